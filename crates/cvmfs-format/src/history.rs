//! The history: named revisions of a repository in an SQLite file (repository format §14).
//!
//! `trunk` names the newest revision, `trunk-previous` the one before. Both are rewritten by each publish with
//! [`History::rotate_trunk`]; a rollback removes `trunk-previous` until the next publish.

use std::fmt;
use std::path::Path;

use rusqlite::types::ValueRef;
use rusqlite::{Connection, ErrorCode, Params, Row, params};

use crate::container::{
    self, ContainerError, Doing, Schema, columns, hash_property, is_wasteful, property, require_table,
    set_property,
};
use crate::hash::{ContentHash, shown};

const WHAT: &str = "history";

/// Schema number of history databases.
const SCHEMA: f64 = 1.0;

/// Newest schema revision.
const SCHEMA_REVISION: u64 = 3;

/// Page size of fresh databases, that of the C++ tools.
pub(crate) const PAGE_SIZE: u32 = 1024;

/// Name of the newest revision.
pub const TRUNK: &str = "trunk";

/// Name of the revision before the newest.
pub const TRUNK_PREVIOUS: &str = "trunk-previous";

const TRUNK_DESCRIPTION: &str = "current HEAD";
const TRUNK_PREVIOUS_DESCRIPTION: &str = "default undo target";

/// Longest tag name; it may become a directory name in the virtual catalog.
const MAX_NAME: usize = 255;

/// Statements in the order and wording of the C++ tools.
const TABLES: &str = "\
CREATE TABLE properties (key TEXT, value TEXT, CONSTRAINT pk_properties PRIMARY KEY (key));
CREATE TABLE branches (branch TEXT, parent TEXT, initial_revision INTEGER,  CONSTRAINT pk_branch PRIMARY KEY (branch),   \
FOREIGN KEY (parent) REFERENCES branches (branch),   CHECK ((branch <> '') OR (parent IS NULL)),   \
CHECK ((branch = '') OR (parent IS NOT NULL)));
INSERT INTO branches (branch, parent, initial_revision) VALUES ('', NULL, 0);
CREATE TABLE tags (name TEXT, hash TEXT, revision INTEGER,   timestamp INTEGER, channel INTEGER, description TEXT, \
size INTEGER,   branch TEXT, CONSTRAINT pk_tags PRIMARY KEY (name),   FOREIGN KEY (branch) REFERENCES branches (branch));
CREATE TABLE recycle_bin (hash TEXT, flags INTEGER,   CONSTRAINT pk_hash PRIMARY KEY (hash));";

/// A named revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tag {
    /// Name, unique, without blanks.
    pub name: String,
    /// Root catalog.
    pub root_catalog: ContentHash,
    /// Plain size of the root catalog in bytes; 0 if not recorded.
    pub root_catalog_size: u64,
    /// Number of the revision.
    pub revision: u64,
    /// Unix time of tagging.
    pub timestamp: i64,
    /// Free text.
    pub description: String,
    /// Branch, empty for the main line.
    pub branch: String,
}

/// Why a history cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum HistoryError {
    /// The database is unusable or a statement failed.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// A row is damaged.
    #[error("damaged tag {name:?} in the history: {reason}")]
    Row {
        /// Name of the tag, as far as readable.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A tag with this name exists.
    #[error("tag {0:?} exists already")]
    Exists(String),
    /// There is no tag with this name.
    #[error("no tag named {0:?}")]
    Missing(String),
    /// The name cannot be used.
    #[error(
        "tag name {0:?} is empty, longer than 255 bytes, or contains blanks, slashes or control characters"
    )]
    BadName(String),
    /// A revision or size needs more than 63 bits.
    #[error("tag {0:?}: revision or size exceeds 63 bits")]
    TooLarge(String),
    /// The tag's branch does not exist.
    #[error("tag {name:?} is on branch {branch:?}, which does not exist")]
    NoBranch {
        /// Name of the tag.
        name: String,
        /// Name of the branch.
        branch: String,
    },
    /// The database was opened for reading.
    #[error("the history is open for reading only")]
    ReadOnly,
}

type Result<T> = std::result::Result<T, HistoryError>;

/// A history database, open for reading or for writing.
pub struct History {
    connection: Connection,
    select: String,
    fqrn: String,
    previous: Option<ContentHash>,
    is_writable: bool,
}

impl History {
    /// Opens a complete file for reading.
    pub fn open(path: &Path) -> Result<Self> {
        Self::from_connection(container::open_immutable(WHAT, path, container::Reading::Mapped)?, false)
    }

    /// Creates the history of a new repository in a new file, without tags.
    pub fn create(path: &Path, fqrn: &str) -> Result<Self> {
        container::create_new(WHAT, path)?;
        let connection = container::open_scratch(WHAT, path, Some(PAGE_SIZE))?;
        connection.execute_batch(TABLES).doing("create the history's tables")?;
        set_property(&connection, "schema", b"1.0")?;
        set_property(&connection, "schema_revision", SCHEMA_REVISION.to_string().as_bytes())?;
        set_property(&connection, "fqrn", fqrn.as_bytes())?;
        Self::from_connection(connection, true)
    }

    /// Opens a history to change it; it must be the caller's own copy. Older schema revisions are upgraded.
    pub fn open_for_writing(path: &Path) -> Result<Self> {
        let connection = container::open_scratch(WHAT, path, None)?;
        upgrade(&connection)?;
        Self::from_connection(connection, true)
    }

    fn from_connection(connection: Connection, is_writable: bool) -> Result<Self> {
        let schema = Schema::read(&connection, WHAT)?;
        if !schema.is(SCHEMA) {
            return Err(unsupported(&schema));
        }
        require_table(&connection, WHAT, "tags")?;
        let present = columns(&connection, "tags")?;
        let or = |column: &'static str, substitute| {
            if present.iter().any(|name| name == column) { column } else { substitute }
        };
        let select = format!(
            "SELECT name, hash, revision, timestamp, description, {}, {} FROM tags",
            or("size", "0"),
            or("branch", "''")
        );
        Ok(Self {
            fqrn: property(&connection, "fqrn")?.map(|name| text(&name)).unwrap_or_default(),
            previous: hash_property(&connection, "previous_revision")?,
            select,
            connection,
            is_writable,
        })
    }

    /// Name of the repository.
    pub fn fqrn(&self) -> &str {
        &self.fqrn
    }

    /// The history's predecessor, none for the first.
    pub fn previous(&self) -> Option<ContentHash> {
        self.previous
    }

    /// All tags, the newest first.
    pub fn tags(&self) -> Result<Vec<Tag>> {
        self.query("ORDER BY timestamp DESC, revision DESC", [])
    }

    /// The tag with this name.
    pub fn tag(&self, name: &str) -> Result<Option<Tag>> {
        Ok(self.query("WHERE name = ?1", [name])?.pop())
    }

    /// The newest tag of the main line that is not younger than a Unix time.
    pub fn tag_at(&self, unix: i64) -> Result<Option<Tag>> {
        let main_line = if self.select.contains("branch") { "branch = '' AND " } else { "" };
        let clause = format!("WHERE {main_line}timestamp <= ?1 ORDER BY revision DESC LIMIT 1");
        Ok(self.query(&clause, [unix])?.pop())
    }

    /// Adds a tag; one with the same name is an error.
    pub fn insert(&mut self, tag: &Tag) -> Result<()> {
        self.check_writable()?;
        let (revision, size) = self.check_storable(tag)?;
        let inserted = self
            .connection
            .prepare_cached(
                "INSERT INTO tags (name, hash, revision, timestamp, channel, description, size, branch) \
                 VALUES (?1, ?2, ?3, ?4, 0, ?5, ?6, ?7)",
            )
            .and_then(|mut statement| {
                statement.execute(params![
                    tag.name,
                    tag.root_catalog.to_string(),
                    revision,
                    tag.timestamp,
                    tag.description,
                    size,
                    tag.branch
                ])
            });
        match inserted {
            Ok(_) => Ok(()),
            Err(rusqlite::Error::SqliteFailure(error, _))
                if error.code == ErrorCode::ConstraintViolation && self.tag(&tag.name)?.is_some() =>
            {
                Err(HistoryError::Exists(tag.name.clone()))
            }
            Err(source) => Err(ContainerError::Sqlite { doing: WRITING, source }.into()),
        }
    }

    /// Adds a tag or replaces the one with the same name.
    pub fn replace(&mut self, tag: &Tag) -> Result<()> {
        self.check_storable(tag)?;
        self.execute("DELETE FROM tags WHERE name = ?1", [&tag.name])?;
        self.insert(tag)
    }

    /// Removes a tag. Objects that only it refers to go with the next garbage collection.
    pub fn remove(&mut self, name: &str) -> Result<()> {
        if self.execute("DELETE FROM tags WHERE name = ?1", [name])? == 0 {
            return Err(HistoryError::Missing(name.to_owned()));
        }
        Ok(())
    }

    /// Makes `trunk` name a new revision and `trunk-previous` what `trunk` named before, as each publish does.
    pub fn rotate_trunk(
        &mut self,
        root_catalog: ContentHash,
        size: u64,
        revision: u64,
        now: i64,
    ) -> Result<()> {
        if let Some(old) = self.tag(TRUNK)? {
            let description = TRUNK_PREVIOUS_DESCRIPTION.to_owned();
            self.replace(&Tag { name: TRUNK_PREVIOUS.to_owned(), description, ..old })?;
        }
        self.set_trunk(root_catalog, size, revision, now)
    }

    /// Records a rollback to a tag: `root_catalog` is the tag's catalog published anew as `revision`. Newer tags of the
    /// main line and `trunk-previous` are removed, the tag and `trunk` name the new revision.
    pub fn rollback(
        &mut self,
        tag: &str,
        root_catalog: ContentHash,
        size: u64,
        revision: u64,
        now: i64,
    ) -> Result<()> {
        let target = self.tag(tag)?.ok_or_else(|| HistoryError::Missing(tag.to_owned()))?;
        let limit = i64::try_from(target.revision).unwrap_or(i64::MAX);
        self.execute("DELETE FROM tags WHERE branch = '' AND revision > ?1", [limit])?;
        self.execute("DELETE FROM tags WHERE name = ?1", [TRUNK_PREVIOUS])?;
        if tag != TRUNK_PREVIOUS && tag != TRUNK {
            self.replace(&Tag { root_catalog, root_catalog_size: size, revision, timestamp: now, ..target })?;
        }
        self.set_trunk(root_catalog, size, revision, now)
    }

    /// Records the predecessor of this history, if any, and commits: the file is complete and ready to be compressed
    /// and hashed.
    pub fn finish(self, previous: Option<ContentHash>) -> Result<()> {
        self.check_writable()?;
        if let Some(previous) = previous {
            set_property(&self.connection, "previous_revision", previous.to_string().as_bytes())?;
        }
        let compact = is_wasteful(&self.connection)?;
        Ok(container::commit(self.connection, compact)?)
    }

    fn set_trunk(&mut self, root_catalog: ContentHash, size: u64, revision: u64, now: i64) -> Result<()> {
        self.replace(&Tag {
            name: TRUNK.to_owned(),
            root_catalog,
            root_catalog_size: size,
            revision,
            timestamp: now,
            description: TRUNK_DESCRIPTION.to_owned(),
            branch: String::new(),
        })
    }

    fn query(&self, clause: &str, parameters: impl Params) -> Result<Vec<Tag>> {
        let sql = format!("{} {clause}", self.select);
        let mut statement = self.connection.prepare_cached(&sql).doing(READING)?;
        let mut rows = statement.query(parameters).doing(READING)?;
        let mut tags = Vec::new();
        while let Some(row) = rows.next().doing(READING)? {
            tags.push(decode(row)?);
        }
        Ok(tags)
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

    /// Checks the rules a tag must keep; returns revision and size as the columns hold them.
    fn check_storable(&self, tag: &Tag) -> Result<(i64, i64)> {
        check_name(&tag.name)?;
        let branch_exists = self
            .connection
            .prepare_cached("SELECT 1 FROM branches WHERE branch = ?1")
            .and_then(|mut statement| statement.exists([&tag.branch]))
            .doing(READING)?;
        if !branch_exists {
            return Err(HistoryError::NoBranch { name: tag.name.clone(), branch: tag.branch.clone() });
        }
        let number = |value: u64| i64::try_from(value).map_err(|_| HistoryError::TooLarge(tag.name.clone()));
        Ok((number(tag.revision)?, number(tag.root_catalog_size)?))
    }

    fn check_writable(&self) -> Result<()> {
        if self.is_writable { Ok(()) } else { Err(HistoryError::ReadOnly) }
    }
}

const READING: &str = "read the history";
const WRITING: &str = "write the history";

impl fmt::Debug for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("History")
            .field("fqrn", &self.fqrn)
            .field("previous", &self.previous)
            .finish_non_exhaustive()
    }
}

fn unsupported(schema: &Schema) -> HistoryError {
    ContainerError::UnsupportedSchema { what: WHAT, found: schema.version, newest: SCHEMA }.into()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn decode(row: &Row<'_>) -> Result<Tag> {
    let bytes = |column: usize| match row.get_ref(column) {
        Ok(ValueRef::Text(bytes) | ValueRef::Blob(bytes)) => Some(bytes),
        _ => None,
    };
    let name = bytes(0).unwrap_or_default();
    let bad = |reason: &str| HistoryError::Row { name: shown(name), reason: reason.to_owned() };
    let integer = |column: usize| row.get_ref(column).ok().and_then(|value| value.as_i64().ok());
    let unsigned = |column: usize| integer(column).and_then(|value| u64::try_from(value).ok());
    Ok(Tag {
        name: std::str::from_utf8(name).map_err(|_| bad("its name is not UTF-8"))?.to_owned(),
        root_catalog: ContentHash::parse(bytes(1).unwrap_or_default()).map_err(|_| bad("no valid hash"))?,
        revision: unsigned(2).ok_or_else(|| bad("no valid revision"))?,
        timestamp: integer(3).ok_or_else(|| bad("no valid time stamp"))?,
        description: bytes(4).map(text).unwrap_or_default(),
        root_catalog_size: unsigned(5).unwrap_or(0),
        branch: bytes(6).map(text).unwrap_or_default(),
    })
}

fn check_name(name: &str) -> Result<()> {
    let is_good = (1..=MAX_NAME).contains(&name.len())
        && !name.chars().any(|letter| letter.is_whitespace() || letter.is_control() || letter == '/');
    if is_good { Ok(()) } else { Err(HistoryError::BadName(shown(name.as_bytes()))) }
}

/// Brings a database of schema 1.0 to the newest revision.
fn upgrade(connection: &Connection) -> Result<()> {
    let schema = Schema::read(connection, WHAT)?;
    if !schema.is(SCHEMA) {
        return Err(unsupported(&schema));
    }
    if schema.revision >= SCHEMA_REVISION {
        return Ok(());
    }
    let present = columns(connection, "tags")?;
    let mut sql = String::new();
    if !present.iter().any(|name| name == "size") {
        sql.push_str("ALTER TABLE tags ADD size INTEGER;");
    }
    sql.push_str(
        "CREATE TABLE IF NOT EXISTS recycle_bin (hash TEXT, flags INTEGER, CONSTRAINT pk_hash PRIMARY KEY (hash));
         DELETE FROM recycle_bin;
         CREATE TABLE IF NOT EXISTS branches (branch TEXT, parent TEXT, initial_revision INTEGER, \
         CONSTRAINT pk_branch PRIMARY KEY (branch), FOREIGN KEY (parent) REFERENCES branches (branch), \
         CHECK ((branch <> '') OR (parent IS NULL)), CHECK ((branch = '') OR (parent IS NOT NULL)));
         INSERT OR IGNORE INTO branches (branch, parent, initial_revision) VALUES ('', NULL, 0);",
    );
    if !present.iter().any(|name| name == "branch") {
        sql.push_str("ALTER TABLE tags ADD branch TEXT REFERENCES branches (branch);");
    }
    sql.push_str(
        "UPDATE tags SET branch = '' WHERE branch IS NULL; UPDATE tags SET size = 0 WHERE size IS NULL;",
    );
    connection.execute_batch(&sql).doing("upgrade the history")?;
    set_property(connection, "schema_revision", SCHEMA_REVISION.to_string().as_bytes())?;
    Ok(())
}
