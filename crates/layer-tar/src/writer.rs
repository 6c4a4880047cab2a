//! Writing archives: USTAR, with PAX records only where USTAR has no room.

use crate::error::shown;
use crate::field::format_pax_time;
use crate::limits::{MAX_DEVICE_MAJOR, MAX_DEVICE_MINOR};
use crate::path::LayerPath;
use crate::pax;
use crate::{Timestamp, Xattr};
use std::io::{self, Read, Write};
use thiserror::Error;

/// Metadata that every kind of entry has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerEntryMeta {
    /// Where it belongs.
    pub path: LayerPath,
    /// Permission, set-id and sticky bits; other bits are not written.
    pub mode: u32,
    /// Numeric owner.
    pub uid: u32,
    /// Numeric group.
    pub gid: u32,
    /// Time of last modification.
    pub mtime: Timestamp,
    /// Extended attributes; written in the order of their names.
    pub xattrs: Vec<Xattr>,
}

/// A device node's kind and number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// A character device.
    Char {
        /// Major number, at most 12 bits.
        major: u32,
        /// Minor number, at most 20 bits.
        minor: u32,
    },
    /// A block device.
    Block {
        /// Major number, at most 12 bits.
        major: u32,
        /// Minor number, at most 20 bits.
        minor: u32,
    },
}

/// How exact times of modification are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TimePrecision {
    /// Whole seconds, rounded down, as Docker's own archives have them.
    #[default]
    Seconds,
    /// A PAX record for each entry whose time has a fraction.
    Nanoseconds,
}

/// Why an archive could not be written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WriteError {
    /// Whoever takes the archive failed.
    #[error("writing the archive failed at entry '{entry}'")]
    Output {
        /// The entry's name.
        entry: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The content of a file could not be read.
    #[error("reading the content of '{entry}' failed")]
    Content {
        /// The entry's name.
        entry: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file became shorter while it was archived.
    #[error("'{entry}' ended after {found} of {expected} bytes; it was changed while it was archived")]
    Shrunk {
        /// The entry's name.
        entry: String,
        /// Its announced size.
        expected: u64,
        /// Bytes found.
        found: u64,
    },
    /// A value that no archive can hold.
    #[error("'{entry}': {problem}")]
    Unrepresentable {
        /// The entry's name.
        entry: String,
        /// What does not fit.
        problem: &'static str,
    },
    /// The writer was used again after an error; the archive is not valid.
    #[error("the archive is incomplete after an earlier error")]
    Broken,
}

const BLOCK: usize = 512;
const BUFFER: u64 = 64 * 1024;
/// Highest number in a 7-digit octal field (owner, device).
const MAX_OCTAL_7: u64 = 0o7_777_777;
/// Highest number in an 11-digit octal field (size, time).
const MAX_OCTAL_11: u64 = 0o77_777_777_777;
const NAME_FIELD: usize = 100;
const PREFIX_FIELD: usize = 155;
const LINK_FIELD: usize = 100;

/// Writes a layer archive. The same calls give the same bytes. Entries are not sorted and parents not added:
/// that is the caller's business.
///
/// ```
/// let archive = layer_tar::LayerWriter::new(Vec::new()).finish()?;
/// assert_eq!(archive, [0; 1024]); // the empty layer that engines recognise
/// # Ok::<(), layer_tar::WriteError>(())
/// ```
#[derive(Debug)]
pub struct LayerWriter<W> {
    output: W,
    precision: TimePrecision,
    broken: bool,
}

impl<W: Write> LayerWriter<W> {
    /// A writer with times in whole seconds. `output` should be buffered.
    pub fn new(output: W) -> Self {
        LayerWriter { output, precision: TimePrecision::default(), broken: false }
    }

    /// Sets how exact times are written.
    pub fn time_precision(mut self, precision: TimePrecision) -> Self {
        self.precision = precision;
        self
    }

    /// Appends a directory; the root becomes `./`.
    pub fn append_dir(&mut self, meta: &LayerEntryMeta) -> Result<(), WriteError> {
        let mut name = meta.path.as_bytes().to_vec();
        if name.is_empty() {
            name.push(b'.');
        }
        name.push(b'/');
        self.entry(meta, |header| {
            header.flag = b'5';
            header.name = name;
        })
    }

    /// Appends a regular file with exactly `size` bytes of `content`; what is beyond is not read.
    pub fn append_file(
        &mut self,
        meta: &LayerEntryMeta,
        size: u64,
        content: impl Read,
    ) -> Result<(), WriteError> {
        self.entry(meta, |header| header.size = size)?;
        self.broken = true;
        let entry = || shown(meta.path.as_bytes());
        let mut content = content.take(size);
        let mut buffer = vec![0; size.clamp(1, BUFFER) as usize];
        let mut found = 0u64;
        loop {
            let count = match content.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(WriteError::Content { entry: entry(), source }),
            };
            self.output
                .write_all(&buffer[..count])
                .map_err(|source| WriteError::Output { entry: entry(), source })?;
            found += count as u64;
        }
        if found < size {
            return Err(WriteError::Shrunk { entry: entry(), expected: size, found });
        }
        let padding = (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64;
        self.output
            .write_all(&[0; BLOCK][..padding as usize])
            .map_err(|source| WriteError::Output { entry: entry(), source })?;
        self.broken = false;
        Ok(())
    }

    /// Appends a symbolic link with its target verbatim.
    pub fn append_symlink(&mut self, meta: &LayerEntryMeta, target: &[u8]) -> Result<(), WriteError> {
        if target.is_empty() || target.contains(&0) {
            let problem = "the target of the symbolic link is empty or contains a NUL byte";
            return Err(WriteError::Unrepresentable { entry: shown(meta.path.as_bytes()), problem });
        }
        self.entry(meta, |header| {
            header.flag = b'2';
            header.link = target.to_vec();
        })
    }

    /// Appends another name for the object at `target`, which must have been appended before.
    pub fn append_hardlink(&mut self, meta: &LayerEntryMeta, target: &LayerPath) -> Result<(), WriteError> {
        self.entry(meta, |header| {
            header.flag = b'1';
            header.link = target.as_bytes().to_vec();
        })
    }

    /// Appends a device node.
    pub fn append_device(&mut self, meta: &LayerEntryMeta, device: Device) -> Result<(), WriteError> {
        let (flag, major, minor) = match device {
            Device::Char { major, minor } => (b'3', major, minor),
            Device::Block { major, minor } => (b'4', major, minor),
        };
        if major > MAX_DEVICE_MAJOR || minor > MAX_DEVICE_MINOR {
            let problem = "the device number exceeds 12 bits of major or 20 bits of minor number";
            return Err(WriteError::Unrepresentable { entry: shown(meta.path.as_bytes()), problem });
        }
        self.entry(meta, |header| {
            header.flag = flag;
            header.device = (major, minor);
        })
    }

    /// Appends a named pipe.
    pub fn append_fifo(&mut self, meta: &LayerEntryMeta) -> Result<(), WriteError> {
        self.entry(meta, |header| header.flag = b'6')
    }

    /// Ends the archive with two zero blocks and flushes. An archive without entries is 1024 zero bytes.
    pub fn finish(mut self) -> Result<W, WriteError> {
        if self.broken {
            return Err(WriteError::Broken);
        }
        self.output
            .write_all(&[0; 2 * BLOCK])
            .and_then(|()| self.output.flush())
            .map_err(|source| WriteError::Output { entry: "(end of archive)".to_owned(), source })?;
        Ok(self.output)
    }

    fn entry(&mut self, meta: &LayerEntryMeta, describe: impl FnOnce(&mut Header)) -> Result<(), WriteError> {
        if self.broken {
            return Err(WriteError::Broken);
        }
        let mut header = Header {
            name: meta.path.as_bytes().to_vec(),
            mode: meta.mode & 0o7777,
            uid: meta.uid,
            gid: meta.gid,
            mtime: match self.precision {
                TimePrecision::Seconds => (meta.mtime.0, 0),
                TimePrecision::Nanoseconds => meta.mtime,
            },
            size: 0,
            flag: b'0',
            link: Vec::new(),
            device: (0, 0),
        };
        describe(&mut header);
        let blocks = header
            .blocks(&meta.xattrs)
            .map_err(|problem| WriteError::Unrepresentable { entry: shown(meta.path.as_bytes()), problem })?;
        self.broken = true;
        self.output
            .write_all(&blocks)
            .map_err(|source| WriteError::Output { entry: shown(meta.path.as_bytes()), source })?;
        self.broken = false;
        Ok(())
    }
}

/// One header before it is cut into fields.
struct Header {
    name: Vec<u8>,
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: Timestamp,
    size: u64,
    flag: u8,
    link: Vec<u8>,
    device: (u32, u32),
}

impl Header {
    /// The header's block, after an extended header if one is needed.
    fn blocks(&self, xattrs: &[Xattr]) -> Result<Vec<u8>, &'static str> {
        if self.name.is_empty() {
            return Err("only a directory can be the root of a layer");
        }
        let split = split_name(&self.name);
        let seconds = u64::try_from(self.mtime.0).ok().filter(|&seconds| seconds <= MAX_OCTAL_11);
        let mut records = Vec::new();
        if split.is_none() {
            pax::append(&mut records, b"path", &self.name);
        }
        if self.link.len() > LINK_FIELD {
            pax::append(&mut records, b"linkpath", &self.link);
        }
        if self.size > MAX_OCTAL_11 {
            pax::append(&mut records, b"size", self.size.to_string().as_bytes());
        }
        if u64::from(self.uid) > MAX_OCTAL_7 {
            pax::append(&mut records, b"uid", self.uid.to_string().as_bytes());
        }
        if u64::from(self.gid) > MAX_OCTAL_7 {
            pax::append(&mut records, b"gid", self.gid.to_string().as_bytes());
        }
        if seconds.is_none() || self.mtime.1 != 0 {
            pax::append(&mut records, b"mtime", format_pax_time(self.mtime).as_bytes());
        }
        append_xattrs(&mut records, xattrs)?;

        let mut blocks = Vec::with_capacity(BLOCK);
        if !records.is_empty() {
            if records.len() > crate::Limits::METADATA as usize {
                return Err("its name, link and extended attributes exceed 1 MiB");
            }
            let name = extended_header_name(&self.name);
            let extended = Fields {
                prefix: b"",
                name: &name,
                mode: 0o644,
                size: records.len() as u64,
                flag: b'x',
                ..EMPTY
            };
            blocks.extend_from_slice(&extended.block());
            blocks.extend_from_slice(&records);
            blocks.resize(blocks.len().next_multiple_of(BLOCK), 0);
        }
        // What stands in a record is also put here as far as it fits, for readers of old dialects.
        let (prefix, name) = split.unwrap_or((b"", &self.name[..NAME_FIELD.min(self.name.len())]));
        let fits = |number: u64, limit: u64| if number > limit { 0 } else { number };
        let fields = Fields {
            prefix,
            name,
            mode: self.mode,
            uid: fits(self.uid.into(), MAX_OCTAL_7),
            gid: fits(self.gid.into(), MAX_OCTAL_7),
            size: fits(self.size, MAX_OCTAL_11),
            mtime: seconds.unwrap_or(0),
            flag: self.flag,
            link: &self.link[..LINK_FIELD.min(self.link.len())],
            device: self.device,
        };
        blocks.extend_from_slice(&fields.block());
        Ok(blocks)
    }
}

fn append_xattrs(records: &mut Vec<u8>, xattrs: &[Xattr]) -> Result<(), &'static str> {
    let mut sorted: Vec<&Xattr> = xattrs.iter().collect();
    sorted.sort();
    for (name, value) in sorted {
        if name.is_empty() || name.contains(&0) || std::str::from_utf8(name).is_err() {
            return Err("an extended attribute's name is empty, contains a NUL byte or is not UTF-8");
        }
        pax::append(records, &pax::xattr_key(name), value);
    }
    Ok(())
}

/// Splits a long name between the fields `prefix` and `name`; none if it does not fit.
fn split_name(name: &[u8]) -> Option<(&[u8], &[u8])> {
    if name.len() <= NAME_FIELD {
        return Some((b"", name));
    }
    // Neither part may be empty, so a directory's trailing slash does not divide.
    let slash = name[..name.len() - 1].iter().take(PREFIX_FIELD + 1).rposition(|&byte| byte == b'/')?;
    let (prefix, rest) = (&name[..slash], &name[slash + 1..]);
    (!prefix.is_empty() && rest.len() <= NAME_FIELD).then_some((prefix, rest))
}

/// A name for an extended header: it only shows up in readers that do not know such headers.
fn extended_header_name(name: &[u8]) -> Vec<u8> {
    const KEPT: usize = 80;
    let trimmed = name.strip_suffix(b"/").unwrap_or(name);
    let last = trimmed.rsplit(|&byte| byte == b'/').next().unwrap_or_default();
    let mut result = b"PaxHeaders.0/".to_vec();
    result.extend(last.iter().take(KEPT).map(|&byte| if byte.is_ascii_graphic() { byte } else { b'_' }));
    result
}

/// The fields of one USTAR block; every value is known to fit.
struct Fields<'a> {
    prefix: &'a [u8],
    name: &'a [u8],
    mode: u32,
    uid: u64,
    gid: u64,
    size: u64,
    mtime: u64,
    flag: u8,
    link: &'a [u8],
    device: (u32, u32),
}

const EMPTY: Fields<'static> = Fields {
    prefix: b"",
    name: b"",
    mode: 0,
    uid: 0,
    gid: 0,
    size: 0,
    mtime: 0,
    flag: b'0',
    link: b"",
    device: (0, 0),
};

impl Fields<'_> {
    fn block(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        put(&mut block, 0, self.name);
        put_octal(&mut block, 100, 7, self.mode.into());
        put_octal(&mut block, 108, 7, self.uid);
        put_octal(&mut block, 116, 7, self.gid);
        put_octal(&mut block, 124, 11, self.size);
        put_octal(&mut block, 136, 11, self.mtime);
        block[156] = self.flag;
        put(&mut block, 157, self.link);
        put(&mut block, 257, b"ustar\x0000");
        put_octal(&mut block, 329, 7, self.device.0.into());
        put_octal(&mut block, 337, 7, self.device.1.into());
        put(&mut block, 345, self.prefix);
        // The checksum is taken with its own field blank.
        put(&mut block, 148, b"        ");
        let sum: u64 = block.iter().map(|&byte| u64::from(byte)).sum();
        put_octal(&mut block, 148, 6, sum);
        block[154] = 0;
        block
    }
}

fn put(block: &mut [u8; BLOCK], at: usize, bytes: &[u8]) {
    block[at..at + bytes.len()].copy_from_slice(bytes);
}

fn put_octal(block: &mut [u8; BLOCK], at: usize, digits: usize, mut number: u64) {
    for place in (0..digits).rev() {
        block[at + place] = b'0' + (number & 7) as u8;
        number >>= 3;
    }
}
