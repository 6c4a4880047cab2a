//! Statistics of a catalog (repository format §11).
//!
//! Each catalog counts its own rows and, separately, those of all catalogs below it. A nested mountpoint directory
//! has a row in two catalogs and is counted in both.

use std::ops::{AddAssign, Neg, SubAssign};

use super::entry::{Entry, EntryFlags, EntryKind};

/// Counts of one family. Values are signed, because changes are counted too.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs)] // the names are those of the format, see `NAMES`
pub struct Counts {
    pub regular: i64,
    pub symlink: i64,
    pub special: i64,
    pub dir: i64,
    pub nested: i64,
    pub chunked: i64,
    pub chunks: i64,
    pub file_size: i64,
    pub chunked_size: i64,
    pub xattr: i64,
    pub external: i64,
    pub external_file_size: i64,
}

impl Counts {
    /// Names in table `statistics` without the prefix `self_` or `subtree_`, in the order in which the C++ tools
    /// insert them.
    pub const NAMES: [&'static str; 12] = [
        "chunked",
        "chunked_size",
        "chunks",
        "dir",
        "external",
        "external_file_size",
        "file_size",
        "nested",
        "regular",
        "special",
        "symlink",
        "xattr",
    ];

    /// What one row adds; its chunks and the nested catalog it may mount are counted apart.
    pub fn of(entry: &Entry) -> Self {
        let mut counts = Self { xattr: i64::from(entry.xattrs.is_some()), ..Self::default() };
        let size = i64::try_from(entry.size).unwrap_or(i64::MAX);
        match entry.kind() {
            EntryKind::Directory => counts.dir = 1,
            EntryKind::Symlink => counts.symlink = 1,
            EntryKind::File => {
                counts.regular = 1;
                counts.file_size = size;
                if entry.flags.has(EntryFlags::CHUNKED) {
                    (counts.chunked, counts.chunked_size) = (1, size);
                }
                if entry.flags.has(EntryFlags::EXTERNAL) {
                    (counts.external, counts.external_file_size) = (1, size);
                }
            }
            EntryKind::Fifo | EntryKind::Socket | EntryKind::CharDevice | EntryKind::BlockDevice => {
                counts.special = 1;
            }
        }
        counts
    }

    /// Number of entries: everything that has a row.
    pub fn entries(&self) -> i64 {
        self.regular.saturating_add(self.symlink).saturating_add(self.special).saturating_add(self.dir)
    }

    /// Names and values in the order of [`Counts::NAMES`].
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, i64)> {
        let mut copy = *self;
        Self::NAMES.into_iter().map(move |name| (name, copy.get_mut(name).map_or(0, |value| *value)))
    }

    /// The value with this name.
    pub fn get_mut(&mut self, name: &str) -> Option<&mut i64> {
        Some(match name {
            "regular" => &mut self.regular,
            "symlink" => &mut self.symlink,
            "special" => &mut self.special,
            "dir" => &mut self.dir,
            "nested" => &mut self.nested,
            "chunked" => &mut self.chunked,
            "chunks" => &mut self.chunks,
            "file_size" => &mut self.file_size,
            "chunked_size" => &mut self.chunked_size,
            "xattr" => &mut self.xattr,
            "external" => &mut self.external,
            "external_file_size" => &mut self.external_file_size,
            _ => return None,
        })
    }

    fn zip_with(&mut self, other: &Self, operation: impl Fn(i64, i64) -> i64) {
        for (name, value) in other.iter() {
            if let Some(own) = self.get_mut(name) {
                *own = operation(*own, value);
            }
        }
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.zip_with(&other, i64::saturating_add);
    }
}

impl SubAssign for Counts {
    fn sub_assign(&mut self, other: Self) {
        self.zip_with(&other, i64::saturating_sub);
    }
}

impl Neg for Counts {
    type Output = Self;

    fn neg(self) -> Self {
        let mut negative = Self::default();
        negative -= self;
        negative
    }
}

/// Statistics of a catalog, or a change of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// The catalog's own rows, `self_…`.
    pub own: Counts,
    /// All catalogs below, without this one, `subtree_…`.
    pub subtree: Counts,
}

impl Counters {
    /// Own rows and all below. Of the root catalog: the whole repository.
    pub fn total(&self) -> Counts {
        let mut total = self.own;
        total += self.subtree;
        total
    }

    /// Adds a nested catalog's counters, or the change of them, to the sub-tree of its parent.
    pub fn add_child(&mut self, child: &Counters) {
        self.subtree += child.total();
    }

    /// The reverse of [`Counters::add_child`].
    pub fn remove_child(&mut self, child: &Counters) {
        self.subtree -= child.total();
    }
}

impl AddAssign for Counters {
    fn add_assign(&mut self, other: Self) {
        self.own += other.own;
        self.subtree += other.subtree;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_its_own_value() {
        let mut counts = Counts::default();
        for (index, name) in Counts::NAMES.into_iter().enumerate() {
            *counts.get_mut(name).unwrap() = 1 << index;
        }
        assert_eq!(counts.iter().map(|(_, value)| value).sum::<i64>(), (1 << 12) - 1);
        assert_eq!(counts.get_mut("other"), None);
        let mut twice = counts;
        twice += counts;
        twice -= counts;
        assert_eq!(twice, counts);
        twice += -counts;
        assert_eq!(twice, Counts::default());
    }

    #[test]
    fn a_file_counts_in_every_family_it_belongs_to() {
        let mut entry = Entry::new(b"/f", EntryKind::File, 0o644);
        entry.size = 10;
        entry.xattrs = Some(vec![1, 0]);
        entry.flags = entry.flags.with(EntryFlags::CHUNKED | EntryFlags::EXTERNAL);
        let expected = Counts {
            regular: 1,
            file_size: 10,
            chunked: 1,
            chunked_size: 10,
            external: 1,
            external_file_size: 10,
            xattr: 1,
            ..Counts::default()
        };
        assert_eq!(Counts::of(&entry), expected);
        assert_eq!(expected.entries(), 1);
        let device = Counts::of(&Entry::new(b"/d", EntryKind::CharDevice, 0o644));
        assert_eq!(device, Counts { special: 1, ..Counts::default() });
    }

    #[test]
    fn a_childs_counters_go_to_the_parents_sub_tree() {
        let directory = Counts { dir: 1, ..Counts::default() };
        let child = Counters { own: directory, subtree: directory };
        let mut parent = Counters { own: directory, subtree: Counts::default() };
        parent.add_child(&child);
        assert_eq!((parent.subtree.dir, parent.own.dir, parent.total().dir), (2, 1, 3));
        parent.remove_child(&child);
        assert_eq!(parent.subtree, Counts::default());
    }
}
