//! `Get`, `Put` and what is mounted (graph driver plugin §10 and §11).

use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};

use overlay::mount::{OverlayMount, remove_mount_point};
use thin_image::Location;

use super::{Driver, DriverError};
use crate::layer_id::LayerId;
use crate::mounts;
use crate::store::{Lower, Owner, StoreError, make_directory};

impl Driver {
    /// `Get`: makes the layer's tree available and takes a reference.
    ///
    /// A base layer is its own tree. So is a thin layer: the engine reads the descriptor
    /// there when it saves or pushes the image, reachable repository or not. Everything
    /// else is an overlay; the layer itself is writable until another one is created on
    /// top of it.
    ///
    /// # Errors
    /// [`DriverError::Store`], [`DriverError::Repository`], [`DriverError::Mount`]; then
    /// nothing is mounted and no reference taken.
    pub fn get(&self, id: &LayerId, mount_label: &str) -> Result<String, DriverError> {
        let _lock = self.locks.lock(id);
        let path = match self.overlay_lowers(id)? {
            None => self.store.diff_directory(id),
            Some(lowers) => {
                let merged = self.store.merged_directory(id);
                let references = self.references_of(id);
                if references == 0 || !mounts::is_mounted(&merged) {
                    self.mount(id, &lowers, mount_label, references == 0)?;
                }
                self.references.set(id, references.saturating_add(1));
                merged
            }
        };
        path.into_os_string()
            .into_string()
            .map_err(|path| DriverError::BadHome(path.to_string_lossy().into_owned()))
    }

    /// `Put`: gives a reference back; the last one unmounts. One too many is fine, which
    /// happens after a crash of the engine.
    ///
    /// # Errors
    /// [`DriverError::Mount`].
    pub fn put(&self, id: &LayerId) -> Result<(), DriverError> {
        let _lock = self.locks.lock(id);
        match self.references_of(id) {
            0 => Ok(()),
            1 => self.unmount_whatever_the_references(id),
            references => {
                self.references.set(id, references - 1);
                Ok(())
            }
        }
    }

    /// `Cleanup`: unmounts all layers, then the repositories.
    ///
    /// # Errors
    /// [`DriverError::Mount`] of the last layer that could not be unmounted; the others
    /// are unmounted nevertheless.
    pub fn clean_up(&self) -> Result<(), DriverError> {
        let mut result = Ok(());
        for id in self.mounted_layers() {
            let _lock = self.locks.lock(&id);
            if let Err(error) = self.unmount_whatever_the_references(&id) {
                tracing::warn!(%id, %error, "cannot unmount at the end");
                result = Err(error);
            }
        }
        self.repositories.unmount_all();
        result
    }

    /// Notes which repositories the layers use that an earlier process mounted. A layer whose repository is gone
    /// shows nothing but errors, also to whoever gets it anew: it is unmounted, and mounted again when it is needed.
    pub(super) fn adopt_mounted(&self) {
        for id in self.mounted_layers() {
            match self.store.lowers(&id) {
                Ok(lowers) if self.repositories.are_mounted(&locations(&lowers)) => {
                    self.repositories.adopt(id.as_str(), &locations(&lowers));
                }
                Ok(_) => {
                    let unmounted = mounts::unmount_all(&self.store.merged_directory(&id));
                    tracing::warn!(%id, ?unmounted, "unmounted a layer whose repository is gone");
                }
                Err(error) => tracing::warn!(%id, %error, "mounted, but cannot be read"),
            }
        }
    }

    /// Fails unless all repositories and layers below `id` can be used.
    pub(super) fn check_repositories(&self, id: &LayerId) -> Result<(), DriverError> {
        let lowers = self.store.lowers(id)?;
        self.resolve(id.as_str(), &lowers)?;
        // Held again by the `Get` that follows; until then they stay mounted as idle.
        self.repositories.release(id.as_str());
        Ok(())
    }

    /// The lowers of a layer whose tree is an overlay; none if it is a plain directory.
    fn overlay_lowers(&self, id: &LayerId) -> Result<Option<Vec<Lower>>, DriverError> {
        let lowers = self.store.lowers(id)?;
        Ok((!lowers.is_empty() && !self.store.is_thin(id)?).then_some(lowers))
    }

    /// Directories to mount, with the repositories mounted and held by `holder`.
    pub(super) fn resolve(&self, holder: &str, lowers: &[Lower]) -> Result<Vec<PathBuf>, DriverError> {
        let mut places = self.repositories.acquire(holder, &locations(lowers))?.into_iter();
        let resolved = lowers.iter().map(|lower| match lower {
            Lower::Layer(id) => self.store.diff_directory(id),
            Lower::Repository(_) => places.next().expect("one place for each location"),
        });
        Ok(resolved.collect())
    }

    /// Where a lower directory is, mounted or not.
    pub(super) fn nominal_path(&self, lower: &Lower) -> PathBuf {
        match lower {
            Lower::Layer(id) => self.store.diff_directory(id),
            Lower::Repository(place) => self.store.home().join("cvmfs").join(&place.fqrn).join(&place.path),
        }
    }

    fn mount(&self, id: &LayerId, lowers: &[Lower], label: &str, first: bool) -> Result<(), DriverError> {
        let mounted = self.mount_resolved(id, lowers, label);
        if mounted.is_err() {
            if first {
                self.repositories.release(id.as_str());
            }
            // An empty directory at most: it is made again by the next `Get`.
            let _ = remove_mount_point(&self.store.merged_directory(id));
        }
        mounted
    }

    fn mount_resolved(&self, id: &LayerId, lowers: &[Lower], label: &str) -> Result<(), DriverError> {
        let mut overlay = OverlayMount {
            lowers: self.resolve(id.as_str(), lowers)?,
            label: Some(label.to_owned()).filter(|label| !label.is_empty()),
            ..OverlayMount::default()
        };
        let (diff, work) = (self.store.diff_directory(id), self.store.work_directory(id));
        let merged = self.store.merged_directory(id);
        // Where nothing is mounted for this process, a mount of an earlier one may be left for others, and would lie on
        // top of this one. It goes with the directory.
        remove_mount_point(&merged)?;
        make_directory(&merged, 0o700, self.store.owner())?;
        if self.store.is_committed(id) {
            overlay.lowers.insert(0, diff);
            overlay.mount_with(&merged, &self.overlays)?;
            return Ok(());
        }
        overlay.upper = Some(diff);
        overlay.work = Some(work.clone());
        overlay.mount_with(&merged, &self.overlays)?;
        self.give_inner_work_directory_to_root(&work)
    }

    /// The kernel makes `work/work` as host root; root of a user namespace must be able
    /// to use it.
    fn give_inner_work_directory_to_root(&self, work: &Path) -> Result<(), DriverError> {
        let owner = self.store.owner();
        if owner == Owner::default() {
            return Ok(());
        }
        let inner = work.join("work");
        chown(&inner, Some(owner.uid), Some(owner.gid))
            .map_err(|cause| StoreError::io("chown", inner, cause).into())
    }

    /// Unmounts a layer and forgets its references. The caller holds its lock.
    pub(super) fn unmount_whatever_the_references(&self, id: &LayerId) -> Result<(), DriverError> {
        let merged = self.store.merged_directory(id);
        // Several lie on each other after a mount had been lost and made again.
        mounts::unmount_all(&merged)?;
        remove_mount_point(&merged)?;
        self.references.forget(id);
        self.repositories.release(id.as_str());
        Ok(())
    }

    /// References of a layer. One that this process has not seen yet but finds mounted
    /// has one: that of a running container.
    fn references_of(&self, id: &LayerId) -> u32 {
        let known = self.references.get(id);
        known.unwrap_or_else(|| u32::from(mounts::is_mounted(&self.store.merged_directory(id))))
    }

    fn mounted_layers(&self) -> Vec<LayerId> {
        mounts::below(self.store.home()).iter().filter_map(|path| self.store.layer_mounted_at(path)).collect()
    }
}

fn locations(lowers: &[Lower]) -> Vec<&Location> {
    let mut locations = Vec::new();
    for lower in lowers {
        if let Lower::Repository(location) = lower {
            locations.push(location);
        }
    }
    locations
}
