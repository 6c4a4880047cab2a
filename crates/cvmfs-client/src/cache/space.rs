//! How full the cache is, and making room in it.
//!
//! The bytes in use are counted in a small file that all processes on a cache directory share, under a lock that is
//! held for microseconds. The count is an estimate that survives `kill -9`: a process that dies between storing a
//! file and counting it makes it wrong by that file, and each eviction, which looks at every file anyway, sets it
//! right. The free space of the partition is not estimated but asked for.
//!
//! Only one process evicts at a time. Removing a file that is open somewhere is harmless: who has it open keeps it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, TryLockError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, flock};

use super::{CHUNKED, TXN, boot, lock, name};

/// First bytes of the usage file; changed when its layout changes.
const MAGIC: [u8; 8] = *b"cvmfsU01";
/// Magic, boot id, time of the last scan, bytes in use.
const RECORD: usize = 8 + 16 + 8 + 8;
/// A count that was not checked against the files for this long is checked at the next start.
const SCAN_AGE: Duration = Duration::from_secs(24 * 3600);
/// Longest wait for another process that evicts.
const EVICTION_PATIENCE: Duration = Duration::from_secs(5);
/// Longest wait for the shared record: it is locked for microseconds, unless its holder was stopped.
const RECORD_PATIENCE: Duration = Duration::from_secs(1);
/// Eviction ends when the cache is filled to this share of the limit, so that it does not run for each object.
const LOW_WATER_PERCENT: u64 = 75;
/// Eviction begins in the background when the cache is filled to this share.
const HIGH_WATER_PERCENT: u64 = 90;
/// Free space of the partition that is left to others: 5 %, at most 1 GiB.
const RESERVE_PERCENT: u64 = 5;
const MAX_RESERVE: u64 = 1 << 30;

/// There is no room, even after eviction.
#[derive(Debug)]
pub(super) struct NoRoom;

#[derive(Debug)]
pub(super) struct Space {
    directory: PathBuf,
    limit: u64,
    /// Bytes that this process is about to store.
    in_flight: AtomicU64,
    evictions: AtomicU64,
    /// File locks exclude processes, this excludes the threads of this one.
    evicting: Mutex<()>,
    /// An eviction ahead of need is under way.
    early: AtomicBool,
}

/// What a scan or an eviction found.
#[derive(Debug, Default, Clone, Copy)]
struct Tally {
    bytes: u64,
    files: u64,
}

impl Space {
    pub(super) fn new(directory: &Path, limit: u64) -> Self {
        Self {
            directory: directory.to_owned(),
            limit,
            in_flight: AtomicU64::new(0),
            evictions: AtomicU64::new(0),
            evicting: Mutex::new(()),
            early: AtomicBool::new(false),
        }
    }

    pub(super) fn evictions(&self) -> u64 {
        self.evictions.load(Ordering::Relaxed)
    }

    /// Bytes in use as counted.
    pub(super) fn used(&self) -> u64 {
        self.record(|_| {}).map_or(0, |record| record.used)
    }

    /// The configured limit, lowered to what the partition can hold.
    pub(super) fn effective_limit(&self) -> u64 {
        match self.partition() {
            Some(partition) => self.limit.min(partition.total.saturating_sub(partition.reserve())),
            None => self.limit,
        }
    }

    /// Whether the count is from another boot, too old, or not there.
    pub(super) fn needs_scan(&self) -> bool {
        let Some(record) = self.record(|_| {}) else { return true };
        let age = Duration::from_secs(unix_now().saturating_sub(record.scanned));
        Some(record.boot) != boot::id() || age > SCAN_AGE
    }

    /// Counts all files. Files that are stored meanwhile may count twice; the next scan sets that right.
    pub(super) fn scan(&self) {
        let before = self.used();
        let mut tally = Tally::default();
        self.visit(&mut |item| tally.add(item));
        self.record(|record| {
            record.used = tally.bytes + record.used.saturating_sub(before);
            record.mark_scanned();
        });
    }

    /// Files now take `bytes` more. True if the cache fills up and should be evicted before somebody has to wait.
    pub(super) fn add(&self, bytes: u64) -> bool {
        let record = self.record(|record| record.used = record.used.saturating_add(bytes));
        record.is_some_and(|record| record.used > self.limit / 100 * HIGH_WATER_PERCENT)
    }

    /// Evicts on a thread of its own, unless this process does so already.
    pub(super) fn evict_early(this: impl AsRef<Self> + Send + 'static) {
        if this.as_ref().early.swap(true, Ordering::SeqCst) {
            return;
        }
        // Without a thread the eviction is done by whoever needs the room.
        let _ = std::thread::Builder::new().name("cvmfs-evict".to_owned()).spawn(move || {
            this.as_ref().try_evict(0);
            this.as_ref().early.store(false, Ordering::SeqCst);
        });
    }

    /// Files now take `bytes` less.
    pub(super) fn subtract(&self, bytes: u64) {
        self.record(|record| record.used = record.used.saturating_sub(bytes));
    }

    /// Announces `bytes` that will be stored, evicting if they do not fit.
    pub(super) fn reserve(&self, bytes: u64) -> Result<Reservation<'_>, NoRoom> {
        self.in_flight.fetch_add(bytes, Ordering::SeqCst);
        let reservation = Reservation { space: self, bytes };
        if self.has_room() {
            return Ok(reservation);
        }
        if self.in_flight.load(Ordering::SeqCst) > self.effective_limit() {
            return Err(NoRoom);
        }
        let patience = Instant::now() + EVICTION_PATIENCE;
        while Instant::now() < patience {
            if self.try_evict(0) || self.has_room() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        if self.has_room() { Ok(reservation) } else { Err(NoRoom) }
    }

    /// The partition refused `bytes`: removes at least as many of the least recently used files, whatever the count
    /// says. Returns whether anything was removed.
    pub(super) fn relieve(&self, bytes: u64) -> bool {
        let before = self.evictions();
        let patience = Instant::now() + EVICTION_PATIENCE;
        while !self.try_evict(bytes.max(1)) && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.evictions() > before
    }

    /// The announced bytes fit beside the files, within the limit and within the partition.
    fn has_room(&self) -> bool {
        let announced = self.in_flight.load(Ordering::SeqCst);
        let fits = self.used().saturating_add(announced) <= self.limit;
        fits && self
            .partition()
            .is_none_or(|partition| announced.saturating_add(partition.reserve()) <= partition.free)
    }

    /// Evicts down to the low-water mark, and at least `least` bytes. False if somebody else is evicting.
    fn try_evict(&self, least: u64) -> bool {
        let _here = match self.evicting.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        let path = self.directory.join("evict.lock");
        let Ok(lock) = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path)
        else {
            // Without a lock file there is no cache directory to make room in.
            return true;
        };
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            return false;
        }
        self.evict(least);
        true
    }

    fn evict(&self, least: u64) {
        let started = Instant::now();
        let before = self.used();
        // Two passes keep the memory small: 8 bytes for each file first, to find the age limit, names afterwards.
        let mut ages: Vec<(u32, u32)> = Vec::new();
        let mut found = Tally::default();
        self.visit(&mut |item| {
            found.add(item);
            ages.push((item.used_at, u32::try_from(item.bytes.div_ceil(1024)).unwrap_or(u32::MAX)));
        });
        let announced = self.in_flight.load(Ordering::SeqCst);
        let target = self.effective_limit() / 100 * LOW_WATER_PERCENT;
        let too_much = found.bytes.saturating_add(announced).saturating_sub(target);
        let missing = self.partition().map_or(0, |partition| {
            announced.saturating_add(partition.reserve()).saturating_sub(partition.free)
        });
        let wanted = too_much.max(missing).max(least);
        ages.sort_unstable();
        let mut oldest = 0_u64;
        let limit = ages.iter().find(|(_, kilobytes)| {
            oldest += u64::from(*kilobytes) * 1024;
            oldest >= wanted
        });
        let limit = limit.map_or(u32::MAX, |(used_at, _)| *used_at);
        drop(ages);
        let mut removed = Tally::default();
        self.visit(&mut |item| {
            if removed.bytes < wanted && item.used_at <= limit && item.remove() {
                removed.add(item);
            }
        });
        self.evictions.fetch_add(removed.files, Ordering::Relaxed);
        self.record(|record| {
            // Files that were stored meanwhile may count twice, but none is left out: the limit must hold.
            let meanwhile = record.used.saturating_sub(before);
            record.used = found.bytes.saturating_sub(removed.bytes) + meanwhile;
            record.mark_scanned();
        });
        tracing::info!(
            decision = "eviction", cache = %self.directory.display(), files = removed.files, bytes = removed.bytes,
            remaining = found.bytes.saturating_sub(removed.bytes), seconds = started.elapsed().as_secs_f64(),
            "cache eviction"
        );
    }

    /// Calls `each` for every file that counts, and removes what does not belong into the cache.
    fn visit(&self, each: &mut dyn FnMut(&Item)) {
        for number in 0..=255_u8 {
            let directory = format!("{number:02x}");
            for path in entries(&self.directory.join(&directory)) {
                let Some(file) = path.file_name().and_then(|file| file.to_str()) else { continue };
                let valid = name::is_valid(&directory, file);
                match Item::at(path.clone(), Measure::Size) {
                    Some(item) if valid => each(&item),
                    Some(item) => drop(item.remove()),
                    None => {}
                }
            }
        }
        for path in entries(&self.directory.join(CHUNKED)) {
            if path.extension().is_some_and(|extension| extension == "part") {
                Item::at(path, Measure::Blocks).iter().for_each(&mut *each);
            }
        }
        super::remove_stale(&self.directory.join(TXN));
    }

    fn partition(&self) -> Option<Partition> {
        let stat = rustix::fs::statvfs(&self.directory).ok()?;
        Some(Partition {
            total: stat.f_blocks.saturating_mul(stat.f_frsize),
            free: stat.f_bavail.saturating_mul(stat.f_frsize),
        })
    }

    /// Reads the shared record, lets `change` have it, and writes it back. `None` if there is no valid record
    /// and none can be made.
    fn record(&self, change: impl FnOnce(&mut Record)) -> Option<Record> {
        let path = self.directory.join("usage");
        let open =
            || OpenOptions::new().create(true).truncate(false).read(true).write(true).mode(0o600).open(&path);
        let file = open().ok()?;
        if !lock::exclusive(&file, RECORD_PATIENCE) {
            return None;
        }
        let found = Record::read(&file);
        let mut record = found.unwrap_or_default();
        change(&mut record);
        if found != Some(record) {
            record.write(&file).ok()?;
        }
        Some(record)
    }
}

/// Bytes announced by one writer.
#[derive(Debug)]
pub(super) struct Reservation<'a> {
    space: &'a Space,
    bytes: u64,
}

impl Reservation<'_> {
    /// Hands the announcement over to the caller, who ends it with [`Space::settle`].
    pub(super) fn keep(self) -> u64 {
        let bytes = self.bytes;
        std::mem::forget(self);
        bytes
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.space.settle(self.bytes);
    }
}

impl Space {
    /// Ends the announcement of `bytes`.
    pub(super) fn settle(&self, bytes: u64) {
        self.in_flight.fetch_sub(bytes, Ordering::SeqCst);
    }
}

#[derive(Debug, Clone, Copy)]
struct Partition {
    total: u64,
    free: u64,
}

impl Partition {
    fn reserve(self) -> u64 {
        (self.total / 100 * RESERVE_PERCENT).min(MAX_RESERVE)
    }
}

/// The shared record of the usage file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Record {
    boot: [u8; 16],
    scanned: u64,
    used: u64,
}

impl Record {
    fn read(file: &File) -> Option<Self> {
        let mut bytes = [0_u8; RECORD];
        file.read_exact_at(&mut bytes, 0).ok()?;
        let (magic, rest) = bytes.split_first_chunk::<8>()?;
        let (boot, rest) = rest.split_first_chunk::<16>()?;
        let (scanned, used) = rest.split_first_chunk::<8>()?;
        let used = u64::from_le_bytes(used.try_into().ok()?);
        (*magic == MAGIC).then_some(Self { boot: *boot, scanned: u64::from_le_bytes(*scanned), used })
    }

    fn write(&self, file: &File) -> io::Result<()> {
        let parts = [&MAGIC[..], &self.boot, &self.scanned.to_le_bytes(), &self.used.to_le_bytes()];
        file.write_all_at(&parts.concat(), 0)
    }

    fn mark_scanned(&mut self) {
        self.boot = boot::id().unwrap_or_default();
        self.scanned = unix_now();
    }
}

/// A file that counts.
struct Item {
    path: PathBuf,
    bytes: u64,
    /// When the file was last used, in seconds since the epoch.
    used_at: u32,
}

/// What a file counts.
enum Measure {
    Size,
    /// Of a sparse file only what is there.
    Blocks,
}

impl Item {
    fn at(path: PathBuf, measure: Measure) -> Option<Self> {
        let metadata = std::fs::symlink_metadata(&path).ok()?;
        if metadata.is_dir() {
            return None;
        }
        let bytes = match measure {
            Measure::Size => charge(metadata.len()),
            Measure::Blocks => metadata.blocks() * 512,
        };
        Some(Self { path, bytes, used_at: u32::try_from(metadata.mtime().max(0)).unwrap_or(u32::MAX) })
    }

    fn remove(&self) -> bool {
        std::fs::remove_file(&self.path).is_ok()
    }
}

impl Tally {
    fn add(&mut self, item: &Item) {
        self.bytes += item.bytes;
        self.files += 1;
    }
}

/// The bytes that a file of `size` counts: whole blocks, as the partition sees it.
pub(super) fn charge(size: u64) -> u64 {
    size.max(1).next_multiple_of(4096)
}

fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> {
    std::fs::read_dir(directory).into_iter().flatten().filter_map(Result::ok).map(|entry| entry.path())
}

fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
