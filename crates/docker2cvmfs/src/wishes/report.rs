//! What a round did: the document of `loop --json`, the status page's source.

use indicatif::HumanBytes;
use serde::{Deserialize, Serialize};

/// Rounds that are remembered.
const MAX_ROUNDS: usize = 20;
/// Failures of one round that are remembered; all of them are logged.
const MAX_REMEMBERED: usize = 200;

/// One round over a wish list.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RoundReport {
    /// The repository.
    pub fqrn: String,
    /// When it began, RFC 3339.
    pub started: String,
    /// How long it took.
    pub seconds: f64,
    /// Whether nothing was done because only the plan was asked for.
    pub dry_run: bool,
    /// Why it began: the clock, or a notification of a registry.
    pub cause: String,
    /// Images that were wished for, wildcards resolved.
    pub wished: u64,
    /// Those among them that were as they should be.
    pub unchanged: u64,
    /// Those that were converted, or would be.
    pub converted: u64,
    /// Those that failed, and wishes that could not be resolved.
    pub failed: u64,
    /// Images that changed or failed.
    pub images: Vec<ImageOutcome>,
    /// Images that left the list in this round; their layers stay for the grace.
    pub retired: u64,
    /// Layers that were removed because their grace is over, or would be.
    pub layers_removed: u64,
    /// Objects that the garbage collection deleted.
    pub objects_collected: u64,
    /// Bytes of layers fetched.
    pub bytes_downloaded: u64,
    /// Stored bytes of new objects.
    pub bytes_stored: u64,
    /// The last revision published, or the one that was found.
    pub revision: u64,
    /// What went wrong apart from single images.
    pub errors: Vec<String>,
}

/// What became of one image.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ImageOutcome {
    /// The image, or the wish that could not be resolved.
    pub image: String,
    /// Converted, failed, or planned.
    pub state: ImageState,
    /// Digest of its manifest or index.
    pub digest: Option<String>,
    /// The thin image.
    pub output: Option<String>,
    /// Its layers.
    pub layers: u64,
    /// Those that were not there before.
    pub layers_new: u64,
    /// Bytes of all its layers as the registry has them.
    pub bytes: u64,
    /// Bytes of the new ones; the rest is shared with other images.
    pub bytes_new: u64,
    /// What is in the way.
    pub error: Option<String>,
}

/// What became of one image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageState {
    /// It is in the repository now.
    Converted,
    /// It is not as it should be.
    #[default]
    Failed,
    /// It would be converted.
    Planned,
}

impl ImageOutcome {
    pub(super) fn failed(image: String, error: String) -> Self {
        Self { image, error: Some(error), ..Self::default() }
    }
}

impl RoundReport {
    pub(super) fn add(&mut self, outcome: ImageOutcome) {
        match outcome.state {
            ImageState::Converted | ImageState::Planned => self.converted += 1,
            ImageState::Failed => self.failed += 1,
        }
        self.images.push(outcome);
    }

    /// Whether everything is as the list wants it.
    pub fn is_good(&self) -> bool {
        self.failed == 0 && self.errors.is_empty()
    }

    /// For people, several lines.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        for image in &self.images {
            let line = match (image.state, &image.error) {
                (ImageState::Failed, error) => {
                    format!("failed     {}: {}\n", image.image, error.as_deref().unwrap_or("unknown"))
                }
                (state, _) => format!(
                    "{}  {}: {} layers, {} of them new, {} of {} to fetch\n",
                    if state == ImageState::Planned { "planned  " } else { "converted" },
                    image.image,
                    image.layers,
                    image.layers_new,
                    HumanBytes(image.bytes_new),
                    HumanBytes(image.bytes)
                ),
            };
            text.push_str(&line);
        }
        for error in &self.errors {
            text.push_str(&format!("error      {error}\n"));
        }
        text.push_str(&self.summary());
        text.push('\n');
        text
    }

    /// One line.
    pub(super) fn summary(&self) -> String {
        format!(
            "{}: {} images wished for, {} unchanged, {} {}, {} failed, {} retired, {} layers removed; {} fetched, \
             {} stored, revision {}, {:.1} s",
            self.fqrn,
            self.wished,
            self.unchanged,
            self.converted,
            if self.dry_run { "to be converted" } else { "converted" },
            self.failed,
            self.retired,
            self.layers_removed,
            HumanBytes(self.bytes_downloaded),
            HumanBytes(self.bytes_stored),
            self.revision,
            self.seconds
        )
    }

    /// Without what would let the history grow.
    fn shortened(&self) -> Self {
        let mut images = self.images.clone();
        images.truncate(MAX_REMEMBERED);
        let mut errors = self.errors.clone();
        errors.truncate(MAX_REMEMBERED);
        Self { images, errors, ..self.clone() }
    }
}

/// The last rounds, latest first.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct History {
    pub(super) rounds: Vec<RoundReport>,
    pub(super) totals: Totals,
}

/// Counted since the state directory was made.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Totals {
    pub(super) rounds: u64,
    pub(super) converted: u64,
    pub(super) failed: u64,
    pub(super) layers_removed: u64,
    pub(super) objects_collected: u64,
    pub(super) bytes_downloaded: u64,
    pub(super) bytes_stored: u64,
}

impl History {
    pub(super) fn add(&mut self, round: &RoundReport) {
        let totals = &mut self.totals;
        totals.rounds += 1;
        totals.converted += round.converted;
        totals.failed += round.failed;
        totals.layers_removed += round.layers_removed;
        totals.objects_collected += round.objects_collected;
        totals.bytes_downloaded += round.bytes_downloaded;
        totals.bytes_stored += round.bytes_stored;
        self.rounds.insert(0, round.shortened());
        self.rounds.truncate(MAX_ROUNDS);
    }
}
