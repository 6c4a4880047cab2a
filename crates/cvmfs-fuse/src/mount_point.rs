//! Mount points: which directories can be mounted on, what lies on them, and how it goes away.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use crate::launch::{FILE_SYSTEM_TYPE, MountError};
use crate::{control, mount_table, users};

/// The absolute path of a mount point. Its parent is resolved, the mount point itself not touched: it may be a dead
/// mount.
pub(crate) fn absolute(given: &Path) -> Result<PathBuf, MountError> {
    let refuse = |reason: String| MountError::Mountpoint { mountpoint: given.to_owned(), reason };
    let absolute = std::path::absolute(given).map_err(|error| refuse(error.to_string()))?;
    let name = absolute.file_name().ok_or_else(|| refuse("cannot mount over this directory".into()))?;
    let parent = absolute.parent().unwrap_or(Path::new("/"));
    let parent = parent
        .canonicalize()
        .map_err(|error| refuse(format!("{}: {error}; create the mount point first", parent.display())))?;
    Ok(parent.join(name))
}

/// Whether anything is mounted exactly here in this mount namespace.
pub(crate) fn is_mountpoint(path: &Path) -> bool {
    matches!(mount_table::at(path), Ok(Some(_)))
}

/// The mount point to use: an existing directory, links resolved, free or freed.
pub(crate) fn check(given: &Path) -> Result<PathBuf, MountError> {
    let refuse = |reason: String| MountError::Mountpoint { mountpoint: given.to_owned(), reason };
    let mountpoint = absolute(given)?;
    let mounted = |path: &Path| {
        mount_table::at(path).map_err(|error| refuse(format!("cannot read the mount table: {error}")))
    };
    match mounted(&mountpoint)? {
        // A trigger of the automounter, which is to be mounted over.
        Some(entry) if entry.kind == "autofs" => {}
        Some(entry) => free(&mountpoint, &entry).map_err(refuse)?,
        None if fs::symlink_metadata(&mountpoint).is_ok_and(|metadata| metadata.is_symlink()) => {
            // As mount(8) does: what the link leads to is the mount point.
            let target = fs::canonicalize(&mountpoint)
                .map_err(|error| refuse(format!("a symbolic link that leads nowhere: {error}")))?;
            return check(&target);
        }
        None => {}
    }
    let metadata = fs::metadata(&mountpoint)
        .map_err(|error| refuse(format!("{error}; create the mount point first")))?;
    if !metadata.is_dir() {
        return Err(refuse("not a directory; a mount point must be one".into()));
    }
    Ok(mountpoint)
}

/// Removes what is left of a dead mount of ours; anything else is refused in words.
fn free(mountpoint: &Path, entry: &mount_table::MountEntry) -> Result<(), String> {
    let record = control::records().into_iter().find(|record| record.mountpoint == mountpoint);
    match record {
        // Its supervisor lives: the worker may be about to be replaced, which is no reason to unmount.
        Some(record) if entry.kind == FILE_SYSTEM_TYPE => {
            return Err(format!(
                "{} is mounted here already (process {})",
                record.fqrn, record.supervisor_pid
            ));
        }
        _ => {}
    }
    let is_dead = is_disconnected(mountpoint);
    if entry.kind != FILE_SYSTEM_TYPE {
        let advice = if is_dead {
            "; it is dead (\"transport endpoint is not connected\"), remove it with `umount -l`"
        } else {
            "; choose another directory"
        };
        return Err(format!("a {} file system ({}) is mounted here{advice}", entry.kind, entry.source));
    }
    if !is_dead {
        return Err(format!("{} is mounted here already, by another user or namespace", entry.source));
    }
    // Ours and dead: the processes are gone, users of it have errors anyway.
    tracing::info!(mountpoint = %mountpoint.display(), "a dead mount is removed");
    lazy_unmount(mountpoint)
        .map_err(|error| format!("a dead mount lies here and cannot be removed: {error}"))?;
    Ok(())
}

/// Whether the kernel says that nobody serves the mount. A mount that does not answer in
/// time is not dead. Asked on a thread, which may wait for ever.
fn is_disconnected(mountpoint: &Path) -> bool {
    /// A dead mount answers at once.
    const PATIENCE: Duration = Duration::from_secs(2);
    let (sender, receiver) = mpsc::channel();
    let mountpoint = mountpoint.to_owned();
    std::thread::spawn(move || {
        let _ = sender.send(fs::read_dir(mountpoint).err().and_then(|error| error.raw_os_error()));
    });
    matches!(receiver.recv_timeout(PATIENCE), Ok(Some(libc::ENOTCONN | libc::ECONNABORTED)))
}

/// The mount point with links resolved, as far as that does not touch the mount.
pub(crate) fn ours_at(mountpoint: &Path) -> Result<(PathBuf, mount_table::MountEntry), MountError> {
    let refuse =
        |reason: &str| MountError::Mountpoint { mountpoint: mountpoint.to_owned(), reason: reason.into() };
    let absolute = std::path::absolute(mountpoint).map_err(|_| refuse("not a path"))?;
    let parent = absolute.parent().and_then(|parent| parent.canonicalize().ok());
    let target = match (parent, absolute.file_name()) {
        (Some(parent), Some(name)) => parent.join(name),
        _ => absolute,
    };
    match mount_table::at(&target).map_err(MountError::system("cannot read the mount table"))? {
        Some(entry) if entry.kind == FILE_SYSTEM_TYPE => Ok((target, entry)),
        Some(_) => Err(refuse("the file system mounted here is not CernVM-FS")),
        None if fs::symlink_metadata(&target).is_ok_and(|metadata| metadata.is_symlink()) => {
            ours_at(&fs::canonicalize(&target).map_err(|_| refuse("a link that leads nowhere"))?)
        }
        None => Err(refuse("nothing is mounted here")),
    }
}

pub(crate) fn in_words(users: &[users::User]) -> String {
    if users.is_empty() {
        return "by a process out of sight, or another mount below it".into();
    }
    let mut words: Vec<String> =
        users.iter().map(|user| format!("{} ({}: {})", user.pid, user.command, user.how)).collect();
    if users.len() >= users::MAX_USERS {
        words.push("and more".into());
    }
    format!("by {}", words.join(", "))
}

pub(crate) fn lazy_unmount(mountpoint: &Path) -> io::Result<()> {
    use rustix::mount::UnmountFlags;
    rustix::mount::unmount(mountpoint, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::unmount;

    #[test]
    fn another_file_system_is_neither_mounted_over_nor_unmounted() {
        let error = check(Path::new("/proc")).unwrap_err();
        assert!(error.to_string().contains("a proc file system"), "{error}");
        assert!(unmount(Path::new("/proc")).unwrap_err().to_string().contains("not CernVM-FS"));
    }

    #[test]
    fn a_missing_mount_point_is_named() {
        let error = check(Path::new("/tmp/no/such/place")).unwrap_err();
        assert!(error.to_string().contains("/tmp/no/such"), "{error}");
    }
}
