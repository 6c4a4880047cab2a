//! An archive's entries as the tree they describe, before it meets the repository.
//!
//! Archives repeat directories, bring a directory's entry after its content, link to
//! files that come later, and replace what they said before. All of that is settled
//! here, in memory, with one rule: *the last entry of a path wins*, as it does when
//! an archive is unpacked. Only the finished tree is applied to catalogs, so
//! a broken archive leaves no trace there.
//!
//! | in the archive | result |
//! |---|---|
//! | directory twice, or after its content | one directory, metadata of the last entry |
//! | file, link or special over anything | replaces it, a directory with all its content |
//! | directory over a file | replaces it |
//! | entry without its parent directories | parents are made: 0755, 0:0, time of that entry |
//! | entry below a symbolic link | goes where the link leads, within the base (see `links`) |
//! | entry below something else that is no directory | refused |
//! | hard link | another name of the target as it is then, whose metadata become those of this entry; a target that comes later counts at the end |
//! | hard link to nothing or to a directory | refused |
//! | whiteout and the name itself | the name wins; a directory becomes opaque |

mod links;

use std::collections::BTreeMap;

use cvmfs_format::Compression;
use cvmfs_format::xattr::Xattrs;
use layer_tar::{LayerPath, Timestamp};

use crate::error::PublishError;
use crate::pipeline::Ticket;

pub(crate) use links::{Existing, Lookup};

/// Deepest accepted directory nesting. Linux resolves no path of more than 4096 bytes in one call; the bound
/// also limits the recursion over the tree.
pub(crate) const MAX_DEPTH: usize = 1024;
/// Marks an opaque directory for overlayfs mounted by root, and in user namespaces (errata 24).
const OPAQUE_XATTRS: [&[u8]; 2] = [b"trusted.overlay.opaque", b"user.overlay.opaque"];

/// Metadata of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Meta {
    /// Permission bits, 0 to 07777.
    pub(crate) permissions: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Timestamp,
    pub(crate) xattrs: Xattrs,
}

impl Meta {
    /// Of a directory that nothing describes.
    pub(crate) fn implied_directory(mtime: Timestamp) -> Meta {
        Meta { permissions: 0o755, uid: 0, gid: 0, mtime, xattrs: Xattrs::default() }
    }
}

/// A file's content: its size and the claims on the hashes of its objects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FileContent {
    pub(crate) size: u64,
    pub(crate) compression: Compression,
    pub(crate) pieces: Pieces,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Pieces {
    Whole(Ticket),
    /// Offset, size and object of each chunk, contiguous from 0; at least two.
    Chunks(Box<[(u64, u64, Ticket)]>),
}

/// What an entry other than a directory is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    File(FileContent),
    Symlink(Box<[u8]>),
    Fifo,
    Socket,
    /// Device number in the C library's encoding.
    CharDevice(u64),
    BlockDevice(u64),
}

/// An entry other than a directory; several names can share it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Leaf {
    pub(crate) meta: Meta,
    pub(crate) kind: Kind,
}

/// Names with the same identity are hard links of each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct LeafId(usize);

#[derive(Debug)]
pub(crate) enum Child {
    Directory(Box<Directory>),
    Leaf(LeafId),
    /// A hard link whose target is not (yet) in the archive.
    Link(LayerPath),
}

#[derive(Debug)]
pub(crate) struct Directory {
    /// `None` if the archive has no entry for it.
    pub(crate) meta: Option<Meta>,
    /// Time of the entry that implied the directory.
    pub(crate) implied_by: Timestamp,
    pub(crate) children: BTreeMap<Box<[u8]>, Child>,
    /// An earlier entry of the archive put something else here: what the repository has goes, too.
    pub(crate) replaces: bool,
    whiteouts: BTreeMap<Box<[u8]>, Meta>,
    opaque: bool,
}

impl Directory {
    fn implied(by: Timestamp) -> Directory {
        Directory {
            meta: None,
            implied_by: by,
            children: BTreeMap::new(),
            replaces: false,
            whiteouts: BTreeMap::new(),
            opaque: false,
        }
    }
}

/// The tree below the base directory of an ingest.
#[derive(Debug)]
pub(crate) struct LayerTree {
    pub(crate) root: Directory,
    leaves: Vec<Leaf>,
    unresolved: usize,
}

impl LayerTree {
    /// An empty tree, made at `now`.
    pub(crate) fn new(now: Timestamp) -> LayerTree {
        LayerTree { root: Directory::implied(now), leaves: Vec::new(), unresolved: 0 }
    }

    pub(crate) fn leaf(&self, id: LeafId) -> &Leaf {
        &self.leaves[id.0]
    }

    pub(crate) fn add_directory(&mut self, path: &LayerPath, meta: Meta) -> Result<(), PublishError> {
        let Some((parents, name)) = split(path)? else {
            self.root.meta = Some(meta);
            return Ok(());
        };
        let parent = descend(&mut self.root, parents, path, meta.mtime)?;
        match parent.children.get_mut(name) {
            Some(Child::Directory(there)) => there.meta = Some(meta),
            earlier => {
                let mut directory = Directory::implied(meta.mtime);
                directory.replaces = earlier.is_some();
                directory.meta = Some(meta);
                parent.children.insert(name.into(), Child::Directory(Box::new(directory)));
            }
        }
        Ok(())
    }

    pub(crate) fn add_leaf(&mut self, path: &LayerPath, leaf: Leaf) -> Result<(), PublishError> {
        let time = leaf.meta.mtime;
        let id = LeafId(self.leaves.len());
        self.leaves.push(leaf);
        self.put(path, Child::Leaf(id), time)
    }

    /// Adds another name of a file. `meta` is what the entry says of it, if it says something of its own.
    pub(crate) fn add_hard_link(
        &mut self,
        path: &LayerPath,
        target: &LayerPath,
        time: Timestamp,
        meta: Option<Meta>,
    ) -> Result<(), PublishError> {
        match find(&self.root, target) {
            Some(Child::Leaf(id)) => {
                let id = *id;
                if let Some(meta) = meta {
                    self.describe_again(id, meta);
                }
                self.put(path, Child::Leaf(id), time)
            }
            Some(Child::Directory(_)) => Err(links_to_directory(path, target)),
            Some(Child::Link(_)) | None => {
                self.unresolved += 1;
                self.put(path, Child::Link(target.clone()), time)
            }
        }
    }

    /// Engines give a hard link's metadata to the file, which all its names share. Writers repeat those of the file.
    fn describe_again(&mut self, id: LeafId, meta: Meta) {
        if let Some(leaf) = self.leaves.get_mut(id.0)
            && !matches!(leaf.kind, Kind::Symlink(_))
        {
            let Meta { permissions, uid, gid, mtime, xattrs } = meta;
            for (name, value) in xattrs.iter() {
                leaf.meta.xattrs.insert(name.to_vec(), value.to_vec());
            }
            leaf.meta = Meta { permissions, uid, gid, mtime, xattrs: std::mem::take(&mut leaf.meta.xattrs) };
        }
    }

    /// Notes that `name` of the layers below is to be hidden.
    pub(crate) fn add_whiteout(
        &mut self,
        marker: &LayerPath,
        name: &[u8],
        meta: Meta,
    ) -> Result<(), PublishError> {
        if matches!(name, b"" | b"." | b"..") {
            return Err(PublishError::entry(marker.as_bytes(), "is a whiteout of no possible name"));
        }
        let Some((parents, _)) = split(marker)? else { return Ok(()) };
        let parent = descend(&mut self.root, parents, marker, meta.mtime)?;
        parent.whiteouts.insert(name.into(), meta);
        Ok(())
    }

    /// Notes that the layers below are to be hidden in the directory that holds `marker`.
    pub(crate) fn add_opaque(&mut self, marker: &LayerPath, time: Timestamp) -> Result<(), PublishError> {
        let Some((parents, _)) = split(marker)? else { return Ok(()) };
        descend(&mut self.root, parents, marker, time)?.opaque = true;
        Ok(())
    }

    /// Adds a catalog marker to the root unless the archive brought one.
    pub(crate) fn add_marker(&mut self, name: &[u8], meta: Meta, content: FileContent) {
        match self.root.children.get(name) {
            None => {}
            // a layer that deletes the marker of a layer below
            Some(Child::Leaf(id)) if self.leaf(*id).kind == Kind::CharDevice(0) => {}
            Some(_) => return,
        }
        let id = LeafId(self.leaves.len());
        self.leaves.push(Leaf { meta, kind: Kind::File(content) });
        self.root.children.insert(name.into(), Child::Leaf(id));
    }

    /// Settles what could only be known at the end: links to later entries, whiteouts, opaque directories.
    ///
    /// Links whose target the archive lacks remain [`Child::Link`]: the repository may have it.
    pub(crate) fn finish(&mut self) -> Result<(), PublishError> {
        self.resolve_links()?;
        let mut leaves = std::mem::take(&mut self.leaves);
        settle_whiteouts(&mut self.root, &mut leaves);
        self.leaves = leaves;
        Ok(())
    }

    /// An error naming an entry whose file has another name in another directory.
    pub(crate) fn refuse_links_across_directories(&self) -> Result<(), PublishError> {
        let mut places = vec![None; self.leaves.len()];
        let mut directories: Vec<(LayerPath, &Directory)> = vec![(LayerPath::root(), &self.root)];
        let mut number = 0_usize;
        while let Some((path, directory)) = directories.pop() {
            number += 1;
            for (name, child) in &directory.children {
                let join = || path.join(name).map_err(|e| PublishError::entry(name, e));
                match child {
                    Child::Directory(below) => directories.push((join()?, below)),
                    Child::Leaf(id) if places[id.0].replace(number).is_some_and(|place| place != number) => {
                        return Err(PublishError::entry(
                            join()?.as_bytes(),
                            "has a hard link in another directory",
                        ));
                    }
                    Child::Leaf(_) | Child::Link(_) => {}
                }
            }
        }
        Ok(())
    }

    fn put(&mut self, path: &LayerPath, child: Child, time: Timestamp) -> Result<(), PublishError> {
        let Some((parents, name)) = split(path)? else {
            return Err(PublishError::entry(b"./", "the root of an archive must be a directory"));
        };
        descend(&mut self.root, parents, path, time)?.children.insert(name.into(), child);
        Ok(())
    }

    fn resolve_links(&mut self) -> Result<(), PublishError> {
        // chains (a link to a link to a file) need several rounds; a round without progress is the last
        while self.unresolved > 0 {
            let mut links = Vec::new();
            collect_links(&self.root, &mut LayerPath::root(), &mut links)?;
            let mut resolved = 0;
            for (path, target) in &links {
                match find(&self.root, target) {
                    Some(Child::Leaf(id)) => {
                        let id = *id;
                        self.put(path, Child::Leaf(id), (0, 0))?;
                        resolved += 1;
                    }
                    Some(Child::Directory(_)) => return Err(links_to_directory(path, target)),
                    Some(Child::Link(_)) | None => {}
                }
            }
            self.unresolved = links.len() - resolved;
            if resolved == 0 {
                break;
            }
        }
        Ok(())
    }
}

fn links_to_directory(path: &LayerPath, target: &LayerPath) -> PublishError {
    let target = crate::error::shown(target.as_bytes());
    PublishError::entry(path.as_bytes(), format!("is a hard link to the directory {target}"))
}

type Split<'a> = Option<(Vec<&'a [u8]>, &'a [u8])>;

/// Parent components and name of a path; `None` for the root.
fn split(path: &LayerPath) -> Result<Split<'_>, PublishError> {
    let mut components: Vec<&[u8]> = path.components().collect();
    if components.len() > MAX_DEPTH {
        let reason = format!("lies more than {MAX_DEPTH} directories deep");
        return Err(PublishError::entry(path.as_bytes(), reason));
    }
    Ok(components.pop().map(|name| (components, name)))
}

/// The directory at `parents`, made where missing.
fn descend<'t>(
    root: &'t mut Directory,
    parents: Vec<&[u8]>,
    path: &LayerPath,
    time: Timestamp,
) -> Result<&'t mut Directory, PublishError> {
    let mut directory = root;
    for (depth, component) in parents.iter().enumerate() {
        let missing = || Child::Directory(Box::new(Directory::implied(time)));
        match directory.children.entry((*component).into()).or_insert_with(missing) {
            Child::Directory(next) => directory = next,
            Child::Leaf(_) | Child::Link(_) => {
                let obstacle = crate::error::shown(&parents[..=depth].join(&b'/'));
                let reason = format!("lies below {obstacle}, which is not a directory in this archive");
                return Err(PublishError::entry(path.as_bytes(), reason));
            }
        }
    }
    Ok(directory)
}

fn find<'t>(root: &'t Directory, path: &LayerPath) -> Option<&'t Child> {
    let mut components = path.components();
    let mut child = root.children.get(components.next()?)?;
    for component in components {
        let Child::Directory(directory) = child else { return None };
        child = directory.children.get(component)?;
    }
    Some(child)
}

fn collect_links(
    directory: &Directory,
    at: &mut LayerPath,
    links: &mut Vec<(LayerPath, LayerPath)>,
) -> Result<(), PublishError> {
    for (name, child) in &directory.children {
        let join = |at: &LayerPath| at.join(name).map_err(|e| PublishError::entry(name, e));
        match child {
            Child::Directory(below) => collect_links(below, &mut join(at)?, links)?,
            Child::Link(target) => links.push((join(at)?, target.clone())),
            Child::Leaf(_) => {}
        }
    }
    Ok(())
}

fn settle_whiteouts(directory: &mut Directory, leaves: &mut Vec<Leaf>) {
    for (name, meta) in std::mem::take(&mut directory.whiteouts) {
        match directory.children.get_mut(&name) {
            Some(Child::Directory(there)) => there.opaque = true,
            Some(Child::Leaf(_) | Child::Link(_)) => {}
            None => {
                // overlayfs writes its own whiteouts with mode 0
                let meta = Meta { permissions: 0, xattrs: Xattrs::default(), ..meta };
                let id = LeafId(leaves.len());
                leaves.push(Leaf { meta, kind: Kind::CharDevice(0) });
                directory.children.insert(name, Child::Leaf(id));
            }
        }
    }
    if directory.opaque {
        let time = directory.implied_by;
        let meta = directory.meta.get_or_insert_with(|| Meta::implied_directory(time));
        for name in OPAQUE_XATTRS {
            meta.xattrs.insert(name.to_vec(), b"y".to_vec());
        }
    }
    for child in directory.children.values_mut() {
        if let Child::Directory(below) = child {
            settle_whiteouts(below, leaves);
        }
    }
}

#[cfg(test)]
mod tests {
    use layer_tar::AbsoluteNames;

    use super::*;

    fn path(text: &str) -> LayerPath {
        LayerPath::parse(text.as_bytes(), AbsoluteNames::Refuse).unwrap()
    }

    fn meta(permissions: u32) -> Meta {
        Meta { permissions, ..Meta::implied_directory((7, 0)) }
    }

    fn fifo(permissions: u32) -> Leaf {
        Leaf { meta: meta(permissions), kind: Kind::Fifo }
    }

    fn tree() -> LayerTree {
        LayerTree::new((1, 0))
    }

    fn directory<'t>(tree: &'t LayerTree, at: &str) -> &'t Directory {
        match find(&tree.root, &path(at)) {
            Some(Child::Directory(found)) => found,
            other => panic!("{at}: {other:?}"),
        }
    }

    fn leaf<'t>(tree: &'t LayerTree, at: &str) -> &'t Leaf {
        match find(&tree.root, &path(at)) {
            Some(Child::Leaf(id)) => tree.leaf(*id),
            other => panic!("{at}: {other:?}"),
        }
    }

    #[test]
    fn a_hard_link_describes_the_file_that_it_is_another_name_of() {
        let mut tree = tree();
        tree.add_leaf(&path("a"), fifo(0o600)).unwrap();
        let link = Meta { uid: 7, ..meta(0o644) };
        tree.add_hard_link(&path("b"), &path("a"), (0, 0), Some(link.clone())).unwrap();
        tree.finish().unwrap();
        for name in ["a", "b"] {
            assert_eq!(leaf(&tree, name).meta, link, "{name}");
        }
    }

    #[test]
    fn a_directory_entry_after_its_content_sets_the_metadata() {
        let mut tree = tree();
        tree.add_leaf(&path("a/f"), fifo(0)).unwrap();
        assert_eq!(directory(&tree, "a").meta, None);
        tree.add_directory(&path("a"), meta(0o700)).unwrap();
        tree.add_directory(&path("a"), meta(0o711)).unwrap();
        assert_eq!(directory(&tree, "a").meta.as_ref().unwrap().permissions, 0o711);
        leaf(&tree, "a/f");
    }

    #[test]
    fn the_last_entry_of_a_path_wins_whatever_its_type() {
        let mut tree = tree();
        tree.add_leaf(&path("a/b"), fifo(1)).unwrap();
        tree.add_leaf(&path("a/b"), fifo(2)).unwrap();
        assert_eq!(leaf(&tree, "a/b").meta.permissions, 2);
        tree.add_leaf(&path("a"), fifo(3)).unwrap();
        assert_eq!(leaf(&tree, "a").meta.permissions, 3);
        tree.add_directory(&path("a"), meta(4)).unwrap();
        assert!(directory(&tree, "a").children.is_empty());
    }

    #[test]
    fn an_entry_below_a_file_is_refused_by_name() {
        let mut tree = tree();
        tree.add_leaf(&path("x/file"), fifo(0)).unwrap();
        let error = tree.add_leaf(&path("x/file/below/it"), fifo(0)).unwrap_err().to_string();
        assert_eq!(
            error,
            "entry x/file/below/it: lies below x/file, which is not a directory in this archive"
        );
    }

    #[test]
    fn hard_links_follow_chains_and_forward_targets() {
        let mut tree = tree();
        tree.add_hard_link(&path("c"), &path("b"), (0, 0), None).unwrap();
        tree.add_hard_link(&path("b"), &path("d/a"), (0, 0), None).unwrap();
        tree.add_leaf(&path("d/a"), fifo(5)).unwrap();
        tree.finish().unwrap();
        for name in ["a", "b", "c"] {
            let at = if name == "a" { "d/a" } else { name };
            assert_eq!(leaf(&tree, at).meta.permissions, 5);
        }
    }

    #[test]
    fn a_hard_link_keeps_its_target_when_the_target_is_replaced() {
        let mut tree = tree();
        tree.add_leaf(&path("a"), fifo(1)).unwrap();
        tree.add_hard_link(&path("b"), &path("a"), (0, 0), None).unwrap();
        tree.add_leaf(&path("a"), fifo(2)).unwrap();
        tree.finish().unwrap();
        assert_eq!(leaf(&tree, "b").meta.permissions, 1);
    }

    #[test]
    fn a_link_to_a_directory_is_refused_and_a_missing_target_is_left_to_the_repository() {
        let mut tree = tree();
        tree.add_directory(&path("d"), meta(0)).unwrap();
        assert!(tree.add_hard_link(&path("l"), &path("d"), (0, 0), None).is_err());
        tree.add_hard_link(&path("m"), &path("self/m"), (0, 0), None).unwrap();
        tree.finish().unwrap();
        assert!(matches!(find(&tree.root, &path("m")), Some(Child::Link(_))));
    }

    #[test]
    fn whiteouts_become_devices_unless_the_name_itself_is_there() {
        let mut tree = tree();
        tree.add_whiteout(&path("d/.wh.gone"), b"gone", meta(0o644)).unwrap();
        tree.add_whiteout(&path("d/.wh.file"), b"file", meta(0o644)).unwrap();
        tree.add_whiteout(&path("d/.wh.dir"), b"dir", meta(0o644)).unwrap();
        tree.add_leaf(&path("d/file"), fifo(6)).unwrap();
        tree.add_directory(&path("d/dir"), meta(0o755)).unwrap();
        tree.add_opaque(&path(".wh..wh..opq"), (0, 0)).unwrap();
        tree.finish().unwrap();
        assert_eq!(leaf(&tree, "d/gone").kind, Kind::CharDevice(0));
        assert_eq!(leaf(&tree, "d/gone").meta.permissions, 0);
        assert_eq!(leaf(&tree, "d/file").kind, Kind::Fifo);
        let opaque = |d: &Directory| {
            let xattrs = &d.meta.as_ref().expect("an opaque directory has metadata").xattrs;
            OPAQUE_XATTRS.iter().all(|name| xattrs.get(name) == Some(&b"y"[..]))
        };
        assert!(opaque(directory(&tree, "d/dir")));
        assert!(opaque(&tree.root));
        assert!(tree.add_whiteout(&path("d/.wh.x"), b"..", meta(0)).is_err());
    }

    #[test]
    fn an_absurdly_deep_entry_is_refused() {
        let deep = "d/".repeat(MAX_DEPTH) + "f";
        assert!(tree().add_leaf(&path(&deep), fifo(0)).is_err());
    }
}
