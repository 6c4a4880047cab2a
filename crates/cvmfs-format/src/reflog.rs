//! The reflog: every root object that was published and not yet swept, in an SQLite file (repository format §15).
//!
//! It is stored raw as `.cvmfsreflog`; its hash stands in the manifest (`Y`). The time stamps decide what garbage
//! collection keeps.

use std::fmt;
use std::path::Path;

use rusqlite::types::ValueRef;
use rusqlite::{Connection, OptionalExtension, Params, params};

use crate::container::{
    self, ContainerError, Doing, Schema, is_wasteful, property, require_table, set_property,
};
use crate::hash::{ContentHash, ObjectKind, shown};
use crate::history::PAGE_SIZE;

const WHAT: &str = "reflog";

/// Schema number of reflogs.
const SCHEMA: f64 = 1.0;

/// Statements in the order and wording of the C++ tools.
const TABLES: &str = "\
CREATE TABLE properties (key TEXT, value TEXT, CONSTRAINT pk_properties PRIMARY KEY (key));
CREATE TABLE refs (hash TEXT, type INTEGER, timestamp INTEGER, CONSTRAINT pk_refs PRIMARY KEY (hash));";

/// What a reference names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ReferenceKind {
    /// Root catalog; nested ones are never listed.
    Catalog,
    /// Certificate.
    Certificate,
    /// History database.
    History,
    /// Metainfo object.
    Metainfo,
}

impl ReferenceKind {
    /// All kinds in the order of their numbers.
    pub const ALL: [ReferenceKind; 4] = [Self::Catalog, Self::Certificate, Self::History, Self::Metainfo];

    /// Column `type`.
    pub fn id(self) -> u8 {
        match self {
            Self::Catalog => 0,
            Self::Certificate => 1,
            Self::History => 2,
            Self::Metainfo => 3,
        }
    }

    /// The kind of object, which completes the object's name.
    pub fn object_kind(self) -> ObjectKind {
        match self {
            Self::Catalog => ObjectKind::Catalog,
            Self::Certificate => ObjectKind::Certificate,
            Self::History => ObjectKind::History,
            Self::Metainfo => ObjectKind::Metainfo,
        }
    }
}

/// One published root object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reference {
    /// Hash of the object.
    pub hash: ContentHash,
    /// What it is.
    pub kind: ReferenceKind,
    /// Unix time at which the row was written.
    pub timestamp: i64,
}

/// Why a reflog cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ReflogError {
    /// The database is unusable or a statement failed.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// A row is damaged.
    #[error("damaged reference {hash:?} in the reflog: {reason}")]
    Row {
        /// The hash column, as far as readable.
        hash: String,
        /// What is wrong.
        reason: String,
    },
    /// The database was opened for reading.
    #[error("the reflog is open for reading only")]
    ReadOnly,
}

type Result<T> = std::result::Result<T, ReflogError>;

/// A reflog, open for reading or for writing.
pub struct Reflog {
    connection: Connection,
    fqrn: String,
    is_writable: bool,
}

const READING: &str = "read the reflog";
const WRITING: &str = "write the reflog";

impl Reflog {
    /// Opens a complete file for reading.
    pub fn open(path: &Path) -> Result<Self> {
        Self::from_connection(container::open_immutable(WHAT, path, container::Reading::Mapped)?, false)
    }

    /// Creates an empty reflog in a new file.
    pub fn create(path: &Path, fqrn: &str) -> Result<Self> {
        container::create_new(WHAT, path)?;
        let connection = container::open_scratch(WHAT, path, Some(PAGE_SIZE))?;
        connection.execute_batch(TABLES).doing("create the reflog's tables")?;
        set_property(&connection, "schema", b"1.0")?;
        set_property(&connection, "schema_revision", b"0")?;
        set_property(&connection, "fqrn", fqrn.as_bytes())?;
        Self::from_connection(connection, true)
    }

    /// Opens a reflog to change it; it must be the caller's own copy.
    pub fn open_for_writing(path: &Path) -> Result<Self> {
        Self::from_connection(container::open_scratch(WHAT, path, None)?, true)
    }

    fn from_connection(connection: Connection, is_writable: bool) -> Result<Self> {
        let schema = Schema::read(&connection, WHAT)?;
        if !schema.is(SCHEMA) {
            let found = schema.version;
            return Err(ContainerError::UnsupportedSchema { what: WHAT, found, newest: SCHEMA }.into());
        }
        require_table(&connection, WHAT, "refs")?;
        let fqrn = property(&connection, "fqrn")?.unwrap_or_default();
        Ok(Self { fqrn: String::from_utf8_lossy(&fqrn).into_owned(), connection, is_writable })
    }

    /// Name of the repository.
    pub fn fqrn(&self) -> &str {
        &self.fqrn
    }

    /// References of one kind, the oldest first.
    pub fn list(&self, kind: ReferenceKind) -> Result<Vec<Reference>> {
        let sql = "SELECT hash, timestamp FROM refs WHERE type = ?1 ORDER BY timestamp, rowid";
        let mut statement = self.connection.prepare_cached(sql).doing(READING)?;
        let mut rows = statement.query([kind.id()]).doing(READING)?;
        let mut found = Vec::new();
        while let Some(row) = rows.next().doing(READING)? {
            let text = match row.get_ref(0).doing(READING)? {
                ValueRef::Text(bytes) | ValueRef::Blob(bytes) => bytes,
                _ => &[],
            };
            let bad = |reason: &str| ReflogError::Row { hash: shown(text), reason: reason.to_owned() };
            found.push(Reference {
                hash: ContentHash::parse(text).map_err(|_| bad("not a hash"))?,
                kind,
                timestamp: row.get(1).map_err(|_| bad("no valid time stamp"))?,
            });
        }
        Ok(found)
    }

    /// All references, by kind and age.
    pub fn references(&self) -> Result<Vec<Reference>> {
        let mut all = Vec::new();
        for kind in ReferenceKind::ALL {
            all.extend(self.list(kind)?);
        }
        Ok(all)
    }

    /// Unix time at which a reference was written; none if it is not listed.
    pub fn timestamp(&self, hash: ContentHash) -> Result<Option<i64>> {
        let timestamp = self
            .connection
            .prepare_cached("SELECT timestamp FROM refs WHERE hash = ?1")
            .and_then(|mut statement| statement.query_row([hash.to_string()], |row| row.get(0)).optional())
            .doing(READING)?;
        Ok(timestamp)
    }

    /// Adds a reference, or refreshes its time stamp.
    pub fn add(&mut self, kind: ReferenceKind, hash: ContentHash, now: i64) -> Result<()> {
        let sql = "INSERT OR REPLACE INTO refs (hash, type, timestamp) VALUES (?1, ?2, ?3)";
        self.execute(sql, params![hash.to_string(), kind.id(), now]).map(drop)
    }

    /// Removes a reference; tells whether it was listed.
    pub fn remove(&mut self, hash: ContentHash) -> Result<bool> {
        Ok(self.execute("DELETE FROM refs WHERE hash = ?1", [hash.to_string()])? > 0)
    }

    /// Commits: the file is complete and ready to be hashed.
    pub fn finish(self) -> Result<()> {
        self.check_writable()?;
        let compact = is_wasteful(&self.connection)?;
        Ok(container::commit(self.connection, compact)?)
    }

    fn execute(&self, sql: &str, parameters: impl Params) -> Result<usize> {
        self.check_writable()?;
        let changed = self
            .connection
            .prepare_cached(sql)
            .and_then(|mut statement| statement.execute(parameters))
            .doing(WRITING)?;
        Ok(changed)
    }

    fn check_writable(&self) -> Result<()> {
        if self.is_writable { Ok(()) } else { Err(ReflogError::ReadOnly) }
    }
}

impl fmt::Debug for Reflog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reflog").field("fqrn", &self.fqrn).finish_non_exhaustive()
    }
}
