//! Reading a local directory tree.
//!
//! The tree should stand still meanwhile; a file that shrinks while it is read is an error.
//! Mounts below the directory are read like the rest of it.

use std::collections::HashMap;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use layer_tar::{LayerPath, Whiteout, Xattr, is_overlay_xattr};
use rustix::fs::OFlags;

use super::{Sink, Whiteouts};
use crate::error::PublishError;
use crate::tree::{Kind, LayerTree, Leaf, MAX_DEPTH};

/// Reads the directory `root` with everything below it into `tree`, storing file contents on the way.
pub(crate) fn read_directory(
    root: &Path,
    tree: &mut LayerTree,
    sink: &mut Sink<'_>,
) -> Result<(), PublishError> {
    let metadata = fs::metadata(root).map_err(PublishError::local("read", root))?;
    if !metadata.is_dir() {
        let not_a_directory = io::Error::from(io::ErrorKind::NotADirectory);
        return Err(PublishError::local("read", root)(not_a_directory));
    }
    let mut walk = Walk { tree, sink, seen: HashMap::new() };
    walk.directory(root, &LayerPath::root(), &metadata, 0)
}

struct Walk<'w, 's, 'o> {
    tree: &'w mut LayerTree,
    sink: &'s mut Sink<'o>,
    /// First name of each file with several links, by device and inode.
    seen: HashMap<(u64, u64), LayerPath>,
}

impl Walk<'_, '_, '_> {
    fn directory(
        &mut self,
        full: &Path,
        path: &LayerPath,
        metadata: &Metadata,
        depth: usize,
    ) -> Result<(), PublishError> {
        if depth > MAX_DEPTH {
            let reason = format!("lies more than {MAX_DEPTH} directories deep");
            return Err(PublishError::entry(path.as_bytes(), reason));
        }
        self.sink.begin_entry()?;
        let (xattrs, opaque) = read_xattrs(full)?;
        let meta = self.sink.meta(path.as_bytes(), metadata.mode(), owner(metadata), mtime(metadata), xattrs);
        self.tree.add_directory(path, meta)?;
        if opaque && self.sink.options.whiteouts == Whiteouts::Overlay {
            self.sink.report.whiteouts += 1;
            self.tree.add_opaque(&join(path, b".wh..wh..opq")?, mtime(metadata))?;
        }
        let mut names = Vec::new();
        for item in fs::read_dir(full).map_err(PublishError::local("list", full))? {
            names.push(item.map_err(PublishError::local("list", full))?.file_name());
        }
        names.sort();
        for name in names {
            let full = full.join(&name);
            let path = join(path, name.as_bytes())?;
            let metadata = fs::symlink_metadata(&full).map_err(PublishError::local("read", &full))?;
            if metadata.is_dir() {
                self.directory(&full, &path, &metadata, depth + 1)?;
            } else {
                self.leaf(full, path, &metadata)?;
            }
        }
        Ok(())
    }

    fn leaf(&mut self, full: PathBuf, path: LayerPath, metadata: &Metadata) -> Result<(), PublishError> {
        self.sink.begin_entry()?;
        let overlay = self.sink.options.whiteouts == Whiteouts::Overlay;
        let marker = path.whiteout().filter(|_| overlay);
        if marker == Some(Whiteout::Internal) {
            return Ok(());
        }
        if marker == Some(Whiteout::Opaque) {
            self.sink.report.whiteouts += 1;
            return self.tree.add_opaque(&path, mtime(metadata));
        }
        let identity = (metadata.dev(), metadata.ino());
        if metadata.nlink() > 1 && marker.is_none() {
            if let Some(first) = self.seen.get(&identity) {
                return self.tree.add_hard_link(&path, first, mtime(metadata), None);
            }
            self.seen.insert(identity, path.clone());
        }
        let (xattrs, _) = read_xattrs(&full)?;
        let meta = self.sink.meta(path.as_bytes(), metadata.mode(), owner(metadata), mtime(metadata), xattrs);
        if let Some(Whiteout::Name(name)) = marker {
            self.sink.report.whiteouts += 1;
            return self.tree.add_whiteout(&path, name, meta);
        }
        let kind = self.kind(&full, &path, metadata)?;
        if self.sink.leaves_out(&kind) {
            return Ok(());
        }
        self.tree.add_leaf(&path, Leaf { meta, kind })
    }

    fn kind(&mut self, full: &Path, path: &LayerPath, metadata: &Metadata) -> Result<Kind, PublishError> {
        let file_type = metadata.file_type();
        Ok(if file_type.is_symlink() {
            let target = fs::read_link(full).map_err(PublishError::local("read", full))?;
            Kind::Symlink(target.as_os_str().as_bytes().into())
        } else if file_type.is_fifo() {
            Kind::Fifo
        } else if file_type.is_socket() {
            Kind::Socket
        } else if file_type.is_char_device() {
            Kind::CharDevice(metadata.rdev())
        } else if file_type.is_block_device() {
            Kind::BlockDevice(metadata.rdev())
        } else {
            let mut file = open_file(full, metadata)?;
            Kind::File(self.sink.store(path, &mut file, metadata.len())?)
        })
    }
}

/// Opens the very file that was looked at.
fn open_file(full: &Path, metadata: &Metadata) -> Result<File, PublishError> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32)
        .open(full)
        .map_err(PublishError::local("open", full))?;
    let opened = file.metadata().map_err(PublishError::local("open", full))?;
    if (opened.dev(), opened.ino()) != (metadata.dev(), metadata.ino()) {
        return Err(PublishError::local("read", full)(io::Error::other(
            "it was replaced while the tree was read",
        )));
    }
    Ok(file)
}

/// Extended attributes without overlayfs's own, and whether overlayfs's own say that the directory is opaque.
fn read_xattrs(full: &Path) -> Result<(Vec<Xattr>, bool), PublishError> {
    let failed = |error: rustix::io::Errno| PublishError::local("read attributes of", full)(error.into());
    let names = match read_growing(|buffer| rustix::fs::llistxattr(full, buffer)) {
        Ok(names) => names,
        // a file system without extended attributes
        Err(rustix::io::Errno::OPNOTSUPP) => return Ok((Vec::new(), false)),
        Err(error) => return Err(failed(error)),
    };
    let mut xattrs = Vec::new();
    let mut opaque = false;
    for name in names.split(|&b| b == 0).filter(|name| !name.is_empty()) {
        let value = match read_growing(|buffer| rustix::fs::lgetxattr(full, name, buffer)) {
            Ok(value) => value,
            // removed meanwhile, or not for us to read
            Err(rustix::io::Errno::NODATA) => continue,
            Err(error) => return Err(failed(error)),
        };
        if is_overlay_xattr(name) {
            opaque |= name.ends_with(b".overlay.opaque") && value == b"y";
        } else {
            xattrs.push((name.to_vec(), value));
        }
    }
    Ok((xattrs, opaque))
}

/// The largest list of names and the largest value Linux has (`XATTR_LIST_MAX`, `XATTR_SIZE_MAX`).
const MAX_XATTR_BYTES: usize = 64 << 10;

fn read_growing(mut read: impl FnMut(&mut [u8]) -> rustix::io::Result<usize>) -> rustix::io::Result<Vec<u8>> {
    let mut buffer = vec![0; 256];
    loop {
        match read(&mut buffer) {
            Ok(length) => {
                buffer.truncate(length);
                return Ok(buffer);
            }
            Err(rustix::io::Errno::RANGE) if buffer.len() < MAX_XATTR_BYTES => {
                buffer.resize(MAX_XATTR_BYTES, 0);
            }
            Err(error) => return Err(error),
        }
    }
}

fn join(path: &LayerPath, name: &[u8]) -> Result<LayerPath, PublishError> {
    path.join(name).map_err(|error| PublishError::entry(path.as_bytes(), error))
}

fn owner(metadata: &Metadata) -> (u32, u32) {
    (metadata.uid(), metadata.gid())
}

fn mtime(metadata: &Metadata) -> layer_tar::Timestamp {
    (metadata.mtime(), u32::try_from(metadata.mtime_nsec()).unwrap_or(0))
}
