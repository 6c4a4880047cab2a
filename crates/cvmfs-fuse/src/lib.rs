//! CernVM-FS for the kernel: the FUSE adapter, its processes and their control.
//!
//! A mount consists of two processes. The *supervisor* opens `/dev/fuse`, mounts
//! and then only waits: it parses nothing foreign and holds the descriptor, so that
//! the mount lives as long as it does. The *worker* holds the repository and answers
//! the kernel; when it dies the supervisor starts another one and asks the kernel to
//! send the requests in flight again. For this to work
//!
//! * the connection is agreed upon once and recorded; nobody answers INIT again,
//! * node ids follow from the catalogs alone ([`nodes`]) and are never counted,
//! * open handles and backing ids live in a small table shared by successive workers
//!   ([`shared_state`]), not in the worker.
//!
//! Other programs use [`mount()`], [`unmount`], [`is_alive`], [`status`] and [`refresh`];
//! every binary that mounts calls [`internal_main`] first.

mod attributes;
pub mod cli;
mod confinement;
mod content;
pub mod control;
mod dispatch;
mod failures;
mod files_ahead;
mod filesystem;
mod handles;
mod in_flight;
mod invalidation;
mod launch;
pub mod layer_view;
mod logging;
mod magic;
pub mod metrics;
mod mount_helper;
mod mount_options;
mod mount_point;
mod mount_table;
pub mod nodes;
mod process;
mod profile;
mod protocol;
mod session;
mod shared_state;
mod slow_lane;
mod statistics;
mod supervisor;
mod syscall;
mod test_fault;
mod traffic;
mod users;
mod view;
mod watchdog;
mod worker;

use std::process::ExitCode;

pub use control::{Status, refresh, status};
pub use launch::{
    MountError, MountFlags, MountRequest, Mounted, is_alive, mount, run_directory, unmount, unmount_unused,
};
pub use profile::Profile;
pub use statistics::{CallStatistics, LATENCY_CLASSES};

/// First argument of a re-executed binary that shall act as supervisor.
pub(crate) const SUPERVISOR_ROLE: &str = "--cvmfs-supervisor";
/// First argument of a re-executed binary that shall act as worker.
pub(crate) const WORKER_ROLE: &str = "--cvmfs-worker";

/// First argument of a re-executed binary that shall look at a directory, so that an automounter mounts it.
pub(crate) const VISITOR_ROLE: &str = "--cvmfs-visitor";

/// Runs the supervisor or worker role if this process was started for one of them.
///
/// A binary that mounts re-executes itself for both roles, so that one static file
/// is enough. Call it first in `main` and end with the code it returns.
pub fn internal_main() -> Option<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    match arguments.next()?.to_str()? {
        SUPERVISOR_ROLE => Some(supervisor::run()),
        WORKER_ROLE => Some(worker::run()),
        VISITOR_ROLE => Some(mount_helper::visitor(arguments)),
        _ => None,
    }
}
