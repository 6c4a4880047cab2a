//! The command line of `cvmfs-client`.

mod check;
mod config;
mod fsck;
mod status;

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};
use cvmfs_client::config::{Config, ProcessSettings};
use cvmfs_client::error::ClientError;

use crate::control;
use crate::filesystem::chain;
use crate::launch::{self, MountError, MountRequest};
use crate::logging::redaction::redacted;
use crate::mount_helper;
use crate::mount_options::MountOptions;

/// Default place of the configuration.
const CONFIGURATION: &str = "/etc/cvmfs";
/// A repository must answer in this time or the mount fails.
const MOUNT_TIMEOUT: Duration = Duration::from_secs(60);
/// `refresh` and `remount` talk to servers.
const TALK_TIMEOUT: Duration = Duration::from_secs(60);

/// Mounts CernVM-FS repositories and tells how they do.
#[derive(Debug, Parser)]
#[command(
    name = "cvmfs-client",
    version,
    after_help = "Examples:\n  \
        cvmfs-client mount atlas.cern.ch /cvmfs/atlas.cern.ch\n  \
        cvmfs-client mount example.org /mnt -o config=/etc/my.conf,layer_view\n  \
        cvmfs-client status\n  \
        cvmfs-client umount /mnt\n\n\
        Exit codes: 0 done, 1 failed, 2 wrong usage, 3 trust (signature, whitelist, expiry, name),\n\
        4 network, 5 not found, 6 out of space."
)]
struct Cli {
    /// Which log lines are written: error, warn, info, debug, trace.
    #[arg(long, global = true, default_value = "info", value_name = "LEVEL", value_parser = crate::logging::level)]
    log_level: String,
    /// Form of the log lines.
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text, value_name = "FORMAT")]
    log_format: LogFormat,
    /// Write one JSON document to standard output.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Mount a repository; returns when its root directory answers.
    Mount(MountArguments),
    /// Unmount; a mount in use is refused with the processes that use it.
    #[command(visible_alias = "unmount")]
    Umount {
        /// Where the repository is mounted.
        mountpoint: PathBuf,
        /// Also if it is in use: it disappears at once and ends with its last user.
        #[arg(long, short = 'l')]
        lazy: bool,
    },
    /// Tell the state of all mounts, or of those of one repository. Never touches a mount.
    Status {
        /// Only this repository.
        fqrn: Option<String>,
    },
    /// Send a command to the control socket of a mounted repository.
    #[command(after_help = TALK_HELP)]
    Talk {
        /// Name of the repository, or its mount point.
        fqrn: String,
        /// The command and its words.
        #[arg(required = true)]
        command: Vec<String>,
    },
    /// Show the effective value and origin of each parameter, and report unknown ones.
    Config {
        /// Name of the repository.
        fqrn: String,
        /// Mount options that change the configuration (`config=…`, `CVMFS_X=…`).
        #[arg(short = 'o', value_name = "OPT[,OPT…]")]
        options: Vec<String>,
    },
    /// Check configuration, servers, proxies, chain of trust, cache and kernel for a repository, without mounting it,
    /// and say what to do.
    #[command(
        after_help = "Every server is asked through every proxy, a few at a time; it takes 20 seconds at most.\n\
                            Exit codes: 0 a mount will work, 1 configuration, cache or kernel, 2 wrong usage,\n\
                            3 trust, 4 no server can be reached."
    )]
    Check {
        /// Name of the repository.
        fqrn: String,
        /// Mount options that change the configuration (`config=…`, `CVMFS_X=…`).
        #[arg(short = 'o', value_name = "OPT[,OPT…]")]
        options: Vec<String>,
    },
    /// Check every file of a cache, also of one in use.
    #[command(
        after_help = "What is removed is fetched again when it is needed. Exit codes: 0 nothing is wrong or all\n\
                            of it was removed, 1 something is damaged and still there, or the cache cannot be read.\n\n\
                            Example: cvmfs-client fsck --repair /var/lib/cvmfs/shared"
    )]
    Fsck {
        /// Remove what is damaged or does not belong there.
        #[arg(long)]
        repair: bool,
        /// The cache directory: `cvmfs-client status` shows it.
        cache: PathBuf,
    },
    /// Write the metrics of all mounts in Prometheus' text format.
    #[command(after_help = "To have them scraped, set CVMFS_METRICS_LISTEN=unix:/PATH or 127.0.0.1:PORT.")]
    Metrics,
}

/// What can be said to a mount.
const TALK_HELP: &str = "\
Commands (those of cvmfs_talk, which works as well):
  status json, refresh, remount [sync], revision, chroot HASH, detach nested catalogs, open catalogs
  cache size | instance | list [pinned|catalogs] | limit get | limit set MB, cleanup MB, cleanup rate MINUTES
  evict PATH, pin PATH, tear down to read-only
  host info | switch | set LIST | probe | probe geo, external host info | switch | set LIST
  proxy info | set LIST | rebalance | group switch | fallback LIST, external proxy info | set LIST
  timeout info | set PROXY DIRECT, nameserver get | set IP, max ttl info | set MINUTES
  mountpoint, device id, pid, pid cachemgr, pid watchdog, parameters, internal affairs, latency
  reset error counters, hotpatch history, version, version patchlevel

Exit codes: 0 done, 1 failed or not supported, 2 unknown command, 5 not mounted.

Example: cvmfs-client talk atlas.cern.ch host info";

#[derive(Debug, Args)]
struct MountArguments {
    /// Name of the repository.
    fqrn: String,
    /// An existing directory.
    mountpoint: PathBuf,
    /// Mount options: config=FILE[:FILE…], layer_view, allow_other, cvmfs_suid, CVMFS_X=value,
    /// and the usual ones of fstab.
    #[arg(short = 'o', value_name = "OPT[,OPT…]")]
    options: Vec<String>,
    /// Stay in the foreground and log to standard error; Ctrl-C unmounts.
    #[arg(long, short = 'f')]
    foreground: bool,
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let invoked = std::env::args_os().next().unwrap_or_default();
    match Path::new(&invoked).file_name().and_then(|name| name.to_str()) {
        Some("mount.cvmfs") => return mount_helper::main(Path::new(CONFIGURATION), MOUNT_TIMEOUT),
        Some("auto.cvmfs") => return mount_helper::autofs_map(),
        _ => {}
    }
    let cli = Cli::parse();
    if !matches!(cli.verb, Verb::Mount(_)) {
        crate::syscall::end_with_reader();
    }
    let outcome = match &cli.verb {
        Verb::Mount(arguments) => mount(&cli, arguments),
        Verb::Umount { mountpoint, lazy } => umount(&cli, mountpoint, *lazy),
        Verb::Status { fqrn } => status::status(cli.json, fqrn.as_deref()),
        Verb::Talk { fqrn, command } => talk(fqrn, command),
        Verb::Config { fqrn, options } => config::config(cli.json, fqrn, options),
        Verb::Check { fqrn, options } => check::check(cli.json, fqrn, options),
        Verb::Fsck { repair, cache } => fsck::fsck(cli.json, cache, *repair),
        Verb::Metrics => {
            print!("{}", crate::metrics::render(&control::inspect_all(None)));
            Ok(ExitCode::SUCCESS)
        }
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            let code = exit_code(&error);
            eprintln!("cvmfs-client: {}", redacted(&chain(error.as_ref())));
            // What servers and publishers did wrong needs a look at every part.
            if let (Verb::Mount(arguments), 3..=5) = (&cli.verb, code) {
                let options: Vec<_> =
                    arguments.options.iter().map(|option| format!(" -o {option}")).collect();
                let check = redacted(&format!("cvmfs-client check {}{}", arguments.fqrn, options.concat()));
                eprintln!("cvmfs-client: `{check}` looks at every part and says what to do");
            }
            ExitCode::from(code)
        }
    }
}

/// The code of the command-line contract for an error.
fn exit_code(error: &anyhow::Error) -> u8 {
    error
        .chain()
        .find_map(|cause| {
            let mount = cause.downcast_ref::<MountError>().map(MountError::exit_code);
            let client = || cause.downcast_ref::<ClientError>().map(ClientError::exit_code);
            let usage = || cause.downcast_ref::<Usage>().map(|_| 2);
            let missing = || cause.downcast_ref::<NotMounted>().map(|_| 5);
            mount.or_else(client).or_else(usage).or_else(missing)
        })
        .unwrap_or(1)
}

/// Wrong arguments.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Usage(pub(crate) String);

#[derive(Debug, thiserror::Error)]
#[error("{0} is not mounted by this user; `cvmfs-client status` lists what is")]
struct NotMounted(String);

fn request_of(cli: &Cli, arguments: &MountArguments) -> anyhow::Result<MountRequest> {
    let options = MountOptions::parse(&arguments.options)?;
    let mountpoint = std::path::absolute(&arguments.mountpoint)?;
    let sources = options.sources(Path::new(CONFIGURATION));
    let config = Config::load(&arguments.fqrn, &sources).map_err(ClientError::from)?;
    Ok(MountRequest {
        process: ProcessSettings::from(&config).map_err(ClientError::from)?,
        fqrn: arguments.fqrn.clone(),
        mountpoint: mountpoint.clone(),
        sources,
        layer_view: options.layer_view,
        allow_other: options.allow_other || rustix::process::geteuid().is_root(),
        suid_and_devices: options.layer_view || options.suid,
        log_level: cli.log_level.clone(),
        log_json: cli.log_format == LogFormat::Json,
        log_file: (!arguments.foreground).then(|| control::log_path(&arguments.fqrn, &mountpoint)),
        confined: false,
    })
}

fn mount(cli: &Cli, arguments: &MountArguments) -> anyhow::Result<ExitCode> {
    let request = request_of(cli, arguments)?;
    let signals = if arguments.foreground {
        Some(crate::syscall::signal_descriptor().context("cannot receive signals")?)
    } else {
        None
    };
    let mounted = launch::mount(&request, MOUNT_TIMEOUT)?;
    if cli.json {
        println!("{}", serde_json::to_string(&mounted)?);
    } else if std::io::stdout().is_terminal() {
        println!("{} is mounted at {}", mounted.fqrn, mounted.mountpoint.display());
    }
    let Some(signals) = signals else { return Ok(ExitCode::SUCCESS) };
    std::io::stdout().flush()?;
    stay_in_foreground(&mounted, &signals)
}

/// Waits for Ctrl-C or for the end of the mount.
fn stay_in_foreground(mounted: &launch::Mounted, signals: &std::os::fd::OwnedFd) -> anyhow::Result<ExitCode> {
    use rustix::event::{PollFd, PollFlags, poll};
    let pid =
        rustix::process::Pid::from_raw(mounted.supervisor_pid.cast_signed()).context("no supervisor")?;
    let supervisor = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
    loop {
        let mut polled = [PollFd::new(&supervisor, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
        let _ = poll(&mut polled, None);
        if !polled[0].revents().is_empty() {
            return Ok(ExitCode::SUCCESS);
        }
        if !polled[1].revents().is_empty() {
            // The supervisor unmounts and ends within its own limit.
            rustix::process::pidfd_send_signal(&supervisor, rustix::process::Signal::TERM)?;
            let mut ended = [PollFd::new(&supervisor, PollFlags::IN)];
            let limit = rustix::event::Timespec { tv_sec: 6, tv_nsec: 0 };
            let _ = poll(&mut ended, Some(&limit));
            return Ok(ExitCode::SUCCESS);
        }
    }
}

fn umount(cli: &Cli, mountpoint: &Path, lazy: bool) -> anyhow::Result<ExitCode> {
    if lazy {
        launch::unmount(mountpoint)?;
    } else {
        launch::unmount_unused(mountpoint)?;
    }
    if cli.json {
        println!("{}", serde_json::json!({ "unmounted": mountpoint }));
    }
    Ok(ExitCode::SUCCESS)
}

fn talk(name: &str, command: &[String]) -> anyhow::Result<ExitCode> {
    let is_meant = |one: &launch::Mounted| one.fqrn == name || one.mountpoint == Path::new(name);
    let found: Vec<_> = control::records().into_iter().filter(is_meant).collect();
    let record = found.first().ok_or_else(|| NotMounted(name.to_owned()))?;
    if found.len() > 1 {
        let place = record.mountpoint.display();
        eprintln!("cvmfs-client: {name} is mounted {} times; this is the answer of {place}", found.len());
    }
    let answer = control::ask(&record.control, &command.join(" "), TALK_TIMEOUT).with_context(|| {
        format!("{name}: the client does not answer; `cvmfs-client status {}` tells more", record.fqrn)
    })?;
    std::io::stdout().write_all(&answer)?;
    // Whoever asked reads the answer; a script looks at the code.
    let begins = |start: &str| answer.starts_with(start.as_bytes());
    Ok(if begins("unknown command") || begins("Usage: ") {
        ExitCode::from(2)
    } else if begins("Failed") || begins("not supported") {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}
