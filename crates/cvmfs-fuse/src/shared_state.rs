//! What successive workers of one mount share: the negotiated connection, the pinned
//! revision, the attached catalogs, the table of open files, what each thread is at, and, where the
//! kernel does not repeat them, the requests that are not answered yet.
//!
//! It lives in a memory file that the supervisor holds. Every change is made so that a
//! worker killed at any instruction leaves a table its successor can use: records are
//! written first and made valid by one atomic store.

pub(crate) mod journal;

use std::collections::HashSet;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};

use cvmfs_client::snapshot::Pin;
use cvmfs_format::{ContentHash, HashAlgorithm};

use crate::protocol::REPEAT_BIT;
use crate::syscall::SharedWords;

/// Changes with the layout below, so that a worker of another program version notices.
const LAYOUT_VERSION: u64 = 0x6376_6d66_7300_0003;

/// INIT is 104 bytes today and its reply 80; a page half leaves room for newer kernels.
const MAX_INIT_BYTES: usize = 1024;
const MAX_REPLY_BYTES: usize = 512;

/// Open regular files of one mount. A node that opens more has lost count of its files;
/// further opens fail with ENFILE.
pub(crate) const MAX_OPEN_FILES: usize = 1 << 18;

/// Room to remember attached catalogs for a successor (about 40,000 of them).
const CATALOG_LOG_WORDS: usize = 1 << 19;

/// Threads of a worker that answer requests: those that read the device and those that wait
/// for the network.
pub(crate) const LANES: usize = 128;

/// Requests remembered that were being answered when a worker died. More than a worker has
/// threads, several times over; the oldest make room.
const SUSPECTS: usize = 512;

const VERSION: usize = 0;
const INIT_LENGTH: usize = 1;
const REPLY_LENGTH: usize = 2;
const ANSWERED: usize = 3;
const SWEPT_BACKING: usize = 4;
const WORKERS: usize = 5;
const REPEATED: usize = 6;
const PINS_RECORDED: usize = 7;
const CATALOG_LOG_USED: usize = 8;
const SLOTS_USED: usize = 9;
const HEARTBEAT: usize = 10;
const PROFILE: usize = 11;
const SUSPECTS_USED: usize = 12;
/// How many of the recorded revisions the kernel was told of.
const PINS_TOLD: usize = 13;
const JOURNAL_USED: usize = 14;
const PINS: usize = 16;
const PIN_WORDS: usize = 8;
/// Revisions that are remembered, the newest and those of files that are still open.
const PIN_PLACES: usize = 6;
const INIT: usize = 64;
const REPLY: usize = INIT + MAX_INIT_BYTES / 8;
const CATALOG_LOG: usize = 512;
const SLOTS: usize = CATALOG_LOG + CATALOG_LOG_WORDS;
const SLOT_WORDS: usize = 4;
const LANE_TABLE: usize = SLOTS + MAX_OPEN_FILES * SLOT_WORDS;
const LANE_WORDS: usize = 4;
const SUSPECT_TABLE: usize = LANE_TABLE + LANES * LANE_WORDS;
const SUSPECT_WORDS: usize = 2;
/// Where the threads that read the device read to, each as much as it reads at most.
const READER_AREA: usize = SUSPECT_TABLE + SUSPECTS * SUSPECT_WORDS;
const READER_WORDS: usize = crate::dispatch::LARGEST_MESSAGE / 8;
/// Requests that wait for the network: as many as can be queued and worked on.
const KEPT_AREA: usize = READER_AREA + crate::dispatch::READERS * READER_WORDS;
const KEPT: usize = crate::slow_lane::MAX_QUEUED + 2 * LANES;
/// The longest name that the kernel passes on, 1024 bytes, with its header.
const KEPT_WORDS: usize = 136;
const WORDS: usize = KEPT_AREA + KEPT * KEPT_WORDS;

/// The shared table. See the module documentation.
#[derive(Debug)]
pub(crate) struct SharedState {
    words: SharedWords,
}

/// An open regular file in the shared table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OpenSlot {
    /// Node id of the file.
    pub(crate) node: u64,
    /// The kernel's number of the OPEN request, without the repeat bit.
    pub(crate) unique: u64,
    /// Backing id of a passthrough open; 0 for one that is answered by READ.
    pub(crate) backing: u32,
    /// Distinguishes successive uses of the slot.
    pub(crate) generation: u32,
}

/// A request that a thread is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Occupied {
    /// Number of the thread's lane.
    pub(crate) lane: usize,
    /// The kernel's number of the request, without the repeat bit.
    pub(crate) unique: u64,
    /// What is asked, see `protocol::request::opcode`.
    pub(crate) opcode: u32,
    /// The node it is about.
    pub(crate) node: u64,
    /// When the thread began, in milliseconds of the monotonic clock.
    pub(crate) since: u64,
}

/// Milliseconds of the monotonic clock, which all processes of the machine share.
pub(crate) fn now() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    time.tv_sec.cast_unsigned() * 1000 + time.tv_nsec.cast_unsigned() / 1_000_000
}

impl SharedState {
    /// Creates the memory file.
    pub(crate) fn create_memory() -> io::Result<std::os::fd::OwnedFd> {
        // Without CLOEXEC: workers inherit it.
        let memory = rustix::fs::memfd_create("cvmfs-mount-state", rustix::fs::MemfdFlags::empty())?;
        rustix::fs::ftruncate(&memory, (WORDS * 8) as u64)?;
        Ok(memory)
    }

    /// Maps the memory file and checks its layout version; a fresh one is stamped.
    pub(crate) fn map(memory: BorrowedFd<'_>) -> io::Result<SharedState> {
        let state = SharedState { words: SharedWords::map(memory, WORDS)? };
        match state.word(VERSION).compare_exchange(0, LAYOUT_VERSION, SeqCst, SeqCst) {
            Ok(_) | Err(LAYOUT_VERSION) => Ok(state),
            Err(other) => Err(io::Error::other(format!("mount state has layout {other:#x}, not ours"))),
        }
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        self.words.word(index)
    }

    fn store_bytes(&self, at: usize, bytes: &[u8]) {
        for (index, part) in bytes.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..part.len()].copy_from_slice(part);
            self.word(at + index).store(u64::from_le_bytes(word), SeqCst);
        }
    }

    fn load_bytes(&self, at: usize, length: usize) -> Vec<u8> {
        let words = length.div_ceil(8);
        let mut bytes: Vec<u8> =
            (0..words).flat_map(|index| self.word(at + index).load(SeqCst).to_le_bytes()).collect();
        bytes.truncate(length);
        bytes
    }

    /// Records the kernel's INIT request.
    pub(crate) fn record_init(&self, request: &[u8]) -> io::Result<()> {
        if request.len() > MAX_INIT_BYTES {
            return Err(io::Error::other("the kernel's INIT request is larger than expected"));
        }
        self.store_bytes(INIT, request);
        self.word(INIT_LENGTH).store(request.len() as u64, SeqCst);
        Ok(())
    }

    /// The recorded INIT request.
    pub(crate) fn init(&self) -> Vec<u8> {
        let length = (self.word(INIT_LENGTH).load(SeqCst) as usize).min(MAX_INIT_BYTES);
        self.load_bytes(INIT, length)
    }

    /// Records the reply to INIT that is about to be sent.
    pub(crate) fn record_reply(&self, reply: &[u8]) -> io::Result<()> {
        if reply.len() > MAX_REPLY_BYTES {
            return Err(io::Error::other("the reply to INIT is larger than expected"));
        }
        self.store_bytes(REPLY, reply);
        self.word(REPLY_LENGTH).store(reply.len() as u64, SeqCst);
        Ok(())
    }

    /// The recorded reply to INIT.
    pub(crate) fn reply(&self) -> Vec<u8> {
        let length = (self.word(REPLY_LENGTH).load(SeqCst) as usize).min(MAX_REPLY_BYTES);
        self.load_bytes(REPLY, length)
    }

    /// Whether INIT was answered, i.e. the connection works and a new worker takes over.
    pub(crate) fn is_answered(&self) -> bool {
        self.word(ANSWERED).load(SeqCst) == 1
    }

    /// Notes that INIT was answered.
    pub(crate) fn set_answered(&self) {
        self.word(ANSWERED).store(1, SeqCst);
    }

    /// Counts a worker that starts; returns how many there were before.
    pub(crate) fn count_worker(&self) -> u64 {
        self.word(WORKERS).fetch_add(1, SeqCst)
    }

    /// Workers started so far.
    pub(crate) fn workers(&self) -> u64 {
        self.word(WORKERS).load(SeqCst)
    }

    /// Counts a request that the kernel sent again after a worker's death.
    pub(crate) fn count_repeated(&self) {
        self.word(REPEATED).fetch_add(1, SeqCst);
    }

    /// Requests sent again so far.
    pub(crate) fn repeated(&self) -> u64 {
        self.word(REPEATED).load(SeqCst)
    }

    /// Backing ids below this one are known to be recorded or closed.
    pub(crate) fn swept_backing(&self) -> u32 {
        self.word(SWEPT_BACKING).load(SeqCst) as u32
    }

    /// Moves the mark of [`Self::swept_backing`].
    pub(crate) fn set_swept_backing(&self, id: u32) {
        self.word(SWEPT_BACKING).store(u64::from(id), SeqCst);
    }

    /// Records the revision in use. Places are used in turn, so that a reader never sees half of one.
    pub(crate) fn record_pin(&self, pin: &Pin) {
        let recorded = self.word(PINS_RECORDED).load(SeqCst);
        let at = PINS + recorded as usize % PIN_PLACES * PIN_WORDS;
        self.store_hash(at, &pin.root_hash);
        self.word(at + 4).store(pin.root_size, SeqCst);
        self.word(at + 5).store(pin.revision, SeqCst);
        self.word(at + 6).store(pin.timestamp, SeqCst);
        self.word(PINS_RECORDED).store(recorded + 1, SeqCst);
    }

    /// The kernel knows what the revision recorded last changed.
    pub(crate) fn record_told(&self) {
        self.word(PINS_TOLD).store(self.word(PINS_RECORDED).load(SeqCst), SeqCst);
    }

    /// The newest revision that the kernel was told of, if it was not told of a later one that is in use.
    pub(crate) fn told_before(&self) -> Option<Pin> {
        let behind = self.word(PINS_RECORDED).load(SeqCst).saturating_sub(self.word(PINS_TOLD).load(SeqCst));
        if behind == 0 { None } else { self.pins().into_iter().nth(usize::try_from(behind).ok()?) }
    }

    /// The recorded revision, if there is one.
    pub(crate) fn pin(&self) -> Option<Pin> {
        self.pins().into_iter().next()
    }

    /// The recorded revisions, newest first.
    pub(crate) fn pins(&self) -> Vec<Pin> {
        let recorded = self.word(PINS_RECORDED).load(SeqCst);
        // One place fewer than there are: the oldest may be half overwritten.
        let first = recorded.saturating_sub(PIN_PLACES as u64 - 1);
        (first..recorded).rev().filter_map(|number| self.pin_at(number as usize % PIN_PLACES)).collect()
    }

    fn pin_at(&self, place: usize) -> Option<Pin> {
        let at = PINS + place * PIN_WORDS;
        Some(Pin {
            root_hash: self.load_hash(at)?,
            root_size: self.word(at + 4).load(SeqCst),
            revision: self.word(at + 5).load(SeqCst),
            timestamp: self.word(at + 6).load(SeqCst),
        })
    }

    fn store_hash(&self, at: usize, hash: &ContentHash) {
        self.word(at).store(u64::from(hash.algorithm.id()), SeqCst);
        self.store_bytes(at + 1, &hash.digest);
    }

    fn load_hash(&self, at: usize) -> Option<ContentHash> {
        let algorithm = HashAlgorithm::from_id(self.word(at).load(SeqCst) as u8)?;
        ContentHash::from_slice(algorithm, &self.load_bytes(at + 1, 20))
    }

    /// Remembers an attached catalog for a successor. When the room is used up, later ones
    /// are not remembered: a successor then answers ESTALE for their nodes and the kernel
    /// walks there again.
    pub(crate) fn record_catalog(&self, mountpoint: &[u8], hash: &ContentHash, size: u64) {
        let used = self.word(CATALOG_LOG_USED).load(SeqCst) as usize;
        let needed = 6 + mountpoint.len().div_ceil(8);
        if used + needed > CATALOG_LOG_WORDS {
            return;
        }
        let at = CATALOG_LOG + used;
        self.word(at).store(mountpoint.len() as u64, SeqCst);
        self.store_hash(at + 1, hash);
        self.word(at + 5).store(size, SeqCst);
        self.store_bytes(at + 6, mountpoint);
        self.word(CATALOG_LOG_USED).store((used + needed) as u64, SeqCst);
    }

    /// The remembered catalogs in the order of attachment: mount point, hash, size.
    pub(crate) fn catalogs(&self) -> Vec<(Vec<u8>, ContentHash, u64)> {
        let used = (self.word(CATALOG_LOG_USED).load(SeqCst) as usize).min(CATALOG_LOG_WORDS);
        let mut found = Vec::new();
        let mut position = 0;
        while position + 6 <= used {
            let at = CATALOG_LOG + position;
            let length = self.word(at).load(SeqCst) as usize;
            let needed = 6 + length.div_ceil(8);
            if position + needed > used {
                break;
            }
            if let Some(hash) = self.load_hash(at + 1) {
                found.push((self.load_bytes(at + 6, length), hash, self.word(at + 5).load(SeqCst)));
            }
            position += needed;
        }
        found
    }

    /// Notes that the worker's threads run.
    pub(crate) fn beat(&self) {
        self.word(HEARTBEAT).store(now(), SeqCst);
    }

    /// When the worker last noted that it runs; 0 if it never did.
    pub(crate) fn last_beat(&self) -> u64 {
        self.word(HEARTBEAT).load(SeqCst)
    }

    /// Forgets heartbeat and lanes of a worker that is dead.
    pub(crate) fn clear_worker(&self) {
        self.word(HEARTBEAT).store(0, SeqCst);
        for lane in 0..LANES {
            self.leave(lane);
        }
    }

    /// The profile that the first worker chose, as a number; 0 if none did.
    pub(crate) fn profile(&self) -> u64 {
        self.word(PROFILE).load(SeqCst)
    }

    /// Records the profile.
    pub(crate) fn record_profile(&self, profile: u64) {
        self.word(PROFILE).store(profile, SeqCst);
    }

    fn lane_word(&self, lane: usize, field: usize) -> &AtomicU64 {
        self.word(LANE_TABLE + lane.min(LANES - 1) * LANE_WORDS + field)
    }

    /// Notes what the thread of a lane is at. The request's number comes last: a reader
    /// that sees it sees the rest.
    pub(crate) fn enter(&self, lane: usize, unique: u64, opcode: u32, node: u64) {
        self.lane_word(lane, 1).store(u64::from(opcode), Relaxed);
        self.lane_word(lane, 2).store(node, Relaxed);
        self.lane_word(lane, 3).store(now(), Relaxed);
        self.lane_word(lane, 0).store(unique & !REPEAT_BIT, Release);
    }

    /// Notes that the thread of a lane is free.
    pub(crate) fn leave(&self, lane: usize) {
        self.lane_word(lane, 0).store(0, Release);
    }

    /// What all threads are at.
    pub(crate) fn occupied(&self) -> Vec<Occupied> {
        let at = |lane| Occupied {
            lane,
            unique: self.lane_word(lane, 0).load(Acquire),
            opcode: self.lane_word(lane, 1).load(Relaxed) as u32,
            node: self.lane_word(lane, 2).load(Relaxed),
            since: self.lane_word(lane, 3).load(Relaxed),
        };
        (0..LANES).map(at).filter(|occupied| occupied.unique != 0).collect()
    }

    /// Counts the death of a worker that was at these requests. One that was just handed from
    /// thread to thread stands in two lanes and counts once.
    pub(crate) fn suspect(&self, requests: &[Occupied]) {
        let mut seen = HashSet::new();
        for request in requests.iter().filter(|request| seen.insert(request.unique)) {
            let known =
                (0..SUSPECTS).find(|index| self.suspect_word(*index, 0).load(SeqCst) == request.unique);
            match known {
                Some(index) => {
                    self.suspect_word(index, 1).fetch_add(1, SeqCst);
                }
                None => {
                    let index = self.word(SUSPECTS_USED).fetch_add(1, SeqCst) as usize % SUSPECTS;
                    self.suspect_word(index, 1).store(1, SeqCst);
                    self.suspect_word(index, 0).store(request.unique, SeqCst);
                }
            }
        }
    }

    /// How many workers died while they were at this request.
    pub(crate) fn deaths_at(&self, unique: u64) -> u64 {
        let plain = unique & !REPEAT_BIT;
        (0..SUSPECTS)
            .find(|index| self.suspect_word(*index, 0).load(SeqCst) == plain)
            .map_or(0, |index| self.suspect_word(index, 1).load(SeqCst))
    }

    fn suspect_word(&self, index: usize, field: usize) -> &AtomicU64 {
        self.word(SUSPECT_TABLE + index * SUSPECT_WORDS + field)
    }

    fn slot_word(&self, slot: u32, field: usize) -> &AtomicU64 {
        self.word(SLOTS + slot as usize * SLOT_WORDS + field)
    }

    /// Fills a free slot; the last store makes it valid. Returns the slot's generation.
    pub(crate) fn fill_slot(&self, slot: u32, node: u64, unique: u64, backing: u32) -> u32 {
        self.word(SLOTS_USED).fetch_max(u64::from(slot) + 1, SeqCst);
        self.slot_word(slot, 1).store(node, SeqCst);
        self.slot_word(slot, 2).store(unique, SeqCst);
        self.slot_word(slot, 3).store(u64::from(backing), SeqCst);
        (self.slot_word(slot, 0).fetch_or(1, SeqCst) >> 1) as u32
    }

    /// Slots from this one on were never used.
    pub(crate) fn slots_used(&self) -> u32 {
        (self.word(SLOTS_USED).load(SeqCst) as usize).min(MAX_OPEN_FILES) as u32
    }

    /// What is open in `slot`.
    pub(crate) fn slot(&self, slot: u32) -> Option<OpenSlot> {
        if slot as usize >= MAX_OPEN_FILES {
            return None;
        }
        let state = self.slot_word(slot, 0).load(SeqCst);
        (state & 1 == 1).then(|| OpenSlot {
            node: self.slot_word(slot, 1).load(SeqCst),
            unique: self.slot_word(slot, 2).load(SeqCst),
            backing: self.slot_word(slot, 3).load(SeqCst) as u32,
            generation: (state >> 1) as u32,
        })
    }

    /// Frees a slot and moves its generation on. The generation wraps within 31 bits.
    pub(crate) fn free_slot(&self, slot: u32, generation: u32) {
        let next = u64::from(generation.wrapping_add(1) & 0x7fff_ffff);
        self.slot_word(slot, 0).store(next << 1, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn state() -> (std::os::fd::OwnedFd, SharedState) {
        let memory = SharedState::create_memory().unwrap();
        let state = SharedState::map(memory.as_fd()).unwrap();
        (memory, state)
    }

    #[test]
    fn a_successor_sees_pin_catalogs_and_open_files() {
        let (memory, first) = state();
        let hash = ContentHash::of(HashAlgorithm::Shake128, b"root");
        let pin = Pin { root_hash: hash, root_size: 4096, revision: 7, timestamp: 1_700_000_000 };
        for revision in 1..=6 {
            first.record_pin(&Pin { revision, ..pin });
        }
        first.record_pin(&pin);
        first.record_catalog(b"/a/nested", &ContentHash::of(HashAlgorithm::Sha1, b"n"), 123);
        first.record_catalog(b"", &hash, 0);
        first.record_init(b"init request").unwrap();
        let generation = first.fill_slot(5, 42, 1001, 9);
        drop(first);

        let second = SharedState::map(memory.as_fd()).unwrap();
        assert_eq!(second.pin(), Some(pin));
        assert_eq!(second.pins().iter().map(|pin| pin.revision).collect::<Vec<_>>(), [7, 6, 5, 4, 3]);
        assert_eq!(second.init(), b"init request");
        let catalogs = second.catalogs();
        assert_eq!(catalogs.len(), 2);
        assert_eq!(catalogs[0].0, b"/a/nested");
        assert_eq!(catalogs[0].2, 123);
        assert_eq!(catalogs[1].1, hash);
        assert_eq!(second.slot(5), Some(OpenSlot { node: 42, unique: 1001, backing: 9, generation }));
        second.free_slot(5, generation);
        assert_eq!(second.slot(5), None);
        assert_eq!(second.fill_slot(5, 42, 1002, 0), generation + 1);
    }

    #[test]
    fn a_request_that_kills_workers_is_counted_and_a_finished_one_is_not() {
        let (_memory, state) = state();
        for death in 1..=3 {
            state.enter(0, 77 | REPEAT_BIT, 14, 5);
            state.enter(1, 100 + death, 1, 6);
            state.enter(2, 78, 1, 7);
            state.leave(2);
            state.suspect(&state.occupied());
            state.clear_worker();
            assert_eq!(state.deaths_at(77 | REPEAT_BIT), death);
        }
        state.enter(0, 500, 1, 1);
        state.enter(3, 500, 1, 1);
        state.suspect(&state.occupied());
        state.clear_worker();
        assert_eq!(state.deaths_at(500), 1, "handed over from one thread to another");
        assert_eq!(state.deaths_at(78), 0);
        assert_eq!(state.deaths_at(101), 1);
        assert!(state.occupied().is_empty());
        for unique in 1000..3000 {
            state.enter(0, unique, 1, 1);
            state.suspect(&state.occupied());
        }
        assert_eq!((state.deaths_at(77), state.deaths_at(2999)), (0, 1), "the oldest make room");
    }

    #[test]
    fn a_full_catalog_log_stops_remembering_and_keeps_what_it_has() {
        let (_memory, state) = state();
        let hash = ContentHash::of(HashAlgorithm::Sha1, b"x");
        let path = vec![b'p'; 4000];
        for _ in 0..2000 {
            state.record_catalog(&path, &hash, 1);
        }
        let catalogs = state.catalogs();
        assert!(catalogs.len() > 900 && catalogs.len() < 2000, "{}", catalogs.len());
        assert!(catalogs.iter().all(|catalog| catalog.0 == path));
    }
}
