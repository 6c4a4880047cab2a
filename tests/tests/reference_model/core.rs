//! The client core: look-ups in snapshots, objects from the store.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use cvmfs_client::clock::SystemClock;
use cvmfs_client::config::{ClientSettings, Config, ConfigSources};
use cvmfs_client::deadline::Deadline;
use cvmfs_client::error::ClientError;
use cvmfs_client::network::FetchError;
use cvmfs_client::repository::Repository;
use cvmfs_client::snapshot::Located;
use cvmfs_client::store::{CachedFile, ChunkedFile, ChunkedHandle};
use cvmfs_client::variant::expand;
use cvmfs_format::catalog::EntryKind;
use cvmfs_format::xattr::Xattrs;
use cvmfs_format::{ObjectKind, ObjectName};

use crate::client::{Client, Errno};
use crate::site::{FQRN, Site};
use crate::tree::Attributes;

/// Longer than any sequence of attempts with the time-outs of these clients.
const PATIENCE: Duration = Duration::from_secs(30);

/// See the module documentation.
#[derive(Debug)]
pub struct Core(Repository);

/// An open file.
#[derive(Debug)]
pub enum CoreFile {
    Whole(CachedFile),
    Chunked(ChunkedHandle),
}

impl Core {
    fn locate(&self, path: &str) -> Result<Option<Located>, Errno> {
        self.0.snapshot().resolve(path.as_bytes(), deadline()).map_err(errno)
    }
}

impl Client for Core {
    type File = CoreFile;

    fn start(site: &Site) -> Result<Core, String> {
        let sources = ConfigSources { files: Some(vec![site.client_config()]), ..ConfigSources::default() };
        let config = Config::load(FQRN, &sources).map_err(|error| error.to_string())?;
        let settings = ClientSettings::from(&config).map_err(|error| error.to_string())?;
        Repository::open(settings, Arc::new(SystemClock)).map(Core).map_err(|error| error.to_string())
    }

    fn crash(&self) {}

    fn revision(&self) -> u64 {
        self.0.snapshot().pinned().revision
    }

    fn refresh(&self) -> Result<(), String> {
        self.0.refresh(deadline()).map(drop).map_err(|error| error.to_string())
    }

    fn look_up(&self, path: &str) -> Result<Option<Attributes>, Errno> {
        let Some(Located { entry, .. }) = self.locate(path)? else { return Ok(None) };
        let xattrs = entry.xattrs.as_deref().map(|blob| Xattrs::parse(blob).unwrap()).unwrap_or_default();
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        // The mount expands targets, with a function of the core; the site sets no variable.
        let target = (entry.kind() == EntryKind::Symlink).then(|| expand(&entry.symlink, &|_| None));
        Ok(Some(Attributes {
            kind: match entry.kind() {
                EntryKind::Directory => "directory",
                EntryKind::File => "file",
                EntryKind::Symlink => "symlink",
                EntryKind::Fifo => "fifo",
                EntryKind::CharDevice => "char",
                EntryKind::Socket => "socket",
                EntryKind::BlockDevice => "block",
            },
            mode: entry.mode & 0o7777,
            owner: (entry.uid, entry.gid),
            mtime: entry.mtime,
            size: match &target {
                Some(target) => target.len() as u64,
                None if entry.kind().is_device() => 0,
                None => entry.size,
            },
            nlink: entry.nlink(),
            target: target.as_deref().map(text),
            device: entry.device_number(),
            xattrs: xattrs.iter().map(|(name, value)| (text(name), value.to_vec())).collect(),
        }))
    }

    fn list(&self, path: &str) -> Result<Option<Vec<String>>, Errno> {
        let snapshot = self.0.snapshot();
        let found = snapshot.resolve(path.as_bytes(), deadline()).map_err(errno)?;
        let Some(directory) = found.filter(|found| found.entry.is_directory()) else { return Ok(None) };
        let (_, entries) = snapshot.list(&directory, deadline()).map_err(errno)?;
        Ok(Some(entries.into_iter().map(|entry| String::from_utf8(entry.name).unwrap()).collect()))
    }

    fn open(&self, path: &str) -> Result<Option<CoreFile>, Errno> {
        let snapshot = self.0.snapshot();
        let Some(file) = snapshot.resolve(path.as_bytes(), deadline()).map_err(errno)? else {
            return Ok(None);
        };
        let (entry, store) = (&file.entry, self.0.store());
        if entry.is_chunked() {
            let chunks = snapshot.chunks(&file, deadline()).map_err(errno)?;
            let file = ChunkedFile { chunks, compression: entry.compression(), size: entry.size };
            return store.chunked(&file).map(|handle| Some(CoreFile::Chunked(handle))).map_err(fetch_errno);
        }
        let name = ObjectName::new(entry.hash.unwrap(), ObjectKind::File);
        let object = store.object(&name, entry.compression(), Some(entry.size), deadline());
        object.map(|object| Some(CoreFile::Whole(object))).map_err(fetch_errno)
    }

    fn read(&self, file: &CoreFile, offset: u64, length: usize) -> Result<Vec<u8>, Errno> {
        let mut buffer = vec![0; length];
        let length = match file {
            CoreFile::Whole(object) => object.file.read_at(&mut buffer, offset).unwrap(),
            CoreFile::Chunked(handle) => {
                handle.read_at(&mut buffer, offset, deadline()).map_err(fetch_errno)?
            }
        };
        buffer.truncate(length);
        Ok(buffer)
    }
}

fn deadline() -> Deadline {
    Deadline::after(PATIENCE)
}

fn errno(error: ClientError) -> Errno {
    Errno { number: error.errno(), text: error.to_string() }
}

fn fetch_errno(error: FetchError) -> Errno {
    errno(error.into())
}
