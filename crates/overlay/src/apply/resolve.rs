//! Finding and making the directories that entries go into, always within the target.
//!
//! Symbolic links that the archive itself brought are followed as by an engine that unpacks in a changed root: the
//! kernel takes the layer as the root (`RESOLVE_IN_ROOT`), so absolute links begin there and `..` ends there. What
//! leads to nothing, or through more links than the kernel follows (40), is refused; on kernels that cannot resolve
//! like that, every symbolic link is.

use super::ApplyError;
use crate::marks::{OpaqueXattr, is_whiteout, make_opaque};
use crate::tree::{Cursor, DIRECTORY, LONG, TreeError, kind, shown};
use layer_tar::LayerPath;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, chmodat, chownat, mkdirat, openat, openat2,
    statat, unlinkat,
};
use rustix::io::Errno;
use std::path::Path;
use std::rc::Rc;

/// What happens to directories that are not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Missing {
    Create,
    Fail,
}

/// Opens directories below a root.
pub(super) struct Resolver {
    root: Rc<OwnedFd>,
    owner: (Uid, Gid),
    opaque: OpaqueXattr,
    /// The directory asked for last: entries mostly follow their siblings.
    last: Option<(LayerPath, Rc<OwnedFd>)>,
}

impl Resolver {
    pub(super) fn open(root: &Path, owner: (Uid, Gid), opaque: OpaqueXattr) -> Result<Self, TreeError> {
        let cursor = Cursor::open(root)?;
        let root = openat(cursor.fd(), ".", DIRECTORY, Mode::empty())
            .map_err(|error| TreeError::new("open directory", b"", error))?;
        Ok(Resolver { root: Rc::new(root), owner, opaque, last: None })
    }

    pub(super) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Forgets what is remembered, because something was removed.
    pub(super) fn forget(&mut self) {
        self.last = None;
    }

    /// The directory that contains `entry`; for the root, the root.
    pub(super) fn parent(&mut self, entry: &LayerPath, missing: Missing) -> Result<Rc<OwnedFd>, ApplyError> {
        let directory = entry.parent().unwrap_or_default();
        if directory.is_root() {
            return Ok(Rc::clone(&self.root));
        }
        match &self.last {
            Some((last, fd)) if *last == directory => return Ok(Rc::clone(fd)),
            _ => {}
        }
        let opened = match self.open_in_root(directory.as_bytes()) {
            Ok(fd) => fd,
            Err(Errno::LOOP) => return Err(ApplyError::Circle { entry: entry.clone() }),
            Err(_) => self.open_step_by_step(entry, &directory, missing)?,
        };
        let opened = Rc::new(opened);
        self.last = Some((directory, Rc::clone(&opened)));
        Ok(opened)
    }

    fn open_in_root(&self, path: &[u8]) -> rustix::io::Result<OwnedFd> {
        if path.len() > LONG {
            return Err(Errno::NAMETOOLONG);
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        loop {
            // EAGAIN: some rename happened anywhere in the system while `..` was resolved.
            match openat2(&self.root, path, flags, Mode::empty(), resolve) {
                Err(Errno::AGAIN) => {}
                opened => return opened,
            }
        }
    }

    fn open_step_by_step(
        &self,
        entry: &LayerPath,
        directory: &LayerPath,
        missing: Missing,
    ) -> Result<OwnedFd, ApplyError> {
        let write = |action| {
            let entry = entry.clone();
            move |error: Errno| ApplyError::Write { entry, action, source: error.into() }
        };
        let path = directory.as_bytes();
        let mut current =
            openat(&self.root, ".", DIRECTORY, Mode::empty()).map_err(write("open the layer"))?;
        let mut end = 0;
        for component in directory.components() {
            end += component.len() + usize::from(end > 0);
            let so_far = &path[..end];
            current = match openat(&current, component, DIRECTORY, Mode::empty()) {
                Ok(next) => next,
                Err(Errno::NOENT) if missing == Missing::Create => {
                    self.make(current.as_fd(), component).map_err(write("make a parent directory"))?
                }
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    self.open_obstacle(entry, &current, component, so_far, missing)?
                }
                Err(error) => return Err(write("open the parent directory")(error)),
            };
        }
        Ok(current)
    }

    /// A component is there but no directory: a symbolic link may lead to one, a whiteout is replaced.
    fn open_obstacle(
        &self,
        entry: &LayerPath,
        parent: &OwnedFd,
        component: &[u8],
        so_far: &[u8],
        missing: Missing,
    ) -> Result<OwnedFd, ApplyError> {
        let write = |action| {
            let entry = entry.clone();
            move |error: Errno| ApplyError::Write { entry, action, source: error.into() }
        };
        let stat = statat(parent, component, AtFlags::SYMLINK_NOFOLLOW).map_err(write("examine a parent"))?;
        if kind(&stat) == FileType::Symlink {
            return self.open_in_root(so_far).map_err(|error| match error {
                Errno::NOENT | Errno::NOTDIR => {
                    ApplyError::NotDirectory { entry: entry.clone(), obstacle: shown(so_far) }
                }
                Errno::LOOP => ApplyError::Circle { entry: entry.clone() },
                error => write("follow a symbolic link above it")(error),
            });
        }
        if is_whiteout(&stat) && missing == Missing::Create {
            // The archive hides what was below and brings the directory again: nothing of it may show through.
            unlinkat(parent, component, AtFlags::empty()).map_err(write("replace a whiteout"))?;
            let directory = self.make(parent.as_fd(), component).map_err(write("make a parent directory"))?;
            make_opaque(parent.as_fd(), component, self.opaque).map_err(write("mark a parent opaque"))?;
            return Ok(directory);
        }
        Err(ApplyError::NotDirectory { entry: entry.clone(), obstacle: shown(so_far) })
    }

    fn make(&self, parent: BorrowedFd<'_>, name: &[u8]) -> rustix::io::Result<OwnedFd> {
        mkdirat(parent, name, Mode::RWXU)?;
        let (uid, gid) = self.owner;
        chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        chmodat(parent, name, Mode::from_raw_mode(0o755), AtFlags::empty())?;
        openat(parent, name, DIRECTORY, Mode::empty())
    }
}
