//! What `check` finds, and what it does not mind.

use std::fs;

use cvmfs_format::letter::seal;
use cvmfs_format::signature::PrivateKey;
use cvmfs_format::{ContentHash, Deflate, HashAlgorithm, ObjectKind, ObjectName};
use cvmfs_publish::check::ProblemKind;
use testkit::Fixture;

use crate::round_trip::noise;
use crate::support::Repository;
use crate::tar::Tar;

fn check(repository: &Repository, options: &[&str]) -> (Option<i32>, serde_json::Value) {
    let output = repository.run("check", &[&["--json"], options].concat(), b"");
    (output.status.code(), serde_json::from_slice(&output.stdout).unwrap_or_default())
}

#[test]
fn row_100_one_missing_one_flipped_and_one_extra_object_are_named() {
    let repository = Repository::create(&[]);
    let archive = Tar::default()
        .file("a/missing", &noise(3000, 1))
        .file("b/flipped", &noise(300_000, 2))
        .file("c/good", b"good")
        .finish();
    repository.ingest("x", &archive, &["--chunk-size", "32K:64K:128K", "--catalog"]);
    assert_eq!(check(&repository, &[]).0, Some(0));

    let root = repository.catalog(repository.head().manifest.root_catalog);
    let catalog = repository.catalog(root.nested().unwrap()[0].hash);
    let entry = |path: &str| catalog.lookup(cvmfs_format::PathHash::of(path.as_bytes())).unwrap().unwrap();
    let missing = ObjectName::new(entry("/x/a/missing").hash.unwrap(), ObjectKind::File).path();
    let chunk = catalog.chunks_of(&entry("/x/b/flipped")).unwrap()[1];
    let flipped = ObjectName::new(chunk.hash, ObjectKind::Chunk).path();
    let extra = ObjectName::new(ContentHash::of(HashAlgorithm::Sha1, b"extra"), ObjectKind::File).path();
    fs::remove_file(repository.storage.join(&missing)).unwrap();
    let mut bytes = repository.raw(&flipped);
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(repository.storage.join(&flipped), bytes).unwrap();
    fs::write(repository.storage.join(&extra), b"extra").unwrap();

    let (code, report) = check(&repository, &[]);
    assert_eq!(code, Some(1));
    let found: Vec<(String, String, String)> = report["problems"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| [&p["kind"], &p["path"], &p["object"]].map(|v| v.as_str().unwrap().to_owned()).into())
        .collect();
    let expected = [("missing", "/x/a/missing", &missing), ("corrupt", "/x/b/flipped", &flipped)]
        .map(|(kind, path, object)| (kind.to_owned(), path.to_owned(), object.clone()));
    assert_eq!(found, expected);
    assert_eq!(report["unreferenced"], serde_json::json!([{"object": extra, "bytes": 5}]));

    // without reading contents the flipped bit stays unseen, the missing object does not
    let (code, report) = check(&repository, &["--no-contents", "--no-unreferenced"]);
    assert_eq!((code, &report["problem_count"]), (Some(1), &1.into()));
}

#[test]
fn the_repositories_of_the_cpp_tools_are_sound_and_the_broken_ones_are_not() {
    for (name, expected) in [
        ("basic-sha1", 0),
        ("shake128", 0),
        ("nocompress", 0),
        ("chunked", 0),
        ("chunked-shake128-none", 0),
        ("hardlinks", 0),
        ("special", 0),
        ("xattrs", 0),
        ("external", 0),
        ("volatile", 0),
        ("history", 0),
        ("history-gc", 0),
        ("ingested-layers", 0),
        ("ingest-corner", 1),
        ("bad-nested-missing", 1),
        ("bad-object-flip", 1),
        ("bad-object-missing", 1),
        ("bad-object-truncated", 1),
        ("bad-root-truncated", 1),
        ("bad-expired-whitelist", 3),
        ("bad-fqrn", 3),
        ("bad-manifest-sig", 3),
        ("bad-whitelist-fingerprint", 3),
        ("bad-whitelist-sig", 3),
        ("bad-wrong-key", 3),
    ] {
        let fixture = Fixture::unpack(name).unwrap();
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_cvmfs-publish"))
            .args(["check", &fixture.fqrn, "--tags", "--storage"])
            .arg(&fixture.storage)
            .arg("--public-key")
            .arg(&fixture.master_pub)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(expected), "{name}: {said}");
        if name.starts_with("bad-object") {
            assert!(
                said.contains("problem: /sizes/rnd100001: ") && said.contains("1 problem found"),
                "{name}: {said}"
            );
        }
        if name == "bad-nested-missing" {
            assert!(
                said.contains("problem: /software: ") && said.contains("1 problem found"),
                "{name}: {said}"
            );
        }
    }
}

/// Replaces the root catalog by one that `sql` has changed, properly hashed and signed.
fn mutate(repository: &Repository, sql: &str) {
    let old = repository.head().manifest;
    let stored = repository.raw(&ObjectName::new(old.root_catalog, ObjectKind::Catalog).path());
    let plain =
        cvmfs_format::compression::inflate(cvmfs_format::Compression::Zlib, &stored, 1 << 30).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), plain).unwrap();
    let connection = rusqlite::Connection::open(file.path()).unwrap();
    connection.execute_batch(sql).unwrap();
    drop(connection);
    let plain = fs::read(file.path()).unwrap();
    let stored = Deflate::Stock.compress(&plain);
    let root = ObjectName::new(ContentHash::of(HashAlgorithm::Sha1, &stored), ObjectKind::Catalog);
    fs::write(repository.storage.join(root.path()), stored).unwrap();
    let manifest = cvmfs_format::manifest::Manifest {
        root_catalog: root.hash,
        root_catalog_size: plain.len() as u64,
        history: None,
        reflog: None,
        ..old
    };
    fs::remove_file(repository.storage.join(".cvmfsreflog")).unwrap();
    let key = fs::read(repository.keys.join("test.example.org.key")).unwrap();
    let key = PrivateKey::from_pem(&key).unwrap();
    let letter = seal(manifest.to_text(), HashAlgorithm::Sha1, |text| key.sign_manifest(text)).unwrap();
    fs::write(repository.storage.join(".cvmfspublished"), letter).unwrap();
}

#[test]
fn every_kind_of_wrong_row_is_found() {
    let repository = Repository::create(&[]);
    let archive = Tar::default()
        .dir("d", 0o755)
        .file("d/f", &noise(1000, 5))
        .link(b'1', "d/g", "d/f")
        .file("big", &noise(300_000, 6))
        .link(b'2', "l", "d/f")
        .add(&crate::tar::Header::new(b"pipe", b'6', 0o644), b"")
        .finish();
    repository.ingest("x", &archive, &["--chunk-size", "32K:64K:128K"]);
    repository.ingest("nested", &Tar::default().file("f", b"x").finish(), &["--catalog"]);
    repository.assert_sound();
    let files = [".cvmfspublished", ".cvmfsreflog"].map(|name| (name, repository.raw(name)));
    for (sql, expected) in [
        ("UPDATE catalog SET hardlinks = 7 WHERE name = 'd'", "link count 7"),
        ("UPDATE catalog SET hardlinks = 0 WHERE name = 'l'", "link count 0"),
        ("UPDATE catalog SET size = size + 1 WHERE name = 'f'", "plain bytes"),
        ("UPDATE catalog SET size = size - 1 WHERE name = 'f'", "inflate"),
        ("UPDATE catalog SET name = 'other' WHERE name = 'pipe'", "path hash"),
        ("UPDATE catalog SET name = '..' WHERE name = 'pipe'", "impossible name"),
        ("UPDATE catalog SET flags = 4 WHERE name = 'l'", "flags"),
        ("UPDATE catalog SET hash = NULL WHERE name = 'f'", "neither a content hash nor chunks"),
        ("UPDATE catalog SET mode = mode + 1 WHERE name = 'g'", "hard link group"),
        (
            "UPDATE catalog SET hardlinks = (1 << 32) | 3 WHERE name IN ('f', 'g')",
            "hard link group 2 members",
        ),
        ("UPDATE catalog SET hardlinks = 2 WHERE name IN ('f', 'g')", "no hard link group"),
        ("UPDATE catalog SET size = 1 WHERE name = 'pipe'", "fifo"),
        ("UPDATE catalog SET parent_1 = 1 WHERE name = 'pipe'", "reachable"),
        ("UPDATE catalog SET xattr = x'02' WHERE name = 'l'", "attributes"),
        ("DELETE FROM chunks WHERE offset = 0", "chunk"),
        ("UPDATE statistics SET value = value + 1 WHERE counter = 'self_chunks'", "self_chunks"),
        ("UPDATE statistics SET value = value + 1 WHERE counter = 'subtree_dir'", "subtree_dir"),
        ("DELETE FROM statistics WHERE counter = 'self_special'", "self_special is missing"),
        ("UPDATE nested_catalogs SET size = 1", "its reference says 1"),
        ("DELETE FROM nested_catalogs", "none is registered"),
        ("UPDATE catalog SET flags = 1 WHERE name = 'nested'", "lacks the flag"),
        ("UPDATE catalog SET mtime = 5 WHERE name = 'nested'", "both catalogs"),
        ("UPDATE properties SET value = '99' WHERE key = 'revision'", "revision 99"),
        ("UPDATE catalog SET name = '.cvmfscatalog' WHERE name = 'pipe'", "no nested catalog"),
    ] {
        mutate(&repository, sql);
        let report = repository.check();
        let said: Vec<&str> = report.problems.iter().map(|p| p.message.as_str()).collect();
        assert!(said.iter().any(|message| message.contains(expected)), "{sql}: {said:#?}");
        assert!(report.problems.iter().all(|p| p.kind != ProblemKind::Reflog), "{said:#?}");
        for (name, content) in &files {
            fs::write(repository.storage.join(name), content).unwrap();
        }
    }
    repository.assert_sound();
}

#[test]
fn a_wrong_history_or_reflog_is_found() {
    let repository = Repository::create(&[]);
    let first = repository.raw(".cvmfsreflog");
    repository.ingest("x", &Tar::default().file("f", b"x").finish(), &[]);
    fs::write(repository.storage.join(".cvmfsreflog"), &first).unwrap();
    let report = repository.check();
    assert!(report.problems.iter().any(|p| p.kind == ProblemKind::Reflog), "{report:#?}");
    fs::remove_file(repository.storage.join(".cvmfsreflog")).unwrap();
    assert!(!repository.check().ok);
    // the next publish mends it
    repository.ingest("y", &Tar::default().file("f", b"x").finish(), &[]);
    repository.assert_sound();

    let history = repository.head().manifest.history.unwrap();
    fs::write(repository.storage.join(ObjectName::new(history, ObjectKind::History).path()), b"no").unwrap();
    let report = repository.check();
    assert_eq!(report.problems.len(), 1, "{report:#?}");
    assert_eq!(report.problems[0].kind, ProblemKind::Corrupt);
}

#[test]
fn a_part_is_checked_and_the_rest_is_not_read() {
    let repository = Repository::create(&[]);
    let archive = |seed: u32| {
        let noise = |n: u32| crate::round_trip::noise(3000, seed * 10 + n);
        Tar::default().file("x/one", &noise(1)).file("x/two", &noise(2)).file("y/three", &noise(3)).finish()
    };
    repository.ingest("/a", &archive(1), &["--catalog"]);
    repository.ingest("/a/x/deep", &archive(2), &["--catalog"]);
    repository.ingest("/b", &archive(3), &["--tag", "before"]);
    repository.ingest("/b/later", &archive(4), &["--chunk-size", "512:1K:2K"]);
    let objects = |options: &[&str]| {
        let (code, report) = check(&repository, options);
        assert_eq!((code, &report["ok"]), (Some(0), &true.into()), "{options:?}: {report}");
        report["objects"].as_u64().unwrap()
    };
    let whole = objects(&[]);
    assert_eq!(objects(&["--path", "/"]), whole);
    assert_eq!(objects(&["--path", "a/y"]), 1);
    assert_eq!(objects(&["--path", "/a/y/three"]), 1);
    // two files, three in the nested catalog, its empty marker
    assert_eq!(objects(&["--path", "/a/x"]), 6);
    assert_eq!(objects(&["--path", "/a/x/deep"]), 4);
    assert_eq!(repository.run("check", &["--path", "/a/none"], b"").status.code(), Some(5));
    let changed = objects(&["--since", "before"]);
    assert!(changed >= 6 && changed < whole, "{changed} of {whole}");
    assert_eq!(objects(&["--since", "before", "--path", "/a"]), 0);
    assert_eq!(objects(&["--since", "trunk"]), 0);

    // damage in one part is seen there only
    let hash = {
        let root = repository.catalog(repository.head().manifest.root_catalog);
        root.lookup(cvmfs_format::PathHash::of(b"/b/x/one")).unwrap().unwrap().hash.unwrap()
    };
    let name = cvmfs_format::ObjectName::new(hash, cvmfs_format::ObjectKind::File);
    std::fs::remove_file(repository.storage.join(name.path())).unwrap();
    assert_eq!(check(&repository, &[]).0, Some(1));
    let (code, report) = check(&repository, &["--path", "/b"]);
    assert_eq!((code, &report["problems"][0]["path"]), (Some(1), &"/b/x/one".into()), "{report}");
    objects(&["--path", "/a"]);
    objects(&["--since", "before"]);
}
