//! What `cvmfs-publish` writes is what `cvmfs-client` shows, and an independent reader of the format agrees.

#![allow(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

mod common;

use std::process::Command;
use std::time::{Duration, Instant};

use common::{Overlay, assert_same, assert_says, layer_content, unpack_layers};
use testkit::process::run;
use testkit::tar::TarBuilder;
use testkit::tree::{read_manifest, subtree};
use testkit::{Fault, MountBuilder, Published, TreeEntry, compare, walk_tree};

/// Everything that a container layer may hold.
fn rich_layer() -> TarBuilder {
    let big: Vec<u8> =
        (0..20_000_000_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    TarBuilder::new()
        .directory("bin", 0o755)
        .file("bin/tool", 0o4755, b"#!/bin/sh\necho tool\n")
        .hard_link("bin/alias", "bin/tool")
        .symlink("bin/link", "tool")
        .symlink("dangling", "/nowhere/at/all")
        .directory("dev", 0o755)
        .char_device("dev/null", 0o666, (1, 3))
        .block_device("dev/disk", 0o660, (8, 1))
        .fifo("dev/pipe", 0o600)
        .directory("tmp", 0o1777)
        .owner(1000, 2000)
        .directory("home", 0o750)
        .xattr("user.colour", b"blue\0green")
        .file("home/with-xattr", 0o600, b"private")
        .file("home/empty", 0o644, b"")
        .file("home/\u{65e5}\u{672c}\u{8a9e}", 0o644, b"unicode")
        .file(&format!("home/{}", "n".repeat(200)), 0o644, b"long name")
        .file("home/big", 0o644, &big)
}

fn oracle(repository: &Published) -> Vec<TreeEntry> {
    let mut command = Command::new("/usr/bin/python3");
    command.arg(testkit::workspace_root().join("tests/oracle/read_repository.py"));
    command.arg(&repository.storage).arg(&repository.fqrn).arg(repository.public_key());
    let text = run(command, Duration::from_secs(120)).unwrap().success().unwrap();
    read_manifest(text.as_bytes()).unwrap()
}

#[test]
fn an_ingested_layer_is_mounted_as_it_was_packed() {
    let tar = rich_layer().finish();
    let repository = Published::create("roundtrip.example.org").unwrap();
    let report = repository.ingest("layers/one", &tar, &["--catalog", "--xattrs"]).unwrap();
    assert_eq!(report["fqrn"], "roundtrip.example.org");
    assert_eq!(report["entries"], 16, "{report}");
    assert!(report["revision"].as_u64().unwrap() >= 2, "{report}");

    let mount = MountBuilder::new(&repository.fqrn, &repository.client_config().unwrap())
        .option("cvmfs_suid")
        .mount()
        .unwrap();
    let shown = walk_tree(mount.path());
    let layer = subtree(&shown, "/layers/one");
    let reference = unpack_layers(&[&tar]);
    assert_same(&compare(&layer_content(&walk_tree(reference.path().join("root"))), &layer_content(&layer)));
    let names = layer.iter().filter(|entry| entry.nlink == Some(2) && entry.ino_group.is_some()).count();
    assert_eq!(names, 2, "both names of the hard link share an inode");
}

#[test]
fn an_independent_reader_and_the_client_agree_on_a_published_repository() {
    let repository = Published::create("oracle.example.org").unwrap();
    repository.ingest("a/b/layer", &rich_layer().finish(), &["--catalog", "--xattrs"]).unwrap();
    let mount = MountBuilder::new(&repository.fqrn, &repository.client_config().unwrap())
        .option("cvmfs_suid")
        .mount()
        .unwrap();
    assert_same(&compare(&oracle(&repository), &walk_tree(mount.path())));
}

#[test]
fn each_hash_and_compression_is_published_and_read() {
    for (hash, compression) in [("rmd160", "zlib"), ("shake128", "none"), ("sha1", "none")] {
        let options = ["--hash", hash, "--compression", compression];
        let repository = Published::create_with("variants.example.org", &options).unwrap();
        let tar = TarBuilder::new().directory("d", 0o755).file("d/f", 0o644, b"content of f").finish();
        repository.ingest("layer", &tar, &[]).unwrap();
        repository.publish("check", &[]).unwrap().success().unwrap();
        let config = repository.client_config().unwrap();
        let mount = MountBuilder::new(&repository.fqrn, &config).option("cvmfs_suid").mount().unwrap();
        assert_eq!(std::fs::read(mount.path().join("layer/d/f")).unwrap(), b"content of f", "{hash}");
        assert_same(&compare(&oracle(&repository), &walk_tree(mount.path())));
    }
}

#[test]
fn whiteouts_are_stored_so_that_layers_stack_under_overlayfs() {
    let base = TarBuilder::new()
        .directory("etc", 0o755)
        .file("etc/keep", 0o644, b"keep")
        .file("etc/gone", 0o644, b"gone")
        .directory("cache", 0o755)
        .file("cache/old", 0o644, b"old")
        .directory("home", 0o755)
        .directory("home/u", 0o700)
        .file("home/u/f", 0o644, b"f")
        .finish();
    let top = TarBuilder::new()
        .directory("etc", 0o755)
        .file("etc/.wh.gone", 0o644, b"")
        .directory("cache", 0o755)
        .file("cache/.wh..wh..opq", 0o644, b"")
        .file("cache/new", 0o644, b"new")
        .directory("home", 0o755)
        .file("home/.wh.u", 0o644, b"")
        .finish();
    let repository = Published::create("whiteouts.example.org").unwrap();
    repository.ingest("layers/base", &base, &["--catalog", "--whiteouts", "overlay"]).unwrap();
    repository.ingest("layers/top", &top, &["--catalog", "--whiteouts", "overlay"]).unwrap();
    // Without the layer view: the stored form alone is right, for any client.
    let mount = MountBuilder::new(&repository.fqrn, &repository.client_config().unwrap())
        .option("cvmfs_suid")
        .mount()
        .unwrap();
    let overlay = Overlay::of(&[&mount.path().join("layers/top"), &mount.path().join("layers/base")]);
    let reference = unpack_layers(&[&base, &top]);
    assert_same(&compare(
        &layer_content(&walk_tree(reference.path().join("root"))),
        &layer_content(&walk_tree(overlay.path())),
    ));
}

#[test]
fn a_check_finds_a_damaged_object() {
    let repository = Published::create("checked.example.org").unwrap();
    repository.ingest("layer", &rich_layer().finish(), &["--catalog", "--xattrs"]).unwrap();
    repository.publish("check", &[]).unwrap().success().unwrap();

    let largest = walk_tree(repository.storage.join("data"))
        .into_iter()
        .filter(|entry| !entry.path.to_string_lossy().starts_with("/txn"))
        .max_by_key(|entry| entry.size.filter(|_| entry.kind.as_deref() == Some("file")))
        .unwrap();
    let name = largest.path.to_str().unwrap().trim_start_matches('/').to_owned();
    let file = repository.storage.join("data").join(&name);
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).unwrap();

    let finished = repository.publish("check", &[]).unwrap();
    assert!(!finished.status.success(), "{}", finished.output());
    assert_says(&finished.output(), &[&name.replace('/', ""), &name]);
}

#[test]
fn a_listing_that_waited_over_an_update_does_not_bring_old_content_back() {
    let repository = Published::create("waited.example.org").unwrap();
    let version = |text: &[u8]| {
        TarBuilder::new()
            .directory("set", 0o755)
            .file("set/.cvmfscatalog", 0o644, b"")
            .file("set/f", 0o644, text)
            .finish()
    };
    repository.ingest("/", &version(b"one"), &[]).unwrap();
    let mount = MountBuilder::new(&repository.fqrn, &repository.client_config().unwrap()).mount().unwrap();
    std::fs::metadata(mount.path().join("set")).unwrap();
    // The catalog of the first revision comes late.
    repository.origin.set_fault_times("*C", Fault::Delay(Duration::from_secs(4)), 1);
    std::thread::scope(|scope| {
        let listing = scope.spawn(|| std::fs::read_dir(mount.path().join("set")).unwrap().count());
        let end = Instant::now() + Duration::from_secs(3);
        while mount.status().unwrap()["waiting"] == 0 {
            assert!(Instant::now() < end, "the listing does not wait");
            std::thread::sleep(Duration::from_millis(20));
        }
        repository.ingest("/", &version(b"two"), &[]).unwrap();
        let answer = mount.ask("refresh", Duration::from_secs(30)).unwrap();
        assert_eq!(answer.trim(), "3", "the update");
        assert_eq!(listing.join().unwrap(), 2);
    });
    assert_eq!(std::fs::read(mount.path().join("set/f")).unwrap(), b"two");
}

/// The kernel enters the names of a listing one after the other, and waits where somebody looks a name up.
#[test]
fn a_listing_that_is_entered_after_an_update_does_not_bring_old_content_back() {
    let repository = Published::create("entered.example.org").unwrap();
    let version = |text: &[u8]| {
        TarBuilder::new()
            .directory("set", 0o755)
            .file("set/first", 0o644, text)
            .file("set/slow", 0o644, text)
            .file("set/then", 0o644, text)
            .finish()
    };
    repository.ingest("/", &version(b"one"), &[]).unwrap();
    let mount = MountBuilder::new(&repository.fqrn, &repository.client_config().unwrap())
        .environment("CVMFS_FUSE_TEST_FAULT", "slow:slow")
        .mount()
        .unwrap();
    let set = mount.path().join("set");
    let waiting = |number: u64| {
        let end = Instant::now() + Duration::from_secs(3);
        while mount.status().unwrap()["waiting"] != number {
            assert!(Instant::now() < end, "{number} requests do not wait");
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| std::fs::metadata(set.join("slow")).unwrap());
        waiting(1);
        let listing = scope.spawn(|| std::fs::read_dir(&set).unwrap().count());
        std::thread::sleep(Duration::from_millis(300));
        assert!(!listing.is_finished(), "the listing waits for the look-up");
        repository.ingest("/", &version(b"two"), &[]).unwrap();
        let answer = mount.ask("refresh", Duration::from_secs(30)).unwrap();
        assert_eq!(answer.trim(), "3", "the update");
        // Others keep the directory itself known.
        while !listing.is_finished() {
            assert_eq!(std::fs::read(set.join("then")).unwrap(), b"two", "once the update is in use");
            std::thread::sleep(Duration::from_millis(50));
        }
        assert_eq!(listing.join().unwrap(), 3);
        assert_eq!(std::fs::read(set.join("then")).unwrap(), b"two", "after the listing");
    });
    assert_eq!(std::fs::read(set.join("first")).unwrap(), b"two");
}

/// A container's root file system holds on to directories of the mount; the kernel must never be told that they are gone.
#[test]
fn an_overlay_over_the_mount_outlives_updates_and_workers() {
    let repository = Published::create("lower.example.org").unwrap();
    let layer = |name: &str| {
        let files = TarBuilder::new().directory("etc", 0o755).file("etc/name", 0o644, name.as_bytes());
        (0..20)
            .fold(files, |files, number| files.file(&format!("etc/{number}"), 0o644, name.as_bytes()))
            .finish()
    };
    for name in ["one", "two"] {
        repository.ingest(&format!("layers/{name}"), &layer(name), &["--catalog"]).unwrap();
    }
    let config = repository.client_config().unwrap();
    let mount = MountBuilder::new(&repository.fqrn, &config).option("layer_view").mount().unwrap();
    let place = |name: &str| mount.path().join("layers").join(name);
    let overlay = Overlay::of(&[&place("two"), &place("one")]);
    let mut next = 0;
    let mut read_on = |when: &str| {
        // One that is known, and one that nobody has read yet.
        for name in ["name".to_owned(), next.to_string()] {
            let text = std::fs::read_to_string(overlay.path().join("etc").join(name));
            assert_eq!(text.map_err(|error| format!("{when}: {error}")).as_deref(), Ok("two"));
        }
        next += 1;
    };
    read_on("at first");
    for round in 0..3 {
        repository.ingest(&format!("layers/more-{round}"), &layer("more"), &["--catalog"]).unwrap();
        mount.ask("refresh", Duration::from_secs(30)).unwrap();
        read_on("after an update");
        assert!(place(&format!("more-{round}")).join("etc/name").is_file(), "the update is there");
        let pid: u32 = mount.ask("pid", Duration::from_secs(10)).unwrap().trim().parse().unwrap();
        testkit::process::kill(pid, rustix::process::Signal::KILL);
        read_on("after the death of the worker");
    }
}
