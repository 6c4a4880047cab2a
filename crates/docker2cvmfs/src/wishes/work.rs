//! Converting many images at once into one publisher.
//!
//! Some threads fetch and verify layers, image by image. This thread publishes whatever is
//! complete by then in one transaction, while the others go on. Further threads push the
//! thin images of what was published and keep the records. An image that fails at any step
//! is reported and leaves the others alone.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};

use cvmfs_publish::Publisher;

use super::claims::{Claims, Reservation, SharedLayer, Turn};
use super::records::{ImageRecord, LayerRecord, OutputRecord};
use super::report::{ImageOutcome, ImageState, RoundReport};
use super::round::{Round, Work, outcome};
use crate::convert::{Ingest, Layout, Stored, Unpacked};
use crate::failure::ConvertError;
use crate::spool::{self, Verified};

/// An image whose layers are all here.
struct Fetched<'a> {
    work: Work,
    layers: Vec<SharedLayer>,
    bytes_downloaded: u64,
    _room: Reservation<'a>,
}

/// An image whose layers are all in the repository.
struct Stocked {
    work: Work,
    revision: u64,
    bytes_downloaded: u64,
}

/// What became of a batch.
enum Ingested<'a> {
    /// These are in the repository.
    All(Vec<Fetched<'a>>, Stored),
    /// One spoilt the transaction; these are still to be ingested.
    Again(Vec<Fetched<'a>>),
}

struct Workshop<'a> {
    round: &'a Round<'a>,
    claims: Claims,
    waiting: Mutex<VecDeque<Work>>,
    outcomes: Mutex<Vec<ImageOutcome>>,
}

/// Converts images; their outcomes go to the report.
pub(super) fn convert(
    round: &Round<'_>,
    work: Vec<Work>,
    report: &mut RoundReport,
) -> Result<(), ConvertError> {
    if work.is_empty() {
        return Ok(());
    }
    let workers = round.request.parallel.clamp(1, work.len());
    let workshop = Workshop {
        round,
        claims: Claims::default(),
        waiting: Mutex::new(work.into()),
        outcomes: Mutex::default(),
    };
    let (to_publish, fetched) = channel();
    let (to_finish, stocked) = channel();
    let stocked = Mutex::new(stocked);
    let workshop = &workshop;
    std::thread::scope(|scope| {
        for _ in 0..workers {
            let to_publish = to_publish.clone();
            scope.spawn(move || workshop.fetch_all(&to_publish));
            let stocked = &stocked;
            scope.spawn(move || workshop.finish_all(stocked));
        }
        // The publisher ends when the last of the threads that fetch has ended.
        drop(to_publish);
        workshop.publish_all(&fetched, &to_finish, report);
        drop(to_finish);
    });
    let outcomes = std::mem::take(&mut *lock(&workshop.outcomes));
    outcomes.into_iter().for_each(|outcome| report.add(outcome));
    Ok(round.interrupt.check()?)
}

impl<'a> Workshop<'a> {
    fn fetch_all(&'a self, to_publish: &Sender<Fetched<'a>>) {
        while let Some(work) = self.next() {
            let described = outcome(&work, ImageState::Failed);
            let top_digest = work.plan.resolved.top_digest.to_string();
            match self.fetch(work) {
                Ok(fetched) => {
                    // The publisher outlives this thread.
                    let _ = to_publish.send(fetched);
                }
                Err(error) => self.failed_itself(described, &top_digest, &error),
            }
        }
    }

    fn next(&self) -> Option<Work> {
        if self.round.interrupt.check().is_err() {
            return None;
        }
        lock(&self.waiting).pop_front()
    }

    fn fetch(&'a self, work: Work) -> Result<Fetched<'a>, ConvertError> {
        if let Some(output) = work.image.destination() {
            output.prepare(self.round.target)?;
        }
        let missing = work.plan.missing();
        let bytes = missing.iter().map(|layer| layer.blob.size).sum();
        let room = self.claims.reserve(bytes, self.round.request.spool_limit);
        let (mut layers, mut bytes_downloaded) = (Vec::new(), 0);
        let (mut own, others) = self.claims.claim(missing);
        let mut others: VecDeque<_> = others.into();
        loop {
            bytes_downloaded += own.iter().map(|layer| layer.blob.size).sum::<u64>();
            let source = &work.plan.resolved.source;
            match spool::download(source, own.clone(), &self.round.spool(), self.round.progress) {
                Ok(spooled) => layers.extend(spooled.into_iter().map(|layer| self.claims.fetched(layer))),
                Err(error) => {
                    self.claims.failed(&own);
                    return Err(error);
                }
            }
            own.clear();
            while let Some(layer) = others.pop_front() {
                match self.claims.wait_for(&layer) {
                    Turn::Here(shared) => layers.push(shared),
                    Turn::Published => {}
                    Turn::Yours => {
                        own.push(layer);
                        break;
                    }
                }
            }
            if own.is_empty() {
                return Ok(Fetched { work, layers, bytes_downloaded, _room: room });
            }
        }
    }

    fn publish_all(
        &self,
        fetched: &Receiver<Fetched<'a>>,
        to_finish: &Sender<Stocked>,
        report: &mut RoundReport,
    ) {
        while let Ok(first) = fetched.recv() {
            let mut batch = vec![first];
            batch.extend(fetched.try_iter());
            let described: Vec<_> =
                batch.iter().map(|image| outcome(&image.work, ImageState::Failed)).collect();
            match self.publish(batch, report) {
                Ok(stocked) => stocked.into_iter().for_each(|image| drop(to_finish.send(image))),
                Err(error) => described.into_iter().for_each(|image| self.failed(image, &error)),
            }
        }
    }

    /// One revision with all that is here. An image that cannot be ingested is taken out.
    fn publish(
        &self,
        batch: Vec<Fetched<'a>>,
        report: &mut RoundReport,
    ) -> Result<Vec<Stocked>, ConvertError> {
        let mut stored = Stored { revision: report.revision, bytes_stored: 0 };
        let mut good = batch;
        if !good.iter().all(|image| image.work.plan.is_published()) {
            let mut publisher = self.round.publisher()?;
            loop {
                match self.ingest_all(&mut publisher, good)? {
                    Ingested::All(images, new) => {
                        (good, stored) = (images, new);
                        break;
                    }
                    // What one of them left in the transaction cannot be taken back: the others again.
                    Ingested::Again(images) => good = images,
                }
            }
        }
        report.revision = stored.revision;
        report.bytes_stored += stored.bytes_stored;
        let stock = |image: Fetched<'a>| {
            report.bytes_downloaded += image.bytes_downloaded;
            let paths: Vec<String> = image.work.plan.layers().map(|layer| layer.path()).collect();
            self.claims.published(paths.iter().map(String::as_str));
            Stocked { work: image.work, revision: stored.revision, bytes_downloaded: image.bytes_downloaded }
        };
        Ok(good.into_iter().map(stock).collect())
    }

    /// Ingests what can be, and commits it.
    fn ingest_all(
        &self,
        publisher: &mut Publisher,
        batch: Vec<Fetched<'a>>,
    ) -> Result<Ingested<'a>, ConvertError> {
        let mut unpacked = None;
        let mut ingest = Ingest::begin(publisher, self.round.progress)?;
        let mut good = Vec::with_capacity(batch.len());
        let mut rest = batch.into_iter();
        while let Some(image) = rest.next() {
            let mut brought = Vec::new();
            let mut result = bring_layers(&mut ingest, &image.layers, &mut brought);
            if result.is_ok() && image.work.plan.layout == Layout::Unpacked {
                if unpacked.is_none() {
                    // What the repository has now, under the lock.
                    unpacked = Some(Unpacked::new(self.round.published()?)?);
                }
                if let Some(unpacked) = &mut unpacked {
                    result = unpacked.write(&image.work.plan, &mut ingest, &verified(&image.layers));
                }
            }
            // All of an image's layers, or none of those that it brought; if it is not sound, all of the transaction goes.
            if result.is_err() && ingest.is_sound() {
                for path in &brought {
                    ingest.remove(path)?;
                }
            }
            match result {
                Ok(()) => good.push(image),
                Err(error) if error.is_interruption() => return Err(ConvertError::Interrupted),
                Err(error) => {
                    let described = outcome(&image.work, ImageState::Failed);
                    let top_digest = image.work.plan.resolved.top_digest.to_string();
                    self.failed_itself(described, &top_digest, &error);
                    if !ingest.is_sound() {
                        good.extend(rest);
                        return Ok(Ingested::Again(good));
                    }
                }
            }
        }
        if let Some(unpacked) = &unpacked {
            unpacked.finish(&mut ingest)?;
        }
        // Nobody gains a revision without an image.
        let stored = if good.is_empty() { ingest.unchanged() } else { ingest.commit()? };
        Ok(Ingested::All(good, stored))
    }

    fn finish_all(&self, stocked: &Mutex<Receiver<Stocked>>) {
        loop {
            let next = lock(stocked).recv();
            let Ok(image) = next else { return };
            match self.finish(&image) {
                Ok(()) => {
                    tracing::info!(image = %image.work.image.reference, revision = image.revision, "converted");
                    lock(&self.outcomes).push(outcome(&image.work, ImageState::Converted));
                }
                Err(error) => {
                    let error =
                        ConvertError::ThinImageMissing { revision: image.revision, cause: Box::new(error) };
                    self.failed(outcome(&image.work, ImageState::Failed), &error);
                }
            }
        }
    }

    /// The thin image, then the record: without a record the next round does this again.
    fn finish(&self, image: &Stocked) -> Result<(), ConvertError> {
        let Work { image: wished, plan } = &image.work;
        let output = match wished.destination() {
            None => None,
            Some(output) => {
                let written = output.write(self.round.target, &plan.thin_set(None)?)?;
                Some(OutputRecord { reference: written.place, digest: written.digest.to_string() })
            }
        };
        let layer = |layer: &&crate::convert::PlannedLayer| LayerRecord {
            path: layer.path(),
            bytes: layer.blob.size,
        };
        let now = cvmfs_publish::system_clock();
        let record = ImageRecord {
            image: wished.reference.to_string(),
            digest: plan.resolved.digest.to_string(),
            top_digest: plan.resolved.top_digest.to_string(),
            platform: self.round.request.platform.to_string(),
            layout: self.round.request.layout.to_string(),
            layers: plan.distinct_layers().iter().map(layer).collect(),
            others: plan.other_paths(),
            output,
            revision: image.revision,
            converted: now,
            bytes_downloaded: image.bytes_downloaded,
        };
        self.round.records.keep(&record, now)
    }

    /// An image failed, and no other is the cause. What is at fault itself is not fetched again in each round.
    fn failed_itself(&self, described: ImageOutcome, top_digest: &str, error: &ConvertError) {
        if error.is_of_the_image() {
            let (image, now) = (&described.image, cvmfs_publish::system_clock());
            let noted = self.round.records.note_unfit(image, top_digest, &error.full_message(), now);
            if let Err(error) = noted {
                tracing::warn!(
                    image,
                    error = error.full_message(),
                    "will be fetched again in the next round"
                );
            }
        }
        self.failed(described, error);
    }

    fn failed(&self, described: ImageOutcome, error: &ConvertError) {
        let error = error.full_message();
        if self.round.interrupt.check().is_ok() {
            tracing::error!(image = described.image, error, "an image cannot be converted");
        }
        lock(&self.outcomes).push(ImageOutcome { error: Some(error), ..described });
    }
}

fn verified(layers: &[SharedLayer]) -> Verified {
    layers.iter().filter_map(|layer| lock(layer).verified()).collect()
}

/// Ingests the layers of an image and notes which it brought.
fn bring_layers(
    ingest: &mut Ingest<'_>,
    layers: &[SharedLayer],
    brought: &mut Vec<String>,
) -> Result<(), ConvertError> {
    for layer in layers {
        let mut layer = lock(layer);
        if ingest.layer(&mut layer)? {
            brought.push(layer.wanted.path.clone());
        }
    }
    ingest.settle()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
