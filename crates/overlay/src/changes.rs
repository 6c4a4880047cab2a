//! What a layer changes, as `docker diff` lists it.
//!
//! Engines compare two complete trees for this. [`changes`] gives the same list from the upper directory and a
//! look into the layers below, so that nothing but what was touched has to be read; [`changes_of_trees`]
//! compares, for a parent that is not right below.

mod lowers;

use crate::diff::{Comparison, Difference, compare};
use crate::marks::{is_opaque, is_whiteout};
use crate::tree::{Cursor, TreeError, kind, lengthen, shorten};
use crate::xattrs::{self, CAPABILITY};
pub use lowers::Lowers;
use lowers::{Below, Found};
use rustix::fs::{FileType, Stat};
use std::collections::BTreeMap;
use std::path::Path;

/// One changed path.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Change {
    /// The path, with a leading slash.
    pub path: Vec<u8>,
    /// What happened to it.
    pub kind: ChangeKind,
}

/// What happened to a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ChangeKind {
    /// It was there and is different now, or is a directory in which something changed.
    Modified,
    /// It is new.
    Added,
    /// It is gone; what was in it is not listed.
    Deleted,
}

/// The changes that the layer on disk `upper` makes to the layers below it, sorted by path.
///
/// Times of directories do not count as changes, and neither do files that were copied up unchanged.
pub fn changes(upper: &Path, lowers: &Lowers) -> Result<Vec<Change>, TreeError> {
    let mut walk =
        Walk { cursor: Cursor::open(upper)?, path: Vec::new(), lowers, changes: Changes::default() };
    let mut root = lowers.root();
    if is_opaque(walk.cursor.fd(), b".", lowers.marks()).map_err(|error| walk.error("examine", error))? {
        root = walk.hide_unlisted(root)?;
    }
    let mut frames = vec![(walk.names()?, root)];
    while let Some((names, below)) = frames.last_mut() {
        let Some(name) = names.next() else {
            frames.pop();
            if !frames.is_empty() {
                walk.leave()?;
            }
            continue;
        };
        lengthen(&mut walk.path, &name);
        match walk.visit(&name, below)? {
            Some(below) => {
                walk.enter(&name)?;
                frames.push((walk.names()?, below));
            }
            None => shorten(&mut walk.path),
        }
    }
    Ok(walk.changes.sorted())
}

/// The changes that lead from the complete tree `lower` to the complete tree `upper`, sorted by path.
pub fn changes_of_trees(lower: &Path, upper: &Path) -> Result<Vec<Change>, TreeError> {
    let mut changes = Changes::default();
    compare::<TreeError>(lower, upper, Comparison::Metadata, |difference| {
        match difference {
            Difference::Added(node) => changes.add(node.path, ChangeKind::Added),
            Difference::Modified(node) => changes.add(node.path, ChangeKind::Modified),
            Difference::Deleted(path) => changes.add(path, ChangeKind::Deleted),
        }
        Ok(())
    })?;
    Ok(changes.sorted())
}

#[derive(Default)]
struct Changes(BTreeMap<Vec<u8>, ChangeKind>);

impl Changes {
    /// Notes a change, and that the directories above it are modified unless something else is known of them.
    fn add(&mut self, path: &[u8], kind: ChangeKind) {
        self.0.insert(path.to_vec(), kind);
        let mut parent = path.to_vec();
        loop {
            shorten(&mut parent);
            if parent.is_empty() || self.0.contains_key(&parent) {
                break;
            }
            self.0.insert(parent.clone(), ChangeKind::Modified);
        }
    }

    fn sorted(self) -> Vec<Change> {
        let absolute = |path: Vec<u8>| [b"/", &path[..]].concat();
        self.0.into_iter().map(|(path, kind)| Change { path: absolute(path), kind }).collect()
    }
}

struct Walk<'a> {
    cursor: Cursor,
    path: Vec<u8>,
    lowers: &'a Lowers,
    changes: Changes,
}

impl Walk<'_> {
    fn error(&self, action: &'static str, error: impl Into<std::io::Error>) -> TreeError {
        TreeError::new(action, &self.path, error)
    }

    fn names(&self) -> Result<std::vec::IntoIter<Vec<u8>>, TreeError> {
        self.cursor.names().map(Vec::into_iter).map_err(|error| self.error("list directory", error))
    }

    fn enter(&mut self, name: &[u8]) -> Result<(), TreeError> {
        self.cursor.enter(name).map_err(|error| TreeError::new("open directory", &self.path, error))
    }

    fn leave(&mut self) -> Result<(), TreeError> {
        self.cursor.leave().map_err(|error| TreeError::new("leave directory", &self.path, error))?;
        shorten(&mut self.path);
        Ok(())
    }

    /// Notes what became of one name; for a directory, what lies below it.
    fn visit(&mut self, name: &[u8], below: &Below) -> Result<Option<Below>, TreeError> {
        let stat = self.cursor.stat(name).map_err(|error| self.error("examine", error))?;
        let old = self.lowers.find(below, &self.path)?;
        if is_whiteout(&stat) {
            // A whiteout of nothing is left when something made in the layer is removed again.
            if old.is_some() {
                self.changes.add(&self.path, ChangeKind::Deleted);
            }
            return Ok(None);
        }
        match &old {
            None => self.changes.add(&self.path, ChangeKind::Added),
            Some(old) if self.differs(name, &stat, old)? => {
                self.changes.add(&self.path, ChangeKind::Modified);
            }
            Some(_) => {}
        }
        if kind(&stat) != FileType::Directory {
            return Ok(None);
        }
        let below = old.map(|old| old.below).unwrap_or_default();
        if !is_opaque(self.cursor.fd(), name, self.lowers.marks())
            .map_err(|error| self.error("examine", error))?
        {
            return Ok(Some(below));
        }
        self.enter(name)?;
        let below = self.hide_unlisted(below)?;
        self.cursor.leave().map_err(|error| self.error("leave directory", error))?;
        Ok(Some(below))
    }

    /// In the opaque directory at hand: everything that lies below and is not here again is gone.
    fn hide_unlisted(&mut self, below: Below) -> Result<Below, TreeError> {
        let here = self.cursor.names().map_err(|error| self.error("list directory", error))?;
        for name in self.lowers.list(&below, &self.path)? {
            if here.binary_search(&name).is_err() {
                lengthen(&mut self.path, &name);
                self.changes.add(&self.path, ChangeKind::Deleted);
                shorten(&mut self.path);
            }
        }
        Ok(below)
    }

    fn differs(&self, name: &[u8], new: &Stat, old: &Found) -> Result<bool, TreeError> {
        let before = &old.stat;
        if (new.st_mode, new.st_uid, new.st_gid) != (before.st_mode, before.st_uid, before.st_gid) {
            return Ok(true);
        }
        if kind(new) != FileType::Directory {
            // An engine's archives have whole seconds, so a time without a fraction may have lost it.
            let lost = new.st_mtime_nsec == 0 || before.st_mtime_nsec == 0;
            let same_time =
                new.st_mtime == before.st_mtime && (lost || new.st_mtime_nsec == before.st_mtime_nsec);
            if !same_time || new.st_size != before.st_size || new.st_rdev != before.st_rdev {
                return Ok(true);
            }
        }
        if kind(new) != FileType::RegularFile {
            return Ok(false);
        }
        let capability = xattrs::get(self.cursor.fd(), name, CAPABILITY);
        Ok(capability.map_err(|error| self.error("examine", error))?
            != self.lowers.capability(old, &self.path)?)
    }
}
