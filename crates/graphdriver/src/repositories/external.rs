//! `cvmfsMountMethod=external`: the host mounts the repositories below `<Home>/cvmfs`,
//! with whatever client it has.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Fqrn, RepositoryError, RepositoryMounts, RepositoryStatus};

/// Repositories that somebody else mounts, and unmounts.
#[derive(Debug)]
pub struct ExternalMounts {
    directory: PathBuf,
}

impl ExternalMounts {
    /// `directory` is `<Home>/cvmfs`.
    pub fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }
}

impl RepositoryMounts for ExternalMounts {
    fn ensure(&self, fqrn: &Fqrn, _timeout: Duration) -> Result<PathBuf, RepositoryError> {
        let mountpoint = self.directory.join(fqrn.as_str());
        if crate::mounts::is_mounted(&mountpoint) {
            Ok(mountpoint)
        } else {
            Err(RepositoryError::NotMountedByHost { fqrn: fqrn.clone(), mountpoint })
        }
    }

    /// The host's client follows new revisions by itself.
    fn refresh(&self, _fqrn: &Fqrn, _timeout: Duration) {}

    fn revision(&self, _fqrn: &Fqrn) -> Option<u64> {
        None
    }

    fn unmount(&self, _fqrn: &Fqrn) -> Result<(), RepositoryError> {
        Ok(())
    }

    /// None that the plugin would have to unmount.
    fn mounted(&self) -> Vec<Fqrn> {
        Vec::new()
    }

    fn status(&self) -> Vec<RepositoryStatus> {
        Vec::new()
    }

    fn recover(&self) {}
}
