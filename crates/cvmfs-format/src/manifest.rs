//! The manifest `.cvmfspublished` (repository format §4) and its local record, the breadcrumb (§6.5).
//!
//! The manifest names the root of one revision. It is a [`Letter`](crate::letter::Letter) signed with the release
//! key; parsing alone trusts nothing. Unknown keys, empty lines and any order are accepted, as newer releases add keys.

use std::fmt::Write as _;

use crate::hash::{ContentHash, shown};
use crate::letter::MAX_LETTER;

/// MD5 of the empty path, the only root the format has.
const ROOT_PATH_MD5: &str = "d41d8cd98f00b204e9800998ecf8427e";

/// Longest line accepted; the longest legitimate value is a repository name.
const MAX_LINE: usize = 4096;

/// Longest repository name: it becomes a host name and a directory name.
const MAX_FQRN: usize = 255;

/// Seconds for which clients rely on a revision, unless the publisher says otherwise.
pub const DEFAULT_TTL: u32 = 240;

/// Content of a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// `C`: hash of the root catalog.
    pub root_catalog: ContentHash,
    /// `B`: plain size of the root catalog in bytes.
    pub root_catalog_size: u64,
    /// `D`: seconds for which a client may rely on this revision.
    pub ttl: u32,
    /// `S`: number of the revision.
    pub revision: u64,
    /// `G`: garbage collection is allowed.
    pub garbage_collectable: bool,
    /// `A`: certificate and root catalog are also stored below `.cvmfsalt-…`.
    pub alternative_paths: bool,
    /// `N`: fully qualified repository name.
    pub fqrn: String,
    /// `X`: hash of the certificate object.
    pub certificate: Option<ContentHash>,
    /// `H`: hash of the history database.
    pub history: Option<ContentHash>,
    /// `T`: Unix time of signing; 0 if absent.
    pub timestamp: u64,
    /// `M`: hash of the metainfo object.
    pub metainfo: Option<ContentHash>,
    /// `Y`: hash of the raw reflog file at the time of signing.
    pub reflog: Option<ContentHash>,
}

/// Why a text is no manifest, or not the wanted one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// More bytes than any manifest has.
    #[error("manifest has {0} bytes, more than the {MAX_LETTER} allowed")]
    TooLarge(usize),
    /// One line is too long.
    #[error("manifest line {line} is longer than {MAX_LINE} bytes")]
    LineTooLong {
        /// Line number from 1.
        line: usize,
    },
    /// A required key is missing.
    #[error("manifest lacks the required key {key} ({meaning})")]
    Missing {
        /// Key letter.
        key: char,
        /// What the key holds.
        meaning: &'static str,
    },
    /// A value cannot be understood.
    #[error("manifest key {key} has the unusable value {value:?} ({expected} expected)")]
    BadValue {
        /// Key letter.
        key: char,
        /// The value, cut for display.
        value: String,
        /// What would be right.
        expected: &'static str,
    },
    /// The manifest belongs to another repository.
    #[error("repository name does not match (found {found}, expected {expected})")]
    WrongName {
        /// Name in the manifest.
        found: String,
        /// Name asked for.
        expected: String,
    },
}

impl Manifest {
    /// Parses the text of a manifest, with or without its signature part: reading stops at the line `--`.
    pub fn parse(text: &[u8]) -> Result<Self, ManifestError> {
        if text.len() > MAX_LETTER {
            return Err(ManifestError::TooLarge(text.len()));
        }
        let values = Values::collect(text)?;
        if values.required('R', "hash of the root path")? != ROOT_PATH_MD5.as_bytes() {
            return Err(values.bad('R', "MD5 of the empty path"));
        }
        Ok(Self {
            root_catalog: values.hash('C')?.ok_or(missing('C', "root catalog"))?,
            root_catalog_size: values.number('B')?.unwrap_or(0),
            ttl: {
                let ttl = values.number('D')?.ok_or(missing('D', "time to live"))?;
                u32::try_from(ttl).map_err(|_| values.bad('D', "number of seconds"))?
            },
            revision: values.number('S')?.ok_or(missing('S', "revision number"))?,
            garbage_collectable: values.get('G') == Some(b"yes"),
            alternative_paths: values.get('A') == Some(b"yes"),
            fqrn: {
                let name = values.required('N', "repository name")?;
                parse_fqrn(name).ok_or_else(|| values.bad('N', "repository name"))?
            },
            certificate: values.hash('X')?,
            history: values.hash('H')?,
            timestamp: values.number('T')?.unwrap_or(0),
            metainfo: values.hash('M')?,
            reflog: values.hash('Y')?,
        })
    }

    /// The text part in the order of the C++ tools; sign it with [`seal`](crate::letter::seal) in the algorithm of the
    /// root catalog's hash.
    pub fn to_text(&self) -> Vec<u8> {
        let yes_no = |value| if value { "yes" } else { "no" };
        let mut text = format!(
            "C{}\nB{}\nR{ROOT_PATH_MD5}\nD{}\nS{}\nG{}\nA{}\nN{}\n",
            self.root_catalog,
            self.root_catalog_size,
            self.ttl,
            self.revision,
            yes_no(self.garbage_collectable),
            yes_no(self.alternative_paths),
            self.fqrn
        );
        push_hash(&mut text, 'X', self.certificate);
        push_hash(&mut text, 'H', self.history);
        if self.timestamp > 0 {
            let _ = writeln!(text, "T{}", self.timestamp);
        }
        push_hash(&mut text, 'M', self.metainfo);
        push_hash(&mut text, 'Y', self.reflog);
        text.into_bytes()
    }

    /// Checks that this manifest is that of the repository asked for.
    pub fn require_fqrn(&self, expected: &str) -> Result<(), ManifestError> {
        if self.fqrn == expected {
            return Ok(());
        }
        Err(ManifestError::WrongName { found: self.fqrn.clone(), expected: expected.to_owned() })
    }

    /// The record of this manifest that a client keeps.
    pub fn breadcrumb(&self) -> Breadcrumb {
        Breadcrumb { root_catalog: self.root_catalog, timestamp: self.timestamp, revision: self.revision }
    }
}

/// A repository name as it may appear in paths and URLs: letters, digits, dots, dashes and underscores, not
/// beginning with a dot.
pub fn is_valid_fqrn(name: &str) -> bool {
    (1..=MAX_FQRN).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'))
}

/// A name that a repository may be made with: what [`is_valid_fqrn`] allows, with a dot inside, no empty part between
/// dots, and no dash in front. Clients refuse to mount anything else; manifests with such names exist nevertheless, and
/// can be read.
pub fn is_mountable_fqrn(name: &str) -> bool {
    is_valid_fqrn(name)
        && !name.starts_with('-')
        && name.contains('.')
        && name.split('.').all(|part| !part.is_empty())
}

fn push_hash(text: &mut String, key: char, hash: Option<ContentHash>) {
    if let Some(hash) = hash {
        let _ = writeln!(text, "{key}{hash}");
    }
}

fn parse_fqrn(name: &[u8]) -> Option<String> {
    let name = std::str::from_utf8(name).ok()?;
    is_valid_fqrn(name).then(|| name.to_owned())
}

fn missing(key: char, meaning: &'static str) -> ManifestError {
    ManifestError::Missing { key, meaning }
}

/// The last value of each key letter.
struct Values<'a>([Option<&'a [u8]>; 256]);

impl<'a> Values<'a> {
    fn collect(text: &'a [u8]) -> Result<Self, ManifestError> {
        let mut values = [None; 256];
        let complete = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        for (index, line) in text[..complete].split(|byte| *byte == b'\n').enumerate() {
            if line == b"--" {
                break;
            }
            if line.len() > MAX_LINE {
                return Err(ManifestError::LineTooLong { line: index + 1 });
            }
            if let Some((key, value)) = line.split_first() {
                values[usize::from(*key)] = Some(value);
            }
        }
        Ok(Self(values))
    }

    fn get(&self, key: char) -> Option<&'a [u8]> {
        self.0[usize::from(key as u8)]
    }

    fn required(&self, key: char, meaning: &'static str) -> Result<&'a [u8], ManifestError> {
        self.get(key).ok_or(missing(key, meaning))
    }

    fn bad(&self, key: char, expected: &'static str) -> ManifestError {
        ManifestError::BadValue { key, value: shown(self.get(key).unwrap_or_default()), expected }
    }

    fn hash(&self, key: char) -> Result<Option<ContentHash>, ManifestError> {
        self.get(key)
            .map(|text| ContentHash::parse(text).map_err(|_| self.bad(key, "hash")))
            .transpose()
            .map(|hash| hash.filter(|hash| !hash.is_null()))
    }

    fn number(&self, key: char) -> Result<Option<u64>, ManifestError> {
        self.get(key)
            .map(|text| parse_decimal(text).ok_or_else(|| self.bad(key, "decimal number")))
            .transpose()
    }
}

fn parse_decimal(text: &[u8]) -> Option<u64> {
    if !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// The last root catalog a client accepted (§6.5): the floor below which it never goes back, and the revision it
/// mounts while no server can be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Breadcrumb {
    /// Root catalog.
    pub root_catalog: ContentHash,
    /// Unix time of signing.
    pub timestamp: u64,
    /// Revision; 0 in records of old clients.
    pub revision: u64,
}

/// Bytes of a breadcrumb file that are looked at.
pub const MAX_BREADCRUMB: usize = 164;

impl Breadcrumb {
    /// Parses a record; none if it is not usable (malformed, null hash or no timestamp).
    pub fn parse(text: &[u8]) -> Option<Self> {
        let text = text.get(..MAX_BREADCRUMB).unwrap_or(text);
        let text = text.strip_suffix(b"\n").unwrap_or(text);
        let mut parts = text.splitn(2, |byte| *byte == b'T');
        let root_catalog = ContentHash::parse(parts.next()?).ok()?;
        let mut parts = parts.next()?.splitn(2, |byte| *byte == b'R');
        let timestamp = parse_decimal(parts.next()?)?;
        let revision = parts.next().map_or(Some(0), parse_decimal)?;
        (!root_catalog.is_null() && timestamp > 0).then_some(Self { root_catalog, timestamp, revision })
    }

    /// The text of the record, without newline.
    pub fn to_text(&self) -> String {
        format!("{}T{}R{}", self.root_catalog, self.timestamp, self.revision)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::HashAlgorithm;

    const EXAMPLE: &str = "Ce7d3a1bd1f3f7a3bf0b65cbe1dbeaf9b25b0d2d5\nB61440\nRd41d8cd98f00b204e9800998ecf8427e\nD240\nS42\nGyes\nAno\n\
        Nexample.cern.ch\nX5f1e9b8f1b3c35f8b0b80d28f2f49e9d92c9b6f3\nH0a4d55a8d778e5022fab701977c5d840bbc486d0\nT1700000000\n\
        Me8ec3d88b62ebf526e4e5a4ff6162a3aa48a6b78\nY2fd4e1c67a2d28fced849ee1bb76e7391b93eb12\n";

    #[test]
    fn the_worked_example_is_read_and_written_byte_for_byte() {
        assert_eq!(EXAMPLE.len(), 298);
        let hash = ContentHash::of(HashAlgorithm::Sha1, EXAMPLE.as_bytes());
        assert_eq!(hash.to_string(), "a6f0d00f98e282ba543d2a028c818c05ab0caf3d");
        let manifest = Manifest::parse(EXAMPLE.as_bytes()).unwrap();
        assert_eq!((manifest.revision, manifest.ttl, manifest.root_catalog_size), (42, 240, 61440));
        assert!(manifest.garbage_collectable && !manifest.alternative_paths);
        assert_eq!(manifest.to_text(), EXAMPLE.as_bytes());
        assert_eq!(manifest.breadcrumb().to_text(), "e7d3a1bd1f3f7a3bf0b65cbe1dbeaf9b25b0d2d5T1700000000R42");
    }

    #[test]
    fn order_unknown_keys_empty_lines_and_what_follows_the_separator_do_not_matter() {
        let text = "\nNold.cern.ch\nQfuture\nZa|b\nNexample.cern.ch\nS7\nD60\nRd41d8cd98f00b204e9800998ecf8427e\n\n\
            Ce7d3a1bd1f3f7a3bf0b65cbe1dbeaf9b25b0d2d5-shake128\n--\nS9\n";
        let manifest = Manifest::parse(text.as_bytes()).unwrap();
        assert_eq!(manifest.fqrn, "example.cern.ch");
        assert_eq!(manifest.revision, 7);
        assert_eq!(manifest.root_catalog.algorithm, HashAlgorithm::Shake128);
        assert_eq!(
            (manifest.timestamp, manifest.certificate, manifest.garbage_collectable),
            (0, None, false)
        );
    }

    #[test]
    fn each_required_key_is_missed_by_name() {
        for key in ["C", "R", "D", "S", "N"] {
            let text: String = EXAMPLE
                .lines()
                .filter(|line| !line.starts_with(key))
                .map(|line| format!("{line}\n"))
                .collect();
            let error = Manifest::parse(text.as_bytes()).unwrap_err();
            assert!(matches!(error, ManifestError::Missing { key: k, .. } if key.starts_with(k)), "{error}");
        }
    }

    #[test]
    fn a_last_line_without_newline_does_not_count() {
        let end = EXAMPLE.find("\nX").unwrap();
        assert!(Manifest::parse(&EXAMPLE.as_bytes()[..end + 1]).is_ok());
        let error = Manifest::parse(&EXAMPLE.as_bytes()[..end]).unwrap_err();
        assert!(matches!(error, ManifestError::Missing { key: 'N', .. }), "{error}");
    }

    #[test]
    fn malformed_values_are_errors_that_show_the_value() {
        for (from, to) in [
            ("S42", "S-1"),
            ("S42", "S"),
            ("S42", "S99999999999999999999"),
            ("D240", "D99999999999"),
            ("Nexample.cern.ch", "N../../etc"),
            ("Nexample.cern.ch", "N"),
            ("Ce7d3", "Cx7d3"),
            ("X5f1e", "X"),
            ("Rd41d", "Rd41e"),
        ] {
            let error = Manifest::parse(EXAMPLE.replace(from, to).as_bytes()).unwrap_err();
            assert!(matches!(error, ManifestError::BadValue { .. }), "{to}: {error}");
        }
        let long = format!("Q{}\n", "x".repeat(MAX_LINE));
        assert_eq!(Manifest::parse(long.as_bytes()), Err(ManifestError::LineTooLong { line: 1 }));
        assert_eq!(Manifest::parse(&[b'\n'; MAX_LETTER + 1]), Err(ManifestError::TooLarge(MAX_LETTER + 1)));
    }

    #[test]
    fn another_repositorys_manifest_is_named_in_the_error() {
        let manifest = Manifest::parse(EXAMPLE.as_bytes()).unwrap();
        assert_eq!(manifest.require_fqrn("example.cern.ch"), Ok(()));
        assert_eq!(
            manifest.require_fqrn("other.example.org").unwrap_err().to_string(),
            "repository name does not match (found example.cern.ch, expected other.example.org)"
        );
    }

    #[test]
    fn breadcrumbs_of_old_clients_have_no_revision() {
        let text = "e7d3a1bd1f3f7a3bf0b65cbe1dbeaf9b25b0d2d5-shake128T1700000000";
        let breadcrumb = Breadcrumb::parse(text.as_bytes()).unwrap();
        assert_eq!((breadcrumb.revision, breadcrumb.timestamp), (0, 1700000000));
        assert_eq!(Breadcrumb::parse(format!("{text}R42").as_bytes()).unwrap().revision, 42);
        for bad in [
            "",
            "T1",
            "e7d3T1R1",
            &text[..50],
            &format!("{text}x"),
            "0000000000000000000000000000000000000000T5R1",
        ] {
            assert_eq!(Breadcrumb::parse(bad.as_bytes()), None, "{bad}");
        }
    }
}
