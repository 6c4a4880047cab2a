//! Garbage collection: old revisions, and what only they refer to (repository format §20, publisher behaviour §10).
//!
//! *Mark*: the current revision, its predecessors as far as the rule goes, every tagged revision, and every
//! revision that was replaced only a short while ago (the *grace*: a mount or a container may still use it). All that
//! these refer to stays. *Sweep*: every other revision in the reflog is taken apart from the bottom up, its catalogs
//! last; then the reflog is written without it. The manifest is not touched.
//!
//! Nothing is deleted unless every revision that stays could be read completely. A collection that is killed leaves
//! revisions half taken apart, which nobody can reach any more; the next collection finishes them, because a
//! catalog goes after what it refers to, and its line in the reflog after it.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use cvmfs_format::catalog::Catalog;
use cvmfs_format::manifest::Manifest;
use cvmfs_format::reflog::{Reference, ReferenceKind, Reflog};
use cvmfs_format::signature::MasterKeys;
use cvmfs_format::{ContentHash, ObjectKind, ObjectName};
use serde::Serialize;

use crate::commit::{MAX_REFLOG, in_reflog};
use crate::error::PublishError;
use crate::head::{Head, unpack_database};
use crate::publisher::{OpenOptions, Publisher};
use crate::replicate::LAST_SNAPSHOT;
use crate::revisions::tags;
use crate::storage::{self, Scratch, Storage};
use crate::workspace::chain;

/// How long a replaced revision stays by default, as with the C++ tools.
pub const DEFAULT_GRACE: Duration = Duration::from_secs(3 * 24 * 3600);

/// What stays.
#[derive(Debug, Clone)]
pub struct CollectOptions {
    /// Revisions before the current one that stay.
    pub keep_revisions: Option<u64>,
    /// Revisions published since this Unix time stay, and the one before them. With
    /// `keep_revisions` both must hold.
    pub keep_since: Option<i64>,
    /// A revision stays for this long after it was replaced, whatever the rules above say.
    pub grace: Duration,
    /// Also delete stored objects, older than the grace, that no revision refers to: what interrupted publishes left.
    pub unreferenced: bool,
    /// Only say what would go.
    pub dry_run: bool,
    /// File to which the names of the deleted objects are appended.
    pub deletion_log: Option<PathBuf>,
}

impl Default for CollectOptions {
    fn default() -> CollectOptions {
        CollectOptions {
            keep_revisions: None,
            keep_since: None,
            grace: DEFAULT_GRACE,
            unreferenced: false,
            dry_run: false,
            deletion_log: None,
        }
    }
}

/// Result of a collection: the document of `gc --json`.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct CollectReport {
    /// Repository name.
    pub fqrn: String,
    /// Whether nothing was deleted because nothing was to be.
    pub dry_run: bool,
    /// Revisions that stay, the current and the tagged ones included.
    pub revisions_kept: u64,
    /// Revisions taken out of the reflog.
    pub revisions_removed: u64,
    /// Objects deleted.
    pub objects_removed: u64,
    /// Their stored bytes.
    pub bytes_removed: u64,
    /// Those among them that no revision referred to.
    pub unreferenced_removed: u64,
    /// How long it took.
    pub seconds: f64,
}

impl Publisher {
    /// Deletes revisions that nobody needs any more, with what only they refer to.
    ///
    /// # Errors
    /// [`PublishError::Usage`] if the repository does not allow it; [`PublishError::Damaged`] if a revision that
    /// stays cannot be read, before anything was deleted; and whatever the storage says.
    pub fn collect(&mut self, options: &CollectOptions) -> Result<CollectReport, PublishError> {
        let place = Place {
            fqrn: &self.fqrn,
            storage: &*self.storage,
            manifest: &self.head.manifest,
            settings: &self.options,
            is_replica: false,
        };
        place.collect(options)
    }
}

/// Like [`Publisher::collect`] without a key that signs: collecting changes nothing that is signed, and replicas have no
/// such keys.
///
/// # Errors
/// As for [`Publisher::collect`], and [`PublishError::Trust`] if the published state is not to be trusted.
pub fn collect(
    fqrn: &str,
    storage: &dyn Storage,
    masters: &MasterKeys,
    settings: &OpenOptions,
    options: &CollectOptions,
) -> Result<CollectReport, PublishError> {
    let _lock = storage.lock(settings.lock_wait)?;
    let head = Head::load_ignoring_expiry(storage, fqrn, masters)?;
    let is_replica = storage.get_file(LAST_SNAPSHOT, MAX_STATUS)?.is_some();
    Place { fqrn, storage, manifest: &head.manifest, settings, is_replica }.collect(options)
}

/// A locked repository.
struct Place<'a> {
    fqrn: &'a str,
    storage: &'a dyn Storage,
    manifest: &'a Manifest,
    settings: &'a OpenOptions,
    /// A copy: what a stored catalog refers to must be there (publisher behaviour §13).
    is_replica: bool,
}

impl Place<'_> {
    fn collect(&self, options: &CollectOptions) -> Result<CollectReport, PublishError> {
        let started = Instant::now();
        if !self.manifest.garbage_collectable {
            return Err(PublishError::Usage(format!(
                "{0} does not allow garbage collection: it was made without --garbage-collectable, so all its \
                 revisions stay; what interrupted publishes left costs space and nothing else (`cvmfs-publish check` \
                 lists it); for another choice make a new repository with --garbage-collectable",
                self.fqrn
            )));
        }
        let scratch = self.storage.scratch()?;
        let reflog_file = scratch.file("reflog");
        let content = self.storage.get_file(storage::REFLOG, MAX_REFLOG)?.ok_or_else(|| {
            PublishError::damaged(
                storage::REFLOG,
                "is missing, so the old revisions are not known; publish once to make it anew",
            )
        })?;
        fs::write(&reflog_file, content).map_err(PublishError::local("write", &reflog_file))?;
        let mut reflog = Reflog::open_for_writing(&reflog_file).map_err(|e| in_reflog(&e))?;
        if reflog.fqrn() != self.fqrn {
            let reason = format!("belongs to the repository {:?}", reflog.fqrn());
            return Err(PublishError::damaged(storage::REFLOG, reason));
        }
        let references = reflog.references().map_err(|e| in_reflog(&e))?;

        let mut mark =
            Mark { place: self, scratch: &scratch, kept: HashSet::new(), catalogs: HashSet::new() };
        let kept = mark.revisions(options, &references)?;
        for root in kept.iter() {
            mark.tree(*root)?;
        }
        let Mark { kept: objects, catalogs, .. } = mark;

        let log = match &options.deletion_log {
            Some(path) => Some(DeletionLog::begin(path, (self.settings.clock)())?),
            None => None,
        };
        let mut sweep = Sweep {
            place: self,
            scratch: &scratch,
            kept: &objects,
            kept_catalogs: &catalogs,
            dry_run: options.dry_run,
            done: HashSet::new(),
            log,
            report: CollectReport {
                fqrn: self.fqrn.to_owned(),
                dry_run: options.dry_run,
                revisions_kept: kept.len() as u64,
                ..CollectReport::default()
            },
        };
        let mut gone = Vec::new();
        for reference in references.iter().filter(|reference| reference.kind == ReferenceKind::Catalog) {
            if !kept.contains(&reference.hash) {
                sweep.tree(reference.hash)?;
                sweep.report.revisions_removed += 1;
                gone.push(reference.hash);
            }
        }
        gone.extend(sweep.auxiliary(&references, &kept)?);
        if options.unreferenced {
            let listed: HashSet<ContentHash> = references.iter().map(|reference| reference.hash).collect();
            sweep.unreferenced(&listed, options.grace)?;
        }
        let Sweep { mut report, log, .. } = sweep;
        if let Some(log) = log {
            log.end((self.settings.clock)())?;
        }
        if !options.dry_run {
            for hash in gone {
                reflog.remove(hash).map_err(|e| in_reflog(&e))?;
            }
            reflog.finish().map_err(|e| in_reflog(&e))?;
            let content = fs::read(&reflog_file).map_err(PublishError::local("read", &reflog_file))?;
            self.storage.put_file(storage::REFLOG, &content)?;
            self.note_collection()?;
        }
        report.seconds = started.elapsed().as_secs_f64();
        Ok(report)
    }

    /// Writes the time into the status file, keeping what else it says.
    fn note_collection(&self) -> Result<(), PublishError> {
        let known = self.storage.get_file(storage::STATUS, MAX_STATUS)?.unwrap_or_default();
        let mut status: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(&known).unwrap_or_default();
        status.insert("last_gc".to_owned(), date((self.settings.clock)()).into());
        let content = serde_json::Value::Object(status).to_string();
        Ok(self.storage.put_file(storage::STATUS, content.as_bytes())?)
    }
}

/// The status file has two dates.
const MAX_STATUS: u64 = 64 << 10;

/// A Unix time as `date --utc` prints it.
pub(crate) fn date(unix: i64) -> String {
    const FORM: &[time::format_description::BorrowedFormatItem<'_>] = time::macros::format_description!(
        "[weekday repr:short] [month repr:short] [day padding:space] [hour]:[minute]:[second] UTC [year]"
    );
    let time = time::OffsetDateTime::from_unix_timestamp(unix).ok().and_then(|time| time.format(FORM).ok());
    time.unwrap_or_else(|| unix.to_string())
}

/// Digests without their kinds, as the C++ collector compares them: what has the digest of something that stays, stays.
type Digests = HashSet<ContentHash>;

struct Mark<'a> {
    place: &'a Place<'a>,
    scratch: &'a Scratch,
    kept: Digests,
    catalogs: HashSet<ContentHash>,
}

impl Mark<'_> {
    /// Root catalogs of the revisions that stay.
    fn revisions(
        &self,
        options: &CollectOptions,
        references: &[Reference],
    ) -> Result<HashSet<ContentHash>, PublishError> {
        let manifest = self.place.manifest;
        let now = (self.place.settings.clock)();
        let still_graced = now.saturating_sub(i64::try_from(options.grace.as_secs()).unwrap_or(i64::MAX));
        let logged: HashMap<ContentHash, i64> =
            references.iter().map(|reference| (reference.hash, reference.timestamp)).collect();
        let mut kept = HashSet::from([manifest.root_catalog]);
        for tag in tags(self.place.storage, manifest)? {
            let name = ObjectName::new(tag.root_catalog, ObjectKind::Catalog);
            // a replica has not what its source had collected before
            if !self.place.is_replica || self.place.storage.object_size(&name)?.is_some() {
                kept.insert(tag.root_catalog);
            }
        }
        for reference in references {
            // Also those beside the main line: branches, and publishes that were interrupted just now.
            let is_young = reference.kind == ReferenceKind::Catalog && reference.timestamp > still_graced;
            if is_young && !kept.contains(&reference.hash) && self.open(reference.hash).is_ok() {
                kept.insert(reference.hash);
            }
        }
        let has_rule = options.keep_revisions.is_some() || options.keep_since.is_some();
        let mut hash = manifest.root_catalog;
        let mut catalog = self.open(hash)?;
        let mut seen = HashSet::from([hash]);
        for depth in 0_u64.. {
            let Some(previous) = catalog.previous().filter(|previous| !previous.is_null()) else { break };
            let modified = i64::try_from(catalog.last_modified()).unwrap_or(i64::MAX);
            let replaced_at = logged.get(&hash).copied().unwrap_or(modified);
            let by_rule = has_rule
                && options.keep_revisions.is_none_or(|count| depth < count)
                && options.keep_since.is_none_or(|since| replaced_at >= since);
            if !(by_rule || replaced_at > still_graced) || !seen.insert(previous) {
                break;
            }
            // Collected before: the line of predecessors ends here.
            let Ok(opened) = self.open(previous) else { break };
            kept.insert(previous);
            (hash, catalog) = (previous, opened);
        }
        Ok(kept)
    }

    /// Marks what a revision refers to. Catalogs that revisions share are read once.
    fn tree(&mut self, root: ContentHash) -> Result<(), PublishError> {
        let mut waiting = vec![root];
        while let Some(hash) = waiting.pop() {
            self.kept.insert(hash);
            if !self.catalogs.insert(hash) {
                continue;
            }
            self.place.settings.interrupt.check()?;
            let catalog = self.open(hash)?;
            let counters = &self.place.settings.counters;
            each_object(&catalog, hash, |name| {
                counters.entries.fetch_add(1, Ordering::Relaxed);
                self.kept.insert(name.hash);
            })?;
            let nested = catalog.nested().map_err(|error| damaged(hash, &error))?;
            waiting.extend(nested.into_iter().map(|nested| nested.hash));
        }
        Ok(())
    }

    fn open(&self, hash: ContentHash) -> Result<Catalog, PublishError> {
        open_catalog(self.place, self.scratch, hash)
    }
}

/// Unpacks and opens a catalog; its file is unlinked at once.
fn open_catalog(place: &Place<'_>, scratch: &Scratch, hash: ContentHash) -> Result<Catalog, PublishError> {
    let file = scratch.file("catalog");
    let _ = fs::remove_file(&file);
    unpack_database(place.storage, ObjectName::new(hash, ObjectKind::Catalog), &file)?;
    let catalog = Catalog::open(&file).map_err(|error| damaged(hash, &error))?;
    let _ = fs::remove_file(&file);
    Ok(catalog)
}

fn damaged(catalog: ContentHash, error: &dyn std::error::Error) -> PublishError {
    PublishError::damaged(ObjectName::new(catalog, ObjectKind::Catalog).path(), chain(error))
}

/// Every file object and chunk that the rows of a catalog name. External files are not in the storage.
fn each_object(
    catalog: &Catalog,
    hash: ContentHash,
    mut visit: impl FnMut(ObjectName),
) -> Result<(), PublishError> {
    let mut chunked = Vec::new();
    catalog
        .for_each(|entry| {
            let entry = entry?;
            if !entry.is_external() {
                if let Some(hash) = entry.hash {
                    visit(ObjectName::new(hash, ObjectKind::File));
                }
                if entry.is_chunked() {
                    chunked.push((entry.path_hash, entry.algorithm()));
                }
            }
            Ok(())
        })
        .map_err(|error| damaged(hash, &error))?;
    for (path, algorithm) in chunked {
        for chunk in catalog.chunks(path, algorithm).map_err(|error| damaged(hash, &error))? {
            visit(ObjectName::new(chunk.hash, ObjectKind::Chunk));
        }
    }
    Ok(())
}

struct Sweep<'a> {
    place: &'a Place<'a>,
    scratch: &'a Scratch,
    kept: &'a Digests,
    kept_catalogs: &'a HashSet<ContentHash>,
    dry_run: bool,
    /// Deleted already, or found not to be there.
    done: HashSet<ObjectName>,
    log: Option<DeletionLog>,
    report: CollectReport,
}

impl Sweep<'_> {
    /// Takes a revision apart, what is below first.
    fn tree(&mut self, root: ContentHash) -> Result<(), PublishError> {
        enum Step {
            Enter(ContentHash),
            Leave(ContentHash),
        }
        let mut waiting = vec![Step::Enter(root)];
        let mut entered = HashSet::new();
        while let Some(step) = waiting.pop() {
            self.place.settings.interrupt.check()?;
            match step {
                Step::Leave(hash) => self.delete(ObjectName::new(hash, ObjectKind::Catalog))?,
                Step::Enter(hash) => {
                    let name = ObjectName::new(hash, ObjectKind::Catalog);
                    if self.kept_catalogs.contains(&hash)
                        || self.done.contains(&name)
                        || !entered.insert(hash)
                    {
                        continue;
                    }
                    let catalog = match open_catalog(self.place, self.scratch, hash) {
                        Ok(catalog) => catalog,
                        Err(error) => {
                            // What only it referred to stays until `unreferenced` finds it.
                            tracing::warn!(object = name.path(), error = %chain(&error), "cannot be taken apart");
                            waiting.push(Step::Leave(hash));
                            continue;
                        }
                    };
                    let mut objects = Vec::new();
                    let read = each_object(&catalog, hash, |name| objects.push(name))
                        .and_then(|()| catalog.nested().map_err(|error| damaged(hash, &error)));
                    if self.place.is_replica {
                        // first: as long as it is there, a replication believes that all below is
                        self.delete(name)?;
                    }
                    waiting.push(Step::Leave(hash));
                    match read {
                        Ok(nested) => {
                            waiting.extend(nested.into_iter().map(|nested| Step::Enter(nested.hash)));
                        }
                        Err(error) => {
                            tracing::warn!(object = name.path(), error = %chain(&error), "cannot be read wholly");
                        }
                    }
                    self.delete_all(objects)?;
                }
            }
        }
        Ok(())
    }

    /// Certificates, histories and metainfo from before the oldest revision that stays; returns what goes.
    fn auxiliary(
        &mut self,
        references: &[Reference],
        kept: &HashSet<ContentHash>,
    ) -> Result<Vec<ContentHash>, PublishError> {
        let oldest = references
            .iter()
            .filter(|reference| reference.kind == ReferenceKind::Catalog && kept.contains(&reference.hash))
            .map(|reference| reference.timestamp)
            .min();
        let Some(oldest) = oldest else { return Ok(Vec::new()) };
        let manifest = self.place.manifest;
        let current = [manifest.certificate, manifest.history, manifest.metainfo];
        let mut gone = Vec::new();
        for reference in references {
            let is_auxiliary = reference.kind != ReferenceKind::Catalog;
            if is_auxiliary && reference.timestamp < oldest && !current.contains(&Some(reference.hash)) {
                self.delete(ObjectName::new(reference.hash, reference.kind.object_kind()))?;
                gone.push(reference.hash);
            }
        }
        Ok(gone)
    }

    /// Objects that nothing refers to and that are older than the grace: a publish, a replication or a check that
    /// is under way elsewhere may need younger ones.
    fn unreferenced(&mut self, listed: &HashSet<ContentHash>, grace: Duration) -> Result<(), PublishError> {
        let mut found = Vec::new();
        let limit =
            (self.place.settings.clock)().saturating_sub(grace.as_secs().try_into().unwrap_or(i64::MAX));
        self.place.storage.list_objects(&mut |object| {
            // What is not named like an object is not ours to delete.
            let Some(name) = ObjectName::from_path(&object.path) else { return };
            if object.modified <= limit && !self.kept.contains(&name.hash) && !listed.contains(&name.hash) {
                found.push(name);
            }
        })?;
        let before = self.report.objects_removed;
        self.delete_all(found)?;
        self.report.unreferenced_removed = self.report.objects_removed - before;
        Ok(())
    }

    fn delete(&mut self, name: ObjectName) -> Result<(), PublishError> {
        self.delete_all(vec![name])
    }

    /// Deletes what nothing needs among `names`, several at the same time: a store across a network mostly waits.
    fn delete_all(&mut self, names: Vec<ObjectName>) -> Result<(), PublishError> {
        let (kept, done) = (self.kept, &mut self.done);
        let gone: Vec<ObjectName> =
            names.into_iter().filter(|name| !kept.contains(&name.hash) && done.insert(*name)).collect();
        let (place, dry_run) = (self.place, self.dry_run);
        let next = AtomicUsize::new(0);
        let deleted: Mutex<Vec<(usize, u64)>> = Mutex::default();
        let failure: Mutex<Option<PublishError>> = Mutex::default();
        let work = || {
            while let Some((index, name)) = {
                let index = next.fetch_add(1, Ordering::Relaxed);
                gone.get(index).map(|name| (index, name))
            } {
                match delete_one(place, name, dry_run) {
                    Ok(None) => {}
                    Ok(Some(size)) => {
                        deleted.lock().unwrap_or_else(PoisonError::into_inner).push((index, size));
                    }
                    Err(error) => {
                        next.store(gone.len(), Ordering::Relaxed);
                        failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                        return;
                    }
                }
            }
        };
        match place.storage.writers().min(gone.len()) {
            0 | 1 => work(),
            threads => std::thread::scope(|scope| {
                for _ in 0..threads {
                    scope.spawn(work);
                }
            }),
        }
        let mut deleted = deleted.into_inner().unwrap_or_else(PoisonError::into_inner);
        deleted.sort_unstable();
        for (index, size) in deleted {
            if let Some(log) = &mut self.log {
                log.note(&gone[index])?;
            }
            self.report.objects_removed += 1;
            self.report.bytes_removed += size;
        }
        failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }
}

/// The stored size of an object that is not there any more; nothing if it was not there.
fn delete_one(place: &Place<'_>, name: &ObjectName, dry_run: bool) -> Result<Option<u64>, PublishError> {
    place.settings.interrupt.check()?;
    let Some(size) = place.storage.object_size(name)? else { return Ok(None) };
    if !dry_run {
        place.storage.delete_object(name)?;
        place.settings.counters.removed_objects.fetch_add(1, Ordering::Relaxed);
    }
    Ok(Some(size))
}

/// The names of what was deleted, in the C++ tools' form. Also written by a dry run.
struct DeletionLog {
    path: PathBuf,
    file: BufWriter<File>,
}

impl DeletionLog {
    fn begin(path: &Path, now: i64) -> Result<DeletionLog, PublishError> {
        let file = File::options().create(true).append(true).open(path);
        let file = BufWriter::new(file.map_err(PublishError::local("open", path))?);
        let mut log = DeletionLog { path: path.to_owned(), file };
        log.line(format_args!("# Garbage Collection started at {}", date(now)))?;
        Ok(log)
    }

    fn note(&mut self, name: &ObjectName) -> Result<(), PublishError> {
        self.line(format_args!("{name}"))
    }

    fn end(mut self, now: i64) -> Result<(), PublishError> {
        self.line(format_args!("# Garbage Collection finished at {}\n", date(now)))?;
        self.file.flush().map_err(PublishError::local("write", &self.path))
    }

    fn line(&mut self, text: std::fmt::Arguments<'_>) -> Result<(), PublishError> {
        writeln!(self.file, "{text}").map_err(PublishError::local("write", &self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_written_as_date_prints_them() {
        assert_eq!(date(1_704_067_200), "Mon Jan  1 00:00:00 UTC 2024");
    }
}
