//! One catalog row as a type (repository format §9).

use std::fmt;

use super::{CatalogError, Result};
use crate::compression::Compression;
use crate::hash::{ContentHash, HashAlgorithm, PathHash, shown, split_path};

const S_IFMT: u32 = 0o170_000;
const S_IFIFO: u32 = 0o010_000;
const S_IFCHR: u32 = 0o020_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFBLK: u32 = 0o060_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFSOCK: u32 = 0o140_000;

/// Longest name a Linux directory can hold.
pub const MAX_NAME: usize = 255;

/// Longest symlink target that the kernel follows.
pub const MAX_SYMLINK: usize = 4095;

/// Kind of a file system object, taken from its mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EntryKind {
    /// Directory.
    Directory,
    /// Regular file.
    File,
    /// Symbolic link.
    Symlink,
    /// Named pipe.
    Fifo,
    /// Unix socket.
    Socket,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
}

impl EntryKind {
    /// The kind a mode states; none for a mode no object has.
    pub fn from_mode(mode: u32) -> Option<Self> {
        Some(match mode & S_IFMT {
            S_IFDIR => Self::Directory,
            S_IFREG => Self::File,
            S_IFLNK => Self::Symlink,
            S_IFIFO => Self::Fifo,
            S_IFSOCK => Self::Socket,
            S_IFCHR => Self::CharDevice,
            S_IFBLK => Self::BlockDevice,
            _ => return None,
        })
    }

    /// The type bits of `st_mode`.
    pub fn mode_bits(self) -> u32 {
        match self {
            Self::Directory => S_IFDIR,
            Self::File => S_IFREG,
            Self::Symlink => S_IFLNK,
            Self::Fifo => S_IFIFO,
            Self::Socket => S_IFSOCK,
            Self::CharDevice => S_IFCHR,
            Self::BlockDevice => S_IFBLK,
        }
    }

    /// Whether this is a character or block device.
    pub fn is_device(self) -> bool {
        matches!(self, Self::CharDevice | Self::BlockDevice)
    }
}

/// Column `flags` (§9.2).
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct EntryFlags(pub u32);

impl EntryFlags {
    /// Directory.
    pub const DIRECTORY: u32 = 1;
    /// Mountpoint of a nested catalog; in the parent catalog.
    pub const NESTED_MOUNTPOINT: u32 = 2;
    /// Everything that is not a directory.
    pub const FILE: u32 = 4;
    /// Symbolic link; with [`EntryFlags::FILE`].
    pub const LINK: u32 = 8;
    /// Fifo, socket or device; with [`EntryFlags::FILE`].
    pub const SPECIAL: u32 = 16;
    /// Root of a nested catalog; in the child catalog.
    pub const NESTED_ROOT: u32 = 32;
    /// Content in chunks.
    pub const CHUNKED: u32 = 64;
    /// Content on an external server.
    pub const EXTERNAL: u32 = 128;
    /// Mountpoint of a catalog from elsewhere.
    pub const BIND_MOUNTPOINT: u32 = 0x4000;
    /// Left out of listings.
    pub const HIDDEN: u32 = 0x8000;
    /// To be opened with direct I/O.
    pub const DIRECT_IO: u32 = 0x1_0000;

    const ALGORITHM_SHIFT: u32 = 8;
    const COMPRESSION_SHIFT: u32 = 11;
    const THREE_BITS: u32 = 7;

    /// The flags that kind alone decides.
    pub fn of_kind(kind: EntryKind) -> Self {
        Self(match kind {
            EntryKind::Directory => Self::DIRECTORY,
            EntryKind::File => Self::FILE,
            EntryKind::Symlink => Self::FILE | Self::LINK,
            EntryKind::Fifo | EntryKind::Socket | EntryKind::CharDevice | EntryKind::BlockDevice => {
                Self::FILE | Self::SPECIAL
            }
        })
    }

    /// Whether all of these bits are set.
    pub fn has(self, bits: u32) -> bool {
        self.0 & bits == bits
    }

    /// With these bits set.
    #[must_use]
    pub fn with(self, bits: u32) -> Self {
        Self(self.0 | bits)
    }

    /// With these bits cleared.
    #[must_use]
    pub fn without(self, bits: u32) -> Self {
        Self(self.0 & !bits)
    }

    /// Hash algorithm of the entry's digests; none for a number not assigned.
    pub fn algorithm(self) -> Option<HashAlgorithm> {
        HashAlgorithm::from_id(((self.0 >> Self::ALGORITHM_SHIFT) & Self::THREE_BITS) as u8 + 1)
    }

    /// With this hash algorithm.
    #[must_use]
    pub fn with_algorithm(self, algorithm: HashAlgorithm) -> Self {
        let bits = u32::from(algorithm.id() - 1) << Self::ALGORITHM_SHIFT;
        self.without(Self::THREE_BITS << Self::ALGORITHM_SHIFT).with(bits)
    }

    /// Compression of the entry's objects; none for a number not assigned.
    pub fn compression(self) -> Option<Compression> {
        Compression::from_id(((self.0 >> Self::COMPRESSION_SHIFT) & Self::THREE_BITS) as u8)
    }

    /// With this compression.
    #[must_use]
    pub fn with_compression(self, compression: Compression) -> Self {
        let bits = u32::from(compression.id()) << Self::COMPRESSION_SHIFT;
        self.without(Self::THREE_BITS << Self::COMPRESSION_SHIFT).with(bits)
    }
}

impl fmt::Debug for EntryFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EntryFlags({:#x})", self.0)
    }
}

/// One row of table `catalog` (§9.3).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// `rowid`, from which clients derive inodes; ignored on writing.
    pub rowid: i64,
    /// Hash of the path.
    pub path_hash: PathHash,
    /// Hash of the path of the directory that contains the entry; [`PathHash::NULL`] for the repository's root.
    pub parent: PathHash,
    /// Hard link group, unique in this catalog; 0 if there is none.
    pub link_group: u32,
    /// Link count as stored, see [`Entry::nlink`].
    pub link_count: u32,
    /// Hash of the object with the content; none for all but regular files, and for most chunked ones.
    pub hash: Option<ContentHash>,
    /// The column as stored: plain bytes of a regular file, *device number* of a device, see
    /// [`Entry::device_number`]; of no meaning for anything else.
    pub size: u64,
    /// `st_mode` with type bits.
    pub mode: u32,
    /// Modification time, seconds since the epoch.
    pub mtime: i64,
    /// Nanosecond part of the modification time, below 10⁹, if it was recorded.
    pub mtime_ns: Option<u32>,
    /// Flags.
    pub flags: EntryFlags,
    /// Last component of the path; empty for the repository's root.
    pub name: Vec<u8>,
    /// Target of a symlink before expansion of variables; empty for anything else.
    pub symlink: Vec<u8>,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Extended attributes as stored, see [`crate::xattr::Xattrs::parse`].
    pub xattrs: Option<Vec<u8>>,
}

impl Entry {
    /// An entry to be stored at `path` (absolute inside the repository, empty for its root): hashes, name and
    /// flags are filled in, the link count is 1, everything else zero or empty.
    pub fn new(path: &[u8], kind: EntryKind, permissions: u32) -> Self {
        Self {
            rowid: 0,
            path_hash: PathHash::of(path),
            parent: PathHash::of_parent(path),
            link_group: 0,
            link_count: 1,
            hash: None,
            size: 0,
            mode: kind.mode_bits() | (permissions & 0o7777),
            mtime: 0,
            mtime_ns: None,
            flags: EntryFlags::of_kind(kind),
            name: split_path(path).map(|(_, name)| name.to_vec()).unwrap_or_default(),
            symlink: Vec::new(),
            uid: 0,
            gid: 0,
            xattrs: None,
        }
    }

    /// Kind of the object. The mode decides, the flags are a redundant index.
    pub fn kind(&self) -> EntryKind {
        // Reading refuses other modes.
        EntryKind::from_mode(self.mode).unwrap_or(EntryKind::File)
    }

    /// Whether this is a directory.
    pub fn is_directory(&self) -> bool {
        self.kind() == EntryKind::Directory
    }

    /// Whether the content of this directory lies in a nested catalog that this catalog lists.
    pub fn is_nested_mountpoint(&self) -> bool {
        self.is_directory() && self.flags.has(EntryFlags::NESTED_MOUNTPOINT)
    }

    /// Whether this is the root directory of a nested catalog.
    pub fn is_nested_root(&self) -> bool {
        self.is_directory() && self.flags.has(EntryFlags::NESTED_ROOT)
    }

    /// Whether the content of this directory lies in a catalog from elsewhere that this catalog lists.
    pub fn is_bind_mountpoint(&self) -> bool {
        self.is_directory() && self.flags.has(EntryFlags::BIND_MOUNTPOINT)
    }

    /// Whether the content is in chunks.
    pub fn is_chunked(&self) -> bool {
        self.kind() == EntryKind::File && self.flags.has(EntryFlags::CHUNKED)
    }

    /// Whether the content is on an external server.
    pub fn is_external(&self) -> bool {
        self.kind() == EntryKind::File && self.flags.has(EntryFlags::EXTERNAL)
    }

    /// Whether listings leave the entry out.
    pub fn is_hidden(&self) -> bool {
        self.flags.has(EntryFlags::HIDDEN)
    }

    /// Whether the file is to be opened with direct I/O.
    pub fn is_direct_io(&self) -> bool {
        self.flags.has(EntryFlags::DIRECT_IO)
    }

    /// How the objects of this file are stored.
    pub fn compression(&self) -> Compression {
        // Reading refuses other numbers on regular files, the only ones with objects.
        self.flags.compression().unwrap_or_default()
    }

    /// Algorithm of this file's digests.
    pub fn algorithm(&self) -> HashAlgorithm {
        // Reading refuses other numbers where there are digests.
        self.flags.algorithm().unwrap_or_default()
    }

    /// Device number of a device, major and minor, decoded as glibc does; none for anything else.
    pub fn device_number(&self) -> Option<(u32, u32)> {
        if !self.kind().is_device() {
            return None;
        }
        let device = self.size;
        let major = ((device >> 32) & 0xffff_f000) | ((device >> 8) & 0xfff);
        let minor = ((device >> 12) & 0xffff_ff00) | (device & 0xff);
        Some((major as u32, minor as u32))
    }

    /// The size column of a device.
    pub fn encode_device_number(major: u32, minor: u32) -> u64 {
        let (major, minor) = (u64::from(major), u64::from(minor));
        ((major & 0xffff_f000) << 32)
            | ((major & 0xfff) << 8)
            | ((minor & 0xffff_ff00) << 12)
            | (minor & 0xff)
    }

    /// Link count to show, at least 1.
    pub fn nlink(&self) -> u32 {
        self.link_count.max(1)
    }

    /// Column `hardlinks`.
    pub fn hardlinks(&self) -> i64 {
        ((u64::from(self.link_group) << 32) | u64::from(self.link_count)) as i64
    }

    /// Whether a Linux directory can hold the name: not empty, not `.` or `..`, without slash or zero byte, at most
    /// 255 bytes. Listings leave out all others.
    pub fn has_valid_name(&self) -> bool {
        is_valid_name(&self.name)
    }

    /// Checks the rules a row must keep to be stored.
    pub(super) fn check_storable(&self) -> Result<()> {
        let unstorable = |reason: &str| {
            Err(CatalogError::Unstorable { name: shown(&self.name), reason: reason.to_owned() })
        };
        let Some(kind) = EntryKind::from_mode(self.mode) else {
            return unstorable("the mode states no type");
        };
        if self.parent != PathHash::NULL && !self.has_valid_name() {
            return unstorable("not a valid file name");
        }
        if self.flags.has(EntryFlags::DIRECTORY) != (kind == EntryKind::Directory)
            || self.flags.has(EntryFlags::LINK) != (kind == EntryKind::Symlink)
        {
            return unstorable("flags and mode state different types");
        }
        if self.symlink.len() > MAX_SYMLINK {
            return unstorable("the symlink's target is longer than 4095 bytes");
        }
        if i64::try_from(self.size).is_err() && !kind.is_device() {
            return unstorable("the size exceeds 63 bits");
        }
        if let Some(hash) = self.hash
            && self.flags.algorithm() != Some(hash.algorithm)
        {
            return unstorable("flags and hash state different algorithms");
        }
        Ok(())
    }
}

/// Whether a Linux directory can hold this name.
pub fn is_valid_name(name: &[u8]) -> bool {
    !matches!(name, b"" | b"." | b"..")
        && name.len() <= MAX_NAME
        && !name.iter().any(|byte| matches!(byte, b'/' | 0))
}

/// One chunk of a file (§9.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// First plain byte in the file.
    pub offset: u64,
    /// Plain bytes.
    pub size: u64,
    /// Hash of the stored chunk object.
    pub hash: ContentHash,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_of_each_kind_are_those_of_the_format_description() {
        let file = EntryFlags::of_kind(EntryKind::File);
        assert_eq!(EntryFlags::of_kind(EntryKind::Directory).0, 1);
        assert_eq!(EntryFlags::of_kind(EntryKind::Directory).with(EntryFlags::NESTED_MOUNTPOINT).0, 3);
        assert_eq!(EntryFlags::of_kind(EntryKind::Directory).with(EntryFlags::NESTED_ROOT).0, 33);
        assert_eq!(file.with_algorithm(HashAlgorithm::Sha1).0, 4);
        assert_eq!(file.with_algorithm(HashAlgorithm::Ripemd160).0, 260);
        assert_eq!(file.with_algorithm(HashAlgorithm::Shake128).0, 516);
        assert_eq!(file.with_compression(Compression::None).0, 2052);
        assert_eq!(file.with(EntryFlags::CHUNKED).0, 68);
        assert_eq!(EntryFlags::of_kind(EntryKind::Symlink).0, 12);
        assert_eq!(EntryFlags::of_kind(EntryKind::BlockDevice).0, 20);
        assert_eq!(EntryFlags(260).algorithm(), Some(HashAlgorithm::Ripemd160));
        assert_eq!(EntryFlags(2052).compression(), Some(Compression::None));
        assert_eq!(EntryFlags(7 << 8).algorithm(), None);
        assert_eq!(EntryFlags(2 << 11).compression(), None);
        assert_eq!(
            EntryFlags(0x7fff).with_algorithm(HashAlgorithm::Sha1).algorithm(),
            Some(HashAlgorithm::Sha1)
        );
    }

    #[test]
    fn device_numbers_beyond_eight_bits_survive() {
        for (major, minor) in [(0, 0), (1, 3), (511, 70_000), (0xfff, 0xfffff), (u32::MAX, u32::MAX)] {
            let mut entry = Entry::new(b"/d", EntryKind::CharDevice, 0o644);
            entry.size = Entry::encode_device_number(major, minor);
            assert_eq!(entry.device_number(), Some((major, minor)));
        }
        assert_eq!(Entry::encode_device_number(8, 1), 0x801);
        assert_eq!(Entry::new(b"/f", EntryKind::File, 0).device_number(), None);
    }

    #[test]
    fn group_seven_with_two_links_has_the_worked_value() {
        let mut entry = Entry::new(b"/f", EntryKind::File, 0o644);
        (entry.link_group, entry.link_count) = (7, 2);
        assert_eq!(entry.hardlinks(), 30064771074);
        entry.link_count = 0;
        assert_eq!(entry.nlink(), 1);
    }

    #[test]
    fn a_new_entry_knows_its_place() {
        let root = Entry::new(b"", EntryKind::Directory, 0o755);
        assert_eq!((root.parent, root.name.as_slice(), root.mode), (PathHash::NULL, &b""[..], 16877));
        let file = Entry::new(b"/a/f", EntryKind::File, 0o644);
        assert_eq!((file.parent, file.name.as_slice(), file.mode), (PathHash::of(b"/a"), &b"f"[..], 33188));
        assert!(root.check_storable().is_ok() && file.check_storable().is_ok());
    }

    #[test]
    fn contradictory_entries_are_not_storable() {
        let good = Entry::new(b"/a/f", EntryKind::File, 0o644);
        let refused = |change: &dyn Fn(&mut Entry)| {
            let mut entry = good.clone();
            change(&mut entry);
            entry.check_storable().is_err()
        };
        assert!(refused(&|entry| entry.mode = 0o644));
        assert!(refused(&|entry| entry.mode = 0o040_755));
        assert!(refused(&|entry| entry.size = u64::MAX));
        assert!(refused(&|entry| entry.hash = Some(ContentHash::null(HashAlgorithm::Shake128))));
        for name in [&b""[..], b".", b"..", b"a/b", b"a\0", &[b'x'; 256]] {
            assert!(refused(&|entry| entry.name = name.to_vec()));
        }
    }
}
