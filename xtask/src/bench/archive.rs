//! Archives of files to be published.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use testkit::interrupt;
use testkit::tar::TarBuilder;

/// A root file system with a scientific Python: entries, and bytes in all; files of `/usr`, and made ones if they do
/// not suffice. None is larger than this.
pub const ROOT: (usize, u64) = (45_000, 1_240_000_000);
const ROOT_LARGEST: u64 = 40 << 20;

/// The root file system, in parts with as many entries each.
pub fn root(parts: &[PathBuf]) -> Result<()> {
    let mut found = Vec::new();
    let mut bytes = 0;
    look_below(Path::new("/usr"), &mut found, &mut bytes)?;
    eprintln!("{} of {} entries are files of /usr, {} MB", found.len(), ROOT.0, bytes / 1_000_000);
    let entries = ROOT.0.div_ceil(parts.len());
    let size = ROOT.1.saturating_sub(bytes) / (ROOT.0 - found.len()).max(1) as u64;
    let mut found = found.into_iter();
    for part in parts {
        let mut archive = Archive::create(part)?;
        for _ in 0..entries {
            match found.next() {
                Some((name, path)) => archive.file(&name, &std::fs::read(path)?)?,
                None => archive.made(size as usize)?,
            }
        }
        archive.finish()?;
    }
    Ok(())
}

/// The regular files below a directory, in the order of their paths, until there are enough.
fn look_below(directory: &Path, found: &mut Vec<(String, PathBuf)>, bytes: &mut u64) -> Result<()> {
    let mut items = std::fs::read_dir(directory)?.collect::<Result<Vec<_>, _>>()?;
    items.sort_by_key(std::fs::DirEntry::file_name);
    for item in items {
        let meta = item.metadata()?;
        if found.len() >= ROOT.0 || *bytes >= ROOT.1 {
            break;
        } else if meta.is_dir() {
            look_below(&item.path(), found, bytes)?;
        } else if meta.is_file()
            && meta.len() <= ROOT_LARGEST
            && let Some(name) = item.path().to_str()
        {
            found.push((name.trim_start_matches('/').to_owned(), item.path()));
            *bytes += meta.len();
        }
    }
    Ok(())
}

/// An archive that is being written.
pub struct Archive {
    out: BufWriter<File>,
    files: usize,
    bytes: u64,
    random: u64,
}

impl Archive {
    /// Begins a file.
    pub fn create(path: &Path) -> Result<Self> {
        let out = BufWriter::new(File::create(path)?);
        Ok(Self { out, files: 0, bytes: 0, random: 0x9e37_79b9_7f4a_7c15 })
    }

    /// Adds a file that is half random and half text.
    pub fn made(&mut self, size: usize) -> Result<()> {
        let number = self.files;
        let mut content: Vec<u8> = (0..size / 16).flat_map(|_| self.word().to_le_bytes()).collect();
        while content.len() < size {
            writeln!(content, "line {number} of some text that compresses")?;
        }
        content.truncate(size);
        self.file(&format!("d{:04}/f{number:06}", number / 100), &content)
    }

    fn file(&mut self, path: &str, content: &[u8]) -> Result<()> {
        interrupt::check()?;
        let one = TarBuilder::new().file(path, 0o644, content).finish();
        // An archive ends with two empty blocks.
        let end = one.len() - 1024;
        self.out.write_all(one.get(..end).context("an archive has an end")?)?;
        self.files += 1;
        self.bytes += content.len() as u64;
        Ok(())
    }

    fn word(&mut self) -> u64 {
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.random ^ (self.random >> 29)
    }

    /// Ends the file.
    pub fn finish(mut self) -> Result<()> {
        self.out.write_all(&[0; 1024])?;
        self.out.flush()?;
        Ok(())
    }
}
