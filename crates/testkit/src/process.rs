//! Child processes that never outlive this one, and commands with a deadline.
//!
//! The kernel ties the parent-death signal to the *thread* that forked, not to the process, and a test runs
//! on a thread of its own. All children are therefore spawned by one thread that lives as long as the
//! process; a daemon started by one test may serve the next.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal};

use crate::interrupt;

/// How often waits look again. Short against everything that is measured with a wait.
const POLL: Duration = Duration::from_millis(10);

/// How many bytes of each output stream [`run`] keeps; commands in tests write far less, and a runaway must
/// not fill the memory.
const OUTPUT_LIMIT: u64 = 64 << 20;

struct Job {
    command: Command,
    reply: Sender<io::Result<Child>>,
}

/// Spawns `command` in its own process group; the kernel sends it `on_parent_death` if this process dies.
pub fn spawn(mut command: Command, on_parent_death: Signal) -> Result<Child> {
    static SPAWNER: OnceLock<Mutex<Sender<Job>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, receiver) = channel::<Job>();
        thread::spawn(move || {
            for mut job in receiver {
                let _ = job.reply.send(job.command.spawn());
            }
        });
        Mutex::new(sender)
    });

    command.process_group(0);
    crate::syscall::signal_on_parent_death(&mut command, on_parent_death);
    let description = describe(&command);
    let (reply, answer) = channel();
    spawner
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
        .send(Job { command, reply })
        .expect("the spawning thread lives as long as the process");
    answer
        .recv()
        .expect("the spawning thread answers every job")
        .with_context(|| format!("cannot start {description}"))
}

/// The words of a command as one line, for messages.
pub fn describe(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}

/// What a finished command left behind.
#[derive(Debug, Clone)]
pub struct Finished {
    /// The command line.
    pub command: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output; bytes that are not UTF-8 are replaced.
    pub stdout: String,
    /// Standard error, likewise.
    pub stderr: String,
    /// From the start to the end of the process.
    pub elapsed: Duration,
}

impl Finished {
    /// The exit code, or `None` if a signal ended the command.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Standard output without the final newline, or an error with all that the command wrote.
    pub fn success(self) -> Result<String> {
        if !self.status.success() {
            bail!("`{}` ended with {}\n{}{}", self.command, self.status, self.stdout, self.stderr);
        }
        Ok(self.stdout.trim_end_matches('\n').to_owned())
    }

    /// Both streams together, for searching a message.
    pub fn output(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }
}

/// Runs a command without standard input and collects its output. After `timeout`, or on an interrupt, its
/// whole process group is killed and an error returned.
pub fn run(mut command: Command, timeout: Duration) -> Result<Finished> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let description = describe(&command);
    let started = Instant::now();
    let mut child = spawn(command, Signal::KILL)?;
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let ended = wait(&mut child, timeout);
    let elapsed = started.elapsed();
    if !matches!(ended, Ok(Some(_))) {
        kill_group(&child, Signal::KILL);
        let _ = child.wait();
    }
    // A daemon that the command left behind may hold the pipes open; what it says is not waited for.
    let grace = Instant::now() + Duration::from_secs(2);
    let (stdout, stderr) = (stdout.text(grace), stderr.text(grace));
    match ended? {
        Some(status) => Ok(Finished { command: description, status, stdout, stderr, elapsed }),
        None => bail!("`{description}` did not end within {timeout:?}\n{stdout}{stderr}"),
    }
}

/// Waits for a child: `Ok(None)` after `timeout`, an error on an interrupt.
pub fn wait(child: &mut Child, timeout: Duration) -> Result<Option<ExitStatus>> {
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        interrupt::check()?;
        thread::sleep(POLL);
    }
}

/// Asks again and again until `ready` answers true; an error that names `what` after `timeout`.
pub fn wait_until(what: &str, timeout: Duration, mut ready: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + timeout;
    while !ready() {
        if Instant::now() >= deadline {
            bail!("{what}: not within {timeout:?}");
        }
        interrupt::check()?;
        thread::sleep(POLL);
    }
    Ok(())
}

/// Sends a signal to the whole process group of a child made by [`spawn`]; a group that is gone is fine.
pub fn kill_group(child: &Child, signal: Signal) {
    if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        let _ = rustix::process::kill_process_group(group, signal);
    }
}

/// Sends a signal to one process; one that is gone is fine.
pub fn kill(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// Whether a process exists and is not a zombie.
pub fn is_alive(pid: u32) -> bool {
    // The state is the first field after the command's name in parentheses.
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|stat| stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()))
        .is_some_and(|state| state != 'Z' && state != 'X')
}

/// The ids of all processes for which `wanted` holds, this one excepted.
pub fn find(wanted: impl Fn(u32) -> bool) -> Vec<u32> {
    let own = std::process::id();
    std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| *pid != own && wanted(*pid))
        .collect()
}

/// A process that runs until it is told to stop, with its output in a file.
#[derive(Debug)]
pub struct Service {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Service {
    /// Starts `command` with both output streams appended to `log`.
    pub fn start(name: &str, mut command: Command, log: &Path) -> Result<Self> {
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("cannot open {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = spawn(command, Signal::TERM)?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned() })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until `ready` holds; an error with the log if the process ends or `timeout` passes first.
    pub fn wait_ready(&mut self, timeout: Duration, mut ready: impl FnMut() -> bool) -> Result<()> {
        let deadline = Instant::now() + timeout;
        while !ready() {
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended with {status} while starting\n{}", self.name, self.log_text());
            }
            if Instant::now() >= deadline {
                bail!("{} was not ready within {timeout:?}\n{}", self.name, self.log_text());
            }
            interrupt::check()?;
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// SIGTERM, then SIGKILL to the group after `grace`. Does nothing if it ended already.
    pub fn stop(&mut self, grace: Duration) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        kill(self.pid(), Signal::TERM);
        let deadline = Instant::now() + grace;
        while Instant::now() < deadline {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            thread::sleep(POLL);
        }
        self.kill();
    }

    /// SIGKILL to the whole group, at once.
    pub fn kill(&mut self) {
        kill_group(&self.child, Signal::KILL);
        let _ = self.child.wait();
    }

    /// All that it has written so far.
    pub fn log_text(&self) -> String {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.stop(Duration::from_secs(5));
    }
}

/// Prints the last lines of a log to standard error, under a headline.
pub fn print_log(title: &str, text: &str) {
    const LINES: usize = 120;
    let lines: Vec<_> = text.lines().collect();
    let skipped = lines.len().saturating_sub(LINES);
    eprintln!("---- {title}{}", if skipped > 0 { format!(" (last {LINES} lines)") } else { String::new() });
    for line in lines.iter().skip(skipped) {
        eprintln!("{line}");
    }
    eprintln!("---- end of {title}");
}

struct Collected {
    buffer: std::sync::Arc<Mutex<Vec<u8>>>,
    done: std::sync::mpsc::Receiver<()>,
}

impl Collected {
    fn text(&self, deadline: Instant) -> String {
        let _ = self.done.recv_timeout(deadline.saturating_duration_since(Instant::now()));
        let bytes = self.buffer.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

fn collect(stream: Option<impl Read + Send + 'static>) -> Collected {
    let buffer = std::sync::Arc::new(Mutex::new(Vec::new()));
    let (finished, done) = channel();
    if let Some(mut stream) = stream {
        let buffer = buffer.clone();
        thread::spawn(move || {
            let mut block = [0_u8; 16384];
            while let Ok(count @ 1..) = stream.read(&mut block) {
                let mut kept = buffer.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                if (kept.len() as u64) < OUTPUT_LIMIT {
                    kept.extend_from_slice(&block[..count]);
                }
            }
            let _ = finished.send(());
        });
    }
    Collected { buffer, done }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_outlives_its_deadline_is_killed_with_its_children() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo $$; sleep 100 & wait"]);
        let error = run(command, Duration::from_millis(300)).unwrap_err().to_string();
        assert!(error.contains("did not end within"), "{error}");
        let shell: u32 = error.lines().nth(1).unwrap().trim().parse().unwrap();
        wait_until("the shell's group is gone", Duration::from_secs(5), || {
            find(|pid| {
                std::fs::read_to_string(format!("/proc/{pid}/stat"))
                    .is_ok_and(|stat| stat.contains(&format!(" {shell} ")) && is_alive(pid))
            })
            .is_empty()
        })
        .unwrap();
    }

    #[test]
    fn a_service_survives_the_thread_that_started_it() {
        let directory = crate::ScratchDir::new("service").unwrap();
        let log = directory.path().join("log");
        let service = thread::spawn(move || {
            let mut command = Command::new("sleep");
            command.arg("100");
            Service::start("sleep", command, &log).unwrap()
        })
        .join()
        .unwrap();
        thread::sleep(Duration::from_millis(100));
        assert!(is_alive(service.pid()));
    }
}
