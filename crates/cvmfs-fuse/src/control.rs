//! What others can ask a mount, and how: the control socket and the records by which mounts are found.
//!
//! * [`records`] lists the mounts of this user; [`ask`] sends one command to one of them.
//! * [`Command`] is what a mount understands: the commands of `cvmfs_talk` (client behaviour §12) and a few of ours.
//! * [`Status`] is the state of a mount as one document, from which `status`, metrics and telemetry are made.
//!
//! Invariants:
//! * nothing here touches the mount itself, so a mount that hangs can still be asked about;
//! * whoever asks has its answer, or the reason why there is none, within the time it allows;
//! * the socket belongs to the worker's other threads in nothing but its descriptors: whatever callers send, the
//!   mount goes on, and what they can use of memory, threads and descriptors is bounded ([`server`]).

mod answers;
mod cache_answers;
mod client;
mod command;
mod inspect;
mod internal_affairs;
mod network_answers;
mod records;
mod server;
mod settings;
mod sockets;
mod status;

pub use client::{ask, refresh, status};
pub use command::Command;
pub use inspect::{Inspected, inspect, inspect_all};
pub use records::{Record, records};
pub use settings::{ControlSettings, TalkSocket};
pub use status::{CallStatus, HostStatus, ProxyStatus, Status};

pub(crate) use answers::Context;
pub(crate) use client::ping;
pub(crate) use internal_affairs::counters;
pub(crate) use records::{forget_old_logs, log_path, record_path, socket_path, write_record};
pub(crate) use server::{Control, serve};
pub(crate) use sockets::claim_path;
