//! Catalog rows as the kernel wants them (repository format §9.3, client behaviour §8).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cvmfs_format::catalog::{Entry, EntryKind};
use fuser::{FileAttr, FileType, INodeNo};

/// `st_blksize` of every entry.
const BLOCK_SIZE: u32 = 4096;

/// The attributes of `entry` under the node id `id`. `size` replaces the column's value
/// where the two differ: symbolic links report the length of their expanded target.
pub fn attributes(id: u64, entry: &Entry, size: u64) -> FileAttr {
    let time = modification_time(entry);
    FileAttr {
        ino: INodeNo(id),
        size,
        blocks: 1 + size / 512,
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: file_type(entry.kind()),
        perm: (entry.mode & 0o7777) as u16,
        nlink: entry.link_count,
        uid: entry.uid,
        gid: entry.gid,
        rdev: device(entry),
        blksize: BLOCK_SIZE,
        flags: 0,
    }
}

/// The size that `stat` reports, except for symbolic links.
pub fn plain_size(entry: &Entry) -> u64 {
    match entry.kind() {
        EntryKind::File | EntryKind::Directory => entry.size,
        _ => 0,
    }
}

/// The kernel's file type.
pub fn file_type(kind: EntryKind) -> FileType {
    match kind {
        EntryKind::Directory => FileType::Directory,
        EntryKind::File => FileType::RegularFile,
        EntryKind::Symlink => FileType::Symlink,
        EntryKind::Fifo => FileType::NamedPipe,
        EntryKind::Socket => FileType::Socket,
        EntryKind::CharDevice => FileType::CharDevice,
        EntryKind::BlockDevice => FileType::BlockDevice,
    }
}

fn modification_time(entry: &Entry) -> SystemTime {
    let nanoseconds = Duration::from_nanos(u64::from(entry.mtime_ns.unwrap_or(0).min(999_999_999)));
    let seconds = Duration::from_secs(entry.mtime.unsigned_abs());
    let time =
        if entry.mtime < 0 { UNIX_EPOCH.checked_sub(seconds) } else { UNIX_EPOCH.checked_add(seconds) };
    time.and_then(|time| time.checked_add(nanoseconds)).unwrap_or(UNIX_EPOCH)
}

/// The device number in the kernel's 32-bit form: 12 bits major, 20 bits minor. The column
/// holds glibc's 64-bit form, which agrees with it for numbers of that width. Everything
/// that is not a device reports 1, as the C++ client does.
fn device(entry: &Entry) -> u32 {
    match entry.kind() {
        EntryKind::CharDevice | EntryKind::BlockDevice => entry.size as u32,
        _ => 1,
    }
}
