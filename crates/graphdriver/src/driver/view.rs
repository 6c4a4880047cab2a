//! Read-only trees for comparing, apart from what `Get` mounts.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use overlay::mount::OverlayMount;

use super::{Driver, DriverError, make_private};
use crate::layer_id::LayerId;
use crate::mounts;
use crate::store::{Lower, VIEW};

/// Lower directories that stay where they are until this is dropped.
#[derive(Debug)]
pub(super) struct Held<'a> {
    driver: &'a Driver,
    holder: String,
    directories: Vec<PathBuf>,
}

/// The tree of a layer as a container on it would see it, mounted until dropped.
#[derive(Debug)]
pub(super) struct View<'a> {
    directory: PathBuf,
    /// Dropped after the mount is gone.
    held: Held<'a>,
}

impl Driver {
    /// Mounts the repositories that `lowers` lie in and keeps them mounted.
    pub(super) fn hold(&self, lowers: &[Lower]) -> Result<Held<'_>, DriverError> {
        let holder = temporary_name();
        let directories = self.resolve(&holder, lowers)?;
        Ok(Held { driver: self, holder, directories })
    }

    /// The tree of `id`, or an empty one. Of a thin layer: the content of the image, not
    /// the descriptor.
    pub(super) fn view(&self, id: Option<&LayerId>) -> Result<View<'_>, DriverError> {
        let mut lowers = Vec::new();
        if let Some(id) = id {
            lowers = self.store.lowers(id)?;
            if !self.store.is_thin(id)? {
                lowers.insert(0, Lower::Layer(id.clone()));
            }
        }
        let view = View { directory: self.store.home().join(temporary_name()), held: self.hold(&lowers)? };
        make_private(&view.directory)?;
        let mut lowers = view.held.directories().to_vec();
        for empty in ["empty", "empty-too"] {
            // An overlay without upper directory needs at least two lower ones.
            if lowers.len() < 2 {
                let empty = view.directory.join(empty);
                make_private(&empty)?;
                lowers.push(empty);
            }
        }
        let merged = view.tree();
        make_private(&merged)?;
        OverlayMount { lowers, ..OverlayMount::default() }.mount_with(&merged, &self.overlays)?;
        Ok(view)
    }

    /// Mounts and unmounts an overlay with an upper directory.
    pub(super) fn try_overlay(&self) -> Result<(), DriverError> {
        let directory = self.store.home().join(format!("{VIEW}probe"));
        let mounted = (|| {
            make_private(&directory)?;
            let [lower, upper, work, merged] =
                ["lower", "upper", "work", "merged"].map(|name| directory.join(name));
            for path in [&lower, &upper, &work, &merged] {
                make_private(path)?;
            }
            let overlay = OverlayMount {
                lowers: vec![lower],
                upper: Some(upper),
                work: Some(work),
                ..OverlayMount::default()
            };
            Ok(overlay.mount_with(&merged, &self.overlays)?)
        })();
        discard(&directory);
        mounted
    }
}

impl Held<'_> {
    /// The directories, in the order of the lowers.
    pub(super) fn directories(&self) -> &[PathBuf] {
        &self.directories
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.driver.repositories.release(&self.holder);
    }
}

impl View<'_> {
    /// Root of the tree.
    pub(super) fn tree(&self) -> PathBuf {
        self.directory.join("merged")
    }
}

impl Drop for View<'_> {
    fn drop(&mut self) {
        discard(&self.directory);
    }
}

/// A name in the store that no layer has and that the next start removes.
fn temporary_name() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("{VIEW}{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

fn discard(directory: &Path) {
    let merged = directory.join("merged");
    if let Err(error) = mounts::unmount_all(&merged) {
        // Deleting now would delete through the mount; the next start tries again.
        tracing::warn!(directory = %directory.display(), %error, "cannot unmount a temporary view");
        return;
    }
    if let Err(error) = overlay::tree::remove(directory) {
        tracing::warn!(directory = %directory.display(), %error, "cannot remove a temporary view");
    }
}
