//! Reading an archive.

use std::io::Read;

use layer_tar::{EntryKind, LayerEntry, LayerReader, Whiteout};

use super::{Sink, SpecialFiles, Whiteouts};
use crate::error::PublishError;
use crate::tree::{Kind, LayerTree, Leaf, Lookup};

/// Reads a whole uncompressed archive into `tree`, storing file contents on the way. `existing` is what the repository
/// has below the base.
pub(crate) fn read_tar(
    input: impl Read,
    existing: &mut Lookup<'_>,
    tree: &mut LayerTree,
    sink: &mut Sink<'_>,
) -> Result<(), PublishError> {
    let mut reader = LayerReader::new(input, sink.options.limits)
        .absolute_names(sink.options.absolute_names)
        .end_of_archive(sink.options.end_of_archive);
    while let Some(entry) = reader.next_entry()? {
        sink.begin_entry()?;
        add(entry, existing, tree, sink)?;
    }
    Ok(())
}

fn add<R: Read>(
    mut entry: LayerEntry<'_, R>,
    existing: &mut Lookup<'_>,
    tree: &mut LayerTree,
    sink: &mut Sink<'_>,
) -> Result<(), PublishError> {
    let path = tree.followed(&entry.path, existing)?;
    let xattrs = std::mem::take(&mut entry.xattrs);
    let meta = sink.meta(path.as_bytes(), entry.mode, (entry.uid, entry.gid), entry.mtime, xattrs);
    if sink.options.whiteouts == Whiteouts::Overlay {
        match path.whiteout() {
            Some(Whiteout::Internal) => return Ok(()),
            Some(Whiteout::Opaque) => {
                sink.report.whiteouts += 1;
                return tree.add_opaque(&path, meta.mtime);
            }
            Some(Whiteout::Name(name)) => {
                sink.report.whiteouts += 1;
                return tree.add_whiteout(&path, name, meta);
            }
            None => {}
        }
    }
    let kind = match &entry.kind {
        EntryKind::Directory => return tree.add_directory(&path, meta),
        EntryKind::HardLink(target) => {
            // What leads nowhere now may be made by a later entry; if not, it is refused at the end.
            let target = match tree.followed(target, existing) {
                Err(PublishError::Entry { .. }) => target.clone(),
                target => target?,
            };
            let time = meta.mtime;
            // In a layer the entry describes the file, as with engines; tar and the C++ tools pass it over.
            let meta = (sink.options.whiteouts == Whiteouts::Overlay).then_some(meta);
            return tree.add_hard_link(&path, &target, time, meta);
        }
        EntryKind::File { size } => {
            let size = *size;
            Kind::File(sink.store(&path, &mut entry, size)?)
        }
        EntryKind::Symlink(target) => Kind::Symlink(target.as_slice().into()),
        EntryKind::Char { major, minor } => Kind::CharDevice(rustix::fs::makedev(*major, *minor)),
        EntryKind::Block { major, minor } => Kind::BlockDevice(rustix::fs::makedev(*major, *minor)),
        EntryKind::Fifo => Kind::Fifo,
    };
    if sink.leaves_out(&kind) {
        return Ok(());
    }
    tree.add_leaf(&path, Leaf { meta, kind })
}

impl Sink<'_> {
    pub(super) fn leaves_out(&self, kind: &Kind) -> bool {
        match kind {
            Kind::File(_) | Kind::Symlink(_) => false,
            // a whiteout in overlayfs's own form
            Kind::CharDevice(0) => false,
            Kind::Fifo | Kind::Socket | Kind::CharDevice(_) | Kind::BlockDevice(_) => {
                self.options.special_files == SpecialFiles::Skip
            }
        }
    }
}
