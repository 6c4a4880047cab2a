//! A full partition never prevents reading. These tests mount a tiny tmpfs and so need root.
#![allow(clippy::unwrap_used)]

mod support;

use cvmfs_format::compression::Compression;
use support::{Bench, cached_files, content, noise, seconds, temporary_files};
use testkit::{Origin, Partition};

#[test]
fn row_46_a_partition_that_others_have_filled_does_not_prevent_reading() {
    let Some(partition) = Partition::in_memory("size=4m").unwrap() else { return };
    let bench = Bench::new();
    let plain = noise(1, 1 << 20);
    let name = bench.publish_file(&plain);
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store_in(&partition.path().join("cache"), 1 << 30, &origin.url());
    std::fs::write(partition.path().join("others"), vec![1; 3 << 20]).unwrap();
    for _ in 0..2 {
        let file = store.object(&name, Compression::Zlib, Some(1 << 20), seconds(20)).unwrap();
        assert_eq!(content(&file), plain);
    }
    assert_eq!(cached_files(store.cache().directory()).len(), 0);
    assert_eq!(support::requests(&origin, 2), 2, "served without being kept");
    std::fs::remove_file(partition.path().join("others")).unwrap();
    store.object(&name, Compression::Zlib, Some(1 << 20), seconds(20)).unwrap();
    assert_eq!(cached_files(store.cache().directory()).len(), 1, "kept as soon as there is room");
}

#[test]
fn row_46_even_a_partition_without_a_single_free_block_does_not_prevent_reading() {
    let Some(partition) = Partition::in_memory("size=4m").unwrap() else { return };
    let bench = Bench::new();
    let names: Vec<_> = (0..4).map(|seed| bench.publish_file(&noise(seed, 300_000))).collect();
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store_in(&partition.path().join("cache"), 1 << 30, &origin.url());
    // Written by small pieces until nothing more fits.
    let mut others = std::fs::File::create(partition.path().join("others")).unwrap();
    while std::io::Write::write_all(&mut others, &[1; 512]).is_ok() {}
    for (seed, name) in (0..).zip(&names) {
        let file = store.object(name, Compression::Zlib, Some(300_000), seconds(20)).unwrap();
        assert_eq!(content(&file), noise(seed, 300_000));
        let catalog = store.object(name, Compression::Zlib, None, seconds(20)).unwrap();
        assert_eq!(content(&catalog), noise(seed, 300_000), "of a size that is not known before");
    }
    assert_eq!(temporary_files(store.cache().directory()), 0);
}

#[test]
fn row_47_a_limit_larger_than_the_partition_is_lowered_and_evicts_instead_of_filling_it() {
    let Some(partition) = Partition::in_memory("size=4m").unwrap() else { return };
    let bench = Bench::new();
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store_in(&partition.path().join("cache"), 1 << 30, &origin.url());
    assert!(store.cache_usage().limit < 4 << 20, "the limit is lowered to the partition");
    for seed in 0..30 {
        let plain = noise(seed, 300_000);
        let name = bench.publish_file(&plain);
        let file = store.object(&name, Compression::Zlib, Some(300_000), seconds(20)).unwrap();
        assert_eq!(content(&file), plain);
        let stat = rustix::fs::statvfs(partition.path()).unwrap();
        assert!(stat.f_bavail > 0, "something is left for others after object {seed}");
    }
    assert!(store.counters().evictions > 0);
    assert!(cached_files(store.cache().directory()).len() > 3, "the cache is used");
}

#[test]
fn row_46_chunks_are_served_from_memory_when_the_partition_is_full() {
    use cvmfs_client::store::ChunkedFile;
    use cvmfs_format::catalog::Chunk;
    use cvmfs_format::hash::ObjectKind;
    let Some(partition) = Partition::in_memory("size=4m").unwrap() else { return };
    let bench = Bench::new();
    let plain = noise(9, 2 << 20);
    let mut chunks = Vec::new();
    for (number, piece) in plain.chunks(1 << 19).enumerate() {
        let name = bench.publish(piece, Compression::Zlib, ObjectKind::Chunk);
        chunks.push(Chunk { offset: (number << 19) as u64, size: piece.len() as u64, hash: name.hash });
    }
    let file = ChunkedFile { chunks, compression: Compression::Zlib, size: plain.len() as u64 };
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store_in(&partition.path().join("cache"), 1 << 30, &origin.url());
    let handle = store.chunked(&file).unwrap();
    std::fs::write(partition.path().join("others"), vec![1; 3 << 20]).unwrap();
    let mut found = vec![0; plain.len()];
    assert_eq!(handle.read_at(&mut found, 0, seconds(20)).unwrap(), plain.len());
    assert_eq!(found, plain);
}
