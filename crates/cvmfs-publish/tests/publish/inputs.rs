//! What becomes of inputs of every sort: odd archives, several at once, settings of the C++ tools.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use testkit::Fixture;

use crate::support::{Repository, Tree, assert_equal_trees};
use crate::tar::Tar;

/// The published tree below `base`, by path from there.
fn below(repository: &Repository, base: &str) -> Tree {
    let relative = |path: &str| path[base.len()..].to_owned();
    let mut found = BTreeMap::new();
    for (path, mut entry) in repository.tree(&format!("{base}/")) {
        entry["path"] = relative(&path).into();
        if let Some(group) = entry.get("ino_group").and_then(|group| group.as_str()) {
            entry["ino_group"] = relative(group).into();
        }
        found.insert(relative(&path), entry);
    }
    found
}

/// Unpacks with GNU tar.
fn unpack(archive: &Path, to: &Path) -> std::process::Output {
    Command::new("tar")
        .args([
            "--extract",
            "--numeric-owner",
            "--same-owner",
            "--preserve-permissions",
            "--delay-directory-restore",
        ])
        .arg("--directory")
        .arg(to)
        .arg("--file")
        .arg(archive)
        .output()
        .unwrap()
}

#[test]
fn every_odd_archive_is_what_gnu_tar_makes_of_it_or_refused_by_name() {
    let fixture = Fixture::unpack("ingest-corner").unwrap();
    let archives = fixture.root().join("tarballs");
    // what GNU tar leaves out with a warning is refused here: nothing of it is published
    let refused = BTreeMap::from([("dotdot", ".."), ("hardlink_missing", "nonexistent")]);
    let repository = Repository::create(&[]);
    let mut count = 0;
    let mut names: Vec<String> = std::fs::read_dir(&archives)
        .unwrap()
        .map(|item| item.unwrap().file_name().into_string().unwrap().trim_end_matches(".tar").to_owned())
        .collect();
    names.sort();
    for name in names.iter().filter(|name| !name.starts_with("merge_")) {
        let file = archives.join(format!("{name}.tar"));
        let archive = std::fs::read(&file).unwrap();
        if let Some(reason) = refused.get(name.as_str()) {
            let message = repository.refuses(1, &archive, &[]);
            assert!(message.contains(reason), "{name}: {message}");
            continue;
        }
        let unpacked = tempfile::tempdir().unwrap();
        if name == "hardlink_forward" {
            // the link comes before its target, which GNU tar does not take
            repository.ingest("/forward", &archive, &[]);
            let tree = below(&repository, "/forward");
            assert_eq!((&tree["/a"]["nlink"], &tree["/b"]["ino_group"]), (&2.into(), &"/a".into()));
            continue;
        }
        let output = unpack(&file, unpacked.path());
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        let base = format!("/{name}/archive");
        repository.ingest(&base, &archive, &[]);
        let tree = format!("/{name}/tree");
        repository.ok("ingest", &["--base", &tree, "--tree", unpacked.path().to_str().unwrap()]);
        let (mut expected, mut found) = (below(&repository, &tree), below(&repository, &base));
        // GNU tar gives directories that the archive implies the time of unpacking
        for (path, entry) in &mut expected {
            if entry["type"] == "dir"
                && found.get(path).is_some_and(|other| other["mtime_ns"] != entry["mtime_ns"])
            {
                entry["mtime_ns"] = 0.into();
                found.get_mut(path).unwrap()["mtime_ns"] = 0.into();
            }
        }
        assert_equal_trees(&expected, &found);
        count += 1;
    }
    assert!(count > 18, "only {count} archives were compared");
    repository.assert_sound();
    assert_equal_trees(&repository.oracle_tree("/"), &repository.tree("/"));
}

#[test]
fn archives_onto_a_published_tree_give_what_unpacking_over_it_gives() {
    let fixture = Fixture::unpack("ingest-corner").unwrap();
    let archives = fixture.root().join("tarballs");
    let repository = Repository::create(&[]);
    let unpacked = tempfile::tempdir().unwrap();
    for name in ["merge_1", "merge_2", "merge_f2d", "merge_d2f", "merge_f2s", "merge_s2f"] {
        let file = archives.join(format!("{name}.tar"));
        let output = Command::new("tar")
            .args([
                "--extract",
                "--numeric-owner",
                "--same-owner",
                "--preserve-permissions",
                "--recursive-unlink",
            ])
            .arg("--directory")
            .arg(unpacked.path())
            .arg("--file")
            .arg(&file)
            .output()
            .unwrap();
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        repository.ingest("/merge", &std::fs::read(&file).unwrap(), &[]);
        repository.assert_sound();
    }
    repository.ok("ingest", &["--base", "/tree", "--tree", unpacked.path().to_str().unwrap()]);
    let kinds = |tree: Tree| -> Vec<(String, String)> {
        tree.into_iter()
            .map(|(path, entry)| (path, format!("{} {}", entry["type"], entry["sha256"])))
            .collect()
    };
    let (published, local) = (kinds(below(&repository, "/merge")), kinds(below(&repository, "/tree")));
    let paths = |list: &[(String, String)]| list.iter().map(|(path, _)| path.clone()).collect::<Vec<_>>();
    // `--recursive-unlink` empties directories that the archive has; a repository merges them
    for entry in &local {
        assert!(published.contains(entry), "{entry:?} is not among {published:?}");
    }
    assert!(paths(&published).len() >= paths(&local).len());
}

#[test]
fn several_archives_trees_and_deletions_become_one_revision() {
    let repository = Repository::create(&[]);
    repository.ingest("/old", &Tar::default().file("gone", b"1").file("stays", b"2").finish(), &[]);
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, content: &[u8]| {
        let path = directory.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let plain = write("a.tar", &Tar::default().file("x", b"first").file("only-a", b"a").finish());
    let packed = {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&Tar::default().file("x", b"second").finish()).unwrap();
        write("b.tar.gz", &gzip.finish().unwrap())
    };
    let zstd =
        write("c.tar.zst", &zstd::encode_all(&Tar::default().file("z", b"zstd").finish()[..], 3).unwrap());
    write("tree/t/f", b"from a tree");
    let tree = directory.path().join("tree").to_str().unwrap().to_owned();
    let report = repository.ok(
        "ingest",
        &[
            "--delete",
            "old/gone",
            "--json",
            "--catalog",
            "--base",
            "/one",
            "--tar",
            &plain,
            "--tar",
            &packed,
            "--base",
            "/two",
            "--tar",
            &zstd,
            "--tree",
            &tree,
        ],
    );
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["revision"], 3, "{report}");
    assert_eq!(repository.assert_sound().revision, 3);
    let tree = repository.tree("/");
    let size = |path: &str| tree.get(path).map(|entry| entry["size"].as_u64().unwrap());
    assert_eq!((size("/one/x"), size("/one/only-a"), size("/two/z")), (Some(6), Some(1), Some(4)));
    assert_eq!((size("/two/t/f"), size("/old/gone"), size("/old/stays")), (Some(11), None, Some(1)));
    assert!(tree.contains_key("/one/.cvmfscatalog") && tree.contains_key("/two/.cvmfscatalog"));
}

#[test]
fn the_settings_of_a_server_conf_count_unless_an_option_says_otherwise() {
    let directory = tempfile::tempdir().unwrap();
    let conf = directory.path().join("server.conf");
    std::fs::write(
        &conf,
        "CVMFS_IGNORE_SPECIAL_FILES=true\nCVMFS_INCLUDE_XATTRS=yes\nCVMFS_IGNORE_XDIR_HARDLINKS=false\n",
    )
    .unwrap();
    let conf = conf.to_str().unwrap();
    let tree = directory.path().join("tree");
    std::fs::create_dir_all(tree.join("a")).unwrap();
    std::fs::write(tree.join("a/f"), b"x").unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, tree.join("fifo"), rustix::fs::FileType::Fifo, 0o644.into(), 0)
        .unwrap();
    rustix::fs::lsetxattr(tree.join("a/f"), "user.colour", b"red", rustix::fs::XattrFlags::empty()).unwrap();
    let tree = tree.to_str().unwrap();
    let repository = Repository::create(&[]);
    let publish = |base: &str, options: &[&str]| {
        repository.run("ingest", &[&["--base", base, "--tree", tree][..], options].concat(), b"")
    };
    crate::support::expect_success(publish("/with", &["--server-conf", conf]));
    crate::support::expect_success(publish("/without", &[]));
    crate::support::expect_success(publish("/option", &["--server-conf", conf, "--special-files", "keep"]));
    let seen = repository.tree("/");
    let has = |path: &str| seen.contains_key(path);
    assert_eq!((has("/with/fifo"), has("/without/fifo"), has("/option/fifo")), (false, true, true));
    let colour = |path: &str| seen[path]["xattrs"].get("user.colour").is_some();
    assert!(colour("/with/a/f") && !colour("/without/a/f"));

    std::fs::create_dir(format!("{tree}/b")).unwrap();
    std::fs::hard_link(format!("{tree}/a/f"), format!("{tree}/b/f")).unwrap();
    let output = publish("/links", &["--server-conf", conf]);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("has a hard link in another directory"), "{message}");
    crate::support::expect_success(publish("/links", &["--server-conf", conf, "--xdir-hardlinks", "split"]));
    std::fs::write(directory.path().join("bad"), "CVMFS_INCLUDE_XATTRS=perhaps\n").unwrap();
    let bad = directory.path().join("bad");
    assert_eq!(publish("/bad", &["--server-conf", bad.to_str().unwrap()]).status.code(), Some(2));
    repository.assert_sound();
}
