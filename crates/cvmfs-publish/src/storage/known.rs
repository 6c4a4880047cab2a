//! Which contents are objects already, so that publishing them again costs no compression.
//!
//! An object is named by its stored bytes, so whether a content is there can only be told by compressing it, which
//! takes most of the time of a publish. This table, a file in the scratch area of a storage directory, remembers for
//! each content that was stored lately the object that it became, under its SHA-256 and all that its stored form
//! depends on. It is a hint: whoever uses it looks whether the object is there with its size, which is what storing
//! it again would do as well. A record that is damaged or torn is not found, a lost file only costs time.
//!
//! The file has a fixed size, of which the parts in use take disk space.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use cvmfs_format::{Compression, ContentHash, Deflate, HashAlgorithm, ObjectKind, ObjectName};
use sha2::{Digest, Sha256};

use crate::pipeline::Encoding;

/// Records: 64 MiB in all.
const RECORDS: u64 = 1 << 20;
/// Bytes of a record: 24 of its key, 20 of the object's hash, 8 of its size, 4 of a checksum, and zeros.
const RECORD: usize = 64;
const KEY: usize = 24;
const DIGEST: usize = 20;
/// Records among which one is looked for.
const WAYS: usize = 4;
const SET: usize = RECORD * WAYS;

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
        let mut hasher = Sha256::new();
        hasher.update([algorithm, compression, u8::from(kind == ObjectKind::Chunk)]);
        hasher.update(plain);
        Content(hasher.finalize().into())
    }

    fn key(&self) -> &[u8] {
        self.0.get(..KEY).unwrap_or_default()
    }

    /// Where its set begins in the file.
    fn place(&self) -> u64 {
        let tail = self.0.last_chunk().map_or(0, |tail| u64::from_le_bytes(*tail));
        tail % (RECORDS / WAYS as u64) * SET as u64
    }
}

/// See the module documentation.
#[derive(Debug)]
pub struct Known {
    file: File,
}

impl Known {
    /// Uses `file`, whatever it contains.
    pub(crate) fn new(file: File) -> io::Result<Known> {
        file.set_len(RECORDS * RECORD as u64)?;
        Ok(Known { file })
    }

    /// The object that the content became when it was stored, and its stored size in bytes.
    pub(crate) fn find(
        &self,
        content: &Content,
        kind: ObjectKind,
        algorithm: HashAlgorithm,
    ) -> Option<(ObjectName, u64)> {
        let set = self.read(content)?;
        let record = set.chunks_exact(RECORD).find(|record| record.starts_with(content.key()))?;
        if *record != seal(record.get(..KEY + DIGEST + 8)?) {
            return None;
        }
        let digest = record.get(KEY..KEY + DIGEST)?.try_into().ok()?;
        let size = record.get(KEY + DIGEST..)?.first_chunk().map(|size| u64::from_le_bytes(*size))?;
        Some((ObjectName::new(ContentHash { algorithm, digest }, kind), size))
    }

    /// Remembers what the content became. What cannot be written is not remembered.
    pub(crate) fn remember(&self, content: &Content, name: &ObjectName, size: u64) {
        let Some(set) = self.read(content) else { return };
        let is_own = |record: &[u8]| record.starts_with(content.key());
        let is_free = |record: &[u8]| record.iter().all(|byte| *byte == 0);
        let position = |wanted: &dyn Fn(&[u8]) -> bool| set.chunks_exact(RECORD).position(wanted);
        // The content chooses whom a full set forgets.
        let way = position(&is_own).or_else(|| position(&is_free));
        let way = way.unwrap_or_else(|| usize::from(content.0.first().copied().unwrap_or(0)) % WAYS);
        let fields = [content.key(), &name.hash.digest, &size.to_le_bytes()].concat();
        let place = content.place() + (way * RECORD) as u64;
        if let Err(error) = self.file.write_all_at(&seal(&fields), place) {
            tracing::debug!(%error, "a stored content is not remembered");
        }
    }

    fn read(&self, content: &Content) -> Option<[u8; SET]> {
        let mut set = [0; SET];
        match self.file.read_exact_at(&mut set, content.place()) {
            Ok(()) => Some(set),
            Err(error) => {
                tracing::debug!(%error, "what was stored cannot be looked up");
                None
            }
        }
    }
}

/// The record with these fields.
fn seal(fields: &[u8]) -> [u8; RECORD] {
    let mut record = [0; RECORD];
    let checksum = Sha256::digest(fields);
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
        for byte in 0..RECORD as u64 {
            let mut original = [0];
            file.read_exact_at(&mut original, content.place() + byte).unwrap();
            file.write_all_at(&[original[0] ^ 4], content.place() + byte).unwrap();
            assert_eq!(known.find(&content, ObjectKind::File, SHA1), None, "byte {byte}");
            file.write_all_at(&original, content.place() + byte).unwrap();
        }
        assert!(known.find(&content, ObjectKind::File, SHA1).is_some());
    }

    #[test]
    fn more_than_fits_is_forgotten_and_never_mixed_up() {
        let known = Known::new(tempfile::tempfile().unwrap()).unwrap();
        // All in one set.
        let contents: Vec<Content> = (0..40_u8)
            .map(|number| {
                let mut bytes = [7; 32];
                bytes[0] = number;
                bytes[KEY..].fill(0);
                Content(bytes)
            })
            .collect();
        for (number, content) in contents.iter().enumerate() {
            known.remember(content, &object(&[number as u8]), number as u64);
        }
        let found: Vec<usize> = (0..contents.len())
            .filter(|number| {
                let found = known.find(&contents[*number], ObjectKind::File, SHA1);
                assert!(found.is_none_or(|found| found == (object(&[*number as u8]), *number as u64)));
                found.is_some()
            })
            .collect();
        assert_eq!(found.len(), WAYS, "{found:?}");
    }
}
