//! A worker's access to files, reduced to what it works with (Landlock, Linux 5.19).
//!
//! It parses what servers and images send. Whoever would take it over by that finds no more files than these: the
//! configuration and what it names, the machine's settings, and, for writing, caches, logs and sockets. Landlock also
//! keeps it from mounting, and from looking into other processes.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use cvmfs_client::config::{CacheInstance, ClientSettings, Config};
use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetError, path_beneath_rules,
};

use crate::control::ControlSettings;
use crate::launch::{MountRequest, run_directory};
use crate::logging;
use crate::metrics::MetricsAddress;

/// Renames between directories, which caches rest on, are always forbidden by older ones.
const REQUIRED: ABI = ABI::V2;
/// What every program may read: names and addresses, certificates, clocks, its own state, repositories with configuration.
const OF_THE_MACHINE: [&str; 8] = ["/etc", "/usr", "/lib", "/lib64", "/dev", "/proc", "/sys", "/cvmfs"];
/// Devices that are written to.
const DEVICES: [&str; 2] = ["/dev/null", "/dev/fuse"];

/// What a worker needs.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Files {
    reads: Vec<PathBuf>,
    writes: Vec<PathBuf>,
}

impl Files {
    pub(crate) fn of(
        request: &MountRequest,
        config: &Config,
        client: &ClientSettings,
        observed: &ControlSettings,
    ) -> Self {
        let mut reads: Vec<PathBuf> = OF_THE_MACHINE.map(PathBuf::from).into();
        reads.push(request.sources.directory.clone());
        reads.extend(request.sources.files.iter().flatten().cloned());
        reads.extend(
            [&client.public_keys, &client.blacklists, &client.authorities].into_iter().flatten().cloned(),
        );
        reads.extend(config.iter().flat_map(|(_, setting)| named_paths(&setting.value)));

        let mut writes: Vec<PathBuf> = DEVICES.map(PathBuf::from).into();
        writes.push(run_directory());
        writes.extend(cache_directories(&client.cache.primary).into_iter().map(existing));
        let metrics = observed.metrics.as_ref().and_then(|address| match address {
            MetricsAddress::Unix(path) => Some(path.as_path()),
            MetricsAddress::Loopback(_) => None,
        });
        let logs = logging::files(request, config);
        let files = logs.iter().map(PathBuf::as_path).chain(metrics).chain([observed.talk.path.as_path()]);
        writes.extend(files.filter_map(Path::parent).map(existing));
        Self { reads, writes }
    }

    /// Confines this thread and all that it starts. Call it before there are others.
    ///
    /// # Errors
    /// A kernel without Landlock, or with the first version of it.
    pub(crate) fn confine(&self) -> Result<(), RulesetError> {
        let ruleset = Ruleset::default()
            .set_compatibility(CompatLevel::HardRequirement)
            .handle_access(AccessFs::from_all(REQUIRED))?
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::Truncate)?
            .create()?;
        let reading = AccessFs::from_read(ABI::V3);
        let writing: BitFlags<AccessFs> = AccessFs::from_all(ABI::V3) & !BitFlags::from(AccessFs::Execute);
        // What is not there cannot be allowed, and need not be.
        ruleset
            .add_rules(path_beneath_rules(&self.reads, reading))?
            .add_rules(path_beneath_rules(&self.writes, writing))?
            .restrict_self()?;
        Ok(())
    }
}

/// Gives up the right to act as other users, which whoever mounts for containers may need and a worker does not. Call
/// it before there are other threads.
///
/// # Errors
/// The kernel refuses.
pub(crate) fn drop_identities() -> std::io::Result<()> {
    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
    let mut own = capabilities(None)?;
    let dropped = CapabilitySet::SETUID | CapabilitySet::SETGID;
    for set in [&mut own.effective, &mut own.permitted, &mut own.inheritable] {
        set.remove(dropped);
    }
    Ok(set_capabilities(None, own)?)
}

/// The absolute paths in a value: one, or several in one of the forms of the configuration.
fn named_paths(value: &str) -> impl Iterator<Item = PathBuf> {
    let words = value.split([':', ';', ',', '|', ' ']).map(|word| word.trim_start_matches("//"));
    words.filter(|word| word.starts_with('/') && *word != "/").map(PathBuf::from)
}

fn cache_directories(instance: &CacheInstance) -> Vec<&Path> {
    match instance {
        CacheInstance::Directory(directory) => vec![&directory.path],
        CacheInstance::Memory { workspace, .. } => vec![workspace],
        CacheInstance::Tiered { upper, lower, .. } => {
            let mut both = cache_directories(upper);
            both.extend(cache_directories(lower));
            both
        }
    }
}

/// The directory, or the one in which it will be made.
fn existing(directory: &Path) -> PathBuf {
    match directory.parent() {
        Some(parent) if !directory.is_dir() => {
            // As the cache would do; what fails here fails there, too, and is told then.
            let _ = DirBuilder::new().recursive(true).mode(0o755).create(parent);
            parent.to_owned()
        }
        _ => directory.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::ErrorKind::PermissionDenied;

    #[test]
    fn a_confined_worker_finds_what_it_works_with_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        for name in ["config", "cache", "cache/txn", "other"] {
            fs::create_dir(at(name)).unwrap();
            fs::write(at(name).join("file"), name).unwrap();
        }
        let files = Files { reads: vec![at("config"), at("missing")], writes: vec![at("cache")] };
        // In a thread of its own: it stays for its life.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                if let Err(error) = files.confine() {
                    eprintln!("not tested, this kernel cannot confine: {error}");
                    return;
                }
                let refused = |outcome: std::io::Result<()>| {
                    assert_eq!(outcome.map_err(|error| error.kind()), Err(PermissionDenied));
                };
                assert_eq!(fs::read(at("config/file")).unwrap(), b"config");
                refused(fs::write(at("config/file"), b"changed"));
                fs::rename(at("cache/txn/file"), at("cache/object")).unwrap();
                fs::write(at("cache/object"), b"changed").unwrap();
                refused(fs::read(at("other/file")).map(drop));
                refused(fs::write(at("other/new"), b"new"));
                refused(fs::rename(at("cache/object"), at("other/object")));
                refused(fs::read_dir(directory.path()).map(drop));
            });
        });
    }

    #[test]
    fn what_the_configuration_names_may_be_read() {
        let paths = |value: &str| named_paths(value).collect::<Vec<_>>();
        assert_eq!(paths("/a/b.pub:/c/d.pub"), [PathBuf::from("/a/b.pub"), "/c/d.pub".into()]);
        assert_eq!(paths("file:///etc/proxy.pac"), [PathBuf::from("/etc/proxy.pac")]);
        assert!(paths("http://host.example.org/cvmfs|DIRECT;yes /").iter().all(|path| path.starts_with("/")));
        assert!(paths("").is_empty() && paths("/").is_empty() && paths("no/path").is_empty());
    }
}
