//! Histories and reflogs written here are those the C++ tools would have written.

use std::path::Path;

use cvmfs_format::history::{History, HistoryError, Tag};
use cvmfs_format::reflog::{ReferenceKind, Reflog, ReflogError};
use cvmfs_format::{ContentHash, HashAlgorithm, ObjectKind};
use rusqlite::Connection;
use rusqlite::types::Value;

use crate::common::Fixture;
use crate::writing::{assert_self_contained, layout, rows};

fn hash(text: &str) -> ContentHash {
    ContentHash::of(HashAlgorithm::Shake128, text.as_bytes())
}

fn tag(name: &str, revision: u64) -> Tag {
    Tag {
        name: name.to_owned(),
        root_catalog: hash(&revision.to_string()),
        root_catalog_size: 1000 + revision,
        revision,
        timestamp: 1_700_000_000 + revision as i64,
        description: format!("made by {name}"),
        branch: String::new(),
    }
}

fn names(history: &History) -> Vec<(String, u64)> {
    let mut names: Vec<_> = history.tags().unwrap().into_iter().map(|tag| (tag.name, tag.revision)).collect();
    names.sort();
    names
}

#[test]
fn fresh_databases_have_the_layout_of_the_cpp_tools() {
    let fixture = Fixture::unpack("basic-sha1");
    let reference = fixture.database(fixture.manifest().history.unwrap(), ObjectKind::History);
    let path = fixture.root.join("history");
    History::create(&path, &fixture.fqrn).unwrap().finish(Some(hash("previous"))).unwrap();
    assert_eq!(layout(&path), layout(&reference));
    let keys = "SELECT key, typeof(value) FROM properties ORDER BY key";
    assert_eq!(rows(&path, keys), rows(&reference, keys));
    assert_eq!(rows(&path, "SELECT * FROM branches"), rows(&reference, "SELECT * FROM branches"));
    assert_self_contained(&path);

    let reference = fixture.storage.join(".cvmfsreflog");
    let path = fixture.root.join("reflog");
    let mut reflog = Reflog::create(&path, &fixture.fqrn).unwrap();
    for entry in Reflog::open(&reference).unwrap().references().unwrap() {
        reflog.add(entry.kind, entry.hash, entry.timestamp).unwrap();
    }
    reflog.finish().unwrap();
    assert_eq!(layout(&path), layout(&reference));
    for sql in ["SELECT * FROM refs ORDER BY hash", "SELECT * FROM properties ORDER BY key"] {
        assert_eq!(rows(&path, sql), rows(&reference, sql));
    }
    assert_self_contained(&path);
}

#[test]
fn a_history_of_the_cpp_tools_is_rewritten_value_by_value() {
    let fixture = Fixture::unpack("history");
    let original = fixture.database(fixture.manifest().history.unwrap(), ObjectKind::History);
    let old = History::open(&original).unwrap();
    let path = fixture.root.join("copy");
    let mut copy = History::create(&path, old.fqrn()).unwrap();
    for tag in old.tags().unwrap() {
        copy.insert(&tag).unwrap();
    }
    copy.finish(old.previous()).unwrap();
    for sql in ["SELECT * FROM tags ORDER BY name", "SELECT * FROM properties ORDER BY key"] {
        assert_eq!(rows(&path, sql), rows(&original, sql));
    }
}

#[test]
fn each_publish_rotates_trunk_and_a_rollback_forgets_what_was_newer() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("history");
    let mut history = History::create(&path, "a.example.org").unwrap();
    for revision in 1..=4 {
        let tag = tag(&format!("v{revision}"), revision);
        history.rotate_trunk(tag.root_catalog, tag.root_catalog_size, revision, tag.timestamp).unwrap();
        history.insert(&tag).unwrap();
        assert_eq!(
            history.tag("trunk-previous").unwrap().map(|tag| tag.revision),
            revision.checked_sub(1).filter(|r| *r > 0)
        );
    }
    history.finish(None).unwrap();
    let history = History::open(&path).unwrap();
    let trunk = history.tag("trunk").unwrap().unwrap();
    assert_eq!(
        (trunk.revision, trunk.description.as_str(), trunk.root_catalog),
        (4, "current HEAD", hash("4"))
    );
    let previous = history.tag("trunk-previous").unwrap().unwrap();
    assert_eq!(
        (previous.revision, previous.description.as_str(), previous.timestamp),
        (3, "default undo target", 1_700_000_003)
    );
    assert_eq!(history.tag_at(1_700_000_002).unwrap().unwrap().revision, 2);
    assert_eq!(history.previous(), None);
    assert_self_contained(&path);

    let mut history = History::open_for_writing(&path).unwrap();
    history.rollback("v2", hash("5"), 1005, 5, 1_700_000_005).unwrap();
    assert_eq!(names(&history), [("trunk".to_owned(), 5), ("v1".to_owned(), 1), ("v2".to_owned(), 5)]);
    assert_eq!(history.tag("v2").unwrap().unwrap().root_catalog, hash("5"));
    assert!(
        matches!(history.rollback("v9", hash("6"), 1, 6, 6), Err(HistoryError::Missing(name)) if name == "v9")
    );
    history.rotate_trunk(hash("6"), 1006, 6, 1_700_000_006).unwrap();
    assert_eq!(history.tag("trunk-previous").unwrap().unwrap().revision, 5);
    history.finish(Some(hash("first history"))).unwrap();
    assert_eq!(History::open(&path).unwrap().previous(), Some(hash("first history")));
}

#[test]
fn tags_that_exist_are_missing_or_have_unusable_names_are_errors() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("history");
    let mut history = History::create(&path, "a.example.org").unwrap();
    history.insert(&tag("v1", 1)).unwrap();
    assert!(matches!(history.insert(&tag("v1", 2)), Err(HistoryError::Exists(name)) if name == "v1"));
    history.replace(&tag("v1", 2)).unwrap();
    assert!(matches!(history.remove("v2"), Err(HistoryError::Missing(_))));
    for name in ["", "a b", "a\tb", "a/b", "a\0", &"x".repeat(256)] {
        assert!(matches!(history.insert(&tag(name, 1)), Err(HistoryError::BadName(_))), "{name:?}");
    }
    let huge = Tag { revision: 1 << 63, ..tag("v1", 1) };
    assert!(matches!(history.replace(&huge), Err(HistoryError::TooLarge(_))));
    let branched = Tag { branch: "other".to_owned(), ..tag("v3", 3) };
    assert!(matches!(history.insert(&branched), Err(HistoryError::NoBranch { .. })));
    history.finish(None).unwrap();
    let mut history = History::open(&path).unwrap();
    assert_eq!(names(&history), [("v1".to_owned(), 2)]);
    assert!(matches!(history.insert(&tag("v4", 4)), Err(HistoryError::ReadOnly)));
    assert!(matches!(history.remove("v1"), Err(HistoryError::ReadOnly)));
    assert!(matches!(history.finish(None), Err(HistoryError::ReadOnly)));
}

fn old_history(path: &Path, revision: u64) {
    let mut history = History::create(path, "a.example.org").unwrap();
    history.insert(&tag("v1", 1)).unwrap();
    history.finish(None).unwrap();
    let connection = Connection::open(path).unwrap();
    connection.execute_batch("PRAGMA foreign_keys = OFF").unwrap();
    let size = if revision < 1 { "" } else { "size INTEGER, " };
    let columns = if revision < 1 { "" } else { ", size" };
    connection
        .execute_batch(&format!(
            "CREATE TABLE old (name TEXT, hash TEXT, revision INTEGER, timestamp INTEGER, channel INTEGER, \
             description TEXT, {size}CONSTRAINT pk_tags PRIMARY KEY (name));
             INSERT INTO old SELECT name, hash, revision, timestamp, channel, description{columns} FROM tags;
             DROP TABLE tags; ALTER TABLE old RENAME TO tags; DROP TABLE branches;
             UPDATE properties SET value = '{revision}' WHERE key = 'schema_revision';"
        ))
        .unwrap();
    if revision < 2 {
        connection.execute_batch("DROP TABLE recycle_bin").unwrap();
    } else {
        connection.execute_batch("INSERT INTO recycle_bin VALUES ('x', 1)").unwrap();
    }
}

#[test]
fn histories_of_every_schema_revision_are_read_and_upgraded_on_writing() {
    for revision in 0..3 {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("history");
        old_history(&path, revision);
        let old = History::open(&path).unwrap();
        let size = if revision < 1 { 0 } else { 1001 };
        let expected = Tag { root_catalog_size: size, ..tag("v1", 1) };
        assert_eq!(old.tags().unwrap(), std::slice::from_ref(&expected), "revision {revision}");
        assert_eq!(old.tag_at(i64::MAX).unwrap(), Some(expected.clone()));
        let mut history = History::open_for_writing(&path).unwrap();
        history.insert(&tag("v2", 2)).unwrap();
        history.finish(None).unwrap();
        assert_self_contained(&path);
        let history = History::open(&path).unwrap();
        assert_eq!(history.tags().unwrap(), [tag("v2", 2), expected]);
        assert_eq!(history.tag_at(i64::MAX).unwrap().unwrap().name, "v2");
        assert_eq!(rows(&path, "SELECT COUNT(*) FROM recycle_bin"), [[Value::Integer(0)]]);
        assert_eq!(
            rows(&path, "SELECT value FROM properties WHERE key = 'schema_revision'"),
            [[Value::Text("3".into())]]
        );
    }
}

#[test]
fn a_damaged_tag_is_named() {
    let directory = tempfile::tempdir().unwrap();
    for change in ["hash = 'x'", "hash = NULL", "revision = -1", "timestamp = NULL", "name = x'ff'"] {
        let path = directory.path().join("history");
        let mut history = History::create(&path, "a.example.org").unwrap();
        history.insert(&tag("v1", 1)).unwrap();
        history.finish(None).unwrap();
        Connection::open(&path).unwrap().execute_batch(&format!("UPDATE tags SET {change}")).unwrap();
        let error = History::open(&path).unwrap().tags().unwrap_err();
        assert!(matches!(error, HistoryError::Row { .. }), "{change}: {error}");
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn the_reflog_refreshes_time_stamps_and_forgets_what_was_swept() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("reflog");
    let mut reflog = Reflog::create(&path, "a.example.org").unwrap();
    reflog.add(ReferenceKind::Catalog, hash("1"), 10).unwrap();
    reflog.add(ReferenceKind::Catalog, hash("2"), 20).unwrap();
    reflog.add(ReferenceKind::Certificate, hash("x"), 10).unwrap();
    reflog.add(ReferenceKind::Certificate, hash("x"), 30).unwrap();
    reflog.finish().unwrap();
    assert_self_contained(&path);
    let mut reflog = Reflog::open_for_writing(&path).unwrap();
    assert_eq!(reflog.timestamp(hash("x")).unwrap(), Some(30));
    let catalogs: Vec<_> =
        reflog.list(ReferenceKind::Catalog).unwrap().iter().map(|entry| entry.hash).collect();
    assert_eq!(catalogs, [hash("1"), hash("2")]);
    assert!(reflog.remove(hash("1")).unwrap());
    assert!(!reflog.remove(hash("1")).unwrap());
    reflog.finish().unwrap();
    let mut reflog = Reflog::open(&path).unwrap();
    assert_eq!((reflog.references().unwrap().len(), reflog.fqrn()), (2, "a.example.org"));
    assert_eq!(reflog.timestamp(hash("1")).unwrap(), None);
    assert!(matches!(reflog.add(ReferenceKind::History, hash("h"), 1), Err(ReflogError::ReadOnly)));
    assert!(matches!(reflog.remove(hash("2")), Err(ReflogError::ReadOnly)));
    Connection::open(&path).unwrap().execute_batch("UPDATE refs SET hash = 'junk' WHERE type = 0").unwrap();
    let error = Reflog::open(&path).unwrap().list(ReferenceKind::Catalog).unwrap_err();
    assert!(matches!(error, ReflogError::Row { .. }), "{error}");
}
