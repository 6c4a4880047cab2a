//! Whether the cache can be written, has room, and lies where reads are fast.

use std::path::PathBuf;

use cvmfs_client::config::ClientSettings;
use cvmfs_client::store::Cache;

use super::Findings;
use crate::filesystem::chain;

/// Less free space than this is soon gone.
const LITTLE_SPACE: u64 = 256 << 20;
const OVERLAY: u64 = 0x794c_7630;
const NFS: u64 = 0x6969;
const FUSE: u64 = 0x6573_5546;

/// Where the chain of trust can keep what it fetches.
pub(super) enum Place {
    /// In the cache.
    Cache,
    /// The cache cannot be used: in a directory that is removed again.
    Elsewhere(PathBuf),
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Place::Elsewhere(directory) = self {
            let _ = std::fs::remove_dir_all(directory);
        }
    }
}

pub(super) fn check(findings: &mut Findings, settings: &ClientSettings) -> Place {
    let cache = match Cache::from_settings(&settings.cache) {
        Ok(cache) => cache,
        Err(error) => {
            findings.fail("cache", chain(&error), None, 1);
            let elsewhere = format!("cvmfs-check.{}", std::process::id());
            return Place::Elsewhere(std::env::temp_dir().join(elsewhere));
        }
    };
    let directory = cache.directory();
    let shown = directory.display();
    let Ok(partition) = rustix::fs::statvfs(directory) else {
        findings.warn("cache", format!("{shown}: its file system does not tell its size"), "use another one");
        return Place::Cache;
    };
    let megabytes = |bytes: u64| bytes >> 20;
    let (free, total) = (partition.f_bavail * partition.f_frsize, partition.f_blocks * partition.f_frsize);
    let usage = cache.usage();
    let configured = settings.cache.primary.limit();
    let unlimited = configured == u64::MAX;
    if !unlimited && configured > total {
        findings.warn(
            "cache",
            format!(
                "{shown}: the limit of {} MiB is larger than the partition; {} MiB are used",
                megabytes(configured),
                megabytes(usage.limit)
            ),
            "set CVMFS_QUOTA_LIMIT to what the partition can spare",
        );
    } else if free < LITTLE_SPACE {
        findings.warn(
            "cache",
            format!("{shown}: only {} MiB of the partition are free", megabytes(free)),
            "make room, or move the cache with CVMFS_CACHE_BASE: what cannot be kept is fetched again",
        );
    } else {
        findings.ok(
            "cache",
            format!(
                "{shown} can be written; {} of {} MiB used, {} MiB of the partition free",
                megabytes(usage.used),
                if unlimited { "unlimited".into() } else { megabytes(usage.limit).to_string() },
                megabytes(free)
            ),
        );
    }
    let kind = rustix::fs::statfs(directory).map_or(0, |found| found.f_type as u64);
    let slow = match kind {
        OVERLAY => Some("an overlay"),
        NFS => Some("NFS"),
        FUSE => Some("FUSE"),
        _ => None,
    };
    if let Some(kind) = slow {
        findings.warn(
            "cache",
            format!("{shown} lies on {kind}: no passthrough, reads go through the client"),
            "put CVMFS_CACHE_BASE on a local file system such as ext4 or xfs",
        );
    }
    Place::Cache
}
