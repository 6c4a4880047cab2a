//! The usage record: what all processes on one cache directory know together.
//!
//! It is a small file that is read, changed and written under a lock held for microseconds. A record that cannot be
//! read, whatever the reason, counts as empty; the cache is counted anew in the background.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::sync::{Mutex, PoisonError};

use super::{boot, lock};

/// First bytes of the file; changed when its layout changes.
const MAGIC: [u8; 8] = *b"cvmfsU02";
/// Magic, boot id, time of the last scan, bytes claimed, pinned bytes, limit, cleanups, checksum.
const LENGTH: usize = 8 + 16 + 8 * 5 + 4;
/// Where the times of cleanups begin.
const CLEANUPS_AT: u64 = 4096;
/// Cleanups whose times are kept. At the fastest that anybody has seen, one a minute, this is eight hours.
const MAX_CLEANUPS: u64 = 512;
/// Longest wait for the lock: it is held for microseconds, unless its holder was stopped.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long a lock that was waited for in vain is not waited for again.
const STUCK: Duration = Duration::from_secs(10);

/// The content of the record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Record {
    boot: [u8; 16],
    /// When all files were counted, in seconds since the epoch.
    pub(super) scanned: u64,
    /// Bytes that are stored, or that somebody may store without asking again.
    pub(super) claimed: u64,
    /// Bytes of pinned files.
    pub(super) pinned: u64,
    /// A limit set while the cache was in use; 0 if there is none.
    pub(super) limit: u64,
    /// Cleanups since the record was made.
    cleanups: u64,
}

impl Record {
    /// Whether the count is that of the files, as far as anybody knows.
    pub(super) fn is_counted(&self, longest: Duration) -> bool {
        let age = Duration::from_secs(unix_now().saturating_sub(self.scanned));
        Some(self.boot) == boot::id() && age <= longest
    }

    pub(super) fn mark_counted(&mut self) {
        self.boot = boot::id().unwrap_or_default();
        self.scanned = unix_now();
    }

    pub(super) fn mark_uncounted(&mut self) {
        self.scanned = 0;
    }

    fn read(file: &File) -> Option<Self> {
        let mut bytes = [0_u8; LENGTH];
        file.read_exact_at(&mut bytes, 0).ok()?;
        let (body, checksum) = bytes.split_last_chunk::<4>()?;
        if libdeflater::crc32(body) != u32::from_le_bytes(*checksum) {
            return None;
        }
        let (magic, rest) = body.split_first_chunk::<8>()?;
        let (boot, rest) = rest.split_first_chunk::<16>()?;
        let mut numbers = rest.chunks_exact(8).map(|bytes| bytes.try_into().map_or(0, u64::from_le_bytes));
        let mut next = || numbers.next().unwrap_or(0);
        let record = Self {
            boot: *boot,
            scanned: next(),
            claimed: next(),
            pinned: next(),
            limit: next(),
            cleanups: next(),
        };
        (*magic == MAGIC).then_some(record)
    }

    fn write(&self, file: &File) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(LENGTH);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&self.boot);
        for number in [self.scanned, self.claimed, self.pinned, self.limit, self.cleanups] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&libdeflater::crc32(&bytes).to_le_bytes());
        file.write_all_at(&bytes, 0)
    }
}

/// The file of the record.
#[derive(Debug)]
pub(super) struct RecordFile {
    /// The mutex excludes the threads of this process, the file's lock other processes.
    file: Mutex<File>,
    /// The lock is taken to be stuck until then.
    stuck: Mutex<Option<Instant>>,
}

impl RecordFile {
    pub(super) fn new(file: File) -> Self {
        Self { file: Mutex::new(file), stuck: Mutex::new(None) }
    }

    /// Lets `change` have the record and writes it back. `None` if somebody holds the lock and does not go on, or if
    /// the file cannot be written.
    pub(super) fn with<T>(&self, change: impl FnOnce(&mut Record) -> T) -> Option<T> {
        let file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let mut stuck = self.stuck.lock().unwrap_or_else(PoisonError::into_inner);
        if stuck.is_some_and(|until| Instant::now() < until) {
            return None;
        }
        if !lock::exclusive(&file, PATIENCE) {
            tracing::warn!("the cache's usage record is locked by a process that does not go on");
            *stuck = Some(Instant::now() + STUCK);
            return None;
        }
        *stuck = None;
        drop(stuck);
        let found = Record::read(&file);
        let mut record = found.unwrap_or_default();
        let outcome = change(&mut record);
        let is_written = found == Some(record) || record.write(&file).is_ok();
        lock::release(&file);
        is_written.then_some(outcome)
    }

    /// Notes a cleanup that happened now.
    pub(super) fn note_cleanup(&self) {
        let number = self.with(|record| {
            record.cleanups += 1;
            record.cleanups - 1
        });
        if let Some(number) = number {
            let file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
            // The times serve statistics only.
            let _ = file.write_all_at(&unix_now().to_le_bytes(), CLEANUPS_AT + number % MAX_CLEANUPS * 8);
        }
    }

    /// Cleanups within the last `period`; at most [`MAX_CLEANUPS`].
    pub(super) fn cleanups_within(&self, period: Duration) -> u64 {
        let cleanups = self.with(|record| record.cleanups).unwrap_or(0);
        let mut times = vec![0_u8; usize::try_from(cleanups.min(MAX_CLEANUPS) * 8).unwrap_or(0)];
        let file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if file.read_exact_at(&mut times, CLEANUPS_AT).is_err() {
            return 0;
        }
        let since = unix_now().saturating_sub(period.as_secs());
        let recent =
            times.chunks_exact(8).filter(|bytes| (**bytes).try_into().map_or(0, u64::from_le_bytes) >= since);
        recent.count() as u64
    }
}

pub(super) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_comes_back_and_a_damaged_one_counts_as_empty() {
        let file = tempfile::tempfile().unwrap();
        let record = RecordFile::new(file.try_clone().unwrap());
        record.with(|record| {
            record.claimed = 12345;
            record.limit = 7;
            record.mark_counted();
        });
        assert_eq!(record.with(|record| (record.claimed, record.limit)), Some((12345, 7)));
        assert!(record.with(|record| record.is_counted(Duration::from_secs(60))).unwrap());
        file.write_all_at(b"X", 30).unwrap();
        assert_eq!(record.with(|record| *record), Some(Record::default()));
    }

    #[test]
    fn cleanups_are_counted_within_a_period() {
        let record = RecordFile::new(tempfile::tempfile().unwrap());
        assert_eq!(record.cleanups_within(Duration::from_secs(60)), 0);
        for _ in 0..3 {
            record.note_cleanup();
        }
        assert_eq!(record.cleanups_within(Duration::from_secs(60)), 3);
    }
}
