//! Repositories in a bucket of a real S3 server.

use std::collections::HashSet;
use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cvmfs_publish::storage::StoredObject;
use hyper::Method;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::round_trip::noise;
use crate::support::{Repository, assert_equal_trees, expect_success};
use crate::tar::Tar;
use s3_testkit::s3_server::{BUCKET, Faults, S3Server};

const FQRN: &str = "test.example.org";

/// A repository in a bucket.
struct Bucket {
    server: S3Server,
    keys: tempfile::TempDir,
}

impl Bucket {
    fn create(signed: bool, options: &[&str]) -> Bucket {
        let bucket = Bucket { server: S3Server::start(signed).unwrap(), keys: tempfile::tempdir().unwrap() };
        bucket.ok("mkfs", options);
        bucket
    }

    fn command(&self, verb: &str, options: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cvmfs-publish"));
        command
            .args([verb, FQRN, "--storage", &format!("s3://{BUCKET}/{FQRN}"), "--keys"])
            .arg(self.keys.path());
        command.args(options).envs(self.server.environment());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn ok(&self, verb: &str, options: &[&str]) -> String {
        expect_success(self.command(verb, options).output().unwrap())
    }

    fn start(&self, base: &str, options: &[&str]) -> Child {
        self.command("ingest", &[&["--base", base, "--tar", "-", "--json"], options].concat())
            .spawn()
            .unwrap()
    }

    /// Ingests an archive; the report, or the message with its exit code.
    fn ingest(&self, base: &str, archive: &[u8], options: &[&str]) -> Result<Value, (i32, String)> {
        finish(self.start(base, options), archive)
    }

    /// The server's directory, read as a storage.
    fn seen(&self) -> Repository {
        Repository::at(FQRN, &self.server.directory(FQRN), self.keys.path())
    }

    fn uploads(&self) -> Vec<String> {
        let arrived = self.server.arrived().into_iter();
        let objects = arrived
            .filter(|a| a.method == Method::PUT && a.key.contains("/data/") && !a.key.contains("/txn/"));
        objects.map(|a| a.key).collect()
    }
}

fn finish(mut child: Child, archive: &[u8]) -> Result<Value, (i32, String)> {
    // a publisher that refuses early closes its end
    let _ = child.stdin.take().unwrap().write_all(archive);
    let output = child.wait_with_output().unwrap();
    match output.status.code() {
        Some(0) => Ok(serde_json::from_slice(&output.stdout).unwrap()),
        code => Err((code.unwrap_or(-1), String::from_utf8_lossy(&output.stderr).into_owned())),
    }
}

/// All files differ for each seed above 40: of two equal ones the second would be sent if the first was lost.
fn archive(seed: u32) -> Vec<u8> {
    let mut tar = Tar::default().file("big", &noise(900_000, seed));
    for number in 0..40 {
        tar = tar.file(&format!("d{}/f{number}", number % 3), &noise(2000, seed ^ (number + 1)));
    }
    tar.finish()
}

#[test]
fn a_repository_in_a_bucket_goes_through_its_whole_life() {
    let bucket = Bucket::create(true, &["--garbage-collectable"]);
    let options = ["--catalog", "--chunk-size", "64K:128K:256K"];
    let report = bucket.ingest("/layers/a", &archive(1), &options).unwrap();
    assert_eq!(report["revision"], 2);
    bucket.ingest("/layers/a", &archive(2), &[&options[..], &["--tag", "second"]].concat()).unwrap();
    let changes = bucket.ok("diff", &["--to", "second"]);
    bucket.ok("rollback", &[]);
    assert!(changes.contains("M /layers/a/big (content)"), "{changes}");
    let tags = expect_success({
        let mut command = Command::new(env!("CARGO_BIN_EXE_cvmfs-publish"));
        command.args(["tag", "list", FQRN, "--storage", &format!("s3://{BUCKET}/{FQRN}"), "--keys"]);
        command.arg(bucket.keys.path()).envs(bucket.server.environment()).output().unwrap()
    });
    assert!(tags.contains("trunk"), "{tags}");

    let seen = bucket.seen();
    seen.assert_sound();
    assert_equal_trees(&seen.oracle_tree("/layers"), &seen.tree("/layers"));
    let removed: Value =
        serde_json::from_str(&bucket.ok("gc", &["--keep", "0", "--grace", "0", "--json"])).unwrap();
    assert!(removed["objects_removed"].as_u64().unwrap() > 10, "{removed}");
    let checked: Value = serde_json::from_str(&bucket.ok("check", &["--json", "--tags"])).unwrap();
    assert_eq!((&checked["ok"], &checked["unreferenced_count"]), (&true.into(), &0.into()), "{checked}");
    assert_equal_trees(&seen.oracle_tree("/layers"), &seen.tree("/layers"));
    assert!(!seen.storage.join("data/txn/publish.lock").exists(), "the lock was left behind");
}

#[test]
fn every_kind_of_thing_has_the_headers_that_caches_need() {
    let bucket = Bucket::create(true, &[]);
    bucket.ingest("/a", &archive(3), &["--catalog"]).unwrap();
    let mut kinds = HashSet::new();
    for arrived in bucket.server.arrived().into_iter().filter(|a| a.method == Method::PUT) {
        let name = arrived.key.strip_prefix("test.example.org/").unwrap().to_owned();
        let (content_type, cache_control) = (arrived.content_type.as_str(), arrived.cache_control.as_str());
        if name.starts_with("data/txn/") {
            continue;
        }
        if name.starts_with("data/") {
            assert_eq!(
                (content_type, cache_control),
                ("application/octet-stream", "max-age=259200"),
                "{name}"
            );
            kinds.insert("object".to_owned());
        } else {
            assert_eq!((content_type, cache_control), ("application/x-cvmfs", "max-age=61"), "{name}");
            kinds.insert(name);
        }
    }
    for kind in ["object", ".cvmfspublished", ".cvmfsreflog", ".cvmfswhitelist", ".cvmfs_master_replica"] {
        assert!(kinds.contains(kind), "{kind} is not among {kinds:?}");
    }
}

#[test]
fn an_upload_that_was_interrupted_goes_on_where_it_stopped() {
    let bucket = Bucket::create(true, &[]);
    let before = bucket.seen().head().manifest;
    bucket.server.break_with(Faults { uploads_until_refusal: Some(20), ..Faults::default() });
    bucket.server.arrived();
    let (code, message) = bucket.ingest("/a", &archive(4), &[]).unwrap_err();
    assert_eq!(code, 4, "{message}");
    assert!(message.contains("cannot write test.example.org/data/") && message.contains("403"), "{message}");
    assert_eq!(bucket.seen().head().manifest, before);
    let stored = stored_keys(&bucket);
    assert!(stored.len() >= 20, "{stored:?}");
    bucket.uploads();

    bucket.server.break_with(Faults::default());
    bucket.ingest("/a", &archive(4), &[]).unwrap();
    let resumed = bucket.uploads();
    assert!(resumed.iter().all(|key| !stored.contains(key)), "something was sent twice: {resumed:?}");
    assert!(resumed.len() < 41, "{resumed:?}");
    bucket.seen().assert_sound();
}

/// Keys of all objects that the server has.
fn stored_keys(bucket: &Bucket) -> HashSet<String> {
    let mut keys = HashSet::new();
    let storage = bucket.seen().open_storage();
    let mut note = |object: StoredObject| {
        keys.insert(format!("{FQRN}/{}", object.path));
    };
    storage.list_objects(&mut note).unwrap();
    keys
}

#[test]
fn row_93_an_upload_that_the_store_confirmed_and_lost_is_found_before_anything_is_signed() {
    let bucket = Bucket::create(true, &[]);
    let before = bucket.seen().head().manifest;
    bucket.server.break_with(Faults { lost_uploads: 1, ..Faults::default() });
    let (code, message) = bucket.ingest("/a", &archive(100), &[]).unwrap_err();
    assert_eq!(code, 1, "{message}");
    assert!(message.contains("confirmed 1 uploads and does not have them (data/"), "{message}");
    assert_eq!(bucket.seen().head().manifest, before);
    bucket.ingest("/a", &archive(100), &[]).unwrap();
    bucket.seen().assert_sound();
}

#[test]
fn a_busy_store_is_asked_again() {
    let bucket = Bucket::create(true, &[]);
    bucket.server.break_with(Faults { busy: 5, ..Faults::default() });
    bucket.ingest("/a", &archive(6), &[]).unwrap();
    bucket.seen().assert_sound();
}

#[test]
fn a_manifest_that_was_written_without_an_answer_counts() {
    let bucket = Bucket::create(true, &[]);
    bucket.server.break_with(Faults { silent_manifest: true, ..Faults::default() });
    assert_eq!(bucket.ingest("/a", &archive(7), &[]).unwrap()["revision"], 2);
    assert_eq!(bucket.seen().assert_sound().revision, 2);
}

#[test]
fn a_store_without_conditional_writes_is_refused_unless_there_is_one_publisher_only() {
    let server = S3Server::start(false).unwrap();
    let bucket = Bucket { server, keys: tempfile::tempdir().unwrap() };
    bucket.server.break_with(Faults { unconditional: true, ..Faults::default() });
    let output = bucket.command("mkfs", &[]).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(
        message.contains("no conditional writes") && message.contains("AWS_CONDITIONAL_PUT=disabled"),
        "{message}"
    );
    assert!(!bucket.seen().storage.join(".cvmfspublished").exists());

    let mut command = bucket.command("mkfs", &[]);
    expect_success(command.env("AWS_CONDITIONAL_PUT", "disabled").output().unwrap());
    bucket.seen().assert_sound();
}

#[test]
fn row_94_two_publishers_come_one_after_the_other() {
    let bucket = Bucket::create(true, &[]);
    let (one, two) = (bucket.start("/one", &[]), bucket.start("/two", &[]));
    let (first, second) = (archive(8), archive(9));
    let waiting = std::thread::scope(|scope| {
        let other = scope.spawn(|| finish(two, &second));
        (finish(one, &first), other.join().unwrap())
    });
    waiting.0.unwrap();
    waiting.1.unwrap();
    assert_eq!(bucket.seen().assert_sound().revision, 3);
    let tree = bucket.seen().tree("/");
    assert!(tree.contains_key("/one/big") && tree.contains_key("/two/big"));
}

#[test]
fn row_94_a_publisher_whose_lock_was_taken_away_overwrites_nothing() {
    let bucket = Bucket::create(true, &[]);
    let lock = bucket.seen().storage.join("data/txn/publish.lock");
    let late = bucket.start("/late", &[]);
    wait_for("the lock", || lock.exists());
    std::thread::sleep(Duration::from_millis(300));
    let text = std::fs::read_to_string(&lock).unwrap();
    assert!(text.starts_with(&format!("process {} on ", late.id())), "{text}");
    std::fs::remove_file(&lock).unwrap();
    bucket.ingest("/early", &archive(10), &[]).unwrap();
    let (code, message) = finish(late, &archive(11)).unwrap_err();
    assert!(message.contains("replaced by another publisher"), "{code}: {message}");
    assert_eq!(code, 1);
    assert_eq!(bucket.seen().assert_sound().revision, 2);
    assert!(bucket.seen().tree("/").contains_key("/early/big"));
}

#[test]
fn a_second_publisher_learns_who_is_at_work_and_does_not_wait_for_a_dead_one() {
    let bucket = Bucket::create(true, &[]);
    let lock = bucket.seen().storage.join("data/txn/publish.lock");
    let mut first = bucket.start("/first", &[]);
    wait_for("the lock", || lock.exists());
    std::thread::sleep(Duration::from_millis(300));
    let (code, message) = bucket.ingest("/second", &archive(12), &["--lock-wait", "1"]).unwrap_err();
    assert_eq!(code, 1, "{message}");
    assert!(message.contains(&format!("process {} on ", first.id())), "{message}");

    kill_process(Pid::from_child(&first), Signal::KILL).unwrap();
    first.wait().unwrap();
    let asked = Instant::now();
    bucket.ingest("/second", &archive(12), &[]).unwrap();
    assert!(asked.elapsed() < Duration::from_secs(15), "waited {:?} for a dead publisher", asked.elapsed());
    assert_eq!(bucket.seen().assert_sound().revision, 2);
    assert!(bucket.server.root().exists());
}

fn wait_for(what: &str, mut happened: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !happened() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn row_91_a_publisher_killed_at_any_moment_leaves_a_bucket_with_the_old_revision_or_the_new_one() {
    let bucket = Bucket::create(true, &[]);
    let temporary = tempfile::tempdir().unwrap();
    let start = |base: &str| {
        let mut command = bucket.command("ingest", &["--base", base, "--catalog", "--tar", "-", "--json"]);
        command.env("TMPDIR", temporary.path()).spawn().unwrap()
    };
    let started = Instant::now();
    finish(start("/warm-up"), &archive(1000)).unwrap();
    let whole = started.elapsed();
    const ROUNDS: u32 = 12;
    let (mut published, mut lost) = (0, 0);
    for round in 0..ROUNDS {
        let before = bucket.seen().head().manifest;
        let base = format!("/round{round}");
        let mut child = start(&base);
        let mut stdin = child.stdin.take().unwrap();
        let input = archive(2000 + round * 100);
        let feeder = std::thread::spawn(move || {
            // The pipe breaks when the publisher dies.
            let _ = stdin.write_all(&input);
        });
        // Spread over the whole publish and a little beyond.
        std::thread::sleep(whole * (round + 1) / (ROUNDS - 2));
        kill_process(Pid::from_child(&child), Signal::KILL).unwrap();
        child.wait().unwrap();
        feeder.join().unwrap();

        let report = bucket.seen().assert_sound();
        let files = bucket.seen().tree(&base).values().filter(|entry| entry["type"] == "file").count();
        if report.revision == before.revision {
            assert_eq!((bucket.seen().head().manifest, files), (before, 0));
            lost += 1;
        } else {
            assert_eq!((report.revision, files), (before.revision + 1, 42));
            published += 1;
        }
        // The next one needs no repair, does not wait, and removes work files that were left a while ago.
        for left in std::fs::read_dir(temporary.path()).unwrap() {
            let long_ago = std::time::SystemTime::now() - Duration::from_secs(300);
            std::fs::File::open(left.unwrap().path()).unwrap().set_modified(long_ago).unwrap();
        }
        let asked = Instant::now();
        finish(start("/after"), &Tar::default().file("f", &round.to_le_bytes()).finish()).unwrap();
        assert!(
            asked.elapsed() < Duration::from_secs(15),
            "waited {:?} for a dead publisher",
            asked.elapsed()
        );
        let left: Vec<_> = std::fs::read_dir(temporary.path()).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
    }
    assert!(lost > 0, "all {published} publishes were complete before they were killed");
    bucket.seen().assert_sound();
}

#[test]
fn row_94_a_lock_of_another_machine_is_waited_for_while_it_is_renewed_and_taken_over_when_it_is_not() {
    let bucket = Bucket::create(false, &[]);
    let address = bucket.server.address.trim_start_matches("http://");
    let lock = format!("/{BUCKET}/{FQRN}/data/txn/publish.lock");
    let foreign = |number: u32| {
        let text = format!("process 17 on far.example.org\nplace elsewhere\nnonce 00\nrenewal {number}\n");
        let answer = testkit::http::request(address, "PUT", &lock, &[], text.as_bytes()).unwrap();
        assert_eq!(answer.status, 200);
    };
    foreign(0);
    let started = Instant::now();
    let waiting = bucket.start("/mine", &["--lock-wait", "120"]);
    // Its holder lives for longer than a lock that is not renewed would be respected.
    let holder_lives = Duration::from_secs(8);
    let mut number = 0;
    while started.elapsed() < holder_lives {
        std::thread::sleep(Duration::from_secs(4));
        number += 1;
        foreign(number);
    }
    finish(waiting, &archive(50)).unwrap();
    let waited = started.elapsed();
    assert!(
        waited >= holder_lives + Duration::from_secs(35),
        "a living holder's lock was taken after {waited:?}"
    );
    assert!(waited < holder_lives + Duration::from_secs(60), "waited {waited:?} for a dead holder");
    assert_eq!(bucket.seen().assert_sound().revision, 2);
}
