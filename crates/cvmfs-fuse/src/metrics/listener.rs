//! Offers metrics over HTTP on a unix socket or a loopback port.
//!
//! Several mounts may name one address, as they do when it stands in `default.local`. The first serves them all;
//! when it ends another takes its place. So an address offers every mount of this user whose configuration names it.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE as CONTENT_TYPE_HEADER, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Mutex, Semaphore, watch};

use super::{CONTENT_TYPE, MetricsAddress, render};
use crate::control::{Inspected, claim_path, inspect_all};

/// Connections at a time; a monitoring system needs one.
const MAX_CONNECTIONS: usize = 8;
/// Time for the head of a request.
const HEAD_PATIENCE: Duration = Duration::from_secs(2);
/// Time for a whole conversation, the answers of all mounts included.
const PATIENCE: Duration = Duration::from_secs(10);
/// Several scrapes within this time get the same numbers.
const FRESH: Duration = Duration::from_secs(1);
/// How often a mount looks whether the address has become free.
const TAKE_OVER: Duration = Duration::from_secs(5);

/// The listener; it ends when dropped.
#[derive(Debug)]
pub(crate) struct MetricsListener {
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl MetricsListener {
    /// Offers metrics at `address`, as soon as it is free.
    ///
    /// # Errors
    /// No thread or no runtime. An address that cannot be used is logged.
    pub(crate) fn start(address: MetricsAddress) -> io::Result<MetricsListener> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .thread_name("cvmfs-metrics-ask")
            .max_blocking_threads(1)
            .build()?;
        let (stop, stopped) = watch::channel(false);
        let thread = std::thread::Builder::new().name("cvmfs-metrics".into()).spawn(move || {
            runtime.block_on(offer(address, stopped));
            runtime.shutdown_background();
        })?;
        Ok(MetricsListener { stop, thread: Some(thread) })
    }
}

impl Drop for MetricsListener {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

async fn offer(address: MetricsAddress, mut stopped: watch::Receiver<bool>) {
    let mut told = false;
    let listener = loop {
        match listen(&address).await {
            Ok(listener) => break listener,
            Err(error) if !told => {
                told = true;
                if error.kind() == io::ErrorKind::AddrInUse {
                    tracing::info!(%address, "metrics are offered by another mount");
                } else {
                    tracing::warn!(%address, %error, "metrics cannot be offered");
                }
            }
            Err(_) => {}
        }
        tokio::select! {
            _ = stopped.wait_for(|stop| *stop) => return,
            () = tokio::time::sleep(TAKE_OVER) => {}
        }
    };
    tracing::info!(%address, "metrics are offered");
    let offered = Arc::new(Offered { address: address.to_string(), last: Mutex::new(None) });
    tokio::select! {
        _ = stopped.wait_for(|stop| *stop) => {}
        () = accept(&listener, &offered) => {}
    }
    if let MetricsAddress::Unix(path) = &address {
        let _ = std::fs::remove_file(path);
    }
}

async fn listen(address: &MetricsAddress) -> io::Result<Listener> {
    match address {
        // Like a loopback port: for everybody on this machine who reaches the directory.
        MetricsAddress::Unix(path) => UnixListener::from_std(claim_path(path, 0o666)?).map(Listener::Unix),
        MetricsAddress::Loopback(address) => TcpListener::bind(address).await.map(Listener::Tcp),
    }
}

async fn accept(listener: &Listener, offered: &Arc<Offered>) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // The semaphore is never closed.
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        let served: Result<_, io::Error> = match listener {
            Listener::Unix(listener) => listener
                .accept()
                .await
                .map(|(stream, _)| tokio::spawn(converse(stream, offered.clone(), permit))),
            Listener::Tcp(listener) => listener
                .accept()
                .await
                .map(|(stream, _)| tokio::spawn(converse(stream, offered.clone(), permit))),
        };
        if served.is_err() {
            // No descriptors are left, for the moment.
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

async fn converse(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    offered: Arc<Offered>,
    _permit: tokio::sync::OwnedSemaphorePermit,
) {
    let service = service_fn(move |request| {
        let offered = offered.clone();
        async move { Ok::<_, Infallible>(offered.answer(&request).await) }
    });
    let conversation = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_PATIENCE)
        .keep_alive(false)
        .max_buf_size(16 * 1024)
        .serve_connection(TokioIo::new(stream), service);
    let _ = tokio::time::timeout(PATIENCE, conversation).await;
}

/// What is offered, with the last text.
struct Offered {
    address: String,
    last: Mutex<Option<(Instant, Bytes)>>,
}

impl Offered {
    async fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let plain = |status: StatusCode, text: &'static str| {
            let mut response = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
            *response.status_mut() = status;
            response
        };
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        if !matches!(request.uri().path(), "/metrics" | "/") {
            return plain(StatusCode::NOT_FOUND, "the metrics are at /metrics\n");
        }
        let mut response = Response::new(Full::new(self.text().await));
        response.headers_mut().insert(CONTENT_TYPE_HEADER, HeaderValue::from_static(CONTENT_TYPE));
        response
    }

    async fn text(&self) -> Bytes {
        // Held while asking: those who come meanwhile get the same text.
        let mut last = self.last.lock().await;
        if let Some((when, text)) = last.as_ref()
            && when.elapsed() < FRESH
        {
            return text.clone();
        }
        let address = self.address.clone();
        let asked = tokio::task::spawn_blocking(move || {
            let mut mounts = inspect_all(None);
            // Who does not answer cannot say where it wants to be offered.
            mounts.retain(|mount| match mount {
                Inspected::Answered(status) => status.metrics == address,
                Inspected::Silent { .. } => true,
            });
            Bytes::from(render(&mounts))
        });
        let text = asked.await.unwrap_or_default();
        *last = Some((Instant::now(), text.clone()));
        text
    }
}
