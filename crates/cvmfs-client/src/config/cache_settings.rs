//! What the configuration says about the cache (client behaviour §2.4, §11).
//!
//! A site has one cache *instance*, `default`, with parameters of short names, or several named ones of which
//! `CVMFS_CACHE_PRIMARY` names the one to use; a tiered one names two others.

use std::path::{Path, PathBuf};

use super::settings::{path_or, set};
use super::{Config, ConfigError, Setting};

/// Bytes of the unit of `CVMFS_QUOTA_LIMIT`.
const MEGABYTE: u64 = 1024 * 1024;
/// Most caches below each other: a chain is at most this long, which also ends one that names itself.
const MAX_TIERS: usize = 4;
/// The share of the machine's memory that a cache in memory takes, and the least (client behaviour §11).
const MEMORY_PART: u64 = 32;
const LEAST_MEMORY: u64 = 40 * MEGABYTE;

/// The cache of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheSettings {
    /// The instance in use.
    pub primary: CacheInstance,
    /// Whether the content of files is fetched anew at each open instead of being kept.
    pub streaming: bool,
}

/// One cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CacheInstance {
    /// Files in a directory.
    Directory(DirectoryInstance),
    /// Objects in the memory of the process.
    Memory {
        /// Most bytes.
        limit: u64,
        /// A directory for what must outlast the process.
        workspace: PathBuf,
    },
    /// Two caches: what is missing in the upper one is copied from the lower one.
    Tiered {
        /// The cache asked first.
        upper: Box<CacheInstance>,
        /// The cache asked next.
        lower: Box<CacheInstance>,
        /// Whether nothing is stored in the lower one.
        is_lower_read_only: bool,
    },
}

/// A cache of files in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectoryInstance {
    /// The directory.
    pub path: PathBuf,
    /// Most bytes; `u64::MAX` is unlimited.
    pub limit: u64,
    /// Whether the directory is shared with other clients and machines, and managed by the site.
    pub is_alien: bool,
    /// Whether files get their names by link and unlink instead of rename.
    pub by_link: bool,
}

impl DirectoryInstance {
    /// A directory that belongs to this client alone.
    pub fn private(path: PathBuf, limit: u64) -> Self {
        Self { path, limit, is_alien: false, by_link: false }
    }
}

impl CacheInstance {
    /// The directory whose files the kernel is given, and in which what must outlast the process lies.
    pub fn directory(&self) -> &Path {
        match self {
            Self::Directory(instance) => &instance.path,
            Self::Memory { workspace, .. } => workspace,
            Self::Tiered { upper, .. } => upper.directory(),
        }
    }

    /// Most bytes of the cache that is asked first.
    pub fn limit(&self) -> u64 {
        match self {
            Self::Directory(instance) => instance.limit,
            Self::Memory { limit, .. } => *limit,
            Self::Tiered { upper, .. } => upper.limit(),
        }
    }
}

impl CacheSettings {
    pub(super) fn from(config: &Config) -> Result<Self, ConfigError> {
        let primary = set(config, "CVMFS_CACHE_PRIMARY").map_or("default", |setting| setting.value.as_str());
        Ok(Self {
            primary: Reader { config, instance: primary }.instance(0)?,
            streaming: config.switch("CVMFS_STREAMING_CACHE", false)?,
        })
    }
}

/// Reads the parameters of one instance.
struct Reader<'a> {
    config: &'a Config,
    instance: &'a str,
}

impl<'a> Reader<'a> {
    fn instance(&self, depth: usize) -> Result<CacheInstance, ConfigError> {
        let kind = self.parameter("TYPE");
        match kind.as_ref().map_or("posix", |(_, setting)| setting.value.as_str()) {
            "posix" => self.directory().map(CacheInstance::Directory),
            "ram" => Ok(CacheInstance::Memory { limit: self.memory()?, workspace: self.path()? }),
            "tiered" => self.tiered(depth),
            "external" => {
                Err(self
                    .invalid("TYPE", "external cache plugins are not supported; use posix, ram or tiered"))
            }
            _ => Err(self.invalid("TYPE", "expected posix, ram or tiered")),
        }
    }

    fn directory(&self) -> Result<DirectoryInstance, ConfigError> {
        let by_link = self.switch("SERVER_MODE", false)?;
        let limit = self.limit()?;
        if let Some((name, setting)) = self.parameter("ALIEN") {
            // As in the C++ client: whoever configures an alien cache shall know that nobody bounds it.
            let is_shared = self.switch("SHARED", true)?;
            if limit != u64::MAX || is_shared {
                let rule = "an alien cache needs CVMFS_QUOTA_LIMIT=-1 and CVMFS_SHARED_CACHE=no: \
                            it is shared by its directory, and nobody evicts from it";
                return Err(self.config.invalid(&name, setting, rule));
            }
            let path = self.config.resolve_path(&setting.value);
            return Ok(DirectoryInstance { path, limit, is_alien: true, by_link });
        }
        Ok(DirectoryInstance { path: self.path()?, limit, is_alien: false, by_link })
    }

    fn tiered(&self, depth: usize) -> Result<CacheInstance, ConfigError> {
        if depth >= MAX_TIERS {
            return Err(self.invalid("TYPE", "too many caches below each other, or one that contains itself"));
        }
        let tier = |property: &str| {
            let Some((_, setting)) = self.parameter(property) else {
                return Err(self.invalid("TYPE", &format!("a tiered cache needs {}", self.name(property))));
            };
            Reader { config: self.config, instance: &setting.value }.instance(depth + 1).map(Box::new)
        };
        Ok(CacheInstance::Tiered {
            upper: tier("UPPER")?,
            lower: tier("LOWER")?,
            is_lower_read_only: self.switch("LOWER_READONLY", false)?,
        })
    }

    /// The directory of the instance.
    fn path(&self) -> Result<PathBuf, ConfigError> {
        let base = self.parameter("BASE");
        if let Some((name, directory)) = self.parameter("DIR") {
            if base.is_some() {
                let rule = format!("{name} and {} exclude each other", self.name("BASE"));
                return Err(self.config.invalid(&name, directory, &rule));
            }
            return Ok(self.config.resolve_path(&directory.value));
        }
        let base = match base {
            Some((_, setting)) => self.config.resolve_path(&setting.value),
            None => path_or(self.config, "CVMFS_CACHE_BASE", "/var/lib/cvmfs"),
        };
        // Instances of one base must not meet in one directory: their limits differ.
        let base = if self.is_default() { base } else { base.join(self.instance) };
        let is_shared = self.switch("SHARED", true)?;
        Ok(if is_shared { base.join("shared") } else { base.join(self.config.fqrn()) })
    }

    fn limit(&self) -> Result<u64, ConfigError> {
        let Some((name, setting)) = self.parameter("QUOTA_LIMIT") else { return Ok(4000 * MEGABYTE) };
        let megabytes = self.config.number(&name, 4000)?;
        match u64::try_from(megabytes) {
            Ok(megabytes @ 1..) => Ok(megabytes.saturating_mul(MEGABYTE)),
            _ if megabytes == -1 => Ok(u64::MAX),
            _ => {
                Err(self.config.invalid(&name, setting, "expected a number of megabytes, or -1 for no limit"))
            }
        }
    }

    /// `SIZE` in megabytes or as a share of the machine's memory.
    fn memory(&self) -> Result<u64, ConfigError> {
        let machine = crate::cache::memory_limit();
        let Some((name, setting)) = self.parameter("SIZE") else {
            return Ok((machine / MEMORY_PART).max(LEAST_MEMORY));
        };
        let bytes = match setting.value.strip_suffix('%') {
            Some(percent) => percent
                .parse::<u64>()
                .ok()
                .filter(|percent| (1..=100).contains(percent))
                .map(|percent| machine / 100 * percent),
            None => setting.value.parse::<u64>().ok().map(|megabytes| megabytes.saturating_mul(MEGABYTE)),
        };
        let bytes = bytes.filter(|bytes| *bytes > 0).ok_or_else(|| {
            self.config.invalid(&name, setting, "expected megabytes, or a share of the memory such as 5%")
        })?;
        Ok(bytes.max(LEAST_MEMORY))
    }

    fn is_default(&self) -> bool {
        self.instance == "default"
    }

    /// The name of a parameter of this instance (client behaviour §2.4).
    fn name(&self, property: &str) -> String {
        if self.is_default() {
            format!("CVMFS_CACHE_{property}")
        } else {
            format!("CVMFS_CACHE_{}_{property}", self.instance)
        }
    }

    /// The parameter, if it is set; the default instance has older names for some.
    fn parameter(&self, property: &str) -> Option<(String, &'a Setting)> {
        let name = self.name(property);
        if let Some(setting) = set(self.config, &name) {
            return Some((name, setting));
        }
        let older = match property {
            "SHARED" => "CVMFS_SHARED_CACHE",
            "ALIEN" => "CVMFS_ALIEN_CACHE",
            "SERVER_MODE" => "CVMFS_SERVER_CACHE_MODE",
            "QUOTA_LIMIT" => "CVMFS_QUOTA_LIMIT",
            _ => return None,
        };
        let is_known = self.is_default();
        set(self.config, older).filter(|_| is_known).map(|setting| (older.to_owned(), setting))
    }

    fn switch(&self, property: &str, default: bool) -> Result<bool, ConfigError> {
        match self.parameter(property) {
            Some((name, _)) => self.config.switch(&name, default),
            None => Ok(default),
        }
    }

    fn invalid(&self, property: &str, rule: &str) -> ConfigError {
        match self.parameter(property) {
            Some((name, setting)) => self.config.invalid(&name, setting, rule),
            None => {
                let setting = Setting { value: String::new(), origin: super::Origin::Default };
                self.config.invalid(&self.name(property), &setting, rule)
            }
        }
    }
}
