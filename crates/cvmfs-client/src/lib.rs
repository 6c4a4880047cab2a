//! CernVM-FS client core: configuration, network, cache, trust, revisions.
//!
//! A repository is a set of signed and content-addressed files on web servers. This crate turns its name into
//! verified bytes:
//!
//! * [`config`] reads a site's `/etc/cvmfs` and says which servers, proxies, keys and cache to use;
//! * [`network`] fetches files through proxies from hosts, with fail-over;
//! * [`cache`] keeps verified files on disk, within bounds;
//! * [`store`] gives out objects by name: from the cache, or verified on the way into it;
//! * [`trust`] decides which revision may be believed;
//! * [`authz`] asks the helper program who may read a protected repository;
//! * [`snapshot`] and [`repository`] answer look-ups in one pinned revision and follow new ones.
//!
//! Every call that may wait takes a [`deadline::Deadline`]. The calls block; the threads of the asynchronous runtime
//! inside [`network`] are not visible.

pub mod authz;
pub mod cache;
pub mod changes;
pub mod clock;
pub mod config;
pub mod deadline;
pub mod error;
pub mod network;
pub mod repository;
pub mod snapshot;
pub mod store;
mod sync;
mod tree;
pub mod trust;
mod url;
pub mod variant;
