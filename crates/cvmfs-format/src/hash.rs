//! Content hashes, object names and path hashes (repository format §1, §2, §9.1).
//!
//! A content hash is taken over the *stored* bytes of an object. Its text form carries the algorithm
//! (`…-rmd160`, `…-shake128`, nothing for SHA-1); the object's kind is one more letter that appears in object names
//! only, never in manifests or databases.

use std::fmt;
use std::io;
use std::str::FromStr;

use md5::Md5;
use ripemd::Ripemd160;
use sha1::{Digest, Sha1};
use shake::{ExtendableOutput, Shake128, XofReader};

/// Bytes of every content digest; SHAKE-128 is squeezed to this length.
pub const DIGEST_SIZE: usize = 20;

/// Longest text form of a hash: 40 hex digits and `-shake128`.
pub const MAX_HASH_TEXT: usize = 49;

/// Algorithm of a content hash (§2). All hashes of one repository normally use one algorithm, but every reference
/// carries its own and readers cope with mixtures.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HashAlgorithm {
    /// SHA-1, the default.
    #[default]
    Sha1,
    /// RIPEMD-160.
    Ripemd160,
    /// SHAKE-128 with 160 bits of output.
    Shake128,
}

impl HashAlgorithm {
    /// All algorithms in the order of their numbers.
    pub const ALL: [HashAlgorithm; 3] = [Self::Sha1, Self::Ripemd160, Self::Shake128];

    /// Number of the algorithm, 1 to 3. Catalog flags store this number minus one.
    pub fn id(self) -> u8 {
        match self {
            Self::Sha1 => 1,
            Self::Ripemd160 => 2,
            Self::Shake128 => 3,
        }
    }

    /// The algorithm with this number.
    pub fn from_id(id: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|algorithm| algorithm.id() == id)
    }

    /// What follows the hex digits in the text form of a hash.
    pub fn identifier(self) -> &'static str {
        match self {
            Self::Sha1 => "",
            Self::Ripemd160 => "-rmd160",
            Self::Shake128 => "-shake128",
        }
    }

    /// Name in configuration: `sha1`, `rmd160`, `shake128`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "sha1",
            Self::Ripemd160 => "rmd160",
            Self::Shake128 => "shake128",
        }
    }
}

impl fmt::Display for HashAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for HashAlgorithm {
    type Err = HashError;

    fn from_str(name: &str) -> Result<Self, HashError> {
        Self::ALL
            .into_iter()
            .find(|algorithm| algorithm.name() == name)
            .ok_or_else(|| HashError::UnknownAlgorithm(shown(name.as_bytes())))
    }
}

/// A text that is no hash, no object name or no algorithm.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HashError {
    /// The text is not hexadecimal digits followed by an algorithm identifier.
    #[error("not a content hash: {0:?}")]
    NotAHash(String),
    /// Forty digits are followed by the identifier of an algorithm that nobody knows.
    #[error("unsupported hash {0:?}")]
    Unsupported(String),
    /// The name of an algorithm is none of `sha1`, `rmd160`, `shake128`.
    #[error("unknown hash algorithm {0:?} (known: sha1, rmd160, shake128)")]
    UnknownAlgorithm(String),
}

/// Incremental computation of a content hash.
#[derive(Clone)]
pub struct Hasher(State);

#[derive(Clone)]
enum State {
    Sha1(Sha1),
    Ripemd160(Ripemd160),
    Shake128(Shake128),
}

impl Hasher {
    /// Starts a hash.
    pub fn new(algorithm: HashAlgorithm) -> Self {
        Self(match algorithm {
            HashAlgorithm::Sha1 => State::Sha1(Sha1::new()),
            HashAlgorithm::Ripemd160 => State::Ripemd160(Ripemd160::new()),
            HashAlgorithm::Shake128 => State::Shake128(Shake128::default()),
        })
    }

    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            State::Sha1(state) => state.update(bytes),
            State::Ripemd160(state) => state.update(bytes),
            State::Shake128(state) => shake::Update::update(state, bytes),
        }
    }

    /// The hash of all bytes added.
    pub fn finish(self) -> ContentHash {
        let mut digest = [0; DIGEST_SIZE];
        let algorithm = match self.0 {
            State::Sha1(state) => {
                digest.copy_from_slice(&state.finalize());
                HashAlgorithm::Sha1
            }
            State::Ripemd160(state) => {
                digest.copy_from_slice(&state.finalize());
                HashAlgorithm::Ripemd160
            }
            State::Shake128(state) => {
                state.finalize_xof().read(&mut digest);
                HashAlgorithm::Shake128
            }
        };
        ContentHash { algorithm, digest }
    }
}

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            State::Sha1(_) => "Hasher(sha1)",
            State::Ripemd160(_) => "Hasher(rmd160)",
            State::Shake128(_) => "Hasher(shake128)",
        })
    }
}

impl io::Write for Hasher {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Hash of stored bytes, with its algorithm (§2).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContentHash {
    /// The algorithm.
    pub algorithm: HashAlgorithm,
    /// The digest.
    pub digest: [u8; DIGEST_SIZE],
}

impl ContentHash {
    /// Hashes bytes.
    pub fn of(algorithm: HashAlgorithm, bytes: &[u8]) -> Self {
        let mut hasher = Hasher::new(algorithm);
        hasher.update(bytes);
        hasher.finish()
    }

    /// A hash from its raw digest; none if that has not exactly 20 bytes.
    pub fn from_slice(algorithm: HashAlgorithm, digest: &[u8]) -> Option<Self> {
        Some(Self { algorithm, digest: digest.try_into().ok()? })
    }

    /// The null hash: all digest bytes zero. It stands for "no object".
    pub fn null(algorithm: HashAlgorithm) -> Self {
        Self { algorithm, digest: [0; DIGEST_SIZE] }
    }

    /// Whether this is the null hash.
    pub fn is_null(&self) -> bool {
        self.digest == [0; DIGEST_SIZE]
    }

    /// Parses the text form: lowercase hex and the exact algorithm identifier, nothing else.
    pub fn parse(text: &[u8]) -> Result<Self, HashError> {
        let not_a_hash = || HashError::NotAHash(shown(text));
        let (digits, identifier) = text.split_at_checked(2 * DIGEST_SIZE).ok_or_else(not_a_hash)?;
        if !digits.iter().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(not_a_hash());
        }
        let algorithm = HashAlgorithm::ALL
            .into_iter()
            .find(|algorithm| algorithm.identifier().as_bytes() == identifier)
            .ok_or_else(|| match identifier.starts_with(b"-") {
                true => HashError::Unsupported(shown(text)),
                false => not_a_hash(),
            })?;
        let mut digest = [0; DIGEST_SIZE];
        hex::decode_to_slice(digits, &mut digest).map_err(|_| not_a_hash())?;
        Ok(Self { algorithm, digest })
    }

    /// Parses the fingerprint syntax of whitelists and blacklists (§6.1, §6.3): the line is cut at the first blank,
    /// tab or `#`, colons are dropped, letters are lowered. None if what remains is no hash.
    pub fn parse_fingerprint(line: &[u8]) -> Option<Self> {
        let end = line.iter().position(|byte| matches!(byte, b' ' | b'\t' | b'#')).unwrap_or(line.len());
        let text: Vec<u8> = line[..end]
            .iter()
            .filter(|byte| **byte != b':')
            .map(u8::to_ascii_lowercase)
            .take(MAX_HASH_TEXT + 1)
            .collect();
        Self::parse(&text).ok()
    }

    /// The fingerprint syntax: uppercase bytes joined by colons, uppercase algorithm identifier.
    pub fn to_fingerprint(&self) -> String {
        let bytes: Vec<String> = self.digest.iter().map(|byte| format!("{byte:02X}")).collect();
        format!("{}{}", bytes.join(":"), self.algorithm.identifier().to_ascii_uppercase())
    }
}

impl fmt::Display for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut digits = [0; 2 * DIGEST_SIZE];
        hex::encode_to_slice(self.digest, &mut digits).map_err(|_| fmt::Error)?;
        f.write_str(std::str::from_utf8(&digits).map_err(|_| fmt::Error)?)?;
        f.write_str(self.algorithm.identifier())
    }
}

impl fmt::Debug for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for ContentHash {
    type Err = HashError;

    fn from_str(text: &str) -> Result<Self, HashError> {
        Self::parse(text.as_bytes())
    }
}

/// What an object is; decides the last letter of its name (§1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectKind {
    /// Whole content of a file.
    File,
    /// File catalog.
    Catalog,
    /// Tag database.
    History,
    /// Signing certificate.
    Certificate,
    /// Repository metainfo.
    Metainfo,
    /// One chunk of a file.
    Chunk,
}

impl ObjectKind {
    /// All kinds.
    pub const ALL: [ObjectKind; 6] =
        [Self::File, Self::Catalog, Self::History, Self::Certificate, Self::Metainfo, Self::Chunk];

    /// Letter at the end of the object's name; empty for whole files.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::File => "",
            Self::Catalog => "C",
            Self::History => "H",
            Self::Certificate => "X",
            Self::Metainfo => "M",
            Self::Chunk => "P",
        }
    }
}

/// Name of a stored object: hash and kind (§1). `Display` and `FromStr` use the short form `<hash text><suffix>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    /// Hash of the stored bytes.
    pub hash: ContentHash,
    /// What the object is.
    pub kind: ObjectKind,
}

impl ObjectName {
    /// Names an object.
    pub fn new(hash: ContentHash, kind: ObjectKind) -> Self {
        Self { hash, kind }
    }

    /// Path below the storage root, such as `data/e8/ec3d…6b78-shake128C`.
    pub fn path(&self) -> String {
        let text = self.to_string();
        let (directory, rest) = text.split_at(2);
        format!("data/{directory}/{rest}")
    }

    /// The name of the object at a path below the storage root; `None` if it is not one.
    pub fn from_path(path: &str) -> Option<Self> {
        let (directory, rest) = path.strip_prefix("data/")?.split_once('/')?;
        if directory.len() != 2 || rest.contains('/') {
            return None;
        }
        let name: Self = format!("{directory}{rest}").parse().ok()?;
        (name.path() == path).then_some(name)
    }

    /// Path of the alternative name directly below the storage root, `.cvmfsalt-<hash text><suffix>`, for
    /// repositories whose manifest says `A yes`.
    pub fn alternative_path(&self) -> String {
        format!(".cvmfsalt-{self}")
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.hash, self.kind.suffix())
    }
}

impl FromStr for ObjectName {
    type Err = HashError;

    fn from_str(text: &str) -> Result<Self, HashError> {
        let letter = text.char_indices().next_back().filter(|(_, letter)| letter.is_ascii_uppercase());
        let Some((end, _)) = letter else {
            return Ok(Self::new(text.parse()?, ObjectKind::File));
        };
        let kind = ObjectKind::ALL
            .into_iter()
            .find(|kind| kind.suffix() == &text[end..])
            .ok_or_else(|| HashError::NotAHash(shown(text.as_bytes())))?;
        Ok(Self::new(text[..end].parse()?, kind))
    }
}

/// MD5 of an absolute path inside the repository as the catalog stores it: two signed little-endian halves (§9.1).
///
/// The repository's root is the empty path, every other path begins with `/` and has no trailing slash. Bytes are
/// hashed as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PathHash {
    /// Column `md5path_1` or `parent_1`.
    pub part1: i64,
    /// Column `md5path_2` or `parent_2`.
    pub part2: i64,
}

impl PathHash {
    /// The parent of the repository's root: both halves zero (not the hash of the empty path).
    pub const NULL: PathHash = PathHash { part1: 0, part2: 0 };

    /// Hashes a path.
    pub fn of(path: &[u8]) -> Self {
        let digest: [u8; 16] = Md5::digest(path).into();
        let value = u128::from_le_bytes(digest);
        Self { part1: value as i64, part2: (value >> 64) as i64 }
    }

    /// Hash of the directory that contains `path`: [`PathHash::NULL`] for the root itself.
    pub fn of_parent(path: &[u8]) -> Self {
        match split_path(path) {
            Some((parent, _)) => Self::of(parent),
            None => Self::NULL,
        }
    }
}

/// Splits a repository path into the directory that contains it and its last component; none for the root.
pub fn split_path(path: &[u8]) -> Option<(&[u8], &[u8])> {
    let slash = path.iter().rposition(|byte| *byte == b'/')?;
    Some((&path[..slash], &path[slash + 1..]))
}

/// Foreign text for messages: printable and cut to a length that fits on a line.
pub(crate) fn shown(text: &[u8]) -> String {
    const MAX_SHOWN: usize = 80;
    let mut shown = String::from_utf8_lossy(&text[..text.len().min(MAX_SHOWN)]).into_owned();
    if text.len() > MAX_SHOWN {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY_OBJECT: [u8; 8] = [0x78, 0x9c, 3, 0, 0, 0, 0, 1];

    #[test]
    fn the_stored_empty_file_has_the_published_names() {
        let hash = ContentHash::of(HashAlgorithm::Sha1, &EMPTY_OBJECT);
        assert_eq!(hash.to_string(), "e8ec3d88b62ebf526e4e5a4ff6162a3aa48a6b78");
        assert_eq!(
            ObjectName::new(hash, ObjectKind::Catalog).path(),
            "data/e8/ec3d88b62ebf526e4e5a4ff6162a3aa48a6b78C"
        );
        assert_eq!(
            ObjectName::new(hash, ObjectKind::File).alternative_path(),
            ".cvmfsalt-e8ec3d88b62ebf526e4e5a4ff6162a3aa48a6b78"
        );
        let shake = ContentHash::of(HashAlgorithm::Shake128, &EMPTY_OBJECT);
        assert_eq!(
            ObjectName::new(shake, ObjectKind::Chunk).path(),
            "data/28/d94b83b7229b331fc601362b8e272e02665122-shake128P"
        );
    }

    #[test]
    fn hashes_of_abc_are_the_standards_values() {
        for (algorithm, expected) in [
            (HashAlgorithm::Sha1, "a9993e364706816aba3e25717850c26c9cd0d89d"),
            (HashAlgorithm::Ripemd160, "8eb208f7e05d987a9b044a8e98c6b087f15a0bfc-rmd160"),
            (HashAlgorithm::Shake128, "5881092dd818bf5cf8a3ddb793fbcba74097d5c5-shake128"),
        ] {
            let mut hasher = Hasher::new(algorithm);
            hasher.update(b"a");
            hasher.update(b"bc");
            assert_eq!(hasher.finish().to_string(), expected);
            assert_eq!(HashAlgorithm::from_id(algorithm.id()), Some(algorithm));
            assert_eq!(algorithm.name().parse(), Ok(algorithm));
        }
        assert_eq!(HashAlgorithm::from_id(0), None);
        assert!("md5".parse::<HashAlgorithm>().is_err());
    }

    #[test]
    fn the_worked_example_has_the_same_object_names() {
        let stored = [0x78, 0x9c, 0xcb, 0x48, 0xcd, 0xc9, 0xc9, 0xe7, 0x02, 0x00, 0x08, 0x4b, 0x02, 0x1f];
        let sha1 = ContentHash::of(HashAlgorithm::Sha1, &stored);
        assert_eq!(sha1.to_string(), "5798f7f4ca7585d850eea64610a1f73d8f8de7a3");
        let shake = ObjectName::new(ContentHash::of(HashAlgorithm::Shake128, &stored), ObjectKind::File);
        assert_eq!(shake.path(), "data/97/71532cda37f736dff5b6609ddae2f44c6407f2-shake128");
    }

    #[test]
    fn only_the_exact_text_form_is_a_hash() {
        let good = "28d94b83b7229b331fc601362b8e272e02665122-shake128";
        assert_eq!(good.parse::<ContentHash>().unwrap().to_string(), good);
        for bad in [
            "",
            "28d9",
            "28D94B83B7229B331FC601362B8E272E02665122",
            "28d94b83b7229b331fc601362b8e272e0266512g",
            "28d94b83b7229b331fc601362b8e272e02665122-shake129",
            "28d94b83b7229b331fc601362b8e272e02665122C",
            "28d94b83b7229b331fc601362b8e272e02665122 ",
        ] {
            assert!(bad.parse::<ContentHash>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn object_names_come_back_from_their_text() {
        let hash = ContentHash::of(HashAlgorithm::Ripemd160, b"x");
        for kind in ObjectKind::ALL {
            let name = ObjectName::new(hash, kind);
            assert_eq!(name.to_string().parse(), Ok(name));
        }
        assert!(format!("{hash}Q").parse::<ObjectName>().is_err());
        assert!("ü".parse::<ObjectName>().is_err());
    }

    #[test]
    fn path_hashes_are_those_of_the_format_description() {
        for (path, part1, part2) in [
            ("", 338333539836370388, 9098107892288553193),
            ("/foo", 5745132282796244766, -5819618580357280866),
            ("/foo/bar", -2822516800166431715, 9048809318629099454),
            ("/.cvmfs", -2402492567927477437, -171651727507129842),
            ("/a", -2906336618250618618, -744252105585281751),
            ("/a/b", -79414819578584146, 8517581007188477988),
            ("/a/f", -5638124684780513603, -4704938181593048171),
            ("/a/l", 5203127561589774042, 4681510480717132366),
            ("/a/b/.cvmfscatalog", 2438909467458220359, 1914288168329344167),
        ] {
            assert_eq!(PathHash::of(path.as_bytes()), PathHash { part1, part2 }, "{path}");
        }
        assert_eq!(PathHash::of_parent(b""), PathHash::NULL);
        assert_eq!(PathHash::of_parent(b"/foo"), PathHash::of(b""));
        assert_eq!(PathHash::of_parent(b"/foo/bar"), PathHash::of(b"/foo"));
    }

    #[test]
    fn fingerprints_are_read_up_to_a_comment_and_written_in_capitals() {
        let line = b"4B:1F:3C:7A:00:11:22:33:44:55:66:77:88:99:AA:BB:CC:DD:EE:FF # release manager";
        let hash = ContentHash::parse_fingerprint(line).unwrap();
        assert_eq!(hash.to_string(), "4b1f3c7a00112233445566778899aabbccddeeff");
        assert_eq!(hash.to_fingerprint().as_bytes(), &line[..59]);
        let shake = ContentHash::of(HashAlgorithm::Shake128, b"");
        assert!(shake.to_fingerprint().ends_with("-SHAKE128"));
        assert_eq!(ContentHash::parse_fingerprint(shake.to_fingerprint().as_bytes()), Some(shake));
        assert_eq!(ContentHash::parse_fingerprint(b"# comment"), None);
        assert_eq!(ContentHash::parse_fingerprint(b"junk"), None);
    }
}
