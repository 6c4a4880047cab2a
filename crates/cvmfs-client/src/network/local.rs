//! A small runtime for each thread that waits for the network.
//!
//! A thread that fetches an object drives its own connection: it sends, sleeps until the socket has something, and
//! reads. With one runtime for all, another thread would watch the sockets and wake this one for each answer and
//! each time-out; a wake-up of another processor costs more than all else that a small object needs.
//!
//! A caller who leaves its work behind leaves its runtime with it: timers and sockets of the work belong to it. A
//! thread of its own then drives both to the end.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::runtime::{Builder, Handle, Runtime};

/// Tells runtimes apart. The default is that of threads without a local one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Place(u64);

struct Local {
    place: Place,
    runtime: Runtime,
}

thread_local! {
    /// The runtime of this thread, while it is not in use.
    static IDLE: RefCell<Option<Local>> = const { RefCell::new(None) };
    /// Where the work is that this thread drives.
    static HERE: Cell<Place> = const { Cell::new(Place(0)) };
}

/// The runtime in which the caller is polled.
pub(super) fn here() -> Place {
    HERE.get()
}

/// Drives `work` on the calling thread, which must not be one of a runtime. Where there are no descriptors for a
/// runtime of its own, `common` watches the sockets.
pub(super) fn drive<T>(common: &Handle, work: impl Future<Output = T>) -> T {
    let Some(local) = IDLE.take().or_else(|| Local::new().ok()) else { return common.block_on(work) };
    let outcome = local.drive(work);
    IDLE.set(Some(local));
    outcome
}

/// Drives what [`drive`] began on this thread to its end, on a thread of its own. Without threads the work is dropped,
/// and whoever waits for it begins anew.
pub(super) fn leave(common: &Handle, work: impl Future<Output = ()> + Send + 'static) {
    let Some(local) = IDLE.take() else {
        common.spawn(work);
        return;
    };
    let spawned = std::thread::Builder::new().name("cvmfs-left".to_owned()).spawn(move || local.drive(work));
    if let Err(error) = spawned {
        tracing::warn!(%error, "no thread for a download whose reader has left; it is given up");
    }
}

impl Local {
    fn new() -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let runtime = Builder::new_current_thread().enable_all().build()?;
        Ok(Self { place: Place(NEXT.fetch_add(1, Ordering::Relaxed)), runtime })
    }

    fn drive<T>(&self, work: impl Future<Output = T>) -> T {
        let _away = Away;
        HERE.set(self.place);
        self.runtime.block_on(work)
    }
}

/// Resets the place also after a panic.
struct Away;

impl Drop for Away {
    fn drop(&mut self) {
        HERE.set(Place::default());
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn work_that_was_left_goes_on_with_its_timers() {
        let common = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let common = common.handle();
        let (done, finished) = std::sync::mpsc::channel();
        let mut work = Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(50)).await;
            done.send(here()).unwrap();
        });
        let began = drive(common, async {
            tokio::select! {
                biased;
                () = work.as_mut() => panic!("it cannot be done yet"),
                () = tokio::time::sleep(Duration::from_millis(1)) => here(),
            }
        });
        leave(common, work);
        assert_eq!(finished.recv_timeout(Duration::from_secs(10)).unwrap(), began);
        assert_eq!(here(), Place::default());
        assert_ne!(drive(common, async { here() }), began, "this thread got a runtime of its own");
    }
}
