//! A file on its way into the cache.
//!
//! It is written under a temporary name and renamed when it is complete and verified. The temporary file is locked
//! as long as its writer lives, so that whatever a killed process left behind can be told from work in progress
//! and removed, in whichever container or process-id namespace either runs.
//!
//! When there is no room the file becomes volatile: it has no name and vanishes with its last descriptor. It is then
//! served to those who wait for it, and not kept.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FlockOperation, MemfdFlags, flock};
use rustix::io::Errno;

use super::{Cache, CacheName, CachedFile, TXN, space};

/// Bytes announced ahead of the writing when the size is not known.
const STEP: u64 = 8 * 1024 * 1024;
/// Most bytes of all volatile files in memory, the last resort when every partition is full.
const MAX_MEMORY: u64 = 256 * 1024 * 1024;

/// A file that is being written and not in the cache yet. Dropping it leaves nothing behind.
#[derive(Debug)]
pub(crate) struct Txn {
    cache: Cache,
    file: File,
    /// Opened while the name is certain, so that the reader's descriptor cannot write.
    reader: File,
    /// The temporary name; `None` once the file is volatile.
    path: Option<PathBuf>,
    written: u64,
    announced: u64,
    memory: Option<Arc<Lease>>,
}

impl Txn {
    /// Begins a file of `expected` bytes, if that is known. Makes room for it.
    pub(super) fn begin(cache: &Cache, expected: Option<u64>) -> io::Result<Self> {
        let first = expected.unwrap_or(0);
        let reservation = cache.0.space.reserve(space::charge(first));
        let is_kept = reservation.is_ok();
        let announced = reservation.map_or(0, space::Reservation::keep);
        let created = create(cache);
        let mut txn = match created {
            Ok((file, reader, path)) => Self {
                cache: cache.clone(),
                file,
                reader,
                path: Some(path),
                written: 0,
                announced,
                memory: None,
            },
            Err(error) => {
                cache.0.space.settle(announced);
                if !is_full(&error) {
                    return Err(error);
                }
                let (file, reader, memory) = spill()?;
                Self { cache: cache.clone(), file, reader, path: None, written: 0, announced: 0, memory }
            }
        };
        if !is_kept {
            txn.make_volatile();
        }
        Ok(txn)
    }

    /// Forgets what was written.
    pub(crate) fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.written = 0;
        Ok(())
    }

    /// Moves the file into the cache under `name`, or hands it out without a name if there was no room.
    pub(crate) fn commit(mut self, name: &CacheName) -> io::Result<CachedFile> {
        let size = self.written;
        let path = self.path.take();
        if let Some(path) = path {
            match std::fs::rename(&path, self.cache.path(name)) {
                Ok(()) => self.cache.stored(space::charge(size)),
                // The cache directory was removed under us: the file is whole, it is only not kept.
                Err(error) if error.kind() == io::ErrorKind::NotFound => self.cache.restore_layout(),
                Err(error) if is_full(&error) => drop(std::fs::remove_file(&path)),
                Err(error) => {
                    let _ = std::fs::remove_file(&path);
                    return Err(error);
                }
            }
        }
        let reader = self.reader.try_clone()?;
        Ok(CachedFile { file: reader, size, memory: self.memory.clone() })
    }

    fn make_volatile(&mut self) {
        if let Some(path) = self.path.take() {
            let _ = std::fs::remove_file(path);
        }
    }

    /// Announces more when more is written than was announced.
    fn announce(&mut self, more: u64) {
        if self.path.is_none() || self.written + more <= self.announced {
            return;
        }
        let reserved = self.cache.0.space.reserve(STEP.max(more)).map(space::Reservation::keep);
        match reserved {
            Ok(bytes) => self.announced += bytes,
            Err(space::NoRoom) => self.make_volatile(),
        }
    }

    /// The partition is full: makes room and tries again, then continues elsewhere with what is written so far.
    fn write_when_full(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.memory.is_none() && self.cache.0.space.relieve(bytes.len() as u64 + self.written) {
            match self.file.write(bytes) {
                Err(error) if is_full(&error) => {}
                outcome => return outcome,
            }
        }
        let (mut file, reader, memory) = spill()?;
        if let Some(memory) = &memory {
            memory.extend(self.written + bytes.len() as u64)?;
        }
        let mut offset = 0;
        let mut buffer = vec![0; 64 * 1024];
        while offset < self.written {
            let wanted =
                usize::try_from((self.written - offset).min(buffer.len() as u64)).unwrap_or(buffer.len());
            let piece = buffer.get_mut(..wanted).unwrap_or_default();
            self.file.read_exact_at(piece, offset)?;
            file.write_all(piece)?;
            offset += wanted as u64;
        }
        self.make_volatile();
        (self.file, self.reader, self.memory) = (file, reader, memory);
        self.file.write(bytes)
    }
}

impl Write for Txn {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.announce(bytes.len() as u64);
        if let Some(memory) = &self.memory {
            memory.extend(bytes.len() as u64)?;
        }
        let written = match self.file.write(bytes) {
            Err(error) if is_full(&error) => self.write_when_full(bytes),
            outcome => outcome,
        }?;
        self.written += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Txn {
    fn drop(&mut self) {
        self.make_volatile();
        self.cache.0.space.settle(self.announced);
    }
}

/// Whether the error says that the partition, its inodes or a quota are exhausted.
pub(crate) fn is_full(error: &io::Error) -> bool {
    let full = [Errno::NOSPC, Errno::DQUOT].map(Errno::raw_os_error);
    error.raw_os_error().is_some_and(|code| full.contains(&code))
}

/// A locked temporary file, the same file for reading, and its name.
fn create(cache: &Cache) -> io::Result<(File, File, PathBuf)> {
    /// Distinguishes the files of one process; the process is told apart by the rest of the name.
    static SEQUENCE: AtomicU64 = AtomicU64::new(0);
    let mut restored = false;
    loop {
        let number = SEQUENCE.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}-{:x}-{number}", std::process::id(), cache.0.instance);
        let path = cache.0.directory.join(TXN).join(name);
        let file = match OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !restored => {
                cache.restore_layout();
                restored = true;
                continue;
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            Err(error) => return Err(error),
        };
        flock(&file, FlockOperation::LockExclusive)?;
        // Somebody who cleans up may have removed the file before it was locked.
        if file.metadata()?.nlink() == 0 {
            continue;
        }
        let reader = File::open(&path)?;
        return Ok((file, reader, path));
    }
}

/// A nameless file outside the cache: in the directory for temporary files, or in memory.
fn spill() -> io::Result<(File, File, Option<Arc<Lease>>)> {
    if let Ok(file) = tempfile::NamedTempFile::new()
        && let Ok(reader) = file.reopen()
        && has_free_space(file.as_file())
    {
        let file = file.into_file();
        return Ok((file, reader, None));
    }
    let memory = rustix::fs::memfd_create("cvmfs-volatile", MemfdFlags::CLOEXEC)?;
    let file = File::from(memory);
    let reader = file.try_clone()?;
    Ok((file, reader, Some(Arc::new(Lease(AtomicU64::new(0))))))
}

/// Whether the partition of a temporary file has room that is worth the move.
fn has_free_space(file: &File) -> bool {
    const WORTHWHILE: u64 = 64 * 1024 * 1024;
    rustix::fs::fstatvfs(file).is_ok_and(|stat| stat.f_bavail.saturating_mul(stat.f_frsize) >= WORTHWHILE)
}

/// A share of the memory for volatile files, given back when the last holder of the file is gone.
#[derive(Debug)]
pub(super) struct Lease(AtomicU64);

/// Bytes of all leases.
static LEASED: AtomicU64 = AtomicU64::new(0);

impl Lease {
    fn extend(&self, bytes: u64) -> io::Result<()> {
        let total = LEASED.fetch_add(bytes, Ordering::SeqCst) + bytes;
        self.0.fetch_add(bytes, Ordering::SeqCst);
        if total > MAX_MEMORY { Err(Errno::NOSPC.into()) } else { Ok(()) }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        LEASED.fetch_sub(self.0.load(Ordering::SeqCst), Ordering::SeqCst);
    }
}
