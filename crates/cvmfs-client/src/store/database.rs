//! Whether a cached database file is whole.
//!
//! Catalogs and history databases are opened without a reliable statement of their size (errata 17), and after a power
//! cut a file may be cut short. The header of an SQLite file says how long it is.

use std::os::unix::fs::FileExt;

use crate::cache::CachedFile;

/// First bytes of an SQLite file.
const MAGIC: &[u8] = b"SQLite format 3\0";
/// Bytes of the header that are looked at.
const HEADER: usize = 100;

/// False if `file` is an SQLite database that is shorter or longer than its header says. Other files pass: whoever
/// opens them as a database will say what is wrong with them.
pub(super) fn is_whole(file: &CachedFile) -> bool {
    let mut header = [0; HEADER];
    if file.size < HEADER as u64
        || file.file.read_exact_at(&mut header, 0).is_err()
        || !header.starts_with(MAGIC)
    {
        return true;
    }
    let number = |at: usize| {
        let bytes = header.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).unwrap_or_default();
        u64::from(u32::from_be_bytes(bytes))
    };
    let page = match u64::from(u16::from_be_bytes([header[16], header[17]])) {
        1 => 65536,
        page => page,
    };
    if page < 512 {
        return true;
    }
    // The page count is valid if it was written by the last change (SQLite file format §1.3.7).
    let (change_counter, pages, valid_for) = (number(24), number(28), number(92));
    let is_counted = change_counter == valid_for && pages > 0;
    if is_counted { page * pages == file.size } else { file.size.is_multiple_of(page) }
}
