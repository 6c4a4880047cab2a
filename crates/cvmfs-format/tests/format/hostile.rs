//! Catalogs from hostile hands: an error or a documented tolerance, never a crash.

use std::path::{Path, PathBuf};

use cvmfs_format::catalog::{Catalog, CatalogError, CatalogWriter, Entry, EntryKind};
use cvmfs_format::{ContainerError, ContentHash, HashAlgorithm, PathHash};
use rusqlite::Connection;

struct Hostile {
    _directory: tempfile::TempDir,
    path: PathBuf,
}

/// A good catalog with `/f` (regular), `/l` (symlink) and `/n` (nested), changed by an SQL statement.
fn hostile(sql: &str) -> Hostile {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("catalog");
    let mut writer = CatalogWriter::create(&path, b"").unwrap();
    writer.insert(&Entry::new(b"", EntryKind::Directory, 0o755)).unwrap();
    let mut file = Entry::new(b"/f", EntryKind::File, 0o644);
    file.hash = Some(ContentHash::of(HashAlgorithm::Sha1, b"f"));
    file.size = 5;
    writer.insert(&file).unwrap();
    let mut link = Entry::new(b"/l", EntryKind::Symlink, 0o777);
    link.symlink = b"target".to_vec();
    writer.insert(&link).unwrap();
    writer.add_nested(b"/n", ContentHash::of(HashAlgorithm::Sha1, b"n"), 1).unwrap();
    writer.finish(1, None, Some(240), 1).unwrap();
    let connection = Connection::open(&path).unwrap();
    connection.execute_batch("PRAGMA foreign_keys = OFF").unwrap();
    connection.execute_batch(sql).unwrap_or_else(|error| panic!("{sql}: {error}"));
    Hostile { _directory: directory, path }
}

fn lookup(sql: &str, path: &str) -> Result<Option<Entry>, CatalogError> {
    let hostile = hostile(sql);
    Catalog::open(&hostile.path).unwrap().lookup(PathHash::of(path.as_bytes()))
}

#[test]
fn row_38_impossible_column_values_are_errors_that_name_row_and_column() {
    for (change, column) in [
        ("size = -1", "size"),
        ("size = NULL", "size"),
        ("size = 'big'", "size"),
        ("mode = 0", "mode"),
        ("mode = 420", "mode"),
        ("mode = -1", "mode"),
        ("mode = 4294967296 + 33188", "mode"),
        ("hash = x'00'", "hash"),
        ("hash = x'000000000000000000000000000000000000000000'", "hash"),
        ("hash = 5", "hash"),
        ("flags = 4 | (7 << 8)", "flags"),
        ("flags = 4 | (2 << 11)", "flags"),
        ("flags = -1", "flags"),
        ("flags = NULL", "flags"),
        ("flags = 68 | (3 << 8), hash = NULL", "flags"),
        ("hardlinks = NULL", "hardlinks"),
        ("mtime = NULL", "mtime"),
        ("mtime = 1.5", "mtime"),
        ("uid = 4294967296", "uid"),
        ("gid = -2", "gid"),
        ("xattr = 5.5", "xattr"),
    ] {
        let error = lookup(&format!("UPDATE catalog SET {change} WHERE name = 'f'"), "/f").unwrap_err();
        let CatalogError::Row { rowid: 2, reason } = &error else { panic!("{change}: {error}") };
        assert!(reason.starts_with(&format!("column {column}: ")), "{change}: {error}");
    }
}

#[test]
fn odd_but_harmless_values_are_tolerated() {
    let good = |change: &str, path: &str| {
        let column = if path == "/f" { "name = 'f'" } else { "name = 'l'" };
        lookup(&format!("UPDATE catalog SET {change} WHERE {column}"), path).unwrap().unwrap()
    };
    assert_eq!(good("symlink = NULL", "/l").symlink, b"");
    assert_eq!(good("name = NULL", "/f").name, b"");
    assert_eq!(good("uid = -1", "/f").uid, u32::MAX);
    assert_eq!(good("gid = 4294967295", "/f").gid, u32::MAX);
    assert_eq!(good("mtimens = 1000000000", "/f").mtime_ns, None);
    assert_eq!(good("mtimens = 'x'", "/f").mtime_ns, None);
    assert_eq!(good("mtime = -5, mtimens = 999999999", "/f").mtime_ns, Some(999_999_999));
    assert_eq!(good("hardlinks = 0", "/f").nlink(), 1);
    assert_eq!(good("hardlinks = -1", "/f").link_group, u32::MAX);
    assert_eq!(good("size = -1", "/l").size, 0);
    assert_eq!(good("hash = zeroblob(20)", "/f").hash, None);
    assert_eq!(good("mode = 8192 + 420, size = -1", "/f").device_number(), Some((u32::MAX, u32::MAX)));
    // The mode decides on the type, whatever the flags say.
    assert_eq!(good("flags = flags | 1", "/f").kind(), EntryKind::File);
    assert!(!good("flags = flags | 2", "/f").is_nested_mountpoint());
}

#[test]
fn row_37_names_no_directory_can_hold_are_not_listed() {
    for name in
        ["''", "NULL", "'.'", "'..'", "'a/b'", "x'6100'", "CAST(x'6100' AS TEXT)", "printf('%.*c', 256, 'x')"]
    {
        let hostile = hostile(&format!("UPDATE catalog SET name = {name} WHERE name = 'f'"));
        let catalog = Catalog::open(&hostile.path).unwrap();
        let names: Vec<_> =
            catalog.list(PathHash::of(b"")).unwrap().into_iter().map(|entry| entry.name).collect();
        assert_eq!(names, [b"l"], "{name}");
        assert_eq!(catalog.list_all(PathHash::of(b"")).unwrap().len(), 2, "{name}");
        assert!(catalog.lookup(PathHash::of(b"/f")).unwrap().is_some());
    }
    let hidden = hostile("UPDATE catalog SET flags = flags | 32768 WHERE name = 'f'");
    let catalog = Catalog::open(&hidden.path).unwrap();
    assert_eq!(catalog.list(PathHash::of(b"")).unwrap().len(), 1);
    assert!(catalog.lookup(PathHash::of(b"/f")).unwrap().unwrap().is_hidden());
}

#[test]
fn a_value_of_many_megabytes_is_refused_without_being_copied() {
    let error = lookup("UPDATE catalog SET symlink = printf('%.*c', 100000000, 'x') WHERE name = 'l'", "/l")
        .unwrap_err();
    assert!(matches!(error, CatalogError::Container(ContainerError::Sqlite { .. })), "{error}");
    let hostile = hostile("UPDATE properties SET value = printf('%.*c', 5000000, 'x') WHERE key = 'TTL'");
    assert!(Catalog::open(&hostile.path).is_err());
}

#[test]
fn row_38_chunk_lists_with_gaps_overlaps_or_odd_values_are_refused() {
    let chunk = "INSERT INTO chunks SELECT md5path_1, md5path_2, ";
    let tail = " FROM catalog WHERE name = 'f';";
    let digest = "zeroblob(20)";
    let chunked = "UPDATE catalog SET flags = flags | 64 WHERE name = 'f';";
    let open = |rows: &[&str]| {
        let sql: String = rows.iter().map(|row| format!("{chunk}{row}{tail}")).collect();
        let hostile = hostile(&format!("{chunked}{sql}"));
        let catalog = Catalog::open(&hostile.path).unwrap();
        let entry = catalog.lookup(PathHash::of(b"/f")).unwrap().unwrap();
        catalog.chunks_of(&entry)
    };
    assert_eq!(open(&[&format!("3, 2, {digest}"), &format!("0, 3, {digest}")]).unwrap().len(), 2);
    for rows in [
        vec![],
        vec![format!("0, 4, {digest}")],
        vec![format!("0, 6, {digest}")],
        vec![format!("1, 4, {digest}")],
        vec![format!("0, 2, {digest}"), format!("3, 2, {digest}")],
        vec![format!("0, 3, {digest}"), format!("2, 3, {digest}")],
        vec![format!("0, 0, {digest}"), format!("0, 5, {digest}")],
        vec![format!("0, -5, {digest}")],
        vec![format!("-5, 10, {digest}")],
        vec![format!("NULL, 5, {digest}")],
        vec!["0, 5, NULL".to_owned()],
        vec!["0, 5, x'00'".to_owned()],
    ] {
        let rows: Vec<&str> = rows.iter().map(String::as_str).collect();
        assert!(matches!(open(&rows), Err(CatalogError::Chunks { .. })), "{rows:?}");
    }
}

#[test]
fn references_without_path_or_hash_are_refused() {
    for change in
        ["path = 'n'", "path = ''", "path = NULL", "sha1 = ''", "sha1 = NULL", "sha1 = 'x'", "sha1 = 5"]
    {
        let hostile = hostile(&format!("UPDATE nested_catalogs SET {change}"));
        let catalog = Catalog::open(&hostile.path).unwrap();
        assert!(matches!(catalog.nested(), Err(CatalogError::Reference { .. })), "{change}");
    }
    for change in ["size = NULL", "size = -5", "size = 'x'"] {
        let hostile = hostile(&format!("UPDATE nested_catalogs SET {change}"));
        assert_eq!(Catalog::open(&hostile.path).unwrap().nested().unwrap()[0].size, 0);
    }
}

#[test]
fn row_35_newer_and_unsupported_schemas_are_refused() {
    let open = |path: &Path| Catalog::open(path).map(drop);
    for (schema, is_good) in [
        ("2.5", true),
        ("2.4", true),
        ("2.5004", true),
        ("1.2", true),
        ("2.6", false),
        ("3.0", false),
        ("2.2", false),
    ] {
        let hostile = hostile(&format!("UPDATE properties SET value = '{schema}' WHERE key = 'schema'"));
        let result = open(&hostile.path);
        assert_eq!(result.is_ok(), is_good, "{schema}: {result:?}");
        let unsupported =
            matches!(result, Err(CatalogError::Container(ContainerError::UnsupportedSchema { .. })));
        assert_eq!(unsupported, !is_good);
        assert_eq!(CatalogWriter::open(&hostile.path).is_ok(), schema.starts_with("2.5"), "{schema}");
    }
    for value in ["'x'", "'NaN'", "''"] {
        let hostile = hostile(&format!("UPDATE properties SET value = {value} WHERE key = 'schema'"));
        assert!(open(&hostile.path).is_err(), "{value}");
    }
}

#[test]
fn row_35_views_in_place_of_tables_and_missing_columns_are_refused() {
    let recursive = "DROP TABLE nested_catalogs; CREATE VIEW nested_catalogs AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL \
                     SELECT x + 1 FROM n) SELECT '/' || x AS path, x AS sha1, 0 AS size FROM n;";
    let hostile_view = hostile(recursive);
    let error = Catalog::open(&hostile_view.path).unwrap_err();
    assert!(
        matches!(
            error,
            CatalogError::Container(ContainerError::MissingTable { table: "nested_catalogs", .. })
        ),
        "{error}"
    );
    let renamed = hostile("ALTER TABLE catalog RENAME COLUMN flags TO flag");
    let error = Catalog::open(&renamed.path).unwrap_err();
    assert!(
        matches!(error, CatalogError::Container(ContainerError::MissingColumn { column: "flags", .. })),
        "{error}"
    );
}

#[test]
fn properties_that_are_no_numbers_are_refused_and_missing_ones_have_defaults() {
    for key in ["revision", "TTL", "last_modified", "schema_revision"] {
        let hostile = hostile(&format!("UPDATE properties SET value = 'many' WHERE key = '{key}'"));
        let error = Catalog::open(&hostile.path).unwrap_err();
        assert!(
            matches!(error, CatalogError::Container(ContainerError::BadProperty { .. })),
            "{key}: {error}"
        );
    }
    let bare = hostile("DELETE FROM properties WHERE key NOT IN ('schema', 'schema_revision')");
    let catalog = Catalog::open(&bare.path).unwrap();
    assert_eq!(
        (catalog.revision(), catalog.ttl(), catalog.previous(), catalog.root_prefix()),
        (0, 240, None, &b""[..])
    );
    let zeros = hostile(
        "INSERT INTO properties VALUES ('previous_revision', '0000000000000000000000000000000000000000')",
    );
    assert_eq!(Catalog::open(&zeros.path).unwrap().previous(), None);
}
