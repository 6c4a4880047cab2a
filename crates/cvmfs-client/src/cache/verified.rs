//! Which files this process has compared with their seals already.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};

use super::CacheName;

/// Files remembered, 512 KiB of them. One that is forgotten is read once more.
const REMEMBERED: usize = 1 << 16;
/// Places where a file may be remembered, so that two files seldom chase each other away.
const WAYS: usize = 4;

/// A set of bounded size that may forget.
#[derive(Debug)]
pub(super) struct Verified {
    slots: Box<[AtomicU64]>,
    hasher: RandomState,
}

impl Verified {
    pub(super) fn new() -> Self {
        let slots = (0..REMEMBERED).map(|_| AtomicU64::new(0)).collect();
        Self { slots, hasher: RandomState::new() }
    }

    pub(super) fn contains(&self, name: &CacheName) -> bool {
        let (set, mark) = self.place(name);
        set.iter().any(|slot| slot.load(Ordering::Relaxed) == mark)
    }

    pub(super) fn insert(&self, name: &CacheName) {
        let (set, mark) = self.place(name);
        let holds = |wanted: u64| set.iter().find(|slot| slot.load(Ordering::Relaxed) == wanted);
        // The hash chooses whom a full set forgets, by bits that did not choose the set.
        let slot = holds(mark).or_else(|| holds(0)).or_else(|| set.get((mark >> 32) as usize % WAYS));
        if let Some(slot) = slot {
            slot.store(mark, Ordering::Relaxed);
        }
    }

    pub(super) fn remove(&self, name: &CacheName) {
        let (set, mark) = self.place(name);
        for slot in set {
            let _ = slot.compare_exchange(mark, 0, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    pub(super) fn clear(&self) {
        self.slots.iter().for_each(|slot| slot.store(0, Ordering::Relaxed));
    }

    /// The slots that may hold the file, and its mark in them.
    fn place(&self, name: &CacheName) -> (&[AtomicU64], u64) {
        // Zero marks an empty slot.
        let mark = self.hasher.hash_one(name) | 1 << 63;
        let first = mark as usize % (REMEMBERED / WAYS) * WAYS;
        (self.slots.get(first..first + WAYS).unwrap_or_default(), mark)
    }
}

#[cfg(test)]
mod tests {
    use cvmfs_format::compression::Compression;
    use cvmfs_format::hash::{ContentHash, HashAlgorithm};

    use super::*;

    fn names(count: u32) -> Vec<CacheName> {
        let hash = |number: u32| ContentHash::of(HashAlgorithm::Sha1, &number.to_le_bytes());
        (0..count).map(|number| CacheName::object(&hash(number), Compression::Zlib)).collect()
    }

    #[test]
    fn a_third_of_its_size_is_remembered_but_for_a_few() {
        let (verified, names) = (Verified::new(), names(REMEMBERED as u32 / 3));
        names.iter().for_each(|name| verified.insert(name));
        let forgotten = names.iter().filter(|name| !verified.contains(name)).count();
        assert!(forgotten * 50 < names.len(), "{forgotten} of {} are forgotten", names.len());
    }

    #[test]
    fn what_is_removed_is_not_remembered_and_nothing_else_goes() {
        let (verified, names) = (Verified::new(), names(100));
        names.iter().for_each(|name| verified.insert(name));
        verified.remove(&names[7]);
        assert!(!verified.contains(&names[7]));
        assert_eq!(names.iter().filter(|name| verified.contains(name)).count(), 99);
    }
}
