//! `storage-opts` of the engine (graph driver plugin §10).

use std::str::FromStr;
use std::time::Duration;

/// Who mounts the repositories.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MountMethod {
    /// The plugin itself.
    #[default]
    Internal,
    /// Something on the host, below `<Home>/cvmfs`.
    External,
}

/// What becomes of a commit that cannot be published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CommitFallback {
    /// It fails.
    #[default]
    Error,
    /// It makes an ordinary layer.
    Diff,
}

/// How long a commit waits for the layer service, unless `cvmfsCommitTimeout` says otherwise.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(600);

/// Options of the driver, from `GraphDriver.Init`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DriverOptions {
    /// `cvmfsMountMethod`.
    pub mount_method: MountMethod,
    /// `cvmfsCommitFallback`.
    pub commit_fallback: CommitFallback,
    /// `cvmfsCommitTimeout`.
    pub commit_timeout: Duration,
}

impl Default for DriverOptions {
    fn default() -> Self {
        Self {
            mount_method: MountMethod::default(),
            commit_fallback: CommitFallback::default(),
            commit_timeout: COMMIT_TIMEOUT,
        }
    }
}

/// An option that cannot be honoured.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum OptionError {
    /// Not of the form `KEY=VALUE`.
    #[error("storage option {0:?} is not of the form KEY=VALUE")]
    NoValue(String),
    /// No option of this driver.
    #[error(
        "unknown storage option {0:?}; this driver has cvmfsMountMethod=internal|external, \
         cvmfsCommitFallback=error|diff, cvmfsCommitTimeout=SECONDS and overlay2.override_kernel_check=true|false"
    )]
    Unknown(String),
    /// A value that the option does not take.
    #[error("storage option {key}: {value:?} is not {expected}")]
    BadValue {
        /// The option.
        key: &'static str,
        /// The value given.
        value: String,
        /// What it takes.
        expected: &'static str,
    },
    /// A limit on the size of a container's layer.
    #[error(
        "storage option {0}: limits on the size of a layer are not supported by this driver (they need project \
         quotas on xfs); remove the option"
    )]
    SizeUnsupported(&'static str),
}

impl DriverOptions {
    /// Reads the engine's list. Names and values are compared without regard to case, as
    /// the engine's own drivers do.
    ///
    /// # Errors
    /// The first option that is unknown or has a bad value.
    pub fn parse(options: &[String]) -> Result<Self, OptionError> {
        let mut parsed = Self::default();
        for option in options {
            let (key, value) = option.split_once('=').ok_or_else(|| OptionError::NoValue(option.clone()))?;
            let (key, value) = (key.trim(), value.trim());
            match key.to_ascii_lowercase().as_str() {
                "cvmfsmountmethod" => parsed.mount_method = value.parse()?,
                "cvmfscommitfallback" => parsed.commit_fallback = value.parse()?,
                "cvmfscommittimeout" => parsed.commit_timeout = seconds("cvmfsCommitTimeout", value)?,
                "overlay2.override_kernel_check" => check_boolean("overlay2.override_kernel_check", value)?,
                "overlay2.size" => return Err(OptionError::SizeUnsupported("overlay2.size")),
                _ => return Err(OptionError::Unknown(key.to_owned())),
            }
        }
        Ok(parsed)
    }
}

impl FromStr for MountMethod {
    type Err = OptionError;

    fn from_str(value: &str) -> Result<Self, OptionError> {
        match value.to_ascii_lowercase().as_str() {
            "internal" => Ok(Self::Internal),
            "external" => Ok(Self::External),
            _ => Err(OptionError::BadValue {
                key: "cvmfsMountMethod",
                value: value.to_owned(),
                expected: "internal or external",
            }),
        }
    }
}

impl FromStr for CommitFallback {
    type Err = OptionError;

    fn from_str(value: &str) -> Result<Self, OptionError> {
        match value.to_ascii_lowercase().as_str() {
            "error" => Ok(Self::Error),
            "diff" => Ok(Self::Diff),
            _ => Err(OptionError::BadValue {
                key: "cvmfsCommitFallback",
                value: value.to_owned(),
                expected: "error or diff",
            }),
        }
    }
}

fn seconds(key: &'static str, value: &str) -> Result<Duration, OptionError> {
    match value.parse() {
        Ok(seconds @ 1..=86_400) => Ok(Duration::from_secs(seconds)),
        _ => Err(OptionError::BadValue {
            key,
            value: value.to_owned(),
            expected: "a number of seconds from 1 to 86400",
        }),
    }
}

/// The options of one layer, from `StorageOpt` of `Create`.
///
/// # Errors
/// There is none that this driver supports.
pub fn check_layer_options<'a>(mut keys: impl Iterator<Item = &'a str>) -> Result<(), OptionError> {
    match keys.next() {
        None => Ok(()),
        Some(key) if key.eq_ignore_ascii_case("size") => Err(OptionError::SizeUnsupported("size")),
        Some(key) => Err(OptionError::Unknown(key.to_owned())),
    }
}

/// The kernel check is gone from the engine, too; a value that is no boolean was refused
/// and still is. Takes what Go's `ParseBool` takes.
fn check_boolean(key: &'static str, value: &str) -> Result<(), OptionError> {
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" | "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(()),
        _ => Err(OptionError::BadValue { key, value: value.to_owned(), expected: "true or false" }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> Result<DriverOptions, OptionError> {
        DriverOptions::parse(&options.iter().map(|&o| o.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn options_are_read_without_regard_to_case() {
        let parsed = parse(&["CVMFSMOUNTMETHOD=External", "overlay2.override_kernel_check=true"]).unwrap();
        assert_eq!(parsed.mount_method, MountMethod::External);
        assert_eq!(parse(&[]).unwrap().mount_method, MountMethod::Internal);
        let parsed = parse(&["cvmfsCommitFallback=diff", "cvmfsCommitTimeout=90"]).unwrap();
        assert_eq!(parsed.commit_fallback, CommitFallback::Diff);
        assert_eq!(parsed.commit_timeout, Duration::from_secs(90));
    }

    #[test]
    fn an_option_that_cannot_be_honoured_is_named() {
        for (option, named) in [
            ("dm.basesize=10G", "dm.basesize"),
            ("cvmfsMountMethod=both", "both"),
            ("cvmfsCommitFallback=maybe", "maybe"),
            ("cvmfsCommitTimeout=0", "cvmfsCommitTimeout"),
            ("cvmfsCommitTimeout=soon", "soon"),
            ("overlay2.override_kernel_check=maybe", "maybe"),
            ("overlay2.size=10G", "overlay2.size"),
            ("lonely", "lonely"),
        ] {
            assert!(parse(&[option]).unwrap_err().to_string().contains(named), "{option}");
        }
    }

    #[test]
    fn a_container_with_a_size_limit_is_refused_rather_than_run_without() {
        assert_eq!(check_layer_options(["size"].into_iter()), Err(OptionError::SizeUnsupported("size")));
        assert!(check_layer_options(["colour"].into_iter()).is_err());
        assert!(check_layer_options([].into_iter()).is_ok());
    }
}
