//! A repository as others use it: the current snapshot, and how it moves forward.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use serde::Serialize;

use crate::clock::Clock;
use crate::config::ClientSettings;
use crate::deadline::Deadline;
use crate::error::ClientError;
use crate::snapshot::{Pin, Snapshot};
use crate::store::ObjectStore;
use crate::trust;

/// Older snapshots that stay readable for files and directories opened before an update.
pub const MAX_OLDER_SNAPSHOTS: usize = 8;

/// Time to reach a server and verify the chain of trust at mount: three small files. Shorter
/// than a mount may take, so that servers that hang leave time for the last good revision.
pub const VERIFY_DEADLINE: Duration = Duration::from_secs(12);

/// Time to load the root catalog at mount.
pub const OPEN_DEADLINE: Duration = Duration::from_secs(30);

/// A repository followed by this process.
#[derive(Debug)]
pub struct Repository {
    settings: ClientSettings,
    store: ObjectStore,
    clock: Arc<dyn Clock>,
    state: RwLock<State>,
    older: Mutex<VecDeque<Arc<Snapshot>>>,
    refresh_turn: Mutex<()>,
}

#[derive(Debug)]
struct State {
    snapshot: Arc<Snapshot>,
    ttl: Duration,
    whitelist_expires: Option<i64>,
    last_error: Option<String>,
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
    /// Unix time at which the whitelist expires, if it was read.
    pub whitelist_expires: Option<i64>,
    /// The last error of an update, if the last attempt failed.
    pub last_error: Option<String>,
}

impl Repository {
    /// Verifies the newest revision a server offers and pins it; the last good one if that
    /// is not possible and its root catalog is cached.
    ///
    /// # Errors
    /// If neither is possible: no server answers, the chain of trust is broken, or the root
    /// catalog is not readable.
    pub fn open(settings: ClientSettings, clock: Arc<dyn Clock>) -> Result<Repository, ClientError> {
        let store = ObjectStore::open(&settings)?;
        let deadline = Deadline::after(VERIFY_DEADLINE);
        let trusted = trust::verify_or_last_good(&store, &settings, clock.as_ref(), deadline)?;
        let pin = pin_of(&trusted.manifest);
        let deadline = Deadline::after(OPEN_DEADLINE);
        let snapshot = Arc::new(Snapshot::pin(&settings.fqrn, &store, pin, None, deadline)?);
        let state = State {
            snapshot,
            ttl: Duration::from_secs(u64::from(trusted.manifest.ttl)),
            whitelist_expires: (!trusted.offline).then_some(trusted.whitelist_expires),
            last_error: None,
            online: !trusted.offline,
        };
        Ok(Repository::with_state(settings, store, clock, state))
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
        let deadline = Deadline::after(OPEN_DEADLINE);
        let snapshot = Arc::new(Snapshot::pin(&settings.fqrn, &store, pin, None, deadline)?);
        let state =
            State { snapshot, ttl: Duration::ZERO, whitelist_expires: None, last_error: None, online: true };
        Ok(Repository::with_state(settings, store, clock, state))
    }

    fn with_state(
        settings: ClientSettings,
        store: ObjectStore,
        clock: Arc<dyn Clock>,
        state: State,
    ) -> Repository {
        Repository {
            settings,
            store,
            clock,
            state: RwLock::new(state),
            older: Mutex::new(VecDeque::new()),
            refresh_turn: Mutex::new(()),
        }
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

    /// How long the current revision may be relied upon before looking for a newer one.
    pub fn ttl(&self) -> Duration {
        let ttl = self.state.read().unwrap_or_else(PoisonError::into_inner).ttl;
        self.settings.max_ttl.map_or(ttl, |longest| ttl.min(longest))
    }

    /// Looks for a newer revision now and moves to it if it is properly signed.
    ///
    /// On any error the current revision stays in use: trust only moves forward.
    ///
    /// # Errors
    /// If no server answers, the chain of trust is broken, or the new root catalog is not readable.
    pub fn refresh(&self, deadline: Deadline) -> Result<Refreshed, ClientError> {
        let _turn = self.refresh_turn.lock().unwrap_or_else(PoisonError::into_inner);
        let result = self.try_refresh(deadline);
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

    fn try_refresh(&self, deadline: Deadline) -> Result<Refreshed, ClientError> {
        let current = self.snapshot();
        let trusted = trust::verify(&self.store, &self.settings, self.clock.as_ref(), deadline)?;
        let pin = pin_of(&trusted.manifest);
        let snapshot = if pin.root_hash == current.pinned().root_hash {
            None
        } else if pin.revision < current.pinned().revision {
            return Err(ClientError::replayed(&self.settings.fqrn, pin.revision, current.pinned().revision));
        } else {
            let next = Snapshot::pin(&self.settings.fqrn, &self.store, pin, Some(&current), deadline)?;
            Some(Arc::new(next))
        };
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        state.ttl = Duration::from_secs(u64::from(trusted.manifest.ttl));
        state.whitelist_expires = Some(trusted.whitelist_expires);
        state.online = !trusted.offline;
        let Some(snapshot) = snapshot else { return Ok(Refreshed::UpToDate) };
        state.snapshot = snapshot;
        drop(state);
        let mut older = self.older.lock().unwrap_or_else(PoisonError::into_inner);
        older.push_front(current);
        older.truncate(MAX_OLDER_SNAPSHOTS);
        Ok(Refreshed::Updated)
    }

    /// Revision, reachability and expiry, for `status`.
    pub fn status(&self) -> RepositoryStatus {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let pin = state.snapshot.pinned();
        RepositoryStatus {
            fqrn: self.settings.fqrn.clone(),
            revision: pin.revision,
            root_hash: pin.root_hash.to_string(),
            online: state.online,
            whitelist_expires: state.whitelist_expires,
            last_error: state.last_error.clone(),
        }
    }
}

fn pin_of(manifest: &cvmfs_format::manifest::Manifest) -> Pin {
    Pin {
        root_hash: manifest.root_catalog,
        root_size: manifest.root_catalog_size,
        revision: manifest.revision,
        timestamp: manifest.timestamp,
    }
}
