//! Where the thin image goes.

use std::ffi::OsStr;
use std::io::Read as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use registry::{Body, Client, Digest, Reference, media_type};

use crate::failure::ConvertError;
use crate::thin::{ThinImageBlobs, write_docker_archive};

/// Loading an image of one small layer takes a second; a busy engine may take longer.
const DOCKER_DEADLINE: Duration = Duration::from_secs(120);
/// What is shown of an engine's complaint.
const MAX_MESSAGE_BYTES: u64 = 4 << 10;

/// Where a thin image goes.
#[derive(Debug, Clone)]
pub enum Output {
    /// To a registry.
    Registry(Reference),
    /// Into a file for `docker load`.
    DockerArchive {
        /// The file, replaced if it exists.
        file: PathBuf,
        /// The name that the image is loaded under.
        name: Reference,
    },
    /// Into the local Docker engine, with the `docker` program.
    Docker {
        /// The name there.
        name: Reference,
    },
}

impl Output {
    /// Finds out before the long work whether writing will be possible: a registry may
    /// want a login, a directory may be missing.
    pub(super) fn prepare(&self, client: &Client) -> Result<(), ConvertError> {
        match self {
            Self::Registry(reference) => Ok(client.check_push(reference)?),
            Self::DockerArchive { file, .. } => {
                let failed = |cause| ConvertError::Output { file: file.clone(), cause };
                let directory = file.parent().filter(|parent| !parent.as_os_str().is_empty());
                tempfile::tempfile_in(directory.unwrap_or_else(|| ".".as_ref())).map_err(failed)?;
                Ok(())
            }
            Self::Docker { .. } => docker(&["version".as_ref()]),
        }
    }

    /// Writes the image; returns the place for the report.
    pub(super) fn write(&self, client: &Client, image: &ThinImageBlobs) -> Result<String, ConvertError> {
        match self {
            Self::Registry(reference) => {
                for blob in [&image.config, &image.layer_gzip] {
                    client.push_blob(
                        reference,
                        &Digest::sha256_of(blob),
                        Body::Bytes(blob.clone().into()),
                    )?;
                }
                client.push_manifest(reference, media_type::DOCKER_MANIFEST, image.manifest.clone())?;
                Ok(reference.to_string())
            }
            Self::DockerArchive { file, name } => {
                let failed = |cause| ConvertError::Output { file: file.clone(), cause };
                write_docker_archive(image, name, file).map_err(failed)?;
                Ok(file.display().to_string())
            }
            Self::Docker { name } => {
                let failed = |cause| ConvertError::Output { file: std::env::temp_dir(), cause };
                let directory = tempfile::tempdir().map_err(failed)?;
                let file = directory.path().join("thin-image.tar");
                write_docker_archive(image, name, &file).map_err(failed)?;
                docker(&["load".as_ref(), "--quiet".as_ref(), "--input".as_ref(), file.as_os_str()])?;
                Ok(name.to_string())
            }
        }
    }
}

/// Runs the `docker` program, which knows how to reach its engine (`DOCKER_HOST`, contexts).
fn docker(arguments: &[&OsStr]) -> Result<(), ConvertError> {
    let failed = |reason: String| {
        let verb = arguments.first().map(|verb| verb.to_string_lossy()).unwrap_or_default();
        ConvertError::Engine { command: format!("docker {verb}"), reason }
    };
    let mut child = Command::new("docker")
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    let started = Instant::now();
    let status = loop {
        match child.try_wait().map_err(|error| failed(error.to_string()))? {
            Some(status) => break status,
            None if started.elapsed() > DOCKER_DEADLINE => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(failed(format!("no end within {} s", DOCKER_DEADLINE.as_secs())));
            }
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    if status.success() {
        return Ok(());
    }
    let mut message = String::new();
    if let Some(errors) = child.stderr.take() {
        let _ = errors.take(MAX_MESSAGE_BYTES).read_to_string(&mut message);
    }
    Err(failed(message.trim().replace('\n', "; ")))
}
