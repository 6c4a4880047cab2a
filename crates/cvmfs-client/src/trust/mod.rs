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
//! repository was made anew under its old name, which an administrator confirms by removing the file that the error
//! names.
//!
//! # Offline
//! [`verify_or_last_good`] falls back to the breadcrumb, so that a mount works while no server answers, or while they
//! serve what cannot be trusted: the last good revision stays good. What an administrator has blacklisted does not.

mod blacklist;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use cvmfs_format::catalog::CatalogError;
use cvmfs_format::compression::Compression;
use cvmfs_format::hash::{ContentHash, ObjectKind, ObjectName};
use cvmfs_format::letter::{Letter, LetterError, MAX_LETTER};
use cvmfs_format::manifest::{Breadcrumb, MAX_BREADCRUMB, Manifest, ManifestError};
use cvmfs_format::signature::{Certificate, MasterKeys, SignatureError};
use cvmfs_format::whitelist::{Whitelist, WhitelistError};

use crate::cache::CachedFile;
use crate::clock::Clock;
use crate::config::ClientSettings;
use crate::deadline::Deadline;
use crate::network::FetchError;
use crate::store::ObjectStore;
use blacklist::Blacklist;

/// Largest file of public keys; one key has some hundred bytes.
const MAX_KEY_FILE: u64 = 64 * 1024;
/// Seconds after which an offline client looks for the servers again (client behaviour §7.2).
const OFFLINE_TTL: u32 = 180;

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

/// Why a revision is not believed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrustError {
    /// A public key file cannot be used.
    #[error("cannot use public key {}: {reason}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A blacklist exists and cannot be read.
    #[error("cannot read blacklist {}: {source}", path.display())]
    Blacklist {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something of the chain cannot be fetched.
    #[error("cannot load the {what} of {fqrn}: {source}")]
    Unavailable {
        /// The repository.
        fqrn: String,
        /// Which part of the chain.
        what: &'static str,
        /// Why.
        source: FetchError,
    },
    /// The manifest is malformed or another repository's.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The manifest names no certificate.
    #[error("manifest of {fqrn} names no certificate")]
    NoCertificate {
        /// The repository.
        fqrn: String,
    },
    /// The certificate is none.
    #[error("cannot read the certificate of {fqrn}: {source}")]
    Certificate {
        /// The repository.
        fqrn: String,
        /// Why.
        source: SignatureError,
    },
    /// The manifest was changed or signed by somebody else.
    #[error("failed to verify repository manifest of {fqrn}: {reason}")]
    ManifestSignature {
        /// The repository.
        fqrn: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The whitelist was changed or signed by somebody else.
    #[error("invalid whitelist signature of {fqrn}: {reason}")]
    WhitelistSignature {
        /// The repository.
        fqrn: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The whitelist is malformed, expired, another repository's, or does not list the certificate.
    #[error("{source} (repository {fqrn})")]
    Whitelist {
        /// The repository.
        fqrn: String,
        /// Which of these.
        source: WhitelistError,
    },
    /// The certificate is on the site's blacklist.
    #[error("certificate of {fqrn} is blacklisted")]
    CertificateBlacklisted {
        /// The repository.
        fqrn: String,
    },
    /// The revision is on the site's blacklist.
    #[error("revision {revision} of {fqrn} is blacklisted: at least {lowest} is required")]
    RevisionBlacklisted {
        /// The repository.
        fqrn: String,
        /// The revision offered.
        revision: u64,
        /// The lowest one that is allowed.
        lowest: u64,
    },
    /// The server offers an older revision than was accepted before.
    #[error(
        "revision {offered} of {fqrn} is older than the known {known}: refused{}",
        replay_advice(breadcrumb.as_deref())
    )]
    Replayed {
        /// The repository.
        fqrn: String,
        /// The revision offered.
        offered: u64,
        /// The revision accepted before.
        known: u64,
        /// The file that remembers it.
        breadcrumb: Option<PathBuf>,
    },
    /// The root catalog has the right hash and is not readable.
    #[error("root catalog {hash} of {fqrn} is not readable: {source}")]
    RootCatalog {
        /// The repository.
        fqrn: String,
        /// The catalog.
        hash: ContentHash,
        /// Why.
        source: Box<CatalogError>,
    },
}

fn replay_advice(breadcrumb: Option<&Path>) -> String {
    breadcrumb.map_or(String::new(), |path| {
        format!("; if the repository was made anew, remove {} to accept it", path.display())
    })
}

impl TrustError {
    /// The fetch that failed, if that is the reason.
    pub(crate) fn fetch_error(&self) -> Option<&FetchError> {
        match self {
            Self::Unavailable { source, .. } => Some(source),
            _ => None,
        }
    }

    /// Whether another host may serve something better (repository format §4.3): not if nothing could be loaded,
    /// which the fetcher has tried on all hosts, and not if the certificate is refused.
    fn is_worth_another_host(&self) -> bool {
        match self {
            Self::Unavailable { what, .. } => *what == WHITELIST,
            Self::Key { .. } | Self::Blacklist { .. } => false,
            Self::Whitelist { source: WhitelistError::NotListed(_), .. } => false,
            Self::CertificateBlacklisted { .. } | Self::RevisionBlacklisted { .. } => false,
            _ => true,
        }
    }

    /// Whether the last good revision may be used instead.
    fn leaves_last_good(&self) -> bool {
        !matches!(
            self,
            Self::Key { .. }
                | Self::Blacklist { .. }
                | Self::CertificateBlacklisted { .. }
                | Self::RevisionBlacklisted { .. }
        )
    }
}

const WHITELIST: &str = "whitelist";

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
    let keys = load_keys(&settings.public_keys)?;
    let blacklist = Blacklist::load(&settings.blacklists)?;
    let chain = Chain { store, settings, clock, deadline, keys, blacklist };
    match chain.follow() {
        Err(error) if error.is_worth_another_host() && store.fetcher().hosts() > 1 => {
            store.fetcher().reject_host(&error.to_string());
            chain.follow()
        }
        outcome => outcome,
    }
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
    let Some(known) = last_accepted(store, &settings.fqrn) else { return Err(error) };
    let root = ObjectName::new(known.root_catalog, ObjectKind::Catalog);
    if !error.leaves_last_good() || !store.is_cached(&root, Compression::Zlib, None) {
        return Err(error);
    }
    tracing::warn!(fqrn = settings.fqrn, revision = known.revision, %error, "last good revision is used");
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

/// The newest revision of `fqrn` that was ever accepted with this cache directory.
pub fn last_accepted(store: &ObjectStore, fqrn: &str) -> Option<Breadcrumb> {
    let mut text = Vec::new();
    let file = File::open(breadcrumb_path(store, fqrn)).ok()?;
    file.take(MAX_BREADCRUMB as u64).read_to_end(&mut text).ok()?;
    Breadcrumb::parse(&text)
}

fn breadcrumb_path(store: &ObjectStore, fqrn: &str) -> PathBuf {
    store.cache().directory().join(format!("cvmfschecksum.{fqrn}"))
}

/// The public master keys. All files must be usable: a key that is silently missing is found out when the others
/// are withdrawn.
fn load_keys(files: &[PathBuf]) -> Result<MasterKeys, TrustError> {
    let mut keys = MasterKeys::new();
    for path in files {
        let unusable = |reason: String| TrustError::Key { path: path.clone(), reason };
        let file = File::open(path).map_err(|error| unusable(error.to_string()))?;
        let mode = file.metadata().map_err(|error| unusable(error.to_string()))?.mode();
        if mode & 0o002 != 0 {
            return Err(unusable("everybody may write it".to_owned()));
        }
        let mut text = Vec::new();
        file.take(MAX_KEY_FILE).read_to_end(&mut text).map_err(|error| unusable(error.to_string()))?;
        keys.add_pem(&text).map_err(|error| unusable(with_source(&error)))?;
    }
    Ok(keys)
}

/// One pass over the chain of trust.
struct Chain<'a> {
    store: &'a ObjectStore,
    settings: &'a ClientSettings,
    clock: &'a dyn Clock,
    deadline: Deadline,
    keys: MasterKeys,
    blacklist: Blacklist,
}

impl Chain<'_> {
    fn follow(&self) -> Result<Trusted, TrustError> {
        let fqrn = &self.settings.fqrn;
        let manifest_file = self.raw(".cvmfspublished", "manifest")?;
        let manifest = Manifest::parse(&manifest_file)?;
        manifest.require_fqrn(fqrn)?;
        let known = last_accepted(self.store, fqrn);
        self.refuse_replay(&manifest, known)?;

        let certificate = self.certificate(&manifest)?;
        let unsigned = |reason| TrustError::ManifestSignature { fqrn: fqrn.clone(), reason };
        let letter =
            Letter::parse(&manifest_file).map_err(|error: LetterError| unsigned(error.to_string()))?;
        certificate.verify_manifest(&letter).map_err(|error| unsigned(error.to_string()))?;

        let whitelist = self.whitelist()?;
        self.blacklist.check(fqrn, manifest.revision, &certificate)?;
        let refused = |source| TrustError::Whitelist { fqrn: fqrn.clone(), source };
        whitelist.check(fqrn, self.clock.unix(), &certificate).map_err(refused)?;

        if known.is_none_or(|known| known != manifest.breadcrumb()) {
            self.require_readable_root(&manifest)?;
            self.remember(&manifest);
        }
        Ok(Trusted { manifest, whitelist_expires: whitelist.expires_unix(), offline: false })
    }

    fn raw(&self, path: &str, what: &'static str) -> Result<Vec<u8>, TrustError> {
        let fetched = self.store.raw(path, MAX_LETTER as u64, self.deadline);
        fetched.map_err(|source| self.unavailable(what, source))
    }

    fn unavailable(&self, what: &'static str, source: FetchError) -> TrustError {
        TrustError::Unavailable { fqrn: self.settings.fqrn.clone(), what, source }
    }

    fn refuse_replay(&self, manifest: &Manifest, known: Option<Breadcrumb>) -> Result<(), TrustError> {
        match known {
            Some(known) if manifest.revision < known.revision || manifest.timestamp < known.timestamp => {
                Err(TrustError::Replayed {
                    fqrn: self.settings.fqrn.clone(),
                    offered: manifest.revision,
                    known: known.revision,
                    breadcrumb: Some(breadcrumb_path(self.store, &self.settings.fqrn)),
                })
            }
            _ => Ok(()),
        }
    }

    fn certificate(&self, manifest: &Manifest) -> Result<Certificate, TrustError> {
        let fqrn = &self.settings.fqrn;
        let hash = manifest.certificate.ok_or_else(|| TrustError::NoCertificate { fqrn: fqrn.clone() })?;
        let name = ObjectName::new(hash, ObjectKind::Certificate);
        let file = self
            .store
            .object(&name, Compression::Zlib, None, self.deadline)
            .map_err(|source| self.unavailable("certificate", source))?;
        let pem = read_whole(&file).map_err(|error| {
            let source = FetchError::Local { object: format!("certificate {name}"), source: error.into() };
            self.unavailable("certificate", source)
        })?;
        Certificate::from_pem(&pem).map_err(|source| TrustError::Certificate { fqrn: fqrn.clone(), source })
    }

    /// The whitelist, its signature verified; its content is checked by the caller.
    fn whitelist(&self) -> Result<Whitelist, TrustError> {
        let fqrn = &self.settings.fqrn;
        let file = self.raw(".cvmfswhitelist", WHITELIST)?;
        let unsigned = |reason| TrustError::WhitelistSignature { fqrn: fqrn.clone(), reason };
        let letter = Letter::parse(&file).map_err(|error| unsigned(error.to_string()))?;
        self.keys.verify_whitelist(&letter).map_err(|error| unsigned(error.to_string()))?;
        // Only what was signed is looked at.
        Whitelist::parse(letter.text).map_err(|source| TrustError::Whitelist { fqrn: fqrn.clone(), source })
    }

    /// A root catalog that cannot be opened must not become the last good one.
    fn require_readable_root(&self, manifest: &Manifest) -> Result<(), TrustError> {
        let name = ObjectName::new(manifest.root_catalog, ObjectKind::Catalog);
        let size = Some(manifest.root_catalog_size).filter(|size| *size > 0);
        let file = self
            .store
            .object(&name, Compression::Zlib, size, self.deadline)
            .map_err(|source| self.unavailable("root catalog", source))?;
        crate::tree::open_catalog(&file).map(drop).map_err(|source| TrustError::RootCatalog {
            fqrn: self.settings.fqrn.clone(),
            hash: manifest.root_catalog,
            source: Box::new(source),
        })
    }

    /// Writes the breadcrumb: to a temporary file, then by rename. It is flushed in the background, since it guards
    /// against replay and must survive a power cut, but nobody should wait for a slow disk.
    fn remember(&self, manifest: &Manifest) {
        let path = breadcrumb_path(self.store, &self.settings.fqrn);
        let write = || {
            let directory = self.store.cache().directory();
            let mut file = tempfile::Builder::new().prefix(".cvmfschecksum.").tempfile_in(directory)?;
            file.write_all(manifest.breadcrumb().to_text().as_bytes())?;
            let file = file.persist(&path).map_err(|error| error.error)?;
            std::thread::Builder::new()
                .name("cvmfs-flush".to_owned())
                .spawn(move || file.sync_data())
                .map(drop)
        };
        if let Err(error) = write() {
            tracing::warn!(path = %path.display(), %error, "cannot remember the accepted revision");
        }
    }
}

fn read_whole(file: &CachedFile) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(file.size).map_err(io::Error::other)?];
    file.file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// An error and its cause in one line.
fn with_source(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}
