//! Looking things up in a stack of layers without mounting it.

use crate::marks::{OpaqueXattr, is_opaque, is_whiteout};
use crate::tree::{DIRECTORY, TreeError, kind, names, open_below, shorten};
use crate::xattrs::{self, CAPABILITY};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Stat, openat, statat};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// Layers on disk, topmost first, looked at as overlayfs merges them.
#[derive(Debug)]
pub struct Lowers {
    layers: Vec<OwnedFd>,
    marks: OpaqueXattr,
}

/// The layers that take part in a directory, topmost first.
#[derive(Debug, Clone, Default)]
pub(super) struct Below(Vec<usize>);

/// What the layers show at a path.
pub(super) struct Found {
    pub(super) stat: Stat,
    /// The layer that it comes from.
    layer: usize,
    /// If it is a directory: the layers that take part in it.
    pub(super) below: Below,
}

impl Lowers {
    /// Opens the layers, topmost first. `marks` are the attributes that a mount of them would heed.
    pub fn open(layers: &[PathBuf], marks: OpaqueXattr) -> Result<Self, TreeError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = |layer: &PathBuf| {
            openat(CWD, layer, flags, Mode::empty())
                .map_err(|error| TreeError::new("open layer", layer.as_os_str().as_bytes(), error))
        };
        Ok(Lowers { layers: layers.iter().map(open).collect::<Result<_, _>>()?, marks })
    }

    pub(super) fn marks(&self) -> OpaqueXattr {
        self.marks
    }

    pub(super) fn root(&self) -> Below {
        let mut below = Vec::new();
        for (layer, root) in self.layers.iter().enumerate() {
            below.push(layer);
            if is_opaque(root.as_fd(), b".", self.marks).unwrap_or(false) {
                break;
            }
        }
        Below(below)
    }

    /// What the layers show at `path`, whose directory has the layers `directory`.
    pub(super) fn find(&self, directory: &Below, path: &[u8]) -> Result<Option<Found>, TreeError> {
        let examine = |error| TreeError::new("examine in a lower layer", path, error);
        let mut found: Option<Found> = None;
        for &layer in &directory.0 {
            let (parent, name) = self.parent(layer, path).map_err(examine)?;
            let stat = match statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                Err(Errno::NOENT) => continue,
                Err(error) => return Err(examine(error)),
            };
            let is_directory = kind(&stat) == FileType::Directory;
            if is_whiteout(&stat) || (found.is_some() && !is_directory) {
                break;
            }
            let found = found.get_or_insert(Found { stat, layer, below: Below::default() });
            if !is_directory {
                break;
            }
            found.below.0.push(layer);
            if is_opaque(parent.as_fd(), name, self.marks).map_err(examine)? {
                break;
            }
        }
        Ok(found)
    }

    /// The names that the layers show in the directory at `path`.
    pub(super) fn list(&self, directory: &Below, path: &[u8]) -> Result<Vec<Vec<u8>>, TreeError> {
        let list = |error| TreeError::new("list in a lower layer", path, error);
        // A name counts as the topmost layer has it.
        let mut seen: BTreeMap<Vec<u8>, bool> = BTreeMap::new();
        for &layer in &directory.0 {
            let opened = open_below(self.layers[layer].as_fd(), path).map_err(list)?;
            for name in names(opened.as_fd()).map_err(list)? {
                if seen.contains_key(&name) {
                    continue;
                }
                let stat = statat(&opened, &name[..], AtFlags::SYMLINK_NOFOLLOW).map_err(list)?;
                seen.insert(name, !is_whiteout(&stat));
            }
        }
        Ok(seen.into_iter().filter(|(_, shown)| *shown).map(|(name, _)| name).collect())
    }

    pub(super) fn capability(&self, found: &Found, path: &[u8]) -> Result<Option<Vec<u8>>, TreeError> {
        let (parent, name) = self
            .parent(found.layer, path)
            .map_err(|error| TreeError::new("examine in a lower layer", path, error))?;
        xattrs::get(parent.as_fd(), name, CAPABILITY)
            .map_err(|error| TreeError::new("examine in a lower layer", path, error))
    }

    fn parent<'a>(&self, layer: usize, path: &'a [u8]) -> rustix::io::Result<(OwnedFd, &'a [u8])> {
        let mut directory = path.to_vec();
        shorten(&mut directory);
        let name = &path[if directory.is_empty() { 0 } else { directory.len() + 1 }..];
        let opened = if directory.is_empty() {
            openat(&self.layers[layer], ".", DIRECTORY, Mode::empty())?
        } else {
            open_below(self.layers[layer].as_fd(), &directory)?
        };
        Ok((opened, name))
    }
}
