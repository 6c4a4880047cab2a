//! What differs between two revisions (publisher behaviour §9).
//!
//! The two trees are walked side by side; a nested catalog that both have in the same form is not even opened, so the
//! time depends on the difference and not on the size of the repository. Memory depends on the depth and on the
//! largest directory: changes are handed out as they are found, in the order of their paths.

use std::cmp::Ordering;
use std::fs;
use std::rc::Rc;

use cvmfs_format::catalog::{Catalog, Entry, EntryKind};
use cvmfs_format::history::{TRUNK, TRUNK_PREVIOUS};
use cvmfs_format::manifest::Manifest;
use cvmfs_format::{ContentHash, ObjectKind, ObjectName, PathHash};
use serde::Serialize;

use crate::error::{PublishError, shown};
use crate::head::unpack_database;
use crate::revisions::tags;
use crate::storage::{Scratch, Storage};
use crate::tree::MAX_DEPTH;
use crate::workspace::{chain, joined};

/// What happened to a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ChangeKind {
    /// It is in the second revision only.
    Added,
    /// It is in the first revision only.
    Removed,
    /// It is in both and differs.
    Modified,
}

/// One difference.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// What happened.
    pub change: ChangeKind,
    /// Path from the root of the repository, beginning with a slash; odd bytes escaped.
    pub path: String,
    /// What it is, in the second revision unless it was removed: file, directory, symlink, …
    pub kind: &'static str,
    /// Plain bytes, in the second revision unless it was removed.
    pub size: u64,
    /// What differs, of a modified one: kind, content, mode, owner, time, target, attributes, links, flags, catalog.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub what: Vec<&'static str>,
}

/// A revision by what a user calls it: a tag, the hash of a root catalog, or the number of a tagged revision.
///
/// # Errors
/// [`PublishError::NotFound`] if the history knows no such revision and it is no hash.
pub fn root_of(storage: &dyn Storage, manifest: &Manifest, name: &str) -> Result<ContentHash, PublishError> {
    let known = tags(storage, manifest)?;
    let number = name.parse::<u64>().ok();
    if let Some(tag) = known.iter().find(|tag| tag.name == name || Some(tag.revision) == number) {
        return Ok(tag.root_catalog);
    }
    if name == TRUNK || number == Some(manifest.revision) {
        return Ok(manifest.root_catalog);
    }
    if number.is_none()
        && let Ok(hash) = name.parse::<ContentHash>()
    {
        return Ok(hash);
    }
    let hint = if name == TRUNK_PREVIOUS {
        "there was no publish since the last rollback"
    } else {
        "see `cvmfs-publish tag list`"
    };
    Err(PublishError::NotFound(format!("there is no revision {name:?} in {}: {hint}", manifest.fqrn)))
}

/// Hands every difference between two root catalogs to `visit`; an error of it ends the walk.
///
/// # Errors
/// A catalog that is missing or damaged, or the error of `visit`.
pub fn diff(
    storage: &dyn Storage,
    from: ContentHash,
    to: ContentHash,
    visit: &mut dyn FnMut(Change) -> Result<(), PublishError>,
) -> Result<(), PublishError> {
    if from == to {
        return Ok(());
    }
    let mut walk = Walk { storage, scratch: Scratch::in_temporary_directory()?, visit };
    let (old, new) = (walk.open(from)?, walk.open(to)?);
    let root = PathHash::of(b"");
    let in_root = |catalog: &Catalog| {
        catalog
            .lookup(root)
            .map_err(|error| PublishError::damaged("root catalog", chain(&error)))?
            .ok_or_else(|| PublishError::damaged("root catalog", "has no root"))
    };
    let (before, after) = (in_root(&old)?, in_root(&new)?);
    walk.modified(b"", &before, &after, false)?;
    walk.directories(b"", Some(&Rc::new(old)), Some(&Rc::new(new)), 0)
}

struct Walk<'a> {
    storage: &'a dyn Storage,
    scratch: Scratch,
    visit: &'a mut dyn FnMut(Change) -> Result<(), PublishError>,
}

/// The catalog with the content of a directory, on one side.
type Side<'a> = Option<&'a Rc<Catalog>>;

impl Walk<'_> {
    /// Compares what is in the directory `path` on both sides; on one of them it may not exist.
    fn directories(
        &mut self,
        path: &[u8],
        old: Side<'_>,
        new: Side<'_>,
        depth: usize,
    ) -> Result<(), PublishError> {
        if depth > MAX_DEPTH {
            return Err(PublishError::damaged(
                shown(path),
                format!("is more than {MAX_DEPTH} directories deep"),
            ));
        }
        let (before, after) = (list(path, old)?, list(path, new)?);
        let (mut before, mut after) = (before.iter().peekable(), after.iter().peekable());
        loop {
            let order = match (before.peek(), after.peek()) {
                (None, None) => return Ok(()),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some(old), Some(new)) => old.name.cmp(&new.name),
            };
            let one = if order.is_le() { before.next() } else { None };
            let other = if order.is_ge() { after.next() } else { None };
            match (one, other) {
                (Some(entry), None) => self.alone(ChangeKind::Removed, path, entry, old, depth)?,
                (None, Some(entry)) => self.alone(ChangeKind::Added, path, entry, new, depth)?,
                (Some(one), Some(other)) => self.both(path, (one, old), (other, new), depth)?,
                (None, None) => return Ok(()),
            }
        }
    }

    /// An entry that only one side has, with everything below it.
    fn alone(
        &mut self,
        change: ChangeKind,
        parent: &[u8],
        entry: &Entry,
        side: Side<'_>,
        depth: usize,
    ) -> Result<(), PublishError> {
        let path = joined(parent, &entry.name);
        (self.visit)(described(change, &path, entry, Vec::new()))?;
        if !entry.is_directory() {
            return Ok(());
        }
        let below = self.content(&path, entry, side)?;
        match change {
            ChangeKind::Removed => self.directories(&path, below.as_ref(), None, depth + 1),
            _ => self.directories(&path, None, below.as_ref(), depth + 1),
        }
    }

    fn both(
        &mut self,
        parent: &[u8],
        (one, old): (&Entry, Side<'_>),
        (other, new): (&Entry, Side<'_>),
        depth: usize,
    ) -> Result<(), PublishError> {
        let path = joined(parent, &one.name);
        if one.kind() != other.kind() && (one.is_directory() || other.is_directory()) {
            self.alone(ChangeKind::Removed, parent, one, old, depth)?;
            return self.alone(ChangeKind::Added, parent, other, new, depth);
        }
        let chunks_differ = one.is_chunked() && other.is_chunked() && {
            let read = |side: Side<'_>, entry: &Entry| match side {
                Some(catalog) => catalog
                    .chunks_of(entry)
                    .map_err(|error| PublishError::damaged(shown(&path), chain(&error))),
                None => Ok(Vec::new()),
            };
            read(old, one)? != read(new, other)?
        };
        self.modified(&path, one, other, chunks_differ)?;
        if !one.is_directory() {
            return Ok(());
        }
        if one.is_nested_mountpoint() && other.is_nested_mountpoint() {
            let (before, after) = (nested(&path, old)?, nested(&path, new)?);
            if before == after {
                return Ok(());
            }
        }
        let before = self.content(&path, one, old)?;
        let after = self.content(&path, other, new)?;
        self.directories(&path, before.as_ref(), after.as_ref(), depth + 1)
    }

    fn modified(
        &mut self,
        path: &[u8],
        one: &Entry,
        other: &Entry,
        chunks_differ: bool,
    ) -> Result<(), PublishError> {
        let is_directory = one.is_directory();
        let differences = [
            ("kind", one.kind() != other.kind()),
            (
                "content",
                one.hash != other.hash
                    || chunks_differ
                    || one.is_chunked() != other.is_chunked()
                    || (one.kind() == EntryKind::File && one.size != other.size),
            ),
            ("mode", one.mode & 0o7777 != other.mode & 0o7777),
            ("owner", (one.uid, one.gid) != (other.uid, other.gid)),
            ("time", (one.mtime, one.mtime_ns) != (other.mtime, other.mtime_ns)),
            ("target", one.symlink != other.symlink),
            ("attributes", one.xattrs != other.xattrs),
            // A directory's link count follows from what is in it.
            ("links", !is_directory && one.link_count != other.link_count),
            (
                "flags",
                one.is_external() != other.is_external()
                    || one.is_hidden() != other.is_hidden()
                    || one.is_direct_io() != other.is_direct_io(),
            ),
            ("catalog", one.is_nested_mountpoint() != other.is_nested_mountpoint()),
        ];
        let what: Vec<&'static str> =
            differences.iter().filter(|(_, differs)| *differs).map(|(name, _)| *name).collect();
        if what.is_empty() {
            return Ok(());
        }
        (self.visit)(described(ChangeKind::Modified, path, other, what))
    }

    /// The catalog with the content of a directory.
    fn content(
        &self,
        path: &[u8],
        entry: &Entry,
        side: Side<'_>,
    ) -> Result<Option<Rc<Catalog>>, PublishError> {
        if entry.is_nested_mountpoint() {
            let hash = nested(path, side)?.ok_or_else(|| {
                PublishError::damaged(shown(path), "is a mountpoint without a nested catalog")
            })?;
            return Ok(Some(Rc::new(self.open(hash)?)));
        }
        Ok(side.cloned())
    }

    /// Opens a catalog; its file is unlinked at once.
    fn open(&self, hash: ContentHash) -> Result<Catalog, PublishError> {
        let name = ObjectName::new(hash, ObjectKind::Catalog);
        let file = self.scratch.file("catalog");
        unpack_database(self.storage, name, &file)?;
        let catalog = Catalog::open(&file).map_err(|error| PublishError::damaged(name.path(), chain(&error)));
        let _ = fs::remove_file(&file);
        catalog
    }
}

fn nested(path: &[u8], side: Side<'_>) -> Result<Option<ContentHash>, PublishError> {
    let Some(catalog) = side else { return Ok(None) };
    let found = catalog.nested_at(path).map_err(|error| PublishError::damaged(shown(path), chain(&error)))?;
    Ok(found.map(|nested| nested.hash))
}

/// The entries of a directory in the order of their names.
fn list(path: &[u8], side: Side<'_>) -> Result<Vec<Entry>, PublishError> {
    let Some(catalog) = side else { return Ok(Vec::new()) };
    let mut entries = catalog
        .list_all(PathHash::of(path))
        .map_err(|error| PublishError::damaged(shown(path), chain(&error)))?;
    entries.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(entries)
}

fn described(change: ChangeKind, path: &[u8], entry: &Entry, what: Vec<&'static str>) -> Change {
    let kind = match entry.kind() {
        EntryKind::Directory => "directory",
        EntryKind::File => "file",
        EntryKind::Symlink => "symlink",
        EntryKind::Fifo => "fifo",
        EntryKind::Socket => "socket",
        EntryKind::CharDevice => "character device",
        EntryKind::BlockDevice => "block device",
    };
    let size = if entry.kind() == EntryKind::File { entry.size } else { 0 };
    let path = if path.is_empty() { "/".to_owned() } else { shown(path) };
    Change { change, path, kind, size, what }
}
