//! Directories for work files, which no death of a publisher leaves behind for ever.
//!
//! Those of a storage directory lie in it, and the next holder of its lock removes what is there. Those for a bucket,
//! a web server or a storage that is only read lie in the system's temporary directory; each is locked as long as its
//! owner lives, and whoever makes one removes those without an owner.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, Mode, OFlags};

use super::StorageError;

/// Begins the names of those in the temporary directory.
const PREFIX: &str = "cvmfs-publish.";
/// A younger one may be made this moment and not be locked yet.
const MIN_AGE: Duration = Duration::from_secs(60);

/// A directory for work files, removed when dropped.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    /// Locked.
    _claim: Option<File>,
}

impl Scratch {
    /// Takes the directory `path`, which somebody else removes if this process cannot.
    pub(super) fn of(path: PathBuf) -> Scratch {
        Scratch { path, _claim: None }
    }

    /// In the system's temporary directory, for work on a storage that may be read-only or far.
    pub(crate) fn in_temporary_directory() -> Result<Scratch, StorageError> {
        let parent = std::env::temp_dir();
        Scratch::in_directory(&parent).map_err(|source| StorageError::Io {
            action: "create",
            path: parent.join(PREFIX).display().to_string(),
            source,
        })
    }

    /// In a directory that may have others of the kind; those without an owner are removed.
    pub fn in_directory(parent: &Path) -> io::Result<Scratch> {
        remove_abandoned(parent);
        let path = tempfile::Builder::new().prefix(PREFIX).tempdir_in(parent)?.keep();
        Ok(Scratch { _claim: claim(&path).ok().flatten(), path })
    }

    /// The path of a file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Best effort: see the module's documentation.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// The directory, locked; `None` if somebody else has it.
fn claim(path: &Path) -> io::Result<Option<File>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(directory)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Removes what publishers of this user left in `parent` when they were killed.
fn remove_abandoned(parent: &Path) {
    for item in fs::read_dir(parent).into_iter().flatten().flatten() {
        if !item.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes()) {
            continue;
        }
        let path = item.path();
        if let Ok(Some(directory)) = claim(&path)
            && is_abandoned(&directory)
        {
            match fs::remove_dir_all(&path) {
                Ok(()) => tracing::debug!(path = %path.display(), "removed what a killed publisher left"),
                Err(error) => tracing::debug!(path = %path.display(), %error, "cannot remove"),
            }
        }
    }
}

/// Whether a directory that nobody has locked is ours to remove.
fn is_abandoned(directory: &File) -> bool {
    let Ok(found) = directory.metadata() else { return false };
    let age = found.modified().ok().and_then(|modified| SystemTime::now().duration_since(modified).ok());
    found.uid() == rustix::process::geteuid().as_raw() && age.is_some_and(|age| age > MIN_AGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_owner_is_removed_and_what_is_in_use_or_new_or_of_others_stays() {
        let parent = tempfile::tempdir().unwrap();
        let make = |name: &str, old: bool| {
            let path = parent.path().join(name);
            fs::create_dir(&path).unwrap();
            fs::write(path.join("catalog"), b"x").unwrap();
            if old {
                let long_ago = SystemTime::now() - 2 * MIN_AGE;
                File::open(&path).unwrap().set_modified(long_ago).unwrap();
            }
            path
        };
        let abandoned = make("cvmfs-publish.abandoned", true);
        let used = make("cvmfs-publish.used", true);
        let _owner = claim(&used).unwrap().unwrap();
        let stay = [used, make("cvmfs-publish.new", false), make("other", true)];
        std::os::unix::fs::symlink(&stay[2], parent.path().join("cvmfs-publish.link")).unwrap();
        remove_abandoned(parent.path());
        assert!(!abandoned.exists());
        assert!(stay.iter().all(|path| path.join("catalog").exists()), "{stay:?}");
    }

    #[test]
    fn one_that_is_dropped_is_gone_and_one_in_use_is_locked() {
        let scratch = Scratch::in_temporary_directory().unwrap();
        let path = scratch.path.clone();
        fs::write(scratch.file("x"), b"x").unwrap();
        assert!(claim(&path).unwrap().is_none(), "it is not locked");
        drop(scratch);
        assert!(!path.exists());
    }
}
