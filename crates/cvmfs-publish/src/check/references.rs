//! History, reflog, auxiliary objects, and what is stored without being referred to.

use std::collections::HashSet;
use std::fs;

use cvmfs_format::catalog::Catalog;
use cvmfs_format::history::{History, TRUNK, Tag};
use cvmfs_format::reflog::{ReferenceKind, Reflog};
use cvmfs_format::{ContentHash, ObjectKind, ObjectName};

use super::{Check, ProblemKind, Unreferenced};
use crate::error::PublishError;
use crate::head::{Head, load_small, unpack_database};
use crate::replicate::LAST_SNAPSHOT;
use crate::storage::{self, StorageError};
use crate::workspace::chain;

const MAX_REFLOG: u64 = 1 << 30;
const MAX_METAINFO: u64 = 1 << 20;
/// It has one date.
const MAX_SNAPSHOT_FILE: u64 = 4096;

/// Where to look for revisions.
#[derive(Debug, Default)]
pub(super) struct Roots {
    pub(super) tagged: Vec<Tag>,
    /// Root catalogs of all revisions known to tags and reflog.
    catalogs: HashSet<ContentHash>,
}

impl Check<'_> {
    /// Checks everything that the manifest names beside the root catalog.
    pub(super) fn references(&mut self, head: &Head, now: i64) -> Result<Roots, PublishError> {
        let manifest = &head.manifest;
        let mut roots = Roots::default();
        roots.catalogs.insert(manifest.root_catalog);
        let left = (head.whitelist.expires_unix() - now) / (24 * 3600);
        if left < 7 {
            let expires = head.whitelist.expires;
            self.findings.note(format!("the whitelist expires on {expires}: run `cvmfs-publish resign`"));
        }
        for (hash, kind) in [
            (Some(manifest.root_catalog), ObjectKind::Catalog),
            (manifest.certificate, ObjectKind::Certificate),
            (manifest.history, ObjectKind::History),
            (manifest.metainfo, ObjectKind::Metainfo),
        ] {
            let Some(hash) = hash else { continue };
            let name = ObjectName::new(hash, kind);
            self.referenced.insert(name);
            if manifest.alternative_paths
                && matches!(kind, ObjectKind::Catalog | ObjectKind::Certificate)
                && self.options.storage.get_file(&name.alternative_path(), u64::MAX)?.is_none()
            {
                let message =
                    format!("{} is missing although the manifest promises it", name.alternative_path());
                self.findings.add(ProblemKind::Missing, b"", Some(&name), message);
            }
        }
        if let Some(hash) = manifest.metainfo {
            let name = ObjectName::new(hash, ObjectKind::Metainfo);
            if let Err(error) = load_small(&*self.options.storage, name, MAX_METAINFO) {
                self.report_object(b"", &name, &error);
            }
        }
        if let Some(hash) = manifest.history {
            self.history(head, hash, &mut roots);
        }
        self.reflog(head, &mut roots)?;
        Ok(roots)
    }

    /// Reports that an object cannot be had: missing or corrupt.
    pub(super) fn report_object(&mut self, path: &[u8], name: &ObjectName, error: &PublishError) {
        let kind = match error {
            PublishError::Storage(error) if error.is_not_found() => ProblemKind::Missing,
            _ => ProblemKind::Corrupt,
        };
        let message = match (kind, error) {
            (ProblemKind::Missing, _) => "the object is missing".to_owned(),
            // the object is named beside the message
            (_, PublishError::Damaged { reason, .. }) => reason.clone(),
            _ => chain(error),
        };
        self.findings.add(kind, path, Some(name), message);
    }

    fn history(&mut self, head: &Head, hash: ContentHash, roots: &mut Roots) {
        let name = ObjectName::new(hash, ObjectKind::History);
        let file = self.work_file("history");
        if let Err(error) = unpack_database(&*self.options.storage, name, &file) {
            return self.report_object(b"", &name, &error);
        }
        let read = || {
            let history = History::open(&file)?;
            Ok::<_, cvmfs_format::history::HistoryError>((history.fqrn().to_owned(), history.tags()?))
        };
        let (fqrn, tags) = match read() {
            Ok(read) => read,
            Err(error) => return self.findings.add(ProblemKind::History, b"", Some(&name), chain(&error)),
        };
        let mut wrong = |message: String| self.findings.add(ProblemKind::History, b"", Some(&name), message);
        if fqrn != self.options.fqrn {
            wrong(format!("the history belongs to the repository {fqrn:?}"));
        }
        match tags.iter().find(|tag| tag.name == TRUNK) {
            None => wrong("the history has no tag trunk".to_owned()),
            Some(trunk) => {
                let manifest = &head.manifest;
                let expected = (manifest.root_catalog, manifest.revision);
                if (trunk.root_catalog, trunk.revision) != expected {
                    wrong(format!(
                        "trunk names revision {} ({}), the manifest revision {} ({})",
                        trunk.revision, trunk.root_catalog, expected.1, expected.0
                    ));
                }
            }
        }
        for tag in &tags {
            if tag.branch.is_empty() && tag.revision > head.manifest.revision {
                wrong(format!(
                    "tag {} names revision {}, which is not published yet",
                    tag.name, tag.revision
                ));
            }
        }
        for tag in tags {
            let name = ObjectName::new(tag.root_catalog, ObjectKind::Catalog);
            self.referenced.insert(name);
            roots.catalogs.insert(tag.root_catalog);
            match self.options.storage.object_size(&name) {
                Ok(Some(_)) => {}
                Ok(None) => {
                    let message = format!("the root catalog of tag {} is missing", tag.name);
                    self.findings.add(ProblemKind::Missing, b"", Some(&name), message);
                    continue;
                }
                Err(error) => self.findings.add(ProblemKind::Corrupt, b"", Some(&name), chain(&error)),
            }
            roots.tagged.push(tag);
        }
    }

    fn reflog(&mut self, head: &Head, roots: &mut Roots) -> Result<(), PublishError> {
        let manifest = &head.manifest;
        let content = self.options.storage.get_file(storage::REFLOG, MAX_REFLOG)?;
        let content = match (content, manifest.reflog) {
            (Some(content), _) => content,
            // a replica has none, or its own
            (None, None) => return Ok(()),
            (None, Some(_)) if self.is_replica()? => return Ok(()),
            (None, Some(_)) => {
                let message = format!("{} is missing: the next publish makes a new one", storage::REFLOG);
                self.findings.add(ProblemKind::Reflog, b"", None, message);
                return Ok(());
            }
        };
        let matches = manifest.reflog.is_some_and(|hash| ContentHash::of(hash.algorithm, &content) == hash);
        let file = self.work_file("reflog");
        fs::write(&file, content).map_err(PublishError::local("write", &file))?;
        let read = || {
            let reflog = Reflog::open(&file)?;
            Ok::<_, cvmfs_format::reflog::ReflogError>((reflog.fqrn().to_owned(), reflog.references()?))
        };
        let (fqrn, references) = match read() {
            Ok(read) => read,
            Err(error) => {
                self.findings.add(
                    ProblemKind::Reflog,
                    b"",
                    None,
                    format!("{}: {}", storage::REFLOG, chain(&error)),
                );
                return Ok(());
            }
        };
        let mut wrong = |message: String| self.findings.add(ProblemKind::Reflog, b"", None, message);
        if fqrn != self.options.fqrn {
            wrong(format!("the reflog belongs to the repository {fqrn:?}"));
        }
        for (kind, hash) in [
            (ReferenceKind::Catalog, Some(manifest.root_catalog)),
            (ReferenceKind::Certificate, manifest.certificate),
            (ReferenceKind::History, manifest.history),
            (ReferenceKind::Metainfo, manifest.metainfo),
        ] {
            let Some(hash) = hash else { continue };
            if !references.iter().any(|r| r.kind == kind && r.hash == hash) {
                let name = ObjectName::new(hash, kind.object_kind());
                wrong(format!("the reflog does not list the manifest's {name}"));
            }
        }
        if !matches {
            self.findings.note(
                "the reflog is not the one the manifest names (Y): garbage was collected or a publish interrupted since"
                    .to_owned(),
            );
        }
        for reference in references {
            self.referenced.insert(ObjectName::new(reference.hash, reference.kind.object_kind()));
            if reference.kind == ReferenceKind::Catalog {
                roots.catalogs.insert(reference.hash);
            }
        }
        Ok(())
    }

    /// Whether the repository was copied from another one.
    fn is_replica(&self) -> Result<bool, PublishError> {
        Ok(self.options.storage.get_file(LAST_SNAPSHOT, MAX_SNAPSHOT_FILE)?.is_some())
    }

    /// Stored objects that no revision in `roots` refers to.
    pub(super) fn unreferenced(&mut self, roots: &Roots) -> Result<Vec<Unreferenced>, PublishError> {
        let mut known: HashSet<ObjectName> = self.uses.keys().copied().collect();
        known.extend(self.referenced.iter().copied());
        let examined: HashSet<ObjectName> = self.trees.keys().map(|(name, _)| *name).collect();
        known.extend(examined.iter().copied());
        let mut waiting: Vec<ContentHash> = roots.catalogs.iter().copied().collect();
        let mut seen: HashSet<ContentHash> = HashSet::new();
        while let Some(hash) = waiting.pop() {
            let name = ObjectName::new(hash, ObjectKind::Catalog);
            known.insert(name);
            if seen.insert(hash) && !examined.contains(&name) {
                self.collect(name, &mut known, &mut waiting);
            }
        }
        // data/xx/…: comparing paths also finds files whose names are no object names
        let known: HashSet<String> = known.iter().map(ObjectName::path).collect();
        let mut found = Vec::new();
        let listed = self.options.storage.list_objects(&mut |object| {
            if !known.contains(&object.path) {
                found.push(Unreferenced { object: object.path, bytes: object.size });
            }
        });
        match listed {
            Err(error @ StorageError::NoListing { .. }) => self.findings.note(error.to_string()),
            other => other?,
        }
        Ok(found)
    }

    /// Adds what a catalog of an older revision refers to.
    fn collect(&mut self, name: ObjectName, known: &mut HashSet<ObjectName>, waiting: &mut Vec<ContentHash>) {
        let file = self.work_file("older");
        let outcome = unpack_database(&*self.options.storage, name, &file).and_then(|_| {
            let damaged = |error| PublishError::damaged(name.path(), chain(&error));
            let catalog = Catalog::open(&file).map_err(damaged)?;
            let mut chunked = Vec::new();
            let visit = |entry: Result<cvmfs_format::catalog::Entry, _>| {
                let entry = entry?;
                if let Some(hash) = entry.hash {
                    known.insert(ObjectName::new(hash, ObjectKind::File));
                }
                if entry.is_chunked() {
                    chunked.push((entry.path_hash, entry.algorithm()));
                }
                Ok(())
            };
            catalog.for_each(visit).map_err(damaged)?;
            for (path, algorithm) in chunked {
                let chunks = catalog.chunks(path, algorithm).map_err(damaged)?;
                known.extend(chunks.iter().map(|chunk| ObjectName::new(chunk.hash, ObjectKind::Chunk)));
            }
            waiting.extend(catalog.nested().map_err(damaged)?.into_iter().map(|nested| nested.hash));
            Ok(())
        });
        if let Err(error) = outcome {
            // collected, or of an interrupted publish: no promise is broken
            self.findings.note(format!("a catalog of an older revision is not complete: {}", chain(&error)));
        }
        let _ = fs::remove_file(&file);
    }
}
