//! Deleting layers.

use std::fs;
use std::io;
use std::path::Path;

use super::create::CREATING;
use super::link::LinkName;
use super::read::read_small;
use super::{LayerStore, StoreError};
use crate::layer_id::LayerId;

/// Names of layers that are being deleted begin with this.
const REMOVING: &str = ".removing-";
/// Names of temporary views begin with this.
pub(crate) const VIEW: &str = ".view-";

impl LayerStore {
    /// Deletes a layer; one that does not exist is fine. Nothing may be mounted in it.
    ///
    /// # Errors
    /// [`StoreError::Io`]. The layer is gone even then; calling again deletes the rest.
    pub fn remove(&self, id: &LayerId) -> Result<(), StoreError> {
        let removing = self.home().join(format!("{REMOVING}{id}"));
        self.purge(&removing)?;
        let path = self.layer_directory(id);
        match fs::rename(&path, &removing) {
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(()),
            result => result.map_err(|cause| StoreError::io("remove", path, cause))?,
        }
        self.purge(&removing)
    }

    /// Deletes a directory under one of the temporary names together with the links
    /// that it owns.
    pub(super) fn purge(&self, directory: &Path) -> Result<(), StoreError> {
        for file in ["link", "thin"] {
            let names = read_small(&directory.join(file))?.unwrap_or_default();
            names.lines().filter_map(LinkName::parse).try_for_each(|link| link.remove(self.home()))?;
        }
        // Before its files, which show the number.
        if let Ok(quotas) = self.quotas()
            && let Some(project) = quotas.project_of(&directory.join("diff"))
            && let Err(error) = quotas.release(project)
        {
            tracing::warn!(directory = %directory.display(), %error, "the limit of a removed layer stays");
        }
        overlay::tree::remove(directory)?;
        Ok(())
    }

    /// Deletes what killed processes left. What cannot be deleted is reported and stays.
    pub(super) fn delete_leftovers(&self) -> Result<(), StoreError> {
        let entries =
            fs::read_dir(self.home()).map_err(|cause| StoreError::io("read", self.home(), cause))?;
        for entry in entries {
            let entry = entry.map_err(|cause| StoreError::io("read", self.home(), cause))?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            if ![CREATING, REMOVING, VIEW].iter().any(|prefix| name.starts_with(prefix)) {
                continue;
            }
            match self.purge(&entry.path()) {
                Ok(()) => tracing::info!(directory = name, "deleted a left-over of a killed process"),
                Err(error) => tracing::warn!(directory = name, %error, "cannot delete a left-over"),
            }
        }
        Ok(())
    }
}
