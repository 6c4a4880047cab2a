//! Publishing: a locked repository, and transactions on it.
//!
//! ```no_run
//! use std::path::Path;
//! use cvmfs_publish::{IngestOptions, Publisher, Whiteouts};
//!
//! let mut publisher = Publisher::open("example.org", "/srv/cvmfs/example.org", Path::new("/etc/cvmfs/keys"))?;
//! if !publisher.exists(b"/layers/ab")? {
//!     let archive = std::fs::File::open("layer.tar").map_err(cvmfs_publish::PublishError::Input)?;
//!     let options = IngestOptions { catalog: true, whiteouts: Whiteouts::Overlay, ..IngestOptions::default() };
//!     let mut transaction = publisher.begin()?;
//!     transaction.ingest_tar(b"/layers/ab", archive, &options)?;
//!     let report = transaction.commit(Some("with-ab"))?;
//!     println!("revision {}", report.revision);
//! }
//! # Ok::<(), cvmfs_publish::PublishError>(())
//! ```

use std::io::Read;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cvmfs_format::catalog::EntryKind;
use cvmfs_format::signature::MasterKeys;
use cvmfs_format::{ContentHash, HashAlgorithm};
use layer_tar::{LayerPath, Timestamp};

use crate::apply::Apply;
use crate::balance::{Balance, CatalogLimits, dirtab_entry, divide_tree};
use crate::commit::{Commit, Signer, check_tag_name};
use crate::error::{PublishError, shown};
use crate::head::Head;
use crate::ingest::{IngestOptions, IngestReport, Owner, Sink, XdirHardLinks, read_directory, read_tar};
use crate::interrupt::Interrupt;
use crate::keys::{KeyFiles, ReleaseKeys};
use crate::path::{RepositoryPath, parent_of};
use crate::pipeline::{Counters, Encoding, Pipeline};
use crate::settings::{Settings, validated};
use crate::stack::Stack;
use crate::storage::{self, Storage, StorageLock};
use crate::tree::{Existing, LayerTree, Lookup, Meta};
use crate::workspace::{MARKER, Workspace, joined};

/// How long a second publisher waits for the first by default.
pub const DEFAULT_LOCK_WAIT: Duration = Duration::from_secs(60);
/// From this long before a whitelist's expiry on, every publish says so.
const EXPIRY_WARNING: i64 = 7 * 24 * 3600;

/// Unix time; injectable for tests.
pub type Clock = fn() -> i64;

/// Unix time of the system clock.
pub fn system_clock() -> i64 {
    time::OffsetDateTime::now_utc().unix_timestamp()
}

/// How to open a publisher.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// How long to wait for another publisher.
    pub lock_wait: Duration,
    /// Stops the work when asked to.
    pub interrupt: Interrupt,
    /// Where progress is counted.
    pub counters: Arc<Counters>,
    /// When catalogs are divided.
    pub catalog_limits: CatalogLimits,
    /// Whether nanoseconds of modification times are recorded in a repository that does not say so itself.
    pub nanoseconds: Option<bool>,
    /// Seconds that clients keep the manifest of what is published; `None`: as before.
    pub ttl: Option<u32>,
    /// Source of time.
    pub clock: Clock,
}

impl Default for OpenOptions {
    fn default() -> OpenOptions {
        OpenOptions {
            lock_wait: DEFAULT_LOCK_WAIT,
            interrupt: Interrupt::default(),
            counters: Arc::default(),
            catalog_limits: CatalogLimits::default(),
            nanoseconds: None,
            ttl: None,
            clock: system_clock,
        }
    }
}

/// A repository that this process alone may change, until it is dropped.
#[derive(Debug)]
pub struct Publisher {
    pub(crate) fqrn: String,
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) keys: ReleaseKeys,
    pub(crate) masters: MasterKeys,
    pub(crate) head: Head,
    pub(crate) settings: Settings,
    pub(crate) options: OpenOptions,
    /// Catalogs opened to answer [`Publisher::exists`].
    looked_up: Mutex<Option<Workspace>>,
    _lock: Box<dyn StorageLock>,
}

impl Publisher {
    /// Opens the repository `fqrn` in `storage` with the keys in `keys`, see [`OpenOptions::default`].
    pub fn open(fqrn: &str, storage: &str, keys: &Path) -> Result<Publisher, PublishError> {
        Publisher::open_with(fqrn, storage, keys, OpenOptions::default())
    }

    /// Checks the keys, takes the lock, and verifies the published state: manifest, certificate, whitelist. The
    /// certificate of the given keys must be on the whitelist, or clients would refuse the result.
    pub fn open_with(
        fqrn: &str,
        storage: &str,
        keys: &Path,
        options: OpenOptions,
    ) -> Result<Publisher, PublishError> {
        let files = KeyFiles::new(keys, fqrn);
        let storage = storage::open(storage)?;
        let masters = files.public()?;
        let keys = files.release()?;
        let lock = storage.lock(options.lock_wait)?;
        let head = verified_head(&*storage, fqrn, &masters, &keys, (options.clock)())?;
        let settings = match head.metainfo(&*storage)? {
            Some(metainfo) => Settings::from_metainfo(&metainfo),
            None => Settings::foreign(),
        };
        Ok(Publisher {
            fqrn: fqrn.to_owned(),
            storage,
            keys,
            masters,
            head,
            settings,
            options,
            looked_up: Mutex::default(),
            _lock: lock,
        })
    }

    /// The published state that the next transaction builds on.
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// How this repository is published.
    pub fn settings(&self) -> Settings {
        self.settings
    }

    /// Whether the published revision has an entry at `path`.
    pub fn exists(&self, path: &[u8]) -> Result<bool, PublishError> {
        let path = RepositoryPath::parse(path)?;
        let mut looked_up = self.looked_up.lock().unwrap_or_else(PoisonError::into_inner);
        let workspace = match looked_up.take() {
            Some(workspace) => workspace,
            None => Workspace::open(self.storage.clone(), self.head.manifest.root_catalog)?,
        };
        let workspace = looked_up.insert(workspace);
        Ok(workspace.lookup(path.as_bytes())?.is_some())
    }

    /// Whether the next revision can be called `tag`: what a commit would refuse is better known before the work.
    ///
    /// # Errors
    /// [`PublishError::Usage`] if the name is not possible, or taken.
    pub fn require_new_tag(&self, tag: &str) -> Result<(), PublishError> {
        check_tag_name(tag)?;
        let scratch = self.storage.scratch()?;
        Signer::of(self).require_free_tag(tag, &self.head.manifest, &scratch)
    }

    /// Begins a transaction on the published revision. Dropping it without a commit publishes nothing, and removes
    /// the objects that only it has stored, as far as the storage can tell.
    pub fn begin(&mut self) -> Result<Transaction<'_>, PublishError> {
        let mut workspace = Workspace::open(self.storage.clone(), self.head.manifest.root_catalog)?;
        let old_dirtab = dirtab_entry(&mut workspace)?.and_then(|entry| entry.hash);
        let counters = self.options.counters.clone();
        let pipeline = Pipeline::start(self.storage.clone(), counters, self.settings.chunks.max);
        static TRANSACTIONS: AtomicU64 = AtomicU64::new(0);
        let number = TRANSACTIONS.fetch_add(1, Ordering::Relaxed);
        let started = Instant::now();
        Ok(Transaction {
            number,
            publisher: self,
            workspace,
            pipeline,
            started,
            old_dirtab,
            unfinished: false,
        })
    }

    fn encoding(&self, options: &IngestOptions) -> Encoding {
        Encoding {
            algorithm: self.head.manifest.root_catalog.algorithm,
            compression: options.compression.unwrap_or(self.settings.compression),
            deflate: options.deflate.unwrap_or(self.settings.deflate),
        }
    }

    pub(crate) fn forget_lookups(&mut self) {
        *self.looked_up.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

fn verified_head(
    storage: &dyn Storage,
    fqrn: &str,
    masters: &MasterKeys,
    keys: &ReleaseKeys,
    now: i64,
) -> Result<Head, PublishError> {
    let head = Head::load(storage, fqrn, masters, now)?;
    if !head.whitelist.lists(&keys.certificate) {
        return Err(PublishError::Trust(format!(
            "the certificate {fqrn}.crt is not on the repository's whitelist: clients would refuse what it signs; run `cvmfs-publish resign`"
        )));
    }
    let left = head.whitelist.expires_unix().saturating_sub(now);
    if left < EXPIRY_WARNING {
        let expires = head.whitelist.expires;
        tracing::warn!("the whitelist of {fqrn} expires on {expires}: run `cvmfs-publish resign`");
    }
    Ok(head)
}

/// What a commit published: the keys of `ingest --json`.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct CommitReport {
    /// Repository name.
    pub fqrn: String,
    /// Number of the new revision.
    pub revision: u64,
    /// Hash of the new root catalog.
    pub root_hash: String,
    /// Entries read from archives and trees.
    pub entries: u64,
    /// Objects that were not in the storage before, catalogs included.
    pub new_objects: u64,
    /// Plain bytes of file contents read.
    pub bytes_in: u64,
    /// Stored bytes of the new objects.
    pub bytes_stored: u64,
    /// Time since the transaction began.
    pub seconds: f64,
}

/// Changes that become one revision, or nothing.
#[derive(Debug)]
pub struct Transaction<'p> {
    /// What was read in one cannot be applied to another.
    number: u64,
    publisher: &'p mut Publisher,
    workspace: Workspace,
    pipeline: Pipeline,
    started: Instant,
    /// Content of `/.cvmfsdirtab` before the transaction.
    old_dirtab: Option<ContentHash>,
    /// A change of the catalogs began and did not end: they must not be published.
    unfinished: bool,
}

impl Transaction<'_> {
    /// Ingests an uncompressed tar stream (see [`crate::decompress`]) below `base`, merging it with what is there.
    ///
    /// After an error of the archive itself the transaction is as it was before and can go on.
    pub fn ingest_tar(
        &mut self,
        base: &[u8],
        reader: impl Read + Send,
        options: &IngestOptions,
    ) -> Result<IngestReport, PublishError> {
        let prepared = self.read_tar(base, reader, options)?;
        self.apply(prepared)
    }

    /// The first half of [`Transaction::ingest_tar`]: reads the archive, whose contents are on their way into the
    /// storage then. Whoever has several archives reads the next one before applying the one before, so that the
    /// processors never wait for the last contents of an archive. What lies below the base must not change in between.
    ///
    /// After an error the transaction is as it was before.
    pub fn read_tar(
        &mut self,
        base: &[u8],
        reader: impl Read + Send,
        options: &IngestOptions,
    ) -> Result<Prepared, PublishError> {
        self.read(base, options, |existing, tree, sink| read_tar(reader, existing, tree, sink))
    }

    /// Ingests the content of a local directory below `base`, merging it with what is there.
    pub fn ingest_tree(
        &mut self,
        base: &[u8],
        directory: &Path,
        options: &IngestOptions,
    ) -> Result<IngestReport, PublishError> {
        let prepared = self.read(base, options, |_, tree, sink| read_directory(directory, tree, sink))?;
        self.apply(prepared)
    }

    /// Makes at `base` the tree that overlayfs shows for `layers`, directories of this repository, the lowest first;
    /// a catalog of its own. Rows are copied, contents shared. `base` must not exist. Returns the number of entries.
    pub fn stack_layers(&mut self, base: &[u8], layers: &[&[u8]]) -> Result<u64, PublishError> {
        if self.exists(base)? {
            let base = shown(RepositoryPath::parse(base)?.as_bytes());
            return Err(PublishError::Usage(format!("{base} is there already")));
        }
        // An archive without entries makes the directory and its catalog.
        self.ingest_tar(base, &[0_u8; 1024][..], &IngestOptions::of_layer())?;
        let base = RepositoryPath::parse(base)?;
        let layers = layers.iter().map(|path| RepositoryPath::parse(path)).collect::<Result<Vec<_>, _>>()?;
        let layers: Vec<&[u8]> = layers.iter().map(RepositoryPath::as_bytes).collect();
        let was_unfinished = std::mem::replace(&mut self.unfinished, true);
        let interrupt = &self.publisher.options.interrupt;
        let mut stack = Stack { workspace: &mut self.workspace, interrupt, entries: 0 };
        stack.at(base.as_bytes(), &layers)?;
        let entries = stack.entries;
        self.unfinished = was_unfinished;
        Ok(entries)
    }

    /// Whether it can be committed. A change of the catalogs that failed halfway makes it useless: it is to be dropped.
    pub fn is_sound(&self) -> bool {
        !self.unfinished
    }

    /// Whether there is an entry at `path` with the changes so far.
    pub fn exists(&mut self, path: &[u8]) -> Result<bool, PublishError> {
        let path = RepositoryPath::parse(path)?;
        Ok(self.workspace.lookup(path.as_bytes())?.is_some())
    }

    /// Removes an entry, a directory with everything below it. It must exist.
    pub fn delete(&mut self, path: &[u8]) -> Result<(), PublishError> {
        let path = RepositoryPath::parse(path)?;
        if path.is_root() {
            return Err(PublishError::Usage("the root of the repository cannot be deleted".to_owned()));
        }
        let at = self.workspace.row_catalog(path.as_bytes())?;
        let Some(entry) = self.workspace.row(at, path.as_bytes())? else {
            let fqrn = &self.publisher.fqrn;
            return Err(PublishError::NotFound(format!("there is no {path} in {fqrn} to delete")));
        };
        let was_unfinished = std::mem::replace(&mut self.unfinished, true);
        let bytes = path.as_bytes();
        if entry.is_directory() {
            self.workspace.remove_tree(at, bytes, &entry)?;
            let parent = parent_of(bytes);
            let above = self.workspace.row_catalog(parent)?;
            self.workspace.update_directory(above, parent, |parent| {
                parent.link_count = parent.link_count.saturating_sub(1).max(2);
            })?;
        } else {
            self.workspace.remove_leaf(at, bytes, &entry)?;
            if entry.name == MARKER {
                self.workspace.merge(parent_of(bytes))?;
            }
        }
        self.unfinished = was_unfinished;
        Ok(())
    }

    /// Publishes the changes as one new revision, also if there are none. `tag` names it in the history.
    ///
    /// The manifest is replaced last; until then, and after any error, the old revision is the published one.
    pub fn commit(self, tag: Option<&str>) -> Result<CommitReport, PublishError> {
        if let Some(tag) = tag {
            check_tag_name(tag)?;
        }
        if self.unfinished {
            return Err(PublishError::damaged(
                "transaction",
                "a change has failed before, so nothing is published",
            ));
        }
        self.pipeline.wait()?;
        let Transaction { publisher, mut workspace, pipeline, started, old_dirtab, .. } = self;
        // From here on the manifest may be replaced, whatever else fails: the objects belong to the repository.
        pipeline.keep();
        drop(pipeline);
        publisher.options.interrupt.check()?;
        let balance = Balance {
            workspace: &mut workspace,
            signer: &Signer::of(publisher),
            encoding: publisher.encoding(&IngestOptions::default()),
            limits: publisher.options.catalog_limits,
            now: (publisher.options.clock)(),
            old_dirtab,
        };
        balance.run()?;
        let head = Commit { publisher: &*publisher, workspace }.publish(tag)?;
        publisher.head = head;
        publisher.forget_lookups();
        let counters = &publisher.options.counters;
        Ok(CommitReport {
            fqrn: publisher.fqrn.clone(),
            revision: publisher.head.manifest.revision,
            root_hash: publisher.head.manifest.root_catalog.to_string(),
            entries: counters.entries.load(Ordering::Relaxed),
            new_objects: counters.new_objects.load(Ordering::Relaxed),
            bytes_in: counters.bytes_in.load(Ordering::Relaxed),
            bytes_stored: counters.bytes_stored.load(Ordering::Relaxed),
            seconds: started.elapsed().as_secs_f64(),
        })
    }

    fn read(
        &mut self,
        base: &[u8],
        options: &IngestOptions,
        read: impl FnOnce(&mut Lookup<'_>, &mut LayerTree, &mut Sink<'_>) -> Result<(), PublishError>,
    ) -> Result<Prepared, PublishError> {
        let base = RepositoryPath::parse(base)?;
        if options.catalog && base.is_root() {
            let reason = "the repository's root is a catalog already: --catalog needs a --base below it";
            return Err(PublishError::Usage(reason.to_owned()));
        }
        let settings = self.publisher.settings;
        let encoding = self.publisher.encoding(options);
        let now = ((self.publisher.options.clock)(), 0);
        let mut tree = LayerTree::new(now);
        let mut sink = Sink {
            pipeline: &self.pipeline,
            counters: &self.publisher.options.counters,
            interrupt: &self.publisher.options.interrupt,
            encoding,
            chunk_sizes: validated(options.chunk_sizes.unwrap_or(settings.chunks))?,
            options,
            report: IngestReport::default(),
        };
        let workspace = &mut self.workspace;
        let is_new = workspace.lookup(base.as_bytes())?.is_none();
        let mut existing = |path: &LayerPath| match is_new {
            true => Ok(Existing::Nothing),
            false => existing_at(workspace, &joined(base.as_bytes(), path.as_bytes())),
        };
        read(&mut existing, &mut tree, &mut sink)?;
        tree.finish()?;
        if options.xdir_hard_links == XdirHardLinks::Refuse {
            tree.refuse_links_across_directories()?;
        }
        if options.catalog && self.workspace.lookup(&joined(base.as_bytes(), MARKER))?.is_none() {
            tree.add_marker(MARKER, marker_meta(options, now), sink.store_empty()?);
        }
        divide_tree(
            &mut tree,
            self.publisher.options.catalog_limits,
            || sink.store_empty(),
            |path| Ok(self.workspace.lookup(&joined(base.as_bytes(), path.as_bytes()))?.is_some()),
        )?;
        let report = sink.report;
        let nanoseconds = match self.publisher.options.nanoseconds {
            Some(wanted) if !settings.is_recorded => wanted,
            _ => settings.nanoseconds,
        };
        let pieces = self.pipeline.submitted();
        let transaction = self.number;
        Ok(Prepared {
            transaction,
            base,
            tree,
            pieces,
            algorithm: encoding.algorithm,
            nanoseconds,
            now,
            report,
        })
    }

    /// The second half of [`Transaction::ingest_tar`]: puts into the catalogs what was read.
    pub fn apply(&mut self, prepared: Prepared) -> Result<IngestReport, PublishError> {
        let Prepared { transaction, base, tree, pieces, algorithm, nanoseconds, now, report } = prepared;
        if transaction != self.number {
            return Err(PublishError::Usage(
                "an archive is applied to a transaction that has not read it".into(),
            ));
        }
        self.pipeline.wait_for(pieces)?;
        self.publisher.options.interrupt.check()?;
        tracing::debug!(base = %shown(base.as_bytes()), entries = report.entries, "archive read, applying it");
        let was_unfinished = std::mem::replace(&mut self.unfinished, true);
        let (workspace, pipeline) = (&mut self.workspace, &self.pipeline);
        Apply { workspace, pipeline, tree: &tree, algorithm, nanoseconds, now }.at(&base)?;
        self.unfinished = was_unfinished;
        Ok(report)
    }
}

/// An archive that was read ([`Transaction::read_tar`]) and is not yet in the catalogs.
#[derive(Debug)]
#[must_use = "what is not applied is not published"]
pub struct Prepared {
    transaction: u64,
    base: RepositoryPath,
    tree: LayerTree,
    /// Pieces handed to the pipeline up to its end.
    pieces: usize,
    algorithm: HashAlgorithm,
    nanoseconds: bool,
    now: Timestamp,
    report: IngestReport,
}

impl Prepared {
    /// What was read.
    pub fn report(&self) -> &IngestReport {
        &self.report
    }
}

/// What is at `path` in the repository, for links to be followed.
fn existing_at(workspace: &mut Workspace, path: &[u8]) -> Result<Existing, PublishError> {
    Ok(match workspace.lookup(path)? {
        None => Existing::Nothing,
        Some(entry) => match entry.kind() {
            EntryKind::Directory => Existing::Directory,
            EntryKind::Symlink => Existing::Symlink(entry.symlink),
            _ => Existing::Other,
        },
    })
}

fn marker_meta(options: &IngestOptions, now: Timestamp) -> Meta {
    let (uid, gid) = match options.owner {
        Owner::Keep => (0, 0),
        Owner::Fixed(uid, gid) => (uid, gid),
    };
    Meta { permissions: 0o644, uid, gid, ..Meta::implied_directory(now) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_publisher_and_its_transaction_may_move_between_threads() {
        fn assert_send<T: Send>() {}
        assert_send::<Publisher>();
        assert_send::<Transaction<'_>>();
    }
}
