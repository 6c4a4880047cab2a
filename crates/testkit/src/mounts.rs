//! The mount table: what is mounted below a directory, and its removal.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::mount::UnmountFlags;

/// One line of `/proc/self/mountinfo`.
#[derive(Debug, Clone)]
pub struct Mount {
    /// The directory inside its file system that is mounted.
    pub root: PathBuf,
    /// Where it is mounted.
    pub point: PathBuf,
    /// File system type, such as `fuse` or `overlay`.
    pub kind: String,
}

/// All mounts that this process sees, in the order in which they were made.
pub fn all() -> Vec<Mount> {
    parse(&std::fs::read("/proc/self/mountinfo").unwrap_or_default())
}

/// The mounts seen by another process; empty if it is gone.
pub fn of_process(pid: u32) -> Vec<Mount> {
    parse(&std::fs::read(format!("/proc/{pid}/mountinfo")).unwrap_or_default())
}

/// The mounts at or below `directory`, in the order in which they were made.
pub fn below(directory: &Path) -> Vec<Mount> {
    all().into_iter().filter(|mount| mount.point.starts_with(directory)).collect()
}

/// Detaches everything mounted at or below `directory`, the latest first; `false` if something is left.
pub fn unmount_below(directory: &Path) -> bool {
    // A propagated mount may uncover another: a few rounds are enough for any stack that tests build.
    for _ in 0..8 {
        let mounts = below(directory);
        if mounts.is_empty() {
            return true;
        }
        for mount in mounts.iter().rev() {
            let _ = rustix::mount::unmount(&mount.point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        }
    }
    below(directory).is_empty()
}

/// Whether the root file system of a process is a directory below `directory`: a container's or a managed
/// plugin's process.
pub fn has_root_below(pid: u32, directory: &Path) -> bool {
    let inside = inside_file_system(directory);
    of_process(pid).iter().any(|mount| mount.point == Path::new("/") && mount.root.starts_with(&inside))
}

/// A path as the mount table writes it: from the root of the file system that it lies on.
fn inside_file_system(path: &Path) -> PathBuf {
    all()
        .into_iter()
        .filter_map(|mount| Some((path.strip_prefix(&mount.point).ok()?.to_owned(), mount)))
        .max_by_key(|(_, mount)| mount.point.as_os_str().len())
        .map_or_else(|| path.to_owned(), |(rest, mount)| mount.root.join(rest))
}

fn parse(table: &[u8]) -> Vec<Mount> {
    table.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let separator = fields.iter().position(|field| *field == b"-")?;
    Some(Mount {
        root: unescape(fields.get(3)?),
        point: unescape(fields.get(4)?),
        kind: String::from_utf8_lossy(fields.get(separator + 1)?).into_owned(),
    })
}

/// The kernel writes blank, tab, newline and backslash as `\` and three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.filter(|_| first == b'\\').and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escaped_names_of_the_mount_table_are_read() {
        let line = br"36 35 98:0 /root\040dir /mnt/a\134b rw,noatime shared:1 - fuse.x /dev/fuse rw";
        let mount = parse_line(line).unwrap();
        assert_eq!(mount.root, Path::new("/root dir"));
        assert_eq!(mount.point, Path::new(r"/mnt/a\b"));
        assert_eq!(mount.kind, "fuse.x");
    }
}
