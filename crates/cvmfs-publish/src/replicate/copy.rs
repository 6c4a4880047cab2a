//! Copying what a revision refers to: catalogs are walked by one thread, objects fetched by many.

use std::collections::{HashSet, VecDeque};
use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use cvmfs_format::catalog::Catalog;
use cvmfs_format::{Compression, ContentHash, Hasher, Inflater, ObjectKind, ObjectName};

use super::ReplicateOptions;
use crate::error::{PublishError, shown};
use crate::head::MAX_DATABASE;
use crate::interrupt::Interrupt;
use crate::pipeline::Counters;
use crate::storage::{Put, Scratch, Storage};
use crate::workspace::chain;

/// Read in pieces of this size.
const PIECE: usize = 256 << 10;
/// Attempts for an object that arrives cut or wrong, with a pause that doubles.
const ATTEMPTS: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Objects that wait for a worker: enough that none is idle while a catalog is read.
const MAX_QUEUED: usize = 4096;
/// Catalogs that are held back until what they refer to is there; with these the workers are waited for.
const MAX_HELD_BACK: usize = 256;
/// Names remembered as looked at, some 40 bytes each; forgotten with each wait.
const MAX_REMEMBERED: usize = 1 << 20;
/// What deflate adds at most to content that it cannot compress.
fn largest_stored(plain: u64) -> u64 {
    plain.saturating_add(plain / 1000).saturating_add(64 << 10)
}

/// An object to be copied.
#[derive(Debug)]
struct Job {
    name: ObjectName,
    /// A path that needs it, for messages.
    path: Vec<u8>,
    limit: u64,
}

/// A copy in progress.
#[derive(Debug)]
pub(super) struct Copy<'a> {
    options: &'a ReplicateOptions,
    scratch: &'a Scratch,
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Objects handed to the workers since the last wait.
    known: HashSet<ObjectName>,
    /// Catalogs to be stored once all that they refer to is, children before parents.
    held_back: Vec<(ObjectName, PathBuf)>,
    next_file: usize,
}

#[derive(Debug)]
struct Shared {
    source: Arc<dyn Storage>,
    replica: Arc<dyn Storage>,
    counters: Arc<Counters>,
    interrupt: Interrupt,
    directory: PathBuf,
    state: Mutex<State>,
    work: Condvar,
    progress: Condvar,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Job>,
    in_flight: usize,
    failure: Option<PublishError>,
    closed: bool,
}

/// What is known of a catalog after it was read.
struct ReadCatalog {
    previous: Option<ContentHash>,
    nested: Vec<(Vec<u8>, ContentHash)>,
}

impl<'a> Copy<'a> {
    pub(super) fn start(options: &'a ReplicateOptions, scratch: &'a Scratch) -> Copy<'a> {
        let shared = Arc::new(Shared {
            source: options.source.clone(),
            replica: options.replica.clone(),
            counters: options.counters.clone(),
            interrupt: options.interrupt.clone(),
            directory: scratch.file(""),
            state: Mutex::default(),
            work: Condvar::new(),
            progress: Condvar::new(),
        });
        let spawn = |number| {
            let shared = shared.clone();
            std::thread::spawn(move || shared.work_until_closed(number))
        };
        let workers = (0..options.parallel.max(1)).map(spawn).collect();
        Copy { options, scratch, workers, shared, known: HashSet::new(), held_back: Vec::new(), next_file: 0 }
    }

    /// Copies a revision with everything below its root catalog; returns its predecessor.
    pub(super) fn revision(&mut self, root: ContentHash) -> Result<Option<ContentHash>, PublishError> {
        enum Step {
            Enter(Vec<u8>, ContentHash),
            Leave(ObjectName, PathBuf),
        }
        let mut previous = None;
        let mut entered = HashSet::new();
        let mut waiting = vec![Step::Enter(Vec::new(), root)];
        while let Some(step) = waiting.pop() {
            self.options.interrupt.check()?;
            match step {
                Step::Leave(name, file) => {
                    self.held_back.push((name, file));
                    if self.held_back.len() >= MAX_HELD_BACK {
                        self.settle()?;
                    }
                }
                Step::Enter(path, hash) => {
                    let name = ObjectName::new(hash, ObjectKind::Catalog);
                    if !entered.insert(hash) {
                        continue;
                    }
                    let is_present = self.options.replica.object_size(&name)?.is_some();
                    if is_present && !self.options.complete {
                        if hash == root {
                            previous = self.predecessor(name)?;
                        }
                        continue;
                    }
                    let file = self.file("stored");
                    self.shared.fetch(&name, &path, MAX_DATABASE, &file)?;
                    let read = self.catalog(name, &path, &file)?;
                    if hash == root {
                        previous = read.previous;
                    }
                    waiting.push(Step::Leave(name, file));
                    waiting.extend(read.nested.into_iter().map(|(path, hash)| Step::Enter(path, hash)));
                }
            }
        }
        Ok(previous)
    }

    /// Copies a small object or a database that nothing is below of.
    pub(super) fn database(&mut self, name: ObjectName, path: &[u8]) -> Result<(), PublishError> {
        self.shared.submit(Job { name, path: path.to_owned(), limit: MAX_DATABASE })
    }

    /// Waits until everything is stored.
    pub(super) fn finish(mut self) -> Result<(), PublishError> {
        self.settle()
    }

    /// Waits for the objects, then stores the catalogs that refer to them.
    fn settle(&mut self) -> Result<(), PublishError> {
        self.shared.wait()?;
        self.known.clear();
        for (name, file) in self.held_back.drain(..) {
            self.shared.store(&name, &file)?;
            if self.options.replica.object_size(&name)?.is_none() {
                return Err(PublishError::damaged(name.path(), "was stored in the replica and is not there"));
            }
        }
        Ok(())
    }

    /// Hands everything that a catalog names to the workers.
    fn catalog(&mut self, name: ObjectName, path: &[u8], stored: &Path) -> Result<ReadCatalog, PublishError> {
        let damaged = |error: &dyn std::error::Error| PublishError::damaged(name.path(), chain(error));
        let plain = self.file("plain");
        inflate(stored, &plain).map_err(|error| damaged(&error))?;
        let catalog = Catalog::open(&plain).map_err(|error| damaged(&error))?;
        let _ = fs::remove_file(&plain);
        if catalog.root_prefix() != path {
            let reason = format!("its root prefix is {}", shown(catalog.root_prefix()));
            return Err(PublishError::damaged(name.path(), reason));
        }
        let mut failure = None;
        let mut chunked = Vec::new();
        let visited = catalog.for_each(|entry| {
            let entry = entry?;
            if failure.is_none() && !entry.is_external() {
                if let Some(hash) = entry.hash {
                    let job = (ObjectName::new(hash, ObjectKind::File), entry.size);
                    failure = self.object(job, path, &entry.name).err();
                }
                if entry.is_chunked() {
                    chunked.push((entry.path_hash, entry.algorithm(), entry.name));
                }
            }
            Ok(())
        });
        failure.map_or(Ok(()), Err)?;
        visited.map_err(|error| damaged(&error))?;
        for (path_hash, algorithm, file) in chunked {
            for chunk in catalog.chunks(path_hash, algorithm).map_err(|error| damaged(&error))? {
                self.object((ObjectName::new(chunk.hash, ObjectKind::Chunk), chunk.size), path, &file)?;
            }
        }
        let nested = catalog.nested().map_err(|error| damaged(&error))?;
        Ok(ReadCatalog {
            previous: catalog.previous(),
            nested: nested.into_iter().map(|nested| (nested.path, nested.hash)).collect(),
        })
    }

    fn object(
        &mut self,
        (name, plain): (ObjectName, u64),
        catalog: &[u8],
        file: &[u8],
    ) -> Result<(), PublishError> {
        if self.known.len() >= MAX_REMEMBERED {
            self.known.clear();
        }
        if !self.known.insert(name) {
            return Ok(());
        }
        let path = [catalog, b"/\xe2\x80\xa6/", file].concat();
        self.shared.submit(Job { name, path, limit: largest_stored(plain) })
    }

    /// The predecessor of a root catalog that the replica has.
    fn predecessor(&mut self, name: ObjectName) -> Result<Option<ContentHash>, PublishError> {
        let file = self.file("present");
        crate::head::unpack_database(&*self.options.replica, name, &file)?;
        let catalog =
            Catalog::open(&file).map_err(|error| PublishError::damaged(name.path(), chain(&error)))?;
        let _ = fs::remove_file(&file);
        Ok(catalog.previous())
    }

    fn file(&mut self, kind: &str) -> PathBuf {
        self.next_file += 1;
        self.scratch.file(&format!("{kind}.{}", self.next_file))
    }
}

impl Drop for Copy<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closed = true;
        state.queue.clear();
        drop(state);
        self.shared.work.notify_all();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn submit(&self, job: Job) -> Result<(), PublishError> {
        let mut state = self.lock();
        while state.queue.len() >= MAX_QUEUED && state.failure.is_none() {
            state = self.progress.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(failure) = state.failure.take() {
            return Err(failure);
        }
        state.queue.push_back(job);
        drop(state);
        self.work.notify_one();
        Ok(())
    }

    fn wait(&self) -> Result<(), PublishError> {
        let mut state = self.lock();
        while state.failure.is_none() && (state.in_flight > 0 || !state.queue.is_empty()) {
            state = self.progress.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.failure.take().map_or(Ok(()), Err)
    }

    fn work_until_closed(&self, number: usize) {
        let file = self.directory.join(format!("object.{number}"));
        loop {
            let mut state = self.lock();
            let job = loop {
                if state.closed {
                    return;
                }
                if let Some(job) = state.queue.pop_front() {
                    break job;
                }
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            };
            state.in_flight += 1;
            drop(state);
            let outcome = self.copy(&job, &file);
            let mut state = self.lock();
            state.in_flight -= 1;
            if let Err(error) = outcome {
                state.queue.clear();
                state.failure.get_or_insert(error);
            }
            drop(state);
            self.progress.notify_all();
        }
    }

    fn copy(&self, job: &Job, file: &Path) -> Result<(), PublishError> {
        self.interrupt.check()?;
        self.counters.entries.fetch_add(1, Ordering::Relaxed);
        if self.replica.object_size(&job.name)?.is_some() {
            return Ok(());
        }
        self.fetch(&job.name, &job.path, job.limit, file)?;
        self.store(&job.name, file)
    }

    /// Puts a verified file into the replica.
    fn store(&self, name: &ObjectName, file: &Path) -> Result<(), PublishError> {
        let size = fs::metadata(file).map_err(PublishError::local("read", file))?.len();
        let put = self.replica.put_object_file(name, file)?;
        self.counters.count(put, usize::try_from(size).unwrap_or(usize::MAX));
        if put == Put::Present {
            let _ = fs::remove_file(file);
        }
        Ok(())
    }

    /// Fetches an object into a file and verifies its hash.
    fn fetch(&self, name: &ObjectName, path: &[u8], limit: u64, file: &Path) -> Result<(), PublishError> {
        let mut pause = FIRST_PAUSE;
        for attempt in 1.. {
            let failure = match self.fetch_once(name, limit, file) {
                Ok(()) => return Ok(()),
                Err(PublishError::Storage(error)) if error.is_not_found() => {
                    let path = if path.is_empty() { "/".to_owned() } else { shown(path) };
                    let reason = format!("is missing at {} and needed for {path}", self.source.location());
                    return Err(PublishError::damaged(name.path(), reason));
                }
                Err(error) => error,
            };
            if attempt == ATTEMPTS || !matches!(failure, PublishError::Damaged { .. }) {
                return Err(failure);
            }
            tracing::debug!(object = name.path(), reason = chain(&failure), "fetching again");
            std::thread::sleep(pause);
            pause *= 2;
        }
        Err(PublishError::damaged(name.path(), "was not fetched"))
    }

    fn fetch_once(&self, name: &ObjectName, limit: u64, file: &Path) -> Result<(), PublishError> {
        let damaged = |reason: String| {
            PublishError::damaged(format!("{} of {}", name.path(), self.source.location()), reason)
        };
        let mut stored = self.source.open_object(name)?;
        let mut out =
            BufWriter::with_capacity(PIECE, File::create(file).map_err(PublishError::local("create", file))?);
        let mut hasher = Hasher::new(name.hash.algorithm);
        let mut piece = vec![0; PIECE];
        let mut length = 0_u64;
        loop {
            self.interrupt.check()?;
            let read = stored.read(&mut piece).map_err(|error| damaged(chain(&error)))?;
            if read == 0 {
                break;
            }
            length += read as u64;
            if length > limit {
                return Err(damaged(format!("has more than the {limit} bytes that its catalog allows")));
            }
            self.counters.bytes_in.fetch_add(read as u64, Ordering::Relaxed);
            hasher.update(&piece[..read]);
            out.write_all(&piece[..read]).map_err(PublishError::local("write", file))?;
        }
        out.flush().map_err(PublishError::local("write", file))?;
        if hasher.finish() != name.hash {
            return Err(damaged(format!(
                "the {length} bytes received do not have the hash that is its name"
            )));
        }
        Ok(())
    }
}

/// Inflates a stored database.
fn inflate(stored: &Path, plain: &Path) -> Result<(), PublishError> {
    let mut input = File::open(stored).map_err(PublishError::local("read", stored))?;
    let mut out = BufWriter::new(File::create(plain).map_err(PublishError::local("create", plain))?);
    let mut inflater = Inflater::new(Compression::Zlib, MAX_DATABASE);
    let mut piece = vec![0; PIECE];
    let broken = |error: &dyn std::error::Error| PublishError::damaged("catalog", chain(error));
    loop {
        let read = input.read(&mut piece).map_err(PublishError::local("read", stored))?;
        if read == 0 {
            break;
        }
        inflater.write(&piece[..read], &mut out).map_err(|error| broken(&error))?;
    }
    inflater.finish().map_err(|error| broken(&error))?;
    out.flush().map_err(PublishError::local("write", plain))
}
