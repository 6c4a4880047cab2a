//! Two complete trees side by side.

use super::record::content_xattrs;
use crate::marks::is_whiteout;
use crate::tree::{Cursor, DIRECTORY, Node, TreeError, kind, lengthen, shorten};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::fs::{FileType, Mode, OFlags, Stat, openat, readlinkat};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// When two regular files with the same metadata are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Comparison {
    /// If their bytes are.
    Content,
    /// Always: size and time decide, as in engines' lists of changes.
    Metadata,
}

/// What leads from one tree to the other.
pub(crate) enum Difference<'a> {
    /// Not there before.
    Added(Node<'a>),
    /// There before, but otherwise; or a directory, unchanged itself, below which something changes.
    Modified(Node<'a>),
    /// No longer there.
    Deleted(&'a [u8]),
}

/// A directory on the way from the root to where the comparison is.
struct Frame {
    children: std::vec::IntoIter<Child>,
    /// The directory in the upper tree; none for the root.
    stat: Option<Stat>,
    /// Whether the lower tree has it too, and the lower cursor is in it.
    both: bool,
    /// Whether it was reported; the root never is.
    reported: bool,
}

struct Child {
    name: Vec<u8>,
    old: Option<Stat>,
    new: Option<Stat>,
}

/// Compares; differences come in bytewise order of names, directories before what they contain.
pub(crate) fn compare<E: From<TreeError>>(
    lower: &Path,
    upper: &Path,
    comparison: Comparison,
    mut report: impl FnMut(Difference<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let mut sides = Sides { lower: Cursor::open(lower)?, upper: Cursor::open(upper)?, path: Vec::new() };
    let children = sides.children(true)?;
    let mut frames = vec![Frame { children, stat: None, both: true, reported: true }];
    while let Some(frame) = frames.last_mut() {
        let Some(Child { name, old, new }) = frame.children.next() else {
            let done = frames.pop();
            if let (Some(done), false) = (done, frames.is_empty()) {
                sides.leave(done.both)?;
            }
            continue;
        };
        lengthen(&mut sides.path, &name);
        let changed = match (&old, &new) {
            (Some(old), Some(new)) => sides.differ(&name, old, new, comparison)?,
            _ => true,
        };
        if changed {
            sides.report_parents(&mut frames, &name, &mut report)?;
        }
        let Some(stat) = new else {
            report(Difference::Deleted(&sides.path))?;
            shorten(&mut sides.path);
            continue;
        };
        if changed {
            let node = Node { directory: sides.upper.fd(), path: &sides.path, name: &name, stat: &stat };
            report(if old.is_some() { Difference::Modified(node) } else { Difference::Added(node) })?;
        }
        if kind(&stat) == FileType::Directory {
            let both = old.is_some_and(|old| kind(&old) == FileType::Directory);
            sides.enter(&name, both)?;
            let children = sides.children(both)?;
            frames.push(Frame { children, stat: Some(stat), both, reported: changed });
        } else {
            shorten(&mut sides.path);
        }
    }
    Ok(())
}

/// Both trees at the same place.
struct Sides {
    lower: Cursor,
    upper: Cursor,
    path: Vec<u8>,
}

impl Sides {
    fn error(&self, action: &'static str, error: impl Into<io::Error>) -> TreeError {
        TreeError::new(action, &self.path, error)
    }

    /// What the directories at hand contain. Sockets and whiteouts count as absent: no layer holds the former,
    /// and a whiteout that shows in a complete tree hides nothing.
    fn children(&self, both: bool) -> Result<std::vec::IntoIter<Child>, TreeError> {
        let list = |cursor: &Cursor| -> rustix::io::Result<Vec<(Vec<u8>, Stat)>> {
            let mut found = Vec::new();
            for name in cursor.names()? {
                let stat = match cursor.stat(&name) {
                    // Overlayfs lists a whiteout of nothing, and denies it when asked.
                    Err(Errno::NOENT) => continue,
                    stat => stat?,
                };
                if !is_whiteout(&stat) && kind(&stat) != FileType::Socket {
                    found.push((name, stat));
                }
            }
            Ok(found)
        };
        let new = list(&self.upper).map_err(|error| self.error("list directory", error))?;
        let old = if both {
            list(&self.lower).map_err(|error| self.error("list directory", error))?
        } else {
            Vec::new()
        };
        let mut old = old.into_iter().peekable();
        let mut children = Vec::with_capacity(new.len());
        let deleted = |(name, stat)| Child { name, old: Some(stat), new: None };
        for (name, stat) in new {
            while let Some(gone) = old.next_if(|(other, _)| *other < name) {
                children.push(deleted(gone));
            }
            let before = old.next_if(|(other, _)| *other == name).map(|(_, stat)| stat);
            children.push(Child { name, old: before, new: Some(stat) });
        }
        children.extend(old.map(deleted));
        Ok(children.into_iter())
    }

    fn enter(&mut self, name: &[u8], both: bool) -> Result<(), TreeError> {
        self.upper.enter(name).map_err(|error| TreeError::new("open directory", &self.path, error))?;
        if both {
            self.lower.enter(name).map_err(|error| TreeError::new("open directory", &self.path, error))?;
        }
        Ok(())
    }

    fn leave(&mut self, both: bool) -> Result<(), TreeError> {
        self.upper.leave().map_err(|error| TreeError::new("leave directory", &self.path, error))?;
        if both {
            self.lower.leave().map_err(|error| TreeError::new("leave directory", &self.path, error))?;
        }
        shorten(&mut self.path);
        Ok(())
    }

    /// Reports the directories above a change that were not reported yet, from the root on.
    fn report_parents<E: From<TreeError>>(
        &self,
        frames: &mut [Frame],
        name: &[u8],
        report: &mut impl FnMut(Difference<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let depth = frames.len();
        let mut path = self.path.clone();
        path.truncate(path.len() - name.len());
        let ends: Vec<usize> =
            path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at).collect();
        for (level, frame) in frames.iter_mut().enumerate().filter(|(_, frame)| !frame.reported) {
            let Some(stat) = frame.stat else { continue };
            // From the directory at hand, the innermost frame, upwards to this one.
            let open = |error| TreeError::new("open directory", &path, error);
            let mut directory = openat(self.upper.fd(), ".", DIRECTORY, Mode::empty()).map_err(open)?;
            for _ in level + 1..depth {
                directory = openat(&directory, "..", DIRECTORY, Mode::empty()).map_err(open)?;
            }
            let end = ends.get(level - 1).copied().unwrap_or(path.len());
            report(Difference::Modified(Node {
                directory: directory.as_fd(),
                path: &path[..end],
                name: b".",
                stat: &stat,
            }))?;
            frame.reported = true;
        }
        Ok(())
    }

    fn differ(&self, name: &[u8], old: &Stat, new: &Stat, comparison: Comparison) -> Result<bool, TreeError> {
        let before = Node { directory: self.lower.fd(), path: &self.path, name, stat: old };
        let after = Node { directory: self.upper.fd(), path: &self.path, name, stat: new };
        if metadata_differs(old, new, comparison) || content_xattrs(&before)? != content_xattrs(&after)? {
            return Ok(true);
        }
        match (kind(new), comparison) {
            (FileType::Symlink, _) => {
                let target = |directory: BorrowedFd<'_>| {
                    readlinkat(directory, name, Vec::new())
                        .map_err(|error| self.error("read the symbolic link", error))
                };
                Ok(target(self.lower.fd())? != target(self.upper.fd())?)
            }
            (FileType::RegularFile, Comparison::Content) if !is_one_inode(old, new) => {
                self.bytes_differ(name)
            }
            _ => Ok(false),
        }
    }

    fn bytes_differ(&self, name: &[u8]) -> Result<bool, TreeError> {
        let open = |directory: BorrowedFd<'_>| {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            openat(directory, name, flags, Mode::empty())
                .map(File::from)
                .map_err(|error| self.error("open", error))
        };
        let (mut old, mut new) = (open(self.lower.fd())?, open(self.upper.fd())?);
        let (mut left, mut right) = (vec![0; BLOCK], vec![0; BLOCK]);
        loop {
            let count = fill(&mut old, &mut left).map_err(|error| self.error("read", error))?;
            let other = fill(&mut new, &mut right).map_err(|error| self.error("read", error))?;
            if left[..count] != right[..other] {
                return Ok(true);
            }
            if count < BLOCK {
                return Ok(false);
            }
        }
    }
}

const BLOCK: usize = 128 * 1024;

/// Reads until the buffer is full or the file ends.
fn fill(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

fn metadata_differs(old: &Stat, new: &Stat, comparison: Comparison) -> bool {
    let owner_or_mode = (old.st_mode, old.st_uid, old.st_gid) != (new.st_mode, new.st_uid, new.st_gid);
    if owner_or_mode || kind(new) == FileType::Directory {
        return owner_or_mode;
    }
    old.st_rdev != new.st_rdev || old.st_size != new.st_size || !same_time(old, new, comparison)
}

/// Engines take a time without a fraction for one that lost it on the way through an archive.
fn same_time(old: &Stat, new: &Stat, comparison: Comparison) -> bool {
    let lost = comparison == Comparison::Metadata && (old.st_mtime_nsec == 0 || new.st_mtime_nsec == 0);
    old.st_mtime == new.st_mtime && (lost || old.st_mtime_nsec == new.st_mtime_nsec)
}

/// Whether both trees show the same file of a common layer. Device numbers differ between two overlays, but the
/// inode number and the time of its last change, which nobody can set, are the file's own.
fn is_one_inode(old: &Stat, new: &Stat) -> bool {
    old.st_ino == new.st_ino && (old.st_ctime, old.st_ctime_nsec) == (new.st_ctime, new.st_ctime_nsec)
}
