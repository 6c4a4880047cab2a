//! A worker that is killed is replaced; readers notice a pause and no error.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{
    Mounted, Prepared, files_below, is_gone, kernel_passes_through, kill, mount_with, signal, wait_until,
};
use rustix::process::Signal;

/// Kills under 13 readers; `CVMFS_TEST_KILLS` asks for more, `CVMFS_TEST_SEED` chooses the moments.
const KILLS: u64 = 15;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|value| value.parse().unwrap())
}

/// A mount on this kernel, or as on one that does not repeat requests in flight (before Linux 6.9).
fn mounted_on(kernel: Option<&str>, fixture: &str, options: &str, faults: &[(&str, &str)]) -> Mounted {
    let mounted = Prepared::new(fixture).0;
    let kernel = kernel.map(|minor| ("CVMFS_FUSE_TEST_KERNEL", minor));
    let environment: Vec<_> =
        kernel.iter().chain(faults).map(|(name, value)| (*name, (*value).to_owned())).collect();
    let output = mount_with(&mounted, options, &environment);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    mounted
}

/// Linux 6.9 and newer, and one before.
const KERNELS: [Option<&str>; 2] = [None, Some("38")];

#[test]
fn readers_survive_the_death_of_the_worker_without_an_error_or_a_wrong_byte() {
    readers_survive(None, "CVMFS_KCACHE_TIMEOUT=0");
}

#[test]
fn readers_survive_the_death_of_the_worker_on_a_kernel_that_repeats_no_request_too() {
    for profile in ["no_open", "plain"] {
        readers_survive(Some("38"), &format!("CVMFS_KCACHE_TIMEOUT=0,CVMFS_FUSE_PROFILE={profile}"));
    }
}

fn readers_survive(kernel: Option<&str>, options: &str) {
    let mounted = mounted_on(kernel, "chunked", options, &[]);
    let contents: HashMap<_, _> = files_below(&mounted.mountpoint)
        .into_iter()
        .map(|path| (path.clone(), fs::read(&path).unwrap()))
        .collect();
    let paths: Vec<_> = contents.keys().cloned().collect();
    let largest = paths.iter().max_by_key(|path| contents[*path].len()).unwrap();
    let held = fs::File::open(largest).unwrap();

    let stop = AtomicBool::new(false);
    let reads = AtomicU64::new(0);
    let longest = AtomicU64::new(0);
    let mut kills = 0;
    std::thread::scope(|scope| {
        for reader in 0..12 {
            let (paths, contents, stop, reads, longest) = (&paths, &contents, &stop, &reads, &longest);
            scope.spawn(move || {
                let mut next = reader * 7;
                while !stop.load(Ordering::SeqCst) {
                    let path = &paths[next % paths.len()];
                    next += 1;
                    let start = Instant::now();
                    let read = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                    longest.fetch_max(start.elapsed().as_millis() as u64, Ordering::SeqCst);
                    assert!(read == contents[path], "wrong bytes in {}", path.display());
                    reads.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        let (held, content, stop) = (&held, &contents[largest], &stop);
        scope.spawn(move || {
            let mut position = 0;
            while !stop.load(Ordering::SeqCst) {
                let mut buffer = [0; 4096];
                let length = held.read_at(&mut buffer, position as u64).unwrap();
                assert!(buffer[..length] == content[position..position + length]);
                position = (position + 7919) % content.len();
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let mut random = number("CVMFS_TEST_SEED").unwrap_or(7) | 1;
        for _ in 0..number("CVMFS_TEST_KILLS").unwrap_or(KILLS) {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            std::thread::sleep(Duration::from_millis((random >> 33) % 400));
            let before = mounted.status();
            kill(before["pid"].as_i64().unwrap());
            let again = Instant::now() + Duration::from_secs(20);
            // The status is answered by the successor as soon as it serves.
            while Instant::now() < again {
                std::thread::sleep(Duration::from_millis(20));
                let now = mounted.status();
                if now["pid"].is_number() && now["pid"] != before["pid"] {
                    kills += 1;
                    break;
                }
            }
        }
        stop.store(true, Ordering::SeqCst);
    });
    let state = mounted.status();
    println!(
        "{kills} kills, {} reads, {} requests answered by a successor, longest read {} ms",
        reads.load(Ordering::SeqCst),
        state["repeated_requests"],
        longest.load(Ordering::SeqCst)
    );
    assert!(kills >= 3);
    assert!(state["workers"].as_u64().unwrap() > 3, "{state}");
    assert_eq!(state["io_errors"], 0);
}

#[test]
fn a_held_file_and_a_held_directory_work_with_the_successor() {
    let mounted = Mounted::new("basic-sha1", "");
    let directory = mounted.mountpoint.join("software/v1.0");
    let names: Vec<_> = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    let held = fs::File::open(&directory).unwrap();
    kill(mounted.status()["pid"].as_i64().unwrap());
    let through_descriptor = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&held));
    let mut again: Vec<_> =
        fs::read_dir(through_descriptor).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    let mut names = names;
    names.sort();
    again.sort();
    assert_eq!(names, again);
}

/// Readers of all files in a loop; they end when dropped, and none may see an error.
struct Readers {
    stop: std::sync::Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<u64>>,
}

impl Readers {
    fn start(mounted: &Mounted, count: usize) -> Readers {
        let contents: HashMap<_, _> = files_below(&mounted.mountpoint)
            .into_iter()
            .map(|path| (path.clone(), fs::read(&path).unwrap()))
            .collect();
        let contents = std::sync::Arc::new(contents);
        let stop = std::sync::Arc::new(AtomicBool::new(false));
        let read_on = |number: usize| {
            let (contents, stop) = (contents.clone(), stop.clone());
            std::thread::spawn(move || {
                let mut reads = 0;
                let paths: Vec<_> = contents.keys().collect();
                for path in paths.iter().cycle().skip(number * 7) {
                    if stop.load(Ordering::SeqCst) {
                        break;
                    }
                    let read = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                    assert!(read == contents[*path], "wrong bytes in {}", path.display());
                    reads += 1;
                }
                reads
            })
        };
        let threads = (0..count).map(read_on).collect();
        Readers { stop, threads }
    }

    fn end(self) -> u64 {
        self.stop.store(true, Ordering::SeqCst);
        self.threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    }
}

fn worker_of(mounted: &Mounted) -> i64 {
    mounted.status()["pid"].as_i64().unwrap()
}

fn has_successor(mounted: &Mounted, before: i64) -> bool {
    mounted.status()["pid"].as_i64().is_some_and(|pid| pid != before)
}

#[test]
fn row_60_a_worker_that_crashes_in_any_way_is_replaced_and_readers_see_nothing() {
    let cases = [
        (None, "passthrough"),
        (None, "no_open"),
        (None, "plain"),
        (Some("38"), "no_open"),
        (Some("38"), "plain"),
    ];
    for (kernel, profile) in cases {
        if profile == "passthrough" && !kernel_passes_through() {
            continue;
        }
        let options = format!("CVMFS_KCACHE_TIMEOUT=0,CVMFS_FUSE_PROFILE={profile}");
        let mounted = mounted_on(kernel, "basic-sha1", &options, &[]);
        assert_eq!(mounted.status()["mode"], profile);
        let readers = Readers::start(&mounted, 3);
        for death in [Signal::SEGV, Signal::ABORT, Signal::BUS, Signal::KILL] {
            let before = worker_of(&mounted);
            // The first one of some signals only takes the runtime's own handler away.
            wait_until("the death", || {
                signal(before, death);
                is_gone(before)
            });
            wait_until("a successor", || has_successor(&mounted, before));
        }
        assert!(readers.end() > 0);
        assert_eq!(mounted.status()["io_errors"], 0);
        assert_eq!(mounted.status()["mode"], profile);
    }
}

#[test]
fn row_61_workers_are_replaced_on_request_again_and_again_under_load() {
    for kernel in KERNELS {
        let mounted = mounted_on(kernel, "basic-sha1", "CVMFS_KCACHE_TIMEOUT=0", &[]);
        let readers = Readers::start(&mounted, 3);
        let supervisor = mounted.record()["supervisor_pid"].as_i64().unwrap();
        for _ in 0..25 {
            let before = worker_of(&mounted);
            signal(supervisor, Signal::HUP);
            wait_until("another worker", || has_successor(&mounted, before));
        }
        assert!(readers.end() > 0);
        let state = mounted.status();
        assert_eq!((&state["workers"], &state["io_errors"]), (&26.into(), &0.into()));
        assert!(mounted.log().contains("took over on request"));
    }
}

#[test]
fn row_62_a_worker_that_hangs_is_noticed_written_down_and_replaced() {
    for kernel in KERNELS {
        let faults = [("CVMFS_FUSE_TEST_FAULT", "hang-once:software"), ("CVMFS_FUSE_TEST_PATIENCE", "2")];
        let mounted = mounted_on(kernel, "basic-sha1", "", &faults);
        let before = worker_of(&mounted);
        fs::metadata(mounted.mountpoint.join("software")).expect("the successor answers");
        assert_ne!(worker_of(&mounted), before);
        let log = mounted.log();
        assert!(log.contains("watchdog") && log.contains("request lookup"), "{log}");
        assert!(log.contains("waits in"), "the threads are written down: {log}");
    }
}

#[test]
fn row_62_a_stopped_worker_is_replaced() {
    for kernel in KERNELS {
        let patience = [("CVMFS_FUSE_TEST_PATIENCE", "3")];
        let mounted = mounted_on(kernel, "basic-sha1", "CVMFS_KCACHE_TIMEOUT=0", &patience);
        let before = worker_of(&mounted);
        signal(before, Signal::STOP);
        fs::read_dir(mounted.mountpoint.join("software")).expect("the successor answers");
        assert_ne!(worker_of(&mounted), before);
    }
}

#[test]
fn row_60_a_request_that_kills_every_worker_is_refused_and_the_mount_goes_on() {
    for kernel in KERNELS {
        let mounted = mounted_on(kernel, "basic-sha1", "", &[("CVMFS_FUSE_TEST_FAULT", "abort:software")]);
        let error = fs::metadata(mounted.mountpoint.join("software")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        let state = mounted.status();
        assert_eq!((&state["workers"], &state["refused"]), (&4.into(), &1.into()));
        assert_eq!(fs::read(mounted.mountpoint.join("sizes/rnd100001")).unwrap().len(), 100_001);
    }
}

#[test]
fn row_62_a_request_that_always_hangs_ends_at_its_deadline_and_the_mount_goes_on() {
    for kernel in KERNELS {
        let faults = [("CVMFS_FUSE_TEST_FAULT", "hang:software"), ("CVMFS_FUSE_TEST_PATIENCE", "1")];
        let mounted = mounted_on(kernel, "basic-sha1", "", &faults);
        let error = fs::metadata(mounted.mountpoint.join("software")).unwrap_err();
        let errno = error.raw_os_error();
        assert!(errno == Some(libc::EIO) || errno == Some(libc::ETIMEDOUT), "{error}");
        assert_eq!(fs::read(mounted.mountpoint.join("sizes/rnd100001")).unwrap().len(), 100_001);
    }
}

#[test]
fn requests_that_wait_for_the_network_are_answered_by_the_successor() {
    for kernel in KERNELS {
        let mounted = mounted_on(kernel, "basic-sha1", "", &[("CVMFS_FUSE_TEST_FAULT", "slow:absent")]);
        let before = worker_of(&mounted);
        // Each its own: the kernel asks once for all who want the same name. One is as long as it lets through.
        let names = (0..7).map(|number| format!("absent{number}"));
        let waiting: Vec<_> = names
            .chain([format!("absent{}", "x".repeat(1018))])
            .map(|name| {
                let path = mounted.mountpoint.join(name);
                std::thread::spawn(move || fs::metadata(path).unwrap_err())
            })
            .collect();
        wait_until("waiting requests", || {
            mounted.status()["waiting"].as_u64().is_some_and(|count| count >= 7)
        });
        kill(before);
        for reader in waiting {
            let error = reader.join().unwrap();
            let answered = [Some(libc::ENOENT), Some(libc::ENAMETOOLONG)];
            assert!(answered.contains(&error.raw_os_error()), "the successor answers: {error}");
        }
        assert!(has_successor(&mounted, before));
        assert!(mounted.status()["repeated_requests"].as_u64().unwrap() >= 7);
    }
}

#[test]
fn row_60_a_panic_costs_one_request_and_no_worker() {
    let mounted = Prepared::new("basic-sha1").0;
    let fault = [("CVMFS_FUSE_TEST_FAULT", "panic:software".to_owned())];
    assert!(mount_with(&mounted, "", &fault).status.success());
    let error = fs::metadata(mounted.mountpoint.join("software")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert_eq!(mounted.status()["workers"], 1);
}

#[test]
fn a_signal_to_end_ends_all_processes_soon_also_with_open_files() {
    for (whom, how) in [("supervisor", Signal::TERM), ("worker", Signal::TERM), ("supervisor", Signal::INT)] {
        let mounted = Mounted::new("basic-sha1", "CVMFS_FUSE_PROFILE=plain");
        let held = fs::File::open(mounted.mountpoint.join("sizes/rnd100001")).unwrap();
        let supervisor = mounted.record()["supervisor_pid"].as_i64().unwrap();
        let worker = worker_of(&mounted);
        signal(if whom == "worker" { worker } else { supervisor }, how);
        wait_until("the end", || is_gone(supervisor) && is_gone(worker));
        assert!(fs::read_dir(&mounted.mountpoint).unwrap().next().is_none(), "{whom}: nothing is mounted");
        assert!(mounted.find_record().is_none());
        drop(held);
    }
}
