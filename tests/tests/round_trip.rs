//! Whatever a file system can hold, packed by GNU tar, ingested, mounted and packed again, is the same tree.

#![allow(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

mod common;

use std::ffi::{CString, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::{layer_content, unpack_layers};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags, makedev, mknodat, setxattr, utimensat,
};
use testkit::process::run;
use testkit::{MountBuilder, Published, ScratchDir, compare, walk_tree};

/// Each mounts once; `CVMFS_TEST_TREES` asks for more.
const TREES: u32 = 12;

/// One thing to make.
#[derive(Debug, Clone)]
struct Item {
    /// Chooses among the directories that are there.
    parent: prop::sample::Index,
    name: Vec<u8>,
    kind: Kind,
    mode: u32,
    owner: (u32, u32),
    /// Seconds since 1970.
    modified: i64,
    xattrs: Vec<(String, Vec<u8>)>,
}

#[derive(Debug, Clone)]
enum Kind {
    /// Bytes, and what they are made of.
    File(usize, u32),
    /// A hole before the content.
    Sparse(u64, usize),
    Directory,
    /// A directory that is to be the root of a nested catalog.
    Catalog,
    Symlink(Vec<u8>),
    /// Of an earlier file in the same directory.
    HardLink(prop::sample::Index),
    Fifo,
    Device(FileType, u32, u32),
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![8 => b'a'..=b'z', 1 => Just(b' '), 1 => 1..=255_u8]
        .prop_filter("no part of a path", |byte| *byte != b'/');
    prop_oneof![12 => vec(byte, 1..20), 1 => vec(b'a'..=b'z', 200..=255)]
        .prop_filter("whiteouts are not content", |name| {
            !name.starts_with(b".") && !name.starts_with(b".wh.")
        })
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        8 => (0..6000_usize, any::<u32>()).prop_map(|(size, seed)| Kind::File(size, seed)),
        2 => (20_000..300_000_usize, any::<u32>()).prop_map(|(size, seed)| Kind::File(size, seed)),
        1 => (0..200_000_u64, 0..5000_usize).prop_map(|(hole, size)| Kind::Sparse(hole, size)),
        8 => Just(Kind::Directory),
        1 => Just(Kind::Catalog),
        3 => vec(1..=255_u8, 1..80).prop_map(Kind::Symlink),
        4 => any::<prop::sample::Index>().prop_map(Kind::HardLink),
        1 => Just(Kind::Fifo),
        1 => (0..200_u32, 0..300_u32).prop_map(|(major, minor)| Kind::Device(FileType::CharacterDevice, major, minor)),
        1 => (0..200_u32, 0..300_u32).prop_map(|(major, minor)| Kind::Device(FileType::BlockDevice, major, minor)),
    ]
}

fn item() -> impl Strategy<Value = Item> {
    let modified = prop_oneof![6 => 0..2_000_000_000_i64, 1 => -2_000_000_000..0_i64, 1 => 4_294_967_296..9_000_000_000_i64];
    let xattr = ("user\\.[a-z]{1,20}", vec(any::<u8>(), 0..60));
    (
        any::<prop::sample::Index>(),
        name(),
        kind(),
        0..0o10000_u32,
        (0..70_000_u32, 0..70_000_u32),
        modified,
        prop_oneof![4 => Just(Vec::new()), 1 => vec(xattr, 1..4)],
    )
        .prop_map(|(parent, name, kind, mode, owner, modified, xattrs)| Item {
            parent,
            name,
            kind,
            mode,
            owner,
            modified,
            xattrs,
        })
}

/// Makes the tree. What cannot be (a name twice, a hard link without an earlier file) is left out.
fn make(root: &Path, items: &[Item]) {
    let mut directories = vec![root.to_owned()];
    let mut files: Vec<PathBuf> = Vec::new();
    let mut made: Vec<(PathBuf, &Item)> = Vec::new();
    for item in items {
        let parent = item.parent.get(&directories).clone();
        let path = parent.join(OsStr::from_bytes(&item.name));
        // A path in an archive has a limit, too.
        if path.symlink_metadata().is_ok() || path.as_os_str().len() > 3000 {
            continue;
        }
        match &item.kind {
            Kind::File(size, seed) => {
                std::fs::write(&path, content(*size, *seed)).unwrap();
                files.push(path.clone());
            }
            Kind::Sparse(hole, size) => {
                use std::os::unix::fs::FileExt;
                let file = std::fs::File::create(&path).unwrap();
                file.write_all_at(&content(*size, 7), *hole).unwrap();
                file.set_len(*hole + *size as u64 + 4096).unwrap();
                files.push(path.clone());
            }
            Kind::Directory | Kind::Catalog => {
                std::fs::create_dir(&path).unwrap();
                if matches!(item.kind, Kind::Catalog) {
                    std::fs::write(path.join(".cvmfscatalog"), b"").unwrap();
                }
                directories.push(path.clone());
            }
            Kind::Symlink(target) => symlink(OsStr::from_bytes(target), &path).unwrap(),
            Kind::HardLink(which) => {
                let siblings: Vec<_> = files.iter().filter(|file| file.parent() == path.parent()).collect();
                if !siblings.is_empty() {
                    std::fs::hard_link(which.get(&siblings), &path).unwrap();
                }
                continue;
            }
            Kind::Fifo => mknodat(CWD, &path, FileType::Fifo, Mode::RUSR, 0).unwrap(),
            Kind::Device(kind, major, minor) => {
                mknodat(CWD, &path, *kind, Mode::RUSR, makedev(*major, *minor)).unwrap();
            }
        }
        made.push((path, item));
    }
    // The innermost first: making things changes the times of their directories.
    for (path, item) in made.iter().rev() {
        lchown(path, Some(item.owner.0), Some(item.owner.1)).unwrap();
        if !matches!(item.kind, Kind::Symlink(_)) {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(item.mode)).unwrap();
        }
        if matches!(item.kind, Kind::File(..) | Kind::Sparse(..) | Kind::Directory | Kind::Catalog) {
            for (name, value) in &item.xattrs {
                setxattr(path, CString::new(name.as_str()).unwrap().as_c_str(), value, XattrFlags::empty())
                    .unwrap();
            }
        }
        let time = Timespec { tv_sec: item.modified, tv_nsec: 0 };
        let times = Timestamps { last_access: time, last_modification: time };
        utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
}

fn content(size: usize, seed: u32) -> Vec<u8> {
    let mut state = u64::from(seed) | 1;
    let mut word = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    };
    // Some compress and some do not.
    (0..size).map(|place| if seed.is_multiple_of(3) { (place / 50) as u8 } else { word() }).collect()
}

fn pack(directory: &Path, archive: &Path) -> Vec<u8> {
    let mut command = Command::new("tar");
    command.args(["--format=posix", "--sparse", "--xattrs", "--xattrs-include=*", "--numeric-owner", "-cf"]);
    command.arg(archive).arg("-C").arg(directory).arg(".");
    run(command, Duration::from_secs(60)).unwrap().success().unwrap();
    std::fs::read(archive).unwrap()
}

#[test]
fn any_tree_comes_back_from_a_mount_as_it_was_packed() {
    let trees = std::env::var("CVMFS_TEST_TREES").map_or(TREES, |trees| trees.parse().unwrap());
    let seed = std::env::var("CVMFS_TEST_SEED").map_or(0x5eed, |seed| seed.parse().unwrap());
    let config = Config {
        cases: trees,
        max_shrink_iters: 40,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(seed),
        ..Config::default()
    };
    let repository = Published::create("roundtrip.example.org").unwrap();
    let number = std::cell::Cell::new(0);
    let outcome = TestRunner::new(config).run(&vec(item(), 0..60), |items| {
        number.set(number.get() + 1);
        let scratch = ScratchDir::new("tree").unwrap();
        let root = scratch.path().join("root");
        std::fs::create_dir(&root).unwrap();
        make(&root, &items);
        let packed = pack(&root, &scratch.path().join("packed.tar"));

        let base = format!("layers/{}", number.get());
        repository.ingest(&base, &packed, &["--catalog", "--xattrs", "--chunk-size", "16K:32K:64K"]).unwrap();
        let mount = MountBuilder::new(&repository.fqrn, &repository.client_config().unwrap());
        let mount = mount.option("cvmfs_suid").mount().unwrap();
        let mounted = mount.path().join(&base);
        // The archive of the mount, unpacked, and the mount itself.
        let again = pack(&mounted, &scratch.path().join("again.tar"));
        let unpacked = unpack_layers(&[&again]);
        let expected = layer_content(&walk_tree(&root));
        for tree in [&mounted, &unpacked.path().join("root")] {
            let differences = compare(&expected, &layer_content(&walk_tree(tree)));
            prop_assert!(differences.is_empty(), "{}", differences.join("\n"));
        }
        Ok(())
    });
    outcome.unwrap_or_else(|failure| panic!("CVMFS_TEST_SEED={seed}: {failure}"));
    repository.publish("check", &[]).unwrap().success().unwrap();
}
