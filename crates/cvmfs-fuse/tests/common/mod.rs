//! A fixture repository behind an origin, mounted by the real binary.
#![allow(dead_code, clippy::unwrap_used, missing_docs)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use testkit::{Fixture, Origin, ScratchDir};

pub struct Mounted {
    pub fixture: Fixture,
    pub origin: Origin,
    pub scratch: ScratchDir,
    pub mountpoint: PathBuf,
}

impl Mounted {
    pub fn new(fixture: &str, options: &str) -> Mounted {
        let prepared = Prepared::new(fixture);
        let output = prepared.mount(options);
        assert!(output.status.success(), "mount of {fixture}: {}", String::from_utf8_lossy(&output.stderr));
        prepared.0
    }

    pub fn status(&self) -> serde_json::Value {
        let output = client(&["--json", "status", &self.fixture.fqrn]);
        let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let states = match document {
            serde_json::Value::Array(states) => states,
            single => vec![single],
        };
        // Another test's mount of the same repository is not ours.
        states
            .into_iter()
            .find(|state| state["mountpoint"].as_str() == self.mountpoint.to_str())
            .unwrap_or_default()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
        client(&["umount", "--lazy", self.mountpoint.to_str().unwrap()]);
    }
}

impl Mounted {
    /// The record that was written at the mount.
    pub fn record(&self) -> serde_json::Value {
        self.find_record().expect("the mount has a record")
    }

    pub fn find_record(&self) -> Option<serde_json::Value> {
        let records = std::fs::read_dir("/run/cvmfs-client").ok()?.flatten();
        let documents = records
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
            .filter_map(|path| serde_json::from_slice(&std::fs::read(path).ok()?).ok());
        documents
            .into_iter()
            .find(|record: &serde_json::Value| record["mountpoint"].as_str() == self.mountpoint.to_str())
    }

    /// The answer to a command, from this very mount: tests mount the same repository side by side.
    pub fn talk(&self, command: &str) -> String {
        let mut stream = UnixStream::connect(self.record()["control"].as_str().unwrap()).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.write_all(command.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.trim().to_owned()
    }

    /// What supervisor and workers logged.
    pub fn log(&self) -> String {
        let control = self.find_record().and_then(|record| record["control"].as_str().map(PathBuf::from));
        control.and_then(|path| std::fs::read_to_string(path.with_extension("log")).ok()).unwrap_or_default()
    }
}

/// Mounts with variables in the environment.
pub fn mount_with(mounted: &Mounted, options: &str, environment: &[(&str, String)]) -> Output {
    let config = mounted.fixture.client_config(&mounted.origin.url()).unwrap();
    let options = format!("config={},{options}", config.display());
    Command::new(env!("CARGO_BIN_EXE_cvmfs-client"))
        .args(["mount", &mounted.fixture.fqrn, mounted.mountpoint.to_str().unwrap(), "-o", &options])
        .envs(environment.iter().map(|(name, value)| (*name, value.as_str())))
        .output()
        .unwrap()
}

/// Whether this kernel lets reads pass through (Linux 6.9): the tests run on older ones, too.
pub fn kernel_passes_through() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers =
        release.split(|char: char| !char.is_ascii_digit()).filter_map(|part| part.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(6), Some(9))
}

/// A time by which anything that happens at all has happened, on a busy machine too.
pub const SOON: Duration = Duration::from_secs(30);

/// Waits until `condition` holds.
#[track_caller]
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + SOON;
    while !condition() {
        assert!(Instant::now() < end, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Kills the worker and waits for its successor.
#[track_caller]
pub fn kill_worker(mounted: &Mounted) {
    let before = mounted.status()["pid"].as_i64().unwrap();
    kill(before);
    wait_until("a successor", || mounted.status()["pid"].as_i64().is_some_and(|pid| pid != before));
}

/// Whether the process is gone, or only a zombie that its parent has yet to collect.
pub fn is_gone(pid: i64) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    !status.contains("State:") || status.contains("State:\tZ")
}

pub fn signal(pid: i64, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    let _ = rustix::process::kill_process(pid, signal);
}

/// Everything but the mount.
pub struct Prepared(pub Mounted);

impl Prepared {
    pub fn new(name: &str) -> Prepared {
        let fixture = Fixture::unpack(name).unwrap();
        let origin = Origin::serve(&fixture.storage).unwrap();
        let scratch = ScratchDir::new("fuse").unwrap();
        let mountpoint = scratch.path().join("mnt");
        std::fs::create_dir(&mountpoint).unwrap();
        Prepared(Mounted { fixture, origin, scratch, mountpoint })
    }

    pub fn mount(&self, options: &str) -> Output {
        let Mounted { fixture, origin, mountpoint, .. } = &self.0;
        let config = fixture.client_config(&origin.url()).unwrap();
        let options =
            format!("config={}{}{options}", config.display(), if options.is_empty() { "" } else { "," });
        client(&["mount", &fixture.fqrn, mountpoint.to_str().unwrap(), "-o", &options])
    }
}

pub fn client(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cvmfs-client")).args(arguments).output().unwrap()
}

pub fn kill(pid: i64) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

pub fn files_below(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut waiting = vec![directory.to_owned()];
    while let Some(directory) = waiting.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                waiting.push(entry.path());
            } else if kind.is_file() {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    found
}
