//! How full the cache is, and making room in it.
//!
//! The bytes in use are counted in a record that all processes on a cache directory share ([`super::record`]), of which
//! each process claims some ahead ([`super::budget`]). The count survives `kill -9`: a killed process leaves claims
//! behind, so it is never too low, and each eviction, which looks at every file anyway, sets it right. The free space
//! of the partition is not counted but asked for.
//!
//! Only one process evicts at a time. Removing a file that is open somewhere is harmless: who has it open keeps it.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags, flock, fstatvfs, openat};

use super::budget::{Budget, Count};
use super::directory::{Directory, Open, Owner};
use super::files::{self, Item};
use super::presence;
use super::record::Record;

/// A count that was not checked against the files for this long is checked at the next start.
const COUNT_AGE: Duration = Duration::from_secs(24 * 3600);
/// Longest wait for another process that evicts.
const EVICTION_PATIENCE: Duration = Duration::from_secs(5);
/// How long nothing is evicted after an eviction that found nothing to remove: it costs a look at every file.
const FUTILE_PAUSE: Duration = Duration::from_secs(1);
/// How long an answer about the free space of the partition is relied on.
const FREE_SPACE_AGE: Duration = Duration::from_millis(200);
/// Eviction ends when the cache is filled to this share of the limit, so that it does not run for each object.
const LOW_WATER_PERCENT: u64 = 75;
/// Eviction begins in the background when the cache is filled to this share.
const HIGH_WATER_PERCENT: u64 = 90;
/// Pinned files may take this share, as in the C++ client (client behaviour §10).
const PINNED_PERCENT: u64 = 50;
/// When this share of what may be pinned is pinned, nested catalogs should be released.
const PIN_PRESSURE_PERCENT: u64 = 75;
/// Free space of the partition that is left to others: 5 %, at most 1 GiB.
const RESERVE_PERCENT: u64 = 5;
const MAX_RESERVE: u64 = 1 << 30;
/// Bytes claimed ahead: this part of the limit, at most 2 MiB. Hundred processes hold 5 % of the cache back with it,
/// and the record is locked once for some hundred small objects.
const AHEAD_PART: u64 = 2048;
const MAX_AHEAD: u64 = 2 << 20;

/// There is no room, even after eviction.
#[derive(Debug)]
pub(super) struct NoRoom;

/// See the module documentation.
#[derive(Debug)]
pub(super) struct Space {
    directory: Arc<Directory>,
    limit: AtomicU64,
    budget: Budget,
    partition: Mutex<Option<Sample>>,
    evictions: AtomicU64,
    /// File locks exclude processes, this excludes the threads of this one.
    evicting: Mutex<()>,
    /// An eviction ahead of need is under way.
    early: AtomicBool,
    futile: Mutex<Option<Instant>>,
}

/// The partition as it was a moment ago.
#[derive(Debug, Clone, Copy)]
struct Sample {
    at: Instant,
    total: u64,
    free: u64,
    /// Bytes that this process has stored since.
    stored: u64,
}

impl Sample {
    fn reserve(self) -> u64 {
        (self.total / 100 * RESERVE_PERCENT).min(MAX_RESERVE)
    }
}

/// What a count or an eviction found.
#[derive(Debug, Default, Clone, Copy)]
struct Tally {
    bytes: u64,
    files: u64,
}

impl Tally {
    fn add(&mut self, item: &Item<'_>) {
        self.bytes += item.bytes;
        self.files += 1;
    }
}

impl Space {
    pub(super) fn new(directory: Arc<Directory>, limit: u64) -> Self {
        Self {
            directory,
            limit: AtomicU64::new(limit),
            budget: Budget::default(),
            partition: Mutex::new(None),
            evictions: AtomicU64::new(0),
            evicting: Mutex::new(()),
            early: AtomicBool::new(false),
            futile: Mutex::new(None),
        }
    }

    fn is_managed(&self) -> bool {
        self.directory.owner() == Owner::Client
    }

    pub(super) fn evictions(&self) -> u64 {
        self.evictions.load(Ordering::Relaxed)
    }

    /// Bytes in use as counted.
    pub(super) fn used(&self) -> u64 {
        let open = self.directory.now();
        let claimed = self.record(|record| record.claimed).unwrap_or(0);
        let (others, _) = presence::living(open.root(), open.presence());
        claimed.saturating_sub(others).saturating_sub(self.budget.outstanding())
    }

    /// Bytes of pinned files.
    pub(super) fn pinned(&self) -> u64 {
        self.record(|record| record.pinned).unwrap_or(0)
    }

    /// The limit, lowered to what the partition can hold.
    pub(super) fn effective_limit(&self) -> u64 {
        let set = self.record(|record| record.limit).unwrap_or(0);
        self.bounded(set)
    }

    /// The limit if `set` is what was set while the cache was in use.
    fn bounded(&self, set: u64) -> u64 {
        let limit = if set > 0 { set } else { self.limit.load(Ordering::Relaxed) };
        self.sample(FREE_SPACE_AGE)
            .map_or(limit, |partition| limit.min(partition.total.saturating_sub(partition.reserve())))
    }

    /// Another limit from now on, for all processes on the cache.
    pub(super) fn set_limit(&self, bytes: u64) {
        self.record(|record| record.limit = bytes.max(1));
    }

    /// The configured limit holds again: nobody else uses the cache any more for whom another was set.
    pub(super) fn reset_limit(&self) {
        self.record(|record| record.limit = 0);
    }

    /// Whether the count is from another boot, too old, or not there.
    pub(super) fn needs_count(&self) -> bool {
        self.is_managed() && !self.record(|record| record.is_counted(COUNT_AGE)).unwrap_or(false)
    }

    /// The count is not relied on any more.
    pub(super) fn doubt(&self) {
        self.record(Record::mark_uncounted);
    }

    /// Counts all files.
    pub(super) fn count(&self) {
        let open = self.directory.now();
        let before = self.before(&open);
        let mut tally = Tally::default();
        files::visit(&open, &mut |item| tally.add(item));
        self.conclude(&open, Count { found: tally.bytes, ..before });
    }

    /// Announces `bytes` that will be stored, evicting if they do not fit.
    pub(super) fn reserve(self: &Arc<Self>, bytes: u64) -> Result<Reservation, NoRoom> {
        if !self.is_managed() {
            return Ok(Reservation { space: self.clone(), bytes: 0 });
        }
        if self.try_reserve(bytes) {
            return Ok(Reservation { space: self.clone(), bytes });
        }
        if bytes > self.effective_limit() || self.is_futile() {
            return Err(NoRoom);
        }
        let patience = Instant::now() + EVICTION_PATIENCE;
        loop {
            let evicted = self.try_evict(bytes, 0);
            if self.try_reserve(bytes) {
                return Ok(Reservation { space: self.clone(), bytes });
            }
            if evicted || Instant::now() >= patience {
                return Err(NoRoom);
            }
            // Somebody else is evicting.
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The partition refused `bytes`: removes at least as many of the least recently used files, whatever the count
    /// says. Returns whether anything was removed.
    pub(super) fn relieve(&self, bytes: u64) -> bool {
        if !self.is_managed() || self.is_futile() {
            return false;
        }
        let before = self.evictions();
        let patience = Instant::now() + EVICTION_PATIENCE;
        while !self.try_evict(0, bytes.max(1)) && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.evictions() > before
    }

    /// Evicts until at most `bytes` are used. False if that was not possible: the rest is pinned.
    pub(super) fn shrink_to(&self, bytes: u64) -> bool {
        let patience = Instant::now() + EVICTION_PATIENCE;
        loop {
            let surplus = self.used().saturating_sub(bytes);
            if surplus == 0 {
                return true;
            }
            if self.try_evict(0, surplus) || Instant::now() >= patience {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        self.used() <= bytes
    }

    /// A file of `bytes` was removed.
    pub(super) fn removed(&self, bytes: u64) {
        if self.is_managed() {
            self.budget.give(bytes);
            self.return_surplus();
        }
    }

    /// Pins `bytes` more, if that leaves enough for others.
    pub(super) fn pin(&self, bytes: u64) -> bool {
        let pinned = self.record(|record| {
            let most = self.bounded(record.limit) / 100 * PINNED_PERCENT;
            let fits = record.pinned.saturating_add(bytes) <= most;
            if fits {
                record.pinned += bytes;
            }
            fits
        });
        // Without a record, as in a directory that is not ours, nobody evicts.
        pinned.unwrap_or(true)
    }

    pub(super) fn unpin(&self, bytes: u64) {
        self.record(|record| record.pinned = record.pinned.saturating_sub(bytes));
    }

    /// Whether so much is pinned that nested catalogs should be released.
    pub(super) fn is_pin_pressure(&self) -> bool {
        let (pinned, set) = self.record(|record| (record.pinned, record.limit)).unwrap_or_default();
        pinned > self.bounded(set) / 100 * PINNED_PERCENT / 100 * PIN_PRESSURE_PERCENT
    }

    pub(super) fn cleanups_within(&self, period: Duration) -> u64 {
        self.directory.now().record().map_or(0, |record| record.cleanups_within(period))
    }

    /// Gives back what this process has claimed and not used.
    pub(super) fn leave(&self) {
        let surplus = self.budget.surplus(0);
        self.record(|record| record.claimed = record.claimed.saturating_sub(surplus));
    }

    fn record<T>(&self, change: impl FnOnce(&mut Record) -> T) -> Option<T> {
        self.directory.now().record()?.with(change)
    }

    /// Reserves `bytes` if they fit beside the files, within the limit and within the partition.
    fn try_reserve(self: &Arc<Self>, bytes: u64) -> bool {
        if !self.partition_has(bytes) {
            return false;
        }
        if self.budget.take(bytes) {
            return true;
        }
        let claimed = self.record(|record| {
            let limit = self.bounded(record.limit);
            let ahead = (limit / AHEAD_PART).min(MAX_AHEAD) / 4096 * 4096;
            let fits = self.budget.claim(&mut record.claimed, limit, bytes, ahead);
            // Told while the record is locked, so that whoever counts sees both or neither.
            self.tell_outstanding();
            (fits, record.claimed > limit / 100 * HIGH_WATER_PERCENT)
        });
        match claimed {
            Some((fits, is_high)) => {
                if is_high {
                    self.evict_early();
                }
                fits
            }
            // The record cannot be had: its holder was stopped, or the directory is gone. Readers go on.
            None => {
                self.budget.borrow(bytes);
                true
            }
        }
    }

    fn tell_outstanding(&self) {
        if let Some(presence) = self.directory.now().presence() {
            presence.tell_outstanding(self.budget.outstanding());
        }
    }

    fn return_surplus(&self) {
        let most = 2 * (self.limit.load(Ordering::Relaxed) / AHEAD_PART).min(MAX_AHEAD);
        let surplus = self.budget.surplus(most);
        if surplus > 0
            && self.record(|record| record.claimed = record.claimed.saturating_sub(surplus)).is_none()
        {
            self.budget.give(surplus);
        }
    }

    /// Whether the partition holds `bytes` more beside what is about to be stored.
    fn partition_has(&self, bytes: u64) -> bool {
        let fits = |partition: Sample| {
            let announced = self.budget.reserved().saturating_add(bytes).saturating_add(partition.stored);
            announced.saturating_add(partition.reserve()) <= partition.free
        };
        // Before anything is refused, the partition is asked once more.
        self.sample(FREE_SPACE_AGE).is_none_or(fits) || self.sample(Duration::ZERO).is_none_or(fits)
    }

    /// The partition as it was at most `age` ago.
    fn sample(&self, age: Duration) -> Option<Sample> {
        let mut sample = self.partition.lock().unwrap_or_else(PoisonError::into_inner);
        if sample.is_none_or(|sample| sample.at.elapsed() > age) {
            let stat = fstatvfs(self.directory.now().root()).ok()?;
            *sample = Some(Sample {
                at: Instant::now(),
                total: stat.f_blocks.saturating_mul(stat.f_frsize),
                free: stat.f_bavail.saturating_mul(stat.f_frsize),
                stored: 0,
            });
        }
        *sample
    }

    /// Evicts on a thread of its own, unless this process does so already.
    fn evict_early(self: &Arc<Self>) {
        if self.is_futile() || self.early.swap(true, Ordering::SeqCst) {
            return;
        }
        let this = self.clone();
        let spawned = std::thread::Builder::new().name("cvmfs-evict".to_owned()).spawn(move || {
            this.try_evict(0, 0);
            this.early.store(false, Ordering::SeqCst);
        });
        if spawned.is_err() {
            // The eviction is then done by whoever needs the room.
            self.early.store(false, Ordering::SeqCst);
        }
    }

    fn is_futile(&self) -> bool {
        let futile = self.futile.lock().unwrap_or_else(PoisonError::into_inner);
        futile.is_some_and(|until| Instant::now() < until)
    }

    /// Evicts down to the low-water mark so that `bytes` fit, and at least `least` bytes. False if somebody else is
    /// evicting.
    fn try_evict(&self, bytes: u64, least: u64) -> bool {
        if !self.is_managed() {
            return true;
        }
        let _here = match self.evicting.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        let open = self.directory.now();
        let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let lock = openat(open.root(), "evict.lock", flags, Mode::from_raw_mode(0o600)).map(File::from);
        match lock {
            Ok(lock) if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() => {
                self.evict(&open, bytes, least);
                true
            }
            Ok(_) => false,
            // On a full partition the lock file may not be there and not be created: then nobody has it either.
            Err(error) if super::is_full(&error.into()) => {
                self.evict(&open, bytes, least);
                true
            }
            // Without a cache directory there is nothing to evict.
            Err(_) => true,
        }
    }

    fn evict(&self, open: &Arc<Open>, bytes: u64, least: u64) {
        let started = Instant::now();
        let before = self.before(open);
        let (_, pinned) = presence::living(open.root(), None);
        // Two passes keep the memory small: bytes by age first, to find the age limit, names afterwards.
        let mut ages: BTreeMap<u64, u64> = BTreeMap::new();
        let mut found = Tally::default();
        files::visit(open, &mut |item| {
            found.add(item);
            if !pinned.contains(&item.name()) {
                *ages.entry(item.rank()).or_default() += item.bytes;
            }
        });
        let announced = self.budget.reserved().saturating_add(bytes);
        let target = self.effective_limit() / 100 * LOW_WATER_PERCENT;
        let too_much = found.bytes.saturating_add(announced).saturating_sub(target);
        let missing = self.sample(Duration::ZERO).map_or(0, |partition| {
            announced.saturating_add(partition.reserve()).saturating_sub(partition.free)
        });
        let wanted = too_much.max(missing).max(least);
        let mut oldest = 0_u64;
        let limit = ages.iter().find(|(_, bytes)| {
            oldest += **bytes;
            oldest >= wanted
        });
        let limit = limit.map_or(u64::MAX, |(rank, _)| *rank);
        drop(ages);
        let mut removed = Tally::default();
        files::visit(open, &mut |item| {
            if removed.bytes < wanted
                && item.rank() <= limit
                && !pinned.contains(&item.name())
                && item.remove()
            {
                removed.add(item);
            }
        });
        self.evictions.fetch_add(removed.files, Ordering::Relaxed);
        self.conclude(open, Count { found: found.bytes.saturating_sub(removed.bytes), ..before });
        self.record(|record| record.pinned = pinned.bytes);
        if removed.files == 0 {
            *self.futile.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + FUTILE_PAUSE);
        } else if let Some(record) = open.record() {
            record.note_cleanup();
        }
        // What is free is another number now.
        *self.partition.lock().unwrap_or_else(PoisonError::into_inner) = None;
        tracing::info!(
            decision = "eviction", cache = %self.directory.path().display(), files = removed.files, bytes = removed.bytes,
            remaining = found.bytes.saturating_sub(removed.bytes), pinned = pinned.bytes,
            seconds = started.elapsed().as_secs_f64(), "cache eviction"
        );
    }

    /// The claims before a count of the files.
    fn before(&self, open: &Open) -> Count {
        let count = |claimed_before| {
            let (others, _) = presence::living(open.root(), open.presence());
            let outstanding_before = others.saturating_add(self.budget.outstanding());
            Count { claimed_before, outstanding_before, found: 0 }
        };
        self.record(|record| count(record.claimed)).unwrap_or_else(|| count(0))
    }

    fn conclude(&self, open: &Open, count: Count) {
        if let Some(record) = open.record() {
            record.with(|record| {
                record.claimed = count.claimed(record.claimed);
                record.mark_counted();
            });
        }
    }
}

/// Bytes announced by one writer; given back when dropped.
#[derive(Debug)]
pub(super) struct Reservation {
    space: Arc<Space>,
    bytes: u64,
}

impl Reservation {
    /// Bytes that may be stored.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Adds another reservation to this one.
    pub(super) fn join(&mut self, mut other: Self) {
        self.bytes += std::mem::take(&mut other.bytes);
    }

    /// Ends the announcement: `stored` bytes were stored.
    pub(super) fn stored(mut self, stored: u64) {
        self.end(stored);
    }

    fn end(&mut self, stored: u64) {
        let reserved = std::mem::take(&mut self.bytes);
        if !self.space.is_managed() {
            return;
        }
        self.space.budget.settle(reserved, stored);
        if stored > 0
            && let Some(sample) = &mut *self.space.partition.lock().unwrap_or_else(PoisonError::into_inner)
        {
            sample.stored += stored;
        }
        if reserved > stored {
            self.space.return_surplus();
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.end(0);
    }
}

/// The bytes that a file of `size` counts: whole blocks, as the partition sees it.
pub(super) fn charge(size: u64) -> u64 {
    size.max(1).next_multiple_of(4096)
}
