//! Replies: each request is answered exactly once, by whoever is first.

use std::io::IoSlice;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::REPLY_HEADER;
use super::attributes::{Attributes, ENTRY_LENGTH, Lifetime};
use crate::in_flight::Ticket;

/// Where answers are sent to: the device, or a socket that stands for it in tests.
#[derive(Debug)]
pub(crate) struct Channel(pub(crate) OwnedFd);

/// Flags of the answer to OPEN and OPENDIR.
pub(crate) mod open_flag {
    pub(crate) const DIRECT_IO: u32 = 1 << 0;
    pub(crate) const KEEP_CACHE: u32 = 1 << 1;
    pub(crate) const CACHE_DIR: u32 = 1 << 3;
    pub(crate) const NO_FLUSH: u32 = 1 << 5;
    pub(crate) const PASSTHROUGH: u32 = 1 << 7;
}

/// The right to answer a request. Dropped without an answer it sends EIO, so that nobody
/// waits for ever.
#[derive(Debug)]
pub(crate) struct Reply {
    channel: Arc<Channel>,
    unique: u64,
    /// Shared with those who may answer first; none if nobody else can.
    ticket: Option<Arc<Ticket>>,
    is_answered: bool,
}

/// Whether the kernel took an answer. It does not if the request was answered before (its
/// caller was interrupted, its deadline passed), or if the mount is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub(crate) enum Sent {
    Taken,
    NotTaken,
}

impl Reply {
    pub(crate) fn new(channel: &Arc<Channel>, unique: u64) -> Reply {
        Reply { channel: channel.clone(), unique, ticket: None, is_answered: false }
    }

    /// Shares the right to answer with the holder of `ticket`.
    pub(crate) fn share(&mut self, ticket: &Arc<Ticket>) {
        self.ticket = Some(ticket.clone());
    }

    /// The request's number.
    pub(crate) fn unique(&self) -> u64 {
        self.unique
    }

    /// Answers with an error number, 0 for success without data.
    pub(crate) fn error(mut self, errno: i32) {
        let _ = self.send(errno, &[]);
    }

    /// Answers with data.
    pub(crate) fn data(mut self, data: &[u8]) {
        let _ = self.send(0, data);
    }

    /// Answers a look-up.
    pub(crate) fn entry(mut self, node: u64, attributes: &Attributes, lifetime: Lifetime) {
        let _ = self.send(0, &attributes.encode_entry(node, lifetime));
    }

    /// Answers a look-up of a name that does not exist, which the kernel may remember.
    pub(crate) fn no_entry(mut self, lifetime: Lifetime) {
        let _ = self.send(0, &Attributes::default().encode_entry(0, lifetime));
    }

    /// Answers GETATTR.
    pub(crate) fn attributes(mut self, attributes: &Attributes, lifetime: Lifetime) {
        let mut body = [0; 16 + super::attributes::LENGTH];
        body[..8].copy_from_slice(&lifetime.seconds.to_ne_bytes());
        body[8..12].copy_from_slice(&lifetime.nanoseconds.to_ne_bytes());
        body[16..].copy_from_slice(&attributes.encode());
        let _ = self.send(0, &body);
    }

    /// Answers OPEN or OPENDIR. If the answer is not taken, nobody will release the handle.
    pub(crate) fn opened(mut self, handle: u64, flags: u32, backing: u32) -> Sent {
        let mut body = [0; 16];
        body[..8].copy_from_slice(&handle.to_ne_bytes());
        body[8..12].copy_from_slice(&flags.to_ne_bytes());
        body[12..].copy_from_slice(&backing.to_ne_bytes());
        self.send(0, &body)
    }

    /// Answers STATFS.
    pub(crate) fn statfs(mut self, numbers: &Statfs) {
        let long = [numbers.blocks, numbers.free, numbers.free, numbers.files, numbers.files_free];
        let short = [numbers.block_size, numbers.longest_name, numbers.block_size];
        let mut body = Vec::with_capacity(80);
        body.extend(long.iter().flat_map(|value| value.to_ne_bytes()));
        body.extend(short.iter().flat_map(|value| value.to_ne_bytes()));
        body.resize(80, 0);
        let _ = self.send(0, &body);
    }

    /// Answers a question for an extended attribute or their list: with its size if `room`
    /// is 0, else with the value if it fits.
    pub(crate) fn attribute(mut self, value: &[u8], room: u32) {
        let _ = if room == 0 {
            let mut body = [0; 8];
            body[..4].copy_from_slice(&u32::try_from(value.len()).unwrap_or(u32::MAX).to_ne_bytes());
            self.send(0, &body)
        } else if value.len() > room as usize {
            self.send(libc::ERANGE, &[])
        } else {
            self.send(0, value)
        };
    }

    fn send(&mut self, errno: i32, body: &[u8]) -> Sent {
        self.is_answered = true;
        if let Some(ticket) = &self.ticket
            && !ticket.claim()
        {
            return Sent::NotTaken;
        }
        let sent = send(&self.channel, self.unique, errno, body);
        if let Some(ticket) = &self.ticket {
            ticket.settle();
        }
        sent
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.is_answered {
            let _ = self.send(libc::EIO, &[]);
        }
    }
}

/// Writes an answer to the device.
pub(crate) fn send(channel: &Channel, unique: u64, errno: i32, body: &[u8]) -> Sent {
    let mut header = [0; REPLY_HEADER];
    header[..4].copy_from_slice(&((REPLY_HEADER + body.len()) as u32).to_ne_bytes());
    header[4..8].copy_from_slice(&(-errno).to_ne_bytes());
    header[8..].copy_from_slice(&unique.to_ne_bytes());
    let written = if body.is_empty() {
        rustix::io::write(channel.0.as_fd(), &header)
    } else {
        rustix::io::writev(channel.0.as_fd(), &[IoSlice::new(&header), IoSlice::new(body)])
    };
    match written {
        Ok(_) => Sent::Taken,
        // The request or the whole connection is gone.
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NODEV | rustix::io::Errno::NOTCONN) => {
            Sent::NotTaken
        }
        Err(error) => {
            tracing::error!(unique, errno, length = body.len(), %error, "the kernel refuses an answer");
            if !body.is_empty() {
                // The caller still waits; a refused answer leaves the request open.
                return send(channel, unique, libc::EIO, &[]);
            }
            Sent::NotTaken
        }
    }
}

/// The numbers of STATFS.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Statfs {
    pub(crate) blocks: u64,
    pub(crate) free: u64,
    pub(crate) files: u64,
    pub(crate) files_free: u64,
    pub(crate) block_size: u32,
    pub(crate) longest_name: u32,
}

/// The entries of a directory, as far as they fit into what the kernel asked for.
#[derive(Debug)]
pub(crate) struct Entries<'a> {
    buffer: &'a mut Vec<u8>,
    room: usize,
}

impl<'a> Entries<'a> {
    /// Collects into `buffer`, which is emptied first.
    pub(crate) fn new(buffer: &'a mut Vec<u8>, room: u32) -> Entries<'a> {
        /// More than any kernel asks for; bounds the buffer.
        const LARGEST: usize = 1 << 20;
        buffer.clear();
        Entries { buffer, room: (room as usize).min(LARGEST) }
    }

    /// Adds an entry; false if it does not fit. `next` is the offset behind it.
    pub(crate) fn add(&mut self, inode: u64, next: u64, mode: u32, name: &[u8]) -> bool {
        let length = (24 + name.len()).next_multiple_of(8);
        if self.buffer.len() + length > self.room {
            return false;
        }
        self.dirent(inode, next, mode, name);
        true
    }

    /// Adds an entry with its attributes; false if it does not fit. Node 0 says nothing of them.
    pub(crate) fn add_plus(
        &mut self,
        node: u64,
        attributes: &Attributes,
        lifetime: Lifetime,
        next: u64,
        name: &[u8],
    ) -> bool {
        let length = (ENTRY_LENGTH + 24 + name.len()).next_multiple_of(8);
        if self.buffer.len() + length > self.room {
            return false;
        }
        self.buffer.extend_from_slice(&attributes.encode_entry(node, lifetime));
        self.dirent(attributes.inode, next, attributes.mode, name);
        true
    }

    fn dirent(&mut self, inode: u64, next: u64, mode: u32, name: &[u8]) {
        self.buffer.extend_from_slice(&inode.to_ne_bytes());
        self.buffer.extend_from_slice(&next.to_ne_bytes());
        self.buffer.extend_from_slice(&(name.len() as u32).to_ne_bytes());
        self.buffer.extend_from_slice(&(mode >> 12 & 0xf).to_ne_bytes());
        self.buffer.extend_from_slice(name);
        self.buffer.resize(self.buffer.len().next_multiple_of(8), 0);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    fn channel() -> (Arc<Channel>, UnixDatagram) {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        (Arc::new(Channel(ours.into())), theirs)
    }

    #[test]
    fn a_forgotten_reply_is_an_error_and_a_given_one_is_sent_once() {
        let (channel, kernel) = channel();
        drop(Reply::new(&channel, 9));
        Reply::new(&channel, 10).data(b"abc");
        let mut buffer = [0; 64];
        assert_eq!(kernel.recv(&mut buffer).unwrap(), 16);
        assert_eq!(buffer[4..8], (-libc::EIO).to_ne_bytes());
        assert_eq!(kernel.recv(&mut buffer).unwrap(), 19);
        assert_eq!((&buffer[8..16], &buffer[16..19]), (&10_u64.to_ne_bytes()[..], &b"abc"[..]));
        assert!(kernel.recv(&mut buffer).is_err(), "nothing else");
    }

    #[test]
    fn entries_are_padded_and_end_where_the_room_ends() {
        let mut buffer = Vec::new();
        let mut entries = Entries::new(&mut buffer, 64);
        assert!(entries.add(5, 1, libc::S_IFDIR, b"a"));
        assert!(entries.add(6, 2, libc::S_IFREG, b"bcdefgh1"));
        assert!(!entries.add(7, 3, libc::S_IFREG, b"c"));
        assert_eq!(buffer.len(), 64);
        assert_eq!((buffer[16], buffer[20], buffer[52]), (1, 4, 8));
    }
}
