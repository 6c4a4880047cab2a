//! Layers stacked into one tree by their catalogs alone (publisher behaviour §16, `.flat`).
//!
//! The result is what overlayfs shows for the layers: the topmost entry of a name counts,
//! directories are merged down to the first opaque one, a whiteout hides what lies below.
//! No content is read or copied; the new rows refer to the objects of the layers' rows.
//!
//! Layers are read in both forms: overlayfs's own (character device 0:0, attribute
//! `*.overlay.opaque`), and the archive's (`.wh.NAME`, `.wh..wh..opq`), which the C++ tools
//! leave as files.

use std::collections::{BTreeMap, HashMap};

use cvmfs_format::catalog::{Entry, EntryKind};
use cvmfs_format::xattr::Xattrs;
use layer_tar::is_overlay_xattr;

use crate::balance::AUTO_MARKER;
use crate::error::PublishError;
use crate::interrupt::Interrupt;
use crate::tree::MAX_DEPTH;
use crate::workspace::{Index, MARKER, Workspace, joined};

/// Begin of the names of markers in archives.
const MARK: &[u8] = b".wh.";
/// Marks its directory as opaque in archives.
const OPAQUE_MARK: &[u8] = b".wh..wh..opq";
/// Marks a directory as opaque for overlayfs.
const OPAQUE_XATTRS: [&[u8]; 2] = [b"trusted.overlay.opaque", b"user.overlay.opaque"];

/// Stacks layers below a directory that is there and empty but for its marker.
#[derive(Debug)]
pub(crate) struct Stack<'a> {
    pub(crate) workspace: &'a mut Workspace,
    pub(crate) interrupt: &'a Interrupt,
    /// Rows made so far.
    pub(crate) entries: u64,
}

/// A hard link group of a layer: the directory, and the number there.
type SourceGroup = (Vec<u8>, u32);

/// What becomes of a name.
enum Slot {
    /// A whiteout: nothing of the layers below.
    Hidden,
    Leaf {
        entry: Entry,
        from: Index,
        directory: Vec<u8>,
    },
    Directory {
        entry: Entry,
        parts: Vec<Vec<u8>>,
        is_open: bool,
    },
}

impl Stack<'_> {
    /// Fills `base` with the layers, the lowest first. Takes over the topmost layer's
    /// metadata of the root.
    pub(crate) fn at(&mut self, base: &[u8], layers: &[&[u8]]) -> Result<(), PublishError> {
        let mut parts = Vec::new();
        for layer in layers.iter().rev() {
            let entry = self.workspace.lookup(layer)?.filter(Entry::is_directory).ok_or_else(|| {
                PublishError::NotFound(format!("there is no layer {}", crate::error::shown(layer)))
            })?;
            let is_opaque = is_opaque(&entry, layer)?;
            parts.push((layer.to_vec(), entry));
            if is_opaque {
                break;
            }
        }
        let Some((_, top)) = parts.first().cloned() else { return Ok(()) };
        let parts: Vec<Vec<u8>> = parts.into_iter().map(|(path, _)| path).collect();
        let subdirectories = self.merge(base, &parts, 0)?;
        let xattrs = without_overlay_marks(&top, base)?;
        let at = self.workspace.row_catalog(base)?;
        self.workspace.update_directory(at, base, |entry| {
            entry.mode = top.mode;
            (entry.uid, entry.gid) = (top.uid, top.gid);
            (entry.mtime, entry.mtime_ns) = (top.mtime, top.mtime_ns);
            entry.xattrs.clone_from(&xattrs);
            entry.link_count = entry.link_count.saturating_add(subdirectories);
        })
    }

    /// Merges directories, the topmost first, into `target`; returns the number of its
    /// sub-directories.
    fn merge(&mut self, target: &[u8], parts: &[Vec<u8>], depth: usize) -> Result<u32, PublishError> {
        self.interrupt.check()?;
        if depth > MAX_DEPTH {
            return Err(PublishError::entry(target, format!("lies more than {MAX_DEPTH} directories deep")));
        }
        let slots = self.slots(parts)?;
        let at = self.workspace.content_catalog(target)?;
        let groups = self.link_groups(at, target, &slots)?;
        let mut subdirectories = 0;
        for (name, slot) in slots {
            let path = joined(target, &name);
            match slot {
                Slot::Hidden => {}
                Slot::Leaf { entry, from, directory } => {
                    let source = joined(&directory, &name);
                    let chunks = self.workspace.chunks_of(from, &entry, &source)?;
                    let group = groups.get(&(directory, entry.link_group)).copied();
                    let mut copy = moved(&entry, &path)?;
                    (copy.link_group, copy.link_count) = group.unwrap_or((0, 1));
                    self.workspace.insert(at, &path, &copy, &chunks)?;
                    self.entries += 1;
                }
                Slot::Directory { entry, parts, .. } => {
                    let below = self.merge(&path, &parts, depth + 1)?;
                    let mut copy = moved(&entry, &path)?;
                    copy.link_count = below.saturating_add(2);
                    self.workspace.insert(at, &path, &copy, &[])?;
                    self.entries += 1;
                    subdirectories += 1;
                }
            }
        }
        Ok(subdirectories)
    }

    fn slots(&mut self, parts: &[Vec<u8>]) -> Result<BTreeMap<Vec<u8>, Slot>, PublishError> {
        let mut slots: BTreeMap<Vec<u8>, Slot> = BTreeMap::new();
        for directory in parts {
            let from = self.workspace.content_catalog(directory)?;
            let entries = self.workspace.list(from, directory)?;
            let mut hidden = Vec::new();
            let mut is_last = false;
            for entry in entries {
                let name = entry.name.clone();
                if name == MARKER || name == AUTO_MARKER {
                    continue;
                } else if name == OPAQUE_MARK {
                    is_last = true;
                    continue;
                } else if let Some(below) = name.strip_prefix(MARK) {
                    hidden.push(below.to_vec());
                    continue;
                }
                let path = joined(directory, &name);
                if entry.is_bind_mountpoint() {
                    return Err(PublishError::entry(&path, "is a bind mountpoint, which no layer has"));
                }
                let is_directory = entry.is_directory();
                match slots.get_mut(&name) {
                    None => {
                        let slot = if is_directory {
                            let is_open = !is_opaque(&entry, &path)?;
                            Slot::Directory { entry, parts: vec![path], is_open }
                        } else if entry.kind() == EntryKind::CharDevice && entry.size == 0 {
                            Slot::Hidden
                        } else {
                            Slot::Leaf { entry, from, directory: directory.clone() }
                        };
                        slots.insert(name, slot);
                    }
                    Some(Slot::Directory { parts, is_open, .. }) if *is_open => {
                        if is_directory {
                            *is_open = !is_opaque(&entry, &path)?;
                            parts.push(path);
                        } else {
                            *is_open = false;
                        }
                    }
                    Some(_) => {}
                }
            }
            // A mark hides what lies below its layer, not what its own layer brings.
            for name in hidden {
                match slots.get_mut(&name) {
                    None => drop(slots.insert(name, Slot::Hidden)),
                    Some(Slot::Directory { is_open, .. }) => *is_open = false,
                    Some(_) => {}
                }
            }
            if is_last {
                break;
            }
        }
        Ok(slots)
    }

    /// Numbers for the files that still have several names, by where they come from.
    fn link_groups(
        &mut self,
        at: Index,
        target: &[u8],
        slots: &BTreeMap<Vec<u8>, Slot>,
    ) -> Result<HashMap<SourceGroup, (u32, u32)>, PublishError> {
        let mut names: BTreeMap<SourceGroup, u32> = BTreeMap::new();
        for slot in slots.values() {
            if let Slot::Leaf { entry, directory, .. } = slot
                && entry.link_group != 0
            {
                *names.entry((directory.clone(), entry.link_group)).or_default() += 1;
            }
        }
        let mut groups = HashMap::new();
        for (source, count) in names.into_iter().filter(|(_, count)| *count > 1) {
            groups.insert(source, (self.workspace.new_link_group(at, target)?, count));
        }
        Ok(groups)
    }
}

/// The row at another place.
fn moved(entry: &Entry, path: &[u8]) -> Result<Entry, PublishError> {
    let place = Entry::new(path, entry.kind(), 0);
    let flags = if entry.is_directory() { place.flags } else { entry.flags };
    Ok(Entry {
        path_hash: place.path_hash,
        parent: place.parent,
        name: place.name,
        flags,
        link_group: 0,
        xattrs: without_overlay_marks(entry, path)?,
        ..entry.clone()
    })
}

fn is_opaque(entry: &Entry, path: &[u8]) -> Result<bool, PublishError> {
    let Some(blob) = &entry.xattrs else { return Ok(false) };
    let xattrs = Xattrs::parse(blob).map_err(|error| PublishError::entry(path, error))?;
    Ok(OPAQUE_XATTRS.iter().any(|name| xattrs.get(name) == Some(b"y")))
}

/// The marks mean nothing in a merged tree.
fn without_overlay_marks(entry: &Entry, path: &[u8]) -> Result<Option<Vec<u8>>, PublishError> {
    let Some(blob) = &entry.xattrs else { return Ok(None) };
    let mut xattrs = Xattrs::parse(blob).map_err(|error| PublishError::entry(path, error))?;
    let marks: Vec<Vec<u8>> =
        xattrs.iter().map(|(name, _)| name.to_vec()).filter(|name| is_overlay_xattr(name)).collect();
    for mark in marks {
        xattrs.remove(&mark);
    }
    xattrs.to_bytes().map_err(|error| PublishError::entry(path, error))
}
