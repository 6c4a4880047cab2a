//! `mkfs`: a new, empty, signed repository.
//!
//! The first revision is number 1 and has no predecessor; the C++ tools publish an empty revision 0
//! first, and accept both (errata 12).

use std::path::{Path, PathBuf};

use cvmfs_format::catalog::{CatalogWriter, Entry, EntryKind};
use cvmfs_format::letter::seal;
use cvmfs_format::manifest::{DEFAULT_TTL, Manifest, is_mountable_fqrn};
use cvmfs_format::whitelist::Whitelist;
use cvmfs_format::{Compression, HashAlgorithm, ObjectKind};

use crate::commit::Signer;
use crate::error::PublishError;
use crate::interrupt::Interrupt;
use crate::keys::{KeyFiles, ReleaseKeys};
use crate::pipeline::Counters;
use crate::publisher::{Clock, DEFAULT_LOCK_WAIT, system_clock};
use crate::settings::Settings;
use crate::storage::{self, Storage};
use crate::workspace::in_catalog;

/// How long a new whitelist is valid unless told otherwise.
pub const DEFAULT_WHITELIST_DAYS: u32 = 30;
const DAY: i64 = 24 * 3600;
/// What the file that allows replication contains.
const REPLICA_NOTE: &[u8] = b"This file marks the repository as replicatable to stratum 1 servers\n";

/// What a repository is to be like.
#[derive(Debug, Clone)]
pub struct NewRepository {
    /// Fully qualified repository name.
    pub fqrn: String,
    /// Storage directory, made if missing.
    pub storage: String,
    /// Keys directory; keys that are there are used, others made.
    pub keys_dir: PathBuf,
    /// Hash algorithm of all objects.
    pub hash: HashAlgorithm,
    /// Compression of file contents.
    pub compression: Compression,
    /// Whether garbage collection is allowed.
    pub garbage_collectable: bool,
    /// Seconds for which clients may rely on a revision.
    pub ttl: u32,
    /// Days for which the first whitelist is valid.
    pub whitelist_days: u32,
    /// Source of time.
    pub clock: Clock,
}

impl NewRepository {
    /// A repository with the defaults: SHA-1, zlib, no garbage collection, 240 s, 30 days.
    pub fn new(fqrn: &str, storage: &str, keys_dir: &Path) -> NewRepository {
        NewRepository {
            fqrn: fqrn.to_owned(),
            storage: storage.to_owned(),
            keys_dir: keys_dir.to_owned(),
            hash: HashAlgorithm::default(),
            compression: Compression::Zlib,
            garbage_collectable: false,
            ttl: DEFAULT_TTL,
            whitelist_days: DEFAULT_WHITELIST_DAYS,
            clock: system_clock,
        }
    }
}

/// What `mkfs` made.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Report {
    /// Repository name.
    pub fqrn: String,
    /// Number of the first revision.
    pub revision: u64,
    /// Hash of its root catalog.
    pub root_hash: String,
    /// The public master key that clients need.
    pub public_key: PathBuf,
    /// Unix time from which the whitelist is invalid.
    pub whitelist_expires: i64,
}

/// Makes a repository: keys, whitelist, an empty root catalog, history, reflog, and last the manifest. Refuses a
/// storage that has a repository.
pub fn create_repository(new: &NewRepository) -> Result<Report, PublishError> {
    if !is_mountable_fqrn(&new.fqrn) {
        let fqrn = &new.fqrn;
        return Err(PublishError::Usage(format!(
            "{fqrn:?} is not a repository name such as example.cern.ch: at most 255 letters, digits, '-' and '_', in \
             parts with dots between them, not beginning with '-'"
        )));
    }
    if new.whitelist_days == 0 {
        return Err(PublishError::Usage("a whitelist must be valid for at least one day".to_owned()));
    }
    let now = (new.clock)();
    let storage = storage::create(&new.storage)?;
    let _lock = storage.lock(DEFAULT_LOCK_WAIT)?;
    if storage.get_file(storage::MANIFEST, u64::MAX)?.is_some() {
        let place = storage.location();
        return Err(PublishError::Usage(format!(
            "{place} holds a repository already: choose another --storage"
        )));
    }
    let files = KeyFiles::new(&new.keys_dir, &new.fqrn);
    files.create_missing(now)?;
    let keys = files.release()?;
    let scratch = storage.scratch()?;
    let settings = Settings::new_repository(new.compression);
    let signer = Signer {
        fqrn: &new.fqrn,
        storage: &storage,
        keys: &keys,
        algorithm: new.hash,
        deflate: settings.deflate,
        alternative_paths: false,
        counters: &Counters::default(),
        interrupt: &Interrupt::default(),
    };
    let expires = now + i64::from(new.whitelist_days) * DAY;
    let expires = write_whitelist(&*storage, &files, &keys, new.hash, now, expires)?;
    storage.put_file(storage::MASTER_REPLICA, REPLICA_NOTE)?;

    let metainfo = signer.store(ObjectKind::Metainfo, &settings.to_metainfo())?;
    let root_file = scratch.file("root");
    make_root_catalog(&root_file, new.ttl, now)?;
    let (root, size) = signer.store_file(ObjectKind::Catalog, &root_file)?;
    let manifest = Manifest {
        root_catalog: root.hash,
        root_catalog_size: size,
        ttl: new.ttl,
        revision: 1,
        garbage_collectable: new.garbage_collectable,
        alternative_paths: false,
        fqrn: new.fqrn.clone(),
        certificate: None,
        history: None,
        timestamp: 0,
        metainfo: Some(metainfo.hash),
        reflog: None,
    };
    let manifest =
        signer.publish(manifest, now, &scratch, |history| history.rotate_trunk(root.hash, size, 1, now))?;
    Ok(Report {
        fqrn: manifest.fqrn,
        revision: manifest.revision,
        root_hash: manifest.root_catalog.to_string(),
        public_key: new.keys_dir.join(format!("{}.pub", new.fqrn)),
        whitelist_expires: expires,
    })
}

/// Signs and stores a whitelist that lists the certificate of `keys`, after making sure that clients with the public
/// key will accept it. Returns the expiry as they will see it: whitelists are valid until a full hour.
pub(crate) fn write_whitelist(
    storage: &dyn Storage,
    files: &KeyFiles,
    keys: &ReleaseKeys,
    algorithm: HashAlgorithm,
    now: i64,
    expires: i64,
) -> Result<i64, PublishError> {
    let master = files.master()?;
    let fingerprint = keys.certificate.fingerprint(algorithm);
    let text = Whitelist::compose(now, expires, files.fqrn(), &[fingerprint]);
    let bad = |error: &dyn std::error::Error| {
        PublishError::Trust(format!("whitelist: {}", crate::workspace::chain(error)))
    };
    let letter = seal(text, algorithm, |text| master.sign_whitelist(text)).map_err(|e| bad(&e))?;
    let parsed = cvmfs_format::letter::Letter::parse(&letter).map_err(|e| bad(&e))?;
    files.public()?.verify_whitelist(&parsed).map_err(|_| {
        PublishError::Trust(format!("{0}.masterkey and {0}.pub do not belong together", files.fqrn()))
    })?;
    let whitelist = Whitelist::parse(&letter).map_err(|e| bad(&e))?;
    storage.put_file(storage::WHITELIST, &letter)?;
    Ok(whitelist.expires_unix())
}

fn make_root_catalog(file: &Path, ttl: u32, now: i64) -> Result<(), PublishError> {
    let mut writer = CatalogWriter::create(file, b"").map_err(in_catalog(b""))?;
    let mut root = Entry::new(b"", EntryKind::Directory, 0o755);
    root.size = 4096;
    root.link_count = 2;
    root.mtime = now;
    writer.insert(&root).map_err(in_catalog(b""))?;
    writer.finish(1, None, Some(ttl), u64::try_from(now).unwrap_or(0)).map_err(in_catalog(b""))
}
