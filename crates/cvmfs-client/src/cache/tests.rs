use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;

use cvmfs_format::compression::Compression;
use cvmfs_format::hash::{ContentHash, HashAlgorithm};

use super::*;

fn name(number: u64) -> CacheName {
    CacheName::object(&ContentHash::of(HashAlgorithm::Sha1, &number.to_le_bytes()), Compression::Zlib)
}

fn begin(cache: &Cache, number: u64, expected: Option<u64>, kind: Kind) -> Txn {
    cache.begin(Draft { name: &name(number), kind, expected, hint: Some("/some/file"), keep: true }).unwrap()
}

fn store_as(cache: &Cache, number: u64, bytes: &[u8], kind: Kind) -> CachedFile {
    let mut txn = begin(cache, number, Some(bytes.len() as u64), kind);
    txn.write_all(bytes).unwrap();
    txn.commit().unwrap()
}

fn store(cache: &Cache, number: u64, bytes: &[u8]) -> CachedFile {
    store_as(cache, number, bytes, Kind::Regular)
}

/// Files that are being written.
fn temporary_files(directory: &Path) -> usize {
    let processes = std::fs::read_dir(directory.join("txn")).unwrap();
    let files = processes.flat_map(|process| std::fs::read_dir(process.unwrap().path()).unwrap());
    files
        .filter(|file| !["life", "pins"].contains(&file.as_ref().unwrap().file_name().to_str().unwrap()))
        .count()
}

fn age(cache: &Cache, number: u64, seconds: u64) {
    let when = std::time::SystemTime::now() - Duration::from_secs(seconds);
    // The eviction in the background may have been faster.
    if let Ok(file) = std::fs::File::open(cache.path(&name(number))) {
        file.set_modified(when).unwrap();
    }
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
    while cache.0.space.needs_count() {
        assert!(start.elapsed() < Duration::from_secs(10), "the cache was not counted");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_file_appears_under_its_name_only_when_it_is_committed() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::open(directory.path(), 1 << 30).unwrap();
    let mut txn = begin(&cache, 1, Some(5), Kind::Regular);
    txn.write_all(b"hello").unwrap();
    assert!(cache.get(&name(1), Some(5)).is_none());
    let file = txn.commit().unwrap();
    assert_eq!((file.size, content(&file)), (5, b"hello".to_vec()));
    assert_eq!(content(&cache.get(&name(1), Some(5)).unwrap()), b"hello");
    assert!(file.file.metadata().unwrap().mode() & 0o077 == 0, "private");
    assert!((&file.file).write(b"x").is_err(), "the reader's descriptor cannot write");
}

#[test]
fn an_abandoned_file_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::open(directory.path(), 1 << 30).unwrap();
    let mut txn = begin(&cache, 1, None, Kind::Regular);
    txn.write_all(b"hello").unwrap();
    drop(txn);
    assert_eq!(temporary_files(directory.path()), 0);
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
    counted(&cache);
    let dead = directory.path().join("txn/1234-dead-0");
    std::fs::create_dir(&dead).unwrap();
    for file in ["life", "pins", "0"] {
        std::fs::write(dead.join(file), b"half").unwrap();
    }
    std::fs::write(directory.path().join("txn/older-version"), b"half").unwrap();
    let mut live = begin(&cache, 1, Some(5), Kind::Regular);
    live.write_all(b"hello").unwrap();
    let again = Cache::open(directory.path(), 1 << 30).unwrap();
    assert!(!dead.exists() && !directory.path().join("txn/older-version").exists());
    live.commit().unwrap();
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
        if cache.contains(&name(number), None) {
            age(&cache, number, 100_000 - number);
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
    let mut txn = begin(&cache, 2, None, Kind::Regular);
    txn.write_all(&[4; 256 * 1024]).unwrap();
    assert_eq!(content(&txn.commit().unwrap()), vec![4; 256 * 1024]);
    assert!(cache.get(&name(2), None).is_none());
    assert_eq!(temporary_files(directory.path()), 0);
}

#[test]
fn two_processes_share_one_count() {
    let directory = tempfile::tempdir().unwrap();
    let first = Cache::open(directory.path(), 1 << 30).unwrap();
    counted(&first);
    let second = Cache::open(directory.path(), 1 << 30).unwrap();
    store(&first, 1, &[1; 8192]);
    store(&second, 2, &[1; 8192]);
    drop(second);
    assert_eq!(first.usage().used, 16384);
}

#[test]
fn row_63_no_number_of_processes_stores_more_than_the_limit() {
    const LIMIT: u64 = 16 << 20;
    let directory = tempfile::tempdir().unwrap();
    let caches: Vec<_> = (0..4).map(|_| Cache::open(directory.path(), LIMIT).unwrap()).collect();
    counted(&caches[0]);
    std::thread::scope(|scope| {
        for (process, cache) in (0_u64..).zip(&caches) {
            for thread in 0..2 {
                scope.spawn(move || {
                    for number in 0..100 {
                        store(cache, process << 32 | thread << 16 | number, &[1; 60_000]);
                    }
                });
            }
        }
        for _ in 0..50 {
            assert!(stored(&caches[0]) <= LIMIT);
            std::thread::sleep(Duration::from_millis(2));
        }
    });
    assert!(stored(&caches[0]) <= LIMIT);
    assert!(caches.iter().any(|cache| cache.usage().evictions > 0));
}

#[test]
fn volatile_files_are_evicted_before_older_ones_and_pinned_files_stay() {
    const LIMIT: u64 = 1 << 20;
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::open(directory.path(), LIMIT).unwrap();
    counted(&cache);
    let other_process = Cache::open(directory.path(), LIMIT).unwrap();
    store_as(&cache, 0, &[1; 100_000], Kind::Catalog);
    let pinned = other_process.pin(&name(0), Some("catalog")).unwrap();
    age(&cache, 0, 9000);
    store(&cache, 1, &[1; 100_000]);
    age(&cache, 1, 5000);
    store_as(&cache, 2, &[1; 100_000], Kind::Volatile);
    assert!(cache.shrink_to(250_000));
    assert!(cache.contains(&name(1), None) && !cache.contains(&name(2), None), "the volatile one went");
    assert!(!cache.shrink_to(50_000), "the pinned file stays");
    assert!(cache.contains(&name(0), None) && !cache.contains(&name(1), None));
    assert_eq!(cache.usage().pinned, 102_400);
    let listed = cache.list(Listing::Pinned);
    assert_eq!((listed.len(), listed[0].size, listed[0].hint.as_deref()), (1, 100_000, Some("/some/file")));
    assert_eq!(cache.cleanups_within(Duration::from_secs(3600)), 2);
    drop(pinned);
    assert!(cache.shrink_to(0));
    assert_eq!(cache.usage().pinned, 0);
    assert_eq!(cache.list(Listing::All), []);
}

#[test]
fn a_limit_set_while_in_use_holds_for_all_processes_until_the_last_one_ends() {
    let directory = tempfile::tempdir().unwrap();
    let first = Cache::open(directory.path(), 1 << 30).unwrap();
    counted(&first);
    let second = Cache::open(directory.path(), 1 << 30).unwrap();
    first.set_limit(1 << 20);
    assert_eq!(second.usage().limit, 1 << 20);
    for number in 0..20 {
        store(&second, number, &[1; 100_000]);
    }
    assert!(stored(&first) <= 1 << 20);
    drop((first, second));
    assert_eq!(Cache::open(directory.path(), 1 << 30).unwrap().usage().limit, 1 << 30);
}

#[test]
fn a_cache_that_is_torn_down_is_read_and_not_written() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::open(directory.path(), 1 << 30).unwrap();
    store(&cache, 1, b"hello");
    cache.tear_down_to_read_only();
    assert_eq!(content(&cache.get(&name(1), Some(5)).unwrap()), b"hello");
    let draft = Draft { name: &name(2), kind: Kind::Regular, expected: Some(5), hint: None, keep: true };
    assert_eq!(cache.begin(draft).unwrap_err().raw_os_error(), Some(libc::EROFS));
    assert!(!cache.remove(&name(1)));
    assert!(cache.describe().ends_with("read-only"));
}

#[test]
fn row_50_a_flipped_bit_of_a_small_file_is_found_when_another_process_opens_it() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::open(directory.path(), 1 << 30).unwrap();
    store(&cache, 1, &[1; 5000]);
    let path = cache.path(&name(1));
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0], 2500).unwrap();
    let fresh = Cache::open(directory.path(), 1 << 30).unwrap();
    assert!(fresh.get(&name(1), Some(5000)).is_none());
    assert!(!path.exists(), "it is fetched again");
}

#[test]
fn row_63_a_process_that_is_stopped_with_the_record_locked_does_not_stop_others() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::open(directory.path(), 1 << 30).unwrap();
    counted(&cache);
    let usage = std::fs::File::open(directory.path().join("usage")).unwrap();
    rustix::fs::flock(&usage, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let started = std::time::Instant::now();
    for number in 0..20 {
        store(&cache, number, &[1; 1 << 20]);
    }
    assert!(started.elapsed() < Duration::from_secs(15), "one wait for all of them");
    assert!(cache.get(&name(19), None).is_some());
}

#[test]
fn a_tiered_cache_copies_up_and_stores_in_both() {
    use crate::config::{CacheInstance, CacheSettings, DirectoryInstance};
    let (upper, lower) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let open = |is_lower_read_only| {
        let directory = DirectoryInstance::private(lower.path().to_owned(), 1 << 30);
        let primary = CacheInstance::Tiered {
            upper: Box::new(CacheInstance::Memory { limit: 1 << 20, workspace: upper.path().to_owned() }),
            lower: Box::new(CacheInstance::Directory(directory)),
            is_lower_read_only,
        };
        Cache::from_settings(&CacheSettings { primary, streaming: false }).unwrap()
    };
    let below = Cache::open(lower.path(), 1 << 30).unwrap();
    let first = open(false);
    store(&first, 1, b"hello");
    assert!(below.contains(&name(1), Some(5)), "stored in both");
    drop(first);
    let second = open(true);
    assert_eq!(content(&second.get(&name(1), Some(5)).unwrap()), b"hello");
    store(&second, 2, b"there");
    assert!(!below.contains(&name(2), Some(5)), "the lower one is read only");
    below.remove(&name(1));
    assert_eq!(content(&second.get(&name(1), Some(5)).unwrap()), b"hello", "copied up");
    assert!(second.describe().contains("in-memory cache"));
}

#[test]
fn row_50_fsck_finds_what_is_damaged_and_repairs_by_removing_it() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::open(directory.path(), 1 << 30).unwrap();
    counted(&cache);
    for number in 0..10 {
        store(&cache, number, &[number as u8; 100_000]);
    }
    let damaged = std::fs::OpenOptions::new().write(true).open(cache.path(&name(3))).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&damaged, &[9], 99_999).unwrap();
    std::fs::write(directory.path().join("ab/core"), b"dump").unwrap();
    let mut seen = 0;
    let report = fsck(directory.path(), false, &mut |progress| seen = progress.files).unwrap();
    assert_eq!((report.files, report.whole, report.problems, report.removed, seen), (10, 9, 2, 0, 10));
    let report = fsck(directory.path(), true, &mut |_| {}).unwrap();
    assert_eq!((report.problems, report.removed), (2, 2));
    let found = report.findings.iter().find(|finding| finding.problem == Problem::Damaged).unwrap();
    assert_eq!(found.hint.as_deref(), Some("/some/file"));
    assert!(!cache.contains(&name(3), None) && cache.contains(&name(4), None));
    assert_eq!(fsck(directory.path(), true, &mut |_| {}).unwrap().problems, 0);
    assert!(fsck(Path::new("/proc"), false, &mut |_| {}).is_err(), "no cache");
}

#[test]
fn row_52_a_damaged_usage_record_is_made_anew_and_foreign_files_are_removed() {
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
fn row_55_a_cache_directory_that_vanishes_is_made_anew() {
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
fn row_56_an_unusable_directory_is_refused_with_advice() {
    let error = Cache::open(Path::new("/proc/cvmfs"), 1 << 30).unwrap_err().to_string();
    assert!(error.contains("/proc/cvmfs") && error.contains("CVMFS_CACHE_BASE"), "{error}");
}
