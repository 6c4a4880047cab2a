//! How much of the content below each catalog had to be fetched.
//!
//! Each layer of an image has a catalog of its own, so this tells how lazy an image is.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::nodes::Node;

/// Catalogs of which is counted; a layer more is not seen in `status`.
const MAX_CATALOGS: usize = 4096;

/// Files that are remembered as counted; afterwards one that is fetched again is counted again.
const MAX_NODES: usize = 1 << 16;

/// What was fetched of the content below one catalog.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Files that were not in the cache when they were opened, or were fetched ahead.
    pub(crate) files: u64,
    /// Plain bytes of them; of chunked files those that were read before they were in the cache.
    pub(crate) bytes: u64,
}

/// See the module documentation.
#[derive(Debug, Default)]
pub(crate) struct Traffic(Mutex<Counted>);

#[derive(Debug, Default)]
struct Counted {
    tallies: HashMap<Box<[u8]>, Tally>,
    /// Files that were counted: several readers may wait for one download.
    nodes: HashSet<u64>,
}

impl Traffic {
    /// A file was fetched, or begins to be.
    pub(crate) fn file(&self, node: &Node) {
        let mut counted = self.lock();
        if counted.nodes.len() >= MAX_NODES {
            counted.nodes.clear();
        }
        if !counted.nodes.insert(node.id) {
            return;
        }
        let bytes = if node.located.entry.is_chunked() { 0 } else { node.located.entry.size };
        counted.add(node, Tally { files: 1, bytes });
    }

    /// So many bytes of a chunked file were read while it was not complete.
    pub(crate) fn part(&self, node: &Node, bytes: usize) {
        self.lock().add(node, Tally { files: 0, bytes: bytes as u64 });
    }

    /// What was fetched below the catalog at this path.
    pub(crate) fn of(&self, mountpoint: &[u8]) -> Tally {
        self.lock().tallies.get(mountpoint).copied().unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, Counted> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counted {
    fn add(&mut self, node: &Node, more: Tally) {
        let mountpoint = node.located.catalog.mountpoint();
        if self.tallies.len() >= MAX_CATALOGS && !self.tallies.contains_key(mountpoint) {
            return;
        }
        let tally = self.tallies.entry(mountpoint.into()).or_default();
        tally.files = tally.files.saturating_add(more.files);
        tally.bytes = tally.bytes.saturating_add(more.bytes);
    }
}
