//! From layers on disk to an archive.
//!
//! [`diff`] writes what one layer holds; [`diff_trees`] compares two complete trees for callers whose parent is
//! not the layer right below. Both are deterministic: bytewise order, whole seconds, whiteouts without time or
//! owner. Sockets are left out, as in every archive.

mod compare;
mod record;

use crate::ids::{IdMaps, Unmapped};
use crate::marks::{OpaqueXattr, is_opaque, is_whiteout, mark};
use crate::tree::{self, Node, TreeError, kind};
use layer_tar::{PathError, WriteError};
use record::Recorder;
use rustix::fs::FileType;
use std::io::{self, Write};
use std::path::Path;
use thiserror::Error;

pub(crate) use compare::{Comparison, Difference, compare};

/// How an archive is to be written.
#[derive(Debug, Clone, Default)]
pub struct DiffOptions {
    /// Owners on disk are the host's; the container's are written.
    pub ids: IdMaps,
    /// Which of overlayfs's attributes count; those of the mount that wrote the layer.
    pub marks: OpaqueXattr,
}

/// Why a layer could not be archived. What was written until then is not a layer.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DiffError {
    /// Something in the tree cannot be read.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// The archive cannot be written.
    #[error(transparent)]
    Archive(#[from] WriteError),
    /// A name that an archive cannot have.
    #[error("'{path}' cannot be archived")]
    Name {
        /// Where it is, escaped.
        path: String,
        /// The rule it breaks.
        #[source]
        source: PathError,
    },
    /// A name that would be read as a whiteout.
    #[error(
        "'{path}' cannot be archived: names that begin with '.wh.' mean whiteouts in a layer; rename or remove it"
    )]
    Reserved {
        /// Where it is, escaped.
        path: String,
    },
    /// The layer refers to content of the layers below, so alone it is not complete.
    #[error(
        "'{path}' has overlayfs's attribute '{attribute}': the layer was mounted with redirect_dir or metacopy and is no complete diff; compare the merged trees instead"
    )]
    Incomplete {
        /// Where it is, escaped.
        path: String,
        /// The attribute.
        attribute: &'static str,
    },
    /// An owner that the mapping does not have.
    #[error("'{path}' cannot be archived")]
    Owner {
        /// Where it is, escaped.
        path: String,
        /// Which owner.
        #[source]
        source: Unmapped,
    },
}

/// Writes the layer on disk `upper` as an archive. An empty layer gives 1024 zero bytes.
///
/// Whiteouts become `.wh.NAME`, opaque directories get a `.wh..wh..opq`, further names of one inode become hard
/// links. Of the extended attributes those travel that [`apply`](crate::apply::apply) writes. The root itself is
/// not part of the archive.
pub fn diff(upper: &Path, out: impl Write, options: &DiffOptions) -> Result<(), DiffError> {
    let mut recorder = Recorder::new(out, options);
    if is_opaque_root(upper, options.marks)? {
        recorder.opaque(b"")?;
    }
    tree::walk::<DiffError>(upper, |node| {
        if is_whiteout(node.stat) || is_attribute_whiteout(&node, options.marks)? {
            return recorder.whiteout(node.path);
        }
        refuse_incomplete(&node, options.marks)?;
        recorder.object(&node)?;
        if kind(node.stat) == FileType::Directory {
            let examine = |error| TreeError::new("read extended attributes of", node.path, error);
            if is_opaque(node.directory, node.name, options.marks).map_err(examine)? {
                recorder.opaque(node.path)?;
            }
        }
        Ok(())
    })?;
    recorder.finish()
}

/// Writes what leads from the complete tree `lower` to the complete tree `upper` as an archive: typically two
/// overlays mounted for reading.
///
/// Regular files are the same if the trees show one unchanged inode, or else if they have the same metadata and
/// the same content. Times of directories do not count. Directories above a change are included, so that they
/// keep their metadata.
pub fn diff_trees(
    lower: &Path,
    upper: &Path,
    out: impl Write,
    options: &DiffOptions,
) -> Result<(), DiffError> {
    let mut recorder = Recorder::new(out, options);
    compare::<DiffError>(lower, upper, Comparison::Content, |difference| match difference {
        Difference::Added(node) | Difference::Modified(node) => recorder.object(&node),
        Difference::Deleted(path) => recorder.whiteout(path),
    })?;
    recorder.finish()
}

fn is_opaque_root(upper: &Path, marks: OpaqueXattr) -> Result<bool, DiffError> {
    let root = tree::Cursor::open(upper)?;
    Ok(is_opaque(root.fd(), b".", marks)
        .map_err(|error| TreeError::new("read extended attributes of", b"", error))?)
}

/// The other form of a whiteout that the kernel knows: an empty file with an attribute.
fn is_attribute_whiteout(node: &Node<'_>, marks: OpaqueXattr) -> Result<bool, TreeError> {
    if kind(node.stat) != FileType::RegularFile || node.stat.st_size != 0 {
        return Ok(false);
    }
    has_mark(node, marks, "whiteout")
}

fn refuse_incomplete(node: &Node<'_>, marks: OpaqueXattr) -> Result<(), DiffError> {
    let attribute = match kind(node.stat) {
        FileType::Directory => "redirect",
        FileType::RegularFile => "metacopy",
        _ => return Ok(()),
    };
    if has_mark(node, marks, attribute)? {
        return Err(DiffError::Incomplete { path: tree::shown(node.path), attribute });
    }
    Ok(())
}

fn has_mark(node: &Node<'_>, marks: OpaqueXattr, name: &str) -> Result<bool, TreeError> {
    let found = mark(node.directory, node.name, marks, name);
    Ok(found.map_err(|error| TreeError::new("read extended attributes of", node.path, error))?.is_some())
}

/// Whoever takes the archive is spared small writes.
const BUFFER: usize = 256 * 1024;

fn buffered<W: Write>(out: W) -> io::BufWriter<W> {
    io::BufWriter::with_capacity(BUFFER, out)
}
