//! Engines of other Debian releases, unpacked into a directory and run from there.
//!
//! Their programs ask for no newer C library than this release has, so nothing is installed and no other root
//! file system is needed; the machine's package configuration stays as it is.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::process::run;

/// Names the directory of the engine that [`crate::Dockerd`] starts instead of the installed one.
pub const VARIABLE: &str = "CVMFS_TEST_ENGINE";

/// A mirror may be slow.
const TIMEOUT: Duration = Duration::from_secs(900);
const MIRROR: &str = "http://deb.debian.org/debian";
/// `dockerd`, and the `containerd` that it starts; `runc` is the installed one.
const PACKAGES: [&str; 2] = ["docker.io", "containerd"];

/// The engine that was asked for.
pub(crate) fn directory() -> Option<PathBuf> {
    std::env::var_os(VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// The program of an engine, and the search path that it needs.
pub(crate) fn dockerd() -> (PathBuf, Option<OsString>) {
    let Some(directory) = directory() else { return (PathBuf::from("/usr/sbin/dockerd"), None) };
    let mut path = OsString::new();
    for below in ["usr/sbin", "usr/bin"] {
        path.push(directory.join(below));
        path.push(":");
    }
    path.push(std::env::var_os("PATH").unwrap_or_default());
    (directory.join("usr/sbin/dockerd"), Some(path))
}

/// Fetches the engine of a Debian release (`trixie` has 26.1.5) into a directory, unless it is there.
pub fn fetch(suite: &str, directory: &Path) -> Result<()> {
    if directory.join("usr/sbin/dockerd").is_file() {
        return Ok(());
    }
    let parent = directory.parent().context("the directory has no parent")?;
    let work = parent.join(format!("{suite}.work"));
    crate::scratch::remove_any(&work)?;
    for below in ["state/lists/partial", "cache/archives/partial", "root"] {
        std::fs::create_dir_all(work.join(below))?;
    }
    // Debian's own keys for the release; the release file is verified with them.
    let key = format!("/usr/share/keyrings/debian-archive-{suite}-stable.gpg");
    ensure!(Path::new(&key).is_file(), "debian-archive-keyring has no {key}: update that package");
    let source = format!("Types: deb\nURIs: {MIRROR}\nSuites: {suite}\nComponents: main\nSigned-By: {key}\n");
    let sources = work.join("suite.sources");
    std::fs::write(&sources, source)?;
    let apt_get = |arguments: &[&str]| -> Result<()> {
        let mut command = Command::new("apt-get");
        let options = [
            ("Dir::Etc::sourcelist", sources.as_path()),
            ("Dir::Etc::sourceparts", Path::new("/dev/null")),
            ("Dir::State", &work.join("state")),
            ("Dir::State::status", Path::new("/dev/null")),
            ("Dir::Cache", &work.join("cache")),
        ];
        for (name, path) in options {
            command.arg("-o").arg(format!("{name}={}", path.display()));
        }
        command.args(["-o", "APT::Sandbox::User=root", "-q"]).args(arguments).current_dir(&work);
        run(command, TIMEOUT)?.success().map(drop)
    };
    apt_get(&["update"])?;
    let mut download = vec!["download"];
    download.extend(PACKAGES);
    apt_get(&download)?;
    for item in std::fs::read_dir(&work)? {
        let file = item?.path();
        if file.extension().is_some_and(|extension| extension == "deb") {
            let mut unpack = Command::new("dpkg-deb");
            unpack.arg("-x").arg(&file).arg(work.join("root"));
            run(unpack, TIMEOUT)?.success()?;
        }
    }
    std::fs::rename(work.join("root"), directory)?;
    crate::scratch::remove_any(&work)
}
