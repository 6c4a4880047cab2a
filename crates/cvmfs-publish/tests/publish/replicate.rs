//! Replicas of repositories behind a real web server.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::round_trip::noise;
use crate::support::{Repository, assert_equal_trees, expect_success};
use crate::takeover::take_over;
use crate::tar::Tar;
use s3_testkit::s3_server::{BUCKET, Faults, S3Server};

/// `cvmfs-publish serve`, until it is dropped.
struct Served {
    url: String,
    process: Child,
}

impl Served {
    fn start(directory: &Path) -> Served {
        let mut process = Command::new(env!("CARGO_BIN_EXE_cvmfs-publish"))
            .args(["serve", "--listen", "127.0.0.1:0"])
            .arg(directory)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Served { url: line.trim().strip_prefix("listening on ").unwrap().to_owned(), process }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A replica that is not there yet, trusting the keys of `source`.
fn replica_of(source: &Repository) -> (tempfile::TempDir, Repository) {
    let directory = tempfile::tempdir().unwrap();
    let replica = Repository::at(&source.fqrn, &directory.path().join("replica"), &source.keys);
    (directory, replica)
}

fn replicate(replica: &Repository, url: &str, options: &[&str]) -> Output {
    replica.command("replicate", &[&["--from", url, "--json"], options].concat()).output().unwrap()
}

fn report(output: Output) -> Value {
    serde_json::from_str(&expect_success(output)).unwrap()
}

fn refused(output: &Output, code: i32) -> String {
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{message}");
    message
}

fn publish(source: &Repository, seed: u32) {
    let mut tar = Tar::default().file("big", &noise(400_000, seed));
    for number in 0..60 {
        tar = tar.file(&format!("d{}/f{number}", number % 3), &noise(3000, seed ^ (number + 1)));
    }
    source.ingest("/data/tree", &tar.finish(), &["--catalog", "--chunk-size", "32K:64K:128K"]);
}

#[test]
fn a_replica_of_a_repository_of_the_cpp_tools_is_the_same_and_stays_so() {
    let (_fixture, source) = take_over("history");
    let served = Served::start(&source.storage);
    let (_directory, replica) = replica_of(&source);
    let first = report(replicate(&replica, &served.url, &[]));
    assert_eq!(first["previous_revision"], Value::Null, "{first}");
    assert!(first["revisions"].as_u64().unwrap() >= 4, "the tagged revisions are missing: {first}");
    replica.assert_sound();
    assert_equal_trees(&source.oracle_tree("/"), &replica.oracle_tree("/"));
    for file in [".cvmfspublished", ".cvmfswhitelist"] {
        assert_eq!(replica.raw(file), source.raw(file), "{file}");
    }
    assert!(replica.storage.join(".cvmfs_master_replica").exists());
    assert!(!replica.storage.join(".cvmfs_is_snapshotting").exists());
    let status: Value = serde_json::from_slice(&replica.raw(".cvmfs_status.json")).unwrap();
    assert!(status["last_snapshot"].as_str().unwrap().contains(" UTC 20"), "{status}");

    let again = report(replicate(&replica, &served.url, &[]));
    assert_eq!(
        (&again["new_objects"], &again["previous_revision"]),
        (&0.into(), &first["revision"]),
        "{again}"
    );

    publish(&source, 1);
    publish(&source, 2);
    let next = report(replicate(&replica, &served.url, &[]));
    assert_eq!(next["revision"].as_u64().unwrap(), first["revision"].as_u64().unwrap() + 2);
    replica.ok("check", &["--tags"]);
    replica.assert_sound();
    assert_equal_trees(&source.oracle_tree("/data"), &replica.oracle_tree("/data"));
}

#[test]
fn a_replication_that_is_killed_goes_on_and_never_shows_half_a_revision() {
    let source = Repository::create(&["--garbage-collectable"]);
    publish(&source, 3);
    let served = Served::start(&source.storage);
    let (_directory, replica) = replica_of(&source);
    let started = Instant::now();
    let (_other, warm_up) = replica_of(&source);
    report(replicate(&warm_up, &served.url, &[]));
    let whole = started.elapsed();
    let mut unfinished = 0;
    for round in 0..12 {
        if round % 4 == 3 {
            publish(&source, 10 + round);
        }
        let mut child = replica
            .command("replicate", &["--from", &served.url, "--parallel", "2"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(whole * (round + 1) / 10);
        kill_process(Pid::from_child(&child), Signal::KILL).unwrap();
        unfinished += u32::from(!child.wait().unwrap().success());
        if replica.storage.join(".cvmfspublished").exists() {
            replica.assert_sound();
        }
    }
    assert!(unfinished > 0, "every replication was complete before it was killed");
    let last = report(replicate(&replica, &served.url, &[]));
    assert_eq!(last["revision"], source.head().manifest.revision);
    replica.assert_sound();
    assert_equal_trees(&source.tree("/"), &replica.tree("/"));
    // What is left of revisions that were never completed here, and have gone from the source meanwhile, is garbage.
    replica.ok("gc", &["--unreferenced", "--grace", "0"]);
    assert_eq!(replica.assert_sound().unreferenced_count, 0);
    assert_equal_trees(&source.tree("/"), &replica.tree("/"));
}

#[test]
fn row_101_a_source_that_is_older_than_the_replica_is_refused() {
    let source = Repository::create(&[]);
    publish(&source, 4);
    let old = tempfile::tempdir().unwrap();
    expect_success(Command::new("cp").arg("-a").arg(&source.storage).arg(old.path()).output().unwrap());
    publish(&source, 5);
    let (_directory, replica) = replica_of(&source);
    report(replicate(&replica, source.storage.to_str().unwrap(), &[]));
    let before = replica.raw(".cvmfspublished");
    let served = Served::start(&old.path().join("storage"));
    let message = refused(&replicate(&replica, &served.url, &[]), 3);
    assert!(message.contains("a replica never goes back"), "{message}");
    assert_eq!(replica.raw(".cvmfspublished"), before);
    replica.assert_sound();
}

#[test]
fn row_101_a_source_that_is_published_to_meanwhile_gives_one_whole_revision() {
    let source = Repository::create(&[]);
    publish(&source, 6);
    let served = Served::start(&source.storage);
    let (_directory, replica) = replica_of(&source);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for seed in 20..26 {
                publish(&source, seed);
            }
        });
        for _ in 0..8 {
            report(replicate(&replica, &served.url, &["--parallel", "3"]));
            replica.assert_sound();
        }
    });
}

#[test]
fn a_missing_and_a_damaged_object_at_the_source_are_named_and_change_nothing() {
    let source = Repository::create(&[]);
    publish(&source, 7);
    let served = Served::start(&source.storage);
    let (_directory, replica) = replica_of(&source);
    report(replicate(&replica, &served.url, &[]));
    source.ingest("/more", &Tar::default().file("only", &noise(5000, 99)).finish(), &["--catalog"]);
    let before = replica.raw(".cvmfspublished");
    let hash = source.tree("/more")["/more/only"]["sha256"].clone();
    let newest = source.ok("check", &["--json"]).parse::<Value>().unwrap();
    assert_eq!(newest["ok"], true);
    let object = newest_object(&source);
    let content = std::fs::read(&object).unwrap();

    std::fs::remove_file(&object).unwrap();
    let message = refused(&replicate(&replica, &served.url, &[]), 1);
    assert!(message.contains("is missing at") && message.contains("/more/"), "{message}");
    let mut flipped = content.clone();
    flipped[100] ^= 1;
    std::fs::write(&object, flipped).unwrap();
    let message = refused(&replicate(&replica, &served.url, &[]), 1);
    assert!(message.contains("do not have the hash"), "{message}");
    assert_eq!(replica.raw(".cvmfspublished"), before);
    replica.assert_sound();

    std::fs::write(&object, content).unwrap();
    report(replicate(&replica, &served.url, &[]));
    assert_eq!(replica.tree("/more")["/more/only"]["sha256"], hash);
}

/// The largest of the objects that came last: the file of 5000 bytes of noise.
fn newest_object(source: &Repository) -> std::path::PathBuf {
    let mut found = None;
    for group in std::fs::read_dir(source.storage.join("data")).unwrap() {
        let group = group.unwrap().path();
        for object in std::fs::read_dir(&group).unwrap() {
            let object = object.unwrap().path();
            let length = object.metadata().unwrap().len();
            let is_file = object.file_name().unwrap().to_str().unwrap().len() == 38;
            if is_file && (5000..5100).contains(&length) {
                found = Some(object);
            }
        }
    }
    found.unwrap()
}

#[test]
fn what_is_no_source_for_replicas_is_refused() {
    let source = Repository::create(&[]);
    let (_directory, replica) = replica_of(&source);
    let nothing = tempfile::tempdir().unwrap();
    let served = Served::start(nothing.path());
    assert!(refused(&replicate(&replica, &served.url, &[]), 5).contains("there is no repository at http://"));
    std::fs::remove_file(source.storage.join(".cvmfs_master_replica")).unwrap();
    let served = Served::start(&source.storage);
    assert!(refused(&replicate(&replica, &served.url, &[]), 5).contains("does not allow replication"));
    assert_eq!(replicate(&replica, "http://127.0.0.1:1/x", &[]).status.code(), Some(4));
    // a web server is for reading
    let to_server = Repository::at(&source.fqrn, served.url.as_ref(), &source.keys);
    assert_eq!(to_server.run("ingest", &["--delete", "x"], b"").status.code(), Some(2));
    let checked: Value = serde_json::from_str(&to_server.ok("check", &["--json"])).unwrap();
    assert_eq!(checked["ok"], true, "{checked}");
}

#[test]
fn a_replica_can_be_in_a_bucket() {
    let source = Repository::create(&[]);
    publish(&source, 8);
    let served = Served::start(&source.storage);
    let server = S3Server::start(true).unwrap();
    let place = format!("s3://{BUCKET}/{}", source.fqrn);
    let in_bucket = Repository::at(&source.fqrn, place.as_ref(), &source.keys);
    for _ in 0..2 {
        let mut command = in_bucket.command("replicate", &["--from", &served.url, "--json"]);
        report(command.envs(server.environment()).output().unwrap());
    }
    let seen = Repository::at(&source.fqrn, &server.directory(&source.fqrn), &source.keys);
    seen.assert_sound();
    assert_equal_trees(&source.oracle_tree("/"), &seen.oracle_tree("/"));
}

#[test]
fn an_object_of_more_than_a_part_reaches_a_bucket_in_parts_and_leaves_none_when_that_fails() {
    let source = Repository::create(&[]);
    // The largest chunk that there is, which does not shrink.
    let large: Vec<u8> = (0..70_u32).flat_map(|part| noise(1 << 20, 77 + part)).collect();
    let archive = Tar::default().file("large", &large).finish();
    source.ingest("/a", &archive, &["--chunk-size", "60M:62M:64M"]);
    let served = Served::start(&source.storage);
    let server = S3Server::start(true).unwrap();
    let place = format!("s3://{BUCKET}/{}", source.fqrn);
    let in_bucket = Repository::at(&source.fqrn, place.as_ref(), &source.keys);
    let replicate = || {
        let mut command = in_bucket.command("replicate", &["--from", &served.url, "--json"]);
        command.envs(server.environment()).output().unwrap()
    };
    server.break_with(Faults { refuse_parts_after: Some(1), ..Faults::default() });
    let message = refused(&replicate(), 4);
    assert!(message.contains("403"), "{message}");
    let ended = server.arrived().into_iter().filter(|arrived| arrived.method == hyper::Method::DELETE);
    assert!(
        ended.map(|arrived| arrived.key).any(|key| key.contains("/data/")),
        "the upload was not given up"
    );

    server.break_with(Faults::default());
    report(replicate());
    let sent = server.arrived();
    let parts = sent.iter().filter(|arrived| arrived.part).count();
    assert_eq!(parts, 2, "{sent:?}");
    let seen = Repository::at(&source.fqrn, &server.directory(&source.fqrn), &source.keys);
    seen.assert_sound();
    assert_equal_trees(&source.oracle_tree("/"), &seen.oracle_tree("/"));
}
