//! A worker that is killed is replaced; readers notice a pause and no error.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{Mounted, files_below, kill};

#[test]
fn readers_survive_the_death_of_the_worker_without_an_error_or_a_wrong_byte() {
    let mounted = Mounted::new("chunked", "CVMFS_KCACHE_TIMEOUT=0");
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
        for reader in 0..4 {
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
        let end = Instant::now() + Duration::from_secs(8);
        while Instant::now() < end {
            std::thread::sleep(Duration::from_millis(300));
            let before = mounted.status();
            kill(before["pid"].as_i64().unwrap());
            kills += 1;
            let again = Instant::now() + Duration::from_secs(20);
            // The status is answered by the successor as soon as it serves.
            while Instant::now() < again {
                std::thread::sleep(Duration::from_millis(50));
                let output = common::client(&["--json", "status", &mounted.fixture.fqrn]);
                if output.status.success() && mounted.status()["pid"] != before["pid"] {
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
    assert_eq!(state["workers"].as_u64().unwrap(), kills + 1);
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
