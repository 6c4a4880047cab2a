//! The managed plugin: a directory for `docker plugin create`, and the same as a tarball. Equal sources give
//! equal bytes: names are sorted, times are zero, owners are root.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use testkit::{managed_plugin, process, scratch};

use crate::build;

/// Packing some ten megabytes takes a second or two.
const PACK_TIMEOUT: Duration = Duration::from_secs(120);

/// Builds the plugin in `output`.
pub fn run(output: &Path) -> Result<()> {
    let binaries = build::binaries(build::Profile::Release)?;
    let tarball = make(output, &binaries.join("cvmfs-graphdriver"))?;
    println!("{}", output.display());
    println!("{}", tarball.display());
    Ok(())
}

/// Puts the plugin's directory at `output` and the tarball beside its content; returns the tarball's path.
pub fn make(output: &Path, binary: &Path) -> Result<PathBuf> {
    for old in ["rootfs", "config.json"] {
        scratch::remove_any(&output.join(old))?;
    }
    managed_plugin::assemble(output, binary)?;
    let tarball = output.join(format!("cvmfs-graphdriver-plugin-{}.tar.gz", env!("CARGO_PKG_VERSION")));
    let plain = output.join("plugin.tar");
    let mut tar = Command::new("tar");
    tar.arg("--create").arg("--file").arg(&plain).arg("--directory").arg(output);
    tar.args(["--format=posix", "--pax-option=delete=atime,delete=ctime", "--sort=name", "--mtime=@0"]);
    tar.args(["--owner=0", "--group=0", "--numeric-owner", "config.json", "rootfs"]);
    process::run(tar, PACK_TIMEOUT)?.success()?;
    let bytes = std::fs::read(&plain)?;
    std::fs::remove_file(&plain)?;
    let mut file =
        std::fs::File::create(&tarball).with_context(|| format!("cannot create {}", tarball.display()))?;
    file.write_all(&testkit::tar::gzip(&bytes))?;
    Ok(tarball)
}
