//! Node ids that follow from the catalogs.
//!
//! A node id is the upper 32 bits of the path's MD5 and 32 bits that tell versions of
//! the entry apart. So
//!
//! * an entry that a new revision leaves alone keeps its id, even if its catalog was
//!   rewritten; the kernel keeps its page cache and an overlay above stays valid;
//! * an entry whose content or metadata changed is another node; open files keep theirs;
//! * a directory keeps its id as long as its path exists;
//! * a successor of this process finds the entry again by a range query on the path
//!   hash, without any table of nodes.
//!
//! Two entries of one mount whose ids collide (64 bits: a chance of 10⁻⁶ for ten million
//! entries) are detected as long as the first is remembered, and answered with EIO.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cvmfs_client::snapshot::Located;
use cvmfs_format::PathHash;
use cvmfs_format::catalog::{self, Chunk};

use crate::protocol::attributes::Attributes;

/// The root directory's node id is fixed by the kernel.
pub const ROOT: u64 = 1;

/// Remembered nodes per generation, two generations (about 450 bytes each): an upper
/// bound of some 20 MiB. A forgotten node costs a range query.
const REMEMBERED: usize = 24_000;

/// The node id of an entry; see the module documentation. A chunked file has no hash of its
/// own, so its chunks are needed to tell its versions apart.
pub fn node_id(entry: &catalog::Entry, chunks: &[Chunk]) -> u64 {
    if entry.is_directory() {
        return directory_id(entry.path_hash);
    }
    let path = entry.path_hash.part1 as u64 & !VERSION_MASK;
    let id = path | (version(entry, chunks) & VERSION_MASK);
    // 0 is the kernel's "no node" and 1 the root; both stay inside the range of the path.
    if id <= ROOT { id ^ 0x8000 } else { id }
}

/// The node id of the directory whose path has this hash.
pub fn directory_id(path: PathHash) -> u64 {
    if path == PathHash::of(b"") {
        return ROOT;
    }
    let id = path.part1 as u64 & !VERSION_MASK | (directory_version(path) & VERSION_MASK);
    if id <= ROOT { id ^ 0x8000 } else { id }
}

/// Half of the id: two versions of a file must not be taken for one another (a chance of
/// 2⁻³² for each file that changes), and a range of paths still holds a row or two.
const VERSION_MASK: u64 = 0xffff_ffff;

/// A directory has one version as long as its path exists.
fn directory_version(path: PathHash) -> u64 {
    let mixed = (path.part2 as u64 ^ 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    mixed >> 32
}

/// Bounds of the first path hash half among which the entry of `id` is found.
pub fn path_hash_range(id: u64) -> (i64, i64) {
    ((id & !VERSION_MASK) as i64, (id | VERSION_MASK) as i64)
}

/// Mixes what makes one version of an entry different from another.
fn version(entry: &catalog::Entry, chunks: &[Chunk]) -> u64 {
    let mut mixed = entry.path_hash.part2 as u64;
    let mut mix = |value: u64| {
        // Multiply and rotate: fast, and every input bit reaches the upper half.
        mixed = (mixed ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    };
    mix(entry.size);
    mix(u64::from(entry.mode));
    mix(entry.mtime as u64);
    mix(u64::from(entry.mtime_ns.unwrap_or(0)));
    mix(u64::from(entry.uid) << 32 | u64::from(entry.gid));
    mix(u64::from(entry.flags.0));
    let digests =
        entry.hash.iter().chain(chunks.iter().map(|chunk| &chunk.hash)).map(|hash| &hash.digest[..]);
    for bytes in digests.chain([&entry.symlink[..], entry.xattrs.as_deref().unwrap_or_default()]) {
        for part in bytes.chunks(8) {
            mix(part.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)));
        }
    }
    mixed >> 32
}

/// An entry as the mount presents it.
#[derive(Debug)]
pub struct Node {
    /// Node id, which is the inode number that users see.
    pub id: u64,
    /// Row, path and catalog, after the layer view.
    pub located: Located,
    /// The chunks of a chunked file; empty for everything else.
    pub chunks: Box<[Chunk]>,
    /// What `stat` shows.
    pub(crate) attributes: Attributes,
    /// When the rows that it comes from were current.
    pub(crate) moment: Moment,
}

/// The time between two revisions. What was made of an older one must not be remembered: a directory keeps its id, and
/// its older node leads to the older catalog.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Moment(u64);

impl Moment {
    /// Before the revision changed for the first time.
    pub const START: Moment = Moment(0);

    /// The one after the next change.
    #[must_use]
    pub const fn next(self) -> Moment {
        Moment(self.0 + 1)
    }
}

/// Recently used nodes by id. Bounded; forgetting one is harmless.
#[derive(Debug, Default)]
pub struct NodeTable {
    generations: Mutex<Generations>,
    /// The present moment; changed with the lock, read without.
    moment: AtomicU64,
}

#[derive(Debug, Default)]
struct Generations {
    young: HashMap<u64, Arc<Node>, BuildHasherDefault<Same>>,
    old: HashMap<u64, Arc<Node>, BuildHasherDefault<Same>>,
    /// Nodes of open files, which are not forgotten: after an update nothing else may know them.
    held: HashMap<u64, Arc<Node>, BuildHasherDefault<Same>>,
}

/// Node ids are parts of hashes already.
#[derive(Debug, Default)]
struct Same(u64);

impl Hasher for Same {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, id: u64) {
        // The table takes its index from the low end and a tag from the high end; ids of
        // one directory tree differ in all bits.
        self.0 = id;
    }
}

/// Two different entries have the same node id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Collision;

impl NodeTable {
    /// The remembered node.
    pub fn get(&self, id: u64) -> Option<Arc<Node>> {
        let mut generations = self.generations.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(node) = generations.young.get(&id) {
            return Some(node.clone());
        }
        let node = match generations.old.remove(&id) {
            Some(node) => node,
            None => generations.held.get(&id)?.clone(),
        };
        generations.keep(node.clone());
        Some(node)
    }

    /// Keeps the node of a file that is open, until [`NodeTable::release`].
    pub fn hold(&self, node: &Arc<Node>) {
        let mut generations = self.generations.lock().unwrap_or_else(PoisonError::into_inner);
        generations.held.entry(node.id).or_insert_with(|| node.clone());
    }

    /// The last open file of the node was closed.
    pub fn release(&self, id: u64) {
        self.generations.lock().unwrap_or_else(PoisonError::into_inner).held.remove(&id);
    }

    /// The present moment. Take it before the revision from which nodes are made.
    pub fn moment(&self) -> Moment {
        Moment(self.moment.load(Ordering::SeqCst))
    }

    /// Remembers a node, unless the revision changed since its moment.
    ///
    /// # Errors
    /// If another entry with the same id is remembered.
    pub fn insert(&self, node: Node) -> Result<Arc<Node>, Collision> {
        let mut generations = self.generations.lock().unwrap_or_else(PoisonError::into_inner);
        let known = generations.young.get(&node.id).or_else(|| generations.old.get(&node.id));
        if let Some(known) = known
            && known.located.entry.path_hash != node.located.entry.path_hash
        {
            return Err(Collision);
        }
        let node = Arc::new(node);
        if node.moment == self.moment() {
            generations.keep(node.clone());
        }
        Ok(node)
    }

    /// Forgets everything but the nodes of open files: the revision changed.
    pub fn clear(&self) {
        let mut generations = self.generations.lock().unwrap_or_else(PoisonError::into_inner);
        let held = std::mem::take(&mut generations.held);
        self.moment.store(self.moment().next().0, Ordering::SeqCst);
        *generations = Generations { held, ..Generations::default() };
    }
}

impl Generations {
    fn keep(&mut self, node: Arc<Node>) {
        if self.young.len() >= REMEMBERED {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(node.id, node);
    }
}

#[cfg(test)]
mod tests {
    use cvmfs_client::snapshot::AttachedCatalog;
    use cvmfs_format::catalog::{Entry, EntryFlags};
    use cvmfs_format::{ContentHash, HashAlgorithm};

    use super::*;

    fn entry(path: &[u8], mode: u32, mtime: i64) -> Entry {
        Entry {
            rowid: 1,
            path_hash: PathHash::of(path),
            parent: PathHash::of(b""),
            link_group: 0,
            link_count: 1,
            hash: None,
            size: 10,
            mode,
            mtime,
            mtime_ns: None,
            flags: EntryFlags(if mode & 0o170_000 == 0o040_000 { 1 } else { 4 }),
            name: b"x".to_vec(),
            symlink: Vec::new(),
            uid: 0,
            gid: 0,
            xattrs: None,
        }
    }

    #[test]
    fn an_unchanged_entry_keeps_its_node_and_a_changed_file_gets_another() {
        let file = entry(b"/a/x", 0o100_644, 5);
        assert_eq!(node_id(&file, &[]), node_id(&Entry { rowid: 99, ..file.clone() }, &[]));
        assert_ne!(node_id(&file, &[]), node_id(&Entry { mtime: 6, ..file.clone() }, &[]));
        assert_ne!(node_id(&file, &[]), node_id(&Entry { xattrs: Some(vec![1]), ..file.clone() }, &[]));
        let directory = entry(b"/a/d", 0o040_755, 5);
        assert_eq!(node_id(&directory, &[]), node_id(&Entry { mtime: 6, size: 1, ..directory.clone() }, &[]));
    }

    #[test]
    fn the_range_of_a_node_contains_its_path_hash() {
        for path in [&b"/foo"[..], b"/foo/bar", b"/.cvmfs", b"/z", b"/q/w/e"] {
            let found = entry(path, 0o100_644, 0);
            let (low, high) = path_hash_range(node_id(&found, &[]));
            assert!((low..=high).contains(&found.path_hash.part1), "{path:?}");
        }
    }

    #[test]
    fn the_root_directory_is_node_one() {
        assert_eq!(node_id(&entry(b"", 0o040_755, 0), &[]), ROOT);
        let directory = entry(b"/a/d", 0o040_755, 0);
        assert_eq!(node_id(&directory, &[]), directory_id(PathHash::of(b"/a/d")));
    }

    #[test]
    fn what_was_made_of_an_older_revision_is_used_and_not_remembered() {
        let table = NodeTable::default();
        let catalog = AttachedCatalog::new(b"", ContentHash::of(HashAlgorithm::Sha1, b"catalog"), 0);
        let node = |moment| {
            let entry = entry(b"/d", 0o040_755, 0);
            let id = node_id(&entry, &[]);
            let located = Located { path: Box::from(&b"/d"[..]), entry, catalog: catalog.clone() };
            Node { id, located, chunks: Box::default(), attributes: Attributes::default(), moment }
        };
        let before = table.moment();
        let id = table.insert(node(before)).unwrap().id;
        assert!(table.get(id).is_some());
        table.clear();
        // Somebody who began before the change comes late.
        table.insert(node(before)).unwrap();
        assert!(table.get(id).is_none(), "the older directory leads to the older catalog");
        table.insert(node(table.moment())).unwrap();
        assert!(table.get(id).is_some());
    }

    #[test]
    fn hundred_thousand_versions_of_a_file_are_as_many_nodes() {
        let file = entry(b"/a/x", 0o100_644, 0);
        let versions = (0..100_000).map(|mtime| node_id(&Entry { mtime, ..file.clone() }, &[]));
        let different: std::collections::HashSet<u64> = versions.collect();
        // Two that meet are expected once in 2³² pairs of 5·10⁹.
        assert!(different.len() > 99_990, "{}", different.len());
    }
}
