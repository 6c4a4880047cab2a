//! New layers.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use overlay::mount::MAX_LOWERS;

use super::link::LinkName;
use super::{LayerStore, Lower, StoreError, make_directory};
use crate::layer_id::LayerId;

/// Names of layers that are being built begin with this.
pub(super) const CREATING: &str = ".creating-";

/// What a layer is to be.
#[derive(Debug, Clone, Copy)]
pub struct NewLayer<'a> {
    /// The layer that it is put on.
    pub parent: Option<&'a LayerId>,
    /// How many more layers will be put on it.
    pub to_come: usize,
    /// How much disk space it may take, in bytes.
    pub size: Option<u64>,
}

impl LayerStore {
    /// Makes an empty layer. It is there as a whole or not at all.
    ///
    /// # Errors
    /// [`StoreError::Exists`], [`StoreError::NoSuchLayer`] for the parent,
    /// [`StoreError::TooManyLowers`], [`StoreError::Limit`], [`StoreError::Io`].
    pub fn create(&self, id: &LayerId, new: &NewLayer<'_>) -> Result<(), StoreError> {
        let parent = new.parent;
        if self.exists(id) {
            return Err(StoreError::Exists(id.clone()));
        }
        let lower = parent.map(|parent| self.lower_entries_for_children(parent)).transpose()?;
        let lower = lower.unwrap_or_default();
        let count = lower.len() + new.to_come;
        if count > MAX_LOWERS {
            return Err(StoreError::TooManyLowers { id: id.clone(), count });
        }

        let building = self.home().join(format!("{CREATING}{id}"));
        self.purge(&building)?;
        let built = self.build(&building, id, new, &lower).and_then(|()| {
            let path = self.layer_directory(id);
            fs::rename(&building, &path).map_err(|cause| StoreError::io("create", path, cause))
        });
        if built.is_err() {
            // The failure itself is what the engine must hear about.
            let _ = self.purge(&building);
        }
        built
    }

    fn build(
        &self,
        building: &Path,
        id: &LayerId,
        new: &NewLayer<'_>,
        lower: &[LinkName],
    ) -> Result<(), StoreError> {
        let (parent, diff, work) = (new.parent, building.join("diff"), building.join("work"));
        self.make_private_directory(building)?;
        make_directory(&diff, 0o755, self.owner())?;
        // The file names the link before the link exists, so that a left-over can be
        // removed together with its link.
        let link = LinkName::random();
        write_durably(&building.join("link"), link.as_str())?;
        write_durably(&building.join("parent"), parent.map_or("", LayerId::as_str))?;
        if let Some(parent) = parent {
            make_directory(&work, 0o700, self.owner())?;
            if !lower.is_empty() {
                write_durably(&building.join("lower"), &join_entries(lower))?;
            }
            self.mark_committed(parent)?;
        }
        if let Some(size) = new.size {
            // Files move from one to the other, which must not cross projects.
            let directories = if parent.is_some() { &[diff.as_path(), &work][..] } else { &[diff.as_path()] };
            self.quotas()?.limit(directories, size)?;
        }
        link.create(self.home(), &Lower::Layer(id.clone()))
    }

    /// Fails unless containers can have limits.
    ///
    /// # Errors
    /// [`StoreError::Limit`].
    pub fn check_limits(&self) -> Result<(), StoreError> {
        Ok(self.quotas().map(drop)?)
    }

    /// From now on the layer is mounted read-only.
    fn mark_committed(&self, id: &LayerId) -> Result<(), StoreError> {
        let path = self.layer_directory(id).join("committed");
        fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map(drop)
            .map_err(|cause| StoreError::io("create", path, cause))
    }
}

pub(super) fn join_entries(links: &[LinkName]) -> String {
    links.iter().map(LinkName::entry).collect::<Vec<_>>().join(":")
}

/// A file that is empty after a power cut makes its layer useless (this happened to
/// overlay2 before it, too, synchronised them).
pub(super) fn write_durably(path: &Path, text: &str) -> Result<(), StoreError> {
    let write = || -> io::Result<()> {
        let mut file = fs::File::create(path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    write().map_err(|cause| StoreError::io("write", path, cause))
}

/// Replaces a file that may exist.
pub(super) fn replace_durably(path: &Path, text: &str) -> Result<(), StoreError> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    write_durably(Path::new(&temporary), text)?;
    fs::rename(&temporary, path).map_err(|cause| StoreError::io("replace", path, cause))
}
