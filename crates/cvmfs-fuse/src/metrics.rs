//! Numbers for monitoring: offered to Prometheus, and sent to InfluxDB (client behaviour §2.5).
//!
//! Both are made from [`Status`](crate::control::Status) alone, so that `status`, metrics and telemetry never
//! contradict each other.

mod exposition;
mod influx;
mod listener;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

pub use exposition::{CONTENT_TYPE, escaped, head, render};
pub use influx::{Influx, InfluxHost};

pub(crate) use influx::Telemetry;
pub(crate) use listener::MetricsListener;

/// Where metrics are offered. Nothing is offered to other machines: that is the business of a collector, which
/// has its own ideas of who may ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MetricsAddress {
    /// A unix socket.
    Unix(PathBuf),
    /// A port of a loopback address.
    Loopback(SocketAddr),
}

impl FromStr for MetricsAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<MetricsAddress, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return match path.strip_prefix('/') {
                Some(_) => Ok(MetricsAddress::Unix(path.into())),
                None => Err("expected unix:/PATH with an absolute path".into()),
            };
        }
        let address = match text.strip_prefix("localhost:") {
            Some(port) => {
                port.parse().ok().map(|port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port))
            }
            None => text.parse().ok(),
        };
        match address {
            Some(address) if address.port() > 0 && address.ip().is_loopback() => {
                Ok(MetricsAddress::Loopback(address))
            }
            _ => Err("expected unix:/PATH, 127.0.0.1:PORT or [::1]:PORT".into()),
        }
    }
}

impl fmt::Display for MetricsAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MetricsAddress::Unix(path) => write!(formatter, "unix:{}", path.display()),
            MetricsAddress::Loopback(address) => write!(formatter, "{address}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_offered_on_this_machine_only() {
        for text in ["unix:/run/x.sock", "127.0.0.1:9100", "[::1]:9100"] {
            assert_eq!(text.parse::<MetricsAddress>().unwrap().to_string(), text);
        }
        assert_eq!("localhost:9100".parse::<MetricsAddress>().unwrap().to_string(), "127.0.0.1:9100");
        for text in
            ["0.0.0.0:9100", "[::]:9100", "192.0.2.1:9100", "127.0.0.1:0", "127.0.0.1", "unix:x", "9100", ""]
        {
            assert!(text.parse::<MetricsAddress>().is_err(), "{text}");
        }
    }
}
