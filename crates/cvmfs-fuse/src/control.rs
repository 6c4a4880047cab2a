//! The control socket of a mount: one command per connection, answered and closed
//! (client behaviour §12), and the records by which mounts are found.
//!
//! Everything here works without touching the mount, and answers within its time limit
//! whatever the mount does.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use cvmfs_client::repository::Refreshed;
use serde::{Deserialize, Serialize};

use crate::filesystem::{Mount, chain};
use crate::launch::{MountRequest, Mounted, run_directory};

/// Longest command; the stock tools send less than a hundred bytes.
const MAX_COMMAND: usize = 4096;
/// Largest answer a caller reads.
const MAX_ANSWER: u64 = 16 << 20;
/// Connections served at a time; a caller beyond that is turned away at once.
const MAX_CONNECTIONS: usize = 32;
/// Time for a command to arrive, and for `status` to be answered.
const PROMPT: Duration = Duration::from_secs(2);

/// State of a mount, with the keys of the command-line contract.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    /// Name of the repository.
    pub fqrn: String,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// The worker.
    pub pid: u32,
    /// Revision in use.
    pub revision: u64,
    /// Root catalog in use.
    pub root_hash: String,
    /// Whether the last look for a newer revision reached a server.
    pub online: bool,
    /// Server in use.
    pub host: String,
    /// Proxy in use, or `DIRECT`.
    pub proxy: String,
    /// Bytes in the cache.
    pub cache_used: u64,
    /// Bytes the cache may have.
    pub cache_limit: u64,
    /// HTTP requests sent.
    pub requests: u64,
    /// Bytes received.
    pub bytes_fetched: u64,
    /// Objects found in the cache.
    pub cache_hits: u64,
    /// Objects that had to be fetched.
    pub cache_misses: u64,
    /// Whether the kernel reads cache files itself.
    pub passthrough: bool,
    /// Whether whiteout markers are presented as overlayfs understands them.
    pub layer_view: bool,
    /// Files open now.
    pub open_files: usize,
    /// Attached catalogs.
    pub catalogs: usize,
    /// Requests that failed with an I/O error.
    pub io_errors: u64,
    /// Workers started since the mount; more than one means that some died.
    pub workers: u64,
    /// Requests that were answered by another worker than the one that received them.
    pub repeated_requests: u64,
    /// Unix time at which the whitelist expires, if it was read by this worker.
    pub whitelist_expires: Option<i64>,
    /// What is wrong now, in words.
    pub errors: Vec<String>,
}

/// Path of the control socket of a mount.
pub(crate) fn socket_path(fqrn: &str, mountpoint: &Path) -> PathBuf {
    base_path(fqrn, mountpoint, "sock")
}

/// Path of the record of a mount.
pub(crate) fn record_path(fqrn: &str, mountpoint: &Path) -> PathBuf {
    base_path(fqrn, mountpoint, "json")
}

/// Path of a mount's log file.
pub(crate) fn log_path(fqrn: &str, mountpoint: &Path) -> PathBuf {
    base_path(fqrn, mountpoint, "log")
}

/// Socket paths are limited to 107 bytes, so the mount point is hashed and the name cut.
fn base_path(fqrn: &str, mountpoint: &Path, extension: &str) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    let hash = cvmfs_format::PathHash::of(mountpoint.as_os_str().as_bytes());
    let short: String = fqrn.chars().take(48).collect();
    run_directory().join(format!("{short}.{:016x}.{extension}", hash.part1))
}

/// Writes the record of a mount, atomically.
pub(crate) fn write_record(mounted: &Mounted) -> io::Result<()> {
    let path = record_path(&mounted.fqrn, &mounted.mountpoint);
    let temporary = path.with_extension("new");
    fs::write(&temporary, serde_json::to_vec_pretty(mounted)?)?;
    fs::rename(temporary, path)
}

/// The mounts of this user whose supervisors live. Records of dead ones are removed.
pub fn records() -> Vec<Mounted> {
    let mut found = Vec::new();
    let Ok(directory) = fs::read_dir(run_directory()) else { return found };
    for entry in directory.flatten() {
        let path = entry.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let Ok(record) = fs::read(&path)
            .map_err(drop)
            .and_then(|text| serde_json::from_slice::<Mounted>(&text).map_err(drop))
        else {
            continue;
        };
        if is_supervisor(record.supervisor_pid) {
            found.push(record);
        } else {
            let _ = fs::remove_file(&path);
            let _ = fs::remove_file(&record.control);
        }
    }
    found.sort_by(|one, other| (&one.fqrn, &one.mountpoint).cmp(&(&other.fqrn, &other.mountpoint)));
    found
}

/// Whether the process is a supervisor of ours: a pid alone may have been used again.
fn is_supervisor(pid: u32) -> bool {
    fs::read(format!("/proc/{pid}/cmdline"))
        .is_ok_and(|line| line.split(|byte| *byte == 0).nth(1) == Some(crate::SUPERVISOR_ROLE.as_bytes()))
}

/// Whether somebody answers at the socket.
pub(crate) fn ping(control: &Path, timeout: Duration) -> bool {
    ask(control, "ping", timeout).is_ok_and(|answer| answer == b"pong\n")
}

/// The state of the mount behind a control socket. Answers within 2 seconds.
///
/// # Errors
/// If nobody answers there, or not in time.
pub fn status(control: &Path) -> io::Result<Status> {
    let answer = ask(control, "status json", PROMPT)?;
    Ok(serde_json::from_slice(&answer)?)
}

/// Has the mount behind a control socket look for a newer revision now; returns the
/// revision in use afterwards.
///
/// # Errors
/// If nobody answers in time, or the look failed: the text says why.
pub fn refresh(control: &Path, timeout: Duration) -> io::Result<u64> {
    let answer = ask(control, "refresh", timeout)?;
    let text = String::from_utf8_lossy(&answer);
    text.trim().parse().map_err(|_| io::Error::other(text.trim().to_owned()))
}

/// Sends a command and returns the answer.
///
/// # Errors
/// If nobody answers there within `timeout`.
pub fn ask(control: &Path, command: &str, timeout: Duration) -> io::Result<Vec<u8>> {
    let mut stream = UnixStream::connect(control)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    stream.write_all(command.as_bytes())?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER).read_to_end(&mut answer)?;
    Ok(answer)
}

/// Answers commands on the mount's control socket from a thread of its own.
pub(crate) fn serve(request: &MountRequest, mount: &Arc<Mount>, device: OwnedFd) -> io::Result<()> {
    let path = socket_path(&request.fqrn, &request.mountpoint);
    // A predecessor's socket: nobody listens there any more.
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    let mount = mount.clone();
    let device = Arc::new(device);
    let mountpoint = request.mountpoint.clone();
    let busy = Arc::new(AtomicUsize::new(0));
    std::thread::Builder::new().name("cvmfs-control".into()).spawn(move || {
        for stream in listener.incoming().flatten() {
            if busy.fetch_add(1, Ordering::SeqCst) >= MAX_CONNECTIONS {
                busy.fetch_sub(1, Ordering::SeqCst);
                continue;
            }
            let (mount, device, mountpoint) = (mount.clone(), device.clone(), mountpoint.clone());
            let guard = busy.clone();
            let answering = std::thread::Builder::new().name("cvmfs-answer".into()).spawn(move || {
                let _ = converse(stream, &mount, &device, &mountpoint);
                guard.fetch_sub(1, Ordering::SeqCst);
            });
            if answering.is_err() {
                busy.fetch_sub(1, Ordering::SeqCst);
            }
        }
    })?;
    Ok(())
}

/// Removes the socket of a mount that is gone.
pub(crate) fn forget(request: &MountRequest) {
    let _ = fs::remove_file(socket_path(&request.fqrn, &request.mountpoint));
}

fn converse(mut stream: UnixStream, mount: &Mount, device: &OwnedFd, mountpoint: &Path) -> io::Result<()> {
    stream.set_read_timeout(Some(PROMPT))?;
    stream.set_write_timeout(Some(PROMPT))?;
    let mut command = [0; MAX_COMMAND];
    let length = stream.read(&mut command)?;
    let text = String::from_utf8_lossy(command.get(..length).unwrap_or_default());
    let command = text.trim_end_matches(['\0', '\n', '\r']).trim();
    let mut answer = answer(command, mount, device, mountpoint);
    if !answer.ends_with('\n') {
        answer.push('\n');
    }
    stream.write_all(answer.as_bytes())
}

fn answer(command: &str, mount: &Mount, device: &OwnedFd, mountpoint: &Path) -> String {
    let repository = mount.view.repository();
    match command {
        "ping" => "pong".into(),
        "status json" => serde_json::to_string(&state_of(mount, mountpoint)).unwrap_or_default(),
        "refresh" => match crate::worker::refresh(mount, device) {
            Ok(_) => repository.snapshot().pinned().revision.to_string(),
            Err(error) => chain(&error),
        },
        "remount" | "remount sync" => match crate::worker::refresh(mount, device) {
            Ok(Refreshed::UpToDate) => "Catalog up to date".into(),
            Ok(Refreshed::Updated) => "New revision applied".into(),
            Err(error) => {
                tracing::warn!(error = %chain(&error), "remount on request failed");
                "Failed".into()
            }
        },
        "revision" => repository.snapshot().pinned().revision.to_string(),
        "mountpoint" => mountpoint.display().to_string(),
        "pid" => std::process::id().to_string(),
        "version" => env!("CARGO_PKG_VERSION").into(),
        "cache size" => {
            let used = repository.store().cache_usage().used;
            format!("Current cache size is {}MB ({used} Bytes), pinned: 0MB (0 Bytes)", used >> 20)
        }
        "open catalogs" => {
            let attached = repository.snapshot().attached();
            let lines = attached.iter().map(|catalog| {
                format!(
                    "/{} {}\n",
                    String::from_utf8_lossy(catalog.mountpoint()).trim_start_matches('/'),
                    catalog.hash()
                )
            });
            lines.collect()
        }
        _ => "unknown command".into(),
    }
}

fn state_of(mount: &Mount, mountpoint: &Path) -> Status {
    let repository = mount.view.repository();
    let known = repository.status();
    let network = repository.store().status();
    let traffic = repository.store().counters();
    let cache = repository.store().cache_usage();
    Status {
        fqrn: known.fqrn,
        mountpoint: mountpoint.to_owned(),
        pid: std::process::id(),
        revision: known.revision,
        root_hash: known.root_hash,
        online: known.online,
        host: network.host,
        proxy: network.proxy,
        cache_used: cache.used,
        cache_limit: cache.limit,
        requests: traffic.requests,
        bytes_fetched: traffic.bytes_fetched,
        cache_hits: traffic.cache_hits,
        cache_misses: traffic.cache_misses,
        passthrough: mount.content.is_passthrough(),
        layer_view: mount.view.is_layer_view(),
        open_files: mount.content.open_files(),
        catalogs: repository.snapshot().attached().len(),
        io_errors: mount.io_errors.load(Ordering::Relaxed),
        workers: mount.state.workers(),
        repeated_requests: mount.state.repeated(),
        whitelist_expires: known.whitelist_expires,
        errors: known.last_error.into_iter().collect(),
    }
}
