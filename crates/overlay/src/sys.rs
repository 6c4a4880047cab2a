//! The system calls whose safety the compiler cannot see.
#![allow(unsafe_code)]

use rustix::io;
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Gives the calling thread a working directory of its own, apart from the process's.
pub(crate) fn unshare_working_directory() -> io::Result<()> {
    // SAFETY: CLONE_FS separates the working directory, the root and the umask of this thread. Memory and
    // file descriptors stay shared, so no other thread can observe a descriptor of a foreign table.
    unsafe { unshare_unsafe(UnshareFlags::FS) }
}
