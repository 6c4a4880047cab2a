//! Differences between revisions.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::round_trip::noise;
use crate::support::Repository;
use crate::tar::Tar;

fn changes(repository: &Repository, options: &[&str]) -> Vec<(String, String, String)> {
    let document: Value =
        serde_json::from_str(&repository.ok("diff", &[options, &["--json"]].concat())).unwrap();
    let list = document["changes"].as_array().unwrap();
    assert_eq!(document["count"].as_u64().unwrap() as usize, list.len());
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let one = |change: &Value| {
        let what: Vec<String> = change["what"].as_array().into_iter().flatten().map(text).collect();
        (text(&change["change"]), text(&change["path"]), what.join(" "))
    };
    list.iter().map(one).collect()
}

#[test]
fn every_difference_is_listed_once_in_the_order_of_paths() {
    let repository = Repository::create(&[]);
    let first = Tar::default()
        .file("same", b"same")
        .file("content", b"old")
        .file("gone", b"x")
        .dir("tree", 0o755)
        .file("tree/a", b"a")
        .file("turns", b"file")
        .link(b'2', "link", "here")
        .file("large", &noise(60_000, 1))
        .finish();
    repository.ingest("x", &first, &["--catalog", "--chunk-size", "8K:16K:32K", "--tag", "first"]);
    let second = Tar::default()
        .file("content", b"new!")
        .dir("turns", 0o755)
        .file("turns/into", b"directory")
        .link(b'2', "link", "there")
        .file("large", &noise(60_000, 2))
        .file("added", b"y")
        .finish();
    let options = ["--chunk-size", "8K:16K:32K", "--delete", "x/gone", "x/tree", "x/turns"];
    repository.ingest("x", &second, &options);

    let found = changes(&repository, &["--from", "first"]);
    let names: Vec<(&str, &str)> =
        found.iter().map(|(kind, path, _)| (kind.as_str(), path.as_str())).collect();
    let expected = [
        ("added", "/x/added"),
        ("modified", "/x/content"),
        ("removed", "/x/gone"),
        ("modified", "/x/large"),
        ("modified", "/x/link"),
        ("removed", "/x/tree"),
        ("removed", "/x/tree/a"),
        ("removed", "/x/turns"),
        ("added", "/x/turns"),
        ("added", "/x/turns/into"),
    ];
    assert_eq!(names, expected, "{found:?}");
    let what = |path: &str| found.iter().find(|change| change.1 == path).unwrap().2.clone();
    assert!(what("/x/content").split(' ').any(|word| word == "content"));
    assert!(what("/x/large").split(' ').any(|word| word == "content"));
    assert_eq!(what("/x/link"), "target");
    // the default is what the last publish changed, and the way back is the same list the other way round
    assert_eq!(changes(&repository, &[]), found);
    let back: BTreeSet<String> = changes(&repository, &["--from", "trunk", "--to", "first"])
        .into_iter()
        .map(|change| change.1)
        .collect();
    assert_eq!(back, found.into_iter().map(|change| change.1).collect());
    assert_eq!(changes(&repository, &["--from", "trunk"]), []);
}

#[test]
fn a_nested_catalog_that_did_not_change_is_not_opened() {
    let repository = Repository::create(&[]);
    repository.ingest("stays", &Tar::default().file("f", b"1").finish(), &["--catalog"]);
    repository.ingest("comes", &Tar::default().file("f", b"2").finish(), &["--catalog"]);
    let root = repository.catalog(repository.head().manifest.root_catalog);
    let nested = root.nested_at(b"/stays").unwrap().unwrap().hash;
    let name = cvmfs_format::ObjectName::new(nested, cvmfs_format::ObjectKind::Catalog);
    std::fs::remove_file(repository.storage.join(name.path())).unwrap();
    let found: Vec<String> = changes(&repository, &[]).into_iter().map(|change| change.1).collect();
    assert_eq!(found, ["/comes", "/comes/.cvmfscatalog", "/comes/f"]);
}

#[test]
fn an_unknown_revision_is_named() {
    let repository = Repository::create(&[]);
    let output = repository.run("diff", &["--from", "nothing"], b"");
    assert_eq!(output.status.code(), Some(5));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no revision \"nothing\""));
}
