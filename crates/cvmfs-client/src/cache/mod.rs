//! The local cache: verified, decompressed files on disk (client behaviour §9, §10, §11).
//!
//! ```text
//! 00 … ff/        files, named by content ([`CacheName`]), sealed with a checksum
//! chunked/        sparse files of which some chunks are present
//! txn/<process>/  files being written; what the process has claimed and pinned
//! usage           bytes in use, shared by all processes
//! evict.lock      held by the process that makes room
//! cvmfschecksum.* the last accepted revision of each repository
//! ```
//!
//! Invariants:
//! * a file appears under its name only complete and verified, by rename; nothing is ever changed under a name;
//! * the cache stays below its limit and leaves the partition a reserve: the least recently used files go first;
//! * `kill -9` at any point leaves nothing that needs repair. No file is flushed to the disk: after a power cut its
//!   size or its checksum is wrong if its bytes are not there, which is found when the file is opened or by `fsck`,
//!   and it is fetched again;
//! * a full, broken or read-only partition never prevents reading: files are then served without being kept.
//!
//! There is no index that could be lost: the files' names, modes and times are the index. What is counted is counted
//! anew, in the background, when the count is not certain.
//!
//! The C++ client's own cache directory is left alone: its quota data base would not know our files. Where one is
//! found, a directory beside it is used. A site's *alien cache* is shared with C++ clients.

pub(crate) mod boot;
mod budget;
mod directory;
mod files;
mod fsck;
mod kind;
mod list;
pub(crate) mod lock;
mod memory;
mod name;
mod pins;
mod presence;
mod record;
mod seal;
mod space;
mod txn;
mod verified;
mod volatile;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde::Serialize;

pub(crate) use directory::is_same_file;
pub use fsck::{Finding, FsckProgress, FsckReport, Problem, fsck};
pub use kind::Kind;
pub use list::{CacheEntry, Listing};
pub use name::CacheName;
pub use pins::{PinError, Pinned};
pub(crate) use seal::combine;
pub(crate) use txn::{Draft, Txn, is_full};
pub(crate) use volatile::memory_limit;

use crate::config::{CacheInstance, CacheSettings, DirectoryInstance};
use directory::{Directory, Open, Owner};
use memory::Memory;
use pins::Pins;
use seal::{Seal, Verdict};
use space::Space;
use verified::Verified;

/// The C++ client's quota data base, by which its cache directories are recognised.
const FOREIGN: [&str; 2] = ["cachedb", "cachemgr"];
/// A file's last use is noted at most this often: it orders evictions, which does not need to be exact.
const TOUCH_INTERVAL: Duration = Duration::from_secs(600);
/// Files up to this size are compared with their seals when this process first opens them: the kernel reads them
/// as a whole then anyway. Larger ones are looked at by `fsck`.
const VERIFIED_AT_OPEN: u64 = 64 * 1024;

/// Why a directory cannot be the cache.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The directory cannot be created or written.
    #[error("cannot use cache directory {}: {source}; set {parameter} to a writable directory", path.display())]
    Unusable {
        /// The directory or the file in it.
        path: PathBuf,
        /// The parameter that names it.
        parameter: &'static str,
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
    memory: Option<Arc<volatile::Lease>>,
}

impl CachedFile {
    /// Another descriptor of the same file.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { file: self.file.try_clone()?, size: self.size, memory: self.memory.clone() })
    }

    /// A file that has been verified otherwise.
    pub(crate) fn new(file: File, size: u64) -> Self {
        Self { file, size, memory: None }
    }
}

/// How full a cache is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct CacheUsage {
    /// Bytes in use.
    pub used: u64,
    /// Most bytes in use: the limit or, if smaller, what the partition can hold; `u64::MAX` without any.
    pub limit: u64,
    /// Bytes that are not evicted because somebody has pinned them.
    pub pinned: u64,
    /// Files evicted by this process.
    pub evictions: u64,
}

/// A cache. Clones share everything; processes may share the directory.
#[derive(Debug, Clone)]
pub struct Cache(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    directory: Arc<Directory>,
    space: Arc<Space>,
    pins: Pins,
    verified: Verified,
    /// Whether files are sealed: the file system has extended attributes.
    sealing: AtomicBool,
    /// Nothing is stored any more.
    torn_down: AtomicBool,
    /// Objects are held in memory; the directory serves as workspace.
    memory: Option<Memory>,
    lower: Option<Lower>,
    numbers: AtomicU64,
}

/// The cache that is asked next.
#[derive(Debug)]
struct Lower {
    cache: Cache,
    is_read_only: bool,
}

impl Cache {
    /// Opens or creates a cache of at most `limit` bytes in `directory`.
    ///
    /// # Errors
    /// The directory cannot be created or written.
    pub fn open(directory: &Path, limit: u64) -> Result<Self, CacheError> {
        Self::open_directory(&DirectoryInstance::private(directory.to_owned(), limit), None)
    }

    /// Opens the cache that a site has configured.
    ///
    /// # Errors
    /// A directory cannot be created or written.
    pub fn from_settings(settings: &CacheSettings) -> Result<Self, CacheError> {
        Self::open_instance(&settings.primary, None)
    }

    fn open_instance(instance: &CacheInstance, lower: Option<Lower>) -> Result<Self, CacheError> {
        match instance {
            CacheInstance::Directory(directory) => Self::open_directory(directory, lower),
            CacheInstance::Memory { limit, workspace } => {
                let workspace = DirectoryInstance::private(workspace.clone(), u64::MAX);
                Self::build(&workspace, Some(Memory::new(*limit)), lower)
            }
            CacheInstance::Tiered { upper, lower, is_lower_read_only } => {
                let cache = Self::open_instance(lower, None)?;
                let is_read_only = *is_lower_read_only || cache.is_read_only();
                Self::open_instance(upper, Some(Lower { cache, is_read_only }))
            }
        }
    }

    fn open_directory(instance: &DirectoryInstance, lower: Option<Lower>) -> Result<Self, CacheError> {
        Self::build(instance, None, lower)
    }

    fn build(
        instance: &DirectoryInstance,
        memory: Option<Memory>,
        lower: Option<Lower>,
    ) -> Result<Self, CacheError> {
        let owner = if instance.is_alien { Owner::Site } else { Owner::Client };
        let path = match owner {
            Owner::Client => own_directory(&instance.path),
            Owner::Site => instance.path.clone(),
        };
        let parameter = if instance.is_alien { "CVMFS_ALIEN_CACHE" } else { "CVMFS_CACHE_BASE" };
        let unusable = |(path, source)| CacheError::Unusable { path, parameter, source };
        let directory = Directory::open(&path, owner, instance.by_link).map_err(unusable)?;
        let directory = Arc::new(directory);
        let open = directory.now();
        if open.presence().is_none() {
            tracing::warn!(
                cache = %directory.path().display(),
                "the cache cannot be written: objects that are missing in it cannot be read (EROFS) \
                 unless CVMFS_STREAMING_CACHE is on"
            );
        }
        let space = Arc::new(Space::new(directory.clone(), instance.limit));
        let cache = Self(Arc::new(Shared {
            space,
            pins: Pins::default(),
            verified: Verified::new(),
            sealing: AtomicBool::new(owner == Owner::Client),
            torn_down: AtomicBool::new(false),
            memory,
            lower,
            numbers: AtomicU64::new(0),
            directory,
        }));
        if owner == Owner::Client {
            cache.take_over(&open, instance.limit);
        }
        Ok(cache)
    }

    /// Looks at what earlier processes left.
    fn take_over(&self, open: &Open, limit: u64) {
        let space = &self.0.space;
        if open.found.living == 0 {
            space.reset_limit();
        }
        if open.found.removed > 0 {
            // A process was killed: what it had claimed is not known exactly.
            space.doubt();
        }
        let effective = space.effective_limit();
        if effective < limit && limit != u64::MAX {
            tracing::warn!(
                cache = %self.directory().display(), configured = limit, effective,
                "cache limit is larger than the partition: lowered"
            );
        }
        if space.needs_count() {
            let space = space.clone();
            let spawned =
                std::thread::Builder::new().name("cvmfs-count".to_owned()).spawn(move || space.count());
            if let Err(error) = spawned {
                tracing::warn!(%error, "cannot count the cache in the background");
            }
        }
    }

    /// The directory in use.
    pub fn directory(&self) -> &Path {
        self.0.directory.path()
    }

    /// How full the cache is.
    pub fn usage(&self) -> CacheUsage {
        if let Some(memory) = &self.0.memory {
            return memory.usage();
        }
        let space = &self.0.space;
        CacheUsage {
            used: space.used(),
            limit: if self.is_bounded() { space.effective_limit() } else { u64::MAX },
            pinned: space.pinned(),
            evictions: space.evictions(),
        }
    }

    /// Files evicted by this process.
    pub fn evictions(&self) -> u64 {
        self.0.memory.as_ref().map_or_else(|| self.0.space.evictions(), |memory| memory.usage().evictions)
    }

    /// One line for people: what kind of cache this is, and where.
    pub fn describe(&self) -> String {
        let place = self.directory().display();
        let own = if self.0.memory.is_some() {
            "in-memory cache".to_owned()
        } else if self.0.directory.owner() == Owner::Site {
            format!("alien cache (cache directory: {place})")
        } else {
            format!("Posix cache manager (cache directory: {place})")
        };
        let own = if self.is_read_only() { format!("{own}, read-only") } else { own };
        match &self.0.lower {
            Some(lower) => {
                format!("Tiered Cache\n  - upper layer: {own}\n  - lower layer: {}", lower.cache.describe())
            }
            None => own,
        }
    }

    /// The file `name`, if it is in the cache. With `size` a file of another size is removed and not returned;
    /// without, an empty one. A damaged or unreadable file is removed and not returned either.
    pub fn get(&self, name: &CacheName, size: Option<u64>) -> Option<CachedFile> {
        let found = match &self.0.memory {
            Some(memory) => memory.get(name).filter(|file| size.is_none_or(|size| size == file.size)),
            None => self.get_here(name, size),
        };
        found.or_else(|| self.get_below(name, size))
    }

    /// Whether the file `name` is in the cache, as far as its size tells.
    pub fn contains(&self, name: &CacheName, size: Option<u64>) -> bool {
        let is_here = match &self.0.memory {
            Some(memory) => memory.size(name).is_some_and(|found| size.is_none_or(|size| size == found)),
            None => self.directory_now().stat(name).is_ok_and(|stat| {
                let found = u64::try_from(stat.st_size).unwrap_or(0);
                size.map_or(found > 0, |size| size == found)
            }),
        };
        is_here || self.0.lower.as_ref().is_some_and(|lower| lower.cache.contains(name, size))
    }

    fn get_here(&self, name: &CacheName, size: Option<u64>) -> Option<CachedFile> {
        let open = self.directory_now();
        let file = open.get(name).ok()?;
        let metadata = file.metadata().ok()?;
        let found = metadata.len();
        let is_right = metadata.is_file() && size.map_or(found > 0, |size| size == found);
        if !is_right {
            self.reject(name, found, &format!("{found} bytes instead of {size:?}"));
            return None;
        }
        if let Some(problem) = self.problem(name, &file, found, size) {
            self.reject(name, found, &problem);
            return None;
        }
        if metadata.modified().is_ok_and(|used| used.elapsed().is_ok_and(|age| age > TOUCH_INTERVAL)) {
            touch(&file);
        }
        Some(CachedFile::new(file, found))
    }

    /// What is wrong with a file that this process opens for the first time. Databases are looked at as a whole: they
    /// are mapped into memory, where an unreadable page would kill the process.
    fn problem(&self, name: &CacheName, file: &File, found: u64, size: Option<u64>) -> Option<String> {
        if !self.is_sealing()
            || (found > VERIFIED_AT_OPEN && size.is_some())
            || self.0.verified.contains(name)
        {
            return None;
        }
        match Seal::check(file) {
            Verdict::Whole | Verdict::Unsealed => {
                self.mark_verified(name);
                None
            }
            Verdict::Damaged => Some("its bytes have changed since they were stored".to_owned()),
            Verdict::Unreadable(error) => Some(format!("the disk does not give its bytes: {error}")),
        }
    }

    fn reject(&self, name: &CacheName, found: u64, reason: &str) {
        tracing::warn!(file = name.as_str(), cache = %self.directory().display(), reason, "damaged cache file");
        if !self.is_read_only() && self.directory_now().remove(name).is_ok() {
            self.0.space.removed(space::charge(found));
        }
    }

    /// The file from the lower cache, copied into this one.
    fn get_below(&self, name: &CacheName, size: Option<u64>) -> Option<CachedFile> {
        let lower = self.0.lower.as_ref()?;
        let file = lower.cache.get(name, size)?;
        match self.copy_in(name, Kind::Regular, None, &file) {
            Ok(copy) => Some(copy),
            Err(error) => {
                tracing::debug!(file = name.as_str(), %error, "cannot copy a file up");
                Some(file)
            }
        }
    }

    fn copy_in(
        &self,
        name: &CacheName,
        kind: Kind,
        hint: Option<&str>,
        file: &CachedFile,
    ) -> io::Result<CachedFile> {
        let mut txn = Txn::begin(self, Draft { name, kind, expected: Some(file.size), hint, keep: true })?;
        let mut outcome = Ok(());
        seal::for_each_piece(&file.file, &mut |piece| {
            if outcome.is_ok() {
                outcome = io::Write::write_all(&mut txn, piece);
            }
        })?;
        outcome?;
        let copy = txn.place()?;
        if let Some(memory) = &self.0.memory {
            memory.put(name, kind, &copy);
        }
        Ok(copy)
    }

    /// Removes the file `name`: it turned out to be damaged, or somebody wants it to go. False if it was not there.
    pub fn remove(&self, name: &CacheName) -> bool {
        if let Some(memory) = &self.0.memory {
            return memory.remove(name);
        }
        let open = self.directory_now();
        let Ok(stat) = open.stat(name) else { return false };
        if self.is_read_only() || open.remove(name).is_err() {
            return false;
        }
        self.0.space.removed(space::charge(u64::try_from(stat.st_size).unwrap_or(0)));
        self.0.verified.remove(name);
        true
    }

    /// Keeps the file `name` in the cache as long as the returned guard lives, but not longer than this process.
    ///
    /// # Errors
    /// The file is not in the cache, or too much is pinned already. It may be used all the same; it may be evicted.
    pub fn pin(&self, name: &CacheName, hint: Option<&str>) -> Result<Pinned, PinError> {
        let open = self.directory_now();
        let size = match &self.0.memory {
            Some(memory) => memory.size(name),
            None => open.stat(name).ok().and_then(|stat| u64::try_from(stat.st_size).ok()),
        };
        let bytes = space::charge(size.ok_or(PinError::NotCached)?);
        let file = open.presence().map(presence::Presence::pins);
        match self.0.pins.take(file, name, bytes, hint) {
            pins::Taken::Again => return Ok(Pinned::new(self, name)),
            pins::Taken::Full => return Err(PinError::NoRoom),
            pins::Taken::First => {}
        }
        let fits = match &self.0.memory {
            Some(memory) => memory.pin(name),
            None => self.0.space.pin(bytes),
        };
        if fits {
            Ok(Pinned::new(self, name))
        } else {
            self.0.pins.release(file, name);
            Err(PinError::NoRoom)
        }
    }

    fn release(&self, name: &CacheName) {
        let open = self.directory_now();
        if let Some(bytes) = self.0.pins.release(open.presence().map(presence::Presence::pins), name) {
            match &self.0.memory {
                Some(memory) => memory.unpin(name),
                None => self.0.space.unpin(bytes),
            }
        }
    }

    /// Whether so much is pinned, by all processes together, that nested catalogs should be released.
    pub fn is_pin_pressure(&self) -> bool {
        self.0.memory.is_none() && self.0.space.is_pin_pressure()
    }

    /// Another limit from now on, for all processes on the cache, until the last of them ends.
    pub fn set_limit(&self, bytes: u64) {
        match &self.0.memory {
            Some(memory) => memory.set_limit(bytes),
            None => self.0.space.set_limit(bytes),
        }
    }

    /// Evicts until at most `bytes` are used. False if that was not possible, since files are pinned.
    pub fn shrink_to(&self, bytes: u64) -> bool {
        match &self.0.memory {
            Some(memory) => memory.shrink_to(bytes),
            None => self.0.space.shrink_to(bytes),
        }
    }

    /// How often, within the last `period`, room had to be made in the cache.
    pub fn cleanups_within(&self, period: Duration) -> u64 {
        self.0.space.cleanups_within(period)
    }

    /// The files of the cache.
    pub fn list(&self, listing: Listing) -> Vec<CacheEntry> {
        list::list(self, listing)
    }

    /// From now on nothing is stored or evicted; what is in the cache stays readable.
    pub fn tear_down_to_read_only(&self) {
        if !self.0.torn_down.swap(true, Ordering::SeqCst) {
            self.0.space.leave();
            self.0.directory.stop_writing();
        }
    }

    /// Whether nothing can be stored.
    pub fn is_read_only(&self) -> bool {
        self.0.torn_down.load(Ordering::SeqCst) || self.directory_now().presence().is_none()
    }

    /// Whether chunks are stored as objects of their own, as other clients expect them.
    pub(crate) fn keeps_chunks_apart(&self) -> bool {
        self.0.memory.is_some() || self.0.lower.is_some() || self.0.directory.owner() == Owner::Site
    }

    /// Begins to write a file.
    pub(crate) fn begin(&self, draft: Draft<'_>) -> io::Result<Txn> {
        Txn::begin(self, draft)
    }

    /// Where partly present files lie.
    pub(crate) fn chunked_directory(&self) -> PathBuf {
        self.directory().join(directory::CHUNKED)
    }

    /// Room for `bytes` more in a partly present file; `None` if there is none.
    pub(crate) fn charge(&self, bytes: u64) -> Option<Charge> {
        self.0.space.reserve(bytes).ok().map(Charge)
    }

    /// Makes room after the partition refused `bytes`. False if nothing could be removed.
    pub(crate) fn relieve(&self, bytes: u64) -> bool {
        self.0.space.relieve(bytes)
    }

    pub(crate) fn path(&self, name: &CacheName) -> PathBuf {
        self.directory().join(self.directory_now().place(name))
    }

    /// A temporary name, for files that are moved through it.
    pub(crate) fn temporary_path(&self, label: &str) -> PathBuf {
        let number = self.0.numbers.fetch_add(1, Ordering::Relaxed);
        let open = self.directory_now();
        let own = open.presence().map_or_else(String::new, |own| own.name().to_string_lossy().into_owned());
        self.directory().join(presence::TXN).join(own).join(format!("{label}-{number}"))
    }

    /// Seals a file that was assembled in place and is about to get its name.
    pub(crate) fn seal(&self, file: &File, kind: Kind, checksum: u32, hint: Option<&str>) {
        if self.is_sealing() {
            Seal::put(file, checksum, hint, false, &self.0.sealing);
        }
        if kind != Kind::Regular {
            let mode = rustix::fs::Mode::from_raw_mode(kind.mode());
            // The kind only orders evictions.
            let _ = rustix::fs::fchmod(file, mode);
        }
    }

    /// Notes that the file was used now.
    pub(crate) fn touch(&self, path: &Path) {
        if let Ok(file) = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path) {
            touch(&file);
        }
    }

    /// Creates directories anew that somebody removed while the cache was in use.
    pub(crate) fn restore_layout(&self) {
        if let Err(error) = self.restore(&self.directory_now()) {
            tracing::warn!(cache = %self.directory().display(), %error, "cannot restore the cache directory");
        }
    }

    fn restore(&self, seen: &Arc<Open>) -> io::Result<Arc<Open>> {
        let open = self.0.directory.restore(seen)?;
        if !Arc::ptr_eq(&open, seen) {
            // What was claimed and verified is gone with the directory.
            self.0.verified.clear();
            self.0.space.doubt();
            if let Some(presence) = open.presence() {
                self.0.pins.tell(presence.pins());
            }
        }
        Ok(open)
    }

    fn directory_now(&self) -> Arc<Open> {
        self.0.directory.now()
    }

    fn space(&self) -> &Arc<Space> {
        &self.0.space
    }

    fn is_memory(&self) -> bool {
        self.0.memory.is_some()
    }

    /// Whether the cache has a limit.
    fn is_bounded(&self) -> bool {
        self.0.directory.owner() == Owner::Client
    }

    fn is_sealing(&self) -> bool {
        self.0.sealing.load(Ordering::Relaxed)
    }

    fn sealing(&self) -> &AtomicBool {
        &self.0.sealing
    }

    fn mark_verified(&self, name: &CacheName) {
        self.0.verified.insert(name);
    }

    /// A file was stored here, or could not be: the other places that shall have it.
    fn stored(&self, name: &CacheName, kind: Kind, hint: Option<&str>, file: &CachedFile) {
        if let Some(memory) = &self.0.memory {
            memory.put(name, kind, file);
        }
        if let Some(lower) = &self.0.lower
            && !lower.is_read_only
            && let Err(error) = lower.cache.copy_in(name, kind, hint, file)
        {
            tracing::debug!(file = name.as_str(), %error, "cannot store a file in the lower cache");
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.space.leave();
    }
}

/// Room in the cache; given back when dropped.
#[derive(Debug)]
pub(crate) struct Charge(space::Reservation);

impl Charge {
    /// The bytes were stored.
    pub(crate) fn stored(self) {
        let bytes = self.0.bytes();
        self.0.stored(bytes);
    }
}

fn touch(file: &File) {
    use rustix::fs::{Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, futimens};
    let times = Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
    };
    // A cache that cannot be written is not evicted from either.
    let _ = futimens(file, &times);
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

#[cfg(test)]
mod tests;
