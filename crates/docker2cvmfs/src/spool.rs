//! Downloaded layers, verified as blobs before anybody sees them.
//!
//! What is kept is the blob as it came, in a file without a name, so that nothing is left
//! whatever happens to this process. It is unpacked once, by the publisher, which checks
//! the diff id and every entry on the way; what fails there is taken out of the
//! transaction again.

use std::cell::Cell;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use registry::{Descriptor, Digest, LayerStream, MAX_LAYER_BYTES, RegistryError, Source};

use crate::failure::ConvertError;
use crate::progress::Progress;

/// Downloads at a time: enough to fill a line through a registry that is slow per
/// connection; registries ask for no more than three.
const PARALLEL_DOWNLOADS: usize = 3;
/// Compressed bytes of layers that a processor ingests within a second, at least.
const INGESTED_PER_SECOND: f64 = 20e6;
/// Between two estimates of when the downloads end.
const ESTIMATE_PAUSE: Duration = Duration::from_millis(50);
/// Bytes of a blob whose blocks take time to be freed.
const LARGE_BLOB: u64 = 1 << 20;
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

/// What layers unpack to, by their paths: diff id and bytes of those that were unpacked.
pub(crate) type Verified = HashMap<String, (Digest, u64)>;

/// A layer whose blob is here and right.
#[derive(Debug)]
pub(crate) struct SpooledLayer {
    pub(crate) wanted: Wanted,
    /// Bytes that it unpacks to, once it was unpacked.
    pub(crate) plain_bytes: Option<u64>,
    blob: Blob,
}

/// A blob as it came. Closing it frees its blocks, for which file systems that tell their disk (`discard`) make the
/// caller wait; nobody has to.
#[derive(Debug)]
struct Blob(Option<File>);

impl Drop for Blob {
    fn drop(&mut self) {
        let Some(file) = self.0.take() else { return };
        if file.metadata().is_ok_and(|blob| blob.len() >= LARGE_BLOB) {
            // Without a thread, the closure is dropped at once, and the file with it.
            let _ = std::thread::Builder::new().spawn(move || drop(file));
        }
    }
}

impl SpooledLayer {
    /// The layer as uncompressed archive; the diff id is verified at its end.
    pub(crate) fn open(&mut self) -> io::Result<LayerStream<&mut File>> {
        let blob = self.blob.0.as_mut().ok_or(io::ErrorKind::NotFound)?;
        blob.rewind()?;
        LayerStream::new(blob, &self.wanted.diff_id, MAX_LAYER_BYTES)
    }

    /// What the layer unpacks to, once it was unpacked.
    pub(crate) fn verified(&self) -> Option<(String, (Digest, u64))> {
        let bytes = self.plain_bytes?;
        Some((self.wanted.path.clone(), (self.wanted.diff_id.clone(), bytes)))
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
    download_while(source, &wanted, directory, progress, |arrivals| arrivals.collect())
}

/// Downloads layers, several at a time, while `consumer` takes those that are complete, in their order. The first
/// failure ends everything.
pub(crate) fn download_while<R>(
    source: &Source,
    wanted: &[Wanted],
    directory: &Path,
    progress: &Progress,
    consumer: impl FnOnce(Arrivals<'_>) -> Result<R, ConvertError>,
) -> Result<R, ConvertError> {
    let threads = PARALLEL_DOWNLOADS.min(wanted.len());
    let done = wanted.iter().map(|_| None).collect();
    let downloads = Downloads {
        source: source.branch(),
        wanted,
        started: Instant::now(),
        next: AtomicUsize::new(0),
        received: AtomicU64::new(0),
        state: Mutex::new(State { done, failure: None, running: threads }),
        arrived: Condvar::new(),
    };
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| downloads.work(directory, progress));
        }
        let _stop = Stop(&downloads);
        consumer(Arrivals { downloads: &downloads, next: 0 })
    })
}

/// Downloads under way.
struct Downloads<'a> {
    source: Source,
    wanted: &'a [Wanted],
    started: Instant,
    /// The next one to begin.
    next: AtomicUsize,
    /// Bytes so far, without those that turned out wrong.
    received: AtomicU64,
    state: Mutex<State>,
    arrived: Condvar,
}

struct State {
    done: Vec<Option<SpooledLayer>>,
    failure: Option<ConvertError>,
    /// Threads that download.
    running: usize,
}

/// A thread that downloads; whoever waits learns that it ended, however it did.
struct Running<'a>(&'a Downloads<'a>);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.lock().running -= 1;
        self.0.arrived.notify_all();
    }
}

/// Without a consumer nothing is downloaded any more, however it ended.
struct Stop<'a>(&'a Downloads<'a>);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

impl Downloads<'_> {
    fn work(&self, directory: &Path, progress: &Progress) {
        let _running = Running(self);
        while let Some((index, layer)) = self.take() {
            let fetched = fetch(&self.source, layer, directory, progress, &self.received);
            let mut state = self.lock();
            match fetched {
                Ok(spooled) => {
                    if let Some(place) = state.done.get_mut(index) {
                        *place = Some(spooled);
                    }
                }
                Err(error) => {
                    // What the cancellation causes elsewhere comes later and is not kept.
                    state.failure.get_or_insert(error);
                    drop(state);
                    self.stop();
                }
            }
            self.arrived.notify_all();
        }
    }

    fn take(&self) -> Option<(usize, &Wanted)> {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        self.wanted.get(index).map(|layer| (index, layer))
    }

    fn stop(&self) {
        self.next.store(self.wanted.len(), Ordering::Relaxed);
        self.source.cancel();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Layers as they come, in their order.
pub(crate) struct Arrivals<'a> {
    downloads: &'a Downloads<'a>,
    /// The first that was not yet given.
    next: usize,
}

impl Arrivals<'_> {
    /// All of them.
    fn collect(mut self) -> Result<Vec<SpooledLayer>, ConvertError> {
        let mut layers = Vec::with_capacity(self.downloads.wanted.len());
        while let Some(layer) = self.next()? {
            layers.push(layer);
        }
        Ok(layers)
    }

    /// Waits until, at the speed so far, the rest will have come before the layers that are complete are ingested:
    /// whoever begins then waits for a registry, with a lock perhaps, only if it becomes slower.
    ///
    /// # Errors
    /// That of the download that failed.
    pub(crate) fn wait_until_worthwhile(&self) -> Result<(), ConvertError> {
        let mut state = self.downloads.lock();
        loop {
            if let Some(error) = state.failure.take() {
                return Err(error);
            }
            let complete =
                self.downloads.wanted.iter().zip(&state.done).take_while(|(_, done)| done.is_some());
            let complete: Vec<u64> = complete.map(|(wanted, _)| wanted.blob.size).collect();
            if complete.len() == self.downloads.wanted.len()
                || state.running == 0
                || self.is_worthwhile(complete.iter().sum())
            {
                return Ok(());
            }
            let waited = self.downloads.arrived.wait_timeout(state, ESTIMATE_PAUSE);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn is_worthwhile(&self, complete: u64) -> bool {
        let total: u64 = self.downloads.wanted.iter().map(|layer| layer.blob.size).sum();
        let received = self.downloads.received.load(Ordering::Relaxed).min(total);
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        let ingesting = complete as f64 / (INGESTED_PER_SECOND * cores as f64);
        let elapsed = self.downloads.started.elapsed().as_secs_f64();
        complete > 0 && (total - received) as f64 * elapsed / received.max(1) as f64 <= ingesting
    }

    /// The next layer, once it is complete; `None` after the last.
    ///
    /// # Errors
    /// That of the download that failed.
    pub(crate) fn next(&mut self) -> Result<Option<SpooledLayer>, ConvertError> {
        if self.next == self.downloads.wanted.len() {
            return Ok(None);
        }
        let mut state = self.downloads.lock();
        loop {
            if let Some(error) = state.failure.take() {
                return Err(error);
            }
            if let Some(layer) = state.done.get_mut(self.next).and_then(Option::take) {
                self.next += 1;
                return Ok(Some(layer));
            }
            if state.running == 0 {
                // What ended the thread is told when the others have ended, too.
                return Err(ConvertError::Interrupted);
            }
            state = self.downloads.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A mirror that begins to answer and then serves something else costs a second download,
/// from the registry itself.
fn fetch(
    source: &Source,
    wanted: &Wanted,
    directory: &Path,
    progress: &Progress,
    received: &AtomicU64,
) -> Result<SpooledLayer, ConvertError> {
    let copied = Cell::new(0);
    let copy = |length: u64| {
        copied.set(copied.get() + length);
        received.fetch_add(length, Ordering::Relaxed);
    };
    match (fetch_from(source, wanted, directory, progress, &copy), source.without_mirrors()) {
        (Err(ConvertError::Registry(error)), Some(registry))
            if !matches!(error, RegistryError::Cancelled) =>
        {
            tracing::warn!(layer = %wanted.blob.digest, %error, "asking the registry itself");
            received.fetch_sub(copied.get(), Ordering::Relaxed);
            fetch_from(&registry, wanted, directory, progress, &copy)
        }
        (fetched, _) => fetched,
    }
}

fn fetch_from(
    source: &Source,
    wanted: &Wanted,
    directory: &Path,
    progress: &Progress,
    copied: &dyn Fn(u64),
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
        copied(length as u64);
    }
    meter.finish();
    Ok(SpooledLayer { wanted: wanted.clone(), plain_bytes: None, blob: Blob(Some(file)) })
}
