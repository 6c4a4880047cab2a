//! Benchmarks, as ratios to the same work without CernVM-FS on the same machine at the same time.

mod archive;
mod client;
mod convert;
mod driver;
mod publish;
mod read;
mod start;
mod syscall;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Serialize;
use testkit::{interrupt, scratch, workspace_root};

use crate::build;

const NAMES: [&str; 6] = ["client", "convert", "driver", "publish", "read", "start"];

#[derive(Debug, clap::Args)]
pub struct Options {
    /// Which: read (warm reads through overlayfs), start (docker run of a thin image),
    /// client (many small and some large files, cold to hot; memory), publish (archives of
    /// small, large and many files; nothing new; check; memory), driver (pull, run, commit and
    /// twenty containers at once against overlay2); all if none is named
    names: Vec<String>,
    /// Print one JSON document instead of the table
    #[arg(long)]
    json: bool,
    /// Work in a new directory below this one: another disk, or an emptier part of this one. What is measured creates
    /// many files, and how long that takes depends on the place
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
}

/// One line of the result.
#[derive(Debug, Clone, Serialize)]
pub struct Line {
    /// What was measured.
    pub name: String,
    /// Unit of the two values.
    pub unit: &'static str,
    /// Median without CernVM-FS.
    pub native: f64,
    /// Median with it.
    pub ours: f64,
    /// Median over the rounds of the ratio of two neighbouring measurements: ours to native.
    pub ratio: f64,
    /// What is to be met.
    pub goal: Goal,
    /// Whether it does.
    pub met: bool,
}

/// What a line has to meet.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// Throughput: at least this.
    AtLeast(f64),
    /// Time: at most this.
    AtMost(f64),
    /// Not the ratio but our own value: at most this.
    Within(f64),
}

impl Line {
    /// Evaluates the rounds, each a pair of native and ours.
    pub fn new(name: &str, unit: &'static str, goal: Goal, rounds: &[(f64, f64)]) -> Self {
        let ratio = median(rounds.iter().map(|(native, ours)| ours / native).collect());
        let ours = median(rounds.iter().map(|round| round.1).collect());
        let met = match goal {
            Goal::AtLeast(bound) => ratio >= bound,
            Goal::AtMost(bound) => ratio <= bound,
            Goal::Within(bound) => ours <= bound,
        };
        Self {
            name: name.to_owned(),
            unit,
            native: median(rounds.iter().map(|round| round.0).collect()),
            ours,
            ratio,
            goal,
            met,
        }
    }
}

impl Line {
    /// A value that nothing native compares to.
    fn alone(name: &str, unit: &'static str, goal: f64, value: f64) -> Self {
        Self::new(name, unit, Goal::Within(goal), &[(goal, value)])
    }
}

/// Runs the named benchmarks.
pub fn run(options: &Options) -> Result<()> {
    for name in &options.names {
        if !NAMES.contains(&name.as_str()) {
            bail!("there is no benchmark {name}; there are: {}", NAMES.join(", "));
        }
    }
    let wanted = |name: &str| options.names.is_empty() || options.names.iter().any(|other| other == name);
    let home = match &options.directory {
        Some(directory) => std::path::absolute(directory)?.join("cvmfs-bench"),
        None => workspace_root().join("target/bench"),
    };
    std::fs::create_dir_all(&home)?;
    spread_directories_below(&home);
    scratch::use_base(&home);
    testkit::binary::use_binaries_of(&build::binaries(build::Profile::Release)?);
    interrupt::catch();
    let lines = measure(wanted);
    scratch::remove(&home);
    let lines = lines?;
    if options.json {
        println!("{}", serde_json::json!({"kernel": kernel(), "lines": lines}));
    } else {
        print_table(&lines);
    }
    Ok(())
}

/// Asks ext4 to place the directories that are made in this one far from each other, so that what one measurement
/// leaves or what a build has deleted is not in the way of another. Elsewhere there is nothing to ask.
fn spread_directories_below(directory: &Path) {
    let spread = || -> std::io::Result<()> {
        let directory = std::fs::File::open(directory)?;
        let flags = rustix::fs::ioctl_getflags(&directory)?;
        Ok(rustix::fs::ioctl_setflags(&directory, flags | rustix::fs::IFlags::TOPDIR)?)
    };
    if let Err(error) = spread() {
        eprintln!("directories are not spread over the disk: {error}");
    }
}

fn measure(wanted: impl Fn(&str) -> bool) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    if wanted("client") {
        lines.extend(client::measure()?);
    }
    if wanted("publish") {
        lines.extend(publish::measure()?);
    }
    if wanted("convert") {
        lines.extend(convert::measure()?);
    }
    if wanted("driver") {
        lines.extend(driver::measure()?);
    }
    if wanted("start") {
        lines.extend(start::measure()?);
    }
    // Last: it stays on one processor.
    if wanted("read") {
        lines.extend(read::measure()?);
    }
    Ok(lines)
}

fn print_table(lines: &[Line]) {
    println!("{:36}{:>12}{:>12}{:>7}{:>8}{:>10}", "", "native", "ours", "", "ratio", "goal");
    for line in lines {
        let goal = match line.goal {
            Goal::AtLeast(bound) => format!(">= {bound}"),
            Goal::AtMost(bound) => format!("<= {bound}"),
            Goal::Within(bound) => format!("<= {bound} {}", line.unit),
        };
        let verdict = if line.met { "" } else { "  missed" };
        println!(
            "{:36}{:>12.2}{:>12.2}{:>7}{:>8.2}{:>10}{verdict}",
            line.name, line.native, line.ours, line.unit, line.ratio, goal
        );
    }
    println!("Linux {}", kernel());
}

fn kernel() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// How often the peak memory of a program is looked at.
const MEMORY_POLL: Duration = Duration::from_millis(10);

/// Runs a program; seconds, and peak resident memory in MB.
fn time_and_memory(mut command: Command) -> Result<(f64, f64)> {
    let started = Instant::now();
    let mut child = command.stdout(Stdio::null()).spawn()?;
    let mut megabytes = 0.0_f64;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        // the process may end in between
        megabytes = megabytes.max(peak(child.id()).unwrap_or(0.0));
        std::thread::sleep(MEMORY_POLL);
    };
    ensure!(status.success(), "{command:?} failed");
    Ok((started.elapsed().as_secs_f64(), megabytes))
}

fn peak(pid: u32) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no such field")?;
    let kilobytes: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kilobytes / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_the_median_of_the_rounds_and_is_judged_by_its_goal() {
        let rounds = [(100.0, 90.0), (100.0, 96.0), (10.0, 9.9)];
        let line = Line::new("x", "GB/s", Goal::AtLeast(0.95), &rounds);
        assert!((line.ratio - 0.96).abs() < 1e-9 && line.met);
        assert!(!Line::new("x", "s", Goal::AtMost(0.9), &rounds).met);
    }
}
