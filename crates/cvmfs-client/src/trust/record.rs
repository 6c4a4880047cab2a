//! What the cache directory remembers of a repository's revisions.
//!
//! Two small files, each replaced by rename: the *breadcrumb* `cvmfschecksum.FQRN` in the form of the C++ client
//! (repository format §6.5), and beside it `cvmfsmanifest.FQRN`, the last manifest that was verified. The first
//! guards against replay and names the last good root catalog; the second leads to the history of tags without a
//! server.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use cvmfs_format::letter::MAX_LETTER;
use cvmfs_format::manifest::{Breadcrumb, MAX_BREADCRUMB, Manifest};

use crate::store::ObjectStore;

/// The newest revision of `fqrn` that was ever accepted with this cache directory.
pub fn last_accepted(store: &ObjectStore, fqrn: &str) -> Option<Breadcrumb> {
    Breadcrumb::parse(&read(&breadcrumb_path(store, fqrn), MAX_BREADCRUMB)?)
}

/// The last manifest of `fqrn` that was verified with this cache directory.
pub(super) fn last_manifest(store: &ObjectStore, fqrn: &str) -> Option<Manifest> {
    let manifest = Manifest::parse(&read(&manifest_path(store, fqrn), MAX_LETTER)?).ok()?;
    manifest.require_fqrn(fqrn).ok()?;
    Some(manifest)
}

/// The newest revision of `fqrn` that was ever verified, whether it was used or only its tags.
pub(super) fn highest_seen(store: &ObjectStore, fqrn: &str) -> Option<Breadcrumb> {
    let looked_at = last_manifest(store, fqrn).map(|manifest| manifest.breadcrumb());
    let known = [last_accepted(store, fqrn), looked_at];
    known.into_iter().flatten().max_by_key(|known| (known.revision, known.timestamp))
}

pub(super) fn breadcrumb_path(store: &ObjectStore, fqrn: &str) -> PathBuf {
    store.cache().directory().join(format!("cvmfschecksum.{fqrn}"))
}

fn manifest_path(store: &ObjectStore, fqrn: &str) -> PathBuf {
    store.cache().directory().join(format!("cvmfsmanifest.{fqrn}"))
}

/// Remembers `manifest` as the last good one.
pub(super) fn remember_revision(store: &ObjectStore, manifest: &Manifest) {
    let path = breadcrumb_path(store, &manifest.fqrn);
    write(store, &path, manifest.breadcrumb().to_text().as_bytes());
}

/// Keeps the text of a verified manifest.
pub(super) fn remember_manifest(store: &ObjectStore, fqrn: &str, text: &[u8]) {
    let path = manifest_path(store, fqrn);
    if read(&path, MAX_LETTER).as_deref() != Some(text) {
        write(store, &path, text);
    }
}

fn read(path: &Path, most: usize) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(most as u64).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// Writes to a temporary file, then renames. It is flushed in the background, since it must survive a power cut,
/// but nobody should wait for a slow disk.
fn write(store: &ObjectStore, path: &Path, content: &[u8]) {
    let write = || -> io::Result<()> {
        let directory = store.cache().directory();
        let mut file = tempfile::Builder::new().prefix(".cvmfsrecord.").tempfile_in(directory)?;
        file.write_all(content)?;
        let file = file.persist(path).map_err(|error| error.error)?;
        let flush = move || file.sync_data();
        std::thread::Builder::new().name("cvmfs-flush".to_owned()).spawn(flush).map(drop)
    };
    if let Err(error) = write() {
        tracing::warn!(path = %path.display(), %error, "cannot remember the accepted revision");
    }
}
