//! Where the thin image goes.

use std::ffi::OsStr;
use std::io::Read as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use registry::{Body, Client, Digest, Reference, media_type};

use super::plan::Plan;
use crate::failure::ConvertError;
use crate::thin::{ThinImageBlobs, ThinSet, write_docker_archive};

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
    pub(crate) fn prepare(&self, client: &Client) -> Result<(), ConvertError> {
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

    /// Refuses what the destination cannot hold.
    pub(super) fn suits(&self, plan: &Plan) -> Result<(), ConvertError> {
        match self {
            Self::DockerArchive { .. } | Self::Docker { .. } if plan.images.len() != 1 => {
                Err(ConvertError::Usage(format!(
                    "{}: images for {} platforms need a registry: name one with --output, or choose a platform",
                    plan.resolved.source.name(),
                    plan.images.len()
                )))
            }
            _ => Ok(()),
        }
    }

    /// Writes the image, or all images and their index.
    pub(crate) fn write(&self, client: &Client, thin: &ThinSet) -> Result<Written, ConvertError> {
        match self {
            Self::Registry(reference) => push(client, reference, thin),
            Self::DockerArchive { file, name } => {
                let failed = |cause| ConvertError::Output { file: file.clone(), cause };
                let image = thin.only_image();
                write_docker_archive(image, name, file).map_err(failed)?;
                Ok(Written { place: file.display().to_string(), digest: image.manifest_digest() })
            }
            Self::Docker { name } => {
                let failed = |cause| ConvertError::Output { file: std::env::temp_dir(), cause };
                let directory = tempfile::tempdir().map_err(failed)?;
                let file = directory.path().join("thin-image.tar");
                let image = thin.only_image();
                write_docker_archive(image, name, &file).map_err(failed)?;
                docker(&["load".as_ref(), "--quiet".as_ref(), "--input".as_ref(), file.as_os_str()])?;
                Ok(Written { place: name.to_string(), digest: image.manifest_digest() })
            }
        }
    }
}

/// What a destination has now.
#[derive(Debug, Clone)]
pub(crate) struct Written {
    /// For the report.
    pub(crate) place: String,
    /// Of the manifest, or of the index.
    pub(crate) digest: Digest,
}

/// Pushes blobs, then manifests, then what the tag leads to.
fn push(client: &Client, reference: &Reference, thin: &ThinSet) -> Result<Written, ConvertError> {
    let push_blobs = |image: &ThinImageBlobs| {
        for blob in [&image.config, &image.layer_gzip] {
            client.push_blob(reference, &Digest::sha256_of(blob), Body::Bytes(blob.clone().into()))?;
        }
        Ok::<_, ConvertError>(())
    };
    for (_, image) in &thin.images {
        push_blobs(image)?;
    }
    let digest = match thin.index() {
        None => {
            let manifest = thin.only_image().manifest.clone();
            client.push_manifest(reference, media_type::DOCKER_MANIFEST, manifest)?
        }
        Some(index) => {
            for (_, image) in &thin.images {
                let by_digest = reference.at(&image.manifest_digest());
                client.push_manifest(&by_digest, media_type::DOCKER_MANIFEST, image.manifest.clone())?;
            }
            client.push_manifest(reference, media_type::DOCKER_LIST, index)?
        }
    };
    Ok(Written { place: reference.to_string(), digest })
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
