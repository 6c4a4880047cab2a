//! Repositories mounted by our own client, in processes of their own.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cvmfs_client::config::ConfigSources;
use cvmfs_fuse::MountRequest;
use cvmfs_fuse::control;

use super::{Fqrn, RepositoryError, RepositoryMounts, RepositoryStatus};
use crate::mounts;

/// How the client is to be run.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// Directory with names and keys of repositories; read at each mount.
    pub config: PathBuf,
    /// Fetched objects are kept below this directory.
    pub cache: PathBuf,
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
                overrides: vec![
                    ("CVMFS_CACHE_BASE".to_owned(), self.options.cache.to_string_lossy().into_owned()),
                    // Files of an image belong to whom the image says, not to the mounter.
                    ("CVMFS_CLAIM_OWNERSHIP".to_owned(), "no".to_owned()),
                ],
            },
            layer_view: true,
            allow_other: true,
            suid_and_devices: true,
            log_level: tracing::level_filters::LevelFilter::current().to_string().to_ascii_lowercase(),
            log_json: self.options.log_json,
            log_file: None,
            process: cvmfs_client::config::ProcessSettings::default(),
        }
    }

    fn failed(fqrn: &Fqrn, error: &dyn std::error::Error) -> RepositoryError {
        let mut message = error.to_string();
        let mut cause = error.source();
        while let Some(next) = cause {
            let text = next.to_string();
            if !message.contains(&text) {
                message = format!("{message}: {text}");
            }
            cause = next.source();
        }
        RepositoryError::Mount { fqrn: fqrn.clone(), message }
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
        if mounts::is_mounted(&mountpoint) && cvmfs_fuse::is_alive(&mountpoint) {
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
        let mounted =
            cvmfs_fuse::mount(&self.request(fqrn), timeout).map_err(|error| Self::failed(fqrn, &error))?;
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
        let _ = fs::remove_dir(&mountpoint);
        Ok(())
    }

    fn mounted(&self) -> Vec<Fqrn> {
        let mut found: Vec<Fqrn> = mounts::below(&self.directory)
            .iter()
            .filter_map(|path| path.strip_prefix(&self.directory).ok()?.to_str())
            .filter_map(|name| thin_image::Location::new(name, "x").ok())
            .map(|location| Fqrn::from(&location))
            .collect();
        found.sort();
        found.dedup();
        found
    }

    fn status(&self) -> Vec<RepositoryStatus> {
        self.mounted().into_iter().map(|fqrn| self.status_of(fqrn)).collect()
    }

    fn recover(&self) {
        for fqrn in self.mounted() {
            let mountpoint = self.mountpoint(&fqrn);
            if cvmfs_fuse::is_alive(&mountpoint) {
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
    }
}

impl ClientMounts {
    fn status_of(&self, fqrn: Fqrn) -> RepositoryStatus {
        let status = self.control(&fqrn).map(|control| cvmfs_fuse::status(&control));
        let summary = match status {
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
        RepositoryStatus { fqrn, summary }
    }
}
