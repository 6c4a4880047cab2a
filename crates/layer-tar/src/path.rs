//! Paths inside a layer, and the whiteouts that hide in their names.

use crate::limits::MAX_COMPONENT;
use std::fmt;
use thiserror::Error;

/// A path relative to the root of a layer: components joined by single slashes, none of them empty, `.`,
/// `..`, longer than 255 bytes or containing NUL. The root itself is the empty path. Bytes, not text.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct LayerPath(Vec<u8>);

/// What to do with names that begin with a slash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AbsoluteNames {
    /// An error: a layer archive has relative names.
    #[default]
    Refuse,
    /// Take one leading slash off, for archives made with `tar --absolute-names`.
    StripOneSlash,
}

/// Meaning of a name in a layer archive (OCI image layer specification, "Whiteouts").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whiteout<'a> {
    /// `.wh.NAME`: NAME of the layers below is hidden.
    Name(&'a [u8]),
    /// `.wh..wh..opq`: everything that the layers below have in this directory is hidden.
    Opaque,
    /// `.wh..wh.*` or something below such a name: bookkeeping of AUFS, without meaning in a layer.
    Internal,
}

/// Why a name is not a path inside a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PathError {
    /// No name at all.
    #[error("the name is empty")]
    Empty,
    /// Begins with a slash.
    #[error("the name is absolute; layers have relative names")]
    Absolute,
    /// Has a `..` component.
    #[error("the name contains '..', which could lead out of the layer")]
    Parent,
    /// Contains a NUL byte.
    #[error("the name contains a NUL byte")]
    Nul,
    /// One component is longer than a file system stores.
    #[error("a component of the name is longer than 255 bytes")]
    LongComponent,
    /// The whole name exceeds [`Limits::path`](crate::Limits).
    #[error("the name is longer than {limit} bytes")]
    TooLong {
        /// The limit in bytes.
        limit: usize,
    },
    /// `.wh.`, `.wh..` or `.wh...`: a whiteout of nothing, of the directory itself or of its parent.
    #[error("the name is a whiteout without a target")]
    EmptyWhiteout,
    /// A component before the last one begins with `.wh.`.
    #[error("the name leads through a whiteout; names that begin with '.wh.' are reserved")]
    BelowWhiteout,
}

const PREFIX: &[u8] = b".wh.";
const INTERNAL_PREFIX: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Whether a file of this name cannot travel in a layer archive, because it would be read as a whiteout.
pub fn is_whiteout_name(name: &[u8]) -> bool {
    name.starts_with(PREFIX)
}

impl LayerPath {
    /// The root of the layer.
    pub fn root() -> Self {
        LayerPath(Vec::new())
    }

    /// Reads a name from an archive: `./`, repeated and trailing slashes are taken out.
    pub fn parse(name: &[u8], absolute: AbsoluteNames) -> Result<Self, PathError> {
        Self::parse_within(name, absolute, crate::Limits::PATH)
    }

    pub(crate) fn parse_within(
        name: &[u8],
        absolute: AbsoluteNames,
        limit: usize,
    ) -> Result<Self, PathError> {
        if name.is_empty() {
            return Err(PathError::Empty);
        }
        if name.len() > limit {
            return Err(PathError::TooLong { limit });
        }
        let relative = match (absolute, name.strip_prefix(b"/")) {
            (AbsoluteNames::StripOneSlash, Some(rest)) => rest,
            _ => name,
        };
        if relative.starts_with(b"/") {
            return Err(PathError::Absolute);
        }
        let mut path = LayerPath(Vec::with_capacity(relative.len()));
        for component in relative.split(|&byte| byte == b'/') {
            match component {
                b"" | b"." => continue,
                _ => path.push(component)?,
            }
        }
        Ok(path)
    }

    /// This path with one more component.
    pub fn join(&self, component: &[u8]) -> Result<Self, PathError> {
        let mut path = self.clone();
        match component {
            b"" | b"." => return Err(PathError::Empty),
            _ if component.contains(&b'/') => return Err(PathError::Absolute),
            _ => path.push(component)?,
        }
        Ok(path)
    }

    fn push(&mut self, component: &[u8]) -> Result<(), PathError> {
        match component {
            b".." => return Err(PathError::Parent),
            b".wh." | b".wh.." | b".wh..." => return Err(PathError::EmptyWhiteout),
            _ if component.contains(&0) => return Err(PathError::Nul),
            _ if component.len() > MAX_COMPONENT => return Err(PathError::LongComponent),
            _ => {}
        }
        // Things below `.wh..wh.plnk` are recognised and skipped; below any other whiteout nothing can be.
        let name = self.name();
        if name.starts_with(PREFIX) && !self.is_internal() {
            return Err(PathError::BelowWhiteout);
        }
        if !self.0.is_empty() {
            self.0.push(b'/');
        }
        self.0.extend_from_slice(component);
        Ok(())
    }

    /// The path without leading or trailing slash; empty for the root.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The components from the root on; none for the root itself.
    pub fn components(&self) -> impl DoubleEndedIterator<Item = &[u8]> {
        self.0.split(|&byte| byte == b'/').filter(|component| !component.is_empty())
    }

    /// Whether this is the root of the layer.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The last component; empty for the root.
    pub fn name(&self) -> &[u8] {
        match self.0.iter().rposition(|&byte| byte == b'/') {
            Some(slash) => &self.0[slash + 1..],
            None => &self.0,
        }
    }

    /// The directory that contains this path; none for the root.
    pub fn parent(&self) -> Option<LayerPath> {
        if self.is_root() {
            return None;
        }
        let end = self.0.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
        Some(LayerPath(self.0[..end].to_vec()))
    }

    /// What the name means if it is not the name of an ordinary object.
    pub fn whiteout(&self) -> Option<Whiteout<'_>> {
        let name = self.name();
        if name == OPAQUE && !self.parent().is_some_and(|parent| parent.is_internal()) {
            return Some(Whiteout::Opaque);
        }
        if self.is_internal() {
            return Some(Whiteout::Internal);
        }
        name.strip_prefix(PREFIX).map(Whiteout::Name)
    }

    fn is_internal(&self) -> bool {
        self.components().any(|component| component.starts_with(INTERNAL_PREFIX))
    }
}

impl fmt::Display for LayerPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_root() { f.write_str("./") } else { fmt::Display::fmt(&self.0.escape_ascii(), f) }
    }
}

impl fmt::Debug for LayerPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LayerPath({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(name: &[u8]) -> Result<Vec<u8>, PathError> {
        LayerPath::parse(name, AbsoluteNames::Refuse).map(|path| path.as_bytes().to_vec())
    }

    #[test]
    fn spellings_of_one_path_become_one_path() {
        for name in [
            &b"usr/bin/env"[..],
            b"./usr/bin/env",
            b"usr//bin/./env",
            b"./././usr/bin/env/",
            b"usr/bin/env//",
        ] {
            assert_eq!(parse(name).unwrap(), b"usr/bin/env");
        }
        for name in [&b"."[..], b"./", b".//."] {
            assert_eq!(parse(name).unwrap(), b"");
        }
    }

    #[test]
    fn names_that_lead_out_are_refused_with_the_rule_they_break() {
        assert_eq!(parse(b"").unwrap_err(), PathError::Empty);
        for name in [&b".."[..], b"../etc", b"a/../b", b"a/..", b"./../x"] {
            assert_eq!(parse(name).unwrap_err(), PathError::Parent);
        }
        for name in [&b"/"[..], b"/etc/passwd", b"//x"] {
            assert_eq!(parse(name).unwrap_err(), PathError::Absolute);
        }
        assert_eq!(parse(b"a\0b").unwrap_err(), PathError::Nul);
        assert_eq!(parse(&[b'x'; 256]).unwrap_err(), PathError::LongComponent);
        assert_eq!(parse(&[b'x'; 255]).unwrap().len(), 255);
        assert_eq!(parse(&b"d/".repeat(40_000)).unwrap_err(), PathError::TooLong { limit: 65536 });
        assert_eq!(parse(b"...").unwrap(), b"...");
    }

    #[test]
    fn one_leading_slash_is_taken_off_on_request_but_not_two() {
        let strip = |name: &[u8]| LayerPath::parse(name, AbsoluteNames::StripOneSlash);
        assert_eq!(strip(b"/etc/passwd").unwrap().as_bytes(), b"etc/passwd");
        assert!(strip(b"/").unwrap().is_root());
        assert_eq!(strip(b"//etc").unwrap_err(), PathError::Absolute);
        assert_eq!(strip(b"/../etc").unwrap_err(), PathError::Parent);
    }

    #[test]
    fn whiteouts_are_told_from_ordinary_names() {
        let meaning = |name: &[u8]| {
            let path = LayerPath::parse(name, AbsoluteNames::Refuse).unwrap();
            match path.whiteout() {
                None => "ordinary".to_owned(),
                Some(Whiteout::Opaque) => "opaque".to_owned(),
                Some(Whiteout::Internal) => "internal".to_owned(),
                Some(Whiteout::Name(name)) => format!("hides {}", name.escape_ascii()),
            }
        };
        assert_eq!(meaning(b"a/b"), "ordinary");
        assert_eq!(meaning(b"a/.whale"), "ordinary");
        assert_eq!(meaning(b"a/.wh.b"), "hides b");
        assert_eq!(meaning(b".wh..hidden"), "hides .hidden");
        assert_eq!(meaning(b"a/.wh..wh..opq"), "opaque");
        assert_eq!(meaning(b".wh..wh..opq"), "opaque");
        assert_eq!(meaning(b".wh..wh.plnk"), "internal");
        assert_eq!(meaning(b".wh..wh.plnk/12.34"), "internal");
        assert_eq!(meaning(b".wh..wh.orph/.wh..wh..opq"), "internal");
        assert_eq!(meaning(b".wh..wh.aufs"), "internal");
    }

    #[test]
    fn whiteouts_of_nothing_or_of_the_parent_are_refused() {
        for name in [&b".wh."[..], b"a/.wh..", b"a/.wh..."] {
            assert_eq!(parse(name).unwrap_err(), PathError::EmptyWhiteout);
        }
        assert_eq!(parse(b"a/.wh.b/c").unwrap_err(), PathError::BelowWhiteout);
    }

    #[test]
    fn parent_name_and_components_agree() {
        let path = LayerPath::parse(b"a/bc/d", AbsoluteNames::Refuse).unwrap();
        assert_eq!(path.name(), b"d");
        assert_eq!(path.parent().unwrap().as_bytes(), b"a/bc");
        assert_eq!(path.components().collect::<Vec<_>>(), [&b"a"[..], b"bc", b"d"]);
        let top = LayerPath::parse(b"a", AbsoluteNames::Refuse).unwrap();
        assert!(top.parent().unwrap().is_root());
        assert!(LayerPath::root().parent().is_none());
        assert_eq!(top.join(b"x").unwrap().as_bytes(), b"a/x");
        assert!(top.join(b"..").is_err() && top.join(b"x/y").is_err() && top.join(b"").is_err());
    }
}
