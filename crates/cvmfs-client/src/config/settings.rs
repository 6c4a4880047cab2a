//! The configuration with types, ready for the other modules.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{
    CacheSettings, Config, ConfigError, NetworkSettings, Selection, Setting, authorization_settings,
    revision_settings,
};
use crate::authz::AuthorizationSettings;

/// What the client needs to know about one repository, with types and defaults (client behaviour §2).
///
/// Where the C++ client's built-in default and the one in its distributed `default.conf` differ, the latter holds:
/// it is what its users have, and an installation of one file has no `default.conf`. `CVMFS_CLAIM_OWNERSHIP` is the
/// exception and off: with it the owners in container images would be lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientSettings {
    /// The repository's name.
    pub fqrn: String,
    /// Servers, proxies and how to use them.
    pub network: NetworkSettings,
    /// The same for external files, if they have servers of their own.
    pub external: Option<NetworkSettings>,
    /// Files with public master keys; at least one.
    pub public_keys: Vec<PathBuf>,
    /// Blacklist files; they need not exist.
    pub blacklists: Vec<PathBuf>,
    /// The cache directory of this repository.
    pub cache_directory: PathBuf,
    /// The cache, of which that is a part.
    pub cache: CacheSettings,
    /// Directories of certificate authorities, for whitelists that demand one.
    pub authorities: Vec<PathBuf>,
    /// Which revision is wanted.
    pub selection: Selection,
    /// Whether the root catalog of a fixed revision is fetched from its alternative path.
    pub alternative_root: bool,
    /// Who decides about access to a protected repository.
    pub authorization: AuthorizationSettings,
    /// Whether newer revisions are followed.
    pub auto_update: bool,
    /// Upper bound of the time for which a revision is relied on.
    pub max_ttl: Option<Duration>,
    /// Time for which the kernel may keep names and attributes.
    pub kcache_timeout: Duration,
    /// Whether all files appear to be owned by the mounting user.
    pub claim_ownership: bool,
    /// Whether set-uid bits are honoured.
    pub suid: bool,
    /// Whether the kernel checks permissions.
    pub check_permissions: bool,
    /// Whether the kernel may keep link targets.
    pub cache_symlinks: bool,
}

impl ClientSettings {
    /// Gives the values of `config` their types.
    ///
    /// # Errors
    /// A parameter that is missing or has a wrong value, with the place to mend it.
    pub fn from(config: &Config) -> Result<Self, ConfigError> {
        let cache = CacheSettings::from(config)?;
        let cache_directory = cache.primary.directory().to_owned();
        let network = NetworkSettings::from(config, &cache_directory, &|name| std::env::var(name).ok())?;
        Ok(Self {
            fqrn: config.fqrn().to_owned(),
            external: network.external(config)?,
            network,
            public_keys: public_keys(config)?,
            blacklists: blacklists(config),
            cache_directory,
            cache,
            authorities: authorities(config),
            selection: revision_settings::selection(config)?,
            alternative_root: config.switch("CVMFS_ALT_ROOT_PATH", false)?,
            authorization: authorization_settings::authorization(config)?,
            auto_update: config.switch("CVMFS_AUTO_UPDATE", true)?,
            max_ttl: max_ttl(config)?,
            kcache_timeout: kcache_timeout(config)?,
            claim_ownership: config.switch("CVMFS_CLAIM_OWNERSHIP", false)?,
            suid: config.switch("CVMFS_SUID", false)?,
            check_permissions: config.switch("CVMFS_CHECK_PERMISSIONS", true)?,
            cache_symlinks: config.switch("CVMFS_CACHE_SYMLINKS", false)?,
        })
    }
}

pub(super) fn set<'a>(config: &'a Config, name: &str) -> Option<&'a Setting> {
    config.get(name).filter(|setting| !setting.value.is_empty())
}

pub(super) fn path_or(config: &Config, name: &str, default: &str) -> PathBuf {
    config.resolve_path(set(config, name).map_or(default, |setting| setting.value.as_str()))
}

/// Where a parameter that is missing would be set.
pub(super) fn missing(config: &Config, parameter: &'static str, for_all: bool) -> ConfigError {
    let directory = config.directory().display();
    let fqrn = config.fqrn();
    let advice = if for_all {
        format!("{directory}/default.local")
    } else {
        format!("{directory}/config.d/{fqrn}.conf or {directory}/domain.d/{}.conf", super::name::domain(fqrn))
    };
    ConfigError::Missing { parameter, fqrn: fqrn.to_owned(), advice }
}

/// `CVMFS_PUBLIC_KEY` wins over `CVMFS_KEYS_DIR` (repository format §6.4).
fn public_keys(config: &Config) -> Result<Vec<PathBuf>, ConfigError> {
    if let Some(setting) = set(config, "CVMFS_PUBLIC_KEY") {
        let files = setting.value.split(':').filter(|file| !file.is_empty());
        return Ok(files.map(|file| config.resolve_path(file)).collect());
    }
    let directory = path_or(config, "CVMFS_KEYS_DIR", "/etc/cvmfs/keys");
    let mut keys: Vec<PathBuf> = std::fs::read_dir(&directory)
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "pub"))
        .collect();
    keys.sort();
    if keys.is_empty() {
        let origin =
            set(config, "CVMFS_KEYS_DIR").map_or(super::Origin::Default, |setting| setting.origin.clone());
        return Err(ConfigError::NoKeys { fqrn: config.fqrn().to_owned(), directory, origin });
    }
    Ok(keys)
}

/// `CVMFS_TRUSTED_CERTS` and `X509_CERT_DIR` are lists separated by ':'.
fn authorities(config: &Config) -> Vec<PathBuf> {
    let given = ["CVMFS_TRUSTED_CERTS", "X509_CERT_DIR"].into_iter().find_map(|name| set(config, name));
    let value = given.map_or("/etc/grid-security/certificates", |setting| setting.value.as_str());
    value.split(':').filter(|path| !path.is_empty()).map(|path| config.resolve_path(path)).collect()
}

/// The local blacklist, and the configuration repository's (repository format §6.3).
fn blacklists(config: &Config) -> Vec<PathBuf> {
    let mut files = vec![path_or(config, "CVMFS_BLACKLIST", "/etc/cvmfs/blacklist")];
    if let Some(repository) = set(config, "CVMFS_CONFIG_REPOSITORY")
        && repository.value != config.fqrn()
    {
        let mount_dir = set(config, "CVMFS_MOUNT_DIR").map_or("/cvmfs", |setting| setting.value.as_str());
        files.push(Path::new(mount_dir).join(&repository.value).join("etc/cvmfs/blacklist"));
    }
    files
}

fn max_ttl(config: &Config) -> Result<Option<Duration>, ConfigError> {
    let minutes = config.number("CVMFS_MAX_TTL", 0)?.clamp(0, i64::from(u32::MAX)).unsigned_abs();
    Ok((minutes > 0).then(|| Duration::from_secs(minutes * 60)))
}

fn kcache_timeout(config: &Config) -> Result<Duration, ConfigError> {
    let seconds = config.number("CVMFS_KCACHE_TIMEOUT", 60)?.clamp(0, i64::from(u32::MAX));
    Ok(Duration::from_secs(seconds.unsigned_abs()))
}
