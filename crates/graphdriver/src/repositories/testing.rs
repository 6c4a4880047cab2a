//! Plain directories that stand for mounted repositories.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use super::{Fqrn, RepositoryError, RepositoryMounts, RepositoryStatus};

/// `<directory>/<fqrn>` is the repository if it exists.
#[derive(Debug)]
pub(crate) struct DirectoryMounts {
    directory: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    mounted: BTreeSet<Fqrn>,
    /// Every call that changes something, in order.
    log: Vec<String>,
    /// Appears in the repository when it is refreshed.
    after_refresh: Option<String>,
}

impl DirectoryMounts {
    pub(crate) fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), state: Mutex::default() }
    }

    pub(crate) fn appears_after_refresh(&self, path: &str) {
        self.state().after_refresh = Some(path.to_owned());
    }

    pub(crate) fn log(&self) -> Vec<String> {
        self.state().log.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

impl RepositoryMounts for DirectoryMounts {
    fn ensure(&self, fqrn: &Fqrn, _timeout: Duration) -> Result<PathBuf, RepositoryError> {
        let path = self.directory.join(fqrn.as_str());
        if !path.is_dir() {
            let message = "not configured: add config.d/FQRN.conf".to_owned();
            return Err(RepositoryError::Mount { fqrn: fqrn.clone(), message });
        }
        if self.state().mounted.insert(fqrn.clone()) {
            self.state().log.push(format!("mount {fqrn}"));
        }
        Ok(path)
    }

    fn refresh(&self, fqrn: &Fqrn, _timeout: Duration) {
        self.state().log.push(format!("refresh {fqrn}"));
        if let Some(path) = self.state().after_refresh.take() {
            fs::create_dir_all(self.directory.join(fqrn.as_str()).join(path)).unwrap();
        }
    }

    fn revision(&self, _fqrn: &Fqrn) -> Option<u64> {
        Some(7)
    }

    fn unmount(&self, fqrn: &Fqrn) -> Result<(), RepositoryError> {
        if self.state().mounted.remove(fqrn) {
            self.state().log.push(format!("unmount {fqrn}"));
        }
        Ok(())
    }

    fn mounted(&self) -> Vec<Fqrn> {
        self.state().mounted.iter().cloned().collect()
    }

    fn is_mounted(&self, fqrn: &Fqrn) -> bool {
        self.state().mounted.contains(fqrn)
    }

    fn status(&self) -> Vec<RepositoryStatus> {
        let status = |fqrn: Fqrn| RepositoryStatus { fqrn, summary: "revision 7".to_owned(), client: None };
        self.mounted().into_iter().map(status).collect()
    }

    fn recover(&self) {}
}
