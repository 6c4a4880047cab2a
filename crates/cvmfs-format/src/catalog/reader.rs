//! Reading a catalog (repository format §8, §10, §12).

use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use rusqlite::types::ValueRef;
use rusqlite::{Connection, OptionalExtension, Params, Row};

use super::counters::{Counters, Counts};
use super::entry::{Chunk, Entry};
use super::{CatalogError, Result, SCHEMA, rows};
use crate::container::{
    ContainerError, Doing, Reading, Schema, Text, has_table, hash_property, integer_property, open_immutable,
    property, require_table,
};
use crate::hash::{ContentHash, HashAlgorithm, PathHash, shown};
use crate::manifest::DEFAULT_TTL;

pub(super) const WHAT: &str = "catalog";

/// Prepared statements kept per connection: all that the reader and the writer have.
const STATEMENTS: usize = 32;

/// A catalog open for reading: one SQLite connection, for one thread at a time.
pub struct Catalog {
    pub(super) connection: Connection,
    pub(super) schema: Schema,
    sql: Statements,
    properties: Properties,
}

/// Statements that depend on the catalog's tables and columns.
struct Statements {
    lookup: String,
    list: String,
    by_rowid: String,
    by_prefix: String,
    all: String,
    /// None if the catalog has no nested catalogs: most are leaves, and the question comes with every name that
    /// does not exist.
    nested: Option<ReferenceStatements>,
    bound: Option<ReferenceStatements>,
}

struct ReferenceStatements {
    all: String,
    at: String,
}

struct Properties {
    revision: u64,
    root_prefix: Vec<u8>,
    ttl: Option<u32>,
    previous: Option<ContentHash>,
    last_modified: u64,
    is_volatile: bool,
    voms_authz: Option<Vec<u8>>,
}

/// A reference to the catalog of a sub-tree (§10).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NestedCatalog {
    /// Path of the mountpoint, inside the tree of this catalog.
    pub path: Vec<u8>,
    /// Hash of the catalog.
    pub hash: ContentHash,
    /// Plain size in bytes; 0 if not recorded.
    pub size: u64,
    /// Whether the catalog is bound from elsewhere: the paths inside it are hashed below its own
    /// [`Catalog::root_prefix`].
    pub bind: bool,
}

impl Catalog {
    /// Opens a complete catalog file, mapped. The file must not be changed while it is open.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_as(path, Reading::Mapped)
    }

    /// Opens a complete catalog file. The file must not be changed while it is open.
    pub fn open_as(path: &Path, reading: Reading) -> Result<Self> {
        Self::from_connection(open_immutable(WHAT, path, reading)?, Access::Read)
    }

    pub(super) fn from_connection(connection: Connection, access: Access) -> Result<Self> {
        connection.set_prepared_statement_cache_capacity(STATEMENTS);
        let schema = Schema::read(&connection, WHAT)?;
        if !(schema.is(SCHEMA) || schema.is(2.4) || schema.version < 2.0) {
            let found = schema.version;
            return Err(ContainerError::UnsupportedSchema { what: WHAT, found, newest: SCHEMA }.into());
        }
        for table in ["catalog", "nested_catalogs"] {
            require_table(&connection, WHAT, table)?;
        }
        Ok(Self {
            sql: Statements::new(&connection, &schema, access)?,
            properties: Properties::read(&connection)?,
            schema,
            connection,
        })
    }

    /// The entry with this path hash; hidden entries are found too.
    pub fn lookup(&self, path: PathHash) -> Result<Option<Entry>> {
        self.one(&self.sql.lookup, (path.part1, path.part2))
    }

    /// The entry with this `rowid`.
    pub fn by_rowid(&self, rowid: i64) -> Result<Option<Entry>> {
        self.one(&self.sql.by_rowid, [rowid])
    }

    /// Entries of a directory, sorted by name: without hidden ones and without names that no Linux directory can
    /// hold (empty, `.`, `..`, with slash or zero byte, over 255 bytes), on which a kernel would fail the listing.
    pub fn list(&self, parent: PathHash) -> Result<Vec<Entry>> {
        Ok(self.list_up_to(parent, usize::MAX)?.unwrap_or_default())
    }

    /// The same, or nothing if the directory has more than `most` rows. No more than those are read.
    pub fn list_up_to(&self, parent: PathHash, most: usize) -> Result<Option<Vec<Entry>>> {
        let mut statement = self.connection.prepare_cached(&self.sql.list).doing(READING)?;
        let mut rows = statement.query((parent.part1, parent.part2)).doing(READING)?;
        let mut entries = Vec::new();
        while let Some(row) = rows.next().doing(READING)? {
            if entries.len() == most {
                return Ok(None);
            }
            entries.push(rows::decode(row)?);
        }
        entries.retain(|entry: &Entry| !entry.is_hidden() && entry.has_valid_name());
        entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        Ok(Some(entries))
    }

    /// All rows with this parent, sorted by name, with the hidden and the unusable ones.
    pub fn list_all(&self, parent: PathHash) -> Result<Vec<Entry>> {
        let mut entries = self.many(&self.sql.list, (parent.part1, parent.part2))?;
        entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// Entries with `lo <= md5path_1 <= hi`, for walks through the catalog in pieces.
    pub fn by_path_prefix(&self, lo: i64, hi: i64) -> Result<Vec<Entry>> {
        self.many(&self.sql.by_prefix, (lo, hi))
    }

    /// Calls `visit` with every row in the order of `rowid`, or with the error of a damaged row.
    pub fn for_each(&self, mut visit: impl FnMut(Result<Entry>) -> Result<()>) -> Result<()> {
        let mut statement = self.connection.prepare_cached(&self.sql.all).doing(READING)?;
        let mut rows = statement.query([]).doing(READING)?;
        while let Some(row) = rows.next().doing(READING)? {
            visit(rows::decode(row))?;
        }
        Ok(())
    }

    /// Smallest `rowid` of each hard link group: its members share that row's inode. Scans the whole catalog.
    pub fn link_group_leaders(&self) -> Result<HashMap<u32, i64>> {
        if !self.sql.all.contains("hardlinks") {
            return Ok(HashMap::new());
        }
        let mut statement = self
            .connection
            .prepare_cached(
                "SELECT (hardlinks >> 32) & 4294967295, MIN(rowid) FROM catalog \
                 WHERE hardlinks > 4294967295 OR hardlinks < 0 GROUP BY 1",
            )
            .doing(READING)?;
        let groups = statement
            .query_map([], |row| Ok((row.get::<_, u32>(0)?, row.get::<_, i64>(1)?)))
            .doing(READING)?;
        groups.map(|group| group.doing(READING).map_err(Into::into)).collect()
    }

    /// Largest hard link group in use, 0 if there is none.
    pub fn max_link_group(&self) -> Result<u32> {
        Ok(self.link_group_leaders()?.into_keys().max().unwrap_or(0))
    }

    /// Largest `rowid`, 0 for a catalog without rows.
    pub fn max_rowid(&self) -> Result<i64> {
        let max: Option<i64> = self
            .connection
            .query_row("SELECT MAX(rowid) FROM catalog", [], |row| row.get(0))
            .doing(READING)?;
        Ok(max.unwrap_or(0))
    }

    /// Nested catalogs of this catalog, sorted by path, without those nested in them.
    pub fn nested(&self) -> Result<Vec<NestedCatalog>> {
        self.references(Reference::Nested)
    }

    /// Catalogs bound from elsewhere, sorted by path.
    pub fn bind_mountpoints(&self) -> Result<Vec<NestedCatalog>> {
        self.references(Reference::Bind)
    }

    /// The nested or bound catalog mounted at this very path.
    pub fn nested_at(&self, path: &[u8]) -> Result<Option<NestedCatalog>> {
        if let Some(found) = self.reference_at(Reference::Nested, path)? {
            return Ok(Some(found));
        }
        self.reference_at(Reference::Bind, path)
    }

    /// The nested or bound catalog whose mountpoint is the deepest component-wise prefix of `path`, or `path`
    /// itself.
    pub fn nested_for(&self, path: &[u8]) -> Result<Option<NestedCatalog>> {
        let mut end = path.len();
        while end > 0 {
            if let Some(found) = self.nested_at(&path[..end])? {
                return Ok(Some(found));
            }
            end = path[..end].iter().rposition(|byte| *byte == b'/').unwrap_or(0);
        }
        Ok(None)
    }

    /// Chunks of a file in order; verified to be contiguous from 0. The caller compares their end with the file's
    /// size, or uses [`Catalog::chunks_of`].
    pub fn chunks(&self, path: PathHash, algorithm: HashAlgorithm) -> Result<Vec<Chunk>> {
        let bad = |reason: String| CatalogError::Chunks { path_hash: path, reason };
        let mut statement = self
            .connection
            .prepare_cached(
                "SELECT offset, size, hash FROM chunks WHERE md5path_1 = ?1 AND md5path_2 = ?2 ORDER BY offset",
            )
            .doing(READING)?;
        let mut rows = statement.query((path.part1, path.part2)).doing(READING)?;
        let mut chunks: Vec<Chunk> = Vec::new();
        let mut end = 0;
        while let Some(row) = rows.next().doing(READING)? {
            let chunk = rows::decode_chunk(row, algorithm)
                .ok_or_else(|| bad(format!("row {} is malformed", chunks.len() + 1)))?;
            if chunk.offset != end || chunk.size == 0 {
                return Err(bad(format!(
                    "{} bytes at {}, expected a chunk at {end}",
                    chunk.size, chunk.offset
                )));
            }
            end =
                chunk.offset.checked_add(chunk.size).ok_or_else(|| bad("end exceeds 64 bits".to_owned()))?;
            chunks.push(chunk);
        }
        Ok(chunks)
    }

    /// Chunks of a chunked file; verified to cover exactly its size.
    pub fn chunks_of(&self, entry: &Entry) -> Result<Vec<Chunk>> {
        let chunks = self.chunks(entry.path_hash, entry.algorithm())?;
        let end = chunks.last().map_or(0, |chunk| chunk.offset + chunk.size);
        if end != entry.size {
            let reason = format!("chunks end at {end}, the file has {} bytes", entry.size);
            return Err(CatalogError::Chunks { path_hash: entry.path_hash, reason });
        }
        Ok(chunks)
    }

    /// Number of chunk rows in the whole catalog.
    pub fn chunk_count(&self) -> Result<u64> {
        let count: i64 =
            self.connection.query_row("SELECT COUNT(*) FROM chunks", [], |row| row.get(0)).doing(READING)?;
        Ok(u64::try_from(count).unwrap_or(0))
    }

    /// Statistics; counters that the catalog lacks read as 0.
    pub fn counters(&self) -> Result<Counters> {
        Ok(self.read_counters()?.0)
    }

    /// Counters that a catalog of this revision must have and lacks: C++ clients refuse such a catalog.
    pub fn missing_counters(&self) -> Result<Vec<String>> {
        Ok(self.read_counters()?.1)
    }

    /// Property `revision`; in the root catalog the revision of the repository.
    pub fn revision(&self) -> u64 {
        self.properties.revision
    }

    /// Path at which the catalog was made; empty for a root catalog. All paths in the catalog are below it.
    pub fn root_prefix(&self) -> &[u8] {
        &self.properties.root_prefix
    }

    /// Seconds for which the revision may be relied on.
    pub fn ttl(&self) -> u32 {
        self.properties.ttl.unwrap_or(DEFAULT_TTL)
    }

    /// The catalog's predecessor, none for the first.
    pub fn previous(&self) -> Option<ContentHash> {
        self.properties.previous
    }

    /// Unix time of the last change.
    pub fn last_modified(&self) -> u64 {
        self.properties.last_modified
    }

    /// Whether clients should evict this repository's objects first.
    pub fn is_volatile(&self) -> bool {
        self.properties.is_volatile
    }

    /// Membership requirement for access to the repository, free text.
    pub fn voms_authz(&self) -> Option<&[u8]> {
        self.properties.voms_authz.as_deref()
    }

    /// Schema number and revision.
    pub fn schema(&self) -> Schema {
        self.schema
    }

    fn one(&self, sql: &str, parameters: impl Params) -> Result<Option<Entry>> {
        let mut statement = self.connection.prepare_cached(sql).doing(READING)?;
        let mut rows = statement.query(parameters).doing(READING)?;
        rows.next().doing(READING)?.map(rows::decode).transpose()
    }

    fn many(&self, sql: &str, parameters: impl Params) -> Result<Vec<Entry>> {
        let mut statement = self.connection.prepare_cached(sql).doing(READING)?;
        let mut rows = statement.query(parameters).doing(READING)?;
        let mut entries = Vec::new();
        while let Some(row) = rows.next().doing(READING)? {
            entries.push(rows::decode(row)?);
        }
        Ok(entries)
    }

    fn references(&self, table: Reference) -> Result<Vec<NestedCatalog>> {
        let Some(sql) = self.sql.references(table) else {
            return Ok(Vec::new());
        };
        let mut statement = self.connection.prepare_cached(&sql.all).doing(READING)?;
        let mut rows = statement.query([]).doing(READING)?;
        let mut found = Vec::new();
        while let Some(row) = rows.next().doing(READING)? {
            found.push(table.decode(row)?);
        }
        Ok(found)
    }

    fn reference_at(&self, table: Reference, path: &[u8]) -> Result<Option<NestedCatalog>> {
        let Some(sql) = self.sql.references(table) else {
            return Ok(None);
        };
        let mut statement = self.connection.prepare_cached(&sql.at).doing(READING)?;
        let mut rows = statement.query([Text(path)]).doing(READING)?;
        rows.next().doing(READING)?.map(|row| table.decode(row)).transpose()
    }

    fn read_counters(&self) -> Result<(Counters, Vec<String>)> {
        let mut counters = Counters::default();
        let mut missing = Vec::new();
        if !has_table(&self.connection, "statistics")? {
            return Ok((counters, vec!["statistics".to_owned()]));
        }
        let sql = "SELECT value FROM statistics WHERE counter = ?1";
        let mut statement = self.connection.prepare_cached(sql).doing(READING)?;
        for (prefix, counts) in [("self", &mut counters.own), ("subtree", &mut counters.subtree)] {
            for name in Counts::NAMES {
                let counter = format!("{prefix}_{name}");
                let value: Option<Option<i64>> =
                    statement.query_row([&counter], |row| row.get(0)).optional().doing("read a counter")?;
                match (value.flatten(), counts.get_mut(name)) {
                    (Some(value), Some(count)) => *count = value,
                    _ if since_revision(name) <= self.schema.revision => missing.push(counter),
                    _ => {}
                }
            }
        }
        Ok((counters, missing))
    }
}

const READING: &str = "read the catalog";

/// Schema revision from which on a counter exists (§8.3).
pub(super) fn since_revision(counter: &str) -> u64 {
    match counter {
        "xattr" => 2,
        "external" | "external_file_size" => 3,
        "special" => 5,
        _ => 0,
    }
}

impl fmt::Debug for Catalog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Catalog")
            .field("root_prefix", &shown(&self.properties.root_prefix))
            .field("revision", &self.properties.revision)
            .field("schema", &self.schema)
            .finish_non_exhaustive()
    }
}

impl Statements {
    fn new(connection: &Connection, schema: &Schema, access: Access) -> Result<Self> {
        let select = rows::select(connection, schema)?;
        let size = if schema.revision >= 1 { "size" } else { "0" };
        let has_bound = schema.revision >= 4 && has_table(connection, "bind_mountpoints")?;
        Ok(Self {
            lookup: format!("{select} WHERE md5path_1 = ?1 AND md5path_2 = ?2"),
            list: format!("{select} WHERE parent_1 = ?1 AND parent_2 = ?2"),
            by_rowid: format!("{select} WHERE rowid = ?1"),
            by_prefix: format!("{select} WHERE md5path_1 BETWEEN ?1 AND ?2 ORDER BY md5path_1, md5path_2"),
            all: format!("{select} ORDER BY rowid"),
            nested: ReferenceStatements::new(connection, "nested_catalogs", size, access)?,
            bound: match has_bound {
                true => ReferenceStatements::new(connection, "bind_mountpoints", "size", access)?,
                false => None,
            },
        })
    }

    fn references(&self, table: Reference) -> Option<&ReferenceStatements> {
        match table {
            Reference::Nested => self.nested.as_ref(),
            Reference::Bind => self.bound.as_ref(),
        }
    }
}

impl ReferenceStatements {
    fn new(connection: &Connection, table: &str, size: &str, access: Access) -> Result<Option<Self>> {
        let has_rows = connection
            .prepare(&format!("SELECT 1 FROM {table}"))
            .and_then(|mut all| all.exists([]))
            .doing(READING)?;
        let statements = Self {
            all: format!("SELECT path, sha1, {size} FROM {table} ORDER BY path"),
            at: format!("SELECT path, sha1, {size} FROM {table} WHERE path = ?1"),
        };
        Ok((has_rows || access == Access::Write).then_some(statements))
    }
}

impl Properties {
    fn read(connection: &Connection) -> Result<Self> {
        let ttl = integer_property(connection, "TTL")?;
        Ok(Self {
            revision: integer_property(connection, "revision")?.unwrap_or(0),
            root_prefix: property(connection, "root_prefix")?.unwrap_or_default(),
            ttl: ttl.map(|ttl| u32::try_from(ttl).unwrap_or(u32::MAX)),
            previous: hash_property(connection, "previous_revision")?,
            last_modified: integer_property(connection, "last_modified")?.unwrap_or(0),
            is_volatile: property(connection, "volatile")?
                .is_some_and(|value| value != b"0" && !value.is_empty()),
            voms_authz: property(connection, "voms_authz")?.filter(|value| !value.is_empty()),
        })
    }
}

/// Whether the rows of a catalog can still change.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
}

/// The two tables that refer to other catalogs.
#[derive(Clone, Copy)]
enum Reference {
    Nested,
    Bind,
}

impl Reference {
    fn decode(self, row: &Row<'_>) -> Result<NestedCatalog> {
        let table = match self {
            Self::Nested => "nested_catalogs",
            Self::Bind => "bind_mountpoints",
        };
        let bad = |reason: String| CatalogError::Reference { table, reason };
        let bytes = |column| match row.get_ref(column).doing(READING)? {
            ValueRef::Text(bytes) | ValueRef::Blob(bytes) => Ok::<_, CatalogError>(bytes),
            other => Err(bad(format!("{} instead of text", other.data_type()))),
        };
        let path = bytes(0)?;
        if path.first() != Some(&b'/') {
            return Err(bad(format!("{:?} is no absolute path", shown(path))));
        }
        let hash = ContentHash::parse(bytes(1)?).map_err(|error| bad(format!("{}: {error}", shown(path))))?;
        let size = row.get_ref(2).doing(READING)?.as_i64().ok().and_then(|size| u64::try_from(size).ok());
        Ok(NestedCatalog {
            path: path.to_vec(),
            hash,
            size: size.unwrap_or(0),
            bind: matches!(self, Self::Bind),
        })
    }
}
