//! Extended attributes of an object named by its directory and name, without following symbolic links.
//!
//! The calls that take a directory descriptor exist since Linux 6.13 only; `/proc/self/fd/N/NAME` says the same
//! on every kernel: the magic link leads to the very directory, and the last component is not followed.

use rustix::fd::{AsRawFd, BorrowedFd};
use rustix::fs::{XattrFlags, lgetxattr, llistxattr, lsetxattr};
use rustix::io::{Errno, Result};

/// `XATTR_LIST_MAX` and `XATTR_SIZE_MAX` of Linux.
const MOST: usize = 64 * 1024;

fn address(directory: BorrowedFd<'_>, name: &[u8]) -> Vec<u8> {
    let mut path = format!("/proc/self/fd/{}/", directory.as_raw_fd()).into_bytes();
    path.extend_from_slice(name);
    path
}

/// The value of an attribute, if the object has it. `.` names the directory itself.
pub(crate) fn get(directory: BorrowedFd<'_>, name: &[u8], attribute: &[u8]) -> Result<Option<Vec<u8>>> {
    let path = address(directory, name);
    let mut small = [0; 256];
    match lgetxattr(&path[..], attribute, &mut small[..]) {
        Ok(length) => return Ok(Some(small[..length].to_vec())),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => return Ok(None),
        Err(Errno::RANGE) => {}
        Err(error) => return Err(error),
    }
    let mut large = vec![0; MOST];
    let length = lgetxattr(&path[..], attribute, &mut large[..])?;
    large.truncate(length);
    Ok(Some(large))
}

/// The names of all attributes that can be seen.
pub(crate) fn list(directory: BorrowedFd<'_>, name: &[u8]) -> Result<Vec<Vec<u8>>> {
    let path = address(directory, name);
    let split = |names: &[u8]| {
        names.split(|&byte| byte == 0).filter(|name| !name.is_empty()).map(<[u8]>::to_vec).collect()
    };
    let mut small = [0; 512];
    match llistxattr(&path[..], &mut small[..]) {
        Ok(length) => return Ok(split(&small[..length])),
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Err(Errno::RANGE) => {}
        Err(error) => return Err(error),
    }
    let mut large = vec![0; MOST];
    let length = llistxattr(&path[..], &mut large[..])?;
    Ok(split(&large[..length]))
}

/// Sets an attribute, replacing an earlier value.
pub(crate) fn set(directory: BorrowedFd<'_>, name: &[u8], attribute: &[u8], value: &[u8]) -> Result<()> {
    lsetxattr(&address(directory, name)[..], attribute, value, XattrFlags::empty())
}

/// File capabilities: they belong to the content and travel with it.
pub(crate) const CAPABILITY: &[u8] = b"security.capability";

/// Whether an attribute belongs to the content of a layer. Labels, access control lists and what the kernel
/// keeps for itself belong to the host, and overlayfs's own notes to the mount.
pub(crate) fn travels(attribute: &[u8]) -> bool {
    attribute == CAPABILITY || (attribute.starts_with(b"user.") && !layer_tar::is_overlay_xattr(attribute))
}
