//! `Diff`, `Changes` and `DiffSize`: what a layer adds to another one.
//!
//! Against its parent a layer's own directory says it all, because our mounts never let
//! the kernel put references to lower layers into it. Against any other layer, which
//! squashing builders ask for, the two trees are compared.

use std::io::Write;

use overlay::OpaqueXattr;
use overlay::changes::{ChangeKind, Lowers, changes, changes_of_trees};
use overlay::diff::{DiffOptions, diff, diff_trees};
use overlay::size::layer_size;

use super::{Driver, DriverError};
use crate::layer_id::LayerId;
use crate::protocol::Change;

impl Driver {
    /// `Diff`: writes what `id` adds to `parent` as an archive. For a commit of a container of a thin image the archive
    /// holds a descriptor, if layers can be published.
    ///
    /// # Errors
    /// [`DriverError::Content`], [`DriverError::Store`], [`DriverError::Repository`], [`DriverError::Commit`].
    pub fn diff(
        &self,
        id: &LayerId,
        parent: Option<&LayerId>,
        out: &mut dyn Write,
    ) -> Result<(), DriverError> {
        if let Some(archive) = self.commit_as_thin(id, parent)? {
            return out.write_all(&archive).map_err(DriverError::Stream);
        }
        let options = DiffOptions { ids: self.id_maps.clone(), ..DiffOptions::default() };
        let written = if self.store.is_parent(id, parent)? {
            diff(&self.store.diff_directory(id), out, &options)
        } else {
            let (below, above) = (self.view(parent)?, self.view(Some(id))?);
            diff_trees(&below.tree(), &above.tree(), out, &options)
        };
        written.map_err(|cause| DriverError::content(id, cause))
    }

    /// `Changes`: the paths that differ, sorted.
    ///
    /// # Errors
    /// As [`Driver::diff`].
    pub fn changes(&self, id: &LayerId, parent: Option<&LayerId>) -> Result<Vec<Change>, DriverError> {
        let found = if self.store.is_parent(id, parent)? {
            // A descriptor is new, whatever lies below.
            let below = if self.store.is_thin(id)? { Vec::new() } else { self.store.lowers(id)? };
            let held = self.hold(&below)?;
            Lowers::open(held.directories(), OpaqueXattr::default())
                .and_then(|lowers| changes(&self.store.diff_directory(id), &lowers))
        } else {
            let (below, above) = (self.view(parent)?, self.view(Some(id))?);
            changes_of_trees(&below.tree(), &above.tree())
        };
        Ok(found.map_err(|cause| DriverError::content(id, cause))?.iter().map(in_protocol).collect())
    }

    /// `DiffSize`: bytes in the files that `id` adds to `parent`.
    ///
    /// # Errors
    /// As [`Driver::diff`].
    pub fn diff_size(&self, id: &LayerId, parent: Option<&LayerId>) -> Result<u64, DriverError> {
        if self.store.is_parent(id, parent)? {
            return layer_size(&self.store.diff_directory(id))
                .map_err(|cause| DriverError::content(id, cause));
        }
        let above = self.view(Some(id))?;
        let mut size = 0;
        for change in self.changes(id, parent)? {
            if let Ok(metadata) = above.tree().join(change.path.trim_start_matches('/')).symlink_metadata()
                && metadata.is_file()
            {
                size += metadata.len();
            }
        }
        Ok(size)
    }
}

/// The protocol has texts only, so that a name which is none is shown with replacement
/// characters.
fn in_protocol(change: &overlay::changes::Change) -> Change {
    let kind = match change.kind {
        ChangeKind::Modified => 0,
        ChangeKind::Added => 1,
        ChangeKind::Deleted => 2,
    };
    Change { path: String::from_utf8_lossy(&change.path).into_owned(), kind }
}
