//! Extended attributes: those stored in the catalog, those of the layer view, and the
//! magic ones that describe client and entry (repository format §13).

mod values;

use cvmfs_client::config::XattrVisibility;
use cvmfs_client::deadline::Deadline;
use cvmfs_format::catalog::EntryKind;
use cvmfs_format::xattr::Xattrs;

use crate::filesystem::Mount;
use crate::layer_view::OPAQUE_ATTRIBUTES;
use crate::nodes::{Node, ROOT};
use crate::protocol::request::Caller;
use crate::view::ViewError;

/// Larger values of several lines are read in pages, `name~N` (repository format §13.2).
const PAGE: usize = 40_000;

/// On which entries a magic attribute is listed and has a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum On {
    Any,
    WithHash,
    File,
    ExternalFile,
    Link,
    /// Any entry of a repository that not everybody may read.
    Restricted,
}

/// All magic attributes, sorted by name.
const ATTRIBUTES: [(&str, On); 47] = [
    ("user.authz", On::Restricted),
    ("user.catalog_counters", On::Any),
    ("user.chunk_list", On::File),
    ("user.chunks", On::File),
    ("user.compression", On::File),
    ("user.direct_io", On::File),
    ("user.expires", On::Any),
    ("user.external_file", On::File),
    ("user.external_host", On::Any),
    ("user.external_timeout", On::Any),
    ("user.external_url", On::ExternalFile),
    ("user.fqrn", On::Any),
    ("user.hash", On::WithHash),
    ("user.hitrate", On::Any),
    ("user.host", On::Any),
    ("user.host_list", On::Any),
    ("user.inode_max", On::Any),
    ("user.lhash", On::WithHash),
    ("user.logbuffer", On::Any),
    ("user.maxfd", On::Any),
    ("user.ncleanup24", On::Any),
    ("user.nclg", On::Any),
    ("user.ndiropen", On::Any),
    ("user.ndownload", On::Any),
    ("user.nioerr", On::Any),
    ("user.nopen", On::Any),
    ("user.pid", On::Any),
    ("user.proxy", On::Any),
    ("user.proxy_list", On::Any),
    ("user.proxy_list_external", On::Any),
    ("user.pubkeys", On::Any),
    ("user.rawlink", On::Link),
    ("user.repo_counters", On::Any),
    ("user.repo_metainfo", On::Any),
    ("user.revision", On::Any),
    ("user.root_hash", On::Any),
    ("user.rx", On::Any),
    ("user.speed", On::Any),
    ("user.tag", On::Any),
    ("user.timeout", On::Any),
    ("user.timeout_direct", On::Any),
    ("user.timestamp_last_ioerr", On::Any),
    ("user.uptime", On::Any),
    ("user.usedfd", On::Any),
    ("user.useddirp", On::Any),
    ("user.version", On::Any),
    ("xfsroot.rawlink", On::Link),
];

/// The value of an attribute; `None` if the entry does not have it, or the caller may not read it.
pub(crate) fn get(
    mount: &Mount,
    node: &Node,
    name: &[u8],
    caller: Caller,
    deadline: Deadline,
) -> Result<Option<Vec<u8>>, ViewError> {
    if OPAQUE_ATTRIBUTES.contains(&name) && mount.view.is_opaque(node, deadline)? {
        return Ok(Some(b"y".to_vec()));
    }
    if !mount.view.is_layer_view()
        && let Ok(text) = std::str::from_utf8(name)
    {
        let request = PageRequest::parse(text);
        if let Some(on) = kind_of(request.name) {
            // A magic name hides a stored attribute of that name, also where it does not apply.
            if !applies(mount, node, on) || !may_read(mount, request.name, caller) {
                return Ok(None);
            }
            let value = values::value(mount, node, request.name, deadline)?;
            return Ok(value.and_then(|value| request.answer(value)));
        }
    }
    Ok(stored(node).get(name).map(<[u8]>::to_vec))
}

/// The names of an entry's attributes, each ended by a zero byte.
pub(crate) fn list(mount: &Mount, node: &Node, deadline: Deadline) -> Result<Vec<u8>, ViewError> {
    let is_shown = match mount.settings.magic_xattrs {
        // In layers an overlay would copy them up with every file.
        _ if mount.view.is_layer_view() => false,
        XattrVisibility::Always => true,
        XattrVisibility::RootOnly => node.id == ROOT,
        XattrVisibility::Never => false,
    };
    let shown = ATTRIBUTES.iter().filter(|(_, on)| is_shown && applies(mount, node, *on));
    let mut names: Vec<Vec<u8>> = shown.map(|(name, _)| name.as_bytes().to_vec()).collect();
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

/// Whether an attribute can be read without waiting for a download or a whole file.
pub(crate) fn is_quick(name: &[u8]) -> bool {
    !["user.lhash", "user.repo_metainfo", "user.pubkeys"].iter().any(|slow| name.starts_with(slow.as_bytes()))
}

fn kind_of(name: &str) -> Option<On> {
    ATTRIBUTES.iter().find(|(known, _)| *known == name).map(|(_, on)| *on)
}

fn applies(mount: &Mount, node: &Node, on: On) -> bool {
    let entry = &node.located.entry;
    let is_file = entry.kind() == EntryKind::File;
    match on {
        On::Any => true,
        On::WithHash => is_file && entry.hash.is_some(),
        On::File => is_file,
        On::ExternalFile => is_file && entry.is_external(),
        On::Link => entry.kind() == EntryKind::Symlink,
        On::Restricted => mount.view.repository().snapshot().requirement().is_some(),
    }
}

/// Protected attributes are for processes with a privileged primary group.
fn may_read(mount: &Mount, name: &str, caller: Caller) -> bool {
    let settings = &mount.settings;
    !settings.protected_xattrs.contains(name) || settings.privileged_gids.contains(&caller.gid)
}

/// The stored attributes. An invalid blob means none, as for the C++ client.
fn stored(node: &Node) -> Xattrs {
    node.located.entry.xattrs.as_deref().and_then(|blob| Xattrs::parse(blob).ok()).unwrap_or_default()
}

/// A value, and whether it is given out in pages.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Value {
    Whole(Vec<u8>),
    /// Lines; a page ends behind the line with which it has [`PAGE`] bytes.
    Lines(Vec<u8>),
}

impl Value {
    fn pages(self) -> Vec<Vec<u8>> {
        let text = match self {
            Value::Whole(text) => return vec![text],
            Value::Lines(text) => text,
        };
        let mut pages = vec![Vec::new()];
        for line in text.split_inclusive(|byte| *byte == b'\n') {
            match pages.last_mut() {
                Some(page) if page.len() < PAGE => page.extend_from_slice(line),
                _ => pages.push(line.to_vec()),
            }
        }
        pages
    }
}

/// An attribute's name with the page that is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct PageRequest<'a> {
    name: &'a str,
    page: Option<&'a str>,
    /// For people: with a comment, and help instead of an error.
    is_human: bool,
}

impl<'a> PageRequest<'a> {
    fn parse(text: &'a str) -> PageRequest<'a> {
        match text.find(['~', '@']) {
            Some(at) => PageRequest {
                name: &text[..at],
                page: text.get(at + 1..),
                is_human: text[at..].starts_with('@'),
            },
            None => PageRequest { name: text, page: None, is_human: false },
        }
    }

    fn answer(&self, value: Value) -> Option<Vec<u8>> {
        let pages = value.pages();
        let count = pages.len();
        let number = match self.page {
            None => 0,
            Some("?") if self.is_human => return Some(self.help(count)),
            Some("?") => return Some(format!("num_pages, {count}").into_bytes()),
            Some(number) => number.parse::<usize>().ok()?,
        };
        let Some(page) = pages.into_iter().nth(number) else {
            return self.is_human.then(|| self.help(count));
        };
        if !self.is_human {
            return Some(page);
        }
        let comment = format!("# page {number} of {count}, counted from 0\n").into_bytes();
        Some([comment, page].concat())
    }

    fn help(&self, count: usize) -> Vec<u8> {
        let name = self.name;
        format!(
            "# {name} has {count} pages, counted from 0: {name}@N is page N with a comment, {name}~N without, \
             {name}~? tells their number\n"
        )
        .into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(name: &str, value: Value) -> Option<String> {
        PageRequest::parse(name).answer(value).map(|bytes| String::from_utf8(bytes).unwrap())
    }

    #[test]
    fn a_small_value_is_one_page_under_every_name() {
        let value = || Value::Whole(b"abc".to_vec());
        assert_eq!(answer("user.x", value()).unwrap(), "abc");
        assert_eq!(answer("user.x~0", value()).unwrap(), "abc");
        assert_eq!(answer("user.x~?", value()).unwrap(), "num_pages, 1");
        assert_eq!(answer("user.x~1", value()), None);
        assert_eq!(answer("user.x~a", value()), None);
        assert!(answer("user.x@0", value()).unwrap().ends_with("\nabc"));
        assert!(answer("user.x@7", value()).unwrap().contains("1 pages"));
        assert!(answer("user.x@?", value()).unwrap().contains("user.x~?"));
        assert_eq!(answer("user.x@a", value()), None);
    }

    #[test]
    fn pages_hold_whole_lines_and_nothing_is_lost() {
        let lines: String = (0..10_000).map(|number| format!("line {number:05}\n")).collect();
        let value = || Value::Lines(lines.clone().into_bytes());
        let count: usize =
            answer("user.x~?", value()).unwrap().strip_prefix("num_pages, ").unwrap().parse().unwrap();
        assert_eq!(count, lines.len().div_ceil(PAGE + 8));
        let pages: Vec<String> =
            (0..count).map(|page| answer(&format!("user.x~{page}"), value()).unwrap()).collect();
        assert_eq!(pages.concat(), lines);
        assert!(pages.iter().all(|page| page.ends_with('\n')));
        assert!(pages[0].len() >= PAGE && pages[0].len() < PAGE + 20);
        assert_eq!(answer("user.x", value()).unwrap(), pages[0], "no page means the first");
    }
}
