//! A reference model of unpacking an archive: one flat map from paths to entries.

use std::collections::BTreeMap;
use std::rc::Rc;

use base64::Engine;
use proptest::prelude::*;
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::round_trip::noise;
use crate::support::{Tree, text};
use crate::tar::{Header, Tar};

const NAMES: [&[u8]; 8] = [
    b"a",
    b"b",
    b"c.txt",
    b".cvmfscatalog",
    "日本".as_bytes(),
    b"caf\xe9",
    b"with space",
    b"nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn",
];

#[derive(Debug, Clone)]
pub enum What {
    Directory,
    /// Noise of this length and seed.
    File(usize, u32),
    Symlink(&'static str),
    Fifo,
    Char(u32, u32),
    Block(u32, u32),
    /// To the n-th linkable entry of the archive.
    HardLink(usize),
}

/// One entry that a generated archive may have.
#[derive(Debug, Clone)]
pub struct Step {
    path: Vec<usize>,
    what: What,
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, u32),
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

pub fn step() -> impl Strategy<Value = Step> {
    let length = prop_oneof![Just(0), 1usize..64, 64usize..2000];
    let what = prop_oneof![
        4 => Just(What::Directory),
        6 => (length, 1u32..1000).prop_map(|(length, seed)| What::File(length, seed)),
        1 => prop_oneof![Just("a"), Just("../x"), Just("/absolute/target")].prop_map(What::Symlink),
        1 => Just(What::Fifo),
        1 => (0u32..4096, 0u32..1_048_576).prop_map(|(major, minor)| What::Char(major, minor)),
        1 => (0u32..300, 0u32..300).prop_map(|(major, minor)| What::Block(major, minor)),
        2 => any::<usize>().prop_map(What::HardLink),
    ];
    let xattr = (
        prop_oneof![Just("user.a"), Just("security.capability"), Just("user.z")],
        proptest::collection::vec(any::<u8>(), 0..20),
    )
        .prop_map(|(name, value)| (name.as_bytes().to_vec(), value));
    let owner = (prop_oneof![Just(0), Just(1000), Just(3_000_000_000)], 0u32..5);
    let mtime = (-3_000_000_000i64..9_000_000_000, prop_oneof![Just(0), 0u32..1_000_000_000]);
    (
        proptest::collection::vec(0..NAMES.len(), 1..5),
        what,
        0u32..0o10000,
        owner,
        mtime,
        proptest::collection::vec(xattr, 0..2),
    )
        .prop_map(|(path, what, mode, owner, mtime, xattrs)| Step {
            path,
            what,
            mode,
            owner,
            mtime,
            xattrs,
        })
}

#[derive(Debug, Clone)]
struct Meta {
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, u32),
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Equal pointers are hard links of each other.
type Leaf = Rc<(Meta, What)>;

#[derive(Debug, Clone)]
enum Node {
    Directory(Meta),
    Leaf(Leaf),
}

#[derive(Debug, Default)]
pub struct Model {
    nodes: BTreeMap<Vec<u8>, Node>,
    /// Non-directories of the current archive, in its order.
    linkable: Vec<(Vec<u8>, Leaf)>,
}

/// An entry to write.
#[derive(Debug)]
pub struct Entry<'s> {
    path: Vec<u8>,
    step: &'s Step,
    target: Vec<u8>,
}

impl Model {
    pub fn begin_archive(&mut self) {
        self.linkable.clear();
    }

    /// Applies a step; nothing if no archive could contain it here.
    pub fn apply<'s>(&mut self, step: &'s Step) -> Option<Entry<'s>> {
        let names: Vec<&[u8]> = step.path.iter().map(|&n| NAMES[n]).collect();
        let path = names.join(&b'/');
        // markers of nested catalogs are regular files and nothing else
        let marker: &[u8] = b".cvmfscatalog";
        let inside = &names[..names.len() - 1];
        if inside.contains(&marker) || (names.last() == Some(&marker) && !matches!(step.what, What::File(..)))
        {
            return None;
        }
        let parents: Vec<Vec<u8>> = (1..names.len()).map(|end| names[..end].join(&b'/')).collect();
        if parents.iter().any(|parent| matches!(self.nodes.get(parent), Some(Node::Leaf(_)))) {
            return None;
        }
        let meta =
            Meta { mode: step.mode, owner: step.owner, mtime: step.mtime, xattrs: unique(&step.xattrs) };
        let mut target = Vec::new();
        let node = match &step.what {
            What::Directory => Node::Directory(meta),
            What::HardLink(number) => {
                let alive: Vec<_> = self.linkable.iter().filter(|(at, leaf)| self.is_at(at, leaf)).collect();
                let (at, leaf) = alive.get(number % alive.len().max(1))?;
                if *at == path || at.ends_with(marker) {
                    return None;
                }
                target.clone_from(at);
                Node::Leaf(leaf.clone())
            }
            other => Node::Leaf(Rc::new((meta, other.clone()))),
        };
        for parent in parents {
            let implied = Meta { mode: 0o755, owner: (0, 0), mtime: step.mtime, xattrs: Vec::new() };
            self.nodes.entry(parent).or_insert(Node::Directory(implied));
        }
        if let Node::Leaf(leaf) = &node {
            let below = [path.as_slice(), b"/"].concat();
            self.nodes.retain(|other, _| !other.starts_with(&below));
            self.linkable.push((path.clone(), leaf.clone()));
        }
        self.nodes.insert(path.clone(), node);
        Some(Entry { path, step, target })
    }

    fn is_at(&self, path: &[u8], leaf: &Leaf) -> bool {
        matches!(self.nodes.get(path), Some(Node::Leaf(there)) if Rc::ptr_eq(there, leaf))
    }

    /// What readers should see below `base`.
    pub fn tree(&self, base: &str) -> Tree {
        let mut tree = Tree::new();
        for (path, node) in &self.nodes {
            let shown = format!("{base}/{}", text(path));
            let (parent, _) = split(path);
            let (meta, kind) = match node {
                Node::Directory(meta) => (meta, "dir"),
                Node::Leaf(leaf) => (&leaf.0, kind(&leaf.1)),
            };
            let mut seen = json!({
                "path": shown, "type": kind, "mode": format!("{:04o}", meta.mode), "uid": meta.owner.0,
                "gid": meta.owner.1, "size": 0, "nlink": 1,
                "mtime_ns": meta.mtime.0 * 1_000_000_000 + i64::from(meta.mtime.1),
            });
            if !meta.xattrs.is_empty() {
                let encode = |value: &[u8]| base64::engine::general_purpose::STANDARD.encode(value);
                let map: BTreeMap<String, String> =
                    meta.xattrs.iter().map(|(k, v)| (text(k), encode(v))).collect();
                seen["xattrs"] = json!(map);
            }
            match node {
                Node::Directory(_) => {
                    let is_below = |other: &Vec<u8>, node: &Node| {
                        matches!(node, Node::Directory(_)) && split(other).0 == path.as_slice()
                    };
                    let subdirectories =
                        self.nodes.iter().filter(|(other, node)| is_below(other, node)).count();
                    seen["nlink"] = json!(2 + subdirectories);
                    seen["size"] = json!(4096);
                }
                Node::Leaf(leaf) => {
                    let here: Vec<&Vec<u8>> = self
                        .nodes
                        .keys()
                        .filter(|other| split(other).0 == parent && self.is_at(other, leaf))
                        .collect();
                    if here.len() > 1 {
                        seen["nlink"] = json!(here.len());
                        // children are walked in the order of their names
                        seen["ino_group"] = json!(format!("{base}/{}", text(here[0])));
                    }
                    describe(&mut seen, &leaf.1);
                }
            }
            tree.insert(shown, seen);
        }
        tree
    }
}

impl Entry<'_> {
    pub fn add_to(&self, tar: Tar) -> Tar {
        let step = self.step;
        let mut header = Header::new(&self.path, b'0', step.mode);
        (header.uid, header.gid) = step.owner;
        (header.mtime, header.nanoseconds) = step.mtime;
        let xattrs = unique(&step.xattrs);
        header.xattrs = &xattrs;
        header.link = &self.target;
        match &step.what {
            What::Directory => header.kind = b'5',
            What::File(length, seed) => return tar.add(&header, &noise(*length, *seed)),
            What::Symlink(target) => (header.kind, header.link) = (b'2', target.as_bytes()),
            What::Fifo => header.kind = b'6',
            What::Char(major, minor) => (header.kind, header.device) = (b'3', (*major, *minor)),
            What::Block(major, minor) => (header.kind, header.device) = (b'4', (*major, *minor)),
            What::HardLink(_) => header.kind = b'1',
        }
        tar.add(&header, b"")
    }
}

fn kind(what: &What) -> &'static str {
    match what {
        What::Directory => "dir",
        What::File(..) => "file",
        What::Symlink(_) => "symlink",
        What::Fifo => "fifo",
        What::Char(..) => "char",
        What::Block(..) => "block",
        What::HardLink(_) => unreachable!("links are resolved when they are applied"),
    }
}

fn describe(seen: &mut serde_json::Value, what: &What) {
    match what {
        What::File(length, seed) => {
            seen["size"] = json!(length);
            seen["sha256"] = json!(hex::encode(Sha256::digest(noise(*length, *seed))));
        }
        What::Symlink(target) => {
            seen["size"] = json!(target.len());
            seen["target"] = json!(target);
        }
        What::Char(major, minor) | What::Block(major, minor) => {
            seen["rdev"] = json!(format!("{major}:{minor}"));
        }
        What::Directory | What::Fifo | What::HardLink(_) => {}
    }
}

fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&b| b == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (b"", path),
    }
}

/// Archives state each attribute once.
fn unique(xattrs: &[(Vec<u8>, Vec<u8>)]) -> Vec<(Vec<u8>, Vec<u8>)> {
    let map: BTreeMap<_, _> = xattrs.iter().cloned().collect();
    map.into_iter().collect()
}
