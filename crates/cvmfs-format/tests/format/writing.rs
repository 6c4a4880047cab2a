//! Catalogs written here are those the C++ tools would have written.

use std::path::Path;

use cvmfs_format::catalog::{
    Catalog, CatalogError, CatalogWriter, Chunk, Counters, Counts, Entry, EntryFlags, EntryKind,
};
use cvmfs_format::{Compression, ContentHash, HashAlgorithm, PathHash};
use rusqlite::Connection;
use rusqlite::types::Value;

use crate::common::{Fixture, GOOD};

/// All rows of a query, all columns, with their SQLite types.
pub fn rows(path: &Path, sql: &str) -> Vec<Vec<Value>> {
    let connection = Connection::open(path).unwrap();
    let mut statement = connection.prepare(sql).unwrap();
    let columns = statement.column_count();
    let rows =
        statement.query_map([], |row| (0..columns).map(|column| value(row, column)).collect()).unwrap();
    rows.collect::<Result<_, _>>().unwrap()
}

/// As rusqlite's own conversion, but text need not be UTF-8.
fn value(row: &rusqlite::Row<'_>, column: usize) -> rusqlite::Result<Value> {
    use rusqlite::types::ValueRef;
    Ok(match row.get_ref(column)? {
        ValueRef::Text(bytes) => Value::Text(bytes.escape_ascii().to_string()),
        other => other.try_into().unwrap(),
    })
}

/// What identifies the layout of a database: settings and statements in order of creation.
pub fn layout(path: &Path) -> Vec<Vec<Value>> {
    let mut layout = rows(path, "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY rowid");
    for pragma in ["page_size", "encoding", "user_version", "application_id", "auto_vacuum", "journal_mode"] {
        layout.extend(rows(path, &format!("PRAGMA {pragma}")));
    }
    layout
}

/// A complete file in rollback journal mode with nothing beside it.
pub fn assert_self_contained(path: &Path) {
    let header = std::fs::read(path).unwrap();
    assert_eq!(header[18..20], [1, 1], "not in rollback journal mode");
    let name = path.file_name().unwrap().to_string_lossy().into_owned();
    for entry in std::fs::read_dir(path.parent().unwrap()).unwrap() {
        let other = entry.unwrap().file_name().to_string_lossy().into_owned();
        assert!(!(other.starts_with(&name) && other != name), "{other} left over");
    }
    assert_eq!(rows(path, "PRAGMA integrity_check"), [[Value::Text("ok".into())]]);
}

fn hash(text: &str) -> ContentHash {
    ContentHash::of(HashAlgorithm::Sha1, text.as_bytes())
}

fn file(path: &str, size: u64) -> Entry {
    let mut entry = Entry::new(path.as_bytes(), EntryKind::File, 0o644);
    (entry.hash, entry.size, entry.mtime) = (Some(hash(path)), size, 1_700_000_000);
    entry
}

fn directory(path: &str, links: u32) -> Entry {
    let mut entry = Entry::new(path.as_bytes(), EntryKind::Directory, 0o755);
    (entry.link_count, entry.size) = (links, 4096);
    entry
}

#[test]
fn a_fresh_catalog_has_the_layout_of_the_cpp_tools() {
    let fixture = Fixture::unpack("basic-sha1");
    let reference = fixture.database(fixture.manifest().root_catalog, cvmfs_format::ObjectKind::Catalog);
    let path = fixture.root.join("fresh");
    CatalogWriter::create(&path, b"")
        .unwrap()
        .finish(1, Some(hash("previous")), Some(240), 1_700_000_000)
        .unwrap();
    assert_eq!(layout(&path), layout(&reference));
    let keys = "SELECT key, typeof(value) FROM properties ORDER BY key";
    assert_eq!(rows(&path, keys), rows(&reference, keys));
    let counters = "SELECT rowid, counter, typeof(value) FROM statistics ORDER BY rowid";
    assert_eq!(rows(&path, counters), rows(&reference, counters));
    assert_self_contained(&path);
}

#[test]
fn every_catalog_of_the_cpp_tools_is_rewritten_value_by_value() {
    for name in GOOD.into_iter().chain(["ingest-corner"]) {
        let fixture = Fixture::unpack(name);
        for (index, (reference, catalog)) in
            fixture.catalogs(fixture.manifest().root_catalog).into_iter().enumerate()
        {
            let original = fixture.database(reference.hash, cvmfs_format::ObjectKind::Catalog);
            let path = fixture.root.join(format!("copy{index}"));
            let mut writer = CatalogWriter::create(&path, catalog.root_prefix()).unwrap();
            let mut unstorable = 0;
            catalog
                .for_each(|entry| {
                    let entry = entry?;
                    match writer.insert(&entry) {
                        Err(CatalogError::Unstorable { .. }) if !entry.has_valid_name() => unstorable += 1,
                        result => result?,
                    }
                    if entry.is_chunked() {
                        writer.set_chunks(entry.path_hash, &catalog.chunks_of(&entry)?)?;
                    }
                    Ok(())
                })
                .unwrap();
            let mut below = catalog.counters().unwrap();
            for nested in catalog.nested().unwrap() {
                writer.add_nested(&nested.path, nested.hash, nested.size).unwrap();
            }
            below.own = Counts::default();
            writer.add_subtree(below.subtree);
            let counters = writer.counters().unwrap();
            writer
                .finish(catalog.revision(), catalog.previous(), Some(catalog.ttl()), catalog.last_modified())
                .unwrap();
            assert_self_contained(&path);
            if unstorable > 0 {
                assert_eq!(name, "ingest-corner");
                continue;
            }
            assert_eq!(Catalog::open(&path).unwrap().counters().unwrap(), counters);
            for sql in [
                "SELECT * FROM catalog ORDER BY rowid",
                "SELECT * FROM chunks ORDER BY md5path_1, md5path_2, offset",
                "SELECT * FROM nested_catalogs ORDER BY path",
                "SELECT * FROM statistics ORDER BY counter",
                "SELECT key, value FROM properties WHERE key IN ('schema', 'schema_revision', 'revision', 'root_prefix', \
                 'last_modified') ORDER BY key",
            ] {
                if name == "ingest-corner" && sql.contains("statistics") {
                    continue; // wrong in the original, which is not a clean repository
                }
                assert_eq!(rows(&path, sql), rows(&original, sql), "{name}: {sql}");
            }
        }
    }
}

/// The tiny repository of the format description's worked example: root and nested catalog.
fn tiny(root: &Path, child: &Path) {
    let mut writer = CatalogWriter::create(child, b"/a/b").unwrap();
    let mut top = directory("/a/b", 2);
    top.flags = top.flags.with(EntryFlags::NESTED_ROOT);
    writer.insert(&top).unwrap();
    let mut marker = file("/a/b/.cvmfscatalog", 0);
    marker.hash = ContentHash::from_slice(
        HashAlgorithm::Sha1,
        &hex::decode("e8ec3d88b62ebf526e4e5a4ff6162a3aa48a6b78").unwrap(),
    );
    writer.insert(&marker).unwrap();
    let delta = *writer.delta();
    writer.finish(1, None, None, 1_700_000_000).unwrap();

    let mut writer = CatalogWriter::create(root, b"").unwrap();
    writer.insert(&directory("", 3)).unwrap();
    writer.insert(&directory("/a", 3)).unwrap();
    let mut mountpoint = directory("/a/b", 2);
    mountpoint.flags = mountpoint.flags.with(EntryFlags::NESTED_MOUNTPOINT);
    writer.insert(&mountpoint).unwrap();
    let mut plain = file("/a/f", 6);
    plain.hash = ContentHash::from_slice(
        HashAlgorithm::Sha1,
        &hex::decode("5798f7f4ca7585d850eea64610a1f73d8f8de7a3").unwrap(),
    );
    writer.insert(&plain).unwrap();
    let mut link = Entry::new(b"/a/l", EntryKind::Symlink, 0o777);
    (link.symlink, link.size) = (b"f".to_vec(), 1);
    writer.insert(&link).unwrap();
    writer.add_nested(b"/a/b", hash("child"), std::fs::metadata(child).unwrap().len()).unwrap();
    writer.add_subtree(delta.total());
    writer.finish(1, None, Some(240), 1_700_000_000).unwrap();
}

#[test]
fn the_worked_example_gives_the_published_rows_and_counters() {
    let directory = tempfile::tempdir().unwrap();
    let (root, child) = (directory.path().join("root"), directory.path().join("child"));
    tiny(&root, &child);
    let columns = "SELECT md5path_1, md5path_2, parent_1, parent_2, hardlinks, lower(hex(hash)), size, mode, flags, name, \
                   symlink, typeof(hash), typeof(name), typeof(symlink) FROM catalog ORDER BY rowid";
    let shown: Vec<String> = rows(&root, columns)
        .into_iter()
        .map(|row| {
            row.into_iter()
                .map(|value| match value {
                    Value::Integer(number) => number.to_string(),
                    Value::Text(text) => text,
                    other => format!("{other:?}"),
                })
                .collect::<Vec<_>>()
                .join(" ")
        })
        .collect();
    assert_eq!(
        shown,
        [
            "338333539836370388 9098107892288553193 0 0 3  4096 16877 1   null text text",
            "-2906336618250618618 -744252105585281751 338333539836370388 9098107892288553193 3  4096 16877 1 a  null text text",
            "-79414819578584146 8517581007188477988 -2906336618250618618 -744252105585281751 2  4096 16877 3 b  null text text",
            "-5638124684780513603 -4704938181593048171 -2906336618250618618 -744252105585281751 1 5798f7f4ca7585d850eea64610a1f73d8f8de7a3 6 33188 4 f  blob text text",
            "5203127561589774042 4681510480717132366 -2906336618250618618 -744252105585281751 1  1 41471 12 l f null text text",
        ]
    );
    let counters = Catalog::open(&root).unwrap().counters().unwrap();
    let own = Counts { regular: 1, symlink: 1, dir: 3, nested: 1, file_size: 6, ..Counts::default() };
    assert_eq!(counters, Counters { own, subtree: Counts { dir: 1, regular: 1, ..Counts::default() } });
    let child = Catalog::open(&child).unwrap();
    assert_eq!(child.root_prefix(), b"/a/b");
    assert_eq!(child.counters().unwrap().own, Counts { dir: 1, regular: 1, ..Counts::default() });
    let flags: Vec<u32> =
        child.list_all(PathHash::of(b"/a")).unwrap().iter().map(|entry| entry.flags.0).collect();
    assert_eq!(flags, [33]);
}

#[test]
fn counters_follow_every_change_of_the_rows() {
    let directory_ = tempfile::tempdir().unwrap();
    let path = directory_.path().join("catalog");
    let mut writer = CatalogWriter::create(&path, b"").unwrap();
    writer.insert(&directory("", 2)).unwrap();
    for index in 0..20 {
        writer.insert(&file(&format!("/f{index}"), 100)).unwrap();
    }
    writer.finish(1, None, Some(240), 1).unwrap();

    let mut writer = CatalogWriter::open(&path).unwrap();
    let mut big = file("/f1", 3000);
    big.hash = None;
    big.flags = big.flags.with(EntryFlags::CHUNKED).with_compression(Compression::None);
    big.xattrs = Some(vec![1, 1, 1, 0, b'a']);
    writer.replace(&big).unwrap();
    let chunks = [(0, 1000), (1000, 2000)].map(|(offset, size)| Chunk { offset, size, hash: hash("chunk") });
    writer.set_chunks(big.path_hash, &chunks).unwrap();
    assert_eq!(writer.reader().chunks_of(&big).unwrap(), chunks);
    // A change of the mode alone keeps the chunks.
    big.mode ^= 0o111;
    writer.replace(&big).unwrap();
    assert_eq!(writer.reader().chunks_of(&big).unwrap().len(), 2);
    assert_eq!(writer.remove(PathHash::of(b"/f2")).unwrap().unwrap().name, b"f2");
    assert_eq!(writer.remove(PathHash::of(b"/f2")).unwrap(), None);
    writer.replace(&file("/new", 7)).unwrap();
    writer.add_nested(b"/n", hash("n"), 5).unwrap();
    writer.update_nested(b"/n", hash("m"), 6).unwrap();
    assert_eq!(writer.reader().nested_at(b"/n").unwrap().unwrap().hash, hash("m"));
    let expected = Counts {
        regular: 20,
        dir: 1,
        nested: 1,
        file_size: 18 * 100 + 3000 + 7,
        chunked: 1,
        chunks: 2,
        chunked_size: 3000,
        xattr: 1,
        ..Counts::default()
    };
    assert_eq!(writer.counters().unwrap().own, expected);
    writer.finish(2, Some(hash("one")), Some(60), 2).unwrap();
    let catalog = Catalog::open(&path).unwrap();
    assert_eq!(catalog.counters().unwrap().own, expected);
    assert_eq!(
        (catalog.revision(), catalog.previous(), catalog.ttl(), catalog.last_modified()),
        (2, Some(hash("one")), 60, 2)
    );

    let mut writer = CatalogWriter::open(&path).unwrap();
    writer.remove(big.path_hash).unwrap();
    writer.remove_nested(b"/n").unwrap();
    assert_eq!(writer.reader().chunk_count().unwrap(), 0);
    let own = writer.counters().unwrap().own;
    assert_eq!((own.chunks, own.chunked, own.xattr, own.nested, own.file_size), (0, 0, 0, 0, 1807));
    writer.finish(3, None, None, 3).unwrap();
}

#[test]
fn a_writer_that_is_dropped_leaves_the_catalog_as_it_was() {
    let directory = tempfile::tempdir().unwrap();
    let (root, child) = (directory.path().join("root"), directory.path().join("child"));
    tiny(&root, &child);
    let before = std::fs::read(&root).unwrap();
    let mut writer = CatalogWriter::open(&root).unwrap();
    for index in 0..5000 {
        writer.insert(&file(&format!("/x{index}"), 1)).unwrap();
    }
    drop(writer);
    assert_self_contained(&root);
    let catalog = Catalog::open(&root).unwrap();
    assert_eq!(catalog.max_rowid().unwrap(), 5);
    assert_eq!(std::fs::read(&root).unwrap().len(), before.len());
}

#[test]
fn what_a_catalog_cannot_hold_is_refused() {
    let directory_ = tempfile::tempdir().unwrap();
    let path = directory_.path().join("catalog");
    let mut writer = CatalogWriter::create(&path, b"").unwrap();
    assert!(CatalogWriter::create(&path, b"").is_err(), "an existing file is not overwritten");
    for prefix in ["a", "/", "/a/", "/a//b", "/a/../b"] {
        assert!(
            CatalogWriter::create(&directory_.path().join("other"), prefix.as_bytes()).is_err(),
            "{prefix}"
        );
    }
    writer.insert(&file("/f", 1)).unwrap();
    assert!(matches!(writer.insert(&file("/f", 2)), Err(CatalogError::Exists { name }) if name == "f"));
    assert!(matches!(writer.insert(&file("/..", 1)), Err(CatalogError::Unstorable { .. })));
    let gap = [Chunk { offset: 1, size: 1, hash: hash("") }];
    assert!(matches!(writer.set_chunks(PathHash::of(b"/f"), &gap), Err(CatalogError::Chunks { .. })));
    writer.add_nested(b"/n", hash("n"), 1).unwrap();
    assert!(matches!(writer.add_nested(b"/n", hash("n"), 1), Err(CatalogError::Exists { .. })));
    assert!(matches!(writer.update_nested(b"/m", hash("n"), 1), Err(CatalogError::Missing { .. })));
    assert!(matches!(writer.remove_nested(b"/m"), Err(CatalogError::Missing { .. })));
    assert!(matches!(writer.add_nested(b"m", hash("n"), 1), Err(CatalogError::Unstorable { .. })));
    writer.add_bind_mountpoint(b"/bound", hash("b"), 9).unwrap();
    let bound = writer.reader().nested_for(b"/bound/x").unwrap().unwrap();
    assert!(bound.bind && bound.hash == hash("b"));
    writer.remove_bind_mountpoint(b"/bound").unwrap();
    assert!(writer.remove_bind_mountpoint(b"/bound").is_err());
    // What was refused has left no trace.
    assert_eq!(
        writer.counters().unwrap().own,
        Counts { regular: 1, nested: 1, file_size: 1, ..Counts::default() }
    );
}

#[test]
fn names_and_targets_are_stored_as_text_whatever_their_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("catalog");
    let mut writer = CatalogWriter::create(&path, b"/l\xe4").unwrap();
    let mut link = Entry::new(b"/l\xe4/\xff\xfe", EntryKind::Symlink, 0o777);
    link.symlink = b"\x80\xff".to_vec();
    writer.insert(&link).unwrap();
    writer.add_nested(b"/l\xe4/n\xf6", hash("n"), 1).unwrap();
    writer.finish(1, None, None, 1).unwrap();
    for sql in [
        "SELECT typeof(name), typeof(symlink) FROM catalog",
        "SELECT typeof(path), typeof(sha1) FROM nested_catalogs",
        "SELECT typeof(key), typeof(value) FROM properties WHERE key = 'root_prefix'",
    ] {
        assert_eq!(rows(&path, sql), [[Value::Text("text".into()), Value::Text("text".into())]], "{sql}");
    }
    let catalog = Catalog::open(&path).unwrap();
    assert_eq!(catalog.root_prefix(), b"/l\xe4");
    let found = catalog.list(PathHash::of(b"/l\xe4")).unwrap();
    assert_eq!((found[0].name.as_slice(), found[0].symlink.as_slice()), (&b"\xff\xfe"[..], &b"\x80\xff"[..]));
    assert_eq!(catalog.nested_for(b"/l\xe4/n\xf6/deep/er").unwrap().unwrap().path, b"/l\xe4/n\xf6");
}

#[test]
fn the_link_count_of_a_group_changes_for_all_its_members() {
    let directory_ = tempfile::tempdir().unwrap();
    let path = directory_.path().join("catalog");
    let mut writer = CatalogWriter::create(&path, b"").unwrap();
    writer.insert(&directory("", 2)).unwrap();
    assert_eq!((writer.new_link_group().unwrap(), writer.new_link_group().unwrap()), (1, 2));
    for (name, group) in [("/a1", 1), ("/a2", 1), ("/b1", 2), ("/b2", 2)] {
        let mut entry = file(name, 1);
        (entry.link_group, entry.link_count) = (group, 2);
        writer.insert(&entry).unwrap();
    }
    writer.change_link_count(PathHash::of(b"/a1"), 1).unwrap();
    writer.change_link_count(PathHash::of(b""), 1).unwrap();
    let nlink = |writer: &CatalogWriter, path: &[u8]| {
        writer.reader().lookup(PathHash::of(path)).unwrap().unwrap().nlink()
    };
    let found = [&b"/a1"[..], b"/a2", b"/b1", b"/b2", b""].map(|path| nlink(&writer, path));
    assert_eq!(found, [3, 3, 2, 2, 3]);
    assert!(writer.change_link_count(PathHash::of(b"/a1"), -3).is_err());
    assert!(writer.change_link_count(PathHash::of(b"/x"), 1).is_err());
    writer.finish(1, None, None, 1).unwrap();
    assert_eq!(CatalogWriter::open(&path).unwrap().new_link_group().unwrap(), 3);
}

#[test]
fn after_many_removals_file_and_inode_range_shrink() {
    let directory_ = tempfile::tempdir().unwrap();
    let path = directory_.path().join("catalog");
    let mut writer = CatalogWriter::create(&path, b"").unwrap();
    for index in 0..2000 {
        writer.insert(&file(&format!("/f{index}"), 1)).unwrap();
    }
    writer.finish(1, None, None, 1).unwrap();
    let before = std::fs::metadata(&path).unwrap().len();
    let mut writer = CatalogWriter::open(&path).unwrap();
    for index in 0..1900 {
        writer.remove(PathHash::of(format!("/f{index}").as_bytes())).unwrap();
    }
    writer.finish(2, None, None, 2).unwrap();
    assert_self_contained(&path);
    assert!(std::fs::metadata(&path).unwrap().len() < before / 4);
    let catalog = Catalog::open(&path).unwrap();
    assert_eq!(catalog.max_rowid().unwrap(), 100);
    assert_eq!(catalog.list(PathHash::of(b"")).unwrap().len(), 100);
    assert_eq!(catalog.lookup(PathHash::of(b"/f1999")).unwrap().unwrap().size, 1);
}

/// A catalog of an old schema revision: what later revisions added is taken away.
fn age(path: &Path, revision: u64) {
    let connection = Connection::open(path).unwrap();
    connection.execute_batch("PRAGMA foreign_keys = OFF").unwrap();
    let drop_counters = |names: &[&str]| {
        for name in names {
            for prefix in ["self", "subtree"] {
                connection
                    .execute("DELETE FROM statistics WHERE counter = ?1", [format!("{prefix}_{name}")])
                    .unwrap();
            }
        }
    };
    if revision < 7 {
        connection.execute_batch("ALTER TABLE catalog DROP COLUMN mtimens").unwrap();
    }
    if revision < 5 {
        drop_counters(&["special"]);
    }
    if revision < 4 {
        connection.execute_batch("DROP TABLE bind_mountpoints").unwrap();
    }
    if revision < 3 {
        drop_counters(&["external", "external_file_size"]);
    }
    if revision < 2 {
        connection.execute_batch("ALTER TABLE catalog DROP COLUMN xattr").unwrap();
        drop_counters(&["xattr"]);
    }
    if revision < 1 {
        connection.execute_batch("ALTER TABLE nested_catalogs DROP COLUMN size").unwrap();
    }
    let sql = if revision == 0 {
        "DELETE FROM properties WHERE key = 'schema_revision' AND ?1 = ?1"
    } else {
        "UPDATE properties SET value = ?1 WHERE key = 'schema_revision'"
    };
    connection.execute(sql, [revision.to_string()]).unwrap();
}

#[test]
fn catalogs_of_every_schema_revision_are_read_and_upgraded_on_writing() {
    for revision in 0..=7 {
        let directory = tempfile::tempdir().unwrap();
        let (root, child) = (directory.path().join("root"), directory.path().join("child"));
        tiny(&root, &child);
        let fresh = Catalog::open(&root).unwrap();
        let (expected, counters) = (fresh.list(PathHash::of(b"/a")).unwrap(), fresh.counters().unwrap());
        drop(fresh);
        age(&root, revision);
        let old = Catalog::open(&root).unwrap();
        assert_eq!(old.schema().revision, revision);
        assert_eq!(old.list(PathHash::of(b"/a")).unwrap(), expected, "revision {revision}");
        assert_eq!(old.counters().unwrap(), counters);
        assert_eq!(old.missing_counters().unwrap(), Vec::<String>::new());
        assert_eq!(old.nested_for(b"/a/b/c").unwrap().unwrap().size > 0, revision >= 1);
        assert_eq!(old.bind_mountpoints().unwrap(), []);
        drop(old);

        let mut writer = CatalogWriter::open(&root).unwrap();
        let mut entry = file("/a/new", 5);
        (entry.xattrs, entry.mtime_ns) = (Some(vec![1, 1, 1, 0, b'a']), Some(5));
        writer.insert(&entry).unwrap();
        writer.finish(2, None, None, 2).unwrap();
        assert_self_contained(&root);
        let upgraded = Catalog::open(&root).unwrap();
        assert_eq!(upgraded.schema().revision, 7);
        assert_eq!(rows(&root, "SELECT COUNT(*) FROM statistics"), [[Value::Integer(24)]]);
        let found = upgraded.lookup(entry.path_hash).unwrap().unwrap();
        assert_eq!(
            (found.xattrs.as_ref(), found.mtime_ns, found.name.as_slice()),
            (entry.xattrs.as_ref(), Some(5), &b"new"[..])
        );
        assert_eq!(upgraded.counters().unwrap().own.xattr, 1);
    }
}

#[test]
fn a_missing_counter_of_the_declared_revision_is_reported() {
    let directory = tempfile::tempdir().unwrap();
    let (root, child) = (directory.path().join("root"), directory.path().join("child"));
    tiny(&root, &child);
    Connection::open(&root)
        .unwrap()
        .execute("DELETE FROM statistics WHERE counter = 'self_external'", [])
        .unwrap();
    assert_eq!(Catalog::open(&root).unwrap().missing_counters().unwrap(), ["self_external"]);
}
