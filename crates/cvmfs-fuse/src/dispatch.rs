//! From the device to the operations: which thread does what, and who answers.
//!
//! Requests that can be answered from what is loaded are answered on the thread that read
//! them; everything that may wait for the network goes to the slow lane with a deadline.
//! What each thread is at stands in the shared state, so that the supervisor can tell a
//! hang, and a request that killed workers before is known when it comes again.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cvmfs_client::deadline::{Deadline, Patience};

use crate::filesystem::{DATA_PATIENCE, METADATA_PATIENCE, Mount, Range};
use crate::in_flight::Ticket;
use crate::protocol::REPEAT_BIT;
use crate::protocol::reply::{Reply, send};
use crate::protocol::request::{self, Operation, Request, opcode};
use crate::shared_state::journal::Left;
use crate::shared_state::{LANES, SharedState};
use crate::slow_lane::MAX_THREADS;

/// Threads that read `/dev/fuse`. They never wait for the network, so few are enough; one
/// more lets a look-up go on beside a large listing.
pub(crate) const READERS: usize = 3;

/// The kernel refuses to read less than 8 KiB; nothing that a read-only mount is asked is larger than a name and an
/// attribute. One forgets many nodes at a time with more room.
pub(crate) const LARGEST_MESSAGE: usize = 64 << 10;

/// A request that as many workers died of is answered with EIO.
const MOST_DEATHS: u64 = 3;

const _: () = assert!(READERS + MAX_THREADS <= LANES, "each thread has a lane");

/// Whether there is more to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    More,
    Unmounted,
}

impl Mount {
    /// Reads requests from the device until the mount is gone.
    ///
    /// # Errors
    /// What the device says, other than that the mount is gone.
    pub(crate) fn read_requests(self: &Arc<Mount>, reader: usize) -> std::io::Result<()> {
        // Filled, not only reserved: the kernel cannot fault pages in for a dying thread.
        let mut buffer = vec![1; LARGEST_MESSAGE];
        loop {
            let read = match &self.journal {
                None => rustix::io::read(&self.channel.0, &mut buffer).map_err(std::io::Error::from),
                Some(journal) => journal.read(reader, self.channel.0.as_fd(), &mut buffer),
            };
            match read {
                Ok(length) => {
                    let next = self.serve_safely(reader, buffer.get(..length).unwrap_or_default());
                    if let Some(journal) = &self.journal {
                        journal.done(reader);
                    }
                    if next == Next::Unmounted {
                        return Ok(());
                    }
                }
                Err(error) => match error.raw_os_error() {
                    // The request was taken back, or a signal came.
                    Some(libc::ENOENT | libc::EINTR | libc::EAGAIN) => {}
                    Some(libc::ENODEV) => return Ok(()),
                    _ => return Err(error),
                },
            }
        }
    }

    /// Serves what predecessors left unanswered, on a kernel that does not send it again.
    pub(crate) fn serve_left(self: &Arc<Mount>, reader: usize, left: Vec<Left>) {
        if !left.is_empty() {
            tracing::info!(requests = left.len(), "answering what the worker before left unanswered");
        }
        for request in left {
            self.serve_safely(reader, request.message());
            request.done();
        }
    }

    fn serve_safely(self: &Arc<Mount>, reader: usize, message: &[u8]) -> Next {
        let serve = std::panic::AssertUnwindSafe(|| self.serve(reader, message));
        std::panic::catch_unwind(serve).unwrap_or_else(|_| {
            tracing::error!("a request ended in a panic; it was answered with EIO");
            Next::More
        })
    }

    /// Answers one message of the kernel, here or on the slow lane.
    pub(crate) fn serve(self: &Arc<Mount>, reader: usize, message: &[u8]) -> Next {
        let number = request::opcode_of(message);
        self.statistics.count_call(number);
        let mut request = match request::parse(message) {
            Ok(request) => request,
            Err(malformed) => {
                self.statistics.count_malformed();
                tracing::error!(
                    opcode = malformed.opcode,
                    length = message.len(),
                    "malformed request of the kernel"
                );
                let wants_answer =
                    !matches!(number, opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT);
                if let Some(unique) = malformed.unique.filter(|_| wants_answer) {
                    let _ = send(&self.channel, unique, libc::EIO, &[]);
                }
                return Next::More;
            }
        };
        match request.operation {
            // Node ids follow from the catalogs: nothing is counted, nothing is to be forgotten.
            Operation::Forget => return Next::More,
            Operation::Interrupt { unique } => {
                self.in_flight.interrupt(unique);
                return Next::More;
            }
            Operation::Destroy => {
                let _ = send(&self.channel, request.unique, 0, &[]);
                return Next::Unmounted;
            }
            _ => {}
        }
        if self.journal.is_some() {
            // The mark is ours: the kernel knows the request by its number alone.
            request.unique &= !REPEAT_BIT;
        }
        let _lane = Lane::enter(&self.state, reader, &request, number);
        let reply = Reply::new(&self.channel, request.unique);
        if request.is_repeated {
            self.state.count_repeated();
            if self.state.deaths_at(request.unique) >= MOST_DEATHS {
                self.statistics.count_refused();
                tracing::error!(
                    request = request::name(number),
                    node = format_args!("{:#x}", request.node),
                    deaths = MOST_DEATHS,
                    "workers died of this request; it is answered with EIO. Please report it with this log"
                );
                reply.error(libc::EIO);
                return Next::More;
            }
        }
        let started = self.statistics.is_instrumented().then(Instant::now);
        if self.answer(request, number, reply) == Place::Here
            && let Some(started) = started
        {
            self.statistics.record_latency(number, started.elapsed());
        }
        Next::More
    }

    fn answer(self: &Arc<Mount>, request: Request<'_>, number: u32, reply: Reply) -> Place {
        let (node, caller) = (request.node, request.caller);
        let (for_metadata, for_data) =
            (METADATA_PATIENCE.min(self.settings.deadline), DATA_PATIENCE.min(self.settings.deadline));
        let soon = || Deadline::after(for_metadata);
        let metadata = (request, number, for_metadata);
        let data = (request, number, for_data);
        match request.operation {
            Operation::Lookup { name } => {
                if self.view.ready(node).is_some() && !crate::test_fault::is_slow(name) {
                    self.lookup(node, name, soon(), reply);
                    return Place::Here;
                }
                let name = name.to_vec();
                self.later(metadata, reply, move |mount, patience, reply| {
                    mount.lookup(node, &name, patience.deadline, reply);
                })
            }
            Operation::Getattr => {
                if self.view.remembered(node).is_some() && self.is_access_known(caller) {
                    self.getattr(node, caller, soon(), reply);
                    return Place::Here;
                }
                self.later(metadata, reply, move |mount, patience, reply| {
                    mount.getattr(node, caller, patience.deadline, reply);
                })
            }
            Operation::Readlink => {
                if self.view.remembered(node).is_some() {
                    self.readlink(node, soon(), reply);
                    return Place::Here;
                }
                self.later(metadata, reply, move |mount, patience, reply| {
                    mount.readlink(node, patience.deadline, reply);
                })
            }
            Operation::Open { flags } => self.answer_open_request(data, flags, reply),
            Operation::Read { offset, size } => {
                let reply = match self.view.remembered(node) {
                    Some(known) => match self.read_at_once(&known, offset, size, reply) {
                        Ok(()) => return Place::Here,
                        Err(reply) => reply,
                    },
                    None => reply,
                };
                self.later(data, reply, move |mount, patience, reply| {
                    mount.read(node, offset, size, patience, reply);
                })
            }
            Operation::Release { handle } => {
                self.release(node, handle);
                self.here(reply, 0)
            }
            Operation::Opendir => {
                if self.is_access_known(caller) {
                    self.opendir(caller, soon(), reply);
                    return Place::Here;
                }
                self.later(metadata, reply, move |mount, patience, reply| {
                    mount.opendir(caller, patience.deadline, reply);
                })
            }
            Operation::Readdir { offset, size, plus } => {
                let range = Range { offset, size, plus };
                if self.view.ready(node).is_some() {
                    self.readdir(node, range, soon(), reply);
                    return Place::Here;
                }
                self.later(metadata, reply, move |mount, patience, reply| {
                    mount.readdir(node, range, patience.deadline, reply);
                })
            }
            Operation::Releasedir => {
                self.statistics.count_closed_directory();
                self.here(reply, 0)
            }
            // The numbers come from the disk of the cache, which may hang.
            Operation::Statfs => match self.statfs_at_once(reply) {
                Ok(()) => Place::Here,
                Err(reply) => self.later(metadata, reply, |mount, _, reply| mount.statfs(reply)),
            },
            Operation::Getxattr { name, size } => {
                let is_ready = crate::magic::is_quick(name) && self.is_access_known(caller);
                if is_ready && self.view.ready(node).is_some() {
                    self.getxattr(node, name, size, caller, soon(), reply);
                    return Place::Here;
                }
                let name = name.to_vec();
                self.later(metadata, reply, move |mount, patience, reply| {
                    mount.getxattr(node, &name, size, caller, patience.deadline, reply);
                })
            }
            Operation::Listxattr { size } => {
                if self.view.ready(node).is_some() {
                    self.listxattr(node, size, soon(), reply);
                    return Place::Here;
                }
                self.later(metadata, reply, move |mount, patience, reply| {
                    mount.listxattr(node, size, patience.deadline, reply);
                })
            }
            Operation::Change => self.here(reply, libc::EROFS),
            // Asked once each: the kernel remembers that there is nothing to it.
            Operation::Flush | Operation::Other => self.here(reply, libc::ENOSYS),
            Operation::Forget | Operation::Interrupt { .. } | Operation::Destroy => Place::Here,
        }
    }

    fn answer_open_request(self: &Arc<Mount>, job: Job<'_>, flags: i32, reply: Reply) -> Place {
        let (node, caller) = (job.0.node, job.0.caller);
        if flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0 {
            return self.here(reply, libc::EROFS);
        }
        if flags & libc::O_EXCL != 0 {
            return self.here(reply, libc::EEXIST);
        }
        if self.content.chosen().profile == crate::profile::Profile::NoOpen {
            // Answered once: from now on the kernel opens files by itself.
            return self.here(reply, libc::ENOSYS);
        }
        let reply = match self.view.remembered(node).filter(|_| self.is_access_known(caller)) {
            Some(known) => match self.open_at_once(&known, caller, reply) {
                Ok(()) => return Place::Here,
                Err(reply) => reply,
            },
            None => reply,
        };
        self.later(job, reply, move |mount, patience, reply| mount.open(node, caller, patience, reply))
    }

    #[expect(clippy::unused_self, reason = "one of the ways to answer")]
    fn here(&self, reply: Reply, errno: i32) -> Place {
        reply.error(errno);
        Place::Here
    }

    /// Has a thread of the slow lane do `work`, which may wait.
    fn later(
        self: &Arc<Mount>,
        (request, number, patience): Job<'_>,
        mut reply: Reply,
        work: impl FnOnce(&Mount, Patience<'_>, Reply) + Send + 'static,
    ) -> Place {
        let kept = match &self.journal {
            None => None,
            Some(journal) => match journal.keep(request.raw) {
                Some(kept) => Some(kept),
                // It would be lost with this worker.
                None => return self.here(reply, libc::EIO),
            },
        };
        let ticket = self.in_flight.admit(&request, number, patience, kept);
        reply.share(&ticket);
        let admitted = Admitted { mount: self.clone(), ticket };
        let (unique, node) = (request.unique, request.node);
        let started = self.statistics.is_instrumented().then(Instant::now);
        self.slow.run(move |thread| {
            let (mount, ticket) = (&admitted.mount, &admitted.ticket);
            if !ticket.is_answered() {
                let _lane = Lane::enter_as(&mount.state, READERS + thread, unique, number, node);
                let patience = Patience { deadline: ticket.deadline(), interrupt: Some(ticket.interrupt()) };
                work(mount, patience, reply);
            }
            if let Some(started) = started {
                mount.statistics.record_latency(number, started.elapsed());
            }
        });
        Place::Elsewhere
    }

    /// Beats and sweeps every second until the mount ends.
    pub(crate) fn keep_watch(&self) {
        const PULSE: Duration = Duration::from_secs(1);
        while !self.is_ending.load(Ordering::Relaxed) {
            self.state.beat();
            self.in_flight.sweep();
            std::thread::sleep(PULSE);
        }
    }
}

/// A request, its operation's number, and how long it may take.
type Job<'a> = (Request<'a>, u32, Duration);

/// Where a request is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Here,
    Elsewhere,
}

/// A request on the slow lane; it ends with its work, however that ends.
struct Admitted {
    mount: Arc<Mount>,
    ticket: Arc<Ticket>,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.mount.in_flight.finish(&self.ticket);
    }
}

/// A thread is at a request; it is free again when this is dropped, also by a panic.
struct Lane<'a> {
    state: &'a SharedState,
    number: usize,
}

impl<'a> Lane<'a> {
    fn enter(state: &'a SharedState, number: usize, request: &Request<'_>, opcode: u32) -> Lane<'a> {
        Lane::enter_as(state, number, request.unique, opcode, request.node)
    }

    fn enter_as(state: &'a SharedState, number: usize, unique: u64, opcode: u32, node: u64) -> Lane<'a> {
        state.enter(number, unique, opcode, node);
        Lane { state, number }
    }
}

impl Drop for Lane<'_> {
    fn drop(&mut self) {
        self.state.leave(self.number);
    }
}
