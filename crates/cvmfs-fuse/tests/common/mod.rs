//! A fixture repository behind an origin, mounted by the real binary.
#![allow(dead_code, clippy::unwrap_used, missing_docs)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

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
        let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        match document {
            serde_json::Value::Array(states) => states
                .into_iter()
                .find(|state| state["mountpoint"].as_str() == self.mountpoint.to_str())
                .expect("the mount is listed"),
            single => single,
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        client(&["umount", self.mountpoint.to_str().unwrap()]);
    }
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
