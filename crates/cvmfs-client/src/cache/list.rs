//! What is in the cache, for people.

use serde::Serialize;

use super::seal::Seal;
use super::{Cache, Kind, files, presence};

/// Which files are listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listing {
    /// All.
    All,
    /// Those that are not evicted because a process has pinned them.
    Pinned,
    /// Catalogs and other databases.
    Catalogs,
    /// Those of repositories that ask to be evicted first.
    Volatile,
}

/// A file of the cache.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct CacheEntry {
    /// Its name as one word: the hash with the identifier of its algorithm, and perhaps an ending.
    pub name: String,
    /// Its size in bytes; of a partly present file what is there.
    pub size: u64,
    /// Where it belongs: the path in its repository, or the end of a long one.
    pub hint: Option<String>,
    /// Whether somebody has pinned it.
    pub pinned: bool,
}

pub(super) fn list(cache: &Cache, listing: Listing) -> Vec<CacheEntry> {
    if let Some(memory) = &cache.0.memory {
        return memory.list(listing);
    }
    let open = cache.directory_now();
    let (_, pinned) = presence::living(open.root(), None);
    let mut entries = Vec::new();
    files::walk(
        &open,
        &mut |item| {
            let name = item.name();
            let is_pinned = pinned.contains(&name);
            let is_listed = match listing {
                Listing::All => true,
                Listing::Pinned => is_pinned,
                Listing::Catalogs => item.kind == Kind::Catalog,
                Listing::Volatile => item.kind == Kind::Volatile,
            };
            if is_listed {
                let own =
                    item.cache_name().and_then(|name| cache.0.pins.hint(&name)).map(|hint| hint.to_string());
                let hint = own.or_else(|| item.open().ok().and_then(|file| Seal::of(&file)?.hint));
                entries.push(CacheEntry { name, size: item.size, hint, pinned: is_pinned });
            }
        },
        &mut |_| {},
    );
    entries.sort_unstable();
    entries
}
