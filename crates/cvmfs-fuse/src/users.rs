//! Which processes use a mount, found without touching it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Processes named in a message; a busy node may have thousands.
pub(crate) const MAX_USERS: usize = 20;

/// A process that keeps a mount busy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) pid: u32,
    /// Its command's name.
    pub(crate) command: String,
    /// How it uses the mount: working directory, an open file, a mapped file.
    pub(crate) how: &'static str,
}

/// The processes with something of the mount at `mountpoint` in use, by pid, at most [`MAX_USERS`].
/// `device` is its number (`major:minor`), by which mapped files are told. Links in `/proc` are read and never
/// followed, so that this works for a mount that hangs, too.
pub(crate) fn of(mountpoint: &Path, device: Option<&str>) -> Vec<User> {
    let mut found = BTreeMap::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        if let Some(how) = use_by(&process.path(), mountpoint, device) {
            let command = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            found.insert(pid, User { pid, command: command.trim().to_owned(), how });
        }
        if found.len() >= MAX_USERS {
            break;
        }
    }
    found.into_values().collect()
}

fn use_by(process: &Path, mountpoint: &Path, device: Option<&str>) -> Option<&'static str> {
    let is_inside = |link: &Path| fs::read_link(link).is_ok_and(|target| target.starts_with(mountpoint));
    for (name, how) in [("cwd", "working directory"), ("root", "root directory"), ("exe", "running program")]
    {
        if is_inside(&process.join(name)) {
            return Some(how);
        }
    }
    if fs::read_dir(process.join("fd")).into_iter().flatten().flatten().any(|fd| is_inside(&fd.path())) {
        return Some("open file");
    }
    let (major, minor) = device?.split_once(':')?;
    let device = format!("{:02x}:{:02x}", major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?);
    let maps = fs::read_to_string(process.join("maps")).ok()?;
    let is_mapped = maps.lines().any(|line| line.split_ascii_whitespace().nth(3) == Some(device.as_str()));
    is_mapped.then_some("mapped file")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_found_by_what_it_has_open() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().canonicalize().unwrap();
        assert!(of(&path, None).is_empty());
        let _open = fs::File::create(path.join("file")).unwrap();
        let users = of(&path, None);
        assert_eq!((users[0].pid, users[0].how), (std::process::id(), "open file"));
    }
}
