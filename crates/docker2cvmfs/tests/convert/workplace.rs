//! A repository in a scratch directory, a registry, and the program run on both.

use std::path::PathBuf;
use std::process::{Command, Output};

use cvmfs_publish::check::{CheckOptions, check};
use cvmfs_publish::{NewRepository, create_repository};
use serde_json::Value;
use testkit::tar::TarBuilder;
use testkit::{Image, Registry, ScratchDir};

pub const FQRN: &str = "images.example.org";

pub struct Workplace {
    pub registry: Registry,
    pub directory: ScratchDir,
}

/// What the program did.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    pub fn json(&self) -> Value {
        assert_eq!(self.code, 0, "{}", self.stderr);
        serde_json::from_str(&self.stdout).unwrap()
    }
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Workplace {
    pub fn new() -> Self {
        Self::with(Registry::start().unwrap())
    }

    pub fn with(registry: Registry) -> Self {
        let directory = ScratchDir::new("docker2cvmfs").unwrap();
        let path = |name: &str| directory.path().join(name);
        let storage = path("storage");
        let mut new = NewRepository::new(FQRN, storage.to_str().unwrap(), &path("keys"));
        new.garbage_collectable = true;
        create_repository(&new).unwrap();
        std::fs::create_dir(path("spool")).unwrap();
        Self { registry, directory }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The program with the user's credentials out of sight.
    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_docker2cvmfs"));
        command.env("HOME", self.directory.path()).env("TMPDIR", self.path("spool"));
        for name in ["DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR"] {
            command.env_remove(name);
        }
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Ran {
        self.command().args(arguments).output().unwrap().into()
    }

    /// The arguments of `convert` for an image in this workplace's repository.
    pub fn convert_command(&self, image: &str, more: &[&str]) -> Command {
        let mut command = self.command();
        command.args(["convert", image, "--json", "--repository", FQRN]);
        command.arg("--storage").arg(self.path("storage")).arg("--keys").arg(self.path("keys")).args(more);
        command
    }

    pub fn convert(&self, image: &str, more: &[&str]) -> Ran {
        self.convert_command(image, more).output().unwrap().into()
    }

    /// The repository is whole, by the publisher's own check.
    pub fn assert_consistent(&self) {
        let storage = cvmfs_publish::storage::open(self.path("storage").to_str().unwrap()).unwrap();
        let masters = cvmfs_publish::keys::KeyFiles::new(&self.path("keys"), FQRN).public().unwrap();
        let report = check(&CheckOptions::new(FQRN, storage, masters)).unwrap();
        assert!(report.problems.is_empty(), "{report:?}");
    }

    /// The published tree, by the independent reader: one JSON value per entry.
    pub fn published(&self) -> Vec<Value> {
        let script = testkit::workspace_root().join("tests/oracle/read_repository.py");
        let output = Command::new("/usr/bin/python3")
            .arg(script)
            .arg(self.path("storage"))
            .arg(FQRN)
            .arg(self.path(&format!("keys/{FQRN}.pub")))
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    pub fn published_paths(&self) -> Vec<String> {
        self.published().iter().map(|entry| entry["path"].as_str().unwrap().to_owned()).collect()
    }

    pub fn revision(&self) -> u64 {
        let manifest = std::fs::read(self.path("storage/.cvmfspublished")).unwrap();
        let text = String::from_utf8_lossy(&manifest);
        text.lines().find_map(|line| line.strip_prefix('S')).unwrap().parse().unwrap()
    }

    /// Nothing of a download is left behind.
    pub fn assert_spool_is_empty(&self) {
        assert_eq!(std::fs::read_dir(self.path("spool")).unwrap().count(), 0);
    }
}

/// Three layers: a base, one that deletes and replaces, an empty one.
pub fn image() -> Image {
    let base = TarBuilder::new()
        .directory("etc", 0o755)
        .file("etc/motd", 0o644, b"hello\n")
        .file("etc/passwd", 0o644, b"root:x:0:0::/:/bin/sh\n")
        .directory("opt", 0o755)
        .file("opt/old", 0o600, b"old")
        .symlink("etc/link", "../opt/old")
        .owner(1000, 7)
        .xattr("user.colour", b"blue")
        .file("opt/tool", 0o4755, &vec![7; 100_000]);
    let change = TarBuilder::new()
        .directory("etc", 0o755)
        .file("etc/.wh.motd", 0o644, b"")
        .file("etc/passwd", 0o644, b"changed\n")
        .directory("opt", 0o755)
        .file("opt/.wh..wh..opq", 0o644, b"")
        .file("opt/new", 0o644, b"new");
    Image::new([base.finish(), change.finish(), TarBuilder::new().finish()]).config(serde_json::json!({
        "Env": ["PATH=/bin", "GREETING=hello $USER, \"dear\""], "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["a b", "c"],
        "User": "1000:7", "WorkingDir": "/opt", "Labels": {"vendor": "x"}, "ExposedPorts": {"80/tcp": {}},
    }))
}
