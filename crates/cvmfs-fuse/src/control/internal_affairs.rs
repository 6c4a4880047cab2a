//! Counters under the names that the C++ client gives them: monitoring tools read them from `internal affairs` and
//! `latency`, and telemetry sends them.

use std::fmt::Write as _;

use super::status::{CallStatus, Status};

/// One counter: its name, its value and what it counts.
pub(crate) struct Counter {
    pub(crate) name: &'static str,
    pub(crate) value: u64,
    pub(crate) description: &'static str,
}

/// The counters of a mount, sorted by name. Counters of the C++ client that have no counterpart are left out.
pub(crate) fn counters(status: &Status) -> Vec<Counter> {
    let call = |name: &str| status.calls.get(name).map(|call| call.count);
    let counted = [
        ("cache.n_evicted", Some(status.evictions), "Number of files evicted"),
        ("cache.n_hits", Some(status.cache_hits), "Number of objects found in the cache"),
        ("cache.n_misses", Some(status.cache_misses), "Number of objects not found in the cache"),
        ("catalog_mgr.n_attached", Some(status.catalogs as u64), "Number of attached catalogs"),
        ("catalog_revision", Some(status.revision), "Revision of the repository"),
        ("cvmfs.n_fs_dir_open", call("opendir"), "Overall number of directory open operations"),
        ("cvmfs.n_fs_forget", call("forget"), "Number of inode forgets"),
        ("cvmfs.n_fs_lookup", call("lookup"), "Number of lookups"),
        ("cvmfs.n_fs_open", call("open"), "Overall number of file open operations"),
        ("cvmfs.n_fs_read", call("read"), "Number of files read"),
        ("cvmfs.n_fs_readlink", call("readlink"), "Number of links read"),
        ("cvmfs.n_fs_stat", call("getattr"), "Number of stats"),
        ("cvmfs.n_fs_statfs", call("statfs"), "Number of statsfs calls"),
        ("cvmfs.n_io_error", Some(status.io_errors), "Number of I/O errors"),
        ("cvmfs.no_open_files", Some(status.open_files as u64), "Number of currently opened files"),
        ("download.n_fail_over", Some(status.fail_overs), "Number of changes of proxy or host"),
        ("download.n_failed_attempts", Some(status.network_errors), "Number of attempts that failed"),
        ("download.n_requests", Some(status.requests), "Number of requests"),
        ("download.sz_transferred_bytes", Some(status.bytes_fetched), "Number of transferred bytes"),
        ("eio.total", Some(status.io_errors), "EIO returned to calling process, total"),
    ];
    counted
        .into_iter()
        .filter_map(|(name, value, description)| Some(Counter { name, value: value?, description }))
        .collect()
}

/// `internal affairs`: what the C++ client shows and this one has.
pub(super) fn internal_affairs(status: &Status) -> String {
    let mut text = format!(
        "Cache Mode: read-write\nRead Mode: {}\nDrainout Mode: no\nMaintenance Mode: no\n",
        status.mode
    );
    text.push_str("\nRaw Counters:\nName|Value|Description\n");
    for counter in counters(status) {
        let _ = writeln!(text, "{}|{}|{}", counter.name, counter.value, counter.description);
    }
    text
}

/// The quantiles that the C++ client shows.
const QUANTILES: [f64; 15] =
    [0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95, 0.99, 0.999, 0.9999];

/// `latency`: a table of comma separated values.
pub(super) fn latency(status: &Status) -> String {
    let timed: Vec<_> = status.calls.iter().filter(|(_, call)| !call.durations.is_empty()).collect();
    if timed.is_empty() {
        return "not supported: calls are timed with CVMFS_INSTRUMENT_FUSE=yes only".into();
    }
    let mut text = String::from("\"repository\",\"action\",\"total_count\",\"time_unit\"");
    for quantile in QUANTILES {
        let _ = write!(text, ",{quantile:.5}");
    }
    text.push('\n');
    for (name, call) in timed {
        let _ = write!(text, "\"{}\",\"{name}\",{},\"nanoseconds\"", status.fqrn, call.count);
        for quantile in QUANTILES {
            let _ = write!(text, ",{}", quantile_of(call, quantile));
        }
        text.push('\n');
    }
    text
}

/// The duration in nanoseconds below which the share `quantile` of the calls lies: interpolated within a bucket.
fn quantile_of(call: &CallStatus, quantile: f64) -> u64 {
    let total: u64 = call.durations.iter().sum();
    let wanted = quantile * total as f64;
    let mut below = 0.0;
    for (index, count) in call.durations.iter().enumerate().filter(|(_, count)| **count > 0) {
        let within = wanted - below;
        if within <= *count as f64 {
            let upper = 1000.0 * (1_u64 << index.min(63)) as f64;
            let lower = if index == 0 { 0.0 } else { upper / 2.0 };
            return (lower + (upper - lower) * within.max(0.0) / *count as f64) as u64;
        }
        below += *count as f64;
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_sorted_and_those_that_are_not_counted_are_left_out() {
        let mut status = Status { requests: 5, ..Status::default() };
        let names: Vec<_> = counters(&status).iter().map(|counter| counter.name).collect();
        assert!(names.is_sorted() && !names.contains(&"cvmfs.n_fs_open"), "{names:?}");
        status.calls.insert("open".into(), CallStatus { count: 3, durations: Vec::new() });
        let text = internal_affairs(&status);
        assert!(text.contains("\ncvmfs.n_fs_open|3|") && text.contains("\ndownload.n_requests|5|"), "{text}");
    }

    #[test]
    fn half_of_the_calls_lie_below_the_median() {
        // 10 calls below 1 µs, 10 from 512 to 1024 µs.
        let mut durations = vec![10];
        durations.resize(10, 0);
        durations.push(10);
        let call = CallStatus { count: 20, durations };
        assert_eq!(quantile_of(&call, 0.5), 1000);
        assert_eq!(quantile_of(&call, 0.75), 768_000);
        assert_eq!(quantile_of(&CallStatus::default(), 0.5), 0);
        let mut status = Status { fqrn: "a.b".into(), ..Status::default() };
        status.calls.insert("lookup".into(), call);
        let text = latency(&status);
        assert!(
            text.starts_with("\"repository\",\"action\",\"total_count\",\"time_unit\",0.10000,"),
            "{text}"
        );
        assert!(text.contains("\n\"a.b\",\"lookup\",20,\"nanoseconds\","), "{text}");
    }
}
