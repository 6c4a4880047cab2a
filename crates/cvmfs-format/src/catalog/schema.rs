//! Tables of a fresh catalog and the upgrade of old ones (repository format §8).

use rusqlite::Connection;

use super::counters::Counts;
use super::reader::{WHAT, since_revision};
use super::{Result, SCHEMA, SCHEMA_REVISION};
use crate::container::{ContainerError, Doing, Schema, columns, set_property};

/// Page size of fresh catalogs, that of the C++ tools: most nested catalogs are small and each of the fifteen tables
/// and indexes takes at least one page.
pub(super) const PAGE_SIZE: u32 = 1024;

/// Statements in the order and wording of the C++ tools.
const TABLES: &str = "\
CREATE TABLE properties (key TEXT, value TEXT, CONSTRAINT pk_properties PRIMARY KEY (key));
CREATE TABLE catalog (md5path_1 INTEGER, md5path_2 INTEGER, parent_1 INTEGER, parent_2 INTEGER, hardlinks INTEGER, \
hash BLOB, size INTEGER, mode INTEGER, mtime INTEGER, mtimens INTEGER, flags INTEGER, name TEXT, symlink TEXT, \
uid INTEGER, gid INTEGER, xattr BLOB,  CONSTRAINT pk_catalog PRIMARY KEY (md5path_1, md5path_2));
CREATE INDEX idx_catalog_parent ON catalog (parent_1, parent_2);
CREATE TABLE chunks (md5path_1 INTEGER, md5path_2 INTEGER, offset INTEGER, size INTEGER,  hash BLOB,  \
CONSTRAINT pk_chunks PRIMARY KEY (md5path_1, md5path_2, offset, size),  \
FOREIGN KEY (md5path_1, md5path_2) REFERENCES    catalog(md5path_1, md5path_2));
CREATE TABLE nested_catalogs (path TEXT, sha1 TEXT, size INTEGER, CONSTRAINT pk_nested_catalogs PRIMARY KEY (path));
CREATE TABLE bind_mountpoints (path TEXT, sha1 TEXT, size INTEGER, CONSTRAINT pk_bind_mountpoints PRIMARY KEY (path));
CREATE TABLE statistics (counter TEXT, value INTEGER, CONSTRAINT pk_statistics PRIMARY KEY (counter));";

/// Creates the tables of a catalog without rows, with all properties and counters.
pub(super) fn create(connection: &Connection, root_prefix: &[u8]) -> Result<()> {
    connection.execute_batch(TABLES).doing("create the catalog's tables")?;
    set_property(connection, "schema", b"2.5")?;
    set_property(connection, "schema_revision", SCHEMA_REVISION.to_string().as_bytes())?;
    set_property(connection, "revision", b"0")?;
    if !root_prefix.is_empty() {
        set_property(connection, "root_prefix", root_prefix)?;
    }
    add_counters(connection, |_| true)
}

/// Brings a catalog of schema 2.5 to the newest revision, as every opening for writing does (§8.3).
pub(super) fn upgrade(connection: &Connection) -> Result<()> {
    let schema = Schema::read(connection, WHAT)?;
    if !schema.is(SCHEMA) {
        let found = schema.version;
        return Err(ContainerError::UnsupportedSchema { what: WHAT, found, newest: SCHEMA }.into());
    }
    if schema.revision >= SCHEMA_REVISION {
        return Ok(());
    }
    add_column(connection, "nested_catalogs", "size", "INTEGER")?;
    add_column(connection, "catalog", "xattr", "BLOB")?;
    add_column(connection, "catalog", "mtimens", "INTEGER")?;
    connection
        .execute_batch(
            "CREATE TABLE IF NOT EXISTS bind_mountpoints \
             (path TEXT, sha1 TEXT, size INTEGER, CONSTRAINT pk_bind_mountpoints PRIMARY KEY (path));",
        )
        .doing("upgrade the catalog")?;
    add_counters(connection, |counter| since_revision(counter) > schema.revision)?;
    set_property(connection, "schema_revision", SCHEMA_REVISION.to_string().as_bytes())?;
    Ok(())
}

fn add_column(connection: &Connection, table: &str, column: &str, kind: &str) -> Result<()> {
    if !columns(connection, table)?.iter().any(|present| present == column) {
        connection
            .execute_batch(&format!("ALTER TABLE {table} ADD {column} {kind}"))
            .doing("upgrade the catalog")?;
    }
    Ok(())
}

fn add_counters(connection: &Connection, is_wanted: impl Fn(&str) -> bool) -> Result<()> {
    for prefix in ["self", "subtree"] {
        for name in Counts::NAMES.into_iter().filter(|name| is_wanted(name)) {
            connection
                .execute(
                    "INSERT OR IGNORE INTO statistics (counter, value) VALUES (?1, 0)",
                    [format!("{prefix}_{name}")],
                )
                .doing("create the catalog's counters")?;
        }
    }
    Ok(())
}
