//! The supervisor: holds `/dev/fuse` and the shared state, mounts, and keeps a worker running.
//!
//! It is single-threaded, opens no network connection and parses nothing but the mount
//! request of its own parent, so that it has no reason to die. When a worker dies or hangs,
//! the kernel is asked to send the requests in flight again and a new worker takes over;
//! readers notice a pause, not an error. Should no worker start for a while, the supervisor
//! answers requests itself, with an error: nobody waits for ever.
//!
//! | signal | effect |
//! |---|---|
//! | TERM, INT | unmount and end, within five seconds; the same if the worker gets one |
//! | HUP | a new worker, of the program and configuration as they are now, takes over |

mod child;
mod device;

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::control;
use crate::launch::{Assignment, MountFlags, MountRequest, Mounted, Prepared, Report, kernel_mount};
use crate::mount_point::lazy_unmount;
use crate::protocol::notify;
use crate::session::widen_readahead;
use crate::shared_state::SharedState;
use crate::syscall;
use crate::test_fault;
use crate::watchdog::{self, Hang, TICK, Watchdog};
use child::{Signals, Wish, Worker};
use device::{answer_left_with_error, answer_with_error};

/// The worker verifies the repository in this time or the mount fails.
const READY_TIMEOUT: Duration = Duration::from_secs(40);
/// A worker that lived this long was healthy: the next death is answered at once.
const HEALTHY: Duration = Duration::from_secs(10);
/// Pause between restarts of a worker that keeps dying, doubled each time up to the maximum.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// The maximum after a worker that had served: its readers get on by each, and a request of which workers die is
/// refused soon.
const LONGEST_PAUSE_IF_SERVED: Duration = Duration::from_millis(320);
/// Time a worker has to end by itself after the unmount that SIGTERM causes.
const END_TIMEOUT: Duration = Duration::from_secs(3);
/// Time for a killed worker to be gone. One that waits for a dead disk is not, but its
/// threads that read the device are.
const DEATH_TIMEOUT: Duration = Duration::from_secs(10);
/// So long callers may wait for a successor; then they get errors until there is one.
const LONGEST_GAP: Duration = Duration::from_secs(30);

/// Entry point of the role.
pub(crate) fn run() -> ExitCode {
    let _ = rustix::thread::set_name(c"cvmfs-supervisor");
    match supervise() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let report = Report::Failed { message: failure.message, exit_code: failure.exit_code };
            let _ = report.send(io::stdout());
            ExitCode::from(failure.exit_code)
        }
    }
}

#[derive(Debug)]
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
    signals: Signals,
    /// The program of the workers: what this process runs, until an upgrade.
    program: File,
    /// Settings of the last worker that was ready.
    last_settings: Option<Vec<(String, String)>>,
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
    let signals = Signals::receive().map_err(Failure::of("cannot receive signals"))?;
    let program = File::open("/proc/self/exe").map_err(Failure::of("cannot open the own program"))?;
    let mut supervisor = Supervisor { request, device, memory, state, signals, program, last_settings: None };
    let upgrade = std::env::current_exe();
    let (worker, mounted) = supervisor.start()?;
    // Only now: below an autofs directory, whoever is outside of the automounter's process group waits for the very
    // mount that is made here.
    syscall::new_session();
    let record = control::record_path(&mounted.fqrn, &mounted.mountpoint);
    control::write_record(&mounted).map_err(Failure::of("cannot write the mount record"))?;
    widen_readahead(&mounted.mountpoint);
    // The parent waits for this line; a parent that has gone is no reason to end.
    let _ = Report::Mounted(mounted).send(io::stdout());
    silence_stdout();
    supervisor.keep_serving(worker, upgrade.ok().as_deref());
    let request = &supervisor.request;
    let _ = std::fs::remove_file(control::socket_path(&request.fqrn, &request.mountpoint));
    let _ = std::fs::remove_file(record);
    Ok(())
}

/// The parent reads until the report ends; later output belongs nowhere.
fn silence_stdout() {
    if let Ok(null) = File::options().write(true).open("/dev/null") {
        let _ = syscall::replace_descriptor(null.as_fd(), io::stdout().as_fd());
    }
}

impl Supervisor {
    /// Starts the first worker, mounts when it is ready, and hands it the connection.
    fn start(&mut self) -> Result<(Worker, Mounted), Failure> {
        let program = self.program.try_clone().map_err(Failure::of("cannot open the own program"))?;
        let mut worker = self.spawn(&program).map_err(Failure::of("cannot start the worker"))?;
        let flags = match self.connect(&mut worker) {
            Ok(flags) => flags,
            Err(failure) => {
                let _ = lazy_unmount_if_mounted(&self.request);
                worker.kill();
                worker.wait(DEATH_TIMEOUT);
                return Err(failure);
            }
        };
        let mounted = Mounted {
            fqrn: self.request.fqrn.clone(),
            mountpoint: self.request.mountpoint.clone(),
            supervisor_pid: std::process::id(),
            control: control::socket_path(&self.request.fqrn, &self.request.mountpoint),
            flags,
        };
        Ok((worker, mounted))
    }

    fn connect(&mut self, worker: &mut Worker) -> Result<MountFlags, Failure> {
        let prepared = self.wait_until_ready(worker)?;
        kernel_mount(self.device.as_fd(), &self.request, prepared.flags).map_err(|error| Failure {
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
        worker.release().map_err(Failure::of("the worker ended early"))?;
        Ok(prepared.flags)
    }

    fn spawn(&self, program: &File) -> io::Result<Worker> {
        let assignment =
            Assignment { request: self.request.clone(), last_settings: self.last_settings.clone() };
        Worker::spawn(program, &assignment, &self.device, &self.memory)
    }

    fn wait_until_ready(&mut self, worker: &mut Worker) -> Result<Prepared, Failure> {
        let failed = |message: &str, exit_code| Failure { message: message.into(), exit_code };
        let report =
            worker.report(READY_TIMEOUT, &self.signals).map_err(Failure::of("cannot wait for the worker"))?;
        match report {
            Some(Report::Ready(prepared)) => {
                self.last_settings = Some(prepared.settings.clone());
                Ok(prepared)
            }
            Some(Report::Failed { message, exit_code }) => Err(Failure { message, exit_code }),
            Some(Report::Mounted(_)) => Err(failed("the worker answered out of turn", 1)),
            None if worker.is_gone() => Err(failed("the worker ended without an answer", 1)),
            None => Err(failed("the worker did not get ready in time", 4)),
        }
    }

    /// Restarts the worker whenever it dies, until the mount is gone or a signal ends it.
    fn keep_serving(&mut self, mut worker: Worker, upgrade: Option<&std::path::Path>) {
        let mut pause = FIRST_PAUSE;
        loop {
            let started = Instant::now();
            match self.watch(&mut worker) {
                Event::Unmounted => return,
                Event::EndAsked => return self.end(worker),
                Event::UpgradeAsked => {
                    worker = self.upgrade(worker, upgrade);
                    continue;
                }
                Event::Died(what) => self.log(&format!("{what}; another worker takes over")),
            }
            pause =
                if started.elapsed() > HEALTHY { FIRST_PAUSE } else { pause.min(LONGEST_PAUSE_IF_SERVED) };
            match self.successor(&mut pause) {
                Some(successor) => worker = successor,
                None => {
                    let _ = lazy_unmount_if_mounted(&self.request);
                    return;
                }
            }
        }
    }

    /// Waits until the worker ends, hangs (and is ended), or somebody wishes something.
    fn watch(&self, worker: &mut Worker) -> Event {
        let mut watchdog = Watchdog::new(test_fault::patience());
        loop {
            match worker.wait_or_signal(TICK, &self.signals) {
                Wish::End => return Event::EndAsked,
                Wish::Upgrade => return Event::UpgradeAsked,
                Wish::None => {}
            }
            if worker.is_gone() {
                return self.autopsy(worker);
            }
            if let Some(hang) = watchdog.look(&self.state)
                && !watchdog::is_traced(worker.pid())
            {
                return self.put_down(worker, &hang);
            }
        }
    }

    /// How the worker ended, and whether the requests it was at are to blame.
    fn autopsy(&self, worker: &Worker) -> Event {
        let at = self.state.occupied();
        let event = match worker.end() {
            child::End::Exited(0) => return Event::Unmounted,
            child::End::Exited(code) => Event::Died(format!("the worker ended with code {code}")),
            child::End::Killed(libc::SIGTERM | libc::SIGINT) => return Event::EndAsked,
            child::End::Killed(signal) => {
                if child::is_crash(signal) || worker.was_out_of_memory() {
                    self.state.suspect(&at);
                }
                Event::Died(format!("the worker was ended by signal {signal}"))
            }
        };
        self.state.clear_worker();
        event
    }

    fn put_down(&self, worker: &mut Worker, hang: &Hang) -> Event {
        self.log(&format!("watchdog: {}; worker {} is ended", hang.what, worker.pid()));
        for line in watchdog::dump(worker.pid(), hang) {
            self.log(&format!("watchdog: {line}"));
        }
        self.state.suspect(&hang.requests);
        // A core dump, where the system makes them, tells more than any log.
        worker.abort();
        if !worker.wait(Duration::from_secs(2)) {
            worker.kill();
            if !worker.wait(DEATH_TIMEOUT) {
                self.log(
                    "the worker does not die (does it wait for a dead disk?); another one goes on without it",
                );
            }
        }
        self.state.clear_worker();
        Event::Died("the worker hung".into())
    }

    /// A worker that has the connection; none if the supervisor shall end.
    fn successor(&mut self, pause: &mut Duration) -> Option<Worker> {
        let gap = Instant::now();
        self.have_requests_repeated();
        loop {
            if self.wait_between(*pause, gap) == Wish::End {
                return None;
            }
            *pause = (*pause * 2).min(LONGEST_PAUSE);
            let attempt = self.program.try_clone().and_then(|program| self.spawn(&program));
            let mut worker = match attempt {
                Ok(worker) => worker,
                Err(error) => {
                    self.log(&format!("cannot start a worker: {error}"));
                    continue;
                }
            };
            match self.wait_until_ready(&mut worker) {
                Ok(_) if worker.release().is_ok() => return Some(worker),
                Ok(_) => {}
                Err(failure) => self.log(&format!("a new worker cannot serve: {}", failure.message)),
            }
            worker.kill();
            worker.wait(DEATH_TIMEOUT);
            if !crate::session::is_open(&self.device) {
                // Unmounted in between.
                return None;
            }
        }
    }

    /// After the death of a worker, before its successor reads: the kernel puts the requests that the dead one held
    /// back into the queue. Where it cannot, the successor has their record.
    fn have_requests_repeated(&self) {
        if crate::session::repeats_requests(&self.state)
            && let Err(error) = notify::resend(&self.device)
        {
            self.log(&format!(
                "requests in flight are lost, their callers wait until the mount ends: {error}"
            ));
        }
    }

    /// Waits while there is no worker. After [`LONGEST_GAP`] requests are answered with an error.
    fn wait_between(&self, pause: Duration, gap: Instant) -> Wish {
        let end = Instant::now() + pause;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let wish = if gap.elapsed() > LONGEST_GAP {
                answer_left_with_error(&self.device, &self.state);
                answer_with_error(&self.device, left, &self.signals)
            } else {
                self.signals.wait(left)
            };
            // A wish for an upgrade is about to be fulfilled.
            if wish == Wish::End || left.is_zero() {
                return wish;
            }
        }
    }

    /// Hands over to a worker of the program as it is now; the old one stays if that cannot serve.
    fn upgrade(&mut self, mut old: Worker, path: Option<&std::path::Path>) -> Worker {
        let newest =
            path.map_or_else(|| self.program.try_clone(), File::open).or_else(|_| self.program.try_clone());
        let prepared = newest.and_then(|program| Ok((self.spawn(&program)?, program)));
        let (mut new, program) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                self.log(&format!("no new worker, the old one stays: {error}"));
                return old;
            }
        };
        if let Err(failure) = self.wait_until_ready(&mut new) {
            self.log(&format!("the new worker cannot serve, the old one stays: {}", failure.message));
            new.kill();
            new.wait(DEATH_TIMEOUT);
            return old;
        }
        old.kill();
        old.wait(DEATH_TIMEOUT);
        self.state.clear_worker();
        self.have_requests_repeated();
        // If it ends now, that is noticed by whoever watches it.
        let _ = new.release();
        self.program = program;
        self.log("a new worker took over on request");
        new
    }

    /// SIGTERM: the mount leaves the tree at once; whoever still uses it has a few seconds.
    fn end(&self, mut worker: Worker) {
        let _ = lazy_unmount_if_mounted(&self.request);
        if !worker.wait(END_TIMEOUT) {
            worker.kill();
            worker.wait(Duration::from_secs(1));
        }
    }

    fn log(&self, message: &str) {
        eprintln!("cvmfs-supervisor: {}: {message}", self.request.fqrn);
    }
}

/// What ends the watch over a worker.
enum Event {
    Unmounted,
    EndAsked,
    UpgradeAsked,
    Died(String),
}

fn lazy_unmount_if_mounted(request: &MountRequest) -> io::Result<()> {
    match lazy_unmount(&request.mountpoint) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        other => other,
    }
}
