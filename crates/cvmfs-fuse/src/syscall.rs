//! The system calls that neither std nor rustix wraps: FUSE device controls, the
//! shared mapping and descriptor inheritance. The only module with `unsafe`.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::atomic::AtomicU64;

/// `FUSE_DEV_IOC_BACKING_OPEN`, `_IOW(229, 1, struct fuse_backing_map)`.
const BACKING_OPEN: libc::c_ulong = 0x4010_e501;
/// `FUSE_DEV_IOC_BACKING_CLOSE`, `_IOW(229, 2, u32)`.
const BACKING_CLOSE: libc::c_ulong = 0x4004_e502;

/// Opens `/dev/fuse` so that child processes inherit the descriptor.
pub(crate) fn open_fuse_device() -> io::Result<OwnedFd> {
    // SAFETY: the path is a NUL-terminated constant; the result is checked and owned once.
    let fd = unsafe { libc::open(c"/dev/fuse".as_ptr(), libc::O_RDWR) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just returned by open and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes ownership of a descriptor inherited from the parent process.
///
/// Fails if no such descriptor is open.
pub(crate) fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD has no memory effects; it tells whether the number is open.
    if fd < 0 || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: the descriptor is open, was passed for this purpose and is taken once at process start.
    let descriptor = unsafe { OwnedFd::from_raw_fd(fd) };
    // Programs that this process starts must not hold the mount.
    rustix::io::fcntl_setfd(&descriptor, rustix::io::FdFlags::CLOEXEC)?;
    Ok(descriptor)
}

/// Mounts a FUSE file system whose server is behind `device`.
pub(crate) fn mount_fuse(
    device: BorrowedFd<'_>,
    source: &str,
    target: &Path,
    flags: libc::c_ulong,
    options: &str,
) -> io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let invalid = |_| io::Error::from_raw_os_error(libc::EINVAL);
    let source = CString::new(source).map_err(invalid)?;
    let target = CString::new(target.as_os_str().as_bytes()).map_err(invalid)?;
    let data = CString::new(format!("fd={},{options}", device.as_raw_fd())).map_err(invalid)?;
    // SAFETY: all pointers are NUL-terminated strings that outlive the call.
    let result = unsafe {
        libc::mount(source.as_ptr(), target.as_ptr(), c"fuse.cvmfs".as_ptr(), flags, data.as_ptr().cast())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes `file` known to the connection behind `device` as a backing file; returns its id.
pub(crate) fn open_backing(device: BorrowedFd<'_>, file: BorrowedFd<'_>) -> io::Result<u32> {
    /// `struct fuse_backing_map`.
    #[repr(C)]
    struct BackingMap {
        fd: i32,
        flags: u32,
        padding: u64,
    }
    let map = BackingMap { fd: file.as_raw_fd(), flags: 0, padding: 0 };
    // SAFETY: the control reads one such structure from the pointer, which lives through the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), BACKING_OPEN, &raw const map) };
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Closes a backing id of the connection behind `device`. Errors mean that the id is gone already.
pub(crate) fn close_backing(device: BorrowedFd<'_>, id: u32) -> io::Result<()> {
    // SAFETY: the control reads one u32 from the pointer, which lives through the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), BACKING_CLOSE, &raw const id) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Puts `device` in the place of the descriptor `place`.
pub(crate) fn replace_descriptor(device: BorrowedFd<'_>, place: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both descriptors are open; dup2 closes and reopens the number atomically and
    // the owner of `place` keeps owning that number.
    let result = unsafe { libc::dup2(device.as_raw_fd(), place.as_raw_fd()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Blocks SIGTERM, SIGINT and SIGHUP in this process and returns a descriptor that delivers them.
pub(crate) fn signal_descriptor() -> io::Result<OwnedFd> {
    // SAFETY: the set is initialised by sigemptyset before use; signalfd's result is checked and owned once.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::sigaddset(&raw mut set, signal);
        }
        if libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// From now on this process ends, as other commands do, when nobody reads what it prints.
pub(crate) fn end_with_reader() {
    // SAFETY: the default action of a signal needs no handler, and no other thread runs yet.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// Unblocks the signals that a parent's [`signal_descriptor`] blocked: the mask is inherited.
pub(crate) fn unblock_signals() {
    // SAFETY: the set is initialised by sigemptyset; changing the own thread's mask has no memory effects.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
    }
}

/// Detaches the process from its terminal and session, as a daemon does.
pub(crate) fn new_session() {
    // SAFETY: setsid has no memory effects; it fails harmlessly for a group leader.
    unsafe {
        libc::setsid();
    }
}

/// A shared mapping of 64-bit words, used by successive workers and their supervisor.
///
/// All access is atomic, so a process that dies in the middle leaves whole words.
#[derive(Debug)]
pub(crate) struct SharedWords {
    base: *const AtomicU64,
    words: usize,
}

// SAFETY: the mapping is never unmapped before drop and is only accessed through atomics.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// Maps the first `words` 64-bit words of `memory`, which must be at least that large.
    pub(crate) fn map(memory: BorrowedFd<'_>, words: usize) -> io::Result<SharedWords> {
        // SAFETY: a fresh shared mapping chosen by the kernel; the result is checked.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                words * 8,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                memory.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(SharedWords { base: base.cast_const().cast(), words })
    }

    /// The word at `index`.
    pub(crate) fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.words, "shared state index {index} of {}", self.words);
        // SAFETY: the index is inside the mapping, which is page aligned and lives as long as self.
        unsafe { &*self.base.add(index) }
    }

    /// Reads a message from `device` into `words` words from `at` on; its length in bytes.
    pub(crate) fn read_from(&self, device: BorrowedFd<'_>, at: usize, words: usize) -> io::Result<usize> {
        assert!(
            at <= self.words && words <= self.words - at,
            "shared state {at} + {words} of {}",
            self.words
        );
        // SAFETY: the kernel writes at most this many bytes, all inside the mapping, which is writable and lives as long
        // as self. Each reading thread has words of its own, and whatever reads them meanwhile does so atomically.
        let length =
            unsafe { libc::read(device.as_raw_fd(), self.base.add(at).cast_mut().cast(), words * 8) };
        usize::try_from(length).map_err(|_| io::Error::last_os_error())
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: base and length are those of the mapping made in `map`; no reference outlives self.
        unsafe {
            libc::munmap(self.base.cast_mut().cast(), self.words * 8);
        }
    }
}
