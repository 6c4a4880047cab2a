//! Opening catalogs that the store delivered.

use std::os::fd::AsRawFd;
use std::path::PathBuf;

use cvmfs_format::catalog::{Catalog, CatalogError};

use crate::store::CachedFile;

/// Opens the catalog in `object`.
///
/// SQLite opens files by name only; the descriptor's name in /proc leads to the very
/// file that was verified, whatever happens to the cache directory meanwhile.
pub(crate) fn open_catalog(object: &CachedFile) -> Result<Catalog, CatalogError> {
    let path = PathBuf::from(format!("/proc/self/fd/{}", object.file.as_raw_fd()));
    Catalog::open(&path)
}
