//! Certificates and revisions that a site refuses (repository format §6.3).

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use cvmfs_format::hash::ContentHash;
use cvmfs_format::signature::Certificate;

use super::TrustError;

/// Largest blacklist in bytes; real ones have a few lines.
const MAX_FILE: u64 = 1 << 20;
/// Longest wait for one file: the configuration repository's is on another mount, which may be dead.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is refused.
#[derive(Debug, Default)]
pub(super) struct Blacklist {
    fingerprints: Vec<ContentHash>,
    /// Revisions lower than the number are refused.
    revisions: Vec<(String, u64)>,
}

impl Blacklist {
    /// Joins the files that exist. One that exists and cannot be read is an error: it may name what must not pass.
    pub(super) fn load(files: &[PathBuf]) -> Result<Self, TrustError> {
        let mut blacklist = Self::default();
        for file in files {
            let failed = |source| TrustError::Blacklist { path: file.clone(), source };
            match read(file) {
                Ok(text) => blacklist.add(&text),
                Err(error) if is_absent(&error) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(blacklist)
    }

    pub(super) fn check(
        &self,
        fqrn: &str,
        revision: u64,
        certificate: &Certificate,
    ) -> Result<(), TrustError> {
        if self.fingerprints.iter().any(|listed| certificate.fingerprint(listed.algorithm) == *listed) {
            return Err(TrustError::CertificateBlacklisted { fqrn: fqrn.to_owned() });
        }
        self.check_revision(fqrn, revision)
    }

    pub(super) fn check_revision(&self, fqrn: &str, revision: u64) -> Result<(), TrustError> {
        let lowest = self.revisions.iter().filter(|(name, _)| name == fqrn).map(|(_, lowest)| *lowest).max();
        match lowest {
            Some(lowest) if revision < lowest => {
                Err(TrustError::RevisionBlacklisted { fqrn: fqrn.to_owned(), revision, lowest })
            }
            _ => Ok(()),
        }
    }

    fn add(&mut self, text: &[u8]) {
        for line in text.split(|byte| *byte == b'\n') {
            if let Some(rule) = line.strip_prefix(b"<") {
                let rule = String::from_utf8_lossy(rule);
                let mut words = rule.split_ascii_whitespace();
                if let (Some(fqrn), Some(Ok(lowest)), None) =
                    (words.next(), words.next().map(str::parse), words.next())
                {
                    self.revisions.push((fqrn.to_owned(), lowest));
                }
            } else if let Some(fingerprint) = ContentHash::parse_fingerprint(line) {
                self.fingerprints.push(fingerprint);
            }
        }
    }
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::TimedOut)
}

/// Reads a file on a thread of its own, so that a dead mount costs no more than the patience.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    let inside = path.to_owned();
    std::thread::spawn(move || {
        let read = || {
            let mut text = Vec::new();
            File::open(&inside)?.take(MAX_FILE).read_to_end(&mut text)?;
            Ok(text)
        };
        // The receiver is gone if this took too long.
        let _ = sender.send(read());
    });
    receiver.recv_timeout(PATIENCE).unwrap_or_else(|_| {
        tracing::warn!(blacklist = %path.display(), "blacklist cannot be read in time and is skipped");
        Err(io::ErrorKind::TimedOut.into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use cvmfs_format::hash::HashAlgorithm;
    use cvmfs_format::signature::generate_keys;

    #[test]
    fn listed_certificates_and_lower_revisions_are_refused() {
        let chain = generate_keys("a.b", 1_700_000_000).unwrap();
        let certificate = Certificate::from_pem(chain.certificate_pem.as_bytes()).unwrap();
        let mut blacklist = Blacklist::default();
        blacklist.add(b"# comment\n<a.b 5\n<a.b 7\n<a.b x\n< a.c 9\nrubbish\n");
        blacklist.check("a.b", 7, &certificate).unwrap();
        blacklist.check("other.b", 1, &certificate).unwrap();
        assert!(matches!(
            blacklist.check("a.b", 6, &certificate),
            Err(TrustError::RevisionBlacklisted { lowest: 7, .. })
        ));
        assert!(blacklist.check("a.c", 8, &certificate).is_err());
        let listed = certificate.fingerprint(HashAlgorithm::Sha1).to_fingerprint();
        blacklist.add(format!("{listed} # stolen\n").as_bytes());
        assert!(matches!(
            blacklist.check("a.b", 9, &certificate),
            Err(TrustError::CertificateBlacklisted { .. })
        ));
    }

    #[test]
    fn a_missing_file_refuses_nothing_and_an_unreadable_one_everything() {
        let directory = tempfile::tempdir().unwrap();
        assert!(Blacklist::load(&[directory.path().join("absent")]).is_ok());
        assert!(Blacklist::load(&[directory.path().to_owned()]).is_err());
    }
}
