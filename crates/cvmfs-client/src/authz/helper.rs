//! The authorisation helper: an external program that answers one question after the other.
//!
//! It lives on a thread of its own, which starts it at the first question, speaks with it and ends it with the
//! repository. A helper that breaks the protocol or does not answer in time is killed; for [`RESTART_PAUSE`] all
//! questions are answered with the reason, then it is started again.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::frame::{self, FrameError, HEADER};
use super::{Answer, AuthorizationSettings, Caller, Denial};

use crate::deadline::Deadline;

/// Longest wait for one answer. A helper looks at files and processes of its own machine.
pub(super) const ANSWER_PATIENCE: Duration = Duration::from_secs(10);
/// Longest wait for a helper to end after it was asked to.
const QUIT_PATIENCE: Duration = Duration::from_secs(1);
/// Time during which a helper that failed is not started again.
const RESTART_PAUSE: Duration = Duration::from_secs(10);
/// Questions that wait; more come only from a storm of sessions, which are denied and ask again.
const MAX_WAITING: usize = 256;

/// What the helper is asked.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) caller: Caller,
    pub(super) membership: Vec<u8>,
}

struct Job {
    question: Question,
    deadline: Deadline,
    reply: SyncSender<Result<Answer, Denial>>,
}

/// The way to the helper. Dropping it ends the helper.
#[derive(Debug)]
pub(super) struct Helper {
    jobs: SyncSender<Job>,
}

impl Helper {
    /// Prepares the helper `program`; it is started by the first question.
    pub(super) fn new(fqrn: &str, program: &Path, settings: &AuthorizationSettings) -> io::Result<Self> {
        let (jobs, receiver) = sync_channel(MAX_WAITING);
        let mut keeper = Keeper {
            fqrn: fqrn.to_owned(),
            program: program.to_owned(),
            settings: settings.clone(),
            process: None,
            failed: None,
        };
        std::thread::Builder::new().name("cvmfs-authz".to_owned()).spawn(move || keeper.run(&receiver))?;
        Ok(Self { jobs })
    }

    /// The helper's answer. An answer that comes too late is lost: who asks again, asks the helper again.
    pub(super) fn ask(&self, question: Question, deadline: Deadline) -> Result<Answer, Denial> {
        let deadline = deadline.at_most(ANSWER_PATIENCE);
        let (reply, answer) = sync_channel(1);
        self.jobs.try_send(Job { question, deadline, reply }).map_err(|error| match error {
            TrySendError::Full(_) => Denial::NoHelper("too many questions are waiting for it".to_owned()),
            TrySendError::Disconnected(_) => Denial::NoHelper("it has ended".to_owned()),
        })?;
        match answer.recv_timeout(deadline.remaining()) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Timeout) => Err(Denial::NoHelper("it does not answer in time".to_owned())),
            Err(RecvTimeoutError::Disconnected) => Err(Denial::NoHelper("it has ended".to_owned())),
        }
    }
}

/// What the helper's thread owns.
struct Keeper {
    fqrn: String,
    program: PathBuf,
    settings: AuthorizationSettings,
    process: Option<Process>,
    failed: Option<(Instant, String)>,
}

impl Keeper {
    fn run(&mut self, jobs: &Receiver<Job>) {
        while let Ok(job) = jobs.recv() {
            if job.deadline.is_over() {
                continue;
            }
            let answer = self.answer(&job);
            // Whoever asked may have left.
            let _ = job.reply.send(answer);
        }
        if let Some(process) = self.process.take() {
            process.quit();
        }
    }

    fn answer(&mut self, job: &Job) -> Result<Answer, Denial> {
        if let Some((when, reason)) = &self.failed
            && when.elapsed() < RESTART_PAUSE
        {
            return Err(Denial::NoHelper(reason.clone()));
        }
        match self.converse(job) {
            Ok(answer) => {
                self.failed = None;
                Ok(answer)
            }
            Err(error) => {
                let reason = format!("{}: {error}", self.program.display());
                tracing::error!(
                    fqrn = self.fqrn,
                    error = reason,
                    "authorisation helper failed; access is denied"
                );
                self.process = None;
                self.failed = Some((Instant::now(), reason.clone()));
                Err(Denial::NoHelper(reason))
            }
        }
    }

    fn converse(&mut self, job: &Job) -> Result<Answer, HelperError> {
        let process = match &mut self.process {
            Some(process) => process,
            slot => {
                let mut process = Process::start(&self.program, &self.settings)?;
                // Not the caller's deadline: a helper that starts slowly serves the next caller.
                let deadline = Deadline::after(ANSWER_PATIENCE);
                process.send(&frame::handshake(&self.fqrn, &self.settings), deadline)?;
                frame::ready(&process.receive(deadline)?)?;
                tracing::info!(fqrn = self.fqrn, helper = %self.program.display(), "authorisation helper is ready");
                slot.insert(process)
            }
        };
        // Also here: a helper that is killed for one impatient caller would fail the others.
        let deadline = Deadline::after(ANSWER_PATIENCE);
        process.send(&frame::verify(&job.question), deadline)?;
        Ok(frame::permit(&process.receive(deadline)?)?)
    }
}

#[derive(Debug, thiserror::Error)]
enum HelperError {
    #[error("cannot be started: {0}")]
    Start(io::Error),
    #[error("does not answer within {} seconds", ANSWER_PATIENCE.as_secs())]
    Silent,
    #[error("has ended")]
    Ended,
    #[error("cannot be spoken with: {0}")]
    Pipe(#[from] io::Error),
    #[error("breaks the protocol: {0}")]
    Protocol(#[from] FrameError),
}

/// A running helper; killed when dropped.
struct Process {
    child: Child,
    input: ChildStdin,
    output: ChildStdout,
}

impl Process {
    fn start(program: &Path, settings: &AuthorizationSettings) -> Result<Self, HelperError> {
        let mut child = Command::new(program)
            .env_clear()
            .envs(settings.environment.iter().map(|(name, value)| (name, value)))
            .env("CVMFS_AUTHZ_HELPER", "yes")
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(HelperError::Start)?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(HelperError::Ended);
        };
        let process = Self { child, input, output };
        for pipe in [process.input.as_fd(), process.output.as_fd()] {
            let flags = fcntl_getfl(pipe).map_err(io::Error::from)?;
            fcntl_setfl(pipe, flags | OFlags::NONBLOCK).map_err(io::Error::from)?;
        }
        Ok(process)
    }

    fn send(&mut self, mut bytes: &[u8], deadline: Deadline) -> Result<(), HelperError> {
        while !bytes.is_empty() {
            match self.input.write(bytes) {
                Ok(0) => return Err(HelperError::Ended),
                Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Err(HelperError::Ended),
                Err(error) => wait_for(self.input.as_fd(), PollFlags::OUT, error, deadline)?,
            }
        }
        Ok(())
    }

    fn receive(&mut self, deadline: Deadline) -> Result<Vec<u8>, HelperError> {
        let mut header = [0; HEADER];
        self.fill(&mut header, deadline)?;
        let mut body = vec![0; frame::body_length(header)?];
        self.fill(&mut body, deadline)?;
        Ok(body)
    }

    fn fill(&mut self, mut room: &mut [u8], deadline: Deadline) -> Result<(), HelperError> {
        while !room.is_empty() {
            match self.output.read(room) {
                Ok(0) => return Err(HelperError::Ended),
                Ok(read) => room = room.get_mut(read..).unwrap_or_default(),
                Err(error) => wait_for(self.output.as_fd(), PollFlags::IN, error, deadline)?,
            }
        }
        Ok(())
    }

    /// Asks it to end, waits a moment, and ends it otherwise.
    fn quit(mut self) {
        let deadline = Deadline::after(QUIT_PATIENCE);
        if self.send(&frame::quit(), deadline).is_ok() {
            // Its output ends with it.
            let mut rest = [0; 64];
            while self.fill(&mut rest, deadline).is_ok() {}
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until the pipe is ready after `error` said that it was not.
fn wait_for(
    pipe: BorrowedFd<'_>,
    events: PollFlags,
    error: io::Error,
    deadline: Deadline,
) -> Result<(), HelperError> {
    match error.kind() {
        io::ErrorKind::Interrupted => return Ok(()),
        io::ErrorKind::WouldBlock => {}
        _ => return Err(error.into()),
    }
    let left = deadline.remaining();
    if left.is_zero() {
        return Err(HelperError::Silent);
    }
    // A hundred milliseconds too many at most: the clock is asked again.
    let left = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
    match poll(&mut [PollFd::from_borrowed_fd(pipe, events)], Some(&left)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(io::Error::from(error).into()),
    }
}
