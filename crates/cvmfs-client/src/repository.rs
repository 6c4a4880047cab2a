//! A repository as others use it: the current snapshot, and how it moves forward.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use cvmfs_format::{Compression, ContentHash, ObjectKind, ObjectName};
use serde::Serialize;

use crate::authz::{Authorization, Caller, Credentials, Denial};
use crate::clock::Clock;
use crate::config::ClientSettings;
use crate::deadline::Deadline;
use crate::error::ClientError;
use crate::snapshot::{EntryCounts, Pin, Snapshot};
use crate::store::ObjectStore;
use crate::trust::{self, TrustError};

/// Older snapshots that stay readable for files and directories opened before an update.
pub const MAX_OLDER_SNAPSHOTS: usize = 8;

/// Time to reach a server and verify the chain of trust at mount: three small files. Shorter
/// than a mount may take, so that servers that hang leave time for the last good revision.
pub const VERIFY_DEADLINE: Duration = Duration::from_secs(12);

/// Time to load the root catalog at mount.
pub const OPEN_DEADLINE: Duration = Duration::from_secs(30);

/// A whitelist that expires within this many days is a warning: its owner has to sign it again, and usually does so
/// a month ahead.
const WHITELIST_WARNING_DAYS: i64 = 7;

/// A repository followed by this process.
#[derive(Debug)]
pub struct Repository {
    settings: ClientSettings,
    store: ObjectStore,
    clock: Arc<dyn Clock>,
    authorization: Authorization,
    state: RwLock<State>,
    older: Mutex<VecDeque<Arc<Snapshot>>>,
    refresh_turn: Mutex<()>,
}

#[derive(Debug)]
struct State {
    snapshot: Arc<Snapshot>,
    /// Whether the revision stays, because the configuration or an administrator chose it.
    fixed: bool,
    /// Upper bound of the time until the next look.
    max_ttl: Option<Duration>,
    whitelist_expires: Option<i64>,
    last_error: Option<String>,
    /// Why the revision in use must not be used any more.
    refused: Option<Arc<TrustError>>,
    online: bool,
}

/// Outcome of looking for a newer revision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refreshed {
    /// The server still has the revision that is in use.
    UpToDate,
    /// A newer revision is in use now.
    Updated,
}

/// What `status` shows of a repository.
#[derive(Debug, Clone, Serialize)]
pub struct RepositoryStatus {
    /// Name of the repository.
    pub fqrn: String,
    /// Revision in use.
    pub revision: u64,
    /// Root catalog in use.
    pub root_hash: String,
    /// Whether the last attempt to look for a newer revision reached a server.
    pub online: bool,
    /// Whether the revision is fixed by the configuration or by an administrator.
    pub fixed: bool,
    /// Unix time at which the whitelist expires, if it was read.
    pub whitelist_expires: Option<i64>,
    /// Whole days until then; negative once it is over.
    pub whitelist_days: Option<i64>,
    /// Why the revision in use is refused, if it was blacklisted while mounted.
    pub refused: Option<String>,
    /// The last error of an update, if the last attempt failed.
    pub last_error: Option<String>,
    /// What an administrator should see to, although everything works.
    pub warnings: Vec<String>,
}

impl Repository {
    /// Pins the revision that the configuration asks for: by default the newest one that a server offers and that
    /// can be verified, or the last good one if that is not possible and its root catalog is cached.
    ///
    /// # Errors
    /// If neither is possible: no server answers, the chain of trust is broken, or the root
    /// catalog is not readable.
    pub fn open(settings: ClientSettings, clock: Arc<dyn Clock>) -> Result<Repository, ClientError> {
        let store = ObjectStore::open(&settings)?;
        let deadline = Deadline::after(VERIFY_DEADLINE);
        let (pin, whitelist_expires, offline) =
            match trust::fixed(&store, &settings, clock.as_ref(), deadline)? {
                Some(fixed) => (fixed.pin, fixed.whitelist_expires, fixed.offline),
                None => {
                    let trusted = trust::verify_or_last_good(&store, &settings, clock.as_ref(), deadline)?;
                    let expires = (!trusted.offline).then_some(trusted.whitelist_expires);
                    (pin_of(&trusted.manifest), expires, trusted.offline)
                }
            };
        let repository = Repository::pinned(settings, store, clock, pin)?;
        let revision = repository.snapshot().pinned().revision;
        trust::check_revision(&repository.settings, revision)?;
        let mut state = repository.state.write().unwrap_or_else(PoisonError::into_inner);
        state.whitelist_expires = whitelist_expires;
        state.online = !offline;
        drop(state);
        Ok(repository)
    }

    /// Pins a revision that a predecessor of this process had verified, without a server.
    ///
    /// # Errors
    /// If the root catalog is neither cached nor to be had.
    pub fn resume(
        settings: ClientSettings,
        clock: Arc<dyn Clock>,
        pin: Pin,
    ) -> Result<Repository, ClientError> {
        let store = ObjectStore::open(&settings)?;
        Repository::pinned(settings, store, clock, pin)
    }

    fn pinned(
        settings: ClientSettings,
        store: ObjectStore,
        clock: Arc<dyn Clock>,
        pin: Pin,
    ) -> Result<Repository, ClientError> {
        let deadline = Deadline::after(OPEN_DEADLINE);
        if settings.alternative_root && settings.selection.is_fixed() {
            load_alternative_root(&settings, &store, pin, deadline)?;
        }
        let snapshot = Arc::new(Snapshot::pin(&settings.fqrn, &store, pin, None, deadline)?);
        let state = State {
            snapshot,
            fixed: settings.selection.is_fixed(),
            max_ttl: settings.max_ttl,
            whitelist_expires: None,
            last_error: None,
            refused: None,
            online: true,
        };
        Ok(Repository {
            authorization: Authorization::new(&settings.fqrn, settings.authorization.clone()),
            settings,
            store,
            clock,
            state: RwLock::new(state),
            older: Mutex::new(VecDeque::new()),
            refresh_turn: Mutex::new(()),
        })
    }

    /// The revision in use. Callers that do several look-ups for one purpose keep it.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.state.read().unwrap_or_else(PoisonError::into_inner).snapshot.clone()
    }

    /// Snapshots used before the current one, newest first.
    pub fn older_snapshots(&self) -> Vec<Arc<Snapshot>> {
        self.older.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// The settings the repository was opened with.
    pub fn settings(&self) -> &ClientSettings {
        &self.settings
    }

    /// Cache and network of this repository.
    pub fn store(&self) -> &ObjectStore {
        &self.store
    }

    /// How long the current revision may be relied upon before looking for a newer one: what its publisher says,
    /// or a fixed time after an attempt that failed, at most [`Repository::max_ttl`] (client behaviour §7.2).
    pub fn ttl(&self) -> Duration {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let ttl =
            if state.online { state.snapshot.ttl() } else { Duration::from_secs(trust::OFFLINE_TTL.into()) };
        state.max_ttl.map_or(ttl, |longest| ttl.min(longest))
    }

    /// Upper bound of [`Repository::ttl`]; none by default.
    pub fn max_ttl(&self) -> Option<Duration> {
        self.state.read().unwrap_or_else(PoisonError::into_inner).max_ttl
    }

    /// Sets or removes the upper bound of [`Repository::ttl`] until the repository is mounted again.
    pub fn set_max_ttl(&self, longest: Option<Duration>) {
        self.state.write().unwrap_or_else(PoisonError::into_inner).max_ttl = longest;
    }

    /// Whether the revision is fixed, by root catalog, tag, date or [`Repository::switch_root`].
    pub fn is_fixed(&self) -> bool {
        self.state.read().unwrap_or_else(PoisonError::into_inner).fixed
    }

    /// Whether the revision in use may still be used. Whoever answers requests asks this first.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if it was blacklisted while mounted, until a better one is found.
    pub fn check_usable(&self) -> Result<(), ClientError> {
        match &self.state.read().unwrap_or_else(PoisonError::into_inner).refused {
            Some(error) => Err(ClientError::Refused(error.clone())),
            None => Ok(()),
        }
    }

    /// Whether [`Repository::authorize`] answers for `caller` without asking the helper.
    pub fn is_access_known(&self, caller: Caller) -> bool {
        match self.snapshot().requirement() {
            Some(requirement) => self.authorization.known(requirement, caller).is_some(),
            None => true,
        }
    }

    /// Whether `caller` may read the repository, and with which credentials it may ask for external data. In a
    /// repository without requirement, everybody may.
    ///
    /// # Errors
    /// [`Denial`], also if the helper cannot be asked.
    pub fn authorize(&self, caller: Caller, deadline: Deadline) -> Result<Option<Arc<Credentials>>, Denial> {
        match self.snapshot().requirement() {
            Some(requirement) => self.authorization.check(requirement, caller, deadline),
            None => Ok(None),
        }
    }

    /// Numbers of entries for `statfs`. Never waits.
    pub fn entry_counts(&self) -> EntryCounts {
        self.snapshot().entry_counts()
    }

    /// Detaches the nested catalogs of all revisions in memory; returns how many of the current one there were.
    pub fn detach_nested_catalogs(&self) -> usize {
        for older in self.older_snapshots() {
            older.detach_nested();
        }
        self.snapshot().detach_nested()
    }

    /// Looks for a newer revision now and moves to it if it is properly signed. A fixed revision stays, but the
    /// blacklists are read again in any case.
    ///
    /// On any error the current revision stays in use: trust only moves forward.
    ///
    /// # Errors
    /// If no server answers, the chain of trust is broken, or the new root catalog is not readable.
    pub fn refresh(&self, deadline: Deadline) -> Result<Refreshed, ClientError> {
        let _turn = self.refresh_turn.lock().unwrap_or_else(PoisonError::into_inner);
        let result = if self.is_fixed() { Ok(Refreshed::UpToDate) } else { self.try_refresh(deadline) };
        self.check_blacklists();
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        match &result {
            Ok(_) => state.last_error = None,
            Err(error) => {
                state.last_error = Some(error.to_string());
                state.online = false;
            }
        }
        result
    }

    /// Moves to another revision by the hash of its root catalog and stays there, as an administrator asked for.
    ///
    /// # Errors
    /// If the catalog is neither cached nor to be had, is none, or its revision is blacklisted. The current
    /// revision stays in use.
    pub fn switch_root(&self, root: ContentHash, deadline: Deadline) -> Result<Refreshed, ClientError> {
        let _turn = self.refresh_turn.lock().unwrap_or_else(PoisonError::into_inner);
        let current = self.snapshot();
        if root == current.pinned().root_hash {
            self.state.write().unwrap_or_else(PoisonError::into_inner).fixed = true;
            return Ok(Refreshed::UpToDate);
        }
        let pin = Pin::of_root(root);
        let next = Snapshot::pin(&self.settings.fqrn, &self.store, pin, Some(&current), deadline)?;
        trust::check_revision(&self.settings, next.pinned().revision)?;
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        state.fixed = true;
        state.refused = None;
        state.snapshot = Arc::new(next);
        drop(state);
        self.keep_older(current);
        Ok(Refreshed::Updated)
    }

    fn try_refresh(&self, deadline: Deadline) -> Result<Refreshed, ClientError> {
        let current = self.snapshot();
        let trusted = trust::verify(&self.store, &self.settings, self.clock.as_ref(), deadline)?;
        let (pin, known) = (pin_of(&trusted.manifest), current.pinned());
        let snapshot = if pin.root_hash == known.root_hash && pin.revision == known.revision {
            None
        } else if pin.revision < known.revision {
            return Err(ClientError::replayed(&self.settings.fqrn, pin.revision, known.revision));
        } else {
            let next = Snapshot::pin(&self.settings.fqrn, &self.store, pin, Some(&current), deadline)?;
            Some(Arc::new(next))
        };
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        state.whitelist_expires = Some(trusted.whitelist_expires);
        state.online = !trusted.offline;
        let Some(snapshot) = snapshot else { return Ok(Refreshed::UpToDate) };
        state.snapshot = snapshot;
        drop(state);
        if pin.root_hash == known.root_hash {
            // Another number for the same tree: nobody has to look anything up again.
            return Ok(Refreshed::UpToDate);
        }
        self.keep_older(current);
        Ok(Refreshed::Updated)
    }

    /// Makes a revision readable that a predecessor of this process used before the current one, for files that
    /// were opened then. To be called for the newest one first.
    ///
    /// # Errors
    /// If its root catalog is neither cached nor to be had.
    pub fn recall(
        &self,
        pin: Pin,
        attached: &[(Vec<u8>, ContentHash, u64)],
        deadline: Deadline,
    ) -> Result<(), ClientError> {
        let snapshot = Snapshot::pin(&self.settings.fqrn, &self.store, pin, None, deadline)?;
        snapshot.attach_again(attached, deadline);
        let mut older = self.older.lock().unwrap_or_else(PoisonError::into_inner);
        if older.len() < MAX_OLDER_SNAPSHOTS {
            older.push_back(Arc::new(snapshot));
        }
        Ok(())
    }

    fn keep_older(&self, snapshot: Arc<Snapshot>) {
        let mut older = self.older.lock().unwrap_or_else(PoisonError::into_inner);
        older.push_front(snapshot);
        older.truncate(MAX_OLDER_SNAPSHOTS);
    }

    /// Reads the blacklists again: whether the revision in use may still be used. One that cannot be read changes
    /// nothing; it prevents updates, which is noticed.
    pub fn check_blacklists(&self) {
        let revision = self.snapshot().pinned().revision;
        let refused = match trust::check_revision(&self.settings, revision) {
            Ok(()) => None,
            Err(error @ TrustError::RevisionBlacklisted { .. }) => Some(Arc::new(error)),
            Err(_) => return,
        };
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        match (&state.refused, &refused) {
            (None, Some(error)) => {
                tracing::error!(decision = "refusal", fqrn = self.settings.fqrn, %error, "the mounted revision is refused");
            }
            (Some(_), None) => tracing::info!(fqrn = self.settings.fqrn, revision, "no longer refused"),
            _ => {}
        }
        state.refused = refused;
    }

    /// Revision, reachability and expiry, for `status`.
    pub fn status(&self) -> RepositoryStatus {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let pin = state.snapshot.pinned();
        let days = state.whitelist_expires.map(|end| (end - self.clock.unix()).div_euclid(24 * 3600));
        RepositoryStatus {
            fqrn: self.settings.fqrn.clone(),
            revision: pin.revision,
            root_hash: pin.root_hash.to_string(),
            online: state.online,
            fixed: state.fixed,
            whitelist_expires: state.whitelist_expires,
            whitelist_days: days,
            refused: state.refused.as_ref().map(|error| error.to_string()),
            last_error: state.last_error.clone(),
            warnings: days.and_then(whitelist_warning).into_iter().collect(),
        }
    }
}

fn whitelist_warning(days: i64) -> Option<String> {
    match days {
        ..0 => {
            Some("the whitelist has expired: no newer revision is accepted until it is signed again".into())
        }
        0 => Some("the whitelist expires within a day; the repository's owner has to sign it again".into()),
        1..=WHITELIST_WARNING_DAYS => {
            Some(format!("the whitelist expires in {days} days; the repository's owner has to sign it again"))
        }
        _ => None,
    }
}

/// Brings the root catalog into the cache from its alternative path: it is not among the other objects where a
/// server gives the latter to authorised clients only.
fn load_alternative_root(
    settings: &ClientSettings,
    store: &ObjectStore,
    pin: Pin,
    deadline: Deadline,
) -> Result<(), ClientError> {
    let name = ObjectName::new(pin.root_hash, ObjectKind::Catalog);
    store
        .object_at(name.alternative_path(), &name, Compression::Zlib, None, deadline)
        .map(drop)
        .map_err(|error| ClientError::catalog_missing(&settings.fqrn, b"", pin.root_hash, error))
}

fn pin_of(manifest: &cvmfs_format::manifest::Manifest) -> Pin {
    Pin {
        root_hash: manifest.root_catalog,
        root_size: manifest.root_catalog_size,
        revision: manifest.revision,
        timestamp: manifest.timestamp,
    }
}
