//! Answers about hosts, proxies, names and timeouts.

use std::fmt::Write as _;
use std::time::Duration;

use cvmfs_client::deadline::Deadline;
use cvmfs_client::network::InvalidList;

use super::answers::Context;
use super::command::Command;
use super::status::{HostStatus, ProxyStatus};
use crate::logging::redaction::redacted;

/// Time for measuring all hosts, or for the Geo API.
const PROBE_PATIENCE: Duration = Duration::from_secs(30);

pub(super) fn answer(context: &Context, command: &Command) -> String {
    let fetcher = context.mount.view.repository().store().fetcher();
    let done = || "OK".to_owned();
    let set = |outcome: Result<(), InvalidList>| match outcome {
        Ok(()) => "OK".into(),
        Err(error) => format!("Failed, {}", redacted(&error.to_string())),
    };
    match command {
        Command::HostInfo(side) => host_info(&context.hosts(*side)),
        Command::HostSwitch(side) => match context.fetcher(*side) {
            Some(fetcher) => {
                fetcher.switch_host();
                done()
            }
            None => NO_EXTERNAL.into(),
        },
        Command::HostSet(side, list) => match context.fetcher(*side) {
            Some(fetcher) => set(fetcher.set_hosts(list)),
            None => NO_EXTERNAL.into(),
        },
        Command::HostProbe => {
            fetcher.probe_hosts(Deadline::after(PROBE_PATIENCE));
            done()
        }
        Command::HostProbeGeo if fetcher.probe_geo(Deadline::after(PROBE_PATIENCE)) => done(),
        Command::HostProbeGeo => "Failed".into(),
        Command::ProxyInfo(side) => proxy_info(&context.proxies(*side)),
        Command::ProxySet(side, list) => match context.fetcher(*side) {
            Some(fetcher) => set(fetcher.set_proxies(list)),
            None => NO_EXTERNAL.into(),
        },
        Command::ProxyFallback(list) => set(fetcher.set_fallback_proxies(list)),
        Command::ProxyRebalance => {
            fetcher.rebalance_proxies();
            done()
        }
        Command::ProxyGroupSwitch => {
            fetcher.switch_proxy_group();
            done()
        }
        Command::TimeoutInfo => {
            let (proxied, direct) = fetcher.timeouts();
            timeout_info(proxied, direct)
        }
        Command::TimeoutSet(proxied, direct) => {
            fetcher.set_timeouts(*proxied, *direct);
            done()
        }
        Command::NameserverGet => match fetcher.nameserver() {
            Some(server) => format!("DNS server address: {server}"),
            None => "DNS server not set.".into(),
        },
        Command::NameserverSet(server) => {
            fetcher.set_nameserver(*server);
            done()
        }
        _ => "not supported".into(),
    }
}

/// The answer to a change of what is not configured.
const NO_EXTERNAL: &str = "Failed, no servers of external files are configured (CVMFS_EXTERNAL_URL)";

fn host_info(hosts: &[HostStatus]) -> String {
    if hosts.is_empty() {
        return "No hosts defined".into();
    }
    let mut text = String::new();
    for (number, host) in hosts.iter().enumerate() {
        let time = host.round_trip_ms.map_or("unprobed".into(), |time| format!("{time} ms"));
        let _ = writeln!(text, "  [{number}] {} ({time})", host.url);
    }
    if let Some((number, host)) = hosts.iter().enumerate().find(|(_, host)| host.current) {
        let _ = writeln!(text, "Active host {number}: {}", host.url);
    }
    text
}

fn proxy_info(proxies: &[ProxyStatus]) -> String {
    if proxies.is_empty() {
        return "No proxies defined".into();
    }
    let mut text = String::from("Load-balance groups:\n");
    for group in 0..=proxies.iter().map(|proxy| proxy.group).max().unwrap_or(0) {
        let members: Vec<_> = proxies.iter().filter(|proxy| proxy.group == group).map(shown).collect();
        let _ = writeln!(text, "[{group}] {}", members.join(", "));
    }
    if let Some(active) = proxies.iter().find(|proxy| proxy.current) {
        let _ = writeln!(text, "Active proxy: [{}] {}", active.group, active.url);
    }
    if let Some(fallback) = proxies.iter().filter(|proxy| proxy.fallback).map(|proxy| proxy.group).min() {
        let _ = writeln!(text, "First fallback group: [{fallback}]");
    }
    text
}

/// Where the C++ client shows for how long a name is resolved, this one shows what matters more.
fn shown(proxy: &ProxyStatus) -> String {
    match proxy.state.as_str() {
        "slow" | "burned" | "unresolved" => format!("{} ({})", proxy.url, proxy.state),
        _ => proxy.url.clone(),
    }
}

fn timeout_info(proxied: Duration, direct: Duration) -> String {
    format!("Timeout with proxy: {}s\nTimeout without proxy: {}s", proxied.as_secs(), direct.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_proxies_are_listed_as_tools_expect_them() {
        let host = |url: &str, current, round_trip_ms| HostStatus { url: url.into(), current, round_trip_ms };
        assert_eq!(
            host_info(&[host("http://a/cvmfs/x", false, Some(12)), host("http://b/cvmfs/x", true, None)]),
            "  [0] http://a/cvmfs/x (12 ms)\n  [1] http://b/cvmfs/x (unprobed)\nActive host 1: http://b/cvmfs/x\n"
        );
        assert_eq!(host_info(&[]), "No hosts defined");
        let proxy = |url: &str, group, state: &str, current, fallback| ProxyStatus {
            url: url.into(),
            group,
            fallback,
            state: state.into(),
            current,
            name: None,
        };
        let proxies = [
            proxy("http://p1:3128", 0, "burned", false, false),
            proxy("http://p2:3128", 0, "alive", true, false),
            proxy("DIRECT", 1, "alive", false, true),
        ];
        assert_eq!(
            proxy_info(&proxies),
            "Load-balance groups:\n[0] http://p1:3128 (burned), http://p2:3128\n[1] DIRECT\n\
             Active proxy: [0] http://p2:3128\nFirst fallback group: [1]\n"
        );
    }
}
