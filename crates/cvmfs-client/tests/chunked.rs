//! Files made of chunks: the right bytes, fetched when read, complete in the end.
#![allow(clippy::unwrap_used)]

mod support;

use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use cvmfs_client::clock::SystemClock;
use cvmfs_client::network::FetchError;
use cvmfs_client::repository::Repository;
use cvmfs_client::store::{ChunkedFile, ChunkedHandle};
use cvmfs_format::catalog::Chunk;
use cvmfs_format::compression::Compression;
use cvmfs_format::hash::{ContentHash, HashAlgorithm, ObjectKind, ObjectName};
use sha2::{Digest, Sha256};
use support::{Bench, content, noise, seconds};
use testkit::{Fault, Fixture, Origin};

/// Publishes `plain` in chunks of `size` bytes.
fn publish(bench: &Bench, plain: &[u8], size: usize) -> ChunkedFile {
    let mut chunks = Vec::new();
    for (number, piece) in plain.chunks(size).enumerate() {
        let name = bench.publish(piece, Compression::Zlib, ObjectKind::Chunk);
        chunks.push(Chunk { offset: (number * size) as u64, size: piece.len() as u64, hash: name.hash });
    }
    ChunkedFile { chunks, compression: Compression::Zlib, size: plain.len() as u64 }
}

fn read(handle: &ChunkedHandle, offset: u64, length: usize) -> Result<Vec<u8>, FetchError> {
    let mut buffer = vec![0xEE; length];
    let found = handle.read_at(&mut buffer, offset, seconds(20))?;
    buffer.truncate(found);
    Ok(buffer)
}

#[test]
fn chunked_files_of_the_cxx_tools_have_the_content_that_the_cxx_client_showed() {
    for name in ["chunked", "chunked-shake128-none"] {
        let fixture = Fixture::unpack(name).unwrap();
        let origin = Origin::serve(&fixture.storage).unwrap();
        let key = fixture.master_pub.to_str().unwrap();
        let options = [("CVMFS_SERVER_URL", &*origin.url()), ("CVMFS_PUBLIC_KEY", key)];
        let settings = support::settings(&fixture.fqrn, fixture.dir.path(), &options);
        let repository = Repository::open(settings, Arc::new(SystemClock)).unwrap();
        let snapshot = repository.snapshot();
        let mut compared = 0;
        for line in &fixture.manifest {
            let Some(expected) = &line.sha256 else { continue };
            let path = [b"/", line.path.as_bytes()].concat();
            let path = path.strip_prefix(b"//").map_or(path.clone(), |rest| [b"/", rest].concat());
            let Some(located) = snapshot.resolve(&path, seconds(20)).unwrap() else {
                panic!("{path:?} is missing")
            };
            if !located.entry.is_chunked() {
                continue;
            }
            let chunks = snapshot.chunks(&located, seconds(20)).unwrap();
            let (compression, size) = (located.entry.compression(), located.entry.size);
            let handle = repository.store().chunked(&ChunkedFile { chunks, compression, size }).unwrap();
            assert_eq!(
                hex::encode(Sha256::digest(read(&handle, 0, size as usize).unwrap())),
                *expected,
                "{path:?}"
            );
            let complete = handle.complete_file().unwrap().expect("all chunks were read");
            assert_eq!(hex::encode(Sha256::digest(content(&complete))), *expected, "{path:?}");
            compared += 1;
        }
        assert!(compared > 0, "{name} has chunked files");
    }
}

#[test]
fn only_the_chunks_that_are_read_are_fetched() {
    let bench = Bench::new();
    let plain = noise(1, 100_000);
    let file = publish(&bench, &plain, 10_000);
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store(&origin.url(), &[]);
    let handle = store.chunked(&file).unwrap();
    assert_eq!(read(&handle, 55_000, 3000).unwrap(), &plain[55_000..58_000]);
    assert_eq!(support::requests(&origin, 1), 1);
    assert!(!handle.is_complete() && handle.complete_file().unwrap().is_none());
    assert_eq!(read(&handle, 51_000, 9000).unwrap(), &plain[51_000..60_000], "from the cache");
    assert_eq!(support::requests(&origin, 1), 1);
}

#[test]
fn reads_at_any_place_give_the_bytes_of_the_file() {
    let bench = Bench::new();
    let plain = noise(2, 70_001);
    let file = publish(&bench, &plain, 4096);
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store(&origin.url(), &[]);
    let handle = store.chunked(&file).unwrap();
    for (offset, length) in [
        (0, 1),
        (4095, 2),
        (4096, 4096),
        (70_000, 1),
        (69_000, 5000),
        (12_000, 40_000),
        (70_001, 5),
        (1 << 40, 5),
    ] {
        let expected = plain.get(offset..).map_or(&[][..], |rest| &rest[..length.min(rest.len())]);
        assert_eq!(read(&handle, offset as u64, length).unwrap(), expected, "{length} at {offset}");
    }
}

#[test]
fn a_file_becomes_complete_and_stays_so_in_the_cache() {
    let bench = Bench::new();
    let plain = noise(3, 50_000);
    let file = publish(&bench, &plain, 8192);
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store(&origin.url(), &[]);
    let handle = store.chunked(&file).unwrap();
    std::thread::scope(|scope| {
        for reader in 0..8 {
            let (handle, plain) = (&handle, &plain);
            scope.spawn(move || {
                for step in 0..50 {
                    let offset = (reader * 6000 + step * 1000) % plain.len();
                    let end = (offset + 1000).min(plain.len());
                    assert_eq!(read(handle, offset as u64, 1000).unwrap(), &plain[offset..end]);
                }
            });
        }
    });
    assert!(handle.is_complete());
    assert_eq!(content(&handle.complete_file().unwrap().unwrap()), plain);
    assert_eq!(support::requests(&origin, file.chunks.len()), file.chunks.len(), "each chunk once");
    assert_eq!(std::fs::read_dir(store.cache().directory().join("chunked")).unwrap().count(), 0);
    drop(origin);
    let fresh = bench.store("http://127.0.0.1:1", &[]);
    let handle = fresh.chunked(&file).unwrap();
    assert!(handle.is_complete());
    assert_eq!(read(&handle, 0, plain.len()).unwrap(), plain);
}

#[test]
fn a_part_survives_the_process_and_another_process_completes_it() {
    let bench = Bench::new();
    let plain = noise(4, 40_000);
    let file = publish(&bench, &plain, 10_000);
    let origin = Origin::serve(bench.storage()).unwrap();
    let first = bench.store(&origin.url(), &[]).chunked(&file).unwrap();
    read(&first, 30_000, 10).unwrap();
    // The second store stands for another process: it shares nothing but the directory.
    let second = bench.store(&origin.url(), &[]).chunked(&file).unwrap();
    assert_eq!(read(&second, 0, 40_000).unwrap(), plain);
    assert_eq!(support::requests(&origin, 4), 4, "the chunk that the first had was not fetched again");
    assert!(second.is_complete());
    assert_eq!(read(&first, 0, 40_000).unwrap(), plain, "the first goes on with its file");
    assert_eq!(support::requests(&origin, 4), 4);
}

#[test]
fn a_damaged_chunk_is_an_error_and_the_others_are_readable() {
    let bench = Bench::new();
    let plain = noise(5, 30_000);
    let file = publish(&bench, &plain, 10_000);
    let origin = Origin::serve(bench.storage()).unwrap();
    let damaged = ObjectName::new(file.chunks[1].hash, ObjectKind::Chunk);
    origin.set_fault(&format!("*{}*", &damaged.path()[8..]), Fault::Flip(77));
    let handle = bench.store(&origin.url(), &[]).chunked(&file).unwrap();
    let error = read(&handle, 0, 30_000).unwrap_err();
    assert!(
        matches!(&error, FetchError::Corrupt { object, .. } if object.contains(&damaged.to_string())),
        "{error}"
    );
    assert_eq!(read(&handle, 0, 10_000).unwrap(), &plain[..10_000]);
    assert_eq!(read(&handle, 20_000, 10_000).unwrap(), &plain[20_000..]);
    origin.clear_faults();
    assert_eq!(read(&handle, 0, 30_000).unwrap(), plain, "heals when the server does");
}

#[test]
fn a_part_that_an_eviction_removed_goes_on_without_its_name() {
    let bench = Bench::new();
    let plain = noise(6, 40_000);
    let file = publish(&bench, &plain, 10_000);
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store(&origin.url(), &[]);
    let first = store.chunked(&file).unwrap();
    read(&first, 0, 10).unwrap();
    for entry in std::fs::read_dir(store.cache().directory().join("chunked")).unwrap() {
        std::fs::remove_file(entry.unwrap().path()).unwrap();
    }
    // Somebody else begins the same file anew and has one chunk of it.
    let second = bench.store(&origin.url(), &[]).chunked(&file).unwrap();
    read(&second, 15_000, 10).unwrap();
    assert_eq!(read(&first, 0, 40_000).unwrap(), plain);
    assert!(first.is_complete() && !second.is_complete(), "the parts are not mixed up");
    assert_eq!(read(&second, 0, 40_000).unwrap(), plain);
    assert_eq!(content(&second.complete_file().unwrap().unwrap()), plain);
}

#[test]
fn a_sequential_reader_finds_the_next_chunks_on_their_way() {
    let bench = Bench::new();
    let plain = noise(7, 40_000);
    let file = publish(&bench, &plain, 10_000);
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store(&origin.url(), &[]);
    let handle = store.chunked(&file).unwrap();
    read(&handle, 0, 2500).unwrap();
    assert_eq!(support::requests(&origin, 1), 1, "who reads the beginning may want no more");
    read(&handle, 2500, 2500).unwrap();
    assert_eq!(support::requests(&origin, 3), 3, "two chunks ahead, not the whole file");
}

#[test]
fn who_begins_with_a_large_piece_is_a_sequential_reader() {
    let bench = Bench::new();
    let plain = noise(8, 800_000);
    let file = publish(&bench, &plain, 200_000);
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store(&origin.url(), &[]);
    let handle = store.chunked(&file).unwrap();
    assert_eq!(read(&handle, 0, 131_072).unwrap(), plain[..131_072]);
    assert_eq!(support::requests(&origin, 3), 3);
    assert_eq!(read(&handle, 0, 800_000).unwrap(), plain);
    assert_eq!(support::requests(&origin, 4), 4, "each chunk comes once");
}

#[test]
fn chunk_lists_that_cannot_be_are_refused() {
    let bench = Bench::new();
    let store = bench.store("http://127.0.0.1:1", &[]);
    let hash = ContentHash::of(HashAlgorithm::Sha1, b"x");
    let chunk = |offset, size| Chunk { offset, size, hash };
    let table = [
        (vec![chunk(0, 10), chunk(11, 9)], 20),
        (vec![chunk(0, 10), chunk(9, 11)], 20),
        (vec![chunk(5, 15)], 20),
        (vec![chunk(0, 10)], 20),
        (vec![chunk(0, 20)], 10),
        (vec![chunk(0, 0), chunk(0, 20)], 20),
        (vec![chunk(0, u64::MAX), chunk(u64::MAX, 1)], u64::MAX),
        (vec![chunk(0, 1 << 40)], 1 << 40),
        (vec![], 20),
    ];
    for (chunks, size) in table {
        let file = ChunkedFile { chunks: chunks.clone(), compression: Compression::Zlib, size };
        let error = store.chunked(&file).unwrap_err();
        assert!(matches!(error, FetchError::Refused { .. }), "{chunks:?}: {error}");
    }
}
