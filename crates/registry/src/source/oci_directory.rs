//! A directory in OCI image layout: `index.json` and `blobs/ALGORITHM/HEX`.

use std::fs::File;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::read_document;
use crate::client::FetchedManifest;
use crate::digest::Digest;
use crate::error::RegistryError;
use crate::manifest::{MAX_MANIFEST_BYTES, Manifest};
use crate::reference::Reference;

/// The annotations that name an image: the standard's, and containerd's with the whole
/// reference.
const NAMES: [&str; 2] = ["org.opencontainers.image.ref.name", "io.containerd.image.name"];

/// An opened layout.
#[derive(Debug)]
pub(super) struct OciDirectory {
    directory: PathBuf,
    top: Top,
}

/// What the name leads to.
#[derive(Debug)]
struct Top {
    digest: Digest,
    name: Option<String>,
}

#[derive(Deserialize)]
struct Index {
    #[serde(default)]
    manifests: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    digest: String,
    #[serde(default)]
    annotations: Option<std::collections::BTreeMap<String, String>>,
}

impl Entry {
    fn names(&self) -> impl Iterator<Item = &str> {
        let annotations = self.annotations.as_ref();
        NAMES.iter().filter_map(move |key| annotations?.get(*key).map(String::as_str))
    }

    /// The longest of the names says most.
    fn name(&self) -> Option<&str> {
        self.names().max_by_key(|name| name.len())
    }
}

impl OciDirectory {
    pub(super) fn open(directory: &Path, name: Option<&str>) -> Result<Self, RegistryError> {
        let file = directory.join("index.json");
        let local = |cause| RegistryError::Local { object: file.display().to_string(), cause };
        let index = super::open(&file).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => not_found("index.json".to_owned(), directory),
            _ => local(error),
        })?;
        let text = read_document(index, "index.json", directory, MAX_MANIFEST_BYTES)?;
        let invalid =
            |reason: String| RegistryError::Configuration { object: file.display().to_string(), reason };
        let index: Index = serde_json::from_slice(&text)
            .map_err(|error| invalid(format!("is not the index of an OCI layout: {error}")))?;
        let mut fitting =
            index.manifests.iter().filter(|entry| name.is_none_or(|name| entry.names().any(|n| n == name)));
        let (Some(entry), None) = (fitting.next(), fitting.next()) else {
            let names: Vec<_> = index.manifests.iter().filter_map(Entry::name).collect();
            let there = if names.is_empty() { "none with a name".to_owned() } else { names.join(", ") };
            return Err(invalid(match name {
                Some(name) => format!("has no, or more than one, image named {name}; there are: {there}"),
                None => format!(
                    "lists {} images; name one as oci:DIRECTORY:NAME; there are: {there}",
                    index.manifests.len()
                ),
            }));
        };
        let digest = entry.digest.parse().map_err(|error| invalid(format!("{error}")))?;
        let top = Top { digest, name: name.or(entry.name()).map(str::to_owned) };
        Ok(Self { directory: directory.to_owned(), top })
    }

    pub(super) fn path(&self) -> &Path {
        &self.directory
    }

    /// The image's name, if it is more than a tag.
    pub(super) fn reference(&self) -> Option<Reference> {
        self.top.name.as_deref().filter(|name| name.contains(['/', ':'])).and_then(|name| name.parse().ok())
    }

    pub(super) fn manifest(&self, digest: Option<&Digest>) -> Result<FetchedManifest, RegistryError> {
        let expected = digest.unwrap_or(&self.top.digest).clone();
        let object = format!("manifest {expected}");
        let bytes = read_document(self.blob(&expected)?, &object, &self.directory, MAX_MANIFEST_BYTES)?;
        let found = crate::client::digest_like(&expected, &bytes);
        if found != expected {
            let host = self.directory.display().to_string();
            return Err(RegistryError::WrongDigest { object, host, expected, found });
        }
        let manifest = Manifest::parse(None, &bytes).map_err(|cause| RegistryError::Manifest {
            object: format!("{object} in {}", self.directory.display()),
            cause,
        })?;
        Ok(FetchedManifest { digest: expected, content_type: None, bytes, manifest })
    }

    pub(super) fn blob(&self, digest: &Digest) -> Result<File, RegistryError> {
        let file = self.directory.join("blobs").join(digest.algorithm()).join(digest.hex());
        super::open(&file).map_err(|cause| match cause.kind() {
            std::io::ErrorKind::NotFound => not_found(format!("blob {digest}"), &self.directory),
            _ => RegistryError::Local { object: file.display().to_string(), cause },
        })
    }
}

fn not_found(object: String, directory: &Path) -> RegistryError {
    RegistryError::NotInSource { object, place: directory.display().to_string() }
}
