//! The FUSE operations. Requests that can be answered from what is loaded are answered
//! on the thread that read them; everything that may wait for the network goes to the
//! slow lane with a deadline.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use cvmfs_client::authz::Caller;
use cvmfs_client::deadline::Deadline;
use cvmfs_client::network::OnBehalf;
use cvmfs_format::catalog::EntryKind;
use fuser::{
    Errno, FileAttr, FileHandle, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig, LockOwner,
    OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyStatfs, ReplyXattr, Request,
};

use crate::attributes::{attributes, file_type};
use crate::content::{Content, ContentError};
use crate::handles::{Mode, REPEAT_BIT};
use crate::magic;
use crate::nodes::Node;
use crate::shared_state::SharedState;
use crate::slow_lane::SlowLane;
use crate::view::{Listing, View, ViewError};

/// Longest wait for a catalog.
const METADATA_DEADLINE: Duration = Duration::from_secs(10);
/// Longest wait for file content.
const DATA_DEADLINE: Duration = Duration::from_secs(30);
/// Largest READ the kernel sends; also bounds a reply's memory.
const MAX_READ: u32 = 1 << 20;

/// How long a kernel before [`EPOCH_ABI`] may remember that a name does not exist.
const BRIEF_ABSENCE: Duration = Duration::from_secs(1);
/// The first FUSE protocol version with epochs (Linux 6.16).
const EPOCH_ABI: fuser::Version = fuser::Version(7, 44);

/// What the mount was asked for and what the kernel granted.
#[derive(Debug)]
pub(crate) struct Options {
    /// How long the kernel may keep entries and attributes.
    pub(crate) kernel_cache: Duration,
    /// Which magic attributes are listed.
    pub(crate) magic: magic::Visibility,
}

/// State of a mount, shared by its threads.
#[derive(Debug)]
pub(crate) struct Mount {
    pub(crate) view: View,
    pub(crate) content: Content,
    pub(crate) options: Options,
    pub(crate) state: Arc<SharedState>,
    pub(crate) started: std::time::Instant,
    pub(crate) io_errors: AtomicU64,
    pub(crate) passthrough_offered: AtomicBool,
    /// Whether the kernel can be told that all its entries are to be looked up again.
    epochs: AtomicBool,
    slow: SlowLane,
}

impl Mount {
    pub(crate) fn new(view: View, content: Content, options: Options, state: Arc<SharedState>) -> Mount {
        Mount {
            view,
            content,
            options,
            state,
            started: std::time::Instant::now(),
            io_errors: AtomicU64::new(0),
            passthrough_offered: AtomicBool::new(false),
            epochs: AtomicBool::new(false),
            slow: SlowLane::default(),
        }
    }

    fn attributes(&self, node: &Node) -> FileAttr {
        attributes(node.id, &node.located.entry, self.view.size(node))
    }

    fn lookup(&self, parent: u64, name: &[u8], reply: ReplyEntry) {
        let deadline = Deadline::after(METADATA_DEADLINE);
        let found = self
            .view
            .node(parent, deadline)
            .and_then(|directory| self.view.child(&directory, name, deadline));
        match found {
            Ok(Some(node)) => reply.entry(&self.options.kernel_cache, &self.attributes(&node), Generation(0)),
            Ok(None) => reply.entry(&self.absence(), &NO_ENTRY, Generation(0)),
            Err(error) => reply.error(self.failed("look-up", parent, Some(name), &error)),
        }
    }

    /// How long the kernel may believe that a name does not exist. Where it cannot be told of
    /// a new revision, only briefly: a layer that was just published must be found.
    fn absence(&self) -> Duration {
        if self.epochs.load(Ordering::Relaxed) {
            self.options.kernel_cache
        } else {
            self.options.kernel_cache.min(BRIEF_ABSENCE)
        }
    }

    fn getattr(&self, id: u64, caller: Caller, reply: ReplyAttr) {
        if let Err(errno) = self.authorize(caller) {
            return reply.error(errno);
        }
        match self.view.node(id, Deadline::after(METADATA_DEADLINE)) {
            Ok(node) => reply.attr(&self.options.kernel_cache, &self.attributes(&node)),
            Err(error) => reply.error(self.failed("attributes", id, None, &error)),
        }
    }

    fn readlink(&self, id: u64, reply: ReplyData) {
        match self.view.node(id, Deadline::after(METADATA_DEADLINE)) {
            Ok(node) if node.located.entry.kind() == EntryKind::Symlink => {
                reply.data(&self.view.link_target(&node));
            }
            Ok(_) => reply.error(Errno::EINVAL),
            Err(error) => reply.error(self.failed("link target", id, None, &error)),
        }
    }

    fn list(&self, id: u64) -> Result<Arc<Listing>, Errno> {
        let deadline = Deadline::after(METADATA_DEADLINE);
        self.view
            .node(id, deadline)
            .and_then(|directory| self.view.list(&directory, deadline))
            .map_err(|error| self.failed("listing", id, None, &error))
    }

    fn open(&self, id: u64, caller: Caller, unique: u64, reply: ReplyOpen) {
        if let Err(errno) = self.authorize(caller) {
            return reply.error(errno);
        }
        let node = match self.view.usable_node(id, Deadline::after(METADATA_DEADLINE)) {
            Ok(node) => node,
            Err(error) => return reply.error(self.failed("open", id, None, &error)),
        };
        let _reading = self.reading(caller, &node);
        match self.content.open(&node, unique, Deadline::after(DATA_DEADLINE)) {
            Ok((handle, mode)) => answer_open(reply, handle, mode),
            Err(error) => reply.error(self.content_failed(&node, &error)),
        }
    }

    fn read(&self, id: u64, caller: Caller, offset: u64, size: u32, reply: ReplyData) {
        let node = match self.view.node(id, Deadline::after(METADATA_DEADLINE)) {
            Ok(node) => node,
            Err(error) => return reply.error(self.failed("read", id, None, &error)),
        };
        let mut buffer = vec![0; size.min(MAX_READ) as usize];
        let _reading = self.reading(caller, &node);
        match self.content.read(&node, offset, &mut buffer, Deadline::after(DATA_DEADLINE)) {
            Ok(length) => reply.data(&buffer[..length]),
            Err(error) => reply.error(self.content_failed(&node, &error)),
        }
    }

    /// Tells the servers who reads what, where the site wants that.
    fn reading(&self, caller: Caller, node: &Node) -> Option<OnBehalf> {
        let tells = self.view.repository().store().fetcher().tells_readers();
        tells.then(|| OnBehalf::of(caller, String::from_utf8_lossy(&node.located.path).into_owned()))
    }

    /// Checks the caller of a protected repository. A denial is logged where it is decided, and is no I/O error.
    fn authorize(&self, caller: Caller) -> Result<(), Errno> {
        let verdict = self.view.repository().authorize(caller, Deadline::after(METADATA_DEADLINE));
        verdict.map(drop).map_err(|_| Errno::EACCES)
    }

    /// One log line per failure, with what an administrator needs to find the cause.
    fn failed(&self, what: &str, id: u64, name: Option<&[u8]>, error: &ViewError) -> Errno {
        let errno = error.errno();
        if let ViewError::Stale(_) = error {
            // Ordinary after an update: the kernel looks up again.
            tracing::debug!(what, node = id, "node of an unknown revision");
            return Errno::from_i32(errno);
        }
        self.io_errors.fetch_add(1, Ordering::Relaxed);
        let path = self.view.remembered(id).map(|node| printable(&node.located.path)).unwrap_or_default();
        let name = name.map(printable).unwrap_or_default();
        tracing::error!(what, path, name, errno, error = %chain(error), "request failed");
        Errno::from_i32(errno)
    }

    fn content_failed(&self, node: &Node, error: &ContentError) -> Errno {
        self.io_errors.fetch_add(1, Ordering::Relaxed);
        let errno = error.errno();
        let path = printable(&node.located.path);
        tracing::error!(what = "content", path, errno, error = %chain(error), "request failed");
        Errno::from_i32(errno)
    }
}

fn caller_of(request: &Request) -> Caller {
    Caller { uid: request.uid(), gid: request.gid(), pid: request.pid() }
}

fn answer_open(reply: ReplyOpen, handle: u64, mode: Mode) {
    match mode {
        Mode::Passthrough(id) => crate::syscall::reply_passthrough(reply, handle, id),
        // Content under one node id never changes, so the kernel's pages stay good.
        Mode::Plain => {
            reply.opened(FileHandle(handle), FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH);
        }
    }
}

/// Node 0 with a time to live: "there is no such entry", which the kernel may remember.
const NO_ENTRY: FileAttr = FileAttr {
    ino: INodeNo(0),
    size: 0,
    blocks: 0,
    atime: std::time::UNIX_EPOCH,
    mtime: std::time::UNIX_EPOCH,
    ctime: std::time::UNIX_EPOCH,
    crtime: std::time::UNIX_EPOCH,
    kind: fuser::FileType::RegularFile,
    perm: 0,
    nlink: 0,
    uid: 0,
    gid: 0,
    rdev: 0,
    blksize: 0,
    flags: 0,
};

/// The adapter that fuser drives.
#[derive(Debug)]
pub(crate) struct Adapter(pub(crate) Arc<Mount>);

impl Adapter {
    /// Runs `answer` here if `ready`, else on the slow lane.
    fn answer(&self, ready: bool, answer: impl FnOnce(&Mount) + Send + 'static) {
        if ready {
            answer(&self.0);
        } else {
            let mount = self.0.clone();
            self.0.slow.run(move || answer(&mount));
        }
    }

    /// Whether the caller's access is decided without asking the authorisation helper.
    fn is_access_known(&self, caller: Caller) -> bool {
        self.0.view.repository().is_access_known(caller)
    }

    fn note(&self, request: &Request) {
        if request.unique().0 & REPEAT_BIT != 0 {
            self.0.state.count_repeated();
        }
    }
}

impl fuser::Filesystem for Adapter {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = [
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_CACHE_SYMLINKS,
            // A new worker asks for the requests in flight again.
            InitFlags::FUSE_HAS_RESEND,
            // Content never changes under a node id; the kernel need not compare times.
            InitFlags::FUSE_EXPLICIT_INVAL_DATA,
        ];
        for flag in wanted {
            // What an older kernel lacks, the mount does without.
            let _ = config.add_capabilities(flag);
        }
        // Depth 1, not 2: an overlay must fit on top.
        if config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
            && config.set_max_stack_depth(1).is_ok()
        {
            self.0.passthrough_offered.store(true, Ordering::SeqCst);
        }
        self.0.epochs.store(config.kernel_abi() >= EPOCH_ABI, Ordering::SeqCst);
        // Bounds the memory of one READ; the kernel asks for at most this much.
        let _ = config.set_max_write(MAX_READ);
        let _ = config.set_max_background(64);
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.note(request);
        let name = name.as_bytes().to_vec();
        self.answer(self.0.view.is_loaded(parent.0), move |mount| mount.lookup(parent.0, &name, reply));
    }

    fn forget(&self, _: &Request, _: INodeNo, _: u64) {}

    fn getattr(&self, request: &Request, node: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        self.note(request);
        let caller = caller_of(request);
        let ready = self.0.view.remembered(node.0).is_some() && self.is_access_known(caller);
        self.answer(ready, move |mount| mount.getattr(node.0, caller, reply));
    }

    fn readlink(&self, request: &Request, node: INodeNo, reply: ReplyData) {
        self.note(request);
        self.answer(self.0.view.remembered(node.0).is_some(), move |mount| mount.readlink(node.0, reply));
    }

    fn open(&self, request: &Request, node: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.note(request);
        if flags.0 & libc::O_ACCMODE != libc::O_RDONLY {
            return reply.error(Errno::EROFS);
        }
        let unique = request.unique().0;
        let remembered = self.0.view.remembered(node.0);
        let cached = remembered.is_some_and(|node| self.0.content.is_cached(&node));
        let caller = caller_of(request);
        let ready = cached && self.is_access_known(caller);
        self.answer(ready, move |mount| mount.open(node.0, caller, unique, reply));
    }

    fn read(
        &self,
        request: &Request,
        node: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.note(request);
        let remembered = self.0.view.remembered(node.0);
        let ready = remembered.is_some_and(|node| self.0.content.is_readable(&node));
        let caller = caller_of(request);
        self.answer(ready, move |mount| mount.read(node.0, caller, offset, size, reply));
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // Asked once: the kernel remembers that there is nothing to flush.
        reply.error(Errno::ENOSYS);
    }

    fn release(
        &self,
        request: &Request,
        node: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.note(request);
        self.0.content.release(node.0, handle.0);
        reply.ok();
    }

    fn opendir(&self, request: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        self.note(request);
        // The kernel may cache listings as long as the revision never changed; afterwards it
        // reads them again, because a directory keeps its node id when its content changes.
        let mut flags = FopenFlags::FOPEN_CACHE_DIR;
        if self.0.view.changes() == 0 {
            flags |= FopenFlags::FOPEN_KEEP_CACHE;
        }
        let caller = caller_of(request);
        self.answer(self.is_access_known(caller), move |mount| match mount.authorize(caller) {
            Ok(()) => reply.opened(FileHandle(0), flags),
            Err(errno) => reply.error(errno),
        });
    }

    fn readdir(
        &self,
        request: &Request,
        node: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        self.note(request);
        self.answer(self.0.view.is_loaded(node.0), move |mount| {
            let listing = match mount.list(node.0) {
                Ok(listing) => listing,
                Err(errno) => return reply.error(errno),
            };
            for (index, dot) in
                [(node.0, "."), (listing.parent, "..")].iter().enumerate().skip(offset as usize)
            {
                if reply.add(INodeNo(dot.0), index as u64 + 1, fuser::FileType::Directory, dot.1) {
                    return reply.ok();
                }
            }
            let first = (offset as usize).saturating_sub(2);
            for (index, (name, child)) in listing.entries.iter().enumerate().skip(first) {
                let name = OsStr::from_bytes(name);
                let kind = file_type(child.located.entry.kind());
                if reply.add(INodeNo(child.id), index as u64 + 3, kind, name) {
                    break;
                }
            }
            reply.ok();
        });
    }

    fn readdirplus(
        &self,
        request: &Request,
        node: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        self.note(request);
        self.answer(self.0.view.is_loaded(node.0), move |mount| {
            let listing = match mount.list(node.0) {
                Ok(listing) => listing,
                Err(errno) => return reply.error(errno),
            };
            let ttl = mount.options.kernel_cache;
            for (index, dot) in
                [(node.0, "."), (listing.parent, "..")].iter().enumerate().skip(offset as usize)
            {
                let attr = FileAttr { ino: INodeNo(dot.0), kind: fuser::FileType::Directory, ..NO_ENTRY };
                if reply.add(INodeNo(dot.0), index as u64 + 1, dot.1, &ttl, &attr, Generation(0)) {
                    return reply.ok();
                }
            }
            let first = (offset as usize).saturating_sub(2);
            for (index, (name, child)) in listing.entries.iter().enumerate().skip(first) {
                let attr = mount.attributes(child);
                let name = OsStr::from_bytes(name);
                if reply.add(INodeNo(child.id), index as u64 + 3, name, &ttl, &attr, Generation(0)) {
                    break;
                }
            }
            reply.ok();
        });
    }

    fn releasedir(&self, _: &Request, _: INodeNo, _: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        reply.ok();
    }

    fn statfs(&self, request: &Request, _: INodeNo, reply: ReplyStatfs) {
        self.note(request);
        self.answer(true, |mount| {
            let cache = mount.view.repository().store().cache_usage();
            let entries = mount
                .view
                .repository()
                .snapshot()
                .counters(Deadline::after(METADATA_DEADLINE))
                .map_or(0, |counters| counters.total().entries().max(0).cast_unsigned());
            let (total, free) =
                (cache.limit / STATFS_BLOCK, cache.limit.saturating_sub(cache.used) / STATFS_BLOCK);
            reply.statfs(total, free, free, entries, 0, STATFS_BLOCK as u32, MAX_NAME, STATFS_BLOCK as u32);
        });
    }

    fn getxattr(&self, request: &Request, node: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        self.note(request);
        let name = name.as_bytes().to_vec();
        let caller = caller_of(request);
        self.answer(self.0.view.is_loaded(node.0) && self.is_access_known(caller), move |mount| {
            if let Err(errno) = mount.authorize(caller) {
                return reply.error(errno);
            }
            let value = mount
                .view
                .node(node.0, Deadline::after(METADATA_DEADLINE))
                .and_then(|node| magic::get(mount, &node, &name, Deadline::after(METADATA_DEADLINE)));
            match value {
                Ok(Some(value)) => answer_attribute(reply, &value, size),
                Ok(None) => reply.error(Errno::ENODATA),
                Err(error) => reply.error(mount.failed("attribute", node.0, Some(&name), &error)),
            }
        });
    }

    fn listxattr(&self, request: &Request, node: INodeNo, size: u32, reply: ReplyXattr) {
        self.note(request);
        self.answer(self.0.view.is_loaded(node.0), move |mount| {
            let names = mount
                .view
                .node(node.0, Deadline::after(METADATA_DEADLINE))
                .and_then(|node| magic::list(mount, &node, Deadline::after(METADATA_DEADLINE)));
            match names {
                Ok(names) => answer_attribute(reply, &names, size),
                Err(error) => reply.error(mount.failed("attribute list", node.0, None, &error)),
            }
        });
    }
}

/// Block size that `statfs` reports, as the C++ client does.
const STATFS_BLOCK: u64 = 512;
/// Overlayfs refuses every name if all its layers say 0 here.
const MAX_NAME: u32 = 255;

fn answer_attribute(reply: ReplyXattr, value: &[u8], size: u32) {
    if size == 0 {
        reply.size(value.len() as u32);
    } else if value.len() > size as usize {
        reply.error(Errno::ERANGE);
    } else {
        reply.data(value);
    }
}

fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// An error with its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
