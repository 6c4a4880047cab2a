//! The list of changes is the one that `docker diff` shows.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Archive, Mounted, scratch, sh};
use overlay::OpaqueXattr;
use overlay::changes::{Change, ChangeKind, Lowers, changes, changes_of_trees};
use std::path::{Path, PathBuf};

fn lines(changes: &[Change]) -> Vec<String> {
    let letter = |kind| match kind {
        ChangeKind::Modified => 'C',
        ChangeKind::Added => 'A',
        ChangeKind::Deleted => 'D',
    };
    changes.iter().map(|change| format!("{} {}", letter(change.kind), change.path.escape_ascii())).collect()
}

fn by_layers(upper: &Path, lowers: &[&Path]) -> Vec<String> {
    let lowers: Vec<PathBuf> = lowers.iter().map(|lower| lower.to_path_buf()).collect();
    let lowers = Lowers::open(&lowers, OpaqueXattr::Trusted).unwrap();
    lines(&changes(upper, &lowers).unwrap())
}

const BASE: &str = "mkdir -p dir/sub edit touched opq gone tofile/sub same; echo a > dir/sub/f; echo q > tofile/sub/x; \
     echo q > tofile/y; echo s > same/f; ln -s a lnk; echo k > chown; echo z > renamed; echo b > edit/file; \
     echo c > opq/old; echo c > opq/same; echo d > gone/x; echo e > file; echo m > mode; echo t > touched/f";

const STEPS: &str = "rm -rf tofile; echo 1 > tofile; ln -sf b lnk; mv renamed moved; chown 1:1 chown; chmod 600 same/f; \
     chmod 644 same/f; mkdir -p tmpd/x; rm -rf tmpd; mkdir new; echo 1 > new/f; mkdir new/deeper; echo 2 >> edit/file; \
     rm -rf opq; mkdir opq; echo n > opq/new; echo s > opq/same; rm -rf gone; rm file; mkdir file; chmod 700 mode; \
     chmod 711 dir; echo x > touched/g; rm touched/g; rm dir/sub/f; ln -s x link; mkdir -p dir/sub/n1/n2";

/// What docker.io 20.10.24 printed for these steps in a container (overlay2 on Linux 6.18), sorted by path.
const ENGINE: &[&str] = &[
    "C /chown",
    "C /dir",
    "C /dir/sub",
    "D /dir/sub/f",
    "A /dir/sub/n1",
    "A /dir/sub/n1/n2",
    "C /edit",
    "C /edit/file",
    "C /file",
    "D /gone",
    "A /link",
    "C /lnk",
    "C /mode",
    "A /moved",
    "A /new",
    "A /new/deeper",
    "A /new/f",
    "C /opq",
    "A /opq/new",
    "D /opq/old",
    "C /opq/same",
    "D /renamed",
    "C /tofile",
];

#[test]
fn the_list_is_the_engine_s() {
    let scratch = scratch();
    let (base, upper) = (scratch.path().join("base"), scratch.path().join("upper"));
    std::fs::create_dir(&base).unwrap();
    sh(&base, BASE);
    let merged = Mounted::writable(&scratch.path().join("merged"), &upper, &[&base]);
    sh(&merged.0, STEPS);
    assert_eq!(by_layers(&upper, &[&base]), ENGINE);
    let lower = Mounted::read_only(&scratch.path().join("lower"), &[&base]);
    assert_eq!(lines(&changes_of_trees(&lower.0, &merged.0).unwrap()), ENGINE);
}

#[test]
fn an_unchanged_container_has_no_changes() {
    let scratch = scratch();
    let base = Archive::new().file("d/f", "x").layer(&scratch.path().join("base"));
    let upper = scratch.path().join("upper");
    std::fs::create_dir(&upper).unwrap();
    assert!(by_layers(&upper, &[&base]).is_empty());
}

#[test]
fn added_and_modified_are_told_apart_through_all_layers() {
    let scratch = scratch();
    let bottom =
        Archive::new().file("deep/a", "1").file("deep/hidden", "1").file("cut/b", "1").file("was", "1");
    let bottom = bottom.layer(&scratch.path().join("bottom"));
    let middle = Archive::new().file("deep/.wh.hidden", "").file("cut/.wh..wh..opq", "").file(".wh.was", "");
    let middle = middle.layer(&scratch.path().join("middle"));
    let top = Archive::new()
        .file("deep/a", "22")
        .file("deep/hidden", "2")
        .file("cut/b", "2")
        .file("was/now", "2")
        .file(".wh.nothing", "")
        .layer(&scratch.path().join("top"));
    let expected = ["C /cut", "A /cut/b", "C /deep", "C /deep/a", "A /deep/hidden", "A /was", "A /was/now"];
    assert_eq!(by_layers(&top, &[&middle, &bottom]), expected);
}

#[test]
fn an_opaque_root_deletes_what_it_hides() {
    let scratch = scratch();
    let base = Archive::new().file("old/x", "").file("kept", "k").layer(&scratch.path().join("base"));
    let top = Archive::new().file(".wh..wh..opq", "").file("kept", "new").layer(&scratch.path().join("top"));
    assert_eq!(by_layers(&top, &[&base]), ["C /kept", "D /old"]);
    let above = Archive::new().file("old/x", "").layer(&scratch.path().join("above"));
    assert_eq!(by_layers(&above, &[&top, &base]), ["A /old", "A /old/x"]);
}
