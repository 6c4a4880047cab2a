//! The blacklist: what a site no longer accepts although it is signed (repository format §6.3).
//!
//! One entry per line: a certificate's fingerprint in the syntax of the whitelist, or `<FQRN REVISION`, which rejects
//! all lower revisions of that repository. It comes before the whitelist.

use std::collections::BTreeMap;

use crate::hash::ContentHash;
use crate::signature::Certificate;

/// Rejected certificates and revisions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Blacklist {
    fingerprints: Vec<ContentHash>,
    lowest_revisions: BTreeMap<String, u64>,
}

impl Blacklist {
    /// Rejects nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the entries of one file; lines that are no entry are comments.
    pub fn add(&mut self, text: &[u8]) {
        for line in text.split(|byte| *byte == b'\n') {
            if let Some((fqrn, revision)) = parse_revision(line) {
                let lowest = self.lowest_revisions.entry(fqrn).or_default();
                *lowest = revision.max(*lowest);
            } else {
                self.fingerprints.extend(ContentHash::parse_fingerprint(line));
            }
        }
    }

    /// Whether a certificate may not sign.
    pub fn rejects_certificate(&self, certificate: &Certificate) -> bool {
        self.fingerprints.iter().any(|listed| certificate.fingerprint(listed.algorithm) == *listed)
    }

    /// Lowest revision of a repository that is acceptable; 0 if there is no entry.
    pub fn lowest_revision(&self, fqrn: &str) -> u64 {
        self.lowest_revisions.get(fqrn).copied().unwrap_or(0)
    }
}

/// `<FQRN REVISION` with any blanks around the parts; the number is the last thing on the line.
fn parse_revision(line: &[u8]) -> Option<(String, u64)> {
    let entry = std::str::from_utf8(line).ok()?.trim().strip_prefix('<')?;
    let mut words = entry.split_ascii_whitespace();
    let (fqrn, revision) = (words.next()?, words.next()?);
    if words.next().is_some() || !revision.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    Some((fqrn.to_owned(), revision.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::HashAlgorithm;
    use crate::signature::generate_keys;

    #[test]
    fn listed_certificates_and_low_revisions_are_rejected() {
        let pem = generate_keys("a.example.org", 1_700_000_000).unwrap().certificate_pem;
        let certificate = Certificate::from_pem(pem.as_bytes()).unwrap();
        let mut blacklist = Blacklist::new();
        blacklist.add(
            b"# comment\n\n<a.example.org 42\n< b.example.org   7  \n<c.example.org 1 x\n<d.example.org -1\n",
        );
        assert_eq!(blacklist.lowest_revision("a.example.org"), 42);
        assert_eq!(blacklist.lowest_revision("b.example.org"), 7);
        assert_eq!(blacklist.lowest_revision("c.example.org"), 0);
        assert_eq!(blacklist.lowest_revision("d.example.org"), 0);
        assert!(!blacklist.rejects_certificate(&certificate));
        for algorithm in HashAlgorithm::ALL {
            let mut blacklist = blacklist.clone();
            blacklist.add(
                format!("{} # stolen\n", certificate.fingerprint(algorithm).to_fingerprint()).as_bytes(),
            );
            assert!(blacklist.rejects_certificate(&certificate));
        }
        // A second file cannot loosen the first.
        blacklist.add(b"<a.example.org 41");
        assert_eq!(blacklist.lowest_revision("a.example.org"), 42);
    }
}
