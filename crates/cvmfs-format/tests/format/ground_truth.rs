//! Repositories written by the C++ tools are understood in every detail that their client shows.

use std::collections::BTreeMap;

use crate::common::{Fixture, GOOD, differences};
use cvmfs_format::catalog::{Counters, Counts};
use cvmfs_format::compression::{Compression, Deflate, inflate};
use cvmfs_format::history::History;
use cvmfs_format::reflog::{ReferenceKind, Reflog};
use cvmfs_format::{ContentHash, HashAlgorithm, ObjectKind, ObjectName};

#[test]
fn every_good_repository_is_trusted_with_its_master_key() {
    for name in GOOD {
        let fixture = Fixture::unpack(name);
        let manifest = fixture.verify().unwrap_or_else(|error| panic!("{name}: {error}"));
        let text = manifest.to_text();
        assert!(fixture.read(".cvmfspublished").starts_with(&text), "{name}: the text is not reproduced");
        assert_eq!(fixture.catalog(manifest.root_catalog).revision(), manifest.revision);
    }
}

#[test]
fn every_entry_of_every_good_repository_is_as_the_cpp_client_shows_it() {
    for name in GOOD {
        let fixture = Fixture::unpack(name);
        let expected = fixture.expected("manifest.jsonl");
        let found = fixture.walk(fixture.manifest().root_catalog);
        let differences = differences(&expected, &found);
        assert!(differences.is_empty(), "{name}:\n{}", differences.join("\n"));
        assert!(expected.len() >= 9);
    }
}

#[test]
fn tagged_revisions_are_found_in_the_history_and_walked() {
    let fixture = Fixture::unpack("history");
    let manifest = fixture.manifest();
    let history = History::open(&fixture.database(manifest.history.unwrap(), ObjectKind::History)).unwrap();
    assert_eq!(history.fqrn(), fixture.fqrn);
    assert!(history.previous().is_some());
    let found: Vec<String> = history
        .tags()
        .unwrap()
        .iter()
        .map(|tag| {
            let (hash, size) = (tag.root_catalog, tag.root_catalog_size);
            format!(
                "{} {hash} {size} {} {} (default) {}",
                tag.name, tag.revision, tag.timestamp, tag.description
            )
        })
        .collect();
    let expected = std::fs::read_to_string(fixture.root.join("tags.txt")).unwrap();
    let sorted = |lines: &mut dyn Iterator<Item = &str>| {
        let mut lines: Vec<String> = lines.map(|line| line.trim_end().to_owned()).collect();
        lines.sort();
        lines
    };
    assert_eq!(sorted(&mut found.iter().map(String::as_str)), sorted(&mut expected.lines()));
    for name in ["v1", "v2", "v3"] {
        let tag = history.tag(name).unwrap().unwrap();
        let expected = fixture.expected(&format!("manifest-{name}.jsonl"));
        let differences = differences(&expected, &fixture.walk(tag.root_catalog));
        assert!(differences.is_empty(), "{name}:\n{}", differences.join("\n"));
        assert_eq!(history.tag_at(tag.timestamp).unwrap().unwrap(), tag);
    }
    assert_eq!(history.tag("v9").unwrap(), None);
    assert_eq!(history.tag_at(0).unwrap(), None);
    let trunk = history.tag("trunk").unwrap().unwrap();
    assert_eq!((trunk.root_catalog, trunk.revision), (manifest.root_catalog, manifest.revision));
}

#[test]
fn the_reflog_lists_what_the_manifest_names() {
    for name in GOOD {
        let fixture = Fixture::unpack(name);
        let manifest = fixture.manifest();
        let file = fixture.read(".cvmfsreflog");
        let found = ContentHash::of(manifest.root_catalog.algorithm, &file);
        // Garbage collection rewrites the reflog without signing the manifest again.
        assert_eq!(manifest.reflog == Some(found), name != "history-gc", "{name}");
        let reflog = Reflog::open(&fixture.storage.join(".cvmfsreflog")).unwrap();
        assert_eq!(reflog.fqrn(), fixture.fqrn);
        for (kind, hash) in [
            (ReferenceKind::Catalog, Some(manifest.root_catalog)),
            (ReferenceKind::Certificate, manifest.certificate),
            (ReferenceKind::History, manifest.history),
            (ReferenceKind::Metainfo, manifest.metainfo),
        ] {
            let listed = reflog.list(kind).unwrap();
            assert!(listed.iter().any(|reference| Some(reference.hash) == hash), "{name}: {kind:?}");
            for reference in reflog.references().unwrap() {
                let object = ObjectName::new(reference.hash, reference.kind.object_kind());
                assert!(fixture.storage.join(object.path()).exists(), "{name}: {object}");
                assert_eq!(reflog.timestamp(reference.hash).unwrap(), Some(reference.timestamp));
            }
        }
    }
}

#[test]
fn counters_follow_from_the_rows_in_every_catalog() {
    for name in GOOD {
        let fixture = Fixture::unpack(name);
        let catalogs = fixture.catalogs(fixture.manifest().root_catalog);
        let mut totals: BTreeMap<Vec<u8>, Counts> = BTreeMap::new();
        // Children follow their parents in the list.
        for (reference, catalog) in catalogs.iter().rev() {
            let mut computed = Counters::default();
            catalog
                .for_each(|entry| {
                    computed.own += Counts::of(&entry?);
                    Ok(())
                })
                .unwrap();
            computed.own.chunks = catalog.chunk_count().unwrap() as i64;
            for nested in catalog.nested().unwrap() {
                computed.own.nested += 1;
                computed.subtree += totals[&nested.path];
            }
            let stored = catalog.counters().unwrap();
            assert_eq!(computed, stored, "{name}: {}", String::from_utf8_lossy(&reference.path));
            assert_eq!(catalog.missing_counters().unwrap(), Vec::<String>::new());
            totals.insert(reference.path.clone(), computed.total());
        }
    }
}

#[test]
fn sizes_of_catalogs_in_manifest_and_references_are_the_plain_sizes() {
    for name in GOOD {
        let fixture = Fixture::unpack(name);
        let manifest = fixture.manifest();
        assert_eq!(
            fixture.object(manifest.root_catalog, ObjectKind::Catalog).len() as u64,
            manifest.root_catalog_size
        );
        for (reference, _) in fixture.catalogs(manifest.root_catalog).iter().skip(1) {
            assert_eq!(
                fixture.object(reference.hash, ObjectKind::Catalog).len() as u64,
                reference.size,
                "{name}"
            );
        }
    }
}

#[test]
fn stock_deflate_reproduces_every_stored_object_byte_for_byte() {
    for name in ["basic-sha1", "chunked"] {
        let fixture = Fixture::unpack(name);
        let mut objects = 0;
        for directory in std::fs::read_dir(fixture.storage.join("data")).unwrap() {
            for file in std::fs::read_dir(directory.unwrap().path()).into_iter().flatten() {
                let path = file.unwrap().path();
                let stored = std::fs::read(&path).unwrap();
                let plain = inflate(Compression::Zlib, &stored, 64 << 20).unwrap();
                assert!(Deflate::Stock.compress(&plain) == stored, "{name}: {}", path.display());
                assert_eq!(
                    inflate(Compression::Zlib, &Deflate::Fast.compress(&plain), 64 << 20).unwrap(),
                    plain
                );
                objects += 1;
            }
        }
        assert!(objects > 50, "{name}: only {objects} objects");
    }
}

#[test]
fn row_39_hard_link_leaders_are_the_first_rows_of_their_groups() {
    let fixture = Fixture::unpack("hardlinks");
    let mut groups = 0;
    for (_, catalog) in fixture.catalogs(fixture.manifest().root_catalog) {
        let mut expected = BTreeMap::new();
        catalog
            .for_each(|entry| {
                let entry = entry?;
                if entry.link_group != 0 {
                    expected.entry(entry.link_group).or_insert(entry.rowid);
                }
                assert_eq!(catalog.by_rowid(entry.rowid)?, Some(entry));
                Ok(())
            })
            .unwrap();
        let leaders: BTreeMap<_, _> = catalog.link_group_leaders().unwrap().into_iter().collect();
        assert_eq!(leaders, expected);
        assert_eq!(catalog.max_link_group().unwrap(), expected.keys().max().copied().unwrap_or(0));
        groups += leaders.len();
    }
    assert!(groups >= 3);
}

#[test]
fn a_walk_in_pieces_of_the_hash_space_sees_every_row_once() {
    let fixture = Fixture::unpack("basic-sha1");
    let catalog = fixture.catalog(fixture.manifest().root_catalog);
    let mut rows = 0;
    for piece in -8..8i64 {
        let lo = piece << 60;
        let found = catalog.by_path_prefix(lo, lo + ((1 << 60) - 1)).unwrap();
        assert!(found.is_sorted_by_key(|entry| (entry.path_hash.part1, entry.path_hash.part2)));
        rows += found.len() as i64;
    }
    assert_eq!(rows, catalog.counters().unwrap().own.entries());
    assert_eq!(catalog.max_rowid().unwrap(), rows);
}

#[test]
fn the_deepest_nested_catalog_of_a_path_is_found() {
    let fixture = Fixture::unpack("basic-sha1");
    let root = fixture.catalog(fixture.manifest().root_catalog);
    let at = |path: &str| {
        root.nested_for(path.as_bytes()).unwrap().map(|nested| String::from_utf8(nested.path).unwrap())
    };
    assert_eq!(at("/software/v1.0/x").as_deref(), Some("/software"));
    assert_eq!(at("/software").as_deref(), Some("/software"));
    assert_eq!(at("/software2"), None);
    assert_eq!(at("/softwar"), None);
    assert_eq!(at(""), None);
    assert_eq!(root.bind_mountpoints().unwrap(), []);
    assert_eq!(root.previous().unwrap().algorithm, HashAlgorithm::Sha1);
    assert_eq!(root.ttl(), 240);
    assert!(!root.is_volatile() && root.voms_authz().is_none());
    let volatile = Fixture::unpack("volatile");
    assert!(volatile.catalog(volatile.manifest().root_catalog).is_volatile());
}

#[test]
fn names_no_kernel_accepts_are_left_out_of_listings_and_shown_to_checks() {
    let fixture = Fixture::unpack("ingest-corner");
    let manifest = fixture.verify().unwrap();
    let mut expected = fixture.expected("manifest.jsonl");
    // The C++ client fails this listing because of an entry without name; here the directory appears without it.
    assert!(expected.get_mut("/doubleslash/d").unwrap().remove("error").is_some());
    let differences = differences(&expected, &fixture.walk(manifest.root_catalog));
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    let mut odd = Vec::new();
    for (_, catalog) in fixture.catalogs(manifest.root_catalog) {
        catalog
            .for_each(|entry| {
                let entry = entry?;
                if !entry.has_valid_name() && !entry.flags.has(1 << 5) {
                    let all = catalog.list_all(entry.parent)?;
                    assert!(all.contains(&entry) && !catalog.list(entry.parent)?.contains(&entry));
                    odd.push(String::from_utf8(entry.name).unwrap());
                }
                Ok(())
            })
            .unwrap();
    }
    odd.sort();
    odd.dedup();
    assert_eq!(odd, ["", ".", ".."]);
}
