//! What the mount counts, for `status`, metrics and the magic attributes.
//!
//! Counters belong to one worker and begin at zero with its successor.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::failures::Failures;
use crate::protocol::request;

/// Operations that are counted one by one, by [`request::name`].
const OPERATIONS: [&str; 19] = [
    "change",
    "destroy",
    "flush",
    "forget",
    "getattr",
    "getxattr",
    "init",
    "interrupt",
    "listxattr",
    "lookup",
    "open",
    "opendir",
    "other",
    "read",
    "readdir",
    "readdirplus",
    "readlink",
    "release",
    "statfs",
];
/// Not in the table above because it is answered without work.
const RELEASEDIR: &str = "releasedir";

/// Upper bounds of the latency classes are powers of two from 1 µs; the last holds the rest.
pub const LATENCY_CLASSES: usize = 26;

/// Different error numbers that are told apart.
const MAX_ERRORS: usize = 32;

/// See the module documentation.
#[derive(Debug)]
pub(crate) struct Statistics {
    calls: [AtomicU64; OPERATIONS.len() + 1],
    latencies: Option<Box<[[AtomicU64; LATENCY_CLASSES]]>>,
    errors: Mutex<BTreeMap<i32, u64>>,
    io_errors: AtomicU64,
    last_io_error: AtomicI64,
    malformed: AtomicU64,
    refused: AtomicU64,
    opened_files: AtomicU64,
    opened_directories: AtomicU64,
    open_directories: AtomicI64,
    /// What failed last, in words.
    failures: Failures,
}

/// Counters of a mount at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct CallStatistics {
    /// Calls by operation, those that never came left out.
    pub calls: BTreeMap<&'static str, u64>,
    /// How many calls took less than 2^n µs, by operation; with `CVMFS_INSTRUMENT_FUSE` only.
    pub latencies: BTreeMap<&'static str, Vec<u64>>,
    /// Failed calls by the error's name. A name that does not exist is no failure.
    pub errors: BTreeMap<String, u64>,
    /// Failures that a user sees as an I/O error.
    pub io_errors: u64,
    /// Unix time of the last of them; 0 if there was none.
    pub last_io_error: i64,
    /// Messages of the kernel that were no requests.
    pub malformed: u64,
    /// Requests that were answered with EIO because earlier workers died of them.
    pub refused: u64,
    /// Calls whose callers were interrupted by a signal.
    pub interrupted: u64,
    /// Calls that were answered because their deadline had passed.
    pub overdue: u64,
    /// Calls that wait for the network now.
    pub waiting: usize,
    /// Files opened so far.
    pub opened_files: u64,
    /// Directories opened so far.
    pub opened_directories: u64,
    /// Files open now.
    pub open_files: usize,
    /// Directories open now.
    pub open_directories: u64,
}

impl Statistics {
    /// `instrumented`: latencies are recorded too.
    pub(crate) fn new(instrumented: bool) -> Statistics {
        let classes = || std::array::from_fn(|_| AtomicU64::new(0));
        Statistics {
            calls: std::array::from_fn(|_| AtomicU64::new(0)),
            latencies: instrumented.then(|| (0..=OPERATIONS.len()).map(|_| classes()).collect()),
            errors: Mutex::default(),
            io_errors: AtomicU64::new(0),
            last_io_error: AtomicI64::new(0),
            malformed: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            opened_files: AtomicU64::new(0),
            opened_directories: AtomicU64::new(0),
            open_directories: AtomicI64::new(0),
            failures: Failures::default(),
        }
    }

    pub(crate) fn is_instrumented(&self) -> bool {
        self.latencies.is_some()
    }

    pub(crate) fn count_call(&self, opcode: u32) {
        if let Some(counter) = self.calls.get(index(opcode)) {
            counter.fetch_add(1, Relaxed);
        }
    }

    pub(crate) fn record_latency(&self, opcode: u32, latency: Duration) {
        let class = (u128::BITS - latency.as_micros().leading_zeros()) as usize;
        if let Some(counters) = self.latencies.as_ref().and_then(|latencies| latencies.get(index(opcode)))
            && let Some(counter) = counters.get(class.min(LATENCY_CLASSES - 1))
        {
            counter.fetch_add(1, Relaxed);
        }
    }

    /// Counts a failure that is not the caller's own; `what` says which object, and why.
    pub(crate) fn count_io_error(&self, errno: i32, unix: i64, what: &str) {
        self.failures.note(format!("{what} ({})", error_name(errno)), unix);
        self.io_errors.fetch_add(1, Relaxed);
        self.last_io_error.store(unix, Relaxed);
        let mut errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        if errors.len() < MAX_ERRORS || errors.contains_key(&errno) {
            *errors.entry(errno).or_default() += 1;
        }
    }

    pub(crate) fn count_malformed(&self) {
        self.malformed.fetch_add(1, Relaxed);
    }

    pub(crate) fn count_refused(&self) {
        self.refused.fetch_add(1, Relaxed);
    }

    pub(crate) fn count_opened_file(&self) {
        self.opened_files.fetch_add(1, Relaxed);
    }

    pub(crate) fn count_opened_directory(&self) {
        self.opened_directories.fetch_add(1, Relaxed);
        self.open_directories.fetch_add(1, Relaxed);
    }

    pub(crate) fn count_closed_directory(&self) {
        self.open_directories.fetch_sub(1, Relaxed);
    }

    /// The failures of the last hour in words, the newest first.
    pub(crate) fn recent_failures(&self, unix: i64) -> Vec<String> {
        self.failures.recent(unix)
    }

    /// Sets the counters of errors back to zero, as an administrator asked for.
    pub(crate) fn reset_errors(&self) {
        self.io_errors.store(0, Relaxed);
        self.last_io_error.store(0, Relaxed);
        self.failures.clear();
        self.errors.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// The counters now, as far as they are kept here.
    pub(crate) fn snapshot(&self) -> CallStatistics {
        let names = OPERATIONS.into_iter().chain([RELEASEDIR]);
        let counted = names.clone().zip(&self.calls).map(|(name, counter)| (name, counter.load(Relaxed)));
        let latencies = self.latencies.iter().flat_map(|latencies| names.clone().zip(latencies.iter()));
        CallStatistics {
            calls: counted.filter(|(_, count)| *count > 0).collect(),
            latencies: latencies
                .map(|(name, classes)| {
                    (name, classes.iter().map(|class| class.load(Relaxed)).collect::<Vec<_>>())
                })
                .filter(|(_, classes)| classes.iter().any(|count| *count > 0))
                .collect(),
            errors: self
                .errors
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .iter()
                .map(|(errno, count)| (error_name(*errno), *count))
                .collect(),
            io_errors: self.io_errors.load(Relaxed),
            last_io_error: self.last_io_error.load(Relaxed),
            malformed: self.malformed.load(Relaxed),
            refused: self.refused.load(Relaxed),
            opened_files: self.opened_files.load(Relaxed),
            opened_directories: self.opened_directories.load(Relaxed),
            // Directories that a predecessor opened are closed here too.
            open_directories: self.open_directories.load(Relaxed).max(0).cast_unsigned(),
            ..CallStatistics::default()
        }
    }
}

fn index(opcode: u32) -> usize {
    OPERATIONS.binary_search(&request::name(opcode)).unwrap_or(OPERATIONS.len())
}

/// The name of an error number that the client gives, or the number.
fn error_name(errno: i32) -> String {
    let name = match errno {
        libc::EIO => "EIO",
        libc::ETIMEDOUT => "ETIMEDOUT",
        libc::EINTR => "EINTR",
        libc::ENOSPC => "ENOSPC",
        libc::EMFILE => "EMFILE",
        libc::ENFILE => "ENFILE",
        libc::EACCES => "EACCES",
        libc::EROFS => "EROFS",
        libc::ESTALE => "ESTALE",
        other => return other.to_string(),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::request::opcode;

    #[test]
    fn calls_are_counted_by_name_and_latencies_by_class() {
        assert!(OPERATIONS.is_sorted());
        let statistics = Statistics::new(true);
        statistics.count_call(opcode::LOOKUP);
        statistics.count_call(opcode::FORGET);
        statistics.count_call(opcode::BATCH_FORGET);
        statistics.count_call(opcode::RELEASEDIR);
        statistics.count_call(9999);
        statistics.record_latency(opcode::LOOKUP, Duration::from_nanos(500));
        statistics.record_latency(opcode::LOOKUP, Duration::from_micros(5));
        statistics.record_latency(opcode::READ, Duration::from_secs(10_000));
        statistics.count_io_error(libc::EIO, 1000, "content of /a: lost");
        let now = statistics.snapshot();
        let expected = BTreeMap::from([("lookup", 1), ("forget", 2), (RELEASEDIR, 1), ("other", 1)]);
        assert_eq!(now.calls, expected);
        assert_eq!((now.latencies["lookup"][0], now.latencies["lookup"][3]), (1, 1));
        assert_eq!(now.latencies["read"][LATENCY_CLASSES - 1], 1);
        assert_eq!((now.errors["EIO"], now.last_io_error), (1, 1000));
        statistics.reset_errors();
        assert_eq!(statistics.snapshot().io_errors, 0);
    }
}
