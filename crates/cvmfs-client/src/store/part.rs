//! A partly present file on disk: the file's bytes, with holes, and behind them a map of the chunks that are there,
//! with the checksum of each.
//!
//! Nothing is flushed to the disk, so after a power cut the map may promise what the disk does not hold. It is
//! believed only while the machine has not been started again, and the file begins anew otherwise. Map and bytes
//! are one file, so no crash can pair a map with the wrong bytes. When all chunks are there the map is cut off and
//! the file gets its final name, under which it is an ordinary file of the cache.
//!
//! Several processes may work on one part. They write the same verified bytes to the same places, one at a time
//! under a file lock, and none writes after the map was cut off.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use cvmfs_format::catalog::Chunk;

use crate::cache::{Cache, CacheName, CachedFile, Kind, boot, combine, is_full, is_same_file, lock};

/// First bytes of the map; changed when the layout changes.
const MAGIC: [u8; 8] = *b"cvmfsP02";
/// Magic, boot id, size of the file, number of chunks. An entry for each chunk follows.
const HEADER: u64 = 8 + 16 + 8 + 8;
/// 1 if the chunk is present, and the checksum of its bytes.
const ENTRY: u64 = 1 + 4;
/// Longest wait for another process that stores a chunk of the same file.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub(super) struct Part {
    cache: Cache,
    name: CacheName,
    path: PathBuf,
    size: u64,
    /// For writing chunks and the map.
    file: File,
    /// For reading.
    reader: File,
    kind: Kind,
    chunks: Box<[State]>,
    missing: AtomicUsize,
    /// File locks exclude processes, this excludes the threads of this one.
    storing: Mutex<()>,
}

/// What is known of a chunk.
#[derive(Debug)]
struct State {
    size: u64,
    is_present: AtomicBool,
    checksum: AtomicU32,
}

/// What became of a chunk.
pub(super) enum Stored {
    /// It is in the file.
    Kept,
    /// There was no room: it must be served from memory.
    NoRoom,
}

impl Part {
    /// Opens the part of a file of `size` bytes in these chunks, creating it if it is not there.
    pub(super) fn open(
        cache: &Cache,
        name: &CacheName,
        kind: Kind,
        size: u64,
        chunks: &[Chunk],
    ) -> io::Result<Self> {
        let path = cache.chunked_directory().join(format!("{}.part", name.as_str()));
        let open =
            || OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = match open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                cache.restore_layout();
                open()?
            }
            outcome => outcome?,
        };
        let reader = File::open(&path)?;
        if !is_same_file(&file, &reader.metadata()?) {
            return Err(io::Error::other("file was replaced while it was opened"));
        }
        cache.touch(&path);
        let mut part = Self {
            cache: cache.clone(),
            name: name.clone(),
            path,
            size,
            file,
            reader,
            kind,
            chunks: chunks
                .iter()
                .map(|chunk| State {
                    size: chunk.size,
                    is_present: AtomicBool::new(false),
                    checksum: AtomicU32::new(0),
                })
                .collect(),
            missing: AtomicUsize::new(chunks.len()),
            storing: Mutex::new(()),
        };
        if !lock::exclusive(&part.file, LOCK_PATIENCE) {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "file is locked by a process that does not go on",
            ));
        }
        let outcome = part.load_map();
        lock::release(&part.file);
        outcome?;
        Ok(part)
    }

    pub(super) fn is_complete(&self) -> bool {
        self.missing.load(Ordering::Acquire) == 0
    }

    pub(super) fn is_present(&self, chunk: usize) -> bool {
        self.chunks.get(chunk).is_some_and(|state| state.is_present.load(Ordering::Acquire))
    }

    /// Looks into the map whether another process has stored the chunk meanwhile.
    pub(super) fn look_up(&self, chunk: usize) -> bool {
        if !self.is_present(chunk) {
            let mut entry = [0; ENTRY as usize];
            match self.file.read_exact_at(&mut entry, self.entry_offset(chunk)) {
                Ok(()) => self.learn(chunk, entry),
                // The map was cut off: that is done to complete files only.
                Err(_) if self.file.metadata().is_ok_and(|metadata| metadata.len() == self.size) => {
                    self.mark_all();
                }
                Err(_) => {}
            }
        }
        self.is_present(chunk)
    }

    /// Reads bytes of chunks that are present.
    pub(super) fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.reader.read_exact_at(buffer, offset)
    }

    /// Stores the verified bytes of a chunk.
    pub(super) fn store(&self, chunk: usize, offset: u64, bytes: &[u8]) -> io::Result<Stored> {
        let Some(charge) = self.cache.charge(bytes.len() as u64) else { return Ok(Stored::NoRoom) };
        let _here = self.storing.lock().unwrap_or_else(PoisonError::into_inner);
        if !lock::exclusive(&self.file, LOCK_PATIENCE) {
            return Ok(Stored::NoRoom);
        }
        let outcome = self.store_locked(chunk, offset, bytes);
        lock::release(&self.file);
        match outcome {
            Err(error) if is_full(&error) => Ok(Stored::NoRoom),
            Err(error) => Err(error),
            Ok(()) => {
                charge.stored();
                Ok(Stored::Kept)
            }
        }
    }

    /// The complete file.
    pub(super) fn complete_file(&self) -> io::Result<Option<CachedFile>> {
        if !self.is_complete() {
            return Ok(None);
        }
        Ok(Some(CachedFile::new(self.reader.try_clone()?, self.size)))
    }

    fn store_locked(&self, chunk: usize, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if self.file.metadata()?.len() != self.full_length() {
            // Another process had the last missing chunk: the file is complete, and ours is in it already.
            self.mark_all();
            return Ok(());
        }
        match self.file.write_all_at(bytes, offset) {
            Err(error) if is_full(&error) && self.cache.relieve(bytes.len() as u64) => {
                self.file.write_all_at(bytes, offset)?;
            }
            outcome => outcome?,
        }
        let [a, b, c, d] = libdeflater::crc32(bytes).to_le_bytes();
        let entry = [1, a, b, c, d];
        self.file.write_all_at(&entry, self.entry_offset(chunk))?;
        self.learn(chunk, entry);
        if !self.is_complete() {
            // Other processes may have stored the rest.
            self.read_map()?;
        }
        if self.is_complete() { self.publish() } else { Ok(()) }
    }

    /// Gives the complete file its final name.
    fn publish(&self) -> io::Result<()> {
        self.file.set_len(self.size)?;
        let checksum = self
            .chunks
            .iter()
            .fold(0, |before, chunk| combine(before, chunk.checksum.load(Ordering::Relaxed), chunk.size));
        self.cache.seal(&self.file, self.kind, checksum, None);
        // The part may have been evicted and begun anew by somebody else under the same name. It is moved to a name
        // of our own first, where it can be compared with the file that we know to be complete.
        let moved = self.cache.temporary_path("assembled");
        if std::fs::rename(&self.path, &moved).is_err() {
            return Ok(());
        }
        if is_same_file(&self.file, &std::fs::symlink_metadata(&moved)?) {
            std::fs::rename(&moved, self.cache.path(&self.name))
        } else {
            std::fs::rename(&moved, &self.path)
        }
    }

    fn map_offset(&self) -> u64 {
        self.size.next_multiple_of(4096)
    }

    fn full_length(&self) -> u64 {
        self.entry_offset(self.chunks.len())
    }

    fn entry_offset(&self, chunk: usize) -> u64 {
        self.map_offset() + HEADER + chunk as u64 * ENTRY
    }

    fn header(&self) -> Vec<u8> {
        let boot = boot::id().unwrap_or_default();
        let (size, chunks) = (self.size.to_le_bytes(), (self.chunks.len() as u64).to_le_bytes());
        [&MAGIC[..], &boot, &size, &chunks].concat()
    }

    /// Believes the map if it was written since the machine was started, and begins anew otherwise.
    fn load_map(&mut self) -> io::Result<()> {
        let mut found = vec![0; self.header().len()];
        let is_whole = self.file.metadata()?.len() == self.full_length()
            && self.file.read_exact_at(&mut found, self.map_offset()).is_ok();
        if is_whole && boot::id().is_some() && found == self.header() {
            return self.read_map();
        }
        self.file.set_len(0)?;
        self.file.set_len(self.full_length())?;
        self.file.write_all_at(&self.header(), self.map_offset())
    }

    fn read_map(&self) -> io::Result<()> {
        let mut map = vec![0; self.chunks.len() * ENTRY as usize];
        self.file.read_exact_at(&mut map, self.entry_offset(0))?;
        for (chunk, entry) in map.as_chunks().0.iter().enumerate() {
            self.learn(chunk, *entry);
        }
        Ok(())
    }

    fn learn(&self, chunk: usize, [is_present, checksum @ ..]: [u8; ENTRY as usize]) {
        if is_present == 1 {
            if let Some(state) = self.chunks.get(chunk) {
                state.checksum.store(u32::from_le_bytes(checksum), Ordering::Relaxed);
            }
            self.mark(chunk);
        }
    }

    fn mark_all(&self) {
        (0..self.chunks.len()).for_each(|chunk| self.mark(chunk));
    }

    fn mark(&self, chunk: usize) {
        if let Some(state) = self.chunks.get(chunk)
            && !state.is_present.swap(true, Ordering::AcqRel)
        {
            self.missing.fetch_sub(1, Ordering::AcqRel);
        }
    }
}
