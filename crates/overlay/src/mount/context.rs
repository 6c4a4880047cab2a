//! The new mount API: a file system context is filled option by option, then made, then attached.

use super::{Marks, MountError, OverlayMount, Support, open_directory};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_fd,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// How directories are named to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layers {
    Descriptors,
    Strings,
}

/// A string for fsconfig(2) has at most 255 bytes; the kernel says EINVAL to longer ones.
const MAX_STRING: usize = 255;

pub(super) fn new_context() -> Result<OwnedFd, Errno> {
    fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)
}

pub(super) fn mount(
    overlay: &OverlayMount,
    target: &Path,
    support: &Support,
    layers: Layers,
) -> Result<(), MountError> {
    let context = new_context().map_err(|error| MountError::NoOverlay(error.into()))?;
    let said_by = context.as_fd();
    let refused =
        |option: &'static str| move |error| overlay.refused(target, option, messages(said_by), error);

    fsconfig_set_string(&context, "source", "overlay").map_err(refused("source"))?;
    for option in overlay.switched_off(support) {
        fsconfig_set_string(&context, option, "off").map_err(refused(option))?;
    }
    if overlay.marks == Marks::User {
        fsconfig_set_flag(&context, "userxattr").map_err(refused("userxattr"))?;
    }
    if let Some(label) = &overlay.label {
        fsconfig_set_string(&context, "context", &label[..]).map_err(refused("context"))?;
    }
    for lower in &overlay.lowers {
        let directory = open_directory("lower", lower)?;
        set_directory(&context, "lowerdir+", lower, &directory, layers).map_err(refused("lowerdir+"))?;
    }
    for (role, option, path) in [("upper", "upperdir", &overlay.upper), ("work", "workdir", &overlay.work)] {
        if let Some(path) = path {
            let directory = open_directory(role, path)?;
            set_directory(&context, option, path, &directory, layers).map_err(refused(option))?;
        }
    }
    fsconfig_create(&context).map_err(refused("create"))?;

    let attach = |error: Errno| MountError::Attach { target: target.to_owned(), source: error.into() };
    let mounted =
        fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).map_err(attach)?;
    // The descriptor keeps the mount busy, so it ends with this function.
    move_mount(&mounted, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(attach)
}

fn set_directory(
    context: &OwnedFd,
    option: &str,
    path: &Path,
    directory: &OwnedFd,
    layers: Layers,
) -> rustix::io::Result<()> {
    if layers == Layers::Descriptors {
        return fsconfig_set_fd(context, option, directory);
    }
    let raw = path.as_os_str().as_bytes();
    // `lowerdir+` is taken as it is; the others undo backslashes.
    let written = if option == "lowerdir+" { raw.to_vec() } else { escape_backslashes(raw) };
    if path.is_absolute() && written.len() <= MAX_STRING {
        return fsconfig_set_string(context, option, OsStr::from_bytes(&written));
    }
    // The kernel resolves the string at once, so the descriptor need not outlive this call.
    fsconfig_set_string(context, option, format!("/proc/self/fd/{}", directory.as_raw_fd()))
}

fn escape_backslashes(path: &[u8]) -> Vec<u8> {
    let mut escaped = Vec::with_capacity(path.len());
    for &byte in path {
        if byte == b'\\' {
            escaped.push(b'\\');
        }
        escaped.push(byte);
    }
    escaped
}

/// What the kernel has to say about a context: one message per read, `e overlay: text`.
fn messages(context: BorrowedFd<'_>) -> Vec<String> {
    /// More than a context keeps.
    const MOST: usize = 16;
    let mut messages = Vec::new();
    let mut buffer = [0u8; 1024];
    while messages.len() < MOST {
        match rustix::io::read(context, &mut buffer) {
            Ok(length) if length > 0 => {
                let text = String::from_utf8_lossy(&buffer[..length]);
                let text = text.trim_end();
                let level = |prefix: &str| text.strip_prefix(prefix).map(str::to_owned);
                messages.push(
                    level("e ").or_else(|| level("w ")).or_else(|| level("i ")).unwrap_or(text.to_owned()),
                );
            }
            _ => break,
        }
    }
    messages
}
