//! Catalog rows as the kernel wants them (repository format §9.3, client behaviour §8).

use cvmfs_client::config::Ownership;
use cvmfs_format::catalog::{Entry, EntryKind};

use crate::protocol::attributes::Attributes;

/// `st_blksize` of every entry.
const BLOCK_SIZE: u32 = 4096;

/// Owners and modes as this mount shows them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Presentation {
    ownership: Ownership,
    uid: u32,
    gid: u32,
}

impl Presentation {
    /// `ownership` for a mount of this process.
    pub(crate) fn new(ownership: Ownership) -> Presentation {
        Presentation {
            ownership,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
        }
    }

    /// The attributes of `entry` under the node id `id`. `size` replaces the column's value
    /// where the two differ: symbolic links report the length of their expanded target.
    pub(crate) fn attributes(&self, id: u64, entry: &Entry, size: u64) -> Attributes {
        let (uid, gid) = if self.ownership.claim {
            (self.uid, self.gid)
        } else {
            (self.ownership.uids.map(entry.uid), self.ownership.gids.map(entry.gid))
        };
        let readable = match entry.kind() {
            _ if !self.ownership.world_readable => 0,
            EntryKind::Directory => 0o555,
            _ => 0o444,
        };
        Attributes {
            inode: id,
            size,
            blocks: 1 + size / 512,
            mtime: entry.mtime,
            mtime_ns: entry.mtime_ns.unwrap_or(0).min(999_999_999),
            mode: entry.kind().mode_bits() | entry.mode & 0o7777 | readable,
            links: entry.link_count,
            uid,
            gid,
            device: device(entry),
            block_size: BLOCK_SIZE,
        }
    }
}

/// The size that `stat` reports, except for symbolic links.
pub(crate) fn plain_size(entry: &Entry) -> u64 {
    match entry.kind() {
        EntryKind::File | EntryKind::Directory => entry.size,
        _ => 0,
    }
}

/// The device number in the kernel's 32-bit form: 12 bits major, 20 bits minor. The column
/// holds glibc's 64-bit form, which agrees with it for numbers of that width. Everything
/// that is not a device reports 1, as the C++ client does.
fn device(entry: &Entry) -> u32 {
    match entry.kind() {
        EntryKind::CharDevice | EntryKind::BlockDevice => entry.size as u32,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use cvmfs_client::config::IdMap;
    use cvmfs_format::PathHash;
    use cvmfs_format::catalog::EntryFlags;

    use super::*;

    fn entry(mode: u32) -> Entry {
        Entry {
            rowid: 1,
            path_hash: PathHash::of(b"/x"),
            parent: PathHash::of(b""),
            link_group: 0,
            link_count: 3,
            hash: None,
            size: 10,
            mode,
            mtime: 5,
            mtime_ns: None,
            flags: EntryFlags(if mode & 0o170_000 == 0o040_000 { 1 } else { 4 }),
            name: b"x".to_vec(),
            symlink: Vec::new(),
            uid: 1000,
            gid: 7,
            xattrs: None,
        }
    }

    #[test]
    fn owners_are_mapped_or_claimed_and_modes_opened() {
        let map = IdMap::parse("1000 500\n").unwrap();
        let mapped = Presentation::new(Ownership { uids: map.clone(), gids: map, ..Ownership::default() });
        let shown = mapped.attributes(9, &entry(0o104_640), 10);
        assert_eq!((shown.uid, shown.gid, shown.mode, shown.links), (500, 7, 0o104_640, 3));
        let claimed =
            Presentation::new(Ownership { claim: true, world_readable: true, ..Ownership::default() });
        let me = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let shown = claimed.attributes(9, &entry(0o100_600), 10);
        assert_eq!(((shown.uid, shown.gid), shown.mode), (me, 0o100_644));
        assert_eq!(claimed.attributes(9, &entry(0o040_700), 0).mode, 0o040_755);
    }
}
