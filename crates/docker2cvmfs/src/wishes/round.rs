//! One round: what is wished for against what is there.
//!
//! 1. The list is read and its wildcards resolved.
//! 2. Each image is looked at, several at a time: one question shows whether its digest,
//!    and that of its thin image, are those of the record.
//! 3. Images that differ are planned and held against the published revision.
//! 4. Their layers are fetched and published (`work`).
//! 5. What left the list is retired, and removed when its grace is over (`retire`).

use std::time::Instant;

use cvmfs_publish::Interrupt;
use registry::{Client, ImageSource, Reference, RegistryError, Source};

use super::expand::{WishedImage, expand};
use super::notice::Notice;
use super::parallel::in_parallel;
use super::recipe::Recipe;
use super::records::{ImageRecord, Records};
use super::report::{ImageOutcome, ImageState, RoundReport};
use super::{LoopRequest, retire, work};
use crate::convert::{Output, Plan, resolve};
use crate::failure::ConvertError;
use crate::policy::Policy;
use crate::progress::Progress;
use crate::published::Published;
use crate::spool;

/// Questions to registries at the same time. They are small; registries see as many from
/// one engine that pulls a few images.
const QUESTIONS: usize = 16;

/// What a round works with.
#[derive(Debug)]
pub(super) struct Round<'a> {
    pub(super) request: &'a LoopRequest,
    pub(super) recipe: &'a Recipe,
    pub(super) policy: Option<&'a Policy>,
    pub(super) records: &'a Records,
    /// The sources' registries.
    pub(super) source: &'a Client,
    /// The registries of thin images.
    pub(super) target: &'a Client,
    pub(super) interrupt: &'a Interrupt,
    pub(super) progress: &'a Progress,
}

/// An image that is not as it should be.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) image: WishedImage,
    pub(super) plan: Plan,
}

enum Look {
    /// The digests are those of the record.
    Same(Box<ImageRecord>),
    Differs(Box<Plan>),
}

impl Round<'_> {
    /// Does a round. With `notices` only the images that these concern are looked at, and
    /// nothing is retired.
    ///
    /// # Errors
    /// What keeps the round from ending: the repository, the records, or an interruption.
    /// What fails for single images is in the report.
    pub(super) fn run(&self, notices: Option<&[Notice]>) -> Result<RoundReport, ConvertError> {
        let started = Instant::now();
        let mut report = RoundReport {
            fqrn: self.recipe.fqrn.clone(),
            started: super::rfc3339(cvmfs_publish::system_clock()),
            dry_run: self.request.dry_run,
            cause: if notices.is_some() { "notification" } else { "schedule" }.to_owned(),
            ..RoundReport::default()
        };
        let concerned = |wish: &super::recipe::Wish| match notices {
            None => true,
            Some(notices) => notices.iter().any(|n| wish.concerns(&n.repository, n.tag.as_deref())),
        };
        let expanded = expand(self.recipe, self.request.thin_images, self.source, QUESTIONS, concerned);
        for unresolved in &expanded.unresolved {
            let error = unresolved.error.full_message();
            tracing::error!(wish = unresolved.wish.text, error, "a wish cannot be resolved");
            report.add(ImageOutcome::failed(unresolved.wish.text.clone(), error));
        }
        report.wished = expanded.images.len() as u64;
        let mut published = self.published()?;
        report.revision = published.revision();
        // Who notifies has a reason to have even what is unfit fetched again.
        let spares_unfit = notices.is_none();
        let work = self.look_at_all(&expanded.images, spares_unfit, &mut published, &mut report)?;
        drop(published);
        self.interrupt.check()?;

        if self.request.dry_run {
            work.iter().for_each(|work| report.add(outcome(work, ImageState::Planned)));
        } else {
            work::convert(self, work, &mut report)?;
        }
        if notices.is_none() {
            retire::unwished(self, &expanded, &mut report)?;
        }
        report.seconds = started.elapsed().as_secs_f64();
        Ok(report)
    }

    fn look_at_all(
        &self,
        images: &[WishedImage],
        spares_unfit: bool,
        published: &mut Published,
        report: &mut RoundReport,
    ) -> Result<Vec<Work>, ConvertError> {
        let looks = in_parallel(images, QUESTIONS, |image| {
            self.interrupt.check()?;
            self.look_at(image)
        });
        let mut work = Vec::new();
        for (image, look) in images.iter().zip(looks) {
            let plan = match look {
                Ok(Look::Same(record)) if has_all(&record, published)? => {
                    report.unchanged += 1;
                    continue;
                }
                Ok(Look::Same(_)) => self.plan(image).map(Box::new),
                Ok(Look::Differs(plan)) => Ok(plan),
                Err(error) => Err(error),
            };
            let plan = match plan {
                Ok(plan) if spares_unfit => self.unless_unfit(image, plan),
                plan => plan,
            };
            match plan {
                Ok(mut plan) => {
                    plan.compare(published)?;
                    work.push(Work { image: image.clone(), plan: *plan });
                }
                Err(ConvertError::Registry(RegistryError::Cancelled) | ConvertError::Interrupted) => {
                    return Err(ConvertError::Interrupted);
                }
                Err(error) => {
                    let error = error.full_message();
                    tracing::error!(image = %image.reference, error, "an image cannot be converted");
                    report.add(ImageOutcome::failed(image.reference.to_string(), error));
                }
            }
        }
        Ok(work)
    }

    fn unless_unfit(&self, image: &WishedImage, plan: Box<Plan>) -> Result<Box<Plan>, ConvertError> {
        let (image, digest) = (image.reference.to_string(), plan.resolved.top_digest.to_string());
        match self.records.unfit(&image, &digest, cvmfs_publish::system_clock()) {
            Some(error) => Err(error),
            None => Ok(plan),
        }
    }

    fn look_at(&self, image: &WishedImage) -> Result<Look, ConvertError> {
        if let Some(record) = self.records.image(&image.reference.to_string())
            && self.is_current(image, &record)?
        {
            return Ok(Look::Same(Box::new(record)));
        }
        self.plan(image).map(Box::new).map(Look::Differs)
    }

    /// Whether registries and record agree. One question for the image, one for the thin
    /// image.
    fn is_current(&self, image: &WishedImage, record: &ImageRecord) -> Result<bool, ConvertError> {
        let as_asked = record.platform == self.request.platform.to_string()
            && record.layout == self.request.layout.to_string();
        let same = |digest: Option<registry::Digest>, recorded: &str| {
            digest.is_some_and(|d| d.to_string() == recorded)
        };
        if !as_asked || !same(self.source.stated_digest(&image.reference)?, &record.top_digest) {
            return Ok(false);
        }
        match (&image.output, &record.output) {
            (None, _) => Ok(true),
            (Some(output), Some(written)) if output.to_string() == written.reference => {
                match self.target.stated_digest(output) {
                    Ok(digest) => Ok(same(digest, &written.digest)),
                    Err(RegistryError::NotFound { .. }) => Ok(false),
                    Err(error) => Err(error.into()),
                }
            }
            _ => Ok(false),
        }
    }

    fn plan(&self, image: &WishedImage) -> Result<Plan, ConvertError> {
        let source = ImageSource::Registry(image.reference.clone());
        let source = Source::open(&source, self.source, &self.spool())?;
        let resolved = resolve(&source, &self.request.platform)?;
        if let Some(policy) = self.policy {
            policy.check(&resolved)?;
        }
        Plan::new(resolved, &self.recipe.fqrn, &self.request.layout)
    }

    /// The published revision, verified.
    pub(super) fn published(&self) -> Result<Published, ConvertError> {
        Published::open(&self.recipe.fqrn, &self.storage(), &self.request.keys, &self.spool())
    }

    /// The repository for writing; waits for other publishers.
    pub(super) fn publisher(&self) -> Result<cvmfs_publish::Publisher, ConvertError> {
        let options = cvmfs_publish::OpenOptions { interrupt: self.interrupt.clone(), ..Default::default() };
        let (storage, keys) = (self.storage(), &self.request.keys);
        Ok(cvmfs_publish::Publisher::open_with(&self.recipe.fqrn, &storage, keys, options)?)
    }

    pub(super) fn spool(&self) -> std::path::PathBuf {
        spool::directory(self.request.spool.as_deref())
    }

    fn storage(&self) -> String {
        self.request.storage.clone().unwrap_or_else(|| format!("/srv/cvmfs/{}", self.recipe.fqrn))
    }
}

impl WishedImage {
    pub(super) fn destination(&self) -> Option<Output> {
        self.output.clone().map(|reference: Reference| Output::Registry(reference))
    }
}

/// Whether all that a record names is still in the repository.
fn has_all(record: &ImageRecord, published: &mut Published) -> Result<bool, ConvertError> {
    for path in record.paths() {
        if !published.exists(path)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What is to be said about an image.
pub(super) fn outcome(work: &Work, state: ImageState) -> ImageOutcome {
    let layers = work.plan.distinct_layers();
    let missing = work.plan.missing();
    ImageOutcome {
        image: work.image.reference.to_string(),
        state,
        digest: Some(work.plan.resolved.digest.to_string()),
        output: work.image.output.as_ref().map(ToString::to_string),
        layers: layers.len() as u64,
        layers_new: missing.len() as u64,
        bytes: layers.iter().map(|layer| layer.blob.size).sum(),
        bytes_new: missing.iter().map(|layer| layer.blob.size).sum(),
        error: None,
    }
}
