//! CernVM-FS publisher: ingest, commit, check, serve.
//!
//! A publish reads one or more archives into memory as trees while their contents go,
//! compressed and hashed, into the storage; applies the trees to copies of the catalogs
//! they concern; stores the changed catalogs bottom-up; and at last replaces the manifest.
//! Until that one rename the published state is the old one, whatever happens.
//!
//! | module | what |
//! |---|---|
//! | [`storage`] | objects and files of a repository, the publisher's lock |
//! | [`keys`], [`settings`], [`server_conf`] | key files; what a repository remembers about publishing, or a `server.conf` says |
//! | [`head`] | the published state and its chain of trust |
//! | `ingest`, `tree`, `pipeline` | from an input to objects and a tree |
//! | `workspace`, `apply` | private copies of catalogs, and a tree applied to them |
//! | `stack` | layers merged into one tree by their catalogs |
//! | `balance`, `dirtab` | which directories become nested catalogs |
//! | `publisher`, `commit` | transactions; from changed catalogs to a signed revision |
//! | `create`, [`revisions`] | new repositories; tags, rollback, renewing signatures |
//! | [`diff`] | what differs between two revisions |
//! | [`collect`] | garbage collection |
//! | [`mod@replicate`] | a verified copy in another storage |
//! | [`mod@check`] | verification of a whole repository |
//! | [`allocator`] | what programs that publish set before anything else |
//! | [`http_server`] | an HTTP server with limits, for programs that publish |
//! | [`serve`] | a static HTTP server for trials |
//! | [`layer_service`] | publishes the layers that engines leave in a bucket |

pub mod allocator;
mod apply;
mod balance;
pub mod check;
pub mod collect;
mod commit;
mod create;
pub mod decompress;
pub mod diff;
mod dirtab;
pub mod error;
pub mod head;
pub mod http_server;
mod ingest;
mod interrupt;
pub mod keys;
pub mod layer_service;
mod path;
mod piece;
mod pipeline;
mod publisher;
pub mod replicate;
pub mod revisions;
pub mod serve;
pub mod server_conf;
pub mod settings;
mod stack;
pub mod storage;
mod tree;
mod workspace;

pub use balance::CatalogLimits;
pub use commit::check_tag_name;
pub use create::{DEFAULT_WHITELIST_DAYS, NewRepository, Report, create_repository};
pub use error::PublishError;
pub use ingest::{IngestOptions, IngestReport, MAX_WARNINGS, Owner, SpecialFiles, Whiteouts, XdirHardLinks};
pub use interrupt::Interrupt;
pub use path::RepositoryPath;
pub use pipeline::Counters;
pub use publisher::{
    Clock, CommitReport, DEFAULT_LOCK_WAIT, OpenOptions, Prepared, Publisher, Transaction, system_clock,
};
