//! CernVM-FS client core: configuration, network, cache, trust, revisions.
//!
//! A repository is a set of signed and content-addressed files on web servers. This crate turns its name into
//! verified bytes:
//!
//! * [`config`] reads a site's `/etc/cvmfs` and says which servers, proxies, keys and cache to use.

pub mod clock;
pub mod config;
pub mod deadline;
// pub mod snapshot;
// pub mod repository;
pub mod cache;
pub mod network;
pub mod store;
