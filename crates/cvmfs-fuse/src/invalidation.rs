//! What the kernel must look up again when the revision changes, entry by entry.
//!
//! A file that changes becomes another node, so only names, absences and directories can be
//! out of date. The kernel is told each name that differs between the two revisions, and each
//! absence it was told of before. Where the newer catalog of a sub-tree is not loaded, all
//! names of the older one count as changed: the kernel finds the same nodes again and keeps
//! their pages.
//!
//! Epochs (Linux 6.16) would say it all with one message, but then the kernel takes every
//! directory for gone until it is looked up again; and an overlay, which holds on to the
//! directories that it was mounted with, answers ESTALE for ever.
//!
//! The kernel takes the lock of the directory for a message about one of its names, and waits
//! for look-ups and listings there. So directories in which somebody waits for the network are
//! left for later, and what is answered after the change is not kept. Only a name that the kernel
//! looks up to confirm it needs no lock; therefore all is told once more when such answers have
//! arrived.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use cvmfs_client::changes::{Change, changes};
use cvmfs_client::deadline::Deadline;
use cvmfs_client::error::ClientError;
use cvmfs_client::snapshot::Snapshot;

use crate::nodes::directory_id;
use crate::protocol::handshake::{Agreement, capability};
use crate::protocol::notify;

/// Time to read the older catalogs; they are in the cache.
const PATIENCE: Duration = Duration::from_secs(30);
/// Absences remembered, because the kernel must be told each one (about 100 bytes each).
const MAX_ABSENCES: usize = 1 << 16;
/// How long the kernel may believe in an absence for which there is no room.
const BRIEF_ABSENCE: Duration = Duration::from_secs(1);
/// Look-ups end within their deadline of ten seconds; after this time their directory is told nevertheless.
const LONGEST_LOOKUP: Duration = Duration::from_secs(13);
/// Between two looks whether they have ended.
const PULSE: Duration = Duration::from_millis(20);
/// Names left for later (about 100 bytes each); more are told at once.
const MAX_DEFERRED: usize = 1 << 16;
/// An answer that was given has reached the kernel.
const ARRIVAL: Duration = Duration::from_millis(50);

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

/// One pass over all that changed.
struct Messages<'a> {
    device: BorrowedFd<'a>,
    /// Only expire the entry, which leaves mounts and overlays on it alone.
    expire: bool,
    is_busy: &'a dyn Fn(u64) -> bool,
    deferred: Vec<(u64, Box<[u8]>)>,
    told: Told,
}

impl Invalidation {
    pub(crate) fn new(agreement: Agreement) -> Invalidation {
        Invalidation { agreement, absences: Mutex::default() }
    }

    /// How long the kernel may believe that there is no such name.
    pub(crate) fn absence(&self, parent: u64, name: &[u8], lifetime: Duration) -> Duration {
        if lifetime <= BRIEF_ABSENCE {
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

    /// Tells the kernel what differs between the revision in use until now and the new one. `is_busy` tells whether
    /// somebody waits for a look-up or a listing in a directory.
    pub(crate) fn revision_changed(
        &self,
        device: impl AsFd,
        old: &Snapshot,
        new: &Snapshot,
        is_busy: &dyn Fn(u64) -> bool,
    ) {
        let mut messages = Messages {
            device: device.as_fd(),
            expire: self.agreement.has(capability::HAS_EXPIRE_ONLY),
            is_busy,
            deferred: Vec::new(),
            told: Told::default(),
        };
        let absences = self.take_absences();
        let mut outcome = Ok(());
        for _ in 0..2 {
            for (parent, name) in &absences {
                messages.entry(*parent, name);
            }
            let told = messages.changes(old, new);
            messages.the_deferred();
            outcome = outcome.and(told);
            std::thread::sleep(ARRIVAL);
        }
        if let Err(error) = outcome {
            tracing::warn!(
                error = %crate::filesystem::chain(&error),
                "some names stay as the kernel knows them until their time is over"
            );
        }
        let Told { entries, directories, refused } = messages.told;
        tracing::info!(entries, directories, refused, "the kernel was told what changed");
    }

    fn take_absences(&self) -> Vec<Absence> {
        let absences = std::mem::take(&mut *self.absences.lock().unwrap_or_else(PoisonError::into_inner));
        let now = Instant::now();
        absences.into_iter().filter(|(_, until)| *until > now).map(|(entry, _)| entry).collect()
    }
}

impl Messages<'_> {
    fn changes(&mut self, old: &Snapshot, new: &Snapshot) -> Result<(), ClientError> {
        let mut last_parent = 0;
        changes(old, new, Deadline::after(PATIENCE), &mut |change: &Change<'_>| {
            let parent = directory_id(change.parent);
            // Where the kernel cannot only expire an entry, it forgets all that is below it, mounts included.
            if self.expire || !change.is_directory || change.is_certain {
                self.entry(parent, change.name);
            }
            if change.is_directory {
                self.told.directory(notify::invalidate_node(self.device, directory_id(change.path)));
            }
            // Rows come by path hash, so the same parent rarely follows itself; listings are
            // read again after an update anyway, and this keeps those of long-lived opens right.
            if change.is_certain && parent != last_parent {
                self.told.directory(notify::invalidate_node(self.device, parent));
                last_parent = parent;
            }
        })
    }

    fn entry(&mut self, parent: u64, name: &[u8]) {
        if self.deferred.len() < MAX_DEFERRED && (self.is_busy)(parent) {
            self.deferred.push((parent, name.into()));
        } else {
            self.told.entry(notify::invalidate_entry(self.device, parent, name, self.expire));
        }
    }

    /// Tells what was left for later, when nobody waits there any more.
    fn the_deferred(&mut self) {
        let end = Instant::now() + LONGEST_LOOKUP;
        while !self.deferred.is_empty() {
            let is_over = Instant::now() >= end;
            for (parent, name) in std::mem::take(&mut self.deferred) {
                if !is_over && (self.is_busy)(parent) {
                    self.deferred.push((parent, name));
                } else {
                    self.told.entry(notify::invalidate_entry(self.device, parent, &name, self.expire));
                }
            }
            if !self.deferred.is_empty() {
                std::thread::sleep(PULSE);
            }
        }
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
    fn absences_are_remembered_and_bounded() {
        let minute = Duration::from_secs(60);
        let invalidation = Invalidation::new(Agreement { kernel_minor: 45, capabilities: 0 });
        for number in 0..MAX_ABSENCES as u64 {
            assert_eq!(invalidation.absence(number, b"x", minute), minute);
        }
        assert_eq!(invalidation.absence(1, b"one more", minute), BRIEF_ABSENCE);
        assert_eq!(invalidation.take_absences().len(), MAX_ABSENCES);
        assert_eq!(invalidation.absence(1, b"again room", minute), minute);
    }
}
