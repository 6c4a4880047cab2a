//! The repositories that layers lie in: mounted when needed, counted by layer,
//! unmounted when idle (graph driver plugin §11.4).
//!
//! What is counted are layers, not calls: a repository stays mounted as long as one
//! layer that has a directory in it is mounted, however often that layer was asked for.
//! Counts are not kept on disk; after a restart they follow from the mount table.

mod client;
mod external;
pub mod owners;
mod place;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use thin_image::Location;

pub use client::{ClientMounts, ClientOptions};
pub use external::ExternalMounts;

use crate::keyed_locks::KeyedLocks;

/// How long a repository that no layer uses stays mounted. A mount costs little; to
/// mount again costs requests and the caches of the kernel.
const IDLE_TIME: Duration = Duration::from_secs(600);

/// A fully qualified repository name, as validated by [`Location`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fqrn(String);

impl Fqrn {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&Location> for Fqrn {
    fn from(location: &Location) -> Self {
        Self(location.fqrn.clone())
    }
}

impl fmt::Display for Fqrn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a repository cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    /// It cannot be mounted, or unmounted.
    #[error(
        "cannot mount repository {fqrn}: {message}; to find out more, run `cvmfs-client check {fqrn}` on the \
         host, or read the engine's log, which has the plugin's"
    )]
    Mount {
        /// The repository.
        fqrn: Fqrn,
        /// The cause.
        message: String,
    },
    /// The host does not mount it, though it shall.
    #[error(
        "repository {fqrn} is not mounted at {}: with cvmfsMountMethod=external the host must mount it there",
        mountpoint.display()
    )]
    NotMountedByHost {
        /// The repository.
        fqrn: Fqrn,
        /// Where it is expected.
        mountpoint: PathBuf,
    },
    /// The layer is not in the repository, not even in its newest revision.
    #[error(
        "layer {path} not in repository {fqrn}{}: it was removed there, or has not reached the server in use; convert the \
         image again, or try again when its revision has arrived",
        at_revision(*revision)
    )]
    LayerMissing {
        /// The repository.
        fqrn: Fqrn,
        /// Path in the repository.
        path: String,
        /// The revision looked at, if known.
        revision: Option<u64>,
    },
    /// The path leads through a symbolic link that leaves the repository.
    #[error("layer {path} in repository {fqrn} leads out of the repository")]
    LeadsOut {
        /// The repository.
        fqrn: Fqrn,
        /// Path in the repository.
        path: String,
    },
    /// The repository is mounted but does not answer.
    #[error(
        "layer {path} in repository {fqrn} cannot be read: {cause}; `docker info` shows the repository's state"
    )]
    Unreadable {
        /// The repository.
        fqrn: Fqrn,
        /// Path in the repository.
        path: String,
        /// What the kernel answered.
        #[source]
        cause: std::io::Error,
    },
}

fn at_revision(revision: Option<u64>) -> String {
    revision.map(|revision| format!(" at revision {revision}")).unwrap_or_default()
}

/// What is known about a mounted repository.
#[derive(Debug, Clone, PartialEq)]
pub struct RepositoryStatus {
    /// The repository.
    pub fqrn: Fqrn,
    /// For people: revision, state, cache.
    pub summary: String,
    /// What its client says, if it is ours and answers.
    pub client: Option<Box<cvmfs_fuse::Status>>,
}

/// Mounts repositories. Calls for one repository come one after the other.
pub trait RepositoryMounts: Send + Sync + fmt::Debug {
    /// Makes sure that the repository is mounted and answers, and returns where. A mount
    /// whose server is dead is replaced.
    ///
    /// # Errors
    /// [`RepositoryError`], at the latest after `timeout`.
    fn ensure(&self, fqrn: &Fqrn, timeout: Duration) -> Result<PathBuf, RepositoryError>;

    /// Looks for a newer revision now, for at most `timeout`.
    fn refresh(&self, fqrn: &Fqrn, timeout: Duration);

    /// The revision that is mounted, if it can be told.
    fn revision(&self, fqrn: &Fqrn) -> Option<u64>;

    /// Unmounts the repository; files that are open stay readable.
    ///
    /// # Errors
    /// [`RepositoryError::Mount`].
    fn unmount(&self, fqrn: &Fqrn) -> Result<(), RepositoryError>;

    /// The repositories that are mounted now by this program, in order of name.
    fn mounted(&self) -> Vec<Fqrn>;

    /// Whether layers of the repository can be read, as far as the mount table tells. Never touches a mount.
    fn is_mounted(&self, fqrn: &Fqrn) -> bool;

    /// State of the mounted repositories, in order of name. Never touches a mount.
    fn status(&self) -> Vec<RepositoryStatus>;

    /// Removes mounts whose server is dead, after a crash.
    fn recover(&self);
}

/// Within this time a start that needs a repository goes on or fails with a message:
/// half a minute is what a user at a terminal waits, and a little is left for the engine.
const START_TIME: Duration = Duration::from_secs(28);
/// Part of [`START_TIME`] that mounting may take, all repositories of a layer together.
const MOUNT_TIME: Duration = Duration::from_secs(20);
/// What each step is given at least, when the others have used up the time.
const LEAST_TIME: Duration = Duration::from_secs(1);

fn remaining(until: Instant) -> Duration {
    until.saturating_duration_since(Instant::now()).max(LEAST_TIME)
}

/// Who uses which repository.
#[derive(Debug)]
pub struct Repositories {
    mounts: Arc<dyn RepositoryMounts>,
    locks: KeyedLocks<Fqrn>,
    uses: Mutex<HashMap<Fqrn, Use>>,
}

#[derive(Debug)]
struct Use {
    holders: HashSet<String>,
    /// When the last holder left.
    idle_since: Instant,
}

impl Repositories {
    /// Nothing is used yet.
    pub fn new(mounts: Arc<dyn RepositoryMounts>) -> Self {
        Self { mounts, locks: KeyedLocks::new(), uses: Mutex::new(HashMap::new()) }
    }

    /// Mounts what `locations` lie in, checks that each is there, notes `holder` as user
    /// and returns the directories in the same order. On failure `holder` holds what it
    /// held before, and what was mounted only for it is unmounted.
    ///
    /// # Errors
    /// The first repository or layer that cannot be used.
    pub fn acquire(&self, holder: &str, locations: &[&Location]) -> Result<Vec<PathBuf>, RepositoryError> {
        let names: Vec<Fqrn> = distinct(locations);
        let (mounted_until, found_until) = (Instant::now() + MOUNT_TIME, Instant::now() + START_TIME);
        let mut added = Vec::new();
        let acquired = (|| {
            let mut mountpoints = HashMap::new();
            for fqrn in &names {
                let _lock = self.locks.lock(fqrn);
                mountpoints.insert(fqrn.clone(), self.mounts.ensure(fqrn, remaining(mounted_until))?);
                if self.hold(fqrn, holder) {
                    added.push(fqrn.clone());
                }
            }
            place::find_all(&*self.mounts, &mountpoints, locations, found_until)
        })();
        if acquired.is_err() {
            for fqrn in &added {
                self.drop_hold(fqrn, holder);
                self.unmount_unused(fqrn, Duration::ZERO);
            }
        }
        acquired
    }

    /// Whether all repositories that `locations` lie in are mounted.
    pub fn are_mounted(&self, locations: &[&Location]) -> bool {
        distinct(locations).iter().all(|fqrn| self.mounts.is_mounted(fqrn))
    }

    /// Notes `holder` as user of repositories that are mounted already, after a restart.
    pub fn adopt(&self, holder: &str, locations: &[&Location]) {
        for fqrn in distinct(locations) {
            self.hold(&fqrn, holder);
        }
    }

    /// `holder` needs no repository any more.
    pub fn release(&self, holder: &str) {
        let held: Vec<Fqrn> = self
            .uses()
            .iter()
            .filter(|(_, u)| u.holders.contains(holder))
            .map(|(fqrn, _)| fqrn.clone())
            .collect();
        held.iter().for_each(|fqrn| self.drop_hold(fqrn, holder));
    }

    /// Unmounts the repositories that nobody has used for a while.
    pub fn unmount_idle(&self) {
        for fqrn in self.mounts.mounted() {
            self.unmount_unused(&fqrn, IDLE_TIME);
        }
    }

    /// Unmounts all repositories that nobody uses, at once.
    pub fn unmount_all(&self) {
        for fqrn in self.mounts.mounted() {
            self.unmount_unused(&fqrn, Duration::ZERO);
        }
    }

    /// State of the mounted repositories.
    pub fn status(&self) -> Vec<RepositoryStatus> {
        self.mounts.status()
    }

    /// Removes dead mounts, after a crash.
    pub fn recover(&self) {
        self.mounts.recover();
    }

    /// Number of layers that hold a repository.
    pub fn holders(&self, fqrn: &str) -> usize {
        self.uses().iter().find(|(name, _)| name.as_str() == fqrn).map_or(0, |(_, u)| u.holders.len())
    }

    fn unmount_unused(&self, fqrn: &Fqrn, idle_time: Duration) {
        // With the lock nobody can be between `ensure` and `hold`.
        let _lock = self.locks.lock(fqrn);
        let now = Instant::now();
        {
            // A mount of an earlier process is idle from the first time it is seen.
            let mut uses = self.uses();
            let used =
                uses.entry(fqrn.clone()).or_insert_with(|| Use { holders: HashSet::new(), idle_since: now });
            if !used.holders.is_empty() || now.duration_since(used.idle_since) < idle_time {
                return;
            }
            uses.remove(fqrn);
        }
        match self.mounts.unmount(fqrn) {
            Ok(()) => tracing::info!(%fqrn, "repository unmounted, no layer uses it"),
            Err(error) => tracing::warn!(%fqrn, %error, "cannot unmount an unused repository"),
        }
    }

    /// Whether the holder is new.
    fn hold(&self, fqrn: &Fqrn, holder: &str) -> bool {
        let mut uses = self.uses();
        let used = uses
            .entry(fqrn.clone())
            .or_insert_with(|| Use { holders: HashSet::new(), idle_since: Instant::now() });
        used.holders.insert(holder.to_owned())
    }

    fn drop_hold(&self, fqrn: &Fqrn, holder: &str) {
        if let Some(used) = self.uses().get_mut(fqrn)
            && used.holders.remove(holder)
        {
            used.idle_since = Instant::now();
        }
    }

    fn uses(&self) -> MutexGuard<'_, HashMap<Fqrn, Use>> {
        self.uses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn distinct(locations: &[&Location]) -> Vec<Fqrn> {
    let mut names: Vec<Fqrn> = locations.iter().map(|&location| Fqrn::from(location)).collect();
    names.sort();
    names.dedup();
    names
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
