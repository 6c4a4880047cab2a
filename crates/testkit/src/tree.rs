//! File trees as lists of entries, in the form of the fixtures' `manifest.jsonl`.
//!
//! One JSON object per line, keys sorted, ASCII only; bytes of a name that are not UTF-8 are written as the
//! lone surrogates U+DC80 … U+DCFF, as Python's `surrogateescape` does.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use base64::Engine as _;
use serde::{Deserialize, Deserializer};
use sha2::{Digest, Sha256};

/// Extended attributes that a client answers by name without listing them.
const MAGIC: [&str; 6] =
    ["user.hash", "user.compression", "user.chunks", "user.chunk_list", "user.external_file", "user.rawlink"];

/// One file, directory, link or device of a tree.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TreeEntry {
    /// Absolute within the tree; `/` is its root.
    #[serde(deserialize_with = "surrogateescaped")]
    pub path: OsString,
    /// `file`, `dir`, `symlink`, `fifo`, `socket`, `char` or `block`; `None` if it could not be examined.
    #[serde(default, rename = "type")]
    pub kind: Option<String>,
    /// Permission bits with set-id and sticky, four octal digits.
    #[serde(default)]
    pub mode: Option<String>,
    /// Owner.
    #[serde(default)]
    pub uid: Option<u32>,
    /// Group.
    #[serde(default)]
    pub gid: Option<u32>,
    /// Bytes, as `stat` says.
    #[serde(default)]
    pub size: Option<u64>,
    /// Units of 512 bytes, as `stat` says.
    #[serde(default)]
    pub blocks: Option<u64>,
    /// Modification time in nanoseconds since 1970.
    #[serde(default)]
    pub mtime_ns: Option<i64>,
    /// Number of hard links.
    #[serde(default)]
    pub nlink: Option<u64>,
    /// `MAJOR:MINOR` of a device.
    #[serde(default)]
    pub rdev: Option<String>,
    /// What a symbolic link points to.
    #[serde(default, deserialize_with = "optional_surrogateescaped")]
    pub target: Option<OsString>,
    /// Listed extended attributes, values in base64, or `ERR ` and the reason.
    #[serde(default)]
    pub xattrs: Option<BTreeMap<String, String>>,
    /// Why the extended attributes could not be listed.
    #[serde(default)]
    pub xattr_error: Option<String>,
    /// The attributes of a CernVM-FS client that are answered by name only.
    #[serde(default)]
    pub magic: Option<BTreeMap<String, String>>,
    /// Hash of a regular file's content.
    #[serde(default)]
    pub sha256: Option<String>,
    /// Bytes that could be read, if they differ from `size`.
    #[serde(default)]
    pub read_size: Option<u64>,
    /// The first path in walk order with the same inode, if there is more than one link.
    #[serde(default, deserialize_with = "optional_surrogateescaped")]
    pub ino_group: Option<OsString>,
    /// Why the entry could not be examined or read.
    #[serde(default)]
    pub error: Option<String>,
}

impl TreeEntry {
    /// The line of `manifest.jsonl`, without newline.
    pub fn to_line(&self) -> String {
        let fields: Vec<_> =
            self.fields().into_iter().map(|(key, value)| format!("\"{key}\": {value}")).collect();
        format!("{{{}}}", fields.join(", "))
    }

    /// The fields that are present, by name, as JSON texts.
    fn fields(&self) -> BTreeMap<&'static str, String> {
        fn bytes(value: &Option<OsString>) -> Option<String> {
            value.as_ref().map(|value| json_bytes(value.as_bytes()))
        }
        fn text(value: &Option<String>) -> Option<String> {
            value.as_ref().map(|value| json_bytes(value.as_bytes()))
        }
        fn number(value: Option<impl ToString>) -> Option<String> {
            value.map(|value| value.to_string())
        }
        fn map(value: &Option<BTreeMap<String, String>>) -> Option<String> {
            let fields = value.as_ref()?.iter();
            let fields: Vec<_> = fields
                .map(|(key, value)| {
                    format!("{}: {}", json_bytes(key.as_bytes()), json_bytes(value.as_bytes()))
                })
                .collect();
            Some(format!("{{{}}}", fields.join(", ")))
        }
        [
            ("path", Some(json_bytes(self.path.as_bytes()))),
            ("type", text(&self.kind)),
            ("mode", text(&self.mode)),
            ("uid", number(self.uid)),
            ("gid", number(self.gid)),
            ("size", number(self.size)),
            ("blocks", number(self.blocks)),
            ("mtime_ns", number(self.mtime_ns)),
            ("nlink", number(self.nlink)),
            ("rdev", text(&self.rdev)),
            ("target", bytes(&self.target)),
            ("xattrs", map(&self.xattrs)),
            ("xattr_error", text(&self.xattr_error)),
            ("magic", map(&self.magic)),
            ("sha256", text(&self.sha256)),
            ("read_size", number(self.read_size)),
            ("ino_group", bytes(&self.ino_group)),
            ("error", text(&self.error)),
        ]
        .into_iter()
        .filter_map(|(key, value)| Some((key, value?)))
        .collect()
    }
}

/// Reads a `manifest.jsonl`.
pub fn read_manifest(source: impl Read) -> Result<Vec<TreeEntry>> {
    BufReader::new(source)
        .lines()
        .enumerate()
        .map(|(number, line)| {
            serde_json::from_slice(line?.as_bytes()).with_context(|| format!("line {}", number + 1))
        })
        .collect()
}

/// Examines a whole tree, reading every file. Errors become part of the entry that they concern.
pub fn walk_tree(root: impl AsRef<Path>) -> Vec<TreeEntry> {
    Walk::of(root.as_ref(), None)
}

/// As [`walk_tree`], but directories on which another file system is mounted are left out, as `find -xdev`
/// does: the tree of a running container without its `/proc`.
pub fn walk_one_file_system(root: impl AsRef<Path>) -> Vec<TreeEntry> {
    let device = std::fs::metadata(root.as_ref()).map(|meta| meta.dev()).ok();
    Walk::of(root.as_ref(), device)
}

/// Compares two trees in every field; one line per difference, empty if there is none.
pub fn compare(expected: &[TreeEntry], found: &[TreeEntry]) -> Vec<String> {
    compare_without(expected, found, &[])
}

/// As [`compare`], without the named fields: `blocks` and `nlink` of directories, say, differ between file
/// systems that hold the same tree.
pub fn compare_without(expected: &[TreeEntry], found: &[TreeEntry], ignored: &[&str]) -> Vec<String> {
    let by_path = |entries: &'_ [TreeEntry]| -> BTreeMap<OsString, TreeEntry> {
        entries.iter().map(|entry| (entry.path.clone(), entry.clone())).collect()
    };
    let (expected, found) = (by_path(expected), by_path(found));
    let mut lines = Vec::new();
    for (path, wanted) in &expected {
        let shown = path.to_string_lossy();
        let Some(got) = found.get(path) else {
            lines.push(format!("{shown}: missing"));
            continue;
        };
        let (wanted, got) = (wanted.fields(), got.fields());
        let names: std::collections::BTreeSet<_> = wanted.keys().chain(got.keys()).collect();
        for name in names.into_iter().filter(|name| !ignored.contains(name)) {
            let value = |fields: &BTreeMap<&'static str, String>| {
                fields.get(name).cloned().unwrap_or_else(|| "nothing".to_owned())
            };
            let (wanted, got) = (value(&wanted), value(&got));
            if wanted != got {
                lines.push(format!("{shown}: {name}: expected {wanted}, found {got}"));
            }
        }
    }
    for path in found.keys().filter(|path| !expected.contains_key(*path)) {
        lines.push(format!("{}: not expected", path.to_string_lossy()));
    }
    lines
}

/// What two file systems that hold the same tree must agree on: without times, block and link counts, and
/// the sizes of directories.
pub fn portable(entries: &[TreeEntry]) -> Vec<TreeEntry> {
    let reduce = |entry: &TreeEntry| TreeEntry {
        size: entry.size.filter(|_| entry.kind.as_deref() == Some("file")),
        blocks: None,
        mtime_ns: None,
        nlink: None,
        ino_group: None,
        magic: None,
        ..entry.clone()
    };
    entries.iter().map(reduce).collect()
}

/// The part of a tree at and below `directory`, as a tree of its own.
pub fn subtree(entries: &[TreeEntry], directory: &str) -> Vec<TreeEntry> {
    let directory = Path::new(directory);
    let part = |entry: &TreeEntry| {
        let inside = Path::new(&entry.path).strip_prefix(directory).ok()?;
        Some(TreeEntry { path: Path::new("/").join(inside).into_os_string(), ..entry.clone() })
    };
    entries.iter().filter_map(part).collect()
}

struct Walk {
    root: PathBuf,
    device: Option<u64>,
    first: HashMap<u64, OsString>,
    entries: Vec<TreeEntry>,
}

impl Walk {
    fn of(root: &Path, device: Option<u64>) -> Vec<TreeEntry> {
        // A root that is itself a link, such as /proc/PID/root, is followed.
        let mut walk = Self { root: root.join("."), device, first: HashMap::new(), entries: Vec::new() };
        walk.visit(OsStr::new("/"));
        walk.entries
    }

    /// Whether a directory lies on another file system than wanted. Only directories can be asked: an
    /// overlay shows files with the device numbers of its layers.
    fn is_elsewhere(&self, full: &Path) -> bool {
        self.device.is_some_and(|device| {
            std::fs::symlink_metadata(full).is_ok_and(|meta| meta.is_dir() && meta.dev() != device)
        })
    }

    fn visit(&mut self, path: &OsStr) {
        let mut full = self.root.clone().into_os_string();
        if path != "/" {
            full.push(path);
        }
        let full = PathBuf::from(full);
        if self.is_elsewhere(&full) {
            return;
        }
        let index = self.entries.len();
        let entry = self.examine(&full, path).unwrap_or_else(|error| TreeEntry {
            path: path.to_owned(),
            error: Some(reason(&error)),
            ..TreeEntry::default()
        });
        self.entries.push(entry);
        if self.entries[index].kind.as_deref() != Some("dir") {
            return;
        }
        let names = std::fs::read_dir(&full)
            .and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>());
        match names {
            Err(error) => self.entries[index].error = Some(reason(&error)),
            Ok(mut names) => {
                names.sort_by(|one, other| one.as_bytes().cmp(other.as_bytes()));
                for name in names {
                    let mut child = if path == "/" { OsString::new() } else { path.to_owned() };
                    child.push("/");
                    child.push(&name);
                    self.visit(&child);
                }
            }
        }
    }

    fn examine(&mut self, full: &Path, path: &OsStr) -> io::Result<TreeEntry> {
        let meta = std::fs::symlink_metadata(full)?;
        let kind = kind(&meta);
        let mut entry = TreeEntry {
            path: path.to_owned(),
            kind: Some(kind.to_owned()),
            mode: Some(format!("{:04o}", meta.permissions().mode() & 0o7777)),
            uid: Some(meta.uid()),
            gid: Some(meta.gid()),
            size: Some(meta.size()),
            blocks: Some(meta.blocks()),
            mtime_ns: Some(meta.mtime() * 1_000_000_000 + meta.mtime_nsec()),
            nlink: Some(meta.nlink()),
            ..TreeEntry::default()
        };
        if matches!(kind, "char" | "block") {
            let device = meta.rdev();
            entry.rdev = Some(format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device)));
        }
        if kind == "symlink" {
            entry.target = Some(std::fs::read_link(full)?.into_os_string());
        }
        if kind != "dir" && meta.nlink() > 1 {
            let first = self.first.entry(meta.ino()).or_insert_with(|| path.to_owned());
            entry.ino_group = Some(first.clone());
        }
        match xattrs(full) {
            Ok(found) => entry.xattrs = Some(found).filter(|found| !found.is_empty()),
            Err(error) => entry.xattr_error = Some(reason(&error)),
        }
        entry.magic = Some(magic(full)).filter(|found| !found.is_empty());
        if kind == "file" {
            match hash_file(full) {
                Ok((hash, size)) => {
                    entry.sha256 = Some(hash);
                    entry.read_size = Some(size).filter(|size| *size != meta.size());
                }
                Err(error) => entry.error = Some(reason(&error)),
            }
        }
        Ok(entry)
    }
}

fn kind(meta: &std::fs::Metadata) -> &'static str {
    let kind = meta.file_type();
    match () {
        () if kind.is_dir() => "dir",
        () if kind.is_symlink() => "symlink",
        () if kind.is_fifo() => "fifo",
        () if kind.is_socket() => "socket",
        () if kind.is_char_device() => "char",
        () if kind.is_block_device() => "block",
        () => "file",
    }
}

fn hash_file(path: &Path) -> io::Result<(String, u64)> {
    let mut file = std::fs::File::open(path)?;
    let mut hash = Sha256::new();
    let mut block = vec![0_u8; 1 << 20];
    let mut total = 0;
    loop {
        let count = file.read(&mut block)?;
        if count == 0 {
            return Ok((hex::encode(hash.finalize()), total));
        }
        hash.update(&block[..count]);
        total += count as u64;
    }
}

fn xattrs(path: &Path) -> io::Result<BTreeMap<String, String>> {
    let mut names = vec![0_u8; 1 << 16];
    let length = rustix::fs::llistxattr(path, &mut names)?;
    let mut found = BTreeMap::new();
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let value = match get_xattr(path, OsStr::from_bytes(name)) {
            Ok(value) => base64::engine::general_purpose::STANDARD.encode(value),
            Err(error) => format!("ERR {}", reason(&error)),
        };
        found.insert(String::from_utf8_lossy(name).into_owned(), value);
    }
    Ok(found)
}

fn magic(path: &Path) -> BTreeMap<String, String> {
    MAGIC
        .iter()
        .filter_map(|name| {
            let value = get_xattr(path, OsStr::new(name)).ok()?;
            Some(((*name).to_owned(), value.into_iter().map(char::from).collect()))
        })
        .collect()
}

fn get_xattr(path: &Path, name: &OsStr) -> io::Result<Vec<u8>> {
    let mut value = vec![0_u8; 1 << 16];
    let length = rustix::fs::lgetxattr(path, name, &mut value)?;
    value.truncate(length);
    Ok(value)
}

/// The C library's text of an error, without Rust's `(os error N)`.
fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or(&text).to_owned()
}

/// A JSON string in ASCII; bytes that are not UTF-8 become lone surrogates.
fn json_bytes(bytes: &[u8]) -> String {
    let mut text = String::from("\"");
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            match character {
                '"' => text.push_str("\\\""),
                '\\' => text.push_str("\\\\"),
                '\n' => text.push_str("\\n"),
                '\r' => text.push_str("\\r"),
                '\t' => text.push_str("\\t"),
                '\u{8}' => text.push_str("\\b"),
                '\u{c}' => text.push_str("\\f"),
                ' '..='~' => text.push(character),
                _ => {
                    for unit in character.encode_utf16(&mut [0; 2]) {
                        let _ = write!(text, "\\u{unit:04x}");
                    }
                }
            }
        }
        for byte in chunk.invalid() {
            let _ = write!(text, "\\udc{byte:02x}");
        }
    }
    text.push('"');
    text
}

fn surrogateescaped<'de, D: Deserializer<'de>>(deserializer: D) -> Result<OsString, D::Error> {
    deserializer.deserialize_bytes(Surrogateescaped)
}

fn optional_surrogateescaped<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<OsString>, D::Error> {
    surrogateescaped(deserializer).map(Some)
}

struct Surrogateescaped;

impl serde::de::Visitor<'_> for Surrogateescaped {
    type Value = OsString;

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("a string")
    }

    fn visit_bytes<E>(self, bytes: &[u8]) -> Result<OsString, E> {
        // serde_json hands out a lone surrogate U+DCxx as the three bytes ED B2..B3 80..BF.
        let mut plain = Vec::with_capacity(bytes.len());
        let mut rest = bytes;
        while let Some((&first, tail)) = rest.split_first() {
            match (first, tail) {
                (0xed, [high @ 0xb2..=0xb3, low @ 0x80..=0xbf, after @ ..]) => {
                    plain.push(((high & 0x03) << 6) | (low & 0x3f));
                    rest = after;
                }
                _ => {
                    plain.push(first);
                    rest = tail;
                }
            }
        }
        Ok(OsString::from_vec(plain))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_named_by_path_and_field() {
        let entry = |path: &str, mode: &str| TreeEntry {
            path: path.into(),
            mode: Some(mode.to_owned()),
            ..TreeEntry::default()
        };
        let expected = [entry("/a", "0644"), entry("/b", "0644")];
        let found = [entry("/a", "0600"), entry("/c", "0644")];
        let lines = compare(&expected, &found);
        assert_eq!(lines, ["/a: mode: expected \"0644\", found \"0600\"", "/b: missing", "/c: not expected"]);
        assert!(compare_without(&expected[..1], &found[..1], &["mode"]).is_empty());
    }

    #[test]
    fn names_that_are_not_utf8_survive_a_round_trip() {
        let entry = TreeEntry {
            path: OsString::from_vec(b"/caf\xe9\x80\"\n\x7f\xf0\x9f\xa6\x80".to_vec()),
            ..TreeEntry::default()
        };
        let line = entry.to_line();
        assert_eq!(line, r#"{"path": "/caf\udce9\udc80\"\n\u007f\ud83e\udd80"}"#);
        assert_eq!(serde_json::from_str::<TreeEntry>(&line).unwrap(), entry);
    }

    #[test]
    fn a_root_that_is_a_link_is_followed() {
        let directory = crate::ScratchDir::new("link").unwrap();
        std::fs::create_dir(directory.path().join("d")).unwrap();
        std::fs::write(directory.path().join("d/f"), "x").unwrap();
        std::os::unix::fs::symlink("d", directory.path().join("root")).unwrap();
        let entries = walk_one_file_system(directory.path().join("root"));
        let paths: Vec<_> = entries.iter().map(|entry| entry.path.to_str().unwrap()).collect();
        assert_eq!(paths, ["/", "/f"]);
    }

    #[test]
    fn a_walk_finds_what_was_made() {
        let directory = crate::ScratchDir::new("walk").unwrap();
        let root = directory.path();
        std::fs::create_dir(root.join("d")).unwrap();
        std::fs::write(root.join("d/f"), "hello").unwrap();
        std::fs::hard_link(root.join("d/f"), root.join("d/g")).unwrap();
        std::os::unix::fs::symlink("f", root.join("d/l")).unwrap();
        let entries = walk_tree(root);
        let paths: Vec<_> = entries.iter().map(|entry| entry.path.to_str().unwrap()).collect();
        assert_eq!(paths, ["/", "/d", "/d/f", "/d/g", "/d/l"]);
        assert_eq!(entries[3].ino_group.as_deref(), Some(OsStr::new("/d/f")));
        assert_eq!(entries[4].target.as_deref(), Some(OsStr::new("f")));
        assert_eq!(
            entries[2].sha256.as_deref(),
            Some("2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824")
        );
    }
}
