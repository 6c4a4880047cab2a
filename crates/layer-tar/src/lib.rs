//! Layer archives: tar entries as types, whiteouts, safe paths; a deterministic writer.
//!
//! Everything in a layer comes from outside: names, links, sizes, owners. This crate is the edge at which
//! such bytes become types. [`LayerReader`] turns a tar stream of any dialect (V7, USTAR, PAX, GNU, all GNU
//! sparse forms) into [`LayerEntry`] values; [`LayerWriter`] writes the smallest archive that says the same.
//!
//! Invariants:
//! 1. A [`LayerPath`] never leads out of the layer: it has no `..`, no leading slash, no NUL, no empty component.
//! 2. What the reader hands over is what the archive says, or it is an error. A cut stream, a malformed PAX
//!    record, a number that does not fit or a sparse map that contradicts its data never becomes a file.
//! 3. Memory is bounded by [`Limits`], whatever the archive claims.
//! 4. The same entries give the same bytes: the writer stores neither access times nor user names, and
//!    extended headers only where USTAR has no room.
//!
//! Extended attributes of the name spaces `trusted.overlay.` and `user.overlay.` are dropped on the way in:
//! they are the kernel's private notes, and an image that brings its own could plant whiteouts and redirects.

mod error;
mod field;
mod limits;
mod path;
mod pax;
mod reader;
mod sparse;
mod stream;
mod writer;

pub use error::TarError;
pub use limits::Limits;
pub use path::{AbsoluteNames, LayerPath, PathError, Whiteout, is_whiteout_name};
pub use reader::{EndOfArchive, EntryKind, LayerEntry, LayerReader};
pub use sparse::{Content, DataRange};
pub use writer::{Device, LayerEntryMeta, LayerWriter, TimePrecision, WriteError};

/// One extended attribute: its name with name space (`user.colour`), and its value.
pub type Xattr = (Vec<u8>, Vec<u8>);

/// A time stamp: seconds since 1970 (negative before) and nanoseconds (0 to 999 999 999) to be added.
pub type Timestamp = (i64, u32);

/// Whether an extended attribute belongs to overlayfs itself and so must not travel in a layer.
pub fn is_overlay_xattr(name: &[u8]) -> bool {
    name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.")
}
