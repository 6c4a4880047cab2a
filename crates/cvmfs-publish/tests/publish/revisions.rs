//! Tags, rollback, renewed signatures, information, the server.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};

use cvmfs_publish::{NewRepository, Publisher, create_repository, system_clock};
use serde_json::Value;

use crate::support::{Repository, assert_equal_trees, expect_success};
use crate::tar::Tar;

/// A verb with a sub-command, such as `tag add`.
fn tag(repository: &Repository, verb: &str, name: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_cvmfs-publish"))
        .args(["tag", verb, &repository.fqrn, "--json", "--storage"])
        .arg(&repository.storage)
        .arg("--keys")
        .arg(&repository.keys)
        .args(name)
        .output()
        .unwrap()
}

fn names(repository: &Repository) -> Vec<(String, u64)> {
    let listed: Value = serde_json::from_str(&expect_success(tag(repository, "list", &[]))).unwrap();
    let entry = |tag: &Value| (tag["name"].as_str().unwrap().to_owned(), tag["revision"].as_u64().unwrap());
    let mut names: Vec<_> = listed.as_array().unwrap().iter().map(entry).collect();
    names.sort();
    names
}

fn owned(names: &[(&str, u64)]) -> Vec<(String, u64)> {
    names.iter().map(|(name, revision)| ((*name).to_owned(), *revision)).collect()
}

#[test]
fn the_description_of_a_tag_can_be_changed() {
    let repository = Repository::create(&[]);
    repository.ok_tag("add", "v1");
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_cvmfs-publish"));
    command.args(["tag", "annotate", &repository.fqrn, "v1", "--description", "the first one", "--storage"]);
    command.arg(&repository.storage).arg("--keys").arg(&repository.keys);
    crate::support::expect_success(command.output().unwrap());
    let info: Value = serde_json::from_str(&repository.ok("info", &["--json"])).unwrap();
    let tags = info["tags"].as_array().unwrap();
    let tag = tags.iter().find(|tag| tag["name"] == "v1").unwrap();
    assert_eq!((&tag["description"], &tag["revision"]), (&"the first one".into(), &1.into()));
    assert_eq!(info["revision"], 1);
    repository.assert_sound();
}

#[test]
fn tags_are_added_listed_and_removed_without_a_new_revision() {
    let repository = Repository::create(&[]);
    repository.ingest("x", &Tar::default().file("f", b"1").finish(), &["--tag", "one"]);
    expect_success(tag(&repository, "add", &["by-hand", "--description", "what it is"]));
    let expected = [("by-hand", 2), ("one", 2), ("trunk", 2), ("trunk-previous", 1)];
    assert_eq!(names(&repository), owned(&expected));
    repository.assert_sound();
    assert_eq!(tag(&repository, "add", &["by-hand"]).status.code(), Some(2));
    assert_eq!(tag(&repository, "add", &["trunk"]).status.code(), Some(2));
    assert_eq!(tag(&repository, "remove", &["nothing"]).status.code(), Some(5));
    expect_success(tag(&repository, "remove", &["one"]));
    assert_eq!(names(&repository), owned(&[("by-hand", 2), ("trunk", 2), ("trunk-previous", 1)]));
    assert_eq!(repository.assert_sound().revision, 2);
}

#[test]
fn a_rollback_publishes_the_old_tree_as_a_new_revision() {
    let repository = Repository::create(&[]);
    repository.ingest("x", &Tar::default().file("f", b"1").finish(), &["--tag", "one"]);
    let one = repository.tree("/");
    repository.ingest("x", &Tar::default().file("f", b"2").finish(), &["--tag", "two", "--catalog"]);
    let two = repository.tree("/");
    repository.ingest("y", &Tar::default().file("f", b"3").finish(), &["--tag", "three"]);
    let replaced = repository.head().manifest.root_catalog;

    repository.ok("rollback", &[]);
    assert_eq!(repository.assert_sound().revision, 5);
    assert_equal_trees(&two, &repository.tree("/"));
    let root = repository.catalog(repository.head().manifest.root_catalog);
    assert_eq!((root.revision(), root.previous()), (5, Some(replaced)));
    // only one level: there is no trunk-previous until the next publish
    assert_eq!(repository.run("rollback", &[], b"").status.code(), Some(5));

    repository.ok("rollback", &["--tag", "one"]);
    assert_eq!(repository.assert_sound().revision, 6);
    assert_equal_trees(&one, &repository.tree("/"));
    assert_equal_trees(&repository.oracle_tree("/"), &repository.tree("/"));
    assert_eq!(names(&repository), owned(&[("one", 6), ("trunk", 6)]));
    repository.ingest("z", &Tar::default().file("f", b"4").finish(), &[]);
    assert_eq!(names(&repository), owned(&[("one", 6), ("trunk", 7), ("trunk-previous", 6)]));
    repository.assert_sound();
}

#[test]
fn row_99_a_rollback_to_a_revision_that_lost_objects_is_refused_with_a_list() {
    let repository = Repository::create(&[]);
    for seed in 1..4 {
        let archive =
            Tar::default().file("f", &crate::round_trip::noise(5000, seed)).file("same", b"s").finish();
        repository.ingest("/d", &archive, &["--catalog", "--tag", &format!("v{seed}")]);
    }
    let hash = {
        let info: Value = serde_json::from_str(&repository.ok("info", &["--json"])).unwrap();
        let tag = info["tags"].as_array().unwrap().iter().find(|tag| tag["name"] == "v1").unwrap().clone();
        let root = repository.catalog(tag["root_hash"].as_str().unwrap().parse().unwrap());
        let nested = repository.catalog(root.nested_at(b"/d").unwrap().unwrap().hash);
        nested.lookup(cvmfs_format::PathHash::of(b"/d/f")).unwrap().unwrap().hash.unwrap()
    };
    let object = cvmfs_format::ObjectName::new(hash, cvmfs_format::ObjectKind::File).path();
    std::fs::remove_file(repository.storage.join(&object)).unwrap();
    let before = repository.head().manifest;
    let output = repository.run("rollback", &["--tag", "v1"], b"");
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("/d/f: the object is missing") && message.contains(&object), "{message}");
    assert_eq!(repository.head().manifest, before);
    repository.ok("rollback", &["--tag", "v2"]);
}

fn sixty_days_ago() -> i64 {
    system_clock() - 60 * 24 * 3600
}

#[test]
fn row_97_an_expired_whitelist_stops_publishing_until_it_is_renewed() {
    let directory = tempfile::tempdir().unwrap();
    let (storage, keys) = (directory.path().join("storage"), directory.path().join("keys"));
    let new = NewRepository::new("test.example.org", storage.to_str().unwrap(), &keys);
    create_repository(&NewRepository { clock: sixty_days_ago, ..new }).unwrap();
    let repository = Repository::at("test.example.org", &storage, &keys);
    let archive = Tar::default().file("f", b"x").finish();
    let output = repository.run("ingest", &["--base", "x", "--tar", "-"], &archive);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3));
    assert!(message.contains("expired on") && message.contains("cvmfs-publish resign"), "{message}");
    assert_eq!(repository.run("check", &[], b"").status.code(), Some(3));
    let info: Value = serde_json::from_str(&repository.ok("info", &["--json"])).unwrap();
    assert_eq!(info["whitelist_valid"], false);

    repository.ok("resign", &["--days", "3"]);
    let output = repository.run("ingest", &["--base", "x", "--tar", "-"], &archive);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && message.contains("expires on"), "no warning of the expiry: {message}");
    repository.assert_sound();
    assert!(!repository.oracle_tree("/x").is_empty());
}

fn whitelist_expiry(repository: &Repository) -> i64 {
    let info: Value = serde_json::from_str(&repository.ok("info", &["--json"])).unwrap();
    info["whitelist_expires"].as_i64().unwrap()
}

#[test]
fn a_whitelist_is_renewed_when_little_is_left_and_by_the_daemon_without_being_asked() {
    let repository = Repository::create(&["--whitelist-days", "20"]);
    let before = repository.raw(".cvmfswhitelist");
    assert!(repository.ok("resign", &["--when-left", "7d"]).contains("still valid until"));
    assert_eq!(repository.raw(".cvmfswhitelist"), before);
    repository.ok("resign", &["--when-left", "21d", "--days", "5"]);
    assert!(whitelist_expiry(&repository) < system_clock() + 6 * 24 * 3600);

    let options = ["--daemon", "--days", "40", "--when-left", "6d", "--interval", "1s", "--json"];
    let mut daemon = repository.command("resign", &options).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(daemon.stdout.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    let first: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(first["renewed"], true);
    assert!(whitelist_expiry(&repository) > system_clock() + 38 * 24 * 3600);
    // somebody shortens it: the daemon renews it again
    repository.ok("resign", &["--days", "2"]);
    line.clear();
    said.read_line(&mut line).unwrap();
    assert!(line.contains(r#""renewed":true"#), "{line}");
    assert!(whitelist_expiry(&repository) > system_clock() + 38 * 24 * 3600);
    rustix::process::kill_process(rustix::process::Pid::from_child(&daemon), rustix::process::Signal::TERM)
        .unwrap();
    assert!(daemon.wait().unwrap().success());
    repository.assert_sound();
}

#[test]
fn a_new_release_key_is_put_on_the_whitelist_and_signs_the_manifest() {
    let repository = Repository::create(&["--hash", "rmd160"]);
    let other = Repository::create(&[]);
    for kind in ["key", "crt"] {
        let file = format!("test.example.org.{kind}");
        std::fs::remove_file(repository.keys.join(&file)).unwrap();
        std::fs::copy(other.keys.join(&file), repository.keys.join(&file)).unwrap();
    }
    let before = repository.head().manifest;
    assert!(
        Publisher::open(&repository.fqrn, repository.storage.to_str().unwrap(), &repository.keys).is_err()
    );
    repository.ok("resign", &[]);
    let after = repository.head().manifest;
    assert_ne!(after.certificate, before.certificate);
    assert_eq!((after.revision, after.root_catalog), (before.revision, before.root_catalog));
    repository.assert_sound();
    repository.ingest("x", &Tar::default().file("f", b"x").finish(), &[]);
    assert!(!repository.oracle_tree("/x").is_empty());
    // and a whitelist that got lost comes back
    std::fs::remove_file(repository.storage.join(".cvmfswhitelist")).unwrap();
    repository.ok("resign", &[]);
    repository.assert_sound();
}

#[test]
fn info_tells_what_the_repository_is() {
    let repository =
        Repository::create(&["--hash", "shake128", "--compression", "none", "--garbage-collectable"]);
    repository.ingest("a/b", &Tar::default().file("f", b"12345").dir("d", 0o755).finish(), &["--catalog"]);
    let info: Value = serde_json::from_str(&repository.ok("info", &["--json"])).unwrap();
    for (key, value) in [
        ("revision", Value::from(2)),
        ("hash", "shake128".into()),
        ("compression", "none".into()),
        ("deflate", "fast".into()),
        ("garbage_collectable", true.into()),
        ("whitelist_valid", true.into()),
        ("catalogs", 2.into()),
        ("file_bytes", 5.into()),
        // the root, a, b, d, f and the marker
        ("entries", 6.into()),
    ] {
        assert_eq!(info[key], value, "{key}");
    }
    assert!(repository.ok("info", &[]).contains("whitelist valid until 20"));
}

#[test]
fn the_server_says_where_it_listens_and_logs_requests() {
    let repository = Repository::create(&[]);
    let mut server = Command::new(env!("CARGO_BIN_EXE_cvmfs-publish"))
        .args(["serve", "--listen", "127.0.0.1:0"])
        .arg(&repository.storage)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(server.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let address =
        line.trim().strip_prefix("listening on http://").unwrap_or_else(|| panic!("{line:?}")).to_owned();
    let mut stream = TcpStream::connect(&address).unwrap();
    let request = "GET /.cvmfspublished HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert!(answer.ends_with(&repository.raw(".cvmfspublished")));
    let mut line = String::new();
    BufReader::new(server.stderr.take().unwrap()).read_line(&mut line).unwrap();
    let logged: Value = serde_json::from_str(&line).unwrap();
    assert_eq!((&logged["path"], &logged["status"]), (&"/.cvmfspublished".into(), &200.into()));
    rustix::process::kill_process(rustix::process::Pid::from_child(&server), rustix::process::Signal::TERM)
        .unwrap();
    assert!(server.wait().unwrap().success());
}

#[test]
fn mkfs_resign_and_info_agree_until_when_the_whitelist_is_valid() {
    let directory = tempfile::tempdir().unwrap();
    let (storage, keys) = (directory.path().join("storage"), directory.path().join("keys"));
    let repository = Repository::at("test.example.org", &storage, &keys);
    let expires = |verb: &str| {
        let report: serde_json::Value = serde_json::from_str(&repository.ok(verb, &["--json"])).unwrap();
        report["whitelist_expires"].as_i64().unwrap()
    };
    assert_eq!(expires("mkfs"), expires("info"));
    assert_eq!(expires("resign"), expires("info"));
}
