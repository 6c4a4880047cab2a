//! File content: from catalog row to an open cache file, by passthrough or by READ.

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cvmfs_client::authz::{Caller, Credentials};
use cvmfs_client::deadline::Patience;
use cvmfs_client::error::ClientError;
use cvmfs_client::store::{Asked, CachedFile, ChunkedFile, ChunkedHandle, Context, ObjectStore};
use cvmfs_format::catalog::EntryKind;
use cvmfs_format::{ObjectKind, ObjectName};

use crate::handles::{Handles, Mode, Offer};
use crate::nodes::Node;
use crate::profile::{Chosen, Profile};
use crate::traffic::Traffic;

/// Files kept open for reads that no open preceded (profile `no_open`). Each costs a
/// descriptor; one that is not kept costs an `open` of the cache file.
const MAX_UNOPENED: usize = 512;

/// Why content cannot be delivered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ContentError {
    /// Network, cache or damage.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The cache file could not be read.
    #[error("cannot read the cache file")]
    Read(#[source] std::io::Error),
    /// The table of open files is full or the kernel refused a backing file.
    #[error("cannot open a handle")]
    Handle(#[source] std::io::Error),
    /// The row has neither hash nor chunks, or is no file.
    #[error("{0}")]
    Unsupported(&'static str),
}

impl ContentError {
    /// The error number for the kernel.
    pub(crate) fn errno(&self) -> i32 {
        match self {
            ContentError::Client(error) => error.errno(),
            ContentError::Handle(error) if error.raw_os_error() == Some(libc::ENFILE) => libc::ENFILE,
            _ => libc::EIO,
        }
    }
}

/// See the module documentation.
#[derive(Debug)]
pub(crate) struct Content {
    store: ObjectStore,
    handles: Handles,
    chosen: Chosen,
    /// Where READ requests are answered from, by node.
    plain: Mutex<Plain>,
    /// What had to be fetched.
    pub(crate) traffic: Traffic,
}

#[derive(Debug, Default)]
struct Plain {
    sources: HashMap<u64, (Arc<Source>, u64)>,
    tick: u64,
}

/// Where READ requests of a node are answered from.
#[derive(Debug)]
enum Source {
    Whole(CachedFile),
    Chunked(ChunkedHandle),
}

/// Who reads, for sites that tell it to their servers, and with which right.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reader {
    pub(crate) caller: Option<Caller>,
    pub(crate) credentials: Option<Arc<Credentials>>,
}

/// How a file was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Opened {
    pub(crate) handle: u64,
    pub(crate) mode: Mode,
    /// The publisher asks for reads past the page cache.
    pub(crate) is_direct: bool,
    /// A worker before opened it for the same request.
    pub(crate) is_repeated: bool,
}

impl Content {
    pub(crate) fn new(store: ObjectStore, handles: Handles, chosen: Chosen) -> Content {
        Content { store, handles, chosen, plain: Mutex::default(), traffic: Traffic::default() }
    }

    /// How reads reach the content, and why.
    pub(crate) fn chosen(&self) -> &Chosen {
        &self.chosen
    }

    /// Opens `node` if that needs no fetch.
    pub(crate) fn open_at_once(&self, node: &Node, unique: u64) -> Option<Result<Opened, ContentError>> {
        let entry = &node.located.entry;
        if entry.kind() != EntryKind::File {
            return Some(Err(ContentError::Unsupported("not a regular file")));
        }
        let is_repeated = self.handles.knows(unique);
        if self.is_passthrough()
            && let Ok((handle, mode)) = self.handles.open(node.id, unique, &Offer::Nothing)
        {
            if mode != Mode::Plain {
                return Some(Ok(Opened { handle, mode, is_direct: false, is_repeated }));
            }
            // The source may be gone with a predecessor; the usual way finds it again.
            self.handles.release(handle);
        }
        self.source_at_once(node).map(|source| self.open_source(node, unique, source?))
    }

    /// Opens `node`: the whole content is verified and local before a passthrough is answered.
    pub(crate) fn open(
        &self,
        node: &Node,
        unique: u64,
        reader: &Reader,
        patience: Patience<'_>,
    ) -> Result<Opened, ContentError> {
        if node.located.entry.kind() != EntryKind::File {
            return Err(ContentError::Unsupported("not a regular file"));
        }
        let source = self.source(node, reader, patience)?;
        self.traffic.file(node);
        self.open_source(node, unique, source)
    }

    fn open_source(&self, node: &Node, unique: u64, source: Source) -> Result<Opened, ContentError> {
        let complete = match &source {
            Source::Whole(_) => None,
            Source::Chunked(handle) => handle.complete_file().map_err(ClientError::from)?,
        };
        let file = match (&source, &complete) {
            (Source::Whole(cached), _) | (_, Some(cached)) => Some(&cached.file),
            _ => None,
        };
        let offer = match file {
            Some(file) if self.is_passthrough() => Offer::File(file),
            _ => Offer::PlainOnly,
        };
        let is_repeated = self.handles.knows(unique);
        let (handle, mode) = match self.handles.open(node.id, unique, &offer) {
            Ok(opened) => opened,
            Err(error) if matches!(offer, Offer::File(_)) && error.raw_os_error() != Some(libc::ENFILE) => {
                tracing::warn!(%error, "the kernel refuses a backing file; reading through the client instead");
                self.handles.open(node.id, unique, &Offer::PlainOnly).map_err(ContentError::Handle)?
            }
            Err(error) => return Err(ContentError::Handle(error)),
        };
        if mode == Mode::Plain {
            self.plain().sources.entry(node.id).or_insert_with(|| (Arc::new(source), 0));
        }
        let is_direct = mode == Mode::Plain && node.located.entry.is_direct_io();
        Ok(Opened { handle, mode, is_direct, is_repeated })
    }

    /// Reads up to `buffer.len()` bytes if that needs no fetch; fewer only at the end of the file.
    pub(crate) fn read_at_once(
        &self,
        node: &Node,
        offset: u64,
        buffer: &mut [u8],
    ) -> Option<Result<usize, ContentError>> {
        let known = self.plain().get(node.id);
        let source = match known {
            Some(source) => source,
            None => match self.source_at_once(node)? {
                Ok(source) => self.keep(node, source),
                Err(error) => return Some(Err(error)),
            },
        };
        match source.as_ref() {
            Source::Whole(cached) => {
                Some(read_fully(&cached.file, buffer, offset).map_err(ContentError::Read))
            }
            Source::Chunked(handle) if handle.is_complete() => {
                let deadline = cvmfs_client::deadline::Deadline::after(std::time::Duration::ZERO);
                Some(
                    handle.read_at(buffer, offset, deadline).map_err(|error| ClientError::from(error).into()),
                )
            }
            Source::Chunked(_) => None,
        }
    }

    /// Reads up to `buffer.len()` bytes; fewer only at the end of the file.
    pub(crate) fn read(
        &self,
        node: &Node,
        offset: u64,
        buffer: &mut [u8],
        patience: Patience<'_>,
    ) -> Result<usize, ContentError> {
        let known = self.plain().get(node.id);
        let source = match known {
            Some(source) => source,
            None => {
                let source = self.source(node, &Reader::default(), patience)?;
                self.keep(node, source)
            }
        };
        match source.as_ref() {
            Source::Whole(cached) => match read_fully(&cached.file, buffer, offset) {
                Err(error) if error.raw_os_error() == Some(libc::EIO) => {
                    tracing::warn!(%error, object = ?object_name(node), "a cached file cannot be read");
                    self.read_anew(node, offset, buffer, patience)
                }
                outcome => outcome.map_err(ContentError::Read),
            },
            Source::Chunked(handle) => {
                let length = handle.read_at(buffer, offset, patience).map_err(ClientError::from)?;
                self.traffic.part(node, length);
                Ok(length)
            }
        }
    }

    /// Begins to fetch a file that is no more than one object; false if it is in the cache.
    pub(crate) fn fetch_ahead(&self, node: &Node) -> bool {
        let begins = asked(node, &Reader::default()).is_some_and(|asked| self.store.fetch_ahead(&asked));
        if begins {
            self.traffic.file(node);
        }
        begins
    }

    /// Returns whether this was the node's last open: its content is let go then.
    pub(crate) fn release(&self, node: u64, handle: u64) -> bool {
        let is_last = self.handles.release(handle);
        if is_last {
            self.plain().sources.remove(&node);
        }
        is_last
    }

    /// Files that are open now.
    pub(crate) fn open_files(&self) -> usize {
        self.handles.open_nodes()
    }

    fn is_passthrough(&self) -> bool {
        self.chosen.profile == Profile::Passthrough
    }

    /// Keeps the source of a file that was opened by a predecessor of this process, or that
    /// the kernel opened without asking.
    fn keep(&self, node: &Node, source: Source) -> Arc<Source> {
        let source = Arc::new(source);
        let is_unopened = self.chosen.profile == Profile::NoOpen;
        if is_unopened || self.handles.mode(node.id).is_some() {
            let mut plain = self.plain();
            if is_unopened && plain.sources.len() >= MAX_UNOPENED {
                plain.forget_half();
            }
            let tick = plain.next_tick();
            plain.sources.insert(node.id, (source.clone(), tick));
        }
        source
    }

    /// The content if it can be had without a fetch.
    fn source_at_once(&self, node: &Node) -> Option<Result<Source, ContentError>> {
        if node.located.entry.is_chunked() {
            return Some(Ok(Source::Whole(self.store.cached_chunked(&chunked_file(node))?)));
        }
        Some(Ok(Source::Whole(self.store.find(&asked(node, &Reader::default())?)?)))
    }

    fn source(&self, node: &Node, reader: &Reader, patience: Patience<'_>) -> Result<Source, ContentError> {
        if node.located.entry.is_chunked() {
            let handle = self.store.chunked_within(&chunked_file(node), context(node, reader));
            return Ok(Source::Chunked(handle.map_err(ClientError::from)?));
        }
        let asked = asked(node, reader).ok_or(ContentError::Unsupported("the catalog names no content"))?;
        let cached = self.store.fetch(&asked, patience).map_err(ClientError::from)?;
        Ok(Source::Whole(cached))
    }

    /// The disk does not give the bytes of a cached file: it is fetched once more.
    fn read_anew(
        &self,
        node: &Node,
        offset: u64,
        buffer: &mut [u8],
        patience: Patience<'_>,
    ) -> Result<usize, ContentError> {
        if let Some(name) = object_name(node) {
            self.store.forget(&name, node.located.entry.compression());
        }
        let source = Arc::new(self.source(node, &Reader::default(), patience)?);
        if let Some((known, _)) = self.plain().sources.get_mut(&node.id) {
            *known = source.clone();
        }
        match source.as_ref() {
            Source::Whole(cached) => read_fully(&cached.file, buffer, offset).map_err(ContentError::Read),
            Source::Chunked(handle) => {
                Ok(handle.read_at(buffer, offset, patience).map_err(ClientError::from)?)
            }
        }
    }

    fn plain(&self) -> MutexGuard<'_, Plain> {
        self.plain.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Plain {
    fn get(&mut self, node: u64) -> Option<Arc<Source>> {
        let tick = self.next_tick();
        let (source, used) = self.sources.get_mut(&node)?;
        *used = tick;
        Some(source.clone())
    }

    fn next_tick(&mut self) -> u64 {
        self.tick += 1;
        self.tick
    }

    /// Lets the less recently used half go.
    fn forget_half(&mut self) {
        let mut used: Vec<u64> = self.sources.values().map(|(_, used)| *used).collect();
        used.sort_unstable();
        let limit = used.get(used.len() / 2).copied().unwrap_or_default();
        self.sources.retain(|_, (_, used)| *used > limit);
    }
}

/// A file without a name on the file system of `directory`, to try passthrough with.
pub(crate) fn nameless_file(directory: &Path) -> std::io::Result<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::File::options().read(true).write(true).custom_flags(libc::O_TMPFILE).open(directory)
}

/// The object that holds a file's content.
pub(crate) fn object_name(node: &Node) -> Option<ObjectName> {
    node.located.entry.hash.map(|hash| ObjectName::new(hash, ObjectKind::File))
}

/// The object of a file that is not chunked.
fn asked<'a>(node: &'a Node, reader: &'a Reader) -> Option<Asked<'a>> {
    let entry = &node.located.entry;
    let asked = Asked::new(object_name(node)?, entry.compression(), Some(entry.size));
    Some(asked.within(context(node, reader)))
}

fn context<'a>(node: &'a Node, reader: &'a Reader) -> Context<'a> {
    Context {
        path: Some(&node.located.path),
        is_external: node.located.entry.is_external(),
        caller: reader.caller,
        credentials: reader.credentials.as_ref(),
    }
}

fn chunked_file(node: &Node) -> ChunkedFile {
    let entry = &node.located.entry;
    ChunkedFile { chunks: node.chunks.to_vec(), compression: entry.compression(), size: entry.size }
}

fn read_fully(file: &std::fs::File, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(length) => filled += length,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
