//! An archive that tries to leave its directory, or is damaged, is refused with a message that names the
//! entry, and the repository stays at its revision.

#![allow(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

mod common;

use common::{assert_same, assert_says};
use testkit::tar::{TarBuilder, gzip};
use testkit::tree::portable;
use testkit::{MountBuilder, Published, TreeEntry, compare, walk_tree};

#[track_caller]
fn is_refused(tar: &[u8], words: &[&str]) {
    let repository = Published::create("badtar.example.org").unwrap();
    let good = TarBuilder::new().file("good", 0o644, b"good").finish();
    repository.ingest("layers/good", &good, &[]).unwrap();
    let before = std::fs::read(repository.storage.join(".cvmfspublished")).unwrap();
    let tree = walk_tree(&repository.storage);

    let file = repository.scratch().join("bad.tar");
    std::fs::write(&file, tar).unwrap();
    let arguments = ["--base", "layers/bad", "--tar", file.to_str().unwrap()];
    let finished = repository.publish("ingest", &arguments).unwrap();

    assert!(!finished.status.success(), "accepted: {}", finished.output());
    assert_says(&finished.stderr, words);
    assert_eq!(std::fs::read(repository.storage.join(".cvmfspublished")).unwrap(), before);
    // Nothing that was there may have changed, and nothing of the refused archive stays.
    let objects = |tree: &[TreeEntry]| -> Vec<TreeEntry> {
        let lasting =
            |entry: &&TreeEntry| entry.sha256.is_some() && !entry.path.to_string_lossy().contains("/txn/");
        portable(&tree.iter().filter(lasting).cloned().collect::<Vec<_>>())
    };
    assert_same(&compare(&objects(&tree), &objects(&walk_tree(&repository.storage))));
    let mount = MountBuilder::new(&repository.fqrn, &repository.client_config().unwrap()).mount().unwrap();
    assert!(mount.path().join("layers/good/good").exists() && !mount.path().join("layers/bad").exists());
}

#[test]
fn a_name_with_parent_components_is_refused() {
    is_refused(&TarBuilder::new().file("a/../../escape", 0o644, b"x").finish(), &["a/../../escape"]);
}

#[test]
fn an_archive_that_ends_in_the_middle_of_a_file_is_refused() {
    let tar = TarBuilder::new().file("file", 0o644, &[7; 5000]).finish();
    is_refused(&tar[..2000], &["file", "ends", "truncated"]);
}

#[test]
fn a_gzip_stream_that_is_cut_is_refused() {
    let content: Vec<u8> =
        (0..200_000_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let blob = gzip(&TarBuilder::new().file("file", 0o644, &content).finish());
    is_refused(&blob[..blob.len() / 2], &["ends", "truncated", "gzip", "incomplete", "corrupt"]);
}

#[test]
fn a_link_to_a_file_that_is_not_in_the_archive_is_refused() {
    is_refused(
        &TarBuilder::new().hard_link("link", "../../etc/shadow").finish(),
        &["../../etc/shadow", "link"],
    );
}

#[test]
fn bytes_that_are_no_archive_are_refused() {
    is_refused(&[0x5a; 4096], &["tar", "header", "checksum"]);
}

/// Absolute names and links out of the layer do occur in honest layers; an engine keeps them inside.
#[test]
fn absolute_names_and_links_that_lead_out_stay_inside_the_layer() {
    let outside = testkit::ScratchDir::new("outside").unwrap();
    let target = outside.path().to_str().unwrap();
    let tar = TarBuilder::new()
        .symlink("out", target)
        .file("out/planted", 0o644, b"planted")
        .file("/absolute", 0o644, b"absolute")
        .finish();
    let repository = Published::create("inside.example.org").unwrap();
    let file = repository.scratch().join("layer.tar");
    std::fs::write(&file, tar).unwrap();
    let arguments = ["--base", "layers/x", "--tar", file.to_str().unwrap()];
    let finished = repository.publish("ingest", &arguments).unwrap();
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0, "written outside");
    if finished.status.success() {
        let mount =
            MountBuilder::new(&repository.fqrn, &repository.client_config().unwrap()).mount().unwrap();
        assert_eq!(std::fs::read(mount.path().join("layers/x/absolute")).unwrap(), b"absolute");
        assert!(!mount.path().join("absolute").exists());
    } else {
        assert_says(&finished.stderr, &["out/planted", "/absolute"]);
    }
}
