//! An independent reader, written from the format description alone, accepts what is written here.

use std::path::Path;
use std::process::{Command, Output};

use cvmfs_format::catalog::{CatalogWriter, Chunk, Entry, EntryFlags, EntryKind};
use cvmfs_format::history::History;
use cvmfs_format::letter::seal;
use cvmfs_format::manifest::Manifest;
use cvmfs_format::reflog::{ReferenceKind, Reflog};
use cvmfs_format::signature::{Certificate, KeyChain, PrivateKey, generate_keys};
use cvmfs_format::whitelist::Whitelist;
use cvmfs_format::xattr::Xattrs;
use cvmfs_format::{Compression, ContentHash, Deflate, HashAlgorithm, ObjectKind, ObjectName};
use serde_json::Value;

const FQRN: &str = "a-repository-with-a-long-name.example.org";

struct Published<'a> {
    storage: &'a Path,
    algorithm: HashAlgorithm,
    deflate: Deflate,
}

impl Published<'_> {
    fn put(&self, plain: &[u8], kind: ObjectKind, compression: Compression) -> ContentHash {
        let stored = match compression {
            Compression::Zlib => self.deflate.compress(plain),
            Compression::None => plain.to_vec(),
        };
        let hash = ContentHash::of(self.algorithm, &stored);
        let path = self.storage.join(ObjectName::new(hash, kind).path());
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, stored).unwrap();
        hash
    }

    fn put_database(&self, path: &Path, kind: ObjectKind) -> (ContentHash, u64) {
        let plain = std::fs::read(path).unwrap();
        (self.put(&plain, kind, Compression::Zlib), plain.len() as u64)
    }

    fn file(&self, path: &str, content: &[u8], compression: Compression) -> Entry {
        let mut entry = Entry::new(path.as_bytes(), EntryKind::File, 0o644);
        entry.hash = Some(self.put(content, ObjectKind::File, compression));
        entry.size = content.len() as u64;
        entry.flags = entry.flags.with_algorithm(self.algorithm).with_compression(compression);
        (entry.mtime, entry.mtime_ns) = (1_600_000_000, Some(7));
        entry
    }

    /// A repository with one of everything; returns the contents of its files by path.
    fn publish(&self, scratch: &Path, keys: &KeyChain, now: u64) -> Vec<(String, Vec<u8>)> {
        let contents = vec![
            ("/a/b/.cvmfscatalog".to_owned(), vec![]),
            ("/a/b/plain".to_owned(), b"uncompressed".to_vec()),
            ("/a/f".to_owned(), b"hello\n".to_vec()),
            ("/big".to_owned(), (0..100_000u32).flat_map(u32::to_le_bytes).collect()),
        ];
        let child = scratch.join("child");
        let mut writer = CatalogWriter::create(&child, b"/a/b").unwrap();
        let mut top = Entry::new(b"/a/b", EntryKind::Directory, 0o750);
        (top.link_count, top.uid) = (2, 1000);
        top.flags = top.flags.with(EntryFlags::NESTED_ROOT);
        writer.insert(&top).unwrap();
        writer.insert(&self.file("/a/b/.cvmfscatalog", b"", Compression::Zlib)).unwrap();
        writer.insert(&self.file("/a/b/plain", b"uncompressed", Compression::None)).unwrap();
        let below = writer.delta().total();
        writer.finish(1, None, None, now).unwrap();
        let (child, child_size) = self.put_database(&child, ObjectKind::Catalog);

        let root = scratch.join("root");
        let mut writer = CatalogWriter::create(&root, b"").unwrap();
        let directory =
            |path: &[u8], links| Entry { link_count: links, ..Entry::new(path, EntryKind::Directory, 0o755) };
        writer.insert(&directory(b"", 3)).unwrap();
        writer.insert(&directory(b"/a", 3)).unwrap();
        let mountpoint = Entry { flags: EntryFlags(3), ..top };
        writer.insert(&mountpoint).unwrap();
        let mut plain = self.file("/a/f", b"hello\n", Compression::Zlib);
        (plain.link_group, plain.link_count) = (writer.new_link_group().unwrap(), 2);
        plain.xattrs = [("user.a", "xy"), ("user.b", "")].into_iter().collect::<Xattrs>().to_bytes().unwrap();
        writer.insert(&plain).unwrap();
        let second = Entry::new(b"/a/g", EntryKind::File, 0o644);
        writer.insert(&Entry { path_hash: second.path_hash, name: second.name, ..plain.clone() }).unwrap();
        let mut link = Entry::new(b"/a/l\xff", EntryKind::Symlink, 0o777);
        link.symlink = b"f".to_vec();
        writer.insert(&link).unwrap();
        let mut device = Entry::new(b"/a/null", EntryKind::CharDevice, 0o666);
        device.size = Entry::encode_device_number(1, 3);
        writer.insert(&device).unwrap();
        writer.insert(&Entry::new(b"/a/pipe", EntryKind::Fifo, 0o600)).unwrap();
        let big = &contents[3].1;
        let mut chunked = Entry::new(b"/big", EntryKind::File, 0o644);
        chunked.size = big.len() as u64;
        chunked.flags = chunked.flags.with(EntryFlags::CHUNKED).with_algorithm(self.algorithm);
        writer.insert(&chunked).unwrap();
        let mut chunks = Vec::new();
        for (index, part) in big.chunks(150_000).enumerate() {
            let hash = self.put(part, ObjectKind::Chunk, Compression::Zlib);
            chunks.push(Chunk { offset: index as u64 * 150_000, size: part.len() as u64, hash });
        }
        writer.set_chunks(chunked.path_hash, &chunks).unwrap();
        writer.add_nested(b"/a/b", child, child_size).unwrap();
        writer.add_subtree(below);
        writer.finish(1, None, Some(240), now).unwrap();
        let (root, root_size) = self.put_database(&root, ObjectKind::Catalog);
        self.sign(scratch, keys, now, root, root_size);
        contents
    }

    fn sign(&self, scratch: &Path, keys: &KeyChain, now: u64, root: ContentHash, root_size: u64) {
        let history = scratch.join("history");
        let mut tags = History::create(&history, FQRN).unwrap();
        tags.rotate_trunk(root, root_size, 1, now as i64).unwrap();
        tags.finish(None).unwrap();
        let (history, _) = self.put_database(&history, ObjectKind::History);
        let certificate =
            self.put(keys.certificate_pem.as_bytes(), ObjectKind::Certificate, Compression::Zlib);
        let reflog = scratch.join("reflog");
        let mut references = Reflog::create(&reflog, FQRN).unwrap();
        references.add(ReferenceKind::Catalog, root, now as i64).unwrap();
        references.finish().unwrap();
        let manifest = Manifest {
            root_catalog: root,
            root_catalog_size: root_size,
            ttl: 240,
            revision: 1,
            garbage_collectable: true,
            alternative_paths: false,
            fqrn: FQRN.to_owned(),
            certificate: Some(certificate),
            history: Some(history),
            timestamp: now,
            metainfo: None,
            reflog: Some(ContentHash::of(self.algorithm, &std::fs::read(&reflog).unwrap())),
        };
        let key = PrivateKey::from_pem(keys.key_pem.as_bytes()).unwrap();
        let published = seal(manifest.to_text(), self.algorithm, |text| key.sign_manifest(text)).unwrap();
        std::fs::write(self.storage.join(".cvmfspublished"), published).unwrap();
        let fingerprint =
            Certificate::from_pem(keys.certificate_pem.as_bytes()).unwrap().fingerprint(self.algorithm);
        let master = PrivateKey::from_pem(keys.masterkey_pem.as_bytes()).unwrap();
        let now = now as i64;
        let whitelist = Whitelist::compose(now, now + 30 * 24 * 3600, FQRN, &[fingerprint]);
        let whitelist = seal(whitelist, self.algorithm, |text| master.sign_whitelist(text)).unwrap();
        std::fs::write(self.storage.join(".cvmfswhitelist"), whitelist).unwrap();
    }
}

fn independent_reader(storage: &Path, master_public: &Path, arguments: &[&str]) -> Output {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/oracle/read_repository.py");
    Command::new("/usr/bin/python3")
        .arg(script)
        .arg(storage)
        .arg(FQRN)
        .arg(master_public)
        .args(arguments)
        .output()
        .unwrap()
}

#[test]
fn an_independent_reader_trusts_and_reads_a_repository_written_here() {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let keys = generate_keys(FQRN, now as i64).unwrap();
    for (algorithm, deflate) in [
        (HashAlgorithm::Sha1, Deflate::Stock),
        (HashAlgorithm::Ripemd160, Deflate::Fast),
        (HashAlgorithm::Shake128, Deflate::Stock),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let (storage, scratch) = (directory.path().join("storage"), directory.path().join("scratch"));
        std::fs::create_dir_all(&storage).unwrap();
        std::fs::create_dir_all(&scratch).unwrap();
        let master_public = directory.path().join("master.pub");
        std::fs::write(&master_public, &keys.master_public_pem).unwrap();
        let contents = Published { storage: &storage, algorithm, deflate }.publish(&scratch, &keys, now);

        for arguments in [&[][..], &["--tag", "trunk"]] {
            let output = independent_reader(&storage, &master_public, arguments);
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success() && errors.is_empty(), "{algorithm}: {errors}");
            let text = String::from_utf8(output.stdout).unwrap().replace("\\udc", "\\ue0");
            let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            let line = |path: &str| lines.iter().find(|line| line["path"] == path).unwrap();
            assert_eq!(lines.len(), 11);
            for (path, content) in &contents {
                let digest = <sha2::Sha256 as sha2::Digest>::digest(content);
                assert_eq!(line(path)["sha256"], hex::encode(digest), "{path}");
            }
            assert_eq!(line("/a/f")["xattrs"], serde_json::json!({"user.a": "eHk=", "user.b": ""}));
            assert_eq!((&line("/a/g")["ino_group"], &line("/a/g")["nlink"]), (&"/a/f".into(), &2.into()));
            assert_eq!(line("/a/null")["rdev"], "1:3");
            assert_eq!(line("/a/l\u{e0ff}")["target"], "f");
            assert_eq!(line("/big")["magic"]["user.chunks"], "3");
            assert_eq!(line("/a/b")["uid"], 1000);
            assert_eq!(line("/a/f")["mtime_ns"], 1_600_000_000_000_000_007u64);
        }

        // The independent reader's refusal shows that its approval means something.
        let other = generate_keys(FQRN, now as i64).unwrap();
        std::fs::write(&master_public, &other.master_public_pem).unwrap();
        let output = independent_reader(&storage, &master_public, &[]);
        assert_eq!(output.status.code(), Some(16));
    }
}

#[test]
fn openssl_reads_the_generated_certificate_and_keys() {
    let chain = generate_keys(FQRN, 1_700_000_000).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let openssl = |arguments: &[&str], input: &str| {
        let path = directory.path().join("input");
        std::fs::write(&path, input).unwrap();
        let output = Command::new("openssl").args(arguments).arg("-in").arg(&path).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let certificate = openssl(&["x509", "-noout", "-text", "-nameopt", "RFC2253"], &chain.certificate_pem);
    for expected in [
        "Version: 1 ",
        "Signature Algorithm: sha256WithRSAEncryption",
        "Subject: CN=a-repository-with-a-long-name.[...] CernVM-FS Release Managers",
        "Issuer: CN=a-repository-with-a-long-name.[...] CernVM-FS Release Managers",
        "Not Before: Nov 14 22:13:20 2023 GMT",
        "Not After : Nov 13 22:13:20 2024 GMT",
        "Public-Key: (2048 bit)",
    ] {
        assert!(certificate.contains(expected), "{expected:?} not in {certificate}");
    }
    let path = directory.path().join("certificate");
    std::fs::write(&path, &chain.certificate_pem).unwrap();
    let verified = Command::new("openssl")
        .args(["verify", "-no_check_time", "-CAfile"])
        .arg(&path)
        .arg(&path)
        .output()
        .unwrap();
    assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));
    assert!(openssl(&["rsa", "-noout", "-check"], &chain.key_pem).contains("RSA key ok"));
    assert_eq!(openssl(&["rsa", "-pubout"], &chain.masterkey_pem), chain.master_public_pem);
    // The traditional form of the same key is read as well.
    let traditional = openssl(&["rsa", "-traditional"], &chain.key_pem);
    assert!(traditional.starts_with("-----BEGIN RSA PRIVATE KEY-----"));
    let key = PrivateKey::from_pem(traditional.as_bytes()).unwrap();
    assert!(key.matches(&Certificate::from_pem(chain.certificate_pem.as_bytes()).unwrap()));
    let trusted = openssl(&["x509", "-trustout", "-setalias", "release"], &chain.certificate_pem);
    assert!(trusted.starts_with("-----BEGIN TRUSTED CERTIFICATE-----"));
    assert!(key.matches(&Certificate::from_pem(trusted.as_bytes()).unwrap()));
}
