//! The local cache: verified, decompressed files on disk (client behaviour §9).
//!
//! ```text
//! 00 … ff/        files, named by content ([`CacheName`])
//! chunked/        sparse files of which some chunks are present
//! txn/            files being written, locked by their writers
//! usage           bytes in use, shared by all processes
//! evict.lock      held by the process that makes room
//! cvmfschecksum.* the last accepted revision of each repository
//! ```
//!
//! Invariants:
//! * a file appears under its name only complete and verified, by rename; nothing is ever changed under a name;
//! * the cache stays below its limit and leaves the partition a reserve: the least recently used files go first;
//! * `kill -9` at any point leaves nothing that needs repair. No file is flushed to the disk: after a power cut its
//!   size is wrong if its bytes are not there, which is found when the file is opened, and it is fetched again;
//! * a full partition never prevents reading: files are then served without being kept.
//!
//! The C++ client's cache directory is left alone: its quota data base would not know our files. Where one is found,
//! a directory beside it is used.

pub(crate) mod boot;
pub(crate) mod lock;
mod name;
mod space;
mod txn;

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, OFlags, flock};
use serde::Serialize;

pub use name::CacheName;
pub(crate) use txn::{Txn, is_full};

const TXN: &str = "txn";
const CHUNKED: &str = "chunked";
/// The C++ client's quota data base, by which its cache directories are recognised.
const FOREIGN: [&str; 2] = ["cachedb", "cachemgr"];
/// A file's last use is noted at most this often: it orders evictions, which does not need to be exact.
const TOUCH_INTERVAL: Duration = Duration::from_secs(600);

/// Why a directory cannot be the cache.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The directory cannot be created or written.
    #[error("cannot use cache directory {}: {source}; set CVMFS_CACHE_BASE to a writable directory", path.display())]
    Unusable {
        /// The directory or the file in it.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A file of the cache, open for reading. It stays readable when it is evicted.
#[derive(Debug)]
pub struct CachedFile {
    /// The file, positioned anywhere: read it at offsets.
    pub file: File,
    /// Its size in bytes.
    pub size: u64,
    /// Keeps the account of memory for a file that is not on disk.
    memory: Option<Arc<txn::Lease>>,
}

impl CachedFile {
    /// Another descriptor of the same file.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { file: self.file.try_clone()?, size: self.size, memory: self.memory.clone() })
    }

    /// A file outside the cache that has been verified otherwise.
    pub(crate) fn new(file: File, size: u64) -> Self {
        Self { file, size, memory: None }
    }
}

/// How full a cache is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct CacheUsage {
    /// Bytes in use.
    pub used: u64,
    /// Most bytes in use: the configured limit or, if smaller, what the partition can hold.
    pub limit: u64,
    /// Files evicted by this process.
    pub evictions: u64,
}

/// A cache directory. Clones share everything; processes may share the directory.
#[derive(Debug, Clone)]
pub struct Cache(Arc<Shared>);

impl AsRef<space::Space> for Cache {
    fn as_ref(&self) -> &space::Space {
        &self.0.space
    }
}

#[derive(Debug)]
struct Shared {
    directory: PathBuf,
    space: space::Space,
    /// Tells this process's temporary files from those of another one with the same number in another container.
    instance: u64,
    touches: AtomicU64,
}

impl Cache {
    /// Opens or creates a cache of at most `limit` bytes in `directory`.
    ///
    /// # Errors
    /// The directory cannot be created or written.
    pub fn open(directory: &Path, limit: u64) -> Result<Self, CacheError> {
        let directory = own_directory(directory);
        let unusable = |path: &Path, source| CacheError::Unusable { path: path.to_owned(), source };
        create_layout(&directory).map_err(|(path, source)| unusable(&path, source))?;
        let directory = directory.canonicalize().map_err(|source| unusable(&directory, source))?;
        // A read-only file system is found now and not at the first object.
        tempfile::tempfile_in(directory.join(TXN)).map_err(|source| unusable(&directory, source))?;
        remove_stale(&directory.join(TXN));
        let instance = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos() as u64);
        let space = space::Space::new(&directory, limit);
        let cache = Self(Arc::new(Shared { directory, space, instance, touches: AtomicU64::new(0) }));
        let effective = cache.0.space.effective_limit();
        if effective < limit && limit != u64::MAX {
            tracing::warn!(
                cache = %cache.0.directory.display(), configured = limit, effective,
                "cache limit is larger than the partition: lowered"
            );
        }
        if cache.0.space.needs_scan() {
            let scanned = cache.clone();
            let spawned = std::thread::Builder::new()
                .name("cvmfs-scan".to_owned())
                .spawn(move || scanned.0.space.scan());
            if let Err(error) = spawned {
                tracing::warn!(%error, "cannot count the cache in the background");
            }
        }
        Ok(cache)
    }

    /// The directory in use.
    pub fn directory(&self) -> &Path {
        &self.0.directory
    }

    /// How full the cache is.
    pub fn usage(&self) -> CacheUsage {
        let space = &self.0.space;
        CacheUsage { used: space.used(), limit: space.effective_limit(), evictions: space.evictions() }
    }

    /// The file `name`, if it is in the cache. With `size` a file of another size is removed and not returned;
    /// without, an empty one.
    pub fn get(&self, name: &CacheName, size: Option<u64>) -> Option<CachedFile> {
        let path = self.path(name);
        let flags = (OFlags::NOFOLLOW | OFlags::CLOEXEC).bits();
        let file = OpenOptions::new().read(true).custom_flags(flags.cast_signed()).open(&path).ok()?;
        let metadata = file.metadata().ok()?;
        let found = metadata.len();
        let is_right = metadata.is_file() && size.map_or(found > 0, |size| size == found);
        if !is_right {
            tracing::warn!(file = %path.display(), found, expected = ?size, "damaged cache file is removed");
            if std::fs::remove_file(&path).is_ok() {
                self.0.space.subtract(space::charge(found));
            }
            return None;
        }
        if metadata.modified().is_ok_and(|used| used.elapsed().is_ok_and(|age| age > TOUCH_INTERVAL)) {
            self.touch(&path);
        }
        Some(CachedFile::new(file, found))
    }

    /// Removes the file `name`: it turned out to be damaged.
    pub fn remove(&self, name: &CacheName) {
        let path = self.path(name);
        if let Ok(metadata) = std::fs::symlink_metadata(&path)
            && std::fs::remove_file(&path).is_ok()
        {
            self.0.space.subtract(space::charge(metadata.len()));
        }
    }

    /// Begins to write a file of `expected` bytes.
    pub(crate) fn begin(&self, expected: Option<u64>) -> io::Result<Txn> {
        Txn::begin(self, expected)
    }

    /// Where partly present files lie.
    pub(crate) fn chunked_directory(&self) -> PathBuf {
        self.0.directory.join(CHUNKED)
    }

    /// Room for `bytes` more in a partly present file. False if there is none.
    pub(crate) fn charge(&self, bytes: u64) -> bool {
        match self.0.space.reserve(bytes) {
            Ok(_reservation) => {
                self.stored(bytes);
                true
            }
            Err(space::NoRoom) => false,
        }
    }

    /// Counts bytes that were stored.
    fn stored(&self, bytes: u64) {
        if self.0.space.add(bytes) {
            space::Space::evict_early(self.clone());
        }
    }

    /// Takes a charge back whose bytes were not stored.
    pub(crate) fn discharge(&self, bytes: u64) {
        self.0.space.subtract(bytes);
    }

    /// Makes room after the partition refused `bytes`. False if nothing could be removed.
    pub(crate) fn relieve(&self, bytes: u64) -> bool {
        self.0.space.relieve(bytes)
    }

    pub(crate) fn path(&self, name: &CacheName) -> PathBuf {
        self.0.directory.join(name.directory()).join(name.file())
    }

    /// A temporary name in `txn/`, for files that are moved through it.
    pub(crate) fn temporary_path(&self, label: &str) -> PathBuf {
        let number = self.0.touches.fetch_add(1, Ordering::Relaxed);
        self.0.directory.join(TXN).join(format!(
            "{}-{:x}-{label}-{number}",
            std::process::id(),
            self.0.instance
        ))
    }

    /// Notes that the file was used now.
    pub(crate) fn touch(&self, path: &Path) {
        use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, utimensat};
        let times = Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            last_modification: Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
        };
        // An evicted file needs no note.
        let _ = utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW);
    }

    /// Creates directories anew that somebody removed while the cache was in use.
    pub(crate) fn restore_layout(&self) {
        if let Err((path, error)) = create_layout(&self.0.directory) {
            tracing::warn!(path = %path.display(), %error, "cannot restore the cache directory");
        }
    }
}

/// `wanted`, or the directory beside it if `wanted` belongs to the C++ client.
fn own_directory(wanted: &Path) -> PathBuf {
    if !FOREIGN.iter().any(|file| wanted.join(file).exists()) {
        return wanted.to_owned();
    }
    let mut name = wanted.file_name().unwrap_or_default().to_owned();
    name.push("-objects");
    let own = wanted.with_file_name(name);
    tracing::info!(theirs = %wanted.display(), ours = %own.display(), "cache directory of another client is left alone");
    own
}

fn create_layout(directory: &Path) -> Result<(), (PathBuf, io::Error)> {
    let create = |path: PathBuf| {
        DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(|error| (path.clone(), error))
    };
    create(directory.to_owned())?;
    create(directory.join(TXN))?;
    create(directory.join(CHUNKED))?;
    (0..=255_u8).try_for_each(|number| create(directory.join(format!("{number:02x}"))))
}

/// Removes temporary files whose writers are gone: a living writer holds a lock on its file.
fn remove_stale(txn: &Path) {
    for entry in std::fs::read_dir(txn).into_iter().flatten().filter_map(Result::ok) {
        let path = entry.path();
        let Ok(file) = File::open(&path) else { continue };
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            let _ = std::fs::remove_file(&path);
        }
    }
}

#[cfg(test)]
mod tests;
