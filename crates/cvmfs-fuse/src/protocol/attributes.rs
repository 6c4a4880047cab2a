//! Attributes as the kernel wants them.

/// Length of `fuse_attr`.
pub(crate) const LENGTH: usize = 88;
/// Length of `fuse_entry_out`: a node with its attributes and their times to live.
pub(crate) const ENTRY_LENGTH: usize = 40 + LENGTH;

/// What `stat` shows of a node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Attributes {
    pub(crate) inode: u64,
    pub(crate) size: u64,
    pub(crate) blocks: u64,
    pub(crate) mtime: i64,
    pub(crate) mtime_ns: u32,
    pub(crate) mode: u32,
    pub(crate) links: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) device: u32,
    pub(crate) block_size: u32,
}

impl Attributes {
    /// `fuse_attr`. All three times are that of the last modification.
    pub(crate) fn encode(&self) -> [u8; LENGTH] {
        let mut encoded = [0; LENGTH];
        let long = [
            self.inode,
            self.size,
            self.blocks,
            self.mtime.cast_unsigned(),
            self.mtime.cast_unsigned(),
            self.mtime.cast_unsigned(),
        ];
        let short = [
            self.mtime_ns,
            self.mtime_ns,
            self.mtime_ns,
            self.mode,
            self.links,
            self.uid,
            self.gid,
            self.device,
            self.block_size,
            0,
        ];
        let (front, back) = encoded.split_at_mut(48);
        for (place, value) in front.chunks_exact_mut(8).zip(long) {
            place.copy_from_slice(&value.to_ne_bytes());
        }
        for (place, value) in back.chunks_exact_mut(4).zip(short) {
            place.copy_from_slice(&value.to_ne_bytes());
        }
        encoded
    }

    /// `fuse_entry_out`: the node under which these attributes are known, and for how long.
    pub(crate) fn encode_entry(&self, node: u64, lifetime: Lifetime) -> [u8; ENTRY_LENGTH] {
        let mut encoded = [0; ENTRY_LENGTH];
        encoded[..8].copy_from_slice(&node.to_ne_bytes());
        // The generation (8..16) stays 0: node ids are never used again for something else.
        encoded[16..24].copy_from_slice(&lifetime.seconds.to_ne_bytes());
        encoded[24..32].copy_from_slice(&lifetime.seconds.to_ne_bytes());
        encoded[32..36].copy_from_slice(&lifetime.nanoseconds.to_ne_bytes());
        encoded[36..40].copy_from_slice(&lifetime.nanoseconds.to_ne_bytes());
        encoded[40..].copy_from_slice(&self.encode());
        encoded
    }
}

/// How long the kernel may keep an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lifetime {
    pub(crate) seconds: u64,
    pub(crate) nanoseconds: u32,
}

impl From<std::time::Duration> for Lifetime {
    fn from(duration: std::time::Duration) -> Lifetime {
        Lifetime { seconds: duration.as_secs(), nanoseconds: duration.subsec_nanos() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_lie_where_the_kernel_reads_them() {
        let attributes = Attributes {
            inode: 7,
            size: 5000,
            blocks: 10,
            mtime: -1,
            mtime_ns: 9,
            mode: 0o100_644,
            links: 2,
            uid: 1000,
            gid: 100,
            device: 1,
            block_size: 4096,
        };
        let entry = attributes.encode_entry(99, Lifetime { seconds: 60, nanoseconds: 5 });
        let word = |at: usize| u32::from_ne_bytes(entry[at..at + 4].try_into().unwrap());
        let long = |at: usize| u64::from_ne_bytes(entry[at..at + 8].try_into().unwrap());
        assert_eq!((long(0), long(8), long(16), long(24), word(32), word(36)), (99, 0, 60, 60, 5, 5));
        assert_eq!((long(40), long(48), long(56)), (7, 5000, 10));
        assert_eq!((long(64), long(80)), (u64::MAX, u64::MAX));
        assert_eq!((word(88), word(96), word(100), word(104)), (9, 9, 0o100_644, 2));
        assert_eq!((word(108), word(112), word(116), word(120), word(124)), (1000, 100, 1, 4096, 0));
    }
}
