//! Why an archive was refused.

use crate::path::PathError;
use std::io;
use tar_core::parse::ParseError;
use thiserror::Error;

/// An archive that cannot be read, with the entry and the rule it breaks. Names are shown escaped.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TarError {
    /// The stream below failed.
    #[error("reading the archive failed at byte {offset}")]
    Io {
        /// Bytes of the archive read so far.
        offset: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The stream ended inside an entry.
    #[error(
        "the archive is cut off at byte {offset}, inside entry '{entry}' ({missing} bytes of it are missing)"
    )]
    CutEntry {
        /// Bytes of the archive.
        offset: u64,
        /// The entry's name.
        entry: String,
        /// Bytes of content and padding that did not come.
        missing: u64,
    },
    /// The stream ended between entries, or inside a header.
    #[error("the archive is cut off at byte {offset}: the two zero blocks that end an archive are missing")]
    CutArchive {
        /// Bytes of the archive.
        offset: u64,
    },
    /// A single zero block with something else behind it.
    #[error("a single zero block at byte {offset} is followed by more entries; the archive is damaged")]
    LoneZeroBlock {
        /// Where it stands.
        offset: u64,
    },
    /// A header that is not one, or extension records that contradict themselves.
    #[error("bad header at byte {offset}")]
    Header {
        /// Where the header (or its first extension header) begins.
        offset: u64,
        /// The rule it breaks.
        #[source]
        source: ParseError,
    },
    /// More bytes of headers in front of one entry than the format needs.
    #[error("the headers at byte {offset} take more than {limit} bytes")]
    HeaderTooLarge {
        /// Where they begin.
        offset: u64,
        /// The limit in bytes.
        limit: usize,
    },
    /// A name that is not a path inside the layer.
    #[error("entry '{entry}' is refused")]
    Path {
        /// The name as it stands in the archive.
        entry: String,
        /// The rule it breaks.
        #[source]
        source: PathError,
    },
    /// The target of a hard link is not a path inside the layer.
    #[error("hard link '{entry}' to '{target}' is refused")]
    LinkTarget {
        /// The entry's name.
        entry: String,
        /// Its target as it stands in the archive.
        target: String,
        /// The rule it breaks.
        #[source]
        source: PathError,
    },
    /// A field with a value that cannot be meant or cannot be stored.
    #[error("entry '{entry}': {field} {problem}")]
    Field {
        /// The entry's name.
        entry: String,
        /// Which field.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// A type that has no place in a layer.
    #[error("entry '{entry}' is of type '{flag}', which a layer cannot hold")]
    Unsupported {
        /// The entry's name.
        entry: String,
        /// The type flag, escaped.
        flag: String,
    },
    /// A global extended header with a record that would change every entry behind it.
    #[error("the global header at byte {offset} sets '{key}' for all entries, which is not supported")]
    Global {
        /// Where it stands.
        offset: u64,
        /// The record's keyword.
        key: String,
    },
    /// One of the [`Limits`](crate::Limits).
    #[error("entry '{entry}' exceeds the limit of {limit} {what}")]
    Limit {
        /// The entry's name.
        entry: String,
        /// What is limited.
        what: &'static str,
        /// How many are allowed.
        limit: u64,
    },
    /// The reader was used again after an error.
    #[error("the archive was already found to be broken")]
    Broken,
}

impl From<TarError> for io::Error {
    fn from(error: TarError) -> Self {
        let kind = match &error {
            TarError::Io { source, .. } => source.kind(),
            TarError::CutEntry { .. } | TarError::CutArchive { .. } => io::ErrorKind::UnexpectedEof,
            _ => io::ErrorKind::InvalidData,
        };
        io::Error::new(kind, error)
    }
}

/// A name for a message: escaped, and cut where it would fill the terminal.
pub(crate) fn shown(name: &[u8]) -> String {
    const SHOWN: usize = 200;
    match name.get(..SHOWN) {
        Some(head) if name.len() > SHOWN => format!("{}…", head.escape_ascii()),
        _ => name.escape_ascii().to_string(),
    }
}
