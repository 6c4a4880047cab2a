//! Files that are not kept: they have no name and vanish with their last descriptor.
//!
//! They are what a reader gets when there is no room in the cache, or when nothing shall be kept. They lie on the
//! cache's partition, else in the directory for temporary files, and in memory as the last resort, within a bound.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

use rustix::fs::{MemfdFlags, fstatvfs, memfd_create};
use rustix::io::Errno;

/// Most bytes of all such files in memory, and their share of the memory that this process may use at all.
const MAX_MEMORY: u64 = 256 << 20;
const MEMORY_PART: u64 = 8;
/// Free space of a partition that is worth the move to it.
const WORTHWHILE: u64 = 64 << 20;

/// A nameless file outside the cache: in the directory for temporary files, or in memory.
pub(super) fn spill() -> io::Result<(File, Option<Arc<Lease>>)> {
    if let Ok(file) = tempfile::tempfile()
        && fstatvfs(&file).is_ok_and(|stat| stat.f_bavail.saturating_mul(stat.f_frsize) >= WORTHWHILE)
    {
        return Ok((file, None));
    }
    let (file, lease) = in_memory()?;
    Ok((file, Some(lease)))
}

/// A file in memory whose bytes are accounted for by the lease.
pub(super) fn in_memory() -> io::Result<(File, Arc<Lease>)> {
    let file = File::from(memfd_create("cvmfs-volatile", MemfdFlags::CLOEXEC)?);
    Ok((file, Arc::new(Lease(AtomicU64::new(0)))))
}

/// A share of the memory for volatile files, given back when the last holder of the file is gone.
#[derive(Debug)]
pub(super) struct Lease(AtomicU64);

/// Bytes of all leases.
static LEASED: AtomicU64 = AtomicU64::new(0);

impl Lease {
    /// Adds bytes to the share.
    ///
    /// # Errors
    /// `ENOSPC` beyond the bound.
    pub(super) fn extend(&self, bytes: u64) -> io::Result<()> {
        static MOST: LazyLock<u64> = LazyLock::new(|| MAX_MEMORY.min(memory_limit() / MEMORY_PART));
        let total = LEASED.fetch_add(bytes, Ordering::SeqCst) + bytes;
        self.0.fetch_add(bytes, Ordering::SeqCst);
        if total > *MOST { Err(Errno::NOSPC.into()) } else { Ok(()) }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        LEASED.fetch_sub(self.0.load(Ordering::SeqCst), Ordering::SeqCst);
    }
}

/// The memory that this process may use: that of the machine or, if smaller, of its control group.
pub(crate) fn memory_limit() -> u64 {
    let read = |path: &Path| std::fs::read_to_string(path).ok();
    let machine = read(Path::new("/proc/meminfo")).and_then(|text| total_memory(&text));
    let groups = read(Path::new("/proc/self/cgroup")).unwrap_or_default();
    let group = group_files(&groups).iter().filter_map(|file| read(file)?.trim().parse::<u64>().ok()).min();
    machine.unwrap_or(u64::MAX).min(group.unwrap_or(u64::MAX))
}

/// The files that limit the memory of a process in these control groups, of both versions. The limits of the groups
/// above hold as well.
fn group_files(groups: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (base, file) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            _ if controllers.split(',').any(|name| name == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => continue,
        };
        let above = Path::new(path.trim_start_matches('/')).ancestors();
        files.extend(above.map(|group| Path::new(base).join(group).join(file)));
    }
    files
}

fn total_memory(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kilobytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_s_memory_is_read() {
        assert_eq!(total_memory("MemTotal:       24589504 kB\nMemFree: 1 kB\n"), Some(24_589_504 * 1024));
        assert_eq!(total_memory("rubbish"), None);
        assert!(memory_limit() > 64 << 20);
    }

    #[test]
    fn control_groups_of_both_versions_are_asked() {
        let files = group_files("12:pids:/a\n4:memory:/jobs/7\n0::/x\n");
        let expected = [
            "/sys/fs/cgroup/memory/jobs/7/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/jobs/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/x/memory.max",
            "/sys/fs/cgroup/memory.max",
        ];
        assert_eq!(files, expected.map(PathBuf::from));
    }

    #[test]
    fn memory_is_bounded_and_comes_back() {
        let (_file, lease) = in_memory().unwrap();
        lease.extend(1 << 20).unwrap();
        assert!(lease.extend(MAX_MEMORY).is_err());
        drop(lease);
        let (_file, lease) = in_memory().unwrap();
        lease.extend(1 << 20).unwrap();
    }
}
