//! The parameters of the log (client behaviour §2.5).

use std::path::PathBuf;

use cvmfs_client::config::{Config, ConfigError};

/// What the configuration says about logs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LogSettings {
    /// Where warnings, errors and decisions go besides the mount's own log.
    pub(super) destination: Destination,
    /// A file for everything.
    pub(super) debug_log: Option<PathBuf>,
}

/// In place of the system's log there may be a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Destination {
    System(SystemLogSettings),
    File(PathBuf),
}

/// How lines appear in the system's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SystemLogSettings {
    /// Number of the facility in the syslog protocol.
    pub(super) facility: u8,
    /// Severity of lines that are neither warnings nor errors.
    pub(super) severity: u8,
    /// What stands in parentheses in front of each line.
    pub(super) prefix: String,
}

/// Facility of lines without `CVMFS_SYSLOG_FACILITY`: `user`.
const USER: u8 = 1;
/// `local0`; the configuration counts from here.
const LOCAL0: u8 = 16;
const NOTICE: u8 = 5;
const INFO: u8 = 6;
const DEBUG: u8 = 7;

impl LogSettings {
    pub(super) fn from(config: &Config) -> Result<LogSettings, ConfigError> {
        let value = |name: &str| config.get(name).filter(|setting| !setting.value.is_empty());
        let path = |name: &str| value(name).map(|setting| config.resolve_path(&setting.value));
        let number = |name: &str, last: u8| -> Result<Option<u8>, ConfigError> {
            let Some(setting) = value(name) else { return Ok(None) };
            match setting.value.parse() {
                Ok(number) if number <= last => Ok(Some(number)),
                _ => Err(config.invalid(name, setting, &format!("expected a number from 0 to {last}"))),
            }
        };
        let severity = match number("CVMFS_SYSLOG_LEVEL", 3)? {
            Some(1) => DEBUG,
            Some(2) => INFO,
            _ => NOTICE,
        };
        let facility = number("CVMFS_SYSLOG_FACILITY", 7)?.map_or(USER, |number| LOCAL0 + number);
        let prefix =
            value("CVMFS_SYSLOG_PREFIX").map_or(config.fqrn(), |setting| setting.value.as_str()).to_owned();
        let destination = match path("CVMFS_USYSLOG") {
            Some(path) => Destination::File(path),
            None => Destination::System(SystemLogSettings { facility, severity, prefix }),
        };
        Ok(LogSettings { destination, debug_log: path("CVMFS_DEBUGLOG") })
    }
}
