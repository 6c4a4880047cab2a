//! A layer on its way into a repository: bucket, layer service, mounted revision (thin images §7.4).

use std::fs::File;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use bucket::connection::InvalidLocation;
use bucket::layers::BucketError;
use bucket::service::ServiceError;
use bucket::{ConfigError, LayerBucket, LayerKey, LayerServiceConfig, LayerState, ServiceClient};
use thin_image::{InvalidDigest, Location, LocationError, ThinLayer};

use crate::repositories::{Repositories, RepositoryError};

/// Directory of the repository in which the layer service makes one for each layer.
const BASE: &str = "layers";
/// Between two questions to the layer service.
const QUESTION_PAUSE: Duration = Duration::from_secs(1);
/// So long a service may not know a layer that was just stored, or not answer.
const GRACE: Duration = Duration::from_secs(30);
/// Between two looks whether the published layer can be read here.
const LOOK_PAUSE: Duration = Duration::from_secs(2);
/// Someone who waits for a commit sees nothing; the log tells that it goes on.
const REPORT: Duration = Duration::from_secs(10);

/// Where `config.json` is looked for, at each commit.
#[derive(Debug, Clone)]
pub struct Publishing {
    directory: PathBuf,
}

/// Why a layer could not be published.
#[derive(Debug, thiserror::Error)]
pub enum PublishingError {
    /// `config.json`.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// What `config.json` says of the bucket.
    #[error(transparent)]
    Location(#[from] InvalidLocation),
    /// The bucket.
    #[error(transparent)]
    Bucket(#[from] BucketError),
    /// The bucket confirmed the layer and does not have it.
    #[error("layer {key} was stored in {bucket} and is not there as a whole")]
    Lost {
        /// The layer.
        key: LayerKey,
        /// The bucket.
        bucket: String,
    },
    /// The service does not answer.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// The service does not publish the layer.
    #[error(
        "the layer service does not publish layer {key}: {reason}; its log says more, and `curl {url}/{key}` what it knows"
    )]
    Unknown {
        /// The layer.
        key: LayerKey,
        /// As the service tells it.
        reason: String,
        /// Its status resource.
        url: String,
    },
    /// It took too long.
    #[error(
        "layer {key} was not published within {limit_s} seconds (cvmfsCommitTimeout); it is stored, so that another \
         commit goes on from there"
    )]
    Late {
        /// The layer.
        key: LayerKey,
        /// The limit.
        limit_s: u64,
    },
    /// Published, but this host does not see it.
    #[error("the layer is published, but cannot be read here: {0}; commit again when it can")]
    NotSeen(#[source] RepositoryError),
    /// The repository's name makes no location.
    #[error(transparent)]
    Place(#[from] LocationError),
    /// The key makes no digest.
    #[error(transparent)]
    Digest(#[from] InvalidDigest),
}

impl Publishing {
    /// With the `config.json` in `directory`, if there is one.
    pub fn new(directory: &Path) -> Publishing {
        Publishing { directory: directory.to_owned() }
    }

    /// What `config.json` says now; none if it is not there.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn config(&self) -> Result<Option<LayerServiceConfig>, ConfigError> {
        LayerServiceConfig::in_directory(&self.directory)
    }
}

/// Stores the archive of `size` bytes in `file`, waits until it is published and can be read here, and returns the
/// layer for a descriptor. Whatever of this was done before is not done again.
///
/// # Errors
/// [`PublishingError`], at the latest after `limit` and the time that uploads and repositories have for themselves.
pub(crate) fn publish(
    config: &LayerServiceConfig,
    repositories: &Repositories,
    key: &LayerKey,
    file: File,
    size: u64,
    limit: Duration,
) -> Result<ThinLayer, PublishingError> {
    for unknown in &config.unknown_keys {
        tracing::warn!(key = unknown, "config.json has a key that nobody reads");
    }
    let location = Location::new(&config.repository, &format!("{BASE}/{key}"))?;
    let layer = ThinLayer::new(key.as_str(), location)?;
    let until = Instant::now() + limit;
    let bucket = LayerBucket::of_config(config)?;
    if bucket.size(key)? == Some(size) {
        tracing::info!(layer = %key, bucket = bucket.name(), "the layer is in the bucket already");
    } else {
        bucket.put(key, file, size)?;
        if bucket.size(key)? != Some(size) {
            return Err(PublishingError::Lost { key: key.clone(), bucket: bucket.name().to_owned() });
        }
        tracing::info!(layer = %key, bytes = size, bucket = bucket.name(), "layer stored");
    }
    let late = || PublishingError::Late { key: key.clone(), limit_s: limit.as_secs() };
    let mut report = Report::new(key);
    wait_until_published(config, key, until, &mut report, late)?;
    wait_until_seen(repositories, &layer.location, until, &mut report)?;
    tracing::info!(layer = %key, repository = config.repository, "layer published");
    Ok(layer)
}

fn wait_until_published(
    config: &LayerServiceConfig,
    key: &LayerKey,
    until: Instant,
    report: &mut Report<'_>,
    late: impl Fn() -> PublishingError,
) -> Result<(), PublishingError> {
    let service = ServiceClient::new(&config.status_url)?;
    let mut patient_until = Instant::now() + GRACE;
    loop {
        let failure = match service.state(key) {
            Ok(LayerState::Done { revision }) => {
                tracing::debug!(layer = %key, revision, "the layer service is done");
                return Ok(());
            }
            Ok(LayerState::Publishing) => {
                patient_until = Instant::now() + GRACE;
                None
            }
            Ok(LayerState::Unknown { reason }) => Some(PublishingError::Unknown {
                key: key.clone(),
                reason: reason.unwrap_or_else(|| "it does not know it".to_owned()),
                url: config.status_url.to_string(),
            }),
            Err(error) => Some(error.into()),
        };
        let now = Instant::now();
        match failure {
            Some(failure) if now >= patient_until || now >= until => return Err(failure),
            None if now >= until => return Err(late()),
            _ => {}
        }
        report.waiting("published");
        thread::sleep(QUESTION_PAUSE);
    }
}

/// A mount may follow the repository through caches, or from a replica.
fn wait_until_seen(
    repositories: &Repositories,
    location: &Location,
    until: Instant,
    report: &mut Report<'_>,
) -> Result<(), PublishingError> {
    let holder = format!("commit of {}", location.path);
    loop {
        let found = repositories.acquire(&holder, &[location]);
        repositories.release(&holder);
        match found {
            Ok(_) => return Ok(()),
            Err(error @ RepositoryError::LayerMissing { .. }) if Instant::now() >= until => {
                return Err(PublishingError::NotSeen(error));
            }
            Err(RepositoryError::LayerMissing { .. }) => {}
            Err(error) => return Err(PublishingError::NotSeen(error)),
        }
        report.waiting("seen here");
        thread::sleep(LOOK_PAUSE);
    }
}

/// Tells every now and then that a commit waits.
struct Report<'a> {
    key: &'a LayerKey,
    since: Instant,
    last: Instant,
}

impl Report<'_> {
    fn new(key: &LayerKey) -> Report<'_> {
        Report { key, since: Instant::now(), last: Instant::now() }
    }

    fn waiting(&mut self, what: &str) {
        if self.last.elapsed() >= REPORT {
            self.last = Instant::now();
            let waited_s = self.since.elapsed().as_secs();
            tracing::info!(layer = %self.key, waited_s, "commit waits until the layer is {what}");
        }
    }
}
