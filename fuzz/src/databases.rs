//! SQLite files from foreign hands: catalogs, histories, reference logs.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use cvmfs_format::catalog::{Catalog, CatalogWriter, Entry, EntryKind, is_valid_name};
use cvmfs_format::history::History;
use cvmfs_format::reflog::Reflog;
use cvmfs_format::xattr::Xattrs;
use cvmfs_format::{ContentHash, HashAlgorithm, ObjectKind, PathHash};
use rusqlite::Connection;
use rusqlite::types::Value;

use crate::{Bytes, Target, fixtures};

/// Entries that a walk looks at: a damaged tree may be endless.
const MAX_WALK: usize = 2000;

pub(crate) const CATALOG: Target = Target {
    name: "catalog",
    run: |bytes| with_file(bytes, |path| drop(Catalog::open(path).map(|catalog| walk(&catalog)))),
    seeds: || {
        let mut seeds: Vec<_> =
            ["special", "chunked", "hardlinks", "xattrs"].map(fixtures::root_catalog).into();
        seeds.push(small_catalog(b"", b""));
        seeds
    },
    words: &[
        "CREATE TABLE ",
        "CREATE VIEW ",
        "catalog",
        "nested_catalogs",
        "chunks",
        "properties",
        "SQLite format 3\0",
    ],
};

pub(crate) const CATALOG_ROWS: Target =
    Target { name: "catalog_rows", run: catalog_rows, seeds: row_changes, words: &[] };

pub(crate) const HISTORY: Target = Target {
    name: "history",
    run: |bytes| with_file(bytes, history),
    seeds: || {
        let hash = fixtures::manifest("history").history.expect("the fixture has tags");
        vec![fixtures::object("history", hash, ObjectKind::History)]
    },
    words: &["tags", "branches", "recycle_bin", "properties", "trunk"],
};

pub(crate) const REFLOG: Target = Target {
    name: "reflog",
    run: |bytes| with_file(bytes, reflog),
    seeds: || vec![fixtures::stored("history", ".cvmfsreflog")],
    words: &["refs", "properties"],
};

thread_local! {
    static FILE: RefCell<Option<(tempfile::TempDir, PathBuf)>> = const { RefCell::new(None) };
}

/// Gives `bytes` to `read` as a file.
pub(crate) fn with_file(bytes: &[u8], read: impl FnOnce(&Path)) {
    let path = FILE.with_borrow_mut(|file| {
        let (_, path) = file.get_or_insert_with(|| {
            let directory = tempfile::tempdir().expect("a directory for the input");
            let path = directory.path().join("input");
            (directory, path)
        });
        path.clone()
    });
    // A new file each time: the previous one may still be mapped.
    let _ = std::fs::remove_file(&path);
    std::fs::write(&path, bytes).expect("the input is written");
    read(&path);
}

/// Asks a catalog everything that clients and publishers ask.
fn walk(catalog: &Catalog) {
    let _ = (catalog.schema(), catalog.revision(), catalog.ttl(), catalog.previous(), catalog.voms_authz());
    let _ = catalog.counters().map(|counters| counters.total().entries());
    let _ =
        (catalog.missing_counters(), catalog.chunk_count(), catalog.max_rowid(), catalog.max_link_group());
    let _ = catalog.link_group_leaders();
    let _ = catalog.by_path_prefix(i64::MIN, i64::MAX);
    let mut seen = 0;
    let _ = catalog.for_each(|entry| {
        if let Ok(entry) = entry
            && seen < MAX_WALK
        {
            seen += 1;
            look_at(catalog, &entry);
        }
        Ok(())
    });
    for nested in [catalog.nested(), catalog.bind_mountpoints()].into_iter().flatten().flatten() {
        assert!(nested.path.starts_with(b"/"), "{nested:?}");
        let _ = (catalog.nested_at(&nested.path), catalog.nested_for(&nested.path));
    }
    let mut waiting = VecDeque::from([PathHash::of(catalog.root_prefix())]);
    let mut steps = 0;
    while let Some(directory) = waiting.pop_front() {
        let Ok(entries) = catalog.list(directory) else { continue };
        for entry in entries {
            assert!(is_valid_name(&entry.name), "a name that leads astray is listed: {:?}", entry.name);
            steps += 1;
            if entry.is_directory() && steps < MAX_WALK {
                waiting.push_back(entry.path_hash);
            }
        }
    }
}

fn look_at(catalog: &Catalog, entry: &Entry) {
    let _ = (entry.nlink(), entry.device_number(), entry.compression(), entry.algorithm());
    let _ = entry.xattrs.as_deref().map(Xattrs::parse);
    let _ = catalog.by_rowid(entry.rowid);
    if let Ok(chunks) = catalog.chunks_of(entry)
        && entry.is_chunked()
    {
        let mut end = 0_u64;
        for chunk in &chunks {
            assert_eq!(chunk.offset, end, "chunks have gaps: {chunks:?}");
            end = chunk.offset.checked_add(chunk.size).expect("chunks end somewhere");
        }
        assert_eq!(end, entry.size, "chunks and size disagree");
    }
}

fn history(path: &Path) {
    let Ok(history) = History::open(path) else { return };
    let _ = (history.fqrn(), history.previous());
    let tags = history.tags().unwrap_or_default();
    for tag in tags.iter().take(MAX_WALK) {
        if let Ok(Some(found)) = history.tag(&tag.name) {
            assert_eq!(found.name, tag.name);
        }
        let _ = history.tag_at(tag.timestamp);
    }
    let _ = (history.tag_at(i64::MIN), history.tag_at(i64::MAX), history.tag(""));
}

fn reflog(path: &Path) {
    let Ok(reflog) = Reflog::open(path) else { return };
    let _ = reflog.fqrn();
    for reference in reflog.references().unwrap_or_default().iter().take(MAX_WALK) {
        let _ = reflog.timestamp(reference.hash);
    }
}

/// A catalog with one of each: file, chunked file, link, device, hard links, attributes, nested catalogs.
pub(crate) fn small_catalog(prefix: &[u8], nested: &[u8]) -> Vec<u8> {
    let directory = tempfile::tempdir().expect("a directory for the catalog");
    let path = directory.path().join("catalog");
    let mut writer = CatalogWriter::create(&path, prefix).expect("a new catalog");
    let at = |name: &str| [prefix, name.as_bytes()].concat();
    let mut insert = |entry: &Entry| writer.insert(entry).expect("a new row");
    insert(&Entry::new(prefix, EntryKind::Directory, 0o755));
    let mut file = Entry::new(&at("/file"), EntryKind::File, 0o644);
    file.hash = Some(ContentHash::of(HashAlgorithm::Sha1, b"file"));
    file.size = 5;
    let mut xattrs = Xattrs::new();
    xattrs.insert(b"user.name".to_vec(), b"value".to_vec());
    file.xattrs = xattrs.to_bytes().expect("a short value");
    insert(&file);
    for name in ["/one", "/two"] {
        let mut linked = Entry::new(&at(name), EntryKind::File, 0o644);
        (linked.hash, linked.size) = (file.hash, 5);
        (linked.link_group, linked.link_count) = (1, 2);
        insert(&linked);
    }
    let mut link = Entry::new(&at("/link"), EntryKind::Symlink, 0o777);
    link.symlink = b"$(ARCH:-x86_64)/target".to_vec();
    insert(&link);
    let mut device = Entry::new(&at("/device"), EntryKind::CharDevice, 0o600);
    device.size = Entry::encode_device_number(1, 3);
    insert(&device);
    insert(&Entry::new(&at("/directory"), EntryKind::Directory, 0o755));
    insert(&Entry::new(&at("/directory/below"), EntryKind::Fifo, 0o644));
    if !nested.is_empty() {
        insert(&Entry::new(nested, EntryKind::Directory, 0o755));
        let hash = ContentHash::of(HashAlgorithm::Sha1, b"nested");
        writer.add_nested(nested, hash, 0).expect("a new reference");
    }
    writer.finish(7, None, Some(240), 1_700_000_000).expect("a whole catalog");
    std::fs::read(&path).expect("the catalog was written")
}

const COLUMNS: [(&str, &[&str]); 4] = [
    (
        "catalog",
        &[
            "md5path_1",
            "md5path_2",
            "parent_1",
            "parent_2",
            "hardlinks",
            "hash",
            "size",
            "mode",
            "mtime",
            "mtimens",
            "flags",
            "name",
            "symlink",
            "uid",
            "gid",
            "xattr",
        ],
    ),
    ("chunks", &["md5path_1", "md5path_2", "offset", "size", "hash"]),
    ("nested_catalogs", &["path", "sha1", "size"]),
    ("properties", &["key", "value"]),
];

/// Changes rows of a good catalog as `bytes` say: the tree below stays sound, so that its values are what is met.
pub(crate) fn change_rows(path: &Path, bytes: &[u8]) {
    let connection = Connection::open(path).expect("a good catalog");
    connection
        .execute_batch(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA foreign_keys = OFF; BEGIN",
        )
        .expect("pragmas are known");
    let mut bytes = Bytes(bytes);
    for _ in 0..32 {
        if bytes.is_empty() {
            break;
        }
        let (table, columns) = COLUMNS[usize::from(bytes.byte()) % COLUMNS.len()];
        let column = columns[usize::from(bytes.byte()) % columns.len()];
        let row = bytes.byte() % 12 + 1;
        // Some changes are refused by a constraint; that is all right.
        let _ = match bytes.byte() % 8 {
            0 => connection.execute(&format!("DELETE FROM {table} WHERE rowid = ?1"), [row]),
            1 => {
                // Another row's value.
                let other = bytes.byte() % 12 + 1;
                let sql = format!(
                    "UPDATE OR IGNORE {table} SET {column} = (SELECT {column} FROM {table} WHERE rowid = ?2) WHERE rowid = ?1"
                );
                connection.execute(&sql, [row, other])
            }
            2 => {
                // One bit of the flags, mode or number.
                let bit = bytes.byte() % 64;
                let sql = format!(
                    "UPDATE OR IGNORE {table} SET {column} = ({column} | ?2) - ({column} & ?2) WHERE rowid = ?1"
                );
                connection.execute(&sql, (row, 1_i64.wrapping_shl(bit.into())))
            }
            3 => {
                let sql = format!("INSERT OR IGNORE INTO {table} SELECT * FROM {table} WHERE rowid = ?1");
                connection.execute(&sql, [row])
            }
            _ => {
                let sql = format!("UPDATE OR IGNORE {table} SET {column} = ?2 WHERE rowid = ?1");
                connection.execute(&sql, (row, value(&mut bytes)))
            }
        };
    }
    connection.execute_batch("COMMIT").expect("the changes are written");
}

fn value(bytes: &mut Bytes<'_>) -> Value {
    match bytes.byte() % 6 {
        0 => Value::Null,
        1 | 2 => Value::Integer(bytes.number().cast_signed()),
        3 => Value::Real(f64::from_bits(bytes.number())),
        4 => {
            let length = usize::from(bytes.byte());
            Value::Text(String::from_utf8_lossy(bytes.take(length)).into_owned())
        }
        _ => {
            let length = usize::from(bytes.byte());
            Value::Blob(bytes.take(length).to_vec())
        }
    }
}

fn catalog_rows(bytes: &[u8]) {
    thread_local! {
        static GOOD: Vec<u8> = small_catalog(b"", b"/nested");
    }
    GOOD.with(|good| {
        with_file(good, |path| {
            change_rows(path, bytes);
            drop(Catalog::open(path).map(|catalog| walk(&catalog)));
        });
    });
}

/// Changes of one value each, as a start for others.
pub(crate) fn row_changes() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (table, (_, columns)) in COLUMNS.iter().enumerate() {
        for column in 0..columns.len() {
            for row in 0..10 {
                let kind = 4 + (row + column as u8) % 4;
                seeds.push(vec![table as u8, column as u8, row, kind, row % 6, 7, 1, 2, 3, 4, 5, 6, 7]);
            }
        }
    }
    seeds
}
