//! Walking and removing directory trees of any depth with a constant number of descriptors.
//!
//! Only the directory at hand is open. The way up is `..`, checked against the directory that the walk came
//! from, so a tree that is moved while it is walked ends in an error and not somewhere else.

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, fstat, openat, openat2, statat, unlinkat,
};
use rustix::io::Errno;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use thiserror::Error;

/// A tree could not be walked or removed.
#[derive(Debug, Error)]
#[error("cannot {action} '{path}'")]
pub struct TreeError {
    /// What was tried.
    pub action: &'static str,
    /// Where, escaped.
    pub path: String,
    /// The cause.
    #[source]
    pub source: io::Error,
}

impl TreeError {
    pub(crate) fn new(action: &'static str, path: &[u8], source: impl Into<io::Error>) -> Self {
        TreeError { action, path: shown(path), source: source.into() }
    }
}

/// A path for a message: escaped, and cut where it would fill the terminal.
pub(crate) fn shown(path: &[u8]) -> String {
    const SHOWN: usize = 300;
    match path.get(..SHOWN) {
        Some(head) if path.len() > SHOWN => format!("{}…", head.escape_ascii()),
        _ if path.is_empty() => "./".to_owned(),
        _ => path.escape_ascii().to_string(),
    }
}

/// How directories are opened to be walked: no symbolic links, no right to read needed yet.
pub(crate) const DIRECTORY: OFlags =
    OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Longest path given to one system call, below `PATH_MAX`.
pub(crate) const LONG: usize = 4000;

/// What kind of object a [`Stat`] is about.
pub(crate) fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// The directory at hand and the way back.
pub(crate) struct Cursor {
    directory: OwnedFd,
    above: Vec<(u64, u64)>,
}

impl Cursor {
    /// Starts at a directory named by the caller, which may be a symbolic link.
    pub(crate) fn open(root: &Path) -> Result<Self, TreeError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = openat(CWD, root, flags, Mode::empty())
            .map_err(|error| TreeError::new("open directory", root.as_os_str().as_bytes(), error))?;
        Ok(Cursor { directory, above: Vec::new() })
    }

    fn at(parent: BorrowedFd<'_>, name: &[u8]) -> rustix::io::Result<Self> {
        let directory = open_on_same_mount(parent, name)?;
        Ok(Cursor { directory, above: Vec::new() })
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    pub(crate) fn enter(&mut self, name: &[u8]) -> rustix::io::Result<()> {
        self.enter_with(|directory| openat(directory, name, DIRECTORY, Mode::empty()))
    }

    fn enter_with(
        &mut self,
        open: impl FnOnce(BorrowedFd<'_>) -> rustix::io::Result<OwnedFd>,
    ) -> rustix::io::Result<()> {
        let here = identity(&self.directory)?;
        self.directory = open(self.directory.as_fd())?;
        self.above.push(here);
        Ok(())
    }

    pub(crate) fn leave(&mut self) -> rustix::io::Result<()> {
        let expected = self.above.pop();
        let directory = openat(&self.directory, "..", DIRECTORY, Mode::empty())?;
        if Some(identity(&directory)?) != expected {
            return Err(Errno::STALE);
        }
        self.directory = directory;
        Ok(())
    }

    /// The names in this directory in bytewise order.
    pub(crate) fn names(&self) -> rustix::io::Result<Vec<Vec<u8>>> {
        names(self.directory.as_fd())
    }

    pub(crate) fn stat(&self, name: &[u8]) -> rustix::io::Result<Stat> {
        statat(&self.directory, name, AtFlags::SYMLINK_NOFOLLOW)
    }
}

/// The names in a directory in bytewise order, without `.` and `..`.
pub(crate) fn names(directory: BorrowedFd<'_>) -> rustix::io::Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    each_name(directory, |name| names.push(name.to_vec()))?;
    names.sort_unstable();
    Ok(names)
}

/// The names in a directory in no order, without `.` and `..`.
pub(crate) fn each_name(directory: BorrowedFd<'_>, mut take: impl FnMut(&[u8])) -> rustix::io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    for entry in Dir::new(openat(directory, ".", flags, Mode::empty())?)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            take(name);
        }
    }
    Ok(())
}

fn identity(directory: &OwnedFd) -> rustix::io::Result<(u64, u64)> {
    let stat = fstat(directory)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Opens the directory at `path` below `root`, none of whose components may be a symbolic link. The empty path
/// is `root` itself.
pub(crate) fn open_below(root: BorrowedFd<'_>, path: &[u8]) -> rustix::io::Result<OwnedFd> {
    let mut directory = openat(root, ".", DIRECTORY, Mode::empty())?;
    for component in path.split(|&byte| byte == b'/').filter(|component| !component.is_empty()) {
        directory = openat(&directory, component, DIRECTORY, Mode::empty())?;
    }
    Ok(directory)
}

/// One object met on a walk.
pub(crate) struct Node<'a> {
    /// The directory that contains it.
    pub(crate) directory: BorrowedFd<'a>,
    /// Its path from the root of the walk.
    pub(crate) path: &'a [u8],
    /// Its name.
    pub(crate) name: &'a [u8],
    /// Its attributes; symbolic links are not followed.
    pub(crate) stat: &'a Stat,
}

/// Visits everything below `root` in bytewise order of names, directories before what they contain.
pub(crate) fn walk<E: From<TreeError>>(
    root: &Path,
    mut visit: impl FnMut(Node<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let mut cursor = Cursor::open(root)?;
    let mut path = Vec::new();
    let list = |cursor: &Cursor, path: &[u8]| {
        cursor.names().map(Vec::into_iter).map_err(|error| TreeError::new("list directory", path, error))
    };
    let mut frames = vec![list(&cursor, &path)?];
    while let Some(frame) = frames.last_mut() {
        let Some(name) = frame.next() else {
            frames.pop();
            if !frames.is_empty() {
                cursor.leave().map_err(|error| TreeError::new("leave directory", &path, error))?;
                shorten(&mut path);
            }
            continue;
        };
        let length = path.len();
        lengthen(&mut path, &name);
        let stat = cursor.stat(&name).map_err(|error| TreeError::new("examine", &path, error))?;
        visit(Node { directory: cursor.fd(), path: &path, name: &name, stat: &stat })?;
        if kind(&stat) == FileType::Directory {
            cursor.enter(&name).map_err(|error| TreeError::new("open directory", &path, error))?;
            frames.push(list(&cursor, &path)?);
        } else {
            path.truncate(length);
        }
    }
    Ok(())
}

pub(crate) fn lengthen(path: &mut Vec<u8>, name: &[u8]) {
    if !path.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(name);
}

pub(crate) fn shorten(path: &mut Vec<u8>) {
    let end = path.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
    path.truncate(end);
}

/// Removes a directory with everything in it; it need not exist. Symbolic links are removed, not followed, and
/// mounts are not entered: one that is still there is an error (`EXDEV` or `EBUSY`) that names it.
///
/// The way to `root` may lead over mounts and symbolic links; only `root` itself is looked at strictly.
pub fn remove(root: &Path) -> Result<(), TreeError> {
    let bytes = root.as_os_str().as_bytes();
    let (Some(parent), Some(name)) = (root.parent(), root.file_name()) else {
        return Err(TreeError::new("remove", bytes, Errno::INVAL));
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let parent = match openat(CWD, parent, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        opened => opened.map_err(|error| TreeError::new("open directory", bytes, error))?,
    };
    remove_at(parent.as_fd(), name.as_bytes())
        .map_err(|error| TreeError { path: join_shown(bytes, &error.path), ..error })
}

pub(crate) fn join_shown(root: &[u8], below: &str) -> String {
    if below == "./" { shown(root) } else { format!("{}/{below}", shown(root)) }
}

/// [`remove`] of `name` in `parent`, whatever it is.
pub(crate) fn remove_at(parent: BorrowedFd<'_>, name: &[u8]) -> Result<(), TreeError> {
    let mut path = Vec::new();
    match unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR) => {}
        Err(error) => return Err(TreeError::new("remove", &path, error)),
    }
    empty(
        Cursor::at(parent, name).map_err(|error| TreeError::new("open directory", &path, error))?,
        &mut path,
    )?;
    match unlinkat(parent, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(TreeError::new("remove directory", &path, error)),
    }
}

fn empty(mut cursor: Cursor, path: &mut Vec<u8>) -> Result<(), TreeError> {
    let list = |cursor: &Cursor, path: &[u8]| {
        cursor.names().map(Vec::into_iter).map_err(|error| TreeError::new("list directory", path, error))
    };
    let mut frames = vec![(Vec::new(), list(&cursor, path)?)];
    while let Some((_, names)) = frames.last_mut() {
        if let Some(name) = names.next() {
            match unlinkat(cursor.fd(), &name[..], AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(Errno::ISDIR) => {
                    lengthen(path, &name);
                    cursor
                        .enter_with(|directory| open_on_same_mount(directory, &name))
                        .map_err(|error| not_emptied(path, error))?;
                    let names = list(&cursor, path)?;
                    frames.push((name, names));
                }
                Err(error) => {
                    lengthen(path, &name);
                    return Err(TreeError::new("remove", path, error));
                }
            }
        } else if let Some((name, _)) = frames.pop().filter(|_| !frames.is_empty()) {
            cursor.leave().map_err(|error| TreeError::new("leave directory", path, error))?;
            match unlinkat(cursor.fd(), &name[..], AtFlags::REMOVEDIR) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => return Err(TreeError::new("remove directory", path, error)),
            }
            shorten(path);
        }
    }
    Ok(())
}

fn not_emptied(path: &[u8], error: Errno) -> TreeError {
    let action = if error == Errno::XDEV {
        "empty the directory on which something is mounted,"
    } else {
        "open directory"
    };
    TreeError::new(action, path, error)
}

/// Opens a directory to empty it, unless something is mounted on it: a leaked mount must not lose its content.
fn open_on_same_mount(parent: BorrowedFd<'_>, name: &[u8]) -> rustix::io::Result<OwnedFd> {
    let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS;
    match openat2(parent, name, DIRECTORY, Mode::empty(), resolve) {
        // Kernels before 5.6, and sandboxes that do not know the call: at least another device is noticed.
        Err(Errno::NOSYS | Errno::PERM) => {
            let directory = openat(parent, name, DIRECTORY, Mode::empty())?;
            let above = openat(&directory, "..", DIRECTORY, Mode::empty())?;
            if fstat(&directory)?.st_dev != fstat(&above)?.st_dev { Err(Errno::XDEV) } else { Ok(directory) }
        }
        opened => opened,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn deep(root: &Path, depth: usize) {
        let mut cursor = Cursor::open(root).unwrap();
        for _ in 0..depth {
            rustix::fs::mkdirat(cursor.fd(), "dddddddddd", Mode::RWXU).unwrap();
            cursor.enter(b"dddddddddd").unwrap();
        }
    }

    #[test]
    fn trees_deeper_than_any_path_or_descriptor_limit_are_walked_and_removed() {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path().join("root");
        std::fs::create_dir(&root).unwrap();
        deep(&root, 3000);
        let mut longest = 0;
        walk::<TreeError>(&root, |node| {
            longest = longest.max(node.path.len());
            Ok(())
        })
        .unwrap();
        assert_eq!(longest, 3000 * 11 - 1);
        remove(&root).unwrap();
        assert!(!root.exists());
        remove(&root).unwrap();
    }

    #[test]
    fn removing_a_tree_leaves_what_its_links_point_to() {
        let scratch = tempfile::tempdir().unwrap();
        let (root, outside) = (scratch.path().join("root"), scratch.path().join("outside"));
        std::fs::create_dir(&root).unwrap();
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("precious"), b"x").unwrap();
        symlink(&outside, root.join("link")).unwrap();
        remove(&root).unwrap();
        assert!(outside.join("precious").exists() && !root.exists());
        symlink(&outside, &root).unwrap();
        remove(&root).unwrap();
        assert!(outside.join("precious").exists() && !root.exists());
    }

    #[test]
    fn a_mount_inside_a_tree_is_not_emptied() {
        let scratch = tempfile::tempdir().unwrap();
        let (root, precious) = (scratch.path().join("root"), scratch.path().join("precious"));
        std::fs::create_dir_all(root.join("a/merged")).unwrap();
        std::fs::create_dir(&precious).unwrap();
        std::fs::write(precious.join("file"), b"x").unwrap();
        rustix::mount::mount_bind(&precious, root.join("a/merged")).unwrap();
        let error = remove(&root).unwrap_err();
        rustix::mount::unmount(root.join("a/merged"), rustix::mount::UnmountFlags::empty()).unwrap();
        assert!(error.path.ends_with("root/a/merged") && error.to_string().contains("is mounted"), "{error}");
        assert!(precious.join("file").exists());
        remove(&root).unwrap();
    }

    #[test]
    fn a_tree_behind_a_mount_and_a_link_is_removed() {
        let scratch = tempfile::tempdir().unwrap();
        let (mounted, link) = (scratch.path().join("mounted"), scratch.path().join("link"));
        std::fs::create_dir(&mounted).unwrap();
        rustix::mount::mount("tmpfs", &mounted, "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
        symlink(&mounted, &link).unwrap();
        std::fs::create_dir_all(mounted.join("root/a/b")).unwrap();
        let removed = remove(&link.join("root"));
        let left = mounted.join("root").exists();
        rustix::mount::unmount(&mounted, rustix::mount::UnmountFlags::DETACH).unwrap();
        removed.unwrap();
        assert!(!left);
    }

    #[test]
    fn names_are_visited_in_order_with_parents_first() {
        let scratch = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(scratch.path().join("b/c")).unwrap();
        for file in ["b/z", "b/c/x", "a", "b-"] {
            std::fs::write(scratch.path().join(file), b"").unwrap();
        }
        let mut seen = Vec::new();
        walk::<TreeError>(scratch.path(), |node| {
            seen.push(String::from_utf8(node.path.to_vec()).unwrap());
            Ok(())
        })
        .unwrap();
        assert_eq!(seen, ["a", "b", "b/c", "b/c/x", "b/z", "b-"]);
    }
}
