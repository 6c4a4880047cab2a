//! Asking a mount through its control socket, within a time that holds for the whole conversation.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::Status;

/// Largest answer that is read: four times what a mount sends.
const MAX_ANSWER: usize = 16 << 20;
/// Pause before another try when a mount has too many callers to take one more.
const CROWDED: Duration = Duration::from_millis(10);
/// Time for an answer that needs no network.
pub(super) const PROMPT: Duration = Duration::from_secs(2);

/// Whether somebody answers at the socket.
pub(crate) fn ping(control: &Path, timeout: Duration) -> bool {
    ask(control, "ping", timeout).is_ok_and(|answer| answer == b"pong\n")
}

/// The state of the mount behind a control socket. Answers within 2 seconds.
///
/// # Errors
/// If nobody answers there, or not in time.
pub fn status(control: &Path) -> io::Result<Status> {
    status_within(control, PROMPT)
}

pub(super) fn status_within(control: &Path, timeout: Duration) -> io::Result<Status> {
    let answer = ask(control, "status json", timeout)?;
    serde_json::from_slice(&answer).map_err(|_| {
        io::Error::other(format!("unexpected answer: {}", String::from_utf8_lossy(&answer).trim()))
    })
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
/// If nobody listens there, or the whole conversation takes longer than `timeout`, or the answer is larger than
/// any mount's.
pub fn ask(control: &Path, command: &str, timeout: Duration) -> io::Result<Vec<u8>> {
    let end = Instant::now() + timeout;
    let mut stream = connect(control, end)?;
    let mut rest = command.as_bytes();
    while !rest.is_empty() {
        match stream.write(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => rest = rest.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait(&stream, PollFlags::OUT, end)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let mut answer = Vec::new();
    let mut piece = [0; 16 * 1024];
    loop {
        match stream.read(&mut piece) {
            Ok(0) => return Ok(answer),
            Ok(length) => answer.extend_from_slice(piece.get(..length).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait(&stream, PollFlags::IN, end)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        if answer.len() > MAX_ANSWER {
            return Err(io::Error::other(format!("the answer is larger than {MAX_ANSWER} bytes")));
        }
    }
}

/// Connects without ever waiting in the kernel: where too many callers wait already, a blocking connect would last
/// until the mount takes one of them, which a stopped one never does.
fn connect(control: &Path, end: Instant) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(control)?;
    loop {
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
            None,
        )?;
        match rustix::net::connect(&socket, &address) {
            Ok(()) => return Ok(socket.into()),
            Err(rustix::io::Errno::AGAIN) if Instant::now() < end => std::thread::sleep(CROWDED),
            Err(rustix::io::Errno::AGAIN) => return Err(too_late()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn wait(stream: &UnixStream, events: PollFlags, end: Instant) -> io::Result<()> {
    let left = end.saturating_duration_since(Instant::now());
    let limit = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: i64::from(left.subsec_nanos()) };
    match poll(&mut [PollFd::from_borrowed_fd(stream.as_fd(), events)], Some(&limit)) {
        Ok(0) => Err(too_late()),
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn too_late() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "no answer in time")
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_listener_that_never_answers_costs_no_more_than_the_time_allowed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sock");
        let listener = UnixListener::bind(&path).unwrap();
        rustix::net::listen(&listener, 1).unwrap();
        let started = Instant::now();
        let error = ask(&path, "ping", Duration::from_millis(200)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        // Also with a full queue of callers, where a connect would wait.
        let waiting: Vec<_> = std::iter::from_fn(|| connect(&path, Instant::now()).ok()).take(100).collect();
        assert!((1..100).contains(&waiting.len()), "{}", waiting.len());
        let error = ask(&path, "ping", Duration::from_millis(200)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(started.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_socket_without_listener_is_refused_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sock");
        drop(UnixListener::bind(&path).unwrap());
        assert_eq!(ask(&path, "ping", PROMPT).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        assert!(!ping(&path, PROMPT));
    }
}
