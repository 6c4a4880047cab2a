//! What the tests, the stories and `cargo xtask` stand on: an HTTP origin with faults, real engines and
//! registries as throw-away instances, the fixture repositories, and a comparer of file trees.
//!
//! For tests only: no shipped binary depends on this crate, and this crate depends on none of the
//! product's crates, so that a test never judges code by itself.
//!
//! Invariants:
//! * Nothing outlives the process that started it. Children run in their own process group, get a signal
//!   when this process dies ([`process`]), and directories left by a killed run are unmounted and removed
//!   by the next one ([`scratch`]).
//! * Servers listen on 127.0.0.1 only.
//! * Every wait has a deadline.

pub mod binary;
pub mod black_hole;
pub mod client;
pub mod dockerd;
pub mod engine;
pub mod fixture;
pub mod http;
pub mod image;
pub mod interrupt;
pub mod managed_plugin;
pub mod mounts;
pub mod name_server;
pub mod origin;
pub mod packages;
pub mod partition;
pub mod process;
pub mod published;
pub mod registry;
pub mod relay;
pub mod scratch;
pub mod soak;
mod syscall;
pub mod tar;
pub mod thin_engine;
pub mod token_server;
pub mod traced;
pub mod tree;

pub use binary::{binary, workspace_root};
pub use black_hole::BlackHole;
pub use client::{Mount, MountBuilder};
pub use dockerd::{Dockerd, DockerdBuilder};
pub use fixture::Fixture;
pub use image::Image;
pub use name_server::NameServer;
pub use origin::{Fault, Length, Origin, Request};
pub use packages::install;
pub use partition::Partition;
pub use published::Published;
pub use registry::Registry;
pub use relay::Relay;
pub use scratch::ScratchDir;
pub use thin_engine::ThinEngine;
pub use tree::{TreeEntry, compare, walk_tree};
