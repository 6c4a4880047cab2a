//! From an image to layers in a repository and a thin image.

mod ingest;
mod output;
mod report;

use std::path::PathBuf;
use std::time::Instant;

use cvmfs_publish::{Interrupt, Publisher};
use registry::{Client, Descriptor, Digest, Image, ImageConfig, Platform, Reference, RegistryError};
use thin_image::{Location, MAX_LAYERS, ThinImage, ThinImageError, ThinLayer};

pub use output::Output;
pub use report::{LayerReport, LayerState, Report};

use crate::failure::ConvertError;
use crate::progress::Progress;
use crate::published::Published;
use crate::spool::{self, Wanted};
use crate::thin::{ThinImageBlobs, is_marked_thin};

/// What is to be converted, and where to.
#[derive(Debug, Clone)]
pub struct ConvertRequest {
    /// The image.
    pub image: Reference,
    /// What to call the image's origin in the descriptor; the full reference with the
    /// digest if `None`.
    pub origin: Option<String>,
    /// The platform wanted; this machine's if `None`, and then an image for another one
    /// that stands alone is taken too.
    pub platform: Option<Platform>,
    /// Name of the repository.
    pub fqrn: String,
    /// Storage of the repository, a directory.
    pub storage: String,
    /// Directory with the repository's keys.
    pub keys: PathBuf,
    /// Directory in the repository that holds the layers, without slashes at the ends.
    pub subdirectory: String,
    /// Where the thin image goes; none is made if `None`.
    pub output: Option<Output>,
    /// Directory for downloaded layers; see `--spool`.
    pub spool: Option<PathBuf>,
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

/// An image with everything known about it but the content of its layers.
#[derive(Debug)]
struct SourceImage {
    reference: Reference,
    image: Image,
    config: ImageConfig,
}

/// One layer of the image, in its place.
#[derive(Debug, Clone)]
struct PlannedLayer {
    blob: Descriptor,
    diff_id: Digest,
    location: Location,
    state: LayerState,
}

impl PlannedLayer {
    /// Its directory as an absolute path in the repository.
    fn path(&self) -> String {
        format!("/{}", self.location.path)
    }
}

impl Conversion<'_> {
    /// Converts an image.
    ///
    /// # Errors
    /// The object, the cause and the next step. Unless it is
    /// [`ConvertError::ThinImageMissing`], nothing was published.
    pub fn run(&self, request: &ConvertRequest) -> Result<Report, ConvertError> {
        let started = Instant::now();
        let source = self.resolve(request)?;
        let mut layers = plan(request, &source)?;
        if let Some(output) = &request.output
            && !request.dry_run
        {
            output.prepare(self.target)?;
        }
        let spool = spool::directory(request.spool.as_deref());
        let mut published = Published::open(&request.fqrn, &request.storage, &request.keys, &spool)?;
        for layer in &mut layers {
            if published.has_directory(&layer.path())? {
                layer.state = LayerState::Present;
            }
        }
        let mut report = Report::begin(request, &source.image.digest, &layers, published.revision());
        drop(published);
        self.progress.step(&report.plan_line());
        if !request.dry_run {
            if layers.iter().any(|layer| layer.state == LayerState::New) {
                self.publish_missing(request, &source, &layers, &spool, &mut report)?;
            }
            if let Some(output) = &request.output {
                report.output =
                    Some(self.write_thin_image(request, &source, &layers, output, report.revision)?);
            }
        }
        report.seconds = started.elapsed().as_secs_f64();
        Ok(report)
    }

    fn resolve(&self, request: &ConvertRequest) -> Result<SourceImage, ConvertError> {
        let platform = request.platform.clone().unwrap_or_else(Platform::host);
        let image = self.source.image(&request.image, &platform)?;
        let (_, config) = self.source.config(&request.image, &image.manifest)?;
        let found = &config.platform;
        let differs = !found.architecture.is_empty()
            && (found.os != platform.os || found.architecture != platform.architecture);
        if differs && request.platform.is_some() {
            return Err(RegistryError::NoPlatform {
                object: request.image.to_string(),
                wanted: platform.to_string(),
                offered: found.to_string(),
            }
            .into());
        }
        let unsuitable = |reason: &str| ConvertError::Unsuitable {
            image: request.image.to_string(),
            reason: reason.to_owned(),
        };
        if is_marked_thin(&config) {
            return Err(unsuitable(
                "is a thin image, or stands on one; convert the image that it was made from",
            ));
        }
        if !found.os.is_empty() && found.os != "linux" {
            return Err(unsuitable("is not an image for Linux"));
        }
        Ok(SourceImage { reference: request.image.clone(), image, config })
    }

    fn publish_missing(
        &self,
        request: &ConvertRequest,
        source: &SourceImage,
        layers: &[PlannedLayer],
        spool: &std::path::Path,
        report: &mut Report,
    ) -> Result<(), ConvertError> {
        let wanted = missing(layers);
        let spooled = spool::download(self.source, &source.reference, wanted, spool, self.progress)?;
        report.bytes_downloaded = spooled.iter().map(|layer| layer.wanted.blob.size).sum();
        self.interrupt.check()?;
        let options = cvmfs_publish::OpenOptions { interrupt: self.interrupt.clone(), ..Default::default() };
        let mut publisher = Publisher::open_with(&request.fqrn, &request.storage, &request.keys, options)?;
        let directory = |blob: &Descriptor| format!("/{}/{}", request.subdirectory, blob.digest.hex());
        let stored = ingest::layers(&mut publisher, spooled, directory, self.progress)?;
        report.revision = stored.revision;
        report.bytes_stored = stored.bytes_stored;
        Ok(())
    }

    fn write_thin_image(
        &self,
        request: &ConvertRequest,
        source: &SourceImage,
        layers: &[PlannedLayer],
        output: &Output,
        revision: u64,
    ) -> Result<String, ConvertError> {
        let origin =
            request.origin.clone().unwrap_or_else(|| source.reference.at(&source.image.digest).to_string());
        let descriptor = ThinImage::new(Some(origin), layers.iter().map(thin_layer).collect())?;
        let blobs = ThinImageBlobs::build(&descriptor, &source.config, &source.image.digest);
        output
            .write(self.target, &blobs)
            .map_err(|cause| ConvertError::ThinImageMissing { revision, cause: Box::new(cause) })
    }
}

/// The layers in their places, base first, all of them new as far as is known.
fn plan(request: &ConvertRequest, source: &SourceImage) -> Result<Vec<PlannedLayer>, ConvertError> {
    let blobs = &source.image.manifest.layers;
    if blobs.len() > MAX_LAYERS {
        return Err(ThinImageError::TooManyLayers(blobs.len()).into());
    }
    let planned = blobs.iter().zip(&source.config.diff_ids).map(|(blob, diff_id)| {
        let path = format!("{}/{}", request.subdirectory, blob.digest.hex());
        let location = Location::new(&request.fqrn, &path).map_err(|rule| {
            ConvertError::Usage(format!(
                "cvmfs://{}/{} cannot hold layers: {rule}",
                request.fqrn, request.subdirectory
            ))
        })?;
        Ok(PlannedLayer { blob: blob.clone(), diff_id: diff_id.clone(), location, state: LayerState::New })
    });
    planned.collect()
}

/// The new layers, each once: an image may apply the same blob twice.
fn missing(layers: &[PlannedLayer]) -> Vec<Wanted> {
    let mut wanted: Vec<Wanted> = Vec::new();
    for layer in layers.iter().filter(|layer| layer.state == LayerState::New) {
        if wanted.iter().all(|other| other.blob.digest != layer.blob.digest) {
            wanted.push(Wanted { blob: layer.blob.clone(), diff_id: layer.diff_id.clone() });
        }
    }
    wanted
}

fn thin_layer(layer: &PlannedLayer) -> ThinLayer {
    ThinLayer::new(layer.blob.digest.hex(), layer.location.clone())
        .expect("digests of registries are hexadecimal")
}
