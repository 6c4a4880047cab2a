//! Writing a catalog (repository format §8 to §11).
//!
//! A writer works on a scratch file inside one transaction that [`CatalogWriter::finish`] commits; a writer that is
//! dropped leaves the file as it was. The catalog's own counters follow the rows by themselves; what happened in
//! catalogs below is added with [`CatalogWriter::add_subtree`].

use std::fmt;
use std::path::Path;

use rusqlite::{ErrorCode, params};

use super::counters::{Counters, Counts};
use super::entry::{Chunk, Entry, MAX_NAME};
use super::reader::{Access, Catalog, WHAT};
use super::{CatalogError, Result, schema};
use crate::container::{self, ContainerError, Doing, Text, is_wasteful, set_property};
use crate::hash::{ContentHash, PathHash, shown};

const WRITING: &str = "write the catalog";

/// Part of the rowids above which unused ones are worth renumbering: clients reserve an inode for each.
const MAX_ROWID_WASTE: f64 = 0.25;

/// Longest path that a catalog can be mounted at; what Linux accepts.
const MAX_PATH: usize = 4095;

/// A catalog being made or changed.
pub struct CatalogWriter {
    catalog: Catalog,
    delta: Counters,
    /// Largest hard link group handed out or found; read on first use.
    last_group: Option<u32>,
}

impl CatalogWriter {
    /// Creates a catalog without rows in a new file; an existing file is an error. `root_prefix` is the path of the
    /// mountpoint, empty for a root catalog.
    pub fn create(path: &Path, root_prefix: &[u8]) -> Result<Self> {
        if !root_prefix.is_empty() {
            check_path(root_prefix)?;
        }
        container::create_new(WHAT, path)?;
        let connection = container::open_scratch(WHAT, path, Some(schema::PAGE_SIZE))?;
        schema::create(&connection, root_prefix)?;
        let catalog = Catalog::from_connection(connection, Access::Write)?;
        Ok(Self { catalog, delta: Counters::default(), last_group: None })
    }

    /// Opens a catalog to change it; it must be the caller's own copy. Older schema revisions are upgraded.
    pub fn open(path: &Path) -> Result<Self> {
        let connection = container::open_scratch(WHAT, path, None)?;
        schema::upgrade(&connection)?;
        let catalog = Catalog::from_connection(connection, Access::Write)?;
        Ok(Self { catalog, delta: Counters::default(), last_group: None })
    }

    /// The catalog as it stands, for look-ups. Properties are those at the time of opening; counters lack the
    /// changes made here, see [`CatalogWriter::counters`].
    pub fn reader(&self) -> &Catalog {
        &self.catalog
    }

    /// Adds a row; a row at the same path is an error. `rowid` is ignored.
    pub fn insert(&mut self, entry: &Entry) -> Result<()> {
        entry.check_storable()?;
        let sql = "INSERT INTO catalog (parent_1, parent_2, hardlinks, hash, size, mode, mtime, mtimens, flags, name, \
                   symlink, uid, gid, xattr, md5path_1, md5path_2) \
                   VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16)";
        match self.execute_row(sql, entry) {
            Ok(_) => {}
            Err(rusqlite::Error::SqliteFailure(error, _)) if error.code == ErrorCode::ConstraintViolation => {
                return Err(CatalogError::Exists { name: shown(&entry.name) });
            }
            Err(error) => return Err(writing(error)),
        }
        self.delta.own += Counts::of(entry);
        Ok(())
    }

    /// Changes the row at the entry's path in place, or adds it. `rowid` is ignored. Chunk rows stay if the entry is
    /// chunked in the same algorithm.
    pub fn replace(&mut self, entry: &Entry) -> Result<()> {
        let Some(old) = self.catalog.lookup(entry.path_hash)? else {
            return self.insert(entry);
        };
        entry.check_storable()?;
        if old.is_chunked() && !(entry.is_chunked() && entry.algorithm() == old.algorithm()) {
            self.remove_chunks(old.path_hash)?;
        }
        let sql = "UPDATE catalog SET parent_1 = ?1, parent_2 = ?2, hardlinks = ?3, hash = ?4, size = ?5, mode = ?6, \
                   mtime = ?7, mtimens = ?8, flags = ?9, name = ?10, symlink = ?11, uid = ?12, gid = ?13, xattr = ?14 \
                   WHERE md5path_1 = ?15 AND md5path_2 = ?16";
        self.execute_row(sql, entry).map_err(writing)?;
        self.delta.own -= Counts::of(&old);
        self.delta.own += Counts::of(entry);
        Ok(())
    }

    /// Removes a row with its chunks and returns it; none if there is no such row. Other members of its hard link
    /// group keep their count, see [`CatalogWriter::change_link_count`].
    pub fn remove(&mut self, path: PathHash) -> Result<Option<Entry>> {
        let Some(old) = self.catalog.lookup(path)? else {
            return Ok(None);
        };
        self.remove_chunks(path)?;
        self.execute(
            "DELETE FROM catalog WHERE md5path_1 = ?1 AND md5path_2 = ?2",
            (path.part1, path.part2),
        )?;
        self.delta.own -= Counts::of(&old);
        Ok(Some(old))
    }

    /// Sets the chunks of a file, which must be contiguous from 0.
    pub fn set_chunks(&mut self, path: PathHash, chunks: &[Chunk]) -> Result<()> {
        let mut end = 0;
        for chunk in chunks {
            if chunk.offset != end || chunk.size == 0 || i64::try_from(chunk.offset + chunk.size).is_err() {
                let reason = format!("{} bytes at {}, expected a chunk at {end}", chunk.size, chunk.offset);
                return Err(CatalogError::Chunks { path_hash: path, reason });
            }
            end = chunk.offset + chunk.size;
        }
        self.remove_chunks(path)?;
        for chunk in chunks {
            self.execute(
                "INSERT INTO chunks (md5path_1, md5path_2, offset, size, hash) VALUES (?1, ?2, ?3, ?4, ?5)",
                params![
                    path.part1,
                    path.part2,
                    chunk.offset as i64,
                    chunk.size as i64,
                    chunk.hash.digest.as_slice()
                ],
            )?;
        }
        self.delta.own.chunks += chunks.len() as i64;
        Ok(())
    }

    /// Adds `change` to the link counts of all members of the hard link group of `member`, or of that row alone if
    /// it is in no group (directories).
    pub fn change_link_count(&mut self, member: PathHash, change: i32) -> Result<()> {
        let entry = self
            .catalog
            .lookup(member)?
            .ok_or(CatalogError::Missing { what: "entry with path hash", name: format!("{member:?}") })?;
        let count =
            entry.link_count.checked_add_signed(change).filter(|count| *count > 0).ok_or_else(|| {
                let reason = format!("link count {} cannot change by {change}", entry.link_count);
                CatalogError::Unstorable { name: shown(&entry.name), reason }
            })?;
        let (old, new) = (entry.hardlinks(), Entry { link_count: count, ..entry.clone() }.hardlinks());
        if entry.link_group == 0 {
            self.execute(
                "UPDATE catalog SET hardlinks = ?1 WHERE md5path_1 = ?2 AND md5path_2 = ?3",
                (new, member.part1, member.part2),
            )?;
        } else {
            self.execute("UPDATE catalog SET hardlinks = ?1 WHERE hardlinks = ?2", (new, old))?;
        }
        Ok(())
    }

    /// A hard link group not yet used in this catalog.
    pub fn new_link_group(&mut self) -> Result<u32> {
        let last = match self.last_group {
            Some(last) => last,
            None => self.catalog.max_link_group()?,
        };
        let next = last.checked_add(1).ok_or_else(|| CatalogError::Unstorable {
            name: "hard link".to_owned(),
            reason: "all hard link groups are in use".to_owned(),
        })?;
        self.last_group = Some(next);
        Ok(next)
    }

    /// Adds the reference to a nested catalog; its mountpoint needs a row with
    /// [`EntryFlags::NESTED_MOUNTPOINT`](super::EntryFlags::NESTED_MOUNTPOINT) as well.
    pub fn add_nested(&mut self, path: &[u8], hash: ContentHash, size: u64) -> Result<()> {
        self.add_reference("nested_catalogs", path, hash, size)?;
        self.delta.own.nested += 1;
        Ok(())
    }

    /// Points the reference to a nested catalog to its new state.
    pub fn update_nested(&mut self, path: &[u8], hash: ContentHash, size: u64) -> Result<()> {
        let changed = self.execute(
            "UPDATE nested_catalogs SET sha1 = ?2, size = ?3 WHERE path = ?1",
            params![Text(path), hash.to_string(), stored_size(path, size)?],
        )?;
        self.require(changed, "nested catalog", path)
    }

    /// Removes the reference to a nested catalog. Its counters are still in this catalog's sub-tree, see
    /// [`CatalogWriter::add_subtree`].
    pub fn remove_nested(&mut self, path: &[u8]) -> Result<()> {
        let changed = self.execute("DELETE FROM nested_catalogs WHERE path = ?1", [Text(path)])?;
        self.require(changed, "nested catalog", path)?;
        self.delta.own.nested -= 1;
        Ok(())
    }

    /// Adds a bind mountpoint.
    pub fn add_bind_mountpoint(&mut self, path: &[u8], hash: ContentHash, size: u64) -> Result<()> {
        self.add_reference("bind_mountpoints", path, hash, size)
    }

    /// Removes a bind mountpoint.
    pub fn remove_bind_mountpoint(&mut self, path: &[u8]) -> Result<()> {
        let changed = self.execute("DELETE FROM bind_mountpoints WHERE path = ?1", [Text(path)])?;
        self.require(changed, "bind mountpoint", path)
    }

    /// Adds what changed in the catalogs below to the sub-tree counters: for a changed child
    /// `child.delta().total()`, for an added child `child.counters().total()`, for a removed one its negative.
    pub fn add_subtree(&mut self, change: Counts) {
        self.delta.subtree += change;
    }

    /// What changed since the catalog was opened.
    pub fn delta(&self) -> &Counters {
        &self.delta
    }

    /// The counters with all changes.
    pub fn counters(&self) -> Result<Counters> {
        let mut counters = self.catalog.counters()?;
        counters += self.delta;
        Ok(counters)
    }

    /// Sets a property that is not set by [`CatalogWriter::finish`]: `volatile`, `voms_authz`.
    pub fn set_property(&mut self, key: &str, value: &[u8]) -> Result<()> {
        Ok(set_property(&self.catalog.connection, key, value)?)
    }

    /// Writes counters and properties and commits: the file is complete and ready to be compressed and hashed.
    ///
    /// `previous` is the catalog's predecessor, none for the first; `ttl` (seconds) is given for root catalogs; `now`
    /// is the Unix time.
    pub fn finish(
        self,
        revision: u64,
        previous: Option<ContentHash>,
        ttl: Option<u32>,
        now: u64,
    ) -> Result<()> {
        let connection = &self.catalog.connection;
        if let Some(ttl) = ttl {
            set_property(connection, "TTL", ttl.to_string().as_bytes())?;
        }
        set_property(connection, "last_modified", now.to_string().as_bytes())?;
        set_property(connection, "revision", revision.to_string().as_bytes())?;
        if let Some(previous) = previous {
            set_property(connection, "previous_revision", previous.to_string().as_bytes())?;
        }
        self.write_counters()?;
        let compact = self.renumber_wasteful_rows()? || is_wasteful(connection)?;
        Ok(container::commit(self.catalog.connection, compact)?)
    }

    fn write_counters(&self) -> Result<()> {
        for (prefix, counts) in [("self", &self.delta.own), ("subtree", &self.delta.subtree)] {
            for (name, value) in counts.iter().filter(|(_, value)| *value != 0) {
                self.execute(
                    "INSERT INTO statistics (counter, value) VALUES (?1, ?2) \
                     ON CONFLICT (counter) DO UPDATE SET value = value + excluded.value",
                    (format!("{prefix}_{name}"), value),
                )?;
            }
        }
        Ok(())
    }

    /// Gives all rows new rowids in their order if many are unused; tells whether it did.
    fn renumber_wasteful_rows(&self) -> Result<bool> {
        let connection = &self.catalog.connection;
        let (rows, max): (i64, i64) = connection
            .query_row("SELECT COUNT(*), COALESCE(MAX(rowid), 0) FROM catalog", [], |row| {
                Ok((row.get(0)?, row.get(1)?))
            })
            .doing(WRITING)?;
        if (max - rows) as f64 <= max as f64 * MAX_ROWID_WASTE {
            return Ok(false);
        }
        connection
            .execute_batch(
                "CREATE TEMPORARY TABLE renumbered AS SELECT * FROM main.catalog ORDER BY rowid;
                 DELETE FROM main.catalog;
                 INSERT INTO main.catalog SELECT * FROM temp.renumbered ORDER BY rowid;
                 DROP TABLE temp.renumbered;",
            )
            .doing(WRITING)?;
        Ok(true)
    }

    fn execute_row(&self, sql: &str, entry: &Entry) -> rusqlite::Result<usize> {
        self.catalog.connection.prepare_cached(sql)?.execute(params![
            entry.parent.part1,
            entry.parent.part2,
            entry.hardlinks(),
            entry.hash.as_ref().map(|hash| hash.digest.as_slice()),
            entry.size as i64,
            entry.mode,
            entry.mtime,
            entry.mtime_ns,
            entry.flags.0,
            Text(&entry.name),
            Text(&entry.symlink),
            entry.uid,
            entry.gid,
            entry.xattrs.as_deref(),
            entry.path_hash.part1,
            entry.path_hash.part2,
        ])
    }

    fn remove_chunks(&mut self, path: PathHash) -> Result<()> {
        let removed = self.execute(
            "DELETE FROM chunks WHERE md5path_1 = ?1 AND md5path_2 = ?2",
            (path.part1, path.part2),
        )?;
        self.delta.own.chunks -= removed as i64;
        Ok(())
    }

    fn add_reference(&self, table: &str, path: &[u8], hash: ContentHash, size: u64) -> Result<()> {
        check_path(path)?;
        let sql = format!("INSERT INTO {table} (path, sha1, size) VALUES (?1, ?2, ?3)");
        let size = stored_size(path, size)?;
        match self
            .catalog
            .connection
            .prepare_cached(&sql)
            .and_then(|mut statement| statement.execute(params![Text(path), hash.to_string(), size]))
        {
            Ok(_) => Ok(()),
            Err(rusqlite::Error::SqliteFailure(error, _)) if error.code == ErrorCode::ConstraintViolation => {
                Err(CatalogError::Exists { name: shown(path) })
            }
            Err(error) => Err(writing(error)),
        }
    }

    fn execute(&self, sql: &str, parameters: impl rusqlite::Params) -> Result<usize> {
        self.catalog
            .connection
            .prepare_cached(sql)
            .and_then(|mut statement| statement.execute(parameters))
            .map_err(writing)
    }

    fn require(&self, changed: usize, what: &'static str, path: &[u8]) -> Result<()> {
        if changed > 0 { Ok(()) } else { Err(CatalogError::Missing { what, name: shown(path) }) }
    }
}

impl fmt::Debug for CatalogWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CatalogWriter").field("catalog", &self.catalog).field("delta", &self.delta).finish()
    }
}

fn writing(source: rusqlite::Error) -> CatalogError {
    ContainerError::Sqlite { doing: WRITING, source }.into()
}

fn stored_size(path: &[u8], size: u64) -> Result<i64> {
    i64::try_from(size).map_err(|_| CatalogError::Unstorable {
        name: shown(path),
        reason: "the size exceeds 63 bits".to_owned(),
    })
}

/// A path that a directory can have: absolute, no empty, `.` or `..` components.
fn check_path(path: &[u8]) -> Result<()> {
    let is_good = path.len() <= MAX_PATH
        && path
            .strip_prefix(b"/")
            .is_some_and(|path| path.split(|byte| *byte == b'/').all(super::is_valid_name));
    if is_good {
        return Ok(());
    }
    let reason = format!("not an absolute path of components of 1 to {MAX_NAME} bytes");
    Err(CatalogError::Unstorable { name: shown(path), reason })
}
