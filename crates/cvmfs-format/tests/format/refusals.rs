//! Broken repositories are refused with the reason an administrator needs.

use crate::common::Fixture;
use cvmfs_format::catalog::Catalog;
use cvmfs_format::compression::{Compression, inflate};
use cvmfs_format::{ContentHash, ObjectKind, ObjectName, PathHash};

#[test]
fn each_broken_chain_of_trust_is_refused_for_its_own_reason() {
    for (name, reason) in [
        ("bad-expired-whitelist", "whitelist expired on 2020-"),
        (
            "bad-fqrn",
            "repository name does not match (found basic-sha1.peer.example.org, expected other.example.org)",
        ),
        ("bad-manifest-sig", "text was changed: its hash is "),
        ("bad-whitelist-fingerprint", "certificate not on whitelist (fingerprint B8:7D:D3:8A:"),
        ("bad-whitelist-sig", "text was changed: its hash is "),
        ("bad-wrong-key", "invalid whitelist signature (none of 1 public keys matches)"),
    ] {
        let error = Fixture::unpack(name).verify().unwrap_err();
        assert!(error.starts_with(reason), "{name}: {error}");
    }
}

#[test]
fn a_changed_text_with_a_fitting_hash_line_is_refused_by_the_signature() {
    let fixture = Fixture::unpack("basic-sha1");
    for (file, reason) in [
        (".cvmfspublished", "failed to verify repository manifest"),
        (".cvmfswhitelist", "invalid whitelist signature"),
    ] {
        let original = fixture.read(file);
        let end = original.windows(4).position(|window| window == b"\n--\n").unwrap() + 1;
        let mut text = original[..end].to_vec();
        text.extend_from_slice(b"Q\n");
        let hash = ContentHash::of(Default::default(), &text).to_string();
        text.extend_from_slice(format!("--\n{hash}\n").as_bytes());
        text.extend_from_slice(&original[end + 3 + 41..]);
        std::fs::write(fixture.storage.join(file), &text).unwrap();
        let error = fixture.verify().unwrap_err();
        assert!(error.starts_with(reason), "{file}: {error}");
        std::fs::write(fixture.storage.join(file), &original).unwrap();
        fixture.verify().unwrap();
    }
}

#[test]
fn damaged_objects_do_not_have_their_hash() {
    for name in ["bad-object-flip", "bad-object-truncated"] {
        let fixture = Fixture::unpack(name);
        let catalog = fixture.catalog(fixture.verify().unwrap().root_catalog);
        let entry = catalog.lookup(PathHash::of(b"/sizes/rnd100001")).unwrap().unwrap();
        let hash = entry.hash.unwrap();
        let stored = fixture.read(&ObjectName::new(hash, ObjectKind::File).path());
        assert_ne!(ContentHash::of(hash.algorithm, &stored), hash, "{name}");
        // Whatever the inflater makes of it, it is not the file.
        if let Ok(plain) = inflate(Compression::Zlib, &stored, entry.size) {
            assert_ne!(plain.len() as u64, entry.size, "{name}");
        }
    }
}

#[test]
fn a_missing_nested_catalog_is_still_known_by_its_reference() {
    let fixture = Fixture::unpack("bad-nested-missing");
    let catalog = fixture.catalog(fixture.verify().unwrap().root_catalog);
    assert!(catalog.lookup(PathHash::of(b"/software")).unwrap().unwrap().is_nested_mountpoint());
    let nested = catalog.nested_for(b"/software/setup.sh").unwrap().unwrap();
    assert_eq!(nested.path, b"/software");
    assert!(!fixture.storage.join(ObjectName::new(nested.hash, ObjectKind::Catalog).path()).exists());
}

#[test]
fn row_35_half_a_catalog_is_an_error_and_not_a_crash() {
    let fixture = Fixture::unpack("bad-root-truncated");
    let hash = fixture.verify().unwrap().root_catalog;
    let stored = fixture.read(&ObjectName::new(hash, ObjectKind::Catalog).path());
    assert_ne!(ContentHash::of(hash.algorithm, &stored), hash);
    let plain = inflate(Compression::Zlib, &stored, 1 << 20).unwrap();
    let path = fixture.root.join("half");
    for size in [0, 1, 50, 100, 1024, 4096, plain.len()] {
        std::fs::write(&path, &plain[..size]).unwrap();
        if let Ok(catalog) = Catalog::open(&path) {
            let _ = catalog.for_each(|_| Ok(()));
            let _ = catalog.lookup(PathHash::of(b"/README.md"));
            let _ = catalog.list(PathHash::of(b""));
            let _ = (catalog.nested(), catalog.counters(), catalog.max_rowid(), catalog.link_group_leaders());
        }
    }
}

#[test]
fn row_35_a_catalog_with_any_byte_destroyed_is_read_or_refused_but_never_crashes() {
    let fixture = Fixture::unpack("special");
    let manifest = fixture.manifest();
    let good = fixture.object(manifest.root_catalog, ObjectKind::Catalog);
    let path = fixture.root.join("damaged");
    let mut state = 1u32;
    for round in 0..600 {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        let mut damaged = good.clone();
        // The header page first, then anywhere.
        let position = if round < 100 { round } else { state as usize % good.len() };
        damaged[position] = (state >> 8) as u8;
        std::fs::write(&path, &damaged).unwrap();
        if let Ok(catalog) = Catalog::open(&path) {
            let _ = catalog.for_each(|_| Ok(()));
            let _ = catalog.list(PathHash::of(b""));
            let _ = (catalog.nested(), catalog.counters(), catalog.max_rowid(), catalog.link_group_leaders());
        }
        std::fs::remove_file(&path).unwrap();
    }
}
