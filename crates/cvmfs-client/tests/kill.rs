//! kill -9 at any point of storing objects leaves a cache that needs no repair.
#![allow(clippy::unwrap_used)]

mod support;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cvmfs_format::compression::Compression;
use support::{Bench, cached_files, content, noise, seconds, temporary_files};
use testkit::Origin;

const ROUNDS: u64 = 25;
const OBJECTS: u64 = 40;
const SIZE: usize = 60_000;
const CACHE: &str = "CVMFS_TEST_CACHE";
const SERVER: &str = "CVMFS_TEST_SERVER";

/// The process that is killed: fetches all objects, over and over, into a cache that is too small for them.
#[test]
fn victim() {
    let (Ok(cache), Ok(server)) = (std::env::var(CACHE), std::env::var(SERVER)) else { return };
    let bench = Bench::new();
    let names: Vec<_> = (0..OBJECTS).map(|seed| bench.publish_file(&noise(seed, SIZE))).collect();
    let store = bench.store_in(cache.as_ref(), (OBJECTS / 2) * SIZE as u64, &server);
    loop {
        for name in &names {
            store.object(name, Compression::Zlib, Some(SIZE as u64), seconds(20)).unwrap();
        }
    }
}

#[test]
fn a_killed_client_leaves_only_whole_objects_and_no_temporary_files() {
    let bench = Bench::new();
    let names: Vec<_> = (0..OBJECTS).map(|seed| bench.publish_file(&noise(seed, SIZE))).collect();
    let origin = Origin::serve(bench.storage()).unwrap();
    let cache = bench.directory.path().join("killed");
    for round in 0..ROUNDS {
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "victim"])
            .env(CACHE, &cache)
            .env(SERVER, origin.url())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // Killed at another point of its work each time, counted from its first object.
        let before = origin.requests().len();
        let begun = Instant::now();
        while origin.requests().len() == before {
            assert!(begun.elapsed() < Duration::from_secs(30), "the victim fetches nothing");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(round * 17 % 60));
        victim.kill().unwrap();
        victim.wait().unwrap();
    }
    let whole: Vec<Vec<u8>> = (0..OBJECTS).map(|seed| noise(seed, SIZE)).collect();
    let files = cached_files(&cache);
    assert!(!files.is_empty(), "the victims stored something");
    for file in files {
        assert!(whole.contains(&std::fs::read(&file).unwrap()), "{} is not whole", file.display());
    }
    let store = bench.store_in(&cache, 1 << 30, &origin.url());
    assert_eq!(temporary_files(&cache), 0, "left-overs are removed at the start");
    for (name, plain) in names.iter().zip(&whole) {
        assert_eq!(
            content(&store.object(name, Compression::Zlib, Some(SIZE as u64), seconds(20)).unwrap()),
            *plain
        );
    }
}
