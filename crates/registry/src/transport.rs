//! One request to a registry, with authentication, redirects, retries and a deadline.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use reqwest::header::{AUTHORIZATION, HeaderMap, LOCATION, RETRY_AFTER};
use reqwest::{Method, Response, StatusCode, Url};
use serde::Deserialize;
use tokio::sync::watch;

use crate::auth::{Access, Authenticator};
use crate::credentials::Credentials;
use crate::error::RegistryError;
use crate::http::{Deadlines, HttpClients, authority, causes, same_origin};
use crate::reference::Reference;

/// Tries of one request: the first and three more.
const MAX_TRIES: u32 = 4;
/// Pause before the second try; doubled for each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// A registry may ask for this pause at most; what takes longer is reported.
const LONGEST_PAUSE: Duration = Duration::from_secs(20);
/// Storage behind a registry is one or two redirects away.
const MAX_REDIRECTS: u32 = 5;
/// A fresh token may be refused once more, when another request raced for it.
const MAX_CHALLENGES: u32 = 2;
/// An error document of a registry; only its beginning is shown.
const MAX_ERROR_BYTES: usize = 64 << 10;

/// Sends requests and can be told to stop.
#[derive(Debug)]
pub(crate) struct Transport {
    shared: Arc<Shared>,
    /// One for each client that this one was branched off, its own last.
    cancelled: Vec<watch::Sender<bool>>,
}

/// Connections and tokens, shared by all branches of a client.
#[derive(Debug)]
struct Shared {
    http: HttpClients,
    deadlines: Deadlines,
    authenticator: Authenticator,
}

/// A request that can be sent again.
#[derive(Debug, Clone)]
pub(crate) struct Call<'a> {
    pub(crate) method: Method,
    pub(crate) url: Url,
    pub(crate) reference: &'a Reference,
    pub(crate) access: Access,
    /// Whether the user's credentials may be used at all: not for URLs that an image names.
    pub(crate) is_anonymous: bool,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Body,
    /// What is asked for, for messages.
    pub(crate) object: &'a str,
    /// For all tries together.
    pub(crate) deadline: Duration,
}

/// Where the bytes of an upload come from.
#[derive(Debug, Clone)]
pub enum Body {
    /// No body.
    Empty,
    /// Bytes in memory.
    Bytes(Bytes),
    /// A file and its size.
    File(PathBuf, u64),
}

impl Body {
    /// How many bytes will be sent.
    pub fn length(&self) -> u64 {
        match self {
            Self::Empty => 0,
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File(_, size) => *size,
        }
    }
}

impl Transport {
    pub(crate) fn new(http: HttpClients, deadlines: Deadlines, credentials: Credentials) -> Self {
        let authenticator = Authenticator::new(credentials);
        Self {
            shared: Arc::new(Shared { http, deadlines, authenticator }),
            cancelled: vec![watch::Sender::new(false)],
        }
    }

    /// A transport that can be cancelled alone, and is cancelled with this one.
    pub(crate) fn branch(&self) -> Self {
        let mut cancelled = self.cancelled.clone();
        cancelled.push(watch::Sender::new(false));
        Self { shared: self.shared.clone(), cancelled }
    }

    pub(crate) fn deadlines(&self) -> &Deadlines {
        &self.shared.deadlines
    }

    /// Makes all waits end with [`RegistryError::Cancelled`].
    pub(crate) fn cancel(&self) {
        if let Some(own) = self.cancelled.last() {
            own.send_replace(true);
        }
    }

    /// Whether [`cancel`](Self::cancel) was called here or on what this was branched off.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.iter().any(|sender| *sender.borrow())
    }

    /// Returns once [`cancel`](Self::cancel) was called here or on what this was branched off.
    pub(crate) async fn cancellation(&self) {
        let any = self.cancelled.iter().map(|sender| {
            let mut watch = sender.subscribe();
            // The sender lives as long as `self`.
            Box::pin(async move { drop(watch.wait_for(|cancelled| *cancelled).await) })
        });
        futures_util::future::select_all(any).await;
    }

    /// Sends a request until it is answered with something else than 401, 429 or 5xx.
    /// The caller judges the remaining statuses with [`refusal`].
    pub(crate) async fn send(&self, call: &Call<'_>) -> Result<Response, RegistryError> {
        let timeout = || RegistryError::Timeout {
            object: call.object.to_owned(),
            host: authority(&call.url),
            waited: call.deadline,
        };
        tokio::select! {
            // Who was cancelled sends nothing more, however fast the answer would be.
            biased;
            () = self.cancellation() => Err(RegistryError::Cancelled),
            result = tokio::time::timeout(call.deadline, self.send_with_retries(call)) => {
                result.map_err(|_| timeout())?
            }
        }
    }

    async fn send_with_retries(&self, call: &Call<'_>) -> Result<Response, RegistryError> {
        let started = Instant::now();
        let mut tries = 0;
        loop {
            tries += 1;
            let result = self.send_authenticated(call).await;
            let Some(pause) = pause_after(&result, tries) else { return result };
            let rest = call.deadline.saturating_sub(started.elapsed());
            if tries >= MAX_TRIES || pause >= rest || pause > LONGEST_PAUSE {
                return settle(call, result).await;
            }
            let host = authority(&call.url);
            let reason = match &result {
                Ok(response) => format!("answers {}", response.status()),
                Err(error) => error.to_string(),
            };
            tracing::warn!(object = call.object, host, tries, %reason, "asking again in {} ms", pause.as_millis());
            tokio::time::sleep(pause).await;
        }
    }

    async fn send_authenticated(&self, call: &Call<'_>) -> Result<Response, RegistryError> {
        let mut challenges = 0;
        loop {
            let response = self.send_following(call).await?;
            let is_ours = !call.is_anonymous && same_origin(response.url(), &call.url);
            if response.status() != StatusCode::UNAUTHORIZED || !is_ours {
                return Ok(response);
            }
            if challenges == MAX_CHALLENGES {
                return Err(denied(call, response).await);
            }
            challenges += 1;
            let headers = response.headers().clone();
            // Read to the end so that the connection can be used again.
            let _ = error_detail(response).await;
            self.shared
                .authenticator
                .answer(&self.shared.http, &call.url, call.reference, call.access, &headers, call.object)
                .await?;
        }
    }

    /// Follows redirects of reading requests. Credentials are sent to the registry only.
    async fn send_following(&self, call: &Call<'_>) -> Result<Response, RegistryError> {
        let mut url = call.url.clone();
        let mut redirects = 0;
        loop {
            let response = self.send_once(call, &url).await?;
            let reading = call.method == Method::GET || call.method == Method::HEAD;
            let target = response.headers().get(LOCATION).filter(|_| response.status().is_redirection());
            let Some(target) = target.filter(|_| reading) else { return Ok(response) };
            let misdirected = |reason: &str| RegistryError::Misdirected {
                object: call.object.to_owned(),
                host: authority(&call.url),
                reason: reason.to_owned(),
            };
            let target = target.to_str().ok().and_then(|text| url.join(text).ok());
            let Some(target) =
                target.filter(|t| matches!(t.scheme(), "http" | "https") && t.host_str().is_some())
            else {
                return Err(misdirected("redirects to something that is not a URL"));
            };
            if url.scheme() == "https" && target.scheme() == "http" {
                return Err(misdirected("redirects from https to plain http"));
            }
            redirects += 1;
            if redirects > MAX_REDIRECTS {
                return Err(misdirected("redirects in a circle"));
            }
            url = target;
        }
    }

    async fn send_once(&self, call: &Call<'_>, url: &Url) -> Result<Response, RegistryError> {
        let mut request =
            self.shared.http.to(url)?.request(call.method.clone(), url.clone()).headers(call.headers.clone());
        if !call.is_anonymous
            && same_origin(url, &call.url)
            && let Some(header) = self.shared.authenticator.header(call.reference, call.access)
        {
            request = request.header(AUTHORIZATION, header);
        }
        let (request, bytes) = match &call.body {
            Body::Empty => (request, 0),
            Body::Bytes(bytes) => (request.body(bytes.clone()), bytes.len() as u64),
            Body::File(path, size) => {
                let file = tokio::fs::File::open(path).await.map_err(|cause| RegistryError::Local {
                    object: format!("{} ({})", call.object, path.display()),
                    cause,
                })?;
                let body =
                    reqwest::Body::wrap_stream(tokio_util::io::ReaderStream::with_capacity(file, 256 << 10));
                (request.body(body).header(reqwest::header::CONTENT_LENGTH, *size), *size)
            }
        };
        // The answer to an upload comes after its last byte.
        let wait = self.shared.deadlines.idle + Deadlines::sending(bytes);
        match tokio::time::timeout(wait, request.send()).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(network(call.object, url, &error)),
            Err(_) => Err(RegistryError::Timeout {
                object: call.object.to_owned(),
                host: authority(url),
                waited: wait,
            }),
        }
    }
}

/// A failed connection as error.
pub(crate) fn network(object: &str, url: &Url, error: &reqwest::Error) -> RegistryError {
    RegistryError::Network { object: object.to_owned(), host: authority(url), cause: causes(error) }
}

/// The error that a status stands for which the caller did not expect.
pub(crate) async fn refusal(object: &str, response: Response) -> RegistryError {
    let host = authority(response.url());
    let status = response.status();
    let object = object.to_owned();
    let pause = retry_after(response.headers());
    let detail = error_detail(response).await;
    match status.as_u16() {
        404 => RegistryError::NotFound { object, host, detail },
        401 | 403 => RegistryError::Denied { object, host, reason: format!("status {status}{detail}") },
        429 => RegistryError::RateLimited { object, host, pause },
        status => RegistryError::Status { object, host, status, detail },
    }
}

/// How long to wait before the next try; `None` if the result is final.
fn pause_after(result: &Result<Response, RegistryError>, tries: u32) -> Option<Duration> {
    let backoff = FIRST_PAUSE * 2u32.saturating_pow(tries.saturating_sub(1));
    match result {
        Ok(response) if is_transient(response.status()) => {
            Some(retry_after(response.headers()).unwrap_or(backoff))
        }
        Err(RegistryError::Network { .. } | RegistryError::Timeout { .. }) => Some(backoff),
        // A token service that stumbles, or limits requests.
        Err(RegistryError::Status { status: 500..=599, .. }) => Some(backoff),
        Err(RegistryError::RateLimited { pause, .. }) => Some(pause.unwrap_or(backoff)),
        _ => None,
    }
}

fn is_transient(status: StatusCode) -> bool {
    status == StatusCode::TOO_MANY_REQUESTS
        || (status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED)
}

/// The last result of a request that is not tried again.
async fn settle(call: &Call<'_>, result: Result<Response, RegistryError>) -> Result<Response, RegistryError> {
    Err(refusal(call.object, result?).await)
}

async fn denied(call: &Call<'_>, response: Response) -> RegistryError {
    let detail = error_detail(response).await;
    RegistryError::Denied {
        object: call.object.to_owned(),
        host: authority(&call.url),
        reason: format!("no such repository, or no right to it with the credentials at hand{detail}"),
    }
}

/// `Retry-After` in seconds or as a date.
pub(crate) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = time::OffsetDateTime::parse(text, &time::format_description::well_known::Rfc2822).ok()?;
    let rest = date.unix_timestamp().saturating_sub(time::OffsetDateTime::now_utc().unix_timestamp());
    Some(Duration::from_secs(u64::try_from(rest).unwrap_or(0)))
}

/// The message in a registry's error document, with a separator in front.
async fn error_detail(mut response: Response) -> String {
    let mut text = Vec::new();
    while let Ok(Some(chunk)) = response.chunk().await {
        text.extend_from_slice(&chunk);
        if text.len() > MAX_ERROR_BYTES {
            return String::new();
        }
    }
    #[derive(Deserialize)]
    struct Document {
        errors: Vec<Entry>,
    }
    #[derive(Deserialize)]
    struct Entry {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let document = serde_json::from_slice::<Document>(&text).ok();
    let Some(entry) = document.and_then(|document| document.errors.into_iter().next()) else {
        return String::new();
    };
    let shown = |text: &str| text.chars().filter(|c| !c.is_control()).take(200).collect::<String>();
    match (shown(&entry.message), shown(&entry.code)) {
        (message, code) if message.is_empty() && code.is_empty() => String::new(),
        (message, code) if message.is_empty() => format!(" ({code})"),
        (message, _) => format!(" ({message})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_read_in_both_forms() {
        let read = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, text.parse().unwrap());
            retry_after(&headers)
        };
        assert_eq!(read("7"), Some(Duration::from_secs(7)));
        assert_eq!(read("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        assert!(read("Sun, 06 Nov 2394 08:49:37 GMT").unwrap() > LONGEST_PAUSE);
        assert_eq!(read("soon"), None);
    }
}
