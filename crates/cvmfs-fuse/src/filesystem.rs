//! The operations on files and directories, and what becomes of their failures.
//!
//! How requests come here, and on which thread, is the business of [`crate::dispatch`].

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cvmfs_client::authz::Credentials;
use cvmfs_client::config::KernelSettings;
use cvmfs_client::deadline::{Deadline, Patience};
use cvmfs_client::network::OnBehalf;
use cvmfs_format::catalog::EntryKind;

use crate::content::{Content, ContentError, Opened, Reader};
use crate::files_ahead::FilesAhead;
use crate::handles::Mode;
use crate::in_flight::InFlight;
use crate::invalidation::Invalidation;
use crate::magic;
use crate::nodes::{Moment, Node};
use crate::profile::Profile;
use crate::protocol::attributes::{Attributes, Lifetime};
use crate::protocol::handshake::Agreement;
use crate::protocol::reply::{Channel, Entries, Reply, Sent, Statfs, open_flag};
use crate::protocol::request::{Caller, opcode};
use crate::shared_state::SharedState;
use crate::shared_state::journal::Journal;
use crate::slow_lane::SlowLane;
use crate::statistics::{CallStatistics, Statistics};
use crate::view::{Listing, View, ViewError};

/// Longest wait for a catalog.
pub(crate) const METADATA_PATIENCE: Duration = Duration::from_secs(10);
/// Longest wait for file content.
pub(crate) const DATA_PATIENCE: Duration = Duration::from_secs(30);
/// Largest READ the kernel sends; also bounds a reply's memory.
const MAX_READ: u32 = 1 << 20;

/// State of a mount, shared by its threads.
#[derive(Debug)]
pub(crate) struct Mount {
    pub(crate) view: View,
    pub(crate) content: Content,
    pub(crate) settings: KernelSettings,
    pub(crate) state: Arc<SharedState>,
    pub(crate) started: Instant,
    pub(crate) statistics: Statistics,
    pub(crate) in_flight: InFlight,
    pub(crate) invalidation: Invalidation,
    /// Held by whoever looks for another revision, until all see it.
    pub(crate) updating: Mutex<()>,
    pub(crate) channel: Arc<Channel>,
    pub(crate) slow: SlowLane,
    /// The record of unanswered requests, if the kernel does not repeat them.
    pub(crate) journal: Option<Arc<Journal>>,
    ahead: FilesAhead,
    /// Whether a thread that reads the device gave up.
    pub(crate) is_ending: AtomicBool,
    statfs: Mutex<Option<(Instant, Statfs)>>,
}

impl Mount {
    pub(crate) fn new(
        view: View,
        content: Content,
        settings: KernelSettings,
        agreement: Agreement,
        (state, journal): (Arc<SharedState>, Option<Arc<Journal>>),
        channel: Arc<Channel>,
    ) -> Mount {
        // What is fetched ahead is fetched in nobody's name.
        let repository = view.repository();
        let is_open =
            !repository.store().fetcher().tells_readers() && repository.snapshot().requirement().is_none();
        Mount {
            ahead: FilesAhead::new(if is_open { settings.files_ahead } else { 0 }),
            view,
            content,
            statistics: Statistics::new(settings.instrument),
            settings,
            started: Instant::now(),
            in_flight: InFlight::new(channel.clone()),
            invalidation: Invalidation::new(agreement),
            updating: Mutex::default(),
            channel,
            state,
            slow: SlowLane::default(),
            journal,
            is_ending: AtomicBool::new(false),
            statfs: Mutex::default(),
        }
    }

    /// What was counted so far.
    pub(crate) fn call_statistics(&self) -> CallStatistics {
        CallStatistics {
            interrupted: self.in_flight.interrupted(),
            overdue: self.in_flight.overdue(),
            waiting: self.in_flight.waiting(),
            open_files: self.content.open_files(),
            ..self.statistics.snapshot()
        }
    }

    /// How long the kernel may keep what was found since `moment`. Nobody tells it what an older revision had.
    fn lifetime(&self, moment: Moment) -> Lifetime {
        self.kept_for(moment).into()
    }

    fn kept_for(&self, moment: Moment) -> Duration {
        if self.view.moment() == moment { self.settings.entry_lifetime } else { Duration::ZERO }
    }

    pub(crate) fn lookup(&self, parent: u64, name: &[u8], deadline: Deadline, reply: Reply) {
        crate::test_fault::at_lookup(name, &self.state);
        let moment = self.view.moment();
        let found = self.view.node(parent, deadline).and_then(|directory| match name {
            b"." => Ok(Some(directory)),
            _ => self.view.child(&directory, name, deadline),
        });
        match found {
            Ok(Some(node)) => reply.entry(node.id, &node.attributes, self.lifetime(moment)),
            Ok(None) => {
                let lifetime = self.invalidation.absence(parent, name, self.kept_for(moment));
                reply.no_entry(lifetime.into());
            }
            Err(error) => reply.error(self.failed("look-up", parent, Some(name), &error)),
        }
    }

    pub(crate) fn getattr(&self, id: u64, caller: Caller, deadline: Deadline, reply: Reply) {
        if let Err(errno) = self.authorize(caller, deadline) {
            return reply.error(errno);
        }
        let moment = self.view.moment();
        match self.view.node(id, deadline) {
            Ok(node) => reply.attributes(&node.attributes, self.lifetime(moment)),
            Err(error) => reply.error(self.failed("attributes", id, None, &error)),
        }
    }

    pub(crate) fn readlink(&self, id: u64, deadline: Deadline, reply: Reply) {
        match self.view.node(id, deadline) {
            Ok(node) if node.located.entry.kind() == EntryKind::Symlink => {
                reply.data(&self.view.link_target(&node));
            }
            Ok(_) => reply.error(libc::EINVAL),
            Err(error) => reply.error(self.failed("link target", id, None, &error)),
        }
    }

    /// Opens a file if that needs no fetch; gives the reply back otherwise.
    pub(crate) fn open_at_once(&self, node: &Arc<Node>, caller: Caller, reply: Reply) -> Result<(), Reply> {
        if let Err(errno) = self.authorize(caller, Deadline::after(METADATA_PATIENCE)) {
            reply.error(errno);
            return Ok(());
        }
        if let Err(error) = self.view.check_usable() {
            reply.error(self.failed("open", node.id, None, &error));
            return Ok(());
        }
        match self.content.open_at_once(node, reply.unique()) {
            Some(outcome) => {
                self.answer_open(node, outcome, false, reply);
                Ok(())
            }
            None => Err(reply),
        }
    }

    pub(crate) fn open(&self, id: u64, caller: Caller, patience: Patience<'_>, reply: Reply) {
        let metadata = patience.deadline.at_most(METADATA_PATIENCE);
        let credentials = match self.authorize(caller, metadata) {
            Ok(credentials) => credentials,
            Err(errno) => return reply.error(errno),
        };
        let reader = Reader { caller: Some(caller), credentials };
        match self.view.check_usable().and_then(|()| self.view.node(id, metadata)) {
            Ok(node) => {
                let _reading = self.reading(caller, &node);
                let outcome = self.content.open(&node, reply.unique(), &reader, patience);
                self.answer_open(&node, outcome, true, reply);
            }
            Err(error) => reply.error(self.failed("open", id, None, &error)),
        }
    }

    /// Tells the servers who reads what, where the site wants that.
    fn reading(&self, caller: Caller, node: &Node) -> Option<OnBehalf> {
        let tells = self.view.repository().store().fetcher().tells_readers();
        tells.then(|| OnBehalf::of(caller, String::from_utf8_lossy(&node.located.path).into_owned()))
    }

    fn answer_open(
        &self,
        node: &Arc<Node>,
        outcome: Result<Opened, ContentError>,
        missed: bool,
        reply: Reply,
    ) {
        let opened = match outcome {
            Ok(opened) => opened,
            Err(error) => return reply.error(self.content_failed(node, &error)),
        };
        self.view.nodes().hold(node);
        let (flags, backing) = match opened.mode {
            Mode::Passthrough(id) => (open_flag::PASSTHROUGH | open_flag::NO_FLUSH, id),
            Mode::Plain if opened.is_direct => (open_flag::DIRECT_IO | open_flag::NO_FLUSH, 0),
            // Content under one node id never changes, so the kernel's pages stay good.
            Mode::Plain => (open_flag::KEEP_CACHE | open_flag::NO_FLUSH, 0),
        };
        match reply.opened(opened.handle, flags, backing) {
            Sent::Taken => {
                self.statistics.count_opened_file();
                self.ahead.opened(&self.view, &self.content, node, missed);
            }
            // Without the kernel's word that it wants the answer again, a worker before may have given it: then the file
            // is open.
            Sent::NotTaken if opened.is_repeated && self.journal.is_some() => {}
            // The caller has gone; the kernel will not release what it was not given.
            Sent::NotTaken => self.release(node.id, opened.handle),
        }
    }

    pub(crate) fn release(&self, node: u64, handle: u64) {
        if self.content.release(node, handle) {
            self.view.nodes().release(node);
        }
    }

    /// Reads if that needs no fetch; gives the reply back otherwise.
    pub(crate) fn read_at_once(
        &self,
        node: &Node,
        offset: u64,
        size: u32,
        reply: Reply,
    ) -> Result<(), Reply> {
        with_buffer(size.min(MAX_READ) as usize, |buffer| {
            match self.content.read_at_once(node, offset, buffer) {
                Some(Ok(length)) => {
                    reply.data(buffer.get(..length).unwrap_or_default());
                    self.read_from(node, offset, false);
                }
                Some(Err(error)) => reply.error(self.content_failed(node, &error)),
                None => return Err(reply),
            }
            Ok(())
        })
    }

    pub(crate) fn read(&self, id: u64, offset: u64, size: u32, patience: Patience<'_>, reply: Reply) {
        let node = match self.view.node(id, patience.deadline.at_most(METADATA_PATIENCE)) {
            Ok(node) => node,
            Err(error) => return reply.error(self.failed("read", id, None, &error)),
        };
        with_buffer(size.min(MAX_READ) as usize, |buffer| {
            match self.content.read(&node, offset, buffer, patience) {
                Ok(length) => {
                    reply.data(buffer.get(..length).unwrap_or_default());
                    self.read_from(&node, offset, true);
                }
                Err(error) => reply.error(self.content_failed(&node, &error)),
            }
        });
    }

    /// A file was read that the kernel may have opened by itself.
    fn read_from(&self, node: &Node, offset: u64, missed: bool) {
        if offset == 0 && self.content.chosen().profile == Profile::NoOpen {
            self.ahead.opened(&self.view, &self.content, node, missed);
        }
    }

    pub(crate) fn opendir(&self, caller: Caller, deadline: Deadline, reply: Reply) {
        if let Err(errno) = self.authorize(caller, deadline) {
            return reply.error(errno);
        }
        // The kernel may cache listings as long as the revision never changed; afterwards it
        // reads them again, because a directory keeps its node id when its content changes.
        let mut flags = open_flag::CACHE_DIR;
        if self.view.moment() == Moment::START {
            flags |= open_flag::KEEP_CACHE;
        }
        if reply.opened(0, flags, 0) == Sent::Taken {
            self.statistics.count_opened_directory();
        }
    }

    pub(crate) fn readdir(&self, id: u64, range: Range, deadline: Deadline, reply: Reply) {
        let moment = self.view.moment();
        let listed = self.view.node(id, deadline).and_then(|directory| self.view.list(&directory, deadline));
        // It may have waited for a catalog of a revision that is gone: the kernel would take its names for new ones.
        let is_current = self.view.moment() == moment;
        match listed {
            Ok(listing) => with_buffer(0, |buffer| {
                let entries = Entries::new(buffer, range.size);
                if fill(&listing, id, range, is_current, self.lifetime(moment), entries) {
                    self.view.listed_to_the_end(id, &listing);
                }
                reply.data(buffer);
            }),
            Err(error) => reply.error(self.failed("listing", id, None, &error)),
        }
    }

    /// Whether somebody waits for a look-up or a listing in this directory.
    pub(crate) fn is_busy(&self, directory: u64) -> bool {
        let holds_its_lock =
            |number| matches!(number, opcode::LOOKUP | opcode::READDIR | opcode::READDIRPLUS);
        self.in_flight.is_waiting(|number, node| node == directory && holds_its_lock(number))
    }

    /// Answers with the numbers that are kept; gives the reply back if there are none.
    pub(crate) fn statfs_at_once(&self, reply: Reply) -> Result<(), Reply> {
        let kept = *self.statfs.lock().unwrap_or_else(PoisonError::into_inner);
        match kept.filter(|(when, _)| when.elapsed() < self.settings.statfs_lifetime) {
            Some((_, numbers)) => {
                reply.statfs(&numbers);
                Ok(())
            }
            None => Err(reply),
        }
    }

    pub(crate) fn statfs(&self, reply: Reply) {
        let numbers = self.statfs_now();
        *self.statfs.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), numbers));
        reply.statfs(&numbers);
    }

    /// Cache and repository in the numbers of `statfs` (client behaviour §8.1).
    fn statfs_now(&self) -> Statfs {
        let cache = self.view.repository().store().cache_usage();
        let entries = self.view.repository().entry_counts();
        // Without a limit the cache counts as full, as with the C++ client.
        let total = if cache.limit == u64::MAX { cache.used } else { cache.limit };
        Statfs {
            blocks: total / STATFS_BLOCK,
            free: total.saturating_sub(cache.used) / STATFS_BLOCK,
            files: entries.total,
            files_free: entries.total.saturating_sub(entries.attached),
            block_size: STATFS_BLOCK as u32,
            longest_name: MAX_NAME,
        }
    }

    pub(crate) fn getxattr(
        &self,
        id: u64,
        name: &[u8],
        size: u32,
        caller: Caller,
        deadline: Deadline,
        reply: Reply,
    ) {
        let value =
            self.view.node(id, deadline).and_then(|node| magic::get(self, &node, name, caller, deadline));
        match value {
            Ok(Some(value)) => reply.attribute(&value, size),
            Ok(None) => reply.error(libc::ENODATA),
            Err(error) => reply.error(self.failed("attribute", id, Some(name), &error)),
        }
    }

    pub(crate) fn listxattr(&self, id: u64, size: u32, deadline: Deadline, reply: Reply) {
        let names = self.view.node(id, deadline).and_then(|node| magic::list(self, &node, deadline));
        match names {
            Ok(names) => reply.attribute(&names, size),
            Err(error) => reply.error(self.failed("attribute list", id, None, &error)),
        }
    }

    /// Whether the caller's access is decided without asking the authorisation helper.
    pub(crate) fn is_access_known(&self, caller: Caller) -> bool {
        self.view.repository().is_access_known(caller)
    }

    /// Checks the caller of a protected repository. A denial is logged where it is decided, and is no I/O error.
    fn authorize(&self, caller: Caller, deadline: Deadline) -> Result<Option<Arc<Credentials>>, i32> {
        self.view.repository().authorize(caller, deadline).map_err(|_| libc::EACCES)
    }

    /// One log line per failure, with what an administrator needs to find the cause.
    fn failed(&self, what: &str, id: u64, name: Option<&[u8]>, error: &ViewError) -> i32 {
        let errno = error.errno();
        if let ViewError::Stale(_) = error {
            // Ordinary after an update: the kernel looks up again.
            tracing::debug!(what, node = id, "node of an unknown revision");
            return errno;
        }
        let path = self.view.remembered(id).map(|node| printable(&node.located.path)).unwrap_or_default();
        let name = name.map(printable).unwrap_or_default();
        self.note_failure(what, &path, &name, errno, error);
        errno
    }

    fn content_failed(&self, node: &Node, error: &ContentError) -> i32 {
        let errno = error.errno();
        self.note_failure("content", &printable(&node.located.path), "", errno, error);
        errno
    }

    fn note_failure(&self, what: &str, path: &str, name: &str, errno: i32, error: &dyn std::error::Error) {
        if errno == libc::EINTR {
            tracing::debug!(what, path, name, "the caller was interrupted");
            return;
        }
        let reason = chain(error);
        let slash = if name.is_empty() { "" } else { "/" };
        let place = format!("{path}{slash}{name}");
        let place = if place.is_empty() { "/" } else { place.as_str() };
        self.statistics.count_io_error(errno, unix_now(), &format!("{what} of {place}: {reason}"));
        tracing::error!(what, path, name, errno, error = %reason, "request failed");
    }
}

/// Seconds since 1970.
fn unix_now() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.unwrap_or_default().as_secs().cast_signed()
}

/// What a READDIR asks for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Range {
    pub(crate) offset: u64,
    pub(crate) size: u32,
    /// With the attributes of each entry.
    pub(crate) plus: bool,
}

/// Collects entries from an offset on; true if the end of the directory was reached. The kernel enters the names
/// only if they are current.
fn fill(
    listing: &Listing,
    id: u64,
    range: Range,
    is_current: bool,
    lifetime: Lifetime,
    mut entries: Entries<'_>,
) -> bool {
    let mut add = |node: u64, attributes: &Attributes, next: u64, name: &[u8]| {
        if range.plus {
            entries.add_plus(node, attributes, lifetime, next, name)
        } else {
            entries.add(attributes.inode, next, attributes.mode, name)
        }
    };
    let first = usize::try_from(range.offset).unwrap_or(usize::MAX);
    for (index, (inode, name)) in
        [(id, &b"."[..]), (listing.parent, b"..")].into_iter().enumerate().skip(first)
    {
        let attributes = Attributes { inode, mode: libc::S_IFDIR, ..Attributes::default() };
        // Node 0: the kernel knows both already.
        if !add(0, &attributes, index as u64 + 1, name) {
            return false;
        }
    }
    let rest = listing.entries.iter().enumerate().skip(first.saturating_sub(2));
    for (index, listed) in rest {
        // Node 0: it looks the name up when somebody uses it.
        let node = if is_current { listed.attributes.inode } else { 0 };
        if !add(node, &listed.attributes, index as u64 + 3, &listed.name) {
            return false;
        }
    }
    true
}

/// Runs `work` with a buffer of the thread, so that answers cost no allocation.
fn with_buffer<T>(size: usize, work: impl FnOnce(&mut Vec<u8>) -> T) -> T {
    thread_local! {
        static BUFFER: std::cell::Cell<Vec<u8>> = const { std::cell::Cell::new(Vec::new()) };
    }
    let mut buffer = BUFFER.take();
    buffer.resize(size, 0);
    let result = work(&mut buffer);
    BUFFER.set(buffer);
    result
}

/// Block size that `statfs` reports, as the C++ client does.
const STATFS_BLOCK: u64 = 512;
/// Overlayfs refuses every name if all its layers say 0 here.
const MAX_NAME: u32 = 255;

fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// An error with its causes in one line, each told once: some errors name their cause themselves.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let told = cause.to_string();
        if !text.contains(&told) {
            text.push_str(": ");
            text.push_str(&told);
        }
        source = cause.source();
    }
    text
}
