//! What goes wrong with disks, caches and limits, and what a reader sees of it. Some of these tests need root.
#![allow(clippy::unwrap_used)]

mod support;

use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use cvmfs_client::cache::{Cache, fsck};
use cvmfs_client::error::ClientError;
use cvmfs_client::network::FetchError;
use cvmfs_client::store::{Asked, ChunkedFile, ObjectStore};
use cvmfs_format::catalog::Chunk;
use cvmfs_format::compression::Compression;
use cvmfs_format::hash::{ObjectKind, ObjectName};
use support::{Bench, cached_files, content, noise, seconds, temporary_files};
use testkit::traced::{Traced, kill_at_call, mark};
use testkit::{Fault, Origin, Partition};

/// Set for a test that runs as a process of its own: the part that it plays.
const ROLE: &str = "CVMFS_TEST_ROLE";
const CACHE: &str = "CVMFS_TEST_CACHE";
const SERVER: &str = "CVMFS_TEST_SERVER";

fn plays(role: &str) -> bool {
    std::env::var(ROLE).is_ok_and(|played| played == role)
}

/// This test program, playing `role` in its test `name`.
fn player(name: &str, role: &str, cache: &Path, server: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--nocapture"]).env(ROLE, role).env(CACHE, cache).env(SERVER, server);
    command.stdout(std::process::Stdio::null());
    command
}

/// The store of a process that plays a part.
fn player_store(bench: &Bench) -> ObjectStore {
    let (cache, server) = (std::env::var(CACHE).unwrap(), std::env::var(SERVER).unwrap());
    bench.store_in(cache.as_ref(), 1 << 30, &server)
}

fn fetch(store: &ObjectStore, name: &ObjectName, size: usize) -> Vec<u8> {
    content(&store.object(name, Compression::Zlib, Some(size as u64), seconds(60)).unwrap())
}

fn damage(file: &Path, offset: u64) {
    let file = std::fs::OpenOptions::new().write(true).open(file).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap_or_default();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
}

/// Publishes a file in chunks of 64 KiB.
fn publish_chunks(bench: &Bench, plain: &[u8]) -> ChunkedFile {
    let mut chunks = Vec::new();
    for (number, piece) in plain.chunks(1 << 16).enumerate() {
        let name = bench.publish(piece, Compression::Zlib, ObjectKind::Chunk);
        chunks.push(Chunk { offset: (number << 16) as u64, size: piece.len() as u64, hash: name.hash });
    }
    ChunkedFile { chunks, compression: Compression::Zlib, size: plain.len() as u64 }
}

#[test]
fn row_24_ten_thousand_opens_at_once_are_all_answered_over_few_connections() {
    const FILES: u64 = 1000;
    const OPENS: u64 = 10_000;
    let bench = Bench::new();
    let names: Vec<_> = (0..FILES).map(|seed| bench.publish_file(&noise(seed, 500))).collect();
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store(&origin.url(), &[]);
    std::thread::scope(|scope| {
        for number in 0..OPENS {
            let (store, name) = (&store, &names[(number % FILES) as usize]);
            let opener = std::thread::Builder::new().stack_size(256 * 1024);
            opener
                .spawn_scoped(scope, move || assert_eq!(fetch(store, name, 500), noise(number % FILES, 500)))
                .unwrap();
        }
    });
    assert_eq!(support::requests(&origin, FILES as usize), FILES as usize, "each file once");
    assert!(origin.connections() <= 32, "{} connections", origin.connections());
}

#[test]
fn row_48_without_a_free_inode_files_are_served_and_not_kept() {
    // The directories of the cache take some three hundred.
    let Some(partition) = Partition::in_memory("size=64m,nr_inodes=400").unwrap() else { return };
    let bench = Bench::new();
    let names: Vec<_> = (0..4).map(|seed| bench.publish_file(&noise(seed, 3000))).collect();
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store_in(&partition.path().join("cache"), 1 << 30, &origin.url());
    let mut taken = 0;
    while std::fs::write(partition.path().join(format!("other-{taken}")), b"").is_ok() {
        taken += 1;
    }
    for (seed, name) in (0..).zip(&names) {
        assert_eq!(fetch(&store, name, 3000), noise(seed, 3000));
    }
    let chunked = publish_chunks(&bench, &noise(9, 200_000));
    let mut found = vec![0; 200_000];
    assert_eq!(store.chunked(&chunked).unwrap().read_at(&mut found, 0, seconds(20)).unwrap(), 200_000);
    assert_eq!(found, noise(9, 200_000));
    assert_eq!(cached_files(store.cache().directory()).len(), 0);
    std::fs::remove_file(partition.path().join("other-0")).unwrap();
    std::fs::remove_file(partition.path().join("other-1")).unwrap();
    fetch(&store, &names[0], 3000);
    assert_eq!(cached_files(store.cache().directory()).len(), 1, "kept as soon as there is an inode");
}

/// The place of a file's first byte in the image of its partition.
fn place_on_disk(file: &Path) -> Option<u64> {
    let output = Command::new("filefrag").args(["-e", "-b1"]).arg(file).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let extent = text.lines().find(|line| line.trim_start().starts_with("0:"))?;
    extent.split(':').nth(2)?.split("..").next()?.trim().parse().ok()
}

#[test]
fn row_49_an_object_that_the_disk_does_not_give_is_fetched_once_more() {
    let Some(partition) = Partition::on_disk(64, "noatime").unwrap() else { return };
    let bench = Bench::new();
    let plain = noise(1, 50_000);
    let name = bench.publish_file(&plain);
    let origin = Origin::serve(bench.storage()).unwrap();
    let cache = partition.path().join("cache");
    // Something before the object, so that its blocks come last on the disk.
    std::fs::write(partition.path().join("before"), vec![1; 8 << 20]).unwrap();
    fetch(&bench.store_in(&cache, 1 << 30, &origin.url()), &name, 50_000);
    let file = cached_files(&cache).remove(0);
    std::fs::File::open(&file).unwrap().sync_all().unwrap();
    let Some(place) = place_on_disk(&file) else {
        eprintln!("skipped: filefrag does not tell where the file lies");
        return;
    };
    partition.unmount().unwrap();
    partition.mount("noatime").unwrap();
    // The disk ends where the object begins: the kernel's answer for the rest is EIO.
    let image = std::fs::OpenOptions::new().write(true).open(partition.image()).unwrap();
    let length = image.metadata().unwrap().len();
    image.set_len(place).unwrap();
    let mut byte = [0];
    let error = std::fs::File::open(&file).unwrap().read_exact_at(&mut byte, 0).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
    let store = bench.store_in(&cache, 1 << 30, &origin.url());
    assert_eq!(fetch(&store, &name, 50_000), plain);
    assert_eq!(support::requests(&origin, 2), 2);
    image.set_len(length).unwrap();
}

#[test]
fn row_50_a_flipped_bit_is_found_at_the_first_open_or_by_fsck_and_the_object_is_fetched_again() {
    let bench = Bench::new();
    let (small, large) = (noise(1, 20_000), noise(2, 500_000));
    let names = [bench.publish_file(&small), bench.publish_file(&large)];
    let catalog = bench.publish(&noise(3, 300_000), Compression::Zlib, ObjectKind::Catalog);
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store(&origin.url(), &[]);
    fetch(&store, &names[0], small.len());
    fetch(&store, &names[1], large.len());
    store.object(&catalog, Compression::Zlib, None, seconds(20)).unwrap();
    let cache = store.cache().directory().to_owned();
    drop(store);
    for file in cached_files(&cache) {
        damage(&file, 15_000);
    }
    let store = bench.store(&origin.url(), &[]);
    assert_eq!(fetch(&store, &names[0], small.len()), small);
    assert_eq!(
        content(&store.object(&catalog, Compression::Zlib, None, seconds(20)).unwrap()),
        noise(3, 300_000)
    );
    let report = fsck(&cache, true, &mut |_| {}).unwrap();
    assert_eq!((report.problems, report.removed), (1, 1), "{report:?}");
    assert_eq!(fetch(&store, &names[1], large.len()), large);
    assert_eq!(support::requests(&origin, 6), 6);
}

#[test]
fn row_51_empty_and_foreign_files_in_the_cache_are_ignored_and_removed() {
    let bench = Bench::new();
    let plain = noise(1, 5000);
    let name = bench.publish_file(&plain);
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store(&origin.url(), &[]);
    fetch(&store, &name, 5000);
    let file = cached_files(store.cache().directory()).remove(0);
    std::fs::write(&file, b"").unwrap();
    let foreign = store.cache().directory().join("ab/core.1234");
    std::fs::write(&foreign, b"dump").unwrap();
    let link = store.cache().directory().join("ab/link");
    std::os::unix::fs::symlink("/etc/passwd", &link).unwrap();
    assert_eq!(fetch(&store, &name, 5000), plain);
    let report = fsck(store.cache().directory(), true, &mut |_| {}).unwrap();
    // The store, which counts a new cache in the background, may have removed it already.
    assert!(report.whole == 1 && report.problems <= 1, "{report:?}");
    assert!(!foreign.exists() && link.symlink_metadata().is_err());
}

#[test]
fn row_52_the_mount_works_while_a_usage_record_of_another_version_is_made_anew() {
    let bench = Bench::new();
    let names: Vec<_> = (0..200).map(|seed| bench.publish_file(&noise(seed, 3000))).collect();
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store(&origin.url(), &[]);
    names.iter().for_each(|name| drop(fetch(&store, name, 3000)));
    let cache = store.cache().directory().to_owned();
    drop(store);
    std::fs::write(cache.join("usage"), b"cvmfsU99 from the future").unwrap();
    drop(origin);
    let store = bench.store("http://127.0.0.1:1", &[]);
    for (seed, name) in (0..).zip(&names) {
        assert_eq!(fetch(&store, name, 3000), noise(seed, 3000), "without a server");
    }
    let begun = std::time::Instant::now();
    while store.cache_usage().used != 200 * 4096 {
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", store.cache_usage());
        std::thread::sleep(Duration::from_millis(5));
    }
}

const SMALL: usize = 4096;
const LARGE: usize = 400_000;

/// The victim stores a small object, a large one, or the last chunk of a file.
fn store_something(what: &str) {
    let bench = Bench::new();
    let (small, large) = (bench.publish_file(&noise(1, SMALL)), bench.publish_file(&noise(2, LARGE)));
    let chunked = publish_chunks(&bench, &noise(3, 100_000));
    let store = player_store(&bench);
    // What happens once in a process does not count.
    fetch(&store, &bench.publish_file(&noise(4, SMALL)), SMALL);
    mark();
    match what {
        "small" => drop(fetch(&store, &small, SMALL)),
        "large" => drop(fetch(&store, &large, LARGE)),
        _ => {
            let handle = store.chunked(&chunked).unwrap();
            handle.read_at(&mut vec![0; 100_000], 0, seconds(60)).unwrap();
        }
    }
    mark();
}

#[test]
fn row_53_kill_9_at_every_system_call_of_storing_leaves_an_object_whole_or_absent() {
    if let Ok(what) = std::env::var(ROLE) {
        return store_something(&what);
    }
    let bench = Bench::new();
    let names = [
        (bench.publish_file(&noise(1, SMALL)), noise(1, SMALL)),
        (bench.publish_file(&noise(2, LARGE)), noise(2, LARGE)),
        (bench.publish_file(&noise(4, SMALL)), noise(4, SMALL)),
    ];
    let chunked = publish_chunks(&bench, &noise(3, 100_000));
    let origin = Origin::serve(bench.storage()).unwrap();
    for (what, stride) in [("small", 1), ("large", 2), ("chunks", 3)] {
        let (mut step, mut killed) = (1, 0);
        loop {
            let directory = tempfile::tempdir().unwrap();
            let test = "row_53_kill_9_at_every_system_call_of_storing_leaves_an_object_whole_or_absent";
            let outcome = kill_at_call(player(test, what, directory.path(), &origin.url()), step).unwrap();
            for file in cached_files(directory.path()) {
                let found = std::fs::read(&file).unwrap();
                let is_whole = names.iter().any(|(_, plain)| *plain == found) || found == noise(3, 100_000);
                assert!(is_whole, "{what}, killed before call {step}: {} is not whole", file.display());
            }
            let store = bench.store_in(directory.path(), 1 << 30, &origin.url());
            assert_eq!(temporary_files(directory.path()), 0, "{what}, killed before call {step}");
            for (name, plain) in &names {
                assert_eq!(fetch(&store, name, plain.len()), *plain, "{what}, killed before call {step}");
            }
            let mut found = vec![0; 100_000];
            store.chunked(&chunked).unwrap().read_at(&mut found, 0, seconds(60)).unwrap();
            assert_eq!(found, noise(3, 100_000), "{what}, killed before call {step}");
            if outcome == Traced::Finished {
                break;
            }
            killed += 1;
            step += stride;
        }
        eprintln!("{what}: killed at {killed} places");
        assert!(killed >= 5, "{what}: {killed} places only");
    }
}

#[test]
fn row_54_after_a_power_cut_every_object_is_whole_or_fetched_again() {
    const OBJECTS: u64 = 150;
    let Some(partition) = Partition::on_disk(64, "noatime,commit=1").unwrap() else { return };
    let bench = Bench::new();
    let size = |seed: u64| 1000 + (seed as usize * 7919) % 120_000;
    let names: Vec<_> = (0..OBJECTS).map(|seed| bench.publish_file(&noise(seed, size(seed)))).collect();
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store_in(&partition.path().join("cache"), 1 << 30, &origin.url());
    let mut cuts = Vec::new();
    for (seed, name) in (0..).zip(&names) {
        fetch(&store, name, size(seed));
        if seed % 50 == 49 {
            // Long enough for the file system to write some of it by itself.
            std::thread::sleep(Duration::from_millis(1200));
            cuts.push(partition.after_power_cut("noatime").unwrap());
        }
    }
    for cut in cuts {
        let cache = cut.path().join("cache");
        if !cache.exists() {
            continue;
        }
        let store = bench.store_in(&cache, 1 << 30, &origin.url());
        for (seed, name) in (0..).zip(&names) {
            assert_eq!(fetch(&store, name, size(seed)), noise(seed, size(seed)));
        }
    }
}

#[test]
fn row_55_reading_goes_on_when_the_cache_directory_is_deleted() {
    let bench = Bench::new();
    let names: Vec<_> = (0..10).map(|seed| bench.publish_file(&noise(seed, 3000))).collect();
    let plain = noise(99, 300_000);
    let chunked = publish_chunks(&bench, &plain);
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store(&origin.url(), &[]);
    let held = store.object(&names[0], Compression::Zlib, Some(3000), seconds(20)).unwrap();
    let handle = store.chunked(&chunked).unwrap();
    let mut found = vec![0; plain.len()];
    handle.read_at(&mut found[..1000], 0, seconds(20)).unwrap();
    let cache = store.cache().directory().to_owned();
    for _ in 0..2 {
        std::fs::remove_dir_all(&cache).unwrap();
        assert_eq!(content(&held), noise(0, 3000), "an open file stays");
        assert_eq!(handle.read_at(&mut found, 0, seconds(20)).unwrap(), plain.len());
        assert_eq!(found, plain);
        for (seed, name) in (0..).zip(&names) {
            assert_eq!(fetch(&store, name, 3000), noise(seed, 3000));
        }
        assert!(cached_files(&cache).len() >= names.len(), "kept again");
    }
}

/// Settings of an alien cache beside the bench's own directory.
fn alien<'a>(directory: &'a str, more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    let mut options =
        vec![("CVMFS_ALIEN_CACHE", directory), ("CVMFS_QUOTA_LIMIT", "-1"), ("CVMFS_SHARED_CACHE", "no")];
    options.extend(more);
    options
}

#[test]
fn an_alien_cache_has_the_names_and_the_modes_that_other_clients_expect() {
    let bench = Bench::new();
    let plain = noise(1, 5000);
    let (zlib, none) =
        (bench.publish_file(&plain), bench.publish(&plain, Compression::None, ObjectKind::File));
    let chunked = publish_chunks(&bench, &noise(2, 150_000));
    let origin = Origin::serve(bench.storage()).unwrap();
    let directory = bench.directory.path().join("alien");
    let store = bench.store(&origin.url(), &alien(directory.to_str().unwrap(), &[]));
    fetch(&store, &zlib, 5000);
    store.object(&none, Compression::None, Some(5000), seconds(20)).unwrap();
    let mut found = vec![0; 150_000];
    store.chunked(&chunked).unwrap().read_at(&mut found, 0, seconds(20)).unwrap();
    assert_eq!(found, noise(2, 150_000));
    let mut expected: Vec<_> =
        [zlib.hash, none.hash].into_iter().chain(chunked.chunks.iter().map(|c| c.hash)).collect();
    expected.sort_by_key(ToString::to_string);
    let mut files = cached_files(&directory);
    files.sort();
    assert_eq!(files.len(), expected.len());
    for (file, hash) in files.iter().zip(&expected) {
        let text = hash.to_string();
        assert_eq!(*file, directory.join(&text[..2]).join(&text[2..]), "the hash and nothing else");
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o660);
        assert_eq!(file.parent().unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o770);
    }
    assert!(!directory.join("usage").exists(), "nobody counts or evicts");
    // What somebody else has stored under such a name is used.
    drop(origin);
    let other = bench.store("http://127.0.0.1:1", &alien(directory.to_str().unwrap(), &[]));
    assert_eq!(fetch(&other, &zlib, 5000), plain);
}

#[test]
fn row_56_a_read_only_alien_cache_is_read_and_what_is_missing_is_erofs_or_streamed() {
    let Some(partition) = Partition::in_memory("size=16m").unwrap() else { return };
    let bench = Bench::new();
    let plain = noise(1, 5000);
    let (present, missing) = (bench.publish_file(&plain), bench.publish_file(&noise(2, 5000)));
    let origin = Origin::serve(bench.storage()).unwrap();
    let directory = partition.path().join("alien");
    let directory = directory.to_str().unwrap();
    fetch(&bench.store(&origin.url(), &alien(directory, &[])), &present, 5000);
    let flags = rustix::mount::MountFlags::RDONLY;
    rustix::mount::mount_remount(partition.path(), flags, c"").unwrap();
    let store = bench.store(&origin.url(), &alien(directory, &[]));
    assert_eq!(fetch(&store, &present, 5000), plain);
    let error = store.object(&missing, Compression::Zlib, Some(5000), seconds(20)).unwrap_err();
    assert_eq!(ClientError::from(error).errno(), libc::EROFS);
    let streaming = bench.store(&origin.url(), &alien(directory, &[("CVMFS_STREAMING_CACHE", "yes")]));
    assert_eq!(fetch(&streaming, &missing, 5000), noise(2, 5000));
    let chunked = publish_chunks(&bench, &noise(3, 150_000));
    let mut found = vec![0; 150_000];
    streaming.chunked(&chunked).unwrap().read_at(&mut found, 0, seconds(20)).unwrap();
    assert_eq!(found, noise(3, 150_000));
}

#[test]
fn an_alien_cache_with_a_limit_is_refused_with_the_reason() {
    use cvmfs_client::config::{ClientSettings, Config, ConfigSources};
    let overrides = [
        ("CVMFS_SERVER_URL", "http://s"),
        ("CVMFS_HTTP_PROXY", "DIRECT"),
        ("CVMFS_PUBLIC_KEY", "/k"),
        ("CVMFS_ALIEN_CACHE", "/a"),
    ];
    let overrides = overrides.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    let sources = ConfigSources { files: Some(Vec::new()), overrides, ..ConfigSources::default() };
    let error = ClientSettings::from(&Config::load("a.example.org", &sources).unwrap()).unwrap_err();
    assert!(error.to_string().contains("CVMFS_QUOTA_LIMIT=-1"), "{error}");
}

#[test]
fn a_streaming_cache_keeps_catalogs_and_no_files() {
    let bench = Bench::new();
    let name = bench.publish_file(&noise(1, 5000));
    let large = bench.publish_file(&noise(2, 500_000));
    let catalog = bench.publish(b"catalog", Compression::Zlib, ObjectKind::Catalog);
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store(&origin.url(), &[("CVMFS_STREAMING_CACHE", "yes")]);
    for _ in 0..2 {
        assert_eq!(fetch(&store, &name, 5000), noise(1, 5000));
        assert_eq!(fetch(&store, &large, 500_000), noise(2, 500_000));
        store.object(&catalog, Compression::Zlib, None, seconds(20)).unwrap();
    }
    assert_eq!(support::requests(&origin, 5), 5);
    assert_eq!(cached_files(store.cache().directory()).len(), 1);
}

#[test]
fn a_cache_in_memory_serves_without_a_file_on_disk() {
    let bench = Bench::new();
    let plain = noise(1, 50_000);
    let name = bench.publish_file(&plain);
    let origin = Origin::serve(bench.storage()).unwrap();
    let options =
        [("CVMFS_CACHE_PRIMARY", "fast"), ("CVMFS_CACHE_fast_TYPE", "ram"), ("CVMFS_CACHE_fast_SIZE", "64")];
    let store = bench.store(&origin.url(), &options);
    for _ in 0..2 {
        assert_eq!(fetch(&store, &name, 50_000), plain);
    }
    let chunked = publish_chunks(&bench, &noise(2, 150_000));
    let mut found = vec![0; 150_000];
    store.chunked(&chunked).unwrap().read_at(&mut found, 0, seconds(20)).unwrap();
    assert_eq!(found, noise(2, 150_000));
    assert_eq!(support::requests(&origin, 4), 4);
    assert_eq!(store.cache_usage().limit, 64 << 20);
    assert_eq!(store.cache_usage().used, 200_000);
    assert_eq!(cached_files(store.cache().directory()).len(), 0);
}

#[test]
fn row_57_beyond_half_of_the_cache_pins_are_refused_and_objects_are_served_all_the_same() {
    let bench = Bench::new();
    let names: Vec<_> = (0..12).map(|seed| bench.publish_file(&noise(seed, 100_000))).collect();
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store_in(&bench.directory.path().join("tight"), 1 << 20, &origin.url());
    let pin =
        |name: &ObjectName| store.pin(&Asked::new(*name, Compression::Zlib, Some(100_000)), seconds(20));
    for name in &names[..5] {
        pin(name).unwrap();
    }
    let error = pin(&names[5]).unwrap_err();
    assert!(matches!(error, FetchError::NoSpace { .. }), "{error}");
    assert_eq!(ClientError::from(error).errno(), libc::ENOSPC);
    for (seed, name) in (0..).zip(&names) {
        assert_eq!(fetch(&store, name, 100_000), noise(seed, 100_000));
    }
    assert!(store.cache().is_pin_pressure());
    for name in &names[..5] {
        assert!(store.is_cached(name, Compression::Zlib, Some(100_000)), "pinned files were not evicted");
    }
    assert!(store.unpin(&names[0], Compression::Zlib));
    pin(&names[5]).unwrap();
}

#[test]
fn row_57_when_everything_is_pinned_files_are_streamed() {
    let bench = Bench::new();
    let names: Vec<_> = (0..3).map(|seed| bench.publish_file(&noise(seed, 400_000))).collect();
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store_in(&bench.directory.path().join("tight"), 1 << 20, &origin.url());
    store.pin(&Asked::new(names[0], Compression::Zlib, Some(400_000)), seconds(20)).unwrap();
    store.cache().set_limit(500_000);
    for (seed, name) in (0..).zip(&names) {
        assert_eq!(fetch(&store, name, 400_000), noise(seed, 400_000));
    }
    assert_eq!(cached_files(store.cache().directory()).len(), 1);
}

#[test]
fn row_58_without_descriptors_only_the_callers_who_hold_them_suffer() {
    const TEST: &str = "row_58_without_descriptors_only_the_callers_who_hold_them_suffer";
    const FILES: u64 = 300;
    if plays("hoarder") {
        use rustix::process::{Resource, Rlimit, setrlimit};
        let bench = Bench::new();
        let names: Vec<_> = (0..FILES).map(|seed| bench.publish_file(&noise(seed, 500))).collect();
        let store = player_store(&bench);
        setrlimit(Resource::Nofile, Rlimit { current: Some(150), maximum: Some(150) }).unwrap();
        let mut held = Vec::new();
        let mut refused = 0;
        for name in &names {
            match store.object(name, Compression::Zlib, Some(500), seconds(5)) {
                Ok(file) => held.push(file),
                Err(error) => {
                    refused += 1;
                    let errno = ClientError::from(error).errno();
                    assert!([libc::EMFILE, libc::EIO, libc::ETIMEDOUT].contains(&errno), "errno {errno}");
                }
            }
            if refused == 3 {
                break;
            }
        }
        assert!(held.len() > 80, "{} descriptors of 150 for files", held.len());
        assert_eq!(refused, 3);
        held.clear();
        for (seed, name) in (0..).zip(&names) {
            assert_eq!(fetch(&store, name, 500), noise(seed, 500), "as soon as descriptors are free");
        }
        return;
    }
    let bench = Bench::new();
    for seed in 0..FILES {
        bench.publish_file(&noise(seed, 500));
    }
    let origin = Origin::serve(bench.storage()).unwrap();
    let cache = bench.directory.path().join("hoarded");
    let status = player(TEST, "hoarder", &cache, &origin.url()).status().unwrap();
    assert!(status.success());
}

/// A control group for processes with little memory, of either version; `None` where none can be made.
struct SmallGroup(std::path::PathBuf);

impl SmallGroup {
    fn new(bytes: u64) -> Option<Self> {
        for (base, file) in
            [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")]
        {
            let group = Path::new(base).join(format!("cvmfs-test-{}", std::process::id()));
            if std::fs::create_dir(&group).is_ok() {
                if std::fs::write(group.join(file), bytes.to_string()).is_ok() {
                    return Some(Self(group));
                }
                let _ = std::fs::remove_dir(&group);
            }
        }
        eprintln!("skipped: no control group with a memory limit can be made");
        None
    }
}

impl Drop for SmallGroup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[test]
fn row_59_files_in_memory_stay_within_a_share_of_the_control_group_s_limit() {
    const TEST: &str = "row_59_files_in_memory_stay_within_a_share_of_the_control_group_s_limit";
    const GROUP: &str = "CVMFS_TEST_GROUP";
    if plays("small") {
        let procs = Path::new(&std::env::var(GROUP).unwrap()).join("cgroup.procs");
        std::fs::write(procs, std::process::id().to_string()).unwrap();
        let bench = Bench::new();
        let names: Vec<_> = (0..400).map(|seed| bench.publish_file(&noise(seed, 200_000))).collect();
        let options = [("CVMFS_STREAMING_CACHE", "yes")];
        let store = bench.store(&std::env::var(SERVER).unwrap(), &options);
        // All of them are held open and none is kept: 80 MB, where 64 MiB would kill the process.
        let outcomes: Vec<_> = names
            .iter()
            .map(|name| store.object(name, Compression::Zlib, Some(200_000), seconds(20)))
            .collect();
        let served = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
        assert!((30..=60).contains(&served), "{served} of 400 files are held in an eighth of 64 MiB");
        drop(outcomes);
        assert_eq!(
            fetch(&store, &names[399], 200_000),
            noise(399, 200_000),
            "afterwards there is room again"
        );
        return;
    }
    let Some(group) = SmallGroup::new(64 << 20) else { return };
    let bench = Bench::new();
    for seed in 0..400 {
        bench.publish_file(&noise(seed, 200_000));
    }
    let origin = Origin::serve(bench.storage()).unwrap();
    let mut small = player(TEST, "small", bench.directory.path(), &origin.url());
    assert!(small.env(GROUP, &group.0).status().unwrap().success());
}

#[test]
fn row_63_a_second_process_on_one_cache_starts_at_once_and_shares_it() {
    let bench = Bench::new();
    let name = bench.publish_file(&noise(1, 3000));
    let origin = Origin::serve(bench.storage()).unwrap();
    let first = bench.store(&origin.url(), &[]);
    origin.set_fault("*", Fault::Delay(Duration::from_millis(300)));
    let second = bench.store(&origin.url(), &[]);
    std::thread::scope(|scope| {
        scope.spawn(|| fetch(&first, &name, 3000));
        scope.spawn(|| fetch(&second, &name, 3000));
    });
    let third = Cache::open(first.cache().directory(), 1 << 30).unwrap();
    assert_eq!(cached_files(third.directory()).len(), 1, "both stored the same file");
}
