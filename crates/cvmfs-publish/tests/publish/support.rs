//! Repositories in temporary directories, the publisher's binary, and two independent readers.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use base64::Engine;
use cvmfs_format::catalog::{Catalog, Entry, EntryKind};
use cvmfs_format::compression::inflate;
use cvmfs_format::xattr::Xattrs;
use cvmfs_format::{Compression, ContentHash, ObjectKind, ObjectName, PathHash};
use cvmfs_publish::check::{CheckOptions, CheckReport};
use cvmfs_publish::head::Head;
use cvmfs_publish::keys::KeyFiles;
use cvmfs_publish::storage::{self, Storage};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Entries by path, in the form of the fixtures' ground truth.
pub type Tree = BTreeMap<String, Value>;

/// A repository and its keys.
#[derive(Debug)]
pub struct Repository {
    pub fqrn: String,
    pub storage: PathBuf,
    pub keys: PathBuf,
    _directory: Option<tempfile::TempDir>,
}

impl Repository {
    /// A new repository; `options` are those of `mkfs`.
    pub fn create(options: &[&str]) -> Repository {
        let directory = tempfile::tempdir().unwrap();
        let repository = Repository {
            fqrn: "test.example.org".to_owned(),
            storage: directory.path().join("storage"),
            keys: directory.path().join("keys"),
            _directory: Some(directory),
        };
        repository.ok("mkfs", options);
        repository
    }

    /// A repository that exists already.
    pub fn at(fqrn: &str, storage: &Path, keys: &Path) -> Repository {
        Repository {
            fqrn: fqrn.to_owned(),
            storage: storage.to_owned(),
            keys: keys.to_owned(),
            _directory: None,
        }
    }

    /// The publisher's command line on this repository.
    pub fn command(&self, verb: &str, options: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cvmfs-publish"));
        command.arg(verb).arg(&self.fqrn).arg("--storage").arg(&self.storage).arg("--keys").arg(&self.keys);
        command.args(options);
        command
    }

    pub fn run(&self, verb: &str, options: &[&str], input: &[u8]) -> Output {
        let mut command = self.command(verb, options);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // a publisher that refuses early closes its end
        let _ = child.stdin.take().unwrap().write_all(input);
        child.wait_with_output().unwrap()
    }

    pub fn ok(&self, verb: &str, options: &[&str]) -> String {
        expect_success(self.run(verb, options, b""))
    }

    /// Ingests an archive at `base`; returns the JSON report.
    /// `tag VERB NAME`.
    pub fn ok_tag(&self, verb: &str, name: &str) -> String {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cvmfs-publish"));
        command.args(["tag", verb, &self.fqrn, name, "--storage"]).arg(&self.storage);
        expect_success(command.arg("--keys").arg(&self.keys).output().unwrap())
    }

    pub fn ingest(&self, base: &str, archive: &[u8], options: &[&str]) -> Value {
        let all = [&["--base", base, "--tar", "-", "--json"], options].concat();
        serde_json::from_str(&expect_success(self.run("ingest", &all, archive))).unwrap()
    }

    /// Ingests an archive that must be refused with this exit code; returns the message.
    pub fn refuses(&self, code: i32, archive: &[u8], options: &[&str]) -> String {
        let before = self.head().manifest;
        let all = [&["--base", "/refused", "--tar", "-"], options].concat();
        let output = self.run("ingest", &all, archive);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{message}");
        assert_eq!(self.head().manifest, before, "something was published");
        message
    }

    pub fn open_storage(&self) -> Arc<dyn Storage> {
        storage::open(self.storage.to_str().unwrap()).unwrap()
    }

    pub fn head(&self) -> Head {
        let masters = KeyFiles::new(&self.keys, &self.fqrn).public().unwrap();
        let now = cvmfs_publish::system_clock();
        Head::load(&*self.open_storage(), &self.fqrn, &masters, now).unwrap()
    }

    pub fn check(&self) -> CheckReport {
        let masters = KeyFiles::new(&self.keys, &self.fqrn).public().unwrap();
        let options =
            CheckOptions { tags: true, ..CheckOptions::new(&self.fqrn, self.open_storage(), masters) };
        cvmfs_publish::check::check(&options).unwrap()
    }

    /// Checks that nothing is wrong.
    pub fn assert_sound(&self) -> CheckReport {
        let report = self.check();
        assert!(report.ok, "{:#?}", report.problems);
        report
    }

    /// The published tree as our own reader sees it.
    pub fn tree(&self, below: &str) -> Tree {
        let head = self.head();
        let mut reader = Reader::new(self.open_storage());
        reader.walk(head.manifest.root_catalog, b"");
        reader.tree.into_iter().filter(|(path, _)| path.starts_with(below)).collect()
    }

    /// The published tree as the independent Python reader sees it.
    pub fn oracle_tree(&self, below: &str) -> Tree {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/oracle/read_repository.py");
        let public = self.keys.join(format!("{}.pub", self.fqrn));
        let output = Command::new("/usr/bin/python3")
            .arg(script)
            .arg(&self.storage)
            .arg(&self.fqrn)
            .arg(public)
            .arg("--path")
            .arg(if below == "/" { "" } else { below })
            .output()
            .unwrap();
        let mut tree = Tree::new();
        for line in expect_success(output).lines() {
            let mut entry: Value = serde_json::from_str(&escaped(line)).unwrap();
            let fields = entry.as_object_mut().unwrap();
            fields.remove("magic");
            fields.remove("blocks");
            let path = fields["path"].as_str().unwrap().to_owned();
            tree.insert(path, entry);
        }
        tree
    }

    /// A published file of the storage.
    pub fn raw(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.storage.join(name)).unwrap()
    }

    /// Opens a catalog of the published revision in a temporary file.
    pub fn catalog(&self, hash: ContentHash) -> Catalog {
        open_catalog(&*self.open_storage(), hash)
    }
}

pub fn expect_success(output: Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {stderr}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// Fails with the first differences of two trees.
pub fn assert_equal_trees(expected: &Tree, found: &Tree) {
    let mut differences = Vec::new();
    for (path, entry) in expected {
        match found.get(path) {
            None => differences.push(format!("{path} is missing")),
            Some(other) if other != entry => differences.push(format!("{path}:\n  {entry}\n  {other}")),
            Some(_) => {}
        }
    }
    differences
        .extend(found.keys().filter(|p| !expected.contains_key(*p)).map(|p| format!("{p} is too much")));
    assert!(differences.is_empty(), "{}", differences[..differences.len().min(10)].join("\n"));
}

/// A path or name as the fixtures write it: bytes that are not UTF-8 as lone surrogates, which JSON text in Rust
/// cannot hold; here as `\xNN`.
pub fn text(bytes: &[u8]) -> String {
    let mut text = String::new();
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        for byte in chunk.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text
}

/// Replaces the lone surrogates of Python's JSON by the form of [`text`].
fn escaped(line: &str) -> String {
    let mut parts = line.split("\\udc");
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        out.push_str("\\\\x");
        out.push_str(part);
    }
    out
}

fn open_catalog(storage: &dyn Storage, hash: ContentHash) -> Catalog {
    let stored = storage.get_object(&ObjectName::new(hash, ObjectKind::Catalog), u64::MAX).unwrap();
    let plain = inflate(Compression::Zlib, &stored, 1 << 30).unwrap();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&plain).unwrap();
    // the open connection keeps the unlinked file
    Catalog::open(file.path()).unwrap()
}

struct Reader {
    storage: Arc<dyn Storage>,
    tree: Tree,
}

impl Reader {
    fn new(storage: Arc<dyn Storage>) -> Reader {
        Reader { storage, tree: Tree::new() }
    }

    fn walk(&mut self, root: ContentHash, mountpoint: &[u8]) {
        let catalog = open_catalog(&*self.storage, root);
        let entry = catalog.lookup(PathHash::of(mountpoint)).unwrap().unwrap();
        let mut groups = HashMap::new();
        self.directory(&catalog, mountpoint, &entry, &mut groups);
    }

    fn directory(
        &mut self,
        catalog: &Catalog,
        path: &[u8],
        entry: &Entry,
        groups: &mut HashMap<u32, String>,
    ) {
        self.record(catalog, path, entry, groups);
        for child in catalog.list(entry.path_hash).unwrap() {
            let below = [path, b"/", &child.name].concat();
            if child.is_nested_mountpoint() {
                let nested = catalog.nested_at(&below).unwrap().unwrap();
                self.walk(nested.hash, &below);
            } else if child.is_directory() {
                self.directory(catalog, &below, &child, groups);
            } else {
                self.record(catalog, &below, &child, groups);
            }
        }
    }

    fn record(&mut self, catalog: &Catalog, path: &[u8], entry: &Entry, groups: &mut HashMap<u32, String>) {
        let path = if path.is_empty() { "/".to_owned() } else { text(path) };
        let kind = match entry.kind() {
            EntryKind::Directory => "dir",
            EntryKind::File => "file",
            EntryKind::Symlink => "symlink",
            EntryKind::Fifo => "fifo",
            EntryKind::Socket => "socket",
            EntryKind::CharDevice => "char",
            EntryKind::BlockDevice => "block",
        };
        let mtime = i128::from(entry.mtime) * 1_000_000_000 + i128::from(entry.mtime_ns.unwrap_or(0));
        let mut seen = json!({
            "path": path, "type": kind, "mode": format!("{:04o}", entry.mode & 0o7777),
            "uid": entry.uid, "gid": entry.gid, "nlink": entry.link_count, "size": entry.size,
            "mtime_ns": i64::try_from(mtime).map_or_else(|_| json!(mtime as f64), |ns| json!(ns)),
        });
        if let Some((major, minor)) = entry.device_number() {
            seen["rdev"] = json!(format!("{major}:{minor}"));
            seen["size"] = json!(0);
        }
        if kind == "symlink" {
            seen["target"] = json!(text(&entry.symlink));
        }
        if kind != "dir" && entry.link_count > 1 {
            seen["ino_group"] = json!(groups.entry(entry.link_group).or_insert_with(|| path.clone()));
        }
        if let Some(blob) = &entry.xattrs {
            let encode = |value: &[u8]| base64::engine::general_purpose::STANDARD.encode(value);
            let found = Xattrs::parse(blob).unwrap();
            let map: BTreeMap<String, String> = found.iter().map(|(k, v)| (text(k), encode(v))).collect();
            seen["xattrs"] = json!(map);
        }
        if kind == "file" {
            seen["sha256"] = json!(hex::encode(Sha256::digest(self.content(catalog, entry))));
        }
        self.tree.insert(path, seen);
    }

    fn content(&self, catalog: &Catalog, entry: &Entry) -> Vec<u8> {
        let object = |hash, kind| {
            let stored = self.storage.get_object(&ObjectName::new(hash, kind), u64::MAX).unwrap();
            assert_eq!(ContentHash::of(hash.algorithm, &stored), hash);
            inflate(entry.compression(), &stored, entry.size).unwrap()
        };
        if entry.is_chunked() {
            let chunks = catalog.chunks_of(entry).unwrap();
            return chunks.iter().flat_map(|chunk| object(chunk.hash, ObjectKind::Chunk)).collect();
        }
        let content = object(entry.hash.unwrap(), ObjectKind::File);
        assert_eq!(content.len() as u64, entry.size);
        content
    }
}
