use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;

use cvmfs_format::compression::Compression;
use cvmfs_format::hash::{ContentHash, HashAlgorithm};

use super::*;

fn name(number: u64) -> CacheName {
    CacheName::object(&ContentHash::of(HashAlgorithm::Sha1, &number.to_le_bytes()), Compression::Zlib)
}

fn store(cache: &Cache, number: u64, bytes: &[u8]) -> CachedFile {
    let mut txn = cache.begin(Some(bytes.len() as u64)).unwrap();
    txn.write_all(bytes).unwrap();
    txn.commit(&name(number)).unwrap()
}

fn content(file: &CachedFile) -> Vec<u8> {
    let mut bytes = Vec::new();
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file.file));
    std::fs::File::open(path).unwrap().read_to_end(&mut bytes).unwrap();
    bytes
}

/// Bytes of files below the hash directories.
fn stored(cache: &Cache) -> u64 {
    let mut bytes = 0;
    for number in 0..=255_u8 {
        for entry in std::fs::read_dir(cache.directory().join(format!("{number:02x}"))).unwrap() {
            // A file that the eviction in the background has just removed counts nothing.
            bytes += entry.unwrap().metadata().map_or(0, |metadata| metadata.len());
        }
    }
    bytes
}

/// Waits for the count that is made in the background after opening.
fn counted(cache: &Cache) {
    let start = std::time::Instant::now();
    while cache.0.space.needs_scan() {
        assert!(start.elapsed() < Duration::from_secs(10), "the cache was not counted");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_file_appears_under_its_name_only_when_it_is_committed() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::open(directory.path(), 1 << 30).unwrap();
    let mut txn = cache.begin(Some(5)).unwrap();
    txn.write_all(b"hello").unwrap();
    assert!(cache.get(&name(1), Some(5)).is_none());
    let file = txn.commit(&name(1)).unwrap();
    assert_eq!((file.size, content(&file)), (5, b"hello".to_vec()));
    assert_eq!(content(&cache.get(&name(1), Some(5)).unwrap()), b"hello");
    assert!(file.file.metadata().unwrap().mode() & 0o077 == 0, "private");
    assert!((&file.file).write(b"x").is_err(), "the reader's descriptor cannot write");
}

#[test]
fn an_abandoned_file_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::open(directory.path(), 1 << 30).unwrap();
    let mut txn = cache.begin(None).unwrap();
    txn.write_all(b"hello").unwrap();
    drop(txn);
    assert_eq!(std::fs::read_dir(directory.path().join("txn")).unwrap().count(), 0);
}

#[test]
fn a_file_of_the_wrong_size_is_removed_and_missed() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::open(directory.path(), 1 << 30).unwrap();
    store(&cache, 1, b"hello");
    assert!(cache.get(&name(1), Some(6)).is_none());
    assert!(cache.get(&name(1), Some(5)).is_none(), "it is gone");
    std::fs::write(cache.path(&name(2)), b"").unwrap();
    assert!(cache.get(&name(2), None).is_none(), "an empty file is damaged when its size is not known");
}

#[test]
fn what_a_killed_process_left_in_txn_is_removed_and_live_work_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::open(directory.path(), 1 << 30).unwrap();
    std::fs::write(directory.path().join("txn/1234-dead-0"), b"half").unwrap();
    let mut live = cache.begin(Some(5)).unwrap();
    live.write_all(b"hello").unwrap();
    let again = Cache::open(directory.path(), 1 << 30).unwrap();
    assert!(!directory.path().join("txn/1234-dead-0").exists());
    live.commit(&name(1)).unwrap();
    assert!(again.get(&name(1), Some(5)).is_some());
}

#[test]
fn eviction_keeps_the_cache_below_its_limit_and_removes_the_least_recently_used() {
    const LIMIT: u64 = 1 << 20;
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::open(directory.path(), LIMIT).unwrap();
    counted(&cache);
    let held = store(&cache, 0, &[7; 16 * 1024]);
    for number in 0..200 {
        store(&cache, number, &[1; 16 * 1024]);
        // Distinct ages, the first files the oldest.
        let path = cache.path(&name(number));
        let age = std::time::SystemTime::now() - Duration::from_secs(100_000 - number);
        if let Ok(file) = std::fs::File::open(path) {
            file.set_modified(age).unwrap();
        }
        assert!(stored(&cache) <= LIMIT, "after file {number}");
        assert!(cache.usage().used <= LIMIT);
    }
    assert!(cache.usage().evictions > 0);
    assert!(cache.get(&name(199), None).is_some(), "the youngest stays");
    assert!(cache.get(&name(0), None).is_none(), "the oldest went");
    assert_eq!(content(&held), vec![7; 16 * 1024], "an open file stays readable");
}

#[test]
fn a_file_larger_than_the_cache_is_served_and_not_kept() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::open(directory.path(), 64 * 1024).unwrap();
    let file = store(&cache, 1, &[3; 256 * 1024]);
    assert_eq!(content(&file), vec![3; 256 * 1024]);
    assert!(cache.get(&name(1), None).is_none());
    let mut txn = cache.begin(None).unwrap();
    txn.write_all(&[4; 256 * 1024]).unwrap();
    assert_eq!(content(&txn.commit(&name(2)).unwrap()), vec![4; 256 * 1024]);
    assert!(cache.get(&name(2), None).is_none());
    assert_eq!(std::fs::read_dir(directory.path().join("txn")).unwrap().count(), 0);
}

#[test]
fn two_processes_share_one_count() {
    let directory = tempfile::tempdir().unwrap();
    let first = Cache::open(directory.path(), 1 << 30).unwrap();
    counted(&first);
    let second = Cache::open(directory.path(), 1 << 30).unwrap();
    store(&first, 1, &[1; 8192]);
    store(&second, 2, &[1; 8192]);
    assert_eq!(first.usage().used, 16384);
    assert_eq!(second.usage().used, 16384);
}

#[test]
fn a_lost_count_is_made_anew_and_foreign_files_are_removed() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::open(directory.path(), 1 << 30).unwrap();
    counted(&cache);
    store(&cache, 1, &[1; 8192]);
    std::fs::write(directory.path().join("usage"), b"rubbish").unwrap();
    std::fs::write(directory.path().join("ab/core"), b"dump").unwrap();
    let cache = Cache::open(directory.path(), 1 << 30).unwrap();
    counted(&cache);
    assert_eq!(cache.usage().used, 8192);
    assert!(!directory.path().join("ab/core").exists());
}

#[test]
fn a_cache_directory_that_vanishes_is_made_anew() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::open(&directory.path().join("cache"), 1 << 30).unwrap();
    std::fs::remove_dir_all(directory.path().join("cache")).unwrap();
    store(&cache, 1, b"hello");
    assert!(cache.get(&name(1), Some(5)).is_some());
}

#[test]
fn the_cxx_client_s_directory_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let theirs = directory.path().join("shared");
    std::fs::create_dir(&theirs).unwrap();
    std::fs::write(theirs.join("cachedb"), b"").unwrap();
    let cache = Cache::open(&theirs, 1 << 30).unwrap();
    assert_eq!(cache.directory(), directory.path().join("shared-objects"));
    assert_eq!(std::fs::read_dir(theirs).unwrap().count(), 1);
}

#[test]
fn an_unusable_directory_is_refused_with_advice() {
    let error = Cache::open(Path::new("/proc/cvmfs"), 1 << 30).unwrap_err().to_string();
    assert!(error.contains("/proc/cvmfs") && error.contains("CVMFS_CACHE_BASE"), "{error}");
}
