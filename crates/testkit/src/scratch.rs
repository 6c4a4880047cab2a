//! Directories for one run, on a real file system, that are unmounted and removed at the end.
//!
//! They lie in `target/tmp` (the cache behind a FUSE passthrough and an overlay's upper directory must not
//! lie on tmpfs or on another overlay), or in `/run` where a path must be short enough for a socket. The
//! owner's process id is part of the name: what a killed run left is swept by the next one.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Once, OnceLock};

use anyhow::{Context as _, Result};
use rustix::process::Signal;

use crate::{mounts, process, workspace_root};

const PREFIX: &str = "cvmfs-scratch-";

/// What an engine starts, by the beginning of the process name.
const ENGINE_PROGRAMS: [&str; 4] = ["dockerd", "containerd", "runc", "docker-registry"];

static BASE: OnceLock<PathBuf> = OnceLock::new();

/// From now on [`ScratchDir::new`] makes its directories below this one instead of `target/tmp`. The first
/// call counts.
pub fn use_base(directory: &Path) {
    let _ = BASE.set(directory.to_owned());
}

fn base() -> PathBuf {
    BASE.get().cloned().unwrap_or_else(|| workspace_root().join("target/tmp"))
}

/// A directory that is emptied of mounts and removed when dropped.
#[derive(Debug)]
pub struct ScratchDir {
    path: PathBuf,
    keep: bool,
}

impl ScratchDir {
    /// A new directory below `target/tmp` (or what [`use_base`] said); `name` is part of its name.
    pub fn new(name: &str) -> Result<Self> {
        Self::below(&base(), name)
    }

    /// A new directory below `/run`, with a short path: a socket's path holds 107 bytes.
    pub fn runtime(name: &str) -> Result<Self> {
        Self::below(Path::new("/run"), name)
    }

    fn below(parent: &Path, name: &str) -> Result<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        static SWEEP: Once = Once::new();
        SWEEP.call_once(sweep);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!("{PREFIX}{}-{number}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self { path, keep: false })
    }

    /// Where it is; absolute.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Leaves the directory in place, for looking at it after a failure.
    pub fn keep(&mut self) {
        self.keep = true;
    }
}

impl Drop for ScratchDir {
    fn drop(&mut self) {
        if !self.keep {
            remove(&self.path);
        }
    }
}

/// Removes a tree, after detaching all that is mounted in it. Never reaches through a mount: if one cannot
/// be detached, the tree stays and a message says so.
pub fn remove(path: &Path) {
    if !mounts::unmount_below(path) {
        eprintln!("{} stays: something below it could not be unmounted", path.display());
        return;
    }
    // A process that ends just now may still make files in it.
    let mut outcome = std::fs::remove_dir_all(path);
    for _ in 0..40 {
        match &outcome {
            Err(error) if error.kind() == std::io::ErrorKind::DirectoryNotEmpty => {
                std::thread::sleep(std::time::Duration::from_millis(25));
                outcome = std::fs::remove_dir_all(path);
            }
            _ => break,
        }
    }
    if let Err(error) = outcome
        && error.kind() != std::io::ErrorKind::NotFound
    {
        eprintln!("{} could not be removed wholly: {error}", path.display());
    }
}

/// Removes a file or a tree that may not exist; an error if something is mounted in it.
pub fn remove_any(path: &Path) -> Result<()> {
    anyhow::ensure!(mounts::below(path).is_empty(), "something is mounted below {}", path.display());
    let removed = match std::fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(_) => Ok(()),
    };
    removed.with_context(|| format!("cannot remove {}", path.display()))
}

/// Ends every process that belongs to an engine below `directory`: the engine's programs whose command line
/// names it, and all whose root file system lies in it (a managed plugin, a container).
pub fn end_processes(directory: &Path) {
    let belongs = |pid: u32| {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let engine = ENGINE_PROGRAMS.iter().any(|program| name.starts_with(program));
        engine && contains(&command, directory.as_os_str().as_encoded_bytes())
            || mounts::has_root_below(pid, directory)
    };
    for _ in 0..20 {
        let left = process::find(|pid| process::is_alive(pid) && belongs(pid));
        if left.is_empty() {
            return;
        }
        for pid in left {
            process::kill(pid, Signal::KILL);
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

/// Removes what killed runs left: directories whose owner is no longer alive.
fn sweep() {
    for parent in [base(), PathBuf::from("/run")] {
        for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let owner = name
                .to_str()
                .and_then(|name| name.strip_prefix(PREFIX))
                .and_then(|rest| rest.split('-').next())
                .and_then(|pid| pid.parse::<u32>().ok());
            if owner.is_some_and(|pid| pid != std::process::id() && !process::is_alive(pid)) {
                end_processes(&entry.path());
                remove(&entry.path());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scratch_directory_is_gone_afterwards() {
        let directory = ScratchDir::new("gone").unwrap();
        let path = directory.path().to_owned();
        std::fs::write(path.join("file"), "x").unwrap();
        drop(directory);
        assert!(!path.exists());
    }
}
