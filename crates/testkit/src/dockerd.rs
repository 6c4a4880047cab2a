//! Debian's Docker engine as a throw-away instance, with everything it needs in directories of its own.
//!
//! Traps that this module knows: a killed dockerd leaves its containerd behind, on which the next start
//! hangs; `exec/netns/default` and the plugins' directories stay mounted; sockets need short paths, so the
//! run-time state lies in `/run` while the data root lies on a real file system in `target/tmp`; plugin
//! sockets are below `/run/docker/plugins` whatever the options say.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::process::{Finished, Service, print_log, run};
use crate::{ScratchDir, mounts, scratch};

/// A start re-enables managed plugins, which may take 10 s each.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// A graceful stop ends containers and plugins, 10 s each.
const STOP_TIMEOUT: Duration = Duration::from_secs(45);

/// No docker command in tests takes longer unless it hangs.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(120);

/// How an engine is to be started.
#[derive(Debug, Clone)]
pub struct DockerdBuilder {
    storage_driver: String,
    experimental: bool,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
}

impl Default for DockerdBuilder {
    fn default() -> Self {
        Self {
            storage_driver: "overlay2".to_owned(),
            experimental: true,
            arguments: Vec::new(),
            environment: Vec::new(),
        }
    }
}

impl DockerdBuilder {
    /// The value of `-s`; `overlay2` unless told otherwise.
    #[must_use]
    pub fn storage_driver(mut self, name: &str) -> Self {
        self.storage_driver = name.to_owned();
        self
    }

    /// Whether `--experimental` is given, which graph driver plugins need; yes unless told otherwise.
    #[must_use]
    pub fn experimental(mut self, yes: bool) -> Self {
        self.experimental = yes;
        self
    }

    /// One more argument of dockerd.
    #[must_use]
    pub fn argument(mut self, argument: &str) -> Self {
        self.arguments.push(argument.to_owned());
        self
    }

    /// One more variable in dockerd's environment.
    #[must_use]
    pub fn environment(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Starts the engine with a fresh data root and waits until it answers. Installs `docker.io`.
    pub fn start(self) -> Result<Dockerd> {
        crate::install(&["docker.io"])?;
        let data = ScratchDir::new("dockerd")?;
        let runtime = ScratchDir::runtime("dockerd")?;
        let mut dockerd =
            Dockerd { options: self, service: None, troubled: AtomicBool::new(false), data, runtime };
        dockerd.start()?;
        Ok(dockerd)
    }
}

/// An engine; stopped, unmounted and removed when dropped. Its log is printed if the test panics, or if a
/// command failed that should not have.
#[derive(Debug)]
pub struct Dockerd {
    options: DockerdBuilder,
    service: Option<Service>,
    troubled: AtomicBool,
    // The order of the fields is the order of their removal.
    data: ScratchDir,
    runtime: ScratchDir,
}

impl Dockerd {
    /// Options of a new engine.
    pub fn builder() -> DockerdBuilder {
        DockerdBuilder::default()
    }

    /// Runs `docker ARGUMENTS…` against this engine; its standard output, or an error with all that it said.
    pub fn docker(&self, arguments: &[&str]) -> Result<String> {
        let result = self.docker_output(arguments).and_then(Finished::success);
        if result.is_err() {
            self.troubled.store(true, Ordering::Relaxed);
        }
        result
    }

    /// Runs `docker ARGUMENTS…` and reports how it ended, for commands that are meant to fail.
    pub fn docker_output(&self, arguments: &[&str]) -> Result<Finished> {
        run(self.docker_command(arguments), COMMAND_TIMEOUT)
    }

    /// `docker ARGUMENTS…`, not yet started.
    pub fn docker_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("/usr/bin/docker");
        command
            .args(arguments)
            .env("DOCKER_HOST", format!("unix://{}", self.socket().display()))
            .env("DOCKER_CONFIG", self.runtime.path().join("cli"))
            .env_remove("DOCKER_CONTEXT");
        command
    }

    /// `docker run --rm --network=host …`: the engine has no bridge.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        self.docker(&run_arguments(arguments))
    }

    /// As [`Dockerd::run`], for containers that are meant to fail.
    pub fn run_output(&self, arguments: &[&str]) -> Result<Finished> {
        self.docker_output(&run_arguments(arguments))
    }

    /// The engine's socket.
    pub fn socket(&self) -> PathBuf {
        self.runtime.path().join("docker.sock")
    }

    /// The engine's data root.
    pub fn data_root(&self) -> PathBuf {
        self.data.path().join("root")
    }

    /// The process id of dockerd while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.service.as_ref().map(Service::pid)
    }

    /// The version of the engine, such as `20.10.24+dfsg1`.
    pub fn version(&self) -> Result<String> {
        self.docker(&["version", "--format", "{{.Server.Version}}"])
    }

    /// All that dockerd and its plugins have logged.
    pub fn log_text(&self) -> String {
        let bytes = std::fs::read(self.log_file()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Stops gracefully, changes `-s`, starts again.
    pub fn restart_with_driver(&mut self, storage_driver: &str) -> Result<()> {
        self.stop();
        self.options.storage_driver = storage_driver.to_owned();
        self.start()
    }

    /// One more argument of dockerd, from its next start on.
    pub fn add_argument(&mut self, argument: &str) {
        self.options.arguments.push(argument.to_owned());
    }

    /// Stops gracefully and starts again.
    pub fn restart(&mut self) -> Result<()> {
        self.stop();
        self.start()
    }

    /// Stops gracefully and ends what is left; images, containers and plugins stay in the data root.
    pub fn stop(&mut self) {
        self.stop_only();
        self.end_rest();
    }

    /// Stops gracefully and leaves everything as the engine leaves it, for looking at it.
    pub fn stop_only(&mut self) {
        if let Some(mut service) = self.service.take() {
            service.stop(STOP_TIMEOUT);
        }
    }

    /// SIGKILL for dockerd and its containerd; containers and plugin processes live on until the next start.
    pub fn kill(&mut self) {
        if let Some(mut service) = self.service.take() {
            service.kill();
        }
        for pid in self.containerd() {
            crate::process::kill(pid, rustix::process::Signal::KILL);
        }
        // A pid that is still there, be it as a zombie, makes the next start wait for a socket in vain.
        let _ = std::fs::remove_file(self.pid_file());
        let _ = std::fs::remove_file(self.runtime.path().join("exec/containerd/containerd.pid"));
    }

    /// As if the machine had been switched off: all processes and mounts are gone, what is on the disk stays.
    pub fn switch_off(&mut self) {
        self.kill();
        self.end_rest();
    }

    /// Starts a stopped engine on the same data root and waits until it answers.
    pub fn start(&mut self) -> Result<()> {
        let started = self.try_start();
        if started.is_err() {
            self.troubled.store(true, Ordering::Relaxed);
        }
        started
    }

    fn try_start(&mut self) -> Result<()> {
        let _ = std::fs::remove_file(self.pid_file());
        // The machine's own /etc/docker/daemon.json is none of ours.
        let config = self.runtime.path().join("daemon.json");
        std::fs::write(&config, "{}")?;
        let (program, search_path) = crate::engine::dockerd();
        let mut command = Command::new(program);
        if let Some(search_path) = search_path {
            command.env("PATH", search_path);
        }
        command
            .args(["-s", &self.options.storage_driver])
            .arg("--data-root")
            .arg(self.data_root())
            .arg("--exec-root")
            .arg(self.runtime.path().join("exec"))
            .arg("-H")
            .arg(format!("unix://{}", self.socket().display()))
            .arg("-p")
            .arg(self.pid_file())
            .arg("--config-file")
            .arg(&config)
            .args(["--iptables=false", "--ip6tables=false", "--bridge=none"]);
        if self.options.experimental {
            command.arg("--experimental");
        }
        command.args(&self.options.arguments);
        command.envs(self.options.environment.iter().map(|(name, value)| (name, value)));
        let mut service = Service::start("dockerd", command, &self.log_file())?;
        let ready = service.wait_ready(START_TIMEOUT, || {
            let mut ping = self.docker_command(&["version", "--format", "{{.Server.Version}}"]);
            ping.env("DOCKER_CLIENT_TIMEOUT", "5");
            self.socket().exists()
                && run(ping, Duration::from_secs(10)).is_ok_and(|answer| answer.status.success())
        });
        self.service = Some(service);
        ready.context("dockerd did not start")
    }

    fn log_file(&self) -> PathBuf {
        self.data.path().join("log")
    }

    fn pid_file(&self) -> PathBuf {
        self.runtime.path().join("pid")
    }

    /// The containerd of this engine; its command line names the exec root.
    fn containerd(&self) -> Vec<u32> {
        let config = self.runtime.path().join("exec/containerd/containerd.toml");
        let config = config.as_os_str().as_encoded_bytes().to_vec();
        crate::process::find(|pid| {
            std::fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| line.split(|byte| *byte == 0).any(|word| word == config))
        })
    }

    fn end_rest(&self) {
        for directory in [self.runtime.path(), self.data.path()] {
            scratch::end_processes(directory);
            mounts::unmount_below(directory);
        }
    }

    /// Sockets of plugins lie outside the exec root; their directories are named after the plugins.
    fn remove_plugin_sockets(&self) {
        for plugin in std::fs::read_dir(self.data_root().join("plugins")).into_iter().flatten().flatten() {
            let directory = Path::new("/run/docker/plugins").join(plugin.file_name());
            if plugin.file_name().len() == 64 && directory.is_dir() {
                scratch::remove(&directory);
            }
        }
    }
}

impl Drop for Dockerd {
    fn drop(&mut self) {
        if std::thread::panicking() || self.troubled.load(Ordering::Relaxed) {
            print_log("log of dockerd and its plugins", &self.log_text());
        }
        self.stop();
        self.remove_plugin_sockets();
    }
}

fn run_arguments<'a>(arguments: &[&'a str]) -> Vec<&'a str> {
    let mut all = vec!["run", "--rm", "--network=host"];
    all.extend(arguments);
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Image, Registry};

    #[test]
    fn a_throw_away_engine_pulls_and_runs_an_image_and_leaves_nothing() {
        let registry = Registry::start().unwrap();
        registry.push("busybox", "1", &Image::busybox().unwrap()).unwrap();
        let mut dockerd = Dockerd::builder().start().unwrap();
        let image = registry.reference("busybox", "1");
        assert_eq!(dockerd.run(&[&image, "/bin/echo", "hello"]).unwrap(), "hello");
        dockerd.restart().unwrap();
        assert!(dockerd.docker(&["images", "-q"]).unwrap().lines().count() == 1);
        let (data, runtime) = (dockerd.data.path().to_owned(), dockerd.runtime.path().to_owned());
        drop(dockerd);
        assert!(!data.exists() && !runtime.exists());
        assert!(mounts::below(&data).is_empty() && mounts::below(&runtime).is_empty());
    }
}
