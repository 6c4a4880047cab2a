//! `cvmfs-client fsck`: looks at every file of a cache.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use cvmfs_client::cache::{Finding, FsckProgress, FsckReport, Problem, fsck as look};

/// How often progress is shown on a terminal, and in a log.
const OFTEN: Duration = Duration::from_millis(200);
const SELDOM: Duration = Duration::from_secs(10);

/// Checks the cache in `directory`; with `repair` removes what is damaged, which is then fetched again. Fails if
/// something is damaged and still there.
pub(super) fn fsck(json: bool, directory: &Path, repair: bool) -> anyhow::Result<ExitCode> {
    let terminal = std::io::stderr().is_terminal();
    let interval = if terminal { OFTEN } else { SELDOM };
    let mut shown = Instant::now();
    let mut progress = |state: FsckProgress| {
        if shown.elapsed() >= interval {
            shown = Instant::now();
            let (start, end) = if terminal { ("\r", "") } else { ("", "\n") };
            eprint!("{start}{} files, {} MiB looked at{end}", state.files, state.bytes >> 20);
            let _ = std::io::stderr().flush();
        }
    };
    let report = look(directory, repair, &mut progress)
        .with_context(|| format!("{} cannot be checked", directory.display()))?;
    if terminal {
        eprint!("\r{:60}\r", "");
    }
    if json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", described(&report, repair));
    }
    Ok(if report.problems > report.removed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn described(report: &FsckReport, repair: bool) -> String {
    let mut text = String::new();
    for finding in &report.findings {
        text.push_str(&line(finding));
    }
    let more = report.problems.saturating_sub(report.findings.len() as u64);
    if more > 0 {
        text.push_str(&format!("and {more} more\n"));
    }
    text.push_str(&format!(
        "{}: {} files, {} MiB; {} whole, {} partly present, {} that carry no checksum, {} with a problem, {} removed\n",
        report.directory.display(),
        report.files,
        report.bytes >> 20,
        report.whole,
        report.partial,
        report.unverifiable,
        report.problems,
        report.removed
    ));
    if report.problems > report.removed {
        text.push_str(if repair {
            "some could not be removed: is the directory writable?\n"
        } else {
            "run again with --repair to remove them; they are fetched again when they are needed\n"
        });
    }
    text
}

fn line(finding: &Finding) -> String {
    let problem = match finding.problem {
        Problem::Damaged => "damaged",
        Problem::Unreadable => "unreadable",
        Problem::Foreign => "not of the cache",
    };
    let hint = finding.hint.as_ref().map_or(String::new(), |hint| format!(" ({hint})"));
    let removed = if finding.removed { ", removed" } else { "" };
    format!("{problem}{removed}: {}{hint}\n", finding.name)
}
