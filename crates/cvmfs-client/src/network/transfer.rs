//! One attempt: one request on one route, its body streamed into a sink.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Empty;
use hyper::body::{Body as _, Incoming};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Response, StatusCode};

use super::connection::{Connection, Connector, Destination, Pool};
use super::failure::Cause;
use super::request::Request;
use super::routes::Route;
use crate::url::{Scheme, Url};

/// Most redirects that are followed (client behaviour §2.3).
const MAX_REDIRECTS: usize = 4;
/// Bytes of a local file that are read at once.
const LOCAL_PIECE: usize = 64 * 1024;
/// Longest `Retry-After` that is understood; the policy bounds it further.
const MAX_RETRY_AFTER: u32 = 24 * 3600;

/// Where the body of a response goes, in pieces and in order.
///
/// The pieces are checked as they arrive; nothing may leave the sink before [`Sink::finish`] said that they are
/// whole and right.
pub trait Sink: Send {
    /// The body begins (again, after a failed attempt): forget everything so far.
    ///
    /// # Errors
    /// See [`SinkError`].
    fn begin(&mut self) -> Result<(), SinkError>;
    /// The next piece.
    ///
    /// # Errors
    /// See [`SinkError`].
    fn write(&mut self, piece: &[u8]) -> Result<(), SinkError>;
    /// The body is complete; is it the right one?
    ///
    /// # Errors
    /// See [`SinkError`].
    fn finish(&mut self) -> Result<(), SinkError>;
}

/// Why a sink does not take the body.
#[derive(Debug)]
pub enum SinkError {
    /// The bytes are wrong: another copy may be right.
    Corrupt(String),
    /// They cannot be stored: there is no room.
    NoSpace(String),
    /// They cannot be stored: no other copy will help.
    Local(io::Error),
}

/// Why an attempt ended without a good body.
pub(super) enum AttemptError {
    Failed {
        cause: Cause,
        /// What the server asks to wait before the next attempt.
        retry_after: Option<Duration>,
        /// Whether the connection had served before.
        reused: bool,
    },
    NoSpace(String),
    Local(io::Error),
}

impl From<Cause> for AttemptError {
    fn from(cause: Cause) -> Self {
        Self::Failed { cause, retry_after: None, reused: false }
    }
}

impl From<SinkError> for AttemptError {
    fn from(error: SinkError) -> Self {
        match error {
            SinkError::Corrupt(reason) => Cause::Corrupt(reason).into(),
            SinkError::NoSpace(reason) => Self::NoSpace(reason),
            SinkError::Local(error) => Self::Local(error),
        }
    }
}

/// What all attempts of a fetcher share.
#[derive(Debug)]
pub(super) struct Transport {
    pub(super) connector: Connector,
    pub(super) pool: Arc<Pool>,
    pub(super) user_agent: HeaderValue,
    pub(super) follow_redirects: bool,
    pub(super) send_info: bool,
    pub(super) tracing: bool,
    pub(super) headers: Vec<(HeaderName, HeaderValue)>,
}

/// The parameters of one attempt.
pub(super) struct Attempt<'a> {
    pub(super) transport: &'a Transport,
    pub(super) route: &'a Route,
    pub(super) request: &'a Request,
    /// Ask caches on the way for a fresh copy.
    pub(super) no_cache: bool,
    /// Do not use a connection that has served before.
    pub(super) fresh: bool,
    /// Time for each stage of connecting, and window of the low-speed limit.
    pub(super) timeout: Duration,
    /// Time for the answer to begin.
    pub(super) patience: Duration,
    pub(super) low_speed_limit: u64,
}

/// An answer whose body is still to be read.
struct Answer {
    connection: Connection,
    destination: Destination,
    response: Response<Incoming>,
}

impl Attempt<'_> {
    /// Sends the request and feeds the body to `sink`; `received` counts its bytes.
    pub(super) async fn run(&self, sink: &mut dyn Sink, received: &mut u64) -> Result<(), AttemptError> {
        sink.begin()?;
        let host = &*self.route.host;
        if host.url.scheme == Scheme::File {
            return self.read_local(sink, received);
        }
        let mut answer = self.exchange(&host.url, self.request.encoded_path(), Some(&host.header)).await?;
        let mut redirects = 0;
        let mut from = None;
        while is_redirect(answer.response.status()) && self.transport.follow_redirects {
            redirects += 1;
            if redirects > MAX_REDIRECTS {
                return Err(Cause::Redirect(format!("more than {MAX_REDIRECTS} in a row")).into());
            }
            let base = match from {
                Some(url) => url,
                None => {
                    let mut url = host.url.clone();
                    url.path.push('/');
                    url.path.push_str(&self.request.encoded_path());
                    url
                }
            };
            let location =
                answer.response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
            let location = location.ok_or_else(|| Cause::Redirect("it leads nowhere".to_owned()))?;
            let next = match base.join(location) {
                Ok(next) if next.scheme != Scheme::File && next.credentials.is_none() => next,
                _ => return Err(Cause::Redirect("it leads to something that is not http".to_owned()).into()),
            };
            // The connection that redirected is closed: a body that nobody wants may be long.
            answer = self.exchange(&next, String::new(), None).await?;
            from = Some(next);
        }
        self.receive(answer, sink, received).await
    }

    /// Sends the request for `path` below `url` and waits for the head of the answer. `header` is the `Host` header
    /// of a configured host; without it the URL is complete, and another's.
    async fn exchange(
        &self,
        url: &Url,
        path: String,
        header: Option<&HeaderValue>,
    ) -> Result<Answer, AttemptError> {
        let transport = self.transport;
        let own = header.is_some();
        let credentials = self.request.credentials.as_deref().filter(|_| own && url.scheme == Scheme::Https);
        let name = if own { Arc::clone(&self.route.host.name) } else { Arc::from(url.host.as_str()) };
        let destination = Destination::new(&self.route.way, url, &name, credentials);
        let kept = if self.fresh {
            transport.pool.forget(&destination);
            None
        } else {
            transport.pool.take(&destination)
        };
        let mut connection = match kept {
            Some(connection) => connection,
            None => transport.connector.open(&self.route.way, url, credentials, self.timeout).await?,
        };
        let request = self.head(url, &path, header)?;
        let reused = connection.reused;
        let outcome = tokio::time::timeout(self.patience, connection.send(request)).await;
        match outcome {
            Ok(Ok(response)) => {
                self.route.way.answered();
                Ok(Answer { connection, destination, response })
            }
            Ok(Err(error)) => {
                let cause = Cause::Closed(describe(&error));
                Err(AttemptError::Failed { cause, retry_after: None, reused })
            }
            Err(_) => {
                Err(AttemptError::Failed { cause: Cause::Silent(self.patience), retry_after: None, reused })
            }
        }
    }

    fn head(
        &self,
        url: &Url,
        path: &str,
        host: Option<&HeaderValue>,
    ) -> Result<hyper::Request<Empty<Bytes>>, Cause> {
        let transport = self.transport;
        let proxy = self.route.way.as_proxy().filter(|_| url.scheme == Scheme::Http);
        let mut target = String::with_capacity(url.path.len() + path.len() + 64);
        if proxy.is_some() {
            target.push_str("http://");
            target.push_str(&url.authority());
        }
        target.push_str(&url.path);
        // A URL that is complete, such as that of a proxy configuration file, has no path below it.
        if !path.is_empty() || url.path.is_empty() {
            target.push('/');
            target.push_str(path);
        }
        let unusable = |_| Cause::Redirect("the URL is not usable".to_owned());
        let host = match host {
            Some(host) => host.clone(),
            None => HeaderValue::try_from(url.authority())
                .map_err(|_| Cause::Redirect("the URL is not usable".to_owned()))?,
        };
        let mut request = hyper::Request::new(Empty::new());
        *request.uri_mut() = hyper::Uri::from_maybe_shared(Bytes::from(target)).map_err(unusable)?;
        let headers = request.headers_mut();
        headers.reserve(8);
        headers.insert(header::HOST, host);
        headers.insert(header::USER_AGENT, transport.user_agent.clone());
        headers.insert(header::CONNECTION, HeaderValue::from_static("Keep-Alive"));
        if let Some(proxy) = proxy
            && let Some(value) = &proxy.authorization
        {
            headers.insert(header::PROXY_AUTHORIZATION, value.clone());
        }
        if self.no_cache {
            headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
            headers.insert(header::PRAGMA, HeaderValue::from_static("no-cache"));
        }
        if let Some((first, last)) = self.request.range {
            headers.insert(header::RANGE, number_header(format_args!("bytes={first}-{last}")));
        }
        if let Some(credentials) = &self.request.credentials
            && url.scheme == Scheme::Https
            && *url == self.route.host.url
            && let Some(value) = super::credentials::authorization(credentials)
        {
            headers.insert(header::AUTHORIZATION, value);
        }
        self.trace(headers);
        Ok(request)
    }

    /// Headers that tell the server what is read and by whom.
    fn trace(&self, headers: &mut HeaderMap) {
        let transport = self.transport;
        for (name, value) in &transport.headers {
            headers.insert(name.clone(), value.clone());
        }
        if transport.tracing
            && let Some(caller) = self.request.caller
        {
            headers.insert("x-cvmfs-pid", number_header(format_args!("{}", caller.pid)));
            headers.insert("x-cvmfs-gid", number_header(format_args!("{}", caller.gid)));
            headers.insert("x-cvmfs-uid", number_header(format_args!("{}", caller.uid)));
        }
        if transport.send_info
            && let Some(file) = &self.request.file
            && let Ok(value) = HeaderValue::try_from(super::request::encode(file))
        {
            headers.insert("cvmfs-info", value);
        }
    }

    async fn receive(
        &self,
        answer: Answer,
        sink: &mut dyn Sink,
        received: &mut u64,
    ) -> Result<(), AttemptError> {
        let Answer { mut connection, destination, response } = answer;
        let (head, mut body) = response.into_parts();
        let status = head.status.as_u16();
        if !head.status.is_success() {
            let proxied = !self.route.way.is_direct();
            let failed = AttemptError::Failed {
                cause: status_cause(status, &head.headers, proxied),
                retry_after: retry_after(&head.headers),
                reused: false,
            };
            // A short error page is read, so that the connection serves again.
            if body.size_hint().exact().is_some_and(|length| length <= 64 * 1024) {
                let page = async { while let Some(Ok(_)) = connection.piece(&mut body).await {} };
                if tokio::time::timeout(Duration::from_secs(1), page).await.is_ok() {
                    self.transport.pool.keep(destination, connection);
                }
            }
            return Err(failed);
        }
        if self.request.range.is_some_and(|(first, _)| status != 206 && first > 0) {
            return Err(Cause::Range(format!("HTTP status {status} instead of 206")).into());
        }
        let max = self.request.max;
        if body.size_hint().exact().is_some_and(|length| length > max) {
            return Err(self.too_large().into());
        }
        let mut window = Window::open(self.timeout, self.low_speed_limit);
        loop {
            match tokio::time::timeout_at(window.end().into(), connection.piece(&mut body)).await {
                Err(_) => window.roll()?,
                Ok(Some(Err(error))) => return Err(Cause::Cut(describe(&error)).into()),
                Ok(None) => break,
                Ok(Some(Ok(piece))) => {
                    window.count(piece.len() as u64)?;
                    *received += piece.len() as u64;
                    if *received > max {
                        return Err(self.too_large().into());
                    }
                    sink.write(&piece)?;
                }
            }
        }
        drop(body);
        self.transport.pool.keep(destination, connection);
        Ok(sink.finish()?)
    }

    /// A server that is a directory of this machine (`file://`). Reading it may block this thread for as long as its
    /// disk takes, which is what the caller would do otherwise.
    fn read_local(&self, sink: &mut dyn Sink, received: &mut u64) -> Result<(), AttemptError> {
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => Cause::Status(404),
            _ => Cause::LocalFile(error.to_string()),
        };
        let relative = Path::new(&self.request.path);
        let is_inside = relative.components().all(|part| matches!(part, std::path::Component::Normal(_)));
        if !is_inside {
            return Err(Cause::LocalFile("the path leads out of the server's directory".to_owned()).into());
        }
        let base = Path::new(&self.route.host.url.path);
        let path = if relative.as_os_str().is_empty() { base.to_owned() } else { base.join(relative) };
        let mut file = File::open(path).map_err(failed)?;
        let mut left = u64::MAX;
        if let Some((first, last)) = self.request.range {
            file.seek(SeekFrom::Start(first)).map_err(failed)?;
            left = last.saturating_sub(first).saturating_add(1);
        }
        let mut file = file.take(left);
        let mut piece = vec![0; LOCAL_PIECE];
        loop {
            let count = file.read(&mut piece).map_err(failed)?;
            if count == 0 {
                break;
            }
            *received += count as u64;
            if *received > self.request.max {
                return Err(self.too_large().into());
            }
            sink.write(piece.get(..count).unwrap_or_default())?;
        }
        Ok(sink.finish()?)
    }

    fn too_large(&self) -> Cause {
        Cause::Corrupt(format!("body is larger than the {} bytes that are possible", self.request.max))
    }
}

/// Counts bytes per time-out window. Time spent in the sink does not count against the sender: the window is only
/// examined while nothing arrives.
struct Window {
    end: Instant,
    length: Duration,
    limit: u64,
    bytes: u64,
}

impl Window {
    fn open(length: Duration, limit: u64) -> Self {
        Self { end: Instant::now() + length, length, limit, bytes: 0 }
    }

    fn end(&self) -> Instant {
        self.end
    }

    /// Bytes arrived. A window that ended while data flowed is judged here, or a steady drip would never be.
    fn count(&mut self, bytes: u64) -> Result<(), Cause> {
        self.bytes += bytes;
        let late = Instant::now().saturating_duration_since(self.end);
        if late > self.length {
            // Our own sink took the time: the sender is not to blame.
            self.restart();
        } else if !late.is_zero() {
            self.roll()?;
        }
        Ok(())
    }

    /// The window ended.
    fn roll(&mut self) -> Result<(), Cause> {
        if self.bytes < self.limit.saturating_mul(self.length.as_secs()).max(1) {
            return Err(Cause::TooSlow { limit: self.limit, window: self.length });
        }
        self.restart();
        Ok(())
    }

    fn restart(&mut self) {
        self.end = Instant::now() + self.length;
        self.bytes = 0;
    }
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307)
}

fn status_cause(status: u16, headers: &HeaderMap, proxied: bool) -> Cause {
    if matches!(status, 301 | 302 | 303 | 307) {
        return Cause::Redirect(format!("HTTP status {status} (CVMFS_FOLLOW_REDIRECTS)"));
    }
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    if !proxied {
        return Cause::Status(status);
    }
    // The proxy says itself that the error is its own.
    if let Some(reason) = text("x-squid-error") {
        return match is_about_host(reason) {
            true => Cause::Gateway { status, reason: printable(reason) },
            false => Cause::ProxyStatus(status),
        };
    }
    match text("proxy-status").and_then(|status| status.split_once("error=")) {
        Some((_, error)) => {
            let error = error.split([';', ',', ' ']).next().unwrap_or(error);
            match is_proxy_status_about_host(error) {
                true => Cause::Gateway { status, reason: printable(error) },
                false => Cause::ProxyStatus(status),
            }
        }
        None => Cause::Status(status),
    }
}

/// Errors of a Squid that say something about the host rather than about the proxy: they go away with another host.
fn is_about_host(reason: &str) -> bool {
    const ABOUT_HOST: [&str; 9] = [
        "ERR_CONNECT_FAIL",
        "ERR_SECURE_CONNECT_FAIL",
        "ERR_DNS_FAIL",
        "ERR_READ_TIMEOUT",
        "ERR_READ_ERROR",
        "ERR_WRITE_ERROR",
        "ERR_ZERO_SIZE_OBJECT",
        "ERR_INVALID_RESP",
        "ERR_GATEWAY_FAILURE",
    ];
    reason.split_whitespace().next().is_some_and(|code| ABOUT_HOST.contains(&code))
}

/// The same for the registered error types of `Proxy-Status`.
fn is_proxy_status_about_host(error: &str) -> bool {
    ["dns_", "destination_", "connection_", "tls_", "http_response_"]
        .iter()
        .any(|prefix| error.starts_with(prefix))
}

fn printable(text: &str) -> String {
    text.chars().filter(|letter| !letter.is_control()).take(100).collect()
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim().parse::<u32>().ok()?;
    Some(Duration::from_secs(seconds.min(MAX_RETRY_AFTER).into()))
}

fn number_header(text: std::fmt::Arguments<'_>) -> HeaderValue {
    HeaderValue::try_from(text.to_string()).expect("digits and ASCII letters fit into a header")
}

/// The error and its causes in one line.
fn describe(error: &hyper::Error) -> String {
    use std::error::Error;
    let mut parts: Vec<String> = vec![error.to_string()];
    let mut next: Option<&(dyn Error + 'static)> = error.source();
    while let Some(cause) = next {
        let text = cause.to_string();
        if parts.last() != Some(&text) {
            parts.push(text);
        }
        next = cause.source();
    }
    parts.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cause(status: u16, headers: &[(&'static str, &'static str)], proxied: bool) -> Cause {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, HeaderValue::from_static(value));
        }
        status_cause(status, &map, proxied)
    }

    #[test]
    fn row_13_a_proxy_that_admits_its_error_is_told_from_one_that_passes_on_the_hosts() {
        assert_eq!(cause(503, &[], true), Cause::Status(503));
        assert_eq!(cause(403, &[("x-squid-error", "ERR_ACCESS_DENIED 0")], true), Cause::ProxyStatus(403));
        assert_eq!(cause(503, &[("x-squid-error", "ERR_CANNOT_FORWARD 0")], true), Cause::ProxyStatus(503));
        assert!(matches!(
            cause(503, &[("x-squid-error", "ERR_CONNECT_FAIL 111")], true),
            Cause::Gateway { .. }
        ));
        assert!(matches!(
            cause(502, &[("proxy-status", "squid; error=destination_unavailable; details=x")], true),
            Cause::Gateway { .. }
        ));
        assert_eq!(
            cause(502, &[("proxy-status", "squid; error=proxy_internal_error")], true),
            Cause::ProxyStatus(502)
        );
        assert_eq!(cause(502, &[("proxy-status", "squid; received-status=502")], true), Cause::Status(502));
        assert_eq!(cause(503, &[("x-squid-error", "ERR_ACCESS_DENIED 0")], false), Cause::Status(503));
    }

    #[test]
    fn row_07_a_window_with_too_few_bytes_is_too_slow_however_steadily_they_drip() {
        let mut window = Window::open(Duration::from_secs(2), 1024);
        window.count(2047).unwrap();
        assert!(matches!(window.roll(), Err(Cause::TooSlow { .. })));
        window.count(1).unwrap();
        window.roll().unwrap();
        assert!(matches!(window.roll(), Err(Cause::TooSlow { .. })), "nothing at all is too slow as well");
        let mut unlimited = Window::open(Duration::from_secs(2), 0);
        assert!(unlimited.roll().is_err(), "without a limit a transfer may be slow but not stand still");
    }
}
