//! How much an archive may ask for, each with its reason.

/// Bounds that a [`LayerReader`](crate::LayerReader) holds an archive to. [`Limits::default`] admits every
/// layer seen in the field and refuses what can only be an attack or damage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Entries in the archive, global headers included.
    pub entries: u64,
    /// Length of a path in bytes. May exceed `PATH_MAX`: deep trees are walked by directory descriptors.
    pub path: usize,
    /// Bytes of extended headers (PAX records, GNU long names) in front of one entry.
    pub metadata: u32,
    /// Extended attributes of one entry.
    pub xattrs: usize,
    /// Data ranges of one sparse file.
    pub sparse_ranges: usize,
    /// Logical bytes of all regular files together, holes included: a header of 512 bytes can claim a hole
    /// of eight exbibytes, and whoever hashes the expanded file would never come back.
    pub total_size: u64,
}

impl Limits {
    /// A million entries is a large layer; ten million still fits a catalog.
    pub const ENTRIES: u64 = 10_000_000;
    /// 64 KiB: more than 250 nested directories with names of the greatest length.
    pub const PATH: usize = 64 * 1024;
    /// 1 MiB: a path, a link and more attributes than any file system stores.
    pub const METADATA: u32 = 1024 * 1024;
    /// Linux returns at most 64 KiB of names from one listing; a name takes at least 7 bytes in practice.
    pub const XATTRS: usize = 1024;
    /// 100 000 ranges are 2.4 MB of memory; a database image of 100 GB rarely has a tenth of it.
    pub const SPARSE_RANGES: usize = 100_000;
    /// 1 TiB per layer.
    pub const TOTAL_SIZE: u64 = 1 << 40;
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            entries: Self::ENTRIES,
            path: Self::PATH,
            metadata: Self::METADATA,
            xattrs: Self::XATTRS,
            sparse_ranges: Self::SPARSE_RANGES,
            total_size: Self::TOTAL_SIZE,
        }
    }
}

/// `NAME_MAX` of every Linux file system that can hold a layer.
pub(crate) const MAX_COMPONENT: usize = 255;
/// `PATH_MAX` without its NUL: symlink(2) refuses longer targets.
pub(crate) const MAX_SYMLINK_TARGET: usize = 4095;
/// `XATTR_NAME_MAX` of Linux.
pub(crate) const MAX_XATTR_NAME: usize = 255;
/// `XATTR_SIZE_MAX` of Linux.
pub(crate) const MAX_XATTR_VALUE: usize = 64 * 1024;
/// Linux device numbers: 12 bits of major and 20 bits of minor number; mknod(2) would cut the rest off.
pub(crate) const MAX_DEVICE_MAJOR: u32 = 0xfff;
/// See [`MAX_DEVICE_MAJOR`].
pub(crate) const MAX_DEVICE_MINOR: u32 = 0xf_ffff;
