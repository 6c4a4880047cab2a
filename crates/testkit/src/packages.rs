//! Debian packages that tests and the demo need, installed when they are missing.

use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::process;

/// A mirror may be slow; an installation that takes longer is stuck.
const TIMEOUT: Duration = Duration::from_secs(900);

/// While packages are configured no daemon of theirs is to be started: the tests start their own.
const POLICY: &str = "/usr/sbin/policy-rc.d";

/// Makes sure that these Debian packages are installed: as root on a Debian machine by installing what is
/// missing, otherwise by an error with the command that does it.
pub fn install(packages: &[&str]) -> Result<()> {
    // One installation at a time; `true` once the index was fetched by this process.
    static UPDATED: Mutex<bool> = Mutex::new(false);
    let mut updated = UPDATED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());

    let missing = missing(packages)?;
    if missing.is_empty() {
        return Ok(());
    }
    let advice = format!("apt-get update && apt-get install --no-install-recommends {}", missing.join(" "));
    if !rustix::process::geteuid().is_root() {
        bail!("missing packages: {}; install them as root with: {advice}", missing.join(", "));
    }
    eprintln!("installing {}", missing.join(", "));
    let policy = PolicyFile::write()?;
    if !*updated {
        apt_get(&["update", "-q"]).with_context(|| format!("try yourself: {advice}"))?;
        *updated = true;
    }
    let mut arguments = vec!["install", "-q", "-y", "--no-install-recommends"];
    arguments.extend(&missing);
    apt_get(&arguments).with_context(|| format!("try yourself: {advice}"))?;
    drop(policy);
    Ok(())
}

/// Those of `packages` that are not installed. An error on a machine that is not Debian's.
pub fn missing<'a>(packages: &[&'a str]) -> Result<Vec<&'a str>> {
    if !Path::new("/usr/bin/dpkg-query").exists() {
        bail!(
            "this is not a Debian machine: install what Debian calls {} and try again",
            packages.join(", ")
        );
    }
    let mut missing = Vec::new();
    for package in packages {
        let mut query = Command::new("dpkg-query");
        query.args(["-W", "-f", "${db:Status-Status}", package]);
        let answer = process::run(query, Duration::from_secs(30))?;
        if !answer.status.success() || answer.stdout.trim() != "installed" {
            missing.push(*package);
        }
    }
    Ok(missing)
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command
        .args(["-o", "DPkg::Lock::Timeout=300"])
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("LC_ALL", "C");
    process::run(command, TIMEOUT)?.success().map(drop)
}

/// Tells the packages' scripts not to start services; an existing policy is left alone.
struct PolicyFile {
    written: bool,
}

impl PolicyFile {
    fn write() -> Result<Self> {
        use std::os::unix::fs::OpenOptionsExt as _;
        let file = std::fs::File::options().write(true).create_new(true).mode(0o755).open(POLICY);
        let Ok(mut file) = file else { return Ok(Self { written: false }) };
        std::io::Write::write_all(&mut file, b"#!/bin/sh\nexit 101\n")?;
        Ok(Self { written: true })
    }
}

impl Drop for PolicyFile {
    fn drop(&mut self) {
        if self.written {
            let _ = std::fs::remove_file(POLICY);
        }
    }
}
