//! From an archive or a directory to a [`LayerTree`]: contents go through the pipeline into
//! the storage, everything else is collected in memory.

mod content;
mod directory;
mod tar;

use std::sync::atomic::Ordering;

use cvmfs_format::chunking::ChunkSizes;
use cvmfs_format::xattr::Xattrs;
use cvmfs_format::{Compression, Deflate};
use layer_tar::{AbsoluteNames, EndOfArchive, Limits, Timestamp, Xattr};

use crate::error::{PublishError, shown};
use crate::interrupt::Interrupt;
use crate::pipeline::{Counters, Encoding, Pipeline};
use crate::tree::Meta;

pub(crate) use directory::read_directory;
pub(crate) use tar::read_tar;

/// What to do with the whiteouts of a container layer (`.wh.NAME`, `.wh..wh..opq`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Whiteouts {
    /// Store them as overlayfs reads them: a character device 0:0, and `trusted.overlay.opaque=y` with
    /// `user.overlay.opaque=y` on the directory. Bookkeeping of AUFS (`.wh..wh.*`) is dropped.
    Overlay,
    /// Store them as the ordinary files they are in the archive, as the C++ tools do.
    #[default]
    Keep,
}

/// Who owns the published entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Owner {
    /// The numeric owner that the archive or tree states.
    #[default]
    Keep,
    /// This uid and gid for everything.
    Fixed(u32, u32),
}

/// What to do with devices, fifos and sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SpecialFiles {
    /// Publish them.
    #[default]
    Keep,
    /// Leave them out. Whiteouts are published nevertheless: they are no devices by intention.
    Skip,
}

/// What to do with a file that has names in several directories: a repository cannot express that (format §9.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum XdirHardLinks {
    /// The names in each directory are one file; those in different directories are independent, with the same content.
    #[default]
    Split,
    /// Refuse the input.
    Refuse,
}

/// How an archive or tree is ingested.
#[derive(Debug, Clone, Default)]
pub struct IngestOptions {
    /// Make the base directory a nested catalog (with an empty `.cvmfscatalog` in it).
    pub catalog: bool,
    /// Treatment of layer whiteouts.
    pub whiteouts: Whiteouts,
    /// Treatment of owners.
    pub owner: Owner,
    /// Publish extended attributes. Overlayfs's own are never taken from an input.
    pub xattrs: bool,
    /// Treatment of special files.
    pub special_files: SpecialFiles,
    /// Treatment of hard links across directories.
    pub xdir_hard_links: XdirHardLinks,
    /// Chunk sizes; the repository's if `None`.
    pub chunk_sizes: Option<ChunkSizes>,
    /// Deflate implementation; the repository's if `None`.
    pub deflate: Option<Deflate>,
    /// Compression of file contents; the repository's if `None`.
    pub compression: Option<Compression>,
    /// Bounds of an archive.
    pub limits: Limits,
    /// Whether a missing end marker is an error; streams verified by other means may set it to optional.
    pub end_of_archive: EndOfArchive,
    /// What to do with absolute names in archives.
    pub absolute_names: AbsoluteNames,
}

impl IngestOptions {
    /// A container layer whose digest is verified by others: whiteouts as overlayfs reads them, with extended
    /// attributes, in a catalog of its own.
    pub fn of_layer() -> IngestOptions {
        IngestOptions {
            catalog: true,
            whiteouts: Whiteouts::Overlay,
            xattrs: true,
            // The digest vouches for completeness.
            end_of_archive: EndOfArchive::Optional,
            ..IngestOptions::default()
        }
    }
}

/// What an ingest did, beside the counters of the transaction.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IngestReport {
    /// Entries read, whiteouts included.
    pub entries: u64,
    /// Plain bytes of regular files.
    pub bytes_in: u64,
    /// Whiteouts and opaque markers met.
    pub whiteouts: u64,
    /// What could not be published as it was: one line each, the first [`MAX_WARNINGS`].
    pub warnings: Vec<String>,
    /// Warnings in all.
    pub warning_count: u64,
}

/// More lines help nobody and could fill the memory.
pub const MAX_WARNINGS: usize = 100;

impl IngestReport {
    pub(crate) fn warn(&mut self, line: String) {
        tracing::warn!("{line}");
        self.warning_count += 1;
        if self.warnings.len() < MAX_WARNINGS {
            self.warnings.push(line);
        }
    }
}

/// What reading an input needs beside the input.
#[derive(Debug)]
pub(crate) struct Sink<'a> {
    pub(crate) pipeline: &'a Pipeline,
    pub(crate) counters: &'a Counters,
    pub(crate) interrupt: &'a Interrupt,
    pub(crate) encoding: Encoding,
    pub(crate) chunk_sizes: ChunkSizes,
    pub(crate) options: &'a IngestOptions,
    pub(crate) report: IngestReport,
}

impl Sink<'_> {
    /// Counts an entry; an error if the user wants to stop.
    fn begin_entry(&mut self) -> Result<(), PublishError> {
        self.interrupt.check()?;
        self.report.entries += 1;
        self.counters.entries.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn meta(
        &mut self,
        path: &[u8],
        permissions: u32,
        (uid, gid): (u32, u32),
        mtime: Timestamp,
        xattrs: Vec<Xattr>,
    ) -> Meta {
        let (uid, gid) = match self.options.owner {
            Owner::Keep => (uid, gid),
            Owner::Fixed(uid, gid) => (uid, gid),
        };
        Meta { permissions: permissions & 0o7777, uid, gid, mtime, xattrs: self.xattrs(path, xattrs) }
    }

    /// The attributes that the format can hold (§13.1); others are left out with a warning.
    fn xattrs(&mut self, path: &[u8], found: Vec<Xattr>) -> Xattrs {
        let mut kept = Xattrs::default();
        if !self.options.xattrs {
            return kept;
        }
        for (count, (name, value)) in found.into_iter().enumerate() {
            let reason = if name.is_empty() || name.len() > MAX_XATTR || name.contains(&0) {
                "has a name that cannot be stored"
            } else if value.len() > MAX_XATTR {
                "has a value of more than 255 bytes"
            } else if count >= MAX_XATTR {
                "is one of more than 255"
            } else {
                kept.insert(name, value);
                continue;
            };
            self.report.warn(format!("{}: attribute {} {reason} and is left out", shown(path), shown(&name)));
        }
        kept
    }
}

/// Lengths and the number of attributes are single bytes in the repository format.
const MAX_XATTR: usize = 255;
