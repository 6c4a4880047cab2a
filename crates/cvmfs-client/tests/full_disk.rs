//! A full partition never prevents reading. These tests mount a tiny tmpfs and so need root.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;

use cvmfs_format::compression::Compression;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use support::{Bench, cached_files, content, noise, seconds, temporary_files};
use testkit::Origin;

/// A tmpfs of some megabytes, unmounted when dropped.
struct Partition(tempfile::TempDir);

impl Partition {
    /// `None` without the right to mount.
    fn mount(megabytes: u32) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let options = std::ffi::CString::new(format!("size={megabytes}m")).unwrap();
        match mount("tmpfs", directory.path(), "tmpfs", MountFlags::empty(), Some(options.as_c_str())) {
            Ok(()) => Some(Self(directory)),
            Err(error) if !rustix::process::geteuid().is_root() => {
                eprintln!("skipped: cannot mount a tmpfs without root ({error})");
                None
            }
            Err(error) => panic!("cannot mount a tmpfs: {error}"),
        }
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Partition {
    fn drop(&mut self) {
        let _ = unmount(self.0.path(), UnmountFlags::DETACH);
    }
}

#[test]
fn a_partition_that_others_have_filled_does_not_prevent_reading() {
    let Some(partition) = Partition::mount(4) else { return };
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
fn even_a_partition_without_a_single_free_block_does_not_prevent_reading() {
    let Some(partition) = Partition::mount(4) else { return };
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
fn a_cache_larger_than_its_partition_evicts_instead_of_filling_it() {
    let Some(partition) = Partition::mount(4) else { return };
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
fn chunks_are_served_from_memory_when_the_partition_is_full() {
    use cvmfs_client::store::ChunkedFile;
    use cvmfs_format::catalog::Chunk;
    use cvmfs_format::hash::ObjectKind;
    let Some(partition) = Partition::mount(4) else { return };
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
