//! The catalogs that a transaction changes: private copies, opened as they are needed.
//!
//! Every change keeps the two rows of a nested catalog's root in step, and the counters. A catalog's
//! own counters follow its rows by themselves; they reach its parent when it is committed (repository
//! format §11). So a parent's sub-tree counters describe its children as they were *before* this
//! transaction, and [`Working::before`] remembers that state.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;

use cvmfs_format::catalog::{CatalogError, CatalogWriter, Chunk, Counts, Entry, EntryFlags};
use cvmfs_format::{ContentHash, ObjectKind, ObjectName, PathHash};

use crate::error::{PublishError, shown};
use crate::head::unpack_database;
use crate::path::{is_below, prefixes};
use crate::storage::{Scratch, Storage};

/// Marks a directory as the root of a nested catalog (format §19).
pub(crate) const MARKER: &[u8] = b".cvmfscatalog";

/// Number of an open catalog in its workspace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Index(usize);

/// The repository's root catalog, always open.
pub(crate) const ROOT: Index = Index(0);

#[derive(Debug)]
pub(crate) struct Workspace {
    storage: Arc<dyn Storage>,
    catalogs: Vec<Option<Working>>,
    /// Dropped after the catalogs in it.
    scratch: Scratch,
}

/// A catalog open for changes.
#[derive(Debug)]
struct Working {
    mountpoint: Vec<u8>,
    file: PathBuf,
    writer: CatalogWriter,
    parent: Option<Index>,
    /// The published catalog this is a copy of.
    base: Option<ContentHash>,
    /// What the parent's sub-tree counters contain of this catalog and those below it.
    before: Counts,
    /// Mountpoints of nested catalogs, with their number once they are open.
    nested: BTreeMap<Vec<u8>, Option<Index>>,
    changed: bool,
}

/// What is known of a catalog beside its writer.
#[derive(Debug)]
pub(crate) struct Finished {
    /// Its mountpoint.
    pub(crate) path: Vec<u8>,
    pub(crate) file: PathBuf,
    /// The published catalog it replaces.
    pub(crate) base: Option<ContentHash>,
    parent: Option<Index>,
    before: Counts,
}

/// Which catalog of a nested catalog's mountpoint is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    /// The one above, which has the row that look-ups find.
    Row,
    /// The one below, which has the content of the directory.
    Content,
}

impl Workspace {
    /// Opens a copy of the root catalog `root` in a new scratch directory of the storage.
    pub(crate) fn open(storage: Arc<dyn Storage>, root: ContentHash) -> Result<Workspace, PublishError> {
        let scratch = storage.scratch()?;
        let mut workspace = Workspace { storage, scratch, catalogs: Vec::new() };
        workspace.open_catalog(Vec::new(), root, None)?;
        Ok(workspace)
    }

    /// The entry at `path`, as look-ups find it.
    pub(crate) fn lookup(&mut self, path: &[u8]) -> Result<Option<Entry>, PublishError> {
        let at = self.locate(path, Side::Row)?;
        self.row(at, path)
    }

    /// The row of `path` in one catalog.
    pub(crate) fn row(&self, at: Index, path: &[u8]) -> Result<Option<Entry>, PublishError> {
        self.get(at).writer.reader().lookup(PathHash::of(path)).map_err(in_catalog(path))
    }

    /// The catalog with the row of `path`.
    pub(crate) fn row_catalog(&mut self, path: &[u8]) -> Result<Index, PublishError> {
        self.locate(path, Side::Row)
    }

    /// The catalog with the content of the directory `path`.
    pub(crate) fn content_catalog(&mut self, path: &[u8]) -> Result<Index, PublishError> {
        self.locate(path, Side::Content)
    }

    /// The rows of a directory whose content is in `at`.
    pub(crate) fn list(&self, at: Index, path: &[u8]) -> Result<Vec<Entry>, PublishError> {
        self.get(at).writer.reader().list_all(PathHash::of(path)).map_err(in_catalog(path))
    }

    /// Hands all rows of a catalog to `visit`.
    pub(crate) fn for_each(&self, at: Index, mut visit: impl FnMut(Entry)) -> Result<(), PublishError> {
        let each = |entry: Result<Entry, CatalogError>| {
            visit(entry?);
            Ok(())
        };
        self.get(at).writer.reader().for_each(each).map_err(in_catalog(self.mountpoint(at)))
    }

    /// Where a catalog is mounted; empty for the root.
    pub(crate) fn mountpoint(&self, at: Index) -> &[u8] {
        &self.get(at).mountpoint
    }

    /// How many rows a catalog has.
    pub(crate) fn own_entries(&self, at: Index) -> Result<u64, PublishError> {
        let counters = self.get(at).writer.counters().map_err(in_catalog(self.mountpoint(at)))?;
        Ok(u64::try_from(counters.own.entries()).unwrap_or(0))
    }

    /// Whether the catalog `at`, or one mounted at or below `path`, was changed.
    pub(crate) fn has_changes(&self, at: Index, path: &[u8]) -> bool {
        let below = |c: &Working| c.changed && (c.mountpoint == path || is_below(&c.mountpoint, path));
        self.get(at).changed || self.catalogs.iter().flatten().any(below)
    }

    /// Adds a row that must not exist.
    pub(crate) fn insert(
        &mut self,
        at: Index,
        path: &[u8],
        entry: &Entry,
        chunks: &[Chunk],
    ) -> Result<(), PublishError> {
        let catalog = self.change(at);
        catalog.writer.insert(entry).map_err(in_catalog(path))?;
        if !chunks.is_empty() {
            catalog.writer.set_chunks(entry.path_hash, chunks).map_err(in_catalog(path))?;
        }
        Ok(())
    }

    /// Changes the row of a directory, also at a nested catalog's root.
    pub(crate) fn update_directory(
        &mut self,
        at: Index,
        path: &[u8],
        change: impl Fn(&mut Entry),
    ) -> Result<(), PublishError> {
        self.update_row(at, path, &change)?;
        let below = self.content_catalog(path)?;
        if below != at {
            self.update_row(below, path, &change)?;
        }
        Ok(())
    }

    /// Removes a file, link or special file. Other members of its hard link group lose a link.
    pub(crate) fn remove_leaf(&mut self, at: Index, path: &[u8], entry: &Entry) -> Result<(), PublishError> {
        self.remove_row(at, path, entry)?;
        if entry.link_group == 0 {
            return Ok(());
        }
        let siblings = self.get(at).writer.reader().list_all(entry.parent).map_err(in_catalog(path))?;
        for mut sibling in siblings.into_iter().filter(|s| s.link_group == entry.link_group) {
            sibling.link_count = sibling.link_count.saturating_sub(1).max(1);
            if sibling.link_count == 1 {
                sibling.link_group = 0;
            }
            self.change(at).writer.replace(&sibling).map_err(in_catalog(path))?;
        }
        Ok(())
    }

    /// Removes a directory with everything below it. The parent's link count is the caller's matter.
    pub(crate) fn remove_tree(&mut self, at: Index, path: &[u8], entry: &Entry) -> Result<(), PublishError> {
        if entry.is_bind_mountpoint() {
            return Err(PublishError::entry(path, "is a bind mountpoint, which cannot be removed here"));
        }
        if entry.is_nested_mountpoint() {
            let below = self.content_catalog(path)?;
            let gone = self.get(below).before;
            let is_published = self.get(below).base.is_some();
            self.change(at).writer.add_subtree(-gone);
            self.forget_nested(at, path, is_published)?;
            self.close_all_below(path);
            return self.remove_row(at, path, entry);
        }
        for child in self.get(at).writer.reader().list_all(entry.path_hash).map_err(in_catalog(path))? {
            let below = joined(path, &child.name);
            if child.is_directory() {
                self.remove_tree(at, &below, &child)?;
            } else {
                self.remove_row(at, &below, &child)?;
            }
        }
        self.remove_row(at, path, entry)
    }

    /// A number for a new hard link group.
    pub(crate) fn new_link_group(&mut self, at: Index, path: &[u8]) -> Result<u32, PublishError> {
        self.change(at).writer.new_link_group().map_err(in_catalog(path))
    }

    /// Makes the directory `path`, whose row is in `at`, the root of a nested catalog; returns that.
    /// Its content moves there (publisher behaviour §6). Does nothing if it is one already.
    pub(crate) fn split(&mut self, at: Index, path: &[u8]) -> Result<Index, PublishError> {
        let mut entry = self.row(at, path)?.ok_or_else(|| {
            PublishError::damaged(shown(path), "has no row where a nested catalog is to begin")
        })?;
        if entry.is_nested_mountpoint() {
            return self.content_catalog(path);
        }
        if path.is_empty() || entry.is_nested_root() {
            return Err(PublishError::entry(
                path,
                "the root of the repository cannot become a nested catalog",
            ));
        }
        let below = self.create_catalog(path, at)?;
        let mut root = entry.clone();
        root.flags = root.flags.with(EntryFlags::NESTED_ROOT);
        self.insert(below, path, &root, &[])?;
        self.move_nested_references(at, below, path)?;
        self.move_content(at, below, path)?;

        entry.flags = entry.flags.with(EntryFlags::NESTED_MOUNTPOINT);
        let above = self.change(at);
        above.writer.replace(&entry).map_err(in_catalog(path))?;
        above.nested.insert(path.to_vec(), Some(below));
        Ok(below)
    }

    /// Returns the content of the nested catalog at `path` to the catalog above.
    pub(crate) fn merge(&mut self, path: &[u8]) -> Result<(), PublishError> {
        let below = self.content_catalog(path)?;
        let Some(at) = self.get(below).parent else { return Ok(()) };
        let mut rows = Vec::new();
        let visit = |entry: Result<Entry, CatalogError>| {
            rows.push(entry?);
            Ok(())
        };
        self.get(below).writer.reader().for_each(visit).map_err(in_catalog(path))?;
        let mut groups = HashMap::new();
        for mut entry in rows.into_iter().filter(|entry| !entry.is_nested_root()) {
            let chunks = self.chunks_of(below, &entry, path)?;
            if entry.link_group != 0 {
                entry.link_group = match groups.get(&entry.link_group) {
                    Some(group) => *group,
                    None => {
                        let group = self.new_link_group(at, path)?;
                        groups.insert(entry.link_group, group);
                        group
                    }
                };
            }
            self.insert(at, path, &entry, &chunks)?;
        }
        let gone = self.catalogs[below.0].take().expect("located above");
        self.forget_nested(at, path, gone.base.is_some())?;
        let further_below = gone.writer.counters().map_err(in_catalog(path))?.subtree;
        let above = self.change(at);
        above.writer.add_subtree(-gone.before);
        above.writer.add_subtree(further_below);
        for reference in gone.writer.reader().nested().map_err(in_catalog(path))? {
            above
                .writer
                .add_nested(&reference.path, reference.hash, reference.size)
                .map_err(in_catalog(path))?;
        }
        above.nested.extend(gone.nested.clone());
        for index in gone.nested.into_values().flatten() {
            self.get_mut(index).parent = Some(at);
        }
        self.update_row(at, path, &|entry: &mut Entry| {
            entry.flags = entry.flags.without(EntryFlags::NESTED_MOUNTPOINT);
        })
    }

    /// The chunks of a file.
    pub(crate) fn chunks_of(
        &self,
        at: Index,
        entry: &Entry,
        path: &[u8],
    ) -> Result<Vec<Chunk>, PublishError> {
        if !entry.is_chunked() {
            return Ok(Vec::new());
        }
        self.get(at).writer.reader().chunks(entry.path_hash, entry.algorithm()).map_err(in_catalog(path))
    }

    /// Open catalogs with changes in them or below them, deepest first. The root is always among them.
    pub(crate) fn changed_bottom_up(&mut self) -> Vec<Index> {
        self.get_mut(ROOT).changed = true;
        let mut order: Vec<Index> =
            (0..self.catalogs.len()).filter(|&i| self.catalogs[i].is_some()).map(Index).collect();
        order.sort_by_key(|&index| std::cmp::Reverse(self.get(index).mountpoint.len()));
        for &index in &order {
            if self.get(index).changed
                && let Some(parent) = self.get(index).parent
            {
                self.get_mut(parent).changed = true;
            }
        }
        order.retain(|&index| self.get(index).changed);
        order
    }

    /// Takes a catalog out to be finished.
    pub(crate) fn take(&mut self, index: Index) -> (CatalogWriter, Finished) {
        let working = self.catalogs[index.0].take().expect("each catalog is committed once");
        let Working { mountpoint, file, writer, parent, base, before, .. } = working;
        (writer, Finished { path: mountpoint, file, parent, base, before })
    }

    /// Notes in the parent what became of a committed nested catalog.
    pub(crate) fn committed(
        &mut self,
        child: &Finished,
        totals: Counts,
        hash: ContentHash,
        size: u64,
    ) -> Result<(), PublishError> {
        let Some(parent) = child.parent else { return Ok(()) };
        let path = &child.path;
        let above = self.change(parent);
        above.writer.add_subtree(totals);
        above.writer.add_subtree(-child.before);
        match child.base {
            Some(_) => above.writer.update_nested(path, hash, size),
            None => above.writer.add_nested(path, hash, size),
        }
        .map_err(in_catalog(path))
    }

    fn locate(&mut self, path: &[u8], side: Side) -> Result<Index, PublishError> {
        let mut at = ROOT;
        for prefix in prefixes(path) {
            if prefix.len() == path.len() && side == Side::Row {
                break;
            }
            match self.get(at).nested.get(prefix) {
                Some(Some(open)) => at = *open,
                Some(None) => {
                    let missing =
                        || PublishError::damaged(shown(prefix), "its nested catalog vanished meanwhile");
                    let reference = self
                        .get(at)
                        .writer
                        .reader()
                        .nested_at(prefix)
                        .map_err(in_catalog(prefix))?
                        .ok_or_else(missing)?;
                    at = self.open_catalog(prefix.to_vec(), reference.hash, Some(at))?;
                }
                None => {}
            }
        }
        Ok(at)
    }

    fn open_catalog(
        &mut self,
        mountpoint: Vec<u8>,
        hash: ContentHash,
        parent: Option<Index>,
    ) -> Result<Index, PublishError> {
        let file = self.next_file();
        unpack_database(&*self.storage, ObjectName::new(hash, ObjectKind::Catalog), &file)?;
        let writer = CatalogWriter::open(&file).map_err(in_catalog(&mountpoint))?;
        if writer.reader().root_prefix() != mountpoint {
            let reason = format!("its root prefix is {}", shown(writer.reader().root_prefix()));
            return Err(PublishError::damaged(format!("catalog {hash} at {}", shown(&mountpoint)), reason));
        }
        let before = writer.counters().map_err(in_catalog(&mountpoint))?.total();
        let nested = writer.reader().nested().map_err(in_catalog(&mountpoint))?;
        Ok(self.keep(Working {
            nested: nested.into_iter().map(|reference| (reference.path, None)).collect(),
            mountpoint,
            file,
            writer,
            parent,
            base: Some(hash),
            before,
            changed: false,
        }))
    }

    fn create_catalog(&mut self, mountpoint: &[u8], parent: Index) -> Result<Index, PublishError> {
        let file = self.next_file();
        let writer = CatalogWriter::create(&file, mountpoint).map_err(in_catalog(mountpoint))?;
        Ok(self.keep(Working {
            mountpoint: mountpoint.to_vec(),
            file,
            writer,
            parent: Some(parent),
            base: None,
            before: Counts::default(),
            nested: BTreeMap::new(),
            changed: true,
        }))
    }

    fn keep(&mut self, working: Working) -> Index {
        let index = Index(self.catalogs.len());
        if let Some(parent) = working.parent {
            self.get_mut(parent).nested.insert(working.mountpoint.clone(), Some(index));
        }
        self.catalogs.push(Some(working));
        index
    }

    fn next_file(&self) -> PathBuf {
        self.scratch.file(&format!("catalog.{}", self.catalogs.len()))
    }

    fn remove_row(&mut self, at: Index, path: &[u8], entry: &Entry) -> Result<(), PublishError> {
        self.change(at).writer.remove(entry.path_hash).map_err(in_catalog(path))?;
        Ok(())
    }

    fn update_row(
        &mut self,
        at: Index,
        path: &[u8],
        change: &dyn Fn(&mut Entry),
    ) -> Result<(), PublishError> {
        let missing = || PublishError::damaged(shown(path), "has no row in its catalog");
        let before = self.row(at, path)?.ok_or_else(missing)?;
        let mut entry = before.clone();
        change(&mut entry);
        if entry == before {
            return Ok(());
        }
        self.change(at).writer.replace(&entry).map_err(in_catalog(path))
    }

    fn move_nested_references(&mut self, from: Index, to: Index, path: &[u8]) -> Result<(), PublishError> {
        let moving: Vec<Vec<u8>> =
            self.get(from).nested.keys().filter(|m| is_below(m, path)).cloned().collect();
        for mountpoint in moving {
            // opened for its counters: the catalogs above it account for them differently from now on
            let index = self.locate_open(from, &mountpoint)?;
            let totals = self.get(index).before;
            self.change(from).writer.add_subtree(-totals);
            let reference =
                self.get(from).writer.reader().nested_at(&mountpoint).map_err(in_catalog(&mountpoint))?;
            self.forget_nested(from, &mountpoint, reference.is_some())?;
            if let Some(reference) = reference {
                self.change(to)
                    .writer
                    .add_nested(&mountpoint, reference.hash, reference.size)
                    .map_err(in_catalog(&mountpoint))?;
            }
            let target = self.change(to);
            target.nested.insert(mountpoint, Some(index));
            target.writer.add_subtree(totals);
            self.get_mut(index).parent = Some(to);
        }
        Ok(())
    }

    /// Takes a nested catalog out of the books of `at`; its sub-tree counters are the caller's matter.
    fn forget_nested(&mut self, at: Index, path: &[u8], is_published: bool) -> Result<(), PublishError> {
        let catalog = self.change(at);
        catalog.nested.remove(path);
        if is_published {
            // one made in this transaction is entered when it is committed
            catalog.writer.remove_nested(path).map_err(in_catalog(path))?;
        }
        Ok(())
    }

    fn locate_open(&mut self, at: Index, mountpoint: &[u8]) -> Result<Index, PublishError> {
        if let Some(Some(open)) = self.get(at).nested.get(mountpoint) {
            return Ok(*open);
        }
        let missing = || PublishError::damaged(shown(mountpoint), "its nested catalog vanished meanwhile");
        let reference = self.get(at).writer.reader().nested_at(mountpoint).map_err(in_catalog(mountpoint))?;
        self.open_catalog(mountpoint.to_vec(), reference.ok_or_else(missing)?.hash, Some(at))
    }

    fn move_content(&mut self, from: Index, to: Index, path: &[u8]) -> Result<(), PublishError> {
        for entry in self.get(from).writer.reader().list_all(PathHash::of(path)).map_err(in_catalog(path))? {
            let below = joined(path, &entry.name);
            let chunks = self.chunks_of(from, &entry, &below)?;
            self.insert(to, &below, &entry, &chunks)?;
            if entry.is_directory() && !entry.is_nested_mountpoint() {
                self.move_content(from, to, &below)?;
            }
            self.remove_row(from, &below, &entry)?;
        }
        Ok(())
    }

    fn close_all_below(&mut self, path: &[u8]) {
        for slot in &mut self.catalogs {
            let gone = slot.as_ref().is_some_and(|c| c.mountpoint == path || is_below(&c.mountpoint, path));
            if gone {
                *slot = None;
            }
        }
    }

    fn get(&self, index: Index) -> &Working {
        self.catalogs[index.0].as_ref().expect("indexes of closed catalogs are forgotten with them")
    }

    fn get_mut(&mut self, index: Index) -> &mut Working {
        self.catalogs[index.0].as_mut().expect("indexes of closed catalogs are forgotten with them")
    }

    fn change(&mut self, index: Index) -> &mut Working {
        let catalog = self.get_mut(index);
        catalog.changed = true;
        catalog
    }
}

/// `directory` + `/` + `name`.
pub(crate) fn joined(directory: &[u8], name: &[u8]) -> Vec<u8> {
    let mut path = Vec::with_capacity(directory.len() + 1 + name.len());
    path.extend_from_slice(directory);
    path.push(b'/');
    path.extend_from_slice(name);
    path
}

pub(crate) fn in_catalog(path: &[u8]) -> impl FnOnce(CatalogError) -> PublishError {
    let path = if path.is_empty() { "/".to_owned() } else { shown(path) };
    move |error| PublishError::damaged(format!("catalog entry {path}"), chain(&error))
}

pub(crate) use crate::error::chain;
