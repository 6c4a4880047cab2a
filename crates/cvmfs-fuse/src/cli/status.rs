//! `cvmfs-client status`: the state of mounts without touching them.

use std::fmt::Write as _;
use std::process::ExitCode;

use super::NotMounted;
use crate::control::{self, HostStatus, Inspected, ProxyStatus, Status};

/// Shows all mounts, or those of one repository. Fails if one of them does not answer.
pub(super) fn status(json: bool, fqrn: Option<&str>) -> anyhow::Result<ExitCode> {
    let mounts = control::inspect_all(fqrn);
    if let Some(fqrn) = fqrn
        && mounts.is_empty()
    {
        return Err(NotMounted(fqrn.to_owned()).into());
    }
    if json {
        let documents: Vec<_> = mounts.iter().map(Inspected::document).collect();
        match (fqrn, documents.as_slice()) {
            // One repository, one mount: the document of the contract.
            (Some(_), [document]) => println!("{document}"),
            _ => println!("{}", serde_json::Value::from(documents)),
        }
    }
    let mut code = ExitCode::SUCCESS;
    for mount in &mounts {
        match mount {
            Inspected::Answered(status) if !json => print!("{}", described(status)),
            Inspected::Answered(_) => {}
            Inspected::Silent { record, reason, .. } => {
                let place = record.mounted.mountpoint.display();
                eprintln!("cvmfs-client: {} at {place} does not answer: {reason}", record.mounted.fqrn);
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}

fn described(status: &Status) -> String {
    let mut text = format!("{} at {}\n", status.fqrn, status.mountpoint.display());
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "  {name:<10} {value}");
    };
    line(
        "revision",
        format!(
            "{}{}, root catalog {}",
            status.revision,
            if status.fixed { " (fixed)" } else { "" },
            status.root_hash
        ),
    );
    if let Some(days) = status.whitelist_days {
        let state = if days < 0 { "expired".into() } else { format!("valid for {days} days") };
        line("whitelist", state);
    }
    line(
        "network",
        format!(
            "{}, {} requests, {} received, {} fail-overs",
            if status.online { "online" } else { "OFFLINE" },
            status.requests,
            size(status.bytes_fetched),
            status.fail_overs
        ),
    );
    let hosts = if status.hosts.is_empty() {
        vec![HostStatus { url: status.host.clone(), current: true, round_trip_ms: None }]
    } else {
        status.hosts.clone()
    };
    for host in &hosts {
        line("host", in_use(host.current, &host.url, host.round_trip_ms.map(|time| format!("{time} ms"))));
    }
    for proxy in &status.proxies {
        line("proxy", in_use(proxy.current, &proxy.url, told_of(proxy)));
    }
    line(
        "cache",
        format!(
            "{} of {} used, {} pinned, {} hits, {} misses, {} files evicted, {} cleanups in 24 hours ({})",
            size(status.cache_used),
            limit(status.cache_limit),
            size(status.cache_pinned),
            status.cache_hits,
            status.cache_misses,
            status.evictions,
            status.cleanups,
            status.cache_directory.display()
        ),
    );
    let view = if status.layer_view { ", layer view" } else { "" };
    let reason =
        if status.mode_reason.is_empty() { String::new() } else { format!(" ({})", status.mode_reason) };
    line("reads", format!("{}{view}{reason}", status.mode));
    line("open", format!("{} files, {} catalogs", status.open_files, status.catalogs));
    let causes: Vec<_> =
        status.errors_by_cause.iter().map(|(cause, count)| format!("{cause} {count}")).collect();
    let causes = if causes.is_empty() { String::new() } else { format!(" ({})", causes.join(", ")) };
    line("failed", format!("{} requests{causes}", status.io_errors));
    line(
        "worker",
        format!(
            "process {}, version {}, restarted {} times",
            status.pid, status.version, status.worker_restarts
        ),
    );
    for warning in &status.warnings {
        line("WARNING", warning.clone());
    }
    for error in &status.errors {
        line("ERROR", error.clone());
    }
    text
}

fn in_use(current: bool, url: &str, more: Option<String>) -> String {
    let more = more.map_or(String::new(), |more| format!(" ({more})"));
    format!("{} {url}{more}", if current { "->" } else { "  " })
}

fn told_of(proxy: &ProxyStatus) -> Option<String> {
    let name = proxy.name.as_ref().map_or(String::new(), |name| format!("{name}, "));
    let fallback = if proxy.fallback { ", fallback" } else { "" };
    let state = if proxy.state == "unknown" { String::new() } else { format!(", {}", proxy.state) };
    Some(format!("{name}group {}{fallback}{state}", proxy.group))
}

fn limit(bytes: u64) -> String {
    if bytes == u64::MAX { "unlimited".into() } else { size(bytes) }
}

/// Bytes for people.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(unit > 0 && value < 10.0);
    format!("{value:.digits$} {}", UNITS.get(unit).copied().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_readable() {
        for (bytes, text) in
            [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (4000 << 20, "3.9 GiB"), (20 << 30, "20 GiB")]
        {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn what_is_wrong_and_which_proxy_is_in_use_is_seen() {
        let proxy = |url: &str, state: &str, current| ProxyStatus {
            url: url.into(),
            state: state.into(),
            current,
            ..ProxyStatus::default()
        };
        let status = Status {
            fqrn: "a.b".into(),
            proxies: vec![proxy("http://one:1", "burned", false), proxy("http://two:2", "slow", true)],
            errors: vec!["everything".into()],
            warnings: vec!["soon".into()],
            whitelist_days: Some(3),
            ..Status::default()
        };
        let text = described(&status);
        for line in [
            "     http://one:1 (group 0, burned)",
            "  -> http://two:2 (group 0, slow)",
            "ERROR      everything",
            "WARNING    soon",
            "valid for 3 days",
            "OFFLINE",
        ] {
            assert!(text.contains(line), "{line} is not in {text}");
        }
    }
}
