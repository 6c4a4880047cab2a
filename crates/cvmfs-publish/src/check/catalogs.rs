//! Catalogs: every row, and how catalogs hang together.

use std::collections::HashMap;
use std::fs;

use cvmfs_format::catalog::{
    Catalog, CatalogError, Counters, Counts, Entry, EntryFlags, EntryKind, NestedCatalog,
};
use cvmfs_format::history::Tag;
use cvmfs_format::xattr::Xattrs;
use cvmfs_format::{ContentHash, ObjectKind, ObjectName, PathHash};
use std::sync::atomic::Ordering;

use super::partial::{nested_hash, same_content};
use super::{Check, ProblemKind, Use};
use crate::error::{PublishError, shown};
use crate::head::{Head, unpack_database};
use crate::tree::MAX_DEPTH;
use crate::workspace::{MARKER, chain, joined};

/// What is remembered of an examined catalog.
#[derive(Debug, Clone)]
pub(super) struct Tree {
    /// Counted anew: its own rows and all below.
    pub(super) totals: Counts,
    /// Whether all catalogs below could be read.
    pub(super) complete: bool,
    /// Plain bytes; 0 if unknown.
    pub(super) size: u64,
    pub(super) root: Option<Entry>,
    pub(super) revision: u64,
}

impl Check<'_> {
    /// Checks the current revision.
    pub(super) fn revision(&mut self, head: &Head) -> Result<(), PublishError> {
        let manifest = &head.manifest;
        let Some(tree) =
            self.catalog(manifest.root_catalog, manifest.root_catalog_size, b"", None, self.options.since)?
        else {
            return Ok(());
        };
        let name = ObjectName::new(manifest.root_catalog, ObjectKind::Catalog);
        if tree.revision != manifest.revision {
            let message = format!("says revision {}, the manifest {}", tree.revision, manifest.revision);
            self.findings.add(ProblemKind::Catalog, b"", Some(&name), message);
        }
        Ok(())
    }

    /// Checks a tagged revision.
    pub(super) fn tagged(&mut self, tag: &Tag) -> Result<(), PublishError> {
        if let Some(tree) = self.catalog(tag.root_catalog, tag.root_catalog_size, b"", None, None)?
            && tree.revision != tag.revision
        {
            let name = ObjectName::new(tag.root_catalog, ObjectKind::Catalog);
            let message = format!("says revision {}, the tag {} {}", tree.revision, tag.name, tag.revision);
            self.findings.add(ProblemKind::History, b"", Some(&name), message);
        }
        Ok(())
    }

    /// Checks of a tagged revision what the current one has not.
    pub(super) fn since(&mut self, tag: &Tag) -> Result<(), PublishError> {
        let old = self.options.since;
        self.catalog(tag.root_catalog, tag.root_catalog_size, b"", None, old)?;
        Ok(())
    }

    /// Examines the catalog `hash` mounted at `mountpoint`, whose row in the catalog above is `above`; nothing if
    /// it cannot be read, which is reported.
    ///
    /// `old` is the catalog that the older revision has there, if only changes are to be checked.
    pub(super) fn catalog(
        &mut self,
        hash: ContentHash,
        expected_size: u64,
        mountpoint: &[u8],
        above: Option<&Entry>,
        old: Option<ContentHash>,
    ) -> Result<Option<Tree>, PublishError> {
        let name = ObjectName::new(hash, ObjectKind::Catalog);
        let key = (name, mountpoint.to_vec());
        let known = match self.trees.get(&key) {
            Some(known) => known.clone(),
            None => {
                let tree = if old == Some(hash) {
                    self.unchanged(name, mountpoint)
                } else {
                    self.examine(name, mountpoint, old)?
                };
                self.trees.insert(key, tree.clone());
                tree
            }
        };
        let Some(tree) = known else { return Ok(None) };
        // sizes were not recorded by old publishers
        if expected_size != 0 && tree.size != 0 && expected_size != tree.size {
            let message = format!("has {} plain bytes, its reference says {expected_size}", tree.size);
            self.findings.add(ProblemKind::Catalog, mountpoint, Some(&name), message);
        }
        if let (Some(above), Some(root)) = (above, &tree.root)
            && let Some(difference) = transition_difference(above, root)
        {
            let message = format!("{difference} differs between the directory's rows in both catalogs");
            self.findings.add(ProblemKind::Catalog, mountpoint, Some(&name), message);
        }
        Ok(Some(tree))
    }

    fn examine(
        &mut self,
        name: ObjectName,
        mountpoint: &[u8],
        old: Option<ContentHash>,
    ) -> Result<Option<Tree>, PublishError> {
        let file = self.work_file(&format!("catalog.{}", self.catalogs));
        let size = match unpack_database(&*self.options.storage, name, &file) {
            Ok(size) => size,
            Err(error) => {
                self.report_object(mountpoint, &name, &error);
                return Ok(None);
            }
        };
        self.catalogs += 1;
        let outcome = match Catalog::open(&file) {
            Ok(catalog) => {
                let older = self.older(old);
                self.rows(&catalog, older.as_ref(), name, mountpoint, size)
            }
            Err(error) => {
                self.findings.add(ProblemKind::Corrupt, mountpoint, Some(&name), chain(&error));
                Ok(None)
            }
        };
        let _ = fs::remove_file(&file);
        outcome
    }

    fn rows(
        &mut self,
        catalog: &Catalog,
        older: Option<&Catalog>,
        name: ObjectName,
        mountpoint: &[u8],
        size: u64,
    ) -> Result<Option<Tree>, PublishError> {
        let wrong = |check: &mut Self, path: &[u8], message: String| {
            check.findings.add(ProblemKind::Catalog, path, Some(&name), message);
        };
        if catalog.root_prefix() != mountpoint {
            wrong(self, mountpoint, format!("its root prefix is {:?}", shown(catalog.root_prefix())));
            return Ok(None);
        }
        let root = match catalog.lookup(PathHash::of(mountpoint)) {
            Ok(Some(root)) if root.is_directory() => root,
            Ok(Some(_)) => {
                wrong(self, mountpoint, "the root of the catalog is not a directory".to_owned());
                return Ok(None);
            }
            Ok(None) => {
                wrong(self, mountpoint, "the catalog has no root entry".to_owned());
                return Ok(None);
            }
            Err(error) => {
                wrong(self, mountpoint, chain(&error));
                return Ok(None);
            }
        };
        if root.is_nested_root() == mountpoint.is_empty() {
            wrong(self, mountpoint, "the flag of a nested catalog's root is wrong".to_owned());
        }
        let nested = catalog.nested().unwrap_or_else(|error| {
            wrong(self, mountpoint, chain(&error));
            Vec::new()
        });
        let mut walk = Walk {
            check: self,
            catalog,
            older,
            name,
            nested: nested.into_iter().map(|reference| (reference.path.clone(), (reference, None))).collect(),
            own: Counts::default(),
            reached: 0,
            chunks: 0,
        };
        walk.count(&root);
        walk.directory(mountpoint, &root, 0);
        walk.finish(mountpoint)?;
        let Walk { nested, mut own, .. } = walk;

        let mut totals = Counters::default();
        let mut complete = true;
        for (path, (reference, row)) in nested {
            own.nested += 1;
            match row {
                None => wrong(self, &path, "a nested catalog is registered without its directory".to_owned()),
                Some(row) => {
                    let old = older.and_then(|older| nested_hash(older, &path));
                    match self.catalog(reference.hash, reference.size, &path, Some(&row), old)? {
                        Some(tree) => {
                            totals.subtree += tree.totals;
                            complete &= tree.complete;
                        }
                        None => complete = false,
                    }
                }
            }
        }
        totals.own = own;
        if !complete {
            // a catalog below is lost and reported; that its entries cannot be counted is no further problem
            totals.subtree = catalog.counters().map(|stored| stored.subtree).unwrap_or_default();
        }
        self.counters(catalog, name, mountpoint, &totals);
        Ok(Some(Tree {
            totals: totals.total(),
            complete,
            size,
            root: Some(root),
            revision: catalog.revision(),
        }))
    }

    fn counters(&mut self, catalog: &Catalog, name: ObjectName, mountpoint: &[u8], counted: &Counters) {
        let mut wrong =
            |message: String| self.findings.add(ProblemKind::Catalog, mountpoint, Some(&name), message);
        match (catalog.counters(), catalog.missing_counters()) {
            (Ok(stored), Ok(missing)) => {
                for counter in missing {
                    wrong(format!("counter {counter} is missing: stock clients refuse the catalog"));
                }
                for (family, stored, counted) in
                    [("self", stored.own, counted.own), ("subtree", stored.subtree, counted.subtree)]
                {
                    for ((counter, stored), (_, counted)) in stored.iter().zip(counted.iter()) {
                        if stored != counted {
                            wrong(format!("counter {family}_{counter} is {stored}, counted {counted}"));
                        }
                    }
                }
            }
            (Err(error), _) | (_, Err(error)) => wrong(chain(&error)),
        }
    }
}

/// One pass through a catalog along its directories.
#[derive(Debug)]
pub(super) struct Walk<'c, 'o> {
    pub(super) check: &'c mut Check<'o>,
    pub(super) catalog: &'c Catalog,
    /// The older revision's catalog at this place, if only changes are to be checked.
    pub(super) older: Option<&'c Catalog>,
    pub(super) name: ObjectName,
    /// References to nested catalogs, with the directory's row once it was met.
    pub(super) nested: HashMap<Vec<u8>, (NestedCatalog, Option<Entry>)>,
    pub(super) own: Counts,
    pub(super) reached: u64,
    pub(super) chunks: u64,
}

impl Walk<'_, '_> {
    fn wrong(&mut self, path: &[u8], message: impl ToString) {
        self.check.findings.add(ProblemKind::Catalog, path, Some(&self.name), message);
    }

    pub(super) fn count(&mut self, entry: &Entry) {
        self.reached += 1;
        self.own += Counts::of(entry);
        self.check.options.counters.entries.fetch_add(1, Ordering::Relaxed);
    }

    /// Everything in the directory `path`, and whether `entry` fits it.
    pub(super) fn directory(&mut self, path: &[u8], entry: &Entry, depth: usize) {
        if depth > MAX_DEPTH {
            return self.wrong(path, format!("is more than {MAX_DEPTH} directories deep"));
        }
        let children = match self.catalog.list_all(entry.path_hash) {
            Ok(children) => children,
            Err(error) => return self.wrong(path, chain(&error)),
        };
        let mut subdirectories = 0u32;
        let mut groups: HashMap<u32, Vec<&Entry>> = HashMap::new();
        let mut has_marker = false;
        for child in &children {
            self.count(child);
            let below = joined(path, &child.name);
            if !child.has_valid_name() {
                self.wrong(path, format!("has an entry with the impossible name {:?}", shown(&child.name)));
                continue;
            }
            if child.path_hash != PathHash::of(&below) {
                self.wrong(&below, "its path hash belongs to another path");
            }
            has_marker |= child.name == MARKER;
            self.entry(&below, child);
            if child.is_directory() {
                subdirectories += 1;
                self.subdirectory(&below, child, depth);
            } else if child.link_count > 1 || child.link_group != 0 {
                groups.entry(child.link_group).or_default().push(child);
            }
        }
        if entry.link_count != 2 + subdirectories {
            let message =
                format!("has link count {}, with {subdirectories} sub-directories", entry.link_count);
            self.wrong(path, message);
        }
        if has_marker != entry.is_nested_root() {
            let message = if has_marker {
                "has a .cvmfscatalog and is no nested catalog"
            } else {
                "is a nested catalog without .cvmfscatalog"
            };
            // the virtual catalog of the C++ tools has its marker, too
            self.wrong(path, message);
        }
        for (group, members) in groups {
            self.link_group(path, group, &members);
        }
    }

    fn subdirectory(&mut self, path: &[u8], entry: &Entry, depth: usize) {
        if entry.is_nested_mountpoint() {
            match self.nested.get_mut(path) {
                Some((_, row)) => *row = Some(entry.clone()),
                None => self.wrong(path, "is a nested catalog's mountpoint, but none is registered"),
            }
        } else if self.nested.contains_key(path) {
            self.wrong(path, "a nested catalog is registered, but the directory lacks the flag");
        }
        if entry.is_bind_mountpoint() {
            match self.catalog.bind_mountpoints() {
                Ok(bound) if bound.iter().any(|reference| reference.path == path) => {}
                Ok(_) => self.wrong(path, "is a bind mountpoint, but none is registered"),
                Err(error) => self.wrong(path, chain(&error)),
            }
        }
        if entry.is_nested_mountpoint() || entry.is_bind_mountpoint() {
            match self.catalog.list_all(entry.path_hash) {
                Ok(below) if below.is_empty() => {}
                Ok(below) => {
                    self.wrong(path, format!("has {} entries in the catalog above its own", below.len()));
                }
                Err(error) => self.wrong(path, chain(&error)),
            }
        } else {
            self.directory(path, entry, depth + 1);
        }
    }

    /// Rules for a single row.
    pub(super) fn entry(&mut self, path: &[u8], entry: &Entry) {
        let kind = entry.kind();
        let kind_flags = EntryFlags::DIRECTORY | EntryFlags::FILE | EntryFlags::LINK | EntryFlags::SPECIAL;
        if entry.flags.0 & kind_flags != EntryFlags::of_kind(kind).0 {
            self.wrong(path, format!("its flags {:#x} do not fit its mode {:o}", entry.flags.0, entry.mode));
        }
        if entry.link_count == 0 {
            self.wrong(path, "has link count 0");
        }
        if entry.xattrs.as_deref().is_some_and(|blob| Xattrs::parse(blob).is_err()) {
            self.wrong(path, "its extended attributes are malformed");
        }
        if kind != EntryKind::File {
            if entry.hash.is_some() {
                self.wrong(path, "has a content hash and is no regular file");
            }
            if entry.flags.0 & (EntryFlags::EXTERNAL | EntryFlags::DIRECT_IO | EntryFlags::CHUNKED) != 0 {
                self.wrong(path, "has flags of regular files and is none");
            }
        }
        match kind {
            EntryKind::Directory => {
                if entry.link_group != 0 {
                    self.wrong(path, "is a directory in a hard link group");
                }
                if entry.is_nested_root() {
                    self.wrong(path, "has the flag of a nested catalog's root inside a catalog");
                }
                if entry.is_nested_mountpoint() && entry.is_bind_mountpoint() {
                    self.wrong(path, "is a nested catalog's mountpoint and a bind mountpoint at once");
                }
            }
            EntryKind::File => self.file(path, entry),
            EntryKind::Symlink => {}
            EntryKind::Fifo | EntryKind::Socket => {
                if entry.size != 0 {
                    self.wrong(path, format!("is a fifo or socket of {} bytes", entry.size));
                }
            }
            EntryKind::CharDevice | EntryKind::BlockDevice => {}
        }
    }

    fn file(&mut self, path: &[u8], entry: &Entry) {
        if entry.hash.is_none() && !entry.is_chunked() {
            self.wrong(path, "has neither a content hash nor chunks");
        }
        let mut needed = Vec::new();
        if entry.is_chunked() {
            match self.catalog.chunks_of(entry) {
                Ok(chunks) if chunks.is_empty() => self.wrong(path, "is chunked and has no chunks"),
                Ok(chunks) => {
                    self.chunks += chunks.len() as u64;
                    needed
                        .extend(chunks.iter().map(|c| (ObjectName::new(c.hash, ObjectKind::Chunk), c.size)));
                }
                Err(error) => self.wrong(path, chain(&error)),
            }
        }
        if let Some(hash) = entry.hash {
            needed.push((ObjectName::new(hash, ObjectKind::File), entry.size));
        }
        if entry.is_external() {
            // read from another server; copies that the C++ publisher stored are not litter
            self.check.referenced.extend(needed.into_iter().map(|(name, _)| name));
            return;
        }
        if self.older.is_some_and(|older| same_content(older, self.catalog, entry)) {
            return;
        }
        for (name, plain_size) in needed {
            let this = Use { path: path.to_vec(), plain_size, compression: entry.compression() };
            let first = self.check.uses.entry(name).or_insert_with(|| this.clone());
            if (first.plain_size, first.compression) != (this.plain_size, this.compression) {
                let first_path = shown(&first.path);
                self.wrong(path, format!("describes {} otherwise than {first_path} does", name.path()));
            }
        }
    }

    fn link_group(&mut self, path: &[u8], group: u32, members: &[&Entry]) {
        if group == 0 {
            for member in members {
                self.wrong(&joined(path, &member.name), "has several links and is in no hard link group");
            }
            return;
        }
        let Some(first) = members.first() else { return };
        for member in members {
            let below = joined(path, &member.name);
            if member.link_count as usize != members.len() {
                let message = format!(
                    "has link count {}, its hard link group {} members",
                    member.link_count,
                    members.len()
                );
                self.wrong(&below, message);
            }
            let same = |e: &Entry| (e.hash, e.size, e.mode, e.mtime, e.mtime_ns, e.flags, e.symlink.clone());
            if same(first) != same(member) {
                self.wrong(
                    &below,
                    format!("differs from {}, of the same hard link group", shown(&first.name)),
                );
            }
        }
    }

    /// What only the whole catalog shows.
    fn finish(&mut self, mountpoint: &[u8]) -> Result<(), PublishError> {
        let mut rows = 0u64;
        let count = |_: Result<Entry, CatalogError>| {
            rows += 1;
            Ok(())
        };
        if let Err(error) = self.catalog.for_each(count) {
            self.wrong(mountpoint, chain(&error));
        }
        if rows != self.reached {
            self.wrong(
                mountpoint,
                format!("has {rows} rows, {} of them reachable from its root", self.reached),
            );
        }
        match self.catalog.chunk_count() {
            Ok(count) if count == self.chunks => {}
            Ok(count) => {
                self.wrong(mountpoint, format!("has {count} chunk rows, {} of them in use", self.chunks));
            }
            Err(error) => self.wrong(mountpoint, chain(&error)),
        }
        self.own.chunks = i64::try_from(self.chunks).unwrap_or(i64::MAX);
        Ok(())
    }
}

/// The first column in which the two rows of a nested catalog's root differ (publisher behaviour §11, errata 19).
fn transition_difference(above: &Entry, root: &Entry) -> Option<&'static str> {
    let pairs = [
        ("name", above.name == root.name),
        ("link count", above.link_count == root.link_count),
        ("hard link group", above.link_group == root.link_group),
        ("size", above.size == root.size),
        ("mode", above.mode == root.mode),
        ("modification time", (above.mtime, above.mtime_ns) == (root.mtime, root.mtime_ns)),
        ("owner", (above.uid, above.gid) == (root.uid, root.gid)),
        ("hash", above.hash == root.hash),
        ("symlink", above.symlink == root.symlink),
        ("presence of attributes", above.xattrs.is_some() == root.xattrs.is_some()),
    ];
    pairs.iter().find(|(_, equal)| !equal).map(|(column, _)| *column)
}
