//! What differs between two revisions, as far as catalogs of the older one were in use.
//!
//! Kernels are told of it, so it errs on the side of too much: where the newer catalog of a sub-tree is not loaded,
//! every row of the older one counts as changed.

use std::cmp::Ordering;

use cvmfs_format::PathHash;
use cvmfs_format::catalog::Entry;

use crate::deadline::Deadline;
use crate::error::ClientError;
use crate::snapshot::{AttachedCatalog, Snapshot};

/// Pieces in which two catalogs are compared, which bounds the rows in memory.
const PIECES: u32 = 256;

/// A name that may mean something else now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change<'a> {
    /// Path hash of the directory that holds the name.
    pub parent: PathHash,
    /// The name.
    pub name: &'a [u8],
    /// Path hash of the entry.
    pub path: PathHash,
    /// Whether it is or was a directory.
    pub is_directory: bool,
    /// Whether both revisions were compared; otherwise it may well be unchanged.
    pub is_certain: bool,
}

/// Calls `visit` with each name that differs between `old` and `new`, in no particular order.
///
/// # Errors
/// If an older catalog cannot be read again; the changes of the others have been visited.
pub fn changes(
    old: &Snapshot,
    new: &Snapshot,
    deadline: Deadline,
    visit: &mut dyn FnMut(&Change<'_>),
) -> Result<(), ClientError> {
    let mut outcome = Ok(());
    let newer = new.attached();
    for catalog in old.attached() {
        let successor = newer.iter().find(|other| other.mountpoint() == catalog.mountpoint());
        let compared = match successor {
            Some(successor) if successor.hash() == catalog.hash() => continue,
            Some(successor) => compare((old, &catalog), (new, successor), deadline, visit),
            None => each_row(old, &catalog, deadline, visit),
        };
        if outcome.is_ok() {
            outcome = compared;
        }
    }
    outcome
}

fn compare(
    (old, before): (&Snapshot, &AttachedCatalog),
    (new, after): (&Snapshot, &AttachedCatalog),
    deadline: Deadline,
    visit: &mut dyn FnMut(&Change<'_>),
) -> Result<(), ClientError> {
    for piece in 0..PIECES {
        let (low, high) = bounds(piece);
        let (gone, come) = (old.rows(before, low, high, deadline)?, new.rows(after, low, high, deadline)?);
        let (mut gone, mut come) = (gone.iter().peekable(), come.iter().peekable());
        loop {
            let order = match (gone.peek(), come.peek()) {
                (None, None) => break,
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some(one), Some(other)) => key(one).cmp(&key(other)),
            };
            let one = (order != Ordering::Greater).then(|| gone.next()).flatten();
            let other = (order != Ordering::Less).then(|| come.next()).flatten();
            match (one, other) {
                (Some(one), Some(other)) if is_same(one, other) => {}
                (Some(row), Some(other)) => {
                    visit(&change(row, row.is_directory() || other.is_directory(), true));
                    if row.name != other.name {
                        visit(&change(other, other.is_directory(), true));
                    }
                }
                (Some(row), None) | (None, Some(row)) => visit(&change(row, row.is_directory(), true)),
                (None, None) => {}
            }
        }
    }
    Ok(())
}

fn each_row(
    old: &Snapshot,
    catalog: &AttachedCatalog,
    deadline: Deadline,
    visit: &mut dyn FnMut(&Change<'_>),
) -> Result<(), ClientError> {
    for piece in 0..PIECES {
        let (low, high) = bounds(piece);
        for row in old.rows(catalog, low, high, deadline)? {
            visit(&change(&row, row.is_directory(), false));
        }
    }
    Ok(())
}

fn change(row: &Entry, is_directory: bool, is_certain: bool) -> Change<'_> {
    Change { parent: row.parent, name: &row.name, path: row.path_hash, is_directory, is_certain }
}

/// Rows are sorted by both halves of the path hash, as signed numbers.
fn key(row: &Entry) -> (i64, i64) {
    (row.path_hash.part1, row.path_hash.part2)
}

/// Whether a row shows the same in both revisions. The content of a chunked file is not in its row.
fn is_same(one: &Entry, other: &Entry) -> bool {
    let other = Entry { rowid: one.rowid, ..other.clone() };
    *one == other && !one.is_chunked()
}

/// The range of first path hash halves of a piece.
fn bounds(piece: u32) -> (i64, i64) {
    let width = u64::MAX / u64::from(PIECES) + 1;
    let low = (u64::from(piece) * width) ^ (1 << 63);
    (low.cast_signed(), (low + (width - 1)).cast_signed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_all_hashes_once() {
        let mut next = i64::MIN;
        for piece in 0..PIECES {
            let (low, high) = bounds(piece);
            assert_eq!(low, next, "{piece}");
            assert!(high > low);
            next = high.wrapping_add(1);
        }
        assert_eq!(next, i64::MIN);
    }
}
