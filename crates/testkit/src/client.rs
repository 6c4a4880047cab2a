//! Repositories mounted by the `cvmfs-client` binary.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::process::{Finished, run};
use crate::{ScratchDir, binary};

/// A mount returns when the root answers, or fails after the client's own deadlines, which are shorter.
const MOUNT_TIMEOUT: Duration = Duration::from_secs(60);

/// How a repository is to be mounted.
#[derive(Debug, Clone)]
pub struct MountBuilder {
    fqrn: String,
    options: Vec<String>,
    environment: Vec<(String, String)>,
}

impl MountBuilder {
    /// A mount of `fqrn` that is configured by this file only.
    pub fn new(fqrn: &str, config: &Path) -> Self {
        let options = vec![format!("config={}", config.display())];
        Self { fqrn: fqrn.to_owned(), options, environment: Vec::new() }
    }

    /// One more `-o` option.
    #[must_use]
    pub fn option(mut self, option: &str) -> Self {
        self.options.push(option.to_owned());
        self
    }

    /// One more variable in the client's environment.
    #[must_use]
    pub fn environment(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Mounts; an error with all that the client said if it did not succeed.
    pub fn mount(self) -> Result<Mount> {
        let (mount, finished) = self.attempt()?;
        finished.success()?;
        Ok(mount)
    }

    /// Tries to mount and reports how the command ended, for mounts that are meant to fail.
    pub fn attempt(self) -> Result<(Mount, Finished)> {
        let directory = ScratchDir::new("mount")?;
        let mountpoint = directory.path().join(&self.fqrn);
        std::fs::create_dir(&mountpoint)?;
        let mut command = Command::new(binary("cvmfs-client"));
        command.args(["mount", "--json", &self.fqrn]).arg(&mountpoint).args(["-o", &self.options.join(",")]);
        command.envs(self.environment);
        let finished = run(command, MOUNT_TIMEOUT)?;
        let report: serde_json::Value = serde_json::from_str(&finished.stdout).unwrap_or_default();
        let control = report["control"].as_str().map(PathBuf::from);
        let log = control.as_ref().map(|control| control.with_extension("log"));
        Ok((Mount { fqrn: self.fqrn, mountpoint, control, log, _directory: directory }, finished))
    }
}

/// A mounted repository; unmounted when dropped.
#[derive(Debug)]
pub struct Mount {
    fqrn: String,
    mountpoint: PathBuf,
    control: Option<PathBuf>,
    log: Option<PathBuf>,
    _directory: ScratchDir,
}

impl Mount {
    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.mountpoint
    }

    /// Whether the mount table has it.
    pub fn is_mounted(&self) -> bool {
        !crate::mounts::below(&self.mountpoint).is_empty()
    }

    /// The document of this mount among those of `cvmfs-client status --json`: other mounts of the same
    /// repository may exist.
    pub fn status(&self) -> Result<serde_json::Value> {
        let mut command = Command::new(binary("cvmfs-client"));
        command.args(["status", "--json"]);
        let text = run(command, Duration::from_secs(10))?.stdout;
        let all: serde_json::Value =
            serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))?;
        let own = all
            .as_array()
            .into_iter()
            .flatten()
            .find(|one| one["mountpoint"] == self.mountpoint.to_string_lossy().as_ref());
        own.cloned().with_context(|| format!("{} is not among the mounts: {all}", self.fqrn))
    }

    /// What the control socket answers to a command, without the newline at its end.
    pub fn ask(&self, command: &str, timeout: Duration) -> Result<String> {
        let control = self.control.as_ref().context("the mount has no control socket")?;
        let mut stream = UnixStream::connect(control)
            .with_context(|| format!("nobody listens at {}", control.display()))?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        stream.write_all(command.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).with_context(|| format!("no answer to `{command}`"))?;
        Ok(answer.trim_end_matches('\n').to_owned())
    }

    /// What the processes of this mount have logged.
    pub fn log_text(&self) -> String {
        let bytes = self.log.as_ref().and_then(|file| std::fs::read(file).ok()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// `cvmfs-client umount --lazy`: a story may still have something open.
    pub fn unmount(&self) -> Result<()> {
        let mut command = Command::new(binary("cvmfs-client"));
        command.args(["umount", "--lazy"]).arg(&self.mountpoint);
        run(command, MOUNT_TIMEOUT)?.success().map(drop)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if std::thread::panicking() {
            crate::process::print_log(&format!("log of the mount of {}", self.fqrn), &self.log_text());
        }
        if self.is_mounted()
            && let Err(error) = self.unmount()
        {
            eprintln!("{error:#}");
        }
        // The log stays after an unmount, for looking into it; a test's is of no use any more.
        if let Some(log) = &self.log {
            let _ = std::fs::remove_file(log);
        }
    }
}
