//! Tells a worker that hangs from one that is busy, and writes down what it was at.
//!
//! A worker that dies is noticed by the kernel. One that hangs is noticed here: its heart
//! stops, or a thread that reads the device is at one request for too long (it never waits
//! for the network), or most of those that do wait are over every deadline.

use std::fs;
use std::time::{Duration, Instant};

use crate::dispatch::READERS;
use crate::filesystem::DATA_PATIENCE;
use crate::protocol::request;
use crate::shared_state::{Occupied, SharedState, now};
use crate::slow_lane::MAX_THREADS;

/// How often the supervisor looks.
pub(crate) const TICK: Duration = Duration::from_secs(1);
/// The worker's heart beats every second; a loaded machine may delay it.
const HEART_PATIENCE: Duration = Duration::from_secs(20);
/// A thread that reads the device answers from memory and the local disk.
const READER_PATIENCE: Duration = Duration::from_secs(30);
/// Threads that wait have deadlines of their own.
const WAITING_PATIENCE: Duration = Duration::from_secs(2 * DATA_PATIENCE.as_secs());
/// So many threads beyond that are no longer one slow disk request.
const MOST_STUCK: usize = MAX_THREADS / 2;
/// Looks that must agree, so that a machine that slept is not taken for a hang.
const STRIKES: u32 = 2;
/// Threads written down at a hang.
const MAX_DUMPED: usize = 100;

/// See the module documentation.
#[derive(Debug)]
pub(crate) struct Watchdog {
    /// For tests: replaces all patience.
    patience: Option<Duration>,
    looked: Instant,
    strikes: u32,
}

/// A worker that hangs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hang {
    /// In words.
    pub(crate) what: String,
    /// The requests it hangs at.
    pub(crate) requests: Vec<Occupied>,
}

impl Watchdog {
    pub(crate) fn new(patience: Option<Duration>) -> Watchdog {
        Watchdog { patience, looked: Instant::now(), strikes: 0 }
    }

    /// Looks at the worker; to be called once in a [`TICK`].
    pub(crate) fn look(&mut self, state: &SharedState) -> Option<Hang> {
        let pause = self.looked.elapsed();
        self.looked = Instant::now();
        if pause > TICK * 5 {
            // We did not run ourselves: the machine slept, or all processes were frozen.
            self.strikes = 0;
            return None;
        }
        let Some(hang) = self.hang(state, now()) else {
            self.strikes = 0;
            return None;
        };
        self.strikes += 1;
        if self.strikes < STRIKES {
            return None;
        }
        self.strikes = 0;
        Some(hang)
    }

    fn hang(&self, state: &SharedState, now: u64) -> Option<Hang> {
        let is_over = |since: u64, patience: Duration| {
            u128::from(now.saturating_sub(since)) > self.patience.unwrap_or(patience).as_millis()
        };
        let occupied = state.occupied();
        let (readers, waiting): (Vec<_>, Vec<_>) = occupied.into_iter().partition(|one| one.lane < READERS);
        let stuck: Vec<_> = readers.into_iter().filter(|one| is_over(one.since, READER_PATIENCE)).collect();
        let late: Vec<_> = waiting.into_iter().filter(|one| is_over(one.since, WAITING_PATIENCE)).collect();
        if !stuck.is_empty() {
            return Some(Hang { what: "a thread that reads the device hangs".into(), requests: stuck });
        }
        if late.len() >= MOST_STUCK {
            return Some(Hang { what: "most threads are over their deadlines".into(), requests: late });
        }
        let beat = state.last_beat();
        (beat != 0 && is_over(beat, HEART_PATIENCE))
            .then(|| Hang { what: "the worker does not run".into(), requests: Vec::new() })
    }
}

/// Whether somebody debugs the process, who would not like it to be killed.
pub(crate) fn is_traced(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| line.strip_prefix("TracerPid:").is_some_and(|tracer| tracer.trim() != "0"))
}

/// What the worker was at, one line for each request and thread.
pub(crate) fn dump(pid: u32, hang: &Hang) -> Vec<String> {
    let now = now();
    let mut lines: Vec<String> = hang
        .requests
        .iter()
        .map(|one| {
            format!(
                "request {} of node {:#x} for {} s (thread {})",
                request::name(one.opcode),
                one.node,
                now.saturating_sub(one.since) / 1000,
                one.lane
            )
        })
        .collect();
    for thread in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten().take(MAX_DUMPED) {
        let read = |name: &str| fs::read_to_string(thread.path().join(name)).unwrap_or_default();
        let status = read("status");
        let state =
            status.lines().find_map(|line| line.strip_prefix("State:")).unwrap_or("?").trim().to_owned();
        lines.push(format!(
            "thread {} {}: {state}, waits in {}, system call {}",
            thread.file_name().to_string_lossy(),
            read("comm").trim(),
            read("wchan").trim(),
            read("syscall").split(' ').next().unwrap_or("?").trim()
        ));
    }
    lines
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::protocol::request::opcode;

    fn state() -> SharedState {
        SharedState::map(SharedState::create_memory().unwrap().as_fd()).unwrap()
    }

    #[test]
    fn row_62_a_reader_at_one_request_for_too_long_is_a_hang_and_a_waiting_thread_is_not() {
        let state = state();
        let dog = Watchdog::new(None);
        state.beat();
        state.enter(0, 7, opcode::LOOKUP, 1);
        state.enter(READERS, 8, opcode::OPEN, 2);
        assert_eq!(dog.hang(&state, now()), None);
        let later = now() + 31_000;
        let hang = dog.hang(&state, later).unwrap();
        assert_eq!((hang.requests.len(), hang.requests[0].unique), (1, 7));
        state.leave(0);
        state.beat();
        assert_eq!(dog.hang(&state, now() + 19_000), None, "one that waits has a deadline of its own");
    }

    #[test]
    fn row_62_a_worker_whose_heart_stops_hangs_and_one_that_never_began_does_not() {
        let state = state();
        let dog = Watchdog::new(None);
        assert_eq!(dog.hang(&state, now() + 100_000), None);
        state.beat();
        assert!(dog.hang(&state, now() + 21_000).unwrap().what.contains("does not run"));
    }

    #[test]
    fn row_62_one_look_is_not_enough() {
        let state = state();
        let mut dog = Watchdog::new(Some(Duration::ZERO));
        state.enter(0, 7, opcode::LOOKUP, 1);
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(dog.look(&state), None);
        assert!(dog.look(&state).is_some());
    }

    #[test]
    fn the_dump_names_requests_and_threads() {
        let requests = vec![Occupied { lane: 1, unique: 9, opcode: opcode::OPEN, node: 0xab, since: now() }];
        let lines = dump(std::process::id(), &Hang { what: String::new(), requests });
        assert!(lines[0].contains("open") && lines[0].contains("0xab"), "{lines:?}");
        assert!(lines.iter().any(|line| line.contains("waits in")), "{lines:?}");
        assert!(!is_traced(std::process::id()));
    }
}
