//! Fetching files from the servers of a repository: hosts, proxies, fail-over (client behaviour §5, §6).
//!
//! A [`Fetcher`] owns a small asynchronous runtime and offers blocking calls to the threads of the client. It
//! streams bodies into a [`Sink`] in bounded memory and tries the configured ways in order: another proxy when the
//! proxy is to blame, another host when the host is, past caches when the body is damaged.
//!
//! Invariants:
//! * every wait ends with the caller's deadline or interrupt, and every attempt has time-outs of its own;
//! * at most [`MAX_CONNECTIONS`] requests are under way;
//! * `DIRECT` is used only where it is listed, and never because a proxy is slow;
//! * a failed attempt is judged by what was asked of whom, and the verdict is shared by all requests.

mod client;
mod failure;
mod journey;
mod routes;
mod transfer;

use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde::Serialize;
use tokio::runtime::{Handle, Runtime};
use tokio::sync::Semaphore;

pub use failure::{Cause, FetchError, Place};
pub use transfer::{Sink, SinkError};

use crate::config::{ClientSettings, Proxy};
use crate::deadline::{Deadline, Leave, Patience};
use journey::{Journey, Policy, Step};
use routes::{Route, Routes};
use transfer::{Attempt, AttemptError};

/// Requests under way at once, as in the C++ client: enough to fill a link, few enough to be fair to a proxy.
const MAX_CONNECTIONS: usize = 16;
/// Threads of the runtime: they only move bytes between sockets and waiting threads.
const RUNTIME_THREADS: usize = 2;

/// Why a fetcher cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum FetcherError {
    /// The URL of a proxy is not usable.
    #[error("proxy {proxy} is not usable: {source}")]
    Proxy {
        /// The proxy without credentials.
        proxy: String,
        /// Why.
        source: reqwest::Error,
    },
    /// The HTTP client cannot be built.
    #[error("cannot set up the HTTP client: {0}")]
    Client(reqwest::Error),
    /// TLS cannot be set up.
    #[error("cannot set up TLS: {0}")]
    Tls(rustls::Error),
    /// No threads for the runtime.
    #[error("cannot start the network threads: {0}")]
    Runtime(std::io::Error),
}

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Request {
    /// Path below the storage root, without a leading slash.
    pub path: String,
    /// The name used in messages.
    pub object: String,
    /// Most bytes of the body.
    pub max: u64,
}

/// Counters since the start. All only grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct NetworkCounters {
    /// Requests sent.
    pub requests: u64,
    /// Bytes of bodies received.
    pub bytes: u64,
    /// Attempts that failed.
    pub errors: u64,
    /// Changes of proxy or host.
    pub fail_overs: u64,
}

/// Where requests go at present.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NetworkStatus {
    /// Base URL of the current host.
    pub host: String,
    /// Address of the current proxy, or `DIRECT`.
    pub proxy: String,
    /// Whether the last request succeeded.
    pub online: bool,
    /// The last failure, with object, host and proxy.
    pub last_error: Option<String>,
}

/// Fetches files from the servers of one repository. Clones share everything.
///
/// The blocking calls must not be made on a thread of an asynchronous runtime.
#[derive(Debug, Clone)]
pub struct Fetcher(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Always present; taken out when the last clone is dropped, which may happen on a runtime's thread.
    runtime: Option<Runtime>,
    hosts: Vec<String>,
    clients: Vec<(Proxy, reqwest::Client)>,
    routes: Routes,
    permits: Semaphore,
    policy: Policy,
    requests: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    fail_overs: AtomicU64,
    last: Mutex<(bool, Option<String>)>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Fetcher {
    /// A fetcher for the hosts and proxies of `settings`.
    ///
    /// # Errors
    /// A proxy URL that is not usable, or no threads.
    pub fn new(settings: &ClientSettings) -> Result<Self, FetcherError> {
        let tls = client::tls()?;
        let mut clients: Vec<(Proxy, reqwest::Client)> = Vec::new();
        let mut groups = Vec::new();
        for group in &settings.proxies {
            let mut members = Vec::new();
            for proxy in group {
                let known = clients.iter().position(|(other, _)| other == proxy);
                let index = match known {
                    Some(index) => index,
                    None => {
                        let client = client::build(settings, proxy, tls.clone(), MAX_CONNECTIONS)?;
                        clients.push((proxy.clone(), client));
                        clients.len() - 1
                    }
                };
                members.push(index);
            }
            groups.push(members);
        }
        let direct = clients.iter().position(|(proxy, _)| *proxy == Proxy::Direct);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(RUNTIME_THREADS)
            .thread_name("cvmfs-net")
            .enable_all()
            .build()
            .map_err(FetcherError::Runtime)?;
        Ok(Self(Arc::new(Shared {
            runtime: Some(runtime),
            routes: Routes::new(
                settings.servers.len(),
                groups,
                direct,
                settings.proxy_reset_after,
                settings.host_reset_after,
            ),
            hosts: settings.servers.clone(),
            clients,
            permits: Semaphore::new(MAX_CONNECTIONS),
            policy: Policy {
                timeout: settings.timeout,
                timeout_direct: settings.timeout_direct,
                low_speed_limit: settings.low_speed_limit,
                max_retries: settings.max_retries,
                backoff_init: settings.backoff_init,
                backoff_max: settings.backoff_max,
            },
            requests: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            fail_overs: AtomicU64::new(0),
            last: Mutex::new((true, None)),
        })))
    }

    /// Fetches a file into `sink`, on the calling thread and within `patience`.
    ///
    /// # Errors
    /// [`FetchError`], which names object, host, proxy and cause.
    pub fn fetch<'a>(
        &self,
        request: &Request,
        sink: &mut dyn Sink,
        patience: impl Into<Patience<'a>>,
    ) -> Result<(), FetchError> {
        let patience = patience.into();
        match self.wait(self.transfer(request, sink, patience.deadline), patience) {
            Ok(outcome) => outcome,
            Err(leave) => Err(self.left(&request.object, leave)),
        }
    }

    /// Fetches a small file into memory.
    ///
    /// # Errors
    /// As [`Fetcher::fetch`]; a body of more than `request.max` bytes is [`FetchError::Corrupt`].
    pub fn bytes<'a>(
        &self,
        request: &Request,
        patience: impl Into<Patience<'a>>,
    ) -> Result<Vec<u8>, FetchError> {
        let mut sink = Memory::default();
        self.fetch(request, &mut sink, patience)?;
        Ok(sink.0)
    }

    /// Leaves the current host for the next one, because what it serves was not accepted.
    pub fn reject_host(&self, reason: &str) {
        let route = self.0.routes.current(Instant::now());
        self.0.routes.host_failed(route.host, Instant::now());
        if self.0.hosts.len() > 1 {
            self.0.fail_overs.fetch_add(1, Ordering::Relaxed);
            let next = self.place(self.0.routes.current(Instant::now()));
            tracing::warn!(host = self.place(route).host, next = next.host, reason, "host is left");
        }
    }

    /// Number of configured hosts.
    pub fn hosts(&self) -> usize {
        self.0.hosts.len()
    }

    /// Counters since the start.
    pub fn counters(&self) -> NetworkCounters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        NetworkCounters {
            requests: read(&self.0.requests),
            bytes: read(&self.0.bytes),
            errors: read(&self.0.errors),
            fail_overs: read(&self.0.fail_overs),
        }
    }

    /// Where requests go at present.
    pub fn status(&self) -> NetworkStatus {
        let place = self.place(self.0.routes.current(Instant::now()));
        let (online, last_error) = self.0.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        NetworkStatus { host: place.host, proxy: place.proxy, online, last_error }
    }

    /// The runtime that continues work whose starter has left.
    pub(crate) fn runtime(&self) -> &Handle {
        self.0.runtime.as_ref().expect("the runtime is only taken when the last clone is dropped").handle()
    }

    /// Drives `work` on the calling thread until it is done or the caller leaves.
    pub(crate) fn wait<T>(&self, work: impl Future<Output = T>, patience: Patience<'_>) -> Result<T, Leave> {
        self.runtime().block_on(async {
            tokio::select! {
                biased;
                outcome = work => Ok(outcome),
                leave = patience.exhausted() => Err(leave),
            }
        })
    }

    /// The error of a caller who left.
    pub(crate) fn left(&self, object: &str, leave: Leave) -> FetchError {
        match leave {
            Leave::Interrupted => FetchError::Interrupted { object: object.to_owned() },
            Leave::Deadline => FetchError::Deadline {
                object: object.to_owned(),
                place: self.place(self.0.routes.current(Instant::now())),
                last: None,
            },
        }
    }

    /// The asynchronous core of [`Fetcher::fetch`].
    pub(crate) async fn transfer(
        &self,
        request: &Request,
        sink: &mut dyn Sink,
        deadline: Deadline,
    ) -> Result<(), FetchError> {
        let shared = &*self.0;
        let mut journey = Journey::start(&shared.routes, Instant::now());
        loop {
            let route = journey.route;
            let outcome = match tokio::time::timeout_at(
                deadline.instant().into(),
                self.attempt(request, route, journey.no_cache, sink),
            )
            .await
            {
                Ok(outcome) => outcome,
                Err(_) => return Err(self.over(&request.object, route, journey.last)),
            };
            let (cause, retry_after) = match outcome {
                Ok(()) => {
                    journey.succeeded(&shared.routes, Instant::now());
                    self.remember(true, None);
                    return Ok(());
                }
                Err(AttemptError::NoSpace(reason)) => {
                    return Err(FetchError::NoSpace { object: request.object.clone(), reason });
                }
                Err(AttemptError::Local(source)) => {
                    return Err(FetchError::Local {
                        object: request.object.clone(),
                        source: Arc::new(source),
                    });
                }
                Err(AttemptError::Failed { cause, retry_after }) => (cause, retry_after),
            };
            shared.errors.fetch_add(1, Ordering::Relaxed);
            let place = self.place(route);
            tracing::debug!(object = request.object, host = place.host, proxy = place.proxy, %cause, "attempt failed");
            match journey.next_step(&shared.routes, &shared.policy, &cause, retry_after, Instant::now()) {
                Step::GiveUp => {
                    let error = journey.failure(&request.object, place, cause);
                    self.remember(false, Some(error.to_string()));
                    return Err(error);
                }
                Step::Again(pause) => {
                    if journey.route != route {
                        shared.fail_overs.fetch_add(1, Ordering::Relaxed);
                        let next = self.place(journey.route);
                        tracing::warn!(
                            object = request.object, host = place.host, proxy = place.proxy, %cause,
                            next_host = next.host, next_proxy = next.proxy, "fail-over"
                        );
                    }
                    journey.last = Some(cause);
                    if tokio::time::timeout_at(deadline.instant().into(), tokio::time::sleep(pause))
                        .await
                        .is_err()
                    {
                        return Err(self.over(&request.object, route, journey.last));
                    }
                }
            }
        }
    }

    async fn attempt(
        &self,
        request: &Request,
        route: Route,
        no_cache: bool,
        sink: &mut dyn Sink,
    ) -> Result<(), AttemptError> {
        let shared = &*self.0;
        let (Some(host), Some((proxy, client))) =
            (shared.hosts.get(route.host), shared.clients.get(route.client))
        else {
            return Err(Cause::Connect("no server is configured".to_owned()).into());
        };
        let url = format!("{host}/{}", encode(&request.path));
        let proxied = *proxy != Proxy::Direct;
        // The semaphore is never closed.
        let _permit = shared.permits.acquire().await;
        shared.requests.fetch_add(1, Ordering::Relaxed);
        let attempt = Attempt {
            client,
            url: &url,
            no_cache,
            proxied,
            timeout: if proxied { shared.policy.timeout } else { shared.policy.timeout_direct },
            low_speed_limit: shared.policy.low_speed_limit,
            max: request.max,
        };
        let mut received = Received { bytes: 0, total: &shared.bytes };
        attempt.run(sink, &mut received.bytes).await
    }

    fn over(&self, object: &str, route: Route, last: Option<Cause>) -> FetchError {
        let error = FetchError::Deadline { object: object.to_owned(), place: self.place(route), last };
        self.remember(false, Some(error.to_string()));
        error
    }

    fn remember(&self, online: bool, error: Option<String>) {
        let mut last = self.0.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.0 = online;
        if error.is_some() {
            last.1 = error;
        }
    }

    fn place(&self, route: Route) -> Box<Place> {
        Box::new(Place {
            host: self.0.hosts.get(route.host).cloned().unwrap_or_default(),
            proxy: self.0.clients.get(route.client).map_or_else(String::new, |(proxy, _)| proxy.display()),
        })
    }
}

/// Adds the bytes of an attempt to the counter however the attempt ends.
struct Received<'a> {
    bytes: u64,
    total: &'a AtomicU64,
}

impl Drop for Received<'_> {
    fn drop(&mut self) {
        self.total.fetch_add(self.bytes, Ordering::Relaxed);
    }
}

/// A body in memory; its size is bounded by the request.
#[derive(Default)]
struct Memory(Vec<u8>);

impl Sink for Memory {
    fn begin(&mut self) -> Result<(), SinkError> {
        self.0.clear();
        Ok(())
    }

    fn write(&mut self, piece: &[u8]) -> Result<(), SinkError> {
        self.0.extend_from_slice(piece);
        Ok(())
    }

    fn finish(&mut self) -> Result<(), SinkError> {
        Ok(())
    }
}

/// Percent-encodes a path, leaving what the C++ client leaves (client behaviour §5.1).
fn encode(path: &str) -> String {
    let mut encoded = String::with_capacity(path.len());
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || b"/:.@+-_~[],".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}
