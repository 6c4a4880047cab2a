//! A repository in a bucket of an S3 store (publisher behaviour §14.2).
//!
//! Keys are the paths of a storage directory below a prefix: `PREFIX/data/ab/cdef…`, `PREFIX/.cvmfspublished`. A web
//! server or a cache in front of the bucket serves it; headers say how long each kind of thing may be kept.
//!
//! * An object is asked for before it is sent, so an interrupted publish is resumed where it stopped.
//! * Everything sent is looked for again before the manifest is signed: a store that confirmed an upload and lost it
//!   is found out ([`S3::settle`]).
//! * The manifest is replaced only if it is still the one that was read when the publisher began, whatever became
//!   of the lock. Stores without conditional writes are refused, unless `AWS_CONDITIONAL_PUT=disabled` says that nobody
//!   else publishes.

mod lease;

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bucket::connection::{Connection, Location, PART};
use bytes::Bytes;
use cvmfs_format::ObjectName;
use futures_util::StreamExt;
use object_store::path::Path;
use object_store::{
    Attribute, Attributes, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload,
    UpdateVersion,
};

use super::{MANIFEST, Put, Scratch, Storage, StorageError, StorageLock, StoredObject, read_bounded};
use crate::error::chain;
use lease::{Held, Lease};

/// Requests at the same time: each mostly waits for the store, so their number and not that of the cores counts.
const PARALLEL: usize = 32;
/// Where locks are, as in a storage directory: below what is never listed or served.
const LOCK: &str = "data/txn/publish.lock";
/// Most missing objects that a message names.
const MAX_NAMED: usize = 3;

/// How long caches may keep a thing, and what it is (publisher behaviour §14.2).
struct Headers {
    content_type: &'static str,
    cache_control: &'static str,
}

const IMMUTABLE: Headers =
    Headers { content_type: "application/octet-stream", cache_control: "max-age=259200" };
const MUTABLE: Headers = Headers { content_type: "application/x-cvmfs", cache_control: "max-age=61" };

/// A repository's place in a bucket.
pub struct S3 {
    connection: Connection,
    location: Location,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The manifest as it was when the lock was taken, or as it was written since.
    manifest: Seen,
    /// What was sent since the last [`Storage::settle`], with its size.
    sent: Vec<(ObjectName, u64)>,
    /// The lock, if one was taken.
    held: Option<Arc<Held>>,
}

#[derive(Default, Clone)]
enum Seen {
    #[default]
    Unknown,
    Absent,
    Version(UpdateVersion),
}

impl S3 {
    /// Opens the storage at `url`, of the form `s3://BUCKET/PREFIX`; nothing is sent yet.
    pub fn open(url: &str) -> Result<S3, StorageError> {
        let location = Location::parse(url)?;
        let connection = Connection::open(&location.bucket)?;
        Ok(S3 { connection, location, state: Mutex::default() })
    }

    fn path(&self, name: &str) -> Path {
        match self.location.prefix.as_str() {
            "" => Path::from(name),
            prefix => Path::from(format!("{prefix}/{name}")),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes need the lock, if one was taken, to be still ours.
    fn require_lock(&self) -> Result<(), StorageError> {
        let held = self.state().held.clone();
        held.map_or(Ok(()), |held| held.check(&self.path(LOCK)))
    }

    fn head(&self, path: &Path) -> Result<Option<ObjectMeta>, StorageError> {
        self.connection.head(path).map_err(at("look for", path))
    }

    fn put(
        &self,
        path: &Path,
        content: Bytes,
        headers: &Headers,
        mode: PutMode,
    ) -> object_store::Result<UpdateVersion> {
        let options = PutOptions { mode, attributes: attributes(headers), ..PutOptions::default() };
        let path = path.clone();
        self.connection.wait(|store| async move {
            store.put_opts(&path, PutPayload::from_bytes(content), options).await.map(UpdateVersion::from)
        })
    }

    /// Replaces the manifest unless somebody else did since it was read.
    fn put_manifest(&self, content: &[u8]) -> Result<(), StorageError> {
        let path = self.path(MANIFEST);
        let mode = match self.state().manifest.clone() {
            _ if !self.connection.conditional => PutMode::Overwrite,
            Seen::Version(version) => PutMode::Update(version),
            Seen::Absent | Seen::Unknown => PutMode::Create,
        };
        let version = match self.put(&path, Bytes::copy_from_slice(content), &MUTABLE, mode) {
            Ok(version) => version,
            Err(error) => {
                // an attempt whose answer was lost may have succeeded: then the manifest is ours
                match self.read(&path, content.len() as u64) {
                    Ok(Some((there, version))) if there == content => version,
                    _ if is_condition(&error) => {
                        return Err(StorageError::Overtaken { path: path.to_string() });
                    }
                    _ => return Err(at("write", &path)(error)),
                }
            }
        };
        self.state().manifest = Seen::Version(version);
        Ok(())
    }

    fn read(&self, path: &Path, limit: u64) -> Result<Option<(Vec<u8>, UpdateVersion)>, StorageError> {
        let asked = path.clone();
        let answer = self.connection.wait(|store| async move {
            let found = store.get(&asked).await?;
            let version =
                UpdateVersion { e_tag: found.meta.e_tag.clone(), version: found.meta.version.clone() };
            if found.meta.size > limit {
                return Ok(None);
            }
            Ok(Some((found.bytes().await?.to_vec(), version)))
        });
        match answer {
            Ok(Some(found)) => Ok(Some(found)),
            Ok(None) => Err(StorageError::TooLarge { path: path.to_string(), limit }),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(at("read", path)(error)),
        }
    }

    fn delete(&self, path: &Path) -> Result<(), StorageError> {
        let asked = path.clone();
        match self.connection.wait(|store| async move { store.delete(&asked).await }) {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(at("remove", path)(error)),
        }
    }

    /// Looks for all of `objects` at once; returns those that are not there as they should be.
    fn missing(&self, objects: Vec<(ObjectName, u64)>) -> Result<Vec<ObjectName>, StorageError> {
        let asked: Vec<_> =
            objects.into_iter().map(|(name, size)| (self.path(&name.path()), name, size)).collect();
        let answer = self.connection.wait(|store| async move {
            let look = asked.into_iter().map(|(path, name, size)| {
                let store = store.clone();
                async move {
                    match store.head(&path).await {
                        Ok(found) if found.size == size => Ok(None),
                        Ok(_) | Err(object_store::Error::NotFound { .. }) => Ok(Some(name)),
                        Err(error) => Err(error),
                    }
                }
            });
            let mut looked = futures_util::stream::iter(look).buffer_unordered(PARALLEL);
            let mut missing = Vec::new();
            while let Some(found) = looked.next().await {
                missing.extend(found?);
            }
            Ok(missing)
        });
        answer.map_err(at("look for", &self.path("data")))
    }
}

impl Storage for S3 {
    fn location(&self) -> String {
        let Location { bucket, prefix } = &self.location;
        format!("s3://{bucket}/{prefix}")
    }

    fn lock(&self, wait: Duration) -> Result<Box<dyn StorageLock>, StorageError> {
        self.state().manifest = Seen::Unknown;
        if !self.connection.conditional {
            tracing::warn!(
                "AWS_CONDITIONAL_PUT=disabled: nothing keeps two publishers of {} apart",
                self.location()
            );
            return Ok(Box::new(NoLock));
        }
        let (lease, held) = Lease::take(&self.connection, &self.path(LOCK), wait)?;
        self.state().held = Some(held);
        Ok(Box::new(lease))
    }

    fn writers(&self) -> usize {
        PARALLEL
    }

    fn put_object(&self, name: &ObjectName, stored: &[u8]) -> Result<Put, StorageError> {
        self.require_lock()?;
        let path = self.path(&name.path());
        let size = stored.len() as u64;
        match self.head(&path)? {
            Some(there) if there.size == size => return Ok(Put::Present),
            Some(there) => tracing::warn!(
                object = %name.path(), found = there.size, expected = size, "replacing a damaged object"
            ),
            None => {}
        }
        self.put(&path, Bytes::copy_from_slice(stored), &IMMUTABLE, PutMode::Overwrite)
            .map_err(at("write", &path))?;
        self.state().sent.push((*name, size));
        Ok(Put::New)
    }

    fn put_object_file(&self, name: &ObjectName, file: &std::path::Path) -> Result<Put, StorageError> {
        let path = self.path(&name.path());
        let mut opened = File::open(file).map_err(broken("read for", &path))?;
        let size = opened.metadata().map_err(broken("read for", &path))?.len();
        if size <= PART {
            let content = read_bounded(opened, &file.display().to_string(), PART)?;
            return self.put_object(name, &content);
        }
        self.require_lock()?;
        if self.head(&path)?.is_some_and(|there| there.size == size) {
            return Ok(Put::Present);
        }
        self.connection
            .put_file(&path, &mut opened, size, attributes(&IMMUTABLE))
            .map_err(at("write", &path))?;
        self.state().sent.push((*name, size));
        Ok(Put::New)
    }

    fn object_size(&self, name: &ObjectName) -> Result<Option<u64>, StorageError> {
        Ok(self.head(&self.path(&name.path()))?.map(|found| found.size))
    }

    fn open_object(&self, name: &ObjectName) -> Result<Box<dyn Read + Send>, StorageError> {
        let path = self.path(&name.path());
        Ok(Box::new(self.connection.read(&path).map_err(at("open", &path))?))
    }

    fn delete_object(&self, name: &ObjectName) -> Result<(), StorageError> {
        self.require_lock()?;
        self.delete(&self.path(&name.path()))?;
        self.delete(&self.path(&name.alternative_path()))
    }

    fn get_file(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>, StorageError> {
        let found = self.read(&self.path(name), limit)?;
        let mut state = self.state();
        // the first one counts: the publish is built on it
        if name == MANIFEST && matches!(state.manifest, Seen::Unknown) {
            state.manifest =
                found.as_ref().map_or(Seen::Absent, |(_, version)| Seen::Version(version.clone()));
        }
        Ok(found.map(|(content, _)| content))
    }

    fn put_file(&self, name: &str, content: &[u8]) -> Result<(), StorageError> {
        self.require_lock()?;
        if name == MANIFEST {
            return self.put_manifest(content);
        }
        let headers = if name.starts_with(".cvmfs") { &MUTABLE } else { &IMMUTABLE };
        let path = self.path(name);
        self.put(&path, Bytes::copy_from_slice(content), headers, PutMode::Overwrite)
            .map_err(at("write", &path))?;
        Ok(())
    }

    fn delete_file(&self, name: &str) -> Result<(), StorageError> {
        self.require_lock()?;
        self.delete(&self.path(name))
    }

    fn settle(&self) -> Result<(), StorageError> {
        let sent = std::mem::take(&mut self.state().sent);
        let missing = self.missing(sent)?;
        if missing.is_empty() {
            return Ok(());
        }
        let named: Vec<String> = missing.iter().take(MAX_NAMED).map(ObjectName::path).collect();
        Err(StorageError::Lost { count: missing.len(), named: named.join(", ") })
    }

    fn list_objects(&self, visit: &mut dyn FnMut(StoredObject)) -> Result<(), StorageError> {
        let data = self.path("data");
        let below = if self.location.prefix.is_empty() { 0 } else { self.location.prefix.len() + 1 };
        let listed = self.connection.list(Some(&data)).map_err(at("list", &data))?;
        for item in listed {
            let item = item.map_err(at("list", &data))?;
            let path = item.location.as_ref().get(below..).unwrap_or_default().to_owned();
            if !path.starts_with("data/txn/") {
                visit(StoredObject { path, size: item.size, modified: item.last_modified.timestamp() });
            }
        }
        Ok(())
    }

    fn scratch(&self) -> Result<Scratch, StorageError> {
        Scratch::in_temporary_directory()
    }
}

impl fmt::Debug for S3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // the connection knows secrets
        f.debug_struct("S3").field("location", &self.location).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct NoLock;

impl StorageLock for NoLock {}

fn attributes(headers: &Headers) -> Attributes {
    let mut attributes = Attributes::new();
    attributes.insert(Attribute::ContentType, headers.content_type.into());
    attributes.insert(Attribute::CacheControl, headers.cache_control.into());
    attributes
}

fn is_condition(error: &object_store::Error) -> bool {
    matches!(error, object_store::Error::Precondition { .. } | object_store::Error::AlreadyExists { .. })
}

fn at(action: &'static str, path: &Path) -> impl FnOnce(object_store::Error) -> StorageError {
    let path = path.to_string();
    move |error| match error {
        object_store::Error::NotFound { .. } => {
            StorageError::Io { action, path, source: io::Error::new(io::ErrorKind::NotFound, chain(&error)) }
        }
        error => StorageError::Remote { action, path, source: Box::new(error) },
    }
}

fn broken(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StorageError {
    let path = path.to_string();
    move |source| StorageError::Io { action, path, source }
}
