//! The key files of a repository: `FQRN.masterkey`, `.pub`, `.key`, `.crt` in one directory (format §6.4).
//!
//! | file | needed for |
//! |---|---|
//! | `.pub` | everything that verifies |
//! | `.crt`, `.key` | publishing |
//! | `.masterkey` | `mkfs` and `resign` only; keep it elsewhere otherwise |
//!
//! A private key that others can read is refused: it protects nothing any more.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use cvmfs_format::signature::{Certificate, MasterKeys, PrivateKey, generate_keys};

use crate::error::PublishError;

/// PEM files of RSA keys have some KiB; a certificate with its chain seldom more.
const MAX_KEY_FILE: u64 = 256 << 10;
const PRIVATE_MODE: u32 = 0o400;
const PUBLIC_MODE: u32 = 0o444;
/// Permission bits that let others than the owner at a file.
const OTHERS: u32 = 0o077;

/// The keys directory of one repository.
#[derive(Debug, Clone)]
pub struct KeyFiles {
    directory: PathBuf,
    fqrn: String,
}

/// What signs manifests.
#[derive(Debug)]
pub struct ReleaseKeys {
    /// The certificate that the whitelist must list.
    pub certificate: Certificate,
    /// Its private key.
    pub key: PrivateKey,
    /// The certificate file as it is, which becomes the certificate object.
    pub certificate_pem: Vec<u8>,
}

impl KeyFiles {
    /// The keys of `fqrn` in `directory`; nothing is read yet.
    pub fn new(directory: &Path, fqrn: &str) -> KeyFiles {
        KeyFiles { directory: directory.to_owned(), fqrn: fqrn.to_owned() }
    }

    /// Name of the repository.
    pub fn fqrn(&self) -> &str {
        &self.fqrn
    }

    /// Makes the directory (0700) and all four key files unless they are there. Part of a set is an error: a
    /// new key could not go with the old ones.
    pub fn create_missing(&self, now: i64) -> Result<(), PublishError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.directory)
            .map_err(PublishError::local("create", &self.directory))?;
        let files = ["masterkey", "pub", "key", "crt"].map(|kind| self.path(kind));
        let missing: Vec<&PathBuf> = files.iter().filter(|file| !file.exists()).collect();
        if missing.is_empty() {
            return Ok(());
        }
        if missing.len() < files.len() {
            return Err(PublishError::Key {
                path: missing[0].clone(),
                reason: "is missing while others of the set exist: restore it, or choose another --keys"
                    .to_owned(),
            });
        }
        let made = generate_keys(&self.fqrn, now)
            .map_err(|error| PublishError::Key { path: self.directory.clone(), reason: error.to_string() })?;
        write_new(&files[0], made.masterkey_pem.as_ref(), PRIVATE_MODE)?;
        write_new(&files[1], made.master_public_pem.as_ref(), PUBLIC_MODE)?;
        write_new(&files[2], made.key_pem.as_ref(), PRIVATE_MODE)?;
        write_new(&files[3], made.certificate_pem.as_ref(), PUBLIC_MODE)
    }

    /// The public master key.
    pub fn public(&self) -> Result<MasterKeys, PublishError> {
        read_public(&self.path("pub"))
    }

    /// The certificate with its private key, which must belong together.
    pub fn release(&self) -> Result<ReleaseKeys, PublishError> {
        let path = self.path("crt");
        let certificate_pem = read(&path)?;
        let bad = |error: &dyn std::fmt::Display| PublishError::Key {
            path: path.clone(),
            reason: error.to_string(),
        };
        let certificate = Certificate::from_pem(&certificate_pem).map_err(|error| bad(&error))?;
        let key = self.private("key")?;
        if !key.matches(&certificate) {
            return Err(bad(&"does not belong to the private key beside it"));
        }
        Ok(ReleaseKeys { certificate, key, certificate_pem })
    }

    /// The private master key.
    pub fn master(&self) -> Result<PrivateKey, PublishError> {
        self.private("masterkey")
    }

    fn private(&self, kind: &str) -> Result<PrivateKey, PublishError> {
        let path = self.path(kind);
        let bad = |reason: String| PublishError::Key { path: path.clone(), reason };
        let metadata = fs::metadata(&path).map_err(|error| unreadable(&path, &error))?;
        if metadata.mode() & OTHERS != 0 {
            let mode = metadata.mode() & 0o7777;
            return Err(bad(format!(
                "has mode {mode:04o}, others can read it: `chmod 400` it, or replace the key"
            )));
        }
        PrivateKey::from_pem(&read(&path)?).map_err(|error| bad(error.to_string()))
    }

    fn path(&self, kind: &str) -> PathBuf {
        self.directory.join(format!("{}.{kind}", self.fqrn))
    }
}

/// Public master keys of one PEM file.
pub fn read_public(path: &Path) -> Result<MasterKeys, PublishError> {
    let bad = |error: &dyn std::fmt::Display| PublishError::Key {
        path: path.to_owned(),
        reason: error.to_string(),
    };
    MasterKeys::from_pem(&read(path)?).map_err(|error| bad(&error))
}

fn read(path: &Path) -> Result<Vec<u8>, PublishError> {
    let bad = |reason: String| PublishError::Key { path: path.to_owned(), reason };
    let file = fs::File::open(path).map_err(|error| unreadable(path, &error))?;
    let mut bytes = Vec::new();
    file.take(MAX_KEY_FILE + 1).read_to_end(&mut bytes).map_err(|error| unreadable(path, &error))?;
    if bytes.len() as u64 > MAX_KEY_FILE {
        return Err(bad("is too large for a key".to_owned()));
    }
    Ok(bytes)
}

fn unreadable(path: &Path, error: &io::Error) -> PublishError {
    if error.kind() == io::ErrorKind::NotFound {
        return PublishError::NotFound(format!(
            "there is no key file {}; --keys names its directory",
            path.display()
        ));
    }
    let reason = format!("cannot be read ({error}); --keys names its directory");
    PublishError::Key { path: path.to_owned(), reason }
}

fn write_new(path: &Path, content: &[u8], mode: u32) -> Result<(), PublishError> {
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
        file.write_all(content)?;
        file.sync_all()
    };
    write().map_err(PublishError::local("create", path))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn made_keys_are_private_belong_together_and_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let keys = KeyFiles::new(&dir.path().join("keys"), "test.example.org");
        keys.create_missing(1_700_000_000).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(&dir.path().join("keys")), 0o700);
        assert_eq!(mode(&keys.path("key")), 0o400);
        assert_eq!(mode(&keys.path("masterkey")), 0o400);
        let before = keys.release().unwrap().certificate_pem;
        keys.create_missing(1_800_000_000).unwrap();
        assert_eq!(keys.release().unwrap().certificate_pem, before);
        keys.public().unwrap();
        keys.master().unwrap();

        fs::set_permissions(keys.path("key"), fs::Permissions::from_mode(0o440)).unwrap();
        let error = keys.release().unwrap_err();
        assert!(error.to_string().contains("mode 0440"), "{error}");
        assert_eq!(error.exit_code(), 3);

        fs::remove_file(keys.path("pub")).unwrap();
        let error = keys.create_missing(0).unwrap_err().to_string();
        assert!(error.contains("test.example.org.pub"), "{error}");
    }
}
