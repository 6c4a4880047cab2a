//! `ApplyDiff`: the content of a layer arrives.

use std::io::Read;

use overlay::apply::{ApplyOptions, Devices, apply};

use super::{Driver, DriverError};
use crate::layer_id::LayerId;

impl Driver {
    /// `ApplyDiff`: extracts an archive into the layer and looks whether it made the
    /// layer a thin one. Returns the size of its files in bytes; of a thin layer, that
    /// of the descriptor.
    ///
    /// # Errors
    /// [`DriverError::NotTheParent`]; [`DriverError::Content`] for a bad archive;
    /// [`DriverError::Store`] for a descriptor that cannot be honoured. The engine
    /// removes the layer then.
    pub fn apply_diff(
        &self,
        id: &LayerId,
        parent: Option<&LayerId>,
        archive: &mut dyn Read,
    ) -> Result<u64, DriverError> {
        let _lock = self.locks.lock(id);
        if !self.store.is_parent(id, parent)? {
            return Err(DriverError::NotTheParent { id: id.clone(), parent: parent.cloned() });
        }
        let applied = apply(archive, &self.store.diff_directory(id), &self.apply_options());
        let applied = applied.map_err(|cause| DriverError::content(id, cause))?;
        if applied.skipped_devices > 0 {
            tracing::warn!(%id, devices = applied.skipped_devices, "left out device nodes, as in any user namespace");
        }
        if let Some(image) = self.store.recognise_thin(id)? {
            tracing::info!(%id, layers = image.layers.len(), origin = image.origin.as_deref(), "thin layer");
        }
        Ok(applied.size)
    }

    fn apply_options(&self) -> ApplyOptions {
        ApplyOptions {
            ids: self.id_maps.clone(),
            devices: if self.in_user_namespace() { Devices::Skip } else { Devices::Create },
            ..ApplyOptions::default()
        }
    }
}
