//! Extended attributes: those stored in the catalog, those of the layer view, and the
//! magic ones that describe client and entry (repository format §13).

use std::fmt::Write;

use cvmfs_client::deadline::Deadline;
use cvmfs_format::catalog::{Counters, EntryKind};
use cvmfs_format::xattr::Xattrs;

use crate::filesystem::Mount;
use crate::layer_view::OPAQUE_ATTRIBUTES;
use crate::nodes::{Node, ROOT};
use crate::view::ViewError;

/// Which magic attributes `listxattr` shows. Reading one by name works regardless, except
/// with [`Visibility::Off`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Visibility {
    /// There are none: in layers an overlay would copy them up with every file.
    Off,
    /// On the root directory.
    RootOnly,
    /// On no entry.
    Never,
    /// On every entry.
    Always,
}

/// Larger values are read in pages, `name~N` (repository format §13.2).
const PAGE: usize = 40_000;

/// Magic attributes of every entry.
const EVERYWHERE: [&str; 17] = [
    "user.catalog_counters",
    "user.expires",
    "user.fqrn",
    "user.host",
    "user.nclg",
    "user.ndownload",
    "user.nioerr",
    "user.nopen",
    "user.pid",
    "user.proxy",
    "user.repo_counters",
    "user.revision",
    "user.root_hash",
    "user.rx",
    "user.tag",
    "user.uptime",
    "user.version",
];
/// Magic attributes of regular files.
const OF_FILES: [&str; 5] =
    ["user.chunk_list", "user.chunks", "user.compression", "user.direct_io", "user.external_file"];
/// Magic attributes of symbolic links.
const OF_LINKS: [&str; 2] = ["user.rawlink", "xfsroot.rawlink"];

/// The value of an attribute; `None` if the entry does not have it.
pub(crate) fn get(
    mount: &Mount,
    node: &Node,
    name: &[u8],
    deadline: Deadline,
) -> Result<Option<Vec<u8>>, ViewError> {
    if OPAQUE_ATTRIBUTES.contains(&name) && mount.view.is_opaque(node, deadline)? {
        return Ok(Some(b"y".to_vec()));
    }
    if mount.options.magic != Visibility::Off
        && let Ok(name) = std::str::from_utf8(name)
    {
        let (base, page) = match name.split_once('~') {
            Some((base, page)) => (base, Some(page)),
            None => (name, None),
        };
        if is_magic(base) {
            let value = magic_value(mount, node, base, deadline)?;
            return Ok(value.and_then(|value| page_of(value, page)));
        }
    }
    Ok(stored(node).get(name).map(<[u8]>::to_vec))
}

/// The names of an entry's attributes, each ended by a zero byte.
pub(crate) fn list(mount: &Mount, node: &Node, deadline: Deadline) -> Result<Vec<u8>, ViewError> {
    let mut names: Vec<Vec<u8>> = Vec::new();
    let shown = match mount.options.magic {
        Visibility::Always => true,
        Visibility::RootOnly => node.id == ROOT,
        Visibility::Never | Visibility::Off => false,
    };
    if shown {
        names.extend(EVERYWHERE.iter().map(|name| name.as_bytes().to_vec()));
        match node.located.entry.kind() {
            EntryKind::File => names.extend(OF_FILES.iter().map(|name| name.as_bytes().to_vec())),
            EntryKind::Symlink => names.extend(OF_LINKS.iter().map(|name| name.as_bytes().to_vec())),
            _ => {}
        }
        if node.located.entry.hash.is_some() {
            names.push(b"user.hash".to_vec());
        }
    }
    if mount.view.is_opaque(node, deadline)? {
        names.extend(OPAQUE_ATTRIBUTES.iter().map(|name| name.to_vec()));
    }
    for (name, _) in stored(node).iter() {
        if !names.iter().any(|known| known == name) {
            names.push(name.to_vec());
        }
    }
    let mut listed = Vec::new();
    for name in names {
        listed.extend_from_slice(&name);
        listed.push(0);
    }
    Ok(listed)
}

/// The stored attributes. An invalid blob means none, as for the C++ client.
fn stored(node: &Node) -> Xattrs {
    node.located.entry.xattrs.as_deref().and_then(|blob| Xattrs::parse(blob).ok()).unwrap_or_default()
}

fn is_magic(name: &str) -> bool {
    EVERYWHERE.contains(&name) || OF_FILES.contains(&name) || OF_LINKS.contains(&name) || name == "user.hash"
}

fn page_of(value: Vec<u8>, page: Option<&str>) -> Option<Vec<u8>> {
    match page {
        None => Some(value.into_iter().take(PAGE).collect()),
        Some("?") => Some(format!("num_pages, {}", value.len().div_ceil(PAGE).max(1)).into_bytes()),
        Some(number) => {
            let number: usize = number.parse().ok()?;
            let first = number.checked_mul(PAGE)?;
            if first >= value.len().max(1) {
                return None;
            }
            Some(value.into_iter().skip(first).take(PAGE).collect())
        }
    }
}

fn magic_value(
    mount: &Mount,
    node: &Node,
    name: &str,
    deadline: Deadline,
) -> Result<Option<Vec<u8>>, ViewError> {
    let repository = mount.view.repository();
    let snapshot = repository.snapshot();
    let pin = snapshot.pinned();
    let entry = &node.located.entry;
    let is_file = entry.kind() == EntryKind::File;
    let network = repository.store().status();
    let traffic = repository.store().counters();
    let text = match name {
        "user.fqrn" => snapshot.fqrn().to_owned(),
        "user.revision" => pin.revision.to_string(),
        "user.root_hash" => pin.root_hash.to_string(),
        "user.tag" => String::new(),
        "user.expires" => (repository.ttl().as_secs() / 60).to_string(),
        "user.version" => concat!(env!("CARGO_PKG_VERSION"), ".0").to_owned(),
        "user.pid" => std::process::id().to_string(),
        "user.uptime" => (mount.started.elapsed().as_secs() / 60).to_string(),
        "user.host" => network.host,
        "user.proxy" => network.proxy,
        "user.nclg" => snapshot.attached().len().to_string(),
        "user.nopen" => mount.content.open_files().to_string(),
        "user.ndownload" => traffic.requests.to_string(),
        "user.rx" => (traffic.bytes_fetched / 1024).to_string(),
        "user.nioerr" => mount.io_errors.load(std::sync::atomic::Ordering::Relaxed).to_string(),
        "user.repo_counters" => counter_lines(&snapshot.counters(deadline)?),
        "user.catalog_counters" => {
            let catalog = &node.located.catalog;
            format!(
                "catalog_hash: {}\ncatalog_mountpoint: {}\n{}",
                catalog.hash(),
                String::from_utf8_lossy(catalog.mountpoint()),
                counter_lines(&snapshot.catalog_counters(&node.located, deadline)?)
            )
        }
        "user.hash" => match entry.hash {
            Some(hash) if is_file => hash.to_string(),
            _ => return Ok(None),
        },
        "user.rawlink" | "xfsroot.rawlink" if entry.kind() == EntryKind::Symlink => {
            return Ok(Some(entry.symlink.clone()));
        }
        "user.chunks" if is_file => node.chunks.len().max(1).to_string(),
        "user.chunk_list" if is_file => chunk_list(node),
        "user.compression" if is_file => entry.compression().name().to_owned(),
        "user.direct_io" if is_file => u8::from(entry.is_direct_io()).to_string(),
        "user.external_file" if is_file => u8::from(entry.is_external()).to_string(),
        _ => return Ok(None),
    };
    Ok(Some(text.into_bytes()))
}

fn chunk_list(node: &Node) -> String {
    let mut text = String::from("hash,offset,size\n");
    let entry = &node.located.entry;
    if node.chunks.is_empty()
        && let Some(hash) = entry.hash
    {
        let _ = writeln!(text, "{hash},0,{}", entry.size);
    }
    for chunk in &node.chunks {
        let _ = writeln!(text, "{},{},{}", chunk.hash, chunk.offset, chunk.size);
    }
    text
}

fn counter_lines(counters: &Counters) -> String {
    let mut text = String::new();
    for (name, value) in counters.own.iter() {
        let _ = writeln!(text, "self_{name},{value}");
    }
    for (name, value) in counters.subtree.iter() {
        let _ = writeln!(text, "subtree_{name},{value}");
    }
    text
}
