//! Whiteouts and opaque directories as overlayfs keeps them on disk.

use crate::tree::kind;
use crate::xattrs;
use rustix::fd::BorrowedFd;
use rustix::fs::{FileType, Mode, Stat, mknodat};
use rustix::io::Result;

/// Which attribute marks a directory as opaque.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OpaqueXattr {
    /// `trusted.overlay.opaque`, for mounts in the initial user namespace.
    #[default]
    Trusted,
    /// `user.overlay.opaque`, for mounts with `userxattr`.
    User,
    /// Both, for layers that serve either kind of mount.
    Both,
}

const TRUSTED: &[u8] = b"trusted.overlay.opaque";
const USER: &[u8] = b"user.overlay.opaque";

/// Whether this is a whiteout: a character device 0:0.
pub(crate) fn is_whiteout(stat: &Stat) -> bool {
    kind(stat) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// Makes a whiteout.
pub(crate) fn make_whiteout(directory: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
    mknodat(directory, name, FileType::CharacterDevice, Mode::empty(), 0)
}

/// Whether overlayfs ignores everything that layers below have in this directory.
pub(crate) fn is_opaque(directory: BorrowedFd<'_>, name: &[u8]) -> Result<bool> {
    for attribute in [TRUSTED, USER] {
        if xattrs::get(directory, name, attribute)?.as_deref() == Some(b"y") {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Makes a directory opaque.
pub(crate) fn make_opaque(directory: BorrowedFd<'_>, name: &[u8], which: OpaqueXattr) -> Result<()> {
    if matches!(which, OpaqueXattr::Trusted | OpaqueXattr::Both) {
        xattrs::set(directory, name, TRUSTED, b"y")?;
    }
    if matches!(which, OpaqueXattr::User | OpaqueXattr::Both) {
        xattrs::set(directory, name, USER, b"y")?;
    }
    Ok(())
}
