//! A walk over the files of a cache directory.

use std::fs::File;
use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, openat, statat, unlinkat};

use super::directory::{CHUNKED, Open, Owner};
use super::{CacheName, Kind, name, presence, space};

/// A file that counts.
pub(super) struct Item<'a> {
    directory: &'a OwnedFd,
    directory_name: &'a str,
    file: &'a str,
    /// Size in bytes; of a partly present file what is there.
    pub(super) size: u64,
    /// The bytes that it counts.
    pub(super) bytes: u64,
    pub(super) kind: Kind,
    /// When the file was last used, in seconds since the epoch.
    used_at: u32,
    is_part: bool,
}

impl Item<'_> {
    /// The file's name as one word.
    pub(super) fn name(&self) -> String {
        let stem = self.file.strip_suffix(".part");
        match stem {
            Some(stem) if self.is_part => stem.to_owned(),
            _ => format!("{}{}", self.directory_name, self.file),
        }
    }

    /// The name under which the cache gives the file out; `None` for a partly present one.
    pub(super) fn cache_name(&self) -> Option<CacheName> {
        if self.is_part { None } else { CacheName::found(self.directory_name, self.file) }
    }

    /// Files of lower rank are evicted first: those of volatile repositories, then by their last use.
    pub(super) fn rank(&self) -> u64 {
        let class = u64::from(self.kind != Kind::Volatile);
        class << 32 | u64::from(self.used_at)
    }

    pub(super) fn remove(&self) -> bool {
        unlinkat(self.directory, self.file, AtFlags::empty()).is_ok()
    }

    pub(super) fn open(&self) -> std::io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        Ok(openat(self.directory, self.file, flags, Mode::empty()).map(File::from)?)
    }
}

/// Calls `each` for every file that counts, and removes what does not belong into a cache of our own.
pub(super) fn visit(open: &Open, each: &mut dyn FnMut(&Item<'_>)) {
    walk(open, each, &mut |item| {
        item.remove();
    });
    if open.owner() == Owner::Client {
        presence::sweep(open.root(), false);
    }
}

/// Calls `each` for every file that counts and `foreign` for every other one. Directories are left alone.
pub(super) fn walk(open: &Open, each: &mut dyn FnMut(&Item<'_>), foreign: &mut dyn FnMut(&Item<'_>)) {
    for number in 0..=255_u8 {
        let directory = format!("{number:02x}");
        let mut sort = |item: &Item<'_>| {
            if name::is_valid(item.directory_name, item.file) {
                each(item);
            } else if open.owner() == Owner::Client {
                foreign(item);
            }
        };
        walk_directory(open, &directory, false, &mut sort);
    }
    if open.owner() == Owner::Client {
        walk_directory(open, CHUNKED, true, &mut |item| {
            if item.file.ends_with(".part") { each(item) } else { foreign(item) }
        });
    }
}

fn walk_directory(open: &Open, name: &str, is_part: bool, each: &mut dyn FnMut(&Item<'_>)) {
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let Ok(directory) = openat(open.root(), name, flags, Mode::empty()) else { return };
    let Ok(entries) = Dir::read_from(&directory) else { return };
    for entry in entries.filter_map(Result::ok) {
        if entry.file_type() == FileType::Directory {
            continue;
        }
        let Ok(stat) = statat(&directory, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW) else { continue };
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            continue;
        }
        let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        // A name that is no text is no name of ours; it is shown as one that is not valid.
        let file = entry.file_name().to_str().ok().filter(|_| is_file);
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let allocated = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512);
        let item = Item {
            directory: &directory,
            directory_name: name,
            file: file.unwrap_or("?"),
            size: if is_part { allocated } else { size },
            // Of a sparse file only what is there.
            bytes: if is_part { allocated } else { space::charge(size) },
            kind: Kind::of_mode(stat.st_mode),
            used_at: u32::try_from(stat.st_mtime.max(0)).unwrap_or(u32::MAX),
            is_part,
        };
        if file.is_some() {
            each(&item);
        } else if open.owner() == Owner::Client {
            let _ = unlinkat(&directory, entry.file_name(), AtFlags::empty());
        }
    }
}
