//! Archives that try to reach what is not theirs. The directory around the target is compared before and after.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Archive, apply_to, chain, listing, scratch, sh, unpack_in_changed_root};
use overlay::apply::ApplyError;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A target beside things that must not change.
struct Cage {
    scratch: TempDir,
    before: String,
}

impl Cage {
    fn new() -> Self {
        let scratch = scratch();
        sh(
            scratch.path(),
            "mkdir -p target outside/sub; echo precious > outside/file; chmod 640 outside/file; \
             touch -h -d @1000000000 outside/sub outside/file outside",
        );
        let before = listing(&scratch.path().join("outside"));
        Cage { scratch, before }
    }

    fn target(&self) -> PathBuf {
        self.scratch.path().join("target")
    }

    /// Applies, and checks that nothing outside changed and that what was written can be removed.
    fn apply(&self, archive: &[u8]) -> Result<(), ApplyError> {
        let result = apply_to(&self.target(), archive).map(|_| ());
        assert_eq!(listing(&self.scratch.path().join("outside")), self.before);
        assert_eq!(sh(self.scratch.path(), "ls"), "outside\ntarget\n");
        overlay::tree::remove(&self.target()).unwrap();
        std::fs::create_dir(self.target()).unwrap();
        result
    }

    fn refused(&self, archive: &[u8]) -> String {
        chain(&self.apply(archive).expect_err("the archive must be refused"))
    }
}

/// What goes below a link that leads out of the layer goes where it would in a changed root, or nowhere.
#[test]
fn entries_below_a_symbolic_link_that_leads_out_stay_in_the_layer() {
    let cage = Cage::new();
    let outside = cage.scratch.path().join("outside");
    let absolute = outside.to_str().unwrap();
    for target in [absolute, "../outside", "sub/../../outside"] {
        for name in ["escape/file", "escape/sub/new", "escape/.wh.file", "escape/.wh..wh..opq"] {
            let message = cage.refused(&Archive::new().link("escape", target).file(name, "x").finish());
            assert_eq!(message, format!("entry '{name}' is refused: 'escape' is not a directory"));
        }
    }
    for target in [".", "/", "..", "../../.."] {
        // The same as `file`.
        cage.apply(&Archive::new().link("escape", target).file("escape/file", "x").finish()).unwrap();
    }
}

#[test]
fn a_link_in_the_middle_and_a_long_way_are_no_detour() {
    let cage = Cage::new();
    let long = vec!["n".repeat(250); 20].join("/");
    let up = "../".repeat(25);
    let archive = Archive::new()
        .dir(&long)
        .link(&format!("{long}/up"), &format!("{up}outside"))
        .file(&format!("{long}/up/file"), "x");
    let message = cage.refused(&archive.finish());
    assert!(message.contains("/up/file'"), "{message}");
    let archive = Archive::new().dir("d").link("d/up", "../..").file("d/up/outside/file", "x").finish();
    cage.apply(&archive).unwrap();
}

#[test]
fn links_in_a_circle_are_refused() {
    let cage = Cage::new();
    let message = cage.refused(&Archive::new().link("a", "b").link("b", "a").file("a/x", "").finish());
    assert_eq!(
        message,
        "entry 'a/x' is refused: it lies below symbolic links that lead in a circle, or more than 40 in a row"
    );
}

#[test]
fn files_replace_symbolic_links_instead_of_following_them() {
    let cage = Cage::new();
    let file = cage.scratch.path().join("outside/file");
    let archive = Archive::new().link("f", file.to_str().unwrap()).file("f", "overwritten").finish();
    cage.apply(&archive).unwrap();
    let directory = cage.scratch.path().join("outside");
    let archive = Archive::new()
        .link("d", directory.to_str().unwrap())
        .with(|next| next.mode = 0o700)
        .dir("d")
        .finish();
    cage.apply(&archive).unwrap();
}

#[test]
fn hard_links_reach_only_what_the_archive_brought() {
    let cage = Cage::new();
    let outside = cage.scratch.path().join("outside");
    let message = cage.refused(&Archive::new().hard("stolen", "etc/passwd").finish());
    assert!(message.contains("its target 'etc/passwd' is not in this layer"), "{message}");
    let archive =
        Archive::new().link("escape", outside.to_str().unwrap()).hard("stolen", "escape/file").finish();
    assert!(cage.refused(&archive).contains("'escape' is not a directory"));
    // A hard link to a symbolic link is one to the link itself, so writing through it is impossible.
    let archive = Archive::new()
        .link("l", outside.join("file").to_str().unwrap())
        .hard("h", "l")
        .file("h", "x")
        .finish();
    cage.apply(&archive).unwrap();
    assert!(cage.refused(&Archive::new().dir("d").hard("h", "d").finish()).contains("not in this layer"));
    assert!(
        cage.refused(&Archive::new().file(".wh.w", "").hard("h", "w").finish()).contains("not in this layer")
    );
    assert!(
        cage.refused(&Archive::new().file("f", "x").hard("f", "f").finish()).contains("not in this layer")
    );
}

#[test]
fn names_that_lead_out_are_refused_by_name() {
    let cage = Cage::new();
    let elsewhere = common::scratch();
    sh(elsewhere.path(), "echo x > f; tar -cPf a.tar --transform='s,^,../outside/,' f");
    let archive = std::fs::read(elsewhere.path().join("a.tar")).unwrap();
    let message = cage.refused(&archive);
    assert!(message.contains("entry '../outside/f' is refused: the name contains '..'"), "{message}");
}

#[test]
fn cut_archives_are_errors_and_leave_something_removable() {
    let cage = Cage::new();
    let archive =
        Archive::new().with(|next| next.mode = 0).dir("d").file("d/f", &"x".repeat(3000)).dir("d/e").finish();
    for cut in (0..archive.len()).step_by(256) {
        let message = cage.refused(&archive[..cut]);
        assert!(message.contains("the archive is cut off at byte"), "{message}");
    }
    cage.apply(&archive).unwrap();
}

#[test]
fn a_parent_that_is_a_file_is_named() {
    let cage = Cage::new();
    let message = cage.refused(&Archive::new().file("a", "x").file("a/b/c", "y").finish());
    assert_eq!(message, "entry 'a/b/c' is refused: 'a' is not a directory");
    let message = cage.refused(&Archive::new().link("dangling", "nowhere").file("dangling/f", "y").finish());
    assert_eq!(message, "entry 'dangling/f' is refused: 'dangling' is not a directory");
}

/// A chain of links, the last of which leads to the directory `d`.
fn chain_of_links(length: usize) -> Archive {
    (1..length).fold(Archive::new().dir("d").link("l0", "d"), |archive, number| {
        archive.link(&format!("l{number}"), &format!("l{}", number - 1))
    })
}

/// The truth is an extraction in a changed root, as engines do it.
#[test]
fn links_are_followed_as_in_a_changed_root() {
    let usr = || Archive::new().dir("usr").dir("usr/lib").dir("run");
    let cases = [
        usr().link("lib", "usr/lib").file("lib/libc.so", "c").dir("lib/new").file("lib/other/deep/x", "x"),
        usr().dir("var").link("var/run", "/run").file("var/run/x", "x"),
        usr().dir("var").link("var/run", "../../../../run").file("var/run/x", "x").dir("var/run/d"),
        usr().link("lib", "/usr/lib").link("usr/lib/up", "/lib/../../usr").file("lib/up/x", "x"),
        usr().link("lib", "usr/lib").file("lib/a", "a").hard("hard", "lib/a").hard("lib/b", "usr/lib/a"),
        usr().link("here", ".").file("here/here/x", "x"),
        usr().link("lib", "usr/lib").link("lib/l", "/lib").file("lib/l/l/x", "x"),
        // Nothing to lead to, nothing that can be entered, no end.
        usr().dir("var").link("var/run", "/missing").file("var/run/x", "x"),
        usr().dir("var").link("var/run", "/missing").file("var/run/deep/x", "x"),
        usr().file("f", "f").link("l", "f").file("l/x", "x"),
        usr().link("a", "b").link("b", "a").file("a/x", "x"),
        chain_of_links(40).file("l39/x", "x"),
        chain_of_links(41).file("l40/x", "x"),
    ];
    for (number, archive) in cases.into_iter().enumerate() {
        let scratch = scratch();
        let (ours, theirs) = (scratch.path().join("ours"), scratch.path().join("theirs"));
        std::fs::create_dir(&ours).unwrap();
        std::fs::create_dir(&theirs).unwrap();
        let archive = archive.finish();
        let accepted = unpack_in_changed_root(&archive, &theirs);
        assert_eq!(apply_to(&ours, &archive).is_ok(), accepted, "case {number}");
        if accepted {
            let names = |at: &Path| sh(at, "find . -mindepth 1 -printf '%P|%y|%n|%l\\n' | LC_ALL=C sort");
            assert_eq!(names(&ours), names(&theirs), "case {number}");
        }
    }
}
