//! Files made of chunks: each chunk is fetched when it is first read, into one sparse file per content.
//!
//! Where the cache is shared with other clients, or keeps nothing, chunks stay objects of their own.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use cvmfs_format::catalog::Chunk;
use cvmfs_format::compression::Compression;
use cvmfs_format::hash::{ContentHash, HashAlgorithm, ObjectKind, ObjectName};
use futures_util::future::BoxFuture;
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;

use super::download::{LONGEST_DOWNLOAD, request_for};
use super::flight::Flights;
use super::part::{Part, Stored};
use super::verify::InMemory;
use super::{Asked, Context, ObjectStore, describe, stored};
use crate::authz::{Caller, Credentials};
use crate::cache::{CacheName, CachedFile, is_full, memory_limit};
use crate::deadline::{Deadline, Patience};
use crate::network::FetchError;

/// Largest chunk in plain bytes. A chunk is verified in memory before it enters the file. Publishers cut at 16 MiB
/// at most by default and 24 MiB with grafts; four times that is room for settings of sites.
pub const MAX_CHUNK: u64 = 64 << 20;
/// Most chunks of a file: at the default average of 8 MiB this is a file of 8 TiB.
const MAX_CHUNKS: usize = 1 << 20;
/// Most memory for chunks being verified, of all files together, and its share of what this process may use.
const MAX_MEMORY: u64 = 256 << 20;
const MEMORY_PART: u64 = 8;
/// What that memory is counted in.
const UNIT: u64 = 64 * 1024;
/// A read that begins so little behind the last one's end still goes on where that ended.
const SEQUENTIAL_SLACK: u64 = 1 << 20;
/// A first read of so many bytes is the beginning of a sequential one.
const LARGE_READ: u64 = 128 * 1024;
/// Chunks that are fetched ahead of a sequential reader: one arrives while the other is verified and stored.
const AHEAD: usize = 2;
/// Chunks of one read that are fetched at once.
const PARALLEL: usize = 4;

/// The content of a file that is stored in chunks (repository format §9.5).
#[derive(Debug, Clone)]
pub struct ChunkedFile {
    /// The chunks in the order of their offsets, without gaps.
    pub chunks: Vec<Chunk>,
    /// The compression of all chunks.
    pub compression: Compression,
    /// Plain bytes of the file.
    pub size: u64,
}

/// Everything about chunked files that a store keeps.
#[derive(Debug)]
pub(super) struct Assemblies {
    /// Files in use, so that all who have one open share it.
    open: Mutex<HashMap<CacheName, Weak<Assembly>>>,
    chunks: Arc<Flights<(CacheName, usize), ChunkResult>>,
    memory: Arc<Semaphore>,
    /// All of the memory.
    units: u32,
}

/// `None` if the chunk is in the file, its bytes if there was no room.
type ChunkResult = Result<Option<Arc<Vec<u8>>>, FetchError>;

impl Assemblies {
    pub(super) fn new() -> Self {
        let bytes = MAX_MEMORY.min(memory_limit() / MEMORY_PART);
        let units = u32::try_from(bytes / UNIT).unwrap_or(u32::MAX).max(1);
        let memory = Arc::new(Semaphore::new(units as usize));
        Self { open: Mutex::new(HashMap::new()), chunks: Flights::new(), memory, units }
    }
}

#[derive(Debug)]
struct Assembly {
    name: CacheName,
    chunks: Box<[Chunk]>,
    compression: Compression,
    size: u64,
    backing: Backing,
    /// The end of the last read: a reader who goes on there is sequential.
    expected: AtomicU64,
}

#[derive(Debug)]
enum Backing {
    Complete(CachedFile),
    Partial(Part),
    /// The chunks are objects; the one read last is kept open.
    Apart(Mutex<Option<(usize, Arc<CachedFile>)>>),
}

/// An open file that is made of chunks. Clones are cheap and share the file.
#[derive(Debug, Clone)]
pub struct ChunkedHandle {
    store: ObjectStore,
    assembly: Arc<Assembly>,
    origin: Arc<Origin>,
}

/// Where the chunks come from, and on whose behalf.
#[derive(Debug)]
struct Origin {
    path: Option<Box<[u8]>>,
    is_external: bool,
    caller: Option<Caller>,
    credentials: Option<Arc<Credentials>>,
}

impl Origin {
    fn of(context: Context<'_>) -> Arc<Self> {
        Arc::new(Self {
            path: context.path.map(Box::from),
            is_external: context.is_external,
            caller: context.caller,
            credentials: context.credentials.cloned(),
        })
    }

    fn context(&self) -> Context<'_> {
        Context {
            path: self.path.as_deref(),
            is_external: self.is_external,
            caller: self.caller,
            credentials: self.credentials.as_ref(),
        }
    }
}

impl ChunkedHandle {
    pub(super) fn open(
        store: &ObjectStore,
        file: &ChunkedFile,
        context: Context<'_>,
    ) -> Result<Self, FetchError> {
        let origin = Origin::of(context);
        let name = content_name(file);
        let object = || format!("chunked file {}", name.as_str());
        if let Some(first) = file.chunks.first().filter(|_| context.is_external) {
            let name = ObjectName::new(first.hash, ObjectKind::Chunk);
            store.fetcher_of(&Asked::new(name, file.compression, None).within(context))?;
        }
        if let Some(rule) = broken_rule(file) {
            return Err(FetchError::Refused { object: object(), reason: rule });
        }
        let mut open = store.0.chunked.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(assembly) = open.get(&name).and_then(Weak::upgrade) {
            return Ok(Self { store: store.clone(), assembly, origin });
        }
        let cache = &store.0.cache;
        let (kind, is_kept) =
            store.kind(&ObjectName::new(ContentHash::null(HashAlgorithm::Sha1), ObjectKind::Chunk));
        let is_apart = !is_kept || cache.keeps_chunks_apart() || cache.is_read_only();
        let backing = match cache.get(&name, Some(file.size)) {
            Some(complete) => Backing::Complete(complete),
            None if is_apart => Backing::Apart(Mutex::new(None)),
            None => match Part::open(cache, &name, kind, file.size, &file.chunks) {
                Ok(part) => Backing::Partial(part),
                // There is no room for another file: the chunks are handed from server to reader.
                Err(error) if is_full(&error) => Backing::Apart(Mutex::new(None)),
                Err(error) => return Err(failed(object(), error)),
            },
        };
        let assembly = Arc::new(Assembly {
            name: name.clone(),
            chunks: file.chunks.clone().into_boxed_slice(),
            compression: file.compression,
            size: file.size,
            backing,
            expected: AtomicU64::new(u64::MAX),
        });
        open.retain(|_, assembly| assembly.strong_count() > 0);
        open.insert(name, Arc::downgrade(&assembly));
        Ok(Self { store: store.clone(), assembly, origin })
    }

    /// Plain bytes of the file.
    pub fn size(&self) -> u64 {
        self.assembly.size
    }

    /// Reads into `buffer` from `offset`, fetching the chunks that are missing. Returns the number of bytes: fewer
    /// than asked for only at the end of the file.
    ///
    /// # Errors
    /// [`FetchError`]; the wait ends with `patience` in any case.
    pub fn read_at<'a>(
        &self,
        buffer: &mut [u8],
        offset: u64,
        patience: impl Into<Patience<'a>>,
    ) -> Result<usize, FetchError> {
        let patience = patience.into();
        let end = offset.saturating_add(buffer.len() as u64).min(self.assembly.size);
        let wanted = usize::try_from(end.saturating_sub(offset)).unwrap_or(0);
        let Some(buffer) = buffer.get_mut(..wanted).filter(|buffer| !buffer.is_empty()) else { return Ok(0) };
        let part = match &self.assembly.backing {
            Backing::Complete(file) => {
                use std::os::unix::fs::FileExt;
                file.file.read_exact_at(buffer, offset).map_err(|error| self.failed(error))?;
                return Ok(wanted);
            }
            Backing::Partial(part) => part,
            Backing::Apart(last) => {
                self.read_apart(last, buffer, offset, patience)?;
                return Ok(wanted);
            }
        };
        let first = self.chunk_at(offset);
        let last = self.chunk_at(end - 1);
        let missing: Vec<usize> = (first..=last).filter(|chunk| !part.is_present(*chunk)).collect();
        self.count(last - first + 1, missing.len());
        self.read_ahead(part, offset, end, last);
        let outside = self.fetch(part, &missing, patience)?;
        for chunk in first..=last {
            let Some(place) = self.assembly.chunks.get(chunk) else { continue };
            let from = place.offset.max(offset);
            let to = (place.offset + place.size).min(end);
            let span = as_index(from - offset)..as_index(to - offset);
            let piece = buffer.get_mut(span).unwrap_or_default();
            match outside.get(&chunk) {
                Some(bytes) => {
                    let span = as_index(from - place.offset)..as_index(to - place.offset);
                    piece.copy_from_slice(bytes.get(span).unwrap_or_default());
                }
                None => part.read_at(piece, from).map_err(|error| self.failed(error))?,
            }
        }
        Ok(wanted)
    }

    /// Whether all bytes are in the cache.
    pub fn is_complete(&self) -> bool {
        match &self.assembly.backing {
            Backing::Complete(_) => true,
            Backing::Partial(part) => part.is_complete(),
            Backing::Apart(_) => false,
        }
    }

    /// The file itself once it is complete, for FUSE passthrough.
    ///
    /// # Errors
    /// [`FetchError::Local`] if no descriptor is left.
    pub fn complete_file(&self) -> Result<Option<CachedFile>, FetchError> {
        let file = match &self.assembly.backing {
            Backing::Complete(file) => file.try_clone().map(Some),
            Backing::Partial(part) => part.complete_file(),
            Backing::Apart(_) => Ok(None),
        };
        file.map_err(|error| self.failed(error))
    }

    /// Reads from chunks that are objects.
    fn read_apart(
        &self,
        last: &Mutex<Option<(usize, Arc<CachedFile>)>>,
        buffer: &mut [u8],
        offset: u64,
        patience: Patience<'_>,
    ) -> Result<(), FetchError> {
        use std::os::unix::fs::FileExt;
        let mut rest = buffer;
        let mut position = offset;
        while !rest.is_empty() {
            let chunk = self.chunk_at(position);
            let Some(place) = self.assembly.chunks.get(chunk) else { break };
            let known = last.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let file = match known.filter(|(number, _)| *number == chunk) {
                Some((_, file)) => file,
                None => {
                    let file = Arc::new(self.store.fetch(&self.asked(place), patience)?);
                    *last.lock().unwrap_or_else(PoisonError::into_inner) = Some((chunk, file.clone()));
                    self.launch_apart(chunk + 1, offset);
                    file
                }
            };
            let inside = position - place.offset;
            let length = as_index((place.size - inside).min(rest.len() as u64));
            let (piece, after) = rest.split_at_mut(length);
            file.file.read_exact_at(piece, inside).map_err(|error| self.failed(error))?;
            rest = after;
            position += length as u64;
        }
        self.assembly.expected.store(position, Ordering::Relaxed);
        Ok(())
    }

    /// A sequential reader gets its next chunk before it asks, if it is kept until then.
    fn launch_apart(&self, chunk: usize, offset: u64) {
        let is_sequential = self.assembly.expected.load(Ordering::Relaxed) == offset;
        let Some(place) = self.assembly.chunks.get(chunk) else { return };
        let asked = self.asked(place);
        if is_sequential && self.store.kind(&asked.name).1 && !self.store.0.cache.is_read_only() {
            let key = (asked.file(), asked.certain_size());
            let objects = &self.store.0.objects;
            // The work looks into the cache before it fetches.
            objects
                .launch(&key, objects.moment(), &self.store.0.fetcher, |_| self.store.download(&asked, true));
        }
    }

    fn asked(&self, place: &Chunk) -> Asked<'_> {
        let name = ObjectName::new(place.hash, ObjectKind::Chunk);
        let asked =
            Asked::new(name, self.assembly.compression, Some(place.size)).within(self.origin.context());
        // Chunks of an external file are byte ranges of it (repository format §9.3).
        let range = self.origin.is_external.then(|| (place.offset, place.offset + place.size - 1));
        Asked { range, ..asked }
    }

    fn chunk_at(&self, offset: u64) -> usize {
        self.assembly.chunks.partition_point(|chunk| chunk.offset <= offset).saturating_sub(1)
    }

    fn count(&self, touched: usize, missing: usize) {
        let shared = &self.store.0;
        shared.hits.fetch_add((touched - missing) as u64, Ordering::Relaxed);
        shared.misses.fetch_add(missing as u64, Ordering::Relaxed);
    }

    /// Fetches chunks, some at once. Returns the bytes of those for which there was no room.
    fn fetch(
        &self,
        part: &Part,
        missing: &[usize],
        patience: Patience<'_>,
    ) -> Result<HashMap<usize, Arc<Vec<u8>>>, FetchError> {
        let mut outside = HashMap::new();
        for group in missing.chunks(PARALLEL) {
            // The others of the group are on their way in the background while this thread takes them in order.
            for chunk in group.iter().skip(1) {
                self.launch(*chunk);
            }
            for chunk in group {
                if part.look_up(*chunk) {
                    continue;
                }
                if let Some(bytes) = self.fetch_chunk(*chunk, patience)? {
                    outside.insert(*chunk, bytes);
                }
            }
        }
        Ok(outside)
    }

    fn fetch_chunk(&self, chunk: usize, patience: Patience<'_>) -> ChunkResult {
        let shared = &self.store.0;
        let key = (self.assembly.name.clone(), chunk);
        let chunks = &shared.chunked.chunks;
        // The work looks into the file itself before it fetches.
        let joined = chunks.join(&key, chunks.moment(), &shared.fetcher, patience, |_| self.work(chunk));
        let outcome = joined.unwrap_or_else(|leave| {
            let object = self.object_name(chunk).map_or_else(String::new, |name| describe(&name));
            Err(shared.fetcher.left(&object, leave))
        });
        if outcome.is_err() {
            shared.failures.fetch_add(1, Ordering::Relaxed);
        }
        outcome
    }

    /// A sequential reader gets its next chunks before it asks. The kernel may swap neighbouring reads. Who begins with
    /// a large piece wants more of the file; a small one may be a look at its header only.
    fn read_ahead(&self, part: &Part, offset: u64, end: u64, last: usize) {
        let expected = self.assembly.expected.swap(end, Ordering::Relaxed);
        let goes_on = offset.checked_sub(expected).is_some_and(|skipped| skipped <= SEQUENTIAL_SLACK);
        let is_sequential = goes_on || (offset == 0 && end >= LARGE_READ);
        let after = (last + 1..self.assembly.chunks.len()).take(AHEAD);
        for next in after.take_while(|_| is_sequential).filter(|next| !part.is_present(*next)) {
            self.launch(next);
        }
    }

    fn launch(&self, chunk: usize) {
        let shared = &self.store.0;
        let key = (self.assembly.name.clone(), chunk);
        let chunks = &shared.chunked.chunks;
        chunks.launch(&key, chunks.moment(), &shared.fetcher, |_| self.work(chunk));
    }

    fn work(&self, chunk: usize) -> BoxFuture<'static, ChunkResult> {
        Box::pin(self.clone().download(chunk))
    }

    async fn download(self, chunk: usize) -> ChunkResult {
        let (Backing::Partial(part), Some(place)) = (&self.assembly.backing, self.assembly.chunks.get(chunk))
        else {
            return Ok(None);
        };
        if part.look_up(chunk) {
            return Ok(None);
        }
        let asked = self.asked(place);
        let (name, wanted) = (asked.name, asked.wanted());
        // The semaphore is never closed. A chunk larger than all of it takes all of it.
        let bytes = place.size.saturating_add(wanted.max_stored());
        let units = u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX).min(self.store.0.chunked.units);
        let _memory = self.store.0.chunked.memory.acquire_many(units).await;
        let mut sink = InMemory::new(wanted, place.size);
        let request = request_for(&asked, wanted.max_stored())?;
        let fetcher = self.store.fetcher_of(&asked)?;
        fetcher.transfer(&request, &mut sink, Deadline::after(LONGEST_DOWNLOAD)).await?;
        let bytes = sink.into_plain();
        match part.store(chunk, place.offset, &bytes).map_err(|error| stored(&name, error))? {
            Stored::Kept => Ok(None),
            Stored::NoRoom => Ok(Some(Arc::new(bytes))),
        }
    }

    fn object_name(&self, chunk: usize) -> Option<ObjectName> {
        Some(ObjectName::new(self.assembly.chunks.get(chunk)?.hash, ObjectKind::Chunk))
    }

    fn failed(&self, error: io::Error) -> FetchError {
        failed(format!("chunked file {}", self.assembly.name.as_str()), error)
    }
}

/// The name of the file's content: a hash over the list of its chunks, which by their hashes determine its bytes.
pub(super) fn content_name(file: &ChunkedFile) -> CacheName {
    let mut hash = Sha256::new();
    hash.update(b"cvmfs chunk list 1");
    hash.update([file.compression.id()]);
    hash.update(file.size.to_le_bytes());
    for chunk in &file.chunks {
        hash.update(chunk.offset.to_le_bytes());
        hash.update(chunk.size.to_le_bytes());
        hash.update([chunk.hash.algorithm.id()]);
        hash.update(chunk.hash.digest);
    }
    CacheName::assembled(&hash.finalize())
}

/// The rule that a chunk list breaks, if any.
fn broken_rule(file: &ChunkedFile) -> Option<String> {
    if file.chunks.len() > MAX_CHUNKS {
        return Some(format!("{} chunks are more than {MAX_CHUNKS}", file.chunks.len()));
    }
    let mut end = 0_u64;
    for chunk in &file.chunks {
        if chunk.offset != end {
            return Some(format!("chunk at {} where {end} was expected", chunk.offset));
        }
        if chunk.size == 0 || chunk.size > MAX_CHUNK {
            return Some(format!("chunk of {} bytes; at most {MAX_CHUNK} are supported", chunk.size));
        }
        end = end.saturating_add(chunk.size);
    }
    (end != file.size).then(|| format!("chunks of {end} bytes for a file of {}", file.size))
}

/// An offset inside a chunk or a buffer, both of which are in memory.
fn as_index(offset: u64) -> usize {
    usize::try_from(offset).expect("offsets inside memory fit into usize")
}

fn failed(object: String, error: io::Error) -> FetchError {
    if crate::cache::is_full(&error) {
        FetchError::NoSpace { object, reason: error.to_string() }
    } else {
        FetchError::Local { object, source: Arc::new(error) }
    }
}
