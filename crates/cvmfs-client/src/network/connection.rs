//! Connections to hosts and proxies: opened, kept alive, used again.
//!
//! A connection is driven by whoever uses it, on that thread: there is no task per connection and no hand-over of
//! bytes between threads. An idle connection is driven by nobody; that the server has closed it is noticed when it is
//! taken out of the pool, or when the next request fails, which is then repeated on a fresh one.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::runtime::Handle;
use tokio_rustls::TlsConnector;

use super::credentials::certificate;
use super::failure::Cause;
use super::names::Names;
use super::tls::{Tls, certificate_problem};
use super::way::{ProxyWay, Way};
use super::wire::Wire;
use crate::authz::Credentials;
use crate::url::{Scheme, Url, bracketed};

/// Idle connections are closed before typical middle boxes forget them silently.
const POOL_IDLE: Duration = Duration::from_secs(20);
/// Addresses of a host that are tried for one connection.
const MAX_TRIES: usize = 4;
/// Most bytes of the answer to CONNECT.
const MAX_TUNNEL_HEAD: usize = 16 * 1024;
/// Buffer of one connection: bounds its memory and the size of an answer's head.
const MAX_BUFFER: usize = 256 * 1024;
/// Most header lines of an answer.
const MAX_HEADERS: usize = 100;

type Empties = Empty<Bytes>;
type Driver = http1::Connection<TokioIo<Stream>, Empties>;

/// What a connection leads to; two requests with the same destination can share one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Destination {
    pub(super) way: u64,
    /// Scheme, name and port of the host, unless a proxy takes requests for any of them.
    pub(super) host: Option<(Scheme, Arc<str>, u16)>,
    /// Identity of the client certificate.
    pub(super) identity: Option<u64>,
}

impl Destination {
    /// `name` is the host of `url`.
    pub(super) fn new(way: &Way, url: &Url, name: &Arc<str>, credentials: Option<&Credentials>) -> Self {
        let shared = !way.is_direct() && url.scheme == Scheme::Http;
        Self {
            way: way.id,
            host: (!shared).then(|| (url.scheme, Arc::clone(name), url.port)),
            identity: match url.scheme {
                Scheme::Https => credentials.and_then(certificate).map(|(id, _)| id),
                _ => None,
            },
        }
    }
}

/// A connection that can take a request.
pub(super) struct Connection {
    send: SendRequest<Empties>,
    driver: Pin<Box<Driver>>,
    /// The driver has nothing left to do: the connection is closed.
    ended: bool,
    /// Whether it has served before.
    pub(super) reused: bool,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "connection (reused: {}, ended: {})", self.reused, self.ended)
    }
}

impl Connection {
    /// Sends a request and returns the head of its answer.
    pub(super) async fn send(
        &mut self,
        request: Request<Empties>,
    ) -> Result<Response<Incoming>, hyper::Error> {
        let answer = self.send.send_request(request);
        let mut answer = std::pin::pin!(answer);
        let (driver, ended) = (&mut self.driver, &mut self.ended);
        poll_fn(|context| {
            drive(driver, ended, context);
            answer.as_mut().poll(context)
        })
        .await
    }

    /// The next piece of the answer's body, `None` at its end.
    pub(super) async fn piece(&mut self, body: &mut Incoming) -> Option<Result<Bytes, hyper::Error>> {
        loop {
            let (driver, ended) = (&mut self.driver, &mut self.ended);
            let frame = poll_fn(|context| {
                drive(driver, ended, context);
                hyper::body::Body::poll_frame(Pin::new(&mut *body), context)
            })
            .await;
            match frame? {
                // Trailers say nothing to this client.
                Ok(frame) => match frame.into_data() {
                    Ok(data) if data.is_empty() => {}
                    Ok(data) => return Some(Ok(data)),
                    Err(_) => {}
                },
                Err(error) => return Some(Err(error)),
            }
        }
    }

    /// Whether another request can follow, now that the body of the last answer was read.
    fn is_reusable(&mut self) -> bool {
        let mut context = Context::from_waker(std::task::Waker::noop());
        drive(&mut self.driver, &mut self.ended, &mut context);
        !self.ended && matches!(self.send.poll_ready(&mut context), Poll::Ready(Ok(())))
    }
}

/// Lets the connection make progress.
fn drive(driver: &mut Pin<Box<Driver>>, ended: &mut bool, context: &mut Context<'_>) {
    if !*ended && driver.as_mut().poll(context).is_ready() {
        // Its error, if any, is told to whoever waits for the answer.
        *ended = true;
    }
}

/// The idle connections.
#[derive(Debug)]
pub(super) struct Pool {
    idle: Mutex<Resting>,
    most: usize,
    handle: Handle,
}

#[derive(Debug, Default)]
struct Resting {
    connections: VecDeque<Idle>,
    /// Somebody will close what is idle for too long.
    is_swept: bool,
}

#[derive(Debug)]
struct Idle {
    destination: Destination,
    connection: Connection,
    since: Instant,
}

impl Pool {
    pub(super) fn new(most: usize, handle: Handle) -> Arc<Self> {
        Arc::new(Self { idle: Mutex::default(), most, handle })
    }

    /// An idle connection to `destination` that was not closed as far as one can see.
    pub(super) fn take(&self, destination: &Destination) -> Option<Connection> {
        loop {
            // The one that was used last is the least likely to have been forgotten.
            let mut idle = {
                let mut idle = self.lock();
                let is_wanted = |idle: &Idle| idle.destination == *destination;
                let index = idle.connections.iter().rposition(is_wanted)?;
                idle.connections.remove(index)?
            };
            if idle.since.elapsed() < POOL_IDLE && idle.connection.is_reusable() {
                idle.connection.reused = true;
                return Some(idle.connection);
            }
        }
    }

    /// Keeps a connection for the next request, if it can take one.
    pub(super) fn keep(self: &Arc<Self>, destination: Destination, mut connection: Connection) {
        if !connection.is_reusable() {
            return;
        }
        let mut idle = self.lock();
        if idle.connections.len() >= self.most {
            idle.connections.pop_front();
        }
        idle.connections.push_back(Idle { destination, connection, since: Instant::now() });
        let was_swept = std::mem::replace(&mut idle.is_swept, true);
        drop(idle);
        if !was_swept {
            self.handle.spawn(sweep(Arc::downgrade(self)));
        }
    }

    /// Closes all idle connections to `destination`: one of them turned out to be forgotten, so the others are.
    pub(super) fn forget(&self, destination: &Destination) {
        self.lock().connections.retain(|idle| idle.destination != *destination);
    }

    fn lock(&self) -> MutexGuard<'_, Resting> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Closes connections that were idle for too long, until none is left. There is one such task at most: one for each
/// time that the only connection comes back would be a wake-up of another thread for each request.
async fn sweep(pool: Weak<Pool>) {
    loop {
        tokio::time::sleep(POOL_IDLE / 2).await;
        let Some(pool) = pool.upgrade() else { return };
        let mut idle = pool.lock();
        idle.connections.retain(|idle| idle.since.elapsed() < POOL_IDLE);
        if idle.connections.is_empty() {
            idle.is_swept = false;
            return;
        }
    }
}

/// Opens connections.
#[derive(Debug)]
pub(super) struct Connector {
    pub(super) names: Arc<Names>,
    pub(super) tls: Tls,
}

impl Connector {
    /// A fresh connection by `way` for requests to `url`, within `timeout` for each address and stage.
    pub(super) async fn open(
        &self,
        way: &Way,
        url: &Url,
        credentials: Option<&Credentials>,
        timeout: Duration,
    ) -> Result<Connection, Cause> {
        let stream = match way.as_proxy() {
            Some(proxy) => self.through(proxy, url, timeout).await?,
            None => Stream::Plain(self.reach(url, timeout).await?),
        };
        let stream = match url.scheme {
            Scheme::Https => {
                let config = self.tls.config(credentials).map_err(Cause::Certificate)?;
                secure(stream, config, &url.host, timeout).await?
            }
            _ => stream,
        };
        let handshake = http1::Builder::new()
            .max_buf_size(MAX_BUFFER)
            .max_headers(MAX_HEADERS)
            .handshake::<_, Empties>(TokioIo::new(stream));
        // Nothing is exchanged by this, so it cannot wait.
        let (send, driver) = handshake.await.map_err(|error| Cause::Connect(error.to_string()))?;
        Ok(Connection { send, driver: Box::pin(driver), ended: false, reused: false })
    }

    /// A connection to one of the addresses of the host itself.
    async fn reach(&self, url: &Url, timeout: Duration) -> Result<Wire, Cause> {
        let addresses = match url.address() {
            Some(address) => vec![address],
            None => self.names.addresses(&url.host).await.map_err(Cause::Resolve)?,
        };
        let mut last = None;
        for address in addresses.into_iter().take(MAX_TRIES) {
            match Wire::connect(SocketAddr::new(address, url.port), timeout).await {
                Ok(wire) => return Ok(wire),
                Err(error) => last = Some((address, error)),
            }
        }
        let (address, error) = last.ok_or_else(|| Cause::Resolve(format!("{}: no address", url.host)))?;
        Err(Cause::Connect(format!("{}: {error}", SocketAddr::new(address, url.port))))
    }

    /// A connection through the proxy, with a tunnel to the host if that speaks TLS.
    async fn through(&self, proxy: &ProxyWay, url: &Url, timeout: Duration) -> Result<Stream, Cause> {
        let address = proxy
            .address
            .ok_or_else(|| Cause::ResolveProxy(format!("{} has no address at present", proxy.url.host)))?;
        let wire = Wire::connect(address, timeout)
            .await
            .map_err(|error| Cause::Connect(format!("{address}: {error}")))?;
        let mut stream = Stream::Plain(wire);
        if proxy.url.scheme == Scheme::Https {
            let config = self.tls.config(None).map_err(Cause::Certificate)?;
            // A proxy whose certificate is wrong is a proxy that cannot be used, not a host's fault.
            stream = secure(stream, config, &proxy.url.host, timeout).await.map_err(|cause| match cause {
                Cause::Certificate(reason) => Cause::Connect(reason),
                other => other,
            })?;
        }
        if url.scheme == Scheme::Https {
            match tokio::time::timeout(timeout, tunnel(&mut stream, proxy, url)).await {
                Ok(outcome) => outcome?,
                Err(_) => return Err(Cause::Silent(timeout)),
            }
        }
        Ok(stream)
    }
}

async fn secure(
    stream: Stream,
    config: Arc<rustls::ClientConfig>,
    host: &str,
    timeout: Duration,
) -> Result<Stream, Cause> {
    let name = ServerName::try_from(host.to_owned())
        .map_err(|_| Cause::Certificate(format!("{host} is no name that a certificate could have")))?;
    match tokio::time::timeout(timeout, TlsConnector::from(config).connect(name, stream)).await {
        Ok(Ok(secured)) => Ok(Stream::Boxed(Box::new(secured))),
        Ok(Err(error)) => Err(match certificate_problem(&error, host) {
            Some(problem) => Cause::Certificate(problem),
            None => Cause::Connect(format!("TLS with {host}: {error}")),
        }),
        Err(_) => Err(Cause::Silent(timeout)),
    }
}

/// Asks the proxy for a tunnel to the host.
async fn tunnel(stream: &mut Stream, proxy: &ProxyWay, url: &Url) -> Result<(), Cause> {
    let authority = format!("{}:{}", bracketed(&url.host), url.port);
    let mut request = format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n").into_bytes();
    if let Some(value) = &proxy.authorization {
        request.extend_from_slice(b"Proxy-Authorization: ");
        request.extend_from_slice(value.as_bytes());
        request.extend_from_slice(b"\r\n");
    }
    request.extend_from_slice(b"\r\n");
    let closed = |error: io::Error| Cause::Closed(error.to_string());
    stream.write_all(&request).await.map_err(closed)?;
    stream.flush().await.map_err(closed)?;
    let mut head = Vec::new();
    // Byte by byte, so that nothing that belongs to the tunnel is taken; it happens once per connection.
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() >= MAX_TUNNEL_HEAD {
            return Err(Cause::Closed("the proxy's answer to CONNECT has no end".to_owned()));
        }
        head.push(stream.read_u8().await.map_err(closed)?);
    }
    let status = head.strip_prefix(b"HTTP/1.").and_then(|rest| rest.get(2..5));
    let status =
        status.and_then(|digits| std::str::from_utf8(digits).ok()).and_then(|text| text.parse::<u16>().ok());
    match status {
        Some(200..=299) => Ok(()),
        Some(status @ 502..=504) => {
            Err(Cause::Gateway { status, reason: format!("no tunnel to {authority}") })
        }
        Some(status) => Err(Cause::ProxyStatus(status)),
        None => Err(Cause::Closed("the proxy's answer to CONNECT is no HTTP".to_owned())),
    }
}

/// A byte stream, encrypted or not.
enum Stream {
    Plain(Wire),
    Boxed(Box<dyn ByteStream>),
}

trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for T {}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Plain(wire) => Pin::new(wire).poll_read(context, buffer),
            Self::Boxed(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut *self {
            Self::Plain(wire) => Pin::new(wire).poll_write(context, bytes),
            Self::Boxed(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Plain(wire) => Pin::new(wire).poll_flush(context),
            Self::Boxed(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Plain(wire) => Pin::new(wire).poll_shutdown(context),
            Self::Boxed(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}
