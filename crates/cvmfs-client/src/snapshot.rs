//! One pinned revision of a repository: its catalogs, loaded on demand, and look-ups in them.
//!
//! A [`Snapshot`] never changes. A newer revision is another snapshot, which shares
//! the [`AttachedCatalog`]s that both revisions have in common. Look-ups go from a
//! directory to its child ([`Snapshot::child`]), so that a path is hashed once and
//! the right catalog is known without a search (repository format §12).
//!
//! Invariants:
//! * a catalog is read only after the store verified its hash;
//! * rows with names that cannot be path components are never shown;
//! * the number of open catalogs is bounded ([`MAX_OPEN_CATALOGS`]); closing one only
//!   costs opening it again.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use cvmfs_format::catalog::{Catalog, Chunk, Counters, Entry};
use cvmfs_format::manifest::DEFAULT_TTL;
use cvmfs_format::{Compression, ContentHash, ObjectKind, ObjectName, PathHash};

use crate::deadline::Deadline;
use crate::error::{ClientError, shown};
use crate::store::{Asked, CacheName, Context, ObjectStore, Pinned};
use crate::tree::OpenCatalog;

/// Catalogs kept open at a time. Each costs a descriptor, and prepared statements and cached pages (up to 300 KiB);
/// a node runs hundreds of layers, not thousands.
pub const MAX_OPEN_CATALOGS: usize = 256;

/// A row of a catalog together with its path and the catalog it was found in.
#[derive(Debug, Clone)]
pub struct Located {
    /// Absolute path inside the repository; empty for the root directory.
    pub path: Box<[u8]>,
    /// The catalog row.
    pub entry: Entry,
    /// The catalog that holds the row. For a nested catalog's mount point this is the parent's.
    pub catalog: Arc<AttachedCatalog>,
}

/// A catalog attached at a path of the repository. Opened when first read.
#[derive(Debug)]
pub struct AttachedCatalog {
    mountpoint: Box<[u8]>,
    hash: ContentHash,
    size: u64,
    open: Mutex<Option<OpenCatalog>>,
    /// Keeps the file in the cache while the catalog is open.
    pinned: Mutex<Option<Pinned>>,
    link_leaders: OnceLock<HashMap<u32, i64>>,
    /// Entries of this catalog without those of nested ones; known once it was open.
    entries: OnceLock<u64>,
    /// Bytes of the files in and below this catalog, likewise.
    content: OnceLock<u64>,
    last_used: AtomicU64,
}

impl AttachedCatalog {
    /// The catalog with this hash, at this path, of `size` plain bytes. It is opened when somebody reads in it.
    pub fn new(mountpoint: &[u8], hash: ContentHash, size: u64) -> Arc<AttachedCatalog> {
        Arc::new(AttachedCatalog {
            mountpoint: mountpoint.into(),
            hash,
            size,
            open: Mutex::new(None),
            pinned: Mutex::new(None),
            link_leaders: OnceLock::new(),
            entries: OnceLock::new(),
            content: OnceLock::new(),
            last_used: AtomicU64::new(0),
        })
    }

    /// Path at which the catalog is attached; empty for the root catalog.
    pub fn mountpoint(&self) -> &[u8] {
        &self.mountpoint
    }

    /// Content hash of the catalog object.
    pub fn hash(&self) -> ContentHash {
        self.hash
    }

    /// Plain size in bytes as its parent records it; 0 if the parent does not.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of the files in this catalog and those below it; known once it was open.
    pub fn content(&self) -> Option<u64> {
        self.content.get().copied()
    }

    fn is_open(&self) -> bool {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Closes the catalog unless somebody reads in it.
    fn close(&self) {
        if let Ok(mut slot) = self.open.try_lock() {
            *slot = None;
            *self.pinned.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }
}

/// The rows of a directory and the catalog that has them.
pub type DirectoryRows = (Arc<AttachedCatalog>, Vec<Entry>);

/// What a snapshot is pinned to: enough to attach it again without a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pin {
    /// Root catalog.
    pub root_hash: ContentHash,
    /// Plain size of the root catalog in bytes; 0 if unknown.
    pub root_size: u64,
    /// Revision number of the manifest.
    pub revision: u64,
    /// Unix time of signing.
    pub timestamp: u64,
}

impl Pin {
    /// A revision of which nothing but the root catalog is known. The catalog itself tells the rest.
    pub fn of_root(root_hash: ContentHash) -> Pin {
        Pin { root_hash, root_size: 0, revision: 0, timestamp: 0 }
    }
}

/// What the root catalog says about its revision as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
struct About {
    ttl: Duration,
    entries: u64,
    requirement: Option<Vec<u8>>,
    is_volatile: bool,
}

/// Numbers of entries for `statfs` (client behaviour §8.1).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EntryCounts {
    /// Entries of the whole repository, as its root catalog counts them.
    pub total: u64,
    /// Entries of the catalogs that are attached and were read.
    pub attached: u64,
}

/// One pinned revision of a repository.
#[derive(Debug)]
pub struct Snapshot {
    store: ObjectStore,
    fqrn: String,
    pin: Pin,
    about: About,
    root: Arc<AttachedCatalog>,
    attached: Mutex<BTreeMap<Box<[u8]>, Arc<AttachedCatalog>>>,
    tick: AtomicU64,
}

impl Snapshot {
    /// Pins the revision `pin` and loads its root catalog.
    ///
    /// The root hash must come from a verified manifest. Catalogs that `previous`
    /// holds under the same path and hash are shared with it.
    ///
    /// # Errors
    /// If the root catalog cannot be fetched, is damaged or not a catalog.
    pub fn pin(
        fqrn: &str,
        store: &ObjectStore,
        pin: Pin,
        previous: Option<&Snapshot>,
        deadline: Deadline,
    ) -> Result<Snapshot, ClientError> {
        let mut attached = BTreeMap::new();
        let root = previous
            .and_then(|snapshot| snapshot.attached_at(b""))
            .filter(|catalog| catalog.hash == pin.root_hash)
            .unwrap_or_else(|| AttachedCatalog::new(b"", pin.root_hash, pin.root_size));
        attached.insert(root.mountpoint.clone(), root.clone());
        let mut snapshot = Snapshot {
            store: store.clone(),
            fqrn: fqrn.to_owned(),
            pin,
            about: About {
                ttl: Duration::from_secs(DEFAULT_TTL.into()),
                entries: 0,
                requirement: None,
                is_volatile: false,
            },
            root,
            attached: Mutex::new(attached),
            tick: AtomicU64::new(1),
        };
        snapshot.read_root(deadline)?;
        if let Some(previous) = previous {
            snapshot.share_with(previous);
        }
        Ok(snapshot)
    }

    /// Opens the root catalog and keeps what it says about the revision.
    fn read_root(&mut self, deadline: Deadline) -> Result<(), ClientError> {
        let (about, revision, timestamp) = self.with_catalog(&self.root, deadline, |rows| {
            let about = About {
                ttl: Duration::from_secs(rows.ttl().into()),
                entries: rows.counters()?.total().entries().max(0).cast_unsigned(),
                requirement: rows.voms_authz().map(<[u8]>::to_vec),
                is_volatile: rows.is_volatile(),
            };
            Ok((about, rows.revision(), rows.last_modified()))
        })?;
        self.store.set_volatile(about.is_volatile);
        self.about = about;
        if self.pin.revision == 0 {
            self.pin.revision = revision;
        }
        if self.pin.timestamp == 0 {
            self.pin.timestamp = timestamp;
        }
        Ok(())
    }

    /// The pin of this snapshot.
    pub fn pinned(&self) -> Pin {
        self.pin
    }

    /// Name of the repository.
    pub fn fqrn(&self) -> &str {
        &self.fqrn
    }

    /// How long the publisher lets clients rely on this revision.
    pub fn ttl(&self) -> Duration {
        self.about.ttl
    }

    /// Who may read the repository, `<helper>%<membership>`; anybody if there is none (client behaviour §13).
    pub fn requirement(&self) -> Option<&[u8]> {
        self.about.requirement.as_deref()
    }

    /// Whether the publisher asks for cached objects of this repository to be evicted first.
    pub fn is_volatile(&self) -> bool {
        self.about.is_volatile
    }

    /// How many entries the repository has, and how many of them are in attached catalogs. Never waits.
    pub fn entry_counts(&self) -> EntryCounts {
        let attached = self.attached();
        let known = attached.iter().filter_map(|catalog| catalog.entries.get()).sum();
        EntryCounts { total: self.about.entries, attached: known }
    }

    /// The root directory.
    ///
    /// # Errors
    /// If the root catalog has no row for the root directory or cannot be read.
    pub fn root(&self, deadline: Deadline) -> Result<Located, ClientError> {
        let entry = self
            .with_catalog(&self.root, deadline, |catalog| Ok(catalog.lookup(PathHash::of(b""))?))?
            .ok_or_else(|| ClientError::catalog_damaged(&self.fqrn, b"", "no row for the root directory"))?;
        Ok(Located { path: Box::default(), entry, catalog: self.root.clone() })
    }

    /// Looks `name` up in `directory`; `None` if there is no such entry.
    ///
    /// # Errors
    /// If the catalog that holds the directory's children cannot be loaded.
    pub fn child(
        &self,
        directory: &Located,
        name: &[u8],
        deadline: Deadline,
    ) -> Result<Option<Located>, ClientError> {
        let catalog = self.children_catalog(directory, deadline)?;
        let path = join(&directory.path, name);
        let entry = self.with_catalog(&catalog, deadline, |rows| Ok(rows.lookup(PathHash::of(&path))?))?;
        Ok(entry.map(|entry| Located { path: path.into(), entry, catalog }))
    }

    /// The entries of `directory`, sorted by name, hidden ones left out.
    ///
    /// # Errors
    /// If the catalog that holds the directory's children cannot be loaded.
    pub fn list(&self, directory: &Located, deadline: Deadline) -> Result<DirectoryRows, ClientError> {
        let catalog = self.children_catalog(directory, deadline)?;
        let parent = PathHash::of(&directory.path);
        let entries = self.with_catalog(&catalog, deadline, |rows| Ok(rows.list(parent)?))?;
        Ok((catalog, entries))
    }

    /// What [`Snapshot::list`] gives, or nothing if the directory has more than `most` entries.
    ///
    /// # Errors
    /// As [`Snapshot::list`].
    pub fn list_up_to(
        &self,
        directory: &Located,
        most: usize,
        deadline: Deadline,
    ) -> Result<Option<DirectoryRows>, ClientError> {
        let catalog = self.children_catalog(directory, deadline)?;
        let parent = PathHash::of(&directory.path);
        let entries = self.with_catalog(&catalog, deadline, |rows| Ok(rows.list_up_to(parent, most)?))?;
        Ok(entries.map(|entries| (catalog, entries)))
    }

    /// Resolves an absolute path from the root. The empty path and `/` are the root directory.
    ///
    /// # Errors
    /// If a catalog on the way cannot be loaded.
    pub fn resolve(&self, path: &[u8], deadline: Deadline) -> Result<Option<Located>, ClientError> {
        let mut located = self.root(deadline)?;
        for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
            if !located.entry.is_directory() {
                return Ok(None);
            }
            match self.child(&located, name, deadline)? {
                Some(child) => located = child,
                None => return Ok(None),
            }
        }
        Ok(Some(located))
    }

    /// Whether the children of `directory` can be read without a fetch.
    pub fn is_loaded(&self, directory: &Located) -> bool {
        if !directory.entry.is_nested_mountpoint() {
            return directory.catalog.is_open();
        }
        self.attached_at(&directory.path).is_some_and(|catalog| catalog.is_open())
    }

    /// The chunks of a chunked file, ordered by offset.
    ///
    /// # Errors
    /// If the catalog cannot be loaded or its chunk list is not contiguous.
    pub fn chunks(&self, file: &Located, deadline: Deadline) -> Result<Vec<Chunk>, ClientError> {
        self.with_catalog(&file.catalog, deadline, |rows| Ok(rows.chunks_of(&file.entry)?))
    }

    /// The first row (by row number) of the hard link group of `file`; the file itself
    /// if it is in no group. All members of a group are one inode.
    ///
    /// # Errors
    /// If the catalog cannot be loaded.
    pub fn link_leader(&self, file: &Located, deadline: Deadline) -> Result<Option<Entry>, ClientError> {
        if file.entry.link_group == 0 {
            return Ok(None);
        }
        self.with_catalog(&file.catalog, deadline, |rows| {
            let leaders = match file.catalog.link_leaders.get() {
                Some(leaders) => leaders,
                None => {
                    let found = rows.link_group_leaders()?;
                    file.catalog.link_leaders.get_or_init(|| found)
                }
            };
            match leaders.get(&file.entry.link_group) {
                Some(rowid) if *rowid != file.entry.rowid => Ok(rows.by_rowid(*rowid)?),
                _ => Ok(None),
            }
        })
    }

    /// Rows of the attached catalogs whose first path hash half lies in `low..=high`.
    ///
    /// Used to find a node again from its number alone; catalogs that were never
    /// attached are not searched. Rows of nested roots are left out: the mount point's
    /// row in the parent catalog stands for them.
    ///
    /// # Errors
    /// If nothing is found and an attached catalog cannot be loaded.
    pub fn find_by_path_hash(
        &self,
        low: i64,
        high: i64,
        deadline: Deadline,
    ) -> Result<Vec<Located>, ClientError> {
        let mut found = Vec::new();
        let mut missing = None;
        for catalog in self.attached() {
            let rows = match self.with_catalog(&catalog, deadline, |rows| Ok(rows.by_path_prefix(low, high)?))
            {
                Ok(rows) => rows,
                // The entry may well be in another catalog, which must not suffer from this one.
                Err(error) => {
                    missing = Some(error);
                    continue;
                }
            };
            for entry in rows.into_iter().filter(|entry| !entry.is_nested_root()) {
                if let Some(path) = self.path_of(&catalog, &entry, deadline)? {
                    found.push(Located { path, entry, catalog: catalog.clone() });
                }
            }
        }
        match missing {
            Some(error) if found.is_empty() => Err(error),
            _ => Ok(found),
        }
    }

    /// Statistics of the whole repository, from the root catalog.
    ///
    /// # Errors
    /// If the root catalog cannot be read.
    pub fn counters(&self, deadline: Deadline) -> Result<Counters, ClientError> {
        self.with_catalog(&self.root, deadline, |rows| Ok(rows.counters()?))
    }

    /// Statistics of the catalog that holds `located`.
    ///
    /// # Errors
    /// If the catalog cannot be read.
    pub fn catalog_counters(&self, located: &Located, deadline: Deadline) -> Result<Counters, ClientError> {
        self.with_catalog(&located.catalog, deadline, |rows| Ok(rows.counters()?))
    }

    /// Detaches all nested catalogs and returns their number. They are attached again when somebody walks there.
    pub fn detach_nested(&self) -> usize {
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        let nested: Vec<_> = attached.extract_if(.., |mountpoint, _| !mountpoint.is_empty()).collect();
        drop(attached);
        // Nodes may still refer to a detached catalog; it is opened again if one of them is read.
        for (_, catalog) in &nested {
            catalog.close();
        }
        nested.len()
    }

    /// Rows of one catalog whose first path hash half lies in `low..=high`, sorted by path hash, without the root
    /// row of a nested catalog: the mount point's row in the parent catalog stands for it.
    ///
    /// # Errors
    /// If the catalog cannot be loaded.
    pub(crate) fn rows(
        &self,
        catalog: &AttachedCatalog,
        low: i64,
        high: i64,
        deadline: Deadline,
    ) -> Result<Vec<Entry>, ClientError> {
        let mut rows = self.with_catalog(catalog, deadline, |rows| Ok(rows.by_path_prefix(low, high)?))?;
        rows.retain(|row| !row.is_nested_root());
        Ok(rows)
    }

    /// The catalogs attached so far, sorted by path.
    pub fn attached(&self) -> Vec<Arc<AttachedCatalog>> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Attaches catalogs that an earlier process had attached, in this revision or another one: those of this
    /// revision are told by their parents. `known` holds mount points, hashes and plain sizes.
    pub fn attach_again(&self, known: &[(Vec<u8>, ContentHash, u64)], deadline: Deadline) {
        let mut known: Vec<_> = known.iter().filter(|(mountpoint, ..)| !mountpoint.is_empty()).collect();
        // Parents before their children.
        known.sort();
        for (mountpoint, hash, size) in known {
            self.attach_if_listed(AttachedCatalog::new(mountpoint, *hash, *size), deadline);
        }
    }

    /// The catalog in which the children of `directory` are rows: the nested one at a mount point.
    fn children_catalog(
        &self,
        directory: &Located,
        deadline: Deadline,
    ) -> Result<Arc<AttachedCatalog>, ClientError> {
        if directory.entry.is_bind_mountpoint() {
            return Err(ClientError::bind_mountpoint(&self.fqrn, &directory.path));
        }
        if !directory.entry.is_nested_mountpoint() {
            return Ok(directory.catalog.clone());
        }
        if let Some(catalog) = self.attached_at(&directory.path) {
            return Ok(catalog);
        }
        let nested = self
            .with_catalog(&directory.catalog, deadline, |rows| Ok(rows.nested_at(&directory.path)?))?
            .ok_or_else(|| {
                ClientError::catalog_damaged(
                    &self.fqrn,
                    &directory.path,
                    "marked as nested catalog but not listed as one",
                )
            })?;
        let named = AttachedCatalog::new(&directory.path, nested.hash, nested.size);
        if !self.has(&directory.catalog, deadline) {
            // The directory was found in another revision: attached here, its catalog would stand for ours.
            return Ok(named);
        }
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(attached.entry(directory.path.clone()).or_insert(named).clone())
    }

    /// Whether the catalog belongs to this revision, as far as the attached ones tell.
    fn has(&self, catalog: &Arc<AttachedCatalog>, deadline: Deadline) -> bool {
        match self.attached_at(&catalog.mountpoint) {
            Some(attached) => attached.hash == catalog.hash,
            // It may have been detached.
            None => self.attach_if_listed(catalog.clone(), deadline),
        }
    }

    /// Runs `read` on the catalog, which is opened (and fetched) first if necessary.
    fn with_catalog<T>(
        &self,
        catalog: &AttachedCatalog,
        deadline: Deadline,
        read: impl FnOnce(&Catalog) -> Result<T, ClientError>,
    ) -> Result<T, ClientError> {
        catalog.last_used.store(self.tick.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
        if let Some(rows) = catalog.open.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            return read(rows);
        }
        // Fetched without the lock, so that each waiter keeps its own deadline; the store
        // sees to it that the object is fetched once. Opening it twice is harmless.
        let rows = self.load(catalog, deadline)?;
        let mut slot = catalog.open.lock().unwrap_or_else(PoisonError::into_inner);
        let result = read(slot.get_or_insert(rows));
        drop(slot);
        self.close_least_used();
        result
    }

    fn load(&self, catalog: &AttachedCatalog, deadline: Deadline) -> Result<OpenCatalog, ClientError> {
        let name = ObjectName::new(catalog.hash, ObjectKind::Catalog);
        let size = (catalog.size > 0).then_some(catalog.size);
        let context = Context { path: Some(&catalog.mountpoint), ..Context::default() };
        let asked = Asked::new(name, Compression::Zlib, size).within(context);
        let object = self.store.fetch(&asked, deadline).map_err(|error| {
            ClientError::catalog_missing(&self.fqrn, &catalog.mountpoint, catalog.hash, error)
        })?;
        let unreadable = |error| ClientError::catalog_unreadable(&self.fqrn, &catalog.mountpoint, error);
        let rows = crate::tree::open_catalog(&object).map_err(unreadable)?;
        if rows.root_prefix() != catalog.mountpoint() {
            return Err(ClientError::catalog_damaged(
                &self.fqrn,
                &catalog.mountpoint,
                "the catalog belongs to another path",
            ));
        }
        let hint = format!("file catalog at {}:{} ({})", self.fqrn, shown(&catalog.mountpoint), catalog.hash);
        // A catalog that cannot be pinned is used all the same; it may have to be fetched again.
        let pinned =
            self.store.cache().pin(&CacheName::object(&catalog.hash, Compression::Zlib), Some(&hint));
        *catalog.pinned.lock().unwrap_or_else(PoisonError::into_inner) = pinned.ok();
        if catalog.entries.get().is_none() {
            let counters = rows.counters().map_err(unreadable)?;
            let _ = catalog.content.set(counters.total().file_size.max(0).cast_unsigned());
            let _ = catalog.entries.set(counters.own.entries().max(0).cast_unsigned());
        }
        Ok(rows)
    }

    /// Closes the least recently used catalogs beyond [`MAX_OPEN_CATALOGS`], and half of them when pinned catalogs
    /// take too much of the cache. The root catalog stays.
    fn close_least_used(&self) {
        let mut open: Vec<_> = self
            .attached()
            .into_iter()
            .filter(|catalog| !catalog.mountpoint.is_empty() && catalog.is_open())
            .collect();
        let most = if self.store.cache().is_pin_pressure() { open.len() / 2 } else { MAX_OPEN_CATALOGS };
        if open.len() <= most {
            return;
        }
        open.sort_by_key(|catalog| catalog.last_used.load(Ordering::Relaxed));
        let surplus = open.len() - most;
        for catalog in open.into_iter().take(surplus) {
            catalog.close();
        }
    }

    /// The absolute path of `entry`, found by climbing to the root row of its catalog.
    fn path_of(
        &self,
        catalog: &AttachedCatalog,
        entry: &Entry,
        deadline: Deadline,
    ) -> Result<Option<Box<[u8]>>, ClientError> {
        let top = PathHash::of(&catalog.mountpoint);
        let mut names = Vec::new();
        let mut row = entry.clone();
        while row.path_hash != top {
            // A path longer than the kernel accepts can only be a loop made by a damaged catalog.
            if names.len() > libc::PATH_MAX as usize / 2 {
                return Ok(None);
            }
            let parent = row.parent;
            names.push(row.name);
            match self.with_catalog(catalog, deadline, |rows| Ok(rows.lookup(parent)?))? {
                Some(above) => row = above,
                None => return Ok(None),
            }
        }
        let mut path = catalog.mountpoint.to_vec();
        for name in names.iter().rev() {
            path.push(b'/');
            path.extend_from_slice(name);
        }
        Ok(Some(path.into()))
    }

    fn attached_at(&self, path: &[u8]) -> Option<Arc<AttachedCatalog>> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner).get(path).cloned()
    }

    /// Takes over the catalogs of `previous` that this revision refers to under the same
    /// path and hash. Only those whose parents are loaded are looked at: an unreadable
    /// one is attached again when somebody walks there.
    fn share_with(&self, previous: &Snapshot) {
        for catalog in previous.attached() {
            if catalog.mountpoint.is_empty() {
                continue;
            }
            self.attach_if_listed(catalog, Deadline::after(Duration::from_secs(10)));
        }
    }

    /// Attaches the catalog if the one above it names it, and tells whether that is so.
    fn attach_if_listed(&self, catalog: Arc<AttachedCatalog>, deadline: Deadline) -> bool {
        let Some(parent) = self.deepest_above(&catalog.mountpoint) else { return false };
        let nested = self.with_catalog(&parent, deadline, |rows| Ok(rows.nested_at(&catalog.mountpoint)?));
        let is_listed = nested.is_ok_and(|nested| nested.is_some_and(|nested| nested.hash == catalog.hash));
        if is_listed {
            let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
            attached.insert(catalog.mountpoint.clone(), catalog);
        }
        is_listed
    }

    /// The attached catalog with the longest mount point that is a proper prefix of `path`.
    fn deepest_above(&self, path: &[u8]) -> Option<Arc<AttachedCatalog>> {
        let attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        let mut prefix = path;
        while let Some(slash) = prefix.iter().rposition(|byte| *byte == b'/') {
            prefix = prefix.get(..slash)?;
            if let Some(catalog) = attached.get(prefix) {
                return Some(catalog.clone());
            }
        }
        None
    }
}

/// `directory` + `/` + `name`.
pub fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    let mut path = Vec::with_capacity(directory.len() + 1 + name.len());
    path.extend_from_slice(directory);
    path.push(b'/');
    path.extend_from_slice(name);
    path
}
