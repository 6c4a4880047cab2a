//! Many schedules of the code in which threads and processes meet: the sharing of one download, and the claims on
//! the cache's space while somebody evicts.
//!
//! The modules are compiled here a second time, with locks and counters that hand control to a scheduler, which tries
//! another order of all threads each time. A dead-lock is a failure as well.
#![allow(dead_code, unused_imports, clippy::unwrap_used)]

mod sync {
    pub(crate) use shuttle::sync::{Arc, Mutex, MutexGuard, PoisonError, atomic};
}

#[path = "../src/cache/budget.rs"]
mod budget;
#[path = "../src/deadline.rs"]
mod deadline;
#[path = "../src/store/flight.rs"]
mod flight;

use std::future::Future;
use std::time::Duration;

use futures_util::future::BoxFuture;
use shuttle::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use shuttle::sync::{Arc, Mutex};
use shuttle::thread;

use budget::{Budget, Count};
use deadline::{Deadline, Interrupt, Leave, Patience};
use flight::{Driver, Flights};

/// Schedules tried of each scenario.
const SCHEDULES: usize = 3000;

/// Waits and works with the scheduler's threads. Its clock never strikes: callers leave when they are interrupted.
#[derive(Clone, Default)]
struct Explorer {
    background: Arc<Mutex<Vec<shuttle::future::JoinHandle<()>>>>,
}

impl Explorer {
    /// Waits for everything that went on without its starter.
    fn finish(&self) {
        loop {
            let Some(work) = self.background.lock().unwrap().pop() else { break };
            shuttle::future::block_on(work).unwrap();
        }
    }
}

impl Driver for Explorer {
    fn wait<T>(&self, work: impl Future<Output = T>, patience: Patience<'_>) -> Result<T, Leave> {
        shuttle::future::block_on(async {
            let interrupted = async {
                match patience.interrupt {
                    Some(interrupt) => interrupt.raised().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                outcome = work => Ok(outcome),
                () = interrupted => Err(Leave::Interrupted),
            }
        })
    }

    fn go_on(&self, work: BoxFuture<'static, ()>) {
        self.background.lock().unwrap().push(shuttle::future::spawn(work));
    }

    fn begin(&self, work: BoxFuture<'static, ()>) {
        self.go_on(work);
    }

    fn linger(&self) -> BoxFuture<'static, ()> {
        Box::pin(shuttle::future::yield_now())
    }
}

/// An object that is fetched once, and the place where it is kept.
#[derive(Default)]
struct Object {
    is_kept: Mutex<bool>,
    at_work: AtomicUsize,
    fetched: AtomicUsize,
}

impl Object {
    fn look(&self) -> bool {
        *self.is_kept.lock().unwrap()
    }

    async fn fetch(self: Arc<Self>, succeeds: bool) -> Result<u32, &'static str> {
        let _busy = Busy::at(&self.at_work);
        for _ in 0..2 {
            shuttle::future::yield_now().await;
        }
        if succeeds {
            *self.is_kept.lock().unwrap() = true;
        }
        self.fetched.fetch_add(1, SeqCst);
        if succeeds { Ok(7) } else { Err("damaged everywhere") }
    }
}

/// One download at a time; one that is given up ends as well.
struct Busy<'a>(&'a AtomicUsize);

impl<'a> Busy<'a> {
    fn at(work: &'a AtomicUsize) -> Self {
        assert_eq!(work.fetch_add(1, SeqCst), 0, "two downloads at once");
        Self(work)
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

fn ask(
    flights: &Arc<Flights<u8, Result<u32, &'static str>>>,
    object: &Arc<Object>,
    succeeds: bool,
    interrupt: Option<&Interrupt>,
    explorer: &Explorer,
) -> Result<Result<u32, &'static str>, Leave> {
    let looked = flights.moment();
    if object.look() {
        return Ok(Ok(7));
    }
    let patience = Patience { deadline: Deadline::after(Duration::from_secs(1)), interrupt };
    flights.join(&1, looked, explorer, patience, |look_again| {
        if look_again && object.look() {
            return Box::pin(std::future::ready(Ok(7)));
        }
        Box::pin(object.clone().fetch(succeeds))
    })
}

#[test]
fn what_is_fetched_ahead_while_somebody_reads_it_is_fetched_once() {
    // At once: a schedule in which a whole download comes between two steps of another thread is found soon.
    let fetch = |object: &Arc<Object>, look_again: bool| -> BoxFuture<'static, Result<u32, &'static str>> {
        let object = object.clone();
        Box::pin(async move {
            if !(look_again && object.look()) {
                *object.is_kept.lock().unwrap() = true;
                object.fetched.fetch_add(1, SeqCst);
            }
            Ok(7)
        })
    };
    shuttle::check_pct(
        move || {
            let (flights, object, explorer) = (Flights::new(), Arc::<Object>::default(), Explorer::default());
            let ahead = {
                let (flights, object, explorer) = (flights.clone(), object.clone(), explorer.clone());
                thread::spawn(move || {
                    let looked = flights.moment();
                    if !object.look() {
                        flights.launch(&1, looked, &explorer, |look_again| fetch(&object, look_again));
                    }
                })
            };
            let looked = flights.moment();
            if !object.look() {
                let patience =
                    Patience { deadline: Deadline::after(Duration::from_secs(1)), interrupt: None };
                let start = |look_again| fetch(&object, look_again);
                assert_eq!(flights.join(&1, looked, &explorer, patience, start), Ok(Ok(7)));
            }
            ahead.join().unwrap();
            explorer.finish();
            assert_eq!(object.fetched.load(SeqCst), 1);
        },
        SCHEDULES,
        3,
    );
}

#[test]
fn row_25_one_download_serves_all_who_ask_in_any_order() {
    shuttle::check_random(
        || {
            let (flights, object) = (Flights::new(), Arc::new(Object::default()));
            let explorer = Explorer::default();
            let readers: Vec<_> = (0..4)
                .map(|_| {
                    let (flights, object, explorer) = (flights.clone(), object.clone(), explorer.clone());
                    thread::spawn(move || ask(&flights, &object, true, None, &explorer))
                })
                .collect();
            for reader in readers {
                assert_eq!(reader.join().unwrap(), Ok(Ok(7)));
            }
            assert_eq!(object.fetched.load(SeqCst), 1);
        },
        SCHEDULES,
    );
}

#[test]
fn row_25_a_leader_who_leaves_hands_the_download_over() {
    shuttle::check_random(
        || {
            let (flights, object) = (Flights::new(), Arc::new(Object::default()));
            let explorer = Explorer::default();
            let impatient = Interrupt::new();
            let leader = {
                let (flights, object, explorer) = (flights.clone(), object.clone(), explorer.clone());
                let impatient = impatient.clone();
                thread::spawn(move || ask(&flights, &object, true, Some(&impatient), &explorer))
            };
            let readers: Vec<_> = (0..2)
                .map(|_| {
                    let (flights, object, explorer) = (flights.clone(), object.clone(), explorer.clone());
                    thread::spawn(move || ask(&flights, &object, true, None, &explorer))
                })
                .collect();
            impatient.raise();
            let outcome = leader.join().unwrap();
            assert!(matches!(outcome, Ok(Ok(7)) | Err(Leave::Interrupted)), "{outcome:?}");
            for reader in readers {
                assert_eq!(reader.join().unwrap(), Ok(Ok(7)));
            }
            explorer.finish();
            assert_eq!(object.fetched.load(SeqCst), 1, "the work of the one who left was not lost");
        },
        SCHEDULES,
    );
}

#[test]
fn row_25_a_failure_reaches_all_who_waited_for_it() {
    shuttle::check_random(
        || {
            let (flights, object) = (Flights::new(), Arc::new(Object::default()));
            let explorer = Explorer::default();
            let readers: Vec<_> = (0..3)
                .map(|_| {
                    let (flights, object, explorer) = (flights.clone(), object.clone(), explorer.clone());
                    thread::spawn(move || ask(&flights, &object, false, None, &explorer))
                })
                .collect();
            for reader in readers {
                assert_eq!(reader.join().unwrap(), Ok(Err("damaged everywhere")));
            }
            assert!((1..=3).contains(&object.fetched.load(SeqCst)));
        },
        SCHEDULES,
    );
}

const LIMIT: u64 = 10;
const AHEAD: u64 = 2;

/// A cache of two directories, each with files of one byte.
struct Model {
    directories: [AtomicU64; 2],
    /// The usage record; the number of claimed bytes.
    record: Mutex<u64>,
    evicting: Mutex<()>,
    processes: Vec<Process>,
}

#[derive(Default)]
struct Process {
    budget: Budget,
    /// What it has told the others.
    told: AtomicU64,
}

impl Model {
    fn stored(&self) -> u64 {
        self.directories.iter().map(|directory| directory.load(SeqCst)).sum()
    }

    fn store(&self, process: &Process, directory: usize) {
        if !self.reserve(process) {
            self.evict(process);
            if !self.reserve(process) {
                // Served and not kept.
                return;
            }
        }
        self.directories[directory].fetch_add(1, SeqCst);
        assert!(self.stored() <= LIMIT, "the limit does not hold");
        process.budget.settle(1, 1);
    }

    fn reserve(&self, process: &Process) -> bool {
        if process.budget.take(1) {
            return true;
        }
        let mut claimed = self.record.lock().unwrap();
        let fits = process.budget.claim(&mut claimed, LIMIT, 1, AHEAD);
        process.told.store(process.budget.outstanding(), SeqCst);
        fits
    }

    fn evict(&self, process: &Process) {
        let _turn = self.evicting.lock().unwrap();
        let before = {
            let claimed = self.record.lock().unwrap();
            let others = self.processes.iter().filter(|other| !std::ptr::eq(*other, process));
            let told: u64 = others.map(|other| other.told.load(SeqCst)).sum();
            Count {
                claimed_before: *claimed,
                outstanding_before: told + process.budget.outstanding(),
                found: 0,
            }
        };
        let found = self.stored();
        let mut removed = 0;
        for directory in &self.directories {
            while found - removed > LIMIT / 2 && directory.load(SeqCst) > 0 {
                directory.fetch_sub(1, SeqCst);
                removed += 1;
            }
        }
        let mut claimed = self.record.lock().unwrap();
        *claimed = Count { found: found - removed, ..before }.claimed(*claimed);
    }
}

#[test]
fn row_63_processes_that_store_and_evict_at_once_never_exceed_the_limit() {
    shuttle::check_random(
        || {
            let model = Arc::new(Model {
                directories: [AtomicU64::new(0), AtomicU64::new(0)],
                record: Mutex::new(0),
                evicting: Mutex::new(()),
                processes: (0..2).map(|_| Process::default()).collect(),
            });
            let threads: Vec<_> = (0..4)
                .map(|number| {
                    let model = model.clone();
                    thread::spawn(move || {
                        for round in 0..6 {
                            model.store(&model.processes[number % 2], (number + round) % 2);
                        }
                    })
                })
                .collect();
            for thread in threads {
                thread.join().unwrap();
            }
            let outstanding: u64 = model.processes.iter().map(|process| process.budget.outstanding()).sum();
            assert!(
                *model.record.lock().unwrap() >= model.stored() + outstanding,
                "nothing is left out of the count"
            );
            assert!(model.stored() > 0);
        },
        SCHEDULES,
    );
}
