//! From changed catalogs to a published revision.
//!
//! The order is that of the format's invariants (publisher behaviour §1, §6): contents are stored already;
//! then nested catalogs from the bottom up, the root catalog, history, certificate; then, after
//! everything was made durable, reflog and manifest. Replacing the manifest is the commit.
//!
//! A publisher that is killed between reflog and manifest leaves a reflog that is newer than the manifest's
//! `Y`. It then lists root objects that exist and were not published, which is harmless, and the
//! next publish sets `Y` again. Garbage collection of the C++ tools leaves the same state.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use cvmfs_format::history::{History, TRUNK, TRUNK_PREVIOUS};
use cvmfs_format::letter::seal;
use cvmfs_format::manifest::Manifest;
use cvmfs_format::reflog::{ReferenceKind, Reflog};
use cvmfs_format::{Compression, ContentHash, Deflate, HashAlgorithm, ObjectKind, ObjectName};

use crate::error::PublishError;
use crate::head::{Head, unpack_database};
use crate::interrupt::Interrupt;
use crate::keys::ReleaseKeys;
use crate::pipeline::{Counters, Encoding};
use crate::publisher::Publisher;
use crate::storage::{self, Scratch, Storage};
use crate::workspace::{Workspace, chain, in_catalog};

/// A reflog has some 60 bytes per published revision.
pub(crate) const MAX_REFLOG: u64 = 1 << 30;
const MAX_TAG_NAME: usize = 255;

/// The last step of a transaction.
#[derive(Debug)]
pub(crate) struct Commit<'a> {
    pub(crate) publisher: &'a Publisher,
    pub(crate) workspace: Workspace,
}

impl Commit<'_> {
    /// Publishes the workspace as the next revision and returns the new head.
    pub(crate) fn publish(mut self, tag: Option<&str>) -> Result<Head, PublishError> {
        let publisher = self.publisher;
        let old = &publisher.head.manifest;
        let signer = Signer::of(publisher);
        let scratch = publisher.storage.scratch()?;
        if let Some(tag) = tag {
            signer.require_free_tag(tag, old, &scratch)?;
        }
        let now = (publisher.options.clock)();
        // it may have run out during the publish: clients would refuse what is signed now
        publisher.head.require_valid_whitelist(&publisher.fqrn, now)?;
        let revision = old.revision + 1;
        let ttl = publisher.options.ttl.unwrap_or(old.ttl);
        let (root_catalog, root_catalog_size) = self.store_catalogs(&signer, revision, ttl, now)?;
        let manifest = Manifest { root_catalog, root_catalog_size, revision, ttl, ..old.clone() };
        let manifest = signer.publish(manifest, now, &scratch, |history| {
            history.rotate_trunk(root_catalog, root_catalog_size, revision, now)?;
            if let Some(tag) = tag {
                let trunk = history.tag(TRUNK)?;
                let named = |trunk| cvmfs_format::history::Tag {
                    name: tag.to_owned(),
                    description: String::new(),
                    ..trunk
                };
                trunk.map(named).map_or(Ok(()), |named| history.insert(&named))?;
            }
            Ok(())
        })?;
        Ok(Head { manifest, ..publisher.head.clone() })
    }

    /// Stores the changed catalogs bottom-up; returns hash and plain size of the root.
    fn store_catalogs(
        &mut self,
        signer: &Signer<'_>,
        revision: u64,
        ttl: u32,
        now: i64,
    ) -> Result<(ContentHash, u64), PublishError> {
        let unix = u64::try_from(now).unwrap_or(0);
        let mut root = None;
        for index in self.workspace.changed_bottom_up() {
            signer.interrupt.check()?;
            let (writer, finished) = self.workspace.take(index);
            let path = &finished.path;
            let totals = writer.counters().map_err(in_catalog(path))?.total();
            let is_root = path.is_empty();
            let (revision, ttl) =
                if is_root { (revision, Some(ttl)) } else { (writer.reader().revision() + 1, None) };
            writer.finish(revision, finished.base, ttl, unix).map_err(in_catalog(path))?;
            let (name, size) = signer.store_file(ObjectKind::Catalog, &finished.file)?;
            self.workspace.committed(&finished, totals, name.hash, size)?;
            if is_root {
                root = Some((name.hash, size));
            }
        }
        root.ok_or_else(|| PublishError::damaged("transaction", "has no root catalog"))
    }
}

/// Stores the objects of a revision beside its catalogs, and signs it.
#[derive(Debug)]
pub(crate) struct Signer<'a> {
    pub(crate) fqrn: &'a str,
    pub(crate) storage: &'a Arc<dyn Storage>,
    pub(crate) keys: &'a ReleaseKeys,
    pub(crate) algorithm: HashAlgorithm,
    pub(crate) deflate: Deflate,
    pub(crate) alternative_paths: bool,
    pub(crate) counters: &'a Counters,
    pub(crate) interrupt: &'a Interrupt,
}

impl<'a> Signer<'a> {
    /// Signs for an open repository, in the algorithm of its root catalog.
    pub(crate) fn of(publisher: &'a Publisher) -> Signer<'a> {
        let manifest = &publisher.head.manifest;
        Signer {
            fqrn: &publisher.fqrn,
            storage: &publisher.storage,
            keys: &publisher.keys,
            algorithm: manifest.root_catalog.algorithm,
            deflate: publisher.settings.deflate,
            alternative_paths: manifest.alternative_paths,
            counters: &publisher.options.counters,
            interrupt: &publisher.options.interrupt,
        }
    }

    /// Completes `manifest` (root catalog, revision, flags and metainfo are given), stores what it refers to, and
    /// makes it the published one. `change_history` gets the history as it is so far.
    pub(crate) fn publish(
        &self,
        mut manifest: Manifest,
        now: i64,
        scratch: &Scratch,
        change_history: impl FnOnce(&mut History) -> Result<(), cvmfs_format::history::HistoryError>,
    ) -> Result<Manifest, PublishError> {
        let reflog_file = scratch.file("reflog");
        let mut reflog = self.open_reflog(&manifest, now, &reflog_file, scratch)?;

        let history_file = scratch.file("history");
        let mut history = match manifest.history {
            Some(hash) => self.open_history(hash, &history_file)?,
            None => History::create(&history_file, self.fqrn).map_err(|e| in_history(&e))?,
        };
        change_history(&mut history).map_err(|e| in_history(&e))?;
        history.finish(manifest.history).map_err(|e| in_history(&e))?;
        let (history, _) = self.store_file(ObjectKind::History, &history_file)?;
        let certificate = self.store(ObjectKind::Certificate, &self.keys.certificate_pem)?;
        manifest.history = Some(history.hash);
        manifest.certificate = Some(certificate.hash);
        manifest.fqrn = self.fqrn.to_owned();
        // clients refuse to go back in time (format §4.3), so a clock that was set back must not stop them
        manifest.timestamp = manifest.timestamp.max(u64::try_from(now).unwrap_or(0));

        for (kind, hash) in [
            (ReferenceKind::Catalog, Some(manifest.root_catalog)),
            (ReferenceKind::Certificate, manifest.certificate),
            (ReferenceKind::History, manifest.history),
            (ReferenceKind::Metainfo, manifest.metainfo),
        ] {
            if let Some(hash) = hash {
                reflog.add(kind, hash, now).map_err(|e| in_reflog(&e))?;
            }
        }
        reflog.finish().map_err(|e| in_reflog(&e))?;
        let reflog = fs::read(&reflog_file).map_err(PublishError::local("read", &reflog_file))?;
        manifest.reflog = Some(ContentHash::of(self.algorithm, &reflog));

        self.interrupt.check()?;
        self.storage.settle()?;
        let letter = seal(manifest.to_text(), manifest.root_catalog.algorithm, |text| {
            self.keys.key.sign_manifest(text)
        })
        .map_err(|error| PublishError::Trust(format!("cannot sign the manifest: {}", chain(&error))))?;

        self.interrupt.begin_commit()?;
        let published = self
            .storage
            .put_file(storage::REFLOG, &reflog)
            .and_then(|()| self.storage.put_file(storage::MANIFEST, &letter));
        self.interrupt.end_commit();
        published?;
        Ok(manifest)
    }

    /// Stores a small zlib object.
    pub(crate) fn store(&self, kind: ObjectKind, plain: &[u8]) -> Result<ObjectName, PublishError> {
        let encoding =
            Encoding { algorithm: self.algorithm, compression: Compression::Zlib, deflate: self.deflate };
        encoding.encode(kind, plain, |name, stored| {
            let put = self.storage.put_object(&name, stored)?;
            self.counters.count(put, stored.len());
            if self.alternative_paths {
                // format §1: a link or a copy; a copy works on every storage
                self.storage.put_file(&name.alternative_path(), stored)?;
            }
            Ok(name)
        })
    }

    /// Stores a finished database; returns its name and plain size. The file is removed.
    pub(crate) fn store_file(
        &self,
        kind: ObjectKind,
        file: &Path,
    ) -> Result<(ObjectName, u64), PublishError> {
        let plain = fs::read(file).map_err(PublishError::local("read", file))?;
        fs::remove_file(file).map_err(PublishError::local("remove", file))?;
        let size = plain.len() as u64;
        Ok((self.store(kind, &plain)?, size))
    }

    pub(crate) fn require_free_tag(
        &self,
        tag: &str,
        manifest: &Manifest,
        scratch: &Scratch,
    ) -> Result<(), PublishError> {
        let Some(hash) = manifest.history else { return Ok(()) };
        let file = scratch.file("tags");
        let found = self.open_history(hash, &file)?.tag(tag).map_err(|e| in_history(&e))?;
        match found {
            Some(found) => Err(PublishError::Usage(format!(
                "tag {tag} exists already (revision {}): choose another name or remove it first",
                found.revision
            ))),
            None => Ok(()),
        }
    }

    fn open_history(&self, hash: ContentHash, file: &Path) -> Result<History, PublishError> {
        unpack_database(&**self.storage, ObjectName::new(hash, ObjectKind::History), file)?;
        let history = History::open_for_writing(file).map_err(|e| in_history(&e))?;
        if history.fqrn() != self.fqrn {
            let reason = format!("belongs to the repository {:?}", history.fqrn());
            return Err(PublishError::damaged("history", reason));
        }
        Ok(history)
    }

    /// The reflog so far in the file `file`.
    fn open_reflog(
        &self,
        manifest: &Manifest,
        now: i64,
        file: &Path,
        scratch: &Scratch,
    ) -> Result<Reflog, PublishError> {
        match self.storage.get_file(storage::REFLOG, MAX_REFLOG)? {
            Some(content) => {
                let differs =
                    |expected: ContentHash| ContentHash::of(expected.algorithm, &content) != expected;
                if manifest.reflog.is_some_and(differs) {
                    tracing::warn!(
                        "the reflog is not the one the manifest names: garbage was collected, or a publish interrupted"
                    );
                }
                fs::write(file, content).map_err(PublishError::local("write", file))?;
                let reflog = Reflog::open_for_writing(file).map_err(|e| in_reflog(&e))?;
                if reflog.fqrn() != self.fqrn {
                    let reason = format!("belongs to the repository {:?}", reflog.fqrn());
                    return Err(PublishError::damaged(storage::REFLOG, reason));
                }
                Ok(reflog)
            }
            None => {
                let mut reflog = Reflog::create(file, self.fqrn).map_err(|e| in_reflog(&e))?;
                if let Some(hash) = manifest.history {
                    tracing::warn!("the reflog is missing: a new one lists what the history knows");
                    reflog.add(ReferenceKind::History, hash, now).map_err(|e| in_reflog(&e))?;
                    let tags = self.open_history(hash, &scratch.file("known"))?;
                    for tag in tags.tags().map_err(|e| in_history(&e))? {
                        reflog
                            .add(ReferenceKind::Catalog, tag.root_catalog, tag.timestamp)
                            .map_err(|e| in_reflog(&e))?;
                    }
                }
                Ok(reflog)
            }
        }
    }
}

/// Refuses names that the history cannot hold or that the publisher itself keeps.
///
/// # Errors
/// [`PublishError::Usage`] with the rule that is broken.
pub fn check_tag_name(tag: &str) -> Result<(), PublishError> {
    let reason = if tag.is_empty() || tag.len() > MAX_TAG_NAME {
        "must have 1 to 255 bytes"
    } else if tag.contains(|c: char| c.is_whitespace() || c.is_control() || c == '/') {
        "must not contain blanks, slashes or control characters"
    } else if tag == TRUNK || tag == TRUNK_PREVIOUS {
        "is kept by the publisher itself"
    } else {
        return Ok(());
    };
    Err(PublishError::Usage(format!("tag name {tag:?} {reason}")))
}

fn in_history(error: &dyn std::error::Error) -> PublishError {
    PublishError::damaged("history", chain(error))
}

pub(crate) fn in_reflog(error: &dyn std::error::Error) -> PublishError {
    PublishError::damaged(storage::REFLOG, chain(error))
}
