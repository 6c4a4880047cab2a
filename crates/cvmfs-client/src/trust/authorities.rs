//! Reading the certificate authorities of a site, for whitelists that demand them.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use cvmfs_format::signature::Authorities;

/// Largest file of an authority in bytes: a revocation list of some ten thousand certificates.
const MAX_FILE: u64 = 8 << 20;
/// Most files looked at; a directory of the grid has about a thousand.
const MAX_FILES: usize = 8192;
/// Longest wait for a directory: it may be on another mount, which may be dead.
const PATIENCE: Duration = Duration::from_secs(10);

/// The authorities of all directories; none of a directory that cannot be read in time.
pub(super) fn load(directories: &[PathBuf]) -> Authorities {
    let (sender, receiver) = mpsc::channel();
    let directories = directories.to_vec();
    std::thread::spawn(move || {
        let mut authorities = Authorities::new();
        for directory in &directories {
            read(directory, &mut authorities);
        }
        // The receiver is gone if this took too long.
        let _ = sender.send(authorities);
    });
    receiver.recv_timeout(PATIENCE).unwrap_or_else(|_| {
        tracing::warn!("certificate authorities cannot be read in time");
        Authorities::new()
    })
}

fn read(directory: &Path, authorities: &mut Authorities) {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    for path in entries.map(|entry| entry.path()).filter(|path| is_of_authority(path)).take(MAX_FILES) {
        let is_file = std::fs::metadata(&path).is_ok_and(|found| found.is_file());
        let mut text = Vec::new();
        if is_file && File::open(&path).is_ok_and(|file| file.take(MAX_FILE).read_to_end(&mut text).is_ok()) {
            authorities.add_pem(&text);
        }
    }
}

/// Names such as `CERN-Root-2.pem`, `d254cc30.0` and `d254cc30.r0`.
fn is_of_authority(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    let number = extension.strip_prefix('r').unwrap_or(extension);
    matches!(extension, "pem" | "crt" | "crl")
        || (!number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_authorities_are_told_by_their_names() {
        for (name, expected) in [
            ("CERN-Root-2.pem", true),
            ("d254cc30.0", true),
            ("d254cc30.r0", true),
            ("x.crl", true),
            ("x.signing_policy", false),
            ("x.r", false),
            ("README", false),
        ] {
            assert_eq!(is_of_authority(Path::new(name)), expected, "{name}");
        }
    }

    #[test]
    fn a_directory_that_is_not_there_has_no_authorities() {
        assert!(format!("{:?}", load(&["/absent".into()])).contains("certificates: 0"));
    }
}
