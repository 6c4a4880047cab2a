//! The published state: manifest, whitelist and certificate, verified against the public master key.
//!
//! Repository format §4.3. The publisher and `check` begin here: nothing below an unverified
//! manifest is looked at.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::Path;

use cvmfs_format::catalog::Entry;
use cvmfs_format::compression::inflate;
use cvmfs_format::letter::{Letter, MAX_LETTER};
use cvmfs_format::manifest::Manifest;
use cvmfs_format::signature::{Certificate, MasterKeys};
use cvmfs_format::whitelist::Whitelist;
use cvmfs_format::{Compression, ContentHash, Hasher, Inflater, ObjectKind, ObjectName};

use crate::error::PublishError;
use crate::storage::{self, Storage};

/// Bounds of the small objects: a certificate with its chain, a metainfo document, a history with 10⁵ tags.
const MAX_CERTIFICATE: u64 = 1 << 20;
const MAX_METAINFO: u64 = 1 << 20;
/// Largest catalog or history database. Catalogs of C++ publishers end at 500,000 entries (some 200 MB).
pub(crate) const MAX_DATABASE: u64 = 4 << 30;
/// Stored bytes are read in pieces of this size.
const PIECE: usize = 256 << 10;

/// A revision whose signatures hold.
#[derive(Debug, Clone)]
pub struct Head {
    /// The manifest.
    pub manifest: Manifest,
    /// The whitelist that lists the manifest's certificate.
    pub whitelist: Whitelist,
    /// The certificate whose key signed the manifest.
    pub certificate: Certificate,
}

impl Head {
    /// Loads and verifies the head of `fqrn`: name, certificate, manifest signature, whitelist signature, expiry
    /// at `now` (Unix time), fingerprint.
    pub fn load(
        storage: &dyn Storage,
        fqrn: &str,
        masters: &MasterKeys,
        now: i64,
    ) -> Result<Head, PublishError> {
        let head = Head::load_ignoring_expiry(storage, fqrn, masters)?;
        head.require_valid_whitelist(fqrn, now)?;
        Ok(head)
    }

    pub(crate) fn require_valid_whitelist(&self, fqrn: &str, now: i64) -> Result<(), PublishError> {
        if self.whitelist.is_expired(now) {
            return Err(PublishError::Trust(format!(
                "the whitelist of {fqrn} expired on {}: run `cvmfs-publish resign`",
                self.whitelist.expires
            )));
        }
        Ok(())
    }

    /// Like [`Head::load`], for commands that renew or examine the whitelist.
    pub fn load_ignoring_expiry(
        storage: &dyn Storage,
        fqrn: &str,
        masters: &MasterKeys,
    ) -> Result<Head, PublishError> {
        Letters::read(storage)?.verify(storage, fqrn, masters)
    }

    /// The manifest if `certificate` signed it, whatever the whitelist says. For renewing the whitelist.
    pub(crate) fn manifest_signed_by(
        storage: &dyn Storage,
        fqrn: &str,
        certificate: &Certificate,
    ) -> Result<Manifest, PublishError> {
        let bad =
            |error: &dyn std::fmt::Display| PublishError::Trust(format!("{}: {error}", storage::MANIFEST));
        let file = required_file(storage, storage::MANIFEST)?;
        let letter = Letter::parse(&file).map_err(|e| bad(&e))?;
        certificate.verify_manifest(&letter).map_err(|e| bad(&e))?;
        let manifest = Manifest::parse(letter.text).map_err(|e| bad(&e))?;
        manifest.require_fqrn(fqrn).map_err(|e| bad(&e))?;
        Ok(manifest)
    }

    /// The metainfo object, if there is one.
    pub fn metainfo(&self, storage: &dyn Storage) -> Result<Option<Vec<u8>>, PublishError> {
        let load = |hash| load_small(storage, ObjectName::new(hash, ObjectKind::Metainfo), MAX_METAINFO);
        self.manifest.metainfo.map(load).transpose()
    }
}

/// Manifest and whitelist as they are stored, not yet trusted.
#[derive(Debug)]
pub(crate) struct Letters {
    pub(crate) manifest: Vec<u8>,
    pub(crate) whitelist: Vec<u8>,
}

impl Letters {
    pub(crate) fn read(storage: &dyn Storage) -> Result<Letters, PublishError> {
        let manifest = required_file(storage, storage::MANIFEST)?;
        Ok(Letters { manifest, whitelist: required_file(storage, storage::WHITELIST)? })
    }

    /// Everything but the whitelist's expiry. The certificate comes from `storage`.
    pub(crate) fn verify(
        &self,
        storage: &dyn Storage,
        fqrn: &str,
        masters: &MasterKeys,
    ) -> Result<Head, PublishError> {
        let trust =
            |object: &str, error: &dyn std::fmt::Display| PublishError::Trust(format!("{object}: {error}"));
        let bad_manifest = |error: &dyn std::fmt::Display| trust(storage::MANIFEST, error);
        let letter = Letter::parse(&self.manifest).map_err(|e| bad_manifest(&e))?;
        let manifest = Manifest::parse(letter.text).map_err(|e| bad_manifest(&e))?;
        manifest.require_fqrn(fqrn).map_err(|e| bad_manifest(&e))?;

        let certificate_hash = manifest
            .certificate
            .ok_or_else(|| bad_manifest(&"names no certificate, so it cannot be verified"))?;
        let pem =
            load_small(storage, ObjectName::new(certificate_hash, ObjectKind::Certificate), MAX_CERTIFICATE)?;
        let certificate = Certificate::from_pem(&pem).map_err(|e| trust("certificate", &e))?;
        certificate.verify_manifest(&letter).map_err(|e| bad_manifest(&e))?;

        let bad_whitelist = |error: &dyn std::fmt::Display| trust(storage::WHITELIST, error);
        let letter = Letter::parse(&self.whitelist).map_err(|e| bad_whitelist(&e))?;
        masters.verify_whitelist(&letter).map_err(|e| bad_whitelist(&e))?;
        let whitelist = Whitelist::parse(letter.text).map_err(|e| bad_whitelist(&e))?;
        // expiry is the caller's matter: a moment before the Unix epoch passes for every list
        whitelist.check(fqrn, BEFORE_ANY_EXPIRY, &certificate).map_err(|e| bad_whitelist(&e))?;
        Ok(Head { manifest, whitelist, certificate })
    }
}

/// 1900: no whitelist is older.
const BEFORE_ANY_EXPIRY: i64 = -2_208_988_800;

fn required_file(storage: &dyn Storage, name: &str) -> Result<Vec<u8>, PublishError> {
    storage.get_file(name, MAX_LETTER as u64)?.ok_or_else(|| {
        PublishError::NotFound(format!("there is no repository at {}: {name} is missing", storage.location()))
    })
}

/// A small zlib object, its hash verified.
pub(crate) fn load_small(
    storage: &dyn Storage,
    name: ObjectName,
    limit: u64,
) -> Result<Vec<u8>, PublishError> {
    let stored = storage.get_object(&name, limit)?;
    require_hash(&name, ContentHash::of(name.hash.algorithm, &stored))?;
    inflate(Compression::Zlib, &stored, limit).map_err(|error| PublishError::damaged(name.path(), error))
}

/// The content of a small file that is stored as one object, its hash verified.
pub(crate) fn load_content(
    storage: &dyn Storage,
    entry: &Entry,
    limit: u64,
) -> Result<Vec<u8>, PublishError> {
    let missing = || PublishError::damaged("entry", "has no content of its own");
    let name = ObjectName::new(entry.hash.ok_or_else(missing)?, ObjectKind::File);
    let stored = storage.get_object(&name, limit)?;
    require_hash(&name, ContentHash::of(name.hash.algorithm, &stored))?;
    inflate(entry.compression(), &stored, limit).map_err(|error| PublishError::damaged(name.path(), error))
}

/// Unpacks a catalog or history database into the new file `to`, verifying its hash; returns its plain size.
pub(crate) fn unpack_database(
    storage: &dyn Storage,
    name: ObjectName,
    to: &Path,
) -> Result<u64, PublishError> {
    let mut stored = storage.open_object(&name)?;
    let mut out =
        BufWriter::with_capacity(PIECE, File::create(to).map_err(PublishError::local("create", to))?);
    let mut hasher = Hasher::new(name.hash.algorithm);
    let mut inflater = Inflater::new(Compression::Zlib, MAX_DATABASE);
    let mut piece = vec![0; PIECE];
    loop {
        let length = stored.read(&mut piece).map_err(|error| PublishError::damaged(name.path(), error))?;
        if length == 0 {
            break;
        }
        hasher.update(&piece[..length]);
        inflater
            .write(&piece[..length], &mut out)
            .map_err(|error| PublishError::damaged(name.path(), error))?;
    }
    require_hash(&name, hasher.finish())?;
    let size = inflater.finish().map_err(|error| PublishError::damaged(name.path(), error))?;
    out.flush().map_err(PublishError::local("write", to))?;
    Ok(size)
}

fn require_hash(name: &ObjectName, found: ContentHash) -> Result<(), PublishError> {
    if found == name.hash {
        return Ok(());
    }
    Err(PublishError::damaged(name.path(), "the stored bytes do not have the hash that is their name"))
}
