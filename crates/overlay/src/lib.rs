//! Overlay file systems: mounts, whiteouts, diff, changes, apply.
//!
//! A layer on disk is a directory in the form that overlayfs reads: a character device 0:0 hides a name of the
//! layers below, the attribute `trusted.overlay.opaque=y` (in user namespaces `user.overlay.opaque=y`) hides all
//! that a directory had below. In archives both are spelt as names, `.wh.NAME` and `.wh..wh..opq`.
//!
//! * [`apply`] turns an archive into a layer on disk, [`diff`] turns one back.
//! * [`mount`] stacks layers, [`mountinfo`] finds what is mounted.
//! * [`owners`] mounts a file system once more with the owners of a user namespace.
//! * [`quota`] limits the disk space of a layer.
//! * [`changes`] and [`size`] say what a layer changes and how large it is; [`tree`] removes one.
//!
//! Invariants:
//! 1. No archive and no symbolic link in a layer makes [`apply`] touch anything outside its target.
//! 2. Trees are walked by directory descriptors, a constant number of them: neither depth nor length of a path
//!    is limited by what a single system call takes.
//! 3. [`diff`] gives the layer or an error, never an archive that means something else.
//!
//! The crate knows neither engines nor repositories. Names are bytes.

pub mod apply;
pub mod changes;
pub mod diff;
pub mod ids;
mod marks;
pub mod mount;
pub mod mountinfo;
pub mod owners;
pub mod quota;
pub mod size;
mod sys;
pub mod tree;
mod xattrs;

pub use marks::OpaqueXattr;
