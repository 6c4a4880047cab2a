//! Which layers go where, and which of them are missing.

use registry::{Descriptor, Digest};
use thin_image::{Location, MAX_LAYERS, ThinImage, ThinImageError, ThinLayer};

use super::layout::Layout;
use super::report::LayerState;
use super::resolve::{Resolved, SourceImage};
use super::unpacked;
use crate::failure::ConvertError;
use crate::published::Published;
use crate::spool::Wanted;
use crate::thin::{ThinImageBlobs, ThinSet};

/// One layer of an image, in its place.
#[derive(Debug, Clone)]
pub(crate) struct PlannedLayer {
    pub(crate) blob: Descriptor,
    pub(crate) diff_id: Digest,
    location: Location,
    pub(crate) state: LayerState,
}

impl PlannedLayer {
    /// Its directory as an absolute path in the repository.
    pub(crate) fn path(&self) -> String {
        format!("/{}", self.location.path)
    }
}

/// One image and its layers, base first.
#[derive(Debug, Clone)]
pub(crate) struct PlannedImage {
    pub(crate) image: SourceImage,
    pub(crate) layers: Vec<PlannedLayer>,
}

/// A conversion before its work.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) resolved: Resolved,
    pub(crate) images: Vec<PlannedImage>,
    pub(crate) layout: Layout,
    /// Whether what the layout has beside the layers is there.
    is_complete: bool,
}

impl Plan {
    /// The layers in their places, all of them new as far as is known.
    pub(crate) fn new(resolved: Resolved, fqrn: &str, layout: &Layout) -> Result<Self, ConvertError> {
        let images =
            resolved.images.iter().map(|image| planned(image, fqrn, layout)).collect::<Result<_, _>>()?;
        Ok(Self { resolved, images, layout: layout.clone(), is_complete: false })
    }

    /// Notes which layers a revision has.
    pub(crate) fn compare(&mut self, published: &mut Published) -> Result<(), ConvertError> {
        for layer in self.images.iter_mut().flat_map(|image| &mut image.layers) {
            layer.state = match published.has_directory(&layer.path())? {
                true => LayerState::Present,
                false => LayerState::New,
            };
        }
        self.is_complete = match self.layout {
            Layout::Layers { .. } => true,
            Layout::Unpacked => unpacked::is_current(self, published)?,
        };
        Ok(())
    }

    /// Whether there is anything to be published.
    pub(crate) fn is_published(&self) -> bool {
        self.is_complete && self.layers().all(|layer| layer.state == LayerState::Present)
    }

    /// What the image has in the repository beside its layers, absolute paths.
    pub(crate) fn other_paths(&self) -> Vec<String> {
        match self.layout {
            Layout::Layers { .. } => Vec::new(),
            Layout::Unpacked => unpacked::paths(self),
        }
    }

    /// All layers, base first, image after image.
    pub(crate) fn layers(&self) -> impl Iterator<Item = &PlannedLayer> {
        self.images.iter().flat_map(|image| &image.layers)
    }

    /// The layers, each once.
    pub(crate) fn distinct_layers(&self) -> Vec<&PlannedLayer> {
        let mut distinct: Vec<&PlannedLayer> = Vec::new();
        for layer in self.layers() {
            if distinct.iter().all(|other| other.blob.digest != layer.blob.digest) {
                distinct.push(layer);
            }
        }
        distinct
    }

    /// The new layers, each once: an image may apply the same blob twice, and images
    /// share layers.
    pub(crate) fn missing(&self) -> Vec<Wanted> {
        let new = self.distinct_layers().into_iter().filter(|layer| layer.state == LayerState::New);
        new.map(|layer| Wanted {
            blob: layer.blob.clone(),
            diff_id: layer.diff_id.clone(),
            path: layer.path(),
        })
        .collect()
    }

    /// The thin images. `origin` is what descriptors call the source.
    pub(crate) fn thin_set(&self, origin: Option<&str>) -> Result<ThinSet, ConvertError> {
        let thin = |planned: &PlannedImage| {
            let origin = origin.map_or_else(|| self.origin(&planned.image.image.digest), str::to_owned);
            let descriptor = ThinImage::new(Some(origin), planned.layers.iter().map(thin_layer).collect())?;
            let (image, config) = (&planned.image.image, &planned.image.config);
            let blobs = ThinImageBlobs::build(&descriptor, config, &image.digest);
            Ok::<_, ConvertError>((planned.image.platform().clone(), blobs))
        };
        let images = self.images.iter().map(thin).collect::<Result<_, _>>()?;
        Ok(ThinSet { images, is_index: self.resolved.is_index })
    }

    /// The source with its digest. The place of a local file says nothing to anybody
    /// else, so only the name inside it counts.
    fn origin(&self, digest: &Digest) -> String {
        match self.resolved.source.reference() {
            Some(reference) => reference.at(digest).to_string(),
            None => digest.to_string(),
        }
    }
}

fn planned(source: &SourceImage, fqrn: &str, layout: &Layout) -> Result<PlannedImage, ConvertError> {
    let blobs = &source.image.manifest.layers;
    if blobs.len() > MAX_LAYERS {
        return Err(ThinImageError::TooManyLayers(blobs.len()).into());
    }
    let layer = |(blob, diff_id): (&Descriptor, &Digest)| {
        let location = layout.location(fqrn, &blob.digest)?;
        Ok::<_, ConvertError>(PlannedLayer {
            blob: blob.clone(),
            diff_id: diff_id.clone(),
            location,
            state: LayerState::New,
        })
    };
    let layers = blobs.iter().zip(&source.config.diff_ids).map(layer).collect::<Result<_, _>>()?;
    Ok(PlannedImage { image: source.clone(), layers })
}

fn thin_layer(layer: &PlannedLayer) -> ThinLayer {
    ThinLayer::new(layer.blob.digest.hex(), layer.location.clone())
        .expect("digests of registries are hexadecimal")
}
