//! Container layers: whiteouts, hard links, merging, deleting, nested catalogs.

use std::io::Write as _;
use std::process::{Command, Stdio};

use cvmfs_format::catalog::EntryFlags;
use cvmfs_format::{ObjectKind, PathHash};
use serde_json::{Value, json};

use crate::support::{Repository, Tree, assert_equal_trees};
use crate::tar::{Header, Tar};

const OVERLAY: &[&str] = &["--catalog", "--whiteouts", "overlay", "--xattrs"];

fn at<'t>(tree: &'t Tree, path: &str) -> &'t Value {
    tree.get(path).unwrap_or_else(|| panic!("{path} is not among {:?}", tree.keys()))
}

#[test]
fn whiteouts_are_stored_as_overlayfs_reads_them() {
    let repository = Repository::create(&[]);
    let archive = Tar::default()
        .dir("etc", 0o755)
        .file("etc/.wh.gone", b"")
        .file("etc/.wh.both", b"")
        .file("etc/both", b"wins")
        .dir("var", 0o700)
        .dir("var/sub", 0o755)
        .file("var/.wh.sub", b"")
        .file("var/.wh..wh..opq", b"")
        .file("var/.wh..wh.plnk", b"")
        .file(".wh..cvmfscatalog", b"")
        .finish();
    repository.ingest("layers/x", &archive, OVERLAY);
    repository.assert_sound();
    let tree = repository.tree("/layers/x");
    assert_equal_trees(&repository.oracle_tree("/layers/x"), &tree);

    let gone = at(&tree, "/layers/x/etc/gone");
    assert_eq!(
        (&gone["type"], &gone["rdev"], &gone["mode"]),
        (&json!("char"), &json!("0:0"), &json!("0000"))
    );
    assert_eq!(at(&tree, "/layers/x/etc/both")["type"], "file");
    let opaque = json!({"trusted.overlay.opaque": "eQ==", "user.overlay.opaque": "eQ=="});
    assert_eq!(at(&tree, "/layers/x/var")["xattrs"], opaque);
    assert_eq!(at(&tree, "/layers/x/var")["mode"], "0700");
    assert_eq!(at(&tree, "/layers/x/var/sub")["xattrs"], opaque);
    assert_eq!(at(&tree, "/layers/x/.cvmfscatalog")["type"], "file");
    assert!(!tree.keys().any(|path| path.contains(".wh.")), "{:?}", tree.keys());
}

#[test]
fn whiteouts_can_be_kept_as_the_cpp_tools_do() {
    let repository = Repository::create(&[]);
    repository.ingest("x", &Tar::default().file(".wh.gone", b"").file(".wh..wh..opq", b"").finish(), &[]);
    let tree = repository.tree("/x");
    assert_eq!(at(&tree, "/x/.wh.gone")["type"], "file");
    assert_eq!(at(&tree, "/x/.wh..wh..opq")["type"], "file");
}

#[test]
fn hard_links_form_groups_in_a_directory_and_copies_across() {
    let repository = Repository::create(&[]);
    let archive = Tar::default()
        .link(b'1', "later/forward", "a/file")
        .file("a/file", b"content")
        .link(b'1', "a/second", "a/file")
        .link(b'2', "a/symlink", "file")
        .link(b'1', "a/symlink2", "a/symlink")
        .link(b'1', "b/one", "a/second")
        .link(b'1', "b/two", "b/one")
        .link(b'1', "c", "./a/file")
        .finish();
    repository.ingest("x", &archive, &["--catalog"]);
    repository.assert_sound();
    let tree = repository.tree("/x");
    assert_equal_trees(&repository.oracle_tree("/x"), &tree);
    let links =
        |path: &str| (at(&tree, path)["nlink"].as_u64().unwrap(), at(&tree, path)["ino_group"].as_str());
    assert_eq!(links("/x/a/file"), (2, Some("/x/a/file")));
    assert_eq!(links("/x/a/second"), (2, Some("/x/a/file")));
    assert_eq!(links("/x/a/symlink2"), (2, Some("/x/a/symlink")));
    assert_eq!(links("/x/b/two"), (2, Some("/x/b/one")));
    assert_eq!(links("/x/c"), (1, None));
    assert_eq!(links("/x/later/forward"), (1, None));
    assert_eq!(at(&tree, "/x/later/forward")["sha256"], at(&tree, "/x/a/file")["sha256"]);

    // replacing one name takes it out of its group
    repository.ingest("x", &Tar::default().file("a/second", b"other").finish(), &[]);
    repository.assert_sound();
    let tree = repository.tree("/x/a");
    assert_eq!(at(&tree, "/x/a/file")["nlink"], 1);
    assert_ne!(at(&tree, "/x/a/file")["sha256"], at(&tree, "/x/a/second")["sha256"]);

    // a target that only the repository has
    repository.ingest("x", &Tar::default().link(b'1', "new", "b/one").finish(), &[]);
    repository.assert_sound();
    assert_eq!(at(&repository.tree("/x/new"), "/x/new")["sha256"], at(&tree, "/x/a/file")["sha256"]);
}

#[test]
fn a_second_ingest_merges_and_the_last_entry_wins() {
    let repository = Repository::create(&[]);
    let first = Tar::default()
        .dir("d", 0o755)
        .file("d/stays", b"1")
        .file("d/changes", b"1")
        .dir("becomes-file/below", 0o755)
        .file("becomes-file/below/f", b"1")
        .file("becomes-dir", b"1")
        .link(b'2', "becomes-link", "x");
    repository.ingest("base", &first.finish(), &["--catalog"]);
    let links_before = at(&repository.tree("/base"), "/base")["nlink"].as_u64().unwrap();
    let second = Tar::default()
        .dir("d", 0o700)
        .file("d/changes", b"2")
        .file("becomes-file", b"2")
        .dir("becomes-dir", 0o755)
        .file("becomes-dir/f", b"2")
        .link(b'2', "becomes-link", "y")
        .file("late/f", b"2")
        .dir("late", 0o750);
    repository.ingest("base", &second.finish(), &[]);
    repository.assert_sound();
    let tree = repository.tree("/base");
    assert_equal_trees(&repository.oracle_tree("/base"), &tree);
    assert_eq!(at(&tree, "/base/d")["mode"], "0700");
    assert_eq!(at(&tree, "/base/d/stays")["type"], "file");
    assert_eq!(at(&tree, "/base/becomes-file")["type"], "file");
    assert_eq!(at(&tree, "/base/becomes-dir/f")["type"], "file");
    assert_eq!(at(&tree, "/base/becomes-link")["target"], "y");
    assert_eq!(at(&tree, "/base/late")["mode"], "0750");
    // one directory became a file, one file a directory, one is new
    assert_eq!(at(&tree, "/base")["nlink"].as_u64().unwrap(), links_before + 1);
}

#[test]
fn deleting_removes_whole_trees_with_their_catalogs() {
    let repository = Repository::create(&[]);
    let archive = Tar::default().dir("a/b", 0o755).file("a/b/f", b"x").file("f", b"y").finish();
    repository.ingest("one/nested", &archive, &["--catalog"]);
    repository.ingest("two", &archive, &[]);
    repository.ok("ingest", &["--delete", "/one/nested", "two/f", "--tag", "less"]);
    let report = repository.assert_sound();
    let tree = repository.tree("/");
    assert!(!tree.keys().any(|path| path.starts_with("/one/") || path == "/two/f"), "{:?}", tree.keys());
    assert_eq!(at(&tree, "/one")["nlink"], 2);
    assert_eq!(at(&tree, "/two/a/b/f")["type"], "file");
    assert!(report.revision == 4 && report.unreferenced.is_empty(), "{report:?}");

    let output = repository.run("ingest", &["--delete", "/one/nested"], b"");
    assert_eq!(output.status.code(), Some(5));
    assert_eq!(repository.run("ingest", &["--delete", "/"], b"").status.code(), Some(2));
}

#[test]
fn catalog_markers_split_and_merge_catalogs() {
    let repository = Repository::create(&[]);
    let inner = Tar::default().file("f", b"x").file("deep/g", b"y").link(b'1', "h", "f").finish();
    repository.ingest("a/b/inner", &inner, &["--catalog"]);
    let plain = repository.tree("/");
    // a marker appears above an existing nested catalog: that one moves below the new one
    repository.ingest("a", &Tar::default().file(".cvmfscatalog", b"").finish(), &[]);
    repository.assert_sound();
    let root = repository.catalog(repository.head().manifest.root_catalog);
    let nested: Vec<_> = root.nested().unwrap().into_iter().map(|n| n.path).collect();
    assert_eq!(nested, [b"/a".to_vec()]);
    let row = root.lookup(PathHash::of(b"/a")).unwrap().unwrap();
    assert!(row.flags.has(EntryFlags::NESTED_MOUNTPOINT));
    let below = repository.catalog(root.nested().unwrap()[0].hash);
    assert_eq!(below.nested().unwrap()[0].path, b"/a/b/inner");

    // the markers go again: everything returns to the root catalog, and a subdirectory becomes one meanwhile
    repository.ok("ingest", &["--delete", "/a/.cvmfscatalog"]);
    repository.assert_sound();
    assert_equal_trees(&plain, &repository.tree("/"));
    repository.ok("ingest", &["--delete", "/a/b/inner/.cvmfscatalog"]);
    repository.assert_sound();
    let root = repository.catalog(repository.head().manifest.root_catalog);
    assert!(root.nested().unwrap().is_empty());
    let mut expected = plain;
    expected.remove("/a/b/inner/.cvmfscatalog");
    assert_equal_trees(&expected, &repository.tree("/"));
    assert_equal_trees(&repository.oracle_tree("/"), &repository.tree("/"));
}

#[test]
fn owners_special_files_and_attributes_follow_the_options() {
    let repository = Repository::create(&[]);
    let long = (b"user.long".to_vec(), vec![b'x'; 256]);
    let capability =
        (b"security.capability".to_vec(), vec![1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let foreign = (b"trusted.overlay.redirect".to_vec(), b"/etc".to_vec());
    let xattrs = [long, capability, foreign];
    let file = Header { uid: 7, gid: 8, xattrs: &xattrs, ..Header::new(b"f", b'0', 0o4755) };
    let archive = Tar::default()
        .add(&file, b"x")
        .add(&Header { device: (8, 300_000), ..Header::new(b"disk", b'4', 0o660) }, b"")
        .add(&Header::new(b"pipe", b'6', 0o600), b"")
        .finish();
    repository.ingest("kept", &archive, &["--xattrs"]);
    repository.ingest("fixed", &archive, &["--owner", "1000:100", "--special-files", "skip"]);
    repository.assert_sound();
    let tree = repository.tree("/");
    assert_equal_trees(&repository.oracle_tree("/"), &tree);
    let kept = at(&tree, "/kept/f");
    assert_eq!((&kept["uid"], &kept["gid"], &kept["mode"]), (&json!(7), &json!(8), &json!("4755")));
    let names: Vec<_> = kept["xattrs"].as_object().unwrap().keys().collect();
    assert_eq!(names, ["security.capability"]);
    assert_eq!(at(&tree, "/kept/disk")["rdev"], "8:300000");
    let fixed = at(&tree, "/fixed/f");
    assert_eq!((&fixed["uid"], &fixed["gid"], fixed.get("xattrs")), (&json!(1000), &json!(100), None));
    assert!(!tree.contains_key("/fixed/disk") && !tree.contains_key("/fixed/pipe"));
}

#[test]
fn the_repository_remembers_its_algorithms_and_refuses_a_second_mkfs() {
    let repository = Repository::create(&[
        "--hash",
        "shake128",
        "--compression",
        "none",
        "--garbage-collectable",
        "--ttl",
        "60",
    ]);
    let first = repository.head().manifest;
    assert_eq!((first.revision, first.ttl, first.garbage_collectable), (1, 60, true));
    repository.ingest("x", &Tar::default().file("f", b"plain content").finish(), &["--tag", "v1"]);
    let manifest = repository.head().manifest;
    assert_eq!((manifest.revision, manifest.ttl, manifest.garbage_collectable), (2, 60, true));
    assert!(manifest.timestamp >= first.timestamp);
    let root = repository.catalog(manifest.root_catalog);
    assert_eq!((root.revision(), root.previous(), root.ttl()), (2, Some(first.root_catalog), 60));
    let file = root.lookup(PathHash::of(b"/x/f")).unwrap().unwrap();
    let name = cvmfs_format::ObjectName::new(file.hash.unwrap(), ObjectKind::File);
    assert!(name.path().ends_with("-shake128"));
    assert_eq!(repository.raw(&name.path()), b"plain content");

    let again = repository.run("mkfs", &[], b"");
    assert_eq!(again.status.code(), Some(2));
    let again = repository.run("ingest", &["--delete", "/x/f", "--tag", "v1"], b"");
    assert_eq!(again.status.code(), Some(2), "a used tag name was accepted");
    assert_eq!(repository.head().manifest, manifest);
}

/// Paths, types and link targets of the archive, unpacked with a directory as the root of the file system as engines
/// do it, in the form of [`listed`]; `None` if that fails.
fn unpacked_in_changed_root(archive: &[u8]) -> Option<Vec<String>> {
    const SCRIPT: &str = r#"
import io, os, stat, sys, tarfile
tarfile.TarFile.extraction_filter = staticmethod(lambda member, path: member)
archive = tarfile.open(fileobj=io.BytesIO(sys.stdin.buffer.read()))
"".encode("idna")  # codecs are loaded while their files can be found
os.chroot(sys.argv[1])
os.chdir("/")
archive.extractall("/", numeric_owner=True)
kinds = {stat.S_IFDIR: "dir", stat.S_IFREG: "file", stat.S_IFLNK: "symlink"}
for directory, names, files in os.walk("/"):
    for path in (os.path.join(directory, name) for name in names + files):
        kind = kinds[stat.S_IFMT(os.lstat(path).st_mode)]
        print("/x" + path, kind, os.readlink(path) if kind == "symlink" else "")
"#;
    let root = tempfile::tempdir().unwrap();
    let mut python = Command::new("/usr/bin/python3");
    python
        .args(["-c", SCRIPT])
        .arg(root.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut python = python.spawn().unwrap();
    python.stdin.take().unwrap().write_all(archive).unwrap();
    let output = python.wait_with_output().unwrap();
    let mut lines: Vec<String> =
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect();
    lines.sort();
    output.status.success().then_some(lines)
}

/// Paths, types and link targets below `/x`.
fn listed(tree: &Tree) -> Vec<String> {
    let line = |(path, entry): (&String, &Value)| {
        let target = entry["target"].as_str().unwrap_or_default();
        format!("{path} {} {target}", entry["type"].as_str().unwrap())
    };
    tree.iter().filter(|(path, _)| *path != "/x").map(line).collect()
}

/// Layers of real images have entries below links that they made before: `bin -> usr/bin`, then `bin/x`.
#[test]
fn entries_below_symbolic_links_go_where_an_engine_puts_them() {
    let usr = || Tar::default().dir("usr", 0o755).dir("usr/bin", 0o755).dir("run", 0o755).dir("var", 0o755);
    let link = |tar: Tar, name, target| tar.link(b'2', name, target);
    let chain = |length: usize| {
        (1..length).fold(link(usr(), "l0", "usr"), |tar, number| {
            tar.link(b'2', &format!("l{number}"), &format!("l{}", number - 1))
        })
    };
    let cases = [
        link(usr(), "bin", "usr/bin").file("bin/x", b"x").dir("bin/d", 0o755).file("bin/new/deep/x", b"x"),
        link(usr(), "var/run", "/run").file("var/run/x", b"x"),
        link(usr(), "var/run", "../../../run").file("var/run/x", b"x"),
        link(link(usr(), "bin", "usr/bin"), "bin/up", "/bin/../../usr").file("bin/up/x", b"x"),
        link(usr(), "bin", "usr/bin").file("bin/a", b"a").link(b'1', "hard", "bin/a").link(
            b'1',
            "bin/b",
            "usr/bin/a",
        ),
        link(usr(), "here", "./").file("here/here/x", b"x"),
        link(usr(), "var/run", "/missing").file("var/run/x", b"x"),
        link(usr(), "var/run", "/missing").file("var/run/deep/x", b"x"),
        link(usr().file("f", b"f"), "l", "f").file("l/x", b"x"),
        link(link(usr(), "a", "b"), "b", "a").file("a/x", b"x"),
        chain(40).file("l39/x", b"x"),
        chain(41).file("l40/x", b"x"),
    ];
    for (number, archive) in cases.into_iter().enumerate() {
        let archive = archive.finish();
        let repository = Repository::create(&[]);
        match unpacked_in_changed_root(&archive) {
            Some(expected) => {
                repository.ingest("x", &archive, &["--whiteouts", "overlay"]);
                repository.assert_sound();
                assert_eq!(listed(&repository.tree("/x")), expected, "case {number}");
            }
            None => {
                let message = repository.refuses(1, &archive, &[]);
                assert!(message.contains("lies below"), "case {number}: {message}");
            }
        }
    }
}

#[test]
fn links_that_the_repository_has_below_the_base_are_followed() {
    let repository = Repository::create(&[]);
    let base =
        Tar::default().dir("usr/bin", 0o755).link(b'2', "bin", "/usr/bin").link(b'2', "out", "../../y");
    repository.ingest("x", &base.finish(), &[]);
    repository.ingest("y", &Tar::default().file("f", b"f").finish(), &[]);
    let more = Tar::default().file("bin/tool", b"t").link(b'2', "lib", "usr/bin").file("lib/second", b"s");
    repository.ingest("x", &more.finish(), &[]);
    repository.assert_sound();
    let expected =
        ["/x/bin symlink /usr/bin", "/x/lib symlink usr/bin", "/x/out symlink ../../y", "/x/usr dir "];
    let below = ["/x/usr/bin dir ", "/x/usr/bin/second file ", "/x/usr/bin/tool file "];
    assert_eq!(listed(&repository.tree("/x")), [&expected[..], &below].concat());

    // What the archive replaced before, the repository has no more.
    let hidden = Tar::default().file(".wh.bin", b"").file("bin/tool", b"t").finish();
    repository.ingest("x", &hidden, &["--whiteouts", "overlay"]);
    assert_eq!(at(&repository.tree("/x"), "/x/bin/tool")["type"], "file");

    let output =
        repository.run("ingest", &["--base", "x", "--tar", "-"], &Tar::default().file("out/f", b"").finish());
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("out/f: lies below out, a symbolic link to ../../y, which is not"), "{message}");
}
