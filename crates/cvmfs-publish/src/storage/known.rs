//! Which contents are objects already, so that publishing them again costs no compression.
//!
//! An object is named by its stored bytes, so whether a content is there can only be told by compressing it, which
//! takes most of the time of a publish. This table, a file in the scratch area of a storage directory, remembers for
//! each content that was stored lately the object that it became, under its BLAKE3 hash and all that its stored form
//! depends on. It is a hint: whoever uses it looks whether the object is there with its size, which is what storing
//! it again would do as well. A record that is damaged or torn is not found, a lost file only costs time.
//!
//! The file is a ring of records, so that a publish writes its records one behind the other and not all over the
//! disk: a header with the next place, a *mark* of four bytes for each record, which are read at once to find
//! records by, and the records. The newest overwrite the oldest. Records are written in batches; what a killed
//! publisher had not yet written is not remembered. One publisher at a time uses the file, by the storage's lock.

use std::collections::HashMap;
use std::fs::File;
use std::hash::{BuildHasherDefault, Hasher};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cvmfs_format::{Compression, ContentHash, Deflate, HashAlgorithm, ObjectKind, ObjectName};

use crate::pipeline::Encoding;

/// Records: 64 MiB in all.
const RECORDS: usize = 1 << 20;
/// Bytes of a record: 24 of its key, 20 of the object's hash, 8 of its size, 4 of a checksum, and zeros.
const RECORD: usize = 64;
const KEY: usize = 24;
const DIGEST: usize = 20;
/// Begins the file, and changes with its layout.
const MAGIC: &[u8; 8] = b"known 3\n";
/// Magic, place of the next record, number of records in use.
const HEADER: usize = 8 + 4 + 4;
const MARKS_AT: u64 = 4096;
const MARK: usize = 4;
const RECORDS_AT: u64 = MARKS_AT + (RECORDS * MARK) as u64;
/// Records that are written at once.
const BATCH: usize = 1024;

/// A content, with all that its stored form depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Content([u8; 32]);

impl Content {
    /// `plain` as an object of this kind would be stored with this encoding.
    pub(crate) fn of(kind: ObjectKind, encoding: Encoding, plain: &[u8]) -> Content {
        let algorithm = match encoding.algorithm {
            HashAlgorithm::Sha1 => 1,
            HashAlgorithm::Ripemd160 => 2,
            HashAlgorithm::Shake128 => 3,
        };
        let compression = match (encoding.compression, encoding.deflate) {
            (Compression::None, _) => 1,
            (Compression::Zlib, Deflate::Stock) => 2,
            (Compression::Zlib, Deflate::Fast) => 3,
        };
        let mut hasher = blake3::Hasher::new();
        hasher.update(&[algorithm, compression, u8::from(kind == ObjectKind::Chunk)]);
        hasher.update(plain);
        Content(hasher.finalize().into())
    }

    fn key(&self) -> &[u8] {
        self.0.get(..KEY).unwrap_or_default()
    }

    /// What the record is found by in memory; two contents with the same mark are told apart by their keys.
    fn mark(&self) -> u32 {
        self.0.last_chunk().map_or(0, |tail| u32::from_le_bytes(*tail))
    }
}

/// See the module documentation.
#[derive(Debug)]
pub struct Known {
    file: File,
    ring: Mutex<Ring>,
}

#[derive(Debug, Default)]
struct Ring {
    /// Of each record in use, by place.
    marks: Vec<u32>,
    /// The newest record with a mark.
    places: HashMap<u32, u32, BuildHasherDefault<MarkHasher>>,
    /// Where the next record goes.
    next: usize,
    /// Records that are not in the file yet; they end before `next`.
    batch: Vec<[u8; RECORD]>,
}

impl Known {
    /// Uses `file`, whatever it contains.
    pub(crate) fn new(file: File) -> io::Result<Known> {
        let ring = Ring::read(&file)?;
        if ring.marks.is_empty() {
            file.set_len(0)?;
        }
        Ok(Known { file, ring: Mutex::new(ring) })
    }

    /// The object that the content became when it was stored, and its stored size in bytes.
    pub(crate) fn find(
        &self,
        content: &Content,
        kind: ObjectKind,
        algorithm: HashAlgorithm,
    ) -> Option<(ObjectName, u64)> {
        let record = self.record(content.mark())?;
        if !record.starts_with(content.key()) || record != seal(record.get(..KEY + DIGEST + 8)?) {
            return None;
        }
        let digest = record.get(KEY..KEY + DIGEST)?.try_into().ok()?;
        let size = record.get(KEY + DIGEST..)?.first_chunk().map(|size| u64::from_le_bytes(*size))?;
        Some((ObjectName::new(ContentHash { algorithm, digest }, kind), size))
    }

    /// Remembers what the content became. What cannot be written is not remembered.
    pub(crate) fn remember(&self, content: &Content, name: &ObjectName, size: u64) {
        let record = seal(&[content.key(), &name.hash.digest, &size.to_le_bytes()].concat());
        let mut ring = self.lock();
        ring.add(content.mark(), record);
        if ring.batch.len() >= BATCH || ring.next == RECORDS {
            self.write(&mut ring);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(&self, mark: u32) -> Option<[u8; RECORD]> {
        let ring = self.lock();
        let place = *ring.places.get(&mark)? as usize;
        let first_waiting = ring.next - ring.batch.len();
        if (first_waiting..ring.next).contains(&place) {
            return ring.batch.get(place - first_waiting).copied();
        }
        drop(ring);
        let mut record = [0; RECORD];
        match self.file.read_exact_at(&mut record, RECORDS_AT + (place * RECORD) as u64) {
            Ok(()) => Some(record),
            Err(error) => {
                tracing::debug!(%error, "what was stored cannot be looked up");
                None
            }
        }
    }

    fn write(&self, ring: &mut Ring) {
        if let Err(error) = ring.write(&self.file) {
            tracing::debug!(%error, "stored contents are not remembered");
        }
        ring.batch.clear();
        ring.next %= RECORDS;
    }
}

impl Drop for Known {
    fn drop(&mut self) {
        let mut ring = self.lock();
        self.write(&mut ring);
    }
}

impl Ring {
    /// Empty unless the file begins as one of ours.
    fn read(file: &File) -> io::Result<Ring> {
        let mut header = [0; HEADER];
        let read = file.read_exact_at(&mut header, 0);
        if read.as_ref().is_err_and(|error| error.kind() != io::ErrorKind::UnexpectedEof) {
            read?;
        }
        let number = |at: usize| -> Option<usize> {
            let bytes = header.get(at..)?.first_chunk()?;
            usize::try_from(u32::from_le_bytes(*bytes)).ok()
        };
        let (Some(next), Some(used)) = (number(8), number(12)) else { return Ok(Ring::default()) };
        if !header.starts_with(MAGIC) || used > RECORDS || next > used || next == RECORDS {
            return Ok(Ring::default());
        }
        let mut bytes = vec![0; used * MARK];
        if let Err(error) = file.read_exact_at(&mut bytes, MARKS_AT) {
            tracing::debug!(%error, "the table of stored contents begins anew");
            return Ok(Ring::default());
        }
        let marks: Vec<u32> = bytes
            .chunks_exact(MARK)
            .filter_map(|mark| mark.first_chunk())
            .map(|mark| u32::from_le_bytes(*mark))
            .collect();
        // From the oldest to the newest.
        let places = (next..used).chain(0..next).filter_map(|place| Some((*marks.get(place)?, place as u32)));
        Ok(Ring { places: places.collect(), next, batch: Vec::new(), marks })
    }

    fn add(&mut self, mark: u32, record: [u8; RECORD]) {
        let place = self.next as u32;
        match self.marks.get_mut(self.next) {
            Some(oldest) => {
                if self.places.get(oldest) == Some(&place) {
                    self.places.remove(oldest);
                }
                *oldest = mark;
            }
            None => self.marks.push(mark),
        }
        self.places.insert(mark, place);
        self.batch.push(record);
        self.next += 1;
    }

    /// Writes the batch; the header last, so that what it counts is there.
    fn write(&self, file: &File) -> io::Result<()> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let first = self.next - self.batch.len();
        let marks = self.marks.get(first..self.next).unwrap_or_default();
        let marks: Vec<u8> = marks.iter().flat_map(|mark| mark.to_le_bytes()).collect();
        file.write_all_at(self.batch.as_flattened(), RECORDS_AT + (first * RECORD) as u64)?;
        file.write_all_at(&marks, MARKS_AT + (first * MARK) as u64)?;
        let mut header = MAGIC.to_vec();
        header.extend(((self.next % RECORDS) as u32).to_le_bytes());
        header.extend((self.marks.len() as u32).to_le_bytes());
        file.write_all_at(&header, 0)
    }
}

/// Marks are parts of digests: all that is left to do is to spread them over a word.
#[derive(Debug, Default)]
struct MarkHasher(u64);

impl Hasher for MarkHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32(u32::from(*byte));
        }
    }

    fn write_u32(&mut self, mark: u32) {
        self.0 = (self.0 ^ u64::from(mark)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

/// The record with these fields.
fn seal(fields: &[u8]) -> [u8; RECORD] {
    let mut record = [0; RECORD];
    let checksum = *blake3::hash(fields).as_bytes();
    let bytes = fields.iter().chain(checksum.iter().take(4));
    record.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    record
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHA1: HashAlgorithm = HashAlgorithm::Sha1;
    const ENCODING: Encoding =
        Encoding { algorithm: SHA1, compression: Compression::Zlib, deflate: Deflate::Fast };

    fn object(bytes: &[u8]) -> ObjectName {
        ObjectName::new(ContentHash::of(SHA1, bytes), ObjectKind::File)
    }

    #[test]
    fn what_is_remembered_is_found_by_its_content_and_encoding_and_survives_the_process() {
        let file = tempfile::tempfile().unwrap();
        let known = Known::new(file.try_clone().unwrap()).unwrap();
        let content = Content::of(ObjectKind::File, ENCODING, b"content");
        assert_eq!(known.find(&content, ObjectKind::File, SHA1), None);
        known.remember(&content, &object(b"content"), 17);
        assert!(known.find(&content, ObjectKind::File, SHA1).is_some());
        drop(known);
        let known = Known::new(file).unwrap();
        assert_eq!(known.find(&content, ObjectKind::File, SHA1), Some((object(b"content"), 17)));
        let stock = Encoding { deflate: Deflate::Stock, ..ENCODING };
        for other in [
            Content::of(ObjectKind::File, ENCODING, b"other"),
            Content::of(ObjectKind::File, stock, b"content"),
            Content::of(ObjectKind::Chunk, ENCODING, b"content"),
        ] {
            assert_eq!(known.find(&other, ObjectKind::File, SHA1), None);
        }
    }

    #[test]
    fn a_record_with_a_flipped_bit_is_not_found() {
        let file = tempfile::tempfile().unwrap();
        let known = Known::new(file.try_clone().unwrap()).unwrap();
        let content = Content::of(ObjectKind::File, ENCODING, b"content");
        known.remember(&content, &object(b"content"), 17);
        drop(known);
        for byte in RECORDS_AT..RECORDS_AT + RECORD as u64 {
            let mut original = [0];
            file.read_exact_at(&mut original, byte).unwrap();
            file.write_all_at(&[original[0] ^ 4], byte).unwrap();
            let known = Known::new(file.try_clone().unwrap()).unwrap();
            assert_eq!(known.find(&content, ObjectKind::File, SHA1), None, "byte {byte}");
            file.write_all_at(&original, byte).unwrap();
        }
        let known = Known::new(file).unwrap();
        assert!(known.find(&content, ObjectKind::File, SHA1).is_some());
    }

    #[test]
    fn a_file_with_anything_else_in_it_is_an_empty_table_that_works() {
        let beyond = [MAGIC.as_slice(), &u32::MAX.to_le_bytes(), &u32::MAX.to_le_bytes()].concat();
        let short = [MAGIC.as_slice(), &0_u32.to_le_bytes(), &(RECORDS as u32).to_le_bytes()].concat();
        for content in [b"x".to_vec(), vec![0xa5; 9000], beyond, short] {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(&content, 0).unwrap();
            let known = Known::new(file.try_clone().unwrap()).unwrap();
            let content = Content::of(ObjectKind::File, ENCODING, b"content");
            assert_eq!(known.find(&content, ObjectKind::File, SHA1), None);
            known.remember(&content, &object(b"content"), 17);
            drop(known);
            let known = Known::new(file).unwrap();
            assert!(known.find(&content, ObjectKind::File, SHA1).is_some());
        }
    }

    #[test]
    fn the_newest_push_out_the_oldest_and_nothing_is_mixed_up() {
        let file = tempfile::tempfile().unwrap();
        let extra = BATCH + 10;
        let content = |number: usize| {
            let mut bytes = [0; 32];
            bytes[..8].copy_from_slice(&number.to_le_bytes());
            // Some share their marks with a neighbour.
            bytes[24..].copy_from_slice(&((number / 2 * 2) as u64 * 0x1_0000_0001).to_be_bytes());
            if number % 100 != 1 {
                bytes[31] ^= number as u8 & 1;
            }
            Content(bytes)
        };
        let known = Known::new(file.try_clone().unwrap()).unwrap();
        let name = object(b"x");
        for number in 0..RECORDS + extra {
            known.remember(&content(number), &name, number as u64);
        }
        let check = |known: &Known| {
            let size = |number| known.find(&content(number), ObjectKind::File, SHA1).map(|found| found.1);
            for number in [0, 2, extra - 1] {
                assert_eq!(size(number), None, "{number} was pushed out");
            }
            for number in [extra, extra + 1, RECORDS - 2, RECORDS, RECORDS + extra - 1] {
                assert_eq!(size(number), Some(number as u64));
            }
        };
        check(&known);
        drop(known);
        assert!(file.metadata().unwrap().len() <= RECORDS_AT + (RECORDS * RECORD) as u64);
        check(&Known::new(file).unwrap());
    }
}
