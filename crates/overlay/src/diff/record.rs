//! One object after the other into the archive.

use super::{DiffError, DiffOptions, buffered};
use crate::tree::{Node, TreeError, kind, lengthen, shorten, shown};
use crate::xattrs;
use layer_tar::{Device, LayerEntryMeta, LayerPath, LayerWriter, PathError, Whiteout};
use rustix::fs::{FileType, Mode, OFlags, fstat, major, minor, openat, readlinkat};
use rustix::io::Errno;
use std::collections::HashMap;
use std::io::{BufWriter, Write};

/// Writes objects and remembers which inodes it has written.
pub(super) struct Recorder<'a, W: Write> {
    writer: LayerWriter<BufWriter<W>>,
    options: &'a DiffOptions,
    linked: HashMap<(u64, u64), LayerPath>,
}

impl<'a, W: Write> Recorder<'a, W> {
    pub(super) fn new(out: W, options: &'a DiffOptions) -> Self {
        Recorder { writer: LayerWriter::new(buffered(out)), options, linked: HashMap::new() }
    }

    pub(super) fn finish(self) -> Result<(), DiffError> {
        self.writer.finish()?;
        Ok(())
    }

    /// A whiteout of the object at `path`.
    pub(super) fn whiteout(&mut self, path: &[u8]) -> Result<(), DiffError> {
        let end = path.iter().rposition(|&byte| byte == b'/').map_or(0, |slash| slash + 1);
        let (parent, name) = path.split_at(end);
        self.marker(&[parent, b".wh.", name].concat())
    }

    /// The marker that the directory at `path` is opaque.
    pub(super) fn opaque(&mut self, path: &[u8]) -> Result<(), DiffError> {
        let mut marker = path.to_vec();
        lengthen(&mut marker, b".wh..wh..opq");
        self.marker(&marker)
    }

    fn marker(&mut self, path: &[u8]) -> Result<(), DiffError> {
        let path = layer_path(path)?;
        if path.whiteout() == Some(Whiteout::Internal) {
            // The whiteout of a file called `.wh.…`, which no archive could have brought or taken away.
            return Err(DiffError::Reserved { path: path.to_string() });
        }
        let meta = LayerEntryMeta { path, mode: 0o600, uid: 0, gid: 0, mtime: (0, 0), xattrs: Vec::new() };
        Ok(self.writer.append_file(&meta, 0, std::io::empty())?)
    }

    /// An object with its metadata and content; sockets are left out.
    pub(super) fn object(&mut self, node: &Node<'_>) -> Result<(), DiffError> {
        let file_type = kind(node.stat);
        if file_type == FileType::Socket {
            tracing::debug!(path = %shown(node.path), "a socket is left out of the layer");
            return Ok(());
        }
        if layer_tar::is_whiteout_name(node.name) {
            return Err(DiffError::Reserved { path: shown(node.path) });
        }
        let path = layer_path(node.path)?;
        let meta = self.meta(node, path)?;
        if file_type != FileType::Directory && node.stat.st_nlink > 1 {
            let inode = (node.stat.st_dev, node.stat.st_ino);
            if let Some(first) = self.linked.get(&inode) {
                return Ok(self
                    .writer
                    .append_hardlink(&LayerEntryMeta { xattrs: Vec::new(), ..meta }, first)?);
            }
            self.linked.insert(inode, meta.path.clone());
        }
        let (major, minor) = (major(node.stat.st_rdev), minor(node.stat.st_rdev));
        match file_type {
            FileType::Directory => self.writer.append_dir(&meta)?,
            FileType::RegularFile => return self.file(node, &meta),
            FileType::Symlink => {
                let target = readlinkat(node.directory, node.name, Vec::new())
                    .map_err(|error| TreeError::new("read the symbolic link", node.path, error))?;
                self.writer.append_symlink(&meta, target.as_bytes())?;
            }
            FileType::CharacterDevice => self.writer.append_device(&meta, Device::Char { major, minor })?,
            FileType::BlockDevice => self.writer.append_device(&meta, Device::Block { major, minor })?,
            FileType::Fifo => self.writer.append_fifo(&meta)?,
            _ => {
                return Err(
                    TreeError::new("archive the unknown kind of object", node.path, Errno::NOTSUP).into()
                );
            }
        }
        Ok(())
    }

    fn file(&mut self, node: &Node<'_>, meta: &LayerEntryMeta) -> Result<(), DiffError> {
        let open = |error| TreeError::new("open", node.path, error);
        // Without NONBLOCK a pipe that took the file's place would wait for ever.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = openat(node.directory, node.name, flags, Mode::empty()).map_err(open)?;
        let stat = fstat(&file).map_err(open)?;
        if (stat.st_dev, stat.st_ino) != (node.stat.st_dev, node.stat.st_ino)
            || kind(&stat) != FileType::RegularFile
        {
            return Err(open(Errno::STALE).into());
        }
        Ok(self.writer.append_file(meta, stat.st_size as u64, std::fs::File::from(file))?)
    }

    fn meta(&self, node: &Node<'_>, path: LayerPath) -> Result<LayerEntryMeta, DiffError> {
        let owner = self.options.ids.to_container(node.stat.st_uid, node.stat.st_gid);
        let (uid, gid) = owner.map_err(|source| DiffError::Owner { path: shown(node.path), source })?;
        let xattrs = content_xattrs(node)?;
        let mtime = (node.stat.st_mtime, node.stat.st_mtime_nsec as u32);
        Ok(LayerEntryMeta { path, mode: node.stat.st_mode & 0o7777, uid, gid, mtime, xattrs })
    }
}

/// The extended attributes that travel, by name.
pub(super) fn content_xattrs(node: &Node<'_>) -> Result<Vec<layer_tar::Xattr>, TreeError> {
    // Linux allows user attributes and capabilities on these only.
    if !matches!(kind(node.stat), FileType::RegularFile | FileType::Directory) {
        return Ok(Vec::new());
    }
    let read = |error| TreeError::new("read extended attributes of", node.path, error);
    let mut found = Vec::new();
    for name in xattrs::list(node.directory, node.name).map_err(read)? {
        if !xattrs::travels(&name) {
            continue;
        }
        if let Some(value) = xattrs::get(node.directory, node.name, &name).map_err(read)? {
            found.push((name, value));
        }
    }
    found.sort();
    Ok(found)
}

fn layer_path(path: &[u8]) -> Result<LayerPath, DiffError> {
    LayerPath::parse(path, Default::default()).map_err(|source| match source {
        PathError::EmptyWhiteout | PathError::BelowWhiteout => {
            let mut parent = path.to_vec();
            if source == PathError::BelowWhiteout {
                shorten(&mut parent);
            }
            DiffError::Reserved { path: shown(&parent) }
        }
        source => DiffError::Name { path: shown(path), source },
    })
}
