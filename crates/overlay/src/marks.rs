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

impl OpaqueXattr {
    /// The prefixes of overlayfs's attributes under which marks are looked for.
    fn prefixes(self) -> &'static [&'static str] {
        match self {
            OpaqueXattr::Trusted => &["trusted.overlay."],
            OpaqueXattr::User => &["user.overlay."],
            OpaqueXattr::Both => &["trusted.overlay.", "user.overlay."],
        }
    }
}

/// Whether this is a whiteout: a character device 0:0.
pub(crate) fn is_whiteout(stat: &Stat) -> bool {
    kind(stat) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// Makes a whiteout.
pub(crate) fn make_whiteout(directory: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
    mknodat(directory, name, FileType::CharacterDevice, Mode::empty(), 0)
}

/// The value of one of overlayfs's attributes. In mounts with `trusted` attributes those of the other kind are
/// ordinary ones, which programs in a container may set, so only the kind asked for counts.
pub(crate) fn mark(
    directory: BorrowedFd<'_>,
    name: &[u8],
    kind: OpaqueXattr,
    mark: &str,
) -> Result<Option<Vec<u8>>> {
    for prefix in kind.prefixes() {
        if let Some(value) = xattrs::get(directory, name, format!("{prefix}{mark}").as_bytes())? {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

/// Whether overlayfs ignores everything that layers below have in this directory.
pub(crate) fn is_opaque(directory: BorrowedFd<'_>, name: &[u8], kind: OpaqueXattr) -> Result<bool> {
    Ok(mark(directory, name, kind, "opaque")?.as_deref() == Some(b"y"))
}

/// Makes a directory opaque.
pub(crate) fn make_opaque(directory: BorrowedFd<'_>, name: &[u8], kind: OpaqueXattr) -> Result<()> {
    for prefix in kind.prefixes() {
        xattrs::set(directory, name, format!("{prefix}opaque").as_bytes(), b"y")?;
    }
    Ok(())
}
