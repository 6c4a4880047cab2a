//! What the layer service says of a layer: its status resource (thin images §7.3).

use std::time::Duration;

use futures_util::StreamExt;
use reqwest::{Client, Response, Url};

use crate::layers::LayerKey;
use crate::network;

/// The original waits two seconds; a service may be busy listing.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Longest answer that is read; the longest real one has ten bytes.
const MAX_ANSWER: usize = 256;

/// Revision that has the layer, with [`LayerState::Done`]. The original service does not send it.
pub const REVISION_HEADER: &str = "x-cvmfs-revision";
/// Root catalog of that revision.
pub const ROOT_HASH_HEADER: &str = "x-cvmfs-root-hash";
/// Why the service does not publish a layer, with [`LayerState::Unknown`]. The original service does not send it.
pub const REASON_HEADER: &str = "x-cvmfs-reason";

/// State of a layer, as the service tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LayerState {
    /// It waits to be published, or is being published.
    Publishing,
    /// It is in the repository.
    Done {
        /// The revision, if the service tells it.
        revision: Option<u64>,
    },
    /// Neither.
    Unknown {
        /// Why, if the service tells it.
        reason: Option<String>,
    },
}

impl LayerState {
    /// The answer's body.
    pub fn as_str(&self) -> &'static str {
        match self {
            LayerState::Publishing => "publishing",
            LayerState::Done { .. } => "done",
            LayerState::Unknown { .. } => "unknown",
        }
    }
}

/// A service that cannot be asked.
#[derive(Debug, thiserror::Error)]
#[error("the layer service at {url} {reason}")]
pub struct ServiceError {
    url: String,
    reason: String,
}

/// Asks a layer service.
#[derive(Debug, Clone)]
pub struct ServiceClient {
    client: Client,
    url: Url,
}

impl ServiceClient {
    /// For the service whose status resource is `url`; nothing is sent yet.
    ///
    /// # Errors
    /// If no HTTP client can be made.
    pub fn new(url: &Url) -> Result<ServiceClient, ServiceError> {
        let failed = |error: std::io::Error| ServiceError { url: url.to_string(), reason: error.to_string() };
        Ok(ServiceClient { client: network::http_client().map_err(failed)?, url: url.clone() })
    }

    /// Asks for the state of a layer, for at most ten seconds.
    ///
    /// # Errors
    /// If the service does not answer, or with something else than a state.
    pub fn state(&self, key: &LayerKey) -> Result<LayerState, ServiceError> {
        let url = format!("{}/{key}", self.url.as_str().trim_end_matches('/'));
        let failed = |reason: String| ServiceError { url: self.url.to_string(), reason };
        let request = self.client.get(&url).timeout(TIMEOUT);
        let answered = network::wait(async move {
            let answer = request.send().await?;
            let (revision, reason) = (header(&answer, REVISION_HEADER), header(&answer, REASON_HEADER));
            let status = answer.status();
            let mut body = Vec::new();
            let mut pieces = answer.bytes_stream();
            while let Some(piece) = pieces.next().await {
                body.extend_from_slice(&piece?);
                if body.len() > MAX_ANSWER {
                    break;
                }
            }
            Ok::<_, reqwest::Error>((status, body, revision, reason))
        });
        let (status, body, revision, reason) = answered
            .map_err(|error| failed(format!("cannot be asked: {error}")))?
            .map_err(|error| failed(format!("does not answer: {}", chain(&error.without_url()))))?;
        if !status.is_success() {
            return Err(failed(format!("answers {status}")));
        }
        match body.trim_ascii() {
            b"publishing" => Ok(LayerState::Publishing),
            b"done" => Ok(LayerState::Done { revision: revision.and_then(|text| text.parse().ok()) }),
            b"unknown" => Ok(LayerState::Unknown { reason }),
            _ => Err(failed("answers with something else than the state of a layer".to_owned())),
        }
    }
}

/// A header that can be shown: printable, and not long.
fn header(answer: &Response, name: &str) -> Option<String> {
    let text = answer.headers().get(name)?.to_str().ok()?;
    Some(text.chars().filter(|c| !c.is_control()).take(MAX_ANSWER).collect())
}

/// An error with its causes: reqwest's own message is only "error sending request".
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    text
}
