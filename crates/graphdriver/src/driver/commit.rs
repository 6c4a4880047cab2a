//! `Diff` of a container on a thin image: its changes become a layer in the repository, and the diff a descriptor
//! (thin images §§3 and 7.4).
//!
//! Only what `docker commit` asks for is rewritten: the diff of a container against its init layer. Builders that
//! write layers by themselves get the ordinary diff.

use std::fs::File;
use std::io::{self, BufWriter, Seek, Write};

use bucket::{LayerKey, LayerServiceConfig};
use flate2::{Compression, GzBuilder};
use layer_tar::{AbsoluteNames, LayerEntryMeta, LayerPath, LayerWriter, WriteError};
use overlay::diff::{DiffOptions, diff};
use sha2::{Digest, Sha256};
use thin_image::{DESCRIPTOR_NAME, ThinImage};

use super::{Driver, DriverError};
use crate::causes::with_causes;
use crate::layer_id::LayerId;
use crate::options::CommitFallback;
use crate::publishing;

/// An archive without entries.
const EMPTY_ARCHIVE: u64 = 1024;
/// Digits of a container's id.
const CONTAINER_DIGITS: usize = 64;

impl Driver {
    /// The archive to answer a commit with, if the container's changes were published; none if `Diff` shall answer as
    /// ever.
    ///
    /// # Errors
    /// [`DriverError::Commit`], unless the option says that an ordinary layer is as good.
    pub(super) fn commit_as_thin(
        &self,
        id: &LayerId,
        parent: Option<&LayerId>,
    ) -> Result<Option<Vec<u8>>, DriverError> {
        let Some(init) = parent.filter(|init| is_init_of(init, id)) else { return Ok(None) };
        let Some(image) = self.thin_image_below(init)? else { return Ok(None) };
        let failed = |cause: publishing::PublishingError| DriverError::Commit {
            id: id.clone(),
            cause: Box::new(cause),
        };
        let committed = match self.publishing.config() {
            Ok(None) => return Ok(None),
            Ok(Some(config)) => self.publish_changes(id, &image, &config),
            Err(error) => Err(failed(error.into())),
        };
        match committed {
            Err(error) if self.options.commit_fallback == CommitFallback::Diff => {
                let reason = with_causes(&error);
                tracing::warn!(%id, reason, "committing an ordinary layer instead (cvmfsCommitFallback=diff)");
                Ok(None)
            }
            committed => committed,
        }
    }

    fn publish_changes(
        &self,
        id: &LayerId,
        image: &ThinImage,
        config: &LayerServiceConfig,
    ) -> Result<Option<Vec<u8>>, DriverError> {
        let Some(archive) = self.archive_changes(id)? else { return Ok(None) };
        let layer = publishing::publish(
            config,
            &self.repositories,
            &archive.key,
            archive.file,
            archive.size,
            self.options.commit_timeout,
        )
        .map_err(|cause| DriverError::Commit { id: id.clone(), cause: Box::new(cause) })?;
        let committed = image.with_layer(layer).map_err(|cause| DriverError::content(id, cause))?;
        Ok(Some(descriptor_archive(&committed).map_err(|cause| DriverError::content(id, cause))?))
    }

    /// The changes of a container as a compressed archive in a file without a name; none if there are no changes.
    fn archive_changes(&self, id: &LayerId) -> Result<Option<Archive>, DriverError> {
        let failed = |cause: io::Error| DriverError::content(id, cause);
        let file = tempfile::tempfile_in(self.store.home()).map_err(failed)?;
        let digesting = Digesting { out: BufWriter::new(file), digest: Sha256::new(), size: 0 };
        // Neither time nor system: the same changes have the same name.
        let mut plain = Counting { out: GzBuilder::new().write(digesting, Compression::fast()), size: 0 };
        let options = DiffOptions { ids: self.id_maps.clone(), ..DiffOptions::default() };
        diff(&self.store.diff_directory(id), &mut plain, &options)
            .map_err(|cause| DriverError::content(id, cause))?;
        if plain.size <= EMPTY_ARCHIVE {
            return Ok(None);
        }
        let Digesting { out, digest, size } = plain.out.finish().map_err(failed)?;
        let mut file = out.into_inner().map_err(|error| failed(error.into_error()))?;
        file.rewind().map_err(failed)?;
        Ok(Some(Archive { key: LayerKey::of_sha256(&digest.finalize().into()), file, size }))
    }

    /// The image under a container, if all its layers are thin: one descriptor for all of them.
    fn thin_image_below(&self, init: &LayerId) -> Result<Option<ThinImage>, DriverError> {
        let mut images = Vec::new();
        let mut next = self.store.parent(init)?;
        while let Some(id) = next {
            match self.store.descriptor(&id)? {
                Some(image) => images.push(image),
                None => return Ok(None),
            }
            next = self.store.parent(&id)?;
        }
        let mut images = images.into_iter().rev();
        let Some(mut whole) = images.next() else { return Ok(None) };
        for mut image in images {
            // A thin commit repeats the list that it was put on.
            if !image.starts_with(&whole) {
                image.layers.splice(0..0, whole.layers);
            }
            whole = image;
        }
        Ok(Some(whole))
    }
}

struct Archive {
    key: LayerKey,
    file: File,
    /// Compressed bytes.
    size: u64,
}

fn is_init_of(init: &LayerId, container: &LayerId) -> bool {
    let digits = container.as_str();
    digits.len() == CONTAINER_DIGITS
        && digits.bytes().all(|digit| digit.is_ascii_hexdigit())
        && init.as_str().strip_suffix("-init") == Some(digits)
}

/// A layer that holds nothing but the descriptor; the same bytes for the same image.
fn descriptor_archive(image: &ThinImage) -> Result<Vec<u8>, WriteError> {
    let text = image.to_json();
    let path = LayerPath::parse(DESCRIPTOR_NAME.as_bytes(), AbsoluteNames::default());
    let path = path.expect("the name of the descriptor is a valid path");
    let meta = LayerEntryMeta { path, mode: 0o644, uid: 0, gid: 0, mtime: (0, 0), xattrs: Vec::new() };
    let mut archive = LayerWriter::new(Vec::new());
    archive.append_file(&meta, text.len() as u64, text.as_bytes())?;
    archive.finish()
}

struct Digesting<W> {
    out: W,
    digest: Sha256,
    size: u64,
}

impl<W: Write> Write for Digesting<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.digest.update(bytes.get(..written).unwrap_or_default());
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

struct Counting<W> {
    out: W,
    size: u64,
}

impl<W: Write> Write for Counting<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_container_and_its_init_layer_are_a_commit() {
        let container = "be08917b20fdc9735bc12399d2a1052568223cf17a3862bf23fb2e28691c91d2";
        let id = |text: &str| text.parse::<LayerId>().unwrap();
        assert!(is_init_of(&id(&format!("{container}-init")), &id(container)));
        // BuildKit's own layers, a classic builder's COPY, somebody else's init layer.
        assert!(!is_init_of(&id("0uw8x1p0f7l8ifxt9tua4pizr"), &id("1uw8x1p0f7l8ifxt9tua4pizr")));
        assert!(!is_init_of(&id(container), &id(container)));
        assert!(!is_init_of(&id("0uw8x1p0f7l8ifxt9tua4pizr-init"), &id("0uw8x1p0f7l8ifxt9tua4pizr")));
        assert!(!is_init_of(&id(&format!("{container}-init")), &id(&container.replace('b', "c"))));
    }
}
