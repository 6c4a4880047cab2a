//! What is mounted in this process's mount namespace.

use std::path::{Path, PathBuf};

use overlay::mount::{MountError, Unmount, unmount};
use overlay::mountinfo::{MountInfo, mounts_below};
use rustix::fs::{Mode, OFlags, ResolveFlags, open, openat2};
use rustix::io::Errno;

use crate::store::VIEW;

/// More mounts never lie on each other, unless something goes wrong over and over.
const MOST_STACKED: usize = 64;

/// Whether something is mounted at exactly this place. Does not touch it: it may hang.
pub(crate) fn is_mounted(path: &Path) -> bool {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return true };
    let place = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Ok(parent_directory) = open(parent, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) else {
        return false;
    };
    // The kernel notices that the step leads to another mount before it takes it, which
    // is quicker than reading the whole mount table.
    match openat2(&parent_directory, name, place, Mode::empty(), ResolveFlags::NO_XDEV) {
        Ok(_) | Err(Errno::NOENT) => false,
        Err(Errno::XDEV) => true,
        // A kernel before 5.6, or a sandbox that does not know the call.
        Err(_) => below(parent).iter().any(|mounted| mounted == path),
    }
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
    for _ in 0..MOST_STACKED {
        if !is_mounted(path) {
            break;
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_is_told_from_a_directory_with_and_without_reading_the_mount_table() {
        assert!(is_mounted(Path::new("/proc")) && below(Path::new("/")).contains(&PathBuf::from("/proc")));
        let directory = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/proc", directory.path().join("link")).unwrap();
        for path in [directory.path(), &directory.path().join("link"), &directory.path().join("absent/x")] {
            assert!(!is_mounted(path), "{}", path.display());
        }
    }
}
