//! What a file is to the cache.
//!
//! The kind is a bit of the file's mode, so that an eviction, which looks at every file, knows it without opening
//! one.

use serde::Serialize;

/// What a file is to the cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The content of a file.
    #[default]
    Regular,
    /// A catalog, or another database or document about the repository.
    Catalog,
    /// The content of a file of a repository that asks to be evicted first (client behaviour §10).
    Volatile,
}

/// The sticky bit, which has no meaning of its own on files.
const VOLATILE: u32 = 0o1000;
const WRITABLE: u32 = 0o200;

impl Kind {
    /// The mode of a file of this kind in a directory of our own.
    pub(super) fn mode(self) -> u32 {
        match self {
            Self::Regular => 0o600,
            Self::Catalog => 0o400,
            Self::Volatile => 0o600 | VOLATILE,
        }
    }

    pub(super) fn of_mode(mode: u32) -> Self {
        if mode & VOLATILE != 0 {
            Self::Volatile
        } else if mode & WRITABLE == 0 {
            Self::Catalog
        } else {
            Self::Regular
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kind_is_told_by_the_mode() {
        for kind in [Kind::Regular, Kind::Catalog, Kind::Volatile] {
            assert_eq!(Kind::of_mode(0o100_000 | kind.mode()), kind);
            assert_eq!(kind.mode() & 0o077, 0, "private");
        }
    }
}
