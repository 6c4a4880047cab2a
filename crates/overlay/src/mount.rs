//! Overlay mounts.
//!
//! Three ways lead to the same mount; the best that the kernel has is taken:
//! 1. the new mount API with a directory descriptor per layer (Linux 6.13): no length limit, no escaping;
//! 2. the new mount API with `lowerdir+` strings (Linux 6.8);
//! 3. mount(2) with one string of options, which must fit a page: names relative to a working directory.
//!
//! All mounts have `index=off`, `redirect_dir=off` and `metacopy=off` where the kernel knows these: with them
//! the upper directory is a complete diff, and neither a second mount of the same layers nor lower layers
//! without stable file handles give `EBUSY` or `ESTALE`.

mod classic;
mod context;
mod probe;

pub use probe::{Support, Way, probe};

use crate::OpaqueXattr;
use crate::marks::is_opaque;
use crate::tree;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use std::io;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// How many lower directories the kernel stacks (`OVL_MAX_STACK`).
pub const MAX_LOWERS: usize = 500;

/// What is to be stacked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OverlayMount {
    /// The layers, topmost first; at most [`MAX_LOWERS`].
    pub lowers: Vec<PathBuf>,
    /// The directory that takes the changes. Without one the mount is read-only.
    pub upper: Option<PathBuf>,
    /// The kernel's scratch directory, empty and on the file system of `upper`. Belongs to `upper`.
    pub work: Option<PathBuf>,
    /// SELinux label of everything in the mount.
    pub label: Option<String>,
    /// Which attributes mark opaque directories.
    pub marks: Marks,
}

/// Which attributes overlayfs reads and writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Marks {
    /// `trusted.overlay.*`.
    #[default]
    Trusted,
    /// `user.overlay.*`: the option `userxattr`, for user namespaces.
    User,
}

/// Why there is no mount. Nothing is mounted by half.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MountError {
    /// More layers than the kernel stacks.
    #[error(
        "{count} layers cannot be stacked: the kernel's limit is {MAX_LOWERS} lower directories; flatten the image"
    )]
    TooManyLowers {
        /// How many there are.
        count: usize,
    },
    /// Nothing to stack.
    #[error("an overlay needs at least one directory")]
    Empty,
    /// The mount point has to serve as an empty layer, and is not empty.
    #[error(
        "the mount point '{target}' is not empty; what was put there while nothing was mounted must be removed"
    )]
    NotEmpty {
        /// The mount point.
        target: PathBuf,
    },
    /// One of `upper` and `work` without the other.
    #[error("the upper and the work directory of an overlay belong together")]
    UpperWithoutWork,
    /// A label that could smuggle in other options.
    #[error("the SELinux label '{label}' contains a quote or a control character")]
    Label {
        /// The label, escaped.
        label: String,
    },
    /// One of the directories cannot be opened.
    #[error("cannot open the {role} directory '{path}' of the overlay")]
    Directory {
        /// `lower`, `upper` or `work`.
        role: &'static str,
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The kernel has no overlayfs.
    #[error("the kernel offers no overlay file system; load the module 'overlay' (modprobe overlay)")]
    NoOverlay(#[source] io::Error),
    /// The kernel refused the configuration.
    #[error("the kernel refused to stack {lowers} layers at '{target}' (option {option}){}", said(messages))]
    Refused {
        /// Where it was to be mounted.
        target: PathBuf,
        /// How many layers there are.
        lowers: usize,
        /// At which option, or `create`.
        option: &'static str,
        /// What the kernel says about it; empty if it says so in its log only, always with mount(2).
        messages: Vec<String>,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The overlay cannot be attached to its mount point.
    #[error("cannot mount the overlay at '{target}'")]
    Attach {
        /// Where it was to be mounted.
        target: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The kernel is too old for the new mount API, and the options do not fit a page.
    #[error(
        "the options of {lowers} layers take {length} bytes, mount(2) takes {limit}; a kernel from Linux 6.8 on has no such limit"
    )]
    OptionsTooLong {
        /// How many layers there are.
        lowers: usize,
        /// How long the options are.
        length: usize,
        /// How long they may be.
        limit: usize,
    },
    /// A mount cannot be removed.
    #[error("cannot unmount '{target}'")]
    Unmount {
        /// Where it is.
        target: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A mount point cannot be removed.
    #[error("cannot remove the mount point '{target}'")]
    MountPoint {
        /// Where it is.
        target: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

fn said(messages: &[String]) -> String {
    // Part of its reasons the kernel only writes to its log.
    if messages.is_empty() {
        "; the kernel log (dmesg) has the reason".to_owned()
    } else {
        format!(": {}", messages.join("; "))
    }
}

impl OverlayMount {
    /// Mounts at the existing directory `target`, in the best way that the kernel has; see [`probe`].
    pub fn mount(&self, target: &Path) -> Result<(), MountError> {
        self.mount_with(target, &probe()?)
    }

    /// [`mount`](Self::mount) for callers that have probed before.
    pub fn mount_with(&self, target: &Path, support: &Support) -> Result<(), MountError> {
        let effective = self.effective(target)?;
        match support.way {
            Way::Descriptors => context::mount(&effective, target, support, context::Layers::Descriptors),
            Way::Strings => context::mount(&effective, target, support, context::Layers::Strings),
            Way::Classic => classic::mount(&effective, target, support),
        }
    }

    /// What the kernel is to be told. It does not heed the opaque mark of a layer's root, so layers below such a
    /// root are left out here; and it wants one lower directory, or two without an upper one, where the mount
    /// point itself serves as an empty one.
    fn effective(&self, target: &Path) -> Result<OverlayMount, MountError> {
        if self.upper.is_some() != self.work.is_some() {
            return Err(MountError::UpperWithoutWork);
        }
        match &self.label {
            Some(label) if label.contains(|char: char| char == '"' || char == '\\' || char.is_control()) => {
                return Err(MountError::Label { label: label.escape_default().to_string() });
            }
            _ => {}
        }
        let mut effective = self.clone();
        let visible = self.visible_lowers()?;
        effective.lowers.truncate(visible);
        if visible > MAX_LOWERS {
            return Err(MountError::TooManyLowers { count: visible });
        }
        if effective.lowers.is_empty() && effective.upper.is_none() {
            return Err(MountError::Empty);
        }
        let wanted = if effective.upper.is_some() { 1 } else { 2 };
        if effective.lowers.len() < wanted {
            let directory = open_directory("lower", target)?;
            let names = tree::names(directory.as_fd())
                .map_err(|error| MountError::Attach { target: target.to_owned(), source: error.into() })?;
            if !names.is_empty() {
                return Err(MountError::NotEmpty { target: target.to_owned() });
            }
            effective.lowers.push(target.to_owned());
        }
        Ok(effective)
    }

    /// How many lower directories, counted from the top, are not hidden by an opaque root above them.
    fn visible_lowers(&self) -> Result<usize, MountError> {
        let marks = match self.marks {
            Marks::Trusted => OpaqueXattr::Trusted,
            Marks::User => OpaqueXattr::User,
        };
        let is_opaque = |role, path: &Path| {
            is_opaque(open_directory(role, path)?.as_fd(), b".", marks)
                .map_err(|error| MountError::Directory { role, path: path.to_owned(), source: error.into() })
        };
        if let Some(upper) = &self.upper
            && is_opaque("upper", upper)?
        {
            return Ok(0);
        }
        for (index, lower) in self.lowers.iter().enumerate().take(MAX_LOWERS) {
            if is_opaque("lower", lower)? {
                return Ok(index + 1);
            }
        }
        Ok(self.lowers.len())
    }

    /// The options that are switched off, as far as the kernel knows them. With `userxattr` the last two are off
    /// anyway, and naming them counts as a contradiction.
    fn switched_off(&self, support: &Support) -> Vec<&'static str> {
        let user = self.marks == Marks::User;
        [
            ("index", support.index),
            ("redirect_dir", support.redirect_dir && !user),
            ("metacopy", support.metacopy && !user),
        ]
        .into_iter()
        .filter_map(|(option, wanted)| wanted.then_some(option))
        .collect()
    }

    fn refused(
        &self,
        target: &Path,
        option: &'static str,
        messages: Vec<String>,
        error: Errno,
    ) -> MountError {
        let (target, lowers, source) = (target.to_owned(), self.lowers.len(), error.into());
        MountError::Refused { target, lowers, option, messages, source }
    }
}

/// Opens one of the directories, so that a missing one is named: the kernel names none.
fn open_directory(role: &'static str, path: &Path) -> Result<OwnedFd, MountError> {
    openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| MountError::Directory { role, path: path.to_owned(), source: error.into() })
}

/// How a mount is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmount {
    /// Only if nobody uses it.
    Normal,
    /// At once from the tree, and wholly when its last user is gone.
    Lazy,
}

/// Removes the topmost mount at `target`; false if there is none.
pub fn unmount(target: &Path, how: Unmount) -> Result<bool, MountError> {
    let flags = match how {
        Unmount::Normal => UnmountFlags::NOFOLLOW,
        Unmount::Lazy => UnmountFlags::NOFOLLOW | UnmountFlags::DETACH,
    };
    match rustix::mount::unmount(target, flags) {
        Ok(()) => Ok(true),
        Err(Errno::INVAL | Errno::NOENT) => Ok(false),
        Err(error) => Err(MountError::Unmount { target: target.to_owned(), source: error.into() }),
    }
}

/// Removes an empty directory that served as mount point; it need not exist. With it the kernel drops copies of
/// the mount in other mount namespaces, which would otherwise keep the layers busy.
pub fn remove_mount_point(target: &Path) -> Result<(), MountError> {
    match rustix::fs::rmdir(target) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(MountError::MountPoint { target: target.to_owned(), source: error.into() }),
    }
}
