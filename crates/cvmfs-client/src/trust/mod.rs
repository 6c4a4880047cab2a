//! Whether to believe a repository's newest revision (repository format §4.3, §6).
//!
//! [`verify`] follows the chain from the public master keys of the configuration to the root catalog: whitelist
//! signed by a master key, certificate listed in it, manifest signed by the certificate, nothing expired or
//! blacklisted, the right name, and not older than what was accepted before.
//!
//! # Replay
//! The *breadcrumb* of a repository (§6.5) lies in the cache directory and holds the newest root catalog that was
//! verified and found readable. A manifest with a smaller revision or an earlier time of signing is refused, always:
//! trust only moves forward. That holds also when the breadcrumb's own catalog is gone from the servers; such a
//! repository was made anew under its old name, which an administrator confirms by removing the files that the error
//! names.
//!
//! # Fixed revisions
//! [`fixed`] finds the revision that the configuration names by root catalog, tag or date.
//!
//! # Offline
//! [`verify_or_last_good`] falls back to the breadcrumb, so that a mount works while no server answers, or while they
//! serve what cannot be trusted: the last good revision stays good. What an administrator has blacklisted does not.

mod authorities;
mod blacklist;
mod chain;
mod error;
mod fixed;
mod record;

use cvmfs_format::compression::Compression;
use cvmfs_format::hash::{ObjectKind, ObjectName};
use cvmfs_format::manifest::Manifest;

pub use error::TrustError;
pub use fixed::{Fixed, fixed};
pub use record::last_accepted;

use crate::clock::Clock;
use crate::config::ClientSettings;
use crate::deadline::Deadline;
use crate::store::ObjectStore;
use blacklist::Blacklist;
use chain::Root;

/// Seconds after which an offline client looks for the servers again (client behaviour §7.2).
pub const OFFLINE_TTL: u32 = 180;

/// A revision that may be used.
#[derive(Debug, Clone)]
pub struct Trusted {
    /// The manifest. Offline it holds only what the breadcrumb knows: name, root catalog, revision and timestamp.
    pub manifest: Manifest,
    /// Unix time at which the whitelist expires; 0 when offline.
    pub whitelist_expires: i64,
    /// Whether the revision is the last good one because none could be verified now.
    pub offline: bool,
}

/// Verifies the newest revision that the servers offer and remembers it.
///
/// # Errors
/// [`TrustError`] of the first link of the chain that is broken, after a second host was asked where that may help.
pub fn verify(
    store: &ObjectStore,
    settings: &ClientSettings,
    clock: &dyn Clock,
    deadline: Deadline,
) -> Result<Trusted, TrustError> {
    chain::verify(store, settings, clock, Root::Accept, deadline)
}

/// Checks a revision against the blacklists, which are read anew.
///
/// # Errors
/// [`TrustError::RevisionBlacklisted`], and [`TrustError::Blacklist`] if one of them cannot be read.
pub fn check_revision(settings: &ClientSettings, revision: u64) -> Result<(), TrustError> {
    Blacklist::load(&settings.blacklists)?.check_revision(&settings.fqrn, revision)
}

/// Verifies the newest revision or, if that is not possible, gives the last good one if it is in the cache.
///
/// # Errors
/// As [`verify`], if there is no last good revision or it must not be used.
pub fn verify_or_last_good(
    store: &ObjectStore,
    settings: &ClientSettings,
    clock: &dyn Clock,
    deadline: Deadline,
) -> Result<Trusted, TrustError> {
    let error = match verify(store, settings, clock, deadline) {
        Ok(trusted) => return Ok(trusted),
        Err(error) => error,
    };
    if !error.leaves_last_good() {
        return Err(error);
    }
    let Some(known) = last_accepted(store, &settings.fqrn) else { return Err(error) };
    check_revision(settings, known.revision)?;
    let root = ObjectName::new(known.root_catalog, ObjectKind::Catalog);
    if !store.is_cached(&root, Compression::Zlib, None) {
        return Err(error);
    }
    tracing::warn!(decision = "refusal", fqrn = settings.fqrn, revision = known.revision, %error, "last good revision is used");
    let manifest = Manifest {
        root_catalog: known.root_catalog,
        root_catalog_size: 0,
        ttl: OFFLINE_TTL,
        revision: known.revision,
        garbage_collectable: false,
        alternative_paths: false,
        fqrn: settings.fqrn.clone(),
        certificate: None,
        history: None,
        timestamp: known.timestamp,
        metainfo: None,
        reflog: None,
    };
    Ok(Trusted { manifest, whitelist_expires: 0, offline: true })
}
