//! Messages to the kernel that answer no request.

use std::io;
use std::os::fd::AsFd;

use super::REPLY_HEADER;

/// `FUSE_NOTIFY_INVAL_INODE`.
const INVALIDATE_NODE: i32 = 2;
/// `FUSE_NOTIFY_INVAL_ENTRY`.
const INVALIDATE_ENTRY: i32 = 3;
/// `FUSE_NOTIFY_RESEND`: Linux 6.9.
const RESEND: i32 = 7;
/// `FUSE_EXPIRE_ONLY`: Linux 6.2.
const EXPIRE_ONLY: u32 = 1;

/// Has the kernel send the requests in flight again. To be called when their reader is dead.
pub(crate) fn resend(device: impl AsFd) -> io::Result<()> {
    send(device, RESEND, &[])
}

/// The kernel forgets attributes and pages (or the listing) of a node.
pub(crate) fn invalidate_node(device: impl AsFd, node: u64) -> io::Result<()> {
    // From offset 0, length 0: all pages.
    let body = [node.to_ne_bytes(), 0_u64.to_ne_bytes(), 0_u64.to_ne_bytes()].concat();
    ignore_unknown(send(device, INVALIDATE_NODE, &body))
}

/// The kernel forgets an entry of a directory. With `expire` it only looks the entry up
/// again before its next use, which leaves mounts below it alone.
pub(crate) fn invalidate_entry(device: impl AsFd, parent: u64, name: &[u8], expire: bool) -> io::Result<()> {
    let mut body = Vec::with_capacity(16 + name.len() + 1);
    body.extend(parent.to_ne_bytes());
    body.extend((name.len() as u32).to_ne_bytes());
    body.extend((if expire { EXPIRE_ONLY } else { 0 }).to_ne_bytes());
    body.extend(name);
    body.push(0);
    ignore_unknown(send(device, INVALIDATE_ENTRY, &body))
}

fn send(device: impl AsFd, code: i32, body: &[u8]) -> io::Result<()> {
    let mut message = Vec::with_capacity(REPLY_HEADER + body.len());
    message.extend(((REPLY_HEADER + body.len()) as u32).to_ne_bytes());
    message.extend(code.to_ne_bytes());
    message.extend(0_u64.to_ne_bytes());
    message.extend(body);
    rustix::io::write(device, &message)?;
    Ok(())
}

/// The kernel does not know the node or entry: there is nothing to forget.
fn ignore_unknown(outcome: io::Result<()>) -> io::Result<()> {
    match outcome {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => Ok(()),
        other => other,
    }
}
