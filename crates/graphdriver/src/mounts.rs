//! What is mounted in this process's mount namespace.

use std::path::{Path, PathBuf};

use overlay::mount::{MountError, Unmount, unmount};
use overlay::mountinfo::{MountInfo, mounts_below};

use crate::store::VIEW;

/// Whether something is mounted at exactly this place. Does not touch it: it may hang.
pub(crate) fn is_mounted(path: &Path) -> bool {
    below(path.parent().unwrap_or(path)).iter().any(|mounted| mounted == path)
}

/// Places below `directory` where something is mounted, later mounts last. The mount
/// table has real paths; these begin as `directory` is given.
pub(crate) fn below(directory: &Path) -> Vec<PathBuf> {
    // Without the directory nothing is mounted below it.
    let Ok(real) = directory.canonicalize() else { return Vec::new() };
    let mounts = match mounts_below(&real) {
        Ok(mounts) => mounts,
        Err(error) => {
            tracing::error!(%error, "cannot read the mount table");
            return Vec::new();
        }
    };
    let as_given = |mount: MountInfo| {
        let inside = mount.mount_point.strip_prefix(&real).ok()?;
        (!inside.as_os_str().is_empty()).then(|| directory.join(inside))
    };
    mounts.into_iter().filter_map(as_given).collect()
}

/// Removes all mounts that lie on each other at `path`; users of one keep it until they
/// are done.
///
/// # Errors
/// The kernel's, with what is mounted still there.
pub(crate) fn unmount_all(path: &Path) -> Result<(), MountError> {
    // As many as there are; a mount that cannot be removed is no reason to try for ever.
    let mounted = below(path.parent().unwrap_or(path)).iter().filter(|mounted| *mounted == path).count();
    for _ in 0..mounted {
        unmount(path, Unmount::Lazy)?;
    }
    Ok(())
}

/// Unmounts the temporary views of killed processes.
///
/// # Errors
/// The kernel's.
pub(crate) fn unmount_temporary(home: &Path) -> Result<(), MountError> {
    let is_temporary = |path: &Path| {
        let first = path.strip_prefix(home).ok().and_then(|inside| inside.components().next());
        first.is_some_and(|first| first.as_os_str().to_string_lossy().starts_with(VIEW))
    };
    below(home).iter().rev().filter(|path| is_temporary(path)).try_for_each(|path| unmount_all(path))
}
