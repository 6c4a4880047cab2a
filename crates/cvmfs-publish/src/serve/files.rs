//! Requests to files: path resolution, ranges, entity tags, bodies.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use bytes::Bytes;
use futures_util::TryStreamExt;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::Frame;
use hyper::header::{
    ACCEPT_RANGES, ALLOW, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, IF_NONE_MATCH,
    IF_RANGE, RANGE,
};
use hyper::{Method, Request, Response, StatusCode};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use tokio::io::AsyncReadExt;
use tokio_util::io::ReaderStream;

use crate::error::PublishError;

pub(super) type Body = BoxBody<Bytes, io::Error>;

/// Bodies up to this size are read at once; larger ones are streamed in pieces of this size.
const PIECE: usize = 256 << 10;
/// Linux takes no longer path.
const MAX_PATH: usize = 4096;

/// The directory that is served.
#[derive(Debug)]
pub(super) struct Files {
    root: OwnedFd,
}

impl Files {
    pub(super) fn open(directory: &Path) -> Result<Files, PublishError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(directory, flags, Mode::empty())
            .map_err(|error| PublishError::local("open", directory)(error.into()))?;
        Ok(Files { root })
    }

    /// The response and the length of its body.
    pub(super) async fn answer<B>(&self, request: &Request<B>) -> (Response<Body>, u64) {
        let head_only = match *request.method() {
            Method::GET => false,
            Method::HEAD => true,
            _ => {
                let mut response = status(StatusCode::METHOD_NOT_ALLOWED);
                response.headers_mut().insert(ALLOW, hyper::header::HeaderValue::from_static("GET, HEAD"));
                return (response, 0);
            }
        };
        let Some(path) = decoded(request.uri().path()) else {
            return (status(StatusCode::BAD_REQUEST), 0);
        };
        let file = match self.open_file(&path) {
            Ok(Some(file)) => file,
            Ok(None) => return (status(StatusCode::NOT_FOUND), 0),
            Err(error) => {
                tracing::warn!(path = %crate::error::shown(&path), %error, "cannot open a file");
                return (status(StatusCode::INTERNAL_SERVER_ERROR), 0);
            }
        };
        match respond(request, &path, file, head_only).await {
            Ok(response) => response,
            Err(error) => {
                tracing::warn!(path = %crate::error::shown(&path), %error, "cannot read a file");
                (status(StatusCode::INTERNAL_SERVER_ERROR), 0)
            }
        }
    }

    fn open_file(&self, path: &[u8]) -> io::Result<Option<File>> {
        let components: Vec<&[u8]> = path.split(|&b| b == b'/').collect();
        if components.windows(2).any(|pair| pair == [&b"data"[..], b"txn"])
            || components.contains(&&b".."[..])
        {
            return Ok(None);
        }
        let opened = rustix::fs::openat2(
            &self.root,
            path,
            // NONBLOCK: opening a fifo must not wait for a writer
            OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS,
        );
        use rustix::io::Errno;
        match opened {
            Ok(descriptor) => {
                let file = File::from(descriptor);
                Ok(file.metadata()?.is_file().then_some(file))
            }
            // XDEV: a link or path that leads out
            Err(
                Errno::NOENT | Errno::NOTDIR | Errno::XDEV | Errno::LOOP | Errno::NAMETOOLONG | Errno::ACCESS,
            ) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

async fn respond<B>(
    request: &Request<B>,
    path: &[u8],
    mut file: File,
    head_only: bool,
) -> io::Result<(Response<Body>, u64)> {
    let metadata = file.metadata()?;
    let size = metadata.len();
    let tag =
        format!("\"{:x}-{:x}-{:x}-{:x}\"", metadata.ino(), size, metadata.mtime(), metadata.mtime_nsec());
    let name = path.rsplit(|&b| b == b'/').next().unwrap_or_default();
    let (content_type, cache) = kind_of(name);
    let builder = Response::builder()
        .header(ETAG, &tag)
        .header(ACCEPT_RANGES, "bytes")
        .header(CACHE_CONTROL, cache)
        .header(CONTENT_TYPE, content_type);

    let header =
        |name| request.headers().get(name).and_then(|v: &hyper::header::HeaderValue| v.to_str().ok());
    if header(IF_NONE_MATCH)
        .is_some_and(|tags| tags.trim() == "*" || tags.split(',').any(|t| same_tag(t, &tag)))
    {
        return Ok((finish(builder.status(StatusCode::NOT_MODIFIED), empty()), 0));
    }
    let wanted = header(RANGE).filter(|_| header(IF_RANGE).is_none_or(|t| t.trim() == tag));
    let (code, start, length) = match wanted.map_or(Range::Whole, |range| parse_range(range, size)) {
        Range::Whole => (StatusCode::OK, 0, size),
        Range::Part { start, length } => (StatusCode::PARTIAL_CONTENT, start, length),
        Range::Unsatisfiable => {
            let builder = builder.status(StatusCode::RANGE_NOT_SATISFIABLE);
            let builder = builder.header(CONTENT_RANGE, format!("bytes */{size}"));
            return Ok((finish(builder, empty()), 0));
        }
    };
    let mut builder = builder.status(code).header(CONTENT_LENGTH, length);
    if code == StatusCode::PARTIAL_CONTENT {
        let last = start + length - 1;
        builder = builder.header(CONTENT_RANGE, format!("bytes {start}-{last}/{size}"));
    }
    if head_only {
        return Ok((finish(builder, empty()), 0));
    }
    if start > 0 {
        file.seek(SeekFrom::Start(start))?;
    }
    Ok((finish(builder, body(file, length)?), length))
}

fn body(mut file: File, length: u64) -> io::Result<Body> {
    if length <= PIECE as u64 {
        let mut bytes = vec![0; length as usize];
        file.read_exact(&mut bytes)?;
        return Ok(Full::new(Bytes::from(bytes)).map_err(|never| match never {}).boxed());
    }
    let pieces = ReaderStream::with_capacity(tokio::fs::File::from_std(file).take(length), PIECE);
    Ok(BodyExt::boxed(StreamBody::new(pieces.map_ok(Frame::data))))
}

fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed()
}

fn status(code: StatusCode) -> Response<Body> {
    finish(Response::builder().status(code).header(CONTENT_LENGTH, 0), empty())
}

fn finish(builder: hyper::http::response::Builder, body: Body) -> Response<Body> {
    builder.body(body).expect("all header values are made of printable ASCII")
}

/// Content type and cache lifetime as the C++ server tools configure them (publisher behaviour §14.1).
fn kind_of(name: &[u8]) -> (&'static str, &'static str) {
    if name.starts_with(b".cvmfs") {
        ("application/x-cvmfs", "max-age=61")
    } else if name.ends_with(b".json") {
        ("application/json", "max-age=61")
    } else {
        ("application/octet-stream", "max-age=259200")
    }
}

fn same_tag(candidate: &str, tag: &str) -> bool {
    let candidate = candidate.trim();
    candidate.strip_prefix("W/").unwrap_or(candidate) == tag
}

#[derive(Debug, PartialEq, Eq)]
enum Range {
    Whole,
    Part { start: u64, length: u64 },
    Unsatisfiable,
}

/// A single byte range (RFC 9110 §14.1.2). Several ranges, and what is not understood, mean the whole file.
fn parse_range(header: &str, size: u64) -> Range {
    let Some((first, last)) = header.trim().strip_prefix("bytes=").and_then(|r| r.split_once('-')) else {
        return Range::Whole;
    };
    let number = |text: &str| text.trim().parse::<u64>();
    match (first.trim().is_empty(), last.trim().is_empty()) {
        (true, false) => match number(last) {
            Ok(0) => Range::Unsatisfiable,
            Ok(_) if size == 0 => Range::Unsatisfiable,
            Ok(length) => Range::Part { start: size.saturating_sub(length), length: length.min(size) },
            Err(_) => Range::Whole,
        },
        (false, open) => {
            let end = if open { Ok(u64::MAX) } else { number(last) };
            match (number(first), end) {
                (Ok(start), Ok(end)) if start <= end => {
                    if start >= size {
                        return Range::Unsatisfiable;
                    }
                    Range::Part { start, length: end.min(size - 1) - start + 1 }
                }
                _ => Range::Whole,
            }
        }
        (true, true) => Range::Whole,
    }
}

/// The path of a request without its leading slash, percent sequences decoded; `None` if it is malformed.
fn decoded(path: &str) -> Option<Vec<u8>> {
    if path.len() > MAX_PATH {
        return None;
    }
    let mut bytes = path.trim_start_matches('/').bytes();
    let mut out = Vec::with_capacity(path.len());
    while let Some(byte) = bytes.next() {
        let byte = match byte {
            b'%' => {
                let digit = |b: Option<u8>| b.and_then(|b| char::from(b).to_digit(16));
                (digit(bytes.next())? * 16 + digit(bytes.next())?) as u8
            }
            other => other,
        };
        if byte == 0 {
            return None;
        }
        out.push(byte);
    }
    Some(if out.is_empty() { b".".to_vec() } else { out })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_understood_as_the_rfc_says() {
        let part = |start, length| Range::Part { start, length };
        assert_eq!(parse_range("bytes=0-0", 10), part(0, 1));
        assert_eq!(parse_range("bytes=2-", 10), part(2, 8));
        assert_eq!(parse_range("bytes=2-100", 10), part(2, 8));
        assert_eq!(parse_range("bytes=-3", 10), part(7, 3));
        assert_eq!(parse_range("bytes=-30", 10), part(0, 10));
        assert_eq!(parse_range("bytes=10-", 10), Range::Unsatisfiable);
        assert_eq!(parse_range("bytes=-0", 10), Range::Unsatisfiable);
        assert_eq!(parse_range("bytes=0-", 0), Range::Unsatisfiable);
        for whole in ["bytes=5-2", "bytes=0-1,3-4", "lines=1-2", "bytes=x-", "bytes=-"] {
            assert_eq!(parse_range(whole, 10), Range::Whole, "{whole}");
        }
    }

    #[test]
    fn percent_sequences_are_decoded_and_nul_is_refused() {
        assert_eq!(decoded("/a%20b").as_deref(), Some(&b"a b"[..]));
        assert_eq!(decoded("/%2e%2E/x").as_deref(), Some(&b"../x"[..]));
        assert_eq!(decoded("/a%00"), None);
        assert_eq!(decoded("/a%zz"), None);
        assert_eq!(decoded("/a%"), None);
    }
}
