//! A throw-away engine whose storage driver is the program as a legacy plugin.

#![allow(dead_code, reason = "each test program uses a part")]
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use testkit::process::Service;
use testkit::{Dockerd, ScratchDir};

pub struct Engine {
    pub docker: Dockerd,
    pub name: String,
    pub directory: ScratchDir,
    /// What the plugin takes for `/etc/cvmfs`.
    pub config: PathBuf,
    plugin: Option<Service>,
}

impl Engine {
    pub fn start() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        // Names of legacy plugins are global to the machine.
        let name = format!("cvmfs-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let directory = ScratchDir::new("plugin").unwrap();
        let config = directory.path().join("etc-cvmfs");
        std::fs::create_dir(&config).unwrap();
        let plugin = start_plugin(&name, &directory, &config);
        let docker = Dockerd::builder().storage_driver(&name).start();
        let docker =
            docker.inspect_err(|_| testkit::process::print_log("plugin", &plugin.log_text())).unwrap();
        Self { docker, name, directory, config, plugin: Some(plugin) }
    }

    /// A command that must succeed; what it printed.
    pub fn docker(&self, arguments: &[&str]) -> String {
        self.docker.docker(arguments).unwrap_or_else(|error| panic!("docker {arguments:?}: {error:#}"))
    }

    /// A command that must fail; what it said.
    pub fn failing_docker(&self, arguments: &[&str]) -> String {
        let finished = self.docker.docker_output(arguments).unwrap();
        assert_ne!(finished.code(), Some(0), "docker {arguments:?}: {}", finished.output());
        finished.output()
    }

    /// Repeats a command until it prints `expected`.
    pub fn wait_for(&self, arguments: &[&str], expected: &str) {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let finished = self.docker.docker_output(arguments).unwrap();
            if finished.stdout.trim() == expected {
                return;
            }
            assert!(Instant::now() < end, "docker {arguments:?}: {}", finished.output());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub fn import_busybox(&self, reference: &str) {
        let tar = testkit::image::busybox_layer().unwrap().finish();
        self.import(&tar, reference);
    }

    pub fn import(&self, tar: &[u8], reference: &str) {
        let file = self.directory.path().join("import.tar");
        std::fs::write(&file, tar).unwrap();
        self.docker(&["import", file.to_str().unwrap(), reference]);
    }

    /// SIGKILL, and a new process in its place.
    pub fn kill_plugin(&mut self) {
        if let Some(mut plugin) = self.plugin.take() {
            plugin.kill();
        }
        self.plugin = Some(start_plugin(&self.name, &self.directory, &self.config));
    }

    /// After SIGKILL dockerd takes its containerd for alive as long as a process, even a dead one that
    /// nobody has reaped, has the recorded number.
    pub fn forget_containerd(&self) {
        let runtime = self.docker.socket();
        let record = runtime.parent().unwrap().join("exec/containerd/containerd.pid");
        let _ = std::fs::remove_file(record);
    }

    pub fn home(&self) -> PathBuf {
        self.docker.data_root().join(&self.name)
    }

    /// Ids of the layers on disk.
    pub fn layers(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.home()).unwrap().map(|entry| entry.unwrap().file_name());
        let names = names.map(|name| name.into_string().unwrap());
        names.filter(|name| !matches!(name.as_str(), "l" | "cvmfs") && !name.starts_with('.')).collect()
    }

    /// No layer is mounted. Repositories may be: they stay for a while.
    pub fn assert_nothing_mounted(&self) {
        let end = Instant::now() + Duration::from_secs(5);
        loop {
            let mut mounted = testkit::mounts::below(&self.home());
            mounted.retain(|mount| !mount.point.starts_with(self.home().join("cvmfs")));
            if mounted.is_empty() {
                return;
            }
            assert!(Instant::now() < end, "{mounted:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.docker.stop();
        if let Some(mut plugin) = self.plugin.take() {
            plugin.stop(Duration::from_secs(10));
            if std::thread::panicking() {
                testkit::process::print_log("plugin", &plugin.log_text());
            }
        }
        for mounted in testkit::mounts::below(&self.home()) {
            eprintln!("left mounted: {mounted:?}");
        }
    }
}

fn start_plugin(name: &str, directory: &ScratchDir, config: &std::path::Path) -> Service {
    let socket = PathBuf::from("/run/docker/plugins").join(format!("{name}.sock"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_cvmfs-graphdriver"));
    command.args(["--log-level", "debug", "serve", "--socket"]).arg(&socket);
    command.arg("--propagated-mount").arg(directory.path()).arg("--config").arg(config);
    let mut plugin = Service::start("plugin", command, &directory.path().join("plugin.log")).unwrap();
    let listens = || std::os::unix::net::UnixStream::connect(&socket).is_ok();
    plugin.wait_ready(Duration::from_secs(20), listens).unwrap();
    plugin
}
