//! `replicate`: a copy of a repository in another storage, for a stratum 1 (publisher behaviour §13).
//!
//! Manifest and whitelist of the source are read once and verified; what that one revision refers to is copied,
//! each object verified by its hash; then the very same two files are stored, the manifest last. So the copy is always
//! one whole revision, whatever happens to the source meanwhile, and it never goes back to an older one.
//!
//! *A stored catalog means that everything below it is stored*: a catalog is stored after all that it refers to. That
//! is what makes a replication resumable and cheap: what a stored catalog names is not looked for again. `complete`
//! does not rely on it.
//!
//! The replica's reflog is its own, with its own times, so that garbage can be collected there.

mod copy;

use std::collections::HashSet;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cvmfs_format::history::{History, Tag};
use cvmfs_format::letter::MAX_LETTER;
use cvmfs_format::manifest::Manifest;
use cvmfs_format::reflog::{ReferenceKind, Reflog};
use cvmfs_format::signature::MasterKeys;
use cvmfs_format::{ContentHash, ObjectKind, ObjectName};
use serde::Serialize;

use crate::collect::date;
use crate::commit::{MAX_REFLOG, in_reflog};
use crate::error::PublishError;
use crate::head::{Head, Letters, unpack_database};
use crate::interrupt::Interrupt;
use crate::pipeline::Counters;
use crate::publisher::{Clock, DEFAULT_LOCK_WAIT, system_clock};
use crate::storage::{self, Scratch, Storage};
use crate::workspace::chain;
use copy::Copy;

/// Files that only exist while a replication is under way, and that tell when one ended.
const IN_PROGRESS: &str = ".cvmfs_is_snapshotting";
pub(crate) const LAST_SNAPSHOT: &str = ".cvmfs_last_snapshot";
/// A whitelist signed with certificates in place of the master key; replicated unread.
const WHITELIST_PKCS7: &str = ".cvmfswhitelist.pkcs7";
/// The status file has two dates.
const MAX_STATUS: u64 = 64 << 10;

/// What to copy from where to where.
#[derive(Debug)]
pub struct ReplicateOptions {
    /// Repository name.
    pub fqrn: String,
    /// Where it is.
    pub source: Arc<dyn Storage>,
    /// Where the replica is, or is to be.
    pub replica: Arc<dyn Storage>,
    /// Public master keys.
    pub masters: MasterKeys,
    /// Also copy revisions that were published between the replica's and the current one; on the first time all
    /// that the source still has. Tagged revisions are always copied.
    pub history: bool,
    /// Look for each object, also below catalogs that are stored already.
    pub complete: bool,
    /// Objects fetched at the same time.
    pub parallel: usize,
    /// How long to wait for another replication or collection.
    pub lock_wait: Duration,
    /// Stops the work when asked to.
    pub interrupt: Interrupt,
    /// Where progress is counted: objects looked at as entries, bytes fetched as input.
    pub counters: Arc<Counters>,
    /// Source of time.
    pub clock: Clock,
}

/// As with the C++ tools.
pub const DEFAULT_PARALLEL: usize = 16;

impl ReplicateOptions {
    /// The current and the tagged revisions, from `source` to `replica`.
    pub fn new(
        fqrn: &str,
        source: Arc<dyn Storage>,
        replica: Arc<dyn Storage>,
        masters: MasterKeys,
    ) -> ReplicateOptions {
        ReplicateOptions {
            fqrn: fqrn.to_owned(),
            source,
            replica,
            masters,
            history: false,
            complete: false,
            parallel: DEFAULT_PARALLEL,
            lock_wait: DEFAULT_LOCK_WAIT,
            interrupt: Interrupt::default(),
            counters: Arc::default(),
            clock: system_clock,
        }
    }
}

/// What a replication did: the document of `replicate --json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ReplicateReport {
    /// Repository name.
    pub fqrn: String,
    /// Number of the revision that the replica has now.
    pub revision: u64,
    /// Hash of its root catalog.
    pub root_hash: String,
    /// Number of the revision that it had before, if it had one.
    pub previous_revision: Option<u64>,
    /// Revisions copied, tagged ones included.
    pub revisions: u64,
    /// Tagged or older revisions that the source does not have any more.
    pub revisions_collected: u64,
    /// Objects that were not in the replica before, catalogs included.
    pub new_objects: u64,
    /// Their stored bytes.
    pub bytes_stored: u64,
    /// How long it took.
    pub seconds: f64,
}

/// Brings a replica up to date with its source.
///
/// # Errors
/// [`PublishError::Trust`] if the source cannot be trusted or is older than the replica; [`PublishError::NotFound`] if it
/// is no repository or does not allow replication; [`PublishError::Damaged`] if an object of the revision is missing or
/// wrong there. The replica then has its old revision.
pub fn replicate(options: &ReplicateOptions) -> Result<ReplicateReport, PublishError> {
    let started = Instant::now();
    let now = (options.clock)();
    let (source, replica) = (&*options.source, &*options.replica);
    let letters = Letters::read(source)?;
    let head = letters.verify(source, &options.fqrn, &options.masters)?;
    head.require_valid_whitelist(&options.fqrn, now)?;
    if source.get_file(storage::MASTER_REPLICA, MAX_LETTER as u64)?.is_none() {
        return Err(PublishError::NotFound(format!(
            "{} does not allow replication: {} is missing",
            source.location(),
            storage::MASTER_REPLICA
        )));
    }
    let _lock = replica.lock(options.lock_wait)?;
    let before = present_revision(options, &head.manifest)?;
    if before.is_none() {
        replica.put_file(IN_PROGRESS, b"")?;
    }
    let scratch = replica.scratch()?;
    let mut work =
        Replication { options, scratch: &scratch, manifest: &head.manifest, roots: Vec::new(), collected: 0 };
    let tags = work.small_objects()?;
    work.revisions(before.as_ref(), tags)?;
    work.reflog(now)?;
    replica.settle()?;
    options.interrupt.begin_commit()?;
    let stored = work.letters(&letters);
    options.interrupt.end_commit();
    stored?;
    note_snapshot(replica, now)?;
    Ok(ReplicateReport {
        fqrn: options.fqrn.clone(),
        revision: head.manifest.revision,
        root_hash: head.manifest.root_catalog.to_string(),
        previous_revision: before.map(|manifest| manifest.revision),
        revisions: work.roots.len() as u64,
        revisions_collected: work.collected,
        new_objects: options.counters.new_objects.load(Ordering::Relaxed),
        bytes_stored: options.counters.bytes_stored.load(Ordering::Relaxed),
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// The replica's manifest, if it has one; refuses to go back from it (reliability: a source that is older than its
/// replica is either not the right one or under attack).
fn present_revision(options: &ReplicateOptions, next: &Manifest) -> Result<Option<Manifest>, PublishError> {
    let replica = &*options.replica;
    if replica.get_file(storage::MANIFEST, MAX_LETTER as u64)?.is_none() {
        return Ok(None);
    }
    let there = Head::load_ignoring_expiry(replica, &options.fqrn, &options.masters)?.manifest;
    let goes_back = next.revision < there.revision;
    let forks = next.revision == there.revision && next.root_catalog != there.root_catalog;
    if goes_back || forks || next.timestamp < there.timestamp {
        return Err(PublishError::Trust(format!(
            "{} has revision {} ({}) of {}, the replica has revision {} ({}): a replica never goes back",
            options.source.location(),
            next.revision,
            next.root_catalog,
            options.fqrn,
            there.revision,
            there.root_catalog
        )));
    }
    Ok(Some(there))
}

struct Replication<'a> {
    options: &'a ReplicateOptions,
    scratch: &'a Scratch,
    manifest: &'a Manifest,
    /// Root catalogs that the replica has got now, with the current one.
    roots: Vec<ContentHash>,
    /// Revisions that the source does not have any more.
    collected: u64,
}

impl Replication<'_> {
    /// Certificate, metainfo and history; returns the tags.
    fn small_objects(&self) -> Result<Vec<Tag>, PublishError> {
        let (source, manifest) = (&*self.options.source, self.manifest);
        let mut copy = Copy::start(self.options, self.scratch);
        for (hash, kind) in [
            (manifest.certificate, ObjectKind::Certificate),
            (manifest.metainfo, ObjectKind::Metainfo),
            (manifest.history, ObjectKind::History),
        ] {
            if let Some(hash) = hash {
                copy.database(ObjectName::new(hash, kind), b"")?;
            }
        }
        copy.finish()?;
        let Some(hash) = manifest.history else { return Ok(Vec::new()) };
        let file = self.scratch.file("history");
        unpack_database(&*self.options.replica, ObjectName::new(hash, ObjectKind::History), &file)?;
        let read = || History::open(&file)?.tags();
        read().map_err(|error| {
            PublishError::damaged(format!("history of {}", source.location()), chain(&error))
        })
    }

    /// The current revision, those between it and the replica's, and the tagged ones.
    fn revisions(&mut self, before: Option<&Manifest>, tags: Vec<Tag>) -> Result<(), PublishError> {
        let current = self.manifest.root_catalog;
        let mut done = HashSet::from([current]);
        let mut previous = self.revision(current, false)?;
        if self.options.history || before.is_some() {
            let last = before.map(|manifest| manifest.root_catalog);
            while let Some(hash) = previous.filter(|hash| !hash.is_null() && Some(*hash) != last) {
                // between two replications there are few; the whole history is copied on request only
                if !done.insert(hash) || (!self.options.history && self.is_present(hash)?) {
                    break;
                }
                previous = self.revision(hash, true)?;
            }
        }
        for tag in tags {
            if done.insert(tag.root_catalog)
                && (self.options.complete || !self.is_present(tag.root_catalog)?)
            {
                self.revision(tag.root_catalog, true)?;
            }
        }
        Ok(())
    }

    /// Copies a revision; returns its predecessor. One that the source has collected is left out if it `may_be_gone`.
    fn revision(
        &mut self,
        root: ContentHash,
        may_be_gone: bool,
    ) -> Result<Option<ContentHash>, PublishError> {
        let name = ObjectName::new(root, ObjectKind::Catalog);
        let is_gone = may_be_gone
            && self.manifest.garbage_collectable
            && !self.is_present(root)?
            && self.options.source.object_size(&name)?.is_none();
        if is_gone {
            self.collected += 1;
            return Ok(None);
        }
        let mut copy = Copy::start(self.options, self.scratch);
        let previous = copy.revision(root)?;
        copy.finish()?;
        self.roots.push(root);
        Ok(previous)
    }

    fn is_present(&self, root: ContentHash) -> Result<bool, PublishError> {
        let name = ObjectName::new(root, ObjectKind::Catalog);
        Ok(self.options.replica.object_size(&name)?.is_some())
    }

    /// Enters what was copied into the replica's own reflog. Without `Y` in the manifest there may be none (errata 10).
    fn reflog(&self, now: i64) -> Result<(), PublishError> {
        let manifest = self.manifest;
        if !manifest.garbage_collectable || manifest.reflog.is_none() {
            return Ok(());
        }
        let replica = &*self.options.replica;
        let file = self.scratch.file("reflog");
        let mut reflog = match replica.get_file(storage::REFLOG, MAX_REFLOG)? {
            Some(content) => {
                fs::write(&file, content).map_err(PublishError::local("write", &file))?;
                Reflog::open_for_writing(&file).map_err(|e| in_reflog(&e))?
            }
            None => Reflog::create(&file, &self.options.fqrn).map_err(|e| in_reflog(&e))?,
        };
        let others = [
            (ReferenceKind::Certificate, manifest.certificate),
            (ReferenceKind::History, manifest.history),
            (ReferenceKind::Metainfo, manifest.metainfo),
        ];
        let roots = self.roots.iter().map(|root| (ReferenceKind::Catalog, Some(*root)));
        for (kind, hash) in roots.chain(others) {
            if let Some(hash) = hash {
                reflog.add(kind, hash, now).map_err(|e| in_reflog(&e))?;
            }
        }
        reflog.finish().map_err(|e| in_reflog(&e))?;
        let content = fs::read(&file).map_err(PublishError::local("read", &file))?;
        Ok(replica.put_file(storage::REFLOG, &content)?)
    }

    /// Stores the signed files as the source had them, the manifest last.
    fn letters(&self, letters: &Letters) -> Result<(), PublishError> {
        let (source, replica) = (&*self.options.source, &*self.options.replica);
        replica.put_file(
            storage::MASTER_REPLICA,
            b"This file marks the repository as replicatable to stratum 1 servers\n",
        )?;
        if let Some(pkcs7) = source.get_file(WHITELIST_PKCS7, MAX_LETTER as u64)? {
            replica.put_file(WHITELIST_PKCS7, &pkcs7)?;
        }
        replica.put_file(storage::WHITELIST, &letters.whitelist)?;
        Ok(replica.put_file(storage::MANIFEST, &letters.manifest)?)
    }
}

/// Tells monitoring when the replica was brought up to date.
fn note_snapshot(replica: &dyn Storage, now: i64) -> Result<(), PublishError> {
    let known = replica.get_file(storage::STATUS, MAX_STATUS)?.unwrap_or_default();
    let mut status: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&known).unwrap_or_default();
    status.insert("last_snapshot".to_owned(), date(now).into());
    replica.put_file(storage::STATUS, serde_json::Value::Object(status).to_string().as_bytes())?;
    replica.put_file(LAST_SNAPSHOT, format!("{}\n", date(now)).as_bytes())?;
    Ok(replica.delete_file(IN_PROGRESS)?)
}
