//! Layers on disk become archives that say the same, or an error.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Archive, Mounted, apply_to, chain, comparable_listing, names, scratch, sh};
use layer_tar::Device;
use overlay::OpaqueXattr;
use overlay::diff::{DiffOptions, diff, diff_trees};
use overlay::ids::{IdMap, IdMaps, IdRange};
use proptest::prelude::*;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

fn archive_of(layer: &Path) -> Vec<u8> {
    let mut archive = Vec::new();
    diff(layer, &mut archive, &DiffOptions::default()).unwrap_or_else(|error| panic!("{}", chain(&error)));
    archive
}

fn refused(layer: &Path) -> String {
    chain(&diff(layer, std::io::sink(), &DiffOptions::default()).expect_err("the layer must be refused"))
}

/// The names in an archive as GNU tar sees them.
fn members(archive: &[u8]) -> Vec<String> {
    let scratch = scratch();
    fs::write(scratch.path().join("a.tar"), archive).unwrap();
    sh(scratch.path(), "tar -tf a.tar").lines().map(str::to_owned).collect()
}

fn everything() -> Archive {
    let capability = vec![1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    Archive::new()
        .with(|next| (next.mode, next.owner) = (0o1777, (1, 2)))
        .dir("d")
        .with(|next| (next.mode, next.owner) = (0o6755, (3_000_000_000, 100)))
        .file("d/setuid", "program")
        .hard("d/hard", "d/setuid")
        .link("d/link", "/anywhere/../else")
        .link("d/long-link", &"t".repeat(300))
        .fifo("d/pipe")
        .device("d/null", Device::Char { major: 1, minor: 3 })
        .device("d/disk", Device::Block { major: 259, minor: 1_048_575 })
        .with(|next| next.xattrs = vec![(b"security.capability".to_vec(), capability)])
        .file("d/capable", "ping")
        .with(|next| next.xattrs = vec![(b"user.binary".to_vec(), b"\0\n=".to_vec())])
        .file("d/noted", "")
        .with(|next| next.xattrs.clear())
        .bytes(b"caf\xe9 \xff\n:,\\", b"odd")
        .file(&vec!["n".repeat(250); 3].join("/"), "far away")
        .file("d/.wh.hidden", "")
        .dir("opaque")
        .file("opaque/.wh..wh..opq", "")
        .file("opaque/new", "n")
        .file(".wh.also-hidden", "")
}

#[test]
fn an_unchanged_layer_is_the_empty_archive() {
    let scratch = scratch();
    assert_eq!(archive_of(scratch.path()), [0; 1024]);
    // Also after a real mount, whose marks on the root are the kernel's own business.
    let lower = Archive::new().file("f", "x").layer(&scratch.path().join("lower"));
    let upper = scratch.path().join("upper");
    let merged = Mounted::writable(&scratch.path().join("merged"), &upper, &[&lower]);
    fs::write(merged.0.join("new"), b"x").unwrap();
    fs::remove_file(merged.0.join("new")).unwrap();
    drop(merged);
    assert_eq!(archive_of(&upper), [0; 1024]);
}

#[test]
fn what_was_applied_is_archived_again_whole_and_always_the_same() {
    let scratch = scratch();
    let first = everything().layer(&scratch.path().join("first"));
    let archive = archive_of(&first);
    let second = scratch.path().join("second");
    fs::create_dir(&second).unwrap();
    apply_to(&second, &archive).unwrap();
    assert_eq!(comparable_listing(&first), comparable_listing(&second));
    assert_eq!(sh(&second, "getfattr --only-values -n trusted.overlay.opaque opaque"), "y");
    assert_eq!(sh(&second, "stat -c %t:%T d/hidden also-hidden"), "0:0\n0:0\n");
    assert_eq!(archive_of(&second), archive);
    assert_eq!(
        fs::metadata(second.join("d/hard")).unwrap().ino(),
        fs::metadata(second.join("d/setuid")).unwrap().ino()
    );
}

#[test]
fn members_are_sorted_with_parents_first_and_marks_behind_their_directory() {
    let scratch = scratch();
    let layer = Archive::new()
        .file("b/z", "")
        .file("b/.wh.gone", "")
        .file("b/.wh..wh..opq", "")
        .file("a", "")
        .file("b-", "")
        .file(".wh.c", "")
        .layer(&scratch.path().join("layer"));
    assert_eq!(
        members(&archive_of(&layer)),
        ["a", "b/", "b/.wh..wh..opq", "b/.wh.gone", "b/z", "b-", ".wh.c"]
    );
}

#[test]
fn an_opaque_root_comes_first() {
    let scratch = scratch();
    let layer =
        Archive::new().file(".wh..wh..opq", "").file("only", "o").layer(&scratch.path().join("layer"));
    assert_eq!(members(&archive_of(&layer)), [".wh..wh..opq", "only"]);
}

#[test]
fn what_a_container_did_survives_the_way_through_an_archive() {
    let scratch = scratch();
    let base = everything()
        .dir("gone")
        .file("gone/x", "x")
        .file("edit", "before")
        .dir("again")
        .file("again/old", "o");
    let base = base.layer(&scratch.path().join("base"));
    let upper = scratch.path().join("upper");
    let merged = Mounted::writable(&scratch.path().join("merged"), &upper, &[&base]);
    sh(
        &merged.0,
        "echo more >> edit; rm -rf gone; rm -rf again; mkdir again; echo n > again/new; rm d/link; mkdir d/link; touch d/link/f; \
         chmod 640 d/noted; chown 7:8 d/pipe; ln edit hard-edit; mv d/setuid moved; mkdir -m 700 fresh; rm -f d/hard; \
         python3 -c \"import socket; socket.socket(socket.AF_UNIX).bind('sock')\" 2>/dev/null; touch -d @-5 fresh; setfattr -n user.note -v 1 fresh",
    );
    let archive = archive_of(&upper);
    fs::remove_file(merged.0.join("sock")).unwrap();
    let expected = comparable_listing(&merged.0);
    drop(merged);
    let copy = scratch.path().join("copy");
    fs::create_dir(&copy).unwrap();
    apply_to(&copy, &archive).unwrap();
    let merged = Mounted::read_only(&scratch.path().join("merged-copy"), &[&copy, &base]);
    assert_eq!(comparable_listing(&merged.0), expected);
}

#[test]
fn sockets_are_left_out() {
    let scratch = scratch();
    let _socket = std::os::unix::net::UnixListener::bind(scratch.path().join("s")).unwrap();
    assert_eq!(archive_of(scratch.path()), [0; 1024]);
}

#[test]
fn marks_that_a_program_in_the_container_could_set_do_not_count() {
    let scratch = scratch();
    fs::create_dir(scratch.path().join("d")).unwrap();
    sh(scratch.path(), "setfattr -n user.overlay.opaque -v y d");
    assert_eq!(members(&archive_of(scratch.path())), ["d/"]);
    let mut archive = Vec::new();
    diff(scratch.path(), &mut archive, &DiffOptions { marks: OpaqueXattr::User, ..DiffOptions::default() })
        .unwrap();
    assert_eq!(members(&archive), ["d/", "d/.wh..wh..opq"]);
}

#[test]
fn layers_that_are_no_complete_diff_are_refused() {
    let scratch = scratch();
    fs::create_dir(scratch.path().join("d")).unwrap();
    sh(scratch.path(), "setfattr -n trusted.overlay.redirect -v /other d");
    let message = refused(scratch.path());
    assert!(message.contains("'d' has overlayfs's attribute 'redirect'"), "{message}");
    fs::remove_dir(scratch.path().join("d")).unwrap();
    fs::write(scratch.path().join("f"), b"").unwrap();
    sh(scratch.path(), "setfattr -n trusted.overlay.metacopy f");
    assert!(refused(scratch.path()).contains("'f' has overlayfs's attribute 'metacopy'"));
}

#[test]
fn names_that_would_turn_into_whiteouts_are_refused() {
    for name in [".wh.passwd", ".wh.", ".wh..wh..opq", "d/.wh.x"] {
        let scratch = scratch();
        fs::create_dir(scratch.path().join("d")).unwrap();
        fs::write(scratch.path().join(name), b"").unwrap();
        let message = refused(scratch.path());
        assert!(
            message.contains(&format!("'{name}' cannot be archived: names that begin with '.wh.'")),
            "{message}"
        );
    }
}

#[test]
fn owners_are_mapped_back_and_unmapped_ones_refused() {
    let scratch = scratch();
    let map = || IdMap::new(vec![IdRange { container: 0, host: 100_000, size: 65_536 }]);
    let options = DiffOptions { ids: IdMaps { users: map(), groups: map() }, ..DiffOptions::default() };
    fs::write(scratch.path().join("f"), b"").unwrap();
    std::os::unix::fs::chown(scratch.path().join("f"), Some(100_033), Some(100_044)).unwrap();
    let mut archive = Vec::new();
    diff(scratch.path(), &mut archive, &options).unwrap();
    let copy = common::scratch();
    apply_to(copy.path(), &archive).unwrap();
    let metadata = fs::metadata(copy.path().join("f")).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (33, 44));
    std::os::unix::fs::chown(scratch.path().join("f"), Some(5), None).unwrap();
    let message = chain(&diff(scratch.path(), std::io::sink(), &options).unwrap_err());
    assert_eq!(message, "'f' cannot be archived: user 5 is outside of the mapped range");
}

#[test]
fn a_reader_that_goes_away_ends_the_diff() {
    struct Gone;
    impl std::io::Write for Gone {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let scratch = scratch();
    let layer = Archive::new().file("f", &"x".repeat(1 << 20)).layer(&scratch.path().join("layer"));
    let message = chain(&diff(&layer, Gone, &DiffOptions::default()).unwrap_err());
    assert!(message.contains("writing the archive failed") && message.contains("broken pipe"), "{message}");
}

/// Two complete trees, and the archive that leads from the first to the second applied over the first.
fn check_trees(lower: &Path, upper: &Path, scratch: &Path) -> Vec<String> {
    let mut archive = Vec::new();
    diff_trees(lower, upper, &mut archive, &DiffOptions::default())
        .unwrap_or_else(|error| panic!("{}", chain(&error)));
    let layer = scratch.join("layer");
    fs::create_dir(&layer).unwrap();
    apply_to(&layer, &archive).unwrap();
    let merged = Mounted::read_only(&scratch.join("applied"), &[&layer, lower]);
    assert_eq!(without_directory_times(&merged.0), without_directory_times(upper));
    drop(merged);
    overlay::tree::remove(&layer).unwrap();
    members(&archive)
}

fn without_directory_times(directory: &Path) -> Vec<String> {
    let line = |line: &str| {
        let mut fields: Vec<&str> = line.split('|').collect();
        if fields.get(1) == Some(&"d") {
            fields[4] = "";
        }
        fields.join("|")
    };
    comparable_listing(directory).lines().map(line).collect()
}

#[test]
fn the_difference_of_two_trees_leads_from_one_to_the_other() {
    let scratch = scratch();
    let base =
        Archive::new().file("same", "s").file("edit", "e").dir("dir").file("dir/x", "x").file("dir/y", "y");
    let base = base
        .dir("gone")
        .file("gone/a", "a")
        .link("link", "one")
        .file("to-dir", "t")
        .dir("to-file")
        .file("to-file/f", "f");
    let base = base.layer(&scratch.path().join("base"));
    let middle = Archive::new().file("edit", "m").file("middle", "m").layer(&scratch.path().join("middle"));
    let top = Archive::new()
        .file("dir/.wh.x", "")
        .file("dir/z", "z")
        .file(".wh.gone", "")
        .link("link", "two")
        .dir("to-dir")
        .file("to-dir/f", "f")
        .file("to-file", "t")
        .layer(&scratch.path().join("top"));
    let lower = Mounted::read_only(&scratch.path().join("lower"), &[&base]);
    let upper = Mounted::read_only(&scratch.path().join("upper"), &[&top, &middle, &base]);
    let found = check_trees(&lower.0, &upper.0, scratch.path());
    let expected = [
        "dir/",
        "dir/.wh.x",
        "dir/z",
        "edit",
        ".wh.gone",
        "link",
        "middle",
        "to-dir/",
        "to-dir/f",
        "to-file",
    ];
    assert_eq!(found, expected);
}

#[test]
fn equal_trees_differ_by_the_empty_archive() {
    let scratch = scratch();
    let base = everything().layer(&scratch.path().join("base"));
    let lower = Mounted::read_only(&scratch.path().join("lower"), &[&base]);
    let upper = Mounted::read_only(&scratch.path().join("upper"), &[&base]);
    let mut archive = Vec::new();
    diff_trees(&lower.0, &upper.0, &mut archive, &DiffOptions::default()).unwrap();
    assert_eq!(archive, [0; 1024]);
}

#[test]
fn a_file_of_same_size_and_time_but_other_content_is_found() {
    let scratch = scratch();
    let one = Archive::new().file("d/f", "one").file("d/same", "xyz").layer(&scratch.path().join("one"));
    let two = Archive::new().file("d/f", "two").file("d/same", "xyz").layer(&scratch.path().join("two"));
    assert_eq!(check_trees(&one, &two, scratch.path()), ["d/", "d/f"]);
}

#[test]
fn unchanged_parents_of_a_change_keep_their_metadata() {
    let scratch = scratch();
    let one = Archive::new()
        .with(|next| (next.mode, next.owner) = (0o1777, (5, 6)))
        .dir("a")
        .dir("a/b")
        .dir("a/b/c");
    let one = one.layer(&scratch.path().join("one"));
    sh(scratch.path(), "cp -a one two; touch two/a/b/c/new");
    assert_eq!(
        check_trees(&one, &scratch.path().join("two"), scratch.path()),
        ["a/", "a/b/", "a/b/c/", "a/b/c/new"]
    );
}

#[derive(Debug, Clone)]
enum Step {
    Write(String, Vec<u8>),
    Dir(String),
    Remove(String),
    Link(String, String),
    Hard(String, String),
    Move(String, String),
    Mode(String, u32),
}

/// Few names, so that steps meet.
fn place() -> impl Strategy<Value = String> {
    prop_oneof!["[ab]", "[ab]/[ab]", "[ab]/[ab]/[ab]"]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (place(), proptest::collection::vec(any::<u8>(), 0..40)).prop_map(|(at, bytes)| Step::Write(at, bytes)),
        3 => place().prop_map(Step::Dir),
        3 => place().prop_map(Step::Remove),
        1 => (place(), place()).prop_map(|(at, to)| Step::Link(at, to)),
        1 => (place(), place()).prop_map(|(at, to)| Step::Hard(at, to)),
        2 => (place(), place()).prop_map(|(at, to)| Step::Move(at, to)),
        1 => (place(), 0u32..0o1000).prop_map(|(at, mode)| Step::Mode(at, mode)),
    ]
}

/// Does what it can; steps that make no sense at the moment are passed over.
fn perform(root: &Path, steps: &[Step]) {
    for step in steps {
        let _ = match step {
            Step::Write(at, bytes) => match fs::symlink_metadata(root.join(at)) {
                Ok(found) if found.is_symlink() => Ok(()),
                _ => fs::write(root.join(at), bytes),
            },
            Step::Dir(at) => fs::create_dir(root.join(at)),
            Step::Remove(at) => overlay::tree::remove(&root.join(at)).map_err(|error| error.source),
            Step::Link(at, to) => symlink(to, root.join(at)),
            Step::Hard(at, to) => fs::hard_link(root.join(to), root.join(at)),
            Step::Move(at, to) => fs::rename(root.join(at), root.join(to)),
            Step::Mode(at, mode) => match fs::symlink_metadata(root.join(at)) {
                Ok(found) if found.is_symlink() => Ok(()),
                _ => fs::set_permissions(root.join(at), std::os::unix::fs::PermissionsExt::from_mode(*mode)),
            },
        };
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_a_container_does_comes_through(
        before in proptest::collection::vec(step(), 0..30),
        during in proptest::collection::vec(step(), 0..30),
    ) {
        let scratch = scratch();
        let base = scratch.path().join("base");
        fs::create_dir(&base).unwrap();
        perform(&base, &before);
        let upper = scratch.path().join("upper");
        let merged = Mounted::writable(&scratch.path().join("merged"), &upper, &[&base]);
        perform(&merged.0, &during);
        let expected = comparable_listing(&merged.0);
        let archive = archive_of(&upper);
        let copy = scratch.path().join("copy");
        fs::create_dir(&copy).unwrap();
        apply_to(&copy, &archive).unwrap();
        let again = Mounted::read_only(&scratch.path().join("again"), &[&copy, &base]);
        prop_assert_eq!(comparable_listing(&again.0), expected);
        drop(again);
        // The comparison of the merged trees leads to the same place.
        let lower = Mounted::read_only(&scratch.path().join("lower"), &[&base]);
        check_trees(&lower.0, &merged.0, scratch.path());
        // And the list of changes is the same by the short way and by the long one.
        let lowers = overlay::changes::Lowers::open(std::slice::from_ref(&base), OpaqueXattr::Trusted).unwrap();
        let short = overlay::changes::changes(&upper, &lowers).unwrap();
        let long = overlay::changes::changes_of_trees(&lower.0, &merged.0).unwrap();
        prop_assert_eq!(short, long);
    }
}

#[test]
fn deep_trees_are_archived() {
    let scratch = scratch();
    let layer = scratch.path().join("layer");
    let deep = vec!["d"; 2500].join("/");
    let long = vec!["n".repeat(250); 30].join("/");
    Archive::new().file(&format!("{deep}/f"), "x").file(&long, "x").layer(&layer);
    let archive = archive_of(&layer);
    let copy = scratch.path().join("copy");
    fs::create_dir(&copy).unwrap();
    assert_eq!(apply_to(&copy, &archive).unwrap().entries, 2501 + 30);
    assert_eq!(archive_of(&copy), archive);
    overlay::tree::remove(&layer).unwrap();
    overlay::tree::remove(&copy).unwrap();
    assert!(names(scratch.path()).is_empty());
}
