//! Paths inside a repository as users write them.

use std::fmt;

use crate::error::{PublishError, shown};
use crate::tree::MAX_DEPTH;

/// Longest name in a directory.
const MAX_NAME: usize = 255;
/// Below this name the C++ publisher keeps its virtual catalog; nobody else may write there (format §10.3).
const RESERVED: &[u8] = b".cvmfs";

/// An absolute path inside a repository in normal form: empty for the root, otherwise `/a/b`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RepositoryPath(Vec<u8>);

impl RepositoryPath {
    /// Normalises what a user wrote: slashes at either end, doubled slashes and `.` are dropped; `..`, zero bytes,
    /// names of more than 255 bytes and the reserved `/.cvmfs` are errors.
    pub fn parse(text: &[u8]) -> Result<RepositoryPath, PublishError> {
        let refuse = |reason: &str| Err(PublishError::Usage(format!("path {}: {reason}", shown(text))));
        let mut path = Vec::with_capacity(text.len() + 1);
        let mut depth = 0;
        for component in text.split(|&b| b == b'/') {
            match component {
                b"" | b"." => continue,
                b".." => return refuse("`..` is not allowed"),
                _ if component.contains(&0) => return refuse("contains a zero byte"),
                _ if component.len() > MAX_NAME => return refuse("has a name of more than 255 bytes"),
                RESERVED if depth == 0 => return refuse("/.cvmfs is reserved"),
                _ => {}
            }
            depth += 1;
            path.push(b'/');
            path.extend_from_slice(component);
        }
        if depth > MAX_DEPTH {
            return refuse("is too deep");
        }
        Ok(RepositoryPath(path))
    }

    /// The bytes: empty for the root, otherwise beginning with a slash and not ending with one.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// True for the root of the repository.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// All directories on the way to the path, from the child of the root to the path's parent.
    pub(crate) fn ancestors(&self) -> impl Iterator<Item = &[u8]> {
        prefixes(&self.0).filter(|prefix| prefix.len() < self.0.len())
    }
}

/// `/a`, `/a/b`, … up to the path itself.
pub(crate) fn prefixes(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    let ends = (1..=path.len()).filter(|&end| end == path.len() || path[end] == b'/');
    ends.map(|end| &path[..end])
}

/// Path of the directory that contains `path`; the root's is the root.
pub(crate) fn parent_of(path: &[u8]) -> &[u8] {
    path.iter().rposition(|&b| b == b'/').map_or(&[], |slash| &path[..slash])
}

/// Whether `path` lies below the directory `above` (and is not it).
pub(crate) fn is_below(path: &[u8], above: &[u8]) -> bool {
    path.strip_prefix(above).is_some_and(|rest| rest.first() == Some(&b'/'))
}

impl fmt::Display for RepositoryPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_root() { "/".into() } else { shown(&self.0) }.as_str())
    }
}

impl fmt::Debug for RepositoryPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RepositoryPath({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_normalised_and_cannot_leave_the_repository() {
        let parsed = |text: &str| RepositoryPath::parse(text.as_bytes()).map(|p| p.to_string()).ok();
        assert_eq!(parsed("/").as_deref(), Some("/"));
        assert_eq!(parsed("").as_deref(), Some("/"));
        assert_eq!(parsed("a//b/./c/").as_deref(), Some("/a/b/c"));
        for bad in ["..", "/a/../b", "/.cvmfs", ".cvmfs/snapshots", "a\0b"] {
            assert_eq!(parsed(bad), None, "{bad:?}");
        }
        assert_eq!(parsed("/a/.cvmfs").as_deref(), Some("/a/.cvmfs"));
        assert!(RepositoryPath::parse(&[b'x'; 256]).is_err());
    }

    #[test]
    fn prefixes_end_at_slashes() {
        let all: Vec<&[u8]> = prefixes(b"/a/bc").collect();
        assert_eq!(all, [&b"/a"[..], b"/a/bc"]);
        assert_eq!(prefixes(b"").count(), 0);
        let path = RepositoryPath::parse(b"/a/bc/d").unwrap();
        assert_eq!(path.ancestors().collect::<Vec<_>>(), [&b"/a"[..], b"/a/bc"]);
        assert_eq!((parent_of(b"/a/b"), parent_of(b"/a")), (&b"/a"[..], &b""[..]));
        assert!(
            is_below(b"/a/b", b"/a")
                && is_below(b"/a", b"")
                && !is_below(b"/ab", b"/a")
                && !is_below(b"/a", b"/a")
        );
    }
}
