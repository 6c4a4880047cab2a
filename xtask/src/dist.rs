//! A release: static binaries, the plugin's tarball, and `SHA256SUMS` over all of them.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use testkit::{image, process};

use crate::{build, plugin};

/// Fills `output`.
pub fn run(output: &Path) -> Result<()> {
    let binaries = build::binaries(build::Profile::Dist)?;
    testkit::scratch::remove_any(output)?;
    std::fs::create_dir_all(output).with_context(|| format!("cannot create {}", output.display()))?;
    let mut files = Vec::new();
    for name in build::RELEASED {
        let source = binaries.join(name);
        ensure_static(&source)?;
        std::fs::copy(&source, output.join(name)).with_context(|| format!("cannot copy {name}"))?;
        files.push(name.to_owned());
    }
    let tarball = plugin::make(&output.join("plugin"), &binaries.join("cvmfs-graphdriver"))?;
    let name = tarball.file_name().context("a tarball has a name")?.to_string_lossy().into_owned();
    std::fs::rename(&tarball, output.join(&name))?;
    testkit::scratch::remove_any(&output.join("plugin"))?;
    files.push(name);

    let mut sums = String::new();
    for name in &files {
        let digest = image::digest(&std::fs::read(output.join(name))?);
        sums.push_str(&format!("{}  {name}\n", digest.trim_start_matches("sha256:")));
    }
    std::fs::write(output.join("SHA256SUMS"), &sums)?;
    print!("{sums}");
    Ok(())
}

/// A binary that wants a dynamic loader would not start in the plugin's empty root file system.
fn ensure_static(binary: &Path) -> Result<()> {
    let mut readelf = Command::new("readelf");
    readelf.arg("--program-headers").arg(binary);
    let headers = process::run(readelf, Duration::from_secs(30))?.success()?;
    ensure!(!headers.contains("INTERP"), "{} is not static", binary.display());
    Ok(())
}
