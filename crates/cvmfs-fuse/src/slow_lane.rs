//! Threads for requests that must wait for the network.
//!
//! Threads that read `/dev/fuse` never download: they hand the request over and go on.
//! Threads are started when needed and end when idle; their number and the queue are bounded.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Requests waiting for the network at a time. More than the connections to one host, so
/// that one slow object does not hold up others.
pub(crate) const MAX_THREADS: usize = 64;

/// Requests that may wait for a thread. The kernel itself allows a mount about as many
/// foreground requests as there are callers; beyond this they fail instead of piling up.
pub(crate) const MAX_QUEUED: usize = 16_384;

/// How long an idle thread stays.
const IDLE: Duration = Duration::from_secs(20);

/// Work, which is told the number of the thread that does it.
type Job = Box<dyn FnOnce(usize) + Send>;

/// A bounded, elastic pool of threads.
#[derive(Clone, Default)]
pub(crate) struct SlowLane {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    /// Numbers of threads that ended.
    free: Vec<usize>,
    /// Threads had numbers below this.
    numbered: usize,
}

impl std::fmt::Debug for SlowLane {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("SlowLane").finish_non_exhaustive()
    }
}

impl SlowLane {
    /// Runs `job` on a thread of the pool. Dropped without running, and `false` returned,
    /// if the queue is full; the reply inside then answers EIO.
    pub(crate) fn run(&self, job: impl FnOnce(usize) + Send + 'static) -> bool {
        let mut queue = self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.jobs.len() >= MAX_QUEUED {
            drop(queue);
            tracing::error!(waiting = MAX_QUEUED, "too many requests wait for the network; this one fails");
            return false;
        }
        queue.jobs.push_back(Box::new(job));
        if queue.idle < queue.jobs.len() && queue.threads < MAX_THREADS {
            let shared = self.shared.clone();
            let number = queue.free.pop().unwrap_or(queue.numbered);
            let started =
                std::thread::Builder::new().name("cvmfs-slow".into()).spawn(move || shared.work(number));
            if started.is_ok() {
                queue.numbered = queue.numbered.max(number + 1);
            } else if number < queue.numbered {
                queue.free.push(number);
            }
            match started {
                Ok(_) => queue.threads += 1,
                // Without any thread nobody would ever answer.
                Err(error) if queue.threads == 0 => {
                    tracing::error!(%error, "cannot start a thread for a waiting request");
                    queue.jobs.pop_back();
                    return false;
                }
                Err(_) => {}
            }
        }
        drop(queue);
        self.shared.wake.notify_one();
        true
    }
}

impl Shared {
    fn work(&self, number: usize) {
        loop {
            let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
            while queue.jobs.is_empty() {
                queue.idle += 1;
                let (woken, timeout) =
                    self.wake.wait_timeout(queue, IDLE).unwrap_or_else(PoisonError::into_inner);
                queue = woken;
                queue.idle -= 1;
                if timeout.timed_out() && queue.jobs.is_empty() {
                    queue.threads -= 1;
                    queue.free.push(number);
                    return;
                }
            }
            let job = queue.jobs.pop_front();
            drop(queue);
            if let Some(job) = job
                && std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| job(number))).is_err()
            {
                tracing::error!("a request ended in a panic; it was answered with EIO");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn requests_that_wait_do_not_hold_up_others() {
        let lane = SlowLane::default();
        let (blocker, gate) = mpsc::channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        for _ in 0..MAX_THREADS - 1 {
            let gate = gate.clone();
            assert!(lane.run(move |_| {
                let _ = gate.lock().unwrap().recv();
            }));
        }
        let (done, finished) = mpsc::channel();
        assert!(lane.run(move |_| done.send(()).unwrap()));
        finished.recv_timeout(Duration::from_secs(10)).expect("a free thread takes the request");
        drop(blocker);
    }

    #[test]
    fn a_panic_ends_the_request_and_not_the_lane() {
        let lane = SlowLane::default();
        lane.run(|_| panic!("expected by the test"));
        let (done, finished) = mpsc::channel();
        lane.run(move |_| done.send(()).unwrap());
        finished.recv_timeout(Duration::from_secs(10)).unwrap();
    }
}
