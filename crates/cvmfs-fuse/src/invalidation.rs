//! What the kernel must forget when the revision changes, entry by entry.
//!
//! A file that changes becomes another node, so only names, absences and directories can be
//! out of date. Kernels with epochs (Linux 6.16) look every name up again; the others are
//! told each name that differs between the two revisions, and each absence they were told of
//! before. Where the newer catalog of a sub-tree is not loaded, all names of the older one
//! count as changed: the kernel finds the same nodes again and keeps their pages.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use cvmfs_client::changes::{Change, changes};
use cvmfs_client::deadline::Deadline;
use cvmfs_client::snapshot::Snapshot;

use crate::nodes::directory_id;
use crate::protocol::handshake::{Agreement, capability};
use crate::protocol::notify;

/// Time to read the older catalogs; they are in the cache.
const PATIENCE: Duration = Duration::from_secs(30);
/// Absences remembered for kernels that must be told each one (about 100 bytes each).
const MAX_ABSENCES: usize = 1 << 16;
/// How long such a kernel may believe in an absence for which there is no room.
const BRIEF_ABSENCE: Duration = Duration::from_secs(1);

/// A directory and a name that it does not have.
type Absence = (u64, Box<[u8]>);

/// See the module documentation.
#[derive(Debug)]
pub(crate) struct Invalidation {
    agreement: Agreement,
    absences: Mutex<HashMap<Absence, Instant>>,
}

/// How many messages the kernel got.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Told {
    entries: u64,
    directories: u64,
    refused: u64,
}

impl Invalidation {
    pub(crate) fn new(agreement: Agreement) -> Invalidation {
        Invalidation { agreement, absences: Mutex::default() }
    }

    /// How long the kernel may believe that there is no such name.
    pub(crate) fn absence(&self, parent: u64, name: &[u8], lifetime: Duration) -> Duration {
        if self.agreement.has_epochs() || lifetime <= BRIEF_ABSENCE {
            return lifetime;
        }
        let mut absences = self.absences.lock().unwrap_or_else(PoisonError::into_inner);
        if absences.len() >= MAX_ABSENCES {
            absences.retain(|_, until| *until > Instant::now());
        }
        if absences.len() >= MAX_ABSENCES {
            return BRIEF_ABSENCE;
        }
        absences.insert((parent, name.into()), Instant::now() + lifetime);
        lifetime
    }

    /// Tells the kernel what differs between the revision in use until now and the new one.
    pub(crate) fn revision_changed(&self, device: impl AsFd, old: &Snapshot, new: &Snapshot) {
        let device = device.as_fd();
        let mut told = Told::default();
        let tell_entries = !self.agreement.has_epochs();
        if let Err(error) = notify::next_epoch(device)
            && !tell_entries
        {
            tracing::warn!(%error, "the kernel keeps names until their time is over");
        }
        for (parent, name) in self.take_absences() {
            self.forget_entry(device, parent, &name, true, &mut told);
        }
        let mut last_parent = 0;
        let outcome = changes(old, new, Deadline::after(PATIENCE), &mut |change: &Change<'_>| {
            let parent = directory_id(change.parent);
            if tell_entries {
                self.forget_entry(
                    device,
                    parent,
                    change.name,
                    !change.is_directory || change.is_certain,
                    &mut told,
                );
            }
            if change.is_directory {
                told.directory(notify::invalidate_node(device, directory_id(change.path)));
            }
            // Rows come by path hash, so the same parent rarely follows itself; listings are
            // read again after an update anyway, and this keeps those of long-lived opens right.
            if change.is_certain && parent != last_parent {
                told.directory(notify::invalidate_node(device, parent));
                last_parent = parent;
            }
        });
        if let Err(error) = outcome {
            tracing::warn!(
                error = %crate::filesystem::chain(&error),
                "some names stay as the kernel knows them until their time is over"
            );
        }
        tracing::info!(
            entries = told.entries,
            directories = told.directories,
            refused = told.refused,
            epochs = self.agreement.has_epochs(),
            "the kernel was told what changed"
        );
    }

    /// Whether the kernel can look every name up again.
    pub(crate) fn has_epochs(&self) -> bool {
        self.agreement.has_epochs()
    }

    /// Has the kernel look up again what it was told so far, where it can.
    pub(crate) fn expire_names(&self, device: impl AsFd) {
        if self.has_epochs()
            && let Err(error) = notify::next_epoch(device.as_fd())
        {
            tracing::warn!(%error, "names of an earlier revision may stay until their time is over");
        }
    }

    /// `forcibly`: also where the kernel can only forget the entry with all that is below it,
    /// mounts included.
    fn forget_entry(
        &self,
        device: BorrowedFd<'_>,
        parent: u64,
        name: &[u8],
        forcibly: bool,
        told: &mut Told,
    ) {
        let expire = self.agreement.has(capability::HAS_EXPIRE_ONLY);
        if expire || forcibly {
            told.entry(notify::invalidate_entry(device, parent, name, expire));
        }
    }

    fn take_absences(&self) -> Vec<Absence> {
        let absences = std::mem::take(&mut *self.absences.lock().unwrap_or_else(PoisonError::into_inner));
        let now = Instant::now();
        absences.into_iter().filter(|(_, until)| *until > now).map(|(entry, _)| entry).collect()
    }
}

impl Told {
    fn entry(&mut self, outcome: std::io::Result<()>) {
        self.entries += 1;
        self.refused += u64::from(outcome.is_err());
    }

    fn directory(&mut self, outcome: std::io::Result<()>) {
        self.directories += 1;
        self.refused += u64::from(outcome.is_err());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absences_are_remembered_for_kernels_without_epochs_and_bounded() {
        let minute = Duration::from_secs(60);
        let new = Invalidation::new(Agreement { kernel_minor: 45, capabilities: 0 });
        assert_eq!(new.absence(1, b"x", minute), minute);
        assert!(new.take_absences().is_empty());
        let old = Invalidation::new(Agreement { kernel_minor: 31, capabilities: 0 });
        for number in 0..MAX_ABSENCES as u64 {
            assert_eq!(old.absence(number, b"x", minute), minute);
        }
        assert_eq!(old.absence(1, b"one more", minute), BRIEF_ABSENCE);
        assert_eq!(old.take_absences().len(), MAX_ABSENCES);
        assert_eq!(old.absence(1, b"again room", minute), minute);
    }
}
