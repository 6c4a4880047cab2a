//! What the files of a layer say.

use std::collections::HashSet;
use std::fs;
use std::io::{self, Read};
use std::path::Path;

use super::link::LinkName;
use super::{LayerStore, Lower, StoreError};
use crate::layer_id::LayerId;

/// Largest file of the store: a `lower` with 500 links has 14.5 kB.
const MAX_FILE_BYTES: u64 = 64 * 1024;

/// The file with the id of the layer below.
const PARENT: &str = "parent";

impl LayerStore {
    /// Whether the layer exists.
    pub fn exists(&self, id: &LayerId) -> bool {
        self.layer_directory(id).is_dir()
    }

    /// All layers, in the order of their ids.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn layers(&self) -> Result<Vec<LayerId>, StoreError> {
        let failed = |cause| StoreError::io("read", self.home(), cause);
        let mut layers = Vec::new();
        for entry in fs::read_dir(self.home()).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let id = entry.file_name().to_str().and_then(|name| name.parse::<LayerId>().ok());
            layers.extend(id.filter(|id| self.diff_directory(id).is_dir()));
        }
        layers.sort_by(|a, b| a.as_str().cmp(b.as_str()));
        Ok(layers)
    }

    /// Fails unless the layer exists.
    ///
    /// # Errors
    /// [`StoreError::NoSuchLayer`].
    pub fn require(&self, id: &LayerId) -> Result<(), StoreError> {
        if self.exists(id) { Ok(()) } else { Err(StoreError::NoSuchLayer(id.clone())) }
    }

    /// Whether another layer was created on top of this one.
    pub fn is_committed(&self, id: &LayerId) -> bool {
        self.layer_directory(id).join("committed").exists()
    }

    /// The directories below the layer, topmost first, each once.
    ///
    /// A directory that occurs twice counts where it is topmost: there it shows
    /// everything that its other occurrence could show, and the kernel refuses to stack
    /// one directory twice. Of a thin layer: what its children see.
    ///
    /// # Errors
    /// [`StoreError::NoSuchLayer`], [`StoreError::Damaged`], [`StoreError::BadLink`],
    /// [`StoreError::Io`].
    pub fn lowers(&self, id: &LayerId) -> Result<Vec<Lower>, StoreError> {
        self.require(id)?;
        let mut seen = HashSet::new();
        let mut lowers = Vec::new();
        for link in self.lower_entries(id)? {
            let lower = link.resolve(self.home())?;
            if seen.insert(lower.clone()) {
                lowers.push(lower);
            }
        }
        Ok(lowers)
    }

    /// Whether `parent` is what the layer was created on (nothing, for a base layer).
    ///
    /// # Errors
    /// As [`LayerStore::lowers`].
    pub fn is_parent(&self, id: &LayerId, parent: Option<&LayerId>) -> Result<bool, StoreError> {
        self.require(id)?;
        if let Some((recorded, name)) = self.recorded_parent(id)? {
            let is_possible = name == PARENT || parent.is_some();
            return Ok(is_possible && recorded == parent.map_or("", LayerId::as_str));
        }
        // A layer made by overlay2 or by the Go plugin.
        let Some(top) = self.lower_entries(id)?.into_iter().next() else {
            return Ok(parent.is_none());
        };
        let top = top.resolve(self.home())?;
        Ok(parent.is_some_and(|parent| top == Lower::Layer(parent.clone())))
    }

    /// What the layer was created on, if anything.
    ///
    /// # Errors
    /// As [`LayerStore::lowers`].
    pub fn parent(&self, id: &LayerId) -> Result<Option<LayerId>, StoreError> {
        self.require(id)?;
        if let Some((recorded, name)) = self.recorded_parent(id)? {
            return match recorded.trim() {
                "" => Ok(None),
                recorded => recorded.parse().map(Some).map_err(|_| self.damaged(id, name)),
            };
        }
        // A layer made by overlay2 or by the Go plugin, whose thin layers had no parents.
        let top = self.lower_entries(id)?.into_iter().next();
        match top.map(|top| top.resolve(self.home())).transpose()? {
            Some(Lower::Layer(parent)) => Ok(Some(parent)),
            _ => Ok(None),
        }
    }

    /// The parent as a file tells it, and the file's name: ours, or that of the Go plugin's containers.
    fn recorded_parent(&self, id: &LayerId) -> Result<Option<(String, &'static str)>, StoreError> {
        if let Some(recorded) = self.read(id, PARENT)? {
            return Ok(Some((recorded, PARENT)));
        }
        let recorded = self.read(id, "thin_parent")?;
        Ok(recorded.map(|recorded| (recorded.trim().to_owned(), "thin_parent")))
    }

    /// Links of the directories below the layer.
    pub(super) fn lower_entries(&self, id: &LayerId) -> Result<Vec<LinkName>, StoreError> {
        let Some(text) = self.read(id, "lower")? else {
            return Ok(Vec::new());
        };
        text.split(':')
            .map(|entry| LinkName::parse_entry(entry).ok_or_else(|| self.damaged(id, "lower")))
            .collect()
    }

    /// Links of what lies below a layer that is created on `id`.
    pub(super) fn lower_entries_for_children(&self, id: &LayerId) -> Result<Vec<LinkName>, StoreError> {
        self.require(id)?;
        let mut entries = self.lower_entries(id)?;
        if !self.is_thin(id)? {
            let link = self.own_link(id)?.ok_or_else(|| self.damaged(id, "link"))?;
            entries.insert(0, link);
        }
        Ok(entries)
    }

    /// The layer's own link; none if the file is missing or damaged.
    fn own_link(&self, id: &LayerId) -> Result<Option<LinkName>, StoreError> {
        Ok(self.read(id, "link")?.and_then(|text| LinkName::parse(text.trim())))
    }

    /// A file of the layer; none if it does not exist.
    pub(super) fn read(&self, id: &LayerId, name: &'static str) -> Result<Option<String>, StoreError> {
        read_small(&self.layer_directory(id).join(name))
    }

    pub(super) fn damaged(&self, id: &LayerId, name: &str) -> StoreError {
        StoreError::Damaged { id: id.clone(), path: self.layer_directory(id).join(name) }
    }
}

/// A file of at most [`MAX_FILE_BYTES`]; none if it does not exist.
pub(super) fn read_small(path: &Path) -> Result<Option<String>, StoreError> {
    let file = match fs::File::open(path) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(None),
        result => result.map_err(|cause| StoreError::io("read", path, cause))?,
    };
    let mut text = String::new();
    file.take(MAX_FILE_BYTES)
        .read_to_string(&mut text)
        .map_err(|cause| StoreError::io("read", path, cause))?;
    Ok(Some(text))
}
