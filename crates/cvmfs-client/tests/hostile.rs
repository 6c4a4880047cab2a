//! Repositories whose catalogs have the right hashes and the wrong content: an error about one sub-tree, and the old
//! revision where there is one.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::sync::Arc;

use cvmfs_client::clock::SystemClock;
use cvmfs_client::error::ClientError;
use cvmfs_client::repository::Repository;
use cvmfs_client::snapshot::{Pin, Snapshot};
use cvmfs_format::PathHash;
use cvmfs_format::catalog::{CatalogWriter, Entry, EntryFlags, EntryKind};
use cvmfs_format::compression::Compression;
use cvmfs_format::hash::{ContentHash, HashAlgorithm, ObjectKind};
use support::{Bench, FQRN, republish, seconds};
use testkit::{Fixture, Origin};

/// Catalogs in the storage of a bench, and a snapshot of them.
struct Tree {
    bench: Bench,
    origin: Origin,
}

/// Nested catalogs by path: content hash and plain size.
type Nested<'a> = &'a [(&'a str, ContentHash)];

impl Tree {
    fn new() -> Self {
        let bench = Bench::new();
        let origin = Origin::serve(bench.storage()).unwrap();
        Self { bench, origin }
    }

    /// Publishes a catalog with these directories and nested catalogs, after `sql` was run on it.
    fn catalog(&self, prefix: &str, directories: &[&str], nested: Nested<'_>, sql: &str) -> ContentHash {
        let path = self.bench.directory.path().join("catalog");
        let mut writer = CatalogWriter::create(&path, prefix.as_bytes()).unwrap();
        let mut top = Entry::new(prefix.as_bytes(), EntryKind::Directory, 0o755);
        if !prefix.is_empty() {
            top.flags = top.flags.with(EntryFlags::NESTED_ROOT);
        }
        writer.insert(&top).unwrap();
        for directory in directories {
            writer.insert(&Entry::new(directory.as_bytes(), EntryKind::Directory, 0o755)).unwrap();
        }
        for (mountpoint, hash) in nested {
            let mut entry = Entry::new(mountpoint.as_bytes(), EntryKind::Directory, 0o755);
            entry.flags = entry.flags.with(EntryFlags::NESTED_MOUNTPOINT);
            writer.replace(&entry).unwrap();
            writer.add_nested(mountpoint.as_bytes(), *hash, 0).unwrap();
        }
        writer.finish(1, None, Some(240), 1).unwrap();
        let connection = rusqlite::Connection::open(&path).unwrap();
        connection.execute_batch("PRAGMA foreign_keys = OFF").unwrap();
        connection.execute_batch(sql).unwrap_or_else(|error| panic!("{sql}: {error}"));
        drop(connection);
        let hash = self.publish(&std::fs::read(&path).unwrap());
        std::fs::remove_file(&path).unwrap();
        hash
    }

    fn publish(&self, bytes: &[u8]) -> ContentHash {
        self.bench.publish(bytes, Compression::Zlib, ObjectKind::Catalog).hash
    }

    fn pin(&self, root: ContentHash) -> Result<Snapshot, ClientError> {
        let store = self.bench.store(&self.origin.url(), &[]);
        Snapshot::pin(FQRN, &store, Pin::of_root(root), None, seconds(20))
    }
}

/// Lists the directory at `path`.
fn list(snapshot: &Snapshot, path: &str) -> Result<Vec<String>, ClientError> {
    let Some(directory) = snapshot.resolve(path.as_bytes(), seconds(20))? else { return Ok(Vec::new()) };
    let (_, entries) = snapshot.list(&directory, seconds(20))?;
    Ok(entries.into_iter().map(|entry| String::from_utf8_lossy(&entry.name).into_owned()).collect())
}

/// A root catalog that has its hash and is nothing that a client can use.
fn unusable_catalogs() -> Vec<(&'static str, Vec<u8>)> {
    let directory = tempfile::tempdir().unwrap();
    let sqlite = |name: &str, sql: &str| {
        let path = directory.path().join(name);
        let connection = rusqlite::Connection::open(&path).unwrap();
        connection.execute_batch(sql).unwrap();
        drop(connection);
        std::fs::read(path).unwrap()
    };
    let properties = "CREATE TABLE properties (key TEXT, value TEXT);
        INSERT INTO properties VALUES ('schema', '2.5'), ('schema_revision', '7');";
    let whole =
        sqlite("whole", &format!("{properties} CREATE TABLE t (x); INSERT INTO t VALUES (zeroblob(20000));"));
    let mut pages = whole.clone();
    // A page size of 64 KiB in a file that has not even one such page.
    pages[16..18].copy_from_slice(&[0, 1]);
    vec![
        ("rubbish", support::noise(1, 5000)),
        ("nothing", Vec::new()),
        ("half a database", whole[..whole.len() / 2].to_vec()),
        ("no catalog table", whole),
        ("huge pages", pages),
        ("another schema", sqlite("schema", "CREATE TABLE properties (key TEXT, value TEXT);
            INSERT INTO properties VALUES ('schema', '99.0');")),
        ("a view that never ends", sqlite("view", &format!("{properties}
            CREATE TABLE nested_catalogs (path TEXT, sha1 TEXT, size INTEGER);
            CREATE VIEW catalog AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x FROM n;"))),
    ]
}

#[test]
fn row_35_a_new_revision_with_an_unusable_root_catalog_is_refused_and_the_old_one_stays() {
    let fixture = Fixture::unpack("basic-sha1").unwrap();
    let origin = Origin::serve(&fixture.storage).unwrap();
    let key = fixture.master_pub.to_str().unwrap();
    let options = [("CVMFS_SERVER_URL", &*origin.url()), ("CVMFS_PUBLIC_KEY", key)];
    let settings = support::settings(&fixture.fqrn, fixture.dir.path(), &options);
    let repository = Repository::open(settings.clone(), Arc::new(SystemClock)).unwrap();
    let before = repository.status();
    for (what, bytes) in unusable_catalogs() {
        let hash = publish(&fixture.storage, &bytes);
        republish(&fixture, |manifest| {
            manifest.revision += 1;
            manifest.root_catalog = hash;
        });
        let error = repository.refresh(seconds(30)).unwrap_err();
        let text = format!("{error}");
        assert!(text.contains(&hash.to_string()), "{what}: {text}");
        assert!(!text.contains("SELECT"), "{what}: {text}");
        let after = repository.status();
        assert_eq!((after.revision, &after.root_hash), (before.revision, &before.root_hash), "{what}");
        let again = Repository::open(settings.clone(), Arc::new(SystemClock)).unwrap();
        assert_eq!(again.status().root_hash, before.root_hash, "{what}: also after a restart");
    }
}

/// Stores an object as a publisher would.
fn publish(storage: &Path, plain: &[u8]) -> ContentHash {
    let stored = cvmfs_format::compression::Deflate::Fast.compress(plain);
    let hash = ContentHash::of(HashAlgorithm::Sha1, &stored);
    let text = hash.to_string();
    let directory = storage.join("data").join(&text[..2]);
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join(format!("{}C", &text[2..])), stored).unwrap();
    hash
}

#[test]
fn row_36_a_catalog_that_is_nested_in_itself_closes_that_sub_tree_only() {
    let tree = Tree::new();
    // No catalog can name its own hash, but two places can name one catalog: as its own child, and as its sister.
    let inner = tree.catalog("/a", &["/a/x"], &[], "");
    let good = tree.catalog("/b", &["/b/x"], &[], "");
    let outer = tree.catalog("/a", &["/a/x", "/a/y"], &[("/a/x", inner)], "");
    let root = tree.catalog("", &[], &[("/a", outer), ("/b", good), ("/c", good)], "");
    let snapshot = tree.pin(root).unwrap();
    assert_eq!(list(&snapshot, "/b").unwrap(), ["x"]);
    assert_eq!(list(&snapshot, "/a").unwrap(), ["x", "y"]);
    let error = list(&snapshot, "/a/x").unwrap_err();
    assert!(error.to_string().contains("belongs to another path"), "{error}");
    assert!(list(&snapshot, "/c").unwrap_err().to_string().contains(":/c is damaged"));
    assert_eq!(list(&snapshot, "").unwrap(), ["a", "b", "c"], "the rest is as it was");
}

#[test]
fn row_36_catalogs_nested_very_deep_are_followed_without_recursion() {
    const DEPTH: usize = 200;
    let tree = Tree::new();
    let path = |depth: usize| "/d".repeat(depth);
    let mut hash = tree.catalog(&path(DEPTH), &[&format!("{}/x", path(DEPTH))], &[], "");
    for depth in (0..DEPTH).rev() {
        hash = tree.catalog(&path(depth), &[], &[(&path(depth + 1), hash)], "");
    }
    let snapshot = tree.pin(hash).unwrap();
    assert_eq!(list(&snapshot, &path(DEPTH)).unwrap(), ["x"]);
    assert_eq!(snapshot.attached().len(), DEPTH + 1);
}

#[test]
fn row_36_a_row_that_is_its_own_ancestor_is_not_climbed_for_ever() {
    let tree = Tree::new();
    let sql = "UPDATE catalog SET parent_1 = md5path_1, parent_2 = md5path_2 WHERE name = 'x'";
    let root = tree.catalog("", &["/a", "/a/x"], &[], sql);
    let snapshot = tree.pin(root).unwrap();
    let hash = PathHash::of(b"/a/x").part1;
    assert!(snapshot.find_by_path_hash(hash, hash, seconds(20)).unwrap().is_empty());
}

#[test]
fn row_37_names_that_lead_elsewhere_are_not_shown() {
    let tree = Tree::new();
    let long = "n".repeat(256);
    let names = ["''", "'.'", "'..'", "'a/b'", "'../x'", &format!("'{long}'"), "x'6100'", "x'610a62'"];
    for name in names {
        let root = tree.catalog(
            "",
            &["/a", "/a/x"],
            &[],
            &format!("UPDATE catalog SET name = {name} WHERE name = 'x'"),
        );
        let snapshot = tree.pin(root).unwrap();
        let listed = list(&snapshot, "/a").unwrap();
        // A line break is a name like any other.
        let expected: &[&str] = if name == "x'610a62'" { &["a\nb"] } else { &[] };
        assert_eq!(listed, expected, "{name}");
        for path in ["/a/..", "/a/.", "/a/../a"] {
            assert!(snapshot.resolve(path.as_bytes(), seconds(5)).unwrap().is_none(), "{path}");
        }
    }
}

#[test]
fn row_39_members_of_a_group_with_different_counts_are_one_file() {
    let tree = Tree::new();
    let sql = "UPDATE catalog SET mode = 33188, flags = 4, size = 0, hardlinks = (7 << 32) | 3 WHERE name = 'x';
               UPDATE catalog SET mode = 33188, flags = 4, size = 9, hardlinks = (7 << 32) | 200 WHERE name = 'y';";
    let root = tree.catalog("", &["/a", "/a/x", "/a/y"], &[], sql);
    let snapshot = tree.pin(root).unwrap();
    let leader = |path: &str| {
        let located = snapshot.resolve(path.as_bytes(), seconds(5)).unwrap().unwrap();
        snapshot.link_leader(&located, seconds(5)).unwrap().unwrap_or(located.entry)
    };
    assert_eq!(leader("/a/x"), leader("/a/y"), "also size and count are the same under both names");
}

#[test]
fn row_41_an_unknown_hash_algorithm_is_named_and_closes_its_entry_only() {
    let tree = Tree::new();
    let sql = "UPDATE catalog SET mode = 33188, flags = 4 | (5 << 8), hash = zeroblob(20), size = 1 WHERE name = 'x'";
    let root = tree.catalog(
        "",
        &["/a", "/a/x", "/b", "/b/x"],
        &[],
        &format!(
            "{sql} AND parent_1 =
        (SELECT md5path_1 FROM catalog WHERE name = 'a')"
        ),
    );
    let snapshot = tree.pin(root).unwrap();
    let error = snapshot.resolve(b"/a/x", seconds(5)).unwrap_err();
    assert!(error.to_string().contains("unsupported hash algorithm"), "{error}");
    assert_eq!(error.errno(), rustix::io::Errno::IO.raw_os_error());
    assert_eq!(list(&snapshot, "/b").unwrap(), ["x"]);

    let good = tree.catalog("/b", &["/b/x"], &[], "");
    let sql = "UPDATE nested_catalogs SET sha1 = sha1 || '-blake3' WHERE path = '/a'";
    let root = tree.catalog("", &[], &[("/a", good), ("/b", good)], sql);
    let snapshot = tree.pin(root).unwrap();
    let error = list(&snapshot, "/a").unwrap_err();
    assert!(
        error.to_string().contains("unsupported hash") && error.to_string().contains("-blake3"),
        "{error}"
    );
    assert_eq!(list(&snapshot, "/b").unwrap(), ["x"]);
}

#[test]
fn a_directory_that_shows_another_revision_is_said_to_be_unsupported_and_not_shown_empty() {
    let tree = Tree::new();
    let other = tree.catalog("", &["/x"], &[], "");
    let sql = format!(
        "INSERT INTO bind_mountpoints VALUES ('/a', '{other}', 0); UPDATE catalog SET flags = 1 | 16384 WHERE name = 'a';"
    );
    let snapshot = tree.pin(tree.catalog("", &["/a", "/b"], &[], &sql)).unwrap();
    let error = list(&snapshot, "/a").unwrap_err();
    assert!(error.to_string().contains("bind mountpoint") && error.to_string().contains(":/a"), "{error}");
    assert_eq!(error.errno(), rustix::io::Errno::OPNOTSUPP.raw_os_error());
    assert_eq!(list(&snapshot, "").unwrap(), ["a", "b"]);
}
