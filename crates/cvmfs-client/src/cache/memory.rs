//! A cache in memory (client behaviour §11): objects of this process, least recently used first out.
//!
//! It ends with the process. Who opens an object gets a file of its own in memory, since the kernel and SQLite want
//! files.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{MemfdFlags, memfd_create};

use super::list::{CacheEntry, Listing};
use super::{CacheName, CacheUsage, CachedFile, Kind, seal};

/// See the module documentation.
#[derive(Debug)]
pub(super) struct Memory(Mutex<Table>);

#[derive(Debug)]
struct Table {
    objects: HashMap<CacheName, Held>,
    by_rank: BTreeMap<(bool, u64), CacheName>,
    tick: u64,
    used: u64,
    pinned: u64,
    limit: u64,
    evictions: u64,
}

#[derive(Debug)]
struct Held {
    bytes: Arc<[u8]>,
    kind: Kind,
    tick: u64,
    is_pinned: bool,
}

impl Held {
    /// Objects of lower rank are evicted first.
    fn rank(&self) -> (bool, u64) {
        (self.kind != Kind::Volatile, self.tick)
    }
}

impl Memory {
    pub(super) fn new(limit: u64) -> Self {
        Self(Mutex::new(Table {
            objects: HashMap::new(),
            by_rank: BTreeMap::new(),
            tick: 0,
            used: 0,
            pinned: 0,
            limit,
            evictions: 0,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // The table is consistent after every statement that can panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn usage(&self) -> CacheUsage {
        let table = self.lock();
        CacheUsage { used: table.used, limit: table.limit, pinned: table.pinned, evictions: table.evictions }
    }

    pub(super) fn get(&self, name: &CacheName) -> Option<CachedFile> {
        let bytes = {
            let mut table = self.lock();
            table.touch(name);
            table.objects.get(name)?.bytes.clone()
        };
        let mut file = File::from(memfd_create("cvmfs-object", MemfdFlags::CLOEXEC).ok()?);
        file.write_all(&bytes).ok()?;
        Some(CachedFile::new(file, bytes.len() as u64))
    }

    pub(super) fn size(&self, name: &CacheName) -> Option<u64> {
        self.lock().objects.get(name).map(|held| held.bytes.len() as u64)
    }

    /// Keeps a copy of the file, if there is room.
    pub(super) fn put(&self, name: &CacheName, kind: Kind, file: &CachedFile) {
        let limit = self.lock().limit;
        if file.size > limit / 2 {
            return;
        }
        let mut bytes = Vec::with_capacity(usize::try_from(file.size).unwrap_or(0));
        if seal::for_each_piece(&file.file, &mut |piece| bytes.extend_from_slice(piece)).is_err() {
            return;
        }
        let mut table = self.lock();
        table.remove(name);
        let size = bytes.len() as u64;
        if !table.make_room(size) {
            return;
        }
        table.tick += 1;
        let held = Held { bytes: bytes.into(), kind, tick: table.tick, is_pinned: false };
        table.used += size;
        table.by_rank.insert(held.rank(), name.clone());
        table.objects.insert(name.clone(), held);
    }

    pub(super) fn remove(&self, name: &CacheName) -> bool {
        self.lock().remove(name)
    }

    /// Half of the memory may be pinned.
    pub(super) fn pin(&self, name: &CacheName) -> bool {
        let mut table = self.lock();
        let most = table.limit / 2;
        let pinned = table.pinned;
        let Some(held) = table.objects.get_mut(name) else { return false };
        let size = held.bytes.len() as u64;
        if pinned + size > most {
            return false;
        }
        held.is_pinned = true;
        let rank = held.rank();
        table.pinned += size;
        table.by_rank.remove(&rank);
        true
    }

    pub(super) fn unpin(&self, name: &CacheName) {
        let mut table = self.lock();
        let Some(held) = table.objects.get_mut(name).filter(|held| held.is_pinned) else { return };
        held.is_pinned = false;
        let (size, rank) = (held.bytes.len() as u64, held.rank());
        table.pinned -= size;
        table.by_rank.insert(rank, name.clone());
    }

    pub(super) fn set_limit(&self, bytes: u64) {
        let mut table = self.lock();
        table.limit = bytes;
        table.make_room(0);
    }

    pub(super) fn shrink_to(&self, bytes: u64) -> bool {
        let mut table = self.lock();
        while table.used > bytes {
            if !table.evict_one() {
                return false;
            }
        }
        true
    }

    pub(super) fn list(&self, listing: Listing) -> Vec<CacheEntry> {
        let table = self.lock();
        let is_listed = |held: &Held| match listing {
            Listing::All => true,
            Listing::Pinned => held.is_pinned,
            Listing::Catalogs => held.kind == Kind::Catalog,
            Listing::Volatile => held.kind == Kind::Volatile,
        };
        let mut entries: Vec<_> = table
            .objects
            .iter()
            .filter(|(_, held)| is_listed(held))
            .map(|(name, held)| CacheEntry {
                name: name.as_str().to_owned(),
                size: held.bytes.len() as u64,
                hint: None,
                pinned: held.is_pinned,
            })
            .collect();
        entries.sort_unstable();
        entries
    }
}

impl Table {
    fn touch(&mut self, name: &CacheName) {
        let Some(held) = self.objects.get_mut(name) else { return };
        let before = held.rank();
        self.tick += 1;
        held.tick = self.tick;
        let rank = held.rank();
        if let Some(name) = self.by_rank.remove(&before) {
            self.by_rank.insert(rank, name);
        }
    }

    fn make_room(&mut self, bytes: u64) -> bool {
        while self.used.saturating_add(bytes) > self.limit {
            if !self.evict_one() {
                return false;
            }
        }
        true
    }

    fn evict_one(&mut self) -> bool {
        let Some((_, name)) = self.by_rank.pop_first() else { return false };
        if let Some(held) = self.objects.remove(&name) {
            self.used -= held.bytes.len() as u64;
            self.evictions += 1;
        }
        true
    }

    fn remove(&mut self, name: &CacheName) -> bool {
        let Some(held) = self.objects.remove(name) else { return false };
        let size = held.bytes.len() as u64;
        self.used -= size;
        if held.is_pinned {
            self.pinned -= size;
        }
        self.by_rank.remove(&held.rank());
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cvmfs_format::compression::Compression;
    use cvmfs_format::hash::{ContentHash, HashAlgorithm};

    fn name(number: u8) -> CacheName {
        CacheName::object(&ContentHash::of(HashAlgorithm::Sha1, &[number]), Compression::Zlib)
    }

    fn put(memory: &Memory, number: u8, size: usize, kind: Kind) {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![number; size]).unwrap();
        memory.put(&name(number), kind, &CachedFile::new(file, size as u64));
    }

    #[test]
    fn volatile_objects_go_first_and_pinned_ones_stay() {
        let memory = Memory::new(1000);
        put(&memory, 1, 200, Kind::Catalog);
        assert!(memory.pin(&name(1)));
        put(&memory, 2, 300, Kind::Regular);
        put(&memory, 3, 300, Kind::Volatile);
        put(&memory, 4, 300, Kind::Regular);
        assert!(memory.size(&name(3)).is_none(), "volatile");
        assert!(memory.get(&name(2)).is_some());
        put(&memory, 5, 400, Kind::Regular);
        assert!(memory.size(&name(4)).is_none(), "used before the other");
        assert!(memory.size(&name(1)).is_some() && memory.size(&name(2)).is_some());
        assert_eq!(memory.usage().used, 900);
        assert!(!memory.shrink_to(0), "a pinned object stays");
        assert_eq!(memory.usage().used, 200);
        memory.unpin(&name(1));
        assert!(memory.shrink_to(0));
    }

    #[test]
    fn an_object_beyond_half_of_the_memory_is_not_kept() {
        let memory = Memory::new(1000);
        put(&memory, 1, 501, Kind::Regular);
        assert_eq!(memory.usage().used, 0);
    }
}
