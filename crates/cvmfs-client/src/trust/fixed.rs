//! Revisions chosen by root catalog, tag or date (client behaviour §2.2, §7.1).
//!
//! A root catalog's hash in the configuration is trusted like a key in it. Tags and dates are looked up in the
//! history that a verified manifest names; without a server, in that of the last manifest that was verified.

use std::os::fd::AsRawFd;
use std::path::PathBuf;

use cvmfs_format::compression::Compression;
use cvmfs_format::hash::{ObjectKind, ObjectName};
use cvmfs_format::history::{History, HistoryError, Tag};
use cvmfs_format::manifest::Manifest;

use super::chain::{self, Root};
use super::{TrustError, check_revision, record};
use crate::clock::Clock;
use crate::config::{ClientSettings, Selection};
use crate::deadline::Deadline;
use crate::snapshot::Pin;
use crate::store::ObjectStore;

/// Tags named in an error.
const TAGS_SHOWN: usize = 5;

/// A revision that was chosen in the configuration.
#[derive(Debug, Clone, Copy)]
pub struct Fixed {
    /// Its root catalog and what is known of it.
    pub pin: Pin,
    /// Unix time at which the whitelist expires; none if it was not needed or not read.
    pub whitelist_expires: Option<i64>,
    /// Whether no server could be asked.
    pub offline: bool,
}

/// Finds the revision that the configuration fixes; `None` if the newest is wanted.
///
/// # Errors
/// [`TrustError`]: the chain of trust is broken, or there is no such revision.
pub fn fixed(
    store: &ObjectStore,
    settings: &ClientSettings,
    clock: &dyn Clock,
    deadline: Deadline,
) -> Result<Option<Fixed>, TrustError> {
    let selection = &settings.selection;
    match selection {
        Selection::Newest => return Ok(None),
        Selection::Root(hash) => {
            let fixed = Fixed { pin: Pin::of_root(*hash), whitelist_expires: None, offline: false };
            return Ok(Some(fixed));
        }
        Selection::Tag(_) | Selection::Date(_) => {}
    }
    let (manifest, whitelist_expires) = match chain::verify(store, settings, clock, Root::Leave, deadline) {
        Ok(trusted) => (trusted.manifest, Some(trusted.whitelist_expires)),
        Err(error) if !error.leaves_last_good() => return Err(error),
        Err(error) => match record::last_manifest(store, &settings.fqrn) {
            Some(manifest) => {
                tracing::warn!(fqrn = settings.fqrn, %selection, %error, "looked up in the last good history");
                (manifest, None)
            }
            None => return Err(error),
        },
    };
    let tag = find(store, settings, &manifest, deadline)?;
    check_revision(settings, tag.revision)?;
    let pin = Pin {
        root_hash: tag.root_catalog,
        root_size: tag.root_catalog_size,
        revision: tag.revision,
        timestamp: u64::try_from(tag.timestamp).unwrap_or(0),
    };
    Ok(Some(Fixed { pin, whitelist_expires, offline: whitelist_expires.is_none() }))
}

fn find(
    store: &ObjectStore,
    settings: &ClientSettings,
    manifest: &Manifest,
    deadline: Deadline,
) -> Result<Tag, TrustError> {
    let (fqrn, selection) = (settings.fqrn.clone(), settings.selection.clone());
    let Some(hash) = manifest.history else { return Err(TrustError::NoHistory { fqrn, selection }) };
    let file = store
        .object(&ObjectName::new(hash, ObjectKind::History), Compression::Zlib, None, deadline)
        .map_err(|source| TrustError::Unavailable { fqrn: fqrn.clone(), what: "history", source })?;
    let unreadable =
        |source: HistoryError| TrustError::History { fqrn: fqrn.clone(), hash, source: Box::new(source) };
    // SQLite opens files by name only; this name leads to the very file that was verified.
    let history = History::open(&PathBuf::from(format!("/proc/self/fd/{}", file.file.as_raw_fd())))
        .map_err(unreadable)?;
    let found = match &selection {
        Selection::Tag(name) => history.tag(name),
        Selection::Date(unix) => history.tag_at(*unix),
        Selection::Newest | Selection::Root(_) => Ok(None),
    };
    match found.map_err(unreadable)? {
        Some(tag) => Ok(tag),
        None => {
            let tags = history.tags().map_err(unreadable)?;
            let tags = tags.into_iter().take(TAGS_SHOWN).map(|tag| tag.name).collect();
            Err(TrustError::NotTagged { fqrn, selection, tags })
        }
    }
}
