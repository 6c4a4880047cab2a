//! Compressing, hashing and storing of file contents on all cores.
//!
//! The reader of an archive hands over *pieces* (a whole small file, or one chunk of a
//! large one) and gets a [`Ticket`] for each; worker threads encode, hash and store
//! them meanwhile; after [`Pipeline::wait_for`] each ticket has its content hash. The
//! pieces that are queued or being worked on never exceed a fixed number of bytes
//! ([`bytes_in_flight`]), so memory depends neither on file sizes nor on their number.
//!
//! A pipeline that is dropped before [`Pipeline::keep`] removes the objects that it made: nothing refers to them, and
//! repositories without garbage collection would never get rid of them.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use cvmfs_format::{Compression, ContentHash, Deflate, HashAlgorithm, ObjectKind, ObjectName};

use crate::error::PublishError;
use crate::piece::{Buffers, Piece};
use crate::storage::{Content, Put, Storage};

/// How pieces become objects.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Encoding {
    pub(crate) algorithm: HashAlgorithm,
    pub(crate) compression: Compression,
    pub(crate) deflate: Deflate,
}

impl Encoding {
    /// Has `consumer` take the stored form of `plain`, with its name.
    pub(crate) fn encode<R>(
        self,
        kind: ObjectKind,
        plain: &[u8],
        consumer: impl FnOnce(ObjectName, &[u8]) -> R,
    ) -> R {
        let named =
            |stored: &[u8]| consumer(ObjectName::new(ContentHash::of(self.algorithm, stored), kind), stored);
        match self.compression {
            Compression::Zlib => self.deflate.with_compressed(plain, named),
            Compression::None => named(plain),
        }
    }
}

/// Running totals of a publish, check, replication or collection, read by whoever shows progress.
#[derive(Debug, Default)]
pub struct Counters {
    /// Entries read from archives and trees.
    pub entries: AtomicU64,
    /// Plain bytes of file contents read.
    pub bytes_in: AtomicU64,
    /// Objects that were not in the storage before, or damaged.
    pub new_objects: AtomicU64,
    /// Stored bytes of those objects.
    pub bytes_stored: AtomicU64,
    /// Objects deleted.
    pub removed_objects: AtomicU64,
}

impl Counters {
    pub(crate) fn count(&self, put: Put, stored: usize) {
        if put != Put::Present {
            self.new_objects.fetch_add(1, Ordering::Relaxed);
            self.bytes_stored.fetch_add(stored as u64, Ordering::Relaxed);
        }
    }
}

/// Claim on the hash of a piece that was handed to the pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ticket(u32);

#[derive(Debug)]
pub(crate) struct Pipeline {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    storage: Arc<dyn Storage>,
    counters: Arc<Counters>,
    state: Mutex<State>,
    /// A job was queued, or the end was announced.
    work: Condvar,
    /// A job was finished.
    progress: Condvar,
    buffers: Buffers,
    max_bytes: u64,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Job>,
    bytes_in_flight: u64,
    jobs_in_flight: usize,
    hashes: Vec<Option<ContentHash>>,
    /// All pieces before this one are stored.
    stored_below: usize,
    /// Up to where somebody waits for the pieces.
    awaited: Option<usize>,
    failure: Option<PublishError>,
    /// What no revision can refer to, as long as nothing is committed.
    made: Vec<ObjectName>,
    closed: bool,
    /// Workers that wait for a job, and others that wait for room or for pieces: who does not wait need
    /// not be woken, which would be a system call for each small file.
    idle_workers: usize,
    waiting: usize,
}

impl State {
    /// Whether somebody who waits has so much to do now that waking it is worth while.
    fn is_worth_waking(&self, max_bytes: u64) -> bool {
        self.failure.is_some()
            || match self.awaited {
                Some(pieces) => self.stored_below >= pieces,
                None => {
                    self.jobs_in_flight == 0
                        || (self.queue.len() <= MAX_QUEUED / 2 && self.bytes_in_flight <= max_bytes / 2)
                }
            }
    }

    fn note(&mut self, ticket: Ticket, hash: ContentHash) {
        if let Some(slot) = self.hashes.get_mut(ticket.0 as usize) {
            *slot = Some(hash);
        }
        while self.hashes.get(self.stored_below).is_some_and(Option::is_some) {
            self.stored_below += 1;
        }
    }

    /// The first caller gets the cause, later ones learn that there was one.
    fn check(&mut self) -> Result<(), PublishError> {
        let Some(failure) = self.failure.take() else { return Ok(()) };
        self.failure = Some(PublishError::damaged("transaction", "storing an object has failed before"));
        Err(failure)
    }
}

#[derive(Debug)]
struct Job {
    ticket: Ticket,
    kind: ObjectKind,
    plain: Piece,
    encoding: Encoding,
}

/// More would only compete for memory bandwidth and the directory's lock, or for the store's patience.
const MAX_WORKERS: usize = 32;
/// For a store across a network, so that its distance does not set the speed.
const MIN_BYTES_FOR_STORES: u64 = 64 << 20;
/// Each queued small file costs little; this many keep the workers busy while a directory is read.
const MAX_QUEUED: usize = 1024;

/// Plain bytes queued or in work: one mean chunk for each worker and one more being read, and never
/// less than a single largest chunk. Compressed copies come on top while a worker stores them.
fn bytes_in_flight(workers: usize, largest: u64) -> u64 {
    ((workers as u64 + 1) * (8 << 20)).max(largest)
}

impl Pipeline {
    /// Starts the workers. `largest` is the size of the largest piece that will come.
    pub(crate) fn start(storage: Arc<dyn Storage>, counters: Arc<Counters>, largest: u64) -> Pipeline {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let writers = storage.writers();
        let workers = cores.max(writers).min(MAX_WORKERS);
        let least = if writers > cores { MIN_BYTES_FOR_STORES } else { 0 };
        let shared = Arc::new(Shared {
            storage,
            counters,
            state: Mutex::default(),
            work: Condvar::new(),
            progress: Condvar::new(),
            buffers: Buffers::default(),
            max_bytes: bytes_in_flight(cores.min(MAX_WORKERS), largest).max(least),
        });
        let spawn = |_| {
            let shared = shared.clone();
            std::thread::spawn(move || shared.work_until_closed())
        };
        Pipeline { workers: (0..workers).map(spawn).collect(), shared }
    }

    /// An empty piece with room for `capacity` bytes.
    pub(crate) fn piece(&self, capacity: usize) -> Piece {
        self.shared.buffers.piece(capacity)
    }

    /// Hands over a piece; waits while too much is in flight. Returns the first failure of any worker.
    pub(crate) fn submit(
        &self,
        kind: ObjectKind,
        plain: Piece,
        encoding: Encoding,
    ) -> Result<Ticket, PublishError> {
        let size = plain.len() as u64;
        let mut state = self.shared.lock();
        while state.failure.is_none()
            && (state.queue.len() >= MAX_QUEUED
                || (state.bytes_in_flight > 0 && state.bytes_in_flight + size > self.shared.max_bytes))
        {
            state = self.shared.wait_for_progress(state);
        }
        state.check()?;
        let ticket = Ticket(u32::try_from(state.hashes.len()).map_err(|_| {
            PublishError::Usage("more than 4294967295 pieces in one transaction: split the input".into())
        })?);
        state.hashes.push(None);
        state.bytes_in_flight += size;
        state.jobs_in_flight += 1;
        state.queue.push_back(Job { ticket, kind, plain, encoding });
        let wake = state.idle_workers > 0;
        drop(state);
        if wake {
            self.shared.work.notify_one();
        }
        Ok(ticket)
    }

    /// Pieces handed over so far.
    pub(crate) fn submitted(&self) -> usize {
        self.shared.lock().hashes.len()
    }

    /// Waits until everything handed over so far is stored.
    pub(crate) fn wait(&self) -> Result<(), PublishError> {
        self.wait_for(self.submitted())
    }

    /// Waits until the first so many pieces are stored.
    pub(crate) fn wait_for(&self, pieces: usize) -> Result<(), PublishError> {
        let mut state = self.shared.lock();
        while state.failure.is_none() && state.stored_below < pieces {
            state.awaited = Some(pieces);
            state = self.shared.wait_for_progress(state);
        }
        state.awaited = None;
        state.check()
    }

    /// The objects stay: what follows may publish them.
    pub(crate) fn keep(&self) {
        self.shared.lock().made = Vec::new();
    }

    /// The hash of a stored piece. Call [`Pipeline::wait_for`] first.
    pub(crate) fn hash(&self, ticket: Ticket) -> ContentHash {
        let state = self.shared.lock();
        state.hashes.get(ticket.0 as usize).copied().flatten().expect("asked for after a successful wait")
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closed = true;
        state.queue.clear();
        drop(state);
        self.shared.work.notify_all();
        for worker in self.workers.drain(..) {
            // panics of jobs are caught and reported where they happen
            let _ = worker.join();
        }
        let made = std::mem::take(&mut self.shared.lock().made);
        let count = made.len();
        for name in made {
            if let Err(error) = self.shared.storage.delete_object(&name) {
                tracing::warn!(%error, "cannot remove what was stored for nothing");
                return;
            }
        }
        if count > 0 {
            tracing::debug!(count, "removed the objects of a publish that did not end");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work_until_closed(&self) {
        while let Some(job) = self.next_job() {
            let size = job.plain.len() as u64;
            let ticket = job.ticket;
            // without this a defect in an encoder would leave the submitter waiting for ever
            let outcome = catch_unwind(AssertUnwindSafe(|| self.store(job)))
                .unwrap_or_else(|_| Err(PublishError::damaged("worker", "stopped by a defect, see the log")));
            let mut state = self.lock();
            match outcome {
                Ok(hash) => state.note(ticket, hash),
                Err(error) if state.failure.is_none() => state.failure = Some(error),
                Err(_) => {}
            }
            state.bytes_in_flight -= size;
            state.jobs_in_flight -= 1;
            let wake = state.waiting > 0 && state.is_worth_waking(self.max_bytes);
            drop(state);
            if wake {
                self.progress.notify_all();
            }
        }
    }

    fn next_job(&self) -> Option<Job> {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.queue.pop_front() {
                return Some(job);
            }
            if state.closed {
                return None;
            }
            state.idle_workers += 1;
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.idle_workers -= 1;
        }
    }

    fn wait_for_progress<'a>(&self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.waiting += 1;
        state = self.progress.wait(state).unwrap_or_else(PoisonError::into_inner);
        state.waiting -= 1;
        state
    }

    fn store(&self, job: Job) -> Result<ContentHash, PublishError> {
        let Job { kind, plain, encoding, .. } = job;
        let outcome = self.store_bytes(kind, plain.bytes(), encoding);
        self.buffers.give_back(plain);
        outcome
    }

    fn store_bytes(
        &self,
        kind: ObjectKind,
        plain: &[u8],
        encoding: Encoding,
    ) -> Result<ContentHash, PublishError> {
        // Without compression the name is as quickly found out as whether it is known.
        let known = self.storage.known().filter(|_| encoding.compression != Compression::None);
        let known = known.map(|known| (known, Content::of(kind, encoding, plain)));
        if let Some((known, content)) = &known
            && let Some((name, size)) = known.find(content, kind, encoding.algorithm)
            && self.storage.object_size(&name)? == Some(size)
        {
            return Ok(name.hash);
        }
        encoding.encode(kind, plain, |name, stored| {
            let put = self.storage.put_object(&name, stored)?;
            if let Some((known, content)) = &known {
                known.remember(content, &name, stored.len() as u64);
            }
            self.counters.count(put, stored.len());
            if put == Put::New && self.storage.is_sure_of_new_objects() {
                self.lock().made.push(name);
            }
            Ok(name.hash)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage;

    const ENCODING: Encoding =
        Encoding { algorithm: HashAlgorithm::Sha1, compression: Compression::Zlib, deflate: Deflate::Fast };

    #[test]
    fn every_piece_is_stored_under_the_hash_its_ticket_yields() {
        let dir = tempfile::tempdir().unwrap();
        let storage = storage::create(dir.path().to_str().unwrap()).unwrap();
        let counters = Arc::new(Counters::default());
        let pipeline = Pipeline::start(storage.clone(), counters.clone(), 1 << 20);
        let tickets: Vec<_> = (0..2000u32)
            .map(|n| {
                pipeline.submit(ObjectKind::File, (n % 500).to_le_bytes().to_vec().into(), ENCODING).unwrap()
            })
            .collect();
        pipeline.wait().unwrap();
        for (n, ticket) in tickets.iter().enumerate() {
            let name = ObjectName::new(pipeline.hash(*ticket), ObjectKind::File);
            let stored = storage.get_object(&name, 1000).unwrap();
            let plain = cvmfs_format::compression::inflate(Compression::Zlib, &stored, 1000).unwrap();
            assert_eq!(plain, (n as u32 % 500).to_le_bytes());
        }
        assert!(counters.new_objects.load(Ordering::Relaxed) >= 500);
    }

    #[test]
    fn a_storage_failure_reaches_the_submitter() {
        let dir = tempfile::tempdir().unwrap();
        let storage = storage::create(dir.path().to_str().unwrap()).unwrap();
        // a file where the scratch directory should be: no object can be written
        std::fs::remove_dir(dir.path().join("data/txn")).unwrap();
        std::fs::write(dir.path().join("data/txn"), b"").unwrap();
        let pipeline = Pipeline::start(storage, Arc::default(), 1 << 20);
        let submitted = pipeline.submit(ObjectKind::File, b"x".to_vec().into(), ENCODING);
        let outcome = submitted.and_then(|_| pipeline.wait());
        assert!(matches!(outcome, Err(PublishError::Storage(_))), "{outcome:?}");
        assert!(pipeline.wait().is_err(), "the failure was forgotten");
    }

    #[test]
    fn a_piece_larger_than_the_budget_still_passes() {
        let dir = tempfile::tempdir().unwrap();
        let storage = storage::create(dir.path().to_str().unwrap()).unwrap();
        let pipeline = Pipeline::start(storage, Arc::default(), 1);
        let big = bytes_in_flight(MAX_WORKERS, 1) as usize;
        let none = Encoding { compression: Compression::None, ..ENCODING };
        pipeline.submit(ObjectKind::Chunk, vec![0; big.min(300 << 20) + 1].into(), none).unwrap();
        pipeline.wait().unwrap();
    }
}
