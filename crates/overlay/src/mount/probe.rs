//! What this kernel's overlayfs can do.

use super::MountError;
use super::context::new_context;
use rustix::fd::{AsFd, BorrowedFd};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::mount::{fsconfig_set_fd, fsconfig_set_string};
use std::path::Path;

/// How layers are handed to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// One directory descriptor per layer.
    Descriptors,
    /// One string per layer.
    Strings,
    /// One string for all, by mount(2).
    Classic,
}

/// What the kernel offers. Callers probe once and keep it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Support {
    /// The best way to hand over layers.
    pub way: Way,
    /// Whether `index=` is known.
    pub index: bool,
    /// Whether `redirect_dir=` is known.
    pub redirect_dir: bool,
    /// Whether `metacopy=` is known.
    pub metacopy: bool,
}

/// Asks the kernel, which loads the module if needed; mounts nothing.
pub fn probe() -> Result<Support, MountError> {
    let known = |parameter: &str| Path::new("/sys/module/overlay/parameters").join(parameter).exists();
    let context = match new_context() {
        Ok(context) => context,
        Err(rustix::io::Errno::NODEV) => return Err(MountError::NoOverlay(rustix::io::Errno::NODEV.into())),
        // No such call (before Linux 5.2), or one that a sandbox hides: mount(2) will tell.
        Err(_) => return Ok(classic(known)),
    };
    // Before Linux 6.5 overlayfs takes every option at first and only looks at them when it is mounted.
    if fsconfig_set_string(&context, "no-such-option", "x").is_ok() {
        return Ok(classic(known));
    }
    let known = |option: &str| fsconfig_set_string(&context, option, "off").is_ok();
    let way = way(context.as_fd());
    Ok(Support {
        way,
        index: known("index"),
        redirect_dir: known("redirect_dir"),
        metacopy: known("metacopy"),
    })
}

fn classic(known: impl Fn(&str) -> bool) -> Support {
    let (index, redirect_dir, metacopy) = (known("index"), known("redirect_dir"), known("metacopy"));
    Support { way: Way::Classic, index, redirect_dir, metacopy }
}

fn way(context: BorrowedFd<'_>) -> Way {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let by_descriptor = openat(CWD, "/", flags, Mode::empty())
        .and_then(|directory| fsconfig_set_fd(context, "lowerdir+", &directory));
    if by_descriptor.is_ok() {
        Way::Descriptors
    } else if fsconfig_set_string(context, "lowerdir+", "/").is_ok() {
        Way::Strings
    } else {
        Way::Classic
    }
}
