//! Repositories mounted by our own client, in processes of their own.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{fs, io};

use cvmfs_client::config::ConfigSources;
use cvmfs_fuse::MountRequest;
use cvmfs_fuse::control;

use super::{Fqrn, RepositoryError, RepositoryMounts, RepositoryStatus};
use crate::causes::with_causes;
use crate::mounts;

/// A client that was told to end, because it did not answer in time, may still be mounted so long.
const LEAVING_TIME: Duration = Duration::from_millis(500);
/// Between two looks whether it is gone.
const LEAVING_PAUSE: Duration = Duration::from_millis(20);

/// How the client is to be run.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// Directory with names and keys of repositories; read at each mount.
    pub config: PathBuf,
    /// Fetched objects are kept below this directory.
    pub cache: PathBuf,
    /// Parameters that hold whatever the configuration says.
    pub parameters: Vec<(String, String)>,
    /// Whether its log lines are JSON, as the plugin's.
    pub log_json: bool,
}

/// Mounts repositories in the layer view at `<directory>/<fqrn>`.
#[derive(Debug)]
pub struct ClientMounts {
    directory: PathBuf,
    options: ClientOptions,
}

impl ClientMounts {
    /// `directory` is `<Home>/cvmfs`.
    pub fn new(directory: &Path, options: ClientOptions) -> Self {
        Self { directory: directory.to_owned(), options }
    }

    fn mountpoint(&self, fqrn: &Fqrn) -> PathBuf {
        self.directory.join(fqrn.as_str())
    }

    fn request(&self, fqrn: &Fqrn) -> MountRequest {
        MountRequest {
            fqrn: fqrn.as_str().to_owned(),
            mountpoint: self.mountpoint(fqrn),
            sources: ConfigSources {
                directory: self.options.config.clone(),
                files: None,
                overrides: {
                    let mut overrides = vec![
                        ("CVMFS_CACHE_BASE".to_owned(), self.options.cache.to_string_lossy().into_owned()),
                        // Files of an image belong to whom the image says, not to the mounter.
                        ("CVMFS_CLAIM_OWNERSHIP".to_owned(), "no".to_owned()),
                    ];
                    overrides.extend(self.options.parameters.iter().cloned());
                    overrides
                },
            },
            layer_view: true,
            allow_other: true,
            suid_and_devices: true,
            log_level: tracing::level_filters::LevelFilter::current().to_string().to_ascii_lowercase(),
            log_json: self.options.log_json,
            log_file: None,
            confined: true,
            process: cvmfs_client::config::ProcessSettings::default(),
        }
    }

    fn failed(fqrn: &Fqrn, error: &dyn std::error::Error) -> RepositoryError {
        let message = with_causes(error);
        // The client begins with the name of the repository, and so does this error.
        let message = message.strip_prefix(&format!("{fqrn}: ")).unwrap_or(&message).to_owned();
        RepositoryError::Mount { fqrn: fqrn.clone(), message }
    }

    /// Removes the directory of a repository that is not mounted: the names come from images, and would stay for
    /// good.
    fn remove_mountpoint(&self, fqrn: &Fqrn) {
        let mountpoint = self.mountpoint(fqrn);
        let end = Instant::now() + LEAVING_TIME;
        // Removes nothing that has content, or on which something is mounted.
        while let Err(error) = fs::remove_dir(&mountpoint) {
            if error.kind() != io::ErrorKind::ResourceBusy || Instant::now() >= end {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::debug!(%fqrn, %error, "cannot remove the mount point");
                }
                return;
            }
            std::thread::sleep(LEAVING_PAUSE);
        }
    }

    /// The control socket of a mounted repository.
    fn control(&self, fqrn: &Fqrn) -> Option<PathBuf> {
        let mountpoint = self.mountpoint(fqrn);
        control::records()
            .into_iter()
            .find(|record| record.mountpoint == mountpoint)
            .map(|record| record.control)
    }
}

impl RepositoryMounts for ClientMounts {
    fn ensure(&self, fqrn: &Fqrn, timeout: Duration) -> Result<PathBuf, RepositoryError> {
        let mountpoint = self.mountpoint(fqrn);
        if mounts::is_mounted(&mountpoint) && cvmfs_fuse::is_alive(fqrn.as_str(), &mountpoint) {
            return Ok(mountpoint);
        }
        for directory in [&mountpoint, &self.options.cache] {
            fs::create_dir_all(directory)
                .or_else(|error| {
                    // A dead mount answers this; it is replaced below.
                    if mounts::is_mounted(directory) { Ok(()) } else { Err(error) }
                })
                .map_err(|error| Self::failed(fqrn, &error))?;
        }
        let mounted = cvmfs_fuse::mount(&self.request(fqrn), timeout).map_err(|error| {
            self.remove_mountpoint(fqrn);
            Self::failed(fqrn, &error)
        })?;
        tracing::info!(%fqrn, supervisor = mounted.supervisor_pid, "repository mounted");
        Ok(mountpoint)
    }

    fn refresh(&self, fqrn: &Fqrn, timeout: Duration) {
        let Some(control) = self.control(fqrn) else { return };
        match cvmfs_fuse::refresh(&control, timeout) {
            Ok(revision) => tracing::info!(%fqrn, revision, "looked for a newer revision"),
            Err(error) => tracing::warn!(%fqrn, %error, "cannot look for a newer revision"),
        }
    }

    fn revision(&self, fqrn: &Fqrn) -> Option<u64> {
        Some(cvmfs_fuse::status(&self.control(fqrn)?).ok()?.revision)
    }

    fn unmount(&self, fqrn: &Fqrn) -> Result<(), RepositoryError> {
        let mountpoint = self.mountpoint(fqrn);
        cvmfs_fuse::unmount(&mountpoint).map_err(|error| Self::failed(fqrn, &error))?;
        // Empty now; made again by the next mount.
        self.remove_mountpoint(fqrn);
        Ok(())
    }

    fn mounted(&self) -> Vec<Fqrn> {
        mounted_below(&self.directory)
    }

    fn is_mounted(&self, fqrn: &Fqrn) -> bool {
        mounts::is_mounted(&self.mountpoint(fqrn))
    }

    fn status(&self) -> Vec<RepositoryStatus> {
        self.mounted().into_iter().map(|fqrn| self.status_of(fqrn)).collect()
    }

    fn recover(&self) {
        for fqrn in self.mounted() {
            let mountpoint = self.mountpoint(&fqrn);
            if cvmfs_fuse::is_alive(fqrn.as_str(), &mountpoint) {
                tracing::info!(%fqrn, "repository is still mounted");
                continue;
            }
            match mounts::unmount_all(&mountpoint) {
                Ok(()) => {
                    tracing::warn!(%fqrn, "removed a dead mount; the repository is mounted again when needed");
                }
                Err(error) => tracing::warn!(%fqrn, %error, "cannot remove a dead mount"),
            }
        }
        self.remove_left_mountpoints();
    }
}

impl ClientMounts {
    /// Removes the directories of repositories that a killed process was about to mount.
    fn remove_left_mountpoints(&self) {
        let Ok(entries) = fs::read_dir(&self.directory) else { return };
        for entry in entries.flatten() {
            let path = entry.path();
            if !mounts::is_mounted(&path) && fs::remove_dir(&path).is_ok() {
                tracing::debug!(mountpoint = %path.display(), "removed an unused mount point");
            }
        }
    }

    fn status_of(&self, fqrn: Fqrn) -> RepositoryStatus {
        let status = self.control(&fqrn).map(|control| cvmfs_fuse::status(&control));
        let summary = match &status {
            Some(Ok(status)) => format!(
                "revision {}, {}, cache {} of {} MiB{}{}",
                status.revision,
                if status.online { "online" } else { "offline" },
                status.cache_used >> 20,
                status.cache_limit >> 20,
                if status.passthrough { ", passthrough" } else { "" },
                status.errors.first().map(|error| format!(", {error}")).unwrap_or_default(),
            ),
            Some(Err(error)) => format!("does not answer: {error}"),
            None => "mounted, but its process is gone".to_owned(),
        };
        RepositoryStatus { fqrn, summary, client: status.and_then(Result::ok).map(Box::new) }
    }
}

/// The repositories that something is mounted for in `directory`, in order of name.
pub(super) fn mounted_below(directory: &Path) -> Vec<Fqrn> {
    let mut found: Vec<Fqrn> = mounts::below(directory)
        .iter()
        .filter_map(|path| path.strip_prefix(directory).ok()?.to_str())
        .filter_map(|name| thin_image::Location::new(name, "x").ok())
        .map(|location| Fqrn::from(&location))
        .collect();
    found.sort();
    found.dedup();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_of_repositories_that_are_not_mounted_go_at_the_next_start() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["left.example.org", "full.example.org/file"] {
            fs::create_dir_all(directory.path().join(name)).unwrap();
        }
        let options = ClientOptions {
            config: "/nowhere".into(),
            cache: "/nowhere".into(),
            parameters: Vec::new(),
            log_json: false,
        };
        ClientMounts::new(directory.path(), options).recover();
        assert!(!directory.path().join("left.example.org").exists());
        assert!(directory.path().join("full.example.org").exists(), "what is not empty is not ours");
    }
}
