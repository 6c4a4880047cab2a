//! The error of this crate, and what it means to the kernel and to a shell.

use std::sync::Arc;

use cvmfs_format::catalog::CatalogError;
use cvmfs_format::hash::ContentHash;
use rustix::io::Errno;

use crate::cache::{CacheError, is_full};
use crate::config::ConfigError;
use crate::network::{FetchError, FetcherError};
use crate::trust::TrustError;

/// Anything that keeps the client from giving an answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The network side cannot be set up.
    #[error(transparent)]
    Setup(#[from] FetcherError),
    /// The cache cannot be set up.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// An object cannot be had.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The chain of trust is broken.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The revision in use was blacklisted while it was mounted.
    #[error(transparent)]
    Refused(Arc<TrustError>),
    /// A catalog that is needed cannot be had.
    #[error("catalog of {fqrn}:{path} ({hash}) cannot be loaded")]
    CatalogMissing {
        /// The repository.
        fqrn: String,
        /// Where the catalog is attached.
        path: String,
        /// The catalog.
        hash: ContentHash,
        /// Why.
        #[source]
        source: Box<FetchError>,
    },
    /// A catalog has the right hash and is nevertheless no catalog.
    #[error("catalog of {fqrn}:{path} is not readable")]
    CatalogUnreadable {
        /// The repository.
        fqrn: String,
        /// Where the catalog is attached.
        path: String,
        /// Why.
        #[source]
        source: Box<CatalogError>,
    },
    /// A catalog contradicts itself or its parent.
    #[error("catalog of {fqrn}:{path} is damaged: {reason}")]
    CatalogDamaged {
        /// The repository.
        fqrn: String,
        /// The path concerned.
        path: String,
        /// The contradiction.
        reason: String,
    },
    /// A directory shows another revision of the repository (repository format §10.2).
    #[error(
        "{fqrn}:{path} is a bind mountpoint, which is not supported; mount the revision by CVMFS_REPOSITORY_TAG"
    )]
    BindMountpoint {
        /// The repository.
        fqrn: String,
        /// The directory.
        path: String,
    },
    /// A catalog query failed.
    #[error(transparent)]
    Catalog(Box<CatalogError>),
}

impl From<CatalogError> for ClientError {
    fn from(error: CatalogError) -> Self {
        Self::Catalog(Box::new(error))
    }
}

impl ClientError {
    /// The catalog attached at `path` cannot be had.
    pub fn catalog_missing(fqrn: &str, path: &[u8], hash: ContentHash, source: FetchError) -> Self {
        Self::CatalogMissing { fqrn: fqrn.to_owned(), path: shown(path), hash, source: Box::new(source) }
    }

    /// The catalog attached at `path` is no catalog.
    pub fn catalog_unreadable(fqrn: &str, path: &[u8], source: CatalogError) -> Self {
        Self::CatalogUnreadable { fqrn: fqrn.to_owned(), path: shown(path), source: Box::new(source) }
    }

    /// The catalogs contradict each other at `path`.
    pub fn catalog_damaged(fqrn: &str, path: &[u8], reason: &str) -> Self {
        Self::CatalogDamaged { fqrn: fqrn.to_owned(), path: shown(path), reason: reason.to_owned() }
    }

    /// The directory at `path` shows another revision.
    pub fn bind_mountpoint(fqrn: &str, path: &[u8]) -> Self {
        Self::BindMountpoint { fqrn: fqrn.to_owned(), path: shown(path) }
    }

    /// A revision older than the one in use was offered.
    pub fn replayed(fqrn: &str, offered: u64, known: u64) -> Self {
        Self::Trust(TrustError::Replayed { fqrn: fqrn.to_owned(), offered, known, breadcrumb: None })
    }

    /// The number that the kernel gives to the calling process (client behaviour §8.2). All of them:
    ///
    /// | errno | when |
    /// |---|---|
    /// | `ETIMEDOUT` | the deadline passed |
    /// | `EINTR` | the caller was interrupted |
    /// | `ENOSPC` | no room for the object, not even in memory |
    /// | `EMFILE` | no descriptors are left |
    /// | `EROFS` | the object is missing in a cache that takes nothing in |
    /// | `EOPNOTSUPP` | a directory that shows another revision |
    /// | `EIO` | anything else: the catalog promised data that cannot be had |
    pub fn errno(&self) -> i32 {
        let errno = match self.fetch_error() {
            Some(FetchError::Deadline { .. }) => Errno::TIMEDOUT,
            Some(FetchError::Interrupted { .. }) => Errno::INTR,
            Some(FetchError::NoSpace { .. }) => Errno::NOSPC,
            Some(FetchError::Local { source, .. }) if is_out_of_descriptors(source) => Errno::MFILE,
            Some(FetchError::Local { source, .. }) if is_read_only(source) => Errno::ROFS,
            _ if matches!(self, Self::BindMountpoint { .. }) => Errno::OPNOTSUPP,
            _ => Errno::IO,
        };
        errno.raw_os_error()
    }

    /// The exit code of a command that fails with this error: 1 failed, 2 wrong usage, 3 trust, 4 network,
    /// 5 not found, 6 out of space.
    pub fn exit_code(&self) -> u8 {
        if let Some(error) = self.fetch_error() {
            return match error {
                FetchError::NotFound { .. } => 5,
                FetchError::Network { .. } | FetchError::Corrupt { .. } | FetchError::Deadline { .. } => 4,
                FetchError::NoSpace { .. } => 6,
                _ => 1,
            };
        }
        match self {
            Self::Config(ConfigError::InvalidName { .. }) => 2,
            Self::Cache(CacheError::Unusable { source, .. }) if is_full(source) => 6,
            Self::Trust(TrustError::Key { .. }) => 1,
            Self::Trust(TrustError::NoHistory { .. } | TrustError::NotTagged { .. }) => 5,
            Self::Trust(_) | Self::Refused(_) => 3,
            _ => 1,
        }
    }

    fn fetch_error(&self) -> Option<&FetchError> {
        match self {
            Self::Fetch(error) => Some(error),
            Self::CatalogMissing { source, .. } => Some(source),
            Self::Trust(error) => error.fetch_error(),
            _ => None,
        }
    }
}

fn is_out_of_descriptors(error: &std::io::Error) -> bool {
    let codes = [Errno::MFILE, Errno::NFILE].map(Errno::raw_os_error);
    error.raw_os_error().is_some_and(|code| codes.contains(&code))
}

fn is_read_only(error: &std::io::Error) -> bool {
    error.raw_os_error() == Some(Errno::ROFS.raw_os_error())
}

/// A repository path for a message: bytes that are not UTF-8 are replaced, control characters escaped.
pub(crate) fn shown(path: &[u8]) -> String {
    let text = String::from_utf8_lossy(path);
    if text.is_empty() { "/".to_owned() } else { text.escape_debug().to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_error_has_its_errno_and_exit_code() {
        let object = || "object x".to_owned();
        let place = Box::new(crate::network::Place { host: "h".to_owned(), proxy: "DIRECT".to_owned() });
        let table: [(ClientError, Errno, u8); 6] = [
            (FetchError::NotFound { object: object(), place: place.clone() }.into(), Errno::IO, 5),
            (FetchError::Deadline { object: object(), place, last: None }.into(), Errno::TIMEDOUT, 4),
            (FetchError::Interrupted { object: object() }.into(), Errno::INTR, 1),
            (FetchError::NoSpace { object: object(), reason: "full".to_owned() }.into(), Errno::NOSPC, 6),
            (ClientError::replayed("a.b", 1, 2), Errno::IO, 3),
            (ClientError::catalog_damaged("a.b", b"/x\ny", "loop"), Errno::IO, 1),
        ];
        for (error, errno, exit_code) in table {
            assert_eq!((error.errno(), error.exit_code()), (errno.raw_os_error(), exit_code), "{error}");
            assert!(!error.to_string().contains('\n'), "{error}");
        }
    }
}
