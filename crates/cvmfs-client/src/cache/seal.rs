//! The seal of a cached file: a checksum of its bytes, and what they are.
//!
//! An object's name is the hash of its *stored*, mostly compressed bytes, so the decompressed file in the cache cannot
//! be compared with its name. Its checksum is noted in an extended attribute while it is written; a flipped bit
//! on the disk is found with it, when a small file is opened for the first time and by `fsck`. It is a guard against
//! decay, not against somebody with write access to the cache.
//!
//! Where the file system has no extended attributes files are not sealed, and only their size is checked.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{XattrFlags, fgetxattr, fsetxattr};
use rustix::io::Errno;

/// The attribute's name.
const NAME: &str = "user.cvmfs";
/// Changed when the layout changes.
const VERSION: u8 = 1;
/// Version and checksum; the hint follows.
const HEADER: usize = 5;
/// Longest hint of an object: with it the attribute still fits into a 256 byte inode of ext4.
const MAX_HINT: usize = 48;
/// Longest hint of a catalog: there are few.
const MAX_CATALOG_HINT: usize = 1000;
/// Bytes read at a time.
const PIECE: usize = 128 * 1024;

/// A checksum (CRC-32) in the making.
pub(super) struct Checksum(libdeflater::Crc);

impl Checksum {
    pub(super) fn new() -> Self {
        Self(libdeflater::Crc::new())
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(super) fn value(&self) -> u32 {
        self.0.sum()
    }
}

impl std::fmt::Debug for Checksum {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Checksum({:08x})", self.value())
    }
}

/// What was noted when a file was stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seal {
    pub(super) checksum: u32,
    /// Where the file belongs, for people.
    pub(super) hint: Option<String>,
}

/// How a file compares with its seal.
#[derive(Debug)]
pub(super) enum Verdict {
    Whole,
    /// There is no seal to compare with.
    Unsealed,
    Damaged,
    /// The disk does not give the bytes.
    Unreadable(io::Error),
}

impl Seal {
    /// Seals `file`. Nothing is done once it is known that the file system cannot.
    pub(super) fn put(file: &File, checksum: u32, hint: Option<&str>, is_catalog: bool, able: &AtomicBool) {
        if !able.load(Ordering::Relaxed) {
            return;
        }
        let hint = tail(hint.unwrap_or_default(), if is_catalog { MAX_CATALOG_HINT } else { MAX_HINT });
        let mut value = Vec::with_capacity(HEADER + hint.len());
        value.push(VERSION);
        value.extend_from_slice(&checksum.to_le_bytes());
        value.extend_from_slice(hint.as_bytes());
        let outcome = fsetxattr(file, NAME, &value, XattrFlags::empty());
        // Without room for the seal the file is as good as on a file system without seals.
        if matches!(outcome, Err(Errno::OPNOTSUPP | Errno::PERM | Errno::NOSYS)) {
            able.store(false, Ordering::Relaxed);
        }
    }

    pub(super) fn of(file: impl AsFd) -> Option<Self> {
        let mut value = [0_u8; HEADER + MAX_CATALOG_HINT];
        let length = fgetxattr(file, NAME, &mut value[..]).ok()?;
        let (version, rest) = value.get(..length)?.split_first()?;
        let (checksum, hint) = rest.split_first_chunk::<4>()?;
        let hint = (!hint.is_empty()).then(|| String::from_utf8_lossy(hint).into_owned());
        (*version == VERSION).then(|| Self { checksum: u32::from_le_bytes(*checksum), hint })
    }

    /// Reads all of `file` and compares it with its seal.
    pub(super) fn check(file: &File) -> Verdict {
        let Some(seal) = Self::of(file) else { return Verdict::Unsealed };
        match checksum_of(file) {
            Ok(found) if found == seal.checksum => Verdict::Whole,
            Ok(_) => Verdict::Damaged,
            Err(error) => Verdict::Unreadable(error),
        }
    }
}

/// The checksum of a file's bytes.
pub(super) fn checksum_of(file: &File) -> io::Result<u32> {
    let mut checksum = Checksum::new();
    for_each_piece(file, &mut |piece| checksum.update(piece))?;
    Ok(checksum.value())
}

/// Reads a file from its beginning to its end.
pub(super) fn for_each_piece(file: &File, each: &mut dyn FnMut(&[u8])) -> io::Result<()> {
    thread_local! {
        static BUFFER: std::cell::RefCell<Box<[u8]>> = std::cell::RefCell::new(vec![0; PIECE].into_boxed_slice());
    }
    BUFFER.with_borrow_mut(|buffer| {
        let mut offset = 0;
        loop {
            match file.read_at(buffer, offset) {
                Ok(0) => return Ok(()),
                Ok(length) => {
                    each(buffer.get(..length).unwrap_or_default());
                    offset += length as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    })
}

/// The checksum of two pieces one after the other, of which the second has `length` bytes.
///
/// A CRC is the remainder of the bytes as a polynomial over GF(2): appending `length` bytes multiplies the first
/// remainder by x^(8 · length).
pub(crate) fn combine(first: u32, second: u32, length: u64) -> u32 {
    /// The polynomial of CRC-32, bits reversed, and x⁰ in that notation.
    const POLYNOMIAL: u32 = 0xEDB8_8320;
    const ONE: u32 = 1 << 31;
    let multiply = |left: u32, mut right: u32| {
        let mut product = 0;
        for bit in (0..32).rev() {
            if left >> bit & 1 == 1 {
                product ^= right;
            }
            right = if right & 1 == 1 { right >> 1 ^ POLYNOMIAL } else { right >> 1 };
        }
        product
    };
    // x^8 by squaring x three times, then x^8 to the power of the length.
    let mut square = (0..3).fold(ONE >> 1, |power, _| multiply(power, power));
    let mut power = ONE;
    let mut exponent = length;
    while exponent > 0 {
        if exponent & 1 == 1 {
            power = multiply(square, power);
        }
        square = multiply(square, square);
        exponent >>= 1;
    }
    multiply(power, first) ^ second
}

/// The end of `text`, which tells more than its beginning, in at most `bytes` bytes.
fn tail(text: &str, bytes: usize) -> String {
    const CUT: &str = "…";
    if text.len() <= bytes {
        return text.to_owned();
    }
    let mut start = text.len() - (bytes - CUT.len());
    while !text.is_char_boundary(start) {
        start += 1;
    }
    format!("{CUT}{}", text.get(start..).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn sealed(bytes: &[u8], hint: &str) -> File {
        let mut file = tempfile::tempfile_in(std::env::current_dir().unwrap()).unwrap();
        file.write_all(bytes).unwrap();
        let mut checksum = Checksum::new();
        checksum.update(bytes);
        Seal::put(&file, checksum.value(), Some(hint), false, &AtomicBool::new(true));
        file
    }

    #[test]
    fn a_changed_byte_breaks_the_seal() {
        let file = sealed(&[7; 300_000], "/bin/ls");
        assert!(matches!(Seal::check(&file), Verdict::Whole));
        assert_eq!(Seal::of(&file).unwrap().hint.as_deref(), Some("/bin/ls"));
        file.write_all_at(&[6], 299_999).unwrap();
        assert!(matches!(Seal::check(&file), Verdict::Damaged));
        file.set_len(299_999).unwrap();
        assert!(matches!(Seal::check(&file), Verdict::Damaged));
    }

    #[test]
    fn checksums_of_pieces_make_the_checksum_of_the_whole() {
        let whole: Vec<u8> = (0..100_000_u32).map(|number| ((number * 7) >> 3) as u8).collect();
        for at in [0, 1, 4096, 65_537, 100_000] {
            let (first, second) = whole.split_at(at);
            let combined =
                combine(libdeflater::crc32(first), libdeflater::crc32(second), second.len() as u64);
            assert_eq!(combined, libdeflater::crc32(&whole), "cut at {at}");
        }
    }

    #[test]
    fn a_file_without_a_seal_says_so() {
        let file = tempfile::tempfile_in(std::env::current_dir().unwrap()).unwrap();
        assert!(matches!(Seal::check(&file), Verdict::Unsealed));
    }

    #[test]
    fn of_a_long_hint_the_end_is_kept() {
        let long = format!("/{}/ä/last", "x".repeat(100));
        let hint = Seal::of(sealed(b"", &long)).unwrap().hint.unwrap();
        assert!(hint.starts_with('…') && hint.ends_with("/last") && hint.len() <= MAX_HINT, "{hint}");
    }
}
