//! One attempt: one request on one route, its body streamed into a sink.

use std::error::Error;
use std::io;
use std::time::{Duration, Instant};

use reqwest::header::{self, HeaderMap};

use super::failure::Cause;

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
    },
    NoSpace(String),
    Local(io::Error),
}

impl From<Cause> for AttemptError {
    fn from(cause: Cause) -> Self {
        Self::Failed { cause, retry_after: None }
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

/// The parameters of one attempt.
pub(super) struct Attempt<'a> {
    pub(super) client: &'a reqwest::Client,
    pub(super) url: &'a str,
    /// Ask caches on the way for a fresh copy.
    pub(super) no_cache: bool,
    pub(super) proxied: bool,
    /// Time for the answer to begin, and window of the low-speed limit.
    pub(super) timeout: Duration,
    pub(super) low_speed_limit: u64,
    /// Most bytes of a body.
    pub(super) max: u64,
}

impl Attempt<'_> {
    /// Sends the request and feeds the body to `sink`; `received` counts its bytes.
    pub(super) async fn run(&self, sink: &mut dyn Sink, received: &mut u64) -> Result<(), AttemptError> {
        sink.begin()?;
        let mut request = self.client.get(self.url);
        if self.no_cache {
            request = request.header(header::CACHE_CONTROL, "no-cache").header(header::PRAGMA, "no-cache");
        }
        // The client's own connect time-out comes first, so that a connection that is not established is told from
        // an established one that stays silent.
        let patience = self.timeout + self.timeout / 2;
        let mut response = match tokio::time::timeout(patience, request.send()).await {
            Ok(answer) => answer.map_err(|error| request_cause(&error))?,
            Err(_) => return Err(Cause::Silent(patience).into()),
        };
        let status = response.status().as_u16();
        if !response.status().is_success() {
            let cause = status_cause(status, response.headers(), self.proxied);
            let retry_after = retry_after(response.headers());
            return Err(AttemptError::Failed { cause, retry_after });
        }
        if let Some(length) = response.content_length()
            && length > self.max
        {
            return Err(self.too_large().into());
        }
        let mut window = Window::open(self.timeout, self.low_speed_limit);
        loop {
            match tokio::time::timeout_at(window.end().into(), response.chunk()).await {
                Err(_) => window.roll()?,
                Ok(Err(error)) => return Err(Cause::Cut(describe(&error)).into()),
                Ok(Ok(None)) => break,
                Ok(Ok(Some(piece))) => {
                    window.count(piece.len() as u64);
                    *received += piece.len() as u64;
                    if *received > self.max {
                        return Err(self.too_large().into());
                    }
                    sink.write(&piece)?;
                }
            }
        }
        Ok(sink.finish()?)
    }

    fn too_large(&self) -> Cause {
        Cause::Corrupt(format!("body is larger than the {} bytes that are possible", self.max))
    }
}

/// Counts bytes per time-out window. Time spent in the sink does not count against the sender: the window is only
/// examined while nothing arrives.
struct Window {
    end: Instant,
    length: Duration,
    limit: u64,
    bytes: u64,
    any: bool,
}

impl Window {
    fn open(length: Duration, limit: u64) -> Self {
        Self { end: Instant::now() + length, length, limit, bytes: 0, any: false }
    }

    fn end(&self) -> Instant {
        self.end
    }

    fn count(&mut self, bytes: u64) {
        self.bytes += bytes;
        self.any = true;
        // A window that ended while data flowed is judged here, or a steady drip would never be.
        if Instant::now() >= self.end && self.is_fast_enough() {
            self.restart();
        }
    }

    /// The window ended while waiting.
    fn roll(&mut self) -> Result<(), Cause> {
        if self.bytes == 0 {
            return Err(Cause::Silent(self.length));
        }
        if !self.is_fast_enough() {
            return Err(Cause::TooSlow { limit: self.limit, window: self.length });
        }
        self.restart();
        Ok(())
    }

    fn is_fast_enough(&self) -> bool {
        self.bytes >= self.limit.saturating_mul(self.length.as_secs())
    }

    fn restart(&mut self) {
        self.end = Instant::now() + self.length;
        self.bytes = 0;
    }
}

/// The failure of a request whose answer did not begin.
fn request_cause(error: &reqwest::Error) -> Cause {
    let text = describe(error);
    if error.is_redirect() {
        return Cause::Redirect(text);
    }
    if text.contains("certificate") || text.contains("TLS") {
        return Cause::Certificate(text);
    }
    if error.is_connect() || error.is_timeout() {
        return if text.contains("dns error") { Cause::Resolve(text) } else { Cause::Connect(text) };
    }
    Cause::Closed(text)
}

fn status_cause(status: u16, headers: &HeaderMap, proxied: bool) -> Cause {
    if (300..400).contains(&status) {
        return Cause::Redirect(format!("HTTP status {status} (CVMFS_FOLLOW_REDIRECTS)"));
    }
    // The proxy says itself that the error is its own.
    let proxy_status = headers.get("proxy-status").and_then(|value| value.to_str().ok());
    let from_proxy =
        headers.contains_key("x-squid-error") || proxy_status.is_some_and(|text| text.contains("error="));
    if proxied && from_proxy { Cause::ProxyStatus(status) } else { Cause::Status(status) }
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim().parse::<u32>().ok()?;
    Some(Duration::from_secs(seconds.into()))
}

/// The error and its causes in one line, without the URL, which the caller names itself.
fn describe(error: &reqwest::Error) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut next: Option<&(dyn Error + 'static)> = error.source();
    while let Some(cause) = next {
        let text = cause.to_string();
        if parts.last() != Some(&text) {
            parts.push(text);
        }
        next = cause.source();
    }
    if parts.is_empty() { "request failed".to_owned() } else { parts.join(": ") }
}
