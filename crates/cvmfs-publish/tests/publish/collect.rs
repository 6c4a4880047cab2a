//! Garbage collection.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, SystemTime};

use cvmfs_publish::{IngestOptions, NewRepository, OpenOptions, Publisher, create_repository};
use serde_json::Value;
use testkit::Fixture;

use crate::round_trip::noise;
use crate::support::{Repository, assert_equal_trees};
use crate::takeover::take_over;
use crate::tar::Tar;

/// Everything stored as an object, by path below the storage root.
fn objects(storage: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for group in std::fs::read_dir(storage.join("data")).unwrap() {
        let group = group.unwrap();
        let name = group.file_name().into_string().unwrap();
        if name == "txn" || !group.file_type().unwrap().is_dir() {
            continue;
        }
        for object in std::fs::read_dir(group.path()).unwrap() {
            found.insert(format!("data/{name}/{}", object.unwrap().file_name().into_string().unwrap()));
        }
    }
    found
}

fn collect(repository: &Repository, options: &[&str]) -> Value {
    serde_json::from_str(&repository.ok("gc", &[options, &["--json"]].concat())).unwrap()
}

/// Five revisions: empty, then `file` with other content in each, the second and third tagged; `nested` replaced too.
fn five_revisions() -> Repository {
    let repository = Repository::create(&["--garbage-collectable"]);
    for (seed, tag) in [(1, Some("one")), (2, Some("two")), (3, None), (4, None)] {
        let archive = Tar::default().file("file", &noise(50_000, seed)).file("same", b"always").finish();
        let options = ["--catalog", "--chunk-size", "8K:16K:32K"];
        let tag = tag.map_or(vec![], |name| vec!["--tag", name]);
        repository.ingest("nested", &archive, &[&options[..], &tag].concat());
    }
    repository
}

#[test]
fn what_only_removed_revisions_refer_to_goes_and_all_else_stays() {
    let repository = five_revisions();
    let (head, before) = (repository.tree("/"), objects(&repository.storage));
    let report = collect(&repository, &["--keep", "0", "--grace", "0"]);
    // of the five revisions the newest and the two tagged ones stay, with trunk-previous, which is a tag
    assert_eq!(report["revisions_removed"], 1, "{report}");
    assert_eq!(report["revisions_kept"], 4, "{report}");
    let after = objects(&repository.storage);
    assert!(after.is_subset(&before) && after.len() < before.len());
    assert_eq!(report["objects_removed"].as_u64().unwrap() as usize, before.len() - after.len());
    assert_equal_trees(&head, &repository.tree("/"));
    assert_equal_trees(&repository.oracle_tree("/"), &repository.tree("/"));
    repository.ok("check", &["--tags"]);
    assert_eq!(repository.assert_sound().unreferenced_count, 0);

    // the tag goes, and with it what only its revision had
    repository.ok_tag("remove", "one");
    repository.ok_tag("remove", "two");
    let report = collect(&repository, &["--keep", "0", "--grace", "0"]);
    assert_eq!(report["revisions_removed"], 2, "{report}");
    assert_equal_trees(&head, &repository.tree("/"));
    assert_eq!(repository.assert_sound().unreferenced_count, 0);
    assert_eq!(collect(&repository, &["--keep", "0", "--grace", "0"])["objects_removed"], 0);
    // the next publish goes on from there
    repository.ingest("more", &Tar::default().file("f", b"1").finish(), &[]);
    repository.assert_sound();
    let status: Value = serde_json::from_slice(&repository.raw(".cvmfs_status.json")).unwrap();
    assert!(status["last_gc"].as_str().unwrap().contains(" UTC 20"), "{status}");
}

#[test]
fn a_revision_that_was_replaced_just_now_stays_whatever_the_rule() {
    let repository = five_revisions();
    let before = objects(&repository.storage);
    let report = collect(&repository, &["--keep", "0"]);
    assert_eq!((&report["revisions_removed"], &report["objects_removed"]), (&0.into(), &0.into()));
    assert_eq!(objects(&repository.storage), before);
}

#[test]
fn rules_by_count_and_by_time_keep_the_predecessors_they_name() {
    let repository = five_revisions();
    let kept = |options: &[&str]| {
        let report = collect(&repository, &[options, &["--grace", "0", "--dry-run"]].concat());
        report["revisions_kept"].as_u64().unwrap()
    };
    assert_eq!(kept(&["--keep", "1"]), 4, "the newest, its predecessor (trunk-previous), one and two");
    assert_eq!(kept(&["--keep", "4"]), 5);
    assert_eq!(kept(&["--keep-since", "1h"]), 5);
    assert_eq!(kept(&["--keep-since", "2100-01-01T00:00:00Z"]), 4);
    assert_eq!(kept(&["--keep-since", "1h", "--keep", "0"]), 4, "both must hold");
}

#[test]
fn a_dry_run_counts_and_logs_and_deletes_nothing() {
    let repository = five_revisions();
    let (before, reflog) = (objects(&repository.storage), repository.raw(".cvmfsreflog"));
    let log = repository.storage.with_extension("log");
    let options = ["--keep", "0", "--grace", "0", "--deletion-log", log.to_str().unwrap()];
    let dry = collect(&repository, &[&options[..], &["--dry-run"]].concat());
    assert_eq!(dry["dry_run"], true);
    assert_eq!(objects(&repository.storage), before);
    assert_eq!(repository.raw(".cvmfsreflog"), reflog);
    let logged = std::fs::read_to_string(&log).unwrap();
    let names = logged.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).count();
    assert_eq!(names as u64, dry["objects_removed"].as_u64().unwrap());
    assert!(logged.starts_with("# Garbage Collection started at "), "{logged}");

    let real = collect(&repository, &options);
    assert_eq!(real["objects_removed"], dry["objects_removed"]);
    assert_eq!(real["bytes_removed"], dry["bytes_removed"]);
}

#[test]
fn remains_of_interrupted_publishes_go_once_they_are_old() {
    let repository = five_revisions();
    let object = |digits: &str| repository.storage.join(format!("data/{}/{}", &digits[..2], &digits[2..]));
    let (old, young) = (object(&"aa".repeat(20)), object(&"bb".repeat(20)));
    let strange = repository.storage.join("data/aa/notes.txt");
    for file in [&old, &young, &strange] {
        std::fs::write(file, b"left").unwrap();
    }
    let long_ago = SystemTime::now() - Duration::from_secs(30 * 24 * 3600);
    for file in [&old, &strange] {
        std::fs::File::options().write(true).open(file).unwrap().set_modified(long_ago).unwrap();
    }
    assert_eq!(collect(&repository, &[])["unreferenced_removed"], 0);
    let report = collect(&repository, &["--unreferenced"]);
    assert_eq!(report["unreferenced_removed"], 1, "{report}");
    assert!(!old.exists() && young.exists() && strange.exists());
    repository.assert_sound();
}

#[test]
fn nothing_is_deleted_while_a_revision_that_stays_cannot_be_read() {
    let repository = five_revisions();
    let root = repository.catalog(repository.head().manifest.root_catalog);
    let nested = root.nested_at(b"/nested").unwrap().unwrap().hash;
    let name = cvmfs_format::ObjectName::new(nested, cvmfs_format::ObjectKind::Catalog);
    std::fs::remove_file(repository.storage.join(name.path())).unwrap();
    let before = objects(&repository.storage);
    let output = repository.run("gc", &["--keep", "0", "--grace", "0"], b"");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains(&name.path()));
    assert_eq!(objects(&repository.storage), before);
}

#[test]
fn a_repository_that_does_not_allow_it_is_left_alone() {
    let repository = Repository::create(&[]);
    let output = repository.run("gc", &[], b"");
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--garbage-collectable"));
}

#[test]
fn the_collection_of_the_cpp_tools_and_ours_leave_the_same_objects() {
    let (_fixture, repository) = take_over("history");
    let theirs = Fixture::unpack("history-gc").unwrap();
    // what was done to theirs
    repository.ok("rollback", &["--tag", "v2"]);
    repository.ok_tag("remove", "v1");
    collect(&repository, &["--keep", "0", "--grace", "0"]);
    // the root catalog of the rollback and the histories have times in them
    let comparable = |storage: &Path| -> BTreeSet<String> {
        let manifest = std::fs::read(storage.join(".cvmfspublished")).unwrap();
        let line = manifest.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"C")).unwrap();
        let (group, rest) = std::str::from_utf8(line).unwrap().split_at(2);
        let root = format!("data/{group}/{rest}C");
        let mut found = objects(storage);
        assert!(found.remove(&root), "{root}");
        found.into_iter().filter(|name| !name.ends_with('H')).collect()
    };
    assert_eq!(comparable(&repository.storage), comparable(&theirs.storage));
    repository.ok("check", &["--tags"]);
}

fn sixty_days_ago() -> i64 {
    cvmfs_publish::system_clock() - 60 * 24 * 3600
}

/// A repository whose revisions were published long ago, each with other content.
fn old_revisions(count: u32) -> (tempfile::TempDir, Repository) {
    let directory = tempfile::tempdir().unwrap();
    let (storage, keys) = (directory.path().join("storage"), directory.path().join("keys"));
    let place = storage.to_str().unwrap();
    let new = NewRepository::new("test.example.org", place, &keys);
    create_repository(&NewRepository {
        garbage_collectable: true,
        whitelist_days: 3650,
        clock: sixty_days_ago,
        ..new
    })
    .unwrap();
    let options = OpenOptions { clock: sixty_days_ago, ..OpenOptions::default() };
    let mut publisher = Publisher::open_with("test.example.org", place, &keys, options).unwrap();
    for seed in 0..count {
        let mut transaction = publisher.begin().unwrap();
        let archive = Tar::default().file("file", &noise(60_000, seed)).file("same", b"always").finish();
        transaction.ingest_tar(b"/base", &archive[..], &IngestOptions::default()).unwrap();
        transaction.commit(None).unwrap();
    }
    drop(publisher);
    let repository = Repository::at("test.example.org", &storage, &keys);
    (directory, repository)
}

#[test]
fn row_95_collecting_while_others_publish_check_and_replicate_disturbs_nobody() {
    let (directory, repository) = old_revisions(8);
    let replica = Repository::at("test.example.org", &directory.path().join("replica"), &repository.keys);
    let source = repository.storage.to_str().unwrap();
    const ROUNDS: u32 = 5;
    let removed = std::thread::scope(|scope| {
        scope.spawn(|| {
            for seed in 0..ROUNDS {
                let archive = Tar::default().file("file", &noise(60_000, 100 + seed)).finish();
                repository.ingest("/base", &archive, &[]);
            }
        });
        scope.spawn(|| {
            for _ in 0..ROUNDS {
                repository.ok("check", &["--tags", "--no-unreferenced"]);
            }
        });
        scope.spawn(|| {
            for _ in 0..ROUNDS {
                replica.ok("replicate", &["--from", source]);
            }
        });
        let collecting = scope.spawn(|| {
            let reports = (0..ROUNDS).map(|_| collect(&repository, &["--keep", "0", "--unreferenced"]));
            reports.map(|report| report["revisions_removed"].as_u64().unwrap()).sum::<u64>()
        });
        collecting.join().unwrap()
    });
    assert!(removed >= 6, "only {removed} revisions were collected");
    assert_eq!(repository.assert_sound().revision, u64::from(1 + 8 + ROUNDS));
    replica.ok("replicate", &["--from", source]);
    replica.assert_sound();
}

#[test]
fn a_replica_is_collected_with_the_public_key_alone() {
    let (directory, repository) = old_revisions(3);
    let replica = Repository::at("test.example.org", &directory.path().join("replica"), &repository.keys);
    let source = repository.storage.to_str().unwrap().to_owned();
    replica.ok("replicate", &["--from", &source, "--history"]);
    for seed in 50..53 {
        repository.ingest("/base", &Tar::default().file("file", &noise(60_000, seed)).finish(), &[]);
        replica.ok("replicate", &["--from", &source]);
    }
    let public = repository.keys.join("test.example.org.pub");
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_cvmfs-publish"));
    command.args(["gc", "test.example.org", "--keep", "0", "--grace", "0", "--json", "--storage"]);
    command.arg(&replica.storage).arg("--public-key").arg(public);
    let report: Value =
        serde_json::from_str(&crate::support::expect_success(command.output().unwrap())).unwrap();
    assert!(report["revisions_removed"].as_u64().unwrap() >= 4, "{report}");
    replica.assert_sound();
    assert_equal_trees(&repository.tree("/"), &replica.tree("/"));
    // the source rolls back to what the replica has collected: it comes again
    let root = repository.head().manifest.root_catalog;
    repository.ok("rollback", &[]);
    assert_ne!(repository.head().manifest.root_catalog, root);
    replica.ok("replicate", &["--from", &source]);
    replica.assert_sound();
    assert_equal_trees(&repository.tree("/"), &replica.tree("/"));
}
