//! The layer view: whiteouts of container layers in the form that overlayfs understands.
//!
//! Layers in foreign repositories carry AUFS-style markers as ordinary files, because
//! their publishers store tar archives as they are. With `-o layer_view`
//!
//! | stored | presented |
//! |---|---|
//! | `.wh.NAME` | character device 0:0 called NAME, unless the layer has an entry NAME |
//! | `.wh.NAME` beside a directory NAME | the directory is opaque |
//! | `.wh..wh..opq` in a directory | the directory is opaque |
//! | any other `.wh..wh.*` | nothing |
//! | `.cvmfscatalog`, `.cvmfsautocatalog` | nothing: the repository's bookkeeping is no file of the image |
//!
//! Opaque means the extended attributes `trusted.overlay.opaque` and, for overlays in a
//! user namespace, `user.overlay.opaque`, both `y`.

use cvmfs_format::catalog::Entry;

/// Prefix of a whiteout's name.
const WHITEOUT: &[u8] = b".wh.";
/// Marker of an opaque directory.
pub(crate) const OPAQUE_MARKER: &[u8] = b".wh..wh..opq";
/// Prefix of AUFS' own bookkeeping.
const INTERNAL: &[u8] = b".wh..wh.";
/// Markers of nested catalogs (repository format §19), which publishers put into a layer's root.
const CATALOG_MARKERS: [&[u8]; 2] = [b".cvmfscatalog", b".cvmfsautocatalog"];

/// Names of the attributes that make a directory opaque.
pub(crate) const OPAQUE_ATTRIBUTES: [&[u8]; 2] = [b"trusted.overlay.opaque", b"user.overlay.opaque"];

/// What a stored name means in the layer view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Marker<'a> {
    /// An ordinary name.
    None,
    /// The name behind `.wh.` is deleted in the layers below.
    Whiteout(&'a [u8]),
    /// Bookkeeping that is never shown.
    Hidden,
}

/// Classifies a stored name.
pub(crate) fn marker(name: &[u8]) -> Marker<'_> {
    if name.starts_with(INTERNAL) || CATALOG_MARKERS.contains(&name) {
        return Marker::Hidden;
    }
    match name.strip_prefix(WHITEOUT) {
        Some(b"" | b"." | b"..") => Marker::Hidden,
        Some(deleted) => Marker::Whiteout(deleted),
        None => Marker::None,
    }
}

/// The stored name of the whiteout of `name`; none if that would be too long to exist.
pub(crate) fn whiteout_of(name: &[u8]) -> Vec<u8> {
    [WHITEOUT, name].concat()
}

/// Turns a stored marker row into the device it is presented as.
pub(crate) fn as_whiteout(mut entry: Entry, deleted: &[u8]) -> Entry {
    entry.name = deleted.to_vec();
    entry.mode = libc::S_IFCHR;
    entry.size = 0;
    entry.hash = None;
    entry.link_group = 0;
    entry.link_count = 1;
    entry.xattrs = None;
    entry.symlink = Vec::new();
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_classified_as_overlay_archives_mean_them() {
        assert_eq!(marker(b".wh.gone"), Marker::Whiteout(b"gone"));
        assert_eq!(marker(b".wh..wh..opq"), Marker::Hidden);
        assert_eq!(marker(b".wh..wh.plnk"), Marker::Hidden);
        assert_eq!(marker(b".wh."), Marker::Hidden);
        assert_eq!(marker(b".wh..hidden"), Marker::Whiteout(b".hidden"));
        assert_eq!(marker(b".cvmfscatalog"), Marker::Hidden);
        assert_eq!(marker(b".what"), Marker::None);
        assert_eq!(marker(b"x.wh.y"), Marker::None);
    }
}
