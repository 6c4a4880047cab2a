//! Listening at a path that others may use as well.

use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Listens at `path` with this mode. A socket there at which nobody listens any more is replaced.
///
/// # Errors
/// `AddrInUse` if somebody listens there, or if the path is something else than a socket; otherwise what the
/// system says.
pub(crate) fn claim_path(path: &Path, mode: u32) -> io::Result<UnixListener> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "there is a file that is no socket"));
        }
        Ok(_) if someone_listens(path)? => {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens there"));
        }
        Ok(_) => fs::remove_file(path)?,
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Whether a process listens at the socket. Nothing is sent, and a listener without time for us counts.
pub(crate) fn someone_listens(path: &Path) -> io::Result<bool> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) | Err(rustix::io::Errno::AGAIN) => Ok(true),
        Err(rustix::io::Errno::CONNREFUSED | rustix::io::Errno::NOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Sends a descriptor to whoever listens at `path`, with one byte.
pub(super) fn send_descriptor(path: &Path, descriptor: BorrowedFd<'_>) -> io::Result<()> {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
    let address = SocketAddrUnix::new(path)?;
    // Nothing here waits: one byte always fits, and a full queue of callers is an error.
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &address)?;
    let descriptors = [descriptor];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    rustix::net::sendmsg(&socket, &[io::IoSlice::new(&[0])], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Identity of the socket file at `path`, by which its owner knows it again.
pub(super) fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_arrives_with_whoever_listens() {
        use std::io::{Seek, Write};
        use std::os::fd::AsFd;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sock");
        let mut file = tempfile::tempfile().unwrap();
        assert!(send_descriptor(&path, file.as_fd()).is_err());
        let listener = UnixListener::bind(&path).unwrap();
        send_descriptor(&path, file.as_fd()).unwrap();
        let (stream, _) = listener.accept().unwrap();
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = rustix::net::RecvAncillaryBuffer::new(&mut space);
        let mut byte = [1];
        let mut places = [io::IoSliceMut::new(&mut byte)];
        let flags = rustix::net::RecvFlags::empty();
        rustix::net::recvmsg(&stream, &mut places, &mut ancillary, flags).unwrap();
        let received = ancillary.drain().find_map(|message| match message {
            rustix::net::RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        let mut received = fs::File::from(received.unwrap());
        received.write_all(b"hello").unwrap();
        // One open file, one position.
        assert_eq!(file.stream_position().unwrap(), 5);
    }

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_or_a_file_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sock");
        drop(UnixListener::bind(&path).unwrap());
        let alive = claim_path(&path, 0o660).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o660);
        assert_eq!(claim_path(&path, 0o660).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(alive);
        assert!(claim_path(&path, 0o600).is_ok());
        let file = directory.path().join("file");
        fs::write(&file, b"precious").unwrap();
        assert_eq!(claim_path(&file, 0o660).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert_eq!(fs::read(&file).unwrap(), b"precious");
    }
}
