//! What parses foreign bytes in here, for the fuzz targets: not an interface.

use std::net::{IpAddr, Ipv4Addr};

use super::{geo, pac};
use crate::config::ProxyGroup;

struct Nowhere;

impl pac::Surroundings for Nowhere {
    fn resolve(&self, name: &str) -> Vec<IpAddr> {
        let length = u8::try_from(name.len()).unwrap_or(u8::MAX);
        if length % 3 == 0 { Vec::new() } else { vec![Ipv4Addr::new(10, 0, 0, length).into()] }
    }

    fn own_address(&self) -> IpAddr {
        Ipv4Addr::LOCALHOST.into()
    }

    fn unix_time(&self) -> i64 {
        1_700_000_000
    }
}

/// Runs a proxy configuration file; the proxies it names.
///
/// # Errors
/// The message for the administrator.
pub fn proxy_configuration(script: &str) -> Result<Vec<ProxyGroup>, String> {
    let answer = pac::find_proxy(script, "http://www.example.org/", "www.example.org", &Nowhere);
    answer.map(|answer| pac::groups(&answer)).map_err(|error| error.to_string())
}

/// The proxies that an answer of such a file names.
pub fn proxy_answer(answer: &str) -> Vec<ProxyGroup> {
    pac::groups(answer)
}

/// The order of so many servers that a Geo API answers.
pub fn geo_order(reply: &[u8], count: usize) -> Option<Vec<usize>> {
    geo::parse_reply(reply, count)
}
