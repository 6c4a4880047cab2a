//! The CernVM-FS repository format: what the bytes of a repository mean.
//!
//! A repository is a set of static files: a signed manifest, a signed whitelist, and objects named by the hash of
//! their stored bytes. Catalogs (the file system's metadata), the history (tags) and the reflog are SQLite files.
//! This crate turns those bytes into types and types into bytes. Section numbers in its documentation are those of
//! the description of the repository format.
//!
//! Invariants:
//!
//! * No network, no clock, no global state: time, randomness (the operating system's, for key generation only) and
//!   files come in as parameters.
//! * Everything read is foreign. Sizes are bounded, every odd value is an error or a documented tolerance, nothing
//!   panics.
//! * What is written is what the C++ tools 2.12 write: same tables, same columns, same properties, same counters.

pub mod blacklist;
pub mod catalog;
pub mod chunking;
pub mod compression;
mod container;
mod descriptor_vfs;
pub mod hash;
pub mod history;
pub mod letter;
pub mod manifest;
mod pem;
pub mod reflog;
pub mod signature;
mod stock_zlib;
pub mod whitelist;
pub mod xattr;

pub use compression::{Compression, Deflate, Inflater};
pub use container::ContainerError;
pub use hash::{ContentHash, HashAlgorithm, Hasher, ObjectKind, ObjectName, PathHash};
