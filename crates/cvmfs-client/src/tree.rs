//! Opening catalogs that the store delivered, within the memory that their mappings may take.

use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use cvmfs_format::catalog::{Catalog, CatalogError, Reading};

use crate::store::CachedFile;

/// Bytes of catalogs that this process maps at a time, which is the metadata of some fifty thousand entries. A
/// catalog beyond that is read page by page, a little slower: a walk over millions of entries must not take the
/// node's memory.
const MAX_MAPPED: u64 = 8 << 20;

/// Bytes mapped now.
static MAPPED: AtomicU64 = AtomicU64::new(0);

/// An open catalog and its share of the mapped bytes.
#[derive(Debug)]
pub(crate) struct OpenCatalog {
    rows: Catalog,
    _share: Option<Share>,
}

impl Deref for OpenCatalog {
    type Target = Catalog;

    fn deref(&self) -> &Catalog {
        &self.rows
    }
}

/// Bytes that were taken from the budget; given back when dropped.
#[derive(Debug)]
struct Share(u64);

impl Share {
    fn take(budget: &AtomicU64, bytes: u64) -> Option<Self> {
        let more = |mapped: u64| mapped.checked_add(bytes).filter(|mapped| *mapped <= MAX_MAPPED);
        budget.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok().map(|_| Self(bytes))
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        MAPPED.fetch_sub(self.0, Ordering::Relaxed);
    }
}

/// Opens the catalog in `object`.
///
/// SQLite opens files by name only; the descriptor's name in /proc leads to the very
/// file that was verified, whatever happens to the cache directory meanwhile.
pub(crate) fn open_catalog(object: &CachedFile) -> Result<OpenCatalog, CatalogError> {
    let path = PathBuf::from(format!("/proc/self/fd/{}", object.file.as_raw_fd()));
    let share = Share::take(&MAPPED, object.size);
    let reading = if share.is_some() { Reading::Mapped } else { Reading::Paged };
    Ok(OpenCatalog { rows: Catalog::open_as(&path, reading)?, _share: share })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mapped_bytes_stay_within_their_budget() {
        let budget = AtomicU64::new(0);
        let share = Share::take(&budget, MAX_MAPPED - 10).unwrap();
        assert!(Share::take(&budget, 11).is_none());
        assert!(Share::take(&budget, u64::MAX).is_none());
        std::mem::forget((Share::take(&budget, 10).unwrap(), share));
        assert_eq!(budget.load(Ordering::Relaxed), MAX_MAPPED);
    }
}
