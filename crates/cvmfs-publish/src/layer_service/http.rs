//! The service's resources: event notifications, states of layers, health, metrics.
//!
//! | request | answer |
//! |---|---|
//! | `POST /` | 200 when the layers that the notification names wait to be published |
//! | `GET /status/KEY` | 200 and `publishing`, `done` or `unknown`, and nothing else |
//! | `GET /healthz` | JSON; 200, or 503 while nothing can be published |
//! | `GET /metrics` | for Prometheus |

use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bucket::event::created_layers;
use bucket::service::{REASON_HEADER, REVISION_HEADER, ROOT_HASH_HEADER};
use bucket::{LayerKey, LayerState};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};

use super::publish::Worker;
use super::queue::{Queue, Told};
use crate::http_server::Token;

/// Largest notification; a record has about 1 kB.
const MAX_NOTIFICATION: usize = 1 << 20;
/// Time for the body of a notification.
const BODY_TIME: Duration = Duration::from_secs(30);
/// Time for a look at repository and bucket.
const LOOK_TIME: Duration = Duration::from_secs(8);

/// Answers requests.
#[derive(Debug)]
pub(super) struct Answers {
    worker: Arc<Worker>,
    queue: Arc<Queue>,
    token: Option<Token>,
}

type Answer = Response<Full<Bytes>>;

impl Answers {
    pub(super) fn new(worker: Arc<Worker>, queue: Arc<Queue>, token: Option<String>) -> Answers {
        Answers { worker, queue, token: token.map(Token::new) }
    }

    pub(super) async fn answer(&self, request: Request<Incoming>, peer: SocketAddr) -> Answer {
        let path = request.uri().path().to_owned();
        let is_reading = matches!(*request.method(), Method::GET | Method::HEAD);
        match path.as_str() {
            "/" if request.method() == Method::POST => self.notified(request, peer).await,
            "/healthz" if is_reading => self.health(),
            "/metrics" if is_reading => self.metrics(),
            _ => match path.strip_prefix("/status/") {
                Some(key) if is_reading => self.status(key).await,
                Some(_) => text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n"),
                None => text(StatusCode::NOT_FOUND, "there are /status/KEY, /healthz, /metrics and POST /\n"),
            },
        }
    }

    /// Stores send a notification again when it was refused.
    async fn notified(&self, request: Request<Incoming>, peer: SocketAddr) -> Answer {
        if self.token.as_ref().is_some_and(|token| !token.is_stated_in(request.headers())) {
            tracing::warn!(%peer, "refused a notification without the token");
            return text(StatusCode::UNAUTHORIZED, "the token is missing or wrong (--token-file)\n");
        }
        self.queue.count(|counts| counts.notifications += 1);
        let body = Limited::new(request.into_body(), MAX_NOTIFICATION).collect();
        let body = match tokio::time::timeout(BODY_TIME, body).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(error)) => return text(StatusCode::BAD_REQUEST, &format!("{error}\n")),
            Err(_) => return text(StatusCode::REQUEST_TIMEOUT, "the notification did not arrive in time\n"),
        };
        if body.is_empty() {
            // Stores try whether there is somebody.
            return text(StatusCode::OK, "");
        }
        match created_layers(&body) {
            Ok(keys) => {
                tracing::debug!(%peer, layers = keys.len(), "notification");
                if keys.into_iter().all(|key| self.queue.add(key)) {
                    text(StatusCode::OK, "")
                } else {
                    text(StatusCode::SERVICE_UNAVAILABLE, "too many layers wait\n")
                }
            }
            Err(error) => text(StatusCode::BAD_REQUEST, &format!("no S3 event notification: {error}\n")),
        }
    }

    /// Engines of old look at the body alone, and take everything but these three words for a failure.
    async fn status(&self, key: &str) -> Answer {
        self.queue.count(|counts| counts.questions += 1);
        let told = match key.parse::<LayerKey>() {
            Ok(key) => self.state(key).await,
            Err(error) => unknown(error.to_string()),
        };
        let mut answer = text(StatusCode::OK, told.state.as_str());
        let mut add = |name: &'static str, value: String| {
            if let Ok(value) = HeaderValue::from_str(&value) {
                answer.headers_mut().insert(name, value);
            }
        };
        match told.state {
            LayerState::Done { revision: Some(revision) } => add(REVISION_HEADER, revision.to_string()),
            LayerState::Unknown { reason: Some(reason) } => {
                add(
                    REASON_HEADER,
                    reason.chars().map(|c| if c.is_ascii_graphic() { c } else { ' ' }).collect(),
                );
            }
            _ => {}
        }
        if let Some(root_hash) = told.root_hash {
            add(ROOT_HASH_HEADER, root_hash);
        }
        answer
    }

    async fn state(&self, key: LayerKey) -> Told {
        if let Some(told) = self.queue.state(&key) {
            return told;
        }
        let worker = self.worker.clone();
        let look = tokio::task::spawn_blocking(move || worker.look_for(&key));
        match tokio::time::timeout(LOOK_TIME, look).await {
            Ok(Ok(told)) => told,
            Ok(Err(error)) => unknown(error.to_string()),
            Err(_) => unknown("repository or bucket do not answer".to_owned()),
        }
    }

    fn health(&self) -> Answer {
        let health = self.queue.health();
        let document = serde_json::json!({
            "status": if health.trouble.is_none() { "ok" } else { "failing" },
            "reason": health.trouble,
            "waiting": health.waiting,
            "oldest_waiting_s": health.oldest.as_secs(),
            "revision": health.counts.revision,
        });
        let status = if health.trouble.is_none() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        let mut answer = text(status, &format!("{document}\n"));
        answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        answer
    }

    fn metrics(&self) -> Answer {
        let health = self.queue.health();
        let counts = &health.counts;
        let mut page = String::new();
        let mut add = |name: &str, kind: &str, help: &str, value: u64| {
            let name = format!("cvmfs_layer_service_{name}");
            // Writing to a text cannot fail.
            let _ = writeln!(page, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
        };
        add("up", "gauge", "1 unless the last attempt failed", u64::from(health.trouble.is_none()));
        add("waiting", "gauge", "Layers that wait or are being published", health.waiting as u64);
        add("oldest_waiting_seconds", "gauge", "How long the first of them waits", health.oldest.as_secs());
        add("revision", "gauge", "Last revision published by the service", counts.revision);
        add("published_total", "counter", "Layers published", counts.published);
        add("published_bytes_total", "counter", "Their bytes as they lay in the bucket", counts.bytes);
        add("given_up_total", "counter", "Layers that could not be published", counts.given_up);
        add("retries_total", "counter", "Attempts that failed and are made again", counts.retries);
        add("notifications_total", "counter", "Event notifications", counts.notifications);
        add("questions_total", "counter", "Questions for the state of a layer", counts.questions);
        text(StatusCode::OK, &page)
    }
}

fn unknown(reason: String) -> Told {
    Told { state: LayerState::Unknown { reason: Some(reason) }, root_hash: None }
}

fn text(status: StatusCode, body: &str) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::copy_from_slice(body.as_bytes())));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    answer.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}
