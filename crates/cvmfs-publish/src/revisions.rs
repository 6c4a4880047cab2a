//! Tags, rollback, renewing signatures: changes to a repository that add no content.
//!
//! Publisher behaviour §9 and §12, errata 4.

use std::path::Path;
use std::time::Duration;

use cvmfs_format::catalog::{Catalog, CatalogWriter, Counts};
use cvmfs_format::history::{History, HistoryError, TRUNK_PREVIOUS, Tag};
use cvmfs_format::manifest::Manifest;
use cvmfs_format::signature::MasterKeys;
use cvmfs_format::{ContentHash, ObjectKind, ObjectName};
use serde::Serialize;

use crate::check::{CheckOptions, require_complete};
use crate::commit::{Signer, check_tag_name};
use crate::create::write_whitelist;
use crate::error::PublishError;
use crate::head::{Head, unpack_database};
use crate::interrupt::Interrupt;
use crate::keys::KeyFiles;
use crate::pipeline::Counters;
use crate::publisher::{Clock, Publisher};
use crate::settings::Settings;
use crate::storage::{self, Scratch, Storage};
use crate::workspace::{chain, in_catalog};

const DAY: i64 = 24 * 3600;

impl Publisher {
    /// Names the current revision.
    pub fn add_tag(&mut self, name: &str, description: &str) -> Result<(), PublishError> {
        check_tag_name(name)?;
        let manifest = self.head.manifest.clone();
        if let Some(there) = tags(&*self.storage, &manifest)?.iter().find(|tag| tag.name == name) {
            let revision = there.revision;
            return Err(PublishError::Usage(format!(
                "tag {name} exists already (revision {revision}): remove it first"
            )));
        }
        let now = (self.options.clock)();
        let tag = Tag {
            name: name.to_owned(),
            root_catalog: manifest.root_catalog,
            root_catalog_size: manifest.root_catalog_size,
            revision: manifest.revision,
            timestamp: now,
            description: description.to_owned(),
            branch: String::new(),
        };
        self.sign(manifest, now, |history| history.insert(&tag))
    }

    /// Removes a name. What only it kept goes with the next garbage collection.
    pub fn remove_tag(&mut self, name: &str) -> Result<(), PublishError> {
        check_tag_name(name)?;
        let tags = tags(&*self.storage, &self.head.manifest)?;
        if !tags.iter().any(|tag| tag.name == name) {
            return Err(PublishError::NotFound(format!("there is no tag {name} in {}", self.fqrn)));
        }
        let now = (self.options.clock)();
        self.sign(self.head.manifest.clone(), now, |history| history.remove(name))
    }

    /// Changes what a tag is said to stand for.
    pub fn annotate_tag(&mut self, name: &str, description: &str) -> Result<(), PublishError> {
        check_tag_name(name)?;
        let tags = tags(&*self.storage, &self.head.manifest)?;
        let Some(tag) = tags.into_iter().find(|tag| tag.name == name) else {
            return Err(PublishError::NotFound(format!("there is no tag {name} in {}", self.fqrn)));
        };
        let now = (self.options.clock)();
        let tag = Tag { description: description.to_owned(), ..tag };
        self.sign(self.head.manifest.clone(), now, |history| history.replace(&tag))
    }

    /// Publishes the tagged revision anew, as the next one; the default is what the last publish replaced. Newer tags
    /// are removed, and there is no `trunk-previous` until the next publish.
    pub fn rollback(&mut self, tag: Option<&str>) -> Result<(), PublishError> {
        let name = tag.unwrap_or(TRUNK_PREVIOUS);
        let current = self.head.manifest.clone();
        let known = tags(&*self.storage, &current)?;
        let target = known.into_iter().find(|tag| tag.name == name).ok_or_else(|| {
            PublishError::NotFound(format!(
                "there is no tag {name} in {}: see `cvmfs-publish tag list`",
                self.fqrn
            ))
        })?;
        if !target.branch.is_empty() {
            return Err(PublishError::Usage(format!("tag {name} is on the branch {}", target.branch)));
        }
        if target.root_catalog == current.root_catalog {
            return Err(PublishError::Usage(format!("tag {name} is the current revision")));
        }
        // what was collected meanwhile, or got lost, would be missed by every client
        let complete = CheckOptions {
            since: Some(current.root_catalog),
            contents: false,
            ..CheckOptions::new(&self.fqrn, self.storage.clone(), self.masters.clone())
        };
        require_complete(&complete, &target)?;
        let now = (self.options.clock)();
        let revision = current.revision + 1;
        let scratch = self.storage.scratch()?;
        let file = scratch.file("root");
        unpack_database(&*self.storage, ObjectName::new(target.root_catalog, ObjectKind::Catalog), &file)?;
        let writer = CatalogWriter::open(&file).map_err(in_catalog(b""))?;
        let unix = u64::try_from(now).unwrap_or(0);
        // the predecessor is the replaced revision: garbage collection walks along it (publisher behaviour §19)
        writer
            .finish(revision, Some(current.root_catalog), Some(current.ttl), unix)
            .map_err(in_catalog(b""))?;
        let (root, size) = Signer::of(self).store_file(ObjectKind::Catalog, &file)?;
        let manifest = Manifest { root_catalog: root.hash, root_catalog_size: size, revision, ..current };
        self.sign(manifest, now, |history| history.rollback(name, root.hash, size, revision, now))
    }

    fn sign(
        &mut self,
        manifest: Manifest,
        now: i64,
        change: impl FnOnce(&mut History) -> Result<(), HistoryError>,
    ) -> Result<(), PublishError> {
        // it may have run out since the publisher was opened: clients would refuse what is signed now
        self.head.require_valid_whitelist(&self.fqrn, now)?;
        let scratch = self.storage.scratch()?;
        self.head.manifest = Signer::of(self).publish(manifest, now, &scratch, change)?;
        self.forget_lookups();
        Ok(())
    }
}

/// All tags of a revision's history, the newest first.
pub fn tags(storage: &dyn Storage, manifest: &Manifest) -> Result<Vec<Tag>, PublishError> {
    let Some(hash) = manifest.history else { return Ok(Vec::new()) };
    let scratch = Scratch::in_temporary_directory()?;
    let file = scratch.file("history");
    unpack_database(storage, ObjectName::new(hash, ObjectKind::History), &file)?;
    let read = || History::open(&file)?.tags();
    read().map_err(|error| PublishError::damaged("history", chain(&error)))
}

/// Unix time from which the whitelist is invalid; `None` if there is none that the keys in `keys` accept.
pub fn whitelist_expiry(fqrn: &str, storage: &str, keys: &Path) -> Result<Option<i64>, PublishError> {
    let masters = KeyFiles::new(keys, fqrn).public()?;
    let storage = storage::open(storage)?;
    match Head::load_ignoring_expiry(&*storage, fqrn, &masters) {
        Ok(head) => Ok(Some(head.whitelist.expires_unix())),
        Err(error @ PublishError::Storage(_)) => Err(error),
        Err(_) => Ok(None),
    }
}

/// Writes a new whitelist, valid for `days`, for the certificate in the keys directory. If that is another one than
/// signed the manifest, the manifest is signed anew as well. Returns the Unix time of the new expiry.
pub fn resign(
    fqrn: &str,
    storage: &str,
    keys: &Path,
    days: u32,
    lock_wait: Duration,
    clock: Clock,
) -> Result<i64, PublishError> {
    let files = KeyFiles::new(keys, fqrn);
    let storage = storage::open(storage)?;
    let keys = files.release()?;
    files.master()?;
    let masters = files.public()?;
    let _lock = storage.lock(lock_wait)?;
    let now = clock();
    // an expired or lost whitelist is what this command is for; the manifest must be ours all the same
    let manifest = match Head::load_ignoring_expiry(&*storage, fqrn, &masters) {
        Ok(head) => head.manifest,
        Err(reason) => Head::manifest_signed_by(&*storage, fqrn, &keys.certificate).map_err(|_| reason)?,
    };
    let algorithm = manifest.root_catalog.algorithm;
    let expires = now + i64::from(days) * DAY;
    let expires = write_whitelist(&*storage, &files, &keys, algorithm, now, expires)?;
    let signer = Signer {
        fqrn,
        storage: &storage,
        keys: &keys,
        algorithm,
        deflate: Settings::foreign().deflate,
        alternative_paths: manifest.alternative_paths,
        counters: &Counters::default(),
        interrupt: &Interrupt::default(),
    };
    if Head::manifest_signed_by(&*storage, fqrn, &keys.certificate).is_err() {
        let scratch = storage.scratch()?;
        signer.publish(manifest, now, &scratch, |_| Ok(()))?;
    }
    Ok(expires)
}

/// What a repository is and has: the document of `info --json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Info {
    /// Repository name.
    pub fqrn: String,
    /// Number of the current revision.
    pub revision: u64,
    /// Hash of its root catalog.
    pub root_hash: String,
    /// Unix time at which it was signed.
    pub published: u64,
    /// Seconds for which clients may rely on it.
    pub ttl: u32,
    /// Hash algorithm of new objects.
    pub hash: &'static str,
    /// Compression of new file contents.
    pub compression: &'static str,
    /// Deflate implementation of new objects.
    pub deflate: &'static str,
    /// Whether garbage may be collected.
    pub garbage_collectable: bool,
    /// Unix time from which the whitelist is invalid.
    pub whitelist_expires: i64,
    /// Whether it is valid now.
    pub whitelist_valid: bool,
    /// Entries of the current revision.
    pub entries: i64,
    /// Catalogs of the current revision.
    pub catalogs: i64,
    /// Plain bytes of its files.
    pub file_bytes: i64,
    /// Tags, the newest first.
    pub tags: Vec<TagInfo>,
}

/// A tag as `info` and `tag list` show it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TagInfo {
    /// Name.
    pub name: String,
    /// Revision it names.
    pub revision: u64,
    /// Hash of that revision's root catalog.
    pub root_hash: String,
    /// Unix time of tagging.
    pub timestamp: i64,
    /// Free text.
    pub description: String,
}

impl From<Tag> for TagInfo {
    fn from(tag: Tag) -> TagInfo {
        TagInfo {
            name: tag.name,
            revision: tag.revision,
            root_hash: tag.root_catalog.to_string(),
            timestamp: tag.timestamp,
            description: tag.description,
        }
    }
}

/// Describes the published state; an expired whitelist is told, not refused.
pub fn info(fqrn: &str, storage: &dyn Storage, masters: &MasterKeys, now: i64) -> Result<Info, PublishError> {
    let head = Head::load_ignoring_expiry(storage, fqrn, masters)?;
    let manifest = &head.manifest;
    let settings =
        head.metainfo(storage)?.map_or_else(Settings::foreign, |text| Settings::from_metainfo(&text));
    let totals = totals(storage, manifest.root_catalog)?;
    Ok(Info {
        fqrn: fqrn.to_owned(),
        revision: manifest.revision,
        root_hash: manifest.root_catalog.to_string(),
        published: manifest.timestamp,
        ttl: manifest.ttl,
        hash: manifest.root_catalog.algorithm.name(),
        compression: settings.compression.name(),
        deflate: settings.deflate.name(),
        garbage_collectable: manifest.garbage_collectable,
        whitelist_expires: head.whitelist.expires_unix(),
        whitelist_valid: !head.whitelist.is_expired(now),
        // the mountpoint of a nested catalog is counted in two catalogs
        entries: totals.entries() - totals.nested,
        catalogs: totals.nested + 1,
        file_bytes: totals.file_size,
        tags: tags(storage, manifest)?.into_iter().map(TagInfo::from).collect(),
    })
}

fn totals(storage: &dyn Storage, root: ContentHash) -> Result<Counts, PublishError> {
    let scratch = Scratch::in_temporary_directory()?;
    let file = scratch.file("root");
    unpack_database(storage, ObjectName::new(root, ObjectKind::Catalog), &file)?;
    let read = || Ok(Catalog::open(&file)?.counters()?.total());
    read().map_err(in_catalog(b""))
}
