//! One runtime for all connections, the HTTP client, and how a thread waits for an answer.

use std::io::{self, Read};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::{Buf, Bytes};
use futures_util::{Stream, StreamExt};
use tokio::runtime::Runtime;

/// A server that does not accept a connection in this time is tried again.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Silence in the middle of an answer; also how long a store may take to confirm an upload.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// Requests are waited for by the publisher's threads; the runtime only moves bytes.
const RUNTIME_THREADS: usize = 2;

/// The runtime of all connections of this process; it lives as long as the process does.
///
/// # Errors
/// If it could not be started.
pub fn runtime() -> io::Result<&'static Runtime> {
    static RUNTIME: OnceLock<Result<Runtime, String>> = OnceLock::new();
    let started = RUNTIME.get_or_init(|| {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(RUNTIME_THREADS)
            .thread_name("network")
            .enable_all()
            .build()
            .map_err(|error| error.to_string())
    });
    started.as_ref().map_err(|reason| io::Error::other(reason.clone()))
}

/// Runs a request to its end. Works on every thread, also on those of another runtime.
///
/// # Errors
/// If there is no runtime, or the request panicked.
pub fn wait<T: Send + 'static>(request: impl Future<Output = T> + Send + 'static) -> io::Result<T> {
    let (answer, answered) = mpsc::sync_channel(1);
    runtime()?.spawn(async move {
        // whoever waited may be gone
        let _ = answer.send(request.await);
    });
    answered.recv().map_err(|_| io::Error::other("the request was abandoned"))
}

/// The HTTP client: TLS with the provider named explicitly, and with the system's and the public roots, as a minimal
/// system may have no certificates.
///
/// # Errors
/// If the client cannot be built.
pub fn http_client() -> io::Result<reqwest::Client> {
    let mut roots = rustls::RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(READ_TIMEOUT)
        .retry(reqwest::retry::never())
        .tcp_nodelay(true)
        .http1_only()
        .user_agent(concat!("cvmfs-graphdriver/", env!("CARGO_PKG_VERSION")))
        .build()
        .map_err(io::Error::other)
}

/// Pieces of a body that are read ahead of its reader.
const READ_AHEAD: usize = 8;

/// A body while it is downloaded.
#[derive(Debug)]
pub struct Pieces {
    received: Receiver<io::Result<Bytes>>,
    piece: Bytes,
}

impl Pieces {
    /// Downloads `body` in the background, a little ahead of whoever reads.
    ///
    /// # Errors
    /// If there is no runtime.
    pub fn of<E>(body: impl Stream<Item = Result<Bytes, E>> + Send + 'static) -> io::Result<Pieces>
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
    {
        let body = body.map(|piece| piece.map_err(io::Error::other));
        Ok(Pieces { received: forward(body, READ_AHEAD)?, piece: Bytes::new() })
    }
}

/// Has the runtime put the items of a stream into a channel with room for `room`, until nobody listens.
pub(crate) fn forward<T: Send + 'static>(
    items: impl Stream<Item = T> + Send + 'static,
    room: usize,
) -> io::Result<Receiver<T>> {
    let (sender, received): (SyncSender<T>, _) = mpsc::sync_channel(room);
    runtime()?.spawn(async move {
        let mut items = std::pin::pin!(items);
        while let Some(item) = items.next().await {
            // a full channel must not block a thread of the runtime
            if tokio::task::block_in_place(|| sender.send(item)).is_err() {
                return;
            }
        }
    });
    Ok(received)
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.received.recv() {
                Ok(piece) => self.piece = piece?,
                Err(mpsc::RecvError) => return Ok(0),
            }
        }
        let length = self.piece.len().min(buffer.len());
        buffer[..length].copy_from_slice(&self.piece[..length]);
        self.piece.advance(length);
        Ok(length)
    }
}
