//! The system calls whose safety the compiler cannot see.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io;
use rustix::process::Pid;
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Gives the calling thread a working directory of its own, apart from the process's.
pub(crate) fn unshare_working_directory() -> io::Result<()> {
    // SAFETY: CLONE_FS separates the working directory, the root and the umask of this thread. Memory and
    // file descriptors stay shared, so no other thread can observe a descriptor of a foreign table.
    unsafe { unshare_unsafe(UnshareFlags::FS) }
}

/// `struct mount_attr` of mount_setattr(2).
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// `MOUNT_ATTR_IDMAP`.
const ATTRIBUTE_IDMAP: u64 = 0x0010_0000;

/// Has a mount that is not attached yet show owners as `user_namespace` maps them.
pub(crate) fn map_owners(mount: BorrowedFd<'_>, user_namespace: BorrowedFd<'_>) -> std::io::Result<()> {
    let attributes = MountAttributes {
        set: ATTRIBUTE_IDMAP,
        clear: 0,
        propagation: 0,
        user_namespace: u64::from(user_namespace.as_raw_fd().unsigned_abs()),
    };
    // SAFETY: the path is a NUL-terminated constant, and the structure is read for the length that is given; both
    // outlive the call. The kernel writes to neither.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Starts a process in a user namespace of its own. It does nothing until it is killed, at the latest by the kernel
/// when the calling thread ends. The caller waits for it.
pub(crate) fn start_in_user_namespace() -> std::io::Result<Pid> {
    let parent = libc::c_long::from(rustix::process::getpid().as_raw_nonzero().get());
    let flags = libc::CLONE_NEWUSER | libc::SIGCHLD;
    // SAFETY: without CLONE_VM this is fork(2): the child has memory of its own. Other threads' locks may be held in
    // that copy, so the child makes nothing but system calls, on its own stack, and never returns.
    let child = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    if child == 0 {
        // SAFETY: plain system calls without pointers.
        unsafe {
            libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
            // The parent may have ended before that.
            while libc::syscall(libc::SYS_getppid) == parent {
                libc::syscall(libc::SYS_ppoll, 0, 0, 0, 0, 0);
            }
            loop {
                libc::syscall(libc::SYS_exit_group, 0);
            }
        }
    }
    let child = i32::try_from(child).ok().and_then(Pid::from_raw);
    child.ok_or_else(std::io::Error::last_os_error)
}
