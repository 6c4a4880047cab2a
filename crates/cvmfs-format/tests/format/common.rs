//! Fixture repositories made by the C++ tools, read through this crate without network or FUSE.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine as _;
use cvmfs_format::catalog::{Catalog, Entry, EntryKind, NestedCatalog};
use cvmfs_format::compression::{Compression, inflate};
use cvmfs_format::letter::Letter;
use cvmfs_format::manifest::Manifest;
use cvmfs_format::signature::{Certificate, MasterKeys};
use cvmfs_format::whitelist::Whitelist;
use cvmfs_format::xattr::Xattrs;
use cvmfs_format::{ContentHash, ObjectKind, ObjectName, PathHash};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

/// Repositories whose tree agrees with their `manifest.jsonl` in every entry.
pub const GOOD: [&str; 13] = [
    "basic-sha1",
    "chunked",
    "chunked-shake128-none",
    "external",
    "hardlinks",
    "history",
    "history-gc",
    "ingested-layers",
    "nocompress",
    "shake128",
    "special",
    "volatile",
    "xattrs",
];

/// Largest object of any fixture.
const LIMIT: u64 = 64 << 20;

/// An unpacked fixture; deleted on drop.
pub struct Fixture {
    _directory: tempfile::TempDir,
    pub root: PathBuf,
    pub storage: PathBuf,
    pub fqrn: String,
}

impl Fixture {
    pub fn unpack(name: &str) -> Self {
        let archive =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(format!("{name}.tar.gz"));
        let directory = tempfile::tempdir().unwrap();
        let status =
            Command::new("tar").arg("xzf").arg(&archive).arg("-C").arg(directory.path()).status().unwrap();
        assert!(status.success(), "cannot unpack {}", archive.display());
        let root = directory.path().join(name);
        let fqrn = std::fs::read_to_string(root.join("fqrn")).unwrap().trim().to_owned();
        Self { storage: root.join("storage"), _directory: directory, root, fqrn }
    }

    pub fn read(&self, path: &str) -> Vec<u8> {
        std::fs::read(self.storage.join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    pub fn master_keys(&self) -> MasterKeys {
        MasterKeys::from_pem(&std::fs::read(self.root.join("master.pub")).unwrap()).unwrap()
    }

    pub fn manifest(&self) -> Manifest {
        Manifest::parse(&self.read(".cvmfspublished")).unwrap()
    }

    /// The whole chain of trust; a failure is returned as the text an administrator would see.
    pub fn verify(&self) -> Result<Manifest, String> {
        fn text(error: impl std::error::Error) -> String {
            error.to_string()
        }
        let file = self.read(".cvmfspublished");
        let manifest = Manifest::parse(&file).map_err(text)?;
        manifest.require_fqrn(&self.fqrn).map_err(text)?;
        let letter = Letter::parse(&file).map_err(text)?;
        let certificate = manifest.certificate.ok_or("manifest names no certificate")?;
        let certificate =
            Certificate::from_pem(&self.object(certificate, ObjectKind::Certificate)).map_err(text)?;
        certificate.verify_manifest(&letter).map_err(text)?;
        let file = self.read(".cvmfswhitelist");
        self.master_keys().verify_whitelist(&Letter::parse(&file).map_err(text)?).map_err(text)?;
        let whitelist = Whitelist::parse(&file).map_err(text)?;
        whitelist.check(&self.fqrn, manifest.timestamp as i64, &certificate).map_err(text)?;
        Ok(manifest)
    }

    /// Plain bytes of a zlib object, hash verified.
    pub fn object(&self, hash: ContentHash, kind: ObjectKind) -> Vec<u8> {
        self.content(&ObjectName::new(hash, kind).path(), hash, Compression::Zlib)
    }

    fn content(&self, path: &str, hash: ContentHash, compression: Compression) -> Vec<u8> {
        let stored = self.read(path);
        assert_eq!(ContentHash::of(hash.algorithm, &stored), hash, "{path}");
        inflate(compression, &stored, LIMIT).unwrap()
    }

    /// A database object as a file in the fixture's directory.
    pub fn database(&self, hash: ContentHash, kind: ObjectKind) -> PathBuf {
        let path = self.root.join(ObjectName::new(hash, kind).to_string());
        if !path.exists() {
            std::fs::write(&path, self.object(hash, kind)).unwrap();
        }
        path
    }

    pub fn catalog(&self, hash: ContentHash) -> Catalog {
        Catalog::open(&self.database(hash, ObjectKind::Catalog)).unwrap()
    }

    /// The catalogs of a revision, parents first, with the reference that leads to each.
    pub fn catalogs(&self, root: ContentHash) -> Vec<(NestedCatalog, Catalog)> {
        let mut found = Vec::new();
        let mut wanted = vec![NestedCatalog { path: Vec::new(), hash: root, size: 0, bind: false }];
        while let Some(reference) = wanted.pop() {
            let catalog = self.catalog(reference.hash);
            wanted.extend(catalog.nested().unwrap());
            found.push((reference, catalog));
        }
        found
    }

    /// Plain content of a regular file.
    pub fn file(&self, catalog: &Catalog, path: &[u8], entry: &Entry) -> Vec<u8> {
        if entry.is_external() {
            let path = String::from_utf8(path.to_vec()).unwrap();
            let whole = self.read(&format!("ext{path}"));
            if entry.is_chunked() {
                for chunk in catalog.chunks_of(entry).unwrap() {
                    let part = &whole[chunk.offset as usize..][..chunk.size as usize];
                    assert_eq!(ContentHash::of(chunk.hash.algorithm, part), chunk.hash);
                }
            } else {
                assert_eq!(Some(ContentHash::of(entry.algorithm(), &whole)), entry.hash);
            }
            return whole;
        }
        let object =
            |hash, kind| self.content(&ObjectName::new(hash, kind).path(), hash, entry.compression());
        if !entry.is_chunked() {
            return object(entry.hash.unwrap(), ObjectKind::File);
        }
        let mut whole = Vec::new();
        for chunk in catalog.chunks_of(entry).unwrap() {
            let part = object(chunk.hash, ObjectKind::Chunk);
            assert_eq!(part.len() as u64, chunk.size);
            whole.extend(part);
        }
        whole
    }

    /// The ground truth lines by path.
    pub fn expected(&self, file: &str) -> BTreeMap<String, Map<String, Value>> {
        let text = std::fs::read_to_string(self.root.join(file)).unwrap();
        text.lines()
            .map(|line| {
                // Bytes that are not UTF-8 are lone surrogates, which JSON readers refuse; see `shown`.
                let line: Map<String, Value> = serde_json::from_str(&line.replace("\\udc", "\\ue0")).unwrap();
                (line["path"].as_str().unwrap().to_owned(), line)
            })
            .collect()
    }

    /// What this crate makes of the tree below a root catalog, in the form of the ground truth.
    pub fn walk(&self, root: ContentHash) -> BTreeMap<String, Map<String, Value>> {
        let catalog = self.catalog(root);
        let entry = catalog.lookup(PathHash::of(b"")).unwrap().unwrap();
        let mut lines = BTreeMap::new();
        self.walk_below(&catalog, b"", &entry, &mut BTreeMap::new(), &mut lines);
        lines
    }

    fn walk_below(
        &self,
        catalog: &Catalog,
        path: &[u8],
        entry: &Entry,
        groups: &mut BTreeMap<u32, String>,
        lines: &mut BTreeMap<String, Map<String, Value>>,
    ) {
        let line = self.line(catalog, path, entry, groups);
        lines.insert(line["path"].as_str().unwrap().to_owned(), line);
        if !entry.is_directory() {
            return;
        }
        if entry.is_nested_mountpoint() {
            let nested = catalog.nested_at(path).unwrap().unwrap();
            let child = self.catalog(nested.hash);
            assert_eq!(child.root_prefix(), path);
            assert!(child.lookup(PathHash::of(path)).unwrap().unwrap().is_nested_root());
            self.walk_children(&child, path, &mut BTreeMap::new(), lines);
        } else {
            self.walk_children(catalog, path, groups, lines);
        }
    }

    fn walk_children(
        &self,
        catalog: &Catalog,
        path: &[u8],
        groups: &mut BTreeMap<u32, String>,
        lines: &mut BTreeMap<String, Map<String, Value>>,
    ) {
        for child in catalog.list(PathHash::of(path)).unwrap() {
            let path = [path, b"/", &child.name].concat();
            assert_eq!(child.path_hash, PathHash::of(&path));
            self.walk_below(catalog, &path, &child, groups, lines);
        }
    }

    fn line(
        &self,
        catalog: &Catalog,
        path: &[u8],
        entry: &Entry,
        groups: &mut BTreeMap<u32, String>,
    ) -> Map<String, Value> {
        let shown_path = if path.is_empty() { "/".to_owned() } else { shown(path) };
        let kind = entry.kind();
        let size = match kind {
            EntryKind::File | EntryKind::Directory => entry.size,
            EntryKind::Symlink => entry.symlink.len() as u64,
            _ => 0,
        };
        // -1 is no valid id: the kernel shows the overflow id.
        let id = |id: u32| if id == u32::MAX { 65534 } else { id };
        let mut line = Map::new();
        line.insert("path".into(), json!(shown_path));
        line.insert("type".into(), json!(type_name(kind)));
        line.insert("mode".into(), json!(format!("{:04o}", entry.mode & 0o7777)));
        line.insert("uid".into(), json!(id(entry.uid)));
        line.insert("gid".into(), json!(id(entry.gid)));
        line.insert("nlink".into(), json!(entry.nlink()));
        let mtime = entry.mtime * 1_000_000_000 + i64::from(entry.mtime_ns.unwrap_or(0));
        line.insert("mtime_ns".into(), json!(mtime));
        line.insert("size".into(), json!(size));
        line.insert("blocks".into(), json!(1 + size / 512));
        if let Some((major, minor)) = entry.device_number() {
            line.insert("rdev".into(), json!(format!("{major}:{minor}")));
        }
        if kind == EntryKind::Symlink {
            line.insert("target".into(), json!(shown(&entry.symlink)));
        }
        if !entry.is_directory() && entry.nlink() > 1 {
            let first = groups.entry(entry.link_group).or_insert_with(|| shown_path.clone());
            line.insert("ino_group".into(), json!(first));
        }
        let xattrs = entry.xattrs.as_deref().map(|blob| Xattrs::parse(blob).unwrap()).unwrap_or_default();
        if !xattrs.is_empty() {
            let base64 = base64::engine::general_purpose::STANDARD;
            let values =
                xattrs.iter().map(|(name, value)| (shown(name), json!(base64.encode(value)))).collect();
            line.insert("xattrs".into(), Value::Object(values));
        }
        if kind == EntryKind::File {
            let content = self.file(catalog, path, entry);
            assert_eq!(content.len() as u64, entry.size);
            line.insert("sha256".into(), json!(hex::encode(Sha256::digest(&content))));
            line.insert("magic".into(), magic(catalog, entry));
        }
        line
    }
}

/// The attributes that the C++ client derives from a row.
fn magic(catalog: &Catalog, entry: &Entry) -> Value {
    let mut list = String::from("hash,offset,size\n");
    let mut chunks = 1;
    if entry.is_chunked() {
        let found = catalog.chunks_of(entry).unwrap();
        chunks = found.len();
        for chunk in found {
            list.push_str(&format!("{},{},{}\n", chunk.hash, chunk.offset, chunk.size));
        }
    } else {
        list.push_str(&format!("{},0,{}\n", entry.hash.unwrap(), entry.size));
    }
    let mut magic = json!({
        "user.compression": entry.compression().name(),
        "user.chunks": chunks.to_string(),
        "user.chunk_list": list,
        "user.external_file": if entry.is_external() { "1" } else { "0" },
    });
    if let Some(hash) = entry.hash {
        magic["user.hash"] = json!(hash.to_string());
    }
    magic
}

fn type_name(kind: EntryKind) -> &'static str {
    match kind {
        EntryKind::Directory => "dir",
        EntryKind::File => "file",
        EntryKind::Symlink => "symlink",
        EntryKind::Fifo => "fifo",
        EntryKind::Socket => "socket",
        EntryKind::CharDevice => "char",
        EntryKind::BlockDevice => "block",
    }
}

/// Bytes as text; what is not UTF-8 becomes U+E000 plus the byte.
pub fn shown(bytes: &[u8]) -> String {
    let mut text = String::new();
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        text.extend(chunk.invalid().iter().map(|byte| char::from_u32(0xe000 + u32::from(*byte)).unwrap()));
    }
    text
}

/// Differences between ground truth and walk, one line each.
pub fn differences(
    expected: &BTreeMap<String, Map<String, Value>>,
    found: &BTreeMap<String, Map<String, Value>>,
) -> Vec<String> {
    let mut differences = Vec::new();
    for path in expected.keys().chain(found.keys().filter(|path| !expected.contains_key(*path))) {
        let (Some(expected), Some(found)) = (expected.get(path), found.get(path)) else {
            let side = if expected.contains_key(path) { "missing" } else { "unexpected" };
            differences.push(format!("{path}: {side}"));
            continue;
        };
        // The ground truth has variables in targets expanded, which is the client's business.
        let has_variable = found.get("target").is_some_and(|target| target.as_str().unwrap().contains("$("));
        for key in expected.keys().chain(found.keys().filter(|key| !expected.contains_key(*key))) {
            if has_variable && matches!(key.as_str(), "target" | "size" | "blocks") {
                continue;
            }
            if expected.get(key) != found.get(key) {
                differences.push(format!(
                    "{path}: {key} is {:?}, expected {:?}",
                    found.get(key),
                    expected.get(key)
                ));
            }
        }
    }
    differences
}
