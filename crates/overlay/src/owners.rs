//! File systems mounted once more with other owners (id-mapped mounts, Linux 5.12).
//!
//! A repository has the owners that a container sees; in the engine's user namespace these are others on the host. What
//! cannot be told to show them so by itself can be mounted once more with a mapping, if the file system takes part:
//! FUSE does from Linux 6.12 on, where its server agreed.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use thiserror::Error;

use crate::ids::{IdMap, IdMaps};
use crate::sys;

/// Why a file system cannot be shown with other owners. Nothing is mounted then.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MapError {
    /// No user namespace with the mapping can be made.
    #[error(
        "cannot make a user namespace with the engine's mapping; it takes CAP_SETUID and CAP_SETGID, and user.max_user_namespaces above 0"
    )]
    Namespace(#[source] io::Error),
    /// The kernel is too old, or the file system does not take part.
    #[error(
        "its file system cannot be id-mapped; a FUSE file system can from Linux 6.12 on, if its client agrees to it"
    )]
    NotSupported(#[source] io::Error),
    /// Something else.
    #[error("cannot {what}")]
    Mount {
        /// What was tried.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Mounts what is mounted at `source` at the existing directory `target`, too, with owners as `maps` say. Those that
/// have no place in the mapping are shown as nobody.
///
/// # Errors
/// See [`MapError`].
pub fn mount_mapped(source: &Path, target: &Path, maps: &IdMaps) -> Result<(), MapError> {
    let failed = |what| move |error: rustix::io::Errno| MapError::Mount { what, source: error.into() };
    let namespace = user_namespace(maps).map_err(MapError::Namespace)?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let mount = open_tree(CWD, source, flags).map_err(failed("copy the mount"))?;
    sys::map_owners(mount.as_fd(), namespace.as_fd()).map_err(|source| match source.raw_os_error() {
        Some(libc::EINVAL | libc::ENOSYS | libc::EPERM | libc::EOPNOTSUPP) => MapError::NotSupported(source),
        _ => MapError::Mount { what: "map the owners of the mount", source },
    })?;
    move_mount(&mount, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(failed("attach the mapped mount"))
}

/// A user namespace with this mapping, which nobody lives in. Without ranges every owner stays what it is.
fn user_namespace(maps: &IdMaps) -> io::Result<OwnedFd> {
    let resident = Resident(sys::start_in_user_namespace()?);
    let proc = Path::new("/proc").join(resident.0.as_raw_nonzero().to_string());
    for (file, map) in [("uid_map", &maps.users), ("gid_map", &maps.groups)] {
        // The kernel takes a mapping in one piece only.
        fs::write(proc.join(file), text(map))?;
    }
    Ok(rustix::fs::open(proc.join("ns/user"), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}

/// The process by which a namespace is made. Gone when this is dropped.
struct Resident(Pid);

impl Drop for Resident {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::KILL);
        while matches!(waitpid(Some(self.0), WaitOptions::empty()), Err(rustix::io::Errno::INTR)) {}
    }
}

/// A mapping as the kernel takes it.
fn text(map: &IdMap) -> String {
    if map.ranges().is_empty() {
        return format!("0 0 {}\n", u32::MAX);
    }
    let ranges = map.ranges().iter().filter(|range| range.size > 0);
    ranges.map(|range| format!("{} {} {}\n", range.container, range.host, range.size)).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, chown};

    use super::*;
    use crate::ids::IdRange;
    use crate::mount::{Unmount, unmount};

    fn maps() -> IdMaps {
        let range = |container, host, size| IdRange { container, host, size };
        let users = IdMap::new(vec![range(0, 100_000, 1000), range(1000, 5000, 1)]);
        IdMaps { users, groups: IdMap::new(vec![range(0, 200_000, 10)]) }
    }

    #[test]
    fn a_directory_mounted_once_more_shows_the_owners_of_the_mapping() {
        let directory = tempfile::tempdir().unwrap();
        let (source, target) = (directory.path().join("source"), directory.path().join("target"));
        for (name, uid, gid) in [("root", 0, 0), ("user", 1000, 9), ("outside", 2000, 10)] {
            fs::create_dir_all(source.join(name)).unwrap();
            chown(source.join(name), Some(uid), Some(gid)).unwrap();
        }
        fs::create_dir(&target).unwrap();
        mount_mapped(&source, &target, &maps()).unwrap();
        let shown = ["root", "user", "outside"].map(|name| {
            let metadata = fs::metadata(target.join(name)).unwrap();
            (metadata.uid(), metadata.gid())
        });
        assert!(unmount(&target, Unmount::Normal).unwrap());
        assert_eq!(shown, [(100_000, 200_000), (5000, 200_009), (65_534, 65_534)]);
    }

    #[test]
    fn what_cannot_be_mapped_is_said_and_nothing_is_mounted() {
        let directory = tempfile::tempdir().unwrap();
        let error = mount_mapped(Path::new("/proc"), directory.path(), &maps()).unwrap_err();
        assert!(matches!(error, MapError::NotSupported(_)), "{error:?}");
        assert!(!unmount(directory.path(), Unmount::Normal).unwrap());
        let nonsense = IdRange { container: 0, host: 0, size: u32::MAX };
        let twice = IdMaps { users: IdMap::new(vec![nonsense, nonsense]), groups: IdMap::default() };
        let error = mount_mapped(directory.path(), directory.path(), &twice).unwrap_err();
        assert!(matches!(error, MapError::Namespace(_)), "{error:?}");
    }
}
