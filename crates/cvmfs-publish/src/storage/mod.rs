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

use std::fmt::Debug;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cvmfs_format::ObjectName;

pub use directory::Directory;

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
    /// A `s3://` storage was named.
    #[error("{url}: S3 storage is not available in this version, give a directory")]
    S3NotAvailable {
        /// The URL that was given.
        url: String,
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
            _ => false,
        }
    }
}

/// The right to change a storage; given back when dropped, or when the process ends in any way.
pub trait StorageLock: Send + Debug {}

/// A place for the objects and files of one repository.
pub trait Storage: Send + Sync + Debug {
    /// The place in words, for messages.
    fn location(&self) -> String;

    /// Takes the publisher's lock, waiting at most `wait`, and removes what interrupted publishers left behind.
    fn lock(&self, wait: Duration) -> Result<Box<dyn StorageLock>, StorageError>;

    /// Stores an object under its name unless it is there. The caller vouches that `stored` hashes to the name.
    fn put_object(&self, name: &ObjectName, stored: &[u8]) -> Result<Put, StorageError>;

    /// The stored size of an object in bytes, or `None` if it does not exist.
    fn object_size(&self, name: &ObjectName) -> Result<Option<u64>, StorageError>;

    /// Opens an object's stored bytes for reading.
    fn open_object(&self, name: &ObjectName) -> Result<Box<dyn Read + Send>, StorageError>;

    /// A whole object's stored bytes, at most `limit`.
    fn get_object(&self, name: &ObjectName, limit: u64) -> Result<Vec<u8>, StorageError> {
        read_bounded(self.open_object(name)?, &name.path(), limit)
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

    /// Makes everything stored so far survive a power failure. Called once before the manifest.
    fn settle(&self) -> Result<(), StorageError>;

    /// Lists everything below `data/` except the scratch area.
    fn list_objects(&self, visit: &mut dyn FnMut(StoredObject)) -> Result<(), StorageError>;

    /// An empty directory for work files. The next holder of the lock removes it if this process cannot.
    fn scratch(&self) -> Result<PathBuf, StorageError>;
}

/// Opens the storage that `location` names: a directory, or (one day) `s3://BUCKET/PREFIX`.
pub fn open(location: &str) -> Result<Arc<dyn Storage>, StorageError> {
    refuse_s3(location)?;
    Ok(Arc::new(Directory::open(location)?))
}

/// Like [`open`], but makes the storage directory and its fixed sub-directories if they are missing.
pub fn create(location: &str) -> Result<Arc<dyn Storage>, StorageError> {
    refuse_s3(location)?;
    Ok(Arc::new(Directory::create(location)?))
}

fn refuse_s3(location: &str) -> Result<(), StorageError> {
    if location.starts_with("s3://") {
        return Err(StorageError::S3NotAvailable { url: location.to_owned() });
    }
    Ok(())
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
    fn s3_storage_is_refused_with_one_clear_sentence() {
        let error = open("s3://bucket/prefix").expect_err("S3 is not available");
        assert_eq!(
            error.to_string(),
            "s3://bucket/prefix: S3 storage is not available in this version, give a directory"
        );
    }

    #[test]
    fn reading_stops_at_the_limit() {
        assert!(read_bounded(&[0u8; 10][..], "x", 10).is_ok());
        assert!(matches!(read_bounded(&[0u8; 11][..], "x", 10), Err(StorageError::TooLarge { .. })));
    }
}
