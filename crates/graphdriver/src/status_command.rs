//! `cvmfs-graphdriver status`: asks a running plugin and shows what it says.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::driver::report::{LayerReport, Lazy, Report};

/// A plugin answers in two seconds, whatever its repositories do.
const PATIENCE: Duration = Duration::from_secs(10);
/// Thousands of layers fit.
const MAX_ANSWER: u64 = 64 << 20;

/// Prints the state of the plugin that listens on `socket`.
///
/// # Errors
/// Nobody listens or answers, or the plugin is not in use.
pub fn run(socket: &Path, json: bool) -> Result<()> {
    let text = ask(socket, "/status").with_context(|| {
        format!(
            "cannot ask the plugin at {}; on the host a managed plugin listens on \
             /run/docker/plugins/ID/plugin.sock with the ID of `docker plugin inspect --format {{{{.ID}}}} NAME`",
            socket.display()
        )
    })?;
    let report: Report = serde_json::from_str(&text).context("the plugin's answer cannot be read")?;
    let shown = if json { format!("{}\n", text.trim_end()) } else { for_people(&report) };
    std::io::stdout().write_all(shown.as_bytes()).context("cannot write to standard output")
}

fn ask(socket: &Path, path: &str) -> Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: plugin\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(MAX_ANSWER).read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("the answer is not HTTP")?;
    let status = head.split(' ').nth(1).unwrap_or_default();
    if status != "200" {
        let error = serde_json::from_str::<serde_json::Value>(body).ok();
        let error = error.as_ref().and_then(|error| error["Err"].as_str()).unwrap_or(body.trim());
        bail!("{error}");
    }
    Ok(body.to_owned())
}

fn for_people(report: &Report) -> String {
    let mut text = format!(
        "cvmfs-graphdriver {} in {}, repositories mounted {}\n",
        report.version,
        report.home,
        if report.mount_method == "external" { "by the host" } else { "by the plugin" }
    );
    if report.repositories.is_empty() {
        text.push_str("no repository is mounted\n");
    }
    for repository in &report.repositories {
        let users = repository.users;
        text.push_str(&format!(
            "repository {}: {}; {users} mounted layers\n",
            repository.fqrn, repository.summary
        ));
    }
    text.push_str(&format!("layers of normal images: {}\n", report.ordinary_layers));
    for layer in &report.layers {
        text.push_str(&format!(
            "{} {}: {}, {}, {}\n",
            layer.kind,
            short(&layer.id),
            if layer.mounted { "mounted" } else { "not mounted" },
            match layer.lazy {
                Lazy::All => "lazy",
                Lazy::Part => "lazy in part",
                Lazy::No => "not lazy",
            },
            layer.reason
        ));
        if layer.lazy != Lazy::No {
            text.push_str(&format!("  fetched {}\n", fetched(layer)));
        }
    }
    text
}

fn fetched(layer: &LayerReport) -> String {
    let mebibytes = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    match layer.bytes {
        Some(bytes) if bytes > 0 => {
            let percent = layer.bytes_fetched as f64 / bytes as f64 * 100.0;
            format!("{} of {} ({percent:.1} %)", mebibytes(layer.bytes_fetched), mebibytes(bytes))
        }
        Some(_) => mebibytes(layer.bytes_fetched),
        None => format!("{} of what is not known yet", mebibytes(layer.bytes_fetched)),
    }
}

/// As `docker ps` shortens ids.
fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_see_what_is_lazy_and_how_much_was_fetched() {
        let layer = LayerReport {
            id: "0123456789abcdef".to_owned(),
            kind: "container".to_owned(),
            mounted: true,
            lazy: Lazy::All,
            reason: "all 3 layers lie in repositories".to_owned(),
            bytes_fetched: 3 << 20,
            bytes: Some(60 << 20),
            ..LayerReport::default()
        };
        let unknown = LayerReport { bytes: None, mounted: false, lazy: Lazy::Part, ..layer.clone() };
        let report = Report { layers: vec![layer, unknown], ..Report::default() };
        let text = for_people(&report);
        for words in [
            "container 0123456789ab: mounted, lazy, all 3 layers",
            "fetched 3.0 MiB of 60.0 MiB (5.0 %)",
            "not mounted, lazy in part",
            "of what is not known yet",
            "no repository is mounted",
        ] {
            assert!(text.contains(words), "no {words:?} in:\n{text}");
        }
    }
}
