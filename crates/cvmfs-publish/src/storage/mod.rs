//! Where a repository's bytes are kept.
//!
//! A [`Storage`] holds two kinds of things: *objects*, named by their content,
//! written once and never changed, and a few *files* below the storage root
//! (manifest, whitelist, reflog, …), each replaced as a whole. Everything else of
//! this crate is written against the trait, so a backend only has to keep these
//! promises:
//!
//! * an object becomes visible under its name complete or not at all;
//! * a replaced file is seen either in its old or in its new form;
//! * one publisher at a time holds the [`StorageLock`].
//!
//! Repository format §1 (layout), publisher behaviour §1 and §14.

mod directory;
mod http;
mod known;
mod s3;
mod scratch;
mod writeback;

use std::fmt::Debug;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bucket::connection::InvalidLocation;
use cvmfs_format::ObjectName;

pub use directory::Directory;
pub use http::Http;
pub(crate) use known::Content;
pub use known::Known;
pub use s3::S3;
pub use scratch::Scratch;

/// The signed description of the current revision.
pub const MANIFEST: &str = ".cvmfspublished";
/// The signed list of acceptable certificates.
pub const WHITELIST: &str = ".cvmfswhitelist";
/// The log of every root object that was published and not yet collected.
pub const REFLOG: &str = ".cvmfsreflog";
/// When garbage was last collected, and on replicas when they were last brought up to date.
pub const STATUS: &str = ".cvmfs_status.json";
/// Its presence allows replication.
pub const MASTER_REPLICA: &str = ".cvmfs_master_replica";

/// What became of an object that was to be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// It was not there and has been written.
    New,
    /// A damaged one was there and has been replaced.
    Replaced,
    /// An object of this name and length was there already; nothing was written.
    Present,
}

/// One object as a listing of the storage shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredObject {
    /// Path below the storage root, such as `data/ab/cdef…C`. Not necessarily a valid object name.
    pub path: String,
    /// Stored bytes.
    pub size: u64,
    /// Unix time at which it was stored.
    pub modified: i64,
}

/// A failure of the storage, naming the object concerned.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The operating system refused.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// The path concerned.
        path: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The storage directory does not exist.
    #[error(
        "there is no storage at {path}: create a repository with `cvmfs-publish mkfs` or correct --storage"
    )]
    NoStorage {
        /// The path that was given.
        path: String,
    },
    /// A `s3://` location, or the `AWS_*` variables with it, makes no sense.
    #[error("{location}: {reason}")]
    InvalidLocation {
        /// The location that was given.
        location: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An S3 store refused, or could not be reached.
    #[error("cannot {action} {path}")]
    Remote {
        /// What was tried, as a verb.
        action: &'static str,
        /// The key concerned.
        path: String,
        /// Why it failed.
        #[source]
        source: Box<object_store::Error>,
    },
    /// A web server did not answer as it should.
    #[error("cannot read {url}: {reason}")]
    Unreachable {
        /// What was asked for.
        url: String,
        /// The last answer, or what happened instead of one.
        reason: String,
    },
    /// A change of something that can only be read.
    #[error("{location} can only be read: changes need a directory or a bucket")]
    ReadOnly {
        /// The storage.
        location: String,
    },
    /// A web server does not tell what it has.
    #[error("{location} is behind a web server, so what is stored there cannot be listed")]
    NoListing {
        /// The storage.
        location: String,
    },
    /// A store cannot keep two publishers apart.
    #[error(
        "{location} has no conditional writes ({reason}), so two publishers could overwrite each other: use \
         another store, or set AWS_CONDITIONAL_PUT=disabled if nobody else ever publishes to it"
    )]
    NoConditionalWrites {
        /// The store.
        location: String,
        /// How that showed.
        reason: String,
    },
    /// The manifest changed since this publisher began.
    #[error("{path} was replaced by another publisher meanwhile: nothing was published, do it again")]
    Overtaken {
        /// The manifest's key.
        path: String,
    },
    /// The lock was not renewed in time, so that another publisher may have it.
    #[error(
        "the lock {path} was lost, as the store could not be reached for too long: nothing was published"
    )]
    LockLost {
        /// The lock's key.
        path: String,
    },
    /// Objects whose upload was confirmed are not there.
    #[error(
        "the store confirmed {count} uploads and does not have them ({named}): nothing was published, do it again"
    )]
    Lost {
        /// How many.
        count: usize,
        /// Some of them, as paths below the storage root.
        named: String,
    },
    /// Something is larger than its reader is willing to take.
    #[error("{path} is larger than the limit of {limit} bytes")]
    TooLarge {
        /// The path concerned.
        path: String,
        /// The limit in bytes.
        limit: u64,
    },
    /// Another publisher is at work.
    #[error(
        "another publisher holds {path} ({holder}), waited {seconds} s: let it finish, or raise --lock-wait"
    )]
    Locked {
        /// The lock file.
        path: String,
        /// What the lock file says about its holder.
        holder: String,
        /// How long was waited.
        seconds: u64,
    },
}

impl From<InvalidLocation> for StorageError {
    fn from(invalid: InvalidLocation) -> StorageError {
        StorageError::InvalidLocation { location: invalid.location, reason: invalid.reason }
    }
}

impl StorageError {
    /// True if the cause is a missing file or object.
    pub fn is_not_found(&self) -> bool {
        match self {
            StorageError::Io { source, .. } => source.kind() == io::ErrorKind::NotFound,
            StorageError::NoStorage { .. } => true,
            _ => false,
        }
    }

    /// True if there is no space left, or the quota is used up.
    pub fn is_out_of_space(&self) -> bool {
        match self {
            StorageError::Io { source, .. } => {
                matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            }
            // the code of an answer is only to be had as text
            StorageError::Remote { source, .. } => {
                let text = source.to_string();
                OUT_OF_SPACE.iter().any(|code| text.contains(code))
            }
            _ => false,
        }
    }
}

/// What S3 stores say when they are full: 507, and the codes of AWS, Garage and MinIO.
const OUT_OF_SPACE: [&str; 4] = ["507 Insufficient Storage", "QuotaExceeded", "QuotaReached", "StorageFull"];

/// The right to change a storage; given back when dropped, or when the process ends in any way.
pub trait StorageLock: Send + Debug {}

/// A place for the objects and files of one repository.
pub trait Storage: Send + Sync + Debug {
    /// The place in words, for messages.
    fn location(&self) -> String;

    /// Takes the publisher's lock, waiting at most `wait`, and removes what interrupted publishers left behind.
    fn lock(&self, wait: Duration) -> Result<Box<dyn StorageLock>, StorageError>;

    /// How many threads may usefully read, store or delete objects at the same time.
    fn writers(&self) -> usize {
        std::thread::available_parallelism().map_or(1, |n| n.get())
    }

    /// Stores an object under its name unless it is there. The caller vouches that `stored` hashes to the name.
    fn put_object(&self, name: &ObjectName, stored: &[u8]) -> Result<Put, StorageError>;

    /// Like [`Storage::put_object`] for a file in a directory of [`Storage::scratch`], which is moved or removed later
    /// by the caller.
    fn put_object_file(&self, name: &ObjectName, file: &Path) -> Result<Put, StorageError>;

    /// The stored size of an object in bytes, or `None` if it does not exist.
    fn object_size(&self, name: &ObjectName) -> Result<Option<u64>, StorageError>;

    /// Opens an object's stored bytes for reading.
    fn open_object(&self, name: &ObjectName) -> Result<Box<dyn Read + Send>, StorageError>;

    /// A whole object's stored bytes, at most `limit`.
    fn get_object(&self, name: &ObjectName, limit: u64) -> Result<Vec<u8>, StorageError> {
        read_bounded(self.open_object(name)?, &name.path(), limit)
    }

    /// What was stored here lately, by content, if that is remembered.
    fn known(&self) -> Option<&Known> {
        None
    }

    /// Whether [`Put::New`] is certain: no revision can refer to the object yet, and a publisher that fails may remove
    /// it again while it holds the lock.
    fn is_sure_of_new_objects(&self) -> bool {
        false
    }

    /// Removes an object; one that is not there is fine. Garbage collection does this, and publishers that fail with
    /// what they stored.
    fn delete_object(&self, name: &ObjectName) -> Result<(), StorageError>;

    /// A file below the storage root, at most `limit` bytes; `None` if it does not exist.
    fn get_file(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>, StorageError>;

    /// Creates or replaces a file below the storage root, atomically and durably.
    fn put_file(&self, name: &str, content: &[u8]) -> Result<(), StorageError>;

    /// Removes a file below the storage root; one that is not there is fine.
    fn delete_file(&self, name: &str) -> Result<(), StorageError>;

    /// Makes sure that everything stored so far is there and survives a power failure. Called before the manifest is
    /// signed.
    fn settle(&self) -> Result<(), StorageError>;

    /// Lists everything below `data/` except the scratch area.
    fn list_objects(&self, visit: &mut dyn FnMut(StoredObject)) -> Result<(), StorageError>;

    /// An empty directory for work files.
    fn scratch(&self) -> Result<Scratch, StorageError>;
}

/// Opens the storage that `location` names: a directory, `s3://BUCKET/PREFIX`, or the URL of a web server, which can
/// only be read.
pub fn open(location: &str) -> Result<Arc<dyn Storage>, StorageError> {
    Ok(match Place::of(location) {
        Place::Bucket => Arc::new(S3::open(location)?),
        Place::Server => Arc::new(Http::open(location)?),
        Place::Directory => Arc::new(Directory::open(location)?),
    })
}

/// Like [`open`], but makes the storage directory and its fixed sub-directories if they are missing. A bucket must
/// exist.
pub fn create(location: &str) -> Result<Arc<dyn Storage>, StorageError> {
    match Place::of(location) {
        Place::Directory => Ok(Arc::new(Directory::create(location)?)),
        Place::Bucket | Place::Server => open(location),
    }
}

enum Place {
    Directory,
    Bucket,
    Server,
}

impl Place {
    fn of(location: &str) -> Place {
        let begins =
            |scheme: &str| location.get(..scheme.len()).is_some_and(|s| s.eq_ignore_ascii_case(scheme));
        match location {
            _ if begins("s3://") => Place::Bucket,
            _ if begins("http://") || begins("https://") => Place::Server,
            _ => Place::Directory,
        }
    }
}

/// Reads to the end, refusing more than `limit` bytes.
pub(crate) fn read_bounded(reader: impl Read, path: &str, limit: u64) -> Result<Vec<u8>, StorageError> {
    let mut bytes = Vec::new();
    let read = reader
        .take(limit.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(|source| StorageError::Io { action: "read", path: path.to_owned(), source })?;
    if read as u64 > limit {
        return Err(StorageError::TooLarge { path: path.to_owned(), limit });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_stops_at_the_limit() {
        assert!(read_bounded(&[0u8; 10][..], "x", 10).is_ok());
        assert!(matches!(read_bounded(&[0u8; 11][..], "x", 10), Err(StorageError::TooLarge { .. })));
    }
}
