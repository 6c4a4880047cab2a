//! The one error type of the publisher, and how errors become exit codes.

use std::io;
use std::path::PathBuf;

use crate::storage::StorageError;

/// Why a command of the publisher failed. The message names the object; causes are chained.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The storage refused.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The request makes no sense as it stands.
    #[error("{0}")]
    Usage(String),
    /// A signature, expiry, name or key does not hold.
    #[error("{0}")]
    Trust(String),
    /// A key file cannot be used.
    #[error("key file {}: {reason}", path.display())]
    Key {
        /// The file concerned.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// Something named by the user is not in the repository.
    #[error("{0}")]
    NotFound(String),
    /// The archive cannot be read or contains something that has no place in a repository.
    #[error(transparent)]
    Tar(#[from] layer_tar::TarError),
    /// One entry of the input cannot be published.
    #[error("entry {path}: {reason}")]
    Entry {
        /// Path of the entry in the input, or in the repository where it clashes.
        path: String,
        /// Which rule it breaks.
        reason: String,
    },
    /// A part of the repository is damaged.
    #[error("{object}: {reason}")]
    Damaged {
        /// The object or path.
        object: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A local file cannot be read or written.
    #[error("cannot {action} {}", path.display())]
    Local {
        /// What was tried, as a verb.
        action: &'static str,
        /// The file concerned.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The input stream failed.
    #[error("cannot read the input")]
    Input(#[source] io::Error),
    /// The user asked to stop; nothing was published.
    #[error("interrupted: nothing was published")]
    Interrupted,
}

impl PublishError {
    /// Exit code of the command (command-line contract): 1 failed, 2 usage, 3 trust, 4 network,
    /// 5 not found, 6 out of space, 130 interrupted.
    pub fn exit_code(&self) -> u8 {
        match self {
            PublishError::Usage(_) => 2,
            PublishError::Trust(_) | PublishError::Key { .. } => 3,
            PublishError::NotFound(_) => 5,
            PublishError::Interrupted => 130,
            PublishError::Storage(error) if error.is_out_of_space() => 6,
            PublishError::Storage(StorageError::NoStorage { .. }) => 5,
            PublishError::Storage(StorageError::InvalidLocation { .. } | StorageError::ReadOnly { .. }) => 2,
            PublishError::Storage(
                StorageError::Remote { .. }
                | StorageError::LockLost { .. }
                | StorageError::Unreachable { .. },
            ) => 4,
            PublishError::Local { source, .. } if out_of_space(source) => 6,
            PublishError::Local { source, .. } if source.kind() == io::ErrorKind::NotFound => 5,
            _ => 1,
        }
    }

    /// The message with all its causes in one line.
    pub fn full_message(&self) -> String {
        chain(self)
    }

    pub(crate) fn local(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> PublishError {
        let path = path.into();
        move |source| PublishError::Local { action, path, source }
    }

    pub(crate) fn damaged(object: impl ToString, reason: impl ToString) -> PublishError {
        PublishError::Damaged { object: object.to_string(), reason: reason.to_string() }
    }

    pub(crate) fn entry(path: &[u8], reason: impl ToString) -> PublishError {
        let path = if path.is_empty() { "/".to_owned() } else { shown(path) };
        PublishError::Entry { path, reason: reason.to_string() }
    }
}

/// An error with its causes on one line, each once: some messages quote their cause already.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let part = error.to_string();
        if !text.contains(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        cause = error.source();
    }
    text
}

fn out_of_space(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// A path of arbitrary bytes as text for messages: printable, on one line, unambiguous.
pub fn shown(path: &[u8]) -> String {
    let mut text = String::with_capacity(path.len());
    for chunk in path.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c.is_control() { text.extend(c.escape_default()) } else { text.push(c) }
        }
        for byte in chunk.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_with_odd_bytes_is_shown_on_one_line() {
        assert_eq!(shown(b"a/\xff\n\x1b[2J"), "a/\\xff\\n\\u{1b}[2J");
        assert_eq!(shown("日本".as_bytes()), "日本");
    }

    #[test]
    fn each_cause_is_said_once() {
        let inner = io::Error::other("disk on fire");
        let outer = PublishError::Input(io::Error::other(format!("block 7: {inner}")));
        assert_eq!(outer.full_message(), "cannot read the input: block 7: disk on fire");
        #[derive(Debug, thiserror::Error)]
        #[error("header: {0}")]
        struct Quoting(#[source] io::Error);
        let quoting = PublishError::Input(io::Error::other(Quoting(io::Error::other("disk on fire"))));
        assert_eq!(quoting.full_message(), "cannot read the input: header: disk on fire");
    }

    #[test]
    fn a_full_disk_has_its_own_exit_code() {
        let full = || io::Error::from(io::ErrorKind::StorageFull);
        let storage = StorageError::Io { action: "write", path: "x".into(), source: full() };
        assert_eq!(PublishError::from(storage).exit_code(), 6);
        assert_eq!(PublishError::local("write", "x")(full()).exit_code(), 6);
    }
}
