//! The server over a real socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::symlink;
use std::sync::{Arc, Mutex};

use std::time::Duration;

use super::*;

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

struct Trial {
    address: SocketAddr,
    log: Lines,
    _runtime: tokio::runtime::Runtime,
}

fn serve(directory: &Path) -> Trial {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let server = runtime.block_on(Server::bind("127.0.0.1:0", directory)).unwrap();
    let address = server.local_addr().unwrap();
    let log = Lines::default();
    runtime.spawn(server.run(log.clone()));
    Trial { address, log, _runtime: runtime }
}

struct Answer {
    status: u16,
    headers: String,
    body: Vec<u8>,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then_some(value.trim())
        })
    }
}

fn ask(stream: &mut BufReader<TcpStream>, method: &str, path: &str, headers: &str) -> Answer {
    let request = format!("{method} {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n");
    stream.get_mut().write_all(request.as_bytes()).unwrap();
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert_ne!(stream.read_line(&mut head).unwrap(), 0, "connection closed after {head:?}");
    }
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let mut answer = Answer { status, headers: head, body: Vec::new() };
    let length: usize = answer.header("content-length").map_or(0, |l| l.parse().unwrap());
    if method != "HEAD" {
        answer.body = vec![0; length];
        stream.read_exact(&mut answer.body).unwrap();
    }
    answer
}

fn connect(trial: &Trial) -> BufReader<TcpStream> {
    BufReader::new(TcpStream::connect(trial.address).unwrap())
}

#[test]
fn one_connection_serves_many_requests_with_ranges_and_tags() {
    let dir = tempfile::tempdir().unwrap();
    let big: Vec<u8> = (0..1_000_000u32).flat_map(u32::to_le_bytes).collect();
    std::fs::create_dir_all(dir.path().join("data/ab")).unwrap();
    std::fs::write(dir.path().join("data/ab/cd"), &big).unwrap();
    std::fs::write(dir.path().join(".cvmfspublished"), b"manifest").unwrap();
    let trial = serve(dir.path());
    let mut stream = connect(&trial);

    let answer = ask(&mut stream, "GET", "/data/ab/cd", "");
    assert_eq!((answer.status, answer.body == big), (200, true));
    assert_eq!(answer.header("cache-control"), Some("max-age=259200"));
    let tag = answer.header("etag").unwrap().to_owned();

    let answer = ask(&mut stream, "HEAD", "/data/ab/cd", "");
    assert_eq!((answer.status, answer.header("content-length")), (200, Some("4000000")));

    let answer = ask(&mut stream, "GET", "/data/ab/cd", "Range: bytes=1000000-1999999\r\n");
    assert_eq!(answer.status, 206);
    assert_eq!(answer.header("content-range"), Some("bytes 1000000-1999999/4000000"));
    assert!(answer.body == big[1_000_000..2_000_000]);

    let answer = ask(&mut stream, "GET", "/data/ab/cd", &format!("If-None-Match: {tag}\r\n"));
    assert_eq!((answer.status, answer.body.len()), (304, 0));
    let answer = ask(&mut stream, "GET", "/data/ab/cd", "Range: bytes=4000000-\r\n");
    assert_eq!((answer.status, answer.header("content-range")), (416, Some("bytes */4000000")));

    let answer = ask(&mut stream, "GET", "/.cvmfspublished", "");
    assert_eq!((answer.status, answer.body.as_slice()), (200, &b"manifest"[..]));
    assert_eq!(answer.header("content-type"), Some("application/x-cvmfs"));
    assert_eq!(ask(&mut stream, "POST", "/.cvmfspublished", "Content-Length: 0\r\n").status, 405);
}

#[test]
fn nothing_outside_the_directory_and_no_scratch_file_is_served() {
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("secret"), b"secret").unwrap();
    let dir = outside.path().join("served");
    std::fs::create_dir_all(dir.join("data/txn")).unwrap();
    std::fs::write(dir.join("data/txn/publish.1"), b"half").unwrap();
    std::fs::write(dir.join("object"), b"object").unwrap();
    symlink("../secret", dir.join("out")).unwrap();
    symlink(outside.path().join("secret"), dir.join("absolute")).unwrap();
    symlink("object", dir.join(".cvmfsalt-x")).unwrap();
    let trial = serve(&dir);
    let mut stream = connect(&trial);
    for path in [
        "/../secret",
        "/%2e%2e/secret",
        "/data/../../secret",
        "/out",
        "/absolute",
        "/data/txn/publish.1",
        "/data//../data/txn/publish.1",
        "/",
        "/data",
        "/missing",
        "/object/x",
    ] {
        assert_eq!(ask(&mut stream, "GET", path, "").status, 404, "{path}");
    }
    assert_eq!(ask(&mut stream, "GET", "/%00", "").status, 400);
    assert_eq!(ask(&mut stream, "GET", "/.cvmfsalt-x", "").body, b"object");
}

#[test]
fn each_request_leaves_a_line_in_the_access_log() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("f"), b"12345").unwrap();
    let trial = serve(dir.path());
    let mut stream = connect(&trial);
    ask(&mut stream, "GET", "/f", "User-Agent: me\r\n");
    ask(&mut stream, "GET", "/missing", "");
    let deadline = std::time::Instant::now() + Duration::from_secs(5);
    let lines = loop {
        let text = String::from_utf8(trial.log.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        if lines.len() == 2 {
            break lines;
        }
        assert!(std::time::Instant::now() < deadline, "log: {text}");
        std::thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(
        (&lines[0]["path"], &lines[0]["status"], &lines[0]["bytes"]),
        (&"/f".into(), &200.into(), &5.into())
    );
    assert_eq!((&lines[0]["agent"], &lines[1]["status"]), (&"me".into(), &404.into()));
}
