//! Whatever is sent to the control socket and whatever the worker does: the mount goes on, and `status` answers.

#![allow(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use testkit::process::{Finished, kill, run, wait_until};
use testkit::{Fixture, Mount, MountBuilder, Origin, ScratchDir, binary};

const PATIENCE: Duration = Duration::from_secs(60);
/// `status` has 2 seconds; the rest is for starting a process on a busy machine.
const STATUS_LIMIT: Duration = Duration::from_secs(5);

struct Stage {
    fixture: Fixture,
    _origin: Origin,
    workspace: ScratchDir,
    mount: Mount,
}

impl Stage {
    fn new() -> Stage {
        let fixture = Fixture::unpack("basic-sha1").unwrap();
        let origin = Origin::serve(&fixture.storage).unwrap();
        let workspace = ScratchDir::new("workspace").unwrap();
        let config = fixture.client_config(&origin.url()).unwrap();
        let mount = MountBuilder::new(&fixture.fqrn, &config)
            .option(&format!("CVMFS_WORKSPACE={}", workspace.path().display()))
            .option("CVMFS_KCACHE_TIMEOUT=0")
            .mount()
            .unwrap();
        Stage { fixture, _origin: origin, workspace, mount }
    }

    fn socket(&self) -> PathBuf {
        self.workspace.path().join(format!("cvmfs_io.{}", self.fixture.fqrn))
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// `status --json` of all mounts, within its time; this mount's document.
    fn status(&self) -> (Finished, serde_json::Value) {
        let mut command = Command::new(binary("cvmfs-client"));
        command.args(["status", "--json"]);
        let started = Instant::now();
        let finished = run(command, PATIENCE).unwrap();
        assert!(started.elapsed() < STATUS_LIMIT, "status took {:?}", started.elapsed());
        let all: Vec<serde_json::Value> = serde_json::from_str(&finished.stdout).unwrap();
        let place = self.mount.path().to_str().unwrap();
        let own = all.into_iter().find(|one| one["mountpoint"] == place).expect("the mount is listed");
        (finished, own)
    }

    fn supervisor(&self) -> u32 {
        let mut stream = self.connect();
        stream.write_all(b"pid watchdog").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.trim().parse().unwrap()
    }
}

/// Reads a file again and again while `work` runs; every read must be right.
fn while_reading(stage: &Stage, work: impl FnOnce()) {
    let path = stage.mount.path().join("sizes/rnd100001");
    let content = fs::read(&path).unwrap();
    let (stop, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                assert!(fs::read(&path).unwrap() == content);
                reads.fetch_add(1, Ordering::SeqCst);
            }
        });
        work();
        let before = reads.load(Ordering::SeqCst);
        wait_until("more reads", PATIENCE, || reads.load(Ordering::SeqCst) > before + 3).unwrap();
        stop.store(true, Ordering::SeqCst);
        reader.join().unwrap();
    });
}

fn number(document: &serde_json::Value, key: &str) -> u64 {
    document[key].as_u64().unwrap_or_else(|| panic!("{key} in {document}"))
}

#[test]
fn row_69_garbage_and_a_line_of_ten_megabytes_cost_nobody_anything() {
    let stage = Stage::new();
    let before = stage.status().1;
    while_reading(&stage, || {
        for garbage in
            [&b"\0\0\0\0"[..], b"\xff\xfe\xfd", b"GET / HTTP/1.1\r\n\r\n", b"cache size; rm -rf /", b"%n%s%x"]
        {
            let mut stream = stage.connect();
            stream.write_all(garbage).unwrap();
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).unwrap();
            assert_eq!(answer, b"unknown command\n", "{garbage:?}");
        }
        let line = vec![b'a'; 10 << 20];
        for _ in 0..5 {
            // The connection is closed in the middle of the line.
            let _ = stage.connect().write_all(&line);
        }
    });
    let after = stage.status().1;
    assert_eq!(after["pid"], before["pid"], "the same worker");
    assert_eq!(after["worker_restarts"], 0);
    assert_eq!(after["io_errors"], 0);
    assert!(number(&after, "memory") < number(&before, "memory") + (64 << 20), "{before} {after}");
}

#[test]
fn row_69_a_thousand_callers_and_slow_ones_do_not_keep_status_from_answering() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
    let stage = Stage::new();
    let before = stage.status().1;
    while_reading(&stage, || {
        let silent: Vec<_> = (0..1000).map(|_| stage.connect()).collect();
        // Callers that begin a command and never take the answer of another.
        let mut slow: Vec<_> = (0..100).map(|_| stage.connect()).collect();
        for stream in &mut slow {
            let _ = stream.write_all(b"internal affairs");
        }
        assert_eq!(stage.status().1["pid"], before["pid"]);
        let during = number(&stage.status().1, "descriptors");
        assert!(during < number(&before, "descriptors") + 300, "{during} descriptors");
        // Silent callers are closed in time.
        for mut stream in silent {
            assert_eq!(stream.read(&mut [0; 1]).unwrap_or(0), 0);
        }
    });
    let settled = || number(&stage.status().1, "descriptors") <= number(&before, "descriptors") + 4;
    wait_until("the descriptors to be closed", PATIENCE, settled).unwrap();
    let after = stage.status().1;
    assert_eq!((&after["pid"], &after["io_errors"]), (&before["pid"], &0.into()));
}

#[test]
fn a_stopped_worker_is_told_in_time_with_the_way_out() {
    let stage = Stage::new();
    let worker = u32::try_from(number(&stage.status().1, "pid")).unwrap();
    kill(worker, Signal::STOP);
    let (finished, document) = stage.status();
    // Its callers fill the queue of the socket, where connecting would wait.
    let waiting: Vec<_> = (0..20)
        .map(|_| {
            let mut command = Command::new(binary("cvmfs-client"));
            command.args(["status", &stage.fixture.fqrn]);
            std::thread::spawn(move || run(command, PATIENCE).unwrap())
        })
        .collect();
    let codes: Vec<_> = waiting.into_iter().map(|one| one.join().unwrap().code()).collect();
    kill(worker, Signal::CONT);
    assert_eq!(finished.code(), Some(1), "{}", finished.output());
    assert!(codes.iter().all(|code| *code == Some(1)), "{codes:?}");
    assert_eq!((&document["online"], &document["revision"]), (&false.into(), &serde_json::Value::Null));
    let reason = document["errors"][0].as_str().unwrap();
    assert!(reason.contains("is stopped") && reason.contains(&format!("kill -CONT {worker}")), "{reason}");
    assert!(finished.stderr.contains(reason), "{}", finished.stderr);
    wait_until("the worker to answer again", PATIENCE, || stage.status().1["revision"].is_u64()).unwrap();
}

#[test]
fn a_worker_that_died_is_counted_and_logged() {
    let stage = Stage::new();
    let worker = u32::try_from(number(&stage.status().1, "pid")).unwrap();
    kill(worker, Signal::KILL);
    wait_until("the next worker", PATIENCE, || stage.status().1["worker_restarts"] == 1).unwrap();
    assert_ne!(number(&stage.status().1, "pid"), u64::from(worker));
    let log = stage.mount.log_text();
    assert!(log.contains("decision=\"worker-restart\""), "{log}");
    // The stock tool reaches the new one at the old place.
    assert!(stage.supervisor() > 0);
}

#[test]
fn a_mount_without_processes_is_told_with_the_way_out() {
    let stage = Stage::new();
    let worker = u32::try_from(number(&stage.status().1, "pid")).unwrap();
    let supervisor = stage.supervisor();
    kill(supervisor, Signal::KILL);
    kill(worker, Signal::KILL);
    wait_until("the processes to end", PATIENCE, || !testkit::process::is_alive(supervisor)).unwrap();
    let (finished, document) = stage.status();
    assert_eq!(finished.code(), Some(1));
    let reason = document["errors"][0].as_str().unwrap();
    assert!(reason.contains("cvmfs-client umount"), "{reason}");
    stage.mount.unmount().unwrap();
    let mut command = Command::new(binary("cvmfs-client"));
    command.args(["status", "--json"]);
    let text = run(command, PATIENCE).unwrap().stdout;
    assert!(!text.contains(stage.mount.path().to_str().unwrap()), "{text}");
}
