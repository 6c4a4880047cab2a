//! Ctrl-C that cleans up: the handler only notes the wish, waits notice it and return an error, and the
//! ordinary destructors then stop engines and remove mounts and directories.

use std::sync::atomic::Ordering;

use crate::syscall;

/// Turns SIGINT, SIGTERM and SIGHUP into a request that [`requested`] and [`check`] report.
pub fn catch() {
    syscall::catch_interrupts();
}

/// Whether an interrupt arrived since [`catch`].
pub fn requested() -> bool {
    syscall::INTERRUPTED.load(Ordering::SeqCst)
}

/// An error if an interrupt arrived.
pub fn check() -> anyhow::Result<()> {
    anyhow::ensure!(!requested(), "interrupted");
    Ok(())
}
