//! Catalogs stay small: nested catalogs where `.cvmfsdirtab` wants them and where one grew beyond a limit.
//!
//! A client downloads, keeps and searches whole catalogs, and a publisher rewrites those that it changes, so
//! their size is what both pay. A catalog with more than [`CatalogLimits::max`] entries is divided along its
//! directories (format §19.2): where the entries below a directory are more than half of that, its heaviest
//! sub-directories become nested catalogs, as long as they have [`CatalogLimits::min`] entries. Catalogs made so have a
//! second marker, `.cvmfsautocatalog`, and return to the catalog above once they are smaller than that.
//!
//! What a publish adds is divided before it is applied ([`divide_tree`]), so that nothing is moved; what grew bit by
//! bit is divided before the commit ([`Balance::run`]). A directory with more entries than the limit is left whole: it is
//! a large catalog, and never a reason to stop.

use std::collections::HashMap;

use cvmfs_format::catalog::{Entry, EntryKind};
use cvmfs_format::{ContentHash, ObjectKind, PathHash};
use layer_tar::LayerPath;

use crate::commit::Signer;
use crate::dirtab::{DIRTAB, Dirtab, MAX_DIRTAB};
use crate::error::PublishError;
use crate::head::load_content;
use crate::pipeline::Encoding;
use crate::tree::{Child, Directory, FileContent, Kind, LayerTree, Leaf, Meta};
use crate::workspace::{Index, MARKER, ROOT, Workspace, joined};

/// Marks a nested catalog that nobody asked for by name.
pub(crate) const AUTO_MARKER: &[u8] = b".cvmfsautocatalog";
/// As the C++ balancer makes them.
const MARKER_PERMISSIONS: u32 = 0o600;

/// When catalogs are divided and when they are united again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CatalogLimits {
    /// Entries from which a catalog is divided; 0 never divides.
    pub max: u64,
    /// Entries that a catalog made by division must have.
    pub min: u64,
}

impl Default for CatalogLimits {
    /// The C++ balancer's limits: some 25 MB of SQLite.
    fn default() -> CatalogLimits {
        CatalogLimits { max: 100_000, min: 1000 }
    }
}

/// Puts markers of nested catalogs into a tree of more than `max` entries. `exists` tells whether the repository has a
/// directory already: such a one may be a catalog, and is left to [`Balance::run`].
pub(crate) fn divide_tree(
    tree: &mut LayerTree,
    limits: CatalogLimits,
    content: impl FnOnce() -> Result<FileContent, PublishError>,
    mut exists: impl FnMut(&LayerPath) -> Result<bool, PublishError>,
) -> Result<(), PublishError> {
    if limits.max == 0 || count(&tree.root) <= limits.max {
        return Ok(());
    }
    let mut cuts = Vec::new();
    weigh_tree(&tree.root, &LayerPath::root(), limits, &mut cuts)?;
    if cuts.is_empty() {
        return Ok(());
    }
    let content = content()?;
    for (path, meta) in cuts {
        if exists(&path)? {
            continue;
        }
        let meta = Meta { permissions: MARKER_PERMISSIONS, ..meta };
        for name in [MARKER, AUTO_MARKER] {
            let marker = path.join(name).map_err(|error| PublishError::entry(path.as_bytes(), error))?;
            tree.add_leaf(&marker, Leaf { meta: meta.clone(), kind: Kind::File(content.clone()) })?;
        }
    }
    Ok(())
}

fn count(directory: &Directory) -> u64 {
    let below = |child: &Child| if let Child::Directory(child) = child { count(child) } else { 0 };
    directory.children.len() as u64 + directory.children.values().map(below).sum::<u64>()
}

/// Entries below `directory` that stay in its catalog.
fn weigh_tree(
    directory: &Directory,
    path: &LayerPath,
    limits: CatalogLimits,
    cuts: &mut Vec<(LayerPath, Meta)>,
) -> Result<u64, PublishError> {
    let mut below = Vec::new();
    for (name, child) in &directory.children {
        let Child::Directory(child) = child else { continue };
        let path = path.join(name).map_err(|error| PublishError::entry(path.as_bytes(), error))?;
        let is_catalog = matches!(child.children.get(MARKER), Some(Child::Leaf(_)));
        let weight = weigh_tree(child, &path, limits, cuts)?;
        if !is_catalog {
            below.push((weight, (path, child)));
        }
    }
    let (weight, heavy) = divide(directory.children.len() as u64, below, limits);
    for (path, child) in heavy {
        let implied = Meta::implied_directory(child.implied_by);
        let meta = child.meta.as_ref().unwrap_or(&implied);
        cuts.push((path, Meta { xattrs: Default::default(), ..meta.clone() }));
    }
    Ok(weight)
}

/// Takes the heaviest children away until at most half of the limit is left, or none is worth it.
fn divide<T>(own: u64, mut below: Vec<(u64, T)>, limits: CatalogLimits) -> (u64, Vec<T>) {
    let mut left = own + below.iter().map(|(weight, _)| weight).sum::<u64>();
    let mut taken = Vec::new();
    if left <= limits.max / 2 {
        return (left, taken);
    }
    // the lightest first, so that the heaviest is popped
    below.sort_by_key(|(weight, _)| *weight);
    while left > limits.max / 2 {
        match below.pop() {
            Some((weight, child)) if weight >= limits.min.max(1) => {
                left -= weight;
                taken.push(child);
            }
            _ => break,
        }
    }
    (left, taken)
}

/// The last change of a transaction before it is published.
#[derive(Debug)]
pub(crate) struct Balance<'a> {
    pub(crate) workspace: &'a mut Workspace,
    pub(crate) signer: &'a Signer<'a>,
    pub(crate) encoding: Encoding,
    pub(crate) limits: CatalogLimits,
    /// Time of the markers that are made.
    pub(crate) now: i64,
    /// The `.cvmfsdirtab` of the published revision.
    pub(crate) old_dirtab: Option<ContentHash>,
}

impl Balance<'_> {
    pub(crate) fn run(mut self) -> Result<(), PublishError> {
        self.apply_dirtab()?;
        if self.limits.max > 0 {
            self.unite()?;
            self.divide()?;
        }
        Ok(())
    }

    fn apply_dirtab(&mut self) -> Result<(), PublishError> {
        let Some(entry) = dirtab_entry(self.workspace)? else { return Ok(()) };
        let content = load_content(&**self.signer.storage, &entry, MAX_DIRTAB)?;
        let dirtab = Dirtab::parse(&content)?;
        let everywhere = entry.hash != self.old_dirtab;
        for path in dirtab.missing(self.workspace, everywhere)? {
            self.signer.interrupt.check()?;
            self.make_catalog(&path, &[MARKER], 0o644)?;
        }
        Ok(())
    }

    /// Returns catalogs that were made by division and shrank to the catalogs above.
    fn unite(&mut self) -> Result<(), PublishError> {
        for index in self.workspace.changed_bottom_up() {
            let path = self.workspace.mountpoint(index).to_vec();
            if index == ROOT || self.workspace.own_entries(index)? >= self.limits.min {
                continue;
            }
            let marker = |name| joined(&path, name);
            if self.workspace.row(index, &marker(AUTO_MARKER))?.is_none() {
                continue;
            }
            for name in [AUTO_MARKER, MARKER] {
                if let Some(entry) = self.workspace.row(index, &marker(name))? {
                    self.workspace.remove_leaf(index, &marker(name), &entry)?;
                }
            }
            self.workspace.merge(&path)?;
        }
        Ok(())
    }

    fn divide(&mut self) -> Result<(), PublishError> {
        for index in self.workspace.changed_bottom_up() {
            if self.workspace.own_entries(index)? <= self.limits.max {
                continue;
            }
            for path in self.heavy_directories(index)? {
                self.signer.interrupt.check()?;
                self.make_catalog(&path, &[MARKER, AUTO_MARKER], MARKER_PERMISSIONS)?;
            }
        }
        Ok(())
    }

    /// Directories of one catalog that are to become nested ones, children before parents.
    fn heavy_directories(&self, index: Index) -> Result<Vec<Vec<u8>>, PublishError> {
        let mut directories: HashMap<PathHash, Rows> = HashMap::new();
        self.workspace.for_each(index, |entry| {
            let parent = directories.entry(entry.parent).or_default();
            parent.own += 1;
            if entry.is_directory()
                && !entry.is_nested_mountpoint()
                && !entry.is_nested_root()
                && !entry.is_bind_mountpoint()
            {
                parent.below.push((entry.path_hash, entry.name));
            }
        })?;
        let mut cuts = Vec::new();
        weigh_rows(&directories, self.workspace.mountpoint(index), self.limits, &mut cuts);
        Ok(cuts)
    }

    /// Makes a directory a nested catalog, with these markers in it.
    fn make_catalog(&mut self, path: &[u8], markers: &[&[u8]], permissions: u32) -> Result<(), PublishError> {
        let above = self.workspace.row_catalog(path)?;
        let Some(directory) = self.workspace.row(above, path)? else { return Ok(()) };
        let below = self.workspace.split(above, path)?;
        let name = self.encoding.encode(ObjectKind::File, b"", |name, stored| {
            let put = self.signer.storage.put_object(&name, stored)?;
            self.signer.counters.count(put, stored.len());
            Ok::<_, PublishError>(name)
        })?;
        for marker in markers {
            let path = joined(path, marker);
            if self.workspace.row(below, &path)?.is_some() {
                continue;
            }
            let mut entry = Entry::new(&path, EntryKind::File, permissions);
            (entry.uid, entry.gid) = (directory.uid, directory.gid);
            entry.mtime = self.now;
            entry.mtime_ns = directory.mtime_ns.map(|_| 0);
            entry.hash = Some(name.hash);
            entry.flags = entry
                .flags
                .with_algorithm(self.encoding.algorithm)
                .with_compression(self.encoding.compression);
            self.workspace.insert(below, &path, &entry, &[])?;
        }
        Ok(())
    }
}

/// The row of `/.cvmfsdirtab` if it is a regular file with one object.
pub(crate) fn dirtab_entry(workspace: &mut Workspace) -> Result<Option<Entry>, PublishError> {
    let entry = workspace.lookup(&joined(b"", DIRTAB))?;
    Ok(entry.filter(|entry| entry.kind() == EntryKind::File && entry.hash.is_some()))
}

/// What a catalog has in one directory.
#[derive(Debug, Default)]
struct Rows {
    own: u64,
    below: Vec<(PathHash, Vec<u8>)>,
}

fn weigh_rows(
    directories: &HashMap<PathHash, Rows>,
    path: &[u8],
    limits: CatalogLimits,
    cuts: &mut Vec<Vec<u8>>,
) -> u64 {
    let Some(rows) = directories.get(&PathHash::of(path)) else { return 0 };
    let weigh = |(_, name): &(PathHash, Vec<u8>)| {
        let path = joined(path, name);
        (weigh_rows(directories, &path, limits, cuts), path)
    };
    let below = rows.below.iter().map(weigh).collect();
    let (weight, heavy) = divide(rows.own, below, limits);
    cuts.extend(heavy);
    weight
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: CatalogLimits = CatalogLimits { max: 100, min: 10 };

    #[test]
    fn the_heaviest_go_until_half_of_the_limit_is_left() {
        assert_eq!(divide(10, vec![(20, 'a'), (15, 'b')], LIMITS), (45, vec![]));
        assert_eq!(divide(10, vec![(20, 'a'), (40, 'b'), (15, 'c')], LIMITS), (45, vec!['b']));
        assert_eq!(divide(60, vec![(20, 'a'), (9, 'b')], LIMITS), (69, vec!['a']), "what is too small stays");
        assert_eq!(
            divide(500, Vec::<(u64, char)>::new(), LIMITS),
            (500, vec![]),
            "one large directory stays whole"
        );
    }
}
