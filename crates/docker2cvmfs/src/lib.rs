//! Registry images to CernVM-FS layers and thin images.
//!
//! [`convert`] turns an image of a registry into content of a repository and a thin
//! image that refers to it:
//!
//! 1. the image's manifest and configuration are fetched and verified;
//! 2. a policy, if there is one, accepts or refuses it ([`policy`]);
//! 3. the published revision is asked, without a lock, which layers it has;
//! 4. the missing ones are downloaded into a spool, the digest of each blob verified;
//! 5. all of them are unpacked and ingested in one transaction, so in one revision; the diff
//!    id of the content and every entry of the archive are checked on the way;
//! 6. the thin image is pushed or written to a file.
//!
//! [`wishes`] does that for a list of images, again and again.
//!
//! Invariants:
//!
//! * Nothing is published before all layers of the image were verified.
//! * The publisher's lock is held for step 5 only, never while waiting for a network.
//! * A revision has all layers of an image or none; the thin image comes after it.
//! * The thin image depends on nothing but its source and its place in the repository:
//!   the same conversion gives the same bytes.

mod bounded;
pub mod cli;
pub mod convert;
mod failure;
pub mod policy;
mod progress;
mod published;
mod spool;
pub mod thin;
pub mod wishes;

pub use convert::{
    Conversion, ConvertRequest, ImageReport, LayerReport, LayerState, Layout, Output, PlatformChoice, Report,
};
pub use failure::{ConvertError, ExitStatus};
pub use progress::Progress;
