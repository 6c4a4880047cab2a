//! Checking a part: one subtree, or what changed since an older revision.
//!
//! A nested catalog that the older revision has in the same form, and a file with the same content there, were
//! checked with that revision. Catalogs are compared by their names, which are their hashes, so nothing is believed
//! that was not verified on the way from the signed manifest.

use std::collections::HashMap;
use std::fs;

use cvmfs_format::catalog::{Catalog, Counts, Entry};
use cvmfs_format::{ContentHash, ObjectKind, ObjectName, PathHash};

use super::catalogs::{Tree, Walk};
use super::{Check, ProblemKind};
use crate::error::PublishError;
use crate::head::{Head, unpack_database};
use crate::path::{RepositoryPath, prefixes};
use crate::workspace::chain;

impl Check<'_> {
    /// Checks one entry with everything below it.
    pub(super) fn subtree(&mut self, head: &Head, path: &RepositoryPath) -> Result<(), PublishError> {
        let path = path.as_bytes();
        let mut hash = head.manifest.root_catalog;
        let mut old = self.options.since;
        let mut mountpoint: &[u8] = b"";
        let (catalog, name) = loop {
            let name = ObjectName::new(hash, ObjectKind::Catalog);
            let catalog = match self.unpack(name) {
                Ok(catalog) => catalog,
                Err(error) => {
                    self.report_object(mountpoint, &name, &error);
                    return Ok(());
                }
            };
            let damaged = |error| PublishError::damaged(name.path(), chain(&error));
            let mut next = None;
            for prefix in prefixes(path).filter(|prefix| prefix.len() > mountpoint.len()) {
                if let Some(nested) = catalog.nested_at(prefix).map_err(damaged)? {
                    next = Some((prefix, nested));
                    break;
                }
            }
            let Some((prefix, nested)) = next else { break (catalog, name) };
            old = self.older_nested(old, prefix);
            if prefix == path {
                let above = catalog.lookup(PathHash::of(prefix)).map_err(damaged)?;
                self.catalog(nested.hash, nested.size, prefix, above.as_ref(), old)?;
                return Ok(());
            }
            (hash, mountpoint) = (nested.hash, prefix);
        };
        let entry = catalog
            .lookup(PathHash::of(path))
            .map_err(|error| PublishError::damaged(name.path(), chain(&error)))?;
        let Some(entry) = entry else {
            let fqrn = &self.options.fqrn;
            return Err(PublishError::NotFound(format!(
                "there is no {} in {fqrn}",
                crate::error::shown(path)
            )));
        };
        self.part(&catalog, name, path, &entry, old)
    }

    /// An entry that is not the root of a catalog.
    fn part(
        &mut self,
        catalog: &Catalog,
        name: ObjectName,
        path: &[u8],
        entry: &Entry,
        old: Option<ContentHash>,
    ) -> Result<(), PublishError> {
        let nested = catalog.nested().map_err(|error| PublishError::damaged(name.path(), chain(&error)))?;
        let older = self.older(old);
        let mut walk = Walk {
            check: self,
            catalog,
            older: older.as_ref(),
            name,
            nested: nested.into_iter().map(|reference| (reference.path.clone(), (reference, None))).collect(),
            own: Counts::default(),
            reached: 0,
            chunks: 0,
        };
        walk.count(entry);
        walk.entry(path, entry);
        if entry.is_directory() {
            walk.directory(path, entry, 0);
        }
        let nested: HashMap<_, _> = walk.nested;
        for (path, (reference, row)) in nested {
            // those elsewhere were not met
            if let Some(row) = row {
                let old = older.as_ref().and_then(|older| nested_hash(older, &path));
                self.catalog(reference.hash, reference.size, &path, Some(&row), old)?;
            }
        }
        Ok(())
    }

    /// A catalog that the older revision has, too: only its totals are read.
    pub(super) fn unchanged(&mut self, name: ObjectName, mountpoint: &[u8]) -> Option<Tree> {
        let catalog = match self.unpack(name) {
            Ok(catalog) => catalog,
            Err(error) => {
                self.report_object(mountpoint, &name, &error);
                return None;
            }
        };
        let read = || {
            let root = catalog.lookup(PathHash::of(mountpoint))?;
            Ok::<_, cvmfs_format::catalog::CatalogError>((root, catalog.counters()?.total()))
        };
        match read() {
            Ok((root, totals)) => {
                // sizes were compared with the older revision's
                Some(Tree { totals, complete: true, size: 0, root, revision: catalog.revision() })
            }
            Err(error) => {
                self.findings.add(ProblemKind::Catalog, mountpoint, Some(&name), chain(&error));
                None
            }
        }
    }

    /// The catalog `hash` of the older revision. Without it more is checked than needed.
    pub(super) fn older(&mut self, hash: Option<ContentHash>) -> Option<Catalog> {
        match self.unpack(ObjectName::new(hash?, ObjectKind::Catalog)) {
            Ok(catalog) => Some(catalog),
            Err(error) => {
                self.findings
                    .note(format!("a catalog of the older revision cannot be read: {}", chain(&error)));
                None
            }
        }
    }

    fn older_nested(&mut self, old: Option<ContentHash>, path: &[u8]) -> Option<ContentHash> {
        let older = self.older(old)?;
        nested_hash(&older, path)
    }

    /// Unpacks and opens a catalog; its file is unlinked at once.
    fn unpack(&mut self, name: ObjectName) -> Result<Catalog, PublishError> {
        self.unpacked += 1;
        let file = self.work_file(&format!("part.{}", self.unpacked));
        unpack_database(&*self.options.storage, name, &file)?;
        let catalog = Catalog::open(&file).map_err(|error| PublishError::damaged(name.path(), chain(&error)));
        let _ = fs::remove_file(&file);
        catalog
    }
}

/// The nested catalog of the older revision at `path`.
pub(super) fn nested_hash(older: &Catalog, path: &[u8]) -> Option<ContentHash> {
    older.nested_at(path).ok().flatten().map(|nested| nested.hash)
}

/// Whether the older revision has the same content at the same path.
pub(super) fn same_content(older: &Catalog, catalog: &Catalog, entry: &Entry) -> bool {
    let Ok(Some(before)) = older.lookup(entry.path_hash) else { return false };
    let described = |e: &Entry| (e.hash, e.size, e.is_chunked(), e.compression(), e.algorithm());
    if described(&before) != described(entry) {
        return false;
    }
    !entry.is_chunked()
        || matches!((older.chunks_of(&before), catalog.chunks_of(entry)), (Ok(a), Ok(b)) if a == b)
}
