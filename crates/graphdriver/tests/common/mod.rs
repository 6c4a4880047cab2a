//! A plugin served in this process, and an engine's side of the protocol written by hand.

#![allow(dead_code, reason = "each test program uses a part")]
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use graphdriver::options::MountMethod;
use graphdriver::plugin::{MountsFactory, Plugin};
use graphdriver::publishing::Publishing;
use graphdriver::repositories::{ExternalMounts, Fqrn, RepositoryError, RepositoryMounts, RepositoryStatus};
use serde_json::{Value, json};
use testkit::ScratchDir;
use tokio::sync::watch;

/// Longest wait for an answer. No call in these tests takes longer unless it hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// A plugin on a socket of its own, with a directory for layers and one for repositories.
pub struct Host {
    pub directory: ScratchDir,
    runtime: ScratchDir,
    server: Option<(watch::Sender<bool>, JoinHandle<()>)>,
    pub repositories: Arc<DirectoryMounts>,
}

impl Host {
    /// Starts a plugin that was never initialised.
    pub fn start() -> Self {
        let directory = ScratchDir::new("graphdriver").unwrap();
        let repositories = Arc::new(DirectoryMounts::new(&directory.path().join("repositories")));
        let runtime = ScratchDir::runtime("graphdriver").unwrap();
        let mut host = Self { directory, runtime, server: None, repositories };
        host.serve();
        host
    }

    /// Starts a plugin and initialises it.
    pub fn initialised() -> Self {
        let host = Self::start();
        host.init();
        host
    }

    pub fn init(&self) {
        assert_eq!(self.call("Init", json!({"Home": self.home(), "Opts": null})), json!({}));
    }

    /// A new process, as it were: nothing but what is on disk and mounted is left.
    pub fn restart(&mut self) {
        self.stop();
        self.serve();
    }

    pub fn stop(&mut self) {
        if let Some((stop, server)) = self.server.take() {
            stop.send_replace(true);
            server.join().unwrap();
        }
    }

    fn serve(&mut self) {
        let _ = std::fs::remove_file(self.socket());
        let listener = graphdriver::server::bind(&self.socket()).unwrap();
        let (stop, stopped) = watch::channel(false);
        let (state, repositories) = (self.directory.path().join("state"), Arc::clone(&self.repositories));
        let layer_service = self.directory.path().join("layer-service");
        let server = std::thread::spawn(move || {
            let factory: MountsFactory = Box::new(move |home, options, id_maps| {
                Ok(match options.mount_method {
                    MountMethod::Internal => Arc::clone(&repositories) as Arc<dyn RepositoryMounts>,
                    MountMethod::External => {
                        Arc::new(ExternalMounts::new(&home.join("cvmfs"), id_maps, &home.join("mapped")))
                    }
                })
            });
            let plugin = Arc::new(Plugin::start(&state, factory, Publishing::new(&layer_service)));
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = tokio::net::UnixListener::from_std(listener).unwrap();
                graphdriver::server::serve(listener, plugin, stopped).await;
            });
        });
        self.server = Some((stop, server));
    }

    pub fn home(&self) -> PathBuf {
        self.directory.path().join("home")
    }

    pub fn socket(&self) -> PathBuf {
        self.runtime.path().join("plugin.sock")
    }

    pub fn connect(&self) -> Connection {
        Connection::open(&self.socket())
    }

    /// A call that must succeed, on a connection of its own.
    pub fn call(&self, name: &str, request: Value) -> Value {
        let (status, answer) = self.connect().call(name, &request);
        assert_eq!(status, 200, "{name} {request}: {answer}");
        answer
    }

    /// A call that must fail; the message.
    pub fn failing_call(&self, name: &str, request: Value) -> String {
        let (status, answer) = self.connect().call(name, &request);
        assert_ne!(status, 200, "{name} {request}: {answer}");
        answer["Err"].as_str().expect("an error has a message").to_owned()
    }

    pub fn create(&self, id: &str, parent: &str) {
        self.call("Create", json!({"ID": id, "Parent": parent}));
    }

    /// Create and ApplyDiff; the size.
    pub fn add_layer(&self, id: &str, parent: &str, tar: &[u8]) -> u64 {
        self.create(id, parent);
        let (status, answer) = self.connect().apply(id, parent, tar);
        assert_eq!(status, 200, "{answer}");
        answer["Size"].as_u64().unwrap()
    }

    /// A container as an engine makes one, without starting it.
    pub fn create_container(&self, id: &str, image: &str) {
        let init = format!("{id}-init");
        self.call("CreateReadWrite", json!({"ID": init, "Parent": image}));
        self.get(&init);
        self.put(&init);
        self.call("CreateReadWrite", json!({"ID": id, "Parent": init}));
    }

    pub fn get(&self, id: &str) -> PathBuf {
        PathBuf::from(self.call("Get", json!({"ID": id}))["Dir"].as_str().unwrap())
    }

    pub fn put(&self, id: &str) {
        self.call("Put", json!({"ID": id}));
    }

    pub fn remove(&self, id: &str) {
        self.call("Remove", json!({"ID": id}));
    }

    /// Mount points below the layers' directory.
    pub fn mounted(&self) -> Vec<PathBuf> {
        let mut found: Vec<_> =
            testkit::mounts::below(&self.home()).into_iter().map(|mount| mount.point).collect();
        found.sort();
        found
    }

    /// Makes a directory of a repository.
    pub fn repository_directory(&self, fqrn: &str, path: &str) -> PathBuf {
        let directory = self.repositories.directory.join(fqrn).join(path);
        std::fs::create_dir_all(&directory).unwrap();
        directory
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stop();
    }
}

/// One connection, kept alive between calls.
pub struct Connection {
    stream: BufReader<UnixStream>,
}

impl Connection {
    pub fn open(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self { stream: BufReader::new(stream) }
    }

    /// A JSON call with the headers that engines send: an empty Host, no content type.
    pub fn call(&mut self, name: &str, request: &Value) -> (u16, Value) {
        self.post(&format!("/GraphDriver.{name}"), &format!("{request}\n"))
    }

    pub fn post(&mut self, path: &str, body: &str) -> (u16, Value) {
        self.try_post(path, body).unwrap()
    }

    /// A call to a plugin that may die meanwhile.
    pub fn try_call(&mut self, name: &str, request: &Value) -> io::Result<(u16, Value)> {
        self.try_post(&format!("/GraphDriver.{name}"), &request.to_string())
    }

    fn try_post(&mut self, path: &str, body: &str) -> io::Result<(u16, Value)> {
        let request = format!(
            "POST {path} HTTP/1.1\r\nHost: \r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: {}\r\n\
             Accept: application/vnd.docker.plugins.v1.2+json\r\n\r\n{body}",
            body.len()
        );
        self.stream.get_mut().write_all(request.as_bytes())?;
        self.try_json_answer()
    }

    /// ApplyDiff: a chunked body, no length.
    pub fn apply(&mut self, id: &str, parent: &str, tar: &[u8]) -> (u16, Value) {
        self.begin_apply(id, parent);
        for piece in tar.chunks(10_000) {
            self.send_chunk(piece);
        }
        self.send("0\r\n\r\n");
        self.json_answer()
    }

    pub fn begin_apply(&mut self, id: &str, parent: &str) {
        self.send(&format!(
            "POST /GraphDriver.ApplyDiff?id={id}&parent={parent} HTTP/1.1\r\nHost: \r\nTransfer-Encoding: chunked\r\n\r\n"
        ));
    }

    pub fn send_chunk(&mut self, piece: &[u8]) {
        self.send(&format!("{:x}\r\n", piece.len()));
        self.stream.get_mut().write_all(piece).unwrap();
        self.send("\r\n");
    }

    /// Diff: the status and the body, or nothing if the connection was cut.
    pub fn diff(&mut self, id: &str, parent: &str) -> (u16, Option<Vec<u8>>) {
        let (status, mut body) = self.begin_diff(id, parent);
        let mut archive = Vec::new();
        loop {
            match body.next_piece() {
                Some(piece) if piece.is_empty() => return (status, Some(archive)),
                Some(piece) => archive.extend(piece),
                None => return (status, None),
            }
        }
    }

    pub fn begin_diff(&mut self, id: &str, parent: &str) -> (u16, Body<'_>) {
        let request = json!({"ID": id, "Parent": parent}).to_string();
        self.send(&format!(
            "POST /GraphDriver.Diff HTTP/1.1\r\nHost: \r\nContent-Length: {}\r\n\r\n{request}",
            request.len()
        ));
        let (status, length) = self.head().unwrap();
        (status, Body { stream: &mut self.stream, length })
    }

    pub fn send(&mut self, text: &str) {
        self.stream.get_mut().write_all(text.as_bytes()).unwrap();
    }

    pub fn json_answer(&mut self) -> (u16, Value) {
        self.try_json_answer().unwrap()
    }

    fn try_json_answer(&mut self) -> io::Result<(u16, Value)> {
        let (status, length) = self.head()?;
        let mut body = vec![0; length.expect("a JSON answer has a length")];
        self.stream.read_exact(&mut body)?;
        Ok((status, serde_json::from_slice(&body)?))
    }

    fn head(&mut self) -> io::Result<(u16, Option<usize>)> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let status = line.split(' ').nth(1).expect("a status line").parse().unwrap();
        let mut length = None;
        loop {
            line.clear();
            if self.stream.read_line(&mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let header = line.trim_end().to_ascii_lowercase();
            if header.is_empty() {
                return Ok((status, length));
            }
            if let Some(value) = header.strip_prefix("content-length: ") {
                length = Some(value.parse().unwrap());
            }
        }
    }
}

/// Body of a Diff that is being received.
pub struct Body<'a> {
    stream: &'a mut BufReader<UnixStream>,
    length: Option<usize>,
}

impl Body<'_> {
    /// The next piece, an empty one at a proper end, none if the connection was cut.
    pub fn next_piece(&mut self) -> Option<Vec<u8>> {
        if let Some(length) = self.length.replace(0) {
            let mut piece = vec![0; length];
            self.stream.read_exact(&mut piece).ok()?;
            return Some(piece);
        }
        self.length = None;
        let mut line = String::new();
        self.stream.read_line(&mut line).ok()?;
        let length = usize::from_str_radix(line.trim_end(), 16).ok()?;
        let mut piece = vec![0; length + 2];
        self.stream.read_exact(&mut piece).ok()?;
        piece.truncate(length);
        Some(piece)
    }
}

/// Plain directories that stand for mounted repositories.
#[derive(Debug)]
pub struct DirectoryMounts {
    pub directory: PathBuf,
    mounted: Mutex<std::collections::BTreeSet<Fqrn>>,
}

impl DirectoryMounts {
    fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), mounted: Mutex::default() }
    }
}

impl RepositoryMounts for DirectoryMounts {
    fn ensure(&self, fqrn: &Fqrn, _timeout: Duration) -> Result<PathBuf, RepositoryError> {
        let path = self.directory.join(fqrn.as_str());
        if !path.is_dir() {
            let message = format!("no configuration for {fqrn}");
            return Err(RepositoryError::Mount { fqrn: fqrn.clone(), message });
        }
        self.mounted.lock().unwrap().insert(fqrn.clone());
        Ok(path)
    }

    fn refresh(&self, _fqrn: &Fqrn, _timeout: Duration) {}

    fn revision(&self, _fqrn: &Fqrn) -> Option<u64> {
        Some(3)
    }

    fn unmount(&self, fqrn: &Fqrn) -> Result<(), RepositoryError> {
        self.mounted.lock().unwrap().remove(fqrn);
        Ok(())
    }

    fn mounted(&self) -> Vec<Fqrn> {
        self.mounted.lock().unwrap().iter().cloned().collect()
    }

    fn is_mounted(&self, fqrn: &Fqrn) -> bool {
        self.mounted.lock().unwrap().contains(fqrn)
    }

    fn status(&self) -> Vec<RepositoryStatus> {
        let status = |fqrn| RepositoryStatus { fqrn, summary: "revision 3".to_owned(), client: None };
        self.mounted().into_iter().map(status).collect()
    }

    fn recover(&self) {}
}
