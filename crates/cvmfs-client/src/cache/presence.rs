//! The presence of a process in a cache directory.
//!
//! Each process has a directory of its own below `txn/`: its temporary files lie there, what it has claimed, and what
//! it has pinned. A lock on a file in it lasts as long as the process lives, however it dies, and in whichever
//! container it runs; so whatever a killed process left behind can be told from work in progress and is removed.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{
    AtFlags, Dir, FileType, FlockOperation, Mode, OFlags, flock, mkdirat, openat, statat, unlinkat,
};
use rustix::io::Errno;

use super::pins::{self, PinSlots};

/// Where the processes' directories are.
pub(super) const TXN: &str = "txn";
/// The file that is locked; it holds the bytes that the process might store.
const LIFE: &str = "life";
const PINS: &str = "pins";
/// In a directory shared between machines, where locks may not work, left-overs are told by their age.
const FOREIGN_AGE: Duration = Duration::from_secs(3 * 24 * 3600);

/// The directory of this process.
#[derive(Debug)]
pub(super) struct Presence {
    directory: OwnedFd,
    life: File,
    pins: File,
    name: CString,
    txn: OwnedFd,
    sequence: AtomicU64,
}

/// What was found of other processes.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Swept {
    /// Processes that live.
    pub(super) living: usize,
    /// Left-overs that were removed.
    pub(super) removed: usize,
}

impl Presence {
    /// Announces this process in the cache directory `root`.
    pub(super) fn announce(root: &OwnedFd, mode: Mode) -> io::Result<Self> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let txn = openat(root, TXN, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let instance = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos() as u64);
        loop {
            // The time tells processes with one number in different containers or on different machines apart.
            let number = COUNTER.fetch_add(1, Ordering::Relaxed);
            let name = CString::new(format!("{}-{instance:x}-{number}", std::process::id()))?;
            match mkdirat(&txn, &name, mode) {
                Err(Errno::EXIST) => continue,
                outcome => outcome?,
            }
            match Self::settle(&txn, name, mode) {
                // Somebody who cleans up was faster than our lock.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                outcome => return outcome,
            }
        }
    }

    fn settle(txn: &OwnedFd, name: CString, mode: Mode) -> io::Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let directory = openat(txn, &name, flags, Mode::empty())?;
        let file = |name: &str| {
            let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            openat(&directory, name, flags, mode & Mode::from_raw_mode(0o660)).map(File::from)
        };
        let life = file(LIFE)?;
        if flock(&life, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(io::ErrorKind::NotFound.into());
        }
        let pins = file(PINS)?;
        if statat(&directory, LIFE, AtFlags::SYMLINK_NOFOLLOW).is_err() {
            return Err(io::ErrorKind::NotFound.into());
        }
        let txn = txn.try_clone()?;
        Ok(Self { directory, life, pins, name, txn, sequence: AtomicU64::new(0) })
    }

    /// The name of the directory.
    pub(super) fn name(&self) -> &std::ffi::CStr {
        &self.name
    }

    /// Where the temporary files lie.
    pub(super) fn directory(&self) -> &OwnedFd {
        &self.directory
    }

    /// A name for a temporary file.
    pub(super) fn temporary_name(&self) -> String {
        self.sequence.fetch_add(1, Ordering::Relaxed).to_string()
    }

    /// A name for a temporary file outside of the own directory.
    pub(super) fn foreign_name(&self) -> String {
        format!("fetch{}-{}", self.name.to_string_lossy(), self.temporary_name())
    }

    /// Tells the other processes how many bytes this one might store.
    pub(super) fn tell_outstanding(&self, bytes: u64) {
        // Who cannot be told counts the files anew.
        let _ = self.life.write_all_at(&bytes.to_le_bytes(), 0);
    }

    /// The file of this process's pins.
    pub(super) fn pins(&self) -> &File {
        &self.pins
    }

    /// Takes this process's directory away, if nothing of it is in use any more.
    pub(super) fn leave(&self) {
        remove(&self.txn, &self.name, &self.directory);
    }
}

/// Bytes that living processes might store, and their pins. `own` is left out of the bytes: it knows better itself.
pub(super) fn living(root: &OwnedFd, own: Option<&Presence>) -> (u64, PinSlots) {
    let (mut outstanding, mut pinned) = (0_u64, PinSlots::default());
    each(root, &mut |_, name, directory| {
        let is_own = own.is_some_and(|own| own.name.as_c_str() == name);
        let open = |file: &str| {
            openat(directory, file, OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty())
                .map(File::from)
        };
        let Ok(life) = open(LIFE) else { return };
        if !is_own && flock(&life, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return;
        }
        let mut bytes = [0; 8];
        if !is_own && life.read_exact_at(&mut bytes, 0).is_ok() {
            outstanding = outstanding.saturating_add(u64::from_le_bytes(bytes));
        }
        if let Ok(file) = open(PINS) {
            pins::read(&file, &mut pinned);
        }
    });
    (outstanding, pinned)
}

/// Removes what processes left behind that do not live any more.
pub(super) fn sweep(root: &OwnedFd, is_shared_between_machines: bool) -> Swept {
    let mut swept = Swept::default();
    let mut dispose = |txn: &OwnedFd, name: &std::ffi::CStr, directory: &OwnedFd| {
        let life = openat(directory, LIFE, OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty());
        let is_dead = match &life {
            _ if is_shared_between_machines => is_old(directory, "."),
            Ok(life) => flock(life, FlockOperation::NonBlockingLockExclusive).is_ok(),
            // A process that has just made its directory, unless that was long ago.
            Err(_) => is_old(directory, "."),
        };
        if is_dead {
            remove(txn, name, directory);
            swept.removed += 1;
        } else {
            swept.living += 1;
        }
    };
    // From a version that had no directories, or from the C++ client. Our older versions locked the files they wrote.
    let mut dispose_plain = |txn: &OwnedFd, name: &std::ffi::CStr| {
        let is_dead = is_old(txn, name)
            || !is_shared_between_machines
                && openat(txn, name, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty())
                    .is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok());
        if is_dead {
            let _ = unlinkat(txn, name, AtFlags::empty());
        }
    };
    each_entry(root, &mut dispose, &mut dispose_plain);
    swept
}

/// Calls `each` with the directory of all processes, and the name and the directory of each.
fn each(root: &OwnedFd, each: &mut dyn FnMut(&OwnedFd, &std::ffi::CStr, &OwnedFd)) {
    each_entry(root, each, &mut |_, _| {});
}

/// The same, and calls `plain` for files that lie between the directories.
fn each_entry(
    root: &OwnedFd,
    each: &mut dyn FnMut(&OwnedFd, &std::ffi::CStr, &OwnedFd),
    plain: &mut dyn FnMut(&OwnedFd, &std::ffi::CStr),
) {
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let Ok(txn) = openat(root, TXN, flags, Mode::empty()) else { return };
    let Ok(entries) = Dir::read_from(&txn) else { return };
    for entry in entries.filter_map(Result::ok) {
        let name = entry.file_name();
        if name.to_bytes().starts_with(b".") {
            continue;
        }
        match openat(&txn, name, flags, Mode::empty()) {
            Ok(directory) => each(&txn, name, &directory),
            Err(_) if entry.file_type() != FileType::Directory => plain(&txn, name),
            Err(_) => {}
        }
    }
}

fn is_old<P: rustix::path::Arg>(directory: impl AsFd, name: P) -> bool {
    let Ok(stat) = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) else { return false };
    let changed = UNIX_EPOCH + Duration::from_secs(u64::try_from(stat.st_mtime).unwrap_or(0));
    changed.elapsed().is_ok_and(|age| age > FOREIGN_AGE)
}

fn remove(txn: &OwnedFd, name: &std::ffi::CStr, directory: &OwnedFd) {
    for entry in Dir::read_from(directory).into_iter().flatten().filter_map(Result::ok) {
        let _ = unlinkat(directory, entry.file_name(), AtFlags::empty());
    }
    let _ = unlinkat(txn, name, AtFlags::REMOVEDIR);
}
