//! One pass over the chain of trust: keys, whitelist, certificate, manifest, root catalog.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;

use cvmfs_format::compression::Compression;
use cvmfs_format::hash::{ObjectKind, ObjectName};
use cvmfs_format::letter::{Letter, LetterError, MAX_LETTER};
use cvmfs_format::manifest::{Breadcrumb, Manifest};
use cvmfs_format::signature::{Certificate, MasterKeys};
use cvmfs_format::whitelist::Whitelist;

use super::blacklist::Blacklist;
use super::{TrustError, Trusted, authorities, record};
use crate::cache::CachedFile;
use crate::clock::Clock;
use crate::config::ClientSettings;
use crate::deadline::Deadline;
use crate::network::FetchError;
use crate::store::ObjectStore;

/// Largest file of public keys; one key has some hundred bytes.
const MAX_KEY_FILE: u64 = 64 * 1024;

/// The whitelist's name in messages.
pub(super) const WHITELIST: &str = "whitelist";

/// What is done with the root catalog of a revision that was verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Root {
    /// It is loaded, and the revision becomes the last good one.
    Accept,
    /// Nothing: another revision is wanted.
    Leave,
}

/// Verifies the newest revision that the servers offer; a second host is asked where that may help.
pub(super) fn verify(
    store: &ObjectStore,
    settings: &ClientSettings,
    clock: &dyn Clock,
    root: Root,
    deadline: Deadline,
) -> Result<Trusted, TrustError> {
    let keys = load_keys(&settings.public_keys)?;
    let blacklist = Blacklist::load(&settings.blacklists)?;
    let chain = Chain { store, settings, clock, deadline, keys, blacklist };
    match chain.follow(root) {
        Err(error) if error.is_worth_another_host() && store.fetcher().hosts() > 1 => {
            store.fetcher().reject_host(&error.to_string());
            chain.follow(root)
        }
        outcome => outcome,
    }
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
    fn follow(&self, root: Root) -> Result<Trusted, TrustError> {
        let fqrn = &self.settings.fqrn;
        let manifest_file = self.raw(".cvmfspublished", "manifest")?;
        let manifest = Manifest::parse(&manifest_file)?;
        manifest.require_fqrn(fqrn)?;
        let known = record::last_accepted(self.store, fqrn);
        self.refuse_replay(&manifest, record::highest_seen(self.store, fqrn))?;

        let certificate = self.certificate(&manifest)?;
        let unsigned = |reason| TrustError::ManifestSignature { fqrn: fqrn.clone(), reason };
        let letter =
            Letter::parse(&manifest_file).map_err(|error: LetterError| unsigned(error.to_string()))?;
        certificate.verify_manifest(&letter).map_err(|error| unsigned(error.to_string()))?;

        let whitelist = self.whitelist()?;
        self.blacklist.check(fqrn, manifest.revision, &certificate)?;
        let refused = |source| TrustError::Whitelist { fqrn: fqrn.clone(), source };
        let authorities = || authorities::load(&self.settings.authorities);
        whitelist.check_with(fqrn, self.clock.unix(), &certificate, &authorities).map_err(refused)?;

        if root == Root::Accept && known.is_none_or(|known| known != manifest.breadcrumb()) {
            self.require_readable_root(&manifest)?;
            record::remember_revision(self.store, &manifest);
        }
        record::remember_manifest(self.store, fqrn, &manifest_file);
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
                    breadcrumb: Some(record::breadcrumb_path(self.store, &self.settings.fqrn)),
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
}

/// The public master keys. All files must be usable: a key that is silently missing is found out when the others
/// are withdrawn.
fn load_keys(files: &[PathBuf]) -> Result<MasterKeys, TrustError> {
    let mut keys = MasterKeys::new();
    for path in files {
        let unusable = |reason: String| TrustError::Key { path: path.clone(), reason };
        // A pipe without writer would block the open.
        let options = File::options().read(true).custom_flags(libc::O_NONBLOCK).clone();
        let file = options.open(path).map_err(|error| unusable(error.to_string()))?;
        let found = file.metadata().map_err(|error| unusable(error.to_string()))?;
        if !found.is_file() && !found.is_dir() {
            return Err(unusable("not a regular file".to_owned()));
        }
        if found.mode() & 0o002 != 0 {
            return Err(unusable("everybody may write it".to_owned()));
        }
        let mut text = Vec::new();
        file.take(MAX_KEY_FILE).read_to_end(&mut text).map_err(|error| unusable(error.to_string()))?;
        keys.add_pem(&text).map_err(|error| unusable(with_source(&error)))?;
    }
    Ok(keys)
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
