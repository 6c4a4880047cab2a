//! Files whose bytes tell which file in which version they belong to.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, Result, ensure};

use super::Random;
use crate::Published;
use crate::tar::TarBuilder;

/// Directories, each a nested catalog.
const DIRECTORIES: usize = 4;
/// Small files in each.
const SMALL: usize = 80;
/// Files of some hundred kilobytes in each.
const MIDDLE: usize = 4;
/// Files made of chunks in each.
const LARGE: usize = 1;
/// Chunks of the large files.
const CHUNKS: &str = "512K:1M:2M";
/// Bytes that name file and version.
const HEADER: usize = 16;

/// All files, and which of their versions may be seen.
#[derive(Debug)]
pub(super) struct World {
    files: Vec<File>,
    revision: AtomicU64,
}

#[derive(Debug)]
struct File {
    path: String,
    size: u64,
    /// The version that readers see at least: it was in use.
    oldest: AtomicU64,
    /// The version that readers see at most: it was published.
    newest: AtomicU64,
}

impl World {
    /// Publishes the first version of everything.
    pub(super) fn publish(repository: &Published) -> Result<World> {
        let mut files = Vec::new();
        let mut random = Random(7);
        for directory in 0..DIRECTORIES {
            let mut add = |kind: &str, count: usize, sizes: std::ops::Range<u64>| {
                for number in 0..count {
                    let size = sizes.start + random.below(sizes.end - sizes.start);
                    let path = format!("set{directory}/{kind}{number}");
                    files.push(File { path, size, oldest: 0.into(), newest: 0.into() });
                }
            };
            add("small", SMALL, 16..40_000);
            add("middle", MIDDLE, 200_000..700_000);
            add("large", LARGE, 3_000_000..5_000_000);
        }
        let world = World { files, revision: AtomicU64::new(1) };
        let all: Vec<usize> = (0..world.len()).collect();
        world.write(repository, &all)?;
        world.in_use();
        Ok(world)
    }

    /// Publishes the next version of these files.
    pub(super) fn write(&self, repository: &Published, numbers: &[usize]) -> Result<()> {
        let mut tar = TarBuilder::new();
        if self.revision() == 1 {
            for directory in 0..DIRECTORIES {
                tar = tar.directory(&format!("set{directory}"), 0o755).file(
                    &format!("set{directory}/.cvmfscatalog"),
                    0o644,
                    b"",
                );
            }
        }
        for number in numbers {
            let file = &self.files[*number];
            // Announced before it can be seen.
            let version = file.newest.fetch_add(1, Ordering::SeqCst) + 1;
            tar = tar.file(&file.path, 0o644, &bytes(*number, version, 0, file.length(version) as usize));
        }
        let report = repository.ingest("/", &tar.finish(), &["--chunk-size", CHUNKS])?;
        let revision = report["revision"].as_u64().context("a publish tells its revision")?;
        self.revision.store(revision, Ordering::SeqCst);
        Ok(())
    }

    /// The newest revision is in use from now on: what is opened later must not be older.
    pub(super) fn in_use(&self) {
        for file in &self.files {
            file.oldest.store(file.newest.load(Ordering::SeqCst), Ordering::SeqCst);
        }
    }

    /// The newest revision.
    pub(super) fn revision(&self) -> u64 {
        self.revision.load(Ordering::SeqCst)
    }

    pub(super) fn len(&self) -> usize {
        self.files.len()
    }

    pub(super) fn path(&self, number: usize) -> &str {
        &self.files[number].path
    }

    /// Whether the file is worth reading in parts.
    pub(super) fn is_large(&self, number: usize) -> bool {
        self.files[number].size > 1 << 20
    }

    /// The version below which nothing may be seen that is opened from now on.
    pub(super) fn oldest(&self, number: usize) -> u64 {
        self.files[number].oldest.load(Ordering::SeqCst)
    }

    /// The version that these first bytes belong to, if it may be seen.
    pub(super) fn version(&self, number: usize, start: &[u8], oldest: u64) -> Result<u64> {
        let word =
            |at: usize| start.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes);
        let path = self.path(number);
        let version = word(8).with_context(|| format!("{path} has {} bytes", start.len()))?;
        ensure!(word(0) == Some(number as u64), "{path} has the bytes of another file");
        let newest = self.files[number].newest.load(Ordering::SeqCst);
        ensure!(
            (oldest..=newest).contains(&version),
            "{path} has version {version}, not {oldest} to {newest}"
        );
        Ok(version)
    }

    /// Length of a file in a version.
    pub(super) fn length(&self, number: usize, version: u64) -> u64 {
        self.files[number].length(version)
    }

    /// Compares a part of a file with what that version has there.
    pub(super) fn compare(
        &self,
        number: usize,
        version: u64,
        offset: u64,
        found: &[u8],
        wanted: usize,
    ) -> Result<()> {
        let length = self.length(number, version);
        let wanted = length.saturating_sub(offset).min(wanted as u64) as usize;
        let path = self.path(number);
        ensure!(found.len() == wanted, "{path}: {} bytes at {offset} instead of {wanted}", found.len());
        let expected = bytes(number, version, offset, wanted);
        let wrong = expected.iter().zip(found).position(|(one, other)| one != other);
        ensure!(
            wrong.is_none(),
            "{path} of version {version}: wrong byte at {}",
            offset + wrong.unwrap_or(0) as u64
        );
        Ok(())
    }

    /// Reads and checks every file once.
    pub(super) fn read_everything(&self, mountpoint: &Path) -> Result<()> {
        for number in 0..self.len() {
            let oldest = self.oldest(number);
            let bytes = std::fs::read(mountpoint.join(self.path(number)))
                .with_context(|| format!("cannot read {}", self.path(number)))?;
            let version = self.version(number, &bytes, oldest)?;
            self.compare(number, version, 0, &bytes, usize::MAX)?;
        }
        Ok(())
    }

    /// The names in the n-th directory, the marker of its catalog left out.
    pub(super) fn names(&self, directory: usize) -> (String, usize) {
        (format!("set{}", directory % DIRECTORIES), SMALL + MIDDLE + LARGE)
    }
}

impl File {
    fn length(&self, version: u64) -> u64 {
        self.size + version % 7 * 101
    }
}

/// A part of the bytes of a version of a file.
fn bytes(number: usize, version: u64, offset: u64, length: usize) -> Vec<u8> {
    let key = mix((number as u64) << 32 | version);
    let word = |index: u64| match index {
        0 => number as u64,
        1 => version,
        _ => mix(key.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15))),
    };
    let skipped = (offset % 8) as usize;
    let mut bytes = Vec::with_capacity(skipped + length + 8);
    let mut index = offset / 8;
    while bytes.len() < skipped + length {
        bytes.extend_from_slice(&word(index).to_le_bytes());
        index += 1;
    }
    bytes.drain(..skipped);
    bytes.truncate(length);
    bytes
}

/// Bytes that have to be read to tell a version.
pub(super) const fn header() -> usize {
    HEADER
}

pub(super) fn mix(number: u64) -> u64 {
    let mut mixed = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_file_is_a_part_of_its_bytes() {
        let whole = bytes(3, 9, 0, 1000);
        for (offset, length) in [(0, 1000), (1, 17), (15, 3), (16, 100), (993, 7), (500, 0)] {
            assert_eq!(bytes(3, 9, offset, length), whole[offset as usize..offset as usize + length]);
        }
        assert_ne!(bytes(3, 10, 16, 100), whole[16..116]);
    }
}
