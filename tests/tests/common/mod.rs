//! What several stories share: reference trees made by GNU tar, and overlay mounts made by hand.
#![allow(dead_code, reason = "each story uses a part")]

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use testkit::process::run;
use testkit::tree::portable;
use testkit::{ScratchDir, TreeEntry};

/// Unpacks archives over each other as a container engine does: a `.wh.NAME` removes NAME of the archives
/// below, a `.wh..wh..opq` empties its directory first.
pub fn unpack_layers(layers: &[&[u8]]) -> ScratchDir {
    let directory = ScratchDir::new("reference").unwrap();
    let root = directory.path().join("root");
    std::fs::create_dir(&root).unwrap();
    for layer in layers {
        let archive = directory.path().join("layer.tar");
        std::fs::write(&archive, layer).unwrap();
        let list = tar(&["--list", "--quoting-style=literal", "--file"], &archive, None);
        for name in list.lines() {
            let (parent, last) = name.trim_end_matches('/').rsplit_once('/').unwrap_or(("", name));
            let parent = root.join(parent.trim_start_matches('/'));
            if last == ".wh..wh..opq" {
                for entry in std::fs::read_dir(&parent).into_iter().flatten() {
                    testkit::scratch::remove_any(&entry.unwrap().path()).unwrap();
                }
            } else if let Some(hidden) = last.strip_prefix(".wh.") {
                testkit::scratch::remove_any(&parent.join(hidden)).unwrap();
            }
        }
        tar(&["--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf"], &archive, Some(&root));
        std::fs::remove_file(&archive).unwrap();
    }
    directory
}

fn tar(options: &[&str], archive: &Path, root: Option<&Path>) -> String {
    let mut command = Command::new("tar");
    command.args(options).arg(archive);
    if let Some(root) = root {
        command.arg("-C").arg(root).args(["--exclude=.wh.*"]);
    }
    run(command, Duration::from_secs(60)).unwrap().success().unwrap()
}

/// A read-only overlay of directories, the uppermost first; unmounted when dropped.
pub struct Overlay(ScratchDir);

impl Overlay {
    pub fn of(layers: &[&Path]) -> Self {
        let directory = ScratchDir::new("overlay").unwrap();
        // Short names: the option string holds one page.
        let lowers: Vec<_> = layers
            .iter()
            .enumerate()
            .map(|(number, layer)| {
                let link = directory.path().join(number.to_string());
                std::os::unix::fs::symlink(layer, &link).unwrap();
                link.display().to_string()
            })
            .collect();
        let target = directory.path().join("merged");
        std::fs::create_dir(&target).unwrap();
        let data = std::ffi::CString::new(format!("lowerdir={}", lowers.join(":"))).unwrap();
        mount("overlay", &target, "overlay", MountFlags::RDONLY, Some(data.as_c_str())).unwrap();
        Self(directory)
    }

    pub fn path(&self) -> std::path::PathBuf {
        self.0.path().join("merged")
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        unmount(self.path(), UnmountFlags::DETACH).unwrap();
    }
}

/// What a layer in a repository and the same layer on a disk must agree on: not the attributes of the root,
/// which archives seldom have, nor the marks of nested catalogs and of opaque directories.
pub fn layer_content(entries: &[TreeEntry]) -> Vec<TreeEntry> {
    let mut entries = portable(entries);
    entries.retain(|entry| entry.path != "/" && entry.path != "/.cvmfscatalog");
    for entry in &mut entries {
        if let Some(xattrs) = &mut entry.xattrs {
            xattrs.retain(|name, _| name != "user.overlay.opaque");
        }
        entry.xattrs = entry.xattrs.take().filter(|xattrs| !xattrs.is_empty());
    }
    entries
}

/// Asserts that a list of differences is empty, and prints them otherwise.
#[track_caller]
pub fn assert_same(differences: &[String]) {
    let shown: Vec<_> = differences.iter().take(40).cloned().collect();
    assert!(differences.is_empty(), "{} differences:\n{}", differences.len(), shown.join("\n"));
}

/// Asserts that a text holds one of these words, whatever their case.
#[track_caller]
pub fn assert_says(text: &str, words: &[&str]) {
    let lower = text.to_lowercase();
    assert!(words.iter().any(|word| lower.contains(&word.to_lowercase())), "none of {words:?} in:\n{text}");
}
