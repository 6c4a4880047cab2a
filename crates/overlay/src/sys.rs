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

/// `struct fsxattr` of FS_IOC_FSGETXATTR.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Attributes {
    pub(crate) flags: u32,
    extent_size: u32,
    extents: u32,
    pub(crate) project: u32,
    copy_on_write_extent_size: u32,
    padding: [u8; 8],
}

/// `FS_IOC_FSGETXATTR`, `_IOR('X', 31, struct fsxattr)`.
const GET_ATTRIBUTES: libc::c_ulong = 0x801c_581f;
/// `FS_IOC_FSSETXATTR`, `_IOW('X', 32, struct fsxattr)`.
const SET_ATTRIBUTES: libc::c_ulong = 0x401c_5820;
const _: () = assert!(size_of::<Attributes>() == 28);

/// The attributes that a file system keeps beside the usual ones.
pub(crate) fn attributes(file: BorrowedFd<'_>) -> std::io::Result<Attributes> {
    let mut attributes = Attributes::default();
    // SAFETY: the kernel writes one structure of exactly this size (asserted above) through a pointer to one.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), GET_ATTRIBUTES, &raw mut attributes) };
    if result == 0 { Ok(attributes) } else { Err(std::io::Error::last_os_error()) }
}

/// Changes them.
pub(crate) fn set_attributes(file: BorrowedFd<'_>, attributes: &Attributes) -> std::io::Result<()> {
    // SAFETY: the kernel reads one structure of exactly this size (asserted above) and keeps no pointer to it.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), SET_ATTRIBUTES, &raw const *attributes) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// `struct fs_disk_quota` of quotactl(2).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct DiskQuota {
    pub(crate) version: i8,
    pub(crate) flags: i8,
    pub(crate) fields: u16,
    pub(crate) id: u32,
    /// In units of 512 bytes, as the next one and `blocks`.
    pub(crate) hard_blocks: u64,
    pub(crate) soft_blocks: u64,
    pub(crate) hard_inodes: u64,
    pub(crate) soft_inodes: u64,
    pub(crate) blocks: u64,
    pub(crate) inodes: u64,
    /// Times, warnings and what is on a real-time device.
    pub(crate) rest: [u64; 7],
}

const _: () = assert!(size_of::<DiskQuota>() == 112);

/// `QCMD(Q_XGETQUOTA, PRJQUOTA)`.
const GET_PROJECT_QUOTA: libc::c_int = 0x0058_0302;
/// `QCMD(Q_XGETQSTAT, PRJQUOTA)`.
const GET_PROJECT_STATE: libc::c_int = 0x0058_0502;
/// `FS_QUOTA_PDQ_ACCT` and `FS_QUOTA_PDQ_ENFD`: projects are counted, and their limits enforced.
const PROJECTS_ENFORCED: u16 = 1 << 4 | 1 << 5;
/// `QCMD(Q_XSETQLIM, PRJQUOTA)`.
const SET_PROJECT_QUOTA: libc::c_int = 0x0058_0402;

/// The limits and the use of a project on the file system of `file`.
pub(crate) fn project_quota(file: BorrowedFd<'_>, project: u32) -> std::io::Result<DiskQuota> {
    let mut quota = DiskQuota::default();
    quota_call(file, GET_PROJECT_QUOTA, project, &mut quota).map(|()| quota)
}

/// Whether limits of projects are enforced on the file system of `file`.
pub(crate) fn enforces_project_quotas(file: BorrowedFd<'_>) -> std::io::Result<bool> {
    // `struct fs_quota_stat` has 80 bytes: a version, and from byte 2 on the flags.
    let mut state = [0_u8; 128];
    // SAFETY: the kernel writes one structure of 80 bytes into the buffer, which is larger.
    let result = unsafe {
        libc::syscall(libc::SYS_quotactl_fd, file.as_raw_fd(), GET_PROJECT_STATE, 0, state.as_mut_ptr())
    };
    if result != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(u16::from_ne_bytes([state[2], state[3]]) & PROJECTS_ENFORCED == PROJECTS_ENFORCED)
}

/// Sets those limits of a project that `quota.fields` names.
pub(crate) fn set_project_quota(file: BorrowedFd<'_>, project: u32, quota: DiskQuota) -> std::io::Result<()> {
    // The version of the structure, and whose quota it is: a project's.
    let mut quota = DiskQuota { version: 1, flags: 2, id: project, ..quota };
    quota_call(file, SET_PROJECT_QUOTA, project, &mut quota)
}

fn quota_call(
    file: BorrowedFd<'_>,
    command: libc::c_int,
    project: u32,
    quota: &mut DiskQuota,
) -> std::io::Result<()> {
    // SAFETY: for both commands the kernel reads or writes one structure of exactly this size (asserted above).
    let result =
        unsafe { libc::syscall(libc::SYS_quotactl_fd, file.as_raw_fd(), command, project, &raw mut *quota) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}
