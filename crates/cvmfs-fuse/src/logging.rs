//! Where log lines go: standard error or the mount's log file, the system's log, a debug log.
//!
//! Decisions (fail-over, revision, eviction, refusal, worker-restart, mode, talk) are one line each with the field
//! `decision` and fields of stable names, which `docs/operate.md` lists.
//!
//! Invariants:
//! * no line leaves with user name and password of a URL in it ([`redaction`]);
//! * every file is bounded ([`file`]), and so is the rate of lines into the system's log ([`syslog`]);
//! * logging never waits and never fails the work that is logged.

mod file;
pub(crate) mod redaction;
mod settings;
mod syslog;

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;

use cvmfs_client::config::{Config, ConfigError};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry};

use crate::launch::MountRequest;
use file::LogFile;
use redaction::redacted_line;
use settings::{Destination, LogSettings};
use syslog::{Syslog, SystemLog};

/// At this size a log becomes `NAME.1` and a new one begins.
const MAX_LOG: u64 = 4 << 20;
/// The same for the file that takes the place of the system's log, as in the C++ client.
const MAX_USYSLOG: u64 = 500 * 1024;
/// The same for the debug log: it is for looking at what just happened.
const MAX_DEBUG_LOG: u64 = 64 << 20;

type BoxedLayer = Box<dyn Layer<Registry> + Send + Sync>;

/// Starts logging as the request and the configuration ask. Only the first call of a process has an effect.
///
/// # Errors
/// If a log file cannot be opened; the error names it.
pub(crate) fn start(request: &MountRequest, config: Option<&Config>) -> io::Result<()> {
    // What is wrong with them is reported by `check_settings`, when there is a log.
    let settings = config.map(LogSettings::from).transpose().unwrap_or_default();
    let mut layers = vec![main_layer(request)?];
    if let Some(settings) = settings {
        layers.extend(system_layer(request, &settings)?);
        layers.extend(debug_layer(&settings)?);
    }
    // A second subscriber in one process is a programming error without consequences.
    let _ = tracing_subscriber::registry().with(layers).try_init();
    Ok(())
}

/// The files that a mount's log is written to, besides those that the process inherits.
pub(crate) fn files(request: &MountRequest, config: &Config) -> Vec<PathBuf> {
    let settings = LogSettings::from(config).ok();
    let configured = settings.map(|settings| {
        let instead = match settings.destination {
            Destination::File(path) => Some(path),
            Destination::System(_) => None,
        };
        [instead, settings.debug_log]
    });
    request.log_file.iter().cloned().chain(configured.into_iter().flatten().flatten()).collect()
}

/// Whether the configuration's settings of the log are right.
///
/// # Errors
/// A value of the wrong form, with its file and line.
pub(crate) fn check_settings(config: &Config) -> Result<(), ConfigError> {
    LogSettings::from(config).map(drop)
}

/// Checks the level of a command line: one of the five, or filters such as `info,cvmfs_client=debug`.
pub(crate) fn level(text: &str) -> Result<String, String> {
    let is_level = text.parse::<tracing::level_filters::LevelFilter>().is_ok();
    if is_level || (text.contains('=') && EnvFilter::try_new(text).is_ok()) {
        return Ok(text.to_owned());
    }
    Err("expected error, warn, info, debug or trace".to_owned())
}

fn main_layer(request: &MountRequest) -> io::Result<BoxedLayer> {
    let filter =
        EnvFilter::try_new(quiet(&request.log_level)).unwrap_or_else(|_| EnvFilter::new(quiet("info")));
    let sink = match &request.log_file {
        None => Sink::new(|line| io::stderr().write_all(line)),
        Some(path) => Sink::to_file(LogFile::open(path.clone(), MAX_LOG)?),
    };
    let layer = tracing_subscriber::fmt::layer().with_ansi(false).with_target(false);
    Ok(if request.log_json {
        layer.json().flatten_event(true).with_writer(sink).with_filter(filter).boxed()
    } else {
        layer.with_writer(sink).with_filter(filter).boxed()
    })
}

/// Libraries say little and only when it matters.
fn quiet(level: &str) -> String {
    format!(
        "hyper=warn,hyper_util=warn,reqwest=warn,rustls=warn,h2=warn,hickory_resolver=warn,hickory_proto=warn,hickory_net=warn,{level}"
    )
}

/// Warnings, errors and decisions go to the system's log if this process runs in the background: one in the
/// foreground or in a container has somebody who reads its standard error.
fn system_layer(request: &MountRequest, settings: &LogSettings) -> io::Result<Option<BoxedLayer>> {
    let plain = tracing_subscriber::fmt::layer().with_ansi(false).with_target(false);
    let filter = || EnvFilter::new(quiet("info"));
    Ok(match &settings.destination {
        Destination::File(path) => {
            let file = LogFile::open(path.clone(), MAX_USYSLOG)
                .map_err(|error| named("CVMFS_USYSLOG", path, &error))?;
            Some(plain.with_writer(Sink::to_file(file)).with_filter(filter()).boxed())
        }
        Destination::System(_) if request.log_file.is_none() => None,
        Destination::System(system) => {
            let log = SystemLog(Arc::new(Syslog::new(system.clone())));
            Some(plain.without_time().with_level(false).with_writer(log).with_filter(filter()).boxed())
        }
    })
}

fn debug_layer(settings: &LogSettings) -> io::Result<Option<BoxedLayer>> {
    let Some(path) = &settings.debug_log else { return Ok(None) };
    let file =
        LogFile::open(path.clone(), MAX_DEBUG_LOG).map_err(|error| named("CVMFS_DEBUGLOG", path, &error))?;
    let layer = tracing_subscriber::fmt::layer().with_ansi(false).with_thread_names(true);
    let filter = EnvFilter::new(quiet("debug"));
    Ok(Some(
        layer.with_writer(Sink::to_file(file)).with_filter(filter).with_filter(LevelFilter::DEBUG).boxed(),
    ))
}

fn named(parameter: &str, path: &std::path::Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{parameter}: cannot write {}: {error}", path.display()))
}

/// A destination of whole lines, which have been redacted.
#[derive(Clone)]
struct Sink(Arc<WriteLine>);

type WriteLine = dyn Fn(&[u8]) -> io::Result<()> + Send + Sync;

impl Sink {
    fn new(write: impl Fn(&[u8]) -> io::Result<()> + Send + Sync + 'static) -> Sink {
        Sink(Arc::new(write))
    }

    fn to_file(file: LogFile) -> Sink {
        Sink::new(move |line| (&file).write_all(line))
    }
}

impl Write for Sink {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        (self.0)(&redacted_line(line))?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Sink {
    type Writer = Sink;

    fn make_writer(&'a self) -> Sink {
        self.clone()
    }
}
