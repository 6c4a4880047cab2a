//! The Docker graph driver plugin `docker.graphdriver/1.0` over CernVM-FS.
//!
//! An engine asks the plugin over a unix socket ([`server`]) to create, mount, compare
//! and remove layers. Layers lie on disk as those of Docker's overlay2 do ([`store`]);
//! a *thin* layer holds only a descriptor, and what is created on it gets directories of
//! CernVM-FS repositories as lower directories ([`repositories`]). [`driver`] ties them
//! together, [`plugin`] remembers across restarts that the driver was initialised.
//!
//! Invariants:
//! * Nothing in an image reaches a shell or a path outside its layer or repository.
//! * A layer exists as a whole or not at all; kill -9 at any point needs no repair.
//! * Whether a repository may be unmounted follows from the mounted layers, never from
//!   the number of calls.
//! * No call holds the locks of two layers, and no two calls on different layers wait
//!   for each other.

mod causes;
pub mod cli;
pub mod driver;
mod keeper;
pub mod keyed_locks;
pub mod layer_id;
mod mounts;
pub mod options;
pub mod plugin;
mod privileges;
pub mod protocol;
pub mod publishing;
pub mod repositories;
pub mod server;
mod status_command;
pub mod store;
mod system_calls;
