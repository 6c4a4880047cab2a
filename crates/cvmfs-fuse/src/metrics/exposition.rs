//! The Prometheus text format, version 0.0.4.

use std::fmt::Write as _;

use crate::control::{Inspected, Status};

/// The media type of [`render`]'s text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Most servers and proxies of a mount that get series: a configuration of thousands must not flood a monitoring
/// system.
const MAX_PLACES: usize = 64;
/// Most mounts.
const MAX_MOUNTS: usize = 1024;

/// The samples of one family: labels besides those of the mount, and values.
type Samples = Vec<Sample>;
type Sample = (Vec<(&'static str, String)>, f64);

struct Family {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    samples: fn(&Status) -> Samples,
}

fn one(value: f64) -> Samples {
    vec![(Vec::new(), value)]
}

fn maybe(value: Option<f64>) -> Samples {
    value.map_or_else(Vec::new, one)
}

macro_rules! family {
    ($kind:literal $name:literal $help:literal $samples:expr) => {
        Family { name: $name, kind: $kind, help: $help, samples: $samples }
    };
}

/// Everything that is offered of a mount that answers; `docs/operate.md` has the same table.
static FAMILIES: &[Family] = &[
    family!("gauge" "cvmfs_info" "Version of the client and how it answers reads; always 1." |status| {
        let labels = vec![
            ("version", status.version.clone()),
            ("mode", status.mode.clone()),
            ("layer_view", status.layer_view.to_string()),
        ];
        vec![(labels, 1.0)]
    }),
    family!("gauge" "cvmfs_revision" "Revision in use." |status| one(status.revision as f64)),
    family!("gauge" "cvmfs_online" "1 if the last look for a newer revision reached a server." |status| {
        one(f64::from(u8::from(status.online)))
    }),
    family!("gauge" "cvmfs_errors" "Number of things that are wrong now; status tells them in words." |status| {
        one(status.errors.len() as f64)
    }),
    family!("gauge" "cvmfs_warnings" "Number of things that will be wrong soon." |status| {
        one(status.warnings.len() as f64)
    }),
    family!("gauge" "cvmfs_whitelist_expiry_timestamp_seconds" "When the whitelist expires." |status| {
        maybe(status.whitelist_expires.map(|time| time as f64))
    }),
    family!("gauge" "cvmfs_start_time_seconds" "When the worker started." |status| one(status.started as f64)),
    family!("counter" "cvmfs_worker_restarts_total" "Workers that replaced one that died." |status| {
        one(status.worker_restarts as f64)
    }),
    family!("counter" "cvmfs_requests_repeated_total" "Requests that another worker answered than the one that received them." |status| {
        one(status.repeated_requests as f64)
    }),
    family!("gauge" "cvmfs_resident_memory_bytes" "Memory of the worker." |status| maybe(status.memory.map(|n| n as f64))),
    family!("gauge" "cvmfs_open_descriptors" "Descriptors of the worker." |status| {
        maybe(status.descriptors.map(|n| n as f64))
    }),
    family!("gauge" "cvmfs_open_files" "Files of the repository that are open." |status| one(status.open_files as f64)),
    family!("gauge" "cvmfs_attached_catalogs" "Catalogs that are attached." |status| one(status.catalogs as f64)),
    family!("counter" "cvmfs_io_errors_total" "Requests of the kernel that failed, by cause where it is known." io_errors),
    family!("counter" "cvmfs_http_requests_total" "HTTP requests sent." |status| one(status.requests as f64)),
    family!("counter" "cvmfs_http_received_bytes_total" "Bytes of bodies received." |status| one(status.bytes_fetched as f64)),
    family!("counter" "cvmfs_http_failed_attempts_total" "Attempts that failed." |status| one(status.network_errors as f64)),
    family!("counter" "cvmfs_fail_overs_total" "Changes of proxy or host." |status| one(status.fail_overs as f64)),
    family!("gauge" "cvmfs_host_in_use" "1 for the server that requests go to." |status| {
        let hosts = status.hosts.iter().take(MAX_PLACES);
        hosts.map(|host| (vec![("host", host.url.clone())], f64::from(u8::from(host.current)))).collect()
    }),
    family!("gauge" "cvmfs_host_round_trip_seconds" "Round-trip time of a server, where it was measured." |status| {
        let hosts = status.hosts.iter().take(MAX_PLACES);
        hosts
            .filter_map(|host| Some((vec![("host", host.url.clone())], host.round_trip_ms? as f64 / 1000.0)))
            .collect()
    }),
    family!("gauge" "cvmfs_proxy_in_use" "1 for the proxy that requests take." |status| {
        proxies(status, |proxy| (Vec::new(), f64::from(u8::from(proxy.current))))
    }),
    family!("gauge" "cvmfs_proxy_state" "1 for the state a proxy is in: alive, slow, burned." |status| {
        proxies(status, |proxy| (vec![("state", proxy.state.clone())], 1.0))
    }),
    family!("gauge" "cvmfs_cache_used_bytes" "Bytes in the cache, which several mounts may share." |status| {
        one(status.cache_used as f64)
    }),
    family!("gauge" "cvmfs_cache_limit_bytes" "Bytes the cache may have." |status| one(status.cache_limit as f64)),
    family!("gauge" "cvmfs_cache_pinned_bytes" "Bytes of pinned entries." |status| one(status.cache_pinned as f64)),
    family!("gauge" "cvmfs_cache_cleanups_24h" "Times that room was made within the last 24 hours." |status| {
        one(status.cleanups as f64)
    }),
    family!("counter" "cvmfs_cache_hits_total" "Objects found in the cache." |status| one(status.cache_hits as f64)),
    family!("counter" "cvmfs_fetched_ahead_total" "Small files fetched before they were opened." |status| one(status.fetched_ahead as f64)),
    family!("counter" "cvmfs_cache_misses_total" "Objects that had to be fetched." |status| one(status.cache_misses as f64)),
    family!("counter" "cvmfs_cache_evicted_files_total" "Files evicted by this mount." |status| one(status.evictions as f64)),
    family!("counter" "cvmfs_fuse_calls_total" "Calls of the kernel, by name." |status| {
        status.calls.iter().map(|(call, known)| (vec![("call", call.clone())], known.count as f64)).collect()
    }),
];

fn io_errors(status: &Status) -> Samples {
    if status.errors_by_cause.is_empty() {
        return vec![(vec![("cause", "any".into())], status.io_errors as f64)];
    }
    let causes = status.errors_by_cause.iter().take(MAX_PLACES);
    causes.map(|(cause, count)| (vec![("cause", cause.clone())], *count as f64)).collect()
}

fn proxies(status: &Status, sample: fn(&crate::control::ProxyStatus) -> Sample) -> Samples {
    let shown = status.proxies.iter().take(MAX_PLACES);
    shown
        .map(|proxy| {
            let (more, value) = sample(proxy);
            let mut labels = vec![("proxy", proxy.url.clone()), ("group", proxy.group.to_string())];
            labels.extend(more);
            (labels, value)
        })
        .collect()
}

/// The text for these mounts. All samples of a family stand together, as the format demands.
pub fn render(mounts: &[Inspected]) -> String {
    let mounts = mounts.get(..MAX_MOUNTS).unwrap_or(mounts);
    let mut text = String::new();
    let up = mounts.iter().map(|mount| match mount {
        Inspected::Answered(status) => (mount_labels(&status.fqrn, &status.mountpoint), 1),
        Inspected::Silent { record, .. } => {
            (mount_labels(&record.mounted.fqrn, &record.mounted.mountpoint), 0)
        }
    });
    head(&mut text, "cvmfs_up", "gauge", "1 if the mount answers.");
    for (labels, value) in up {
        let _ = writeln!(text, "cvmfs_up{{{labels}}} {value}");
    }
    let answered: Vec<_> = mounts
        .iter()
        .filter_map(|mount| match mount {
            Inspected::Answered(status) => {
                Some((mount_labels(&status.fqrn, &status.mountpoint), status.as_ref()))
            }
            Inspected::Silent { .. } => None,
        })
        .collect();
    for family in FAMILIES {
        let mut has_head = false;
        for (mount, status) in &answered {
            for (labels, value) in (family.samples)(status) {
                if !has_head {
                    head(&mut text, family.name, family.kind, family.help);
                    has_head = true;
                }
                let more: String =
                    labels.iter().map(|(name, value)| format!(",{name}=\"{}\"", escaped(value))).collect();
                let _ = writeln!(text, "{}{{{mount}{more}}} {value}", family.name);
            }
        }
    }
    durations(&mut text, &answered);
    text
}

/// The durations of calls, where they are timed.
fn durations(text: &mut String, mounts: &[(String, &Status)]) {
    const NAME: &str = "cvmfs_fuse_call_duration_seconds";
    let mut has_head = false;
    for (mount, status) in mounts {
        for (call, known) in status.calls.iter().filter(|(_, known)| !known.durations.is_empty()) {
            if !has_head {
                head(text, NAME, "histogram", "Durations of calls, with CVMFS_INSTRUMENT_FUSE=yes.");
                has_head = true;
            }
            let mut below = 0;
            let mut sum = 0.0;
            for (index, count) in known.durations.iter().enumerate() {
                let upper = (1_u64 << index.min(63)) as f64 / 1e6;
                below += count;
                // The middle of the bucket stands for each of its calls.
                sum += *count as f64 * upper * 0.75;
                let _ = writeln!(text, "{NAME}_bucket{{{mount},call=\"{call}\",le=\"{upper}\"}} {below}");
            }
            let _ = writeln!(text, "{NAME}_bucket{{{mount},call=\"{call}\",le=\"+Inf\"}} {below}");
            let _ = writeln!(text, "{NAME}_sum{{{mount},call=\"{call}\"}} {sum}");
            let _ = writeln!(text, "{NAME}_count{{{mount},call=\"{call}\"}} {below}");
        }
    }
}

/// Begins a family of samples.
pub fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn mount_labels(fqrn: &str, mountpoint: &std::path::Path) -> String {
    format!("fqrn=\"{}\",mountpoint=\"{}\"", escaped(fqrn), escaped(&mountpoint.to_string_lossy()))
}

/// A label's value as it stands between quotes.
pub fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashMap, HashSet};

    use super::*;
    use crate::control::{CallStatus, HostStatus, ProxyStatus, Record};

    fn example() -> Vec<Inspected> {
        let status = Status {
            fqrn: "a.example.org".into(),
            mountpoint: "/mnt/with \"quotes\"\n".into(),
            revision: 7,
            requests: 12,
            online: true,
            whitelist_expires: Some(1_800_000_000),
            hosts: vec![HostStatus { url: "http://s/cvmfs".into(), current: true, round_trip_ms: Some(15) }],
            proxies: vec![ProxyStatus {
                url: "http://p:1".into(),
                state: "alive".into(),
                ..ProxyStatus::default()
            }],
            errors_by_cause: BTreeMap::from([("network".into(), 3)]),
            calls: BTreeMap::from([("open".into(), CallStatus { count: 3, durations: vec![1, 2] })]),
            ..Status::default()
        };
        let other = Status { fqrn: "b.example.org".into(), ..status.clone() };
        let mounted = crate::Mounted {
            fqrn: "dead.example.org".into(),
            mountpoint: "/mnt/dead".into(),
            supervisor_pid: 1,
            flags: crate::MountFlags::default(),
            control: "/x".into(),
        };
        let silent = Inspected::Silent {
            record: Record { mounted, alive: false },
            worker: None,
            reason: "gone".into(),
        };
        vec![Inspected::Answered(Box::new(status)), Inspected::Answered(Box::new(other)), silent]
    }

    #[test]
    fn the_text_keeps_the_rules_of_the_format() {
        let text = render(&example());
        let mut kinds = HashMap::new();
        let mut seen = HashSet::new();
        let mut current = "";
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert!(kinds.insert(name, kind).is_none(), "{name} twice");
                current = name;
            } else if !line.starts_with('#') {
                let (series, value) = line.rsplit_once(' ').unwrap();
                value.parse::<f64>().unwrap();
                assert!(seen.insert(series), "{series} twice");
                let name = series.split('{').next().unwrap();
                assert!(
                    name == current
                        || name
                            .strip_prefix(current)
                            .is_some_and(|end| ["_bucket", "_sum", "_count"].contains(&end)),
                    "{line} below {current}"
                );
                if kinds[current] == "counter" {
                    assert!(name.ends_with("_total"), "{name}");
                }
            }
        }
        assert!(
            text.contains(r#"cvmfs_revision{fqrn="a.example.org",mountpoint="/mnt/with \"quotes\"\n"} 7"#),
            "{text}"
        );
        assert!(text.contains("cvmfs_up{fqrn=\"dead.example.org\",mountpoint=\"/mnt/dead\"} 0\n"), "{text}");
        assert!(!text.contains("cvmfs_revision{fqrn=\"dead"), "{text}");
        assert!(text.contains(",cause=\"network\"} 3\n"), "{text}");
    }

    #[test]
    fn every_metric_is_in_the_table_of_the_documentation() {
        let document = include_str!("../../../../docs/operate.md");
        let names =
            FAMILIES.iter().map(|family| family.name).chain(["cvmfs_up", "cvmfs_fuse_call_duration_seconds"]);
        let missing: Vec<_> = names.filter(|name| !document.contains(&format!("`{name}`"))).collect();
        assert!(missing.is_empty(), "{missing:?}");
    }
}
