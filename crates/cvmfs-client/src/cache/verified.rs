//! Which files this process has compared with their seals already.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};

use super::CacheName;

/// Files remembered, 512 KiB of them. One that is forgotten is read once more.
const REMEMBERED: usize = 1 << 16;

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
        let (slot, mark) = self.place(name);
        slot.is_some_and(|slot| slot.load(Ordering::Relaxed) == mark)
    }

    pub(super) fn insert(&self, name: &CacheName) {
        let (slot, mark) = self.place(name);
        if let Some(slot) = slot {
            slot.store(mark, Ordering::Relaxed);
        }
    }

    pub(super) fn remove(&self, name: &CacheName) {
        if self.contains(name)
            && let (Some(slot), _) = self.place(name)
        {
            slot.store(0, Ordering::Relaxed);
        }
    }

    pub(super) fn clear(&self) {
        self.slots.iter().for_each(|slot| slot.store(0, Ordering::Relaxed));
    }

    fn place(&self, name: &CacheName) -> (Option<&AtomicU64>, u64) {
        // Zero marks an empty slot.
        let mark = self.hasher.hash_one(name) | 1 << 63;
        (self.slots.get(mark as usize % REMEMBERED), mark)
    }
}
