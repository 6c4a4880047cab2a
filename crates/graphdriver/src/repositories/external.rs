//! `cvmfsMountMethod=external`: the host mounts the repositories below `<Home>/cvmfs`,
//! with whatever client it has.
//!
//! That client knows nothing of the engine's user namespace. With one, each repository is mounted once more by this
//! program with the owners of the namespace, if its client takes part; else its files show as the host's ids.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use overlay::ids::IdMaps;
use overlay::mountinfo::mount_at;
use overlay::owners::mount_mapped;

use super::client::mounted_below;
use super::{Fqrn, RepositoryError, RepositoryMounts, RepositoryStatus};
use crate::causes::with_causes;
use crate::mounts;

/// Repositories that somebody else mounts, and unmounts.
#[derive(Debug)]
pub struct ExternalMounts {
    directory: PathBuf,
    mapped: Option<Mapped>,
}

/// The same repositories with other owners.
#[derive(Debug)]
struct Mapped {
    directory: PathBuf,
    maps: IdMaps,
    /// Why repositories are not there.
    refusals: Mutex<BTreeMap<Fqrn, String>>,
}

impl ExternalMounts {
    /// `directory` is `<Home>/cvmfs`. With a user namespace, given by `maps`, repositories are mounted once more below
    /// `mapped`.
    pub fn new(directory: &Path, maps: &IdMaps, mapped: &Path) -> Self {
        let mapped = (*maps != IdMaps::default()).then(|| Mapped {
            directory: mapped.to_owned(),
            maps: maps.clone(),
            refusals: Mutex::default(),
        });
        Self { directory: directory.to_owned(), mapped }
    }

    fn mountpoint(&self, fqrn: &Fqrn) -> PathBuf {
        self.directory.join(fqrn.as_str())
    }
}

impl Mapped {
    fn mountpoint(&self, fqrn: &Fqrn) -> PathBuf {
        self.directory.join(fqrn.as_str())
    }

    fn refusals(&self) -> MutexGuard<'_, BTreeMap<Fqrn, String>> {
        self.refusals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The repository with the namespace's owners; `None` if that cannot be, which is said once.
    fn ensure(&self, fqrn: &Fqrn, source: &Path) -> Option<PathBuf> {
        let target = self.mountpoint(fqrn);
        if mounts::is_mounted(&target) {
            if is_same_file_system(source, &target) {
                return Some(target);
            }
            // The host has mounted the repository anew since.
            self.remove(fqrn);
        }
        let mapped = fs::create_dir_all(&target)
            .map_err(|error| error.to_string())
            .and_then(|()| mount_mapped(source, &target, &self.maps).map_err(|error| with_causes(&error)));
        match mapped {
            Ok(()) => {
                tracing::info!(%fqrn, "repository of the host mounted with the owners of the user namespace");
                self.refusals().remove(fqrn);
                Some(target)
            }
            Err(reason) => {
                let _ = fs::remove_dir(&target);
                let said = self.refusals().insert(fqrn.clone(), reason.clone());
                if said.as_ref() != Some(&reason) {
                    tracing::warn!(%fqrn, reason, "owners of files in the repository show as the host's");
                }
                None
            }
        }
    }

    fn remove(&self, fqrn: &Fqrn) {
        let target = self.mountpoint(fqrn);
        match mounts::unmount_all(&target) {
            // Removes nothing that has content, or on which something is mounted.
            Ok(()) => drop(fs::remove_dir(&target)),
            Err(error) => tracing::warn!(%fqrn, %error, "cannot unmount the mapped repository"),
        }
    }
}

/// Whether two mount points show one file system. Does not touch it: it may hang.
fn is_same_file_system(one: &Path, other: &Path) -> bool {
    let device = |path: &Path| {
        let (parent, name) = (path.parent()?.canonicalize().ok()?, path.file_name()?);
        mount_at(&parent.join(name)).ok()?.map(|mount| mount.device)
    };
    device(one).is_some_and(|device_of_one| device(other) == Some(device_of_one))
}

impl RepositoryMounts for ExternalMounts {
    fn ensure(&self, fqrn: &Fqrn, _timeout: Duration) -> Result<PathBuf, RepositoryError> {
        let mountpoint = self.mountpoint(fqrn);
        if !mounts::is_mounted(&mountpoint) {
            return Err(RepositoryError::NotMountedByHost { fqrn: fqrn.clone(), mountpoint });
        }
        let mapped = self.mapped.as_ref().and_then(|mapped| mapped.ensure(fqrn, &mountpoint));
        Ok(mapped.unwrap_or(mountpoint))
    }

    /// The host's client follows new revisions by itself.
    fn refresh(&self, _fqrn: &Fqrn, _timeout: Duration) {}

    fn revision(&self, _fqrn: &Fqrn) -> Option<u64> {
        None
    }

    /// The host's mount stays; the mapped one would keep the host's client busy.
    fn unmount(&self, fqrn: &Fqrn) -> Result<(), RepositoryError> {
        if let Some(mapped) = &self.mapped {
            mapped.remove(fqrn);
        }
        Ok(())
    }

    /// None that the plugin would have to unmount, but for mapped ones.
    fn mounted(&self) -> Vec<Fqrn> {
        self.mapped.as_ref().map_or_else(Vec::new, |mapped| mounted_below(&mapped.directory))
    }

    fn is_mounted(&self, fqrn: &Fqrn) -> bool {
        let mapped =
            || self.mapped.as_ref().is_some_and(|mapped| mounts::is_mounted(&mapped.mountpoint(fqrn)));
        mounts::is_mounted(&self.mountpoint(fqrn)) || mapped()
    }

    fn status(&self) -> Vec<RepositoryStatus> {
        let mapped = self.mounted();
        let summary = |fqrn: &Fqrn| {
            let Some(namespace) = &self.mapped else { return "mounted by the host".to_owned() };
            match namespace.refusals().get(fqrn) {
                _ if mapped.contains(fqrn) => "mounted by the host, id-mapped".to_owned(),
                Some(reason) => format!("mounted by the host, not id-mapped: {reason}"),
                None => "mounted by the host".to_owned(),
            }
        };
        let of_host = mounted_below(&self.directory).into_iter();
        of_host.map(|fqrn| RepositoryStatus { summary: summary(&fqrn), fqrn, client: None }).collect()
    }

    fn recover(&self) {}
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, chown};

    use overlay::ids::{IdMap, IdRange};
    use rustix::mount::{MountFlags, mount, mount_bind};

    use super::*;

    fn fqrn() -> Fqrn {
        Fqrn::from(&thin_image::Location::new("host.example.org", "x").unwrap())
    }

    fn maps() -> IdMaps {
        let map = || IdMap::new(vec![IdRange { container: 0, host: 100_000, size: 65_536 }]);
        IdMaps { users: map(), groups: map() }
    }

    #[test]
    fn a_repository_of_the_host_is_shown_with_the_owners_of_the_namespace_and_follows_the_host() {
        let home = tempfile::tempdir().unwrap();
        let (directory, mapped) = (home.path().join("cvmfs"), home.path().join("mapped"));
        let mountpoint = directory.join("host.example.org");
        let content = home.path().join("content");
        for path in [&mountpoint, &content] {
            fs::create_dir_all(path).unwrap();
        }
        chown(&content, Some(1000), Some(10)).unwrap();
        let external = ExternalMounts::new(&directory, &maps(), &mapped);
        let ensure = || external.ensure(&fqrn(), Duration::from_secs(1));
        assert!(matches!(ensure(), Err(RepositoryError::NotMountedByHost { .. })));
        assert!(!external.is_mounted(&fqrn()));

        mount_bind(&content, &mountpoint).unwrap();
        let owner = |path: &Path| fs::metadata(path).map(|found| (found.uid(), found.gid())).unwrap();
        let found = ensure().unwrap();
        assert_eq!((owner(&found), owner(&mountpoint)), ((101_000, 100_010), (1000, 10)));
        assert_eq!(external.status()[0].summary, "mounted by the host, id-mapped");
        assert_eq!(ensure().unwrap(), found, "mounted once");
        assert!(external.is_mounted(&fqrn()) && external.mounted() == [fqrn()]);

        // What containers still use is there, whatever the host does; and it shows what it mounts next, mapped or not.
        mounts::unmount_all(&mountpoint).unwrap();
        assert!(external.is_mounted(&fqrn()));
        mount("none", &mountpoint, "proc", MountFlags::empty(), None).unwrap();
        assert_eq!(ensure().unwrap(), mountpoint);
        assert!(external.mounted().is_empty());
        let summary = &external.status()[0].summary;
        assert!(summary.contains("not id-mapped: its file system cannot"), "{summary}");

        mounts::unmount_all(&mountpoint).unwrap();
        mount_bind(&content, &mountpoint).unwrap();
        ensure().unwrap();
        external.unmount(&fqrn()).unwrap();
        assert!(external.mounted().is_empty() && external.is_mounted(&fqrn()) && !found.exists());
        mounts::unmount_all(&mountpoint).unwrap();
    }
}
