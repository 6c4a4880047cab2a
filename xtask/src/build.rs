//! Calls of cargo, and where its products lie.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use testkit::workspace_root;

/// The binaries that make up a release.
pub const RELEASED: [&str; 4] = ["cvmfs-client", "cvmfs-publish", "docker2cvmfs", "cvmfs-graphdriver"];

/// `cargo ARGUMENTS…` in the workspace.
pub fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(workspace_root());
    command
}

/// Builds the released binaries with the release profile; returns their directory.
pub fn release() -> Result<PathBuf> {
    let mut arguments = vec!["build", "--release"];
    for name in RELEASED {
        arguments.extend(["--bin", name]);
    }
    let status = cargo(&arguments).status().context("cannot run cargo")?;
    ensure!(status.success(), "the release build failed");
    // This program lies in target/TRIPLE/PROFILE.
    let own = testkit::binary::binary_directory();
    Ok(own.parent().unwrap_or(&own).join("release"))
}
