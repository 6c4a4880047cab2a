//! Good documents from the repositories that the C++ tools have written.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};

use cvmfs_format::compression::{Compression, inflate};
use cvmfs_format::letter::Letter;
use cvmfs_format::manifest::Manifest;
use cvmfs_format::{ContentHash, ObjectKind, ObjectName};
use testkit::Fixture;

/// Largest database of the fixtures.
const MAX_PLAIN: u64 = 64 << 20;

static UNPACKED: LazyLock<Mutex<HashMap<&'static str, &'static Fixture>>> = LazyLock::new(Mutex::default);

/// An unpacked fixture, kept until the process ends.
pub(crate) fn fixture(name: &'static str) -> &'static Fixture {
    let mut unpacked = UNPACKED.lock().unwrap_or_else(PoisonError::into_inner);
    unpacked.entry(name).or_insert_with(|| {
        let fixture = Fixture::unpack(name).expect("the fixture is part of the sources");
        // Statics are not dropped: the next run sweeps the directory.
        Box::leak(Box::new(fixture))
    })
}

/// A file of a fixture's storage.
pub(crate) fn stored(name: &'static str, path: &str) -> Vec<u8> {
    std::fs::read(fixture(name).storage.join(path)).expect("the fixture has this file")
}

pub(crate) fn manifest(name: &'static str) -> Manifest {
    let letter = stored(name, ".cvmfspublished");
    let letter = Letter::parse(&letter).expect("the fixture is good");
    Manifest::parse(letter.text).expect("the fixture is good")
}

/// An object of a fixture, decompressed.
pub(crate) fn object(name: &'static str, hash: ContentHash, kind: ObjectKind) -> Vec<u8> {
    let path = ObjectName::new(hash, kind).path();
    inflate(Compression::Zlib, &stored(name, &path), MAX_PLAIN).expect("the fixture is good")
}

/// The root catalog of a fixture.
pub(crate) fn root_catalog(name: &'static str) -> Vec<u8> {
    object(name, manifest(name).root_catalog, ObjectKind::Catalog)
}
