//! Which directories become nested catalogs.

use std::collections::BTreeMap;

use cvmfs_format::ContentHash;

use crate::support::{Repository, assert_equal_trees};
use crate::tar::Tar;

/// Mountpoints of all catalogs with the number of their own entries.
fn catalogs(repository: &Repository) -> BTreeMap<String, i64> {
    let mut found = BTreeMap::new();
    let mut waiting: Vec<(String, ContentHash)> =
        vec![(String::new(), repository.head().manifest.root_catalog)];
    while let Some((path, hash)) = waiting.pop() {
        let catalog = repository.catalog(hash);
        for nested in catalog.nested().unwrap() {
            waiting.push((String::from_utf8(nested.path).unwrap(), nested.hash));
        }
        found.insert(path, catalog.counters().unwrap().own.entries());
    }
    found
}

fn paths(repository: &Repository) -> Vec<String> {
    catalogs(repository).into_keys().filter(|path| !path.is_empty()).collect()
}

/// `directories` with `files` files in each, below `top`.
fn tree(top: &str, directories: u32, files: u32) -> Vec<u8> {
    let mut tar = Tar::default();
    for directory in 0..directories {
        for file in 0..files {
            tar =
                tar.file(&format!("{top}/d{directory:02}/f{file}"), &(directory * 1000 + file).to_le_bytes());
        }
    }
    tar.finish()
}

#[test]
fn the_dirtab_makes_nested_catalogs_of_old_and_new_directories() {
    let repository = Repository::create(&[]);
    repository.ingest("/", &tree("software/a", 2, 2), &[]);
    repository.ingest("/", &tree("software/b", 2, 2), &[]);
    assert_eq!(paths(&repository), Vec::<String>::new());
    let rules = b"# releases\n/software/*\n/software/*/d0?\n/data\n! *\\/d01\n";
    repository.ingest("/", &Tar::default().file(".cvmfsdirtab", rules).finish(), &[]);
    assert_eq!(paths(&repository), ["/software/a", "/software/a/d00", "/software/b", "/software/b/d00"]);
    repository.assert_sound();

    repository.ingest("/software", &tree("c", 1, 2), &[]);
    let all = [
        "/software/a",
        "/software/a/d00",
        "/software/b",
        "/software/b/d00",
        "/software/c",
        "/software/c/d00",
    ];
    assert_eq!(paths(&repository), all);
    // without rules the catalogs stay
    repository.ok("ingest", &["--delete", ".cvmfsdirtab"]);
    assert_eq!(paths(&repository), all);
    repository.assert_sound();
    assert_equal_trees(&repository.oracle_tree("/software"), &repository.tree("/software"));
}

#[test]
fn a_spoilt_dirtab_is_refused_with_its_line() {
    let repository = Repository::create(&[]);
    let bad = Tar::default().file(".cvmfsdirtab", b"/software\nsoftware/*\n").finish();
    let output = repository.run("ingest", &["--base", "/", "--tar", "-"], &bad);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("/.cvmfsdirtab: line 2 (software/*) does not begin with a slash"), "{message}");
    assert_eq!(repository.head().manifest.revision, 1);
}

#[test]
fn row_96_what_is_large_is_divided_when_it_comes_and_united_when_it_goes() {
    let repository = Repository::create(&[]);
    let limit = ["--catalog-entries", "200"];
    repository.ingest("/big", &tree("top", 12, 60), &limit);
    repository.assert_sound();
    for (path, entries) in catalogs(&repository) {
        assert!(entries <= 200, "{path} has {entries} entries");
    }
    assert!(paths(&repository).len() > 5, "{:?}", catalogs(&repository));
    let files = repository.tree("/big").values().filter(|entry| entry["type"] == "file").count();
    assert_eq!(files, 12 * 60 + 2 * paths(&repository).len(), "each catalog has two markers");
    assert_equal_trees(&repository.oracle_tree("/big"), &repository.tree("/big"));

    // the same again changes nothing
    let before = catalogs(&repository);
    repository.ingest("/big", &tree("top", 12, 60), &limit);
    assert_eq!(catalogs(&repository), before);

    // a directory that is emptied returns to the catalog above
    let gone = paths(&repository)[0].clone();
    let files: Vec<String> = (0..55).map(|file| format!("{gone}/f{file}")).collect();
    let delete: Vec<&str> =
        [&limit[..], &["--delete"], &files.iter().map(String::as_str).collect::<Vec<_>>()].concat();
    repository.ok("ingest", &delete);
    assert!(!paths(&repository).contains(&gone), "{gone} is still a catalog");
    assert!(!repository.tree(&gone).contains_key(&format!("{gone}/.cvmfsautocatalog")));
    repository.assert_sound();
}

#[test]
fn row_96_what_grows_bit_by_bit_is_divided_too_and_one_large_directory_is_no_obstacle() {
    let repository = Repository::create(&[]);
    let limit = ["--catalog-entries", "100"];
    for step in 0..6 {
        repository.ingest(&format!("/grows/part{step}"), &tree("x", 1, 40), &limit);
    }
    for (path, entries) in catalogs(&repository) {
        assert!(entries <= 100, "{path} has {entries} entries");
    }
    repository.ingest("/flat", &tree("x", 1, 300), &limit);
    repository.assert_sound();
    let all = catalogs(&repository);
    assert_eq!(all["/flat/x/d00"], 303, "{all:?}");
    assert!(all[""] <= 100, "{all:?}");
    assert_equal_trees(&repository.oracle_tree("/"), &repository.tree("/"));
}

#[test]
fn a_users_own_catalogs_are_left_as_they_are() {
    let repository = Repository::create(&[]);
    let mut tar = Tar::default().file("own/.cvmfscatalog", b"mine");
    for file in 0..30 {
        tar = tar.file(&format!("own/f{file}"), b"x");
    }
    repository.ingest("/", &tar.finish(), &["--catalog-entries", "20"]);
    assert_eq!(paths(&repository), ["/own"]);
    let tree = repository.tree("/own");
    assert_eq!(tree["/own/.cvmfscatalog"]["size"], 4);
    assert!(!tree.contains_key("/own/.cvmfsautocatalog"));
    repository.ok("ingest", &["--catalog-entries", "20", "--delete", "own/f1"]);
    assert_eq!(paths(&repository), ["/own"]);
    repository.assert_sound();
}
