//! A repository that is published and served, and what each of its revisions contains.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use cvmfs_format::chunking::ChunkSizes;
use cvmfs_publish::{IngestOptions, NewRepository, Publisher, create_repository};
use testkit::{Fault, Origin, ScratchDir};

use crate::tree::{Change, Edit, Tree};

pub const FQRN: &str = "model.example.org";

/// One key chain for all repositories: it takes longer to make than everything else of a small one.
static KEYS: LazyLock<ScratchDir> = LazyLock::new(|| {
    let directory = ScratchDir::new("model-keys").unwrap();
    create(&directory.path().join("storage"), directory.path());
    directory
});

fn create(storage: &Path, keys: &Path) {
    std::fs::create_dir_all(storage).unwrap();
    create_repository(&NewRepository::new(FQRN, storage.to_str().unwrap(), keys)).unwrap();
}

/// What is wrong with the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// Every request is answered with this status.
    Status(u16),
    /// Every connection is reset.
    Reset,
    /// Every body ends after so many bytes.
    Cut(u64),
    /// One bit of every body is wrong.
    Flip(u64),
}

impl Trouble {
    /// Whether clients remember for a while that an object cannot be had.
    pub fn is_remembered(self) -> bool {
        matches!(self, Trouble::Status(404) | Trouble::Flip(_))
    }
}

/// See the module documentation.
#[derive(Debug)]
pub struct Site {
    pub origin: Origin,
    trees: BTreeMap<u64, Arc<Tree>>,
    directory: ScratchDir,
}

impl Site {
    /// A new repository without entries.
    pub fn new() -> Site {
        let directory = ScratchDir::new("model").unwrap();
        let storage = directory.path().join("storage");
        create(&storage, KEYS.path());
        let origin = Origin::serve(&storage).unwrap();
        Site { origin, trees: BTreeMap::from([(1, Arc::default())]), directory }
    }

    /// Number of the newest revision.
    pub fn newest(&self) -> u64 {
        *self.trees.keys().last().unwrap()
    }

    /// What a revision contains.
    pub fn tree(&self, revision: u64) -> Arc<Tree> {
        self.trees[&revision].clone()
    }

    /// Publishes the next revision.
    pub fn publish(&mut self, edits: &[Edit]) {
        let mut tree = Tree::clone(&self.tree(self.newest()));
        let changes = tree.edit(edits);
        let options = IngestOptions {
            xattrs: true,
            chunk_sizes: Some(ChunkSizes { min: 8 << 10, avg: 16 << 10, max: 32 << 10 }),
            ..IngestOptions::default()
        };
        let storage = self.directory.path().join("storage");
        let mut publisher = Publisher::open(FQRN, storage.to_str().unwrap(), KEYS.path()).unwrap();
        let mut transaction = publisher.begin().unwrap();
        for change in changes {
            match change {
                Change::Ingest(tar) => {
                    let report = transaction.ingest_tar(b"/", &tar.finish()[..], &options).unwrap();
                    assert_eq!(report.warnings, [""; 0], "{edits:?}");
                }
                Change::Delete(path) => transaction.delete(format!("/{path}").as_bytes()).unwrap(),
            }
        }
        let report = transaction.commit(None).unwrap();
        self.trees.insert(report.revision, Arc::new(tree));
    }

    pub fn disturb(&self, trouble: Option<Trouble>) {
        self.origin.clear_faults();
        let fault = match trouble {
            None => return,
            Some(Trouble::Status(status)) => Fault::Status(status),
            Some(Trouble::Reset) => Fault::Reset,
            Some(Trouble::Cut(length)) => Fault::Truncate(length),
            Some(Trouble::Flip(offset)) => Fault::Flip(offset),
        };
        self.origin.set_fault("*", fault);
    }

    /// A client configuration for this repository, with a cache of its own.
    pub fn client_config(&self) -> PathBuf {
        let file = self.directory.path().join("client.conf");
        let key = KEYS.path().join(format!("{FQRN}.pub"));
        testkit::fixture::write_client_config(&file, &self.cache_base(), &self.origin.url(), &key).unwrap();
        let more = format!(
            "CVMFS_TIMEOUT=2\nCVMFS_TIMEOUT_DIRECT=2\nCVMFS_MAX_RETRIES=1\nCVMFS_BACKOFF_INIT=0\nCVMFS_BLACKLIST={}\n",
            self.directory.path().join("blacklist").display()
        );
        let text = std::fs::read_to_string(&file).unwrap() + &more;
        std::fs::write(&file, text).unwrap();
        file
    }

    fn cache_base(&self) -> PathBuf {
        self.directory.path().join("cache")
    }

    /// Removes files of the cache, all or by `choice`, as an administrator or another process might.
    pub fn evict(&self, choice: u8) {
        for (number, path) in self.cached_files().into_iter().enumerate() {
            if choice == 0 || (number * 7 + usize::from(choice)) % 3 == 0 {
                let _ = std::fs::remove_file(path);
            }
        }
    }

    /// What a power failure leaves of some files: fewer bytes than there should be, or none.
    pub fn damage_cache(&self, choice: u8) {
        for (number, path) in self.cached_files().into_iter().enumerate() {
            if (number + usize::from(choice)) % 3 == 0 {
                let file = std::fs::File::options().write(true).open(path).unwrap();
                let length = file.metadata().unwrap().len();
                file.set_len(if choice.is_multiple_of(2) { 0 } else { length / 2 }).unwrap();
            }
        }
        let stray = self.cache_base().join("shared/ab");
        if stray.is_dir() {
            std::fs::write(stray.join("no-hash-at-all"), b"stray").unwrap();
        }
    }

    /// The files below the directories of objects and of partly present files, sorted.
    fn cached_files(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for directory in std::fs::read_dir(self.cache_base().join("shared")).into_iter().flatten().flatten() {
            let name = directory.file_name().to_string_lossy().into_owned();
            if name.len() == 2 || name == "chunked" {
                let files = std::fs::read_dir(directory.path()).into_iter().flatten().flatten();
                found.extend(files.map(|file| file.path()));
            }
        }
        found.sort();
        found
    }
}
