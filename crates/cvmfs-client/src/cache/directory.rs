//! The cache directory: its layout, and the descriptors by which everything in it is reached.
//!
//! Files are opened relative to the open directory. It may be deleted while it is in use: it is then made anew under
//! its path and opened again.

use std::fs::{DirBuilder, File, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use rustix::fs::{
    AtFlags, CWD, FsWord, Mode, OFlags, Stat, fchmod, fstat, fstatfs, linkat, openat, renameat, statat,
    unlinkat,
};
use rustix::io::Errno;

use super::presence::{self, Presence, TXN};
use super::record::RecordFile;
use super::{CacheName, Kind};

/// Where partly present files lie.
pub(super) const CHUNKED: &str = "chunked";
/// Bytes in use, shared by all processes.
const USAGE: &str = "usage";
/// From `statfs`: link and unlink instead of rename (client behaviour §11).
const NFS_MAGIC: FsWord = 0x6969;
/// From `statfs`: no moves between directories (client behaviour §11).
const BEEGFS_MAGIC: FsWord = 0x1983_0326;

/// Whose directory it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// Ours alone: private, bounded, evicted.
    Client,
    /// Shared with other clients, the C++ client among them, and other machines (*alien cache*): neither bounded nor
    /// evicted, readable and writable for a group.
    Site,
}

impl Owner {
    fn directory_mode(self) -> u32 {
        match self {
            Self::Client => 0o700,
            Self::Site => 0o770,
        }
    }
}

/// How a complete file gets its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Publication {
    Rename,
    /// By a second link: on NFS a rename may be repeated and then fail although it succeeded.
    Link,
    /// By a rename inside the final directory.
    InPlace,
}

/// See the module documentation.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    owner: Owner,
    /// Files get their names by link and unlink even where rename would do.
    by_link: bool,
    open: RwLock<Arc<Open>>,
    restoring: Mutex<()>,
}

/// The open directory.
#[derive(Debug)]
pub(super) struct Open {
    root: OwnedFd,
    /// `None` if the directory cannot be written.
    presence: Option<Presence>,
    record: Option<RecordFile>,
    publication: Publication,
    owner: Owner,
    /// Others that lived when it was opened.
    pub(super) found: presence::Swept,
}

impl Directory {
    /// Opens `path`, creating what is missing. A directory of the site that cannot be written is opened for reading.
    pub(super) fn open(path: &Path, owner: Owner, by_link: bool) -> Result<Self, (PathBuf, io::Error)> {
        let layout = create_layout(path, owner);
        match &layout {
            Err((_, error)) if owner == Owner::Site && is_read_only(error) && path.is_dir() => {}
            Err(_) => layout?,
            Ok(()) => {}
        }
        let path = path.canonicalize().map_err(|error| (path.to_owned(), error))?;
        let open = Open::new(&path, owner, by_link).map_err(|error| (path.clone(), error))?;
        let open = RwLock::new(Arc::new(open));
        Ok(Self { path, owner, by_link, open, restoring: Mutex::new(()) })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn owner(&self) -> Owner {
        self.owner
    }

    /// The open directory. Keep it for the time of one operation.
    pub(super) fn now(&self) -> Arc<Open> {
        self.open.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes the directory, or what is missing in it, anew after something in `seen` was not found. Returns what is
    /// open afterwards.
    pub(super) fn restore(&self, seen: &Arc<Open>) -> io::Result<Arc<Open>> {
        let _turn = self.restoring.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.now();
        if !Arc::ptr_eq(&now, seen) {
            return Ok(now);
        }
        create_layout(&self.path, self.owner).map_err(|(_, error)| error)?;
        if seen.is_at(&self.path) {
            return Ok(now);
        }
        tracing::warn!(cache = %self.path.display(), "the cache directory was removed while in use: made anew");
        let open = Arc::new(Open::new(&self.path, self.owner, self.by_link)?);
        *self.open.write().unwrap_or_else(PoisonError::into_inner) = open.clone();
        Ok(open)
    }

    /// Goes on without writing.
    pub(super) fn stop_writing(&self) {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        let Ok(root) = open.root.try_clone() else { return };
        let read_only = Open {
            root,
            presence: None,
            record: None,
            publication: open.publication,
            owner: open.owner,
            found: open.found,
        };
        if let Some(presence) = &open.presence {
            presence.leave();
        }
        *open = Arc::new(read_only);
    }
}

impl Open {
    fn new(path: &Path, owner: Owner, by_link: bool) -> io::Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let root = openat(CWD, path, flags, Mode::empty())?;
        let kind = fstatfs(&root).map(|stat| stat.f_type);
        let publication = match kind {
            Ok(BEEGFS_MAGIC) => Publication::InPlace,
            Ok(NFS_MAGIC) => Publication::Link,
            _ if by_link => Publication::Link,
            _ => Publication::Rename,
        };
        let found = presence::sweep(&root, owner == Owner::Site);
        let presence = match Presence::announce(&root, Mode::from_raw_mode(owner.directory_mode())) {
            Ok(presence) => Some(presence),
            Err(error) if owner == Owner::Site && is_read_only(&error) => None,
            Err(error) => return Err(error),
        };
        let record = match owner {
            Owner::Client => Some(RecordFile::new(open_usage(&root)?)),
            Owner::Site => None,
        };
        Ok(Self { root, presence, record, publication, owner, found })
    }

    /// Opens a cache for looking at it, whoever it belongs to.
    pub(super) fn look(path: &Path) -> io::Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let root = openat(CWD, path, flags, Mode::empty())?;
        if statat(&root, "00", AtFlags::SYMLINK_NOFOLLOW).is_err() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "it is no cache directory"));
        }
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let usage = openat(&root, USAGE, flags, Mode::empty()).map(File::from);
        let owner = match statat(&root, USAGE, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Owner::Client,
            Err(_) => Owner::Site,
        };
        Ok(Self {
            root,
            presence: None,
            record: usage.ok().map(RecordFile::new),
            publication: Publication::Rename,
            owner,
            found: presence::Swept::default(),
        })
    }

    /// Whether files can be removed.
    pub(super) fn can_write(&self) -> io::Result<()> {
        use rustix::fs::{Access, accessat};
        Ok(accessat(&self.root, "00", Access::WRITE_OK, AtFlags::EACCESS)?)
    }

    /// Whether the path still leads here, and our own directory is still there.
    fn is_at(&self, path: &Path) -> bool {
        let same = |left: &Stat, right: &Stat| (left.st_dev, left.st_ino) == (right.st_dev, right.st_ino);
        let Ok(own) = fstat(&self.root) else { return false };
        let is_here = statat(CWD, path, AtFlags::empty()).is_ok_and(|found| same(&own, &found));
        // An unlinked directory has no links.
        let has_presence = self
            .presence
            .as_ref()
            .is_none_or(|presence| fstat(presence.directory()).is_ok_and(|stat| stat.st_nlink > 0));
        is_here && has_presence
    }

    pub(super) fn owner(&self) -> Owner {
        self.owner
    }

    pub(super) fn root(&self) -> &OwnedFd {
        &self.root
    }

    pub(super) fn presence(&self) -> Option<&Presence> {
        self.presence.as_ref()
    }

    pub(super) fn record(&self) -> Option<&RecordFile> {
        self.record.as_ref()
    }

    /// The path of a file below the root.
    pub(super) fn place(&self, name: &CacheName) -> String {
        match self.owner {
            Owner::Client => name.place(),
            Owner::Site => name.shared_place(),
        }
    }

    /// Opens a file of the cache for reading.
    pub(super) fn get(&self, name: &CacheName) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(openat(&self.root, self.place(name), flags, Mode::empty()).map(File::from)?)
    }

    /// Size and mode of a file of the cache.
    pub(super) fn stat(&self, name: &CacheName) -> io::Result<Stat> {
        Ok(statat(&self.root, self.place(name), AtFlags::SYMLINK_NOFOLLOW)?)
    }

    pub(super) fn remove(&self, name: &CacheName) -> io::Result<()> {
        Ok(unlinkat(&self.root, self.place(name), AtFlags::empty())?)
    }

    /// Creates a temporary file for what will become `name`.
    pub(super) fn create(&self, name: Option<&CacheName>, kind: Kind) -> io::Result<(File, Temporary)> {
        let presence = self.presence.as_ref().ok_or(Errno::ROFS)?;
        let temporary = match (self.publication, name) {
            (Publication::InPlace, Some(name)) => Temporary {
                place: format!("{}/{}", name.directory(), presence.foreign_name()),
                is_in_place: true,
            },
            _ => Temporary { place: presence.temporary_name(), is_in_place: false },
        };
        let mode = match self.owner {
            Owner::Client => kind.mode(),
            Owner::Site => 0o660,
        };
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
        let file = openat(self.base(&temporary), &temporary.place, flags, Mode::from_raw_mode(mode))?;
        if self.owner == Owner::Site {
            // Whatever the process's mask: others of the group shall use it. Not possible on some file systems.
            let _ = fchmod(&file, Mode::from_raw_mode(mode));
        }
        Ok((File::from(file), temporary))
    }

    /// Opens a temporary file for reading only.
    pub(super) fn reopen(&self, temporary: &Temporary) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(openat(self.base(temporary), &temporary.place, flags, Mode::empty()).map(File::from)?)
    }

    /// Gives a complete temporary file its name.
    pub(super) fn publish(&self, temporary: &Temporary, name: &CacheName) -> io::Result<()> {
        let base = self.base(temporary);
        let place = self.place(name);
        if self.publication != Publication::Link {
            return Ok(renameat(base, &temporary.place, &self.root, place)?);
        }
        match linkat(base, &temporary.place, &self.root, place, AtFlags::empty()) {
            // Somebody else had the same object.
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        self.discard(temporary);
        Ok(())
    }

    /// Removes a temporary file's name.
    pub(super) fn discard(&self, temporary: &Temporary) {
        let _ = unlinkat(self.base(temporary), &temporary.place, AtFlags::empty());
    }

    fn base(&self, temporary: &Temporary) -> &OwnedFd {
        match &self.presence {
            Some(presence) if !temporary.is_in_place => presence.directory(),
            _ => &self.root,
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if let Some(presence) = &self.presence {
            presence.leave();
        }
    }
}

/// The name of a temporary file.
#[derive(Debug)]
pub(super) struct Temporary {
    place: String,
    is_in_place: bool,
}

fn open_usage(root: &OwnedFd) -> io::Result<File> {
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(openat(root, USAGE, flags, Mode::from_raw_mode(0o600)).map(File::from)?)
}

/// Whether the error says that a directory cannot be written, which is no fault of a site's cache.
pub(super) fn is_read_only(error: &io::Error) -> bool {
    let codes = [Errno::ROFS, Errno::ACCESS, Errno::PERM].map(Errno::raw_os_error);
    error.raw_os_error().is_some_and(|code| codes.contains(&code))
}

fn create_layout(directory: &Path, owner: Owner) -> Result<(), (PathBuf, io::Error)> {
    let mode = owner.directory_mode();
    let create = |path: PathBuf| {
        let created = match DirBuilder::new().mode(mode).create(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
            outcome => outcome,
        };
        // The process's mask must not keep the group out.
        let opened = created.and_then(|()| match owner {
            Owner::Client => Ok(()),
            Owner::Site => std::fs::set_permissions(&path, Permissions::from_mode(mode)),
        });
        opened.map_err(|error| (path, error))
    };
    if let Some(parent) = directory.parent() {
        let above = DirBuilder::new().recursive(true).mode(0o755).create(parent);
        above.map_err(|error| (parent.to_owned(), error))?;
    }
    create(directory.to_owned())?;
    create(directory.join(TXN))?;
    if owner == Owner::Client {
        create(directory.join(CHUNKED))?;
    }
    (0..=255_u8).try_for_each(|number| create(directory.join(format!("{number:02x}"))))
}

/// Whether two files are one.
pub(crate) fn is_same_file(left: &File, right: &std::fs::Metadata) -> bool {
    left.metadata().is_ok_and(|left| (left.dev(), left.ino()) == (right.dev(), right.ino()))
}
