//! From a parsed header to what it means in a layer, strictly.

use super::EntryKind;
use crate::error::{TarError, shown};
use crate::field::{header_number, pax_number, pax_time};
use crate::limits::{
    Limits, MAX_DEVICE_MAJOR, MAX_DEVICE_MINOR, MAX_SYMLINK_TARGET, MAX_XATTR_NAME, MAX_XATTR_VALUE,
};
use crate::path::{AbsoluteNames, LayerPath};
use crate::sparse::DataMap;
use crate::{Timestamp, Xattr, is_overlay_xattr, pax};
use std::ops::Range;
use tar_core::SparseEntry;
use tar_core::parse::ParsedEntry;

// Fields of the 512-byte header (POSIX.1-2017, pax, "ustar Interchange Format").
const MODE: Range<usize> = 100..108;
const UID: Range<usize> = 108..116;
const GID: Range<usize> = 116..124;
const SIZE: Range<usize> = 124..136;
const MTIME: Range<usize> = 136..148;
pub(super) const TYPE_FLAG: usize = 156;
const DEVICE_MAJOR: Range<usize> = 329..337;
const DEVICE_MINOR: Range<usize> = 337..345;

/// An entry's header, understood.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) path: LayerPath,
    pub(super) kind: EntryKind,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Timestamp,
    pub(super) xattrs: Vec<Xattr>,
    pub(super) map: DataMap,
    /// Bytes of content in the archive.
    pub(super) stored: u64,
}

/// What global headers have set.
#[derive(Debug, Default)]
pub(super) struct Defaults {
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) mtime: Option<Timestamp>,
}

/// The sparse form of an entry as the parser found it.
pub(super) struct Sparse<'a> {
    pub(super) real_size: u64,
    pub(super) ranges: &'a [SparseEntry],
    /// Bytes that the map itself takes behind the header.
    pub(super) map_length: usize,
}

/// How entries are to be read.
pub(super) struct Dialect<'a> {
    pub(super) absolute: AbsoluteNames,
    pub(super) limits: &'a Limits,
    pub(super) defaults: &'a Defaults,
}

impl Dialect<'_> {
    pub(super) fn interpret(
        &self,
        entry: &ParsedEntry<'_>,
        sparse: Option<Sparse<'_>>,
    ) -> Result<Header, TarError> {
        let name = Name(&entry.path);
        let header = Fields { name, bytes: entry.header.as_bytes() };
        let records = Records::read(name, entry.pax.unwrap_or_default(), self.limits)?;
        if records.sparse && sparse.is_none() {
            return Err(name.bad("sparse map", "is of a form that is not supported"));
        }

        let path = LayerPath::parse_within(&entry.path, self.absolute, self.limits.path)
            .map_err(|source| TarError::Path { entry: shown(&entry.path), source })?;
        let flag = header.bytes[TYPE_FLAG];
        let size = match records.size {
            Some(size) => size,
            None => {
                u64::try_from(header.number("size", SIZE)?).map_err(|_| name.bad("size", "is negative"))?
            }
        };
        let (kind, map, stored) = match (flag, sparse) {
            (b'0' | 0 | b'7' | b'S', Some(sparse)) => sparse_file(name, flag, size, sparse)?,
            (_, Some(_)) => {
                return Err(name.bad("sparse map", "belongs to something that is not a regular file"));
            }
            // Archives older than USTAR mark directories by the slash alone.
            (b'0' | 0 | b'7', None) if entry.path.ends_with(b"/") && size == 0 => {
                without_content(EntryKind::Directory)
            }
            (b'0' | 0 | b'7', None) if entry.path.ends_with(b"/") => {
                return Err(name.bad("name", "ends with a slash but the entry has content"));
            }
            (b'0' | 0 | b'7', None) => (EntryKind::File { size }, DataMap::dense(size), size),
            // Sizes of what has no content are ignored: that is how Go's, and so Docker's, reader and GNU tar
            // take them, and POSIX lets a directory's size be a hint.
            (b'1', None) => without_content(EntryKind::HardLink(self.hard_link_target(entry)?)),
            (b'2', None) => without_content(EntryKind::Symlink(symlink_target(entry)?)),
            (b'3', None) => {
                let (major, minor) = header.device()?;
                without_content(EntryKind::Char { major, minor })
            }
            (b'4', None) => {
                let (major, minor) = header.device()?;
                without_content(EntryKind::Block { major, minor })
            }
            (b'5', None) => without_content(EntryKind::Directory),
            (b'6', None) => without_content(EntryKind::Fifo),
            _ => {
                return Err(TarError::Unsupported {
                    entry: shown(&entry.path),
                    flag: [flag].escape_ascii().to_string(),
                });
            }
        };
        if path.is_root() && kind != EntryKind::Directory {
            return Err(name.bad("type", "makes the root of the layer something other than a directory"));
        }

        // Some writers put the file type into the mode as well.
        let mode = (header.number("mode", MODE)? & 0o7777) as u32;
        let uid = match records.uid.or(self.defaults.uid) {
            Some(uid) => uid,
            None => id(header.number("uid", UID)?).map_err(|problem| name.bad("uid", problem))?,
        };
        let gid = match records.gid.or(self.defaults.gid) {
            Some(gid) => gid,
            None => id(header.number("gid", GID)?).map_err(|problem| name.bad("gid", problem))?,
        };
        let mtime = match records.mtime.or(self.defaults.mtime) {
            Some(mtime) => mtime,
            None => {
                let seconds = header.number("mtime", MTIME)?;
                (i64::try_from(seconds).map_err(|_| name.bad("mtime", "does not fit 64 bits"))?, 0)
            }
        };
        Ok(Header { path, kind, mode, uid, gid, mtime, xattrs: records.xattrs, map, stored })
    }

    fn hard_link_target(&self, entry: &ParsedEntry<'_>) -> Result<LayerPath, TarError> {
        let target = entry.link_target.as_deref().unwrap_or_default();
        LayerPath::parse_within(target, self.absolute, self.limits.path).map_err(|source| {
            TarError::LinkTarget { entry: shown(&entry.path), target: shown(target), source }
        })
    }
}

fn without_content(kind: EntryKind) -> (EntryKind, DataMap, u64) {
    (kind, DataMap::dense(0), 0)
}

fn sparse_file(
    name: Name<'_>,
    flag: u8,
    size: u64,
    sparse: Sparse<'_>,
) -> Result<(EntryKind, DataMap, u64), TarError> {
    // Old GNU keeps its map in extension headers, which the size does not count.
    let map_length = if flag == b'S' { 0 } else { sparse.map_length as u64 };
    let stored =
        size.checked_sub(map_length).ok_or_else(|| name.bad("size", "is smaller than the sparse map"))?;
    let ranges = sparse.ranges.iter().map(|range| (range.offset, range.length));
    let map = DataMap::sparse(sparse.real_size, stored, ranges)
        .map_err(|problem| name.bad("sparse map", problem))?;
    Ok((EntryKind::File { size: sparse.real_size }, map, stored))
}

fn symlink_target(entry: &ParsedEntry<'_>) -> Result<Vec<u8>, TarError> {
    let name = Name(&entry.path);
    match entry.link_target.as_deref() {
        None | Some([]) => Err(name.bad("link target", "is empty")),
        Some(target) if target.len() > MAX_SYMLINK_TARGET => {
            Err(name.bad("link target", "is longer than 4095 bytes"))
        }
        Some(target) if target.contains(&0) => Err(name.bad("link target", "contains a NUL byte")),
        Some(target) => Ok(target.to_vec()),
    }
}

/// An owner; 4294967295 is refused because chown(2) takes it for "leave as it is".
fn id(number: i128) -> Result<u32, &'static str> {
    match u32::try_from(number) {
        Ok(u32::MAX) | Err(_) => Err("is not a Linux owner (0 to 4294967294)"),
        Ok(id) => Ok(id),
    }
}

/// A PAX owner; an empty value takes an earlier one back.
pub(super) fn pax_id(value: &[u8]) -> Result<Option<u32>, String> {
    if value.is_empty() {
        return Ok(None);
    }
    Ok(Some(id(pax_number(value)?)?))
}

/// A PAX time; an empty value takes an earlier one back.
pub(super) fn pax_mtime(value: &[u8]) -> Result<Option<Timestamp>, String> {
    if value.is_empty() { Ok(None) } else { pax_time(value).map(Some) }
}

/// What the local extended header says beyond names, which the parser has already applied.
#[derive(Default)]
struct Records {
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<Timestamp>,
    xattrs: Vec<Xattr>,
    sparse: bool,
}

impl Records {
    fn read(name: Name<'_>, data: &[u8], limits: &Limits) -> Result<Self, TarError> {
        let mut records = Records::default();
        for (key, value) in pax::records(data).map_err(|problem| name.bad("PAX data", problem))? {
            match key {
                b"size" if value.is_empty() => records.size = None,
                b"size" => {
                    let size = pax_number(value).map_err(|problem| name.bad("size", problem))?;
                    records.size =
                        Some(u64::try_from(size).map_err(|_| name.bad("size", "does not fit 64 bits"))?);
                }
                b"uid" => records.uid = pax_id(value).map_err(|problem| name.bad("uid", problem))?,
                b"gid" => records.gid = pax_id(value).map_err(|problem| name.bad("gid", problem))?,
                b"mtime" => records.mtime = pax_mtime(value).map_err(|problem| name.bad("mtime", problem))?,
                b"SCHILY.realsize" => {
                    return Err(name.bad("sparse map", "is in star's form, which is not supported"));
                }
                _ if key.starts_with(b"GNU.sparse.") => records.sparse = true,
                _ => {
                    if let Some(attribute) = pax::xattr_name(key) {
                        records.add_xattr(name, attribute, value, limits)?;
                    }
                }
            }
        }
        Ok(records)
    }

    fn add_xattr(
        &mut self,
        name: Name<'_>,
        attribute: Vec<u8>,
        value: &[u8],
        limits: &Limits,
    ) -> Result<(), TarError> {
        if is_overlay_xattr(&attribute) {
            return Ok(());
        }
        if attribute.is_empty() || attribute.len() > MAX_XATTR_NAME || attribute.contains(&0) {
            return Err(name.bad("extended attribute", format!("has a bad name '{}'", shown(&attribute))));
        }
        if value.len() > MAX_XATTR_VALUE {
            return Err(
                name.bad("extended attribute", format!("'{}' is larger than 65536 bytes", shown(&attribute)))
            );
        }
        // The last record of a name counts.
        self.xattrs.retain(|(earlier, _)| *earlier != attribute);
        if self.xattrs.len() == limits.xattrs {
            let limit = limits.xattrs as u64;
            return Err(TarError::Limit { entry: shown(name.0), what: "extended attributes", limit });
        }
        self.xattrs.push((attribute, value.to_vec()));
        Ok(())
    }
}

struct Fields<'a> {
    name: Name<'a>,
    bytes: &'a [u8; 512],
}

impl Fields<'_> {
    fn number(&self, field: &'static str, range: Range<usize>) -> Result<i128, TarError> {
        header_number(&self.bytes[range]).map_err(|problem| self.name.bad(field, problem))
    }

    fn device(&self) -> Result<(u32, u32), TarError> {
        let part = |field, range, limit| match u32::try_from(self.number(field, range)?) {
            Ok(number) if number <= limit => Ok(number),
            _ => Err(self.name.bad(field, format!("is not a Linux device number (0 to {limit})"))),
        };
        let major = part("device major number", DEVICE_MAJOR, MAX_DEVICE_MAJOR)?;
        let minor = part("device minor number", DEVICE_MINOR, MAX_DEVICE_MINOR)?;
        Ok((major, minor))
    }
}

/// The entry's name, for messages.
#[derive(Clone, Copy)]
struct Name<'a>(&'a [u8]);

impl Name<'_> {
    fn bad(&self, field: &'static str, problem: impl Into<String>) -> TarError {
        TarError::Field { entry: shown(self.0), field, problem: problem.into() }
    }
}
