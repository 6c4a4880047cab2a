//! Objects by name: from the cache, or from the servers into the cache.
//!
//! [`ObjectStore`] joins a [`Fetcher`] and a [`Cache`]. It downloads each object once however many ask, verifies it
//! while it arrives ([`verify`]), and gives out open files. Files made of chunks are assembled in place
//! ([`ChunkedHandle`]).
//!
//! Invariant: no byte leaves this module that does not belong to the object whose name was asked for.

mod chunked;
mod database;
mod download;
mod flight;
mod part;
mod verify;

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cvmfs_format::compression::Compression;
use cvmfs_format::hash::{ObjectKind, ObjectName};
use serde::Serialize;
use tokio::sync::Semaphore;

pub use crate::cache::{Cache, CacheName, CacheUsage, CachedFile, PinError, Pinned};
pub use crate::network::{FetchError, Fetcher, NetworkStatus, Place};
pub use chunked::{ChunkedFile, ChunkedHandle, MAX_CHUNK};

use crate::authz::{Caller, Credentials};
use crate::cache::{Kind, is_full};
use crate::config::ClientSettings;
use crate::deadline::Patience;
use crate::error::ClientError;
use crate::network::Request;
use flight::Flights;
use verify::Wanted;

/// How long a missing or damaged object is not asked for again, so that a program that retries in a loop does not
/// hammer the servers.
const FAILURE_MEMORY: Duration = Duration::from_secs(2);
/// Downloads under way at a time that nobody waits for.
const MAX_AHEAD: usize = 6;
/// Most failures remembered.
const MAX_FAILURES: usize = 1024;

/// Counters since the start, for status and benchmarks. All only grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counters {
    /// Requests sent.
    pub requests: u64,
    /// Bytes of bodies received.
    pub bytes_fetched: u64,
    /// Attempts that failed.
    pub network_errors: u64,
    /// Changes of proxy or host.
    pub fail_overs: u64,
    /// Objects and chunks found in the cache.
    pub cache_hits: u64,
    /// Objects and chunks that had to be fetched.
    pub cache_misses: u64,
    /// Files evicted from the cache.
    pub evictions: u64,
    /// Small files fetched before anybody asked for them.
    pub fetched_ahead: u64,
    /// Objects that could not be delivered.
    pub failures: u64,
}

/// Where something belongs that is read, and who reads it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Context<'a> {
    /// The absolute path in the repository, for people who look into the cache, for sites that tell it to their
    /// servers, and for external files.
    pub path: Option<&'a [u8]>,
    /// The file lies on the external servers under its path in the repository (repository format §9.3).
    pub is_external: bool,
    /// Who reads, for sites that tell it to their servers.
    pub caller: Option<Caller>,
    /// The right to read.
    pub credentials: Option<&'a Arc<Credentials>>,
}

/// An object that somebody asks for.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// Its name.
    pub name: ObjectName,
    /// How it is stored.
    pub compression: Compression,
    /// Its plain size in bytes; state it whenever it is known. For catalogs and history databases it is no more than
    /// a hint: what manifests and parent catalogs say about it is not reliable, and nobody else minds (errata 17).
    pub size: Option<u64>,
    /// Where it belongs, and who asks.
    pub context: Context<'a>,
    /// Where it lies below the storage root, if that does not follow from its name.
    pub source: Option<&'a str>,
    /// First and last byte of an external file of which it is a part.
    range: Option<(u64, u64)>,
}

impl<'a> Asked<'a> {
    /// An object that is where objects are.
    pub fn new(name: ObjectName, compression: Compression, size: Option<u64>) -> Self {
        Self { name, compression, size, context: Context::default(), source: None, range: None }
    }

    /// The same in this context.
    #[must_use]
    pub fn within(self, context: Context<'a>) -> Self {
        Self { context, ..self }
    }

    fn is_database(&self) -> bool {
        matches!(self.name.kind, ObjectKind::Catalog | ObjectKind::History)
    }

    /// The size that a file in the cache must have.
    fn certain_size(&self) -> Option<u64> {
        self.size.filter(|_| !self.is_database())
    }

    /// The name in the cache.
    fn file(&self) -> CacheName {
        CacheName::object(&self.name.hash, self.compression)
    }

    fn wanted(&self) -> Wanted {
        let hint = self.size.filter(|_| self.is_database());
        Wanted { name: self.name, compression: self.compression, size: self.certain_size(), hint }
    }
}

/// The objects of one repository. Clones share everything.
///
/// The calls block: they must not be made on a thread of an asynchronous runtime.
#[derive(Debug, Clone)]
pub struct ObjectStore(Arc<Shared>);

/// What tells one download from another.
type ObjectKey = (CacheName, Option<u64>);
type ObjectResult = Result<Arc<CachedFile>, FetchError>;

#[derive(Debug)]
struct Shared {
    fetcher: Fetcher,
    /// For external files, if they have servers.
    external: Option<Fetcher>,
    cache: Cache,
    /// The content of files is not kept.
    is_streaming: bool,
    /// The repository asks for its files to be evicted first.
    is_volatile: AtomicBool,
    objects: Arc<Flights<ObjectKey, ObjectResult>>,
    chunked: chunked::Assemblies,
    failed: Mutex<HashMap<ObjectKey, (Instant, FetchError)>>,
    pinned: Mutex<HashMap<CacheName, Pinned>>,
    hits: AtomicU64,
    misses: AtomicU64,
    fetched_ahead: AtomicU64,
    /// Bounds the downloads that nobody waits for, so that those with a reader find a connection.
    ahead: Arc<Semaphore>,
    failures: AtomicU64,
}

impl ObjectStore {
    /// A store that fetches with `fetcher` and keeps in `cache`.
    pub fn new(fetcher: Fetcher, cache: Cache) -> Self {
        Self::with(fetcher, None, cache, false)
    }

    /// The store that `settings` describe.
    ///
    /// # Errors
    /// The cache directory or the network cannot be set up.
    pub fn open(settings: &ClientSettings) -> Result<Self, ClientError> {
        let cache = Cache::from_settings(&settings.cache)?;
        let (fetcher, external) = (Fetcher::new(settings)?, Fetcher::external(settings)?);
        Ok(Self::with(fetcher, external, cache, settings.cache.streaming))
    }

    fn with(fetcher: Fetcher, external: Option<Fetcher>, cache: Cache, is_streaming: bool) -> Self {
        Self(Arc::new(Shared {
            fetcher,
            external,
            cache,
            is_streaming,
            is_volatile: AtomicBool::new(false),
            objects: Flights::new(),
            chunked: chunked::Assemblies::new(),
            failed: Mutex::new(HashMap::new()),
            pinned: Mutex::new(HashMap::new()),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            fetched_ahead: AtomicU64::new(0),
            ahead: Arc::new(Semaphore::new(MAX_AHEAD)),
            failures: AtomicU64::new(0),
        }))
    }

    /// From now on the files of this repository are evicted before those of others (client behaviour §10).
    pub fn set_volatile(&self, is_volatile: bool) {
        self.0.is_volatile.store(is_volatile, Ordering::Relaxed);
    }

    /// The object `name` as a file of decompressed bytes.
    ///
    /// # Errors
    /// [`FetchError`]; the wait ends with `patience` in any case.
    pub fn object<'a>(
        &self,
        name: &ObjectName,
        compression: Compression,
        size: Option<u64>,
        patience: impl Into<Patience<'a>>,
    ) -> Result<CachedFile, FetchError> {
        self.fetch(&Asked::new(*name, compression, size), patience)
    }

    /// The object `name` like [`ObjectStore::object`], fetched from `path` below the storage root if it is not in
    /// the cache: some objects have a second, alternative path.
    ///
    /// # Errors
    /// As [`ObjectStore::object`].
    pub fn object_at<'a>(
        &self,
        path: String,
        name: &ObjectName,
        compression: Compression,
        size: Option<u64>,
        patience: impl Into<Patience<'a>>,
    ) -> Result<CachedFile, FetchError> {
        let asked = Asked { source: Some(&path), ..Asked::new(*name, compression, size) };
        self.fetch(&asked, patience)
    }

    /// The object that is asked for, as a file of decompressed bytes: from the cache or from the servers.
    ///
    /// # Errors
    /// [`FetchError`]; the wait ends with `patience` in any case.
    pub fn fetch<'a>(
        &self,
        asked: &Asked<'_>,
        patience: impl Into<Patience<'a>>,
    ) -> Result<CachedFile, FetchError> {
        let looked = self.0.objects.moment();
        match self.find(asked) {
            Some(found) => Ok(found),
            None => self.fetch_missing(asked, looked, patience.into()),
        }
    }

    /// The object if it is in the cache. Never waits for a server.
    pub fn find(&self, asked: &Asked<'_>) -> Option<CachedFile> {
        let found = self.cached(asked, &asked.file())?;
        self.0.hits.fetch_add(1, Ordering::Relaxed);
        Some(found)
    }

    /// Begins to fetch the object in the background, for whoever asks for it later; false if it is in the cache. What
    /// fails is forgotten: a reader asks anew and gets the error.
    pub fn fetch_ahead(&self, asked: &Asked<'_>) -> bool {
        let looked = self.0.objects.moment();
        if self.is_cached(&asked.name, asked.compression, asked.size) {
            return false;
        }
        let Ok(fetcher) = self.fetcher_of(asked) else { return false };
        self.0.fetched_ahead.fetch_add(1, Ordering::Relaxed);
        let key = (asked.file(), asked.certain_size());
        self.0.objects.launch(&key, looked, fetcher, |look_again| {
            let (work, room) = (self.download(asked, look_again), Arc::clone(&self.0.ahead));
            Box::pin(async move {
                // The semaphore is never closed.
                let _permit = room.acquire().await;
                work.await
            })
        });
        true
    }

    /// The object if it is in the cache. Never waits for a server.
    pub fn cached_object(
        &self,
        name: &ObjectName,
        compression: Compression,
        size: Option<u64>,
    ) -> Option<CachedFile> {
        self.find(&Asked::new(*name, compression, size))
    }

    /// A file made of chunks if all of it is in the cache as one file. Never waits for a server.
    pub fn cached_chunked(&self, file: &ChunkedFile) -> Option<CachedFile> {
        let found = self.0.cache.get(&chunked::content_name(file), Some(file.size))?;
        self.0.hits.fetch_add(1, Ordering::Relaxed);
        Some(found)
    }

    fn fetch_missing(
        &self,
        asked: &Asked<'_>,
        looked: flight::Moment,
        patience: Patience<'_>,
    ) -> Result<CachedFile, FetchError> {
        self.0.misses.fetch_add(1, Ordering::Relaxed);
        let key = (asked.file(), asked.certain_size());
        let outcome = match self.remembered_failure(&key) {
            Some(error) => Err(error),
            None => {
                let fetcher = self.fetcher_of(asked)?;
                let start = |look_again| self.download(asked, look_again);
                let joined = self.0.objects.join(&key, looked, fetcher, patience, start);
                joined.unwrap_or_else(|leave| Err(fetcher.left(&described(asked), leave)))
            }
        };
        let delivered = outcome.and_then(|file| match Arc::try_unwrap(file) {
            Ok(file) => Ok(file),
            Err(shared) => shared.try_clone().map_err(|error| stored(&asked.name, error)),
        });
        if let Err(error) = &delivered {
            self.0.failures.fetch_add(1, Ordering::Relaxed);
            self.remember_failure(key, error);
        }
        delivered
    }

    /// Whether the object is in the cache. With `size` a file of another size does not count.
    pub fn is_cached(&self, name: &ObjectName, compression: Compression, size: Option<u64>) -> bool {
        let asked = Asked::new(*name, compression, size);
        match asked.certain_size() {
            Some(size) => self.0.cache.contains(&asked.file(), Some(size)),
            None => self.cached(&asked, &asked.file()).is_some(),
        }
    }

    /// Forgets a cached object that turned out to be unusable, or that somebody wants to go; it is fetched again when
    /// it is asked for. False if it was not there.
    pub fn forget(&self, name: &ObjectName, compression: Compression) -> bool {
        self.0.cache.remove(&CacheName::object(&name.hash, compression))
    }

    /// Fetches an object and keeps it in the cache as long as this store lives.
    ///
    /// # Errors
    /// [`FetchError`]; [`FetchError::NoSpace`] if too much is pinned already.
    pub fn pin<'a>(&self, asked: &Asked<'_>, patience: impl Into<Patience<'a>>) -> Result<(), FetchError> {
        self.fetch(asked, patience)?;
        let file = asked.file();
        let pinned = self.0.cache.pin(&file, hint(asked).as_deref()).map_err(|error| {
            FetchError::NoSpace { object: describe(&asked.name), reason: error.to_string() }
        })?;
        self.0.pinned.lock().unwrap_or_else(PoisonError::into_inner).insert(file, pinned);
        Ok(())
    }

    /// Ends what [`ObjectStore::pin`] began. False if the object was not pinned.
    pub fn unpin(&self, name: &ObjectName, compression: Compression) -> bool {
        let file = CacheName::object(&name.hash, compression);
        self.0.pinned.lock().unwrap_or_else(PoisonError::into_inner).remove(&file).is_some()
    }

    /// What [`ObjectStore::forget`] does, for a file made of chunks and for its chunks; also what pinned them ends.
    pub fn forget_chunked(&self, file: &ChunkedFile) -> bool {
        let name = chunked::content_name(file);
        self.0.pinned.lock().unwrap_or_else(PoisonError::into_inner).remove(&name);
        let whole = self.0.cache.remove(&name);
        let chunks = file.chunks.iter().map(|chunk| ObjectName::new(chunk.hash, ObjectKind::Chunk));
        chunks.fold(whole, |any, chunk| {
            self.unpin(&chunk, file.compression);
            self.forget(&chunk, file.compression) || any
        })
    }

    /// Fetches all of a file made of chunks and keeps it in the cache as long as this store lives.
    ///
    /// # Errors
    /// As [`ObjectStore::pin`].
    pub fn pin_chunked<'a>(
        &self,
        file: &ChunkedFile,
        context: Context<'_>,
        patience: impl Into<Patience<'a>>,
    ) -> Result<(), FetchError> {
        /// Bytes read at a time.
        const PIECE: usize = 1 << 20;
        let patience = patience.into();
        let handle = self.chunked_within(file, context)?;
        let (mut buffer, mut offset) = (vec![0; PIECE], 0);
        while offset < file.size {
            match handle.read_at(&mut buffer, offset, patience)? {
                0 => break,
                length => offset += length as u64,
            }
        }
        let name = chunked::content_name(file);
        let path = context.path.map(|path| String::from_utf8_lossy(path).into_owned());
        match self.0.cache.pin(&name, path.as_deref()) {
            Ok(pinned) => {
                self.0.pinned.lock().unwrap_or_else(PoisonError::into_inner).insert(name, pinned);
                Ok(())
            }
            // Caches that are shared with other clients keep the chunks, and not the file.
            Err(PinError::NotCached) => file.chunks.iter().try_for_each(|chunk| {
                let object = ObjectName::new(chunk.hash, ObjectKind::Chunk);
                self.pin(&Asked::new(object, file.compression, Some(chunk.size)).within(context), patience)
            }),
            Err(error) => {
                let object = format!("chunked file {}", name.as_str());
                Err(FetchError::NoSpace { object, reason: error.to_string() })
            }
        }
    }

    /// A file made of chunks, whose bytes are fetched when they are read.
    ///
    /// # Errors
    /// [`FetchError::Refused`] for a chunk list that is not contiguous or has too large a chunk;
    /// [`FetchError::Local`] and [`FetchError::NoSpace`] if the file cannot be created.
    pub fn chunked(&self, file: &ChunkedFile) -> Result<ChunkedHandle, FetchError> {
        self.chunked_within(file, Context::default())
    }

    /// The same in a context.
    ///
    /// # Errors
    /// As [`ObjectStore::chunked`]; [`FetchError::Refused`] for an external file without external servers.
    pub fn chunked_within(
        &self,
        file: &ChunkedFile,
        context: Context<'_>,
    ) -> Result<ChunkedHandle, FetchError> {
        ChunkedHandle::open(self, file, context)
    }

    /// A small file of the storage root that is not an object, such as `.cvmfspublished`, of at most `max` bytes.
    ///
    /// # Errors
    /// [`FetchError`].
    pub fn raw<'a>(
        &self,
        path: &str,
        max: u64,
        patience: impl Into<Patience<'a>>,
    ) -> Result<Vec<u8>, FetchError> {
        let request = Request::new(path.to_owned(), path.to_owned(), max);
        self.0.fetcher.bytes(&request, patience)
    }

    /// The network side.
    pub fn fetcher(&self) -> &Fetcher {
        &self.0.fetcher
    }

    /// The network side of external files; `None` without `CVMFS_EXTERNAL_URL`.
    pub fn external_fetcher(&self) -> Option<&Fetcher> {
        self.0.external.as_ref()
    }

    /// The network side that has what is asked for.
    fn fetcher_of(&self, asked: &Asked<'_>) -> Result<&Fetcher, FetchError> {
        if !asked.context.is_external {
            return Ok(&self.0.fetcher);
        }
        self.0.external.as_ref().ok_or_else(|| FetchError::Refused {
            object: described(asked),
            reason: "the file lies on external servers, and CVMFS_EXTERNAL_URL is not set".to_owned(),
        })
    }

    /// The disk side.
    pub fn cache(&self) -> &Cache {
        &self.0.cache
    }

    /// How full the cache is.
    pub fn cache_usage(&self) -> CacheUsage {
        self.0.cache.usage()
    }

    /// Counters since the start.
    pub fn counters(&self) -> Counters {
        let network = self.0.fetcher.counters();
        Counters {
            requests: network.requests,
            bytes_fetched: network.bytes,
            network_errors: network.errors,
            fail_overs: network.fail_overs,
            cache_hits: self.0.hits.load(Ordering::Relaxed),
            cache_misses: self.0.misses.load(Ordering::Relaxed),
            evictions: self.0.cache.evictions(),
            fetched_ahead: self.0.fetched_ahead.load(Ordering::Relaxed),
            failures: self.0.failures.load(Ordering::Relaxed),
        }
    }

    /// Where requests go at present.
    pub fn status(&self) -> NetworkStatus {
        self.0.fetcher.status()
    }

    /// What the content of an object is to the cache, and whether it is kept there.
    fn kind(&self, name: &ObjectName) -> (Kind, bool) {
        match name.kind {
            ObjectKind::File | ObjectKind::Chunk if self.0.is_volatile.load(Ordering::Relaxed) => {
                (Kind::Volatile, !self.0.is_streaming)
            }
            ObjectKind::File | ObjectKind::Chunk => (Kind::Regular, !self.0.is_streaming),
            _ => (Kind::Catalog, true),
        }
    }

    /// The object from the cache. Where nobody reliable states the size, what the file says of itself must fit it.
    fn cached(&self, asked: &Asked<'_>, file: &CacheName) -> Option<CachedFile> {
        let size = asked.certain_size();
        let found = self.0.cache.get(file, size)?;
        if size.is_none() && !database::is_whole(&found) {
            tracing::warn!(
                object = describe(&asked.name),
                found = found.size,
                "cut database file is removed from the cache"
            );
            self.0.cache.remove(file);
            return None;
        }
        Some(found)
    }

    fn remembered_failure(&self, key: &ObjectKey) -> Option<FetchError> {
        let mut failed = self.0.failed.lock().unwrap_or_else(PoisonError::into_inner);
        match failed.get(key) {
            Some((when, error)) if when.elapsed() < FAILURE_MEMORY => Some(error.clone()),
            Some(_) => {
                failed.remove(key);
                None
            }
            None => None,
        }
    }

    fn remember_failure(&self, key: ObjectKey, error: &FetchError) {
        if !matches!(error, FetchError::NotFound { .. } | FetchError::Corrupt { .. }) {
            return;
        }
        let mut failed = self.0.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if failed.len() >= MAX_FAILURES {
            failed.retain(|_, (when, _)| when.elapsed() < FAILURE_MEMORY);
        }
        if failed.len() < MAX_FAILURES {
            failed.entry(key).or_insert_with(|| (Instant::now(), error.clone()));
        }
    }
}

/// Where an object belongs, for people.
fn hint<'a>(asked: &Asked<'a>) -> Option<std::borrow::Cow<'a, str>> {
    asked.context.path.map(String::from_utf8_lossy)
}

/// What is asked for in messages.
fn described(asked: &Asked<'_>) -> String {
    match hint(asked) {
        Some(path) if asked.context.is_external => format!("external file {}", path.escape_debug()),
        _ => describe(&asked.name),
    }
}

/// The name of an object in messages: what it is and where it lies.
fn describe(name: &ObjectName) -> String {
    let kind = match name.kind {
        ObjectKind::File => "object",
        ObjectKind::Catalog => "catalog",
        ObjectKind::History => "history",
        ObjectKind::Certificate => "certificate",
        ObjectKind::Metainfo => "metainfo",
        ObjectKind::Chunk => "chunk",
    };
    format!("{kind} {name}")
}

/// The error of an object that could not be stored.
fn stored(name: &ObjectName, error: io::Error) -> FetchError {
    let object = describe(name);
    if is_full(&error) {
        FetchError::NoSpace { object, reason: error.to_string() }
    } else {
        FetchError::Local { object, source: Arc::new(error) }
    }
}
