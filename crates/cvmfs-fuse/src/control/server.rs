//! The server behind the control socket.
//!
//! One thread takes connections, reads commands and writes answers without ever waiting for a caller; commands are
//! carried out by short-lived threads. What callers can use is bounded:
//!
//! * connections: [`MAX_CONNECTIONS`]; one more displaces the caller that has been silent longest, so that idle
//!   callers never keep out one that has something to ask;
//! * commands under way: [`MAX_WORKING`] of those that may take long and as many of those that are prompt;
//! * memory: [`MAX_COMMAND`] bytes of a command and [`MAX_ANSWER`] of an answer;
//! * time: a command arrives within [`COMMAND_PATIENCE`], an answer is taken within [`ANSWER_PATIENCE`].

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::command::{Command, MAX_COMMAND};
use super::settings::TalkSocket;
use super::sockets::{claim_path, identity};

/// Connections at a time; each costs a descriptor, which the mount's files need more.
const MAX_CONNECTIONS: usize = 128;
/// Commands carried out at a time, per kind. With [`MAX_ANSWER`] it bounds the memory.
const MAX_WORKING: usize = 16;
/// Largest answer in bytes; a longer list is cut with a line that says so.
const MAX_ANSWER: usize = 4 << 20;
/// Time for a command to arrive: callers send it in one piece right after connecting.
const COMMAND_PATIENCE: Duration = Duration::from_secs(2);
/// Time a command waits for its turn.
const QUEUE_PATIENCE: Duration = Duration::from_secs(10);
/// Time a caller has to take its answer.
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);
/// Pause after the system refused another descriptor.
const EXHAUSTED: Duration = Duration::from_millis(100);
/// What is logged if the socket for the stock tool cannot be made.
const UNREACHABLE: &str = "cvmfs_talk cannot reach this mount; `cvmfs-client talk` can";
/// Last line of an answer that was cut.
const CUT: &str = "(the list is longer and was cut here)\n";

/// Carries out a command; may take its time.
pub(crate) type Answerer = Arc<dyn Fn(&Command) -> String + Send + Sync>;

/// The running server. Ends and removes its sockets when dropped.
#[derive(Debug)]
pub(crate) struct Control {
    stop: Arc<AtomicBool>,
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
    sockets: Vec<(PathBuf, Option<(u64, u64)>)>,
}

impl Drop for Control {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        ring(&self.wake);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        for (path, socket) in &self.sockets {
            // Somebody else's socket may lie there by now.
            if socket.is_some() && identity(path) == *socket {
                let _ = std::fs::remove_file(path);
            }
        }
    }
}

/// Answers commands on the mount's own socket at `own`, and on the one for `cvmfs_talk` if it is to be had.
///
/// # Errors
/// If the own socket cannot be made.
pub(crate) fn serve(own: &Path, talk: &TalkSocket, answerer: Answerer) -> io::Result<Control> {
    // A predecessor's socket: nobody listens there any more.
    match std::fs::remove_file(own) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut listeners = vec![claim_path(own, 0o600)?];
    let mut paths = vec![own.to_owned()];
    match listen_for_talk(talk) {
        Ok(listener) => {
            listeners.push(listener);
            paths.push(talk.path.clone());
        }
        Err(error) if talk.named => {
            tracing::warn!(socket = %talk.path.display(), %error, "{UNREACHABLE}");
        }
        Err(error) => tracing::info!(socket = %talk.path.display(), %error, "{UNREACHABLE}"),
    }
    let sockets = paths.into_iter().map(|path| (path.clone(), identity(&path))).collect();
    let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
    let stop = Arc::new(AtomicBool::new(false));
    let (done, finished) = mpsc::channel();
    let mut server = Server {
        listeners,
        wake: wake.clone(),
        stop: stop.clone(),
        answerer,
        connections: Vec::new(),
        next: 0,
        working: [0; 2],
        done,
        finished,
        deaf_until: None,
    };
    let thread = std::thread::Builder::new().name("cvmfs-control".into()).spawn(move || server.run())?;
    Ok(Control { stop, wake, thread: Some(thread), sockets })
}

/// The socket at which `cvmfs_talk` looks: for root and the owner that the configuration names.
fn listen_for_talk(talk: &TalkSocket) -> io::Result<UnixListener> {
    let owner = match &talk.owner {
        Some(name) => Some(user_id(name)?),
        None => None,
    };
    if let Some(directory) = talk.path.parent() {
        use std::os::unix::fs::DirBuilderExt;
        std::fs::DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
    }
    let listener = claim_path(&talk.path, 0o660)?;
    if let Some(owner) = owner {
        rustix::fs::chownat(
            rustix::fs::CWD,
            &talk.path,
            Some(rustix::fs::Uid::from_raw(owner)),
            None,
            rustix::fs::AtFlags::SYMLINK_NOFOLLOW,
        )?;
    }
    Ok(listener)
}

/// The number of a user, from `/etc/passwd` alone: name services need libraries that a static binary does not have.
fn user_id(name: &str) -> io::Result<u32> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    /// Larger files of users come from name services.
    const MAX_PASSWD: u64 = 16 << 20;
    let mut text = String::new();
    std::fs::File::open("/etc/passwd")?.take(MAX_PASSWD).read_to_string(&mut text)?;
    text.lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.first() == Some(&name))
        .and_then(|fields| fields.get(2)?.parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("there is no user {name}")))
}

fn ring(wake: &OwnedFd) {
    // A full counter wakes just as well.
    let _ = rustix::io::write(wake, &1_u64.to_ne_bytes());
}

struct Connection {
    number: u64,
    stream: UnixStream,
    phase: Phase,
    until: Instant,
}

enum Phase {
    /// The command has not arrived.
    Reading,
    /// The command waits for a thread.
    Queued(Command),
    /// A thread carries the command out; it has its own deadline.
    Working,
    /// The answer is being taken, so many bytes already.
    Writing(Vec<u8>, usize),
    /// To be closed.
    Over,
}

struct Server {
    listeners: Vec<UnixListener>,
    wake: Arc<OwnedFd>,
    stop: Arc<AtomicBool>,
    answerer: Answerer,
    /// In the order of their arrival.
    connections: Vec<Connection>,
    next: u64,
    /// Commands under way: the long ones and the prompt ones.
    working: [usize; 2],
    done: mpsc::Sender<Done>,
    finished: mpsc::Receiver<Done>,
    /// No connection is taken before: the system has no descriptors left.
    deaf_until: Option<Instant>,
}

/// The answer to the command of a connection.
struct Done {
    connection: u64,
    lane: usize,
    answer: Vec<u8>,
}

impl Server {
    fn run(&mut self) {
        while !self.stop.load(Ordering::SeqCst) {
            let ready = self.wait();
            let (listening, connected) = ready.split_at(ready.len().saturating_sub(self.connections.len()));
            for (connection, ready) in self.connections.iter_mut().zip(connected) {
                if *ready {
                    connection.advance();
                }
            }
            self.collect_answers();
            for (index, ready) in listening.iter().enumerate() {
                if *ready {
                    self.accept(index);
                }
            }
            self.expire();
            self.start_queued();
            self.connections.retain(|connection| !matches!(connection.phase, Phase::Over));
        }
    }

    /// Waits until something is to be done; tells which listeners and connections are ready.
    fn wait(&mut self) -> Vec<bool> {
        let now = Instant::now();
        let deaf = self.deaf_until.is_some_and(|until| now < until);
        if !deaf {
            self.deaf_until = None;
        }
        let until =
            self.connections.iter().filter(|one| !matches!(one.phase, Phase::Working)).map(|one| one.until);
        let next = until.chain(self.deaf_until).min();
        let limit = next.map(|next| {
            let left = next.saturating_duration_since(now) + Duration::from_millis(1);
            Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: i64::from(left.subsec_nanos()) }
        });
        let mut polled: Vec<PollFd<'_>> =
            Vec::with_capacity(1 + self.listeners.len() + self.connections.len());
        let watch = |fd, events| PollFd::from_borrowed_fd(fd, events);
        polled.push(watch(self.wake.as_fd(), PollFlags::IN));
        let take = if deaf { PollFlags::empty() } else { PollFlags::IN };
        polled.extend(self.listeners.iter().map(|listener| watch(listener.as_fd(), take)));
        polled.extend(self.connections.iter().map(|one| watch(one.stream.as_fd(), one.phase.events())));
        if let Err(error) = poll(&mut polled, limit.as_ref())
            && error != rustix::io::Errno::INTR
        {
            tracing::error!(%error, "the control socket cannot be watched");
            std::thread::sleep(EXHAUSTED);
        }
        let mut ready: Vec<bool> = polled.iter().map(|one| !one.revents().is_empty()).collect();
        drop(polled);
        if ready.remove(0) {
            let _ = rustix::io::read(&*self.wake, &mut [0_u8; 8]);
        }
        ready
    }

    fn accept(&mut self, listener: usize) {
        // As many as could be waiting; what comes later is taken in the next round.
        for _ in 0..MAX_CONNECTIONS {
            let accepted = match self.listeners.get(listener).map(UnixListener::accept) {
                Some(Ok((stream, _))) => stream.set_nonblocking(true).map(|()| stream),
                Some(Err(error)) => Err(error),
                None => return,
            };
            match accepted {
                Ok(stream) => self.admit(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
                    ) => {}
                Err(error) => {
                    tracing::warn!(%error, "no more callers can be taken on the control socket for a moment");
                    self.deaf_until = Some(Instant::now() + EXHAUSTED);
                    return;
                }
            }
        }
    }

    fn admit(&mut self, stream: UnixStream) {
        if self.connections.len() >= MAX_CONNECTIONS {
            let silent =
                self.connections.iter().position(|one| matches!(one.phase, Phase::Reading | Phase::Over));
            match silent {
                Some(index) => drop(self.connections.remove(index)),
                // All have commands under way: the newcomer is closed and may come again.
                None => return,
            }
        }
        let until = Instant::now() + COMMAND_PATIENCE;
        let mut connection = Connection { number: self.next, stream, phase: Phase::Reading, until };
        self.next += 1;
        // Most callers have sent their command by now.
        connection.advance();
        self.connections.push(connection);
        self.start_queued();
    }

    fn expire(&mut self) {
        let now = Instant::now();
        for connection in &mut self.connections {
            if now < connection.until {
                continue;
            }
            match connection.phase {
                Phase::Working => {}
                Phase::Queued(_) => connection.answer(b"Failed, too many commands are under way\n".to_vec()),
                _ => connection.phase = Phase::Over,
            }
        }
    }

    fn start_queued(&mut self) {
        for connection in &mut self.connections {
            let Phase::Queued(command) = &connection.phase else { continue };
            let lane = usize::from(command.is_prompt());
            let Some(working) = self.working.get_mut(lane).filter(|working| **working < MAX_WORKING) else {
                continue;
            };
            if command.changes_something() {
                log_change(command, connection.stream.as_fd());
            }
            let (command, answerer) = (command.clone(), self.answerer.clone());
            let (done, wake, number) = (self.done.clone(), self.wake.clone(), connection.number);
            let carry_out = move || {
                // A panic is a defect of one command, not the end of the mount.
                let answer = catch_unwind(AssertUnwindSafe(|| bounded(answerer(&command))))
                    .unwrap_or_else(|_| b"Failed, internal error\n".to_vec());
                let _ = done.send(Done { connection: number, lane, answer });
                ring(&wake);
            };
            match std::thread::Builder::new().name("cvmfs-answer".into()).spawn(carry_out) {
                Ok(_) => {
                    *working += 1;
                    connection.phase = Phase::Working;
                }
                Err(_) => connection.answer(b"Failed, the system has no threads left\n".to_vec()),
            }
        }
    }

    fn collect_answers(&mut self) {
        while let Ok(done) = self.finished.try_recv() {
            if let Some(working) = self.working.get_mut(done.lane) {
                *working = working.saturating_sub(1);
            }
            // The caller may have gone meanwhile.
            if let Some(connection) = self.connections.iter_mut().find(|one| one.number == done.connection) {
                connection.answer(done.answer);
            }
        }
    }
}

impl Phase {
    fn events(&self) -> PollFlags {
        match self {
            Phase::Reading => PollFlags::IN,
            Phase::Writing(..) => PollFlags::OUT,
            Phase::Queued(_) | Phase::Working | Phase::Over => PollFlags::empty(),
        }
    }
}

impl Connection {
    /// Does what can be done without waiting.
    fn advance(&mut self) {
        match &mut self.phase {
            Phase::Reading => self.read(),
            Phase::Writing(answer, taken) => {
                let rest = answer.get(*taken..).unwrap_or_default();
                match (&self.stream).write(rest) {
                    Ok(written) if written > 0 && written < rest.len() => *taken += written,
                    Err(error) if is_transient(&error) => {}
                    _ => self.phase = Phase::Over,
                }
            }
            // Nothing was asked of the system but whether the caller is still there.
            Phase::Queued(_) | Phase::Working => self.phase = Phase::Over,
            Phase::Over => {}
        }
    }

    /// As in the C++ client, what arrives in one piece is the command: callers send no end of line.
    fn read(&mut self) {
        let mut received = [0; MAX_COMMAND + 1];
        match (&self.stream).read(&mut received) {
            Ok(0) => self.phase = Phase::Over,
            Ok(length) => match Command::parse(received.get(..length).unwrap_or_default()) {
                // Whoever starts a container waits for this one.
                Ok(Command::Ping) => self.answer(b"pong\n".to_vec()),
                Ok(command) => {
                    self.phase = Phase::Queued(command);
                    self.until = Instant::now() + QUEUE_PATIENCE;
                }
                Err(line) => self.answer(format!("{line}\n").into_bytes()),
            },
            Err(error) if is_transient(&error) => {}
            Err(_) => self.phase = Phase::Over,
        }
    }

    fn answer(&mut self, answer: Vec<u8>) {
        self.phase = Phase::Writing(answer, 0);
        self.until = Instant::now() + ANSWER_PATIENCE;
        self.advance();
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

fn bounded(mut answer: String) -> Vec<u8> {
    if answer.len() > MAX_ANSWER {
        let mut end = MAX_ANSWER - CUT.len();
        while !answer.is_char_boundary(end) {
            end -= 1;
        }
        let line = answer.get(..end).and_then(|kept| kept.rfind('\n')).map_or(0, |newline| newline + 1);
        answer.truncate(line);
        answer.push_str(CUT);
    }
    if !answer.is_empty() && !answer.ends_with('\n') {
        answer.push('\n');
    }
    answer.into_bytes()
}

/// Who changed what through the socket: the first question after a surprise.
fn log_change(command: &Command, caller: BorrowedFd<'_>) {
    let caller = rustix::net::sockopt::socket_peercred(caller);
    let (uid, pid) =
        caller.map_or((u32::MAX, 0), |caller| (caller.uid.as_raw(), caller.pid.as_raw_nonzero().get()));
    tracing::info!(
        decision = "talk",
        command = command.words(),
        caller_uid = uid,
        caller_pid = pid,
        "changed by command"
    );
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::super::client::ask;
    use super::*;

    struct Served {
        _control: Control,
        directory: tempfile::TempDir,
        gate: Arc<Mutex<()>>,
    }

    impl Served {
        /// `remount` waits for the gate, everything else is answered at once; `cache list` is long, `latency` panics.
        fn new() -> Served {
            let directory = tempfile::tempdir().unwrap();
            let gate = Arc::new(Mutex::new(()));
            let waiting = gate.clone();
            let answerer: Answerer = Arc::new(move |command| match command {
                Command::Ping => "pong".into(),
                Command::Remount => {
                    drop(waiting.lock().unwrap());
                    "Catalog up to date".into()
                }
                Command::CacheList(_) => "one of many entries\n".repeat(MAX_ANSWER / 10),
                Command::Latency => panic!("expected by the test"),
                _ => String::new(),
            });
            let talk =
                TalkSocket { path: directory.path().join("work/cvmfs_io.a.b"), owner: None, named: true };
            let control = serve(&directory.path().join("own"), &talk, answerer).unwrap();
            Served { _control: control, directory, gate }
        }

        fn own(&self) -> PathBuf {
            self.directory.path().join("own")
        }

        fn ask(&self, command: &str) -> String {
            String::from_utf8(ask(&self.own(), command, Duration::from_secs(20)).unwrap()).unwrap()
        }
    }

    #[test]
    fn both_sockets_answer_and_are_gone_with_the_server() {
        let served = Served::new();
        let talk = served.directory.path().join("work/cvmfs_io.a.b");
        assert_eq!(served.ask("ping"), "pong\n");
        assert_eq!(ask(&talk, "ping\0", Duration::from_secs(20)).unwrap(), b"pong\n");
        assert_eq!(served.ask("no such thing"), "unknown command\n");
        let Served { _control, directory, .. } = served;
        drop(_control);
        assert!(!talk.exists() && !directory.path().join("own").exists());
    }

    #[test]
    fn a_panic_costs_one_answer() {
        let served = Served::new();
        assert_eq!(served.ask("latency"), "Failed, internal error\n");
        assert_eq!(served.ask("ping"), "pong\n");
    }

    #[test]
    fn a_long_list_is_cut_at_a_line_and_says_so() {
        let served = Served::new();
        let answer = served.ask("cache list");
        assert!(answer.len() <= MAX_ANSWER, "{}", answer.len());
        assert!(answer.ends_with(&format!("entries\n{CUT}")));
    }

    #[test]
    fn row_69_commands_that_wait_for_servers_do_not_keep_prompt_ones_from_being_answered() {
        let served = Served::new();
        let shut = served.gate.lock().unwrap();
        let waiting: Vec<_> = (0..3 * MAX_WORKING)
            .map(|_| {
                let mut stream = UnixStream::connect(served.own()).unwrap();
                stream.write_all(b"remount").unwrap();
                stream
            })
            .collect();
        for _ in 0..50 {
            assert_eq!(served.ask("ping"), "pong\n");
        }
        drop(shut);
        for mut stream in waiting {
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            assert_eq!(answer, "Catalog up to date\n");
        }
    }

    #[test]
    fn row_69_a_thousand_silent_callers_neither_stay_nor_keep_out_one_that_asks() {
        let served = Served::new();
        // Fewer than the usual limit of descriptors of a process; both ends are in this one.
        let silent: Vec<_> = (0..400).map(|_| UnixStream::connect(served.own()).unwrap()).collect();
        assert_eq!(served.ask("ping"), "pong\n");
        for mut stream in silent {
            stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
            assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0, "closed without an answer");
        }
    }

    #[test]
    fn row_69_a_caller_that_never_takes_its_answer_is_left() {
        let served = Served::new();
        let idle: Vec<_> = (0..2 * MAX_WORKING)
            .map(|_| {
                let mut stream = UnixStream::connect(served.own()).unwrap();
                stream.write_all(b"cache list").unwrap();
                stream
            })
            .collect();
        assert_eq!(served.ask("ping"), "pong\n");
        drop(idle);
        assert_eq!(served.ask("ping"), "pong\n");
    }

    #[test]
    fn row_69_garbage_of_any_kind_gets_one_line_or_nothing() {
        let served = Served::new();
        for seed in 0..200_u32 {
            let mut stream = UnixStream::connect(served.own()).unwrap();
            let length = 1 + seed as usize * 53 % (2 * MAX_COMMAND);
            let garbage: Vec<u8> = (0..length)
                .map(|index| (index as u32 * 31).wrapping_mul(seed + 7).to_le_bytes()[1])
                .collect();
            let _ = stream.write_all(&garbage);
            let mut answer = Vec::new();
            stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
            // What was not read when the answer was given makes the end a reset.
            let _ = stream.read_to_end(&mut answer);
            assert!(answer.is_empty() || answer == b"unknown command\n", "{answer:?}");
        }
        assert_eq!(served.ask("ping"), "pong\n");
    }
}
