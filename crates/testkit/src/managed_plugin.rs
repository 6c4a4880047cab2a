//! The graph driver as a managed plugin: its directory (`config.json` and `rootfs/`), and its life in an
//! engine.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{Dockerd, workspace_root};

/// The name that stories and the demo give the plugin.
pub const NAME: &str = "cvmfs/graphdriver";

/// The empty directories of the root file system, with their modes; `packaging/plugin/README.md` says why.
const DIRECTORIES: [(&str, u32); 14] = [
    ("cvmfs_ext_config", 0o755),
    ("dev", 0o755),
    ("etc", 0o755),
    ("minio_ext_config", 0o755),
    ("mnt", 0o755),
    ("proc", 0o755),
    ("run", 0o755),
    ("run/cvmfs", 0o755),
    ("run/docker", 0o755),
    ("run/docker/plugins", 0o755),
    ("sys", 0o755),
    ("tmp", 0o1777),
    ("usr", 0o755),
    ("var", 0o755),
];

/// Makes a plugin directory in `output`, which must not exist or be empty: `packaging/plugin/config.json`,
/// the binary where `Entrypoint` expects it, and the empty directories.
pub fn assemble(output: &Path, binary: &Path) -> Result<()> {
    let config_file = workspace_root().join("packaging/plugin/config.json");
    let text =
        std::fs::read(&config_file).with_context(|| format!("cannot read {}", config_file.display()))?;
    let config: Value =
        serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", config_file.display()))?;
    let entrypoint = config["Entrypoint"][0].as_str().context("config.json has no Entrypoint")?;
    ensure!(binary.is_file(), "{} has not been built", binary.display());

    let root = output.join("rootfs");
    std::fs::create_dir_all(&root)?;
    for (directory, mode) in DIRECTORIES {
        let path = root.join(directory);
        std::fs::create_dir_all(&path)?;
        std::fs::set_permissions(&path, Permissions::from_mode(mode))?;
    }
    for mount in config["Mounts"].as_array().into_iter().flatten() {
        let point = mount["Destination"].as_str().unwrap_or_default();
        ensure!(root.join(point.trim_start_matches('/')).is_dir(), "no directory for the mount at {point}");
    }
    // Configuration files name their keys by absolute path.
    std::os::unix::fs::symlink("/cvmfs_ext_config", root.join("etc/cvmfs"))?;
    let target = root.join(entrypoint.trim_start_matches('/'));
    std::fs::copy(binary, &target).with_context(|| format!("cannot copy {}", binary.display()))?;
    std::fs::set_permissions(&target, Permissions::from_mode(0o755))?;
    std::fs::write(output.join("config.json"), text)?;
    Ok(())
}

/// Where the plugin finds its configuration on the host.
#[derive(Debug, Clone, Copy)]
pub struct Links<'a> {
    /// Source of `cvmfs_ext_config`: the directory in the form of `/etc/cvmfs`.
    pub cvmfs: &'a Path,
    /// Source of `minio_ext_config`: the directory of the layer publisher's configuration.
    pub minio: &'a Path,
}

/// `docker plugin create`, `set` of both links, `enable`.
pub fn enable(dockerd: &Dockerd, directory: &Path, links: Links<'_>) -> Result<()> {
    let text = |path: &Path| path.to_str().map(str::to_owned).context("a path is not UTF-8");
    dockerd.docker(&["plugin", "create", NAME, &text(directory)?])?;
    let cvmfs = format!("cvmfs_ext_config={}", text(links.cvmfs)?);
    let minio = format!("minio_ext_config={}", text(links.minio)?);
    dockerd.docker(&["plugin", "set", NAME, &cvmfs, &minio])?;
    dockerd.docker(&["plugin", "enable", NAME])?;
    Ok(())
}

/// The processes of the plugin in this engine (of all that run the plugin's entry point).
pub fn processes(dockerd: &Dockerd) -> Vec<u32> {
    let plugins = dockerd.data_root().join("plugins");
    crate::process::find(|pid| crate::mounts::has_root_below(pid, &plugins))
}
