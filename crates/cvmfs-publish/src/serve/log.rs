//! The access log: one JSON line for each request, written by its own thread.
//!
//! The thread writes what has gathered and rests a moment, so that requests do not wake it one by one.

use std::borrow::Cow;
use std::io::Write;
use std::net::SocketAddr;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use hyper::header::{HeaderName, RANGE, USER_AGENT};
use hyper::{Request, Response};
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Lines that may wait for a slow reader before new ones are dropped.
const MAX_WAITING: usize = 4096;
/// How long lines gather.
const REST: Duration = Duration::from_millis(10);
/// Longest part of a header or path that is logged.
const MAX_FIELD: usize = 1024;

#[derive(Debug)]
pub(super) struct AccessLog {
    lines: SyncSender<String>,
}

impl AccessLog {
    pub(super) fn start(mut out: impl Write + Send + 'static) -> AccessLog {
        let (lines, waiting) = sync_channel::<String>(MAX_WAITING);
        std::thread::spawn(move || {
            while let Ok(first) = waiting.recv() {
                let gathered = std::iter::once(first).chain(waiting.try_iter().take(MAX_WAITING));
                let text: String = gathered.flat_map(|line| [line, "\n".to_owned()]).collect();
                // a closed log must not stop the server
                if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() {
                    return;
                }
                std::thread::sleep(REST);
            }
        });
        AccessLog { lines }
    }

    pub(super) fn record<B, C>(
        &self,
        request: &Request<B>,
        response: &Response<C>,
        sent: u64,
        peer: SocketAddr,
        took: Duration,
    ) {
        let header = |name: HeaderName| {
            request.headers().get(name).map(|value| String::from_utf8_lossy(clipped(value.as_bytes())))
        };
        let line = Line {
            time: OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default(),
            peer,
            method: request.method().as_str(),
            path: String::from_utf8_lossy(clipped(request.uri().path().as_bytes())),
            status: response.status().as_u16(),
            bytes: sent,
            range: header(RANGE),
            seconds: took.as_secs_f64(),
            agent: header(USER_AGENT),
        };
        if let Ok(line) = serde_json::to_string(&line) {
            let _ = self.lines.try_send(line);
        }
    }
}

#[derive(Serialize)]
struct Line<'a> {
    time: String,
    peer: SocketAddr,
    method: &'a str,
    path: Cow<'a, str>,
    status: u16,
    bytes: u64,
    range: Option<Cow<'a, str>>,
    seconds: f64,
    agent: Option<Cow<'a, str>>,
}

fn clipped(bytes: &[u8]) -> &[u8] {
    bytes.get(..MAX_FIELD).unwrap_or(bytes)
}
