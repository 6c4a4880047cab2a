//! The client's look-ups in catalogs that contradict themselves and each other.

use std::collections::VecDeque;

use cvmfs_client::config::{ClientSettings, Config, ConfigSources};
use cvmfs_client::deadline::Deadline;
use cvmfs_client::snapshot::{Pin, Snapshot};
use cvmfs_client::store::ObjectStore;
use cvmfs_format::{ContentHash, HashAlgorithm};
use std::time::Duration;
use tempfile::TempDir;

use crate::Target;
use crate::databases::{change_rows, row_changes, small_catalog};

/// Nodes that a walk looks at.
const MAX_WALK: usize = 300;

pub(crate) const SNAPSHOT: Target =
    Target { name: "snapshot", run: snapshot, seeds: row_changes, words: &[] };

/// A client without servers, whose cache holds what the target puts there.
pub(crate) struct Bench {
    directory: TempDir,
    pub(crate) store: ObjectStore,
    root: Vec<u8>,
    nested: Vec<u8>,
}

impl Bench {
    pub(crate) fn new() -> Bench {
        let directory = tempfile::tempdir().expect("a directory for the cache");
        let key = directory.path().join("key.pub");
        std::fs::write(&key, "").expect("the key is written");
        let overrides = [
            // Nobody listens at the port of `discard`: every fetch fails at once.
            ("CVMFS_SERVER_URL", "http://127.0.0.1:9/repository".to_owned()),
            ("CVMFS_HTTP_PROXY", "DIRECT".to_owned()),
            ("CVMFS_MAX_RETRIES", "0".to_owned()),
            // No name that an input invents leaves this machine.
            ("CVMFS_DNS_SERVER", "127.0.0.1".to_owned()),
            ("CVMFS_PUBLIC_KEY", key.display().to_string()),
            ("CVMFS_CACHE_BASE", directory.path().join("cache").display().to_string()),
        ];
        let overrides = overrides.map(|(name, value)| (name.to_owned(), value)).into();
        let sources = ConfigSources { files: Some(Vec::new()), overrides, ..ConfigSources::default() };
        let config = Config::load("fuzz.example.org", &sources).expect("a good configuration");
        let settings = ClientSettings::from(&config).expect("a good configuration");
        let store = ObjectStore::open(&settings).expect("a store");
        let (root, nested) = (small_catalog(b"", b"/nested"), small_catalog(b"/nested", b"/nested/nested"));
        Bench { directory, store, root, nested }
    }

    /// Puts a catalog into the cache under this hash, as if it had been verified, and changes its rows.
    fn place(&self, hash: ContentHash, good: &[u8], changes: &[u8]) {
        let text = hash.to_string();
        let path = self.store.cache().directory().join(&text[..2]).join(&text[2..]);
        let scratch = self.directory.path().join("catalog");
        std::fs::write(&scratch, good).expect("the catalog is written");
        change_rows(&scratch, changes);
        // A new file each time: the previous one may still be mapped.
        std::fs::rename(&scratch, path).expect("the catalog is in the cache");
    }
}

fn snapshot(bytes: &[u8]) {
    thread_local! {
        static BENCH: Bench = Bench::new();
    }
    BENCH.with(|bench| {
        let root = ContentHash::of(HashAlgorithm::Sha1, b"root");
        let (upper, lower) = bytes.split_at(bytes.len() / 2);
        bench.place(root, &bench.root, upper);
        // The nested catalogs below it refer to themselves, without end.
        bench.place(ContentHash::of(HashAlgorithm::Sha1, b"nested"), &bench.nested, lower);
        let deadline = Deadline::after(Duration::from_secs(30));
        let pin = Pin { root_hash: root, root_size: 0, revision: 1, timestamp: 1 };
        let Ok(snapshot) = Snapshot::pin("fuzz.example.org", &bench.store, pin, None, deadline) else {
            return;
        };
        let _ = (snapshot.entry_counts(), snapshot.counters(deadline), snapshot.ttl());
        for path in
            [&b"/nested/nested/nested/file"[..], b"/nested/file", b"/directory/below/../..", b"//file/x"]
        {
            let _ = snapshot.resolve(path, deadline);
        }
        walk(&snapshot, deadline);
        let _ = snapshot.find_by_path_hash(i64::MIN, i64::MAX, deadline);
        snapshot.detach_nested();
        let _ = snapshot.resolve(b"/nested/one", deadline);
        let _ = Snapshot::pin(
            "fuzz.example.org",
            &bench.store,
            Pin { revision: 2, ..pin },
            Some(&snapshot),
            deadline,
        );
    });
}

fn walk(snapshot: &Snapshot, deadline: Deadline) {
    let Ok(root) = snapshot.root(deadline) else { return };
    let mut waiting = VecDeque::from([root]);
    let mut steps = 0;
    while let Some(directory) = waiting.pop_front() {
        let Ok((_, entries)) = snapshot.list(&directory, deadline) else { continue };
        for entry in entries {
            steps += 1;
            if steps > MAX_WALK {
                return;
            }
            assert!(!entry.name.contains(&b'/') && entry.name != b"..", "{:?}", entry.name);
            let Ok(Some(child)) = snapshot.child(&directory, &entry.name, deadline) else { continue };
            let _ = (snapshot.link_leader(&child, deadline), snapshot.chunks(&child, deadline));
            let _ = (snapshot.is_loaded(&child), snapshot.catalog_counters(&child, deadline));
            if child.entry.is_directory() {
                waiting.push_back(child);
            }
        }
    }
}
