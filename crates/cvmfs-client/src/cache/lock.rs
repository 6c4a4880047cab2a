//! File locks that are waited for in bounded time.

use std::fs::File;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

/// Takes the exclusive lock on `file`. False if it is still held by somebody else after `patience`; such a holder
/// was stopped, since nobody here holds a lock for longer than an instant. Closing the file releases the lock.
pub(crate) fn exclusive(file: &File, patience: Duration) -> bool {
    let end = Instant::now() + patience;
    loop {
        if flock(file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Releases the lock on `file`.
pub(crate) fn release(file: &File) {
    // Unlocking cannot fail on an open file.
    let _ = flock(file, FlockOperation::Unlock);
}
