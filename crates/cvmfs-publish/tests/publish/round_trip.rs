//! Archive → repository → two readers: what went in comes out.

use std::collections::BTreeMap;
use std::process::Command;

use cvmfs_publish::settings::parse_chunk_sizes;
use cvmfs_publish::{IngestOptions, Publisher};
use proptest::prelude::*;
use serde_json::json;

use crate::model::{self, Step};
use crate::support::{Repository, Tree, assert_equal_trees, expect_success};
use crate::tar::{Header, Tar};

/// Bytes that do not compress, the same every time.
pub fn noise(length: usize, seed: u32) -> Vec<u8> {
    let mut state = seed.max(1);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..length).map(|_| next()).collect()
}

#[test]
fn every_algorithm_and_compression_gives_the_same_tree() {
    let archive = Tar::default()
        .dir("dir", 0o755)
        .file("dir/empty", b"")
        .file("dir/small", b"small")
        .file("dir/chunked", &noise(200_000, 7))
        .file("dir/zeros", &[0; 100_000])
        .link(b'1', "dir/again", "dir/chunked")
        .link(b'2', "symlink", "dir/small")
        .finish();
    let mut trees = Vec::new();
    for hash in ["sha1", "rmd160", "shake128"] {
        for compression in ["zlib", "none"] {
            let repository = Repository::create(&["--hash", hash, "--compression", compression]);
            repository.ingest("/x", &archive, &["--chunk-size", "16K:32K:64K", "--catalog"]);
            let report = repository.assert_sound();
            assert!(report.unreferenced.is_empty(), "{:?}", report.unreferenced);
            let mut tree = repository.tree("/x/");
            assert_equal_trees(&repository.oracle_tree("/"), &repository.tree("/"));
            // made by the publisher, at its own time
            tree.remove("/x/.cvmfscatalog");
            trees.push(tree);
        }
    }
    assert_eq!(trees[0]["/x/dir/chunked"]["ino_group"], "/x/dir/again");
    for tree in &trees[1..] {
        assert_equal_trees(&trees[0], tree);
    }
}

#[test]
fn names_and_times_of_every_sort_survive() {
    let repository = Repository::create(&[]);
    let long = "n".repeat(255);
    let deep = "d/".repeat(200) + "f";
    let latin1 = b"caf\xe9";
    let mut tar =
        Tar::default().file(&long, b"").file(&deep, b"").add(&Header::new(latin1, b'0', 0o644), b"");
    let times = [(-1, 0), (-2, 500_000_000), (0, 1), (1 << 33, 999_999_999), (-5_000_000_000, 0)];
    for (number, (mtime, nanoseconds)) in times.iter().enumerate() {
        let name = format!("time{number}");
        tar = tar.add(
            &Header { mtime: *mtime, nanoseconds: *nanoseconds, ..Header::new(name.as_bytes(), b'0', 0o644) },
            b"",
        );
    }
    let big = Header { uid: 4_000_000_000, gid: 2_097_152, ..Header::new(b"owner", b'0', 0o7777) };
    repository.ingest("x", &tar.add(&big, b"").finish(), &[]);
    repository.assert_sound();
    let tree = repository.tree("/x");
    assert_equal_trees(&repository.oracle_tree("/x"), &tree);
    for (number, (mtime, nanoseconds)) in times.iter().enumerate() {
        let expected = mtime * 1_000_000_000 + i64::from(*nanoseconds);
        assert_eq!(tree[&format!("/x/time{number}")]["mtime_ns"], json!(expected));
    }
    assert!(tree.contains_key("/x/caf\\xe9") && tree.contains_key(&format!("/x/{long}")));
    assert_eq!(tree["/x/owner"]["uid"], json!(4_000_000_000u32));
}

#[test]
fn a_local_directory_is_published_like_its_archive() {
    let repository = Repository::create(&[]);
    let tree = tempfile::tempdir().unwrap();
    let script = "mkdir -p d/e; echo x > d/f; ln d/f d/g; ln d/f d/e/h; ln -s ../f d/e/l; mkfifo d/p; \
                  chmod 4711 d/f; touch -h -d @1600000000.5 d/f d/e/l; setfattr -n user.a -v b d/f || true; \
                  head -c 300000 /dev/urandom > big; truncate -s 1000000 sparse";
    expect_success(Command::new("sh").arg("-ec").arg(script).current_dir(tree.path()).output().unwrap());
    repository.ok(
        "ingest",
        &[
            "--base",
            "tree",
            "--tree",
            tree.path().to_str().unwrap(),
            "--xattrs",
            "--chunk-size",
            "64K:128K:256K",
        ],
    );
    let archive = Command::new("tar")
        .args(["--format=posix", "--xattrs", "--pax-option=delete=atime,delete=ctime", "-S", "-c", "."])
        .current_dir(tree.path())
        .output()
        .unwrap();
    assert!(archive.status.success());
    repository.ingest("tar", &archive.stdout, &["--xattrs", "--chunk-size", "64K:128K:256K"]);
    repository.assert_sound();
    let moved = |tree: Tree, from: &str, to: &str| -> Tree {
        let text = serde_json::to_string(&tree).unwrap().replace(from, to);
        serde_json::from_str(&text).unwrap()
    };
    let (from_tree, from_tar) = (repository.tree("/tree"), repository.tree("/tar"));
    assert_equal_trees(&repository.oracle_tree("/tree"), &from_tree);
    assert_equal_trees(&moved(from_tree, "/tree", "/x"), &moved(from_tar, "/tar", "/x"));
}

#[test]
fn several_ingests_and_deletions_become_one_revision() {
    let repository = Repository::create(&[]);
    let mut publisher =
        Publisher::open(&repository.fqrn, repository.storage.to_str().unwrap(), &repository.keys).unwrap();
    let options = IngestOptions { catalog: true, ..IngestOptions::default() };
    let mut transaction = publisher.begin().unwrap();
    let one = Tar::default().file("f", b"one").finish();
    transaction.ingest_tar(b"layers/one", &one[..], &options).unwrap();
    // a bad archive leaves the transaction as it was
    let bad = Tar::default().file("f", b"bad").file("f/g", b"bad").finish();
    transaction.ingest_tar(b"layers/bad", &bad[..], &options).unwrap_err();
    assert!(transaction.exists(b"/layers/one/f").unwrap() && !transaction.exists(b"/layers/bad").unwrap());
    transaction.ingest_tar(b"layers/two", &one[..], &options).unwrap();
    transaction.delete(b"layers/two/f").unwrap();
    let report = transaction.commit(Some("three-in-one")).unwrap();
    assert_eq!(report.revision, 2);
    assert!(publisher.exists(b"layers/one/f").unwrap() && !publisher.exists(b"layers/two/f").unwrap());

    // the same publisher goes on
    let mut transaction = publisher.begin().unwrap();
    transaction.delete(b"/layers/two").unwrap();
    assert_eq!(transaction.commit(None).unwrap().revision, 3);
    assert!(!publisher.exists(b"layers/two").unwrap());
    drop(publisher);
    repository.assert_sound();
    // an empty transaction is a revision as well, and a dropped one is none
    let mut publisher =
        Publisher::open(&repository.fqrn, repository.storage.to_str().unwrap(), &repository.keys).unwrap();
    drop(publisher.begin().unwrap());
    assert_eq!(publisher.begin().unwrap().commit(None).unwrap().revision, 4);
    repository.assert_sound();
}

#[test]
fn a_merge_into_a_fixed_place_needs_no_second_upload() {
    let repository = Repository::create(&[]);
    let archive = Tar::default().file("f", &noise(50_000, 3)).finish();
    let first = repository.ingest("x", &archive, &[]);
    let second = repository.ingest("y", &archive, &[]);
    assert_eq!(first["bytes_in"], second["bytes_in"]);
    // root catalog and history only
    assert_eq!(second["new_objects"], 2, "{second}");
}

#[test]
fn content_that_is_known_is_stored_again_if_its_object_is_gone_or_damaged() {
    let repository = Repository::create(&[]);
    let content = noise(50_000, 5);
    let archive = Tar::default().file("f", &content).finish();
    let objects = || -> Vec<_> { find_files(&repository.storage.join("data")) };
    let before = objects();
    repository.ingest("x", &archive, &[]);
    let object = objects()
        .into_iter()
        .find(|path| !before.contains(path) && std::fs::metadata(path).unwrap().len() > 40_000);
    let object = object.unwrap();
    let stored = std::fs::read(&object).unwrap();
    for (number, damage) in [None, Some(&stored[..100])].into_iter().enumerate() {
        match damage {
            None => std::fs::remove_file(&object).unwrap(),
            Some(rest) => std::fs::write(&object, rest).unwrap(),
        }
        repository.ingest(&format!("again{number}"), &archive, &[]);
        assert_eq!(std::fs::read(&object).unwrap(), stored);
    }
    // A table full of nonsense only costs time.
    let table = repository.storage.join("data/txn/publish.known");
    assert!(table.is_file());
    std::fs::write(&table, noise(1 << 20, 9)).unwrap();
    repository.ingest("after-nonsense", &archive, &[]);
    repository.assert_sound();
}

fn find_files(directory: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for item in std::fs::read_dir(directory).unwrap() {
        let path = item.unwrap().path();
        if path.is_dir() { found.extend(find_files(&path)) } else { found.push(path) }
    }
    found
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 200, ..ProptestConfig::default() })]
    #[test]
    fn any_sequence_of_entries_gives_the_tree_that_unpacking_would(
        parts in proptest::collection::vec(proptest::collection::vec(model::step(), 1..30), 1..4)
    ) {
        static REPOSITORY: std::sync::OnceLock<Repository> = std::sync::OnceLock::new();
        let repository = REPOSITORY.get_or_init(|| Repository::create(&["--hash", "shake128"]));
        let mut expected = model::Model::default();
        let options = IngestOptions {
            xattrs: true,
            chunk_sizes: Some(parse_chunk_sizes("64:128:256").unwrap()),
            ..IngestOptions::default()
        };
        let mut publisher = Publisher::open(
            &repository.fqrn, repository.storage.to_str().unwrap(), &repository.keys,
        ).unwrap();
        let mut transaction = publisher.begin().unwrap();
        if transaction.exists(b"/case").unwrap() {
            transaction.delete(b"/case").unwrap();
        }
        for steps in &parts {
            let archive = archive_of(&mut expected, steps);
            transaction.ingest_tar(b"/case", &archive[..], &options).unwrap();
        }
        transaction.commit(None).unwrap();
        drop(publisher);
        repository.assert_sound();
        let found: BTreeMap<_, _> =
            repository.tree("/case").into_iter().filter(|(path, _)| path != "/case").collect();
        assert_equal_trees(&expected.tree("/case"), &found);
        let oracle: BTreeMap<_, _> =
            repository.oracle_tree("/case").into_iter().filter(|(path, _)| path != "/case").collect();
        assert_equal_trees(&oracle, &found);
    }
}

/// The archive of the steps that make sense after what was there before.
fn archive_of(expected: &mut model::Model, steps: &[Step]) -> Vec<u8> {
    expected.begin_archive();
    let mut tar = Tar::default();
    for step in steps {
        if let Some(entry) = expected.apply(step) {
            tar = entry.add_to(tar);
        }
    }
    tar.finish()
}

#[test]
fn what_is_stored_is_for_everybody_whatever_the_umask() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let place = |name: &str| directory.path().join(name);
    let repository = Repository::at("test.example.org", &place("storage"), &place("keys"));
    let archive = place("archive.tar");
    std::fs::write(&archive, Tar::default().file("f", &noise(5000, 1)).finish()).unwrap();
    let under_umask = |verb: &str, options: &[&str]| {
        let command = repository.command(verb, options);
        let mut shell = Command::new("sh");
        shell
            .args(["-c", "umask 077; exec \"$0\" \"$@\""])
            .arg(command.get_program())
            .args(command.get_args());
        expect_success(shell.output().unwrap());
    };
    under_umask("mkfs", &[]);
    under_umask("ingest", &["--base", "/a", "--tar", archive.to_str().unwrap()]);
    for served in ["", "data", "data/00", "data/ff"] {
        let mode = std::fs::metadata(repository.storage.join(served)).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o755, "directory {served:?}");
    }
    for served in [".cvmfspublished", ".cvmfswhitelist"] {
        let mode = std::fs::metadata(repository.storage.join(served)).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o644, "{served}");
    }
    let mut objects = 0;
    repository
        .open_storage()
        .list_objects(&mut |object| {
            let mode = std::fs::metadata(repository.storage.join(&object.path)).unwrap().permissions().mode();
            assert_eq!(mode & 0o7777, 0o644, "{}", object.path);
            objects += 1;
        })
        .unwrap();
    assert!(objects >= 3);
}
