//! Repositories that the C++ tools made, continued by us.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;

use cvmfs_format::catalog::{Catalog, Entry};
use cvmfs_format::{ContentHash, ObjectKind};
use testkit::Fixture;

use crate::support::{Repository, assert_equal_trees};
use crate::tar::Tar;

pub fn take_over(name: &str) -> (Fixture, Repository) {
    let fixture = Fixture::unpack(name).unwrap();
    let keys = fixture.keys.clone().expect("the fixture has keys");
    for item in std::fs::read_dir(&keys).unwrap() {
        let owner_only = std::fs::Permissions::from_mode(0o400);
        std::fs::set_permissions(item.unwrap().path(), owner_only).unwrap();
    }
    let repository = Repository::at(&fixture.fqrn, &fixture.storage, &keys);
    (fixture, repository)
}

fn tarball(fixture: &Fixture, name: &str) -> Vec<u8> {
    std::fs::read(fixture.root().join("tarballs").join(name)).unwrap()
}

/// Rows of a catalog by their name below `base`, without what depends on the place.
fn rows(catalog: &Catalog, base: &str) -> BTreeMap<String, Entry> {
    let mut rows = BTreeMap::new();
    let mut waiting = vec![base.as_bytes().to_vec()];
    while let Some(directory) = waiting.pop() {
        for entry in catalog.list_all(cvmfs_format::PathHash::of(&directory)).unwrap() {
            let path = [directory.as_slice(), b"/", &entry.name].concat();
            if entry.is_directory() {
                waiting.push(path.clone());
            }
            let name = String::from_utf8(path[base.len()..].to_vec()).unwrap();
            let place = cvmfs_format::PathHash::NULL;
            rows.insert(name, Entry { rowid: 0, path_hash: place, parent: place, ..entry });
        }
    }
    rows
}

#[test]
fn the_same_archive_gives_the_rows_counters_and_objects_of_the_cpp_ingest() {
    let (fixture, repository) = take_over("ingested-layers");
    let before = repository.head().manifest;
    let known: Vec<_> = list(&repository);
    repository.ingest("ours", &tarball(&fixture, "layer1.tar"), &["--catalog", "--owner", "keep"]);
    repository.assert_sound();

    let head = repository.head().manifest;
    assert_eq!(head.revision, before.revision + 1);
    let root = repository.catalog(head.root_catalog);
    let ours = repository.catalog(root.nested_at(b"/ours").unwrap().unwrap().hash);
    // the C++ publisher put the same archive below keep/ in the root catalog, and as a nested catalog elsewhere
    let (mut expected, mut found) = (rows(&root, "/keep/layer1"), rows(&ours, "/ours"));
    found.remove("/.cvmfscatalog").expect("our nested catalog has its marker");
    // the fixture's last step was `ingest -d keep/layer1/etc/deleteme`
    found.remove("/etc/deleteme").expect("the archive has it");
    assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>());
    for (name, theirs) in &mut expected {
        let ours = found.get_mut(name).unwrap();
        // hard links within a directory are kept, where the C++ ingest breaks them up
        if ["/bin/sh", "/bin/bash"].contains(&name.as_str()) {
            assert_eq!(ours.link_count, 2, "{name}");
            (ours.link_group, ours.link_count) = (0, 1);
        }
        // directories without an entry of their own: the C++ ingest takes the time of the publish and owner -1
        if theirs.uid == u32::MAX {
            assert!(
                ours.is_directory() && (ours.uid, ours.gid, ours.mtime) == (0, 0, 1_600_000_000),
                "{name}"
            );
            (theirs.uid, theirs.gid, theirs.mtime) = (0, 0, ours.mtime);
        }
        // the size of a symlink is its target's length; the C++ ingest stores 0
        if !theirs.symlink.is_empty() {
            assert_eq!(ours.size as usize, ours.symlink.len(), "{name}");
            theirs.size = ours.size;
        }
    }
    assert_eq!(expected, found);

    // their nested catalog of the same archive has the same statistics
    let layers = root.nested().unwrap().into_iter().find(|n| n.path == b"/.layers/35").unwrap();
    let theirs = repository.catalog(layers.hash);
    let theirs = repository.catalog(theirs.nested().unwrap()[0].hash);
    assert_eq!(ours.counters().unwrap(), theirs.counters().unwrap());
    assert_eq!(ours.schema(), theirs.schema());

    // equal deflate, hence no new file objects: only catalogs and the history
    let new: Vec<String> = list(&repository).into_iter().filter(|name| !known.contains(name)).collect();
    assert!(new.iter().all(|name| name.ends_with('C') || name.ends_with('H')), "{new:?}");
}

fn list(repository: &Repository) -> Vec<String> {
    let mut names = Vec::new();
    repository.open_storage().list_objects(&mut |object| names.push(object.path)).unwrap();
    names
}

#[test]
fn old_content_stays_as_it_is_and_the_history_goes_on() {
    for name in ["basic-sha1", "history"] {
        let (_fixture, repository) = take_over(name);
        let before = repository.tree("/");
        let old = repository.head().manifest;
        repository.ingest(
            "ours/place",
            &crate::tar::Tar::default().file("f", b"x").finish(),
            &["--tag", "ours"],
        );
        repository.assert_sound();
        let mut after = repository.tree("/");
        after.retain(|path, _| !path.starts_with("/ours"));
        // the root has one sub-directory more
        let mut before = before;
        before.get_mut("/").unwrap()["nlink"] = after["/"]["nlink"].clone();
        assert_equal_trees(&before, &after);
        // the other reader expands variables in symlinks
        let plain = |mut tree: crate::support::Tree| {
            tree.retain(|path, _| !path.starts_with("/links/var"));
            tree
        };
        assert_equal_trees(&plain(repository.oracle_tree("/")), &plain(repository.tree("/")));

        let manifest = repository.head().manifest;
        let history = tags(&repository, manifest.history.unwrap());
        let (root, size) = (manifest.root_catalog, manifest.root_catalog_size);
        let row = |revision, root: ContentHash, size, text: &str| (revision, root, size, text.to_owned());
        assert_eq!(history["trunk"], row(manifest.revision, root, size, "current HEAD"));
        assert_eq!(
            history["trunk-previous"],
            row(old.revision, old.root_catalog, old.root_catalog_size, "default undo target")
        );
        assert_eq!(history["ours"], row(manifest.revision, root, size, ""));
        assert_eq!(manifest.metainfo, old.metainfo);
        assert_eq!((manifest.garbage_collectable, manifest.ttl), (old.garbage_collectable, old.ttl));
        let reflog = repository.raw(".cvmfsreflog");
        assert_eq!(manifest.reflog, Some(ContentHash::of(root.algorithm, &reflog)));
        let catalog = repository.catalog(root);
        assert_eq!(catalog.previous(), Some(old.root_catalog));
    }
}

type Tag = (u64, ContentHash, u64, String);

fn tags(repository: &Repository, hash: ContentHash) -> BTreeMap<String, Tag> {
    use cvmfs_format::{Compression, ObjectName, compression::inflate, history::History};
    let stored = repository.raw(&ObjectName::new(hash, ObjectKind::History).path());
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), inflate(Compression::Zlib, &stored, 1 << 30).unwrap()).unwrap();
    let tags = History::open(file.path()).unwrap().tags().unwrap();
    tags.into_iter()
        .map(|tag| (tag.name, (tag.revision, tag.root_catalog, tag.root_catalog_size, tag.description)))
        .collect()
}

#[test]
fn nanoseconds_are_recorded_where_the_server_conf_wants_them() {
    use std::time::{Duration, UNIX_EPOCH};
    let (_fixture, repository) = take_over("basic-sha1");
    let directory = tempfile::tempdir().unwrap();
    let (tree, conf) = (directory.path().join("tree"), directory.path().join("server.conf"));
    std::fs::create_dir(&tree).unwrap();
    let file = std::fs::File::create(tree.join("f")).unwrap();
    file.set_modified(UNIX_EPOCH + Duration::new(1_600_000_000, 123_456_789)).unwrap();
    std::fs::write(&conf, "CVMFS_ENABLE_MTIME_NS=true\n").unwrap();
    let (tree, conf) = (tree.to_str().unwrap(), conf.to_str().unwrap());
    repository.ok("ingest", &["--base", "/without", "--tree", tree]);
    repository.ok("ingest", &["--base", "/with", "--tree", tree, "--server-conf", conf]);
    let seen = repository.tree("/");
    assert_eq!(seen["/without/f"]["mtime_ns"], 1_600_000_000_000_000_000_i64);
    assert_eq!(seen["/with/f"]["mtime_ns"], 1_600_000_000_123_456_789_i64);
}

#[test]
fn the_lifetime_of_a_server_conf_holds_from_the_next_revision_on() {
    let (_fixture, repository) = take_over("basic-sha1");
    let directory = tempfile::tempdir().unwrap();
    let conf = directory.path().join("server.conf");
    std::fs::write(&conf, "CVMFS_REPOSITORY_TTL=1234\n").unwrap();
    let before = repository.head().manifest.ttl;
    let archive = Tar::default().file("f", b"1").finish();
    repository.ingest("/a", &archive, &[]);
    assert_eq!(repository.head().manifest.ttl, before);
    repository.ingest("/b", &archive, &["--server-conf", conf.to_str().unwrap()]);
    assert_eq!(repository.head().manifest.ttl, 1234);
    let root = repository.head().manifest.root_catalog;
    assert_eq!(repository.catalog(root).ttl(), 1234);
    // What was set stays, and takes part in everything else.
    repository.ingest("/c", &archive, &[]);
    assert_eq!(repository.head().manifest.ttl, 1234);
    repository.assert_sound();
}
