//! From the bucket into the repository.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bucket::{LayerKey, LayerState};
use cvmfs_format::ContentHash;
use sha2::{Digest, Sha256};

use super::LayerServiceOptions;
use super::queue::{Outcome, Published, Queue, Told};
use crate::decompress::decompressed;
use crate::error::{PublishError, chain};
use crate::head::Head;
use crate::ingest::IngestOptions;
use crate::interrupt::Interrupt;
use crate::keys::KeyFiles;
use crate::path::RepositoryPath;
use crate::publisher::{OpenOptions, Publisher, Transaction};
use crate::storage;
use crate::workspace::{Workspace, joined};

/// How often the queue is looked at when nothing is to be watched.
const IDLE: Duration = Duration::from_secs(3600);
/// Layers are copied in pieces of this size.
const PIECE: usize = 256 << 10;

/// Publishes layers, and tells which are published.
#[derive(Debug)]
pub(super) struct Worker {
    options: LayerServiceOptions,
    base: RepositoryPath,
    queue: Arc<Queue>,
    interrupt: Interrupt,
    /// Catalogs of the revision that was looked at last.
    seen: Mutex<Option<(Published, Workspace)>>,
}

impl Worker {
    pub(super) fn new(
        options: LayerServiceOptions,
        base: RepositoryPath,
        queue: Arc<Queue>,
        interrupt: Interrupt,
    ) -> Worker {
        Worker { options, base, queue, interrupt, seen: Mutex::default() }
    }

    /// Whether everything is there that a publish needs.
    pub(super) fn check(&self) -> Result<(), PublishError> {
        drop(self.open()?);
        Ok(())
    }

    /// Publishes until the queue ends.
    pub(super) fn run(&self) {
        let mut looked = Instant::now();
        loop {
            let next_look = looked + self.options.watch.unwrap_or(IDLE);
            let Some(keys) = self.queue.take(next_look) else { return };
            if !keys.is_empty() {
                self.publish(keys);
            }
            if Instant::now() < next_look {
                continue;
            }
            looked = Instant::now();
            if self.options.watch.is_some() {
                let trouble = self.look_into_bucket().err().map(|error| error.full_message());
                if let Some(reason) = &trouble {
                    tracing::warn!(reason, "cannot look into the bucket");
                }
                self.queue.trouble(trouble);
            }
        }
    }

    /// Has all layers of the bucket published that are not in the repository.
    pub(super) fn look_into_bucket(&self) -> Result<(), PublishError> {
        let mut keys = Vec::new();
        let listed = self.options.bucket.list(&mut |key| keys.push(key));
        listed.map_err(|error| PublishError::Damaged {
            object: self.options.bucket.name().to_owned(),
            reason: chain(&error),
        })?;
        for key in keys {
            if !self.queue.knows(&key) && self.published(&key)?.is_none() {
                self.queue.add(key);
            }
        }
        Ok(())
    }

    /// What is to be told of a layer that the queue does not know: it may be in the repository since long ago, or
    /// have arrived in the bucket without notice.
    pub(super) fn look_for(&self, key: &LayerKey) -> Told {
        let unknown = |reason| Told { state: LayerState::Unknown { reason }, root_hash: None };
        match self.published(key) {
            Ok(Some(published)) => {
                self.queue.found(key.clone(), published);
            }
            Ok(None) => match self.options.bucket.size(key) {
                Ok(Some(_)) if self.queue.add(key.clone()) => {}
                Ok(Some(_)) => return unknown(Some("too many layers wait".to_owned())),
                Ok(None) => return unknown(None),
                Err(error) => return unknown(Some(chain(&error))),
            },
            Err(error) => return unknown(Some(error.full_message())),
        }
        self.queue.state(key).unwrap_or_else(|| unknown(None))
    }

    /// The revision in which a layer was found, if it is in the published one.
    fn published(&self, key: &LayerKey) -> Result<Option<Published>, PublishError> {
        let LayerServiceOptions { fqrn, storage, keys, .. } = &self.options;
        let storage = storage::open(storage)?;
        let masters = KeyFiles::new(keys, fqrn).public()?;
        let manifest = Head::load_ignoring_expiry(&*storage, fqrn, &masters)?.manifest;
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let root: ContentHash = manifest.root_catalog;
        let (published, mut workspace) = match seen.take() {
            Some((published, workspace)) if published.root_hash == root.to_string() => (published, workspace),
            _ => {
                let published = Published { revision: manifest.revision, root_hash: root.to_string() };
                (published, Workspace::open(storage, root)?)
            }
        };
        let found = workspace.lookup(&self.directory(key))?.is_some_and(|entry| entry.is_directory());
        *seen = Some((published.clone(), workspace));
        Ok(found.then_some(published))
    }

    fn open(&self) -> Result<Publisher, PublishError> {
        let LayerServiceOptions { fqrn, storage, keys, lock_wait, clock, .. } = &self.options;
        let options = OpenOptions {
            lock_wait: *lock_wait,
            interrupt: self.interrupt.clone(),
            clock: *clock,
            ..OpenOptions::default()
        };
        Publisher::open_with(fqrn, storage, keys, options)
    }

    fn directory(&self, key: &LayerKey) -> Vec<u8> {
        joined(self.base.as_bytes(), key.as_str().as_bytes())
    }

    /// Publishes layers as one revision. Those that cannot be are left out of it.
    fn publish(&self, mut pending: Vec<LayerKey>) {
        let published = self.try_publish(&mut pending);
        if let Err(error) = &published {
            tracing::warn!(error = error.full_message(), "nothing published");
        }
        for key in &pending {
            self.queue.ended(
                key,
                match &published {
                    Ok(published) => Outcome::Published(published.clone()),
                    Err(error) => Outcome::Failed(error.full_message()),
                },
            );
        }
    }

    /// Publishes `pending`; what could not be published for reasons of its own is taken out of it.
    fn try_publish(&self, pending: &mut Vec<LayerKey>) -> Result<Published, PublishError> {
        let mut publisher = self.open()?;
        let mut missing = Vec::new();
        for key in pending.iter() {
            if !publisher.exists(&self.directory(key))? {
                missing.push(key.clone());
            }
        }
        if !missing.is_empty() {
            let mut transaction = publisher.begin()?;
            let mut any = false;
            for key in missing {
                // One at a time: the copies need room on the disk.
                let outcome = match self.fetch(&key) {
                    Ok(file) => match self.ingest(&mut transaction, &key, file) {
                        Ok(bytes) => {
                            any = true;
                            self.queue.count(|counts| counts.bytes += bytes);
                            continue;
                        }
                        Err(error) if is_about_the_layer(&error) => Outcome::Refused(error.full_message()),
                        Err(error) => return Err(error),
                    },
                    Err(outcome) => outcome,
                };
                self.queue.ended(&key, outcome);
                pending.retain(|other| *other != key);
            }
            if any {
                transaction.commit(None)?;
            }
        }
        let manifest = &publisher.head().manifest;
        Ok(Published { revision: manifest.revision, root_hash: manifest.root_catalog.to_string() })
    }

    /// A verified copy of a layer in a file without a name. Content that is not what the name says is fetched again: only
    /// if it stays the same is the layer to blame, and not the way here.
    fn fetch(&self, key: &LayerKey) -> Result<File, Outcome> {
        let (file, found) = self.copy(key)?;
        if found == *key {
            return Ok(file);
        }
        let (file, again) = self.copy(key)?;
        if again == *key {
            return Ok(file);
        }
        let reason = format!("the content is not what the name says: its SHA-256 is {again}");
        Err(if again == found { Outcome::Refused(reason) } else { Outcome::Failed(reason) })
    }

    /// A copy of a layer, and how it should be called.
    fn copy(&self, key: &LayerKey) -> Result<(File, LayerKey), Outcome> {
        let mut body = self.options.bucket.read(key).map_err(|error| {
            let reason = chain(&error);
            if error.is_missing { Outcome::Refused(reason) } else { Outcome::Failed(reason) }
        })?;
        let failed = |error: io::Error| Outcome::Failed(format!("cannot copy the layer: {}", chain(&error)));
        let mut file = tempfile::tempfile().map_err(failed)?;
        let (mut digest, mut size, mut piece) = (Sha256::new(), 0_u64, vec![0; PIECE]);
        loop {
            self.interrupt.check().map_err(|error| Outcome::Failed(error.to_string()))?;
            let length = body.read(&mut piece).map_err(failed)?;
            if length == 0 {
                break;
            }
            size += length as u64;
            if size > self.options.max_layer {
                let most = self.options.max_layer;
                return Err(Outcome::Refused(format!("the layer is larger than {most} bytes (--max-layer)")));
            }
            let piece = piece.get(..length).unwrap_or_default();
            digest.update(piece);
            file.write_all(piece).map_err(failed)?;
        }
        file.rewind().map_err(failed)?;
        Ok((file, LayerKey::of_sha256(&digest.finalize().into())))
    }

    /// Bytes of the layer as it lies in the bucket.
    fn ingest(
        &self,
        transaction: &mut Transaction<'_>,
        key: &LayerKey,
        file: File,
    ) -> Result<u64, PublishError> {
        let size = file.metadata().map_err(PublishError::Input)?.len();
        let plain = decompressed(file).map_err(PublishError::Input)?;
        let report = transaction.ingest_tar(&self.directory(key), plain, &IngestOptions::of_layer())?;
        for warning in &report.warnings {
            tracing::warn!(layer = %key, "{warning}");
        }
        Ok(size)
    }
}

/// Whether an archive is at fault, and not the storage.
fn is_about_the_layer(error: &PublishError) -> bool {
    matches!(error, PublishError::Tar(_) | PublishError::Entry { .. } | PublishError::Input(_))
}
