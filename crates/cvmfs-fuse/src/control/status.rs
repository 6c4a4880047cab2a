//! The state of a mount as one document: the keys of the command-line contract and what an administrator asks next.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// State of a mount. Keys that are added later have defaults, so that tools and workers of different versions
/// understand each other.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// Name of the repository.
    pub fqrn: String,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// The worker.
    pub pid: u32,
    /// Revision in use.
    pub revision: u64,
    /// Root catalog in use.
    pub root_hash: String,
    /// Whether the last look for a newer revision reached a server.
    pub online: bool,
    /// Server in use.
    pub host: String,
    /// Proxy in use, or `DIRECT`.
    pub proxy: String,
    /// Bytes in the cache.
    pub cache_used: u64,
    /// Bytes the cache may have.
    pub cache_limit: u64,
    /// HTTP requests sent.
    pub requests: u64,
    /// Bytes received.
    pub bytes_fetched: u64,
    /// Objects found in the cache.
    pub cache_hits: u64,
    /// Objects that had to be fetched.
    pub cache_misses: u64,
    /// Small files that were fetched before they were opened.
    pub fetched_ahead: u64,
    /// Whether the kernel reads cache files itself.
    pub passthrough: bool,
    /// What is wrong now, in words.
    pub errors: Vec<String>,
    /// What will be wrong soon or is not as it should be, in words.
    pub warnings: Vec<String>,

    /// How reads are answered: `passthrough`, `no_open` or `plain`.
    pub mode: String,
    /// Why they are answered this way.
    pub mode_reason: String,
    /// Whether whiteout markers are presented as overlayfs understands them.
    pub layer_view: bool,
    /// In a layer view: the content of each layer that was looked into, by the path of its catalog.
    pub layers: BTreeMap<String, LayerStatus>,
    /// Files open now.
    pub open_files: usize,
    /// Attached catalogs.
    pub catalogs: usize,
    /// Requests of the kernel that failed since the start of the worker.
    pub io_errors: u64,
    /// The same by cause.
    pub errors_by_cause: BTreeMap<String, u64>,
    /// Requests of the kernel that wait for the network now.
    pub waiting: usize,
    /// Requests that ended because their callers were interrupted by a signal.
    pub interrupted: u64,
    /// Requests that ended because their deadline had passed, whatever their work was stuck in.
    pub overdue: u64,
    /// Requests that were refused because workers died of them.
    pub refused: u64,
    /// FUSE calls by name, where they are counted.
    pub calls: BTreeMap<String, CallStatus>,

    /// Workers started since the mount; more than one means that some died.
    pub workers: u64,
    /// Workers that replaced one that died.
    pub worker_restarts: u64,
    /// Requests that were answered by another worker than the one that received them.
    pub repeated_requests: u64,
    /// Unix time at which this worker started.
    pub started: i64,
    /// Version of the worker.
    pub version: String,
    /// Bytes of memory that the worker has.
    pub memory: Option<u64>,
    /// Descriptors that the worker has.
    pub descriptors: Option<u64>,
    /// Where its metrics are offered; empty if nowhere.
    pub metrics: String,

    /// Seconds for which a revision is relied on before a look for a newer one.
    pub ttl: u64,
    /// Whether the revision is fixed by the configuration (root hash, tag or date).
    pub fixed: bool,
    /// Unix time at which the whitelist expires, if it was read by this worker.
    pub whitelist_expires: Option<i64>,
    /// Whole days until then; negative afterwards.
    pub whitelist_days: Option<i64>,

    /// All servers in their present order.
    pub hosts: Vec<HostStatus>,
    /// All proxies, group by group.
    pub proxies: Vec<ProxyStatus>,
    /// Attempts that failed.
    pub network_errors: u64,
    /// Changes of proxy or host.
    pub fail_overs: u64,

    /// Where the cache lies.
    pub cache_directory: PathBuf,
    /// Bytes of pinned entries.
    pub cache_pinned: u64,
    /// Files evicted by this worker.
    pub evictions: u64,
    /// Times that room was made in the cache within the last 24 hours.
    pub cleanups: u64,
}

/// How much of a layer had to be fetched since the worker started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LayerStatus {
    /// Bytes of all files of the layer, also in catalogs below, if its catalog was read.
    pub bytes: Option<u64>,
    /// Files that were fetched.
    pub files_fetched: u64,
    /// Plain bytes that were fetched.
    pub bytes_fetched: u64,
}

/// A server as `status` shows it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct HostStatus {
    /// Base URL without credentials.
    pub url: String,
    /// Whether requests go there.
    pub current: bool,
    /// Round-trip time in milliseconds, if it was measured.
    pub round_trip_ms: Option<u64>,
}

/// A proxy as `status` shows it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProxyStatus {
    /// URL without credentials, or `DIRECT`.
    pub url: String,
    /// The name that the address in the URL was resolved from.
    pub name: Option<String>,
    /// Number of its group, from 0.
    pub group: usize,
    /// Whether the group is a fallback.
    pub fallback: bool,
    /// `alive`, `slow`, `burned` (not used until the reset time) or `unknown`.
    pub state: String,
    /// Whether requests take this proxy.
    pub current: bool,
}

/// What is known of one kind of FUSE call.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CallStatus {
    /// Calls answered.
    pub count: u64,
    /// Calls by duration, if they are timed: number `i` counts those of less than 2^i microseconds and not less
    /// than 2^(i-1).
    pub durations: Vec<u64>,
}

impl Status {
    /// Adds what follows from the rest.
    pub(crate) fn conclude(mut self) -> Status {
        self.worker_restarts = self.workers.saturating_sub(1);
        if !self.online {
            self.warnings
                .push("offline: no server could be reached at the last look for a newer revision".into());
        }
        let burned: Vec<_> = self
            .proxies
            .iter()
            .filter(|proxy| proxy.state == "burned")
            .map(|proxy| proxy.url.as_str())
            .collect();
        if !burned.is_empty() {
            self.warnings.push(format!("not used since they failed: {}", burned.join(", ")));
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proxies_that_failed_are_warned_of_by_name() {
        let proxy = |url: &str, state: &str| ProxyStatus {
            url: url.into(),
            state: state.into(),
            ..ProxyStatus::default()
        };
        let proxies = vec![proxy("http://one:1", "alive"), proxy("http://two:2", "burned")];
        let status = Status { online: true, workers: 3, proxies, ..Status::default() }.conclude();
        assert_eq!(status.warnings, ["not used since they failed: http://two:2"]);
        assert_eq!(status.worker_restarts, 2);
        let away = Status::default().conclude();
        assert!(away.warnings[0].starts_with("offline"), "{away:?}");
    }

    #[test]
    fn a_document_of_another_version_is_understood() {
        let status: Status = serde_json::from_str(r#"{"fqrn": "a.b", "revision": 7, "news": true}"#).unwrap();
        assert_eq!((status.fqrn.as_str(), status.revision, status.pid), ("a.b", 7, 0));
    }
}
