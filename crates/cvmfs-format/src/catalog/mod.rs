//! File catalogs: the metadata of a directory tree in one SQLite file (repository format §8 to §12).
//!
//! A catalog holds the rows of one sub-tree down to its nested catalogs. [`Catalog`] reads, [`CatalogWriter`] makes
//! new ones and changes copies of old ones. Paths and names are bytes. Rows are found by the hash of the absolute path
//! inside the repository.
//!
//! Invariants:
//!
//! * Catalogs of all schema revisions 0 to 7 are readable; columns are addressed by name, since their order differs
//!   between fresh and upgraded catalogs.
//! * A row that cannot be represented (unknown hash algorithm, digest of the wrong length, negative file size) is an
//!   error that names the row, never a guess. Names that no kernel accepts are left out of listings.

mod counters;
mod entry;
mod reader;
mod rows;
mod schema;
mod writer;

pub use self::counters::{Counters, Counts};
pub use self::entry::{Chunk, Entry, EntryFlags, EntryKind, MAX_NAME, MAX_SYMLINK, is_valid_name};
pub use self::reader::{Catalog, NestedCatalog};
pub use self::writer::CatalogWriter;
use crate::container::ContainerError;
pub use crate::container::{Reading, Schema};
use crate::hash::PathHash;

/// Schema number of the catalogs this crate writes, and the newest it reads.
pub const SCHEMA: f64 = 2.5;

/// Schema revision of the catalogs this crate writes.
pub const SCHEMA_REVISION: u64 = 7;

/// Why a catalog cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// The database is unusable or a statement failed.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// A row has values that no file system object has.
    #[error("damaged catalog row {rowid}: {reason}")]
    Row {
        /// `rowid` in table `catalog`.
        rowid: i64,
        /// What is wrong.
        reason: String,
    },
    /// A row of another table is damaged.
    #[error("damaged row in catalog table {table}: {reason}")]
    Reference {
        /// The table.
        table: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// The chunks of a file do not cover it.
    #[error("damaged chunk list of {path_hash:?}: {reason}")]
    Chunks {
        /// The file.
        path_hash: PathHash,
        /// What is wrong.
        reason: String,
    },
    /// There is a row for this path already.
    #[error("catalog has an entry {name:?} at this path already")]
    Exists {
        /// Last component of the path.
        name: String,
    },
    /// There is no such row.
    #[error("catalog has no {what} {name:?}")]
    Missing {
        /// What was looked for.
        what: &'static str,
        /// Its path or name.
        name: String,
    },
    /// What was given cannot be stored in a catalog.
    #[error("cannot store {name:?} in a catalog: {reason}")]
    Unstorable {
        /// Path or name.
        name: String,
        /// The rule it breaks.
        reason: String,
    },
}

pub(crate) type Result<T> = std::result::Result<T, CatalogError>;
