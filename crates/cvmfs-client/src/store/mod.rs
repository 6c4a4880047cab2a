//! Objects by name: from the cache, or from the servers into the cache.
//!
//! [`ObjectStore`] joins a [`Fetcher`] and a [`Cache`]. It downloads each object once however many ask, verifies it
//! while it arrives ([`verify`]), and gives out open files. Files made of chunks are assembled in place
//! ([`ChunkedHandle`]).
//!
//! Invariant: no byte leaves this module that does not belong to the object whose name was asked for.

mod chunked;
mod database;
mod flight;
mod part;
mod verify;

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cvmfs_format::compression::Compression;
use cvmfs_format::hash::{ObjectKind, ObjectName};
use serde::Serialize;

pub use crate::cache::{Cache, CacheName, CacheUsage, CachedFile};
pub use crate::network::{FetchError, Fetcher, NetworkStatus, Place};
pub use chunked::{ChunkedFile, ChunkedHandle, MAX_CHUNK};

use crate::cache::is_full;
use crate::config::ClientSettings;
use crate::deadline::{Deadline, Patience};
use crate::error::ClientError;
use crate::network::Request;
use flight::Flights;
use verify::{Verified, Wanted};

/// Longest download of one object. Within it the low-speed limit decides.
const LONGEST_DOWNLOAD: Duration = Duration::from_secs(3600);
/// How long a missing or damaged object is not asked for again, so that a program that retries in a loop does not
/// hammer the servers.
const FAILURE_MEMORY: Duration = Duration::from_secs(2);
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
    /// Objects that could not be delivered.
    pub failures: u64,
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
    cache: Cache,
    objects: Arc<Flights<ObjectKey, ObjectResult>>,
    chunked: chunked::Assemblies,
    failed: Mutex<HashMap<ObjectKey, (Instant, FetchError)>>,
    hits: AtomicU64,
    misses: AtomicU64,
    failures: AtomicU64,
}

impl ObjectStore {
    /// A store that fetches with `fetcher` and keeps in `cache`.
    pub fn new(fetcher: Fetcher, cache: Cache) -> Self {
        Self(Arc::new(Shared {
            fetcher,
            cache,
            objects: Flights::new(),
            chunked: chunked::Assemblies::new(),
            failed: Mutex::new(HashMap::new()),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            failures: AtomicU64::new(0),
        }))
    }

    /// The store that `settings` describe.
    ///
    /// # Errors
    /// The cache directory or the network cannot be set up.
    pub fn open(settings: &ClientSettings) -> Result<Self, ClientError> {
        let cache = Cache::open(&settings.cache_directory, settings.cache_limit)?;
        Ok(Self::new(Fetcher::new(settings)?, cache))
    }

    /// The object `name` as a file of decompressed bytes. With `size` its plain size is checked; state it whenever
    /// it is known. For catalogs and history databases it is no more than a hint: what manifests and parent
    /// catalogs say about it is not reliable, and nobody else minds (errata 17).
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
        self.object_at(name.path(), name, compression, size, patience)
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
        let file = CacheName::object(&name.hash, compression);
        let is_database = matches!(name.kind, ObjectKind::Catalog | ObjectKind::History);
        let (size, hint) = if is_database { (None, size) } else { (size, None) };
        if let Some(found) = self.cached(name, &file, size) {
            self.0.hits.fetch_add(1, Ordering::Relaxed);
            return Ok(found);
        }
        self.0.misses.fetch_add(1, Ordering::Relaxed);
        let key = (file, size);
        let wanted = Wanted { name: *name, compression, size, hint };
        let outcome = match self.remembered_failure(&key) {
            Some(error) => Err(error),
            None => {
                let start = || -> futures_util::future::BoxFuture<'static, ObjectResult> {
                    Box::pin(self.clone().download(wanted, key.0.clone(), path.clone()))
                };
                let joined = self.0.objects.join(&key, &self.0.fetcher, patience.into(), start);
                joined.unwrap_or_else(|leave| Err(self.0.fetcher.left(&describe(name), leave)))
            }
        };
        let delivered = outcome.and_then(|file| match Arc::try_unwrap(file) {
            Ok(file) => Ok(file),
            Err(shared) => shared.try_clone().map_err(|error| stored(name, error)),
        });
        if let Err(error) = &delivered {
            self.0.failures.fetch_add(1, Ordering::Relaxed);
            self.remember_failure(key, error);
        }
        delivered
    }

    /// Whether the object is in the cache. With `size` a file of another size does not count.
    pub fn is_cached(&self, name: &ObjectName, compression: Compression, size: Option<u64>) -> bool {
        self.cached(name, &CacheName::object(&name.hash, compression), size).is_some()
    }

    /// Forgets a cached object that turned out to be unusable; it is fetched again when it is asked for.
    pub fn forget(&self, name: &ObjectName, compression: Compression) {
        self.0.cache.remove(&CacheName::object(&name.hash, compression));
    }

    /// A file made of chunks, whose bytes are fetched when they are read.
    ///
    /// # Errors
    /// [`FetchError::Refused`] for a chunk list that is not contiguous or has too large a chunk;
    /// [`FetchError::Local`] and [`FetchError::NoSpace`] if the file cannot be created.
    pub fn chunked(&self, file: &ChunkedFile) -> Result<ChunkedHandle, FetchError> {
        ChunkedHandle::open(self, file)
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
            evictions: self.0.cache.usage().evictions,
            failures: self.0.failures.load(Ordering::Relaxed),
        }
    }

    /// Where requests go at present.
    pub fn status(&self) -> NetworkStatus {
        self.0.fetcher.status()
    }

    async fn download(self, wanted: Wanted, file: CacheName, path: String) -> ObjectResult {
        // Somebody may have stored it between our look and the start of this download.
        let name = &wanted.name;
        if let Some(found) = self.cached(name, &file, wanted.size) {
            return Ok(Arc::new(found));
        }
        let txn = self.0.cache.begin(wanted.size).map_err(|error| stored(name, error))?;
        let mut sink = Verified::new(wanted, txn);
        let request = Request::new(path, describe(name), wanted.max_stored());
        self.0.fetcher.transfer(&request, &mut sink, Deadline::after(LONGEST_DOWNLOAD)).await?;
        let stored_file = sink.into_target().commit(&file).map_err(|error| stored(name, error))?;
        Ok(Arc::new(stored_file))
    }

    /// The object from the cache. Where nobody reliable states the size, what the file says of itself must fit it.
    fn cached(&self, name: &ObjectName, file: &CacheName, size: Option<u64>) -> Option<CachedFile> {
        let found = self.0.cache.get(file, size)?;
        if size.is_none() && !database::is_whole(&found) {
            tracing::warn!(
                object = describe(name),
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
