//! Where images are read from: a registry, a docker-archive, or a directory in OCI layout.
//!
//! All three answer the same questions (manifest, configuration, blob), and all of their
//! bytes are verified the same way; what is found in a local file is trusted no more than
//! what a registry sends.

mod docker_archive;
mod oci_directory;

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use crate::client::{Client, FetchedManifest, Image};
use crate::config::{ImageConfig, MAX_CONFIG_BYTES};
use crate::digest::{Digest, Digester};
use crate::error::RegistryError;
use crate::manifest::{Descriptor, ImageManifest, Manifest};
use crate::platform::{Platform, choose, images, offered};
use crate::reference::{ImageSource, Reference};
use crate::signature::SignedStatement;
use docker_archive::DockerArchive;
use oci_directory::OciDirectory;

/// `open(2)` does not wait for a writer of a pipe.
const O_NONBLOCK: i32 = 0o4000;
/// An index may lead to another one; deeper nesting serves nobody.
const MAX_INDEX_DEPTH: u32 = 3;
/// Most documents that are read for one index, nested ones included.
const MAX_DOCUMENTS: usize = 256;

/// A place that an image is read from. Clones share what they have opened.
#[derive(Debug, Clone)]
pub struct Source {
    name: ImageSource,
    client: Client,
    kept: Kept,
}

#[derive(Debug, Clone)]
enum Kept {
    Registry(Reference),
    Directory(Arc<OciDirectory>),
    Archive(Arc<DockerArchive>),
}

/// All images behind one name.
#[derive(Debug, Clone)]
pub struct ImageSet {
    /// Digest of the document that the name leads to: of an index if there is one.
    pub digest: Digest,
    /// Whether that document is an index.
    pub is_index: bool,
    /// The images, in the order of the index, attestations left out.
    pub images: Vec<Image>,
}

impl Source {
    /// Opens a source. A docker-archive is looked through once; a compressed one is
    /// unpacked into a file without a name in `spool`.
    ///
    /// # Errors
    /// A local source that is not there or not what it should be. Registries are not
    /// asked yet.
    pub fn open(name: &ImageSource, client: &Client, spool: &Path) -> Result<Self, RegistryError> {
        let kept = match name {
            ImageSource::Registry(reference) => Kept::Registry(reference.clone()),
            ImageSource::DockerArchive { file, name } => {
                Kept::Archive(Arc::new(DockerArchive::open(file, name.as_deref(), spool, client)?))
            }
            ImageSource::OciDirectory { directory, name } => {
                Kept::Directory(Arc::new(OciDirectory::open(directory, name.as_deref())?))
            }
        };
        Ok(Self { name: name.clone(), client: client.clone(), kept })
    }

    /// An image of a registry.
    pub fn registry(client: &Client, reference: &Reference) -> Self {
        let (name, kept) = (ImageSource::Registry(reference.clone()), Kept::Registry(reference.clone()));
        Self { name, client: client.clone(), kept }
    }

    /// What was asked for.
    pub fn name(&self) -> &ImageSource {
        &self.name
    }

    /// The image's name in registries, if it has one: archives may state one.
    pub fn reference(&self) -> Option<Reference> {
        match &self.kept {
            Kept::Registry(reference) => Some(reference.clone()),
            Kept::Directory(directory) => directory.reference(),
            Kept::Archive(archive) => archive.reference(),
        }
    }

    /// The same source without mirrors; `None` if there are none in use.
    pub fn without_mirrors(&self) -> Option<Self> {
        let Kept::Registry(reference) = &self.kept else { return None };
        let client = self.client.without_mirrors(&reference.registry)?;
        Some(Self { client, ..self.clone() })
    }

    /// The signatures that the source keeps of a manifest or index. Local sources keep none.
    ///
    /// # Errors
    /// Network, denied, or an artifact that cannot be read.
    pub fn signatures(&self, digest: &Digest) -> Result<Vec<SignedStatement>, RegistryError> {
        match &self.kept {
            Kept::Registry(reference) => self.client.signatures(reference, digest),
            Kept::Directory(_) | Kept::Archive(_) => Ok(Vec::new()),
        }
    }

    /// A source whose waits can be ended alone, see [`Client::branch`].
    #[must_use]
    pub fn branch(&self) -> Self {
        Self { client: self.client.branch(), ..self.clone() }
    }

    /// Ends all waits of this source.
    pub fn cancel(&self) {
        self.client.canceller().cancel();
    }

    /// The manifest or index that the name leads to, or another one of the same source
    /// by its digest.
    ///
    /// # Errors
    /// Not there, not readable, or not a manifest.
    pub fn manifest(&self, digest: Option<&Digest>) -> Result<FetchedManifest, RegistryError> {
        match &self.kept {
            Kept::Registry(reference) => match digest {
                Some(digest) => self.client.manifest(&reference.at(digest)),
                None => self.client.manifest(reference),
            },
            Kept::Directory(directory) => directory.manifest(digest),
            Kept::Archive(archive) => Ok(archive.manifest()),
        }
    }

    /// The image for a platform. An index is resolved; an image that stands alone is
    /// taken whatever it was built for, because only its configuration knows.
    ///
    /// # Errors
    /// Those of [`manifest`](Self::manifest), and [`RegistryError::NoPlatform`].
    pub fn image(&self, platform: &Platform) -> Result<Image, RegistryError> {
        let mut fetched = self.manifest(None)?;
        let top_digest = fetched.digest.clone();
        let mut stated = None;
        for _ in 0..=MAX_INDEX_DEPTH {
            match fetched.manifest {
                Manifest::Image(manifest) => {
                    let (digest, manifest_bytes) = (fetched.digest, fetched.bytes);
                    return Ok(Image { digest, top_digest, manifest_bytes, manifest, platform: stated });
                }
                Manifest::Index(entries) => {
                    let chosen = choose(&entries, platform).ok_or_else(|| RegistryError::NoPlatform {
                        object: self.name.to_string(),
                        wanted: platform.to_string(),
                        offered: offered(&entries),
                    })?;
                    stated.clone_from(&chosen.platform);
                    fetched = self.manifest(Some(&chosen.descriptor.digest))?;
                }
            }
        }
        Err(self.too_deep())
    }

    /// The images for all platforms.
    ///
    /// # Errors
    /// Those of [`manifest`](Self::manifest).
    pub fn images(&self) -> Result<ImageSet, RegistryError> {
        let top = self.manifest(None)?;
        let is_index = matches!(top.manifest, Manifest::Index(_));
        let mut set = ImageSet { digest: top.digest.clone(), is_index, images: Vec::new() };
        let mut seen = HashSet::from([top.digest.clone()]);
        self.collect(top, None, 0, &mut seen, &mut set)?;
        Ok(set)
    }

    fn collect(
        &self,
        fetched: FetchedManifest,
        platform: Option<Platform>,
        depth: u32,
        seen: &mut HashSet<Digest>,
        set: &mut ImageSet,
    ) -> Result<(), RegistryError> {
        let entries = match fetched.manifest {
            Manifest::Image(manifest) => {
                let (digest, manifest_bytes) = (fetched.digest, fetched.bytes);
                let top_digest = set.digest.clone();
                set.images.push(Image { digest, top_digest, manifest_bytes, manifest, platform });
                return Ok(());
            }
            Manifest::Index(entries) => entries,
        };
        if depth > MAX_INDEX_DEPTH {
            return Err(self.too_deep());
        }
        for (entry, platform) in images(&entries) {
            if self.client.is_cancelled() {
                return Err(RegistryError::Cancelled);
            }
            if !seen.insert(entry.descriptor.digest.clone()) {
                continue;
            }
            if seen.len() > MAX_DOCUMENTS {
                let reason = format!("the index leads to more than {MAX_DOCUMENTS} documents");
                return Err(RegistryError::Configuration { object: self.name.to_string(), reason });
            }
            let next = self.manifest(Some(&entry.descriptor.digest))?;
            self.collect(next, platform.cloned(), depth + 1, seen, set)?;
        }
        Ok(())
    }

    /// The configuration of an image, verified, byte for byte and parsed.
    ///
    /// # Errors
    /// Network, not found, wrong digest, or a document that is no configuration.
    pub fn config(&self, manifest: &ImageManifest) -> Result<(Vec<u8>, ImageConfig), RegistryError> {
        let object = format!("configuration of {}", self.name);
        if manifest.config.size > MAX_CONFIG_BYTES {
            let host = self.host();
            return Err(RegistryError::TooLarge { object, host, limit: MAX_CONFIG_BYTES });
        }
        let mut bytes = Vec::new();
        self.start(&manifest.config, object.clone())?
            .read_to_end(&mut bytes)
            .map_err(|error| failure(&object, error))?;
        let invalid = |reason| RegistryError::Configuration { object: self.name.to_string(), reason };
        let config = ImageConfig::parse(&bytes).map_err(invalid)?;
        if config.diff_ids.len() != manifest.layers.len() {
            let (layers, ids) = (manifest.layers.len(), config.diff_ids.len());
            return Err(invalid(format!(
                "the manifest lists {layers} layers, the configuration {ids} diff ids"
            )));
        }
        Ok((bytes, config))
    }

    /// Starts reading a layer. Its end is reported only after size and digest were found
    /// right. Foreign layers come from the first of their URLs that answers, if the
    /// registry itself does not have them.
    ///
    /// # Errors
    /// Those of the first request; later ones come out of the reader and carry a
    /// [`RegistryError`].
    pub fn layer(&self, blob: &Descriptor) -> Result<Box<dyn Read + Send>, RegistryError> {
        match &self.kept {
            Kept::Registry(reference) => Ok(Box::new(self.client.blob(reference, blob)?)),
            Kept::Directory(_) | Kept::Archive(_) => {
                self.start(blob, format!("layer {} of {}", blob.digest, self.name))
            }
        }
    }

    fn start(&self, blob: &Descriptor, object: String) -> Result<Box<dyn Read + Send>, RegistryError> {
        let bytes: Box<dyn Read + Send> = match &self.kept {
            Kept::Registry(reference) => {
                return Ok(Box::new(self.client.start(reference, blob, object)?));
            }
            Kept::Directory(directory) => Box::new(directory.blob(&blob.digest)?),
            Kept::Archive(archive) => Box::new(archive.blob(&blob.digest)?),
        };
        Ok(Box::new(Verified {
            bytes,
            client: self.client.clone(),
            digester: Some(Digester::like(&blob.digest)),
            is_verified: false,
            blob: blob.clone(),
            received: 0,
            object,
            place: self.host(),
        }))
    }

    /// Whose word the content is, for messages.
    fn host(&self) -> String {
        match &self.kept {
            Kept::Registry(reference) => reference.registry.clone(),
            Kept::Directory(directory) => directory.path().display().to_string(),
            Kept::Archive(archive) => archive.path().display().to_string(),
        }
    }

    fn too_deep(&self) -> RegistryError {
        let reason = "nests indexes too deeply".to_owned();
        RegistryError::Configuration { object: self.name.to_string(), reason }
    }
}

/// The registry's error behind an error of reading a blob.
pub(crate) fn failure(object: &str, error: io::Error) -> RegistryError {
    match error.downcast::<RegistryError>() {
        Ok(error) => error,
        Err(cause) => RegistryError::Local { object: object.to_owned(), cause },
    }
}

/// Local bytes that are held against their descriptor, as a download is.
struct Verified {
    bytes: Box<dyn Read + Send>,
    client: Client,
    digester: Option<Digester>,
    is_verified: bool,
    blob: Descriptor,
    received: u64,
    object: String,
    place: String,
}

impl Verified {
    fn wrong_size(&self) -> io::Error {
        io::Error::other(RegistryError::WrongSize {
            object: self.object.clone(),
            host: self.place.clone(),
            expected: self.blob.size,
            found: self.received,
        })
    }

    fn verify(&mut self) -> io::Result<()> {
        if self.is_verified {
            return Ok(());
        }
        // Whoever asks again after an error gets no clean end.
        let Some(digester) = self.digester.take() else {
            return Err(io::Error::other(RegistryError::Cancelled));
        };
        if self.received != self.blob.size {
            return Err(self.wrong_size());
        }
        let (found, expected) = (digester.finish(), self.blob.digest.clone());
        if found == expected {
            self.is_verified = true;
            return Ok(());
        }
        let (object, host) = (self.object.clone(), self.place.clone());
        Err(io::Error::other(RegistryError::WrongDigest { object, host, expected, found }))
    }
}

impl Read for Verified {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        if self.client.is_cancelled() {
            return Err(io::Error::other(RegistryError::Cancelled));
        }
        let length = self.bytes.read(buffer).map_err(|cause| {
            io::Error::other(RegistryError::Local {
                object: format!("{} in {}", self.object, self.place),
                cause,
            })
        })?;
        if length == 0 {
            self.verify()?;
            return Ok(0);
        }
        self.received += length as u64;
        if self.received > self.blob.size {
            return Err(self.wrong_size());
        }
        if let (Some(digester), Some(bytes)) = (&mut self.digester, buffer.get(..length)) {
            digester.update(bytes);
        }
        Ok(length)
    }
}

/// Opens a regular file: anything else might keep us waiting for ever.
fn open(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let file = File::options().read(true).custom_flags(O_NONBLOCK).open(path)?;
    if file.metadata()?.is_file() {
        return Ok(file);
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "is not a regular file"))
}

/// A document of a local source in whole, of at most `limit` bytes.
fn read_document(
    mut from: impl Read,
    object: &str,
    place: &Path,
    limit: u64,
) -> Result<Vec<u8>, RegistryError> {
    let mut bytes = Vec::new();
    let read = (&mut from).take(limit + 1).read_to_end(&mut bytes);
    read.map_err(|cause| RegistryError::Local { object: format!("{object} in {}", place.display()), cause })?;
    if bytes.len() as u64 > limit {
        let host = place.display().to_string();
        return Err(RegistryError::TooLarge { object: object.to_owned(), host, limit });
    }
    Ok(bytes)
}
