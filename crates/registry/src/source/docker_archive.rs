//! A file written by `docker save`: a tar archive with `manifest.json`, configurations
//! and uncompressed layers.
//!
//! Engines since 25 add an OCI layout to it, whose blobs are the same files; the older
//! form is in all of them. The archive has no manifest with digests: ours is made from
//! what is there, and the image is known by its id, the digest of its configuration.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use layer_tar::{AbsoluteNames, EndOfArchive, EntryKind, LayerPath, LayerReader, Limits};
use serde::Deserialize;

use super::read_document;
use crate::client::{Client, FetchedManifest};
use crate::config::{ImageConfig, MAX_CONFIG_BYTES};
use crate::digest::{Digest, Digester};
use crate::error::RegistryError;
use crate::layer::Unpacked;
use crate::manifest::{Descriptor, ImageManifest, MAX_MANIFEST_BYTES, Manifest, media_type};
use crate::reference::Reference;

/// Symbolic links from one layer to another are followed this often.
const MAX_LINKS: usize = 8;
/// Read buffer of hashing a member.
const PIECE_BYTES: usize = 256 << 10;

/// An opened archive.
#[derive(Debug)]
pub(super) struct DockerArchive {
    path: PathBuf,
    file: Arc<File>,
    name: Option<String>,
    manifest: FetchedManifest,
    /// Members by the digest of their bytes.
    blobs: BTreeMap<Digest, Span>,
}

/// Where a member's bytes lie in the file.
#[derive(Debug, Clone, Copy)]
struct Span {
    offset: u64,
    size: u64,
}

#[derive(Debug)]
enum Member {
    File(Span),
    Link(LayerPath),
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SavedImage {
    config: String,
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Vec<String>,
}

impl DockerArchive {
    pub(super) fn open(
        path: &Path,
        name: Option<&str>,
        spool: &Path,
        client: &Client,
    ) -> Result<Self, RegistryError> {
        let file = super::open(path).map_err(|cause| match cause.kind() {
            io::ErrorKind::NotFound => {
                let (object, place) = ("docker-archive".to_owned(), path.display().to_string());
                RegistryError::NotInSource { object, place }
            }
            _ => RegistryError::Local { object: path.display().to_string(), cause },
        })?;
        let archive = Opening { path, client, file: Arc::new(uncompressed(file, path, spool, client)?) };
        let members = archive.members()?;
        let saved = archive.saved_image(&members, name)?;
        let mut opened = archive.finish(&members, &saved)?;
        if let Some(name) = name {
            opened.name = Some(name.to_owned());
        }
        Ok(opened)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn reference(&self) -> Option<Reference> {
        self.name.as_deref().and_then(|name| name.parse().ok())
    }

    pub(super) fn manifest(&self) -> FetchedManifest {
        self.manifest.clone()
    }

    pub(super) fn blob(&self, digest: &Digest) -> Result<SpanReader, RegistryError> {
        let span = self.blobs.get(digest).ok_or_else(|| RegistryError::NotInSource {
            object: format!("blob {digest}"),
            place: self.path.display().to_string(),
        })?;
        Ok(SpanReader { file: self.file.clone(), span: *span })
    }
}

/// An archive that is being looked through.
struct Opening<'a> {
    path: &'a Path,
    client: &'a Client,
    file: Arc<File>,
}

impl Opening<'_> {
    fn invalid(&self, reason: String) -> RegistryError {
        RegistryError::Configuration { object: self.path.display().to_string(), reason }
    }

    fn failed(&self, cause: io::Error) -> RegistryError {
        RegistryError::Local { object: self.path.display().to_string(), cause }
    }

    fn members(&self) -> Result<BTreeMap<Vec<u8>, Member>, RegistryError> {
        let whole = self.file.metadata().map_err(|cause| self.failed(cause))?.len();
        let reader = SpanReader { file: self.file.clone(), span: Span { offset: 0, size: whole } };
        let broken = |error: layer_tar::TarError| self.invalid(format!("is not a readable archive: {error}"));
        let mut archive = LayerReader::new(reader, Limits::default()).end_of_archive(EndOfArchive::Optional);
        let mut members = BTreeMap::new();
        while let Some(entry) = archive.next_entry().map_err(broken)? {
            let (path, kind) = (entry.path, entry.kind);
            let member = match kind {
                EntryKind::File { size } => Member::File(Span { offset: archive.offset(), size }),
                EntryKind::HardLink(target) => Member::Link(target),
                EntryKind::Symlink(target) => match target_of(&path, &target) {
                    Some(target) => Member::Link(target),
                    None => continue,
                },
                _ => continue,
            };
            members.insert(path.as_bytes().to_vec(), member);
        }
        Ok(members)
    }

    fn span(&self, members: &BTreeMap<Vec<u8>, Member>, name: &str) -> Result<Span, RegistryError> {
        let missing = || RegistryError::NotInSource {
            object: format!("member {name:?}"),
            place: self.path.display().to_string(),
        };
        let mut path = LayerPath::parse(name.as_bytes(), AbsoluteNames::default()).map_err(|_| missing())?;
        for _ in 0..=MAX_LINKS {
            match members.get(path.as_bytes()).ok_or_else(missing)? {
                Member::File(span) => return Ok(*span),
                Member::Link(target) => path = target.clone(),
            }
        }
        Err(missing())
    }

    /// The entry of `manifest.json` that is meant.
    fn saved_image(
        &self,
        members: &BTreeMap<Vec<u8>, Member>,
        name: Option<&str>,
    ) -> Result<SavedImage, RegistryError> {
        let span = self.span(members, "manifest.json").map_err(|_| {
            self.invalid(
                "has no manifest.json, so it was not written by docker save; an OCI layout is read as \
                 oci:DIRECTORY once it is unpacked"
                    .to_owned(),
            )
        })?;
        let text = read_document(self.reader(span), "manifest.json", self.path, MAX_MANIFEST_BYTES)?;
        let images: Vec<SavedImage> = serde_json::from_slice(&text)
            .map_err(|error| self.invalid(format!("manifest.json is not valid: {error}")))?;
        let canonical = |text: &str| text.parse::<Reference>().map(|r| r.to_string()).ok();
        let wanted = name.map(|name| (name.to_owned(), canonical(name)));
        let is_wanted = |image: &SavedImage| {
            wanted.as_ref().is_none_or(|(typed, long)| {
                image.tags().any(|tag| tag == typed || (long.is_some() && canonical(tag) == *long))
            })
        };
        let all: Vec<String> = images.iter().flat_map(|image| image.tags().map(str::to_owned)).collect();
        let count = images.len();
        let mut fitting = images.into_iter().filter(is_wanted);
        match (fitting.next(), fitting.next()) {
            (Some(image), None) => Ok(image),
            _ => Err(self.invalid(match name {
                Some(name) => format!("has no image named {name}; there are: {}", all.join(", ")),
                None => format!(
                    "holds {count} images; name one as docker-archive:FILE:NAME; there are: {}",
                    all.join(", ")
                ),
            })),
        }
    }

    fn finish(
        &self,
        members: &BTreeMap<Vec<u8>, Member>,
        saved: &SavedImage,
    ) -> Result<DockerArchive, RegistryError> {
        let span = self.span(members, &saved.config)?;
        let text = read_document(self.reader(span), &saved.config, self.path, MAX_CONFIG_BYTES)?;
        let config = ImageConfig::parse(&text).map_err(|reason| self.invalid(reason))?;
        if config.diff_ids.len() != saved.layers.len() {
            let (layers, ids) = (saved.layers.len(), config.diff_ids.len());
            return Err(self
                .invalid(format!("manifest.json lists {layers} layers, the configuration {ids} diff ids")));
        }
        if saved.layers.len() > crate::manifest::MAX_LAYERS {
            return Err(self.invalid(format!("manifest.json lists {} layers", saved.layers.len())));
        }
        let id = Digest::sha256_of(&text);
        let mut blobs = BTreeMap::from([(id.clone(), span)]);
        let mut layers = Vec::with_capacity(saved.layers.len());
        // An image may name one member often.
        let mut digests: BTreeMap<u64, Digest> = BTreeMap::new();
        for (name, diff_id) in saved.layers.iter().zip(&config.diff_ids) {
            let span = self.span(members, name)?;
            // Uncompressed, as the engine writes it, the layer is what the diff id says, and
            // reading it will show. Other tools compress: then the bytes have a digest of their own.
            let digest = match self.is_compressed(span)? {
                false => diff_id.clone(),
                true => match digests.get(&span.offset) {
                    Some(digest) => digest.clone(),
                    None => {
                        let digest = self.digest(span)?;
                        digests.insert(span.offset, digest.clone());
                        digest
                    }
                },
            };
            layers.push(Descriptor {
                media_type: media_type::DOCKER_LAYER.to_owned(),
                size: span.size,
                digest: digest.clone(),
                urls: Vec::new(),
            });
            blobs.insert(digest, span);
        }
        let manifest = ImageManifest {
            media_type: media_type::DOCKER_MANIFEST.to_owned(),
            config: Descriptor {
                media_type: media_type::DOCKER_CONFIG.to_owned(),
                size: span.size,
                digest: id.clone(),
                urls: Vec::new(),
            },
            layers,
        };
        let bytes = manifest.to_docker_json();
        let manifest =
            FetchedManifest { digest: id, content_type: None, bytes, manifest: Manifest::Image(manifest) };
        Ok(DockerArchive {
            path: self.path.to_owned(),
            file: self.file.clone(),
            name: saved.tags().next().map(str::to_owned),
            manifest,
            blobs,
        })
    }

    fn reader(&self, span: Span) -> SpanReader {
        SpanReader { file: self.file.clone(), span }
    }

    fn is_compressed(&self, span: Span) -> Result<bool, RegistryError> {
        crate::layer::is_compressed(self.reader(span)).map_err(|cause| self.failed(cause))
    }

    fn digest(&self, span: Span) -> Result<Digest, RegistryError> {
        let mut reader = self.reader(span);
        let mut digester = Digester::sha256();
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            if self.client.is_cancelled() {
                return Err(RegistryError::Cancelled);
            }
            let length = reader.read(&mut piece).map_err(|cause| self.failed(cause))?;
            match piece.get(..length) {
                Some(bytes) if !bytes.is_empty() => digester.update(bytes),
                _ => return Ok(digester.finish()),
            }
        }
    }
}

impl SavedImage {
    fn tags(&self) -> impl Iterator<Item = &str> {
        self.repo_tags.iter().flatten().map(String::as_str)
    }
}

/// The target of a symbolic link inside the archive; `None` if it leads out of it.
fn target_of(link: &LayerPath, target: &[u8]) -> Option<LayerPath> {
    let mut path = link.parent()?;
    for component in target.split(|byte| *byte == b'/') {
        path = match component {
            b"" | b"." => path,
            b".." => path.parent()?,
            name => path.join(name).ok()?,
        };
    }
    Some(path)
}

/// The archive as a file that can be read from anywhere.
fn uncompressed(mut file: File, path: &Path, spool: &Path, client: &Client) -> Result<File, RegistryError> {
    let failed = |cause| RegistryError::Local { object: path.display().to_string(), cause };
    if !crate::layer::is_compressed(&file).map_err(failed)? {
        return Ok(file);
    }
    file.seek(SeekFrom::Start(0)).map_err(failed)?;
    let mut plain = tempfile::tempfile_in(spool).map_err(|cause| RegistryError::Local {
        object: format!("{} cannot be unpacked in {}", path.display(), spool.display()),
        cause,
    })?;
    let mut unpacked = Unpacked::new(file, crate::layer::MAX_LAYER_BYTES).map_err(failed)?;
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        if client.is_cancelled() {
            return Err(RegistryError::Cancelled);
        }
        let length = unpacked.read(&mut piece).map_err(failed)?;
        match piece.get(..length) {
            Some(bytes) if !bytes.is_empty() => plain.write_all(bytes).map_err(failed)?,
            _ => return Ok(plain),
        }
    }
}

/// A member's bytes. Readers do not share a position.
#[derive(Debug)]
pub(super) struct SpanReader {
    file: Arc<File>,
    span: Span,
}

impl Read for SpanReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.span.size).unwrap_or(usize::MAX).min(buffer.len());
        let length = self.file.read_at(buffer.get_mut(..wanted).unwrap_or_default(), self.span.offset)?;
        self.span.offset += length as u64;
        self.span.size -= length as u64;
        Ok(length)
    }
}
