//! Fetching files from the servers of a repository: hosts, proxies, fail-over (client behaviour §5, §6).
//!
//! A [`Fetcher`] owns a small asynchronous runtime and offers blocking calls to the threads of the client. It
//! streams bodies into a [`Sink`] in bounded memory and tries the configured ways in order: another proxy when the
//! proxy is to blame, another host when the host is, past caches when the body is damaged.
//!
//! | module | what |
//! |---|---|
//! | [`way`] | hosts, and the ways to them: addresses of proxies, `DIRECT` |
//! | [`routes`], [`shard`] | which host and way the next request takes; what is known against them |
//! | [`journey`], [`failure`] | where a request goes after an attempt failed; whom a failure blames |
//! | [`transfer`], [`connection`], [`wire`], [`tls`] | one attempt |
//! | [`local`] | a runtime for each thread that waits |
//! | [`preparation`], [`roster`], [`names`], [`discovery`], [`pac`], [`geo`] | proxies and hosts before the first request, and when names change |
//! | [`control`] | what an administrator asks and changes while mounted |
//!
//! Invariants:
//! * every wait ends with the caller's deadline or interrupt, and every attempt has time-outs of its own;
//! * at most [`MAX_CONNECTIONS`] requests are under way;
//! * `DIRECT` is used only where it is listed, and never while a proxy lives;
//! * a failed attempt is judged by what was asked of whom, and the verdict is shared by all requests.

mod connection;
mod control;
mod credentials;
mod discovery;
mod failure;
#[doc(hidden)]
pub mod fuzzing;
mod geo;
mod journey;
mod local;
mod names;
mod pac;
mod preparation;
mod request;
mod roster;
mod routes;
mod shard;
mod tls;
mod transfer;
mod way;
mod wire;

use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use hyper::header::{HeaderName, HeaderValue};
use serde::Serialize;
use tokio::runtime::{Handle, Runtime};
use tokio::sync::Semaphore;

pub use control::{HostInfo, InvalidList, ProxyEntry, ProxyInfo, ProxyState};
pub use failure::{Cause, FetchError, Place};
pub use request::{OnBehalf, Request};
pub use transfer::{Sink, SinkError};

use crate::config::{ClientSettings, NetworkSettings};
use crate::deadline::{Deadline, Leave, Patience};
use connection::{Connector, Pool};
use journey::{Failure, Journey, Policy, Step};
use names::Names;
use preparation::Preparation;
use roster::Roster;
use routes::{Route, Routes};
use tls::Tls;
use transfer::{Attempt, AttemptError, Transport};
use way::Host;

/// Requests under way at once, as in the C++ client: enough to fill a link, few enough to be fair to a proxy.
const MAX_CONNECTIONS: usize = 16;
/// Threads of the common runtime, which does what nobody waits for: readahead, names, idle connections.
const RUNTIME_THREADS: usize = 2;

/// Why a fetcher cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum FetcherError {
    /// The URL of a proxy is not usable.
    #[error("proxy {proxy} is not usable: {reason}")]
    Proxy {
        /// The proxy without credentials.
        proxy: String,
        /// Why.
        reason: &'static str,
    },
    /// The URL of a host is not usable.
    #[error("server {host} is not usable: {reason}")]
    Host {
        /// Its URL.
        host: String,
        /// Why.
        reason: &'static str,
    },
    /// No threads for the runtime.
    #[error("cannot start the network threads: {0}")]
    Runtime(std::io::Error),
}

/// Counters since the start. All only grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct NetworkCounters {
    /// Requests sent.
    pub requests: u64,
    /// Requests sent without a proxy although proxies are configured: traffic that leaves the site unproxied.
    pub past_proxies: u64,
    /// Bytes of bodies received.
    pub bytes: u64,
    /// Attempts that failed.
    pub errors: u64,
    /// Changes of proxy or host.
    pub fail_overs: u64,
    /// Times that a proxy was found too slow.
    pub slow_proxies: u64,
    /// Requests repeated because a kept connection had been closed.
    pub stale_connections: u64,
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
    settings: NetworkSettings,
    names: Arc<Names>,
    routes: Routes,
    preparation: Preparation,
    transport: Transport,
    permits: Semaphore,
    policy: RwLock<Policy>,
    count: Counts,
    last: Mutex<(bool, Option<String>)>,
}

#[derive(Debug, Default)]
struct Counts {
    requests: AtomicU64,
    past_proxies: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    fail_overs: AtomicU64,
    slow_proxies: AtomicU64,
    stale_connections: AtomicU64,
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Fetcher {
    /// A fetcher for the hosts and proxies of the repository.
    ///
    /// Nothing is asked of the network yet: names are resolved, proxies discovered and hosts sorted when the first
    /// request comes.
    ///
    /// # Errors
    /// A URL that is not usable, or no threads.
    pub fn new(settings: &ClientSettings) -> Result<Self, FetcherError> {
        Self::with(&settings.network)
    }

    /// A fetcher for external files, if they have hosts of their own.
    ///
    /// # Errors
    /// As [`Fetcher::new`].
    pub fn external(settings: &ClientSettings) -> Result<Option<Self>, FetcherError> {
        settings.external.as_ref().map(Self::with).transpose()
    }

    fn with(settings: &NetworkSettings) -> Result<Self, FetcherError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(RUNTIME_THREADS)
            .thread_name("cvmfs-net")
            .enable_all()
            .build()
            .map_err(FetcherError::Runtime)?;
        let handle = runtime.handle().clone();
        let names = Arc::new(Names::new(settings.dns.clone(), handle.clone()));
        let roster = Roster::unresolved(&settings.proxies)
            .map_err(|(proxy, reason)| FetcherError::Proxy { proxy, reason })?;
        let preparation = Preparation::new(settings, &roster);
        let routes = Routes::new(
            hosts(&settings.servers)?,
            roster.groups,
            roster.first_fallback,
            settings.shard_proxies,
            settings.proxy_reset_after,
            settings.host_reset_after,
        );
        Ok(Self(Arc::new(Shared {
            names: Arc::clone(&names),
            routes,
            preparation,
            transport: Transport {
                connector: Connector { names, tls: Tls::new(settings.tls.clone()) },
                pool: Pool::new(MAX_CONNECTIONS, handle),
                user_agent: user_agent(settings.uuid.as_deref()),
                follow_redirects: settings.follow_redirects,
                send_info: settings.send_info_header,
                tracing: settings.tracing,
                headers: if settings.tracing { tracing_headers(settings) } else { Vec::new() },
            },
            permits: Semaphore::new(MAX_CONNECTIONS),
            policy: RwLock::new(Policy {
                timeout: settings.timeout,
                timeout_direct: settings.timeout_direct,
                low_speed_limit: settings.low_speed_limit,
                max_retries: settings.max_retries,
                backoff_init: settings.backoff_init,
                backoff_max: settings.backoff_max,
                indefinitely: settings.fail_over_indefinitely,
            }),
            count: Counts::default(),
            last: Mutex::new((true, None)),
            settings: settings.clone(),
            runtime: Some(runtime),
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
        let now = Instant::now();
        let Some(route) = self.0.routes.current(0, now) else { return };
        if self.0.routes.host_failed(&route.host, now) {
            self.0.count.fail_overs.fetch_add(1, Ordering::Relaxed);
            let next = self.current_place();
            tracing::warn!(
                decision = "fail-over",
                host = route.host.base,
                next_host = next.host,
                cause = reason,
                "host is left"
            );
        }
    }

    /// Number of configured hosts.
    pub fn hosts(&self) -> usize {
        self.0.routes.host_count()
    }

    /// Counters since the start.
    pub fn counters(&self) -> NetworkCounters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let count = &self.0.count;
        NetworkCounters {
            requests: read(&count.requests),
            past_proxies: read(&count.past_proxies),
            bytes: read(&count.bytes),
            errors: read(&count.errors),
            fail_overs: read(&count.fail_overs),
            slow_proxies: read(&count.slow_proxies),
            stale_connections: read(&count.stale_connections),
        }
    }

    /// Where requests go at present.
    pub fn status(&self) -> NetworkStatus {
        let (host, proxy) = match self.0.routes.current(0, Instant::now()) {
            Some(route) => (route.host.base.clone(), route.way.shown.clone()),
            None => (String::new(), String::new()),
        };
        let (online, last_error) = self.0.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        NetworkStatus { host, proxy, online, last_error }
    }

    /// The runtime of work that nobody waits for.
    pub(crate) fn runtime(&self) -> &Handle {
        self.0.handle()
    }

    /// Drives `work` on the calling thread until it is done or the caller leaves.
    pub(crate) fn wait<T>(&self, work: impl Future<Output = T>, patience: Patience<'_>) -> Result<T, Leave> {
        local::drive(self.runtime(), async {
            tokio::select! {
                biased;
                outcome = work => Ok(outcome),
                leave = patience.exhausted() => Err(leave),
            }
        })
    }

    /// Lets work go on that [`Fetcher::wait`] began on this thread and whose caller has left.
    pub(crate) fn go_on(&self, work: impl Future<Output = ()> + Send + 'static) {
        local::leave(self.runtime(), work);
    }

    /// The error of a caller who left.
    pub(crate) fn left(&self, object: &str, leave: Leave) -> FetchError {
        match leave {
            Leave::Interrupted => FetchError::Interrupted { object: object.to_owned() },
            Leave::Deadline => {
                FetchError::Deadline { object: object.to_owned(), place: self.current_place(), last: None }
            }
        }
    }

    /// The asynchronous core of [`Fetcher::fetch`].
    pub(crate) async fn transfer(
        &self,
        request: &Request,
        sink: &mut dyn Sink,
        deadline: Deadline,
    ) -> Result<(), FetchError> {
        let end = deadline.instant().into();
        let told = if self.tells_readers() { request.on_behalf() } else { None };
        let travelling = self.travel(told.as_ref().unwrap_or(request), sink);
        let mut last = LastCause::default();
        match tokio::time::timeout_at(end, travelling.run(&mut last)).await {
            Ok(outcome) => outcome,
            Err(_) => {
                let place = last.place.unwrap_or_else(|| self.current_place());
                let error = FetchError::Deadline { object: request.object.clone(), place, last: last.cause };
                self.remember(false, Some(error.to_string()));
                Err(error)
            }
        }
    }

    /// Whether servers are told who reads what, so that it is worth an [`OnBehalf`].
    pub fn tells_readers(&self) -> bool {
        self.0.transport.tracing || self.0.transport.send_info
    }

    fn travel<'a>(&'a self, request: &'a Request, sink: &'a mut dyn Sink) -> Travel<'a> {
        Travel { fetcher: self, request, sink }
    }

    fn remember(&self, online: bool, error: Option<String>) {
        let mut last = self.0.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.0 = online;
        if error.is_some() {
            last.1 = error;
        }
    }

    fn current_place(&self) -> Box<Place> {
        match self.0.routes.current(0, Instant::now()) {
            Some(route) => place(&route),
            None => Box::new(Place { host: String::new(), proxy: String::new() }),
        }
    }
}

impl Shared {
    fn handle(&self) -> &Handle {
        self.runtime.as_ref().expect("the runtime is only taken when the last clone is dropped").handle()
    }

    fn policy(&self) -> Policy {
        self.policy.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What is known when the deadline ends a request.
#[derive(Default)]
struct LastCause {
    place: Option<Box<Place>>,
    cause: Option<Cause>,
}

/// One request on its way through attempts.
struct Travel<'a> {
    fetcher: &'a Fetcher,
    request: &'a Request,
    sink: &'a mut dyn Sink,
}

impl Travel<'_> {
    async fn run(self, last: &mut LastCause) -> Result<(), FetchError> {
        let Self { fetcher, request, sink } = self;
        let shared = &fetcher.0;
        let object = &request.object;
        if let Err(reason) = preparation::ready(shared).await {
            let place = fetcher.current_place();
            return Err(FetchError::Network {
                object: object.clone(),
                place,
                cause: Cause::NoProxy(reason),
                attempts: 0,
            });
        }
        let key = if shared.settings.shard_proxies { request.shard_key() } else { 0 };
        let mut journey: Option<Journey> = None;
        loop {
            // The semaphore is never closed.
            let permit = shared.permits.acquire().await;
            let began = Instant::now();
            let journey = match &mut journey {
                Some(journey) => journey,
                // Chosen after waiting for a turn: what others found out meanwhile counts.
                None => match shared.routes.current(key, began) {
                    Some(route) => journey.insert(Journey::start(route, key)),
                    None => return Err(fetcher.left(object, Leave::Deadline)),
                },
            };
            let route = journey.route.clone();
            let policy = shared.policy();
            if let Some(rest) = route.host.rest_left(began) {
                drop(permit);
                tokio::time::sleep(rest.min(policy.backoff_max)).await;
                continue;
            }
            let outcome = fetcher.attempt(request, journey, &policy, sink).await;
            let (cause, retry_after, reused) = match outcome {
                Ok(()) => {
                    journey.succeeded(&shared.routes, Instant::now());
                    fetcher.remember(true, None);
                    return Ok(());
                }
                Err(AttemptError::NoSpace(reason)) => {
                    return Err(FetchError::NoSpace { object: object.clone(), reason });
                }
                Err(AttemptError::Local(source)) => {
                    return Err(FetchError::Local { object: object.clone(), source: Arc::new(source) });
                }
                Err(AttemptError::Failed { cause, retry_after, reused }) => (cause, retry_after, reused),
            };
            let now = Instant::now();
            let failure = Failure { cause: &cause, retry_after, reused, began };
            if let (Some(pause), Cause::Status(429 | 503)) = (retry_after, &cause) {
                route.host.rest(pause.min(policy.backoff_max), now);
            }
            let was_slow = matches!(cause, Cause::TooSlow { .. }) && !route.way.is_direct();
            let step = journey.next_step(&shared.routes, &policy, &failure, now);
            // Only now: who waits for a turn is to know the verdict.
            drop(permit);
            let place = place(&route);
            tracing::debug!(object, host = place.host, proxy = place.proxy, %cause, reused, "attempt failed");
            if reused && cause.may_be_stale() {
                shared.count.stale_connections.fetch_add(1, Ordering::Relaxed);
            } else {
                shared.count.errors.fetch_add(1, Ordering::Relaxed);
                shared.count.slow_proxies.fetch_add(u64::from(was_slow), Ordering::Relaxed);
            }
            let pause = match step {
                Step::Again(pause) => pause,
                Step::GiveUp
                    if policy.indefinitely
                        && !matches!(cause, Cause::Corrupt(_) | Cause::Status(404 | 410)) =>
                {
                    journey.start_again(&shared.routes, &policy, now)
                }
                Step::GiveUp => {
                    let error = journey.failure(object, place, cause);
                    // A server that says that it has no such file is reached.
                    let online = matches!(error, FetchError::NotFound { .. });
                    fetcher.remember(online, Some(error.to_string()));
                    return Err(error);
                }
            };
            if journey.route.host.id != route.host.id || journey.route.way.id != route.way.id {
                shared.count.fail_overs.fetch_add(1, Ordering::Relaxed);
                let next = self::place(&journey.route);
                tracing::warn!(
                    decision = "fail-over", object, host = place.host, proxy = place.proxy, %cause,
                    next_host = next.host, next_proxy = next.proxy, "fail-over"
                );
            }
            last.place = Some(place);
            last.cause = Some(cause);
            if !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
        }
    }
}

impl Fetcher {
    async fn attempt(
        &self,
        request: &Request,
        journey: &Journey,
        policy: &Policy,
        sink: &mut dyn Sink,
    ) -> Result<(), AttemptError> {
        let shared = &*self.0;
        let direct = journey.route.way.is_direct();
        shared.count.requests.fetch_add(1, Ordering::Relaxed);
        if direct && shared.preparation.has_proxies() {
            shared.count.past_proxies.fetch_add(1, Ordering::Relaxed);
        }
        let timeout = if direct { policy.timeout_direct } else { policy.timeout };
        let attempt = Attempt {
            transport: &shared.transport,
            route: &journey.route,
            request,
            no_cache: journey.no_cache,
            fresh: journey.fresh,
            timeout,
            patience: timeout.saturating_mul(journey.patience),
            low_speed_limit: policy.low_speed_limit,
        };
        let mut received = Received { bytes: 0, total: &shared.count.bytes };
        attempt.run(sink, &mut received.bytes).await
    }
}

fn place(route: &Route) -> Box<Place> {
    Box::new(Place { host: route.host.base.clone(), proxy: route.way.describe() })
}

fn hosts(servers: &[String]) -> Result<Vec<Arc<Host>>, FetcherError> {
    servers
        .iter()
        .map(|base| {
            Host::new(base).map(Arc::new).map_err(|reason| FetcherError::Host { host: base.clone(), reason })
        })
        .collect()
}

/// The C++ client's form, by which servers and proxies recognise CernVM-FS (client behaviour §5.1).
fn user_agent(uuid: Option<&str>) -> HeaderValue {
    let own = concat!("cvmfs Fuse ", env!("CARGO_PKG_VERSION"));
    let with_uuid = uuid.and_then(|uuid| HeaderValue::try_from(format!("{own} {uuid}")).ok());
    with_uuid.unwrap_or_else(|| HeaderValue::from_static(own))
}

fn tracing_headers(settings: &NetworkSettings) -> Vec<(HeaderName, HeaderValue)> {
    let header = |(key, value): &(String, String)| {
        let name = HeaderName::try_from(format!("x-cvmfs-{}", key.to_ascii_lowercase())).ok()?;
        Some((name, HeaderValue::try_from(value.as_str()).ok()?))
    };
    settings.tracing_headers.iter().filter_map(header).collect()
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

/// The longest wait for preparations, in which nobody's time-outs add up: names, discovery, order of hosts.
const PREPARATION: Duration = Duration::from_secs(20);
