//! The parameters of CernVM-FS and what this client makes of each (client behaviour §2).
//!
//! A site's files are full of parameters; one that is silently without effect costs its administrator a night. So
//! each known name is in this table: honoured, without effect by design, or not supported yet, and a `CVMFS_` name
//! that is not here is reported as unknown.

/// What the client makes of a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Support {
    /// Has the effect that the specification describes.
    Honoured,
    /// Needs no effect here, for the reason given.
    WithoutEffect(&'static str),
    /// Not supported yet.
    NotSupported,
}

use Support::{Honoured, NotSupported, WithoutEffect};

const THREADS: Support = WithoutEffect("threads are sized by the client itself");
const NO_LOADER: Support = WithoutEffect("there is no separate loader process");
const SHELL: Support = WithoutEffect("it is for the conditions in configuration files");
const BOUNDED: Support = WithoutEffect("memory and descriptors are bounded by the client itself");

/// Every parameter of the specification, sorted by name.
#[rustfmt::skip]
const PARAMETERS: &[(&str, Support)] = &[
    ("CVMFS_ALIEN_CACHE", Honoured),
    ("CVMFS_ALT_ROOT_PATH", Honoured),
    ("CVMFS_AUTHZ_HELPER", Honoured),
    ("CVMFS_AUTHZ_SEARCH_PATH", Honoured),
    ("CVMFS_AUTO_UPDATE", Honoured),
    ("CVMFS_BACKOFF_INIT", Honoured),
    ("CVMFS_BACKOFF_MAX", Honoured),
    ("CVMFS_BASE_ENV", SHELL),
    ("CVMFS_BLACKLIST", Honoured),
    ("CVMFS_CACHE_ALIEN", Honoured),
    ("CVMFS_CACHE_BASE", Honoured),
    ("CVMFS_CACHE_DIR", Honoured),
    ("CVMFS_CACHE_PRIMARY", Honoured),
    ("CVMFS_CACHE_QUOTA_LIMIT", Honoured),
    ("CVMFS_CACHE_REFCOUNT", WithoutEffect("opens of one object share its file by FUSE passthrough")),
    ("CVMFS_CACHE_SERVER_MODE", NotSupported),
    ("CVMFS_CACHE_SHARED", Honoured),
    ("CVMFS_CACHE_SYMLINKS", Honoured),
    ("CVMFS_CACHE_WORKSPACE", NotSupported),
    ("CVMFS_CATALOG_WATERMARK", BOUNDED),
    ("CVMFS_CHECK_PERMISSIONS", Honoured),
    ("CVMFS_CLAIM_OWNERSHIP", Honoured),
    ("CVMFS_CLIENT_PROFILE", SHELL),
    ("CVMFS_CONFIG_REPOSITORY", Honoured),
    ("CVMFS_CONFIG_REPO_DEFAULT_ENV", SHELL),
    ("CVMFS_CONFIG_REPO_REQUIRED", Honoured),
    ("CVMFS_CPU_AFFINITY", Honoured),
    ("CVMFS_DEADLINE", Honoured),
    ("CVMFS_DEBUGLOG", Honoured),
    ("CVMFS_DEFAULT_DOMAIN", Honoured),
    ("CVMFS_DNS_MAX_TTL", Honoured),
    ("CVMFS_DNS_MIN_TTL", Honoured),
    ("CVMFS_DNS_RETRIES", Honoured),
    ("CVMFS_DNS_ROAMING", Honoured),
    ("CVMFS_DNS_SERVER", Honoured),
    ("CVMFS_DNS_TIMEOUT", Honoured),
    ("CVMFS_ENFORCE_ACLS", Honoured),
    ("CVMFS_EXTERNAL_FALLBACK_PROXY", Honoured),
    ("CVMFS_EXTERNAL_HTTP_PROXY", Honoured),
    ("CVMFS_EXTERNAL_MAX_SERVERS", Honoured),
    ("CVMFS_EXTERNAL_TIMEOUT", Honoured),
    ("CVMFS_EXTERNAL_TIMEOUT_DIRECT", Honoured),
    ("CVMFS_EXTERNAL_URL", Honoured),
    ("CVMFS_FAILOVER_INDEFINITELY", Honoured),
    ("CVMFS_FALLBACK_PROXY", Honoured),
    ("CVMFS_FILES_AHEAD", Honoured),
    ("CVMFS_FOLLOW_REDIRECTS", Honoured),
    ("CVMFS_FQRN", Honoured),
    ("CVMFS_FUSE3_IDLE_THREADS", THREADS),
    ("CVMFS_FUSE3_MAX_THREADS", THREADS),
    ("CVMFS_FUSE_IDMAP", Honoured),
    ("CVMFS_FUSE_NOTIFY_INVALIDATION", WithoutEffect("kernel caches are always invalidated actively")),
    ("CVMFS_FUSE_PROFILE", Honoured),
    ("CVMFS_GID_MAP", Honoured),
    ("CVMFS_HIDE_MAGIC_XATTRS", Honoured),
    ("CVMFS_HOST_RESET_AFTER", Honoured),
    ("CVMFS_HTTP_PROXY", Honoured),
    ("CVMFS_HTTP_TRACING", Honoured),
    ("CVMFS_HTTP_TRACING_HEADERS", Honoured),
    ("CVMFS_IGNORE_SIGNATURE", WithoutEffect("signatures are always verified")),
    ("CVMFS_INFLUX_EXTRA_FIELDS", Honoured),
    ("CVMFS_INFLUX_EXTRA_TAGS", Honoured),
    ("CVMFS_INFLUX_HOST", Honoured),
    ("CVMFS_INFLUX_METRIC_NAME", Honoured),
    ("CVMFS_INFLUX_PORT", Honoured),
    ("CVMFS_INITIAL_GENERATION", WithoutEffect("inode numbers follow from path and content and are never used again")),
    ("CVMFS_INSTRUMENT_FUSE", Honoured),
    ("CVMFS_IPFAMILY_PREFER", Honoured),
    ("CVMFS_IPV4_ONLY", Honoured),
    ("CVMFS_KCACHE_TIMEOUT", Honoured),
    ("CVMFS_KEYS_DIR", Honoured),
    ("CVMFS_LOW_SPEED_LIMIT", Honoured),
    ("CVMFS_MAGIC_XATTRS_VISIBILITY", Honoured),
    ("CVMFS_MAX_IPADDR_PER_PROXY", Honoured),
    ("CVMFS_MAX_RETRIES", Honoured),
    ("CVMFS_MAX_SERVERS", Honoured),
    ("CVMFS_MAX_TTL", Honoured),
    ("CVMFS_MEMCACHE_SIZE", BOUNDED),
    ("CVMFS_METRICS_LISTEN", Honoured),
    ("CVMFS_MOUNT_DIR", Honoured),
    ("CVMFS_MOUNT_RW", Honoured),
    ("CVMFS_NFILES", Honoured),
    ("CVMFS_NFS_INTERLEAVED_INODES", NotSupported),
    ("CVMFS_NFS_SHARED", NotSupported),
    ("CVMFS_NFS_SOURCE", NotSupported),
    ("CVMFS_NOTIFICATION_SERVER", NotSupported),
    ("CVMFS_OOM_SCORE_ADJ", Honoured),
    ("CVMFS_PAC_URLS", Honoured),
    ("CVMFS_PROXY_RESET_AFTER", Honoured),
    ("CVMFS_PROXY_SHARD", Honoured),
    ("CVMFS_PROXY_SHARDING_POLICY", NotSupported),
    ("CVMFS_PROXY_TEMPLATE", Honoured),
    ("CVMFS_PUBLIC_KEY", Honoured),
    ("CVMFS_QUOTA_LIMIT", Honoured),
    ("CVMFS_RELOAD_SOCKETS", NO_LOADER),
    ("CVMFS_REPOSITORIES", Honoured),
    ("CVMFS_REPOSITORY_DATE", Honoured),
    ("CVMFS_REPOSITORY_TAG", Honoured),
    ("CVMFS_ROOT_HASH", Honoured),
    ("CVMFS_SEND_INFO_HEADER", Honoured),
    ("CVMFS_SERVER_CACHE_MODE", NotSupported),
    ("CVMFS_SERVER_URL", Honoured),
    ("CVMFS_SHARED_CACHE", Honoured),
    ("CVMFS_STATFS_CACHE_TIMEOUT", Honoured),
    ("CVMFS_STREAMING_CACHE", Honoured),
    ("CVMFS_STRICT_MOUNT", Honoured),
    ("CVMFS_SUID", Honoured),
    ("CVMFS_SYSLOG_FACILITY", Honoured),
    ("CVMFS_SYSLOG_LEVEL", Honoured),
    ("CVMFS_SYSLOG_PREFIX", Honoured),
    ("CVMFS_SYSTEMD_NOKILL", Honoured),
    ("CVMFS_TALK_OWNER", Honoured),
    ("CVMFS_TALK_SOCKET", Honoured),
    ("CVMFS_TELEMETRY_RATE", Honoured),
    ("CVMFS_TELEMETRY_SEND", Honoured),
    ("CVMFS_TIMEOUT", Honoured),
    ("CVMFS_TIMEOUT_DIRECT", Honoured),
    ("CVMFS_TRACEBUFFER", NotSupported),
    ("CVMFS_TRACEBUFFER_THRESHOLD", NotSupported),
    ("CVMFS_TRACEFILE", NotSupported),
("CVMFS_TRUSTED_CERTS", Honoured),
    ("CVMFS_UID_MAP", Honoured),
    ("CVMFS_USER", NotSupported),
    ("CVMFS_USE_CDN", SHELL),
    ("CVMFS_USE_GEOAPI", Honoured),
    ("CVMFS_USE_OPENHTC", SHELL),
    ("CVMFS_USE_SSL_SYSTEM_CA", Honoured),
    ("CVMFS_USYSLOG", Honoured),
    ("CVMFS_WORKSPACE", Honoured),
    ("CVMFS_WORLD_READABLE", Honoured),
    ("CVMFS_XATTR_PRIVILEGED_GIDS", Honoured),
    ("CVMFS_XATTR_PROTECTED_XATTRS", Honoured),
];

/// What the client makes of the parameter `name`; `None` if the specification does not know it.
///
/// Parameters of a named cache instance (`CVMFS_CACHE_<instance>_<property>`) are known and not supported; what an
/// authorisation helper makes of its own (`CVMFS_AUTHZ_<name>`) is up to it.
pub fn support(name: &str) -> Option<Support> {
    match PARAMETERS.binary_search_by(|(known, _)| (*known).cmp(name)) {
        Ok(index) => PARAMETERS.get(index).map(|(_, support)| *support),
        Err(_) if name.starts_with("CVMFS_AUTHZ_") => Some(Honoured),
        Err(_) => instance_parameter(name),
    }
}

/// The known parameter closest to a misspelt `name`, if one is close.
pub fn closest(name: &str) -> Option<&'static str> {
    /// More differences than this are another word, not a slip.
    const SLIPS: usize = 2;
    PARAMETERS
        .iter()
        .map(|(known, _)| (distance(known, name), *known))
        .min()
        .filter(|(differences, _)| *differences <= SLIPS)
        .map(|(_, known)| known)
}

fn instance_parameter(name: &str) -> Option<Support> {
    const PROPERTIES: [(&str, Support); 16] = [
        ("LOWER_READONLY", Honoured),
        ("QUOTA_LIMIT", Honoured),
        ("SERVER_MODE", NotSupported),
        ("WORKSPACE", NotSupported),
        ("REFCOUNT", WithoutEffect("opens of one object share its file by FUSE passthrough")),
        ("LOCATOR", NotSupported),
        ("CMDLINE", NotSupported),
        ("SHARED", Honoured),
        ("MALLOC", WithoutEffect("memory is managed by the client itself")),
        ("ALIEN", Honoured),
        ("UPPER", Honoured),
        ("LOWER", Honoured),
        ("TYPE", Honoured),
        ("BASE", Honoured),
        ("SIZE", Honoured),
        ("DIR", Honoured),
    ];
    let rest = name.strip_prefix("CVMFS_CACHE_")?;
    let is_named = |property: &str| {
        rest.strip_suffix(property)
            .and_then(|rest| rest.strip_suffix('_'))
            .is_some_and(|instance| !instance.is_empty())
    };
    PROPERTIES.iter().find(|(property, _)| is_named(property)).map(|(_, support)| *support)
}

/// Number of single letter changes between two names (Levenshtein).
fn distance(left: &str, right: &str) -> usize {
    /// Names longer than any parameter are no slip; it also bounds the work.
    const LONGEST: usize = 64;
    if left.len() > LONGEST || right.len() > LONGEST {
        return usize::MAX;
    }
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (index, a) in left.bytes().enumerate() {
        let mut diagonal = index;
        let mut before = index + 1;
        for (cell, b) in row.iter_mut().skip(1).zip(right.bytes()) {
            let above = *cell;
            before = (diagonal + usize::from(a != b)).min(above + 1).min(before + 1);
            diagonal = above;
            *cell = before;
        }
        if let Some(first) = row.first_mut() {
            *first = index + 1;
        }
    }
    row.last().copied().unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_so_that_every_name_is_found() {
        assert!(PARAMETERS.is_sorted_by(|(a, _), (b, _)| a < b));
        for (name, expected) in PARAMETERS {
            assert_eq!(support(name), Some(*expected));
        }
    }

    #[test]
    fn a_misspelt_name_is_unknown_and_the_right_one_is_proposed() {
        assert_eq!(support("CVMFS_HTTP_PROXYY"), None);
        assert_eq!(closest("CVMFS_HTTP_PROXYY"), Some("CVMFS_HTTP_PROXY"));
        assert_eq!(closest("CVMFS_SERVERURL"), Some("CVMFS_SERVER_URL"));
        assert_eq!(closest("CVMFS_SOMETHING_ELSE"), None);
        assert_eq!(closest(&"CVMFS_".repeat(1000)), None);
    }

    #[test]
    fn parameters_of_a_named_cache_instance_are_known() {
        assert_eq!(support("CVMFS_CACHE_hpc_TYPE"), Some(Honoured));
        assert_eq!(support("CVMFS_CACHE_hpc_LOWER_READONLY"), Some(Honoured));
        assert_eq!(support("CVMFS_CACHE_hpc_LOCATOR"), Some(NotSupported));
        assert_eq!(support("CVMFS_CACHE_hpc_TYP"), None);
    }
}
