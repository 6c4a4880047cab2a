//! The mount table, which tells about mounts without touching them.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A line of the mount table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MountEntry {
    /// Type of the file system.
    pub(crate) kind: String,
    /// What is mounted.
    pub(crate) source: String,
    /// Device number, `major:minor`.
    pub(crate) device: String,
}

/// The topmost file system mounted exactly at `path`.
pub(crate) fn at(path: &Path) -> io::Result<Option<MountEntry>> {
    let text = fs::read("/proc/self/mountinfo")?;
    Ok(text.split(|byte| *byte == b'\n').filter_map(|line| parse(line, path)).next_back())
}

/// The device number of the file system mounted at `path`, `major:minor`.
pub(crate) fn device_of(path: &Path) -> io::Result<Option<String>> {
    Ok(at(path)?.map(|entry| entry.device))
}

fn parse(line: &[u8], path: &Path) -> Option<MountEntry> {
    let text = |field: &[u8]| String::from_utf8_lossy(&unescape(field)).into_owned();
    let mut fields = line.split(|byte| *byte == b' ');
    let device = text(fields.nth(2)?);
    let place = fields.nth(1)?;
    if unescape(place) != path.as_os_str().as_bytes() {
        return None;
    }
    let mut behind = fields.skip_while(|field| *field != b"-").skip(1);
    Some(MountEntry { kind: text(behind.next()?), source: text(behind.next()?), device })
}

/// mountinfo writes blanks, tabs, newlines and backslashes as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let octal = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if *first == b'\\' => {
                plain.push(byte);
                rest = &tail[3..];
            }
            _ => {
                plain.push(*first);
                rest = tail;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_with_blanks_are_found() {
        assert_eq!(unescape(b"/a\\040b\\134c"), b"/a b\\c");
        assert_eq!(unescape(b"/plain"), b"/plain");
        let line = b"36 35 0:42 / /mnt/a\\040b ro,nosuid shared:1 - fuse.cvmfs x.example.org ro,user_id=0";
        let found = parse(line, Path::new("/mnt/a b")).unwrap();
        assert_eq!((&found.kind[..], &found.source[..]), ("fuse.cvmfs", "x.example.org"));
        assert_eq!(found.device, "0:42");
        assert_eq!(parse(line, Path::new("/mnt/a")), None);
        assert_eq!(at(Path::new("/proc")).unwrap().unwrap().kind, "proc");
        assert_eq!(at(Path::new("/nonexistent/x")).unwrap(), None);
    }
}
