//! The FUSE protocol between the kernel and a worker: requests, replies, notifications.
//!
//! The part of it that a read-only file system needs, and no more. It is written here and
//! not taken from a crate because the mount's promises depend on it: requests are answered
//! exactly once and by whoever is first (an interrupt, a deadline, the answer itself), a
//! request that comes again after a worker's death is recognised, and a successor completes
//! a handshake that its predecessor began. Everything the kernel sends is bounded by its
//! length and parsed into a type before it is looked at.

pub(crate) mod attributes;
pub(crate) mod handshake;
pub(crate) mod notify;
pub(crate) mod reply;
pub(crate) mod request;

/// Length of the header of a request.
pub(crate) const REQUEST_HEADER: usize = 40;
/// Length of the header of a reply.
pub(crate) const REPLY_HEADER: usize = 16;

/// The kernel marks a request that it sends again in the top bit of its number.
pub(crate) const REPEAT_BIT: u64 = 1 << 63;

/// Reads native-endian numbers off the front of a message.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl<'a> Fields<'a> {
    /// The next `N` bytes; `None` at the end of the message.
    pub(crate) fn bytes<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*first)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.bytes().map(u16::from_ne_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.bytes().map(u32::from_ne_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.bytes().map(u64::from_ne_bytes)
    }

    /// The text up to the next zero byte, which must be there.
    pub(crate) fn text(&mut self) -> Option<&'a [u8]> {
        let end = self.0.iter().position(|byte| *byte == 0)?;
        let (text, rest) = self.0.split_at(end);
        self.0 = rest.get(1..).unwrap_or_default();
        Some(text)
    }
}
