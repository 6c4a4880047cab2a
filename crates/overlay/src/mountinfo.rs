//! `/proc/self/mountinfo`: what is mounted where (proc_pid_mountinfo(5)).
//!
//! One line of an overlay with 500 layers is longer than 47 KB, so lines and the file are read whole.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountInfo {
    /// The mount's number.
    pub id: u64,
    /// The number of the mount that it lies on.
    pub parent: u64,
    /// The file system, `major:minor`. Two mounts of one file system have the same.
    pub device: String,
    /// Which directory of the file system is mounted.
    pub root: PathBuf,
    /// Where it is mounted, as seen from this process's root.
    pub mount_point: PathBuf,
    /// Options of this mount.
    pub options: OsString,
    /// Kind of file system, with a subtype after a dot (`fuse.cvmfs`).
    pub fs_type: OsString,
    /// What was mounted, as the file system describes it.
    pub source: OsString,
    /// Options of the file system.
    pub super_options: OsString,
}

/// All mounts that this process sees, in mount order.
pub fn mounts() -> io::Result<Vec<MountInfo>> {
    Ok(parse(&std::fs::read("/proc/self/mountinfo")?))
}

/// The mounts at or below `directory`, later ones last: unmount them from the end.
pub fn mounts_below(directory: &Path) -> io::Result<Vec<MountInfo>> {
    let mut mounts = mounts()?;
    mounts.retain(|mount| mount.mount_point.starts_with(directory));
    Ok(mounts)
}

/// What is mounted on top at exactly this place, if anything. `mount_point` must be absolute and free of
/// symbolic links. Does not touch the mount, which may hang.
pub fn mount_at(mount_point: &Path) -> io::Result<Option<MountInfo>> {
    Ok(mounts()?.into_iter().rfind(|mount| mount.mount_point == mount_point))
}

/// Reads the text of a mountinfo file; lines that do not have its form are left out.
pub fn parse(text: &[u8]) -> Vec<MountInfo> {
    text.split(|&byte| byte == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<MountInfo> {
    let mut fields = line.split(|&byte| byte == b' ');
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let device = std::str::from_utf8(fields.next()?).ok()?.to_owned();
    let root = PathBuf::from(unescape(fields.next()?));
    let mount_point = PathBuf::from(unescape(fields.next()?));
    let options = unescape(fields.next()?);
    // Any number of optional fields, then a separator.
    fields.find(|field| *field == b"-")?;
    let fs_type = unescape(fields.next()?);
    let source = unescape(fields.next()?);
    let super_options = unescape(fields.next()?);
    Some(MountInfo { id, parent, device, root, mount_point, options, fs_type, source, super_options })
}

fn number(field: &[u8]) -> Option<u64> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

/// Blanks, tabs, line ends and backslashes stand as `\040` and the like.
fn unescape(field: &[u8]) -> OsString {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal =
            tail.get(..3).filter(|digits| first == b'\\' && digits.iter().all(|d| (b'0'..=b'7').contains(d)));
        let value =
            octal.map(|digits| digits.iter().fold(0u32, |value, digit| value * 8 + u32::from(digit - b'0')));
        match value.and_then(|value| u8::try_from(value).ok()) {
            Some(byte) => {
                plain.push(byte);
                rest = &tail[3..];
            }
            None => {
                plain.push(first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(plain)
}

impl MountInfo {
    /// Whether this is an overlay.
    pub fn is_overlay(&self) -> bool {
        self.fs_type.as_bytes() == b"overlay"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn escapes_and_optional_fields_are_understood() {
        let text = b"36 35 98:0 /mnt1 /mnt\\040with\\134odd\\011name rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue\n\
                     37 36 0:44 / /x rw - fuse.cvmfs source ro\n\
                     garbage\n38 36\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].mount_point, Path::new("/mnt with\\odd\tname"));
        assert_eq!((mounts[0].id, mounts[0].parent), (36, 35));
        assert_eq!((&mounts[0].root, &mounts[0].fs_type), (&PathBuf::from("/mnt1"), &OsString::from("ext3")));
        assert_eq!(mounts[0].super_options, "rw,errors=continue");
        assert_eq!(mounts[1].fs_type, "fuse.cvmfs");
    }

    #[test]
    fn the_machine_s_own_mounts_are_found() {
        let mounts = mounts().unwrap();
        assert!(mounts.iter().any(|mount| mount.mount_point == Path::new("/proc")), "{mounts:?}");
        assert!(mount_at(Path::new("/proc")).unwrap().is_some());
        assert!(mount_at(Path::new("/proc/self/no-mount")).unwrap().is_none());
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = parse(&text);
        }
    }
}
