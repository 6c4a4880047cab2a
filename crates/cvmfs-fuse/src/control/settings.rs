//! Where a mount can be asked besides its own socket, and where it reports by itself (client behaviour §2.5).

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use cvmfs_client::config::{Config, ConfigError, Setting};

use crate::metrics::{Influx, MetricsAddress};

/// Interval of telemetry that is not configured.
const TELEMETRY_RATE: Duration = Duration::from_secs(300);
/// Shortest interval of telemetry.
const SHORTEST_TELEMETRY_RATE: i64 = 5;

/// What the configuration says about observing a mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlSettings {
    /// The socket at which `cvmfs_talk` looks.
    pub talk: TalkSocket,
    /// Where metrics are offered.
    pub metrics: Option<MetricsAddress>,
    /// Where counters are sent.
    pub telemetry: Option<Influx>,
    /// What is missing where counters should be sent: the mount goes on without.
    pub complaint: Option<String>,
}

/// The socket at which `cvmfs_talk` looks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TalkSocket {
    /// Its path.
    pub path: PathBuf,
    /// Who may use it besides root.
    pub owner: Option<String>,
    /// Whether the configuration names the place, which then should work.
    pub named: bool,
}

impl ControlSettings {
    /// Reads the settings.
    ///
    /// # Errors
    /// A value of the wrong form, with its file and line.
    pub fn from(config: &Config) -> Result<ControlSettings, ConfigError> {
        let metrics = match set(config, METRICS_LISTEN) {
            Some(setting) => Some(
                setting
                    .value
                    .parse()
                    .map_err(|rule: String| config.invalid(METRICS_LISTEN, setting, &rule))?,
            ),
            None => None,
        };
        let (telemetry, complaint) = match telemetry(config) {
            Err(error @ ConfigError::Missing { .. }) => (None, Some(error.to_string())),
            other => (other?, None),
        };
        Ok(ControlSettings { talk: talk_socket(config)?, metrics, telemetry, complaint })
    }
}

const METRICS_LISTEN: &str = "CVMFS_METRICS_LISTEN";

/// A value that is there and not empty.
fn set<'a>(config: &'a Config, name: &str) -> Option<&'a Setting> {
    config.get(name).filter(|setting| !setting.value.is_empty())
}

/// `cvmfs_talk` derives the path from the configuration: `CVMFS_WORKSPACE`, else `CVMFS_CACHE_DIR`, else
/// `CVMFS_CACHE_BASE` with `/shared` or the name, and in it `cvmfs_io.<fqrn>`. Whether the cache is shared it takes
/// from `CVMFS_SHARED_CACHE` alone, which is off if it is not set.
fn talk_socket(config: &Config) -> Result<TalkSocket, ConfigError> {
    let owner = set(config, "CVMFS_TALK_OWNER").map(|setting| setting.value.clone());
    if let Some(setting) = set(config, "CVMFS_TALK_SOCKET") {
        return Ok(TalkSocket { path: config.resolve_path(&setting.value), owner, named: true });
    }
    let workspace = match ["CVMFS_WORKSPACE", "CVMFS_CACHE_DIR"].iter().find_map(|name| set(config, name)) {
        Some(setting) => config.resolve_path(&setting.value),
        None => {
            let base = set(config, "CVMFS_CACHE_BASE").map_or_else(
                || PathBuf::from("/var/lib/cvmfs"),
                |setting| config.resolve_path(&setting.value),
            );
            if config.switch("CVMFS_SHARED_CACHE", false)? {
                base.join("shared")
            } else {
                base.join(config.fqrn())
            }
        }
    };
    let path = workspace.join(format!("cvmfs_io.{}", config.fqrn()));
    Ok(TalkSocket { path, owner, named: set(config, "CVMFS_WORKSPACE").is_some() })
}

/// Telemetry is on if it is asked for and its destination is complete. Other than in the C++ client the interval
/// has its default also in practice.
fn telemetry(config: &Config) -> Result<Option<Influx>, ConfigError> {
    if !config.switch("CVMFS_TELEMETRY_SEND", false)? {
        return Ok(None);
    }
    let required = |name: &'static str| {
        set(config, name).ok_or_else(|| ConfigError::Missing {
            parameter: name,
            fqrn: config.fqrn().to_owned(),
            advice: "the same file as CVMFS_TELEMETRY_SEND, or set that to no".into(),
        })
    };
    let (host, port) = (required("CVMFS_INFLUX_HOST")?, required("CVMFS_INFLUX_PORT")?);
    let metric = required("CVMFS_INFLUX_METRIC_NAME")?;
    let port_number = port
        .value
        .parse::<u16>()
        .ok()
        .filter(|port| *port > 0)
        .ok_or_else(|| config.invalid("CVMFS_INFLUX_PORT", port, "expected a port from 1 to 65535"))?;
    if !is_line_protocol_name(&metric.value) {
        let rule = "expected a name of letters, digits, '-', '_' and '.'";
        return Err(config.invalid("CVMFS_INFLUX_METRIC_NAME", metric, rule));
    }
    let pairs = |name: &'static str| -> Result<String, ConfigError> {
        let Some(setting) = set(config, name) else { return Ok(String::new()) };
        let is_pair = |pair: &str| {
            pair.split_once('=').is_some_and(|(key, value)| !key.is_empty() && !value.is_empty())
        };
        if setting.value.split(',').all(is_pair) && !setting.value.contains(char::is_control) {
            Ok(setting.value.clone())
        } else {
            Err(config.invalid(name, setting, "expected key=value,key=value"))
        }
    };
    let rate = config.number("CVMFS_TELEMETRY_RATE", TELEMETRY_RATE.as_secs().cast_signed())?;
    let rate = Duration::from_secs(rate.max(SHORTEST_TELEMETRY_RATE).unsigned_abs());
    let host = match host.value.parse() {
        Ok(address) => crate::metrics::InfluxHost::Address(SocketAddr::new(address, port_number)),
        Err(_) => crate::metrics::InfluxHost::Name(host.value.clone(), port_number),
    };
    Ok(Some(Influx {
        host,
        metric: metric.value.clone(),
        tags: pairs("CVMFS_INFLUX_EXTRA_TAGS")?,
        fields: pairs("CVMFS_INFLUX_EXTRA_FIELDS")?,
        rate,
    }))
}

fn is_line_protocol_name(name: &str) -> bool {
    name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}
