//! Lines into the system's log, by its socket `/dev/log`.

use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

use super::redaction::redacted_line;
use super::settings::SystemLogSettings;

/// Where the system's log listens.
const SOCKET: &str = "/dev/log";
/// The name under which lines appear.
const NAME: &str = "cvmfs-client";
/// Longest line; longer ones are cut, since the receiver would.
const MAX_LINE: usize = 8 * 1024;
/// Lines in a row, and per [`WINDOW`]: a repository without servers must not drown everybody else's lines.
const MAX_LINES: u32 = 200;
const WINDOW: Duration = Duration::from_secs(10);

const ERROR: u8 = 3;
const WARNING: u8 = 4;

/// The connection to the system's log.
#[derive(Debug)]
pub(super) struct Syslog {
    settings: SystemLogSettings,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    socket: Option<UnixDatagram>,
    window: Instant,
    lines: u32,
    suppressed: u32,
}

impl Syslog {
    pub(super) fn new(settings: SystemLogSettings) -> Syslog {
        let state = State { socket: None, window: Instant::now(), lines: 0, suppressed: 0 };
        Syslog { settings, state: Mutex::new(state) }
    }

    /// Sends a line; one that cannot be sent at once is lost, it is in the mount's own log.
    fn send(&self, severity: u8, line: &[u8], socket: &Path, now: Instant) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if now.saturating_duration_since(state.window) >= WINDOW {
            let suppressed = std::mem::take(&mut state.suppressed);
            (state.window, state.lines) = (now, 0);
            if suppressed > 0 {
                let text =
                    format!("{suppressed} lines were not sent: too many; the mount's own log has them");
                let packet = self.packet(WARNING, text.as_bytes());
                state.deliver(&packet, socket);
            }
        }
        if state.lines >= MAX_LINES {
            state.suppressed = state.suppressed.saturating_add(1);
            return;
        }
        state.lines += 1;
        let packet = self.packet(severity, line);
        state.deliver(&packet, socket);
    }

    fn packet(&self, severity: u8, line: &[u8]) -> Vec<u8> {
        let priority = u32::from(self.settings.facility) * 8 + u32::from(severity);
        let head = format!("<{priority}>{NAME}[{}]: ({}) ", std::process::id(), self.settings.prefix);
        let line = line.trim_ascii();
        let mut packet = head.into_bytes();
        packet.extend_from_slice(line.get(..MAX_LINE).unwrap_or(line));
        packet
    }
}

impl State {
    fn deliver(&mut self, packet: &[u8], path: &Path) {
        // Connected anew after the log's process was restarted.
        for _ in 0..2 {
            let socket = match self.socket.take() {
                Some(socket) => socket,
                None => match connect(path) {
                    Ok(socket) => socket,
                    Err(_) => return,
                },
            };
            match socket.send(packet) {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => {}
                _ => {
                    self.socket = Some(socket);
                    return;
                }
            }
        }
    }
}

fn connect(path: &Path) -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.connect(path)?;
    Ok(socket)
}

/// Gives each line its severity.
pub(super) struct SystemLog(pub(super) Arc<Syslog>);

pub(super) struct LineWriter {
    log: Arc<Syslog>,
    severity: u8,
}

impl Write for LineWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.log.send(self.severity, &redacted_line(line), Path::new(SOCKET), Instant::now());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for SystemLog {
    type Writer = LineWriter;

    fn make_writer(&'a self) -> LineWriter {
        LineWriter { log: self.0.clone(), severity: self.0.settings.severity }
    }

    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> LineWriter {
        let severity = match *metadata.level() {
            Level::ERROR => ERROR,
            Level::WARN => WARNING,
            _ => self.0.settings.severity,
        };
        LineWriter { log: self.0.clone(), severity }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn syslog() -> Syslog {
        Syslog::new(SystemLogSettings { facility: 17, severity: 6, prefix: "a.example.org".into() })
    }

    fn receive(socket: &UnixDatagram) -> String {
        let mut buffer = [0; 16 * 1024];
        let length = socket.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    }

    #[test]
    fn a_line_carries_facility_severity_and_prefix_and_follows_a_restarted_log() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let log = syslog();
        log.send(WARNING, b"nobody listens\n", &path, Instant::now());
        for _ in 0..2 {
            let _ = std::fs::remove_file(&path);
            let receiver = UnixDatagram::bind(&path).unwrap();
            log.send(WARNING, b"something happened\n", &path, Instant::now());
            let expected =
                format!("<140>cvmfs-client[{}]: (a.example.org) something happened", std::process::id());
            assert_eq!(receive(&receiver), expected);
        }
    }

    #[test]
    fn a_flood_is_cut_and_the_cut_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let receiver = UnixDatagram::bind(&path).unwrap();
        let log = syslog();
        let now = Instant::now();
        let mut sent = 0;
        for _ in 0..MAX_LINES + 50 {
            log.send(ERROR, b"again", &path, now);
            // The queue of a datagram socket is short.
            receiver.set_nonblocking(true).unwrap();
            while receiver.recv(&mut [0; 1024]).is_ok() {
                sent += 1;
            }
        }
        assert_eq!(sent, MAX_LINES);
        receiver.set_nonblocking(false).unwrap();
        log.send(ERROR, b"later", &path, now + WINDOW);
        assert!(receive(&receiver).contains("50 lines were not sent"));
        assert!(receive(&receiver).ends_with("later"));
    }
}
