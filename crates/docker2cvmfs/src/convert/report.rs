//! What a conversion did: the keys of `convert --json`.

use indicatif::HumanBytes;
use serde::Serialize;

use super::plan::{Plan, PlannedImage, PlannedLayer};

/// What a conversion did, or would do.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The source image.
    pub image: String,
    /// Digest of its manifest, or of the index with all its images.
    pub digest: String,
    /// Its layers, base first; of several images each layer once.
    pub layers: Vec<LayerReport>,
    /// The images of an index.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub images: Vec<ImageReport>,
    /// Bytes of layers fetched from the registry.
    pub bytes_downloaded: u64,
    /// Stored bytes of the repository's new objects.
    pub bytes_stored: u64,
    /// The repository's revision that has all layers; of a dry run the current one.
    pub revision: u64,
    /// Reference or file of the thin image; none if none was asked for.
    pub output: Option<String>,
    /// Time from begin to end.
    pub seconds: f64,
    /// Bytes that were or would be fetched; the plan's line needs it.
    #[serde(skip)]
    missing_bytes: u64,
}

/// One image of an index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ImageReport {
    /// What it runs on.
    pub platform: String,
    /// Digest of its manifest.
    pub digest: String,
    /// Digests of its layers, base first.
    pub layers: Vec<String>,
}

/// One layer of the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LayerReport {
    /// Digest of its blob.
    pub digest: String,
    /// Its directory in the repository.
    pub path: String,
    /// Whether it had to be published.
    pub state: LayerState,
}

/// Whether a layer was in the repository before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LayerState {
    /// It was published by this conversion, or would be.
    New,
    /// It was there.
    Present,
}

impl Report {
    pub(super) fn begin(plan: &Plan, revision: u64) -> Self {
        let layers: Vec<LayerReport> = match plan.images.as_slice() {
            [image] => image.layers.iter().map(layer_report).collect(),
            _ => plan.distinct_layers().into_iter().map(layer_report).collect(),
        };
        let images =
            if plan.resolved.is_index { plan.images.iter().map(image_report).collect() } else { Vec::new() };
        Self {
            image: plan.resolved.source.name().to_string(),
            digest: plan.resolved.digest.to_string(),
            layers,
            images,
            bytes_downloaded: 0,
            bytes_stored: 0,
            revision,
            output: None,
            seconds: 0.0,
            missing_bytes: plan.missing().iter().map(|wanted| wanted.blob.size).sum(),
        }
    }

    pub(super) fn plan_line(&self) -> String {
        let new = self.layers.iter().filter(|layer| layer.state == LayerState::New).count();
        format!(
            "{}: {} layers, {new} of them new ({} to fetch)",
            self.image,
            self.layers.len(),
            HumanBytes(self.missing_bytes)
        )
    }

    /// The report for people, several lines.
    pub fn to_text(&self) -> String {
        let mut text = format!("image     {}\ndigest    {}\n", self.image, self.digest);
        for image in &self.images {
            text.push_str(&format!("platform  {} {}\n", image.platform, image.digest));
        }
        for layer in &self.layers {
            let state = match layer.state {
                LayerState::New => "new",
                LayerState::Present => "present",
            };
            text.push_str(&format!("layer     {} {state}\n", layer.path));
        }
        let (downloaded, stored) = (HumanBytes(self.bytes_downloaded), HumanBytes(self.bytes_stored));
        text.push_str(&format!("revision  {}\n", self.revision));
        if let Some(output) = &self.output {
            text.push_str(&format!("output    {output}\n"));
        }
        text.push_str(&format!("{downloaded} downloaded, {stored} stored, {:.1} s\n", self.seconds));
        text
    }
}

fn layer_report(layer: &PlannedLayer) -> LayerReport {
    LayerReport { digest: layer.blob.digest.to_string(), path: layer.path(), state: layer.state }
}

fn image_report(planned: &PlannedImage) -> ImageReport {
    ImageReport {
        platform: planned.image.platform().to_string(),
        digest: planned.image.image.digest.to_string(),
        layers: planned.layers.iter().map(|layer| layer.blob.digest.to_string()).collect(),
    }
}
