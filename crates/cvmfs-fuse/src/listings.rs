//! Listings whose names the kernel may still be entering when the revision changes.
//!
//! Kernels with epochs (Linux 6.16) date a name that they look up by when they asked, but a name of a READDIRPLUS by
//! when they enter it. That may be seconds after the answer, because entering waits for each name that somebody else
//! is looking up; and then a name of the older revision counts as new. A handle has one READDIR at a time, so its next
//! request tells that the names of its last answer are entered: if the revision has changed since then, the epoch is
//! raised once more. Whoever changes the revision waits for such handles, so that "in use" is true when it is said.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::nodes::Moment;

/// Open directories whose answers are remembered (about 50 bytes each); the kernel enters no names for others.
const MOST: usize = 1 << 16;
/// Entering names that nobody looks up takes no longer. A handle whose reader does something else looks the same.
const ENTERING: Duration = Duration::from_millis(500);
/// Longest wait for handles: a look-up takes at most ten seconds, and a few may follow one another.
const LONGEST: Duration = Duration::from_secs(15);
/// How often look-ups are asked for.
const PULSE: Duration = Duration::from_millis(20);
/// The bits of a handle that count the handles of a worker; those above tell the worker.
const COUNTER_BITS: u32 = 40;

/// The open directories of a worker.
#[derive(Debug)]
pub(crate) struct Listings {
    worker: u64,
    opened: AtomicU64,
    table: Mutex<Table>,
    entered: Condvar,
}

#[derive(Debug)]
struct Table {
    answered: HashMap<u64, Answered>,
    /// A predecessor may have answered handles that nothing was heard of since.
    has_predecessor: bool,
}

/// The last READDIR of a handle.
#[derive(Debug, Clone, Copy)]
struct Answered {
    directory: u64,
    moment: Moment,
}

/// What a look-up that delays the entering of names may be in.
#[derive(Debug)]
pub(crate) enum Directories {
    /// A predecessor knew.
    Any,
    /// One of these nodes.
    These(HashSet<u64>),
}

impl Listings {
    /// For the worker with this number, from 1.
    pub(crate) fn new(worker: u64) -> Listings {
        let table = Table { answered: HashMap::new(), has_predecessor: worker > 1 };
        Listings { worker, opened: AtomicU64::new(0), table: Mutex::new(table), entered: Condvar::new() }
    }

    /// The handle for a directory that is being opened; never 0.
    pub(crate) fn open(&self) -> u64 {
        let count = self.opened.fetch_add(1, Ordering::Relaxed) + 1;
        (self.worker << COUNTER_BITS) | (count & ((1 << COUNTER_BITS) - 1))
    }

    /// A READDIR is about to be answered with what was current at `moment`. Returns whether the kernel may enter the
    /// names: not if the revision has changed since then, which `present` tells.
    pub(crate) fn answer(
        &self,
        handle: u64,
        directory: u64,
        moment: Moment,
        present: impl FnOnce() -> Moment,
    ) -> bool {
        let mut table = self.lock();
        // Under the lock: whoever changes the revision looks here afterwards.
        let present = present();
        if table.answered.len() >= MOST && !table.answered.contains_key(&handle) {
            return false;
        }
        table.answered.insert(handle, Answered { directory, moment: present });
        moment == present
    }

    /// Another request of the handle has come: the names of its last answer are entered. Calls `expire` if some may be
    /// older than `present`.
    pub(crate) fn entered(&self, handle: u64, present: Moment, expire: impl FnOnce()) {
        let known = self.lock().answered.get(&handle).copied();
        let is_outdated = match known {
            Some(answered) => answered.moment != present,
            None => handle >> COUNTER_BITS != self.worker,
        };
        if is_outdated {
            expire();
        }
        if known.is_some() {
            self.lock().answered.remove(&handle);
            self.entered.notify_all();
        }
    }

    /// Waits until all names that were answered before `present` are entered, as far as can be told, and at most for
    /// 15 seconds. `is_delayed` tells whether look-ups are under way there. Returns whether there were any.
    pub(crate) fn wait_until_entered(
        &self,
        present: Moment,
        is_delayed: impl Fn(&Directories) -> bool,
    ) -> bool {
        let end = Instant::now() + LONGEST;
        let mut quiet_since = Instant::now();
        let mut any = false;
        let mut table = self.lock();
        while let Some(directories) = table.outdated(present) {
            any = true;
            drop(table);
            let now = Instant::now();
            if is_delayed(&directories) {
                quiet_since = now;
            }
            table = self.lock();
            if now >= end || now.duration_since(quiet_since) >= ENTERING {
                table.has_predecessor = false;
                break;
            }
            table = self.entered.wait_timeout(table, PULSE).unwrap_or_else(PoisonError::into_inner).0;
        }
        any
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Where names are older than `present`; `None` if nowhere.
    fn outdated(&self, present: Moment) -> Option<Directories> {
        if self.has_predecessor {
            return Some(Directories::Any);
        }
        let outdated = self.answered.values().filter(|answered| answered.moment != present);
        let directories: HashSet<u64> = outdated.map(|answered| answered.directory).collect();
        (!directories.is_empty()).then_some(Directories::These(directories))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Moment = Moment::START;

    #[test]
    fn names_that_were_answered_before_a_change_expire_when_they_are_entered() {
        let listings = Listings::new(1);
        let (handle, later) = (listings.open(), FIRST.next());
        assert!(listings.answer(handle, 7, FIRST, || FIRST));
        let mut expired = 0;
        listings.entered(handle, later, || expired += 1);
        assert_eq!(expired, 1);
        assert!(listings.answer(handle, 7, later, || later));
        listings.entered(handle, later, || expired += 1);
        assert_eq!(expired, 1, "the handle has caught up");
        assert!(!listings.wait_until_entered(later, |_| false), "nothing is awaited");
        assert!(!listings.answer(handle, 7, FIRST, || later), "an answer that took too long enters no names");
    }

    #[test]
    fn whoever_changes_the_revision_waits_for_look_ups_in_listed_directories() {
        let listings = Listings::new(1);
        let handle = listings.open();
        listings.answer(handle, 7, FIRST, || FIRST);
        let later = FIRST.next();
        let looks = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                listings.wait_until_entered(later, |directories| {
                    let Directories::These(nodes) = directories else { panic!("there is no predecessor") };
                    assert!(nodes.contains(&7));
                    looks.fetch_add(1, Ordering::SeqCst);
                    true
                })
            });
            while looks.load(Ordering::SeqCst) < 3 {
                std::thread::yield_now();
            }
            assert!(!waiting.is_finished());
            listings.entered(handle, later, || {});
            assert!(waiting.join().unwrap());
        });
    }

    #[test]
    fn a_reader_that_holds_a_directory_does_not_hold_an_update() {
        let listings = Listings::new(1);
        listings.answer(listings.open(), 7, FIRST, || FIRST);
        assert!(listings.wait_until_entered(FIRST.next(), |_| false), "it gives up");
    }

    #[test]
    fn handles_of_a_predecessor_expire_once() {
        let handle = Listings::new(1).open();
        let successor = Listings::new(2);
        let mut expired = 0;
        successor.entered(handle, FIRST, || expired += 1);
        successor.answer(handle, 7, FIRST, || FIRST);
        successor.entered(handle, FIRST, || expired += 1);
        assert_eq!(expired, 1);
        assert!(successor.wait_until_entered(FIRST, |directories| {
            assert!(matches!(directories, Directories::Any));
            false
        }));
        assert!(!successor.wait_until_entered(FIRST, |_| false), "only once");
    }

    #[test]
    fn directories_beyond_all_reason_enter_no_names() {
        let listings = Listings::new(1);
        for _ in 0..MOST {
            assert!(listings.answer(listings.open(), 7, FIRST, || FIRST));
        }
        let handle = listings.open();
        assert!(!listings.answer(handle, 7, FIRST, || FIRST));
        listings.entered(1 << COUNTER_BITS | 1, FIRST, || {});
        assert!(listings.answer(handle, 7, FIRST, || FIRST));
    }
}
