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

/// Lets the process that spawns the child trace it; the child stops at its exec.
pub(crate) fn trace_me(command: &mut Command) {
    let prepare = || {
        // SAFETY: the request takes no pointers; it only changes who is told about this process.
        match unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: the closure runs between fork and exec and makes one system call only.
    unsafe {
        command.pre_exec(prepare);
    }
}

/// The next stop or end of a process or thread that this very thread traces: its number and how it stopped.
pub(crate) fn wait_traced() -> io::Result<(i32, i32)> {
    let mut status = 0;
    // SAFETY: the status is a valid place for the result.
    match unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL | libc::__WNOTHREAD) } {
        -1 => Err(io::Error::last_os_error()),
        pid => Ok((pid, status)),
    }
}

/// A request about a stopped thread with a number as its argument.
pub(crate) fn trace(request: libc::c_uint, thread: i32, number: usize) -> io::Result<()> {
    // SAFETY: the requests used here (continue, options) take numbers and no pointers.
    match unsafe { libc::ptrace(request, thread, 0, number) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Whether a stopped thread is about to make a system call; otherwise it comes back from one.
pub(crate) fn enters_call(thread: i32) -> io::Result<bool> {
    // SAFETY: all zeros are a valid value of this structure of numbers.
    let mut info: libc::ptrace_syscall_info = unsafe { std::mem::zeroed() };
    let size = std::mem::size_of_val(&info);
    // SAFETY: the kernel writes at most `size` bytes to the structure.
    match unsafe { libc::ptrace(libc::PTRACE_GET_SYSCALL_INFO, thread, size, &raw mut info) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(info.op == libc::PTRACE_SYSCALL_INFO_ENTRY),
    }
}

/// Sends a signal to the calling thread.
pub(crate) fn signal_this_thread(signal: i32) {
    // SAFETY: the call takes a number; the signal is one that is ignored by default.
    unsafe {
        libc::raise(signal);
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
