//! Objects: verified, fetched once, kept.
#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use cvmfs_client::deadline::Deadline;
use cvmfs_client::network::FetchError;
use cvmfs_format::compression::{Compression, Deflate};
use cvmfs_format::hash::ObjectKind;
use support::{Bench, cached_files, content, noise, seconds};
use testkit::{Fault, Origin};

#[test]
fn row_25_sixty_four_readers_of_one_object_cause_one_request() {
    let bench = Bench::new();
    let plain = noise(1, 300_000);
    let name = bench.publish_file(&plain);
    let origin = Origin::serve(bench.storage()).unwrap();
    origin.set_fault("*", Fault::Delay(Duration::from_millis(200)));
    let store = bench.store(&origin.url(), &[]);
    std::thread::scope(|scope| {
        for _ in 0..64 {
            scope.spawn(|| {
                let size = Some(plain.len() as u64);
                let file = store.object(&name, Compression::Zlib, size, seconds(20)).unwrap();
                assert_eq!(content(&file), plain);
            });
        }
    });
    assert_eq!(support::requests(&origin, 1), 1);
}

#[test]
fn row_25_a_reader_who_gives_up_does_not_take_the_download_from_the_others() {
    let bench = Bench::new();
    let name = bench.publish_file(b"patience");
    let origin = Origin::serve(bench.storage()).unwrap();
    origin.set_fault("*", Fault::Delay(Duration::from_secs(1)));
    let store = bench.store(&origin.url(), &[]);
    std::thread::scope(|scope| {
        let impatient = scope.spawn(|| {
            let started = Instant::now();
            let deadline = Deadline::after(Duration::from_millis(300));
            let error = store.object(&name, Compression::Zlib, Some(8), deadline).unwrap_err();
            assert!(matches!(error, FetchError::Deadline { .. }), "{error}");
            assert!(started.elapsed() < Duration::from_millis(800));
        });
        std::thread::sleep(Duration::from_millis(100));
        let file = store.object(&name, Compression::Zlib, Some(8), seconds(20)).unwrap();
        assert_eq!(content(&file), b"patience");
        impatient.join().unwrap();
    });
    assert_eq!(support::requests(&origin, 1), 1, "the download went on when its first reader left");
}

#[test]
fn a_reader_who_comes_back_finds_the_download_still_going_on() {
    let bench = Bench::new();
    let name = bench.publish_file(b"again");
    let origin = Origin::serve(bench.storage()).unwrap();
    origin.set_fault("*", Fault::Delay(Duration::from_secs(1)));
    let store = bench.store(&origin.url(), &[]);
    let deadline = Deadline::after(Duration::from_millis(200));
    store.object(&name, Compression::Zlib, Some(5), deadline).unwrap_err();
    std::thread::sleep(Duration::from_millis(200));
    store.object(&name, Compression::Zlib, Some(5), seconds(20)).unwrap();
    assert_eq!(support::requests(&origin, 1), 1);
}

#[test]
fn a_damaged_object_is_fetched_past_caches_and_then_from_the_next_host() {
    let bench = Bench::new();
    let plain = noise(2, 10_000);
    let name = bench.publish_file(&plain);
    let origin = Origin::serve(bench.storage()).unwrap();
    origin.set_fault_times("*", Fault::Flip(5000), 1);
    let store = bench.store(&origin.url(), &[]);
    let file = store.object(&name, Compression::Zlib, Some(10_000), seconds(20)).unwrap();
    assert_eq!(content(&file), plain);
    support::requests(&origin, 2);
    let no_cache: Vec<bool> = origin
        .requests()
        .iter()
        .map(|request| request.headers.get("cache-control").is_some_and(|value| value == "no-cache"))
        .collect();
    assert_eq!(no_cache, [false, true]);

    let other = bench.publish_file(b"other");
    let damaged = Origin::serve(bench.storage()).unwrap();
    damaged.set_fault("*", Fault::Flip(3));
    let bench_two = bench.store(&format!("{};{}", damaged.url(), origin.url()), &[]);
    let file = bench_two.object(&other, Compression::Zlib, Some(5), seconds(20)).unwrap();
    assert_eq!(content(&file), b"other");
    assert_eq!(support::requests(&damaged, 2), 2);
}

#[test]
fn an_object_that_is_damaged_everywhere_is_an_error_that_names_it() {
    let bench = Bench::new();
    let plain = noise(3, 10_000);
    let name = bench.publish_file(&plain);
    let origin = Origin::serve(bench.storage()).unwrap();
    origin.set_fault("*", Fault::Flip(5000));
    let store = bench.store(&origin.url(), &[]);
    let error = store.object(&name, Compression::Zlib, Some(10_000), seconds(20)).unwrap_err();
    assert!(matches!(error, FetchError::Corrupt { .. }), "{error}");
    assert!(error.to_string().contains(&name.to_string()), "{error}");
    assert_eq!(support::requests(&origin, 2), 2);
    assert_eq!(cached_files(store.cache().directory()).len(), 0);
}

#[test]
fn an_object_whose_size_is_not_the_catalog_s_is_refused() {
    let bench = Bench::new();
    let name = bench.publish_file(b"hello");
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store(&origin.url(), &[]);
    for size in [4, 6] {
        let error = store.object(&name, Compression::Zlib, Some(size), seconds(20)).unwrap_err();
        assert!(matches!(error, FetchError::Corrupt { .. }), "{error}");
    }
    assert_eq!(cached_files(store.cache().directory()).len(), 0);
}

#[test]
fn a_wrong_size_of_a_catalog_is_tolerated_when_its_hash_is_right() {
    let bench = Bench::new();
    let name = bench.publish(b"catalog", Compression::Zlib, ObjectKind::Catalog);
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store(&origin.url(), &[]);
    for _ in 0..2 {
        let file = store.object(&name, Compression::Zlib, Some(99), seconds(20)).unwrap();
        assert_eq!(content(&file), b"catalog");
    }
    assert_eq!(support::requests(&origin, 1), 1);
}

#[test]
fn what_is_in_the_cache_needs_no_server() {
    let bench = Bench::new();
    let name = bench.publish_file(b"kept");
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store(&origin.url(), &[]);
    store.object(&name, Compression::Zlib, Some(4), seconds(20)).unwrap();
    let url = origin.url();
    drop(origin);
    let fresh = bench.store(&url, &[]);
    assert_eq!(content(&fresh.object(&name, Compression::Zlib, Some(4), seconds(1)).unwrap()), b"kept");
    assert_eq!((fresh.counters().cache_hits, fresh.counters().requests), (1, 0));
}

#[test]
fn row_51_a_truncated_cache_file_is_fetched_again() {
    let bench = Bench::new();
    let plain = noise(4, 9000);
    let name = bench.publish_file(&plain);
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store(&origin.url(), &[]);
    store.object(&name, Compression::Zlib, Some(9000), seconds(20)).unwrap();
    let file = cached_files(store.cache().directory()).remove(0);
    std::fs::OpenOptions::new().write(true).open(file).unwrap().set_len(100).unwrap();
    let file = store.object(&name, Compression::Zlib, Some(9000), seconds(20)).unwrap();
    assert_eq!(content(&file), plain);
    assert_eq!(support::requests(&origin, 2), 2);
}

#[test]
fn row_54_a_catalog_that_a_power_cut_shortened_is_fetched_again() {
    let fixture = testkit::Fixture::unpack("basic-sha1").unwrap();
    let origin = Origin::serve(&fixture.storage).unwrap();
    let manifest = std::fs::read(fixture.storage.join(".cvmfspublished")).unwrap();
    let root = cvmfs_format::manifest::Manifest::parse(&manifest).unwrap().root_catalog;
    let name = cvmfs_format::hash::ObjectName::new(root, ObjectKind::Catalog);
    let bench = Bench::new();
    let store = bench.store(&origin.url(), &[]);
    let whole = content(&store.object(&name, Compression::Zlib, None, seconds(20)).unwrap());
    assert!(store.is_cached(&name, Compression::Zlib, None));
    let file = cached_files(store.cache().directory()).remove(0);
    std::fs::OpenOptions::new().write(true).open(file).unwrap().set_len(8192).unwrap();
    assert_eq!(content(&store.object(&name, Compression::Zlib, None, seconds(20)).unwrap()), whole);
    assert_eq!(support::requests(&origin, 2), 2);
}

#[test]
fn an_uncompressed_object_that_is_another_one_s_zlib_stream_keeps_its_own_content() {
    let bench = Bench::new();
    let plain = b"the same stored bytes, two contents";
    let stream = Deflate::Fast.compress(plain);
    let zlib = bench.publish_file(plain);
    let none = bench.publish(&stream, Compression::None, ObjectKind::File);
    assert_eq!(zlib, none, "the stored bytes and so the names are the same");
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store(&origin.url(), &[]);
    for _ in 0..2 {
        let size = Some(plain.len() as u64);
        assert_eq!(content(&store.object(&zlib, Compression::Zlib, size, seconds(20)).unwrap()), plain);
        let size = Some(stream.len() as u64);
        assert_eq!(content(&store.object(&none, Compression::None, size, seconds(20)).unwrap()), stream);
    }
}

#[test]
fn the_empty_file_is_an_object_like_others() {
    let bench = Bench::new();
    let name = bench.publish_file(b"");
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store(&origin.url(), &[]);
    for _ in 0..2 {
        assert_eq!(store.object(&name, Compression::Zlib, Some(0), seconds(20)).unwrap().size, 0);
    }
    assert_eq!(support::requests(&origin, 1), 1);
}
