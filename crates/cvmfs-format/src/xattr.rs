//! The extended attribute blob of a catalog row (repository format §13.1).
//!
//! ```text
//! version 1 | number of entries | { key length | value length | key | value }*
//! ```
//!
//! All lengths are one byte, so 255 is the limit of everything. No attributes are stored as NULL, not as an empty
//! list.

use std::collections::BTreeMap;
use std::collections::btree_map;

use crate::hash::shown;

const VERSION: u8 = 1;

/// Largest number of attributes, key length and value length.
pub const MAX_XATTR: usize = 255;

/// Extended attributes of one entry, in ascending order of their full names (`user.foo`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Xattrs(BTreeMap<Vec<u8>, Vec<u8>>);

/// Why a blob is invalid or attributes cannot be stored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum XattrError {
    /// The blob ends before its entries do.
    #[error("extended attributes are cut short")]
    Truncated,
    /// The blob has another version.
    #[error("extended attributes of unknown version {0}")]
    Version(u8),
    /// A name is empty or contains a zero byte.
    #[error("extended attribute name is empty or contains a zero byte")]
    BadName,
    /// More than 255 attributes.
    #[error("{0} extended attributes, the format has room for {MAX_XATTR}")]
    TooMany(usize),
    /// A name or value is longer than 255 bytes.
    #[error("{what} of extended attribute {name:?} has {size} bytes, the format has room for {MAX_XATTR}")]
    TooLong {
        /// `name` or `value`.
        what: &'static str,
        /// Name of the attribute, cut for display.
        name: String,
        /// Bytes.
        size: usize,
    },
}

impl Xattrs {
    /// No attributes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Parses a blob. Trailing bytes are ignored and of a repeated name the last value wins.
    pub fn parse(blob: &[u8]) -> Result<Self, XattrError> {
        let &[version, count, ref rest @ ..] = blob else {
            return Err(XattrError::Truncated);
        };
        if version != VERSION {
            return Err(XattrError::Version(version));
        }
        let mut attributes = BTreeMap::new();
        let mut rest = rest;
        for _ in 0..count {
            let &[name_size, value_size, ref body @ ..] = rest else {
                return Err(XattrError::Truncated);
            };
            let (name, body) = body.split_at_checked(name_size.into()).ok_or(XattrError::Truncated)?;
            let (value, body) = body.split_at_checked(value_size.into()).ok_or(XattrError::Truncated)?;
            if name.is_empty() || name.contains(&0) {
                return Err(XattrError::BadName);
            }
            attributes.insert(name.to_vec(), value.to_vec());
            rest = body;
        }
        Ok(Self(attributes))
    }

    /// The blob; none if there are no attributes.
    pub fn to_bytes(&self) -> Result<Option<Vec<u8>>, XattrError> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let count = u8::try_from(self.0.len()).map_err(|_| XattrError::TooMany(self.0.len()))?;
        let mut blob = vec![VERSION, count];
        for (name, value) in &self.0 {
            if name.is_empty() || name.contains(&0) {
                return Err(XattrError::BadName);
            }
            blob.push(length("name", name, name)?);
            blob.push(length("value", name, value)?);
            blob.extend_from_slice(name);
            blob.extend_from_slice(value);
        }
        Ok(Some(blob))
    }

    /// Value of an attribute.
    pub fn get(&self, name: &[u8]) -> Option<&[u8]> {
        self.0.get(name).map(Vec::as_slice)
    }

    /// Sets an attribute. Limits are checked by [`Xattrs::to_bytes`].
    pub fn insert(&mut self, name: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) {
        self.0.insert(name.into(), value.into());
    }

    /// Removes an attribute; tells whether it existed.
    pub fn remove(&mut self, name: &[u8]) -> bool {
        self.0.remove(name).is_some()
    }

    /// Names and values in order.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.0.iter().map(|(name, value)| (name.as_slice(), value.as_slice()))
    }

    /// Number of attributes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are no attributes.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl IntoIterator for Xattrs {
    type Item = (Vec<u8>, Vec<u8>);
    type IntoIter = btree_map::IntoIter<Vec<u8>, Vec<u8>>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<K: Into<Vec<u8>>, V: Into<Vec<u8>>> FromIterator<(K, V)> for Xattrs {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(attributes: I) -> Self {
        Self(attributes.into_iter().map(|(name, value)| (name.into(), value.into())).collect())
    }
}

fn length(what: &'static str, name: &[u8], part: &[u8]) -> Result<u8, XattrError> {
    u8::try_from(part.len()).map_err(|_| XattrError::TooLong { what, name: shown(name), size: part.len() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: [u8; 20] = *b"\x01\x02\x06\x02user.axy\x06\x00user.b";

    #[test]
    fn the_format_descriptions_example_is_read_and_written() {
        let xattrs = Xattrs::parse(&EXAMPLE).unwrap();
        assert_eq!(xattrs.iter().collect::<Vec<_>>(), [(&b"user.a"[..], &b"xy"[..]), (b"user.b", b"")]);
        assert_eq!(xattrs.to_bytes().unwrap().unwrap(), EXAMPLE);
        let unordered: Xattrs = [("user.b", ""), ("user.a", "xy")].into_iter().collect();
        assert_eq!(unordered.to_bytes().unwrap().unwrap(), EXAMPLE);
        assert_eq!(Xattrs::new().to_bytes().unwrap(), None);
    }

    #[test]
    fn cut_blobs_other_versions_and_bad_names_are_refused() {
        for end in 0..EXAMPLE.len() {
            assert_eq!(Xattrs::parse(&EXAMPLE[..end]), Err(XattrError::Truncated), "{end}");
        }
        assert_eq!(Xattrs::parse(&[2, 0]), Err(XattrError::Version(2)));
        assert_eq!(Xattrs::parse(&[1, 1, 0, 0]), Err(XattrError::BadName));
        assert_eq!(Xattrs::parse(&[1, 1, 0, 1, b'x']), Err(XattrError::BadName));
        assert_eq!(Xattrs::parse(&[1, 1, 2, 0, b'x', 0]), Err(XattrError::BadName));
    }

    #[test]
    fn trailing_bytes_are_ignored_and_the_last_of_repeated_names_wins() {
        let mut blob = EXAMPLE.to_vec();
        blob.extend_from_slice(b"tail");
        assert_eq!(Xattrs::parse(&blob), Xattrs::parse(&EXAMPLE));
        let xattrs = Xattrs::parse(b"\x01\x02\x01\x01a1\x01\x01a2").unwrap();
        assert_eq!((xattrs.len(), xattrs.get(b"a")), (1, Some(&b"2"[..])));
        assert!(Xattrs::parse(&[1, 0]).unwrap().is_empty());
    }

    #[test]
    fn what_does_not_fit_is_refused_on_writing() {
        let of = |name: Vec<u8>, value: Vec<u8>| [(name, value)].into_iter().collect::<Xattrs>().to_bytes();
        assert!(of(vec![b'n'; 255], vec![0; 255]).is_ok());
        assert!(matches!(
            of(vec![b'n'; 256], vec![]),
            Err(XattrError::TooLong { what: "name", size: 256, .. })
        ));
        assert!(matches!(
            of(b"user.n".to_vec(), vec![0; 256]),
            Err(XattrError::TooLong { what: "value", .. })
        ));
        assert_eq!(of(vec![], vec![]), Err(XattrError::BadName));
        let many: Xattrs = (0..256u32).map(|index| (format!("user.{index}"), "")).collect();
        assert_eq!(many.to_bytes(), Err(XattrError::TooMany(256)));
    }
}
