//! Status, metrics and notifications over HTTP.
//!
//! | request | answer |
//! |---|---|
//! | `GET /` | the status page |
//! | `GET /status` | the same as JSON |
//! | `GET /metrics` | for Prometheus |
//! | `GET /healthz` | 200, or 503 if the last round did not end |
//! | `POST /webhook` | 202 when what a registry says was pushed will be looked at |

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use cvmfs_publish::http_server::Token;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};

use super::bell::Bell;
use super::notice::notices;
use super::page;
use super::records::ImageRecord;
use super::report::{History, RoundReport};
use crate::failure::ConvertError;

/// Largest notification that is read.
const MAX_NOTIFICATION: usize = 1 << 20;
/// Time for the body of a notification.
const BODY_TIME: Duration = Duration::from_secs(30);

/// What there is to say about the loop.
#[derive(Debug)]
pub(super) struct Status(Mutex<State>);

/// What there is to say about the loop at a moment.
#[derive(Debug, Clone)]
pub(super) struct State {
    pub(super) fqrn: String,
    pub(super) recipe: PathBuf,
    pub(super) phase: Phase,
    pub(super) history: History,
    pub(super) images: Arc<Vec<ImageRecord>>,
    pub(super) notifications: u64,
}

/// What the loop does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// A round runs since this Unix time.
    Running(i64),
    /// The next round begins at this Unix time.
    Waiting(i64),
}

impl Status {
    pub(super) fn new(fqrn: &str, recipe: &Path, history: History) -> Self {
        Self(Mutex::new(State {
            fqrn: fqrn.to_owned(),
            recipe: recipe.to_owned(),
            phase: Phase::Running(cvmfs_publish::system_clock()),
            history,
            images: Arc::default(),
            notifications: 0,
        }))
    }

    pub(super) fn begins(&self) {
        self.lock().phase = Phase::Running(cvmfs_publish::system_clock());
    }

    pub(super) fn waits_for(&self, interval: Duration) {
        let seconds = i64::try_from(interval.as_secs()).unwrap_or(i64::MAX);
        self.lock().phase = Phase::Waiting(cvmfs_publish::system_clock().saturating_add(seconds));
    }

    /// Adds a round; returns what is to be kept.
    pub(super) fn ended(&self, round: RoundReport) -> History {
        let mut state = self.lock();
        state.history.add(&round);
        state.history.clone()
    }

    pub(super) fn images(&self, images: Vec<ImageRecord>) {
        self.lock().images = Arc::new(images);
    }

    fn state(&self) -> State {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The server; it ends when dropped.
#[derive(Debug)]
pub(super) struct Server {
    _runtime: tokio::runtime::Runtime,
}

impl Server {
    pub(super) fn start(
        address: SocketAddr,
        status: Arc<Status>,
        bell: Bell,
        token: Option<Token>,
    ) -> Result<Self, ConvertError> {
        let failed = |cause| ConvertError::Listen { address: address.to_string(), cause };
        if token.is_none() && !address.ip().is_loopback() {
            tracing::warn!(%address, "anybody who reaches this address can make the loop look at images (--token-file)");
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("status")
            .enable_all()
            .build()
            .map_err(failed)?;
        let listener = runtime.block_on(tokio::net::TcpListener::bind(address)).map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        // Read by whoever asked for any port.
        eprintln!("docker2cvmfs: status on http://{bound}/");
        let answers = Arc::new(Answers { status, bell, token });
        runtime.spawn(cvmfs_publish::http_server::serve(listener, move |request, peer| {
            let answers = answers.clone();
            async move { answers.answer(request, peer).await }
        }));
        Ok(Self { _runtime: runtime })
    }
}

struct Answers {
    status: Arc<Status>,
    bell: Bell,
    token: Option<Token>,
}

type Answer = Response<Full<Bytes>>;

impl Answers {
    async fn answer(&self, request: Request<Incoming>, peer: SocketAddr) -> Answer {
        let is_reading = matches!(*request.method(), Method::GET | Method::HEAD);
        match request.uri().path() {
            "/" | "/index.html" if is_reading => {
                answer(StatusCode::OK, "text/html; charset=utf-8", page::html(&self.status.state()))
            }
            "/status" if is_reading => {
                answer(StatusCode::OK, "application/json", format!("{}\n", page::json(&self.status.state())))
            }
            "/metrics" if is_reading => text(StatusCode::OK, page::metrics(&self.status.state())),
            "/healthz" if is_reading => match page::trouble(&self.status.state()) {
                None => text(StatusCode::OK, "ok\n".to_owned()),
                Some(trouble) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{trouble}\n")),
            },
            "/webhook" if request.method() == Method::POST => self.notified(request, peer).await,
            "/" | "/status" | "/metrics" | "/healthz" | "/webhook" => {
                text(StatusCode::METHOD_NOT_ALLOWED, "not with this method\n".to_owned())
            }
            _ => text(
                StatusCode::NOT_FOUND,
                "there are /, /status, /metrics, /healthz and /webhook\n".to_owned(),
            ),
        }
    }

    async fn notified(&self, request: Request<Incoming>, peer: SocketAddr) -> Answer {
        if self.token.as_ref().is_some_and(|token| !token.is_stated_in(request.headers())) {
            tracing::warn!(%peer, "refused a notification without the token");
            return text(
                StatusCode::UNAUTHORIZED,
                "the token is missing or wrong (--token-file)\n".to_owned(),
            );
        }
        let body = Limited::new(request.into_body(), MAX_NOTIFICATION).collect();
        let body = match tokio::time::timeout(BODY_TIME, body).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(error)) => return text(StatusCode::BAD_REQUEST, format!("{error}\n")),
            Err(_) => {
                return text(
                    StatusCode::REQUEST_TIMEOUT,
                    "the notification did not arrive in time\n".to_owned(),
                );
            }
        };
        match notices(&body) {
            Ok(notices) => {
                tracing::info!(%peer, images = notices.len(), "notification");
                self.status.lock().notifications += 1;
                self.bell.notify(notices);
                text(StatusCode::ACCEPTED, String::new())
            }
            Err(error) => text(StatusCode::BAD_REQUEST, format!("{error}\n")),
        }
    }
}

fn text(status: StatusCode, body: String) -> Answer {
    answer(status, "text/plain; charset=utf-8", body)
}

fn answer(status: StatusCode, content_type: &'static str, body: String) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(body)));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}
