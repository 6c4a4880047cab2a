//! An engine whose storage driver is the product's managed plugin.

use std::path::PathBuf;

use anyhow::Result;

use crate::managed_plugin::{self, Links, NAME};
use crate::published::EtcCvmfs;
use crate::{Dockerd, DockerdBuilder, ScratchDir, binary};

/// A dockerd started with `-s` on the plugin. Stopped and removed when dropped.
#[derive(Debug)]
pub struct ThinEngine {
    /// The engine.
    pub dockerd: Dockerd,
    /// What the plugin sees as `/etc/cvmfs`.
    pub etc: EtcCvmfs,
    minio: PathBuf,
    _directory: ScratchDir,
}

impl ThinEngine {
    /// Starts an engine on overlay2, creates and enables the plugin with a configuration without any
    /// repository, and restarts the engine on it. Uses the binary of this build.
    pub fn start() -> Result<Self> {
        Self::start_with(&binary("cvmfs-graphdriver"))
    }

    /// As [`ThinEngine::start`], with this plugin binary.
    pub fn start_with(graphdriver: &std::path::Path) -> Result<Self> {
        Self::start_on(Dockerd::builder(), graphdriver)
    }

    /// As [`ThinEngine::start_with`], with these options of the engine.
    pub fn start_on(dockerd: DockerdBuilder, graphdriver: &std::path::Path) -> Result<Self> {
        let directory = ScratchDir::new("plugin")?;
        let etc = EtcCvmfs::create(&directory.path().join("etc-cvmfs"))?;
        let minio = directory.path().join("minio");
        std::fs::create_dir(&minio)?;
        let plugin = directory.path().join("plugin");
        managed_plugin::assemble(&plugin, graphdriver)?;
        let mut dockerd = dockerd.start()?;
        managed_plugin::enable(&dockerd, &plugin, Links { cvmfs: etc.path(), minio: &minio })?;
        crate::scratch::remove(&plugin);
        dockerd.restart_with_driver(NAME)?;
        Ok(Self { dockerd, etc, minio, _directory: directory })
    }

    /// Directory in which the plugin looks for the layer service's `config.json`; empty at first.
    pub fn layer_service_config(&self) -> &std::path::Path {
        &self.minio
    }

    /// The propagated mount of the plugin, on the host.
    pub fn propagated_mount(&self) -> Result<PathBuf> {
        let id = self.dockerd.docker(&["plugin", "inspect", "--format", "{{.ID}}", NAME])?;
        Ok(self.dockerd.data_root().join("plugins").join(id).join("propagated-mount"))
    }
}
