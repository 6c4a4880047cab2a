//! From SQLite rows to [`Entry`] and back, for every schema revision.

use rusqlite::types::ValueRef;
use rusqlite::{Connection, Row};

use super::entry::{Chunk, Entry, EntryFlags, EntryKind};
use super::{CatalogError, Result};
use crate::container::{ContainerError, Schema, columns};
use crate::hash::{ContentHash, HashAlgorithm, PathHash};

/// Columns in the order of [`decode`], with the schema revision that introduced them and what stands in for them in
/// older catalogs (none: the catalog is unusable without).
const COLUMNS: [(&str, u64, Option<&str>); 17] = [
    ("rowid", 0, None),
    ("md5path_1", 0, None),
    ("md5path_2", 0, None),
    ("parent_1", 0, None),
    ("parent_2", 0, None),
    ("hardlinks", 0, Some("1")),
    ("hash", 0, None),
    ("size", 0, None),
    ("mode", 0, None),
    ("mtime", 0, None),
    ("mtimens", 7, Some("NULL")),
    ("flags", 0, None),
    ("name", 0, None),
    ("symlink", 0, None),
    ("uid", 0, Some("0")),
    ("gid", 0, Some("0")),
    ("xattr", 2, Some("NULL")),
];

/// `SELECT <columns> FROM catalog`, suited to the catalog's schema; a `WHERE` clause is to be appended.
pub(super) fn select(connection: &Connection, schema: &Schema) -> Result<String> {
    let present = columns(connection, "catalog")?;
    let mut list = Vec::with_capacity(COLUMNS.len());
    for (column, since, substitute) in COLUMNS {
        let is_present = column == "rowid" || present.iter().any(|name| name == column);
        match substitute {
            _ if is_present && schema.revision >= since => list.push(column),
            Some(substitute) => list.push(substitute),
            None => return Err(ContainerError::MissingColumn { table: "catalog", column }.into()),
        }
    }
    Ok(format!("SELECT {} FROM catalog ", list.join(", ")))
}

/// Decodes a row of [`select`].
pub(super) fn decode(row: &Row<'_>) -> Result<Entry> {
    let cells =
        Cells { row, rowid: row.get_ref(0).ok().and_then(|value| value.as_i64().ok()).unwrap_or_default() };
    let hardlinks = cells.integer(5)? as u64;
    let flags = cells.u32(11)?;
    let mode = cells.u32(8)?;
    let mut entry = Entry {
        rowid: cells.rowid,
        path_hash: PathHash { part1: cells.integer(1)?, part2: cells.integer(2)? },
        parent: PathHash { part1: cells.integer(3)?, part2: cells.integer(4)? },
        link_group: (hardlinks >> 32) as u32,
        link_count: hardlinks as u32,
        hash: None,
        size: 0,
        mode,
        mtime: cells.integer(9)?,
        mtime_ns: cells.nanoseconds(10)?,
        flags: EntryFlags(flags),
        name: cells.bytes(12)?.unwrap_or_default().to_vec(),
        symlink: Vec::new(),
        uid: cells.id(14)?,
        gid: cells.id(15)?,
        xattrs: cells.bytes(16)?.map(<[u8]>::to_vec),
    };
    let kind =
        EntryKind::from_mode(mode).ok_or_else(|| cells.bad(8, format!("no file type in {mode:#o}")))?;
    entry.size = match (kind, cells.integer(7)?) {
        // A device number uses all 64 bits.
        (EntryKind::CharDevice | EntryKind::BlockDevice, size) => size as u64,
        (EntryKind::File, size) => {
            u64::try_from(size).map_err(|_| cells.bad(7, format!("size {size} is negative")))?
        }
        (_, size) => u64::try_from(size).unwrap_or(0),
    };
    if kind == EntryKind::Symlink {
        // NULL stands for an empty target in databases written by hand.
        entry.symlink = cells.bytes(13)?.unwrap_or_default().to_vec();
    }
    let digest = cells.bytes(6)?;
    if kind == EntryKind::File {
        let algorithm = entry.flags.algorithm();
        if algorithm.is_none() && (digest.is_some() || entry.is_chunked()) {
            return Err(cells.bad(11, format!("unsupported hash algorithm in {flags:#x}")));
        }
        if entry.flags.compression().is_none() {
            return Err(cells.bad(11, "unknown compression".to_owned()));
        }
    }
    if let (Some(digest), Some(algorithm)) = (digest, entry.flags.algorithm()) {
        let hash = ContentHash::from_slice(algorithm, digest)
            .ok_or_else(|| cells.bad(6, format!("digest of {} bytes", digest.len())))?;
        entry.hash = Some(hash).filter(|hash| !hash.is_null());
    }
    Ok(entry)
}

/// Decodes a row `offset, size, hash` of table `chunks`.
pub(super) fn decode_chunk(row: &Row<'_>, algorithm: HashAlgorithm) -> Option<Chunk> {
    let number = |column| u64::try_from(row.get_ref(column).ok()?.as_i64().ok()?).ok();
    Some(Chunk {
        offset: number(0)?,
        size: number(1)?,
        hash: ContentHash::from_slice(algorithm, row.get_ref(2).ok()?.as_bytes().ok()?)?,
    })
}

/// The values of one row, with the row named in errors.
struct Cells<'r> {
    row: &'r Row<'r>,
    rowid: i64,
}

impl<'r> Cells<'r> {
    fn value(&self, column: usize) -> Result<ValueRef<'r>> {
        self.row
            .get_ref(column)
            .map_err(|source| ContainerError::Sqlite { doing: "read a catalog row", source }.into())
    }

    fn integer(&self, column: usize) -> Result<i64> {
        match self.value(column)? {
            ValueRef::Integer(value) => Ok(value),
            other => Err(self.bad(column, format!("{} instead of an integer", other.data_type()))),
        }
    }

    fn u32(&self, column: usize) -> Result<u32> {
        let value = self.integer(column)?;
        u32::try_from(value).map_err(|_| self.bad(column, format!("{value} is out of range")))
    }

    /// Owner or group; −1 is stored by writers that take ids for signed.
    fn id(&self, column: usize) -> Result<u32> {
        if self.integer(column)? == -1 { Ok(u32::MAX) } else { self.u32(column) }
    }

    fn nanoseconds(&self, column: usize) -> Result<Option<u32>> {
        match self.value(column)? {
            ValueRef::Integer(value) => Ok(u32::try_from(value).ok().filter(|value| *value < 1_000_000_000)),
            _ => Ok(None),
        }
    }

    fn bytes(&self, column: usize) -> Result<Option<&'r [u8]>> {
        match self.value(column)? {
            ValueRef::Null => Ok(None),
            ValueRef::Text(bytes) | ValueRef::Blob(bytes) => Ok(Some(bytes)),
            other => Err(self.bad(column, format!("{} instead of text", other.data_type()))),
        }
    }

    fn bad(&self, column: usize, reason: String) -> CatalogError {
        CatalogError::Row { rowid: self.rowid, reason: format!("column {}: {reason}", COLUMNS[column].0) }
    }
}
