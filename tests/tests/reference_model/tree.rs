//! What a revision contains: one flat map, and edits that make the next one. Knows nothing of catalogs.

use std::collections::BTreeMap;

use proptest::prelude::*;
use testkit::tar::TarBuilder;

/// Few names, so that edits meet each other.
const NAMES: [&str; 8] = [
    "a",
    "b",
    "c",
    "libc.so.6",
    "\u{65e5}\u{672c}",
    "with space",
    ".hidden",
    "nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn",
];
/// A regular file of this name makes its directory a nested catalog.
const MARKER: &str = ".cvmfscatalog";
/// What every directory says about its size.
const DIRECTORY_SIZE: u64 = 4096;

/// The bytes of a file: noise, or for odd seeds text that compresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Content {
    pub seed: u8,
    pub length: u32,
}

impl Content {
    pub fn bytes(self) -> Vec<u8> {
        let length = self.length as usize;
        if self.seed % 2 == 1 {
            return format!("line of {} ", self.seed).bytes().cycle().take(length).collect();
        }
        let mut state = u64::from(self.seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
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
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    pub mode: u32,
    pub owner: (u32, u32),
    pub mtime: u64,
    pub xattr: Option<(&'static str, Vec<u8>)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    Directory,
    File(Content),
    Symlink(&'static str),
    Fifo,
    Char(u32, u32),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Node {
    meta: Meta,
    body: Body,
    /// Names with the same number are hard links of each other.
    group: Option<u32>,
}

/// A target that depends on the client's environment.
const VARIANT: &str = "$(NOT_SET:-x)";

/// What `lstat`, `readlink` and `lgetxattr` say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attributes {
    pub kind: &'static str,
    pub mode: u32,
    pub owner: (u32, u32),
    pub mtime: i64,
    pub size: u64,
    pub nlink: u32,
    pub target: Option<String>,
    pub device: Option<(u32, u32)>,
    pub xattrs: BTreeMap<String, Vec<u8>>,
}

/// Where something happens: at the n-th entry there is, or at a path of these names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    Entry(u16),
    Path(Vec<u8>),
}

/// A change of the published tree.
#[derive(Debug, Clone)]
pub enum Edit {
    /// Anything but a directory; replaces what is there.
    Put(Place, Meta, Body),
    /// A directory: made, or its metadata changed, or in place of what is there.
    Directory(Place, Meta),
    /// A file with two names in one directory.
    Twins(Place, u8, Meta, Content),
    /// Makes a directory a nested catalog.
    Nest(Place, Meta),
    Remove(Place),
}

/// What the publisher is told to do.
#[derive(Debug)]
pub enum Change {
    Ingest(TarBuilder),
    Delete(String),
}

/// One revision. Paths have no slash at either end; the root is the empty path.
#[derive(Debug, Clone, Default)]
pub struct Tree {
    nodes: BTreeMap<String, Node>,
    groups: u32,
}

impl Tree {
    /// The path that is meant.
    pub fn path(&self, place: &Place) -> String {
        match place {
            Place::Entry(number) => {
                let number = usize::from(*number) % (self.nodes.len() + 1);
                number
                    .checked_sub(1)
                    .and_then(|number| self.nodes.keys().nth(number))
                    .cloned()
                    .unwrap_or_default()
            }
            Place::Path(names) => {
                let names: Vec<_> =
                    names.iter().map(|name| NAMES[usize::from(*name) % NAMES.len()]).collect();
                names.join("/")
            }
        }
    }

    /// The content if there is a regular file.
    pub fn content(&self, path: &str) -> Option<Content> {
        match self.nodes.get(path)?.body {
            Body::File(content) => Some(content),
            _ => None,
        }
    }

    pub fn exists(&self, path: &str) -> bool {
        path.is_empty() || self.nodes.contains_key(path)
    }

    /// The names in a directory, sorted; nothing if there is no directory.
    pub fn list(&self, path: &str) -> Option<Vec<String>> {
        self.is_directory(path).then(|| self.children(path).map(|(name, _)| name.to_owned()).collect())
    }

    pub fn attributes(&self, path: &str) -> Option<Attributes> {
        let root;
        let node = match self.nodes.get(path) {
            Some(node) => node,
            None if path.is_empty() => {
                let meta = Meta { mode: 0o755, owner: (0, 0), mtime: 0, xattr: None };
                root = Node { meta, body: Body::Directory, group: None };
                &root
            }
            None => return None,
        };
        let Meta { mode, owner, mtime, xattr } = node.meta.clone();
        let mut attributes = Attributes {
            kind: "",
            mode,
            owner,
            mtime: mtime as i64,
            size: 0,
            nlink: 1,
            target: None,
            device: None,
            xattrs: xattr.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
        };
        attributes.kind = match &node.body {
            Body::Directory => {
                let below = self.children(path).filter(|(_, node)| node.body == Body::Directory).count();
                attributes.nlink = 2 + below as u32;
                attributes.size = DIRECTORY_SIZE;
                "directory"
            }
            Body::File(content) => {
                attributes.size = content.length.into();
                if node.group.is_some() {
                    let (parent, _) = split(path);
                    attributes.nlink =
                        self.children(parent).filter(|(_, other)| other.group == node.group).count() as u32;
                }
                "file"
            }
            Body::Symlink(target) => {
                // Readers see the variant: the site sets no variable, so the default.
                let target = if *target == VARIANT { "x" } else { target };
                attributes.size = target.len() as u64;
                attributes.target = Some(target.to_owned());
                "symlink"
            }
            Body::Fifo => "fifo",
            Body::Char(major, minor) => {
                attributes.device = Some((*major, *minor));
                "char"
            }
        };
        Some(attributes)
    }

    /// Applies edits one after the other; what no archive could contain here is left out.
    pub fn edit(&mut self, edits: &[Edit]) -> Vec<Change> {
        let mut changes = Vec::new();
        let mut archive = None::<TarBuilder>;
        for edit in edits {
            match edit {
                Edit::Remove(place) => {
                    let path = self.path(place);
                    if path.is_empty() || !self.exists(&path) {
                        continue;
                    }
                    changes.extend(archive.take().map(Change::Ingest));
                    self.remove(&path);
                    changes.push(Change::Delete(path));
                }
                other => {
                    let tar = archive.take().unwrap_or_default();
                    archive = Some(self.write(other, tar));
                }
            }
        }
        changes.extend(archive.map(Change::Ingest));
        changes
    }

    fn write(&mut self, edit: &Edit, tar: TarBuilder) -> TarBuilder {
        match edit {
            Edit::Put(place, meta, body) => {
                let path = self.path(place);
                let must_be_file = split(&path).1 == MARKER;
                if !self.is_writable(&path) || (must_be_file && !matches!(body, Body::File(_))) {
                    return tar;
                }
                self.insert(&path, meta, body.clone(), None);
                archived(tar, &path, meta, body)
            }
            Edit::Directory(place, meta) => {
                let path = self.path(place);
                if !self.is_writable(&path) || split(&path).1 == MARKER {
                    return tar;
                }
                self.insert(&path, meta, Body::Directory, None);
                archived(tar, &path, meta, &Body::Directory)
            }
            Edit::Twins(place, other, meta, content) => {
                let first = self.path(place);
                let name = NAMES[usize::from(*other) % NAMES.len()];
                let second = join(split(&first).0, name);
                if !self.is_writable(&first) || split(&first).1 == MARKER || first == second {
                    return tar;
                }
                self.groups += 1;
                let group = Some(self.groups);
                self.insert(&first, meta, Body::File(*content), group);
                self.insert(&second, meta, Body::File(*content), group);
                archived(tar, &first, meta, &Body::File(*content)).hard_link(&second, &first)
            }
            Edit::Nest(place, meta) => {
                let path = self.path(place);
                if path.is_empty() || !self.is_directory(&path) {
                    return tar;
                }
                let (marker, body) = (join(&path, MARKER), Body::File(Content { seed: 0, length: 0 }));
                self.insert(&marker, meta, body.clone(), None);
                archived(tar, &marker, meta, &body)
            }
            Edit::Remove(_) => tar,
        }
    }

    /// Whether an entry can be put there: nothing above it is something else than a directory.
    fn is_writable(&self, path: &str) -> bool {
        let mut above = path;
        while let Some((parent, _)) = above.rsplit_once('/') {
            if self.exists(parent) && !self.is_directory(parent) {
                return false;
            }
            above = parent;
        }
        !path.is_empty()
    }

    fn is_directory(&self, path: &str) -> bool {
        path.is_empty() || self.nodes.get(path).is_some_and(|node| node.body == Body::Directory)
    }

    fn insert(&mut self, path: &str, meta: &Meta, body: Body, group: Option<u32>) {
        let mut above = path;
        while let Some((parent, _)) = above.rsplit_once('/') {
            let implied = Meta { mode: 0o755, owner: (0, 0), mtime: meta.mtime, xattr: None };
            let directory = Node { meta: implied, body: Body::Directory, group: None };
            self.nodes.entry(parent.to_owned()).or_insert(directory);
            above = parent;
        }
        if body != Body::Directory {
            self.remove(path);
        }
        // Archives have attributes of files and directories only.
        let xattr = meta.xattr.clone().filter(|_| matches!(body, Body::Directory | Body::File(_)));
        // Nobody asks for the mode of a link.
        let mode = if matches!(body, Body::Symlink(_)) { 0o777 } else { meta.mode };
        self.nodes.insert(path.to_owned(), Node { meta: Meta { xattr, mode, ..meta.clone() }, body, group });
    }

    fn remove(&mut self, path: &str) {
        let below = format!("{path}/");
        self.nodes.retain(|other, _| other != path && !other.starts_with(&below));
    }

    fn children<'t>(&'t self, path: &'t str) -> impl Iterator<Item = (&'t str, &'t Node)> {
        let is_child = move |(other, node): (&'t String, &'t Node)| {
            let (parent, name) = split(other);
            (parent == path).then_some((name, node))
        };
        self.nodes.iter().filter_map(is_child)
    }
}

fn archived(tar: TarBuilder, path: &str, meta: &Meta, body: &Body) -> TarBuilder {
    let mut tar = tar.owner(meta.owner.0, meta.owner.1).mtime(meta.mtime);
    if let (Some((name, value)), Body::Directory | Body::File(_)) = (&meta.xattr, body) {
        tar = tar.xattr(name, value);
    }
    match body {
        Body::Directory => tar.directory(path, meta.mode),
        Body::File(content) => tar.file(path, meta.mode, &content.bytes()),
        Body::Symlink(target) => tar.symlink(path, target),
        Body::Fifo => tar.fifo(path, meta.mode),
        Body::Char(major, minor) => tar.char_device(path, meta.mode, (*major, *minor)),
    }
}

fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

pub fn join(directory: &str, name: &str) -> String {
    if directory.is_empty() { name.to_owned() } else { format!("{directory}/{name}") }
}

pub fn content() -> impl Strategy<Value = Content> {
    // Chunks have 8 to 32 KiB in these repositories.
    let length = prop_oneof![
        1 => Just(0_u32),
        4 => 1_u32..200,
        3 => 200_u32..8_000,
        3 => 8_000_u32..150_000,
    ];
    (0_u8..6, length).prop_map(|(seed, length)| Content { seed, length })
}

fn meta() -> impl Strategy<Value = Meta> {
    let mode = prop::sample::select(vec![0o644, 0o755, 0o600, 0o4755, 0o1777, 0o000]);
    let owner = prop::sample::select(vec![(0, 0), (1000, 1000), (0, 65534)]);
    let mtime = prop::sample::select(vec![0, 1, 1_600_000_000, 4_000_000_000]);
    let name = prop::sample::select(vec!["user.a", "user.longer.name"]);
    let xattr = prop::option::weighted(0.2, (name, prop::collection::vec(any::<u8>(), 0..40)));
    (mode, owner, mtime, xattr).prop_map(|(mode, owner, mtime, xattr)| Meta { mode, owner, mtime, xattr })
}

pub fn place() -> impl Strategy<Value = Place> {
    prop_oneof![
        3 => any::<u16>().prop_map(Place::Entry),
        2 => prop::collection::vec(0..NAMES.len() as u8, 1..4).prop_map(Place::Path),
    ]
}

/// Mostly files, in a tree that mostly grows.
pub fn edit() -> impl Strategy<Value = Edit> {
    let fresh = || {
        prop_oneof![
            4 => prop::collection::vec(0..NAMES.len() as u8, 1..4).prop_map(Place::Path),
            1 => any::<u16>().prop_map(Place::Entry),
        ]
    };
    let body = prop_oneof![
        8 => content().prop_map(Body::File),
        1 => prop::sample::select(vec!["a", "../a/b", "/nowhere", VARIANT]).prop_map(Body::Symlink),
        1 => Just(Body::Fifo),
        1 => prop::sample::select(vec![(1, 3), (0, 0), (4095, 1_048_575)])
            .prop_map(|(major, minor)| Body::Char(major, minor)),
    ];
    prop_oneof![
        8 => (fresh(), meta(), body).prop_map(|(place, meta, body)| Edit::Put(place, meta, body)),
        3 => (fresh(), meta()).prop_map(|(place, meta)| Edit::Directory(place, meta)),
        1 => (fresh(), any::<u8>(), meta(), content())
            .prop_map(|(place, other, meta, content)| Edit::Twins(place, other, meta, content)),
        2 => (place(), meta()).prop_map(|(place, meta)| Edit::Nest(place, meta)),
        2 => place().prop_map(Edit::Remove),
    ]
}
