//! A tar writer for test data: writes what it is told, also names that no honest archive has. It is not the
//! product's writer, so that the product's reader is not tested against its own sister.

use std::io::Write as _;

/// The time that entries get unless told otherwise.
pub const MTIME: u64 = 1_600_000_000;

/// Collects entries; [`TarBuilder::finish`] gives the archive.
#[derive(Debug, Clone)]
pub struct TarBuilder {
    bytes: Vec<u8>,
    pending: Vec<(String, Vec<u8>)>,
    owner: (u32, u32),
    mtime: u64,
}

impl Default for TarBuilder {
    fn default() -> Self {
        Self { bytes: Vec::new(), pending: Vec::new(), owner: (0, 0), mtime: MTIME }
    }
}

/// The type flag of an entry.
#[derive(Debug, Clone, Copy)]
#[repr(u8)]
enum Kind {
    File = b'0',
    HardLink = b'1',
    Symlink = b'2',
    Char = b'3',
    Block = b'4',
    Directory = b'5',
    Fifo = b'6',
    Pax = b'x',
}

impl TarBuilder {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// The owner of the entries that follow.
    #[must_use]
    pub fn owner(mut self, uid: u32, gid: u32) -> Self {
        self.owner = (uid, gid);
        self
    }

    /// The time of last modification of the entries that follow, in Unix seconds.
    #[must_use]
    pub fn mtime(mut self, mtime: u64) -> Self {
        self.mtime = mtime;
        self
    }

    /// An extended attribute of the next entry.
    #[must_use]
    pub fn xattr(mut self, name: &str, value: &[u8]) -> Self {
        self.pending.push((format!("SCHILY.xattr.{name}"), value.to_vec()));
        self
    }

    /// A directory.
    #[must_use]
    pub fn directory(self, name: &str, mode: u32) -> Self {
        self.entry(Kind::Directory, &format!("{}/", name.trim_end_matches('/')), mode, "", (0, 0), &[])
    }

    /// A regular file.
    #[must_use]
    pub fn file(self, name: &str, mode: u32, content: &[u8]) -> Self {
        self.entry(Kind::File, name, mode, "", (0, 0), content)
    }

    /// A symbolic link.
    #[must_use]
    pub fn symlink(self, name: &str, target: &str) -> Self {
        self.entry(Kind::Symlink, name, 0o777, target, (0, 0), &[])
    }

    /// Another name of an earlier entry.
    #[must_use]
    pub fn hard_link(self, name: &str, earlier: &str) -> Self {
        self.entry(Kind::HardLink, name, 0o644, earlier, (0, 0), &[])
    }

    /// A named pipe.
    #[must_use]
    pub fn fifo(self, name: &str, mode: u32) -> Self {
        self.entry(Kind::Fifo, name, mode, "", (0, 0), &[])
    }

    /// A character device.
    #[must_use]
    pub fn char_device(self, name: &str, mode: u32, device: (u32, u32)) -> Self {
        self.entry(Kind::Char, name, mode, "", device, &[])
    }

    /// A block device.
    #[must_use]
    pub fn block_device(self, name: &str, mode: u32, device: (u32, u32)) -> Self {
        self.entry(Kind::Block, name, mode, "", device, &[])
    }

    /// The archive with its two closing blocks of zeros.
    pub fn finish(mut self) -> Vec<u8> {
        self.bytes.extend_from_slice(&[0; 1024]);
        self.bytes
    }

    fn entry(
        mut self,
        kind: Kind,
        name: &str,
        mode: u32,
        link: &str,
        device: (u32, u32),
        content: &[u8],
    ) -> Self {
        let mut records = std::mem::take(&mut self.pending);
        if name.len() > 100 {
            records.push(("path".to_owned(), name.as_bytes().to_vec()));
        }
        if link.len() > 100 {
            records.push(("linkpath".to_owned(), link.as_bytes().to_vec()));
        }
        if !records.is_empty() {
            let body: Vec<u8> = records.iter().flat_map(|(key, value)| pax_record(key, value)).collect();
            self.append(Kind::Pax, "pax", 0o644, "", (0, 0), &body);
        }
        self.append(kind, name, mode, link, device, content);
        self
    }

    fn append(&mut self, kind: Kind, name: &str, mode: u32, link: &str, device: (u32, u32), content: &[u8]) {
        let mut header = [0_u8; 512];
        put(&mut header[..100], name.as_bytes());
        put(&mut header[100..108], format!("{mode:07o}").as_bytes());
        put(&mut header[108..116], format!("{:07o}", self.owner.0).as_bytes());
        put(&mut header[116..124], format!("{:07o}", self.owner.1).as_bytes());
        put(&mut header[124..136], format!("{:011o}", content.len()).as_bytes());
        put(&mut header[136..148], format!("{:011o}", self.mtime).as_bytes());
        put(&mut header[148..156], b"        ");
        header[156] = kind as u8;
        put(&mut header[157..257], link.as_bytes());
        put(&mut header[257..265], b"ustar\x0000");
        put(&mut header[329..337], format!("{:07o}", device.0).as_bytes());
        put(&mut header[337..345], format!("{:07o}", device.1).as_bytes());
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        put(&mut header[148..156], format!("{sum:06o}\0 ").as_bytes());
        self.bytes.extend_from_slice(&header);
        self.bytes.extend_from_slice(content);
        let padding = content.len().next_multiple_of(512) - content.len();
        self.bytes.extend(std::iter::repeat_n(0, padding));
    }
}

/// `LENGTH KEY=VALUE\n`, where the length counts its own digits.
fn pax_record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let length = (1..).map(|digits| rest + digits).find(|length| length.to_string().len() + rest == *length);
    let mut record = format!("{} {key}=", length.unwrap_or(rest)).into_bytes();
    record.extend_from_slice(value);
    record.push(b'\n');
    record
}

fn put(field: &mut [u8], value: &[u8]) {
    let length = value.len().min(field.len());
    field[..length].copy_from_slice(&value[..length]);
}

/// The gzip form, with a fixed header: the same bytes give the same blob.
pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::GzBuilder::new().mtime(0).write(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).expect("writing to memory does not fail");
    encoder.finish().expect("writing to memory does not fail")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ScratchDir, process};
    use std::os::unix::fs::MetadataExt;
    use std::process::Command;
    use std::time::Duration;

    #[test]
    fn gnu_tar_reads_what_is_written() {
        let directory = ScratchDir::new("tar").unwrap();
        let long = "n".repeat(150);
        let tar = TarBuilder::new()
            .directory("d", 0o755)
            .owner(7, 8)
            .xattr("user.colour", b"blue")
            .file("d/f", 0o640, b"hello")
            .hard_link("d/g", "d/f")
            .symlink("d/l", "f")
            .file(&long, 0o644, b"")
            .finish();
        let archive = directory.path().join("a.tar.gz");
        std::fs::write(&archive, gzip(&tar)).unwrap();
        let out = directory.path().join("out");
        std::fs::create_dir(&out).unwrap();
        let mut command = Command::new("tar");
        command.args(["--xattrs", "--numeric-owner", "-xzpf"]).arg(&archive).arg("-C").arg(&out);
        process::run(command, Duration::from_secs(10)).unwrap().success().unwrap();
        let meta = std::fs::metadata(out.join("d/f")).unwrap();
        assert_eq!((meta.mode() & 0o7777, meta.nlink(), meta.len()), (0o640, 2, 5));
        assert_eq!(meta.mtime() as u64, MTIME);
        assert_eq!(std::fs::read_link(out.join("d/l")).unwrap().to_str(), Some("f"));
        assert!(out.join(long).is_file());
        let entries = crate::walk_tree(&out);
        let file = entries.iter().find(|entry| entry.path == "/d/f").unwrap();
        assert_eq!(file.xattrs.as_ref().unwrap()["user.colour"], "Ymx1ZQ==");
    }
}
