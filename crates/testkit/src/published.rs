//! Repositories written by the product's own publisher and served over HTTP.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::process::{Finished, run};
use crate::{Origin, ScratchDir, binary, fixture};

/// Publishing a whole root file system with unoptimised code takes a minute or two.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(600);

/// A fresh repository with its keys; removed when dropped.
#[derive(Debug)]
pub struct Published {
    /// Its name.
    pub fqrn: String,
    /// The storage directory.
    pub storage: PathBuf,
    /// The directory with `FQRN.{masterkey,pub,key,crt}`.
    pub keys: PathBuf,
    /// Serves the storage.
    pub origin: Origin,
    directory: ScratchDir,
}

impl Published {
    /// `cvmfs-publish mkfs FQRN`, served by an [`Origin`].
    pub fn create(fqrn: &str) -> Result<Self> {
        Self::create_with(fqrn, &[])
    }

    /// As [`Published::create`], with more options of `mkfs`.
    pub fn create_with(fqrn: &str, options: &[&str]) -> Result<Self> {
        let directory = ScratchDir::new("repository")?;
        let (storage, keys) = (directory.path().join("storage"), directory.path().join("keys"));
        std::fs::create_dir(&storage)?;
        std::fs::create_dir(&keys)?;
        let origin = Origin::serve(&storage)?;
        let published = Self { fqrn: fqrn.to_owned(), storage, keys, origin, directory };
        published.publish("mkfs", options)?.success()?;
        Ok(published)
    }

    /// `cvmfs-publish VERB FQRN --storage … --keys … ARGUMENTS…`.
    pub fn publish(&self, verb: &str, arguments: &[&str]) -> Result<Finished> {
        let mut command = Command::new(binary("cvmfs-publish"));
        command.args([verb, &self.fqrn]);
        command.arg("--storage").arg(&self.storage).arg("--keys").arg(&self.keys).args(arguments);
        run(command, PUBLISH_TIMEOUT)
    }

    /// Ingests an archive below `base`; the document that `--json` prints.
    pub fn ingest(&self, base: &str, tar: &[u8], options: &[&str]) -> Result<Value> {
        let file = self.directory.path().join("layer.tar");
        std::fs::write(&file, tar)?;
        let file = file.to_str().context("a path is not UTF-8")?;
        let mut arguments = vec!["--base", base, "--tar", file, "--json"];
        arguments.extend(options);
        let text = self.publish("ingest", &arguments)?.success()?;
        serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))
    }

    /// `docker2cvmfs convert IMAGE … OPTIONS… --json` into this repository.
    pub fn convert_output(&self, image: &str, options: &[&str]) -> Result<Finished> {
        let mut command = Command::new(binary("docker2cvmfs"));
        command.args(["convert", image, "--repository", &self.fqrn]);
        command.arg("--storage").arg(&self.storage).arg("--keys").arg(&self.keys);
        command.args(options).arg("--json");
        run(command, PUBLISH_TIMEOUT)
    }

    /// As [`Published::convert_output`], with the document that it prints.
    pub fn convert(&self, image: &str, options: &[&str]) -> Result<Value> {
        let text = self.convert_output(image, options)?.success()?;
        serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))
    }

    /// The public master key.
    pub fn public_key(&self) -> PathBuf {
        self.keys.join(format!("{}.pub", self.fqrn))
    }

    /// A directory that is removed with the repository.
    pub fn scratch(&self) -> &Path {
        self.directory.path()
    }

    /// Writes a client configuration with a cache of its own; returns the file.
    pub fn client_config(&self) -> Result<PathBuf> {
        let file = self.directory.path().join("client.conf");
        let cache = self.directory.path().join("cache");
        fixture::write_client_config(&file, &cache, &self.origin.url(), &self.public_key())?;
        Ok(file)
    }
}

/// A directory in the form of `/etc/cvmfs`, for the plugin.
#[derive(Debug)]
pub struct EtcCvmfs {
    directory: PathBuf,
}

impl EtcCvmfs {
    /// Makes the directory, with direct connections and short time limits.
    pub fn create(directory: &Path) -> Result<Self> {
        for name in ["config.d", "domain.d", "keys"] {
            std::fs::create_dir_all(directory.join(name))?;
        }
        std::fs::write(
            directory.join("default.local"),
            "CVMFS_HTTP_PROXY=DIRECT\nCVMFS_TIMEOUT=5\nCVMFS_TIMEOUT_DIRECT=5\n",
        )?;
        Ok(Self { directory: directory.to_owned() })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.directory
    }

    /// Configures a repository: its key is copied, its server is `url`.
    pub fn add(&self, fqrn: &str, url: &str, public_key: &Path) -> Result<()> {
        let key = self.directory.join("keys").join(format!("{fqrn}.pub"));
        std::fs::copy(public_key, &key).with_context(|| format!("cannot copy {}", public_key.display()))?;
        let text = format!("CVMFS_SERVER_URL={url}\nCVMFS_PUBLIC_KEY=/etc/cvmfs/keys/{fqrn}.pub\n");
        std::fs::write(self.directory.join("config.d").join(format!("{fqrn}.conf")), text)?;
        Ok(())
    }

    /// Configures a repository of the publisher's.
    pub fn add_published(&self, repository: &Published) -> Result<()> {
        self.add(&repository.fqrn, &repository.origin.url(), &repository.public_key())
    }
}

/// Runs one of the product's binaries.
pub fn run_binary(name: &str, arguments: &[impl AsRef<OsStr>]) -> Result<Finished> {
    let mut command = Command::new(binary(name));
    command.args(arguments);
    run(command, PUBLISH_TIMEOUT)
}
