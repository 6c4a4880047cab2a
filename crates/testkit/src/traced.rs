//! Processes that are killed at a system call of one's choice.

use std::collections::HashSet;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::syscall;

/// How a traced process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Traced {
    /// It was killed before the chosen system call.
    Killed,
    /// It came to the end of what is looked at, and ended by itself.
    Finished,
}

/// The process says with this where the interesting part begins, and where it ends: by a signal to the calling thread
/// that is ignored unless the process is traced.
pub fn mark() {
    syscall::signal_this_thread(MARK);
}

/// A signal that nobody else uses here.
const MARK: i32 = libc::SIGWINCH;

/// Runs `command` and kills it, all threads of it, before the system call number `step` (from 1) that the thread
/// makes that called [`mark`].
pub fn kill_at_call(mut command: Command, step: u32) -> Result<Traced> {
    // Tracing is a matter of one thread.
    let tracer = std::thread::spawn(move || {
        syscall::trace_me(&mut command);
        let child = command.spawn().context("cannot start the process to be traced")?;
        follow(i32::try_from(child.id())?, step)
    });
    tracer.join().map_err(|_| anyhow::anyhow!("the tracer panicked"))?
}

fn follow(process: i32, step: u32) -> Result<Traced> {
    const SYSCALL_STOP: i32 = libc::SIGTRAP | 0x80;
    let mut known = HashSet::new();
    let (mut marked, mut ended, mut calls, mut killed) = (None, false, 0, false);
    loop {
        let (thread, status) = syscall::wait_traced().context("cannot wait for the traced process")?;
        if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
            if thread != process {
                continue;
            }
            return match (killed, libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0) {
                (true, _) => Ok(Traced::Killed),
                (false, true) => Ok(Traced::Finished),
                (false, false) => bail!("the traced process failed: status {status:#x}"),
            };
        }
        if thread == process && known.is_empty() {
            let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_EXITKILL;
            syscall::trace(libc::PTRACE_SETOPTIONS, thread, usize::try_from(options)?)?;
        }
        let is_new = known.insert(thread);
        let signal = libc::WSTOPSIG(status);
        if signal == MARK {
            ended = marked.is_some();
            marked = marked.or(Some(thread));
        }
        let is_watched = marked == Some(thread) && !ended;
        if signal == SYSCALL_STOP && is_watched && !killed && syscall::enters_call(thread)? {
            calls += 1;
            if calls == step {
                killed = true;
                let pid = Pid::from_raw(process).context("a process has a number")?;
                kill_process(pid, Signal::KILL)?;
                continue;
            }
        }
        // The stop with which a new thread begins, the traps of tracing itself; everything else is for the process.
        let is_own =
            [SYSCALL_STOP, libc::SIGTRAP, MARK].contains(&signal) || (is_new && signal == libc::SIGSTOP);
        let deliver = if is_own { 0 } else { usize::try_from(signal)? };
        let request = if is_watched { libc::PTRACE_SYSCALL } else { libc::PTRACE_CONT };
        // A thread that was killed meanwhile is gone.
        let _ = syscall::trace(request, thread, deliver);
    }
}
