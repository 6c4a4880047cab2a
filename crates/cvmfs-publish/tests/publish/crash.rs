//! Killed, interrupted and competing publishers.

use std::io::{Read, Write};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::round_trip::noise;
use crate::support::Repository;
use crate::tar::Tar;

const PATIENCE: Duration = Duration::from_secs(20);

fn archive(seed: u32) -> Vec<u8> {
    let mut tar = Tar::default().file("big", &noise(3_000_000, seed));
    for number in 0..150 {
        tar = tar.file(&format!("d{}/f{number}", number % 7), &noise(5000, seed ^ (number + 1)));
    }
    tar.finish()
}

fn start(repository: &Repository, options: &[&str]) -> Child {
    let mut command = repository.command("ingest", &[&["--tar", "-"], options].concat());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

fn wait_for(what: &str, mut happened: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !happened() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn leftovers(repository: &Repository) -> Vec<String> {
    let names = std::fs::read_dir(repository.storage.join("data/txn")).unwrap();
    let names = names.map(|item| item.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name != "publish.lock" && name != "publish.known").collect()
}

#[test]
fn row_91_a_publisher_killed_at_any_moment_leaves_the_old_revision_or_the_new_one() {
    let repository = Repository::create(&[]);
    let options = ["--chunk-size", "256K:512K:1M", "--catalog", "--base"];
    let started = Instant::now();
    repository.ingest("/warm-up", &archive(1), &options[..3]);
    let whole = started.elapsed();
    let (mut published, mut lost) = (0, 0);
    const ROUNDS: u32 = 24;
    for round in 0..ROUNDS {
        let before = repository.head().manifest;
        let base = format!("/round{round}");
        let mut child = start(&repository, &[&options[..], &[&base]].concat());
        let input = archive(round + 2);
        let mut stdin = child.stdin.take().unwrap();
        let feeder = std::thread::spawn(move || {
            // the pipe breaks when the publisher dies
            let _ = stdin.write_all(&input);
        });
        // spread over the whole publish and a little beyond
        std::thread::sleep(whole * (round + 1) / (ROUNDS - 4));
        signal(&child, Signal::KILL);
        child.wait().unwrap();
        feeder.join().unwrap();

        let report = repository.assert_sound();
        let tree = repository.tree(&base);
        if report.revision == before.revision {
            assert_eq!(repository.head().manifest, before);
            assert!(tree.is_empty());
            lost += 1;
        } else {
            assert_eq!(report.revision, before.revision + 1);
            assert_eq!(tree.values().filter(|entry| entry["type"] == "file").count(), 152);
            published += 1;
        }
        // the next publisher needs no repair, and cleans up
        repository.ingest("/after", &Tar::default().file("f", &round.to_le_bytes()).finish(), &[]);
        assert_eq!(leftovers(&repository), Vec::<String>::new());
    }
    assert!(lost > 0, "all {published} publishes were complete before they were killed");
    repository.assert_sound();
}

#[test]
fn an_interrupted_publish_ends_with_130_and_publishes_nothing() {
    let repository = Repository::create(&[]);
    let before = repository.head().manifest;
    for (sent, which) in [(0, Signal::INT), (1_000_000, Signal::INT), (1_000_000, Signal::TERM)] {
        let mut child = start(&repository, &["--base", "/x"]);
        let mut stdin = child.stdin.take().unwrap();
        wait_for("the lock", || holds_lock(&repository, &child));
        stdin.write_all(&archive(3)[..sent]).unwrap();
        // the stream stays open and silent
        let asked = Instant::now();
        signal(&child, which);
        let status = child.wait().unwrap();
        assert_eq!(status.code(), Some(130));
        assert!(asked.elapsed() < Duration::from_secs(5));
        drop(stdin);
        assert_eq!(repository.head().manifest, before);
        repository.assert_sound();
    }
    repository.ingest("/x", &archive(3), &[]);
    assert_eq!(leftovers(&repository), Vec::<String>::new());
}

fn holds_lock(repository: &Repository, child: &Child) -> bool {
    let lock = std::fs::read_to_string(repository.storage.join("data/txn/publish.lock")).unwrap_or_default();
    lock.starts_with(&format!("process {} on", child.id()))
}

#[test]
fn row_94_a_second_publisher_is_told_who_is_at_work_and_loses_nothing() {
    let repository = Repository::create(&[]);
    let mut first = start(&repository, &["--base", "/first"]);
    wait_for("the lock", || holds_lock(&repository, &first));
    let second = Tar::default().file("f", b"second").finish();
    let asked = Instant::now();
    let message = repository.refuses(1, &second, &["--lock-wait", "1"]);
    assert!(asked.elapsed() >= Duration::from_secs(1));
    assert!(message.contains(&format!("process {}", first.id())), "{message}");

    // one that waits long enough comes after the first
    let mut waiting = start(&repository, &["--base", "/second"]);
    let mut stdin = waiting.stdin.take().unwrap();
    stdin.write_all(&second).unwrap();
    drop(stdin);
    let mut stdin = first.stdin.take().unwrap();
    stdin.write_all(&archive(9)).unwrap();
    drop(stdin);
    for child in [&mut first, &mut waiting] {
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(child.wait().unwrap().success(), "{said}");
    }
    assert_eq!(repository.assert_sound().revision, 3);
    let tree = repository.tree("/");
    assert!(tree.contains_key("/first/big") && tree.contains_key("/second/f"));
}
