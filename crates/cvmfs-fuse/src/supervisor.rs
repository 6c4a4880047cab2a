//! The supervisor: holds `/dev/fuse` and the shared state, mounts, and keeps a worker running.
//!
//! It is single-threaded, opens no network connection and parses nothing but the mount
//! request of its own parent, so that it has no reason to die. When a worker dies, the
//! kernel is asked to send the requests in flight again and a new worker takes over;
//! readers notice a pause, not an error.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::control;
use crate::launch::{MountRequest, Mounted, Report, kernel_mount, lazy_unmount};
use crate::shared_state::SharedState;
use crate::syscall;

/// The worker verifies the repository in this time or the mount fails.
const READY_TIMEOUT: Duration = Duration::from_secs(40);
/// A worker that lived this long was healthy: the next death is answered at once.
const HEALTHY: Duration = Duration::from_secs(10);
/// Pause between restarts of a worker that keeps dying, doubled each time up to the maximum.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Time a worker has to end by itself after the unmount that SIGTERM causes.
const END_TIMEOUT: Duration = Duration::from_secs(4);
/// `FUSE_NOTIFY_RESEND`: length, code, and no request number.
const RESEND: [u32; 4] = [16, 7, 0, 0];

/// Entry point of the role.
pub(crate) fn run() -> ExitCode {
    match supervise() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let report = Report::Failed { message: failure.message, exit_code: failure.exit_code };
            let _ = report.send(io::stdout());
            ExitCode::from(failure.exit_code)
        }
    }
}

struct Failure {
    message: String,
    exit_code: u8,
}

impl Failure {
    fn of(what: &str) -> impl FnOnce(io::Error) -> Failure {
        move |error| Failure { message: format!("{what}: {error}"), exit_code: 1 }
    }
}

struct Supervisor {
    request: MountRequest,
    device: OwnedFd,
    memory: OwnedFd,
    state: SharedState,
    signals: OwnedFd,
}

fn supervise() -> Result<(), Failure> {
    let mut text = Vec::new();
    io::stdin().read_to_end(&mut text).map_err(Failure::of("cannot read the mount request"))?;
    let request: MountRequest = serde_json::from_slice(&text)
        .map_err(|error| Failure { message: format!("bad mount request: {error}"), exit_code: 2 })?;
    crate::process::apply(&request.process, &|problem| {
        eprintln!("cvmfs-supervisor: {}: {problem}", request.fqrn);
    });
    let device = syscall::open_fuse_device().map_err(Failure::of(
        "cannot open /dev/fuse (load the kernel module with `modprobe fuse`, or pass the device to the container)",
    ))?;
    let memory = SharedState::create_memory().map_err(Failure::of("cannot create the mount's state"))?;
    let state = SharedState::map(memory.as_fd()).map_err(Failure::of("cannot map the mount's state"))?;
    let signals = syscall::signal_descriptor().map_err(Failure::of("cannot receive signals"))?;
    let supervisor = Supervisor { request, device, memory, state, signals };
    let (worker, mounted) = supervisor.start()?;
    // Only now: below an autofs directory, whoever is outside of the automounter's process group waits for the very
    // mount that is made here.
    syscall::new_session();
    let record = control::record_path(&mounted.fqrn, &mounted.mountpoint);
    control::write_record(&mounted).map_err(Failure::of("cannot write the mount record"))?;
    // The parent waits for this line; a parent that has gone is no reason to end.
    let _ = Report::Mounted(mounted).send(io::stdout());
    silence_stdout();
    supervisor.keep_serving(worker);
    let _ = std::fs::remove_file(record);
    Ok(())
}

/// The parent reads until the report ends; later output belongs nowhere.
fn silence_stdout() {
    if let Ok(null) = std::fs::File::options().write(true).open("/dev/null") {
        let _ = syscall::replace_descriptor(null.as_fd(), io::stdout().as_fd());
    }
}

impl Supervisor {
    /// Starts the first worker, mounts when it is ready, and hands it the connection.
    fn start(&self) -> Result<(Child, Mounted), Failure> {
        let mut worker = self.spawn_worker().map_err(Failure::of("cannot start the worker"))?;
        let connected = self.connect(&mut worker);
        if let Err(failure) = connected {
            let _ = lazy_unmount_if_mounted(&self.request);
            let _ = worker.kill();
            let _ = worker.wait();
            return Err(failure);
        }
        let mounted = Mounted {
            fqrn: self.request.fqrn.clone(),
            mountpoint: self.request.mountpoint.clone(),
            supervisor_pid: std::process::id(),
            control: control::socket_path(&self.request.fqrn, &self.request.mountpoint),
        };
        Ok((worker, mounted))
    }

    fn connect(&self, worker: &mut Child) -> Result<(), Failure> {
        self.wait_until_ready(worker)?;
        kernel_mount(self.device.as_fd(), &self.request).map_err(|error| Failure {
            message: format!(
                "cannot mount at {}: {error}{}",
                self.request.mountpoint.display(),
                if error.raw_os_error() == Some(libc::EPERM) {
                    " (mounting needs root or CAP_SYS_ADMIN)"
                } else {
                    ""
                }
            ),
            exit_code: 1,
        })?;
        let mut init = vec![0; 1 << 16];
        let length = rustix::io::read(&self.device, &mut init).map_err(|error| Failure {
            message: format!("no INIT from the kernel: {error}"),
            exit_code: 1,
        })?;
        self.state
            .record_init(init.get(..length).unwrap_or_default())
            .map_err(Failure::of("cannot record INIT"))?;
        release_worker(worker).map_err(Failure::of("the worker ended early"))
    }

    fn spawn_worker(&self) -> io::Result<Child> {
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0(crate::process::shown_name("cvmfs-worker", &self.request.process))
            .arg(crate::WORKER_ROLE)
            .arg(&self.request.fqrn)
            .arg(self.device.as_raw_fd().to_string())
            .arg(self.memory.as_raw_fd().to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut worker = command.spawn()?;
        let mut request = serde_json::to_vec(&self.request)?;
        request.push(b'\n');
        if let Some(input) = worker.stdin.as_mut() {
            input.write_all(&request)?;
        }
        Ok(worker)
    }

    fn wait_until_ready(&self, worker: &mut Child) -> Result<(), Failure> {
        let gone = || Failure { message: "the worker ended without an answer".into(), exit_code: 1 };
        let output = worker.stdout.as_mut().ok_or_else(gone)?;
        if !self.readable_within(output, READY_TIMEOUT).map_err(Failure::of("cannot wait for the worker"))? {
            return Err(Failure { message: "the worker did not get ready in time".into(), exit_code: 4 });
        }
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line).map_err(|_| gone())?;
        match serde_json::from_str(&line) {
            Ok(Report::Ready) => Ok(()),
            Ok(Report::Failed { message, exit_code }) => Err(Failure { message, exit_code }),
            _ => Err(gone()),
        }
    }

    /// Waits for the worker's answer; a signal to end counts as none.
    fn readable_within(&self, output: &impl AsFd, timeout: Duration) -> io::Result<bool> {
        let mut polled = [PollFd::new(output, PollFlags::IN), PollFd::new(&self.signals, PollFlags::IN)];
        poll_for(&mut polled, timeout)?;
        Ok(polled[1].revents().is_empty() && !polled[0].revents().is_empty())
    }

    /// Restarts the worker whenever it dies, until the mount is gone or a signal ends it.
    fn keep_serving(&self, mut worker: Child) {
        let mut pause = FIRST_PAUSE;
        loop {
            let started = Instant::now();
            match self.wait_for_end(&mut worker) {
                End::Unmounted => return,
                End::Signal => return self.end(worker),
                End::Died(status) => {
                    eprintln!(
                        "cvmfs-supervisor: {}: worker ended ({status}), starting another",
                        self.request.fqrn
                    );
                }
            }
            if started.elapsed() > HEALTHY {
                pause = FIRST_PAUSE;
            } else {
                std::thread::sleep(pause);
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            // After the death, before the successor reads: the kernel puts the requests that
            // the dead worker held back into the queue. EINVAL: the kernel cannot (before 6.9).
            let resend: Vec<u8> = RESEND.iter().flat_map(|word| word.to_ne_bytes()).collect();
            if let Err(error) = rustix::io::write(&self.device, &resend) {
                eprintln!("cvmfs-supervisor: {}: requests in flight are lost: {error}", self.request.fqrn);
            }
            worker = loop {
                match self.spawn_worker().and_then(|mut worker| release_worker(&mut worker).map(|()| worker))
                {
                    Ok(worker) => break worker,
                    Err(error) => {
                        eprintln!("cvmfs-supervisor: {}: cannot start a worker: {error}", self.request.fqrn);
                        std::thread::sleep(LONGEST_PAUSE);
                    }
                }
            };
        }
    }

    fn wait_for_end(&self, worker: &mut Child) -> End {
        let Ok(watched) = rustix::process::pidfd_open(Pid::from_child(worker), PidfdFlags::empty()) else {
            // Cannot happen for an unreaped child; waiting without signals is still right.
            return End::of(worker.wait());
        };
        loop {
            let mut polled =
                [PollFd::new(&watched, PollFlags::IN), PollFd::new(&self.signals, PollFlags::IN)];
            let _ = poll(&mut polled, None);
            if !polled[0].revents().is_empty() {
                return End::of(worker.wait());
            }
            if !polled[1].revents().is_empty() {
                return End::Signal;
            }
        }
    }

    /// SIGTERM: the mount leaves the tree at once; whoever still uses it has a few seconds.
    fn end(&self, mut worker: Child) {
        let _ = lazy_unmount_if_mounted(&self.request);
        let end = Instant::now() + END_TIMEOUT;
        while Instant::now() < end {
            if matches!(worker.try_wait(), Ok(Some(_)) | Err(_)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = rustix::process::kill_process(Pid::from_child(&worker), Signal::KILL);
        let _ = worker.wait();
    }
}

enum End {
    Unmounted,
    Died(String),
    Signal,
}

impl End {
    fn of(status: io::Result<std::process::ExitStatus>) -> End {
        match status {
            Ok(status) if status.success() => End::Unmounted,
            Ok(status) => End::Died(status.to_string()),
            Err(error) => End::Died(error.to_string()),
        }
    }
}

/// Lets a worker that waits for the connection go on.
fn release_worker(worker: &mut Child) -> io::Result<()> {
    match worker.stdin.as_mut() {
        Some(input) => input.write_all(b"go\n"),
        None => Err(io::Error::from(io::ErrorKind::BrokenPipe)),
    }
}

fn lazy_unmount_if_mounted(request: &MountRequest) -> io::Result<()> {
    match lazy_unmount(&request.mountpoint) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        other => other,
    }
}

fn poll_for(polled: &mut [PollFd<'_>], timeout: Duration) -> io::Result<()> {
    let limit = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
    loop {
        match poll(polled, Some(&limit)) {
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => return Ok(()),
        }
    }
}
