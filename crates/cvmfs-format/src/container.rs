//! What catalog, history and reflog have in common: SQLite files with a table of properties (repository format §7).
//!
//! Files read come from foreign hands: they are opened immutable (complete files are renamed into place, never
//! changed), column values have a bounded length, and views, triggers or virtual tables in place of the expected
//! tables are refused. Files written are scratch copies: they are thrown away after a crash, hence nothing is synced;
//! after the last commit the file is self-contained and in rollback journal mode.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rusqlite::config::DbConfig;
use rusqlite::limits::Limit;
use rusqlite::types::{ToSql, ToSqlOutput, ValueRef};
use rusqlite::{Connection, OpenFlags, OptionalExtension};

use crate::descriptor_vfs;
use crate::hash::{ContentHash, shown};

/// Longest value of one row accepted. The largest legitimate row is a catalog entry with 255 attributes of 510
/// bytes, a target of 4 KiB and a name of 255 bytes.
const MAX_ROW: i32 = 1 << 20;

/// Tolerance with which schema numbers are compared.
pub(crate) const SCHEMA_EPSILON: f64 = 0.0005;

/// Why a database cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// The file cannot be opened.
    #[error("cannot open {what} {}", path.display())]
    Open {
        /// `catalog`, `history` or `reflog`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: rusqlite::Error,
    },
    /// The file cannot be examined or created.
    #[error("cannot access {what} {}", path.display())]
    Access {
        /// `catalog`, `history` or `reflog`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// SQLite refused a statement; usually the file is damaged.
    #[error("cannot {doing}")]
    Sqlite {
        /// What was tried.
        doing: &'static str,
        /// The cause.
        #[source]
        source: rusqlite::Error,
    },
    /// A table is missing or no plain table.
    #[error("{what} has no table {table}")]
    MissingTable {
        /// `catalog`, `history` or `reflog`.
        what: &'static str,
        /// The table.
        table: &'static str,
    },
    /// A column is missing.
    #[error("table {table} has no column {column}")]
    MissingColumn {
        /// The table.
        table: &'static str,
        /// The column.
        column: &'static str,
    },
    /// The schema is newer than known, or an old one that no reader supports.
    #[error("{what} has schema {found}, this program reads up to {newest}; upgrade it")]
    UnsupportedSchema {
        /// `catalog`, `history` or `reflog`.
        what: &'static str,
        /// Schema number in the file.
        found: f64,
        /// Newest schema number known.
        newest: f64,
    },
    /// A property has a value that cannot be understood.
    #[error("property {key} has the unusable value {value:?}")]
    BadProperty {
        /// Key of the property.
        key: &'static str,
        /// The value, cut for display.
        value: String,
    },
}

/// Result of an operation on a container.
pub(crate) type Result<T, E = ContainerError> = std::result::Result<T, E>;

/// Attaches what was tried to an SQLite error.
pub(crate) trait Doing<T> {
    fn doing(self, doing: &'static str) -> Result<T>;
}

impl<T> Doing<T> for rusqlite::Result<T> {
    fn doing(self, doing: &'static str) -> Result<T> {
        self.map_err(|source| ContainerError::Sqlite { doing, source })
    }
}

/// Bytes bound as SQLite text, whether UTF-8 or not: names and paths are bytes, and the C++ tools bind them so.
pub(crate) struct Text<'a>(pub(crate) &'a [u8]);

impl ToSql for Text<'_> {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(ValueRef::Text(self.0)))
    }
}

/// How a complete file is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reading {
    /// The whole file is mapped: half the cost of a look-up, and pages are shared between connections. What was
    /// looked at counts as memory of the process.
    Mapped,
    /// Page by page through a small cache.
    Paged,
}

/// Page cache of a connection that reads page by page, in KiB: the inner pages of an index of a million rows.
const PAGED_CACHE_KIB: i32 = 128;

/// Opens a complete file for reading; one connection without locks, to be used by one thread at a time.
pub(crate) fn open_immutable(what: &'static str, path: &Path, reading: Reading) -> Result<Connection> {
    let size = fs::metadata(path)
        .map_err(|source| ContainerError::Access { what, path: path.to_owned(), source })?
        .len();
    let open_error = |source| ContainerError::Open { what, path: path.to_owned(), source };
    let flags =
        OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_URI;
    let connection = match descriptor_vfs::name() {
        Some(vfs) => Connection::open_with_flags_and_vfs(immutable_uri(path), flags, vfs),
        None => Connection::open_with_flags(immutable_uri(path), flags),
    }
    .map_err(open_error)?;
    distrust(&connection).map_err(open_error)?;
    match reading {
        Reading::Mapped => {
            connection.pragma_update(None, "mmap_size", i64::try_from(size).unwrap_or(i64::MAX))
        }
        Reading::Paged => connection.pragma_update(None, "cache_size", -PAGED_CACHE_KIB),
    }
    .map_err(open_error)?;
    connection.pragma_update(None, "temp_store", 2).map_err(open_error)?;
    Ok(connection)
}

/// Opens or creates a scratch file for writing and begins the one transaction that [`commit`] ends.
pub(crate) fn open_scratch(what: &'static str, path: &Path, page_size: Option<u32>) -> Result<Connection> {
    let open_error = |source| ContainerError::Open { what, path: path.to_owned(), source };
    let create = if page_size.is_some() { OpenFlags::SQLITE_OPEN_CREATE } else { OpenFlags::empty() };
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX | create;
    let connection = Connection::open_with_flags(path, flags).map_err(open_error)?;
    distrust(&connection).map_err(open_error)?;
    let setup = || -> rusqlite::Result<()> {
        if let Some(page_size) = page_size {
            connection.pragma_update(None, "page_size", page_size)?;
        }
        // Leaves WAL mode, should the file be in it; the mode is part of the file and readers abort on it.
        connection.pragma_update_and_check(None, "journal_mode", "DELETE", |_| Ok(()))?;
        connection.pragma_update_and_check(None, "journal_mode", "MEMORY", |_| Ok(()))?;
        connection.pragma_update(None, "synchronous", "OFF")?;
        connection.pragma_update(None, "temp_store", 2)?;
        connection.pragma_update(None, "foreign_keys", false)?;
        connection.pragma_update_and_check(None, "locking_mode", "EXCLUSIVE", |_| Ok(()))?;
        connection.pragma_update(None, "cache_size", -CACHE_KIB)?;
        connection.execute_batch("BEGIN EXCLUSIVE")
    };
    setup().map_err(open_error)?;
    Ok(connection)
}

/// Page cache of a connection that writes, in KiB: index pages of some hundred thousand rows.
const CACHE_KIB: i32 = 16 * 1024;

/// Refuses to create what exists: a scratch file belongs to one writer.
pub(crate) fn create_new(what: &'static str, path: &Path) -> Result<()> {
    fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
        .map(drop)
        .map_err(|source| ContainerError::Access { what, path: path.to_owned(), source })
}

/// Commits, compacts if that pays, and closes: afterwards the file is complete and self-contained.
pub(crate) fn commit(connection: Connection, vacuum: bool) -> Result<()> {
    connection.flush_prepared_statement_cache();
    connection.execute_batch("COMMIT").doing("commit")?;
    if vacuum {
        connection.execute_batch("VACUUM").doing("compact the database")?;
    }
    connection.close().map_err(|(_, source)| ContainerError::Sqlite { doing: "close the database", source })
}

/// Part of the pages above which unused ones are worth a rewrite of the file.
const MAX_FREE_RATIO: f64 = 0.2;

/// Whether deletions left so many unused pages that the file should be rewritten.
pub(crate) fn is_wasteful(connection: &Connection) -> Result<bool> {
    let number = |pragma| connection.pragma_query_value(None, pragma, |row| row.get::<_, i64>(0));
    let pages = number("page_count").doing("read the page count")?;
    let free = number("freelist_count").doing("read the page count")?;
    Ok(free as f64 > pages as f64 * MAX_FREE_RATIO)
}

fn distrust(connection: &Connection) -> rusqlite::Result<()> {
    connection.set_limit(Limit::SQLITE_LIMIT_LENGTH, MAX_ROW)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, false)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_VIEW, false)?;
    Ok(())
}

/// `file:` URI of a path with every special byte escaped.
fn immutable_uri(path: &Path) -> String {
    let mut uri = OsString::from("file:");
    if path.is_absolute() {
        // An empty authority, so that a path beginning with two slashes is not taken for a host name.
        uri.push("//");
    }
    let mut uri = uri.into_string().expect("made of ASCII above");
    for byte in path.as_os_str().as_bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'_' | b'.' | b'~' => {
                uri.push(char::from(*byte));
            }
            _ => uri.push_str(&format!("%{byte:02X}")),
        }
    }
    uri.push_str("?immutable=1");
    uri
}

/// Checks that a table exists and is an ordinary one; tells whether it does.
pub(crate) fn has_table(connection: &Connection, table: &str) -> Result<bool> {
    let sql: Option<Option<String>> = connection
        .query_row("SELECT sql FROM sqlite_master WHERE type = 'table' AND name = ?1", [table], |row| {
            row.get(0)
        })
        .optional()
        .doing("read the list of tables")?;
    Ok(sql
        .flatten()
        .is_some_and(|sql| sql.get(..12).is_some_and(|start| start.eq_ignore_ascii_case("CREATE TABLE"))))
}

/// As [`has_table`], but its absence is an error.
pub(crate) fn require_table(connection: &Connection, what: &'static str, table: &'static str) -> Result<()> {
    if has_table(connection, table)? {
        return Ok(());
    }
    Err(ContainerError::MissingTable { what, table })
}

/// Names of a table's columns, lowercase.
pub(crate) fn columns(connection: &Connection, table: &str) -> Result<Vec<String>> {
    const DOING: &str = "read the columns of a table";
    let mut statement = connection.prepare("SELECT name FROM pragma_table_info(?1)").doing(DOING)?;
    let names = statement.query_map([table], |row| row.get::<_, String>(0)).doing(DOING)?;
    names.map(|name| name.map(|name| name.to_ascii_lowercase()).doing(DOING)).collect()
}

/// Value of a property as bytes; none if the key is absent or NULL.
pub(crate) fn property(connection: &Connection, key: &str) -> Result<Option<Vec<u8>>> {
    let value = connection
        .prepare_cached("SELECT CAST(value AS BLOB) FROM properties WHERE key = ?1")
        .and_then(|mut statement| {
            statement.query_row([key], |row| row.get::<_, Option<Vec<u8>>>(0)).optional()
        })
        .doing("read a property")?;
    Ok(value.flatten())
}

/// A property that is an integer; none if absent.
pub(crate) fn integer_property(connection: &Connection, key: &'static str) -> Result<Option<u64>> {
    let Some(value) = property(connection, key)? else {
        return Ok(None);
    };
    let number = std::str::from_utf8(&value).ok().and_then(|text| text.trim().parse().ok());
    number.map(Some).ok_or_else(|| ContainerError::BadProperty { key, value: shown(&value) })
}

/// A property that is a hash; absent, empty and all zeros mean none.
pub(crate) fn hash_property(connection: &Connection, key: &'static str) -> Result<Option<ContentHash>> {
    let value = property(connection, key)?.unwrap_or_default();
    if value.is_empty() {
        return Ok(None);
    }
    let hash =
        ContentHash::parse(&value).map_err(|_| ContainerError::BadProperty { key, value: shown(&value) })?;
    Ok(Some(hash).filter(|hash| !hash.is_null()))
}

/// Sets a property, as text like all of them.
pub(crate) fn set_property(connection: &Connection, key: &str, value: &[u8]) -> Result<()> {
    connection
        .prepare_cached("INSERT OR REPLACE INTO properties (key, value) VALUES (?1, ?2)")
        .and_then(|mut statement| statement.execute((key, Text(value))))
        .map(drop)
        .doing("write a property")
}

/// Number and revision of a schema.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schema {
    /// Property `schema`, such as 2.5; a missing one reads as 1.0.
    pub version: f64,
    /// Property `schema_revision`; a missing one reads as 0.
    pub revision: u64,
}

impl Schema {
    pub(crate) fn read(connection: &Connection, what: &'static str) -> Result<Self> {
        require_table(connection, what, "properties")?;
        let version = match property(connection, "schema")? {
            None => 1.0,
            Some(value) => std::str::from_utf8(&value)
                .ok()
                .and_then(|text| text.trim().parse().ok())
                .filter(|version: &f64| version.is_finite())
                .ok_or_else(|| ContainerError::BadProperty { key: "schema", value: shown(&value) })?,
        };
        Ok(Self { version, revision: integer_property(connection, "schema_revision")?.unwrap_or(0) })
    }

    pub(crate) fn is(&self, version: f64) -> bool {
        (self.version - version).abs() < SCHEMA_EPSILON
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_with_every_special_byte_is_opened_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["a b", "50%", "x?immutable=0", "y#z", "ü&=", "new\nline", "%41"] {
            let path = directory.path().join(name);
            let connection = Connection::open(&path).unwrap();
            connection.execute_batch("CREATE TABLE properties (key TEXT, value TEXT)").unwrap();
            connection.execute("INSERT INTO properties VALUES ('schema', ?1)", [name]).unwrap();
            drop(connection);
            let connection = open_immutable("test", &path, Reading::Mapped).unwrap();
            assert_eq!(property(&connection, "schema").unwrap().unwrap(), name.as_bytes());
        }
    }

    #[test]
    fn a_file_without_a_name_is_opened_by_its_descriptor() {
        use std::os::fd::AsRawFd;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x");
        let connection = Connection::open(&path).unwrap();
        connection.execute_batch("CREATE TABLE properties (key TEXT, value TEXT)").unwrap();
        connection.execute("INSERT INTO properties VALUES ('schema', '2.5')", []).unwrap();
        drop(connection);
        let file = fs::File::open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let connection = open_immutable(
            "test",
            Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd())),
            Reading::Mapped,
        )
        .unwrap();
        assert!(Schema::read(&connection, "test").unwrap().is(2.5));
    }

    #[test]
    fn a_missing_file_and_a_file_that_is_no_database_are_errors() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x");
        assert!(matches!(open_immutable("test", &path, Reading::Mapped), Err(ContainerError::Access { .. })));
        fs::write(&path, vec![b'x'; 5000]).unwrap();
        assert!(
            open_immutable("test", &path, Reading::Mapped)
                .and_then(|connection| Schema::read(&connection, "test"))
                .is_err()
        );
    }

    #[test]
    fn views_and_virtual_tables_do_not_pass_for_tables() {
        let connection = Connection::open_in_memory().unwrap();
        connection
            .execute_batch(
                "CREATE TABLE plain (x); CREATE VIEW view_ AS SELECT 1; CREATE VIRTUAL TABLE virtual_ USING fts5(x);",
            )
            .unwrap();
        assert!(has_table(&connection, "plain").unwrap());
        assert!(!has_table(&connection, "view_").unwrap());
        assert!(!has_table(&connection, "virtual_").unwrap());
        assert!(matches!(require_table(&connection, "test", "no"), Err(ContainerError::MissingTable { .. })));
    }
}
