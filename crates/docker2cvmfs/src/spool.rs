//! Downloaded layers, verified before anybody sees them.
//!
//! A layer passes three checks while it comes in: the digest of its blob, the diff id of
//! what it unpacks to, and the layer reader's rules for every entry of the archive. What
//! is kept is the blob as it came, in a file without a name, so that nothing is left
//! whatever happens to this process.

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use layer_tar::{EndOfArchive, LayerReader, Limits};
use registry::{Descriptor, Digest, LayerError, LayerStream, MAX_LAYER_BYTES, RegistryError, Source};

use crate::failure::ConvertError;
use crate::progress::Progress;

/// Downloads at a time: enough to fill a line through a registry that is slow per
/// connection; registries ask for no more than three.
const PARALLEL_DOWNLOADS: usize = 3;
/// Write buffer of a spool file.
const BUFFER_BYTES: usize = 256 << 10;

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

/// A layer whose bytes are here and right.
#[derive(Debug)]
pub(crate) struct SpooledLayer {
    pub(crate) wanted: Wanted,
    /// Bytes that it unpacks to.
    pub(crate) plain_bytes: u64,
    blob: File,
}

impl SpooledLayer {
    /// The layer as uncompressed archive; the diff id is verified once more at the end,
    /// against a disk that does not keep what it was given.
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

/// Downloads and checks layers, several at a time. The first failure ends the others.
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

fn fetch(
    source: &Source,
    wanted: &Wanted,
    directory: &Path,
    progress: &Progress,
) -> Result<SpooledLayer, ConvertError> {
    let spool_error = |cause| ConvertError::Spool { directory: directory.to_owned(), cause };
    let file = tempfile::tempfile_in(directory).map_err(spool_error)?;
    let root_cause = RootCause::default();
    let meter = progress.layer(&wanted.blob);
    let blob = Tee {
        blob: source.layer(&wanted.blob)?,
        file: BufWriter::with_capacity(BUFFER_BYTES, file),
        root_cause: root_cause.clone(),
        meter: &meter,
    };
    let (file, plain_bytes) =
        check(blob, wanted, &root_cause).map_err(|fault| match (root_cause.take(), fault) {
            (Some(Cause::Spool(cause)), _) => spool_error(cause),
            (Some(Cause::Registry(error)), _) => error.into(),
            (Some(Cause::Layer(cause)), _) => RegistryError::Layer {
                object: format!("layer {} of {}", wanted.blob.digest, source.name()),
                cause,
            }
            .into(),
            (None, Fault::Archive(cause)) => {
                ConvertError::Archive { digest: wanted.blob.digest.to_string(), cause }
            }
            (None, Fault::Stream(cause)) => spool_error(cause),
        })?;
    meter.finish();
    Ok(SpooledLayer { wanted: wanted.clone(), plain_bytes, blob: file })
}

/// Where reading a layer stopped. If the root cause lies below the archive, it was noted.
enum Fault {
    Archive(layer_tar::TarError),
    Stream(io::Error),
}

/// Reads a whole layer the way the publisher will; gives back the spool file, and how much
/// the layer unpacks to.
fn check<R: Read>(blob: Tee<'_, R>, wanted: &Wanted, root_cause: &RootCause) -> Result<(File, u64), Fault> {
    let stream = LayerStream::new(blob, &wanted.diff_id, MAX_LAYER_BYTES)
        .map_err(|error| Fault::Stream(root_cause.note(error)))?;
    let mut stream = Noting { stream, root_cause: root_cause.clone() };
    let outcome = read_archive(&mut stream);
    let plain_bytes = stream.stream.plain_bytes();
    let mut blob = stream.stream.into_blob();
    if let Err(fault) = outcome {
        blob.look_for_deeper_cause();
        return Err(fault);
    }
    let file = blob.file.into_inner();
    let file = file.map_err(|error| Fault::Stream(root_cause.note_spool(error.into_error())))?;
    Ok((file, plain_bytes))
}

fn read_archive(stream: &mut impl Read) -> Result<(), Fault> {
    // The diff id vouches for completeness, and some builders leave the end marker away.
    let mut archive =
        LayerReader::new(&mut *stream, Limits::default()).end_of_archive(EndOfArchive::Optional);
    while archive.next_entry().map_err(Fault::Archive)?.is_some() {}
    drop(archive);
    io::copy(stream, &mut io::sink()).map(drop).map_err(Fault::Stream)
}

/// The first thing that went wrong below the archive's reader. Readers in between wrap
/// errors in their own words; this keeps what it was.
#[derive(Debug, Clone, Default)]
struct RootCause(Arc<Mutex<Option<Cause>>>);

#[derive(Debug)]
enum Cause {
    Registry(RegistryError),
    Spool(io::Error),
    Layer(LayerError),
}

impl RootCause {
    fn take(&self) -> Option<Cause> {
        lock(&self.0).take()
    }

    /// Notes an error of the registry or of decompression; gives back a copy to go on.
    fn note(&self, error: io::Error) -> io::Error {
        let copy = io::Error::new(error.kind(), error.to_string());
        let cause = match error.downcast::<RegistryError>() {
            Ok(error) => Cause::Registry(error),
            Err(error) => match error.downcast::<LayerError>() {
                Ok(error) => Cause::Layer(error),
                Err(error) => Cause::Spool(error),
            },
        };
        lock(&self.0).get_or_insert(cause);
        copy
    }

    /// Whether the blob or the spool failed already; then the blob has no more to say.
    fn is_below_layer(&self) -> bool {
        matches!(*lock(&self.0), Some(Cause::Registry(_) | Cause::Spool(_)))
    }

    fn note_spool(&self, error: io::Error) -> io::Error {
        let copy = io::Error::new(error.kind(), error.to_string());
        lock(&self.0).get_or_insert(Cause::Spool(error));
        copy
    }
}

/// Hands on a blob and keeps a copy of it.
struct Tee<'a, R> {
    blob: R,
    file: BufWriter<File>,
    root_cause: RootCause,
    meter: &'a crate::progress::LayerMeter,
}

impl<R: Read> Tee<'_, R> {
    /// A stream that cannot be unpacked is often one that was damaged on its way: the
    /// rest of the blob tells, by its digest.
    fn look_for_deeper_cause(&mut self) {
        if !self.root_cause.is_below_layer()
            && let Err(error) = io::copy(&mut self.blob, &mut io::sink())
        {
            self.root_cause.take();
            self.root_cause.note(error);
        }
    }
}

impl<R: Read> Read for Tee<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.blob.read(buffer).map_err(|error| self.root_cause.note(error))?;
        let bytes = buffer.get(..length).unwrap_or_default();
        self.file.write_all(bytes).map_err(|error| self.root_cause.note_spool(error))?;
        self.meter.add(length as u64);
        Ok(length)
    }
}

/// Notes errors of decompression and of the diff id.
struct Noting<R: Read> {
    stream: LayerStream<R>,
    root_cause: RootCause,
}

impl<R: Read> Read for Noting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.read(buffer).map_err(|error| self.root_cause.note(error))
    }
}
