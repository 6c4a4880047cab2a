//! The run directory: one record, one control socket and one log per mount.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::launch::{Mounted, run_directory};

/// Largest record that is read; ordinary ones have some hundred bytes.
const MAX_RECORD: u64 = 64 * 1024;
/// Logs of mounts that are gone which are kept, the newest: for looking into what happened, not as an archive.
const KEPT_LOGS: usize = 64;

/// Path of the control socket of a mount.
pub(crate) fn socket_path(fqrn: &str, mountpoint: &Path) -> PathBuf {
    base_path(fqrn, mountpoint, "sock")
}

/// Path of the record of a mount.
pub(crate) fn record_path(fqrn: &str, mountpoint: &Path) -> PathBuf {
    base_path(fqrn, mountpoint, "json")
}

/// Path of a mount's log file.
pub(crate) fn log_path(fqrn: &str, mountpoint: &Path) -> PathBuf {
    base_path(fqrn, mountpoint, "log")
}

/// Socket paths are limited to 107 bytes, so the mount point is hashed and the name cut.
fn base_path(fqrn: &str, mountpoint: &Path, extension: &str) -> PathBuf {
    let hash = cvmfs_format::PathHash::of(mountpoint.as_os_str().as_bytes());
    let short: String = fqrn.chars().take(48).collect();
    run_directory().join(format!("{short}.{:016x}.{extension}", hash.part1))
}

/// Writes the record of a mount, atomically.
pub(crate) fn write_record(mounted: &Mounted) -> io::Result<()> {
    let path = record_path(&mounted.fqrn, &mounted.mountpoint);
    let temporary = path.with_extension("new");
    fs::write(&temporary, serde_json::to_vec_pretty(mounted)?)?;
    fs::rename(temporary, path)
}

/// A mount that this user made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// What was written at the mount.
    pub mounted: Mounted,
    /// Whether its supervisor lives. Without it nobody answers, and the mount point is of no use.
    pub alive: bool,
}

/// The mounts of this user whose supervisors live.
pub fn records() -> Vec<Mounted> {
    all_records().into_iter().filter(|record| record.alive).map(|record| record.mounted).collect()
}

/// The mounts of this user: those that live, and those whose processes are gone while the kernel still has them.
/// Records of others are removed.
pub(super) fn all_records() -> Vec<Record> {
    let mut found = Vec::new();
    let Ok(directory) = fs::read_dir(run_directory()) else { return found };
    for entry in directory.flatten() {
        let path = entry.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let Some(mounted) = read_record(&path) else { continue };
        let alive = is_supervisor(mounted.supervisor_pid);
        if alive || is_in_mount_table(&mounted.mountpoint) {
            found.push(Record { mounted, alive });
        } else {
            let _ = fs::remove_file(&path);
            let _ = fs::remove_file(&mounted.control);
        }
    }
    found.sort_by(|one, other| {
        (&one.mounted.fqrn, &one.mounted.mountpoint).cmp(&(&other.mounted.fqrn, &other.mounted.mountpoint))
    });
    found
}

fn read_record(path: &Path) -> Option<Mounted> {
    if fs::metadata(path).ok()?.len() > MAX_RECORD {
        return None;
    }
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// Whether the process is a supervisor of ours: a pid alone may have been used again.
fn is_supervisor(pid: u32) -> bool {
    fs::read(format!("/proc/{pid}/cmdline"))
        .is_ok_and(|line| line.split(|byte| *byte == 0).nth(1) == Some(crate::SUPERVISOR_ROLE.as_bytes()))
}

fn is_in_mount_table(mountpoint: &Path) -> bool {
    crate::mount_table::at(mountpoint)
        .is_ok_and(|entry| entry.is_some_and(|entry| entry.kind == crate::launch::FILE_SYSTEM_TYPE))
}

/// Removes the oldest logs of mounts that are gone, so that the run directory does not grow with every mount point
/// that was ever used.
pub(crate) fn forget_old_logs() {
    let Ok(directory) = fs::read_dir(run_directory()) else { return };
    let mut logs: Vec<(SystemTime, PathBuf)> = directory
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
        .filter(|path| !path.with_extension("json").exists())
        .filter_map(|path| Some((fs::metadata(&path).ok()?.modified().ok()?, path)))
        .collect();
    logs.sort_by(|one, other| other.cmp(one));
    for (_, path) in logs.into_iter().skip(KEPT_LOGS) {
        let mut older = path.clone().into_os_string();
        older.push(".1");
        let _ = fs::remove_file(&path);
        let _ = fs::remove_file(older);
    }
}
