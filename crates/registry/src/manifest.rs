//! Manifests and indexes: Docker schema 2 and OCI.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::platform::Platform;

/// Largest accepted manifest or index in bytes, the limit of docker-registry.
pub const MAX_MANIFEST_BYTES: u64 = 4 << 20;
/// Most layers of an image: engines stop at 127, flattening tools a little later.
pub(crate) const MAX_LAYERS: usize = 1000;
/// Largest accepted layer blob: 1 TiB, beyond any image and small enough for arithmetic.
const MAX_BLOB_BYTES: u64 = 1 << 40;

/// Media types of the documents and blobs of an image.
pub mod media_type {
    /// Docker image manifest, version 2 schema 2.
    pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
    /// Docker index of images for several platforms.
    pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
    /// OCI image manifest.
    pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    /// OCI index.
    pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
    /// Docker image configuration.
    pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
    /// OCI image configuration.
    pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
    /// Uncompressed layer in a Docker manifest.
    pub const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";
    /// Gzip layer in a Docker manifest.
    pub const DOCKER_LAYER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
}

/// A blob or manifest as another document refers to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// Media type as stated.
    pub media_type: String,
    /// Size of the stored bytes.
    pub size: u64,
    /// Digest of the stored bytes.
    pub digest: Digest,
    /// Other places for the blob (foreign layers).
    pub urls: Vec<String>,
}

impl Descriptor {
    /// Whether the blob is not kept by registries but at its [`urls`](Self::urls).
    pub fn is_foreign(&self) -> bool {
        self.media_type.contains(".foreign.") || self.media_type.contains(".nondistributable.")
    }
}

/// The manifest of one image for one platform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageManifest {
    /// Media type of the manifest.
    pub media_type: String,
    /// The image configuration.
    pub config: Descriptor,
    /// The layers, base first.
    pub layers: Vec<Descriptor>,
}

/// One entry of an index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexEntry {
    /// The image manifest, or another index.
    pub descriptor: Descriptor,
    /// What the image runs on, if stated.
    pub platform: Option<Platform>,
    /// A signed statement about another entry, not an image.
    pub is_attestation: bool,
}

/// A document that a registry serves as manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Manifest {
    /// One image.
    Image(ImageManifest),
    /// A choice of images.
    Index(Vec<IndexEntry>),
}

/// Why a document is not a manifest that we can use.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not JSON, or keys missing or of the wrong type.
    #[error("not a valid manifest: {0}")]
    Malformed(#[source] serde_json::Error),
    /// Schema 1 has no digests of the content and was withdrawn.
    #[error("the image has a manifest of schema 1, which is obsolete; push it again with a current docker")]
    Schema1,
    /// A document of another kind.
    #[error("manifest of unknown type {0:?}")]
    UnknownType(String),
    /// Something that is kept in a registry but is not a container image.
    #[error("not a container image but an artifact with configuration of type {0:?}")]
    Artifact(String),
    /// More layers than any engine stacks.
    #[error("the manifest lists {0} layers, more than {MAX_LAYERS}")]
    TooManyLayers(usize),
    /// A digest that cannot be verified.
    #[error(transparent)]
    Digest(#[from] crate::digest::InvalidDigest),
    /// A size that no blob has.
    #[error("the manifest states a size of {0} bytes for a blob")]
    Size(i64),
}

impl Manifest {
    /// Parses a manifest. The kind follows from the transport's content type, else from
    /// `mediaType` in the document, else from its shape.
    ///
    /// # Errors
    /// Each says why the document cannot be used.
    pub fn parse(content_type: Option<&str>, text: &[u8]) -> Result<Self, ManifestError> {
        let document: Document = serde_json::from_slice(text).map_err(ManifestError::Malformed)?;
        if document.schema_version == Some(1) {
            return Err(ManifestError::Schema1);
        }
        let stated = content_type.map(|value| value.split(';').next().unwrap_or(value).trim());
        let media_type =
            stated.filter(|stated| is_known(stated)).or(document.media_type.as_deref()).map(str::to_owned);
        match media_type.as_deref() {
            Some(media_type::DOCKER_MANIFEST | media_type::OCI_MANIFEST) => document.image(media_type),
            Some(media_type::DOCKER_LIST | media_type::OCI_INDEX) => document.index(),
            Some(other) => Err(ManifestError::UnknownType(other.chars().take(200).collect())),
            None if document.manifests.is_some() => document.index(),
            None if document.config.is_some() && document.layers.is_some() => document.image(None),
            None => Err(ManifestError::UnknownType(stated.unwrap_or_default().chars().take(200).collect())),
        }
    }

    /// All types that [`Manifest::parse`] reads, for an `Accept` header.
    pub(crate) fn accept() -> String {
        [
            media_type::OCI_INDEX,
            media_type::DOCKER_LIST,
            media_type::OCI_MANIFEST,
            media_type::DOCKER_MANIFEST,
        ]
        .join(", ")
    }
}

impl ImageManifest {
    /// The manifest as Docker schema 2, which every engine reads.
    pub fn to_docker_json(&self) -> Vec<u8> {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Entry<'a> {
            media_type: &'a str,
            size: u64,
            digest: String,
        }
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Document<'a> {
            schema_version: u32,
            media_type: &'a str,
            config: Entry<'a>,
            layers: Vec<Entry<'a>>,
        }
        fn entry<'a>(media_type: &'a str, blob: &Descriptor) -> Entry<'a> {
            Entry { media_type, size: blob.size, digest: blob.digest.to_string() }
        }
        serde_json::to_vec_pretty(&Document {
            schema_version: 2,
            media_type: media_type::DOCKER_MANIFEST,
            config: entry(media_type::DOCKER_CONFIG, &self.config),
            layers: self.layers.iter().map(|layer| entry(media_type::DOCKER_LAYER_GZIP, layer)).collect(),
        })
        .expect("strings, numbers and lists always have a JSON form")
    }
}

/// An index of images as Docker manifest list, which every engine reads.
pub fn docker_list(entries: &[(Descriptor, Platform)]) -> Vec<u8> {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Entry<'a> {
        media_type: &'a str,
        size: u64,
        digest: String,
        platform: Stated<'a>,
    }
    #[derive(Serialize)]
    struct Stated<'a> {
        architecture: &'a str,
        os: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        variant: Option<&'a str>,
    }
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Document<'a> {
        schema_version: u32,
        media_type: &'a str,
        manifests: Vec<Entry<'a>>,
    }
    let manifests = entries.iter().map(|(blob, platform)| Entry {
        media_type: &blob.media_type,
        size: blob.size,
        digest: blob.digest.to_string(),
        platform: Stated {
            architecture: &platform.architecture,
            os: &platform.os,
            variant: platform.variant.as_deref().filter(|variant| !variant.is_empty()),
        },
    });
    serde_json::to_vec_pretty(&Document {
        schema_version: 2,
        media_type: media_type::DOCKER_LIST,
        manifests: manifests.collect(),
    })
    .expect("strings, numbers and lists always have a JSON form")
}

fn is_known(media_type: &str) -> bool {
    matches!(
        media_type,
        media_type::DOCKER_MANIFEST
            | media_type::OCI_MANIFEST
            | media_type::DOCKER_LIST
            | media_type::OCI_INDEX
    )
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    schema_version: Option<u32>,
    media_type: Option<String>,
    config: Option<RawDescriptor>,
    layers: Option<Vec<RawDescriptor>>,
    manifests: Option<Vec<RawDescriptor>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    #[serde(default)]
    media_type: String,
    size: i64,
    digest: String,
    urls: Option<Vec<String>>,
    annotations: Option<BTreeMap<String, String>>,
    platform: Option<Platform>,
}

impl Document {
    fn image(self, media_type: Option<String>) -> Result<Manifest, ManifestError> {
        let missing = |key| ManifestError::Malformed(serde::de::Error::missing_field(key));
        let media_type = media_type.unwrap_or_else(|| media_type::OCI_MANIFEST.to_owned());
        let config = self.config.ok_or_else(|| missing("config"))?;
        // Docker 1.10 wrote application/octet-stream.
        let is_image = matches!(
            config.media_type.as_str(),
            media_type::DOCKER_CONFIG | media_type::OCI_CONFIG | "application/octet-stream"
        );
        if !is_image {
            return Err(ManifestError::Artifact(config.media_type.chars().take(200).collect()));
        }
        let layers = self.layers.ok_or_else(|| missing("layers"))?;
        if layers.len() > MAX_LAYERS {
            return Err(ManifestError::TooManyLayers(layers.len()));
        }
        let layers = layers.into_iter().map(RawDescriptor::checked).collect::<Result<_, _>>()?;
        Ok(Manifest::Image(ImageManifest { media_type, config: config.checked()?, layers }))
    }

    fn index(self) -> Result<Manifest, ManifestError> {
        let entries = self.manifests.unwrap_or_default();
        entries.into_iter().map(RawDescriptor::entry).collect::<Result<_, _>>().map(Manifest::Index)
    }
}

impl RawDescriptor {
    fn checked(self) -> Result<Descriptor, ManifestError> {
        let size = u64::try_from(self.size).ok().filter(|size| *size <= MAX_BLOB_BYTES);
        Ok(Descriptor {
            size: size.ok_or(ManifestError::Size(self.size))?,
            digest: self.digest.parse()?,
            media_type: self.media_type,
            urls: self.urls.unwrap_or_default(),
        })
    }

    fn entry(mut self) -> Result<IndexEntry, ManifestError> {
        let annotation = self.annotations.as_ref().and_then(|all| all.get("vnd.docker.reference.type"));
        let is_attestation = annotation.is_some_and(|kind| kind == "attestation-manifest");
        let platform = self.platform.take();
        Ok(IndexEntry { platform, is_attestation, descriptor: self.checked()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn blob(media_type: &str) -> String {
        format!(r#"{{"mediaType":"{media_type}","size":7,"digest":"{}"}}"#, Digest::sha256_of(b"x"))
    }

    fn image(extra: &str) -> String {
        format!(
            r#"{{"schemaVersion":2{extra},"config":{},"layers":[{}]}}"#,
            blob(media_type::OCI_CONFIG),
            blob("application/vnd.oci.image.layer.v1.tar+zstd")
        )
    }

    #[test]
    fn the_kind_follows_from_header_then_document_then_shape() {
        let plain = image("");
        for content_type in [Some(media_type::DOCKER_MANIFEST), Some("application/json; charset=utf-8"), None]
        {
            let parsed = Manifest::parse(content_type, plain.as_bytes()).unwrap();
            assert!(matches!(parsed, Manifest::Image(image) if image.layers.len() == 1), "{content_type:?}");
        }
        let index = format!(r#"{{"mediaType":"{}","manifests":[]}}"#, media_type::OCI_INDEX);
        assert_eq!(Manifest::parse(Some("text/plain"), index.as_bytes()).unwrap(), Manifest::Index(vec![]));
    }

    #[test]
    fn what_is_no_image_is_refused_by_name() {
        let message = |text: &str| Manifest::parse(None, text.as_bytes()).unwrap_err().to_string();
        assert!(message(r#"{"schemaVersion":1,"fsLayers":[]}"#).contains("schema 1"));
        assert!(message(&image(r#","mediaType":"application/x-y""#)).contains("application/x-y"));
        let helm = image("").replace(media_type::OCI_CONFIG, "application/vnd.cncf.helm.config.v1+json");
        assert!(message(&helm).contains("artifact with configuration of type \"application/vnd.cncf.helm"));
        assert!(message(&image("").replace(":7,", ":-7,")).contains("-7 bytes"));
        assert!(message(&image("").replace("sha256:", "sha1:")).contains("is not a digest"));
        assert!(message("[]").contains("not a valid manifest"));
        assert!(message("{}").contains("unknown type"));
    }

    #[test]
    fn our_own_manifest_is_read_back() {
        let Manifest::Image(mut image) = Manifest::parse(None, image("").as_bytes()).unwrap() else {
            panic!()
        };
        let written = Manifest::parse(None, &image.to_docker_json()).unwrap();
        image.media_type = media_type::DOCKER_MANIFEST.into();
        image.config.media_type = media_type::DOCKER_CONFIG.into();
        image.layers[0].media_type = media_type::DOCKER_LAYER_GZIP.into();
        assert_eq!(written, Manifest::Image(image));
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_manifest_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Manifest::parse(None, &bytes);
        }
    }
}
