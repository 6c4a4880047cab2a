//! The one pass over an object's bytes: hash what is stored, inflate, write what is plain.

use std::io;

use cvmfs_format::compression::{Compression, InflateError, Inflater, inflate_known};
use cvmfs_format::hash::{ContentHash, Hasher, ObjectKind, ObjectName};

use crate::cache::{Txn, is_full};
use crate::network::{Sink, SinkError};

/// Most plain bytes of a catalog or history database whose size is not stated anywhere that can be relied on
/// (errata 17). The largest in the field have some hundred MiB.
const MAX_DATABASE: u64 = 2 << 30;
/// Bytes that a database may have however small it is said to be.
const MIN_DATABASE: u64 = 64 << 20;
/// Most bytes of a certificate or of metainfo.
const MAX_DOCUMENT: u64 = 1 << 20;
/// Most plain bytes of a file without a stated size. Callers state it; this only bounds a mistake.
const MAX_FILE: u64 = 1 << 40;

/// The object to fetch and what is known about it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    pub(super) name: ObjectName,
    pub(super) compression: Compression,
    /// Plain bytes.
    pub(super) size: Option<u64>,
    /// Plain bytes as somebody says who may be wrong.
    pub(super) hint: Option<u64>,
}

impl Wanted {
    /// Most plain bytes.
    pub(super) fn max_plain(&self) -> u64 {
        self.size.unwrap_or(match self.name.kind {
            ObjectKind::Catalog | ObjectKind::History => match self.hint {
                Some(hint) => hint.saturating_mul(4).clamp(MIN_DATABASE, MAX_DATABASE),
                None => MAX_DATABASE,
            },
            ObjectKind::Certificate | ObjectKind::Metainfo => MAX_DOCUMENT,
            _ => MAX_FILE,
        })
    }

    /// Most stored bytes: deflate adds at most about one thousandth, and bytes after the end of a stream are
    /// tolerated (errata 7); anything beyond this slack is not the object.
    pub(super) fn max_stored(&self) -> u64 {
        let plain = self.max_plain();
        match self.compression {
            Compression::None => plain,
            _ => plain.saturating_add(plain / 8).saturating_add(64 * 1024),
        }
    }
}

/// A body in memory: hashed while it arrives and inflated in one go when it is complete, which takes half of the time
/// of inflating piece by piece.
pub(super) struct InMemory {
    wanted: Wanted,
    size: u64,
    state: Option<Hasher>,
    body: Vec<u8>,
    plain: Vec<u8>,
}

impl InMemory {
    /// Largest object that is always held in memory.
    pub(super) const SMALL: u64 = 256 * 1024;

    /// For an object of `size` plain bytes. It takes twice as much memory, and little more.
    pub(super) fn new(wanted: Wanted, size: u64) -> Self {
        Self { wanted, size, state: None, body: Vec::new(), plain: Vec::new() }
    }

    /// The plain bytes; only valid after [`Sink::finish`] succeeded.
    pub(super) fn into_plain(self) -> Vec<u8> {
        self.plain
    }
}

impl Sink for InMemory {
    fn begin(&mut self) -> Result<(), SinkError> {
        self.body.clear();
        self.state = Some(Hasher::new(self.wanted.name.hash.algorithm));
        Ok(())
    }

    fn write(&mut self, piece: &[u8]) -> Result<(), SinkError> {
        if let Some(hasher) = &mut self.state {
            hasher.update(piece);
        }
        self.body.extend_from_slice(piece);
        Ok(())
    }

    fn finish(&mut self) -> Result<(), SinkError> {
        let hasher = self.state.take().ok_or_else(|| corrupt("body without a beginning"))?;
        check_hash(hasher.finish(), self.wanted.name.hash)?;
        let body = std::mem::take(&mut self.body);
        self.plain = match self.wanted.compression {
            Compression::None => body,
            packed => inflate_known(packed, &body, self.size)
                .map_err(|error| SinkError::Corrupt(error.to_string()))?,
        };
        check_size(self.plain.len() as u64, Some(self.size))
    }
}

fn corrupt(reason: &str) -> SinkError {
    SinkError::Corrupt(reason.to_owned())
}

fn check_hash(found: ContentHash, expected: ContentHash) -> Result<(), SinkError> {
    if found == expected {
        Ok(())
    } else {
        Err(SinkError::Corrupt(format!("content hash is {found} instead of {expected}")))
    }
}

fn check_size(plain: u64, expected: Option<u64>) -> Result<(), SinkError> {
    match expected {
        Some(size) if size != plain => {
            Err(SinkError::Corrupt(format!("{plain} plain bytes instead of {size}")))
        }
        _ => Ok(()),
    }
}

/// Where plain bytes go.
pub(super) trait Target: io::Write + Send {
    /// Forget everything so far.
    fn restart(&mut self) -> io::Result<()>;
}

impl Target for Txn {
    fn restart(&mut self) -> io::Result<()> {
        Txn::restart(self)
    }
}

/// Verifies a body against the name of its object while inflating it into a target.
pub(super) struct Verified<T> {
    wanted: Wanted,
    state: Option<(Hasher, Inflater)>,
    target: T,
}

impl<T: Target> Verified<T> {
    pub(super) fn new(wanted: Wanted, target: T) -> Self {
        Self { wanted, state: None, target }
    }

    /// The plain bytes; only valid after [`Sink::finish`] succeeded.
    pub(super) fn into_target(self) -> T {
        self.target
    }
}

impl<T: Target> Sink for Verified<T> {
    fn begin(&mut self) -> Result<(), SinkError> {
        self.target.restart().map_err(local)?;
        let hasher = Hasher::new(self.wanted.name.hash.algorithm);
        self.state = Some((hasher, Inflater::new(self.wanted.compression, self.wanted.max_plain())));
        Ok(())
    }

    fn write(&mut self, piece: &[u8]) -> Result<(), SinkError> {
        let Some((hasher, inflater)) = &mut self.state else {
            return Err(corrupt("body without a beginning"));
        };
        hasher.update(piece);
        inflater.write(piece, &mut self.target).map_err(|error| match error {
            InflateError::Write(error) => local(error),
            other => SinkError::Corrupt(other.to_string()),
        })
    }

    fn finish(&mut self) -> Result<(), SinkError> {
        let Some((hasher, inflater)) = self.state.take() else {
            return Err(corrupt("body without a beginning"));
        };
        check_hash(hasher.finish(), self.wanted.name.hash)?;
        let plain = inflater.finish().map_err(|error| SinkError::Corrupt(error.to_string()))?;
        check_size(plain, self.wanted.size)
    }
}

fn local(error: io::Error) -> SinkError {
    if is_full(&error) { SinkError::NoSpace(error.to_string()) } else { SinkError::Local(error) }
}
