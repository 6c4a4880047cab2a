//! `storage-opts` of the engine (graph driver plugin §10).

use std::collections::BTreeMap;
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

/// What of the client's configuration the engine's options set; `None`: what the configuration says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ClientParameters {
    /// `cvmfs.quota`: limit of the cache in MB.
    pub quota: Option<u64>,
    /// `cvmfs.deadline`: seconds that a container waits for a file before it gets an error.
    pub deadline: Option<u64>,
    /// `cvmfs.timeout`: seconds that a silent server is waited for.
    pub timeout: Option<u64>,
    /// `cvmfs.profile`: how files are read.
    pub profile: Option<&'static str>,
}

/// Bounds of `cvmfs.quota` in MB. With less a single large image would push itself out all the time.
const MIN_QUOTA: u64 = 1 << 10;
const MAX_QUOTA: u64 = 1 << 30;
/// Bounds of the size of a container in bytes. With less not even the engine's own files find room.
const MIN_SIZE: u64 = 1 << 20;
const MAX_SIZE: u64 = 1 << 50;
/// Values of `cvmfs.profile`.
const PROFILES: [&str; 4] = ["auto", "passthrough", "no_open", "plain"];

impl ClientParameters {
    /// The parameters of the client's configuration that are set.
    pub fn overrides(&self) -> Vec<(String, String)> {
        let number = |value: Option<u64>| value.map(|value| value.to_string());
        let timeout = number(self.timeout);
        let set = [
            ("CVMFS_QUOTA_LIMIT", number(self.quota)),
            ("CVMFS_DEADLINE", number(self.deadline)),
            ("CVMFS_TIMEOUT", timeout.clone()),
            ("CVMFS_TIMEOUT_DIRECT", timeout),
            ("CVMFS_FUSE_PROFILE", self.profile.map(str::to_owned)),
        ];
        set.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
    }
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
    /// `overlay2.size`: the limit of each container that asks for no other, in bytes.
    pub size: Option<u64>,
    /// `cvmfs.…`.
    pub client: ClientParameters,
}

impl Default for DriverOptions {
    fn default() -> Self {
        Self {
            mount_method: MountMethod::default(),
            commit_fallback: CommitFallback::default(),
            commit_timeout: COMMIT_TIMEOUT,
            size: None,
            client: ClientParameters::default(),
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
         cvmfsCommitFallback=error|diff, cvmfsCommitTimeout=SECONDS, cvmfs.quota=SIZE, cvmfs.deadline=SECONDS, \
         cvmfs.timeout=SECONDS, cvmfs.profile=auto|passthrough|no_open|plain, \
         overlay2.size=SIZE and overlay2.override_kernel_check=true|false"
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
        expected: String,
    },
    /// Something about the plugin's own client, which is not used.
    #[error(
        "storage option {0} has no effect with cvmfsMountMethod=external: the host's client has its own settings"
    )]
    NeedsInternal(String),
    /// A limit on the size of a layer of an image.
    #[error("storage option size is for containers only: layers of images take what they take")]
    SizeOfImage,
}

impl DriverOptions {
    /// Reads the engine's list. Names and values are compared without regard to case, as
    /// the engine's own drivers do.
    ///
    /// # Errors
    /// The first option that is unknown or has a bad value.
    pub fn parse(options: &[String]) -> Result<Self, OptionError> {
        let mut parsed = Self::default();
        let mut about_client = None;
        for option in options {
            let (key, value) = option.split_once('=').ok_or_else(|| OptionError::NoValue(option.clone()))?;
            let (key, value) = (key.trim(), value.trim());
            let lower = key.to_ascii_lowercase();
            if lower.starts_with("cvmfs.") {
                about_client.get_or_insert(lower.clone());
            }
            match lower.as_str() {
                "cvmfsmountmethod" => parsed.mount_method = value.parse()?,
                "cvmfscommitfallback" => parsed.commit_fallback = value.parse()?,
                "cvmfscommittimeout" => {
                    parsed.commit_timeout =
                        Duration::from_secs(seconds("cvmfsCommitTimeout", value, 86_400)?);
                }
                "cvmfs.quota" => parsed.client.quota = Some(megabytes("cvmfs.quota", value)?),
                "cvmfs.deadline" => parsed.client.deadline = Some(seconds("cvmfs.deadline", value, 30)?),
                "cvmfs.timeout" => parsed.client.timeout = Some(seconds("cvmfs.timeout", value, 3600)?),
                "cvmfs.profile" => parsed.client.profile = Some(profile(value)?),
                "overlay2.override_kernel_check" => check_boolean("overlay2.override_kernel_check", value)?,
                "overlay2.size" => parsed.size = Some(bytes("overlay2.size", value)?),
                _ => return Err(OptionError::Unknown(key.to_owned())),
            }
        }
        match about_client {
            Some(key) if parsed.mount_method == MountMethod::External => Err(OptionError::NeedsInternal(key)),
            _ => Ok(parsed),
        }
    }
}

impl MountMethod {
    /// As the option has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Internal => "internal",
            Self::External => "external",
        }
    }
}

impl FromStr for MountMethod {
    type Err = OptionError;

    fn from_str(value: &str) -> Result<Self, OptionError> {
        match value.to_ascii_lowercase().as_str() {
            "internal" => Ok(Self::Internal),
            "external" => Ok(Self::External),
            _ => Err(bad_value("cvmfsMountMethod", value, "internal or external")),
        }
    }
}

impl FromStr for CommitFallback {
    type Err = OptionError;

    fn from_str(value: &str) -> Result<Self, OptionError> {
        match value.to_ascii_lowercase().as_str() {
            "error" => Ok(Self::Error),
            "diff" => Ok(Self::Diff),
            _ => Err(bad_value("cvmfsCommitFallback", value, "error or diff")),
        }
    }
}

fn seconds(key: &'static str, value: &str, most: u64) -> Result<u64, OptionError> {
    match value.parse() {
        Ok(seconds) if (1..=most).contains(&seconds) => Ok(seconds),
        _ => Err(bad_value(key, value, &format!("a number of seconds from 1 to {most}"))),
    }
}

/// A size as the engine's own options take it, `20G` or `500m`; without a unit MB, as in the client's configuration.
fn megabytes(key: &'static str, value: &str) -> Result<u64, OptionError> {
    let lower = value.to_ascii_lowercase();
    let text = lower.strip_suffix('b').unwrap_or(&lower);
    let (number, unit) = match text.strip_suffix(['m', 'g', 't']) {
        Some(number) if text.ends_with('g') => (number, 1 << 10),
        Some(number) if text.ends_with('t') => (number, 1 << 20),
        Some(number) => (number, 1),
        None => (text, 1),
    };
    let size = number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
    size.filter(|size| (MIN_QUOTA..=MAX_QUOTA).contains(size))
        .ok_or_else(|| bad_value(key, value, "a size from 1G to 1024T, such as 20G"))
}

fn profile(value: &str) -> Result<&'static str, OptionError> {
    let known = PROFILES.into_iter().find(|known| value.eq_ignore_ascii_case(known));
    known.ok_or_else(|| bad_value("cvmfs.profile", value, &PROFILES.join(", ")))
}

fn bad_value(key: &'static str, value: &str, expected: &str) -> OptionError {
    OptionError::BadValue { key, value: value.to_owned(), expected: expected.to_owned() }
}

/// A size in bytes as the engine's own driver takes it: `10G`, `1.5g`, `512MiB`, or a number of bytes.
fn bytes(key: &'static str, value: &str) -> Result<u64, OptionError> {
    let expected = || bad_value(key, value, "a size from 1M to 1024T, such as 20G");
    let lower = value.to_ascii_lowercase();
    let text = lower.strip_suffix("ib").or(lower.strip_suffix('b')).unwrap_or(&lower).trim_end();
    let (number, shift) = match text.strip_suffix(['k', 'm', 'g', 't', 'p']) {
        Some(number) => {
            (number.trim_end(), 10 * (1 + "kmgtp".find(&text[number.len()..]).unwrap_or_default()))
        }
        None => (text, 0),
    };
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    let number: f64 = number.parse().ok().filter(|_| is_number).ok_or_else(expected)?;
    let size = number * (1_u64 << shift) as f64;
    let is_sensible = (MIN_SIZE as f64..=MAX_SIZE as f64).contains(&size);
    if is_sensible { Ok(size as u64) } else { Err(expected()) }
}

/// The limit that a container asks for, from `StorageOpt` of `CreateReadWrite`, in bytes.
///
/// # Errors
/// A size that is none, or another option.
pub fn container_size(options: &BTreeMap<String, String>) -> Result<Option<u64>, OptionError> {
    let mut size = None;
    for (key, value) in options {
        match key.to_ascii_lowercase().as_str() {
            "size" => size = Some(bytes("size", value)?),
            _ => return Err(OptionError::Unknown(key.clone())),
        }
    }
    Ok(size)
}

/// Checks the options of a layer of an image, from `StorageOpt` of `Create`.
///
/// # Errors
/// There is none that an image can have.
pub fn check_image_options(options: &BTreeMap<String, String>) -> Result<(), OptionError> {
    match options.keys().next() {
        None => Ok(()),
        Some(key) if key.eq_ignore_ascii_case("size") => Err(OptionError::SizeOfImage),
        Some(key) => Err(OptionError::Unknown(key.clone())),
    }
}

/// The kernel check is gone from the engine, too; a value that is no boolean was refused
/// and still is. Takes what Go's `ParseBool` takes.
fn check_boolean(key: &'static str, value: &str) -> Result<(), OptionError> {
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" | "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(()),
        _ => Err(bad_value(key, value, "true or false")),
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
            ("overlay2.size=10", "overlay2.size"),
            ("overlay2.size=-1G", "-1G"),
            ("overlay2.size=1e9", "1e9"),
            ("overlay2.size=4096P", "4096P"),
            ("overlay2.size=.", "overlay2.size"),
            ("overlay2.size=G", "overlay2.size"),
            ("cvmfs.quota=1M", "cvmfs.quota"),
            ("cvmfs.quota=99999999999T", "99999999999T"),
            ("cvmfs.quota=all", "all"),
            ("cvmfs.deadline=31", "1 to 30"),
            ("cvmfs.timeout=0", "cvmfs.timeout"),
            ("cvmfs.profile=fast", "passthrough"),
            ("cvmfs.proxy=http://proxy", "cvmfs.quota=SIZE"),
            ("lonely", "lonely"),
        ] {
            assert!(parse(&[option]).unwrap_err().to_string().contains(named), "{option}");
        }
    }

    #[test]
    fn options_of_the_client_become_its_parameters_and_need_it() {
        let options = ["cvmfs.quota=20g", "CVMFS.Deadline=7", "cvmfs.timeout=3", "cvmfs.profile=NO_OPEN"];
        let parsed = parse(&options).unwrap();
        let overrides: Vec<_> =
            parsed.client.overrides().into_iter().map(|(name, value)| format!("{name}={value}")).collect();
        let expected = [
            "CVMFS_QUOTA_LIMIT=20480",
            "CVMFS_DEADLINE=7",
            "CVMFS_TIMEOUT=3",
            "CVMFS_TIMEOUT_DIRECT=3",
            "CVMFS_FUSE_PROFILE=no_open",
        ];
        assert_eq!(overrides, expected);
        assert_eq!(parse(&["cvmfs.quota=4000"]).unwrap().client.quota, Some(4000));
        assert_eq!(parse(&["cvmfs.quota=1TB"]).unwrap().client.quota, Some(1 << 20));
        assert!(parse(&[]).unwrap().client.overrides().is_empty());
        for option in options {
            let refused = parse(&["cvmfsMountMethod=external", option]).unwrap_err();
            assert!(matches!(refused, OptionError::NeedsInternal(_)), "{option}: {refused}");
        }
    }

    #[test]
    fn sizes_are_read_as_the_engine_s_own_driver_reads_them() {
        for (text, size) in [
            ("10G", 10 << 30),
            ("1.5g", 3 << 29),
            ("512MiB", 512 << 20),
            ("2tb", 2 << 40),
            ("1048576", 1 << 20),
            ("4096 k", 4 << 20),
        ] {
            assert_eq!(parse(&[&format!("overlay2.size={text}")]).unwrap().size, Some(size), "{text}");
            let options = BTreeMap::from([("Size".to_owned(), text.to_owned())]);
            assert_eq!(container_size(&options), Ok(Some(size)), "{text}");
        }
    }

    #[test]
    fn an_option_of_a_layer_that_cannot_be_honoured_is_refused() {
        let options = |key: &str| BTreeMap::from([(key.to_owned(), "1G".to_owned())]);
        assert_eq!(check_image_options(&options("size")), Err(OptionError::SizeOfImage));
        assert_eq!(check_image_options(&options("colour")), Err(OptionError::Unknown("colour".to_owned())));
        assert_eq!(container_size(&options("colour")), Err(OptionError::Unknown("colour".to_owned())));
        assert!(check_image_options(&BTreeMap::new()).is_ok());
        assert_eq!(container_size(&BTreeMap::new()), Ok(None));
    }
}
