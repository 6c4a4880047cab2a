//! Rows of `docker info`.

use std::path::Path;

use super::Driver;
use crate::options::MountMethod;

impl Driver {
    /// `Status`: the rows of overlay2 first, in its order, because tools look for them.
    pub fn status(&self) -> Vec<(String, String)> {
        let row = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let mut rows = vec![
            row("Backing Filesystem", &self.backing),
            row("Supports d_type", "true"),
            row("Native Overlay Diff", "true"),
            row("CernVM-FS client", concat!("cvmfs-graphdriver ", env!("CARGO_PKG_VERSION"))),
            row("CernVM-FS mount method", self.options.mount_method.name()),
        ];
        let commits = match self.publishing.config() {
            Ok(Some(config)) => format!("by way of {} into {}", config.place(), config.repository),
            Ok(None) => "as ordinary layers (no config.json)".to_owned(),
            Err(error) => format!("not possible: {error}"),
        };
        rows.push(row("Commits on thin images", &commits));
        if self.in_user_namespace() {
            let effect = match self.options.mount_method {
                MountMethod::Internal => "mapped by the client",
                MountMethod::External => {
                    "id-mapped, where the host's client can be (else they show as the host's ids)"
                }
            };
            rows.push(row("User namespace", &format!("owners of files in thin images are {effect}")));
        }
        if let Some(size) = self.options.size {
            rows.push(row("Limit of each container", &format!("{} MiB (overlay2.size)", size >> 20)));
        }
        let repositories = self.repositories.status();
        if repositories.is_empty() {
            rows.push(row("Repositories", "none mounted"));
        }
        rows.extend(repositories.into_iter().map(|r| (format!("Repository {}", r.fqrn), r.summary)));
        rows
    }
}

/// The name that overlay2 shows for the file system of `path`.
pub(super) fn file_system_name(path: &Path) -> String {
    // From linux/magic.h, those that Docker names.
    const NAMES: [(u32, &str); 12] = [
        (0xef53, "extfs"),
        (0x5846_5342, "xfs"),
        (0x9123_683e, "btrfs"),
        (0x0102_1994, "tmpfs"),
        (0x2fc1_2fc1, "zfs"),
        (0x794c_7630, "overlayfs"),
        (0x6969, "nfs"),
        (0x6173_756d, "aufs"),
        (0x4d44, "msdos"),
        (0x5265_4973, "reiserfs"),
        (0x3153_464a, "jfs"),
        (0xf2f5_2010, "f2fs"),
    ];
    // The directory may not exist yet; its first existing ancestor is on the same file system.
    let existing = path.ancestors().find_map(|ancestor| rustix::fs::statfs(ancestor).ok());
    let magic = existing.map(|statfs| u32::try_from(statfs.f_type & 0xffff_ffff).unwrap_or_default());
    let name = magic.and_then(|magic| NAMES.iter().find(|(known, _)| *known == magic)).map(|(_, name)| *name);
    match (name, magic) {
        (Some(name), _) => name.to_owned(),
        (None, Some(magic)) => format!("<unknown 0x{magic:x}>"),
        (None, None) => "<unknown>".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_backing_file_system_has_the_name_that_docker_uses() {
        assert_eq!(file_system_name(Path::new("/dev/shm/not/there/yet")), "tmpfs");
    }
}
