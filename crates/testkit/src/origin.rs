//! An HTTP/1.1 origin (or proxy) on loopback that serves a directory, can misbehave on demand, and keeps a
//! record of every request.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

/// Longest head of a request that is read; ordinary ones have some hundred bytes.
const HEAD_LIMIT: u64 = 64 * 1024;
/// Longest wait for answers under way before the record is shown.
const SETTLE_LIMIT: Duration = Duration::from_millis(500);

/// What goes wrong with an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// This status code with a short text as body.
    Status(u16),
    /// The full length is announced, but the connection is closed after so many bytes of the body.
    Truncate(u64),
    /// The lowest bit of the body's byte at this offset is inverted.
    Flip(u64),
    /// The answer begins only after this time.
    Delay(Duration),
    /// The request is read and never answered; the connection stays open.
    Hang,
    /// The connection is reset (RST) instead of an answer.
    Reset,
    /// The body flows at so many bytes per second.
    Slow(u64),
    /// Other bytes instead of the file's.
    Replace(Vec<u8>),
    /// Other bytes, as from a cache that has a wrong copy: a request that asks past caches gets the file.
    Stale(Vec<u8>),
    /// The connection is reset (RST) after so many bytes of the body.
    ResetAfter(u64),
    /// As if a middle box had forgotten the connection: a second request on one is read and never answered.
    HangReused,
    /// This answer instead of the file.
    Answer {
        /// Status code.
        status: u16,
        /// Header lines.
        headers: Vec<(String, String)>,
    },
    /// The body's length is told wrongly or not at all.
    Length(Length),
    /// A body without end and without a length.
    Endless,
}

/// How the length of a body is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Length {
    /// So many bytes more than there are; the connection is closed after those that there are.
    Longer(u64),
    /// So many bytes less than are sent.
    Shorter(u64),
    /// Not at all: the connection's end is the body's.
    Absent,
    /// By chunked encoding.
    Chunked,
}

/// One request as it was answered.
#[derive(Debug, Clone)]
pub struct Request {
    /// `GET`, `HEAD`, …
    pub method: String,
    /// Path with leading slash, without query, as sent (not decoded).
    pub path: String,
    /// Header lines, names in lower case.
    pub headers: HashMap<String, String>,
    /// The request named a full URL, as clients do with a proxy.
    pub absolute: bool,
    /// The client asked for the connection to be closed: `Connection: close`, or HTTP/1.0.
    pub last: bool,
    /// The status code that was sent; 0 if none was.
    pub status: u16,
    /// Bytes of the body that were sent.
    pub sent: u64,
    /// Which connection, counted from 0.
    pub connection: u64,
    /// How many requests came before on the same connection.
    pub turn: u64,
}

/// The server; it ends when dropped.
#[derive(Debug)]
pub struct Origin {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    root: PathBuf,
    faults: Mutex<Vec<Rule>>,
    requests: Mutex<Vec<Request>>,
    /// Answers that are being sent and are not in `requests` yet; those that are held back do not count.
    answering: AtomicUsize,
    open: Mutex<HashMap<u64, TcpStream>>,
    connections: AtomicU64,
    stopping: AtomicBool,
}

#[derive(Debug)]
struct Rule {
    pattern: String,
    fault: Fault,
    left: Option<u32>,
}

impl Origin {
    /// Serves `directory` on a free port of 127.0.0.1.
    pub fn serve(directory: impl AsRef<Path>) -> Result<Self> {
        Self::serve_at(directory, SocketAddr::from(([127, 0, 0, 1], 0)))
    }

    /// Serves `directory` at this address: the way to come back after a drop.
    pub fn serve_at(directory: impl AsRef<Path>, address: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(address).with_context(|| format!("cannot listen at {address}"))?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            root: directory.as_ref().to_owned(),
            faults: Mutex::default(),
            requests: Mutex::default(),
            answering: AtomicUsize::new(0),
            open: Mutex::default(),
            connections: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
        });
        let accepting = shared.clone();
        thread::spawn(move || accepting.accept(&listener));
        Ok(Self { address, shared })
    }

    /// `http://127.0.0.1:PORT`, without a slash at the end.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on each request whose path matches gets this fault. `*` in the pattern stands for any bytes;
    /// the fault set last wins.
    pub fn set_fault(&self, pattern: &str, fault: Fault) {
        self.add_fault(pattern, fault, None);
    }

    /// As [`Origin::set_fault`], for the next `times` matching requests only.
    pub fn set_fault_times(&self, pattern: &str, fault: Fault, times: u32) {
        self.add_fault(pattern, fault, Some(times));
    }

    fn add_fault(&self, pattern: &str, fault: Fault, left: Option<u32>) {
        lock(&self.shared.faults).push(Rule { pattern: pattern.to_owned(), fault, left });
    }

    /// Behaves well again.
    pub fn clear_faults(&self) {
        lock(&self.shared.faults).clear();
    }

    /// All requests so far, in the order in which their answers ended. Each answer that a client has received
    /// wholly is among them.
    pub fn requests(&self) -> Vec<Request> {
        self.shared.settle();
        lock(&self.shared.requests).clone()
    }

    /// Forgets the requests so far.
    pub fn clear_requests(&self) {
        self.shared.settle();
        lock(&self.shared.requests).clear();
    }

    /// How many connections were accepted so far.
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// Sum of the body bytes sent so far.
    pub fn bytes_sent(&self) -> u64 {
        self.shared.settle();
        lock(&self.shared.requests).iter().map(|request| request.sent).sum()
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        // Wakes the accepting thread, which then drops the listener.
        let _ = TcpStream::connect(self.address);
        for stream in lock(&self.shared.open).values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        let deadline = Instant::now() + Duration::from_secs(2);
        while Instant::now() < deadline && TcpStream::connect(self.address).is_ok() {
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Shared {
    fn accept(self: Arc<Self>, listener: &TcpListener) {
        while let Ok((stream, _)) = listener.accept() {
            if self.stopping.load(Ordering::SeqCst) {
                return;
            }
            let number = self.connections.fetch_add(1, Ordering::SeqCst);
            let Ok(copy) = stream.try_clone() else { continue };
            lock(&self.open).insert(number, copy);
            let shared = self.clone();
            thread::spawn(move || {
                // An error here is a client that went away, which is its right.
                let _ = shared.converse(&stream, number);
                lock(&shared.open).remove(&number);
            });
        }
    }

    /// Serves one connection until either side ends it.
    fn converse(&self, stream: &TcpStream, connection: u64) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut turn = 0;
        while let Some(mut request) = read_head(&mut reader, connection)? {
            request.turn = turn;
            turn += 1;
            let fault = self.fault_for(&request.path);
            self.answering.fetch_add(1, Ordering::SeqCst);
            let keep = self.answer(stream, &mut request, fault);
            let last = request.last;
            lock(&self.requests).push(request);
            self.answering.fetch_sub(1, Ordering::SeqCst);
            if last || !keep? || self.stopping.load(Ordering::SeqCst) {
                break;
            }
        }
        Ok(())
    }

    fn fault_for(&self, path: &str) -> Option<Fault> {
        let mut faults = lock(&self.faults);
        let index = faults.iter().rposition(|rule| rule.left != Some(0) && matches(&rule.pattern, path))?;
        let rule = faults.get_mut(index)?;
        rule.left = rule.left.map(|left| left - 1);
        Some(rule.fault.clone())
    }

    /// Answers one request; `false` if the connection is to be closed.
    fn answer(&self, stream: &TcpStream, request: &mut Request, fault: Option<Fault>) -> io::Result<bool> {
        let mut replacement = None;
        match fault.clone() {
            Some(Fault::Hang) => {
                self.wait(Duration::MAX);
                return Ok(false);
            }
            Some(Fault::HangReused) if request.turn > 0 => {
                self.wait(Duration::MAX);
                return Ok(false);
            }
            Some(Fault::Reset) => return self.reset(stream, request),
            Some(Fault::Answer { status, headers }) => {
                let lines: String =
                    headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
                return self.send_answer(stream, request, status, &lines, "this fault was asked for\n");
            }
            Some(Fault::Stale(_))
                if request.headers.get("cache-control").is_some_and(|value| value.contains("no-cache")) => {}
            Some(Fault::Stale(bytes)) => replacement = Some(bytes),
            Some(Fault::Endless) => {
                request.status = 200;
                (&*stream).write_all(b"HTTP/1.1 200 -\r\n\r\n")?;
                while !self.stopping.load(Ordering::SeqCst) {
                    (&*stream).write_all(&[b'x'; 16 * 1024])?;
                    request.sent += 16 * 1024;
                }
                return Ok(false);
            }
            Some(Fault::Delay(time)) => self.wait(time),
            Some(Fault::Status(code)) => {
                return self.send_text(stream, request, code, "this fault was asked for\n");
            }
            Some(Fault::Replace(bytes)) => replacement = Some(bytes),
            _ => {}
        }
        let body = match replacement {
            Some(bytes) => Body::bytes(bytes),
            None => match self.locate(&request.path).and_then(|path| Body::file(&path).ok()) {
                Some(body) => body,
                None => return self.send_text(stream, request, 404, "no such file\n"),
            },
        };
        self.send_body(stream, request, body, fault.as_ref())
    }

    fn reset(&self, stream: &TcpStream, request: &Request) -> io::Result<bool> {
        rustix::net::sockopt::set_socket_linger(stream.as_fd(), Some(Duration::ZERO))?;
        lock(&self.open).remove(&request.connection);
        Ok(false)
    }

    fn send_text(
        &self,
        stream: &TcpStream,
        request: &mut Request,
        status: u16,
        text: &str,
    ) -> io::Result<bool> {
        self.send_answer(stream, request, status, "", text)
    }

    fn send_answer(
        &self,
        mut stream: &TcpStream,
        request: &mut Request,
        status: u16,
        lines: &str,
        text: &str,
    ) -> io::Result<bool> {
        request.status = status;
        let head = format!("HTTP/1.1 {status} -\r\n{lines}Content-Length: {}\r\n\r\n", text.len());
        stream.write_all(head.as_bytes())?;
        if request.method != "HEAD" {
            stream.write_all(text.as_bytes())?;
            request.sent = text.len() as u64;
        }
        Ok(true)
    }

    fn send_body(
        &self,
        mut stream: &TcpStream,
        request: &mut Request,
        mut body: Body,
        fault: Option<&Fault>,
    ) -> io::Result<bool> {
        let range = request.headers.get("range").and_then(|range| parse_range(range, body.size));
        let unchanged = request.headers.get("if-none-match").is_some_and(|tag| *tag == body.tag);
        let (status, start, length) = match range {
            _ if unchanged => (304, 0, 0),
            Some((start, end)) => (206, start, end - start),
            None => (200, 0, body.size),
        };
        request.status = status;
        let mut head = format!("HTTP/1.1 {status} -\r\nETag: {}\r\nAccept-Ranges: bytes\r\n", body.tag);
        if status == 206 {
            head.push_str(&format!("Content-Range: bytes {start}-{}/{}\r\n", start + length - 1, body.size));
        }
        let told = match fault {
            Some(Fault::Length(told)) => Some(*told),
            _ => None,
        };
        match told {
            _ if status == 304 => {}
            None => head.push_str(&format!("Content-Length: {length}\r\n")),
            Some(Length::Longer(more)) => head.push_str(&format!("Content-Length: {}\r\n", length + more)),
            Some(Length::Shorter(less)) => {
                head.push_str(&format!("Content-Length: {}\r\n", length.saturating_sub(less)));
            }
            Some(Length::Absent) => {}
            Some(Length::Chunked) => head.push_str("Transfer-Encoding: chunked\r\n"),
        }
        head.push_str("\r\n");
        stream.write_all(head.as_bytes())?;
        if request.method == "HEAD" || status == 304 {
            return Ok(true);
        }

        let limit = match fault {
            Some(Fault::Truncate(limit) | Fault::ResetAfter(limit)) => length.min(*limit),
            _ => length,
        };
        let rate = match fault {
            Some(Fault::Slow(rate)) => Some((*rate).max(1)),
            _ => None,
        };
        // Slow bodies flow in twenty pieces a second.
        let piece = rate.map_or(64 * 1024, |rate| (rate / 20).clamp(1, 64 * 1024));
        body.source.seek(SeekFrom::Start(start))?;
        let mut block = vec![0_u8; piece as usize];
        while request.sent < limit && !self.stopping.load(Ordering::SeqCst) {
            let wanted = (limit - request.sent).min(piece) as usize;
            body.source.read_exact(&mut block[..wanted])?;
            if let Some(Fault::Flip(offset)) = fault
                && let Some(at) = offset.checked_sub(start + request.sent)
                && let Some(byte) = block[..wanted].get_mut(usize::try_from(at).unwrap_or(usize::MAX))
            {
                *byte ^= 1;
            }
            if told == Some(Length::Chunked) {
                stream.write_all(format!("{wanted:x}\r\n").as_bytes())?;
            }
            stream.write_all(&block[..wanted])?;
            if told == Some(Length::Chunked) {
                stream.write_all(b"\r\n")?;
            }
            request.sent += wanted as u64;
            if rate.is_some() {
                self.wait(Duration::from_millis(50));
            }
        }
        if matches!(fault, Some(Fault::ResetAfter(_))) {
            // What was sent is to arrive, and then the reset.
            self.wait(Duration::from_millis(50));
            return self.reset(stream, request);
        }
        match told {
            Some(Length::Chunked) => stream.write_all(b"0\r\n\r\n")?,
            Some(_) => return Ok(false),
            None => {}
        }
        Ok(limit == length)
    }

    fn locate(&self, path: &str) -> Option<PathBuf> {
        let relative = percent_decode(path.trim_start_matches('/'));
        let inside = Path::new(&relative)
            .components()
            .all(|part| matches!(part, std::path::Component::Normal(_) | std::path::Component::CurDir));
        inside.then(|| self.root.join(relative)).filter(|path| path.is_file())
    }

    /// Waits until what has been sent is in the record as well. A client that does not read its answer, or gets one
    /// without end, is not waited for.
    fn settle(&self) {
        let started = Instant::now();
        while self.answering.load(Ordering::SeqCst) > 0 && started.elapsed() < SETTLE_LIMIT {
            thread::sleep(Duration::from_micros(200));
        }
    }

    /// Sleeps, but wakes when the server ends.
    fn wait(&self, time: Duration) {
        self.answering.fetch_sub(1, Ordering::SeqCst);
        let started = Instant::now();
        while started.elapsed() < time && !self.stopping.load(Ordering::SeqCst) {
            thread::sleep(time.saturating_sub(started.elapsed()).min(Duration::from_millis(20)));
        }
        self.answering.fetch_add(1, Ordering::SeqCst);
    }
}

struct Body {
    source: Box<dyn ReadSeek>,
    size: u64,
    tag: String,
}

trait ReadSeek: Read + Seek {}
impl<T: Read + Seek> ReadSeek for T {}

impl Body {
    fn bytes(bytes: Vec<u8>) -> Self {
        let size = bytes.len() as u64;
        Self { source: Box::new(io::Cursor::new(bytes)), size, tag: "\"replaced\"".to_owned() }
    }

    fn file(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let meta = file.metadata()?;
        let tag = format!("\"{:x}-{:x}-{:x}\"", meta.ino(), meta.mtime_nsec(), meta.size());
        Ok(Self { source: Box::new(file), size: meta.size(), tag })
    }
}

fn read_head(reader: &mut BufReader<TcpStream>, connection: u64) -> io::Result<Option<Request>> {
    let mut head = reader.by_ref().take(HEAD_LIMIT);
    let mut line = String::new();
    if head.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let method = words.next().unwrap_or_default().to_owned();
    let target = words.next().unwrap_or_default().to_owned();
    let old = words.next() == Some("HTTP/1.0");
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        if head.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let line = line.trim_end();
        if line.is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':') {
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
    }
    // A proxy is asked for a whole URL.
    let absolute = target.starts_with("http://");
    let path = match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("/", |slash| &rest[slash..]),
        None => target.as_str(),
    };
    let path = path.split(['?', '#']).next().unwrap_or(path).to_owned();
    let last = old || headers.get("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
    Ok(Some(Request { method, path, headers, absolute, last, status: 0, sent: 0, connection, turn: 0 }))
}

/// `bytes=A-B`, `bytes=A-` and `bytes=-N`; end exclusive. Anything else, or a range outside, is ignored.
fn parse_range(range: &str, size: u64) -> Option<(u64, u64)> {
    let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    let (start, end) = match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(first), Ok(last)) => (first, last.checked_add(1)?.min(size)),
        (Ok(first), Err(_)) if last.is_empty() => (first, size),
        (Err(_), Ok(count)) if first.is_empty() => (size.saturating_sub(count), size),
        _ => return None,
    };
    (start < end).then_some((start, end))
}

fn percent_decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut index = 0;
    while let Some(&byte) = bytes.get(index) {
        let code = text.get(index + 1..index + 3).and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match code.filter(|_| byte == b'%') {
            Some(code) => {
                plain.push(code);
                index += 3;
            }
            None => {
                plain.push(byte);
                index += 1;
            }
        }
    }
    String::from_utf8_lossy(&plain).into_owned()
}

/// Whether `text` matches `pattern`, in which `*` stands for any bytes.
fn matches(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = text.strip_prefix(parts.next().unwrap_or_default()) else { return false };
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    true
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ScratchDir, http};

    fn origin() -> (ScratchDir, Origin) {
        let directory = ScratchDir::new("origin").unwrap();
        std::fs::write(directory.path().join("file"), b"0123456789").unwrap();
        let origin = Origin::serve(directory.path()).unwrap();
        (directory, origin)
    }

    fn get(origin: &Origin, path: &str) -> Result<http::Response> {
        http::get(&origin.address().to_string(), path)
    }

    /// The next answer on a kept connection; the body has ten bytes.
    fn ask(stream: &mut TcpStream, target: &str) -> String {
        write!(stream, "GET {target} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            reader.read_line(&mut head).unwrap();
        }
        let mut body = [0; 10];
        reader.read_exact(&mut body).unwrap();
        String::from_utf8_lossy(&body).into_owned()
    }

    #[test]
    fn one_connection_serves_several_requests_also_as_a_proxy() {
        let (_directory, origin) = origin();
        let mut stream = TcpStream::connect(origin.address()).unwrap();
        assert_eq!(ask(&mut stream, "/file"), "0123456789");
        assert_eq!(ask(&mut stream, "http://example.org/file"), "0123456789");
        let requests = origin.requests();
        assert_eq!(requests.len(), 2);
        assert!(requests[1].absolute && requests[1].path == "/file");
        assert_eq!(origin.connections(), 1);
    }

    #[test]
    fn each_fault_does_what_it_says() {
        let (_directory, origin) = origin();
        origin.set_fault_times("/fi*", Fault::Status(503), 1);
        assert_eq!(get(&origin, "/file").unwrap().status, 503);
        assert_eq!(get(&origin, "/file").unwrap().status, 200);
        origin.set_fault("/file", Fault::Truncate(4));
        assert_eq!(get(&origin, "/file").unwrap().body, b"0123");
        origin.set_fault("/file", Fault::Flip(2));
        assert_eq!(get(&origin, "/file").unwrap().body, b"0133456789");
        origin.set_fault("/file", Fault::Reset);
        assert!(get(&origin, "/file").is_err());
        origin.set_fault("/file", Fault::Replace(b"other".to_vec()));
        assert_eq!(get(&origin, "/file").unwrap().body, b"other");
        origin.set_fault("/file", Fault::Delay(Duration::from_millis(200)));
        let started = Instant::now();
        assert_eq!(get(&origin, "/file").unwrap().status, 200);
        assert!(started.elapsed() >= Duration::from_millis(200));
        origin.set_fault("/file", Fault::Slow(40));
        let started = Instant::now();
        assert_eq!(get(&origin, "/file").unwrap().body, b"0123456789");
        assert!(started.elapsed() >= Duration::from_millis(200));
        origin.clear_faults();
        assert_eq!(get(&origin, "/nothing").unwrap().status, 404);
        assert_eq!(get(&origin, "/../Cargo.toml").unwrap().status, 404);
    }

    #[test]
    fn ranges_and_entity_tags_are_answered() {
        let (_directory, origin) = origin();
        let address = origin.address().to_string();
        let part = http::request(&address, "GET", "/file", &[("Range", "bytes=2-4")], &[]).unwrap();
        assert_eq!((part.status, part.body.as_slice()), (206, b"234".as_slice()));
        let tag = part.header("etag").unwrap().to_owned();
        let same = http::request(&address, "GET", "/file", &[("If-None-Match", &tag)], &[]).unwrap();
        assert_eq!(same.status, 304);
    }

    #[test]
    fn a_hanging_answer_ends_with_the_server_and_the_address_is_free_again() {
        let (directory, origin) = origin();
        origin.set_fault("*", Fault::Hang);
        let address = origin.address();
        let client = thread::spawn(move || http::get(&address.to_string(), "/file"));
        thread::sleep(Duration::from_millis(100));
        drop(origin);
        assert!(client.join().unwrap().is_err());
        let origin = Origin::serve_at(directory.path(), address).unwrap();
        assert_eq!(get(&origin, "/file").unwrap().status, 200);
    }

    #[test]
    fn patterns_match_as_documented() {
        assert!(matches("*", "/any") && matches("/a*c", "/abc") && matches("/a*", "/a"));
        assert!(matches("/data/*C", "/data/ab/cdC") && matches("*b*d*", "/abcde"));
        assert!(!matches("/a", "/ab") && !matches("/a*c", "/ab") && !matches("b*", "/b"));
    }
}
