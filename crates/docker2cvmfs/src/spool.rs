//! Downloaded layers, verified as blobs before anybody sees them.
//!
//! What is kept is the blob as it came, in a file without a name, so that nothing is left
//! whatever happens to this process. It is unpacked once, by the publisher, which checks
//! the diff id and every entry on the way; what fails there is taken out of the
//! transaction again.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use registry::{Descriptor, Digest, LayerStream, MAX_LAYER_BYTES, RegistryError, Source};

use crate::failure::ConvertError;
use crate::progress::Progress;

/// Downloads at a time: enough to fill a line through a registry that is slow per
/// connection; registries ask for no more than three.
const PARALLEL_DOWNLOADS: usize = 3;
/// What is copied at a time.
const PIECE_BYTES: usize = 256 << 10;

/// A layer to be fetched.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    /// The blob.
    pub(crate) blob: Descriptor,
    /// Digest of what it unpacks to.
    pub(crate) diff_id: Digest,
    /// Its directory in the repository, an absolute path.
    pub(crate) path: String,
}

/// A layer whose blob is here and right.
#[derive(Debug)]
pub(crate) struct SpooledLayer {
    pub(crate) wanted: Wanted,
    /// Bytes that it unpacks to, once it was unpacked.
    pub(crate) plain_bytes: Option<u64>,
    blob: File,
}

impl SpooledLayer {
    /// The layer as uncompressed archive; the diff id is verified at its end.
    pub(crate) fn open(&mut self) -> io::Result<LayerStream<&mut File>> {
        self.blob.rewind()?;
        LayerStream::new(&mut self.blob, &self.wanted.diff_id, MAX_LAYER_BYTES)
    }
}

/// Where layers are kept: `given`, else `$TMPDIR`, else `/var/tmp`, which unlike `/tmp`
/// is not kept in memory.
pub(crate) fn directory(given: Option<&Path>) -> PathBuf {
    given.map(Path::to_owned).unwrap_or_else(|| {
        let variable = std::env::var_os("TMPDIR").filter(|value| !value.is_empty());
        variable.map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from)
    })
}

/// Downloads layers, several at a time. The first failure ends the others.
pub(crate) fn download(
    source: &Source,
    wanted: Vec<Wanted>,
    directory: &Path,
    progress: &Progress,
) -> Result<Vec<SpooledLayer>, ConvertError> {
    let source = source.branch();
    let next = AtomicUsize::new(0);
    let failure: Mutex<Option<ConvertError>> = Mutex::new(None);
    let done: Mutex<Vec<(usize, SpooledLayer)>> = Mutex::new(Vec::new());
    let work = || {
        while let Some((index, layer)) = take(&next, &wanted) {
            match fetch(&source, layer, directory, progress) {
                Ok(spooled) => lock(&done).push((index, spooled)),
                Err(error) => {
                    // What the cancellation causes elsewhere comes later and is not kept.
                    lock(&failure).get_or_insert(error);
                    next.store(wanted.len(), Ordering::Relaxed);
                    source.cancel();
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..PARALLEL_DOWNLOADS.min(wanted.len()) {
            scope.spawn(work);
        }
    });
    if let Some(error) = lock(&failure).take() {
        return Err(error);
    }
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|(index, _)| *index);
    Ok(done.into_iter().map(|(_, layer)| layer).collect())
}

fn take<'a>(next: &AtomicUsize, wanted: &'a [Wanted]) -> Option<(usize, &'a Wanted)> {
    let index = next.fetch_add(1, Ordering::Relaxed);
    wanted.get(index).map(|layer| (index, layer))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A mirror that begins to answer and then serves something else costs a second download,
/// from the registry itself.
fn fetch(
    source: &Source,
    wanted: &Wanted,
    directory: &Path,
    progress: &Progress,
) -> Result<SpooledLayer, ConvertError> {
    match (fetch_from(source, wanted, directory, progress), source.without_mirrors()) {
        (Err(ConvertError::Registry(error)), Some(registry))
            if !matches!(error, RegistryError::Cancelled) =>
        {
            tracing::warn!(layer = %wanted.blob.digest, %error, "asking the registry itself");
            fetch_from(&registry, wanted, directory, progress)
        }
        (fetched, _) => fetched,
    }
}

fn fetch_from(
    source: &Source,
    wanted: &Wanted,
    directory: &Path,
    progress: &Progress,
) -> Result<SpooledLayer, ConvertError> {
    let spool_error = |cause| ConvertError::Spool { directory: directory.to_owned(), cause };
    let mut file = tempfile::tempfile_in(directory).map_err(spool_error)?;
    let meter = progress.layer(&wanted.blob);
    let mut blob = source.layer(&wanted.blob)?;
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let length = blob.read(&mut piece).map_err(|error| match error.downcast::<RegistryError>() {
            Ok(error) => error.into(),
            Err(cause) => spool_error(cause),
        })?;
        let Some(bytes) = piece.get(..length).filter(|bytes| !bytes.is_empty()) else { break };
        file.write_all(bytes).map_err(spool_error)?;
        meter.add(length as u64);
    }
    meter.finish();
    Ok(SpooledLayer { wanted: wanted.clone(), plain_bytes: None, blob: file })
}
