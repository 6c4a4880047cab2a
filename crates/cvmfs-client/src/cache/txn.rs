//! A file on its way into the cache.
//!
//! It is written under a temporary name in this process's own directory ([`super::presence`]) and gets its final
//! name when it is complete and verified.
//!
//! When there is no room, or the disk takes no more for whatever reason, the file becomes volatile
//! ([`super::volatile`]): it is served to those who wait for it, and not kept.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::io::Errno;

use super::directory::{Open, Temporary};
use super::seal::{Checksum, Seal};
use super::space::{Reservation, charge};
use super::volatile::{Lease, in_memory, spill};
use super::{Cache, CacheName, CachedFile, Kind};

/// Bytes announced ahead of the writing when the size is not known.
const STEP: u64 = 8 * 1024 * 1024;
/// Largest file that goes to memory when it is not kept anyway.
const SMALL: u64 = 256 * 1024;

/// What a file will be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Draft<'a> {
    /// Its name in the cache.
    pub(crate) name: &'a CacheName,
    pub(crate) kind: Kind,
    /// Its size, if that is known.
    pub(crate) expected: Option<u64>,
    /// Where it belongs, for people.
    pub(crate) hint: Option<&'a str>,
    /// Whether it shall stay in the cache.
    pub(crate) keep: bool,
}

/// A file that is being written and not in the cache yet. Dropping it leaves nothing behind.
#[derive(Debug)]
pub(crate) struct Txn {
    cache: Cache,
    open: Arc<Open>,
    name: CacheName,
    kind: Kind,
    hint: Option<Box<str>>,
    keep: bool,
    file: File,
    /// The temporary name; `None` once the file is volatile.
    temporary: Option<Temporary>,
    /// Of a volatile file: a descriptor that cannot write, made while the file had a name.
    reader: Option<File>,
    checksum: Checksum,
    written: u64,
    reservation: Option<Reservation>,
    memory: Option<Arc<Lease>>,
}

impl Txn {
    /// Begins a file and makes room for it.
    ///
    /// # Errors
    /// `EROFS` if the cache takes nothing in.
    pub(super) fn begin(cache: &Cache, draft: Draft<'_>) -> io::Result<Self> {
        let expected = draft.expected.unwrap_or(0);
        if cache.is_memory() {
            return Self::in_memory(cache, draft);
        }
        if !draft.keep {
            return Self::unkept(cache, draft);
        }
        if cache.is_read_only() {
            return Err(Errno::ROFS.into());
        }
        let reservation = cache.space().reserve(charge(expected));
        let mut txn = match create(cache, draft) {
            Ok((open, file, temporary)) => Self::new(cache, draft, open, file, Some(temporary)),
            Err(error) if is_unwritable(&error) => {
                let (file, memory) = spill()?;
                Self::nameless(cache, draft, file, memory)
            }
            Err(error) => return Err(error),
        };
        match reservation {
            Ok(reservation) => txn.reservation = Some(reservation),
            Err(_) => txn.make_volatile(),
        }
        Ok(txn)
    }

    /// A file that is not kept.
    fn unkept(cache: &Cache, draft: Draft<'_>) -> io::Result<Self> {
        if draft.expected.is_some_and(|expected| expected <= SMALL) {
            return Self::in_memory(cache, draft);
        }
        match create(cache, draft) {
            Ok((open, file, temporary)) => {
                let mut txn = Self::new(cache, draft, open, file, Some(temporary));
                txn.make_volatile();
                Ok(txn)
            }
            Err(_) => {
                let (file, memory) = spill()?;
                Ok(Self::nameless(cache, draft, file, memory))
            }
        }
    }

    fn in_memory(cache: &Cache, draft: Draft<'_>) -> io::Result<Self> {
        let (file, lease) = in_memory()?;
        Ok(Self::nameless(cache, draft, file, Some(lease)))
    }

    fn nameless(cache: &Cache, draft: Draft<'_>, file: File, memory: Option<Arc<Lease>>) -> Self {
        let mut txn = Self::new(cache, draft, cache.directory_now(), file, None);
        txn.memory = memory;
        txn
    }

    fn new(
        cache: &Cache,
        draft: Draft<'_>,
        open: Arc<Open>,
        file: File,
        temporary: Option<Temporary>,
    ) -> Self {
        Self {
            cache: cache.clone(),
            open,
            name: draft.name.clone(),
            kind: draft.kind,
            hint: draft.hint.map(Box::from),
            keep: draft.keep,
            file,
            temporary,
            reader: None,
            checksum: Checksum::new(),
            written: 0,
            reservation: None,
            memory: None,
        }
    }

    /// Forgets what was written.
    pub(crate) fn restart(&mut self) -> io::Result<()> {
        if self.written > 0 {
            self.file.set_len(0)?;
            self.file.seek(SeekFrom::Start(0))?;
            self.written = 0;
            self.checksum = Checksum::new();
        }
        Ok(())
    }

    /// Gives the file its name, or hands it out without one if it cannot be kept.
    pub(crate) fn commit(self) -> io::Result<CachedFile> {
        let (cache, name, kind, hint) = (self.cache.clone(), self.name.clone(), self.kind, self.hint.clone());
        let is_kept = self.keep;
        let file = self.place()?;
        if is_kept {
            cache.stored(&name, kind, hint.as_deref(), &file);
        }
        Ok(file)
    }

    /// The same, in this cache alone and in no lower one.
    pub(super) fn place(mut self) -> io::Result<CachedFile> {
        let size = self.written;
        let reader = match (self.temporary.take(), self.reader.take()) {
            (Some(temporary), _) => self.publish(&temporary)?,
            (None, Some(reader)) => reader,
            (None, None) => self.file.try_clone()?,
        };
        Ok(CachedFile { file: reader, size, memory: self.memory.clone() })
    }

    fn publish(&mut self, temporary: &Temporary) -> io::Result<File> {
        let hint = self.hint.as_deref();
        if self.cache.is_sealing() {
            let is_catalog = self.kind == Kind::Catalog;
            Seal::put(&self.file, self.checksum.value(), hint, is_catalog, self.cache.sealing());
        }
        let reader = match self.open.reopen(temporary) {
            Ok(reader) => reader,
            // The cache directory was removed under us; the file is whole.
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.file.try_clone()?,
            Err(error) => {
                self.open.discard(temporary);
                return Err(error);
            }
        };
        let mut outcome = self.open.publish(temporary, &self.name);
        if outcome.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            outcome = self.cache.restore(&self.open).and_then(|_| self.open.publish(temporary, &self.name));
        }
        match outcome {
            Ok(()) => {
                if let Some(reservation) = self.reservation.take() {
                    reservation.stored(charge(self.written));
                }
                self.cache.mark_verified(&self.name);
            }
            Err(error) => {
                tracing::debug!(file = self.name.as_str(), %error, "a file is served and not kept");
                self.open.discard(temporary);
            }
        }
        Ok(reader)
    }

    fn make_volatile(&mut self) {
        if let Some(temporary) = self.temporary.take() {
            self.reader = self.open.reopen(&temporary).ok();
            self.open.discard(&temporary);
        }
        self.reservation = None;
    }

    /// Announces more when more is written than was announced.
    fn announce(&mut self, more: u64) {
        if self.temporary.is_none() || !self.cache.is_bounded() {
            return;
        }
        let announced = self.reservation.as_ref().map_or(0, Reservation::bytes);
        if self.written + more <= announced {
            return;
        }
        match (self.cache.space().reserve(STEP.max(more)), &mut self.reservation) {
            (Ok(further), Some(reservation)) => reservation.join(further),
            (Ok(further), none) => *none = Some(further),
            (Err(_), _) => self.make_volatile(),
        }
    }

    /// The disk takes no more: makes room and tries again, then continues elsewhere with what is written so far.
    fn write_elsewhere(&mut self, bytes: &[u8], error: &io::Error) -> io::Result<usize> {
        let is_here = self.memory.is_none() && self.temporary.is_some();
        if is_here && is_full(error) && self.cache.relieve(bytes.len() as u64 + self.written) {
            match self.file.write(bytes) {
                Err(error) if is_unwritable(&error) => {}
                outcome => return outcome,
            }
        }
        let (mut file, memory) = spill()?;
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
        self.reader = None;
        (self.file, self.memory) = (file, memory);
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
            Err(error) if is_unwritable(&error) => self.write_elsewhere(bytes, &error),
            outcome => outcome,
        }?;
        self.checksum.update(bytes.get(..written).unwrap_or_default());
        self.written += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Txn {
    fn drop(&mut self) {
        if let Some(temporary) = self.temporary.take() {
            self.open.discard(&temporary);
        }
    }
}

/// Whether the error says that the partition, its inodes or a quota are exhausted.
pub(crate) fn is_full(error: &io::Error) -> bool {
    let full = [Errno::NOSPC, Errno::DQUOT].map(Errno::raw_os_error);
    error.raw_os_error().is_some_and(|code| full.contains(&code))
}

/// Whether the error says that this disk takes nothing more: it is full, broken, or was made read-only, as file systems
/// are after errors. Readers then get their bytes elsewhere.
fn is_unwritable(error: &io::Error) -> bool {
    let broken = [Errno::IO, Errno::ROFS, Errno::NXIO, Errno::STALE].map(Errno::raw_os_error);
    is_full(error) || error.raw_os_error().is_some_and(|code| broken.contains(&code))
}

/// A temporary file, in a directory that is made anew if it is gone.
fn create(cache: &Cache, draft: Draft<'_>) -> io::Result<(Arc<Open>, File, Temporary)> {
    let mut open = cache.directory_now();
    let mut is_restored = false;
    loop {
        match open.create(Some(draft.name), draft.kind) {
            Ok((file, temporary)) => return Ok((open, file, temporary)),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !is_restored => {
                open = cache.restore(&open)?;
                is_restored = true;
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
}
