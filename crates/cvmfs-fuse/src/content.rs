//! File content: from catalog row to an open cache file, by passthrough or by READ.

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cvmfs_client::deadline::Deadline;
use cvmfs_client::error::ClientError;
use cvmfs_client::store::{CachedFile, ChunkedFile, ChunkedHandle, ObjectStore};
use cvmfs_format::catalog::EntryKind;
use cvmfs_format::{ObjectKind, ObjectName};

use crate::handles::{Handles, Mode, Offer};
use crate::nodes::Node;

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
    /// The row has neither hash nor chunks, or is external.
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
    passthrough: AtomicBool,
    /// Content of files open in plain mode, by node.
    plain: Mutex<HashMap<u64, Arc<Source>>>,
}

/// Where READ requests of a node are answered from.
#[derive(Debug)]
enum Source {
    Whole(CachedFile),
    Chunked(ChunkedHandle),
}

impl Content {
    pub(crate) fn new(store: ObjectStore, handles: Handles) -> Content {
        Content { store, handles, passthrough: AtomicBool::new(false), plain: Mutex::default() }
    }

    /// Tries passthrough with a file of the cache and uses it from now on if it works.
    /// Also closes backing ids that a killed predecessor left unrecorded.
    pub(crate) fn probe_passthrough(&self) {
        match nameless_file(self.store.cache().directory()).and_then(|file| self.handles.sweep(&file)) {
            Ok(()) => self.passthrough.store(true, Ordering::SeqCst),
            Err(error) => tracing::warn!(
                %error,
                "passthrough is not available, reads go through the client; \
                 it needs Linux 6.9, root in the initial user namespace and a cache on a real file system"
            ),
        }
    }

    /// Whether files are opened by passthrough.
    pub(crate) fn is_passthrough(&self) -> bool {
        self.passthrough.load(Ordering::SeqCst)
    }

    /// Whether `node` can be opened without a fetch.
    pub(crate) fn is_cached(&self, node: &Node) -> bool {
        match object_name(node) {
            // A chunked file is opened without fetching anything.
            _ if node.located.entry.is_chunked() => true,
            Some(name) => {
                let entry = &node.located.entry;
                self.store.is_cached(&name, entry.compression(), Some(entry.size))
            }
            None => true,
        }
    }

    /// Whether a READ needs no fetch.
    pub(crate) fn is_readable(&self, node: &Node) -> bool {
        let plain = self.plain.lock().unwrap_or_else(PoisonError::into_inner);
        match plain.get(&node.id).map(Arc::as_ref) {
            Some(Source::Whole(_)) => true,
            Some(Source::Chunked(handle)) => handle.is_complete(),
            None => false,
        }
    }

    /// Opens `node`: the whole content is verified and local before a passthrough is answered.
    pub(crate) fn open(
        &self,
        node: &Node,
        unique: u64,
        deadline: Deadline,
    ) -> Result<(u64, Mode), ContentError> {
        if node.located.entry.kind() != EntryKind::File {
            return Err(ContentError::Unsupported("not a regular file"));
        }
        let source = self.source(node, deadline)?;
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
        let (handle, mode) = match self.handles.open(node.id, unique, &offer) {
            Ok(opened) => opened,
            Err(error) if matches!(offer, Offer::File(_)) && error.raw_os_error() != Some(libc::ENFILE) => {
                tracing::warn!(%error, "the kernel refuses a backing file; reading through the client instead");
                self.handles.open(node.id, unique, &Offer::PlainOnly).map_err(ContentError::Handle)?
            }
            Err(error) => return Err(ContentError::Handle(error)),
        };
        if mode == Mode::Plain {
            self.plain
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .entry(node.id)
                .or_insert_with(|| Arc::new(source));
        }
        Ok((handle, mode))
    }

    /// Reads up to `buffer.len()` bytes; fewer only at the end of the file.
    pub(crate) fn read(
        &self,
        node: &Node,
        offset: u64,
        buffer: &mut [u8],
        deadline: Deadline,
    ) -> Result<usize, ContentError> {
        let known = self.plain.lock().unwrap_or_else(PoisonError::into_inner).get(&node.id).cloned();
        let source = match known {
            Some(source) => source,
            None => {
                // Opened by a predecessor of this process.
                let source = Arc::new(self.source(node, deadline)?);
                if self.handles.mode(node.id).is_some() {
                    let mut plain = self.plain.lock().unwrap_or_else(PoisonError::into_inner);
                    plain.insert(node.id, source.clone());
                }
                source
            }
        };
        match source.as_ref() {
            Source::Whole(cached) => read_fully(&cached.file, buffer, offset).map_err(ContentError::Read),
            Source::Chunked(handle) => {
                Ok(handle.read_at(buffer, offset, deadline).map_err(ClientError::from)?)
            }
        }
    }

    /// The last release of a node lets its content go.
    pub(crate) fn release(&self, node: u64, handle: u64) {
        if self.handles.release(handle) {
            self.plain.lock().unwrap_or_else(PoisonError::into_inner).remove(&node);
        }
    }

    /// Files that are open now.
    pub(crate) fn open_files(&self) -> usize {
        self.handles.open_nodes()
    }

    fn source(&self, node: &Node, deadline: Deadline) -> Result<Source, ContentError> {
        let entry = &node.located.entry;
        if entry.is_external() {
            return Err(ContentError::Unsupported("external files are not supported by this version"));
        }
        if entry.is_chunked() {
            let file = ChunkedFile {
                chunks: node.chunks.clone(),
                compression: entry.compression(),
                size: entry.size,
            };
            return Ok(Source::Chunked(self.store.chunked(&file).map_err(ClientError::from)?));
        }
        let name = object_name(node).ok_or(ContentError::Unsupported("the catalog names no content"))?;
        let cached = self
            .store
            .object(&name, entry.compression(), Some(entry.size), deadline)
            .map_err(ClientError::from)?;
        Ok(Source::Whole(cached))
    }
}

/// A file without a name on the file system of `directory`, to try passthrough with.
fn nameless_file(directory: &std::path::Path) -> std::io::Result<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::File::options().read(true).write(true).custom_flags(libc::O_TMPFILE).open(directory)
}

fn object_name(node: &Node) -> Option<ObjectName> {
    node.located.entry.hash.map(|hash| ObjectName::new(hash, ObjectKind::File))
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
