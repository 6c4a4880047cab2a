//! Applying a finished [`LayerTree`] to the catalogs.
//!
//! Merging with what the repository has follows the rule of the archive itself: what comes
//! later wins.
//!
//! | repository | tree | result |
//! |---|---|---|
//! | nothing | anything | added |
//! | directory | directory with metadata | merged; metadata of the tree |
//! | directory | directory only implied by entries below | merged; metadata stay |
//! | directory | file, link or special | replaced with all its content |
//! | file, link or special | anything but an implied directory | replaced |
//! | file, link or special | directory only implied | refused, naming the entry |
//!
//! A regular file `.cvmfscatalog` makes its directory a nested catalog. Several names of one
//! file in one directory become a hard link group; in different directories they are independent
//! entries that share their objects, as the format demands (§9.4). A hard link to a file
//! that only the repository has becomes a copy of that entry.

use std::collections::HashMap;

use cvmfs_format::HashAlgorithm;
use cvmfs_format::catalog::{Chunk, Entry, EntryFlags, EntryKind};
use layer_tar::{LayerPath, Timestamp};

use crate::error::{PublishError, shown};
use crate::path::{RepositoryPath, parent_of};
use crate::pipeline::Pipeline;
use crate::tree::{Child, Directory, FileContent, Kind, LayerTree, Leaf, LeafId, Meta, Pieces};
use crate::workspace::{Index, MARKER, Workspace, joined};

/// What directories say about their size; the C++ tools take it from ext4.
const DIRECTORY_SIZE: u64 = 4096;

/// Applies one tree. After an error the workspace must not be committed.
#[derive(Debug)]
pub(crate) struct Apply<'a> {
    pub(crate) workspace: &'a mut Workspace,
    pub(crate) pipeline: &'a Pipeline,
    pub(crate) tree: &'a LayerTree,
    /// Algorithm of the objects that the pipeline stored.
    pub(crate) algorithm: HashAlgorithm,
    /// Whether to record nanoseconds.
    pub(crate) nanoseconds: bool,
    /// Time of directories that must be made above the base.
    pub(crate) now: Timestamp,
}

/// A hard link group to be: its number, and how many names of the directory are in it.
type Group = (u32, u32);

impl Apply<'_> {
    /// Puts the tree at `base`, making the directories above it if need be.
    pub(crate) fn at(mut self, base: &RepositoryPath) -> Result<(), PublishError> {
        for directory in base.ancestors() {
            self.ensure_directory(directory)?;
        }
        let path = base.as_bytes();
        let mut links = Vec::new();
        let above = self.workspace.row_catalog(path)?;
        if self.place_directory(above, path, &self.tree.root, false, &mut links)? && !base.is_root() {
            self.add_subdirectories(parent_of(path), 1)?;
        }
        for (path, target) in links {
            self.place_link(&path, base, target)?;
        }
        Ok(())
    }

    fn ensure_directory(&mut self, path: &[u8]) -> Result<(), PublishError> {
        match self.workspace.lookup(path)? {
            Some(entry) if entry.is_directory() => Ok(()),
            Some(entry) => Err(not_a_directory(path, path, &entry)),
            None => {
                let at = self.workspace.row_catalog(path)?;
                let entry = self.directory_entry(path, &Meta::implied_directory(self.now), 0)?;
                self.workspace.insert(at, path, &entry, &[])?;
                self.add_subdirectories(parent_of(path), 1)
            }
        }
    }

    /// Puts a directory at `path`, whose row belongs into `at`. True if there was no directory before.
    fn place_directory(
        &mut self,
        at: Index,
        path: &[u8],
        directory: &Directory,
        nothing_there: bool,
        links: &mut Vec<(Vec<u8>, LayerPath)>,
    ) -> Result<bool, PublishError> {
        let existing = if nothing_there { None } else { self.workspace.row(at, path)? };
        let was_directory = existing.as_ref().is_some_and(Entry::is_directory);
        let is_new = match existing {
            Some(entry) if entry.is_bind_mountpoint() => {
                return Err(PublishError::entry(
                    path,
                    "is a bind mountpoint: its content belongs to another catalog",
                ));
            }
            Some(entry) if entry.is_directory() && directory.replaces => {
                self.workspace.remove_tree(at, path, &entry)?;
                true
            }
            Some(entry) if entry.is_directory() => {
                if let Some(meta) = &directory.meta {
                    self.update_metadata(at, path, meta)?;
                }
                false
            }
            Some(entry) => {
                if directory.meta.is_none() {
                    return Err(not_a_directory(path, first_below(path, directory).as_slice(), &entry));
                }
                self.workspace.remove_leaf(at, path, &entry)?;
                true
            }
            None => true,
        };
        if is_new {
            let implied = Meta::implied_directory(directory.implied_by);
            let meta = directory.meta.as_ref().unwrap_or(&implied);
            let subdirectories =
                directory.children.values().filter(|c| matches!(c, Child::Directory(_))).count();
            let entry = self.directory_entry(path, meta, subdirectories)?;
            self.workspace.insert(at, path, &entry, &[])?;
        }
        if matches!(directory.children.get(MARKER), Some(Child::Leaf(id)) if self.is_file(*id)) {
            self.workspace.split(at, path)?;
        }
        let inside = self.workspace.content_catalog(path)?;
        let added = self.place_children(inside, path, directory, is_new, links)?;
        if !is_new && added != 0 {
            self.add_subdirectories(path, added)?;
        }
        Ok(!was_directory)
    }

    /// Puts the content of a directory into the catalog `at`; returns by how many its sub-directories grew.
    fn place_children(
        &mut self,
        at: Index,
        path: &[u8],
        directory: &Directory,
        is_new: bool,
        links: &mut Vec<(Vec<u8>, LayerPath)>,
    ) -> Result<i64, PublishError> {
        let groups = self.link_groups(at, path, directory)?;
        let mut added = 0;
        for (name, child) in &directory.children {
            let path = joined(path, name);
            match child {
                Child::Directory(below) => {
                    if **name == *MARKER {
                        return Err(marker_is_no_file(&path));
                    }
                    added += i64::from(self.place_directory(at, &path, below, is_new, links)?);
                }
                Child::Leaf(id) => {
                    let group = groups.get(id).copied();
                    added += self.place_leaf(at, &path, *id, group, is_new)?;
                }
                Child::Link(target) => links.push((path, target.clone())),
            }
        }
        Ok(added)
    }

    /// Numbers for the files that have several names in one directory.
    fn link_groups(
        &mut self,
        at: Index,
        path: &[u8],
        directory: &Directory,
    ) -> Result<HashMap<LeafId, Group>, PublishError> {
        let mut names: HashMap<LeafId, u32> = HashMap::new();
        for child in directory.children.values() {
            if let Child::Leaf(id) = child {
                *names.entry(*id).or_default() += 1;
            }
        }
        // in the order of the archive, so that equal archives give equal catalogs
        let mut shared: Vec<(LeafId, u32)> = names.into_iter().filter(|(_, count)| *count > 1).collect();
        shared.sort_unstable();
        let mut groups = HashMap::new();
        for (id, count) in shared {
            groups.insert(id, (self.workspace.new_link_group(at, path)?, count));
        }
        Ok(groups)
    }

    /// Puts a file, link or special file at `path`; returns by how many the parent's sub-directories grew: 0 or -1.
    fn place_leaf(
        &mut self,
        at: Index,
        path: &[u8],
        id: LeafId,
        group: Option<Group>,
        nothing_there: bool,
    ) -> Result<i64, PublishError> {
        let leaf = self.tree.leaf(id);
        if path.ends_with(b"/.cvmfscatalog") {
            if parent_of(path).is_empty() {
                return Err(PublishError::entry(path, "the repository's root cannot be a nested catalog"));
            }
            match leaf.kind {
                Kind::File(_) => {}
                // a layer that deletes the marker of a layer below: nothing depends on it
                Kind::CharDevice(0) => return Ok(0),
                _ => return Err(marker_is_no_file(path)),
            }
        }
        let (mut entry, chunks) = self.leaf_entry(path, leaf)?;
        if let Some((number, names)) = group {
            (entry.link_group, entry.link_count) = (number, names);
        }
        let there = if nothing_there { None } else { self.workspace.row(at, path)? };
        if let Some(there) = &there
            && self.is_same(at, path, there, &entry, &chunks)?
        {
            return Ok(0);
        }
        let grown = self.clear(at, path, there)?;
        self.workspace.insert(at, path, &entry, &chunks)?;
        Ok(grown)
    }

    /// Whether a row says the same as the one that would replace it: then its catalog stays as it is.
    fn is_same(
        &self,
        at: Index,
        path: &[u8],
        there: &Entry,
        entry: &Entry,
        chunks: &[Chunk],
    ) -> Result<bool, PublishError> {
        // The numbers of hard link groups are given anew.
        Ok(entry.link_group == 0
            && *there == Entry { rowid: there.rowid, ..entry.clone() }
            && self.workspace.chunks_of(at, there, path)? == chunks)
    }

    /// Removes what is at `path`; -1 if that was a directory.
    fn clear(&mut self, at: Index, path: &[u8], there: Option<Entry>) -> Result<i64, PublishError> {
        match there {
            Some(entry) if entry.is_directory() => {
                self.workspace.remove_tree(at, path, &entry)?;
                Ok(-1)
            }
            Some(entry) => {
                self.workspace.remove_leaf(at, path, &entry)?;
                Ok(0)
            }
            None => Ok(0),
        }
    }

    /// Makes `path` a copy of an entry that only the repository has.
    fn place_link(
        &mut self,
        path: &[u8],
        base: &RepositoryPath,
        target: LayerPath,
    ) -> Result<(), PublishError> {
        let source = joined(base.as_bytes(), target.as_bytes());
        let found = match self.workspace.lookup(&source)? {
            Some(found) if found.is_directory() => {
                let reason = format!("is a hard link to the directory {}", shown(target.as_bytes()));
                return Err(PublishError::entry(path, reason));
            }
            Some(found) if source != path => found,
            _ => {
                let target = shown(target.as_bytes());
                let reason =
                    format!("is a hard link to {target}, which is neither in the archive nor below the base");
                return Err(PublishError::entry(path, reason));
            }
        };
        let from = self.workspace.row_catalog(&source)?;
        let chunks = self.workspace.chunks_of(from, &found, &source)?;
        let place = Entry::new(path, found.kind(), 0);
        let (path_hash, parent, name) = (place.path_hash, place.parent, place.name);
        let copy = Entry { path_hash, parent, name, link_group: 0, link_count: 1, ..found };
        if path.ends_with(b"/.cvmfscatalog") {
            if copy.kind() != EntryKind::File {
                return Err(marker_is_no_file(path));
            }
            let directory = parent_of(path);
            let above = self.workspace.row_catalog(directory)?;
            self.workspace.split(above, directory)?;
        }
        let at = self.workspace.row_catalog(path)?;
        let there = self.workspace.row(at, path)?;
        let grown = self.clear(at, path, there)?;
        self.workspace.insert(at, path, &copy, &chunks)?;
        self.add_subdirectories(parent_of(path), grown)
    }

    fn add_subdirectories(&mut self, path: &[u8], added: i64) -> Result<(), PublishError> {
        if added == 0 {
            return Ok(());
        }
        let at = self.workspace.row_catalog(path)?;
        self.workspace.update_directory(at, path, |entry| {
            let links = i64::from(entry.link_count).saturating_add(added).max(2);
            entry.link_count = u32::try_from(links).unwrap_or(u32::MAX);
        })
    }

    fn update_metadata(&mut self, at: Index, path: &[u8], meta: &Meta) -> Result<(), PublishError> {
        let template = self.directory_entry(path, meta, 0)?;
        self.workspace.update_directory(at, path, |entry| {
            entry.mode = template.mode;
            (entry.uid, entry.gid) = (template.uid, template.gid);
            (entry.mtime, entry.mtime_ns) = (template.mtime, template.mtime_ns);
            entry.xattrs.clone_from(&template.xattrs);
        })
    }

    fn is_file(&self, id: LeafId) -> bool {
        matches!(self.tree.leaf(id).kind, Kind::File(_))
    }

    fn directory_entry(
        &self,
        path: &[u8],
        meta: &Meta,
        subdirectories: usize,
    ) -> Result<Entry, PublishError> {
        let mut entry = self.entry(path, EntryKind::Directory, meta);
        entry.size = DIRECTORY_SIZE;
        entry.link_count = u32::try_from(subdirectories).unwrap_or(u32::MAX).saturating_add(2);
        entry.xattrs = stored_xattrs(path, meta)?;
        Ok(entry)
    }

    fn leaf_entry(&self, path: &[u8], leaf: &Leaf) -> Result<(Entry, Vec<Chunk>), PublishError> {
        let kind = match leaf.kind {
            Kind::File(_) => EntryKind::File,
            Kind::Symlink(_) => EntryKind::Symlink,
            Kind::Fifo => EntryKind::Fifo,
            Kind::Socket => EntryKind::Socket,
            Kind::CharDevice(_) => EntryKind::CharDevice,
            Kind::BlockDevice(_) => EntryKind::BlockDevice,
        };
        let mut entry = self.entry(path, kind, &leaf.meta);
        entry.xattrs = stored_xattrs(path, &leaf.meta)?;
        let mut chunks = Vec::new();
        match &leaf.kind {
            Kind::File(content) => chunks = self.describe_content(&mut entry, content),
            Kind::Symlink(target) => {
                entry.size = target.len() as u64;
                entry.symlink = target.to_vec();
            }
            Kind::CharDevice(number) | Kind::BlockDevice(number) => entry.size = *number,
            Kind::Fifo | Kind::Socket => {}
        }
        Ok((entry, chunks))
    }

    fn describe_content(&self, entry: &mut Entry, content: &FileContent) -> Vec<Chunk> {
        entry.size = content.size;
        entry.flags = entry.flags.with_algorithm(self.algorithm).with_compression(content.compression);
        match &content.pieces {
            Pieces::Whole(ticket) => {
                entry.hash = Some(self.pipeline.hash(*ticket));
                Vec::new()
            }
            Pieces::Chunks(pieces) => {
                entry.flags = entry.flags.with(EntryFlags::CHUNKED);
                let chunk =
                    |&(offset, size, ticket)| Chunk { offset, size, hash: self.pipeline.hash(ticket) };
                pieces.iter().map(chunk).collect()
            }
        }
    }

    fn entry(&self, path: &[u8], kind: EntryKind, meta: &Meta) -> Entry {
        let mut entry = Entry::new(path, kind, meta.permissions);
        (entry.uid, entry.gid) = (meta.uid, meta.gid);
        entry.mtime = meta.mtime.0;
        entry.mtime_ns = self.nanoseconds.then_some(meta.mtime.1);
        entry
    }
}

fn stored_xattrs(path: &[u8], meta: &Meta) -> Result<Option<Vec<u8>>, PublishError> {
    meta.xattrs.to_bytes().map_err(|error| PublishError::entry(path, error))
}

fn marker_is_no_file(path: &[u8]) -> PublishError {
    PublishError::entry(path, "marks a nested catalog and must be a regular file")
}

fn not_a_directory(obstacle: &[u8], entry: &[u8], there: &Entry) -> PublishError {
    let kind = match there.kind() {
        EntryKind::File => "a file",
        EntryKind::Symlink => "a symbolic link",
        _ => "a special file",
    };
    let obstacle = shown(obstacle);
    PublishError::entry(
        entry,
        format!("{obstacle} is {kind} in the repository, not a directory: delete it first"),
    )
}

/// Some entry below an implied directory, for a message.
fn first_below(path: &[u8], directory: &Directory) -> Vec<u8> {
    match directory.children.iter().next() {
        Some((name, Child::Directory(below))) if below.meta.is_none() => {
            first_below(&joined(path, name), below)
        }
        Some((name, _)) => joined(path, name),
        None => path.to_vec(),
    }
}
