//! Names of files in the cache.

use cvmfs_format::compression::Compression;
use cvmfs_format::hash::ContentHash;

/// Ending of files that hold an uncompressed object as it is stored.
const PLAIN: &str = ".none";
/// Ending of files that were put together from chunks.
const ASSEMBLED: &str = ".chunks";

/// The name of a file in the cache: two hexadecimal digits for the directory, the rest for the file.
///
/// Objects are named as the C++ client names them (client behaviour §9.1): the hash with the identifier of its
/// algorithm, without the suffix letter, holding the *decompressed* bytes. Uncompressed objects have the ending
/// `.none` in addition. Without it two repositories could disagree about one name: an object stored uncompressed
/// may be, byte for byte, the zlib stream of another one, and then both have the same hash and different contents.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CacheName(String);

impl CacheName {
    /// The name of the object with the given hash over its stored bytes.
    pub fn object(hash: &ContentHash, compression: Compression) -> Self {
        match compression {
            Compression::None => Self(format!("{hash}{PLAIN}")),
            _ => Self(hash.to_string()),
        }
    }

    /// The name of a file made of chunks, of which `digest` is a hash over the list.
    pub(crate) fn assembled(digest: &[u8]) -> Self {
        Self(format!("{}{ASSEMBLED}", hex::encode(digest)))
    }

    /// The path below the root of a cache of our own.
    pub(super) fn place(&self) -> String {
        format!("{}/{}", self.directory(), self.file())
    }

    /// The path below the root of a cache that is shared with C++ clients, which know no endings.
    pub(super) fn shared_place(&self) -> String {
        format!("{}/{}", self.directory(), self.file().strip_suffix(PLAIN).unwrap_or(self.file()))
    }

    /// The name of a file found in the cache: `file` in the directory `directory`.
    pub(super) fn found(directory: &str, file: &str) -> Option<Self> {
        is_valid(directory, file).then(|| Self(format!("{directory}{file}")))
    }

    /// Whether this is the name of an object that is stored uncompressed.
    pub(super) fn is_plain(&self) -> bool {
        self.0.ends_with(PLAIN)
    }

    /// The hash over the stored bytes of the object; `None` of a file made of chunks.
    pub(super) fn hash(&self) -> Option<ContentHash> {
        ContentHash::parse(self.0.strip_suffix(PLAIN).unwrap_or(&self.0).as_bytes()).ok()
    }

    /// The name of the directory.
    pub(super) fn directory(&self) -> &str {
        self.0.get(..2).unwrap_or("00")
    }

    /// The name of the file in its directory.
    pub(super) fn file(&self) -> &str {
        self.0.get(2..).unwrap_or("")
    }

    /// The name as one word.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// Whether `file` in the directory `directory` can be a file of the cache.
pub(super) fn is_valid(directory: &str, file: &str) -> bool {
    let name = format!("{directory}{file}");
    let stem = name.strip_suffix(PLAIN).or_else(|| name.strip_suffix(ASSEMBLED)).unwrap_or(&name);
    let hex = stem.split_once('-').map_or(stem, |(hex, _)| hex);
    (32..=64).contains(&hex.len())
        && hex.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use cvmfs_format::hash::HashAlgorithm;

    #[test]
    fn names_carry_the_algorithm_and_tell_uncompressed_objects_apart() {
        let hash = ContentHash::of(HashAlgorithm::Shake128, b"x");
        let zlib = CacheName::object(&hash, Compression::Zlib);
        let none = CacheName::object(&hash, Compression::None);
        assert!(zlib.as_str().ends_with("-shake128"));
        assert!(none.as_str().ends_with("-shake128.none"));
        assert_eq!(zlib.directory(), hex::encode(&hash.digest[..1]));
        for name in [zlib, none, CacheName::assembled(&hash.digest)] {
            assert!(is_valid(name.directory(), name.file()), "{name:?}");
        }
        assert!(!is_valid("ab", "core"));
        assert!(!is_valid("ab", ".nfs000000000123"));
    }
}
