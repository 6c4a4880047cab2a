//! Requests that wait: for the network, or in the queue before it.
//!
//! Whoever comes first answers such a request: its work, the interrupt that its caller's
//! signal causes, or its deadline. So no caller waits longer than promised, whatever the
//! work is stuck in.
//!
//! # Signals
//! The kernel sends one INTERRUPT for a request whose caller got any signal. Programs expect
//! EINTR from files least of all, so a signal that does not mean "end" (a child died, a
//! window changed its size, a profiler's tick) leaves the request alone, and whether one
//! that does came later is looked at again every second. An interrupted download goes on for a while,
//! since an impatient reader tends to come back (`cvmfs_client::store`).

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cvmfs_client::deadline::{Deadline, Interrupt};

use crate::protocol::reply::{Channel, send};
use crate::protocol::request::{self, Caller, Request};
use crate::shared_state::journal::Kept;

/// How much later than its deadline a request is answered in place of its work, which
/// knows better what went wrong.
const GRACE: Duration = Duration::from_secs(2);

/// Interrupts remembered that arrived before their request was looked at by its thread.
const MAX_EARLY: usize = 64;

/// A waiting request.
#[derive(Debug)]
pub(crate) struct Ticket {
    unique: u64,
    opcode: u32,
    node: u64,
    caller: Caller,
    since: Instant,
    deadline: Deadline,
    interrupt: Interrupt,
    is_answered: AtomicBool,
    /// A signal came that did not end the caller.
    is_signalled: AtomicBool,
    /// Its record for a successor.
    kept: Mutex<Option<Kept>>,
}

impl Ticket {
    /// Takes the right to answer; false if it was taken before.
    pub(crate) fn claim(&self) -> bool {
        !self.is_answered.swap(true, Ordering::AcqRel)
    }

    /// The answer was sent: no successor needs to give it.
    pub(crate) fn settle(&self) {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Whether the request was answered.
    pub(crate) fn is_answered(&self) -> bool {
        self.is_answered.load(Ordering::Acquire)
    }

    /// When the work must be done.
    pub(crate) fn deadline(&self) -> Deadline {
        self.deadline
    }

    /// Raised when nobody waits for the work any more.
    pub(crate) fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }
}

/// The waiting requests of a worker.
#[derive(Debug)]
pub(crate) struct InFlight {
    channel: Arc<Channel>,
    waiting: Mutex<HashMap<u64, Arc<Ticket>>>,
    early: Mutex<VecDeque<u64>>,
    interrupted: AtomicU64,
    overdue: AtomicU64,
}

impl InFlight {
    pub(crate) fn new(channel: Arc<Channel>) -> InFlight {
        InFlight {
            channel,
            waiting: Mutex::default(),
            early: Mutex::default(),
            interrupted: AtomicU64::new(0),
            overdue: AtomicU64::new(0),
        }
    }

    /// Registers a request that is going to wait.
    pub(crate) fn admit(
        &self,
        request: &Request<'_>,
        opcode: u32,
        patience: Duration,
        kept: Option<Kept>,
    ) -> Arc<Ticket> {
        let Request { unique, node, caller, .. } = *request;
        // What a worker before knew of its caller's signals went with it.
        let is_signalled = request.is_repeated && kept.is_some() && caller.pid != 0;
        let ticket = Arc::new(Ticket {
            unique,
            opcode,
            node,
            caller,
            since: Instant::now(),
            deadline: Deadline::after(patience),
            interrupt: Interrupt::new(),
            is_answered: AtomicBool::new(false),
            is_signalled: AtomicBool::new(is_signalled),
            kept: Mutex::new(kept),
        });
        self.lock().insert(unique, ticket.clone());
        let mut early = self.early.lock().unwrap_or_else(PoisonError::into_inner);
        let was_interrupted =
            early.iter().position(|number| *number == unique).and_then(|at| early.remove(at));
        drop(early);
        if was_interrupted.is_some() {
            self.signalled(&ticket);
        }
        ticket
    }

    /// The work of a request ended.
    pub(crate) fn finish(&self, ticket: &Ticket) {
        ticket.settle();
        self.lock().remove(&ticket.unique);
    }

    /// The caller of a request got a signal.
    pub(crate) fn interrupt(&self, unique: u64) {
        let ticket = self.lock().get(&unique).cloned();
        match ticket {
            Some(ticket) => self.signalled(&ticket),
            None => {
                // Answered meanwhile, or its thread is about to register it.
                let mut early = self.early.lock().unwrap_or_else(PoisonError::into_inner);
                if early.len() >= MAX_EARLY {
                    early.pop_front();
                }
                early.push_back(unique);
            }
        }
    }

    /// Ends the waits that are over, and those whose callers were ended by a later signal.
    pub(crate) fn sweep(&self) {
        let waiting: Vec<_> = self.lock().values().cloned().collect();
        for ticket in waiting {
            if ticket.is_signalled.load(Ordering::Relaxed) {
                self.signalled(&ticket);
            }
            let end = ticket.deadline.instant() + GRACE;
            if Instant::now() >= end && ticket.claim() {
                self.overdue.fetch_add(1, Ordering::Relaxed);
                tracing::error!(
                    request = request::name(ticket.opcode),
                    node = format_args!("{:#x}", ticket.node),
                    waited_s = ticket.since.elapsed().as_secs(),
                    "request is over its deadline; its caller gets ETIMEDOUT"
                );
                let _ = send(&self.channel, ticket.unique, libc::ETIMEDOUT, &[]);
                ticket.settle();
                ticket.interrupt.raise();
            }
        }
    }

    /// Requests that wait now.
    pub(crate) fn waiting(&self) -> usize {
        self.lock().len()
    }

    /// Whether a request waits of which `is_wanted` holds, by operation and node.
    pub(crate) fn is_waiting(&self, is_wanted: impl Fn(u32, u64) -> bool) -> bool {
        self.lock().values().any(|ticket| is_wanted(ticket.opcode, ticket.node))
    }

    /// Requests whose callers were interrupted.
    pub(crate) fn interrupted(&self) -> u64 {
        self.interrupted.load(Ordering::Relaxed)
    }

    /// Requests that were answered because their deadline had passed.
    pub(crate) fn overdue(&self) -> u64 {
        self.overdue.load(Ordering::Relaxed)
    }

    fn signalled(&self, ticket: &Ticket) {
        if !is_ending(ticket.caller.pid) {
            ticket.is_signalled.store(true, Ordering::Relaxed);
            return;
        }
        if ticket.claim() {
            self.interrupted.fetch_add(1, Ordering::Relaxed);
            let _ = send(&self.channel, ticket.unique, libc::EINTR, &[]);
            ticket.settle();
            ticket.interrupt.raise();
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<Ticket>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Signals after which a caller wants to go on at once, or not at all.
const ENDING: [i32; 6] =
    [libc::SIGKILL, libc::SIGINT, libc::SIGTERM, libc::SIGQUIT, libc::SIGHUP, libc::SIGALRM];

/// Whether a signal is pending that ends what the process (or thread) is doing. A process
/// that cannot be looked at counts as ending: it is gone, or in a namespace out of sight.
fn is_ending(pid: u32) -> bool {
    if pid == 0 {
        return true;
    }
    std::fs::read_to_string(format!("/proc/{pid}/status")).map_or(true, |status| has_ending_signal(&status))
}

fn has_ending_signal(status: &str) -> bool {
    let mask = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        u64::from_str_radix(line.trim(), 16).unwrap_or(0)
    };
    let pending = (mask("SigPnd:") | mask("ShdPnd:")) & !mask("SigBlk:");
    ENDING.iter().any(|signal| pending >> (signal - 1) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;
    use crate::protocol::reply::{Reply, Sent};

    fn asked(unique: u64) -> Request<'static> {
        let operation = request::Operation::Getattr;
        Request { unique, node: 1, caller: NOBODY, operation, is_repeated: false, raw: &[] }
    }

    const NOBODY: Caller = Caller { uid: 0, gid: 0, pid: 0 };

    fn pair() -> (Arc<Channel>, UnixDatagram) {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        (Arc::new(Channel(ours.into())), theirs)
    }

    fn errno_of(kernel: &UnixDatagram) -> Option<i32> {
        let mut answer = [0; 64];
        let length = kernel.recv(&mut answer).ok()?;
        assert!(length >= 16);
        Some(-i32::from_ne_bytes(answer[4..8].try_into().unwrap()))
    }

    #[test]
    fn row_66_an_interrupted_request_is_answered_at_once_and_only_once() {
        let (channel, kernel) = pair();
        let requests = InFlight::new(channel.clone());
        let ticket = requests.admit(&asked(5), 14, Duration::from_secs(30), None);
        let mut reply = Reply::new(&channel, 5);
        reply.share(&ticket);
        requests.interrupt(5);
        assert_eq!(errno_of(&kernel), Some(libc::EINTR));
        assert!(ticket.interrupt().is_raised(), "the work learns of it");
        assert_eq!(reply.opened(1, 0, 0), Sent::NotTaken, "the opener knows that nobody will release");
        assert_eq!(errno_of(&kernel), None);
        requests.finish(&ticket);
        assert_eq!((requests.waiting(), requests.interrupted()), (0, 1));
    }

    #[test]
    fn row_66_an_interrupt_that_comes_before_its_request_counts() {
        let (channel, kernel) = pair();
        let requests = InFlight::new(channel);
        requests.interrupt(6);
        for other in 0..MAX_EARLY as u64 - 1 {
            requests.interrupt(1000 + other);
        }
        let _ticket = requests.admit(&asked(6), 1, Duration::from_secs(30), None);
        assert_eq!(errno_of(&kernel), Some(libc::EINTR));
    }

    #[test]
    fn a_request_beyond_its_deadline_is_answered_whatever_its_work_does() {
        let (channel, kernel) = pair();
        let requests = InFlight::new(channel);
        let mut late = requests.admit(&asked(7), 15, Duration::ZERO, None);
        requests.sweep();
        assert_eq!(errno_of(&kernel), None, "the work has a moment to answer better");
        requests.finish(&late);
        Arc::get_mut(&mut late).unwrap().deadline = Deadline::after(Duration::ZERO);
        let mut ticket = Arc::try_unwrap(late).unwrap();
        let Some(past) = Instant::now().checked_sub(GRACE * 2) else { return };
        ticket.deadline = Deadline::at(past);
        requests.lock().insert(7, Arc::new(ticket));
        requests.sweep();
        requests.sweep();
        assert_eq!(errno_of(&kernel), Some(libc::ETIMEDOUT));
        assert_eq!(errno_of(&kernel), None);
        assert_eq!(requests.overdue(), 1);
    }

    #[test]
    fn only_signals_that_end_something_interrupt() {
        let status = |pending: i32, blocked: i32| {
            let mask = |signal: i32| if signal == 0 { 0_u64 } else { 1 << (signal - 1) };
            format!(
                "Name:\tx\nSigPnd:\t{:016x}\nShdPnd:\t{:016x}\nSigBlk:\t{:016x}\n",
                mask(pending),
                0,
                mask(blocked)
            )
        };
        for signal in ENDING {
            assert!(has_ending_signal(&status(signal, 0)), "{signal}");
        }
        for signal in [libc::SIGCHLD, libc::SIGURG, libc::SIGPROF, libc::SIGWINCH, libc::SIGUSR1] {
            assert!(!has_ending_signal(&status(signal, 0)), "{signal}");
        }
        assert!(!has_ending_signal(&status(libc::SIGINT, libc::SIGINT)), "a blocked signal ends nothing");
        assert!(!is_ending(std::process::id()));
    }
}
