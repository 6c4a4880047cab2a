//! The configuration of a repository, read as the C++ client reads it (client behaviour §1).
//!
//! [`Config::load`] evaluates the files of a [`ConfigSources`] in the ten-step order of the specification, later
//! ones winning, and remembers where each value was set. [`ClientSettings`] gives the values their types and
//! reports a wrong one with its file and line. The files are data, not shell scripts: see [`syntax`].
//!
//! # Paths in a configuration directory that is not `/etc/cvmfs`
//! Where the directory lies elsewhere (a container engine's plugin sees the host's `/etc/cvmfs` under another
//! name) a parameter's path that begins with `/etc/cvmfs/` means the same file inside that directory, so that the
//! host's files, keys above all, work unchanged.
//!
//! # Environment
//! The process environment neither sets parameters nor is it visible to `$NAME` in a file. Only the few names that
//! the specification gives to it are read there, unless the configuration sets them: `CVMFS_PAC_URLS`, `http_proxy`,
//! `CVMFS_IPV4_ONLY`, `X509_CERT_DIR`, `X509_CERT_BUNDLE`, `CERNVM_UUID`.

mod authorization_settings;
mod cache_settings;
mod files;
mod kernel_settings;
mod name;
mod network_settings;
mod parameters;
mod process_settings;
mod revision_settings;
mod settings;
mod syntax;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use cache_settings::{CacheInstance, CacheSettings, DirectoryInstance};
use files::{MAX_FILE, is_absent, patiently, read_file};
pub use kernel_settings::{IdMap, KernelSettings, Ownership, ProfileChoice, XattrVisibility};
pub use name::{expand_fqrn, validate_fqrn};
pub use network_settings::{
    DiscoverySettings, DnsSettings, NetworkSettings, Proxy, ProxyGroup, ProxyList, TlsSettings,
};
pub(crate) use network_settings::{at_least_a_second, parse_servers, without_credentials};
pub use parameters::{Support, closest, support};
pub use process_settings::ProcessSettings;
pub use revision_settings::Selection;
pub use settings::ClientSettings;

/// Where the host keeps the configuration, and the prefix of paths in it.
const ETC_CVMFS: &str = "/etc/cvmfs";
/// Most files of `default.d`, to bound start-up work.
const MAX_DROP_INS: usize = 1024;
/// Most notices kept; a file full of rubbish says no more with its ten thousandth line.
const MAX_NOTICES: usize = 1000;

/// Where the configuration comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigSources {
    /// The directory with `default.conf`, `config.d` and so on.
    pub directory: PathBuf,
    /// Exactly these files, in this order, instead of those of the directory.
    pub files: Option<Vec<PathBuf>>,
    /// Names and values that win over all files (`-o CVMFS_X=value`).
    pub overrides: Vec<(String, String)>,
}

impl Default for ConfigSources {
    fn default() -> Self {
        Self { directory: PathBuf::from(ETC_CVMFS), files: None, overrides: Vec::new() }
    }
}

/// A value and where it was set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// The value, with `@fqrn@` and `@org@` replaced.
    pub value: String,
    /// Where it was set.
    pub origin: Origin,
}

/// The place where a value was set or a notice applies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A line of a file, counted from 1; line 0 is the file as a whole.
    File {
        /// The file.
        path: PathBuf,
        /// The line.
        line: u32,
    },
    /// An option of the command.
    Override,
    /// The client's own default.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, line: 0 } => write!(formatter, "{}", path.display()),
            Self::File { path, line } => write!(formatter, "{}:{line}", path.display()),
            Self::Override => formatter.write_str("command line"),
            Self::Default => formatter.write_str("default"),
        }
    }
}

/// Something an administrator should know about the configuration although it does not prevent a mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// Where.
    pub origin: Origin,
    /// What kind of notice.
    pub kind: NoticeKind,
    /// What is the matter, and what to do.
    pub message: String,
}

/// The kinds of [`Notice`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoticeKind {
    /// A `CVMFS_` name that no specification knows.
    UnknownParameter,
    /// A parameter that this client does not support.
    NotSupported,
    /// Shell syntax that was not executed.
    NotExecuted,
    /// A name that one file sets twice.
    Duplicate,
    /// The configuration repository was not read.
    ConfigRepository,
}

impl fmt::Display for Notice {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.origin, self.message)
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not a repository name.
    #[error("'{name}' is not a repository name: {rule}")]
    InvalidName {
        /// The name, cut to 255 letters.
        name: String,
        /// The rule it breaks.
        rule: &'static str,
    },
    /// A file exists but cannot be read.
    #[error("cannot read configuration file {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is larger than any sensible configuration.
    #[error("configuration file {} is larger than {MAX_FILE} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The configuration repository is required and not there.
    #[error(
        "configuration repository {repository} is not available at {} and CVMFS_CONFIG_REPO_REQUIRED is set",
        path.display()
    )]
    ConfigRepository {
        /// Its name.
        repository: String,
        /// Where it should be mounted.
        path: PathBuf,
    },
    /// A parameter without which the repository cannot be mounted.
    #[error("{parameter} is not set for repository {fqrn}: set it in {advice}")]
    Missing {
        /// The parameter.
        parameter: &'static str,
        /// The repository.
        fqrn: String,
        /// The files where it could be set.
        advice: String,
    },
    /// A value that has the wrong form.
    #[error("{origin}: {parameter}={value}: {rule}")]
    InvalidValue {
        /// The parameter.
        parameter: String,
        /// Its value.
        value: String,
        /// Where it was set.
        origin: Origin,
        /// What is expected.
        rule: String,
    },
    /// No public master key was found.
    #[error(
        "no public key for repository {fqrn} in {} ({origin}): copy the repository's master key there as {fqrn}.pub",
        directory.display()
    )]
    NoKeys {
        /// The repository.
        fqrn: String,
        /// Where keys were looked for.
        directory: PathBuf,
        /// Where that directory was configured.
        origin: Origin,
    },
}

/// The effective configuration of one repository.
#[derive(Debug, Clone)]
pub struct Config {
    fqrn: String,
    directory: PathBuf,
    values: BTreeMap<String, Setting>,
    notices: Vec<Notice>,
    /// Set while files must not change `CVMFS_CONFIG_REPOSITORY` any more.
    config_repository_frozen: bool,
    /// Files read by `.` so far.
    includes: usize,
}

impl Config {
    /// Reads the configuration of the repository `fqrn`.
    ///
    /// # Errors
    /// An invalid name, a file that exists but cannot be read or is too large, a missing file that was asked for
    /// by name, or a required configuration repository that is not there.
    pub fn load(fqrn: &str, sources: &ConfigSources) -> Result<Self, ConfigError> {
        validate_fqrn(fqrn)?;
        let mut config = Self::empty(fqrn, sources);
        match &sources.files {
            Some(files) => {
                for file in files {
                    let text = read_file(file)?;
                    config.evaluate(file, &text);
                }
            }
            None => config.load_directory(sources)?,
        }
        config.apply_overrides(sources);
        config.notice_parameters();
        Ok(config)
    }

    /// Reads only what does not depend on a repository and returns `CVMFS_DEFAULT_DOMAIN`, with which the mount
    /// helper completes short names.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn default_domain(sources: &ConfigSources) -> Result<Option<String>, ConfigError> {
        let mut config = Self::empty("", sources);
        match &sources.files {
            Some(files) => {
                for file in files {
                    let text = read_file(file)?;
                    config.evaluate(file, &text);
                }
            }
            None => {
                config.load_defaults(&sources.directory)?;
                config.load_optional(&sources.directory.join("default.local"))?;
            }
        }
        config.apply_overrides(sources);
        Ok(config.get("CVMFS_DEFAULT_DOMAIN").map(|setting| setting.value.clone()))
    }

    /// The directory in which the configuration repository of `fqrn` keeps its files; `None` without such a
    /// repository, and for itself. Does not touch that directory.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn configuration_repository(
        fqrn: &str,
        sources: &ConfigSources,
    ) -> Result<Option<PathBuf>, ConfigError> {
        if sources.files.is_some() {
            return Ok(None);
        }
        let mut config = Self::empty(fqrn, sources);
        config.load_defaults(&sources.directory)?;
        config.apply_overrides(sources);
        Ok(config.shared_directory()?.map(|(_, directory)| directory))
    }

    /// The repository's name.
    pub fn fqrn(&self) -> &str {
        &self.fqrn
    }

    /// The configuration directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The value of the parameter `name` and where it was set.
    pub fn get(&self, name: &str) -> Option<&Setting> {
        self.values.get(name)
    }

    /// All values by name; variant symlinks are expanded from them.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Setting)> {
        self.values.iter().map(|(name, setting)| (name.as_str(), setting))
    }

    /// What an administrator should know, in the order of reading.
    pub fn notices(&self) -> &[Notice] {
        &self.notices
    }

    /// A switch: `YES`, `ON`, `1`, `TRUE` in any case are on, `NO`, `OFF`, `0`, `FALSE` and nothing are off.
    ///
    /// # Errors
    /// Any other value, with its origin.
    pub fn switch(&self, name: &str, default: bool) -> Result<bool, ConfigError> {
        let Some(setting) = self.get(name) else { return Ok(default) };
        match setting.value.to_ascii_uppercase().as_str() {
            "YES" | "ON" | "1" | "TRUE" => Ok(true),
            "NO" | "OFF" | "0" | "FALSE" | "" => Ok(false),
            _ => Err(self.invalid(name, setting, "expected yes or no")),
        }
    }

    /// A whole number; unset and empty mean `default`.
    ///
    /// # Errors
    /// Anything else, with its origin. The C++ client reads `4GB` as 4; here that is an error.
    pub fn number(&self, name: &str, default: i64) -> Result<i64, ConfigError> {
        match self.get(name) {
            Some(setting) if !setting.value.is_empty() => setting
                .value
                .parse()
                .map_err(|_| self.invalid(name, setting, "expected a whole number without unit")),
            _ => Ok(default),
        }
    }

    /// A number of seconds, not negative; unset and empty mean `default`.
    ///
    /// # Errors
    /// Anything else, with its origin.
    pub fn seconds(&self, name: &str, default: u64) -> Result<Duration, ConfigError> {
        match self.get(name) {
            Some(setting) if !setting.value.is_empty() => {
                let seconds = setting.value.parse::<u32>();
                seconds.map(|seconds| Duration::from_secs(seconds.into())).map_err(|_| {
                    self.invalid(name, setting, "expected a whole number of seconds without unit")
                })
            }
            _ => Ok(Duration::from_secs(default)),
        }
    }

    /// The file that a path in a parameter means; see the module's rule on directories other than `/etc/cvmfs`.
    pub fn resolve_path(&self, path: &str) -> PathBuf {
        let path = Path::new(path);
        match path.strip_prefix(ETC_CVMFS) {
            Ok(inside) if self.directory != Path::new(ETC_CVMFS) => self.directory.join(inside),
            _ => path.to_owned(),
        }
    }

    /// The error for a value of the wrong form: `rule` says what is expected.
    pub fn invalid(&self, name: &str, setting: &Setting, rule: &str) -> ConfigError {
        ConfigError::InvalidValue {
            parameter: name.to_owned(),
            value: setting.value.clone(),
            origin: setting.origin.clone(),
            rule: rule.to_owned(),
        }
    }

    fn empty(fqrn: &str, sources: &ConfigSources) -> Self {
        let mut values = BTreeMap::new();
        if !fqrn.is_empty() {
            let setting = Setting { value: fqrn.to_owned(), origin: Origin::Default };
            values.insert("CVMFS_FQRN".to_owned(), setting);
        }
        Self {
            fqrn: fqrn.to_owned(),
            directory: sources.directory.clone(),
            values,
            notices: Vec::new(),
            config_repository_frozen: false,
            includes: 0,
        }
    }

    /// The ten steps of client behaviour §1.1.
    fn load_directory(&mut self, sources: &ConfigSources) -> Result<(), ConfigError> {
        let directory = &sources.directory;
        let domain = name::domain(&self.fqrn).to_owned();
        let fqrn = self.fqrn.clone();
        self.load_defaults(directory)?;
        // An option may name the configuration repository too, so it counts before that repository is read.
        for (name, value) in &sources.overrides {
            if name == "CVMFS_CONFIG_REPOSITORY" {
                self.insert(name, value, Origin::Override);
            }
        }
        let shared = self.read_config_repository(&domain)?;
        self.config_repository_frozen = true;
        self.evaluate_shared(&shared.default);
        self.load_optional(&directory.join("default.local"))?;
        self.evaluate_shared(&shared.domain);
        self.load_optional(&directory.join(format!("domain.d/{domain}.conf")))?;
        self.load_optional(&directory.join(format!("domain.d/{domain}.local")))?;
        self.evaluate_shared(&shared.repository);
        self.load_optional(&directory.join(format!("config.d/{fqrn}.conf")))?;
        self.load_optional(&directory.join(format!("config.d/{fqrn}.local")))?;
        self.config_repository_frozen = false;
        Ok(())
    }

    /// Steps 1 and 2: `default.conf` and the drop-ins beside it.
    fn load_defaults(&mut self, directory: &Path) -> Result<(), ConfigError> {
        self.load_optional(&directory.join("default.conf"))?;
        let drop_ins = directory.join("default.d");
        let entries = match std::fs::read_dir(&drop_ins) {
            Ok(entries) => entries,
            Err(error) if is_absent(&error) => return Ok(()),
            Err(source) => return Err(ConfigError::Read { path: drop_ins, source }),
        };
        let mut files: Vec<PathBuf> = entries
            .filter_map(Result::ok)
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "conf"))
            .take(MAX_DROP_INS)
            .collect();
        files.sort();
        for file in files {
            self.load_optional(&file)?;
        }
        Ok(())
    }

    fn load_optional(&mut self, path: &Path) -> Result<(), ConfigError> {
        match read_file(path) {
            Ok(text) => self.evaluate(path, &text),
            Err(ConfigError::Read { source, .. }) if is_absent(&source) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn evaluate_shared(&mut self, file: &Option<(PathBuf, String)>) {
        if let Some((path, text)) = file {
            self.evaluate(path, text);
        }
    }

    fn evaluate(&mut self, path: &Path, text: &str) {
        files::evaluate(self, path, text);
    }

    /// The name of the configuration repository and the directory with its files, if there is one to be read.
    fn shared_directory(&self) -> Result<Option<(Setting, PathBuf)>, ConfigError> {
        let Some(setting) = self.get("CVMFS_CONFIG_REPOSITORY").cloned() else { return Ok(None) };
        if setting.value.is_empty() || setting.value == self.fqrn {
            return Ok(None);
        }
        if validate_fqrn(&setting.value).is_err() {
            return Err(self.invalid("CVMFS_CONFIG_REPOSITORY", &setting, "expected a repository name"));
        }
        let mount_dir = self.get("CVMFS_MOUNT_DIR").map_or("/cvmfs", |setting| setting.value.as_str());
        let directory = Path::new(mount_dir).join(&setting.value).join("etc/cvmfs");
        Ok(Some((setting, directory)))
    }

    /// Reads the three files of the configuration repository. It is another mount: reading it is given a limited
    /// time on a thread of its own, so that a dead mount cannot hang this one.
    fn read_config_repository(&mut self, domain: &str) -> Result<SharedFiles, ConfigError> {
        let Some((setting, directory)) = self.shared_directory()? else { return Ok(SharedFiles::default()) };
        let required = self.switch("CVMFS_CONFIG_REPO_REQUIRED", false)?;
        let (domain, fqrn, inside) = (domain.to_owned(), self.fqrn.clone(), directory.clone());
        match patiently(move || SharedFiles::read(&inside, &domain, &fqrn)).flatten() {
            Some(files) => Ok(files),
            None if required => {
                Err(ConfigError::ConfigRepository { repository: setting.value, path: directory })
            }
            None => {
                let message = format!(
                    "configuration repository {} is not available at {}: its files are skipped",
                    setting.value,
                    directory.display()
                );
                self.notice(setting.origin, NoticeKind::ConfigRepository, message);
                Ok(SharedFiles::default())
            }
        }
    }

    fn apply_overrides(&mut self, sources: &ConfigSources) {
        for (name, value) in &sources.overrides {
            self.insert(name, value, Origin::Override);
        }
    }

    fn insert(&mut self, name: &str, value: &str, origin: Origin) {
        let value = if self.fqrn.is_empty() {
            value.to_owned()
        } else {
            value.replace("@fqrn@", &self.fqrn).replace("@org@", name::organisation(&self.fqrn))
        };
        self.values.insert(name.to_owned(), Setting { value, origin });
    }

    fn notice(&mut self, origin: Origin, kind: NoticeKind, message: String) {
        if self.notices.len() < MAX_NOTICES {
            self.notices.push(Notice { origin, kind, message });
        }
    }

    /// Notices for effective parameters that are unknown or not supported. A parameter that is switched off or
    /// empty asks for nothing and is not mentioned.
    fn notice_parameters(&mut self) {
        let mut found = Vec::new();
        for (name, setting) in &self.values {
            let off =
                matches!(setting.value.to_ascii_lowercase().as_str(), "" | "no" | "off" | "0" | "false");
            let (kind, message) = match parameters::support(name) {
                None if name.starts_with("CVMFS_") => {
                    let hint =
                        closest(name).map_or(String::new(), |known| format!("; did you mean {known}?"));
                    (NoticeKind::UnknownParameter, format!("unknown parameter {name}{hint}"))
                }
                Some(Support::NotSupported) if !off => {
                    (NoticeKind::NotSupported, format!("{name} is not supported yet and has no effect"))
                }
                _ => continue,
            };
            found.push((setting.origin.clone(), kind, message));
        }
        for (origin, kind, message) in found {
            self.notice(origin, kind, message);
        }
    }
}

/// The files of the configuration repository, as far as they exist.
#[derive(Debug, Default)]
struct SharedFiles {
    default: Option<(PathBuf, String)>,
    domain: Option<(PathBuf, String)>,
    repository: Option<(PathBuf, String)>,
}

impl SharedFiles {
    /// `None` if the directory is not there.
    fn read(directory: &Path, domain: &str, fqrn: &str) -> Option<Self> {
        if !directory.is_dir() {
            return None;
        }
        let read = |name: String| {
            let path = directory.join(name);
            read_file(&path).ok().map(|text| (path, text))
        };
        Some(Self {
            default: read("default.conf".to_owned()),
            domain: read(format!("domain.d/{domain}.conf")),
            repository: read(format!("config.d/{fqrn}.conf")),
        })
    }
}

#[cfg(test)]
mod tests;
