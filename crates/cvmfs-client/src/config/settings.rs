//! The configuration with types, ready for the other modules.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Config, ConfigError, Selection, Setting, authorization_settings, revision_settings};
use crate::authz::AuthorizationSettings;

/// Bytes of the unit of `CVMFS_QUOTA_LIMIT`.
const MEGABYTE: u64 = 1024 * 1024;

/// What the client needs to know about one repository, with types and defaults (client behaviour §2).
///
/// Where the C++ client's built-in default and the one in its distributed `default.conf` differ, the latter holds:
/// it is what its users have, and an installation of one file has no `default.conf`. `CVMFS_CLAIM_OWNERSHIP` is the
/// exception and off: with it the owners in container images would be lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientSettings {
    /// The repository's name.
    pub fqrn: String,
    /// Base URLs of the hosts without a slash at the end, in order of preference; at least one.
    pub servers: Vec<String>,
    /// Groups of proxies in order of preference, as written in the configuration, `DIRECT` kept; at least one.
    pub proxies: Vec<Vec<Proxy>>,
    /// Files with public master keys; at least one.
    pub public_keys: Vec<PathBuf>,
    /// Blacklist files; they need not exist.
    pub blacklists: Vec<PathBuf>,
    /// The directory below which caches lie.
    pub cache_base: PathBuf,
    /// The cache directory of this repository.
    pub cache_directory: PathBuf,
    /// Most bytes in the cache; `u64::MAX` is unlimited.
    pub cache_limit: u64,
    /// Time to connect through a proxy, and window of the low-speed limit.
    pub timeout: Duration,
    /// The same without a proxy.
    pub timeout_direct: Duration,
    /// A transfer below this many bytes per second during the time-out is given up.
    pub low_speed_limit: u64,
    /// Repetitions of a failed transfer from the same URL.
    pub max_retries: u32,
    /// Longest first pause before a repetition.
    pub backoff_init: Duration,
    /// Longest pause before a repetition.
    pub backoff_max: Duration,
    /// Time after which the first proxy group is tried again; zero: never.
    pub proxy_reset_after: Duration,
    /// Time after which the first host is tried again; zero: never.
    pub host_reset_after: Duration,
    /// Whether redirects are followed.
    pub follow_redirects: bool,
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

/// One way out to the servers.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Proxy {
    /// Without a proxy.
    Direct,
    /// Through the proxy with this URL.
    Url(String),
}

impl Proxy {
    /// The proxy's URL without user name and password, or `DIRECT`; fit for logs.
    pub fn display(&self) -> String {
        let Self::Url(url) = self else { return "DIRECT".to_owned() };
        match url.split_once("://") {
            Some((scheme, rest)) => {
                let address = rest.rsplit_once('@').map_or(rest, |(_, address)| address);
                format!("{scheme}://{address}")
            }
            None => url.clone(),
        }
    }
}

impl ClientSettings {
    /// Gives the values of `config` their types.
    ///
    /// # Errors
    /// A parameter that is missing or has a wrong value, with the place to mend it.
    pub fn from(config: &Config) -> Result<Self, ConfigError> {
        let cache_base = path_or(config, "CVMFS_CACHE_BASE", "/var/lib/cvmfs");
        Ok(Self {
            fqrn: config.fqrn().to_owned(),
            servers: servers(config)?,
            proxies: proxies(config)?,
            public_keys: public_keys(config)?,
            blacklists: blacklists(config),
            cache_directory: cache_directory(config, &cache_base)?,
            cache_base,
            cache_limit: cache_limit(config)?,
            timeout: at_least_a_second(config.seconds("CVMFS_TIMEOUT", 5)?),
            timeout_direct: at_least_a_second(config.seconds("CVMFS_TIMEOUT_DIRECT", 10)?),
            low_speed_limit: config.number("CVMFS_LOW_SPEED_LIMIT", 1024)?.max(0).unsigned_abs(),
            max_retries: u32::try_from(config.number("CVMFS_MAX_RETRIES", 1)?.clamp(0, 100)).unwrap_or(1),
            backoff_init: config.seconds("CVMFS_BACKOFF_INIT", 2)?,
            backoff_max: config.seconds("CVMFS_BACKOFF_MAX", 10)?,
            proxy_reset_after: config.seconds("CVMFS_PROXY_RESET_AFTER", 300)?,
            host_reset_after: config.seconds("CVMFS_HOST_RESET_AFTER", 1800)?,
            follow_redirects: config.switch("CVMFS_FOLLOW_REDIRECTS", false)?,
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

/// A time-out of zero would fail every request.
fn at_least_a_second(timeout: Duration) -> Duration {
    timeout.max(Duration::from_secs(1))
}

fn set<'a>(config: &'a Config, name: &str) -> Option<&'a Setting> {
    config.get(name).filter(|setting| !setting.value.is_empty())
}

fn path_or(config: &Config, name: &str, default: &str) -> PathBuf {
    config.resolve_path(set(config, name).map_or(default, |setting| setting.value.as_str()))
}

/// Where a parameter that is missing would be set.
fn missing(config: &Config, parameter: &'static str, for_all: bool) -> ConfigError {
    let directory = config.directory().display();
    let fqrn = config.fqrn();
    let advice = if for_all {
        format!("{directory}/default.local")
    } else {
        format!("{directory}/config.d/{fqrn}.conf or {directory}/domain.d/{}.conf", super::name::domain(fqrn))
    };
    ConfigError::Missing { parameter, fqrn: fqrn.to_owned(), advice }
}

fn servers(config: &Config) -> Result<Vec<String>, ConfigError> {
    const NAME: &str = "CVMFS_SERVER_URL";
    let setting = set(config, NAME).ok_or_else(|| missing(config, NAME, false))?;
    let mut servers = Vec::new();
    for server in setting.value.split(';').map(str::trim).filter(|server| !server.is_empty()) {
        if !has_scheme_and_host(server, &["http://", "https://"]) {
            return Err(config.invalid(
                NAME,
                setting,
                "expected URLs with http:// or https:// separated by ';'",
            ));
        }
        servers.push(server.trim_end_matches('/').to_owned());
    }
    let most = config.number("CVMFS_MAX_SERVERS", 0)?;
    if let Ok(most @ 1..) = usize::try_from(most) {
        servers.truncate(most);
    }
    if servers.is_empty() { Err(missing(config, NAME, false)) } else { Ok(servers) }
}

fn has_scheme_and_host(url: &str, schemes: &[&str]) -> bool {
    schemes.iter().any(|scheme| {
        url.strip_prefix(scheme).is_some_and(|rest| {
            !rest.is_empty() && !rest.starts_with('/') && !rest.contains(char::is_whitespace)
        })
    })
}

/// The groups of `CVMFS_HTTP_PROXY`, then those of `CVMFS_FALLBACK_PROXY` (client behaviour §2.3): with a fallback,
/// `DIRECT` counts in neither.
fn proxies(config: &Config) -> Result<Vec<Vec<Proxy>>, ConfigError> {
    const NAME: &str = "CVMFS_HTTP_PROXY";
    let setting = set(config, NAME).ok_or_else(|| missing(config, NAME, true))?;
    let mut groups = proxy_groups(config, NAME, setting)?;
    if let Some(fallback) = set(config, "CVMFS_FALLBACK_PROXY") {
        groups.extend(proxy_groups(config, "CVMFS_FALLBACK_PROXY", fallback)?);
        for group in &mut groups {
            group.retain(|proxy| *proxy != Proxy::Direct);
        }
    }
    groups.retain(|group| !group.is_empty());
    if groups.is_empty() {
        return Err(config.invalid(NAME, setting, "no proxy is left; write DIRECT to go without"));
    }
    Ok(groups)
}

fn proxy_groups(config: &Config, name: &str, setting: &Setting) -> Result<Vec<Vec<Proxy>>, ConfigError> {
    let mut groups = Vec::new();
    for group in setting.value.split(';') {
        let mut proxies = Vec::new();
        for proxy in group.split('|').map(str::trim).filter(|proxy| !proxy.is_empty()) {
            let proxy = match proxy {
                "DIRECT" => Proxy::Direct,
                "auto" => {
                    return Err(config.invalid(
                        name,
                        setting,
                        "proxy discovery ('auto') is not supported yet",
                    ));
                }
                _ if proxy.contains("://") => Proxy::Url(proxy.to_owned()),
                _ => Proxy::Url(format!("http://{proxy}")),
            };
            if let Proxy::Url(url) = &proxy
                && !has_scheme_and_host(url, &["http://", "https://"])
            {
                return Err(config.invalid(
                    name,
                    setting,
                    "expected DIRECT or proxies of the form http://host:port",
                ));
            }
            proxies.push(proxy);
        }
        groups.push(proxies);
    }
    Ok(groups)
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

fn cache_directory(config: &Config, base: &Path) -> Result<PathBuf, ConfigError> {
    if let Some(directory) = set(config, "CVMFS_CACHE_DIR") {
        if set(config, "CVMFS_CACHE_BASE").is_some() {
            let rule = "CVMFS_CACHE_DIR and CVMFS_CACHE_BASE exclude each other";
            return Err(config.invalid("CVMFS_CACHE_DIR", directory, rule));
        }
        return Ok(config.resolve_path(&directory.value));
    }
    let shared = match set(config, "CVMFS_CACHE_SHARED") {
        Some(_) => config.switch("CVMFS_CACHE_SHARED", true)?,
        None => config.switch("CVMFS_SHARED_CACHE", true)?,
    };
    Ok(if shared { base.join("shared") } else { base.join(config.fqrn()) })
}

fn cache_limit(config: &Config) -> Result<u64, ConfigError> {
    let name = match set(config, "CVMFS_CACHE_QUOTA_LIMIT") {
        Some(_) => "CVMFS_CACHE_QUOTA_LIMIT",
        None => "CVMFS_QUOTA_LIMIT",
    };
    let megabytes = config.number(name, 4000)?;
    match (u64::try_from(megabytes), set(config, name)) {
        (Ok(megabytes @ 1..), _) => Ok(megabytes.saturating_mul(MEGABYTE)),
        (_, Some(setting)) if megabytes != -1 => {
            Err(config.invalid(name, setting, "expected a number of megabytes, or -1 for no limit"))
        }
        _ => Ok(u64::MAX),
    }
}

fn max_ttl(config: &Config) -> Result<Option<Duration>, ConfigError> {
    let minutes = config.number("CVMFS_MAX_TTL", 0)?.clamp(0, i64::from(u32::MAX)).unsigned_abs();
    Ok((minutes > 0).then(|| Duration::from_secs(minutes * 60)))
}

fn kcache_timeout(config: &Config) -> Result<Duration, ConfigError> {
    let seconds = config.number("CVMFS_KCACHE_TIMEOUT", 60)?.clamp(0, i64::from(u32::MAX));
    Ok(Duration::from_secs(seconds.unsigned_abs()))
}
