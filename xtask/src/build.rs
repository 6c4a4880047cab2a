//! Calls of cargo, and where its products lie.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use testkit::workspace_root;

/// The binaries that make up a release.
pub const RELEASED: [&str; 4] = ["cvmfs-client", "cvmfs-publish", "docker2cvmfs", "cvmfs-graphdriver"];

/// `cargo ARGUMENTS…` in the workspace.
///
/// What the outer cargo said about this package is taken out of the environment: build scripts
/// that look at it would run again, with everything that stands on them, whenever builds
/// alternate between this program and plain cargo.
pub fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(workspace_root());
    for (name, _) in std::env::vars_os() {
        let of_outer = name.to_str().is_some_and(|name| {
            name.starts_with("CARGO_PKG_")
                || name.starts_with("CARGO_MANIFEST_")
                || name.starts_with("CARGO_BIN_")
        });
        if of_outer {
            command.env_remove(name);
        }
    }
    for name in ["CARGO", "CARGO_CRATE_NAME", "CARGO_PRIMARY_PACKAGE", "LD_LIBRARY_PATH"] {
        command.env_remove(name);
    }
    command
}

/// A profile for what this program builds: quick to build, or for others to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// For trials on this machine.
    Release,
    /// For releases: optimised across crates.
    Dist,
}

/// Builds the released binaries; returns their directory.
pub fn binaries(profile: Profile) -> Result<PathBuf> {
    let profile = match profile {
        Profile::Release => "release",
        Profile::Dist => "dist",
    };
    let mut arguments = vec!["build", "--profile", profile];
    for name in RELEASED {
        arguments.extend(["--bin", name]);
    }
    let status = cargo(&arguments).status().context("cannot run cargo")?;
    ensure!(status.success(), "the {profile} build failed");
    // This program lies in target/TRIPLE/PROFILE.
    let own = testkit::binary::binary_directory();
    Ok(own.parent().unwrap_or(&own).join(profile))
}
