//! The fixture repositories of `tests/fixtures`: written by the C++ tools, with ground truth.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::{ScratchDir, TreeEntry, process, tree, workspace_root};

/// Overrides the directory that holds the fixtures.
pub const FIXTURES_VARIABLE: &str = "CVMFS_FIXTURES";

/// An unpacked fixture; removed when dropped.
#[derive(Debug)]
pub struct Fixture {
    /// The unpacked tree; its `name` sub-directory is what the archive holds.
    pub dir: ScratchDir,
    /// The directory to be served: `.cvmfspublished`, `.cvmfswhitelist`, `data/`.
    pub storage: PathBuf,
    /// The public master key.
    pub master_pub: PathBuf,
    /// The key chain `FQRN.{masterkey,pub,key,crt}`, in the fixtures that have one.
    pub keys: Option<PathBuf>,
    /// The name under which the repository is to be mounted.
    pub fqrn: String,
    /// Ground truth: what the C++ client showed. Empty in the `bad-*` fixtures that it refused.
    pub manifest: Vec<TreeEntry>,
}

impl Fixture {
    /// Unpacks `tests/fixtures/NAME.tar.gz`.
    pub fn unpack(name: &str) -> Result<Self> {
        let archive = fixtures().join(format!("{name}.tar.gz"));
        ensure!(archive.is_file(), "there is no fixture {}", archive.display());
        let dir = ScratchDir::new(name)?;
        let mut tar = Command::new("tar");
        tar.arg("-C").arg(dir.path()).arg("--no-same-owner").arg("-xzf").arg(&archive);
        process::run(tar, Duration::from_secs(60))?.success()?;

        let root = dir.path().join(name);
        let fqrn = std::fs::read_to_string(root.join("fqrn"))
            .with_context(|| format!("fixture {name} has no name file"))?
            .trim()
            .to_owned();
        let manifest = match File::open(root.join("manifest.jsonl")) {
            Ok(file) => tree::read_manifest(file).with_context(|| format!("ground truth of {name}"))?,
            Err(_) => Vec::new(),
        };
        let keys = Some(root.join("keys")).filter(|keys| keys.is_dir());
        let (storage, master_pub) = (root.join("storage"), root.join("master.pub"));
        Ok(Self { storage, master_pub, keys, fqrn, manifest, dir })
    }

    /// The directory with the fixture's other files (`tarballs/`, `manifest-v1.jsonl`, …).
    pub fn root(&self) -> &Path {
        self.storage.parent().unwrap_or(self.dir.path())
    }

    /// Writes a client configuration for this fixture served at `url`, with a cache of its own; returns the
    /// file, to be given as `-o config=FILE`.
    pub fn client_config(&self, url: &str) -> Result<PathBuf> {
        let file = self.dir.path().join("client.conf");
        write_client_config(&file, &self.dir.path().join("cache"), url, &self.master_pub)?;
        Ok(file)
    }
}

/// The parameters of a client that reads one repository from `url`, directly.
pub fn write_client_config(file: &Path, cache: &Path, url: &str, public_key: &Path) -> Result<()> {
    let text = format!(
        "CVMFS_SERVER_URL={url}\n\
         CVMFS_PUBLIC_KEY={}\n\
         CVMFS_HTTP_PROXY=DIRECT\n\
         CVMFS_CACHE_BASE={}\n\
         CVMFS_TIMEOUT=5\n\
         CVMFS_TIMEOUT_DIRECT=5\n\
         CVMFS_CLAIM_OWNERSHIP=no\n\
         CVMFS_CHECK_PERMISSIONS=yes\n\
         CVMFS_MAGIC_XATTRS_VISIBILITY=never\n",
        public_key.display(),
        cache.display()
    );
    std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

fn fixtures() -> PathBuf {
    match std::env::var_os(FIXTURES_VARIABLE) {
        Some(directory) => PathBuf::from(directory),
        None => workspace_root().join("tests/fixtures"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fixture_unpacks_with_its_ground_truth() {
        let fixture = Fixture::unpack("basic-sha1").unwrap();
        assert_eq!(fixture.fqrn, "basic-sha1.peer.example.org");
        assert_eq!(fixture.manifest.len(), 504);
        assert!(fixture.storage.join(".cvmfspublished").is_file());
        assert!(fixture.keys.is_some());
    }

    #[test]
    fn every_line_of_every_ground_truth_is_written_back_byte_for_byte() {
        let mut lines = 0;
        for entry in std::fs::read_dir(fixtures()).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let Some(name) = name.strip_suffix(".tar.gz") else { continue };
            let fixture = Fixture::unpack(name).unwrap();
            let Ok(text) = std::fs::read_to_string(fixture.root().join("manifest.jsonl")) else { continue };
            for (line, entry) in text.lines().zip(&fixture.manifest) {
                assert_eq!(line, entry.to_line(), "{name}");
                lines += 1;
            }
        }
        assert!(lines > 1000, "{lines} lines only");
    }
}
