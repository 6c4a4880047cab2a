//! The plugin's first process.
//!
//! In a managed plugin the server would be process 1 of its own process namespace: if
//! it died, the kernel would kill the FUSE processes with it, and every container on a
//! thin image would lose its files. So process 1 only binds the socket, starts the
//! server as its child, starts it again when it dies, and reaps the orphans that become
//! its children. It parses nothing. Calls that arrive while there is no server wait in
//! the socket's queue.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, wait};
use tokio::signal::unix::{SignalKind, signal};

use crate::server;

/// Pause before a server that died is started again; doubled each time up to
/// [`LONGEST_PAUSE`]. The engine repeats calls for 15 s.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(3);
/// A server that ran this long had started well: pauses begin anew.
const GOOD_RUN: Duration = Duration::from_secs(30);
/// The server ends by itself earlier than this after SIGTERM; dockerd kills after 10 s.
const STOP_TIMEOUT: Duration = Duration::from_secs(9);

/// Whether this process is the first of its namespace.
pub fn is_needed() -> bool {
    std::process::id() == 1
}

/// The socket that the keeper passed as standard input.
///
/// # Errors
/// The system's.
pub fn inherited_socket() -> io::Result<UnixListener> {
    let listener = UnixListener::from(io::stdin().as_fd().try_clone_to_owned()?);
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Keeps a server running until SIGTERM.
///
/// # Errors
/// If the socket cannot be bound or the server cannot be started at all.
pub fn run(socket: &Path) -> Result<()> {
    let listener = server::bind(socket).with_context(|| format!("cannot listen on {}", socket.display()))?;
    let listener = OwnedFd::from(listener);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start")?;
    let kept = runtime.block_on(keep(&listener));
    // Failing that, the next start replaces it.
    let _ = std::fs::remove_file(socket);
    kept
}

async fn keep(listener: &OwnedFd) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut child_ended = signal(SignalKind::child())?;
    let mut pause = FIRST_PAUSE;
    loop {
        let server = start(listener)?;
        let started = Instant::now();
        loop {
            tokio::select! {
                _ = child_ended.recv() => if reap(server) { break },
                _ = terminate.recv() => return stop(server, child_ended).await,
                _ = interrupt.recv() => return stop(server, child_ended).await,
            }
        }
        pause = if started.elapsed() > GOOD_RUN { FIRST_PAUSE } else { pause };
        tracing::error!(pause_ms = pause.as_millis(), "the server died, starting another one");
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = terminate.recv() => return Ok(()),
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Starts this very program again, with the same arguments and the socket as standard
/// input.
fn start(listener: &OwnedFd) -> Result<Pid> {
    let mut arguments = std::env::args_os();
    let server = Command::new("/proc/self/exe")
        .arg0(arguments.next().unwrap_or_default())
        .args(arguments)
        .arg("--inherited-socket")
        .stdin(Stdio::from(listener.try_clone()?))
        .spawn()
        .context("cannot start the server process")?;
    // Reaped by `reap`, like every other child.
    Pid::from_raw(i32::try_from(server.id())?).context("the server has no process id")
}

/// Reaps all ended children and tells whether `server` is among them.
fn reap(server: Pid) -> bool {
    let mut ended = false;
    while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
        tracing::debug!(%pid, ?status, "reaped");
        ended |= pid == server;
    }
    ended
}

async fn stop(server: Pid, mut child_ended: tokio::signal::unix::Signal) -> Result<()> {
    // It may have ended just now.
    let _ = kill_process(server, Signal::TERM);
    let ended = async {
        while !reap(server) {
            child_ended.recv().await;
        }
    };
    if tokio::time::timeout(STOP_TIMEOUT, ended).await.is_err() {
        tracing::warn!("the server did not stop in time");
        let _ = kill_process(server, Signal::KILL);
    }
    Ok(())
}
