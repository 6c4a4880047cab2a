//! Writing to the disk while the publisher still compresses.
//!
//! A manifest may only be published when all that it refers to is on the disk. Kernels begin to write after half a
//! minute, so without this most publishes would compress with an idle disk and then wait for it.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Stored bytes after which the disk gets to work: a fraction of a second of its time. More often costs more than it
/// saves: whoever makes files meanwhile waits for directories that are on their way to the disk.
const EVERY: u64 = 128 << 20;

/// The file system of a storage directory.
#[derive(Debug)]
pub(super) struct Writeback {
    /// One descriptor for all: of a failed write the kernel tells each descriptor once, and one that is opened later
    /// not at all if another was told.
    file_system: Arc<File>,
    stored: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    running: Option<JoinHandle<io::Result<()>>>,
    failure: Option<io::Error>,
}

impl Writeback {
    pub(super) fn of(root: &Path) -> io::Result<Self> {
        let file_system = Arc::new(File::open(root)?);
        Ok(Self { file_system, stored: AtomicU64::new(0), state: Mutex::default() })
    }

    /// So many bytes more were stored.
    pub(super) fn stored(&self, bytes: u64) {
        let before = self.stored.fetch_add(bytes, Ordering::Relaxed);
        if before / EVERY == before.wrapping_add(bytes) / EVERY {
            return;
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.running.as_ref().is_some_and(|thread| !thread.is_finished()) {
            return;
        }
        state.finish();
        let file_system = self.file_system.clone();
        state.running = Some(std::thread::spawn(move || Ok(rustix::fs::syncfs(&file_system)?)));
    }

    /// Returns when everything stored so far is on the disk.
    pub(super) fn settle(&self) -> io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.finish();
        if let Some(failure) = state.failure.take() {
            return Err(failure);
        }
        Ok(rustix::fs::syncfs(&self.file_system)?)
    }
}

impl State {
    fn finish(&mut self) {
        let Some(thread) = self.running.take() else { return };
        let outcome =
            thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that flushes has ended")));
        if let Err(error) = outcome {
            self.failure.get_or_insert(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_while_the_publisher_worked_is_told_at_the_end_whatever_came_after_it() {
        let directory = tempfile::tempdir().unwrap();
        let writeback = Writeback::of(directory.path()).unwrap();
        writeback.stored(EVERY);
        writeback.settle().unwrap();
        let failing = std::thread::spawn(|| Err(io::Error::other("the disk is broken")));
        while !failing.is_finished() {
            std::thread::yield_now();
        }
        writeback.state.lock().unwrap().running = Some(failing);
        // Starts another flush, which succeeds.
        writeback.stored(EVERY);
        let told = writeback.settle().unwrap_err();
        assert!(told.to_string().contains("the disk is broken"), "{told}");
        writeback.settle().unwrap();
    }
}
