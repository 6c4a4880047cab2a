//! The tree as the mount presents it: nodes, children and listings of a repository,
//! through the layer view if it is on. Knows no FUSE replies.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cvmfs_client::deadline::Deadline;
use cvmfs_client::error::ClientError;
use cvmfs_client::repository::Repository;
use cvmfs_client::snapshot::{AttachedCatalog, DirectoryRows, Located, Snapshot, join};
use cvmfs_format::catalog::{Entry, EntryKind};
use cvmfs_format::{ContentHash, PathHash};

use crate::attributes::Presentation;
use crate::layer_view::{self, Marker};
use crate::nodes::{Moment, Node, NodeTable, ROOT, directory_id, node_id, path_hash_range};
use crate::protocol::attributes::Attributes;
use crate::shared_state::SharedState;

/// Entries of recently read directories that are kept between READDIR requests, all together.
const MAX_LISTED: usize = 1 << 16;

/// Look-ups in a directory after which it is read as a whole, and then whenever they have doubled.
const FIRST_COUNT: u32 = 4;
/// Rows that are read for each of these look-ups: about what they cost together.
const ROWS_PER_LOOKUP: u32 = 32;
/// Directories whose look-ups are counted.
const MAX_COUNTED: usize = 1024;

/// Why a request on the tree fails.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ViewError {
    /// The repository cannot answer.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The kernel remembers a node of a revision that is not known any more. It looks up again.
    #[error("node {0:#x} belongs to no known revision")]
    Stale(u64),
    /// Two entries share a node id.
    #[error("{} and another entry have the same node id", String::from_utf8_lossy(.0))]
    Collision(Vec<u8>),
}

impl ViewError {
    /// The error number for the kernel.
    pub(crate) fn errno(&self) -> i32 {
        match self {
            ViewError::Client(error) => error.errno(),
            ViewError::Stale(_) => libc::ESTALE,
            ViewError::Collision(_) => libc::EIO,
        }
    }
}

/// A directory as READDIR delivers it, in a fixed order.
#[derive(Debug)]
pub(crate) struct Listing {
    /// Names and attributes, sorted by name, without `.` and `..`. A node that is a hard link
    /// group appears under each of its names.
    pub(crate) entries: Box<[Listed]>,
    /// Node id of the directory above.
    pub(crate) parent: u64,
}

/// An entry of a [`Listing`]. Its node id is the inode number.
#[derive(Debug)]
pub(crate) struct Listed {
    pub(crate) name: Box<[u8]>,
    pub(crate) attributes: Attributes,
}

/// See the module documentation.
#[derive(Debug)]
pub(crate) struct View {
    repository: Repository,
    layer_view: bool,
    /// The configuration, whose values variant symbolic links may name.
    parameters: HashMap<Vec<u8>, Vec<u8>>,
    presentation: Presentation,
    nodes: NodeTable,
    state: Arc<SharedState>,
    /// Catalogs that a successor was told of, by hash and mount point.
    recorded: Mutex<HashMap<ContentHash, HashSet<Box<[u8]>>>>,
    listings: Mutex<Vec<(u64, Arc<Listing>)>>,
    /// Look-ups in directories that are not listed.
    lookups: Mutex<HashMap<u64, u32>>,
    /// The next directory will be read.
    is_expecting: AtomicBool,
}

impl View {
    pub(crate) fn new(
        repository: Repository,
        layer_view: bool,
        parameters: HashMap<Vec<u8>, Vec<u8>>,
        presentation: Presentation,
        state: Arc<SharedState>,
    ) -> View {
        View {
            repository,
            layer_view,
            parameters,
            presentation,
            nodes: NodeTable::default(),
            state,
            recorded: Mutex::default(),
            listings: Mutex::default(),
            lookups: Mutex::default(),
            is_expecting: AtomicBool::new(false),
        }
    }

    pub(crate) fn repository(&self) -> &Repository {
        &self.repository
    }

    /// Whether markers are presented as whiteouts.
    pub(crate) fn is_layer_view(&self) -> bool {
        self.layer_view
    }

    /// The present moment: it ends when the revision changes.
    pub(crate) fn moment(&self) -> Moment {
        self.nodes.moment()
    }

    /// Drops what is remembered of an older revision.
    pub(crate) fn revision_changed(&self) {
        self.nodes.clear();
        self.listings.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.lookups.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.state.record_pin(&self.repository.snapshot().pinned());
    }

    /// Whether files of the revision may still be opened.
    pub(crate) fn check_usable(&self) -> Result<(), ViewError> {
        Ok(self.repository.check_usable()?)
    }

    /// The node `id` if it is remembered and its children can be read without a fetch.
    pub(crate) fn ready(&self, id: u64) -> Option<Arc<Node>> {
        self.nodes.get(id).filter(|node| self.repository.snapshot().is_loaded(&node.located))
    }

    /// The node if it is remembered: no catalog is read.
    pub(crate) fn remembered(&self, id: u64) -> Option<Arc<Node>> {
        self.nodes.get(id)
    }

    /// Nodes of open files stay known, whatever happens to their revision.
    pub(crate) fn nodes(&self) -> &NodeTable {
        &self.nodes
    }

    /// The node `id`, remembered or found again in the attached catalogs.
    pub(crate) fn node(&self, id: u64, deadline: Deadline) -> Result<Arc<Node>, ViewError> {
        if let Some(node) = self.nodes.get(id) {
            return Ok(node);
        }
        let moment = self.nodes.moment();
        let current = self.repository.snapshot();
        if id == ROOT {
            let root = current.root(deadline)?;
            return self.remember(&current, root, moment, deadline);
        }
        if let Some(node) = self.find(&current, id, moment, deadline)? {
            return self.insert(node);
        }
        for older in self.repository.older_snapshots() {
            let Some(node) = self.find(&older, id, moment, deadline)? else { continue };
            // A directory whose catalog was not attached yet in the current revision.
            if node.located.entry.is_directory()
                && let Some(located) = current.resolve(&node.located.path, deadline)?
                && located.entry.is_directory()
            {
                return self.remember(&current, located, moment, deadline);
            }
            // A directory that is gone would be looked into again under its old id.
            return if node.located.entry.is_directory() { Ok(Arc::new(node)) } else { self.insert(node) };
        }
        Err(ViewError::Stale(id))
    }

    fn find(
        &self,
        snapshot: &Snapshot,
        id: u64,
        moment: Moment,
        deadline: Deadline,
    ) -> Result<Option<Node>, ViewError> {
        let (low, high) = path_hash_range(id);
        for located in snapshot.find_by_path_hash(low, high, deadline)? {
            let Some(located) = self.present(located) else { continue };
            let node = self.build(snapshot, located, moment, deadline)?;
            if node.id == id {
                return Ok(Some(node));
            }
        }
        Ok(None)
    }

    /// The entry `name` of `directory`.
    pub(crate) fn child(
        &self,
        directory: &Node,
        name: &[u8],
        deadline: Deadline,
    ) -> Result<Option<Arc<Node>>, ViewError> {
        self.repository.check_usable()?;
        if self.layer_view && layer_view::marker(name) != Marker::None {
            return Ok(None);
        }
        if let Some(node) = self.listed_child(directory, name, deadline)? {
            return Ok(Some(node));
        }
        let snapshot = self.repository.snapshot();
        let found = match snapshot.child(&directory.located, name, deadline)? {
            Some(located) => Some(located),
            None if self.layer_view => snapshot
                .child(&directory.located, &layer_view::whiteout_of(name), deadline)?
                .and_then(|marker| self.present(marker)),
            None => None,
        };
        match found {
            Some(located) => {
                self.record(directory, &located.catalog);
                self.remember(&snapshot, located, directory.moment, deadline).map(Some)
            }
            None => Ok(None),
        }
    }

    /// The entry `name` of a directory whose listing is kept, or is worth to be made: one row after the other costs
    /// several times as much. What is not in the listing may exist nevertheless: some entries are hidden.
    fn listed_child(
        &self,
        directory: &Node,
        name: &[u8],
        deadline: Deadline,
    ) -> Result<Option<Arc<Node>>, ViewError> {
        let listing = match self.kept(directory.id) {
            Some(listing) => listing,
            None => match self.count_lookup(directory.id) {
                None => return Ok(None),
                Some(most) => {
                    let snapshot = self.repository.snapshot();
                    match snapshot.list_up_to(&directory.located, most, deadline)? {
                        None => return Ok(None),
                        Some(rows) => self.keep_listing(directory, &snapshot, rows, deadline)?,
                    }
                }
            },
        };
        let place = listing.entries.binary_search_by(|listed| (*listed.name).cmp(name)).ok();
        let listed = place.and_then(|place| listing.entries.get(place));
        Ok(listed.and_then(|listed| self.nodes.get(listed.attributes.inode)))
    }

    /// Counts a look-up in a directory that is not listed. Returns up to how many rows it shall be.
    fn count_lookup(&self, directory: u64) -> Option<usize> {
        let mut lookups = self.lookups.lock().unwrap_or_else(PoisonError::into_inner);
        if lookups.len() >= MAX_COUNTED && !lookups.contains_key(&directory) {
            lookups.clear();
        }
        let count = lookups.entry(directory).or_default();
        *count = match *count {
            0 if self.is_expecting.swap(false, Ordering::Relaxed) => FIRST_COUNT,
            count => count.saturating_add(1),
        };
        let is_due = *count >= FIRST_COUNT && count.is_power_of_two();
        is_due.then(|| count.saturating_mul(ROWS_PER_LOOKUP) as usize)
    }

    /// A directory was read to its end, file by file: the next one will be, too.
    pub(crate) fn expect_reader(&self) {
        self.is_expecting.store(true, Ordering::Relaxed);
    }

    /// The listing of a directory that was listed lately.
    pub(crate) fn kept(&self, directory: u64) -> Option<Arc<Listing>> {
        let known = self.listings.lock().unwrap_or_else(PoisonError::into_inner);
        known.iter().find(|(id, _)| *id == directory).map(|(_, listing)| listing.clone())
    }

    /// The entries of `directory`.
    pub(crate) fn list(&self, directory: &Node, deadline: Deadline) -> Result<Arc<Listing>, ViewError> {
        self.repository.check_usable()?;
        if let Some(listing) = self.kept(directory.id) {
            return Ok(listing);
        }
        let snapshot = self.repository.snapshot();
        let rows = snapshot.list(&directory.located, deadline)?;
        self.keep_listing(directory, &snapshot, rows, deadline)
    }

    /// Makes a listing of these rows, and keeps it unless the revision has changed since the directory's moment.
    fn keep_listing(
        &self,
        directory: &Node,
        snapshot: &Snapshot,
        (catalog, rows): DirectoryRows,
        deadline: Deadline,
    ) -> Result<Arc<Listing>, ViewError> {
        self.record(directory, &catalog);
        let mut entries = Vec::with_capacity(rows.len());
        for entry in self.present_rows(rows) {
            let name = Box::from(entry.name.as_slice());
            let path = join(&directory.located.path, &entry.name).into();
            let located = Located { path, entry, catalog: catalog.clone() };
            let attributes = self.remember(snapshot, located, directory.moment, deadline)?.attributes;
            entries.push(Listed { name, attributes });
        }
        let listing = Arc::new(Listing { entries: entries.into(), parent: parent_id(directory) });
        let mut known = self.listings.lock().unwrap_or_else(PoisonError::into_inner);
        if directory.moment == self.nodes.moment() {
            known.insert(0, (directory.id, listing.clone()));
            let mut room = MAX_LISTED;
            let mut is_first = true;
            known.retain(|(_, listing)| {
                let cost = listing.entries.len().max(MAX_LISTED / 64);
                // A directory that is larger than all room is kept while it is read.
                let fits = std::mem::take(&mut is_first) || cost <= room;
                room = room.saturating_sub(cost);
                fits
            });
        }
        Ok(listing)
    }

    /// A directory was read to its end: one that is too large to be kept is forgotten.
    pub(crate) fn listed_to_the_end(&self, directory: u64, listing: &Listing) {
        if listing.entries.len() > MAX_LISTED {
            let mut known = self.listings.lock().unwrap_or_else(PoisonError::into_inner);
            known.retain(|(id, _)| *id != directory);
        }
    }

    /// Whether the layer view makes `directory` hide what lies below it.
    pub(crate) fn is_opaque(&self, directory: &Node, deadline: Deadline) -> Result<bool, ViewError> {
        if !self.layer_view || !directory.located.entry.is_directory() || directory.id == ROOT {
            return Ok(false);
        }
        let snapshot = self.repository.snapshot();
        if snapshot.child(&directory.located, layer_view::OPAQUE_MARKER, deadline)?.is_some() {
            return Ok(true);
        }
        // Deleted and made again within one layer: what lay below must not shine through.
        let path = &directory.located.path;
        let Some(slash) = path.iter().rposition(|byte| *byte == b'/') else { return Ok(false) };
        let marker = join(&path[..slash], &layer_view::whiteout_of(&path[slash + 1..]));
        Ok(match snapshot.resolve(&path[..slash], deadline)? {
            Some(parent) => {
                let name = &marker[slash + 1..];
                snapshot.child(&parent, name, deadline)?.is_some()
            }
            None => false,
        })
    }

    /// The target of a symbolic link, variables expanded from this process' environment and
    /// the configuration.
    pub(crate) fn link_target(&self, node: &Node) -> Vec<u8> {
        self.expanded(&node.located.entry.symlink)
    }

    fn expanded(&self, target: &[u8]) -> Vec<u8> {
        if self.layer_view {
            // An image's links are the image's business, and this process' environment is not a container's.
            return target.to_vec();
        }
        cvmfs_client::variant::expand(target, &|name| {
            use std::os::unix::ffi::{OsStrExt, OsStringExt};
            let environment = std::env::var_os(std::ffi::OsStr::from_bytes(name)).map(OsStringExt::into_vec);
            environment.or_else(|| self.parameters.get(name).cloned())
        })
    }

    /// The size that `stat` reports.
    fn size(&self, entry: &Entry) -> u64 {
        match entry.kind() {
            EntryKind::Symlink => self.expanded(&entry.symlink).len() as u64,
            _ => crate::attributes::plain_size(entry),
        }
    }

    /// Attaches what a predecessor had attached. With `has_open_files` also the revisions
    /// before the current one: some of the files may be theirs.
    pub(crate) fn attach_again(&self, has_open_files: bool) {
        /// The catalogs are in the cache; callers wait meanwhile.
        const PATIENCE: Duration = Duration::from_secs(10);
        let deadline = Deadline::after(PATIENCE);
        let known = self.state.catalogs();
        let current = self.repository.snapshot();
        current.attach_again(&known, deadline);
        let mut seen = HashSet::from([current.pinned().root_hash]);
        let older = self.state.pins().into_iter().filter(|pin| has_open_files && seen.insert(pin.root_hash));
        for pin in older {
            if let Err(error) = self.repository.recall(pin, &known, deadline) {
                tracing::warn!(
                    revision = pin.revision,
                    error = %crate::filesystem::chain(&error),
                    "files that are open since an earlier revision may fail"
                );
            }
        }
    }

    /// What the layer view makes of a stored row; `None` if it is not shown.
    fn present(&self, located: Located) -> Option<Located> {
        if !self.layer_view {
            return Some(located);
        }
        match layer_view::marker(&located.entry.name) {
            Marker::None => Some(located),
            Marker::Hidden => None,
            Marker::Whiteout(deleted) => {
                let deleted = deleted.to_vec();
                Some(Located { entry: layer_view::as_whiteout(located.entry, &deleted), ..located })
            }
        }
    }

    fn present_rows(&self, rows: Vec<Entry>) -> Vec<Entry> {
        if !self.layer_view || !rows.iter().any(|row| layer_view::marker(&row.name) != Marker::None) {
            return rows;
        }
        let names: HashSet<Vec<u8>> = rows.iter().map(|row| row.name.clone()).collect();
        let mut shown: Vec<Entry> = rows
            .into_iter()
            .filter_map(|row| {
                let deleted = match layer_view::marker(&row.name) {
                    Marker::None => return Some(row),
                    Marker::Hidden => return None,
                    Marker::Whiteout(deleted) => deleted.to_vec(),
                };
                (!names.contains(&deleted)).then(|| layer_view::as_whiteout(row, &deleted))
            })
            .collect();
        shown.sort_by(|one, other| one.name.cmp(&other.name));
        shown
    }

    fn remember(
        &self,
        snapshot: &Snapshot,
        located: Located,
        moment: Moment,
        deadline: Deadline,
    ) -> Result<Arc<Node>, ViewError> {
        self.insert(self.build(snapshot, located, moment, deadline)?)
    }

    fn insert(&self, node: Node) -> Result<Arc<Node>, ViewError> {
        let path = node.located.path.clone();
        self.nodes.insert(node).map_err(|_| ViewError::Collision(path.into()))
    }

    /// Tells a successor of the catalog that was attached at `directory`, once.
    fn record(&self, directory: &Node, catalog: &Arc<AttachedCatalog>) {
        if !directory.located.entry.is_nested_mountpoint() {
            return;
        }
        let mut recorded = self.recorded.lock().unwrap_or_else(PoisonError::into_inner);
        let places = recorded.entry(catalog.hash()).or_default();
        if !places.contains(catalog.mountpoint()) {
            places.insert(catalog.mountpoint().into());
            self.state.record_catalog(catalog.mountpoint(), &catalog.hash(), catalog.size());
        }
    }

    /// Makes the node of a row. All members of a hard link group become the node of its first row.
    fn build(
        &self,
        snapshot: &Snapshot,
        mut located: Located,
        moment: Moment,
        deadline: Deadline,
    ) -> Result<Node, ViewError> {
        if let Some(leader) = snapshot.link_leader(&located, deadline)? {
            located.entry = leader;
        }
        let chunks =
            if located.entry.is_chunked() { snapshot.chunks(&located, deadline)? } else { Vec::new() };
        let id = node_id(&located.entry, &chunks);
        debug_assert!(id != ROOT || located.entry.path_hash == PathHash::of(b""));
        let attributes = self.presentation.attributes(id, &located.entry, self.size(&located.entry));
        // The path ends with it.
        located.entry.name = Vec::new();
        Ok(Node { id, located, chunks: chunks.into(), attributes, moment })
    }
}

/// The node id of the directory above.
pub(crate) fn parent_id(node: &Node) -> u64 {
    let path = &node.located.path;
    let above = path.iter().rposition(|byte| *byte == b'/').map_or(&path[..0], |slash| &path[..slash]);
    directory_id(PathHash::of(above))
}
