//! What the tests of this crate share: settings for servers on loopback, and a storage directory with objects.
#![allow(dead_code, clippy::unwrap_used)]

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cvmfs_client::cache::{Cache, CachedFile};
use cvmfs_client::config::{ClientSettings, Config, ConfigSources};
use cvmfs_client::deadline::Deadline;
use cvmfs_client::network::Fetcher;
use cvmfs_client::store::ObjectStore;
use cvmfs_format::compression::{Compression, Deflate};
use cvmfs_format::hash::{ContentHash, HashAlgorithm, ObjectKind, ObjectName};
use cvmfs_format::letter::seal;
use cvmfs_format::manifest::Manifest;
use cvmfs_format::signature::PrivateKey;
use testkit::Fixture;

/// The repository of tests that need no signatures.
pub const FQRN: &str = "test.example.org";

/// Settings made of `-o` options alone. `CVMFS_HTTP_PROXY` is `DIRECT` unless given.
pub fn settings(fqrn: &str, directory: &Path, options: &[(&str, &str)]) -> ClientSettings {
    let key = directory.join("unused.pub");
    std::fs::write(&key, "").unwrap();
    let mut overrides: Vec<(String, String)> = [
        ("CVMFS_HTTP_PROXY", "DIRECT"),
        ("CVMFS_PUBLIC_KEY", key.to_str().unwrap()),
        ("CVMFS_CACHE_BASE", directory.join("cache").to_str().unwrap()),
        ("CVMFS_BLACKLIST", directory.join("blacklist").to_str().unwrap()),
        ("CVMFS_BACKOFF_INIT", "0"),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .collect();
    overrides.extend(options.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
    let sources = ConfigSources { files: Some(Vec::new()), overrides, ..ConfigSources::default() };
    let config = Config::load(fqrn, &sources).unwrap();
    assert_eq!(config.notices(), [], "options of tests are known and supported");
    ClientSettings::from(&config).unwrap()
}

/// A storage directory with objects, and a store that reads it from servers.
pub struct Bench {
    pub directory: tempfile::TempDir,
}

impl Bench {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("storage")).unwrap();
        Self { directory }
    }

    pub fn storage(&self) -> PathBuf {
        self.directory.path().join("storage")
    }

    /// Publishes an object and returns its name.
    pub fn publish(&self, plain: &[u8], compression: Compression, kind: ObjectKind) -> ObjectName {
        let stored = match compression {
            Compression::None => plain.to_vec(),
            _ => Deflate::Fast.compress(plain),
        };
        let name = ObjectName::new(ContentHash::of(HashAlgorithm::Sha1, &stored), kind);
        let path = self.storage().join(name.path());
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, stored).unwrap();
        name
    }

    pub fn publish_file(&self, plain: &[u8]) -> ObjectName {
        self.publish(plain, Compression::Zlib, ObjectKind::File)
    }

    pub fn settings(&self, servers: &str, options: &[(&str, &str)]) -> ClientSettings {
        let mut all = vec![("CVMFS_SERVER_URL", servers)];
        all.extend(options);
        settings(FQRN, self.directory.path(), &all)
    }

    pub fn store(&self, servers: &str, options: &[(&str, &str)]) -> ObjectStore {
        ObjectStore::open(&self.settings(servers, options)).unwrap()
    }

    /// A store with a cache in a directory of the caller's choice.
    pub fn store_in(&self, cache: &Path, limit: u64, servers: &str) -> ObjectStore {
        let fetcher = Fetcher::new(&self.settings(servers, &[])).unwrap();
        ObjectStore::new(fetcher, Cache::open(cache, limit).unwrap())
    }
}

/// The manifest of a storage directory, unverified.
pub fn manifest_of(storage: &Path) -> Manifest {
    Manifest::parse(&std::fs::read(storage.join(".cvmfspublished")).unwrap()).unwrap()
}

/// Changes the manifest and signs it with the repository's key.
pub fn republish(fixture: &Fixture, change: impl FnOnce(&mut Manifest)) {
    let mut manifest = manifest_of(&fixture.storage);
    change(&mut manifest);
    sign(fixture, manifest.root_catalog.algorithm, manifest.to_text());
}

/// Changes the text of the manifest and signs it with the repository's key.
pub fn republish_text(fixture: &Fixture, change: impl FnOnce(&[u8]) -> Vec<u8>) {
    let manifest = manifest_of(&fixture.storage);
    sign(fixture, manifest.root_catalog.algorithm, change(&manifest.to_text()));
}

fn sign(fixture: &Fixture, algorithm: HashAlgorithm, text: Vec<u8>) {
    let key = fixture.keys.as_ref().unwrap().join(format!("{}.key", fixture.fqrn));
    let key = PrivateKey::from_pem(&std::fs::read(key).unwrap()).unwrap();
    let sealed = seal(text, algorithm, |text| key.sign_manifest(text)).unwrap();
    std::fs::write(fixture.storage.join(".cvmfspublished"), sealed).unwrap();
}

/// Bytes that do not compress, different for each seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

pub fn seconds(seconds: u64) -> Deadline {
    Deadline::after(Duration::from_secs(seconds))
}

pub fn content(file: &CachedFile) -> Vec<u8> {
    use std::os::fd::AsRawFd;
    let mut bytes = Vec::new();
    let path = format!("/proc/self/fd/{}", file.file.as_raw_fd());
    std::fs::File::open(path).unwrap().read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len() as u64, file.size);
    bytes
}

/// Names of the files that the cache holds under the names of objects.
pub fn cached_files(cache: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for number in 0..=255_u8 {
        for entry in std::fs::read_dir(cache.join(format!("{number:02x}"))).into_iter().flatten() {
            files.push(entry.unwrap().path());
        }
    }
    files
}

/// How many files are being written in the cache.
pub fn temporary_files(cache: &Path) -> usize {
    let processes = std::fs::read_dir(cache.join("txn")).unwrap();
    let files = processes.flat_map(|process| std::fs::read_dir(process.unwrap().path()).unwrap());
    files
        .filter(|file| !["life", "pins"].contains(&file.as_ref().unwrap().file_name().to_str().unwrap()))
        .count()
}

/// A port of loopback on which nobody listens.
pub fn closed_port() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

/// The number of requests that the origin has answered. An answer is noted after it was sent, so up to `expected`
/// requests are waited for.
pub fn requests(origin: &testkit::Origin, expected: usize) -> usize {
    let begun = std::time::Instant::now();
    while origin.requests().len() < expected && begun.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(2));
    }
    origin.requests().len()
}
