//! A disk that is full at any moment of a publish: the old revision stays, the exit code says why, and with room the same
//! publish succeeds. Disks that cannot be written at all, and those that know nothing but files.

#![allow(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use testkit::process::{Finished, run};
use testkit::tar::TarBuilder;
use testkit::{ScratchDir, binary};

const FQRN: &str = "full.example.org";
const TIMEOUT: Duration = Duration::from_secs(60);

/// A file system in memory, of a size that can be changed.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: &Path, kilobytes: u32) -> Disk {
        std::fs::create_dir(at).unwrap();
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", &format!("size={kilobytes}k"), "tmpfs"]).arg(at);
        run(command, TIMEOUT).unwrap().success().unwrap();
        Disk(at.to_owned())
    }

    fn resize(&self, kilobytes: u32) {
        self.remount(&format!("size={kilobytes}k"));
    }

    fn remount(&self, option: &str) {
        let mut command = Command::new("mount");
        command.args(["-o", &format!("remount,{option}")]).arg(&self.0);
        run(command, TIMEOUT).unwrap().success().unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

fn publisher(verb: &str, storage: &Path, keys: &Path, options: &[&str]) -> Finished {
    let mut command = Command::new(binary("cvmfs-publish"));
    command.args([verb, FQRN, "--storage"]).arg(storage).arg("--keys").arg(keys).args(options);
    run(command, TIMEOUT).unwrap()
}

fn archive() -> Vec<u8> {
    let mut tar = TarBuilder::new();
    let mut state = 1_u64;
    for number in 0..60 {
        let noise: Vec<u8> = (0..2000)
            .flat_map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 32).to_le_bytes()
            })
            .collect();
        tar = tar.file(&format!("d{}/f{number}", number % 4), 0o644, &noise);
    }
    tar.finish()
}

#[test]
fn row_92_a_disk_that_is_full_at_any_write_leaves_the_old_revision_and_the_next_run_succeeds() {
    let directory = ScratchDir::new("full-disk").unwrap();
    let keys = directory.path().join("keys");
    let tar = directory.path().join("archive.tar");
    std::fs::write(&tar, archive()).unwrap();
    let ingest = ["--base", "/data", "--catalog", "--tar", tar.to_str().unwrap()];
    let mut failed = 0;
    for (round, room) in (0..1600).step_by(80).enumerate() {
        let disk = Disk::mount(&directory.path().join(format!("disk{round}")), 4096);
        let storage = disk.0.join("storage");
        publisher("mkfs", &storage, &keys, &[]).success().unwrap();
        let used =
            rustix::fs::statvfs(&disk.0).map(|s| (s.f_blocks - s.f_bfree) * s.f_frsize / 1024).unwrap();
        disk.resize(u32::try_from(used).unwrap() + room);
        let manifest = std::fs::read(storage.join(".cvmfspublished")).unwrap();
        let finished = publisher("ingest", &storage, &keys, &ingest);
        if finished.status.success() {
            publisher("check", &storage, &keys, &[]).success().unwrap();
            continue;
        }
        failed += 1;
        assert_eq!(finished.status.code(), Some(6), "with {room} KiB: {}", finished.output());
        assert_eq!(std::fs::read(storage.join(".cvmfspublished")).unwrap(), manifest, "with {room} KiB");
        publisher("check", &storage, &keys, &[]).success().unwrap();
        disk.resize(16_384);
        publisher("ingest", &storage, &keys, &ingest).success().unwrap();
        publisher("check", &storage, &keys, &[]).success().unwrap();
    }
    assert!(failed > 8, "the disk was full only {failed} times");
}

#[test]
fn row_102_a_read_only_disk_is_named_and_its_repository_can_be_checked() {
    let directory = ScratchDir::new("read-only").unwrap();
    let keys = directory.path().join("keys");
    let tar = directory.path().join("archive.tar");
    std::fs::write(&tar, archive()).unwrap();
    let disk = Disk::mount(&directory.path().join("disk"), 8192);
    let storage = disk.0.join("storage");
    publisher("mkfs", &storage, &keys, &[]).success().unwrap();
    disk.remount("ro");
    let ingest = ["--base", "/data", "--tar", tar.to_str().unwrap()];
    for (verb, options) in [("ingest", &ingest[..]), ("gc", &[]), ("rollback", &[])] {
        let refused = publisher(verb, &storage, &keys, options);
        assert_eq!(refused.status.code(), Some(1), "{verb}: {}", refused.output());
        for words in [storage.to_str().unwrap(), "Read-only file system"] {
            assert!(refused.stderr.contains(words), "{verb} does not say {words}: {}", refused.output());
        }
    }
    publisher("check", &storage, &keys, &[]).success().unwrap();
    disk.remount("rw");
    publisher("ingest", &storage, &keys, &ingest).success().unwrap();
}

#[test]
fn row_102_a_disk_without_extended_attributes_is_as_good_as_any() {
    let directory = ScratchDir::new("plain").unwrap();
    let disk = directory.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    let mut command = Command::new("mount");
    command.args(["-t", "ramfs", "ramfs"]).arg(&disk);
    run(command, TIMEOUT).unwrap().success().unwrap();
    let disk = Disk(disk);
    let (storage, keys, tree) = (disk.0.join("storage"), disk.0.join("keys"), disk.0.join("tree"));
    std::fs::create_dir_all(tree.join("d")).unwrap();
    std::fs::write(tree.join("d/f"), b"content").unwrap();
    publisher("mkfs", &storage, &keys, &[]).success().unwrap();
    let options = ["--base", "/data", "--xattrs", "--tree", tree.to_str().unwrap()];
    publisher("ingest", &storage, &keys, &options).success().unwrap();
    publisher("check", &storage, &keys, &[]).success().unwrap();
}
