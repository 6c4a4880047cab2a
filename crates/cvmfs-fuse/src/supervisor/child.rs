//! Workers and signals as the supervisor sees them: nothing here waits without a limit.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::launch::{Assignment, Report};
use crate::syscall;

/// Longest report of a worker: its settings, which come from files of at most 1 MiB.
const MAX_REPORT: usize = 16 << 20;

/// What somebody wants of the supervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    None,
    End,
    Upgrade,
}

/// The signals of this process as a descriptor.
#[derive(Debug)]
pub(super) struct Signals(OwnedFd);

impl Signals {
    pub(super) fn receive() -> io::Result<Signals> {
        syscall::signal_descriptor().map(Signals)
    }

    /// Waits for a signal.
    pub(super) fn wait(&self, timeout: Duration) -> Wish {
        poll_for(&mut [PollFd::new(&self.0, PollFlags::IN)], timeout);
        self.take()
    }

    /// The descriptor to wait for.
    pub(super) fn as_poll(&self) -> PollFd<'_> {
        PollFd::new(&self.0, PollFlags::IN)
    }

    /// The wish that came, if one did.
    pub(super) fn take(&self) -> Wish {
        // `struct signalfd_siginfo`; its first word is the signal's number.
        let mut info = [0; 128];
        let mut wish = Wish::None;
        while let Ok(128) = rustix::io::read(&self.0, &mut info) {
            let number = u32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
            let is_upgrade = number == libc::SIGHUP.cast_unsigned();
            match wish {
                Wish::End => {}
                _ => wish = if is_upgrade { Wish::Upgrade } else { Wish::End },
            }
        }
        wish
    }
}

/// How a worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Exited(i32),
    Killed(i32),
}

/// A worker process.
#[derive(Debug)]
pub(super) struct Worker {
    child: Child,
    watched: OwnedFd,
    ended: Option<ExitStatus>,
    /// How often the system ended a process of the control group for lack of memory, at the start.
    out_of_memory: Option<u64>,
}

impl Worker {
    pub(super) fn spawn(
        program: &File,
        assignment: &Assignment,
        device: &OwnedFd,
        memory: &OwnedFd,
    ) -> io::Result<Worker> {
        let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
        command
            .arg0(crate::process::shown_name("cvmfs-worker", &assignment.request.process))
            .arg(crate::WORKER_ROLE)
            .arg(&assignment.request.fqrn)
            .arg(device.as_raw_fd().to_string())
            .arg(memory.as_raw_fd().to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let watched = rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
        let watched = match watched {
            Ok(watched) => watched,
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(error.into());
            }
        };
        let mut worker = Worker { child, watched, ended: None, out_of_memory: out_of_memory_kills() };
        let mut line = serde_json::to_vec(assignment)?;
        line.push(b'\n');
        if let Err(error) = worker.tell(&line) {
            worker.kill();
            worker.wait(Duration::from_secs(1));
            return Err(error);
        }
        Ok(worker)
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Lets a worker that waits for the connection go on.
    pub(super) fn release(&mut self) -> io::Result<()> {
        self.tell(b"go\n")
    }

    /// The worker's report; none if it ends, the time is over or a signal comes first.
    pub(super) fn report(&mut self, timeout: Duration, signals: &Signals) -> io::Result<Option<Report>> {
        let end = Instant::now() + timeout;
        let mut text = Vec::new();
        while !text.ends_with(b"\n") && text.len() < MAX_REPORT {
            let Some(output) = self.child.stdout.as_mut() else { return Ok(None) };
            let left = end.saturating_duration_since(Instant::now());
            let mut polled = [PollFd::new(&*output, PollFlags::IN), signals.as_poll()];
            poll_for(&mut polled, left);
            let (is_readable, is_signalled) =
                (!polled[0].revents().is_empty(), !polled[1].revents().is_empty());
            // The signal stays for whoever waits next.
            if is_signalled || left.is_zero() {
                return Ok(None);
            }
            if is_readable {
                let mut part = [0; 8192];
                match output.read(&mut part)? {
                    0 => break,
                    length => text.extend_from_slice(part.get(..length).unwrap_or_default()),
                }
            }
        }
        if text.is_empty() {
            self.wait(Duration::from_secs(1));
            return Ok(None);
        }
        Ok(Some(serde_json::from_slice(&text)?))
    }

    /// Waits until the worker ends, a signal comes or the time is over.
    pub(super) fn wait_or_signal(&mut self, timeout: Duration, signals: &Signals) -> Wish {
        let mut polled = [PollFd::new(&self.watched, PollFlags::IN), signals.as_poll()];
        poll_for(&mut polled, timeout);
        self.collect();
        signals.take()
    }

    /// Waits for the end; false if the time was over first.
    pub(super) fn wait(&mut self, timeout: Duration) -> bool {
        poll_for(&mut [PollFd::new(&self.watched, PollFlags::IN)], timeout);
        self.collect();
        self.is_gone()
    }

    pub(super) fn is_gone(&self) -> bool {
        self.ended.is_some()
    }

    /// How it ended.
    pub(super) fn end(&self) -> End {
        let status = self.ended.unwrap_or_default();
        match (status.code(), status.signal()) {
            (Some(code), _) => End::Exited(code),
            (None, Some(signal)) => End::Killed(signal),
            (None, None) => End::Killed(libc::SIGKILL),
        }
    }

    /// Whether the system may have ended it for lack of memory.
    pub(super) fn was_out_of_memory(&self) -> bool {
        matches!((self.out_of_memory, out_of_memory_kills()), (Some(before), Some(now)) if now > before)
    }

    pub(super) fn kill(&self) {
        self.send(Signal::KILL);
    }

    pub(super) fn abort(&self) {
        // A stopped process does not see it otherwise.
        self.send(Signal::ABORT);
        self.send(Signal::CONT);
    }

    fn send(&self, signal: Signal) {
        let _ = rustix::process::pidfd_send_signal(&self.watched, signal);
    }

    fn tell(&mut self, line: &[u8]) -> io::Result<()> {
        match self.child.stdin.as_mut() {
            Some(input) => input.write_all(line),
            None => Err(io::Error::from(io::ErrorKind::BrokenPipe)),
        }
    }

    fn collect(&mut self) {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().ok().flatten();
        }
    }
}

/// Whether a signal is one that a process causes itself.
pub(super) fn is_crash(signal: i32) -> bool {
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGABRT, libc::SIGSYS, libc::SIGTRAP]
        .contains(&signal)
}

/// How often the system ended a process of our control group (version 2) for lack of memory.
fn out_of_memory_kills() -> Option<u64> {
    let own = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let events = std::fs::read_to_string(format!("/sys/fs/cgroup/{path}/memory.events")).ok()?;
    events.lines().find_map(|line| line.strip_prefix("oom_kill "))?.trim().parse().ok()
}

/// Polls; an interrupted or failed poll counts as nothing to see.
pub(super) fn poll_for(polled: &mut [PollFd<'_>], timeout: Duration) {
    let limit = Timespec {
        tv_sec: timeout.as_secs().min(3600).cast_signed(),
        tv_nsec: i64::from(timeout.subsec_nanos()),
    };
    let _ = poll(polled, Some(&limit));
}
