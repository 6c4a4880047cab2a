//! The bytes that this process may store without asking the other processes on the cache.
//!
//! The usage record counts *claimed* bytes: those of stored files, and those that somebody may store without asking
//! again. A process claims some more than it needs at the moment, so that the record is not locked for every object;
//! the limit holds nevertheless, however many processes there are, since what is not claimed is not stored.
//!
//! Claimed bytes of a process are *granted* (nobody needs them yet), *reserved* (somebody is about to store them)
//! or stored. A process that is killed leaves claims behind; the next count of the files takes them back.

use crate::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// See the module documentation.
#[derive(Debug, Default)]
pub(super) struct Budget {
    granted: AtomicU64,
    reserved: AtomicU64,
    /// Bytes stored without a claim because the record could not be had.
    owed: AtomicU64,
}

impl Budget {
    /// Reserves bytes that are granted. False if fewer are.
    pub(super) fn take(&self, bytes: u64) -> bool {
        // Counted twice for an instant rather than not at all.
        self.reserved.fetch_add(bytes, SeqCst);
        let taken = self.granted.fetch_update(SeqCst, SeqCst, |granted| granted.checked_sub(bytes)).is_ok();
        if !taken {
            self.reserved.fetch_sub(bytes, SeqCst);
        }
        taken
    }

    /// Claims `bytes` to be reserved, and `more` to be granted if there is room for that too. Called with the record
    /// locked; `claimed` is its number. False if not even `bytes` fit below `limit`.
    pub(super) fn claim(&self, claimed: &mut u64, limit: u64, bytes: u64, more: u64) -> bool {
        *claimed = claimed.saturating_add(self.owed.swap(0, SeqCst));
        let free = limit.saturating_sub(*claimed);
        if bytes > free {
            return false;
        }
        let granted = if more <= free - bytes { more } else { 0 };
        *claimed += bytes + granted;
        self.reserved.fetch_add(bytes, SeqCst);
        self.granted.fetch_add(granted, SeqCst);
        true
    }

    /// Reserves bytes without a claim: they are claimed as soon as the record can be had.
    pub(super) fn borrow(&self, bytes: u64) {
        self.owed.fetch_add(bytes, SeqCst);
        self.reserved.fetch_add(bytes, SeqCst);
    }

    /// Ends a reservation of which `stored` bytes were stored.
    pub(super) fn settle(&self, reserved: u64, stored: u64) {
        self.granted.fetch_add(reserved.saturating_sub(stored), SeqCst);
        self.reserved.fetch_sub(reserved, SeqCst);
        self.owed.fetch_add(stored.saturating_sub(reserved), SeqCst);
    }

    /// Takes the bytes of a removed file back.
    pub(super) fn give(&self, bytes: u64) {
        self.granted.fetch_add(bytes, SeqCst);
    }

    /// Takes away what is granted beyond `most`.
    pub(super) fn surplus(&self, most: u64) -> u64 {
        let reduced = self.granted.fetch_update(SeqCst, SeqCst, |granted| (granted > most).then_some(most));
        reduced.map_or(0, |granted| granted - most)
    }

    /// Bytes claimed by this process that are not stored yet.
    pub(super) fn outstanding(&self) -> u64 {
        self.granted.load(SeqCst).saturating_add(self.reserved())
    }

    /// Bytes that somebody is about to store.
    pub(super) fn reserved(&self) -> u64 {
        self.reserved.load(SeqCst)
    }
}

/// What a count of the files found, and what had been claimed before it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Count {
    /// Bytes claimed according to the record before the count began.
    pub(super) claimed_before: u64,
    /// Bytes that all living processes might store without a further claim, before the count began.
    pub(super) outstanding_before: u64,
    /// Bytes of the files that were found and not removed.
    pub(super) found: u64,
}

impl Count {
    /// The number of claimed bytes after the count, `now` being the record's number. Files stored while it went on
    /// may count twice, but none is left out: the limit must hold.
    pub(super) fn claimed(&self, now: u64) -> u64 {
        let meanwhile = i128::from(now) - i128::from(self.claimed_before);
        let claimed = i128::from(self.found) + i128::from(self.outstanding_before) + meanwhile;
        u64::try_from(claimed.max(0)).unwrap_or(u64::MAX)
    }
}
