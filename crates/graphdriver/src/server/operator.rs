//! What operators ask the plugin's socket: `GET /status` (JSON) and `GET /metrics` (Prometheus).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use cvmfs_fuse::metrics::{escaped, head};

use crate::driver::report::{Lazy, Report, RepositoryReport};

/// Calls of the protocol that are counted by name; all others together.
const CALLS: [&str; 16] = [
    "Activate",
    "Init",
    "Capabilities",
    "Create",
    "CreateReadWrite",
    "Remove",
    "Get",
    "Put",
    "Exists",
    "Status",
    "GetMetadata",
    "Cleanup",
    "Changes",
    "DiffSize",
    "Diff",
    "ApplyDiff",
];

/// Calls that were answered since the process started.
#[derive(Debug, Default)]
pub struct CallCounters(Mutex<BTreeMap<&'static str, Calls>>);

#[derive(Debug, Clone, Copy, Default)]
struct Calls {
    answered: u64,
    failed: u64,
    seconds: f64,
}

impl CallCounters {
    /// One more call of this path.
    pub(super) fn note(&self, path: &str, failed: bool, elapsed: Duration) {
        let name = path.rsplit('.').next().unwrap_or_default();
        let name = CALLS.into_iter().find(|known| *known == name).unwrap_or("other");
        let mut counted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let calls = counted.entry(name).or_default();
        calls.answered += 1;
        calls.failed += u64::from(failed);
        calls.seconds += elapsed.as_secs_f64();
    }
}

/// The exposition format, version 0.0.4.
pub(super) fn metrics(report: &Report, calls: &CallCounters) -> String {
    let mut text = String::new();
    let mut family = |name: &str, kind: &str, help: &str, values: &[(String, f64)]| {
        if values.is_empty() {
            return;
        }
        let name = format!("cvmfs_graphdriver_{name}");
        head(&mut text, &name, kind, help);
        for (labels, value) in values {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{name}{labels} {value}");
        }
    };
    let build = vec![(labelled("version", &report.version), 1.0)];
    family("info", "gauge", "Version of the plugin.", &build);
    let count = |kind: &str, lazy: Lazy, mounted: Option<bool>| {
        let layers = report.layers.iter().filter(|layer| layer.kind == kind && layer.lazy == lazy);
        layers.filter(|layer| mounted.is_none_or(|mounted| layer.mounted == mounted)).count() as f64
    };
    let mut layers = Vec::new();
    let mut mounted = Vec::new();
    for kind in ["container", "image"] {
        for (lazy, name) in [(Lazy::All, "all"), (Lazy::Part, "part"), (Lazy::No, "no")] {
            let labels = format!("{{kind=\"{kind}\",lazy=\"{name}\"}}");
            layers.push((labels.clone(), count(kind, lazy, None)));
            mounted.push((labels, count(kind, lazy, Some(true))));
        }
    }
    family(
        "layers",
        "gauge",
        "Containers and thin images, by whether their files are fetched when opened.",
        &layers,
    );
    family("mounted_layers", "gauge", "The same, of those that are mounted.", &mounted);
    family(
        "ordinary_layers",
        "gauge",
        "Layers of normal images.",
        &[(String::new(), report.ordinary_layers as f64)],
    );
    let of_repositories = |value: &dyn Fn(&RepositoryReport) -> Option<f64>| {
        let repositories = report.repositories.iter();
        let samples = repositories.filter_map(|r| Some((labelled("fqrn", &r.fqrn), value(r)?)));
        samples.collect::<Vec<_>>()
    };
    let number = |value: Option<u64>| value.map(|value| value as f64);
    let switch = |value: Option<bool>| value.map(|value| f64::from(u8::from(value)));
    family(
        "repository_up",
        "gauge",
        "Whether the client of a mounted repository answers.",
        &of_repositories(&|r| switch(Some(r.answers))),
    );
    family(
        "repository_online",
        "gauge",
        "Whether its last look for a newer revision reached a server.",
        &of_repositories(&|r| switch(r.online)),
    );
    family("repository_revision", "gauge", "Revision in use.", &of_repositories(&|r| number(r.revision)));
    family(
        "repository_users",
        "gauge",
        "Mounted layers that need it.",
        &of_repositories(&|r| Some(r.users as f64)),
    );
    family(
        "repository_passthrough",
        "gauge",
        "Whether the kernel reads cache files itself.",
        &of_repositories(&|r| switch(r.passthrough)),
    );
    family(
        "repository_fetched_bytes_total",
        "counter",
        "Bytes received.",
        &of_repositories(&|r| number(r.bytes_fetched)),
    );
    family(
        "repository_requests_total",
        "counter",
        "Requests sent.",
        &of_repositories(&|r| number(r.requests)),
    );
    family(
        "cache_used_bytes",
        "gauge",
        "Bytes in the cache that the repositories share.",
        &of_repositories(&|r| number(r.cache_used)),
    );
    family(
        "cache_limit_bytes",
        "gauge",
        "Bytes that this cache may have.",
        &of_repositories(&|r| number(r.cache_limit)),
    );
    let counted = calls.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let of_calls = |value: &dyn Fn(&Calls) -> f64| {
        counted.iter().map(|(name, calls)| (labelled("call", name), value(calls))).collect::<Vec<_>>()
    };
    family("calls_total", "counter", "Calls of the engine.", &of_calls(&|calls| calls.answered as f64));
    family("failed_calls_total", "counter", "Those that failed.", &of_calls(&|calls| calls.failed as f64));
    family("call_seconds_total", "counter", "Time that they took.", &of_calls(&|calls| calls.seconds));
    text
}

fn labelled(name: &str, value: &str) -> String {
    format!("{{{name}=\"{}\"}}", escaped(value))
}
