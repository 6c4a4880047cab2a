//! The least of an HTTP client: one request per connection, answer read to its end. HTTP/1.0 is spoken so
//! that a server never answers in chunks.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

/// Longest wait for a connection, and for each read and write.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Answers are small in tests; a blob that is pushed or fetched is smaller still.
const BODY_LIMIT: u64 = 1 << 30;

/// An answer.
#[derive(Debug, Clone)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// Header lines, names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

impl Response {
    /// The first header of this (lower case) name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// Sends a request to `address` (`HOST:PORT`) for `target` (path and query).
pub fn request(
    address: &str,
    method: &str,
    target: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Result<Response> {
    let socket: std::net::SocketAddr =
        address.parse().with_context(|| format!("{address} is not ADDRESS:PORT"))?;
    let mut stream =
        TcpStream::connect_timeout(&socket, TIMEOUT).with_context(|| format!("cannot reach {address}"))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    let mut head = format!("{method} {target} HTTP/1.0\r\nHost: {address}\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str(&format!("Content-Length: {}\r\n\r\n", body.len()));
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)?;
    let mut answer = Vec::new();
    stream.take(BODY_LIMIT).read_to_end(&mut answer)?;
    parse(&answer).with_context(|| format!("{method} http://{address}{target}"))
}

/// `GET`.
pub fn get(address: &str, target: &str) -> Result<Response> {
    request(address, "GET", target, &[], &[])
}

fn parse(answer: &[u8]) -> Result<Response> {
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n").context("answer without head")?;
    let head = String::from_utf8_lossy(&answer[..end]);
    let mut lines = head.split("\r\n");
    let status_line = lines.next().unwrap_or_default();
    ensure!(status_line.starts_with("HTTP/1."), "not an HTTP answer: {status_line}");
    let status =
        status_line.split(' ').nth(1).and_then(|code| code.parse().ok()).context("no status code")?;
    let headers = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    Ok(Response { status, headers, body: answer[end + 4..].to_vec() })
}
