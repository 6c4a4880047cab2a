//! Layers, archives and mounts for the tests. Runs as root on a file system that can be an upper layer.
#![allow(dead_code, clippy::unwrap_used)]

use layer_tar::{Device, LayerEntryMeta, LayerPath, LayerWriter, TimePrecision, Xattr};
use overlay::apply::{Applied, ApplyError, ApplyOptions, apply};
use overlay::mount::{OverlayMount, Unmount, unmount};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tempfile::TempDir;

/// A directory on the file system of the build, which is no overlay on any sane machine.
pub fn scratch() -> TempDir {
    TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Runs a shell script in `directory` and returns what it prints.
pub fn sh(directory: &Path, script: &str) -> String {
    let output = Command::new("bash").arg("-euc").arg(script).current_dir(directory).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    let errors: String = errors.chars().take(2000).collect();
    assert!(output.status.success(), "{script}\n{errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A line per object below `directory`: everything that a layer keeps.
pub fn listing(directory: &Path) -> String {
    sh(
        directory,
        r#"find . -mindepth 1 -printf '%P|%y|%m|%U:%G|%T@|%s|%n|%l\n' | sed -E '/\|d\|/s/\|[0-9]+\|[0-9]+\|$/|/; s/\|c\|0\|0:0\|[0-9.]+/|whiteout/' | LC_ALL=C sort;
           find . -type f -print0 | LC_ALL=C sort -z | xargs -0r sha256sum;
           find . \( -type c -o -type b \) -print0 | LC_ALL=C sort -z | xargs -0r stat -c '%n %t:%T';
           find . \( -type f -o -type d \) -print0 | LC_ALL=C sort -z | xargs -0r getfattr -h -d -m '^(user|security\.capability)' -e hex 2>/dev/null"#,
    )
}

/// Unpacks an archive as an engine does, with `directory` as the root of the file system; false if that fails.
pub fn unpack_in_changed_root(archive: &[u8], directory: &Path) -> bool {
    const SCRIPT: &str = r#"
import io, os, sys, tarfile
tarfile.TarFile.extraction_filter = staticmethod(lambda member, path: member)
archive = tarfile.open(fileobj=io.BytesIO(sys.stdin.buffer.read()))
"".encode("idna")  # codecs are loaded while their files can be found
os.chroot(sys.argv[1])
os.chdir("/")
archive.extractall("/", numeric_owner=True)
"#;
    let mut python = Command::new("/usr/bin/python3");
    let mut python = python
        .args(["-c", SCRIPT])
        .arg(directory)
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    python.stdin.take().unwrap().write_all(archive).unwrap();
    python.wait().unwrap().success()
}

/// [`listing`] without what an archive does not carry: fractions of seconds, and counts of links, which overlayfs
/// reports as the layers have them.
pub fn comparable_listing(directory: &Path) -> String {
    let listing = listing(directory);
    let fields = |line: &str| line.split('|').map(str::to_owned).collect::<Vec<_>>();
    listing
        .lines()
        .map(|line| {
            let mut fields = fields(line);
            if fields.len() > 4 {
                fields[4] = fields[4].split('.').next().unwrap_or_default().to_owned();
                if fields.len() > 6 {
                    fields[6].clear();
                }
            }
            fields.join("|") + "\n"
        })
        .collect()
}

pub fn path(name: &[u8]) -> LayerPath {
    LayerPath::parse(name, Default::default()).unwrap()
}

/// An archive being written, with metadata that can be changed before each entry.
pub struct Archive {
    writer: LayerWriter<Vec<u8>>,
    pub mode: u32,
    pub owner: (u32, u32),
    pub mtime: (i64, u32),
    pub xattrs: Vec<Xattr>,
}

impl Archive {
    pub fn new() -> Self {
        let writer = LayerWriter::new(Vec::new()).time_precision(TimePrecision::Nanoseconds);
        Archive { writer, mode: 0o755, owner: (0, 0), mtime: (1_600_000_000, 0), xattrs: Vec::new() }
    }

    fn meta(&self, name: &[u8]) -> LayerEntryMeta {
        let (uid, gid) = self.owner;
        LayerEntryMeta {
            path: path(name),
            mode: self.mode,
            uid,
            gid,
            mtime: self.mtime,
            xattrs: self.xattrs.clone(),
        }
    }

    pub fn dir(mut self, name: &str) -> Self {
        self.writer.append_dir(&self.meta(name.as_bytes())).unwrap();
        self
    }

    pub fn file(self, name: &str, content: &str) -> Self {
        self.bytes(name.as_bytes(), content.as_bytes())
    }

    pub fn bytes(mut self, name: &[u8], content: &[u8]) -> Self {
        self.writer.append_file(&self.meta(name), content.len() as u64, content).unwrap();
        self
    }

    pub fn link(mut self, name: &str, target: &str) -> Self {
        self.writer.append_symlink(&self.meta(name.as_bytes()), target.as_bytes()).unwrap();
        self
    }

    pub fn hard(mut self, name: &str, target: &str) -> Self {
        self.writer.append_hardlink(&self.meta(name.as_bytes()), &path(target.as_bytes())).unwrap();
        self
    }

    pub fn device(mut self, name: &str, device: Device) -> Self {
        self.writer.append_device(&self.meta(name.as_bytes()), device).unwrap();
        self
    }

    pub fn fifo(mut self, name: &str) -> Self {
        self.writer.append_fifo(&self.meta(name.as_bytes())).unwrap();
        self
    }

    /// Changes the metadata of the entries that follow.
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    pub fn finish(self) -> Vec<u8> {
        self.writer.finish().unwrap()
    }

    /// The archive as a layer on disk.
    pub fn layer(self, directory: &Path) -> PathBuf {
        std::fs::create_dir_all(directory).unwrap();
        apply_to(directory, &self.finish()).unwrap();
        directory.to_owned()
    }
}

pub fn apply_to(directory: &Path, archive: &[u8]) -> Result<Applied, ApplyError> {
    apply(archive, directory, &ApplyOptions::default())
}

/// An error with its causes in one line, as a user sees it.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    text
}

/// A mount that goes away with the test.
pub struct Mounted(pub PathBuf);

impl Mounted {
    /// Stacks `layers`, topmost first, for reading.
    pub fn read_only(at: &Path, layers: &[&Path]) -> Self {
        let mut lowers: Vec<PathBuf> = layers.iter().map(|layer| layer.to_path_buf()).collect();
        if lowers.len() == 1 {
            let empty = at.with_extension("empty");
            std::fs::create_dir_all(&empty).unwrap();
            lowers.push(empty);
        }
        Self::mount(at, OverlayMount { lowers, ..OverlayMount::default() })
    }

    /// Stacks `upper` and a fresh work directory over `layers`.
    pub fn writable(at: &Path, upper: &Path, layers: &[&Path]) -> Self {
        let work = at.with_extension("work");
        std::fs::create_dir_all(&work).unwrap();
        std::fs::create_dir_all(upper).unwrap();
        let lowers = layers.iter().map(|layer| layer.to_path_buf()).collect();
        let (upper, work) = (Some(upper.to_owned()), Some(work));
        Self::mount(at, OverlayMount { lowers, upper, work, ..OverlayMount::default() })
    }

    pub fn mount(at: &Path, overlay: OverlayMount) -> Self {
        std::fs::create_dir_all(at).unwrap();
        overlay.mount(at).unwrap_or_else(|error| panic!("{}", chain(&error)));
        Mounted(at.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        unmount(&self.0, Unmount::Lazy).unwrap();
    }
}

/// Names below a directory, sorted, a slash behind directories.
pub fn names(directory: &Path) -> Vec<String> {
    sh(directory, r"find . -mindepth 1 \( -type d -printf '%P/\n' -o -printf '%P\n' \) | LC_ALL=C sort")
        .lines()
        .map(str::to_owned)
        .collect()
}
