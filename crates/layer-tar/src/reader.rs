//! Reading an archive entry by entry.

mod interpret;

use crate::error::TarError;
use crate::limits::Limits;
use crate::path::{AbsoluteNames, LayerPath};
use crate::sparse::Content;
use crate::stream::Stream;
use crate::{Timestamp, Xattr, pax};
use interpret::{Defaults, Dialect};
use std::io::{self, Read};
use tar_core::HEADER_SIZE;
use tar_core::parse::{ParseError, ParseEvent, Parser};

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A directory.
    Directory,
    /// A regular file.
    File {
        /// Its size in bytes, holes included.
        size: u64,
    },
    /// A symbolic link with its target verbatim: not empty, at most 4095 bytes, no NUL, otherwise anything.
    Symlink(Vec<u8>),
    /// Another name for the object at this path of the same layer.
    HardLink(LayerPath),
    /// A character device; 0:0 is overlayfs's own form of a whiteout.
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
    /// A named pipe.
    Fifo,
}

/// One entry with its metadata; reading it yields the file's content.
#[derive(Debug)]
pub struct LayerEntry<'a, R> {
    /// Where it belongs.
    pub path: LayerPath,
    /// What it is.
    pub kind: EntryKind,
    /// Permission, set-id and sticky bits (`0o7777`).
    pub mode: u32,
    /// Numeric owner, never `u32::MAX`, which chown(2) takes for "leave as it is".
    pub uid: u32,
    /// Numeric group, never `u32::MAX`.
    pub gid: u32,
    /// Time of last modification.
    pub mtime: Timestamp,
    /// Extended attributes in archive order, each name once, none of overlayfs's own.
    pub xattrs: Vec<Xattr>,
    /// The content; empty unless this is a regular file.
    pub content: Content<'a, R>,
}

impl<R: Read> Read for LayerEntry<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.content.read(buffer)
    }
}

/// How an archive must end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EndOfArchive {
    /// With two zero blocks; anything else is a cut archive.
    #[default]
    Required,
    /// The stream may also end between two entries. Only for streams whose completeness is known otherwise,
    /// such as a blob whose digest is verified: some image builders leave the zero blocks away.
    Optional,
}

/// Reads a layer archive from an uncompressed stream.
///
/// ```
/// use layer_tar::{LayerReader, Limits};
/// let mut reader = LayerReader::new(&[0u8; 1024][..], Limits::default());
/// assert!(reader.next_entry()?.is_none());
/// # Ok::<(), layer_tar::TarError>(())
/// ```
#[derive(Debug)]
pub struct LayerReader<R> {
    stream: Stream<R>,
    parser: Parser,
    limits: Limits,
    absolute: AbsoluteNames,
    end: EndOfArchive,
    defaults: Defaults,
    entries: u64,
    total_size: u64,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Reading,
    Ended,
    Broken,
}

/// More header bytes than this in front of one entry are damage: the largest sparse map that the limits
/// admit takes half of it.
const MAX_HEADERS: usize = 8 * 1024 * 1024;
/// GNU long name, GNU long link and PAX header, each once.
const MAX_EXTENSION_HEADERS: usize = 3;

impl<R: Read> LayerReader<R> {
    /// A reader that holds the archive in `inner` to `limits`. It buffers by itself.
    pub fn new(inner: R, limits: Limits) -> Self {
        let mut parser = Parser::new(tar_core::parse::Limits {
            max_metadata_size: limits.metadata,
            max_path_len: u32::try_from(limits.path).ok(),
            max_pending_entries: MAX_EXTENSION_HEADERS,
            max_sparse_entries: limits.sparse_ranges,
        });
        // The parser knows no negative times. All PAX values that matter are read again, strictly, here.
        parser.set_ignore_pax_errors(true);
        LayerReader {
            stream: Stream::new(inner),
            parser,
            limits,
            absolute: AbsoluteNames::default(),
            end: EndOfArchive::default(),
            defaults: Defaults::default(),
            entries: 0,
            total_size: 0,
            state: State::Reading,
        }
    }

    /// Sets what happens to names that begin with a slash; refused by default.
    pub fn absolute_names(mut self, absolute: AbsoluteNames) -> Self {
        self.absolute = absolute;
        self
    }

    /// Sets how the archive must end; with two zero blocks by default.
    pub fn end_of_archive(mut self, end: EndOfArchive) -> Self {
        self.end = end;
        self
    }

    /// The next entry, or none at the end of the archive, by then the stream was read to its end, padding
    /// included. What was not read of the previous entry is skipped. After an error there is no next entry.
    pub fn next_entry(&mut self) -> Result<Option<LayerEntry<'_, R>>, TarError> {
        match self.state {
            State::Reading => {}
            State::Ended => return Ok(None),
            State::Broken => return Err(TarError::Broken),
        }
        self.state = State::Broken;
        let Some(header) = self.next_header()? else {
            self.stream.drain()?;
            self.state = State::Ended;
            return Ok(None);
        };
        self.count_size(&header)?;
        self.state = State::Reading;

        let interpret::Header { path, kind, mode, uid, gid, mtime, xattrs, map, stored } = header;
        self.stream.begin_content(crate::error::shown(path.as_bytes()), stored);
        let content = Content::new(&mut self.stream, map);
        Ok(Some(LayerEntry { path, kind, mode, uid, gid, mtime, xattrs, content }))
    }

    /// Bytes of the archive before the next one that is handed out. Right after [`next_entry`](Self::next_entry)
    /// that is the entry's content, so whoever can seek finds it again.
    pub fn offset(&self) -> u64 {
        self.stream.offset()
    }

    /// The stream below. It has been read to its end if the last entry was asked for.
    pub fn into_inner(self) -> R {
        self.stream.into_inner()
    }

    fn next_header(&mut self) -> Result<Option<interpret::Header>, TarError> {
        self.stream.skip_content()?;
        let mut wanted = HEADER_SIZE;
        loop {
            let offset = self.stream.offset();
            let before = self.stream.window().len();
            let complete = self.stream.fill(wanted)?;
            let window = self.stream.window();
            if !complete && (window.len() < HEADER_SIZE || window.len() == before) {
                return self.end_of_stream();
            }
            refuse_lone_zero_block(window, offset)?;
            let event = self.parser.parse(window).map_err(|source| TarError::Header { offset, source })?;
            match event {
                ParseEvent::NeedData { min_bytes } => {
                    if !complete && window.len() < min_bytes {
                        return self.end_of_stream();
                    }
                    if min_bytes > MAX_HEADERS || window.len() > MAX_HEADERS {
                        return Err(TarError::HeaderTooLarge { offset, limit: MAX_HEADERS });
                    }
                    // Half as much again, because the parser starts over each time; and always more than
                    // there is, because it asks for less than it has when a sparse map's line is not complete.
                    wanted = min_bytes.max(window.len() + window.len() / 2);
                }
                ParseEvent::End { consumed } => {
                    self.stream.consume(consumed);
                    return Ok(None);
                }
                ParseEvent::GlobalExtensions { consumed, pax_data } => {
                    // The parser forgets extension headers that stand in front of a global one.
                    if window.get(interpret::TYPE_FLAG) != Some(&b'g') {
                        return Err(TarError::Header { offset, source: ParseError::OrphanedMetadata });
                    }
                    self.defaults.apply(pax_data, offset)?;
                    self.stream.consume(consumed);
                    self.count_entry("(global header)")?;
                    wanted = HEADER_SIZE;
                }
                ParseEvent::Entry { consumed, entry } => {
                    let dialect =
                        Dialect { absolute: self.absolute, limits: &self.limits, defaults: &self.defaults };
                    let header = dialect.interpret(&entry, None)?;
                    self.stream.consume(consumed);
                    self.count_entry(&header.path)?;
                    return Ok(Some(header));
                }
                ParseEvent::SparseEntry { consumed, entry, sparse_map, real_size } => {
                    let dialect =
                        Dialect { absolute: self.absolute, limits: &self.limits, defaults: &self.defaults };
                    // Version 1.0 keeps the map in front of the data and counts it in the stored size.
                    let header_at = entry.header.as_bytes().as_ptr().addr() - window.as_ptr().addr();
                    let map_length = consumed - header_at - HEADER_SIZE;
                    let sparse = interpret::Sparse { real_size, ranges: &sparse_map, map_length };
                    let header = dialect.interpret(&entry, Some(sparse))?;
                    self.stream.consume(consumed);
                    self.count_entry(&header.path)?;
                    return Ok(Some(header));
                }
            }
        }
    }

    /// The stream is over and the two zero blocks have not come.
    fn end_of_stream(&mut self) -> Result<Option<interpret::Header>, TarError> {
        let rest = self.stream.window();
        let between_entries =
            rest.is_empty() || (rest.len() == HEADER_SIZE && rest.iter().all(|&byte| byte == 0));
        match self.end {
            EndOfArchive::Optional if between_entries => Ok(None),
            _ => Err(TarError::CutArchive { offset: self.stream.offset() + rest.len() as u64 }),
        }
    }

    fn count_entry(&mut self, entry: impl ToString) -> Result<(), TarError> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            let limit = self.limits.entries;
            return Err(TarError::Limit { entry: entry.to_string(), what: "entries in one archive", limit });
        }
        Ok(())
    }

    fn count_size(&mut self, header: &interpret::Header) -> Result<(), TarError> {
        let EntryKind::File { size } = header.kind else { return Ok(()) };
        self.total_size = self.total_size.saturating_add(size);
        if self.total_size > self.limits.total_size {
            let limit = self.limits.total_size;
            let entry = header.path.to_string();
            return Err(TarError::Limit { entry, what: "bytes of files in one archive", limit });
        }
        Ok(())
    }
}

/// The parser passes over a zero block that stands alone. Docker's own reader refuses it, and so do we: one
/// archive must not mean two things.
fn refuse_lone_zero_block(window: &[u8], offset: u64) -> Result<(), TarError> {
    match (window.get(..HEADER_SIZE), window.get(HEADER_SIZE..2 * HEADER_SIZE)) {
        (Some(first), Some(second))
            if first.iter().all(|&byte| byte == 0) && second.iter().any(|&byte| byte != 0) =>
        {
            Err(TarError::LoneZeroBlock { offset })
        }
        _ => Ok(()),
    }
}

impl Defaults {
    /// Takes over a global header: owner and time become defaults, what describes no object is ignored, and
    /// what would rename, resize or decorate every following entry is refused.
    fn apply(&mut self, data: &[u8], offset: u64) -> Result<(), TarError> {
        let bad =
            |field, problem: String| TarError::Field { entry: "(global header)".to_owned(), field, problem };
        for (key, value) in pax::records(data).map_err(|problem| bad("PAX data", problem.to_owned()))? {
            match key {
                b"uid" => self.uid = interpret::pax_id(value).map_err(|problem| bad("uid", problem))?,
                b"gid" => self.gid = interpret::pax_id(value).map_err(|problem| bad("gid", problem))?,
                b"mtime" => {
                    self.mtime = interpret::pax_mtime(value).map_err(|problem| bad("mtime", problem))?;
                }
                b"path" | b"linkpath" | b"size" => {
                    return Err(TarError::Global { offset, key: crate::error::shown(key) });
                }
                _ if key.starts_with(b"SCHILY.") || key.starts_with(b"GNU.sparse.") => {
                    return Err(TarError::Global { offset, key: crate::error::shown(key) });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

impl<R> std::fmt::Debug for Stream<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").field("entry", &self.entry).finish_non_exhaustive()
    }
}
