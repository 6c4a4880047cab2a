//! Verifying stored objects, each once, on all cores.

use std::io::{self, Read};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use cvmfs_format::{Compression, Hasher, Inflater, ObjectName};

use super::{Check, CheckOptions, ProblemKind, Use};

/// Reading is as much of the work as hashing, so a few more threads than cores keep both busy.
const EXTRA_THREADS: usize = 2;
/// Stored bytes are read in pieces of this size.
const PIECE: usize = 256 << 10;

type Found = (ProblemKind, String);

impl Check<'_> {
    /// Verifies everything in `uses`; returns the stored bytes looked at.
    pub(super) fn verify_objects(&mut self) -> u64 {
        let mut work: Vec<(&ObjectName, &Use)> = self.uses.iter().collect();
        // in the order of the storage's directories
        work.sort_unstable_by_key(|(name, _)| **name);
        let threads = (self.options.storage.writers() + EXTRA_THREADS).min(work.len());
        let next = AtomicUsize::new(0);
        let bytes = AtomicU64::new(0);
        let found: Mutex<Vec<(usize, Found)>> = Mutex::default();
        let verify = || {
            let mut piece = vec![0; PIECE];
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some((name, expected)) = work.get(index) else { return };
                match verify(self.options, name, expected, &mut piece) {
                    Ok(length) => {
                        bytes.fetch_add(length, Ordering::Relaxed);
                    }
                    Err(problem) => {
                        found.lock().unwrap_or_else(PoisonError::into_inner).push((index, problem));
                    }
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(verify);
            }
        });
        let mut found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
        found.sort_unstable_by(|(a, _), (b, _)| work[*a].1.path.cmp(&work[*b].1.path).then(a.cmp(b)));
        for (index, (kind, message)) in found {
            let (name, expected) = work[index];
            self.findings.add(kind, &expected.path, Some(name), message);
        }
        bytes.into_inner()
    }
}

/// The stored size of a sound object.
fn verify(options: &CheckOptions, name: &ObjectName, expected: &Use, piece: &mut [u8]) -> Result<u64, Found> {
    let corrupt = |message: String| (ProblemKind::Corrupt, message);
    let missing = || (ProblemKind::Missing, "the object is missing".to_owned());
    if !options.contents {
        let size = options.storage.object_size(name).map_err(|error| corrupt(error.to_string()))?;
        return size.ok_or_else(missing);
    }
    let mut stored = match options.storage.open_object(name) {
        Ok(stored) => stored,
        Err(error) if error.is_not_found() => return Err(missing()),
        Err(error) => return Err(corrupt(crate::workspace::chain(&error))),
    };
    let mut hasher = Hasher::new(name.hash.algorithm);
    let mut inflater = Inflater::new(Compression::Zlib, expected.plain_size);
    let mut inflated = Ok(());
    let mut length = 0u64;
    loop {
        let read = match stored.read(piece) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(corrupt(format!("cannot be read: {error}"))),
        };
        length += read as u64;
        options.counters.bytes_in.fetch_add(read as u64, Ordering::Relaxed);
        hasher.update(&piece[..read]);
        if expected.compression == Compression::Zlib && inflated.is_ok() {
            inflated = inflater.write(&piece[..read], &mut io::sink());
        }
    }
    // the hash first: it tells damage on disk from a wrong catalog
    if hasher.finish() != name.hash {
        return Err(corrupt(format!(
            "the {length} stored bytes do not have the hash that is the object's name"
        )));
    }
    let plain = match expected.compression {
        Compression::None => length,
        Compression::Zlib => inflated
            .and_then(|()| inflater.finish())
            .map_err(|error| corrupt(format!("cannot be inflated: {error}")))?,
    };
    if plain != expected.plain_size {
        return Err(corrupt(format!("has {plain} plain bytes, the catalog says {}", expected.plain_size)));
    }
    Ok(length)
}
