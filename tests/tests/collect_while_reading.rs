//! Garbage is collected while a mount is in use: nobody loses a file of a revision that is tagged, or that was replaced
//! only just now.

#![allow(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

use std::time::Duration;

use testkit::tar::TarBuilder;
use testkit::{MountBuilder, Published};

const FILES: u32 = 150;

/// `FILES` files whose content depends on the revision.
fn tree(revision: u32) -> Vec<u8> {
    let mut tar = TarBuilder::new();
    for number in 0..FILES {
        tar = tar.file(&format!("d{}/f{number}", number % 10), 0o644, &content(revision, number));
    }
    tar.finish()
}

fn content(revision: u32, number: u32) -> Vec<u8> {
    format!("revision {revision} file {number}\n").repeat(200).into_bytes()
}

/// Reads every file once, slowly, while `meanwhile` runs.
fn read_slowly(repository: &Published, revision: u32, meanwhile: impl FnOnce() + Send) {
    let config = repository.client_config().unwrap();
    let mount = MountBuilder::new(&repository.fqrn, &config).mount().unwrap();
    std::thread::scope(|scope| {
        let other = scope.spawn(meanwhile);
        for number in 0..FILES {
            let path = mount.path().join(format!("tree/d{}/f{number}", number % 10));
            let found = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            assert!(found == content(revision, number), "{} has other content", path.display());
            std::thread::sleep(Duration::from_millis(15));
        }
        other.join().unwrap();
    });
    mount.unmount().unwrap();
}

fn collect(repository: &Published, options: &[&str]) -> u64 {
    let text =
        repository.publish("gc", &[&["--keep", "0", "--json"], options].concat()).unwrap().success().unwrap();
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    report["objects_removed"].as_u64().unwrap()
}

#[test]
fn row_95_a_reader_of_a_tagged_revision_loses_nothing_to_a_collection_without_grace() {
    let repository = Published::create_with("tagged.example.org", &["--garbage-collectable"]).unwrap();
    repository.ingest("tree", &tree(1), &["--tag", "running", "--catalog"]).unwrap();
    let mut removed = 0;
    read_slowly(&repository, 1, || {
        for revision in 2..7 {
            repository.ingest("tree", &tree(revision), &["--catalog"]).unwrap();
            removed += collect(&repository, &["--grace", "0", "--unreferenced"]);
        }
    });
    assert!(removed > u64::from(FILES), "only {removed} objects were collected");
    repository.publish("check", &["--tags"]).unwrap().success().unwrap();
}

#[test]
fn row_95_a_reader_of_a_revision_that_was_replaced_just_now_loses_nothing_to_a_collection_with_grace() {
    let repository = Published::create_with("grace.example.org", &["--garbage-collectable"]).unwrap();
    repository.ingest("tree", &tree(1), &["--catalog"]).unwrap();
    read_slowly(&repository, 1, || {
        for revision in 2..6 {
            repository.ingest("tree", &tree(revision), &["--catalog"]).unwrap();
            assert_eq!(collect(&repository, &["--unreferenced"]), 0);
        }
    });
}
