//! The system calls that need `unsafe`: what runs between fork and exec, and the interrupt handler.
#![allow(unsafe_code)]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::Signal;

/// Set by the handler of SIGINT and SIGTERM, once [`catch_interrupts`] was called.
pub(crate) static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Makes the kernel send `signal` to the child when the thread that spawns it ends.
pub(crate) fn signal_on_parent_death(command: &mut Command, signal: Signal) {
    let parent = rustix::process::getpid();
    let prepare = move || {
        rustix::process::set_parent_process_death_signal(Some(signal)).map_err(io::Error::from)?;
        // The parent may have died before the line above took effect.
        if rustix::process::getppid() == Some(parent) {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::ESRCH))
        }
    };
    // SAFETY: the closure runs between fork and exec and makes two system calls only: no allocation, no
    // lock, nothing that another thread of the parent could have left half done.
    unsafe {
        command.pre_exec(prepare);
    }
}

/// From now on SIGINT, SIGTERM and SIGHUP set [`INTERRUPTED`] instead of ending the process.
pub(crate) fn catch_interrupts() {
    extern "C" fn note(_signal: libc::c_int) {
        INTERRUPTED.store(true, Ordering::SeqCst);
    }
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler only stores into an atomic, which is async-signal-safe; the function pointer
        // lives for the whole program.
        unsafe {
            libc::signal(signal, note as extern "C" fn(libc::c_int) as libc::sighandler_t);
        }
    }
}
