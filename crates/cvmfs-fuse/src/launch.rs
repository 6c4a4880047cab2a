//! Mounting from another process' point of view: start the supervisor, wait for the root
//! directory to answer, unmount, ask whether a mount lives.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use cvmfs_client::config::{ConfigSources, ProcessSettings};
use serde::{Deserialize, Serialize};

use crate::mount_point::{check, in_words, lazy_unmount, ours_at};
use crate::{control, users};

/// What to mount, and how. Crosses process boundaries as JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MountRequest {
    /// Name of the repository.
    pub fqrn: String,
    /// An existing directory.
    pub mountpoint: PathBuf,
    /// Where the client's configuration comes from.
    #[serde(with = "sources_as_json")]
    pub sources: ConfigSources,
    /// Present whiteout markers as overlayfs understands them (layer view).
    pub layer_view: bool,
    /// Let users other than the one who mounts use it.
    pub allow_other: bool,
    /// Honour set-uid bits and device nodes. Container layers need both.
    pub suid_and_devices: bool,
    /// Filter of the worker's log, e.g. `info`.
    pub log_level: String,
    /// Whether log lines are JSON.
    pub log_json: bool,
    /// Log file, bounded in size; standard error if none is given.
    pub log_file: Option<PathBuf>,
    /// Confine the worker's access to files, where the kernel can.
    #[serde(default)]
    pub confined: bool,
    /// Limits and placement of the processes.
    #[serde(default)]
    pub process: ProcessSettings,
}

/// `ConfigSources` belongs to the client crate, which does not serialise it.
mod sources_as_json {
    use std::path::PathBuf;

    use cvmfs_client::config::ConfigSources;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    struct Wire {
        directory: PathBuf,
        files: Option<Vec<PathBuf>>,
        overrides: Vec<(String, String)>,
    }

    pub(super) fn serialize<S: Serializer>(
        sources: &ConfigSources,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        Wire {
            directory: sources.directory.clone(),
            files: sources.files.clone(),
            overrides: sources.overrides.clone(),
        }
        .serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ConfigSources, D::Error> {
        let wire = Wire::deserialize(deserializer)?;
        Ok(ConfigSources { directory: wire.directory, files: wire.files, overrides: wire.overrides })
    }
}

/// A mount that works.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct Mounted {
    /// Name of the repository.
    pub fqrn: String,
    /// Absolute path of the mount.
    pub mountpoint: PathBuf,
    /// The process that holds the mount.
    pub supervisor_pid: u32,
    /// Control socket of the worker.
    pub control: PathBuf,
    /// What the configuration says about the flags of the mount.
    #[serde(default)]
    pub flags: MountFlags,
}

/// Why a mount or unmount failed.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The mount point is not a directory.
    #[error("{}: {reason}", mountpoint.display())]
    Mountpoint {
        /// The path given.
        mountpoint: PathBuf,
        /// What is wrong with it, and the next step.
        reason: String,
    },
    /// The client refused or failed: configuration, network, trust.
    #[error("{fqrn}: {message}")]
    Client {
        /// Name of the repository.
        fqrn: String,
        /// The client's message with its causes.
        message: String,
        /// Exit code that belongs to it (command-line contract).
        exit_code: u8,
    },
    /// The client did not answer in time.
    #[error("{fqrn}: no answer within {} seconds", timeout.as_secs())]
    Timeout {
        /// Name of the repository.
        fqrn: String,
        /// The time it had.
        timeout: Duration,
    },
    /// The mount is in use.
    #[error(
        "{} is in use {users}; end them, or unmount with --lazy: it disappears now and ends with its last user",
        mountpoint.display()
    )]
    Busy {
        /// The mount point.
        mountpoint: PathBuf,
        /// Who uses it, in words.
        users: String,
    },
    /// A system call failed.
    #[error("{what}")]
    System {
        /// What was attempted.
        what: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl MountError {
    /// Exit code of the command-line contract: 3 trust, 4 network, 5 not found, 6 out of space, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            MountError::Client { exit_code, .. } => *exit_code,
            MountError::Timeout { .. } => 4,
            MountError::Mountpoint { .. } | MountError::Busy { .. } | MountError::System { .. } => 1,
        }
    }

    pub(crate) fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> MountError {
        let what = what.into();
        |source| MountError::System { what, source }
    }
}

/// How a worker wants its repository mounted, and by which settings.
#[derive(Debug, Clone, Default, Serialize, Deserialize, PartialEq, Eq)]
pub(crate) struct Prepared {
    pub(crate) flags: MountFlags,
    /// All settings in effect. A successor uses them if the configuration cannot be read any more.
    pub(crate) settings: Vec<(String, String)>,
}

/// What the configuration says about the flags of a mount.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, PartialEq, Eq)]
pub struct MountFlags {
    /// The kernel checks permissions.
    pub check_permissions: bool,
    /// Set-uid bits are honoured.
    pub suid: bool,
    /// Writable by its flags; writes fail nevertheless.
    pub writable: bool,
}

/// What a supervisor tells a new worker, one JSON line.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Assignment {
    pub(crate) request: MountRequest,
    /// The settings of its predecessor.
    pub(crate) last_settings: Option<Vec<(String, String)>>,
}

/// What supervisor and worker report to the process that started them, one JSON line.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Report {
    /// The worker verified the repository and can serve it.
    Ready(Prepared),
    /// The mount answers.
    Mounted(Mounted),
    /// Nothing is mounted.
    Failed {
        /// Message with causes.
        message: String,
        /// Exit code that belongs to it.
        exit_code: u8,
    },
}

impl Report {
    pub(crate) fn send(&self, mut to: impl Write) -> io::Result<()> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        to.write_all(&line)?;
        to.flush()
    }
}

/// File system type in mountinfo; tools recognise CernVM-FS by it.
pub(crate) const FILE_SYSTEM_TYPE: &str = "fuse.cvmfs";

/// Where control sockets, mount records and logs lie: below `/run` for root, else in the
/// user's runtime directory.
pub fn run_directory() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return PathBuf::from("/run/cvmfs-client");
    }
    let base = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    base.join("cvmfs-client")
}

/// Mounts a repository: starts its supervisor and returns when the root directory answers.
///
/// The processes go on in the background, in a session of their own. A mount point that
/// is still occupied by a dead mount of ours is freed first; one that is in use is refused.
///
/// # Errors
/// See [`MountError`]. On an error nothing is mounted.
pub fn mount(request: &MountRequest, timeout: Duration) -> Result<Mounted, MountError> {
    let end = Instant::now() + timeout;
    let mountpoint = check(&request.mountpoint)?;
    let request = MountRequest { mountpoint, ..request.clone() };
    create_run_directory()?;
    control::forget_old_logs();
    let mut supervisor = start_supervisor(&request)?;
    let report = supervisor.stdout.take();
    let input = supervisor.stdin.take();
    if let Some(mut input) = input {
        let text = serde_json::to_vec(&request).map_err(|error| MountError::System {
            what: "cannot encode the mount request".into(),
            source: error.into(),
        })?;
        input.write_all(&text).map_err(MountError::system("cannot reach the supervisor"))?;
    }
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut line = String::new();
        if let Some(report) = report {
            let _ = BufReader::new(report).read_line(&mut line);
        }
        let _ = sender.send(line);
    });
    let remaining = end.saturating_duration_since(Instant::now());
    let line = receiver.recv_timeout(remaining);
    let failed =
        |message: String, exit_code| MountError::Client { fqrn: request.fqrn.clone(), message, exit_code };
    let outcome = match line.ok().map(|line| serde_json::from_str::<Report>(&line)) {
        Some(Ok(Report::Mounted(mounted))) => wait_for_root(&mounted, end).map(|()| mounted),
        Some(Ok(Report::Failed { message, exit_code })) => Err(failed(message, exit_code)),
        Some(_) => Err(failed("the client ended without an answer; its log tells why".into(), 1)),
        None => Err(MountError::Timeout { fqrn: request.fqrn.clone(), timeout }),
    };
    if outcome.is_err() {
        // Its pid is ours until waited for, so the signal cannot hit another process.
        let _ = rustix::process::kill_process(
            rustix::process::Pid::from_child(&supervisor),
            rustix::process::Signal::TERM,
        );
    }
    // Collected by a thread: the supervisor lives as long as the mount.
    std::thread::spawn(move || {
        let _ = supervisor.wait();
    });
    outcome
}

fn start_supervisor(request: &MountRequest) -> Result<std::process::Child, MountError> {
    let errors = match &request.log_file {
        None => Stdio::inherit(),
        Some(path) => {
            let file = File::options().create(true).append(true).mode(0o600).open(path);
            file.map_err(MountError::system(format!("cannot open the log file {}", path.display())))?.into()
        }
    };
    Command::new("/proc/self/exe")
        .arg0(crate::process::shown_name("cvmfs-supervisor", &request.process))
        .arg(crate::SUPERVISOR_ROLE)
        .arg(&request.fqrn)
        .arg(&request.mountpoint)
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(errors)
        .spawn()
        .map_err(MountError::system("cannot start the supervisor"))
}

/// A FUSE root that the kernel cannot ask would hold the caller, so a thread asks.
fn wait_for_root(mounted: &Mounted, end: Instant) -> Result<(), MountError> {
    let (sender, receiver) = mpsc::channel();
    let mountpoint = mounted.mountpoint.clone();
    std::thread::spawn(move || {
        let _ = sender.send(fs::metadata(mountpoint));
    });
    match receiver.recv_timeout(end.saturating_duration_since(Instant::now())) {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(source)) => {
            let what = format!("{}: the mounted root does not answer", mounted.mountpoint.display());
            Err(MountError::System { what, source })
        }
        Err(_) => Err(MountError::Timeout { fqrn: mounted.fqrn.clone(), timeout: Duration::ZERO }),
    }
}

/// Makes a mount that runs already visible in this mount namespace too: the kernel attaches the same connection.
///
/// # Errors
/// If the supervisor's descriptor cannot be taken over, which needs its privileges, or the kernel refuses.
pub(crate) fn attach(running: &Mounted, request: &MountRequest) -> Result<(), MountError> {
    let failed = || MountError::system(format!("cannot attach to the running mount of {}", running.fqrn));
    let device = connection_of(running.supervisor_pid).map_err(failed())?;
    kernel_mount(device.as_fd(), request, running.flags).map_err(failed())
}

/// A duplicate of the descriptor by which a supervisor holds its connection.
fn connection_of(supervisor: u32) -> io::Result<OwnedFd> {
    use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
    let gone = || io::Error::from(io::ErrorKind::NotFound);
    let mut numbers = fs::read_dir(format!("/proc/{supervisor}/fd"))?.flatten().filter_map(|entry| {
        let is_device = fs::read_link(entry.path()).is_ok_and(|target| target == Path::new("/dev/fuse"));
        is_device.then(|| entry.file_name().to_str()?.parse().ok()).flatten()
    });
    let number = numbers.next().ok_or_else(gone)?;
    let process = Pid::from_raw(supervisor.cast_signed()).ok_or_else(gone)?;
    let process = pidfd_open(process, PidfdFlags::empty())?;
    Ok(pidfd_getfd(process, number, PidfdGetfdFlags::empty())?)
}

/// Mounts the connection behind `device` as request and configuration say.
pub(crate) fn kernel_mount(
    device: BorrowedFd<'_>,
    request: &MountRequest,
    configured: MountFlags,
) -> io::Result<()> {
    let mut flags = 0;
    if !configured.writable {
        flags |= libc::MS_RDONLY;
    }
    if !request.suid_and_devices {
        flags |= libc::MS_NODEV;
    }
    if !request.suid_and_devices && !configured.suid {
        flags |= libc::MS_NOSUID;
    }
    let mut options = format!(
        "rootmode=40000,user_id={},group_id={}",
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw()
    );
    if configured.check_permissions {
        options.push_str(",default_permissions");
    }
    if request.allow_other {
        options.push_str(",allow_other");
    }
    crate::syscall::mount_fuse(device, &request.fqrn, &request.mountpoint, flags, &options)
}

/// Creates the run directory, private to its owner.
pub(crate) fn create_run_directory() -> Result<(), MountError> {
    let directory = run_directory();
    let what = format!("cannot use the run directory {}", directory.display());
    match fs::DirBuilder::new().mode(0o700).recursive(true).create(&directory) {
        Ok(()) => {}
        Err(source) => return Err(MountError::System { what, source }),
    }
    let metadata = fs::metadata(&directory).map_err(MountError::system(what.clone()))?;
    if metadata.uid() != rustix::process::geteuid().as_raw() {
        let source = io::Error::new(io::ErrorKind::PermissionDenied, "it belongs to another user");
        return Err(MountError::System { what, source });
    }
    Ok(())
}

/// Unmounts. A mount that is still in use disappears from the tree at once and ends when
/// its last user does.
///
/// # Errors
/// If nothing of ours is mounted there or the kernel refuses.
pub fn unmount(mountpoint: &Path) -> Result<(), MountError> {
    let (target, _) = ours_at(mountpoint)?;
    lazy_unmount(&target).map_err(MountError::system(format!("cannot unmount {}", target.display())))
}

/// Unmounts if nobody uses the mount.
///
/// # Errors
/// [`MountError::Busy`] with the processes that use it; else as [`unmount`].
pub fn unmount_unused(mountpoint: &Path) -> Result<(), MountError> {
    use rustix::mount::UnmountFlags;
    let (target, entry) = ours_at(mountpoint)?;
    match rustix::mount::unmount(&target, UnmountFlags::NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::BUSY) => {
            let users = users::of(&target, Some(&entry.device));
            Err(MountError::Busy { mountpoint: target, users: in_words(&users) })
        }
        Err(error) => Err(MountError::system(format!("cannot unmount {}", target.display()))(error.into())),
    }
}

/// Whether a worker serves the repository at this mount point. Asks the control socket, never the mount.
pub fn is_alive(fqrn: &str, mountpoint: &Path) -> bool {
    control::ping(&control::socket_path(fqrn, mountpoint), Duration::from_secs(2))
}
