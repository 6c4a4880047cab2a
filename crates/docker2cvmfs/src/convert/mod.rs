//! From an image to layers in a repository and a thin image.

mod apptainer;
mod ingest;
mod layout;
mod members;
mod output;
mod plan;
mod podman;
mod report;
mod resolve;
mod unpacked;

use std::path::{Path, PathBuf};
use std::time::Instant;

use cvmfs_publish::{Interrupt, Publisher};
use registry::{Client, ImageSource, Source};

pub use layout::Layout;
pub use output::Output;
pub use report::{ImageReport, LayerReport, LayerState, Report};
pub use resolve::PlatformChoice;

pub(crate) use ingest::{Ingest, Stored};
pub(crate) use plan::{Plan, PlannedLayer};
pub(crate) use podman::PodmanStore;
pub(crate) use resolve::{Resolved, resolve};
pub(crate) use unpacked::{METADATA, Unpacked};

use crate::failure::ConvertError;
use crate::policy::Policy;
use crate::progress::Progress;
use crate::published::Published;
use crate::spool;

/// What is to be converted, and where to.
#[derive(Debug, Clone)]
pub struct ConvertRequest {
    /// The image.
    pub image: ImageSource,
    /// What to call the image's origin in the descriptor; the full reference with the
    /// digest if `None`.
    pub origin: Option<String>,
    /// The platforms wanted.
    pub platform: PlatformChoice,
    /// Name of the repository.
    pub fqrn: String,
    /// Storage of the repository.
    pub storage: String,
    /// Directory with the repository's keys.
    pub keys: PathBuf,
    /// Where layers lie in the repository.
    pub layout: Layout,
    /// Where the thin image goes; none is made if `None`.
    pub output: Option<Output>,
    /// Directory for downloaded layers; see `--spool`.
    pub spool: Option<PathBuf>,
    /// File with what has to be true of the image before it is published.
    pub policy: Option<PathBuf>,
    /// Only say what would be done.
    pub dry_run: bool,
}

/// What a conversion works with.
#[derive(Debug)]
pub struct Conversion<'a> {
    /// The source's registry.
    pub source: &'a Client,
    /// The registry that the thin image is pushed to.
    pub target: &'a Client,
    /// Where progress is shown.
    pub progress: &'a Progress,
    /// Stops the publisher; the clients have cancellers of their own.
    pub interrupt: &'a Interrupt,
}

impl Conversion<'_> {
    /// Converts an image.
    ///
    /// # Errors
    /// The object, the cause and the next step. Unless it is
    /// [`ConvertError::ThinImageMissing`], nothing was published.
    pub fn run(&self, request: &ConvertRequest) -> Result<Report, ConvertError> {
        let started = Instant::now();
        let spool = spool::directory(request.spool.as_deref());
        let policy = request.policy.as_deref().map(Policy::read).transpose()?;
        let source = Source::open(&request.image, self.source, &spool)?;
        let resolved = resolve(&source, &request.platform)?;
        if let Some(policy) = &policy {
            policy.check(&resolved)?;
        }
        let mut plan = Plan::new(resolved, &request.fqrn, &request.layout)?;
        if let Some(output) = &request.output {
            output.suits(&plan)?;
            if !request.dry_run {
                output.prepare(self.target)?;
            }
        }
        let mut published = Published::open(&request.fqrn, &request.storage, &request.keys, &spool)?;
        plan.compare(&mut published)?;
        let mut report = Report::begin(&plan, published.revision());
        drop(published);
        self.progress.step(&report.plan_line());
        if !request.dry_run {
            self.publish_missing(request, &plan, &spool, &mut report)?;
            if let Some(output) = &request.output {
                let thin = plan.thin_set(request.origin.as_deref())?;
                let written = output.write(self.target, &thin).map_err(|cause| {
                    ConvertError::ThinImageMissing { revision: report.revision, cause: Box::new(cause) }
                })?;
                report.output = Some(written.place);
            }
        }
        report.seconds = started.elapsed().as_secs_f64();
        Ok(report)
    }

    fn publish_missing(
        &self,
        request: &ConvertRequest,
        plan: &Plan,
        spool: &Path,
        report: &mut Report,
    ) -> Result<(), ConvertError> {
        if plan.is_published() {
            return Ok(());
        }
        let missing = plan.missing();
        report.bytes_downloaded = missing.iter().map(|layer| layer.blob.size).sum();
        let source = &plan.resolved.source;
        let stored = spool::download_while(source, &missing, spool, self.progress, |arrivals| {
            arrivals.wait_until_worthwhile()?;
            self.interrupt.check()?;
            let options =
                cvmfs_publish::OpenOptions { interrupt: self.interrupt.clone(), ..Default::default() };
            let mut publisher =
                Publisher::open_with(&request.fqrn, &request.storage, &request.keys, options)?;
            // What it has now, under the lock.
            let published = || Published::open(&request.fqrn, &request.storage, &request.keys, spool);
            ingest::image(&mut publisher, plan, arrivals, published, self.progress)
        })?;
        report.revision = stored.revision;
        report.bytes_stored = stored.bytes_stored;
        Ok(())
    }
}
