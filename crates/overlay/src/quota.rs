//! Limits on the disk space that a layer may take: project quotas of xfs and ext4 (xfs_quota(8), quotactl(2)).
//!
//! What a directory's subtree takes is counted under the number of a project, which files inherit from their directory.
//! The numbers are found in the file system itself: one is free that has neither files nor limits. So nothing has to be
//! remembered. They begin where those of the engine's own driver and volumes, which count from 1, do not come.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{Mode, OFlags};
use thiserror::Error;

use crate::sys::{self, DiskQuota};

/// Quotas count in such units.
const BLOCK: u64 = 512;
/// `FS_DQ_BSOFT` and `FS_DQ_BHARD`: which limits are set.
const FIELDS: u16 = 1 << 2 | 1 << 3;
/// `FS_XFLAG_PROJINHERIT`: new files belong to their directory's project.
const INHERITED: u32 = 0x200;
/// Projects of layers begin so far behind that of the home.
const FIRST: u32 = 1 << 30;
/// So many projects are looked at for a free one.
const MOST_TRIED: u32 = 1 << 20;

/// Why a limit cannot be set.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum QuotaError {
    /// The kernel or the file system has no project quotas.
    #[error(
        "the file system of {} has no project quotas; mount it with prjquota (xfs, or ext4 made with -O quota,project), on \
         Linux 5.14 or newer",
        directory.display()
    )]
    NotSupported {
        /// Where it was tried.
        directory: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// All numbers that were looked at are taken.
    #[error("no free project in the file system of {}: {MOST_TRIED} are in use", directory.display())]
    NoneFree {
        /// Where it was tried.
        directory: PathBuf,
    },
    /// Something else.
    #[error("cannot {what} {}", path.display())]
    Failed {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl QuotaError {
    fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> QuotaError {
        move |source| QuotaError::Failed { what, path: path.to_owned(), source }
    }
}

/// The project quotas of one file system.
#[derive(Debug)]
pub struct ProjectQuotas {
    home: PathBuf,
    directory: File,
    /// Projects below this one are not ours.
    first: u32,
    /// Where the search for a free one begins.
    next: Mutex<u32>,
}

impl ProjectQuotas {
    /// The quotas of the file system of `home`. An administrator keeps several users of a file system apart by giving
    /// each `home` a project: those of layers follow it.
    ///
    /// # Errors
    /// [`QuotaError::NotSupported`], also if limits are not enforced.
    pub fn of(home: &Path) -> Result<ProjectQuotas, QuotaError> {
        let not_supported = |source| QuotaError::NotSupported { directory: home.to_owned(), source };
        let directory = open(home).map_err(QuotaError::failed("open", home))?;
        let own = sys::attributes(directory.as_fd()).map_err(not_supported)?.project;
        if !sys::enforces_project_quotas(directory.as_fd()).map_err(not_supported)? {
            return Err(not_supported(io::Error::other(
                "projects are counted there, but their limits not enforced",
            )));
        }
        let first =
            own.checked_add(FIRST).ok_or_else(|| not_supported(io::ErrorKind::InvalidInput.into()))?;
        Ok(ProjectQuotas { home: home.to_owned(), directory, first, next: Mutex::new(first) })
    }

    /// From now on all that is created in these empty directories takes at most `bytes` of disk space together.
    ///
    /// # Errors
    /// [`QuotaError`]; a part of the directories may have the limit then.
    pub fn limit(&self, directories: &[&Path], bytes: u64) -> Result<(), QuotaError> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let project = self.free_from(*next)?;
        // The directories first: whoever removes them finds the limit to lift.
        for path in directories {
            let enter = || {
                let directory = open(path)?;
                let mut attributes = sys::attributes(directory.as_fd())?;
                attributes.project = project;
                attributes.flags |= INHERITED;
                sys::set_attributes(directory.as_fd(), &attributes)
            };
            enter().map_err(QuotaError::failed("set the project of", path))?;
        }
        sys::set_project_quota(self.directory.as_fd(), project, limits(bytes / BLOCK))
            .map_err(QuotaError::failed("set a quota on the file system of", &self.home))?;
        *next = project.checked_add(1).unwrap_or(self.first);
        Ok(())
    }

    /// The project of `directory`, if it has one of those of layers.
    pub fn project_of(&self, directory: &Path) -> Option<u32> {
        let project = sys::attributes(open(directory).ok()?.as_fd()).ok()?.project;
        (project >= self.first).then_some(project)
    }

    /// The limit of a project in bytes, if it has one.
    pub fn limit_of(&self, project: u32) -> Option<u64> {
        let quota = sys::project_quota(self.directory.as_fd(), project).ok()?;
        Some(quota.hard_blocks.saturating_mul(BLOCK)).filter(|bytes| *bytes > 0)
    }

    /// Lifts the limit of a project, which is free again when its files are gone.
    ///
    /// # Errors
    /// [`QuotaError::Failed`].
    pub fn release(&self, project: u32) -> Result<(), QuotaError> {
        sys::set_project_quota(self.directory.as_fd(), project, limits(0))
            .map_err(QuotaError::failed("lift a quota on the file system of", &self.home))
    }

    fn free_from(&self, start: u32) -> Result<u32, QuotaError> {
        let mut project = start;
        for _ in 0..MOST_TRIED {
            match sys::project_quota(self.directory.as_fd(), project) {
                Ok(quota) if is_used(&quota) => project = project.checked_add(1).unwrap_or(self.first),
                Ok(_) => return Ok(project),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(project),
                Err(source) => {
                    return Err(QuotaError::NotSupported { directory: self.home.clone(), source });
                }
            }
        }
        Err(QuotaError::NoneFree { directory: self.home.clone() })
    }
}

fn is_used(quota: &DiskQuota) -> bool {
    let DiskQuota { hard_blocks, soft_blocks, hard_inodes, soft_inodes, blocks, inodes, .. } = *quota;
    [hard_blocks, soft_blocks, hard_inodes, soft_inodes, blocks, inodes].iter().any(|number| *number > 0)
}

fn limits(blocks: u64) -> DiskQuota {
    DiskQuota { fields: FIELDS, hard_blocks: blocks, soft_blocks: blocks, ..DiskQuota::default() }
}

fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_without_project_quotas_is_named_with_what_to_do() {
        let error = ProjectQuotas::of(Path::new("/proc")).unwrap_err();
        assert!(matches!(error, QuotaError::NotSupported { .. }), "{error:?}");
        assert!(error.to_string().contains("/proc has no project quotas; mount it with prjquota"), "{error}");
        assert!(matches!(ProjectQuotas::of(Path::new("/absent")), Err(QuotaError::Failed { .. })));
    }
}
