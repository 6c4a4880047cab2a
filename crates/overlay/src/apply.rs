//! From a layer archive to a layer on disk.
//!
//! Entries are made in archive order below directory descriptors that the kernel resolved within the target, so
//! no earlier entry can lead a later one out. After a failure what was written can be removed like any tree.

mod resolve;

use crate::ids::{IdMaps, Unmapped};
use crate::marks::{OpaqueXattr, is_whiteout, make_opaque, make_whiteout};
use crate::tree::{self, TreeError, join_shown, kind};
use crate::{size, xattrs};
use layer_tar::{
    EntryKind, LayerEntry, LayerPath, LayerReader, Limits, TarError, Timestamp, Whiteout, Xattr,
};
use resolve::{Missing, Resolver};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, chmodat, chownat, fchmod, fchown,
    ftruncate, futimens, linkat, makedev, mkdirat, mknodat, openat, statat, symlinkat, utimensat,
};
use rustix::io::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use thiserror::Error;

/// How a layer is to be written.
#[derive(Debug, Clone, Default)]
pub struct ApplyOptions {
    /// Which attribute marks opaque directories.
    pub opaque: OpaqueXattr,
    /// Owners of the archive are a container's; the host's are written.
    pub ids: IdMaps,
    /// What happens to device nodes.
    pub devices: Devices,
    /// What the archive may ask for.
    pub limits: Limits,
}

/// What happens to device nodes. Whiteouts are not device nodes in this sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Devices {
    /// They are made.
    #[default]
    Create,
    /// They are left out, for user namespaces, where the kernel does not allow them.
    Skip,
}

/// What [`apply`] has written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Applied {
    /// As [`layer_size`](crate::size::layer_size).
    pub size: u64,
    /// Entries read from the archive.
    pub entries: u64,
    /// Names in the layer's root, in bytewise order; at most [`ROOT_ENTRIES`] of them.
    pub root_entries: Vec<Vec<u8>>,
    /// Device nodes left out, see [`Devices::Skip`].
    pub skipped_devices: u64,
}

/// How many names of the root are reported: enough to recognise a layer that consists of a descriptor.
pub const ROOT_ENTRIES: usize = 64;

/// Bytes of directory names that are remembered until their times are set: the largest layers of the field need
/// a tenth of it, and a small compressed archive of long names could ask for any amount.
const MAX_DIRECTORY_NAMES: usize = 256 * 1024 * 1024;

/// Why a layer could not be written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ApplyError {
    /// The archive is broken, cut off, or has an entry that no layer can have.
    #[error("the layer archive is refused")]
    Archive(#[from] TarError),
    /// An entry below symbolic links that lead to each other.
    #[error(
        "entry '{entry}' is refused: it lies below symbolic links that lead in a circle, or more than 40 in a row"
    )]
    Circle {
        /// The entry's path.
        entry: LayerPath,
    },
    /// An entry below something that is not a directory.
    #[error("entry '{entry}' is refused: '{obstacle}' is not a directory")]
    NotDirectory {
        /// The entry's path.
        entry: LayerPath,
        /// What is in the way.
        obstacle: String,
    },
    /// A hard link to something that the archive has not brought before.
    #[error("hard link '{entry}' is refused: its target '{target}' is not in this layer")]
    LinkTarget {
        /// The entry's path.
        entry: LayerPath,
        /// The target's path.
        target: LayerPath,
    },
    /// An owner that the mapping does not have.
    #[error("entry '{entry}' cannot be written")]
    Owner {
        /// The entry's path.
        entry: LayerPath,
        /// Which owner.
        #[source]
        source: Unmapped,
    },
    /// More directories than can be remembered.
    #[error(
        "entry '{entry}' is refused: the names of the layer's directories take more than {MAX_DIRECTORY_NAMES} bytes"
    )]
    TooManyDirectories {
        /// The entry's path.
        entry: LayerPath,
    },
    /// The file system refused.
    #[error("entry '{entry}': cannot {action}")]
    Write {
        /// The entry's path.
        entry: LayerPath,
        /// What was tried.
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The target itself, or something in the way of an entry.
    #[error(transparent)]
    Tree(#[from] TreeError),
}

/// Writes the layer in the uncompressed archive `reader` into the existing directory `target`. The archive is
/// read to the end of the stream.
///
/// Whiteouts take overlayfs's form. A directory whose name a whiteout of the same archive had hidden before
/// becomes opaque. Missing parents are made with mode 0755 and owned by the container's root. Extended
/// attributes are written if they belong to content: `security.capability` and `user.*`.
pub fn apply(reader: impl Read, target: &Path, options: &ApplyOptions) -> Result<Applied, ApplyError> {
    let mut layer = Layer::open(target, options)?;
    let mut archive = LayerReader::new(reader, options.limits);
    let mut applied = Applied::default();
    while let Some(entry) = archive.next_entry()? {
        applied.entries += 1;
        applied.skipped_devices += u64::from(layer.add(entry)? == Added::Skipped);
    }
    layer.finish_directories()?;
    applied.size = size::layer_size(target)?;
    applied.root_entries = layer.root_entries()?;
    Ok(applied)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Added {
    Made,
    Skipped,
}

/// A layer being written.
struct Layer<'a> {
    resolver: Resolver,
    options: &'a ApplyOptions,
    /// Times of directories, set at the end because what is made in a directory changes its time.
    directories: BTreeMap<LayerPath, Timestamp>,
    /// Bytes of their names.
    directory_names: usize,
}

/// Where an entry goes, and what its messages say.
struct Place<'a> {
    entry: &'a LayerPath,
    parent: BorrowedFd<'a>,
    name: &'a [u8],
}

/// The metadata of an entry, mapped.
struct Owned {
    owner: (Uid, Gid),
    mode: Mode,
    times: Timestamps,
    xattrs: Vec<Xattr>,
}

impl<'a> Layer<'a> {
    fn open(target: &Path, options: &'a ApplyOptions) -> Result<Self, ApplyError> {
        let root = LayerPath::root();
        let (uid, gid) =
            options.ids.to_host(0, 0).map_err(|source| ApplyError::Owner { entry: root, source })?;
        let resolver = Resolver::open(target, (Uid::from_raw(uid), Gid::from_raw(gid)), options.opaque)?;
        Ok(Layer { resolver, options, directories: BTreeMap::new(), directory_names: 0 })
    }

    fn add(&mut self, entry: LayerEntry<'_, impl Read>) -> Result<Added, ApplyError> {
        let path = entry.path.clone();
        match path.whiteout() {
            Some(Whiteout::Internal) => return Ok(Added::Made),
            Some(Whiteout::Opaque) => return self.add_opaque(&path),
            Some(Whiteout::Name(hidden)) => return self.add_whiteout(&path, hidden),
            None => {}
        }
        let node = |kind, major, minor| (kind, makedev(major, minor));
        let special = match entry.kind {
            EntryKind::Char { major: 0, minor: 0 } => return self.add_whiteout(&path, path.name()),
            EntryKind::Char { .. } | EntryKind::Block { .. } if self.options.devices == Devices::Skip => {
                return Ok(Added::Skipped);
            }
            EntryKind::Char { major, minor } => Some(node(FileType::CharacterDevice, major, minor)),
            EntryKind::Block { major, minor } => Some(node(FileType::BlockDevice, major, minor)),
            EntryKind::Fifo => Some(node(FileType::Fifo, 0, 0)),
            _ => None,
        };

        let owned = self.owned(&entry)?;
        let parent = self.resolver.parent(&path, Missing::Create)?;
        let name = if path.is_root() { b"." } else { path.name() };
        let place = Place { entry: &path, parent: parent.as_fd(), name };
        match (&entry.kind, special) {
            (EntryKind::Directory, _) => {
                self.make_directory(&place)?;
                owned.write(&place)?;
                self.remember(&path, entry.mtime)?;
            }
            (EntryKind::File { .. }, _) => self.make_file(&place, entry, &owned)?,
            (EntryKind::Symlink(target), _) => {
                self.make(&place, "make the symbolic link", |place| {
                    symlinkat(&target[..], place.parent, place.name)
                })?;
                owned.write_link(&place)?;
            }
            (EntryKind::HardLink(target), _) => self.make_hard_link(&place, target)?,
            (_, special) => {
                let (kind, number) = special.unwrap_or((FileType::Fifo, 0));
                let action = "make the device node or pipe";
                self.make(&place, action, |place| {
                    mknodat(place.parent, place.name, kind, Mode::empty(), number)
                })?;
                owned.write(&place)?;
            }
        }
        Ok(Added::Made)
    }

    fn owned(&self, entry: &LayerEntry<'_, impl Read>) -> Result<Owned, ApplyError> {
        let owner = self.options.ids.to_host(entry.uid, entry.gid);
        let (uid, gid) = owner.map_err(|source| ApplyError::Owner { entry: entry.path.clone(), source })?;
        Ok(Owned {
            owner: (Uid::from_raw(uid), Gid::from_raw(gid)),
            mode: Mode::from_raw_mode(entry.mode),
            times: times(entry.mtime),
            xattrs: entry.xattrs.iter().filter(|(name, _)| xattrs::travels(name)).cloned().collect(),
        })
    }

    fn add_opaque(&mut self, marker: &LayerPath) -> Result<Added, ApplyError> {
        // A directory that the archive brings later only adds to the one made here.
        let directory = self.resolver.parent(marker, Missing::Create)?;
        make_opaque(directory.as_fd(), b".", self.options.opaque)
            .map_err(failed(marker, "mark the directory opaque"))?;
        Ok(Added::Made)
    }

    fn add_whiteout(&mut self, marker: &LayerPath, hidden: &[u8]) -> Result<Added, ApplyError> {
        let parent = self.resolver.parent(marker, Missing::Create)?;
        let place = Place { entry: marker, parent: parent.as_fd(), name: hidden };
        self.make(&place, "make the whiteout", |place| make_whiteout(place.parent, place.name))?;
        Ok(Added::Made)
    }

    /// Makes something new, in place of whatever has the name.
    fn make(
        &mut self,
        place: &Place<'_>,
        action: &'static str,
        make: impl Fn(&Place<'_>) -> rustix::io::Result<()>,
    ) -> Result<(), ApplyError> {
        match make(place) {
            Err(Errno::EXIST) => {
                self.clear(place)?;
                make(place).map_err(failed(place.entry, action))
            }
            made => made.map_err(failed(place.entry, action)),
        }
    }

    fn clear(&mut self, place: &Place<'_>) -> Result<(), ApplyError> {
        self.resolver.forget();
        tree::remove_at(place.parent, place.name).map_err(|error| {
            TreeError { path: join_shown(place.entry.as_bytes(), &error.path), ..error }.into()
        })
    }

    fn make_directory(&mut self, place: &Place<'_>) -> Result<(), ApplyError> {
        let action = "make the directory";
        match mkdirat(place.parent, place.name, Mode::RWXU) {
            Err(Errno::EXIST) => {}
            made => return made.map_err(failed(place.entry, action)),
        }
        let stat = statat(place.parent, place.name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(failed(place.entry, "examine what is there"))?;
        if kind(&stat) == FileType::Directory {
            return Ok(());
        }
        self.clear(place)?;
        mkdirat(place.parent, place.name, Mode::RWXU).map_err(failed(place.entry, action))?;
        if is_whiteout(&stat) {
            make_opaque(place.parent, place.name, self.options.opaque)
                .map_err(failed(place.entry, "mark the directory opaque"))?;
        }
        Ok(())
    }

    fn make_file(
        &mut self,
        place: &Place<'_>,
        entry: LayerEntry<'_, impl Read>,
        owned: &Owned,
    ) -> Result<(), ApplyError> {
        let file = std::fs::File::from(self.create_file(place)?);
        let size = entry.content.size();
        entry.content.visit_data(|offset, data| file.write_all_at(data, offset)).map_err(|source| {
            // What the archive does wrong comes as such; the rest is the file system's.
            match source.downcast::<TarError>() {
                Ok(error) => ApplyError::Archive(error),
                Err(source) => {
                    ApplyError::Write { entry: place.entry.clone(), action: "write the content", source }
                }
            }
        })?;
        let file = OwnedFd::from(file);
        ftruncate(&file, size).map_err(failed(place.entry, "set the size"))?;
        owned.write_file(place, &file)
    }

    fn create_file(&mut self, place: &Place<'_>) -> Result<OwnedFd, ApplyError> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let create = || openat(place.parent, place.name, flags, Mode::RUSR | Mode::WUSR);
        match create() {
            Err(Errno::EXIST) => {
                self.clear(place)?;
                create().map_err(failed(place.entry, "make the file"))
            }
            created => created.map_err(failed(place.entry, "make the file")),
        }
    }

    fn make_hard_link(&mut self, place: &Place<'_>, target: &LayerPath) -> Result<(), ApplyError> {
        let missing = || ApplyError::LinkTarget { entry: place.entry.clone(), target: target.clone() };
        if target == place.entry || target.is_root() {
            return Err(missing());
        }
        let parent = self.resolver.parent(target, Missing::Fail).map_err(|error| match error {
            ApplyError::Write { source, .. } if source.kind() == io::ErrorKind::NotFound => missing(),
            error => error,
        })?;
        match statat(&parent, target.name(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if is_whiteout(&stat) || kind(&stat) == FileType::Directory => return Err(missing()),
            Ok(_) => {}
            Err(Errno::NOENT) => return Err(missing()),
            Err(error) => return Err(failed(place.entry, "examine the target of the hard link")(error)),
        }
        let link =
            |place: &Place<'_>| linkat(&parent, target.name(), place.parent, place.name, AtFlags::empty());
        self.make(place, "make the hard link", link)
    }

    fn remember(&mut self, directory: &LayerPath, mtime: Timestamp) -> Result<(), ApplyError> {
        if self.directories.insert(directory.clone(), mtime).is_none() {
            self.directory_names += directory.as_bytes().len();
        }
        if self.directory_names > MAX_DIRECTORY_NAMES {
            return Err(ApplyError::TooManyDirectories { entry: directory.clone() });
        }
        Ok(())
    }

    fn finish_directories(&mut self) -> Result<(), ApplyError> {
        for (path, mtime) in std::mem::take(&mut self.directories) {
            let name = if path.is_root() { b"." } else { path.name() };
            // A later entry may have replaced the directory or a parent of it.
            let Ok(parent) = self.resolver.parent(&path, Missing::Fail) else { continue };
            match statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) if kind(&stat) == FileType::Directory => {
                    utimensat(&parent, name, &times(mtime), AtFlags::SYMLINK_NOFOLLOW)
                        .map_err(failed(&path, "set the time"))?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn root_entries(&self) -> Result<Vec<Vec<u8>>, ApplyError> {
        let mut names = BTreeSet::new();
        let keep = |name: &[u8]| {
            names.insert(name.to_vec());
            if names.len() > ROOT_ENTRIES {
                names.pop_last();
            }
        };
        tree::each_name(self.resolver.root(), keep)
            .map_err(|error| TreeError::new("list directory", b"", error))?;
        Ok(names.into_iter().collect())
    }
}

impl Owned {
    /// Writes everything but content. The owner comes first: changing it takes set-id bits and capabilities away.
    fn write(&self, place: &Place<'_>) -> Result<(), ApplyError> {
        let (uid, gid) = self.owner;
        chownat(place.parent, place.name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(failed(place.entry, "set the owner"))?;
        self.write_xattrs(place)?;
        // What was made here is no symbolic link, and nobody else writes into a layer that is being made.
        chmodat(place.parent, place.name, self.mode, AtFlags::empty())
            .map_err(failed(place.entry, "set the mode"))?;
        utimensat(place.parent, place.name, &self.times, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(failed(place.entry, "set the time"))
    }

    fn write_link(&self, place: &Place<'_>) -> Result<(), ApplyError> {
        let (uid, gid) = self.owner;
        chownat(place.parent, place.name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(failed(place.entry, "set the owner"))?;
        utimensat(place.parent, place.name, &self.times, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(failed(place.entry, "set the time"))
    }

    fn write_file(&self, place: &Place<'_>, file: &OwnedFd) -> Result<(), ApplyError> {
        let (uid, gid) = self.owner;
        fchown(file, Some(uid), Some(gid)).map_err(failed(place.entry, "set the owner"))?;
        self.write_xattrs(place)?;
        fchmod(file, self.mode).map_err(failed(place.entry, "set the mode"))?;
        futimens(file, &self.times).map_err(failed(place.entry, "set the time"))
    }

    fn write_xattrs(&self, place: &Place<'_>) -> Result<(), ApplyError> {
        for (name, value) in &self.xattrs {
            match xattrs::set(place.parent, place.name, name, value) {
                // Capabilities decide what a program can do; a file system without them is no place for it.
                Err(Errno::OPNOTSUPP | Errno::PERM) if name != xattrs::CAPABILITY => {
                    tracing::warn!(entry = %place.entry, attribute = %name.escape_ascii(), "the file system does not take this attribute; it is left out");
                }
                set => set.map_err(failed(place.entry, "set an extended attribute"))?,
            }
        }
        Ok(())
    }
}

fn times((seconds, nanoseconds): Timestamp) -> Timestamps {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() };
    Timestamps { last_access: time, last_modification: time }
}

fn failed(entry: &LayerPath, action: &'static str) -> impl Fn(Errno) -> ApplyError + use<> {
    let entry = entry.clone();
    move |error| ApplyError::Write { entry: entry.clone(), action, source: error.into() }
}
