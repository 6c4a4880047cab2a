//! What the published revision has, looked up without the publisher's lock.
//!
//! A layer is published as a whole or not at all, so a directory at its path means that
//! the layer is there. The signatures are verified first: an answer from a forged
//! catalog would make us skip layers.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cvmfs_format::catalog::{Catalog, Entry, EntryKind};
use cvmfs_format::{Compression, ContentHash, Hasher, Inflater, ObjectKind, ObjectName, PathHash};
use cvmfs_publish::head::Head;
use cvmfs_publish::keys::KeyFiles;
use cvmfs_publish::storage::{self, Scratch, Storage};
use cvmfs_publish::{PublishError, system_clock};
use serde::de::DeserializeOwned;

use crate::failure::ConvertError;

/// Largest catalog that is unpacked, the publisher's own bound.
const MAX_CATALOG_BYTES: u64 = 4 << 30;
/// Catalogs nested in each other on the way to a layer.
const MAX_DEPTH: usize = 32;

/// A verified published revision.
pub(crate) struct Published {
    storage: Arc<dyn Storage>,
    head: Head,
    /// Where catalogs are unpacked.
    spool: PathBuf,
    scratch: Scratch,
    /// The root catalog and those below it that were needed, with the paths at which
    /// they are mounted.
    catalogs: Vec<(Vec<u8>, Catalog)>,
}

impl Published {
    /// Opens the current revision of `fqrn`; `spool` takes the unpacked catalogs.
    pub(crate) fn open(fqrn: &str, storage: &str, keys: &Path, spool: &Path) -> Result<Self, ConvertError> {
        let masters = KeyFiles::new(keys, fqrn).public()?;
        let storage = storage::open(storage).map_err(PublishError::from)?;
        let head = Head::load(&*storage, fqrn, &masters, system_clock())?;
        let scratch = Scratch::in_directory(spool)
            .map_err(|cause| ConvertError::Spool { directory: spool.to_owned(), cause })?;
        let mut published = Self { storage, head, spool: spool.to_owned(), scratch, catalogs: Vec::new() };
        let root = published.head.manifest.root_catalog;
        published.load(Vec::new(), root)?;
        Ok(published)
    }

    /// The number of the revision.
    pub(crate) fn revision(&self) -> u64 {
        self.head.manifest.revision
    }

    /// Whether there is a directory at an absolute path in normal form.
    pub(crate) fn has_directory(&mut self, path: &str) -> Result<bool, ConvertError> {
        Ok(self.lookup(path)?.is_some_and(|entry| entry.is_directory()))
    }

    /// Whether there is an entry at an absolute path in normal form.
    pub(crate) fn exists(&mut self, path: &str) -> Result<bool, ConvertError> {
        Ok(self.lookup(path)?.is_some())
    }

    /// The target of the symbolic link at a path, if there is one.
    pub(crate) fn symlink(&mut self, path: &str) -> Result<Option<String>, ConvertError> {
        let link = self.lookup(path)?.filter(|entry| entry.kind() == EntryKind::Symlink);
        Ok(link.and_then(|entry| String::from_utf8(entry.symlink).ok()))
    }

    /// The content of the file at a path, if there is one of at most `limit` bytes.
    pub(crate) fn file(&mut self, path: &str, limit: u64) -> Result<Option<Vec<u8>>, ConvertError> {
        let file = self.lookup(path)?.filter(|entry| entry.kind() == EntryKind::File && entry.size <= limit);
        let Some(file) = file else { return Ok(None) };
        let compression = file.flags.compression().unwrap_or(Compression::Zlib);
        let mut bytes = Vec::new();
        if file.is_chunked() {
            let (_, catalog) = self.deepest_for(path.as_bytes());
            let chunks = catalog.chunks_of(&file);
            for chunk in chunks.map_err(|error| damaged(path.as_bytes(), &error))? {
                let left = limit.saturating_sub(bytes.len() as u64);
                self.unpack(&ObjectName::new(chunk.hash, ObjectKind::Chunk), compression, left, &mut bytes)?;
            }
        } else {
            let Some(hash) = file.hash else { return Ok(None) };
            self.unpack(&ObjectName::new(hash, ObjectKind::File), compression, limit, &mut bytes)?;
        }
        Ok(Some(bytes))
    }

    /// The JSON document at a path; an empty one if there is none. `None` if what is there is something else, which is
    /// to be left alone then: others rely on it.
    pub(crate) fn document<T: DeserializeOwned + Default>(
        &mut self,
        path: &str,
        limit: u64,
    ) -> Result<Option<T>, ConvertError> {
        let bytes = self.file(path, limit)?;
        if bytes.is_none() && !self.exists(path)? {
            return Ok(Some(T::default()));
        }
        let document = bytes.as_deref().and_then(|bytes| serde_json::from_slice(bytes).ok());
        if document.is_none() {
            tracing::warn!(path, "is not what its name says, and is left as it is");
        }
        Ok(document)
    }

    fn lookup(&mut self, path: &str) -> Result<Option<Entry>, ConvertError> {
        let path = path.as_bytes();
        for _ in 0..MAX_DEPTH {
            let (mountpoint, catalog) = self.deepest_for(path);
            let nested = catalog.nested_for(path).map_err(|error| damaged(path, &error))?;
            match nested.filter(|nested| nested.path.len() > mountpoint.len() && nested.path != path) {
                Some(nested) => self.load(nested.path, nested.hash)?,
                None => {
                    return catalog.lookup(PathHash::of(path)).map_err(|error| damaged(path, &error));
                }
            }
        }
        Err(damaged(path, &"its catalogs are nested too deeply"))
    }

    fn deepest_for(&self, path: &[u8]) -> (&[u8], &Catalog) {
        let covers = |mountpoint: &[u8]| {
            path.strip_prefix(mountpoint)
                .is_some_and(|rest| mountpoint.is_empty() || rest.first() == Some(&b'/'))
        };
        let deepest =
            self.catalogs.iter().filter(|(mountpoint, _)| covers(mountpoint)).max_by_key(|(m, _)| m.len());
        let (mountpoint, catalog) = deepest.expect("the root catalog is always loaded and covers every path");
        (mountpoint, catalog)
    }

    fn load(&mut self, mountpoint: Vec<u8>, hash: ContentHash) -> Result<(), ConvertError> {
        let name = ObjectName::new(hash, ObjectKind::Catalog);
        let spool = |cause| ConvertError::Spool { directory: self.spool.clone(), cause };
        let path = self.scratch.file("catalog");
        let mut output = BufWriter::new(File::create(&path).map_err(spool)?);
        self.unpack(&name, Compression::Zlib, MAX_CATALOG_BYTES, &mut output)?;
        output.flush().map_err(spool)?;
        drop(output);
        let catalog = Catalog::open(&path).map_err(|error| damaged(name.path().as_bytes(), &error))?;
        // The catalog keeps the file open.
        std::fs::remove_file(&path).map_err(spool)?;
        self.catalogs.push((mountpoint, catalog));
        Ok(())
    }

    /// Unpacks an object, verifying its hash.
    fn unpack(
        &self,
        name: &ObjectName,
        compression: Compression,
        limit: u64,
        output: &mut impl Write,
    ) -> Result<(), ConvertError> {
        let object = name.path();
        let broken = |error: &dyn std::fmt::Display| damaged(object.as_bytes(), error);
        let mut stored = self.storage.open_object(name).map_err(PublishError::from)?;
        let mut hasher = Hasher::new(name.hash.algorithm);
        let mut inflater = Inflater::new(compression, limit);
        let mut piece = vec![0; 256 << 10];
        loop {
            let length = stored.read(&mut piece).map_err(|error| broken(&error))?;
            let Some(bytes) = piece.get(..length).filter(|bytes| !bytes.is_empty()) else { break };
            hasher.update(bytes);
            inflater.write(bytes, &mut *output).map_err(|error| broken(&error))?;
        }
        if hasher.finish() != name.hash {
            return Err(broken(&"the stored bytes do not have the hash that is their name"));
        }
        inflater.finish().map(drop).map_err(|error| broken(&error))
    }
}

fn damaged(object: &[u8], error: &dyn std::fmt::Display) -> ConvertError {
    let object = cvmfs_publish::error::shown(object);
    PublishError::Damaged { object, reason: error.to_string() }.into()
}
