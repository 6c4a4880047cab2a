//! Spooled layers into one revision of the repository.

use std::collections::HashSet;
use std::io::{self, Read};

use cvmfs_publish::{IngestOptions, Prepared, PublishError, Publisher, Transaction};

use super::layout::Layout;
use super::members::Members;
use super::plan::Plan;
use super::unpacked::Unpacked;
use crate::failure::ConvertError;
use crate::progress::{LayerMeter, Progress};
use crate::published::Published;
use crate::spool::{Arrivals, SpooledLayer, Verified};

/// What was published.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stored {
    pub(crate) revision: u64,
    pub(crate) bytes_stored: u64,
}

/// Ingests an image's layers that are not there yet, and what the layout has beside them,
/// in one transaction. `published` opens the revision that it begins with.
pub(super) fn image(
    publisher: &mut Publisher,
    plan: &Plan,
    mut arrivals: Arrivals<'_>,
    published: impl FnOnce() -> Result<Published, ConvertError>,
    progress: &Progress,
) -> Result<Stored, ConvertError> {
    let mut ingest = Ingest::begin(publisher, progress)?;
    let mut verified = Verified::new();
    while let Some(mut layer) = arrivals.next()? {
        ingest.layer(&mut layer)?;
        verified.extend(layer.verified());
    }
    ingest.settle()?;
    if plan.layout == Layout::Unpacked {
        let mut unpacked = Unpacked::new(published()?)?;
        unpacked.write(plan, &mut ingest, &verified)?;
        unpacked.finish(&mut ingest)?;
    }
    ingest.commit()
}

/// Layers on their way into one revision.
pub(crate) struct Ingest<'a> {
    transaction: Transaction<'a>,
    progress: &'a Progress,
    /// The revision before.
    revision: u64,
    /// Directories that this transaction added, without those that it removed again.
    added: HashSet<String>,
    /// Whether it changed anything else.
    is_changed: bool,
    /// The layer that was read last: it goes into the catalogs when the next one was read.
    waiting: Option<Waiting>,
}

/// A layer that was read and is right.
struct Waiting {
    path: String,
    digest: String,
    prepared: Prepared,
}

impl<'a> Ingest<'a> {
    pub(crate) fn begin(publisher: &'a mut Publisher, progress: &'a Progress) -> Result<Self, ConvertError> {
        let revision = publisher.head().manifest.revision;
        Ok(Self {
            transaction: publisher.begin()?,
            progress,
            revision,
            added: HashSet::new(),
            is_changed: false,
            waiting: None,
        })
    }

    /// Ingests a layer unless it is there: another conversion may have published it since
    /// we looked. Returns whether it was new. A failure may also be that of the layer
    /// before; [`Ingest::settle`] tells whether there is none.
    pub(crate) fn layer(&mut self, layer: &mut SpooledLayer) -> Result<bool, ConvertError> {
        let path = layer.wanted.path.clone();
        if self.waiting.as_ref().is_some_and(|waiting| waiting.path == path)
            || self.transaction.exists(path.as_bytes())?
        {
            return Ok(false);
        }
        let digest = layer.wanted.blob.digest.to_string();
        let meter = self.progress.ingest(&layer.wanted.blob);
        let stream = layer.open().map_err(|cause| failed(&digest, PublishError::Input(cause)))?;
        let mut stream = Metered { stream, meter: &meter };
        let options = IngestOptions::of_layer();
        let read = self.transaction.read_tar(path.as_bytes(), &mut stream, &options);
        let prepared = read.map_err(|cause| failed(&digest, cause))?;
        // What the archive's reader left, so that the diff id is checked in any case.
        let rest = io::copy(&mut stream, &mut io::sink());
        rest.map_err(|cause| failed(&digest, PublishError::Input(cause)))?;
        layer.plain_bytes = Some(stream.stream.plain_bytes());
        for warning in &prepared.report().warnings {
            tracing::warn!(layer = digest, "{warning}");
        }
        meter.finish();
        self.settle()?;
        self.waiting = Some(Waiting { path, digest, prepared });
        Ok(true)
    }

    /// Puts the last layer into the catalogs.
    pub(crate) fn settle(&mut self) -> Result<(), ConvertError> {
        if let Some(Waiting { path, digest, prepared }) = self.waiting.take() {
            self.transaction.apply(prepared).map_err(|cause| failed(&digest, cause))?;
            self.added.insert(path);
        }
        Ok(())
    }

    /// Removes a directory, whether it is of this transaction or was there before. Returns
    /// whether it was there.
    pub(crate) fn remove(&mut self, path: &str) -> Result<bool, ConvertError> {
        if self.waiting.take_if(|waiting| waiting.path == path).is_some() {
            return Ok(true);
        }
        let is_there = self.transaction.exists(path.as_bytes())?;
        if is_there {
            self.transaction.delete(path.as_bytes())?;
            // What it brought itself leaves no change behind.
            self.is_changed |= !self.added.remove(path);
        }
        Ok(is_there)
    }

    /// Whether there is an entry, with the changes so far.
    pub(super) fn exists(&mut self, path: &str) -> Result<bool, ConvertError> {
        Ok(self.transaction.exists(path.as_bytes())?)
    }

    /// Adds small files and links below a directory.
    pub(super) fn members(&mut self, base: &str, members: &Members) -> Result<(), ConvertError> {
        if !members.is_empty() {
            let tar = members.to_tar()?;
            self.transaction.ingest_tar(base.as_bytes(), tar.as_slice(), &IngestOptions::default())?;
            self.is_changed = true;
        }
        Ok(())
    }

    /// Makes a tree of layers that are there.
    pub(super) fn stack(&mut self, base: &str, layers: &[String]) -> Result<(), ConvertError> {
        let layers: Vec<&[u8]> = layers.iter().map(String::as_bytes).collect();
        self.transaction.stack_layers(base.as_bytes(), &layers)?;
        self.is_changed = true;
        Ok(())
    }

    /// Whether it can be committed; see [`Transaction::is_sound`].
    pub(crate) fn is_sound(&self) -> bool {
        self.transaction.is_sound()
    }

    /// Ends it without publishing.
    pub(crate) fn unchanged(self) -> Stored {
        Stored { revision: self.revision, bytes_stored: 0 }
    }

    /// Publishes, unless nothing changed.
    pub(crate) fn commit(mut self) -> Result<Stored, ConvertError> {
        self.settle()?;
        if self.added.is_empty() && !self.is_changed {
            return Ok(self.unchanged());
        }
        let report = self.transaction.commit(None)?;
        self.progress.step(&format!("revision {} published", report.revision));
        Ok(Stored { revision: report.revision, bytes_stored: report.bytes_stored })
    }
}

fn failed(digest: &str, cause: PublishError) -> ConvertError {
    match cause {
        PublishError::Interrupted => ConvertError::Interrupted,
        cause => ConvertError::Ingest { digest: digest.to_owned(), cause },
    }
}

struct Metered<'a, R> {
    stream: R,
    meter: &'a LayerMeter,
}

impl<R: Read> Read for Metered<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.stream.read(buffer)?;
        self.meter.add(length as u64);
        Ok(length)
    }
}
