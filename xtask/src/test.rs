//! All tests, with one total at the end: formatting, lints, units, the stories on real engines.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

use crate::build::cargo;
use crate::faults::Rows;

/// What the tests use beside the Rust tool chain: the engine and registry of the stories, the content of
/// their images, the independent reader and publisher, and a C compiler for the bundled C libraries.
const PACKAGES: [&str; 10] = [
    "docker.io",
    "docker-registry",
    "skopeo",
    "busybox-static",
    "python3-cryptography",
    "attr",
    "openssl",
    "zstd",
    "gcc",
    "libc6-dev",
];

/// Engines on which the tests run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Engines {
    /// The installed one.
    #[default]
    Installed,
    /// Newer ones, too, and what depends on the kernel on Debian's.
    All,
}

/// Newer engines, by the Debian release that has them: the last one with graph driver plugins in Debian.
const NEWER_ENGINES: [&str; 1] = ["trixie"];

/// What starts an engine.
const WITH_ENGINES: [&str; 9] = [
    "bad_descriptors",
    "commit_thin_image",
    "converted_images",
    "crash_matrix",
    "docker",
    "docker_thin",
    "every_verb",
    "start_thin_image",
    "survive_restarts",
];

/// Tests that mount need root, and the stories start engines: so many at a time, on any machine. Half of the time they
/// wait, for time-outs above all, so two processors have enough to do with three.
const THREADS: (&str, &str) = ("RUST_TEST_THREADS", "3");

/// Packages whose very unit tests mount or start engines, and thus need root.
const NEED_ROOT: [&str; 2] = ["testkit", "overlay"];

/// More failures than this are no accident, and are not tried again.
const MOST_UNSTEADY: usize = 5;

/// Counts of tests.
#[derive(Debug, Default, Clone, Copy)]
pub struct Total {
    /// Tests that passed.
    pub passed: u64,
    /// Tests that failed.
    pub failed: u64,
    /// Tests that did not run.
    pub skipped: u64,
}

impl Total {
    /// Adds the counts of another run.
    pub fn add(&mut self, other: Total) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

/// What a run said of single tests.
#[derive(Debug, Default)]
struct Failures {
    names: BTreeSet<String>,
    passed: BTreeSet<String>,
    /// The options that select the test programs with failures, as cargo names them.
    targets: BTreeSet<Vec<String>>,
    /// A test program ended in another way than by its verdict: it was killed, and says nothing of what failed.
    is_incomplete: bool,
}

impl Failures {
    fn note(&mut self, line: &str) {
        if let Some((name, outcome)) = line.strip_prefix("test ").and_then(|rest| rest.rsplit_once(" ... ")) {
            match outcome {
                "FAILED" => self.names.insert(name.to_owned()),
                "ok" => self.passed.insert(name.to_owned()),
                _ => return,
            };
        }
        self.targets.extend(failed_target(line));
        self.is_incomplete |= line.trim_start().starts_with("process didn't exit successfully: `");
    }
}

/// `--test network_setup` of "error: test failed, to rerun pass `-p cvmfs-client --test network_setup`". The package
/// is left out: with it alone, cargo would build everything anew with other features.
fn failed_target(line: &str) -> Option<Vec<String>> {
    let options = line.strip_prefix("error: test failed, to rerun pass `")?.strip_suffix('`')?;
    let mut words = options.split(' ').peekable();
    words.next_if_eq(&"-p").and_then(|_| words.next());
    Some(words.map(str::to_owned).collect())
}

/// Runs everything and prints the total as the last line; an error if anything failed.
pub fn run(quick: bool, engines: Engines) -> Result<()> {
    if !quick {
        testkit::install(&PACKAGES)?;
    }
    let mut total = Total::default();
    let lints = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"];
    for (name, arguments) in [("formatting", &["fmt", "--all", "--check"][..]), ("lints", &lints)] {
        // A minimal tool chain has neither; what is not there cannot be run.
        if available(arguments[0]) {
            check(&mut total, name, arguments)?;
        } else {
            println!("== {name}: skipped, cargo {} is not installed", arguments[0]);
            total.skipped += 1;
        }
    }
    // Everything of one selection of packages, so that their dependencies are built once, with one set of features.
    let build = if quick { "--bins" } else { "--all-targets" };
    if !check(&mut total, "binaries", &["build", "--quiet", "--workspace", build])? {
        return finish(total);
    }
    let mut selection = vec!["test", "--workspace", "--no-fail-fast"];
    if quick {
        // What stands in `tests/` of a crate mounts, or wants a registry.
        selection.extend(["--lib", "--bins", "--exclude", "stories"]);
        for package in NEED_ROOT {
            selection.extend(["--exclude", package]);
        }
    }
    let mut rows = Rows::default();
    let mut failures = Failures::default();
    let mut outcome = tests(&mut rows, &mut failures, "tests", &selection, None)?;
    let unsteady = again(&mut rows, &failures)?;
    outcome.passed += unsteady;
    outcome.failed -= unsteady.min(outcome.failed);
    total.add(outcome);
    if engines == Engines::All {
        total.add(on_newer_engines(&mut rows)?);
        total.add(crate::kernel::tests(false)?);
    }
    rows.print()?;
    finish(total)
}

/// Runs the tests that failed once more, one after the other, and returns how many pass now. The stories depend on
/// engines and clocks of a machine that may be busy: a failure that does not repeat is shown, but does not end the
/// work of everybody else.
fn again(rows: &mut Rows, failures: &Failures) -> Result<u64> {
    let count = failures.names.len();
    if count == 0 || count > MOST_UNSTEADY || failures.targets.is_empty() || failures.is_incomplete {
        return Ok(0);
    }
    let mut arguments = vec!["test", "--workspace", "--no-fail-fast"];
    arguments.extend(failures.targets.iter().flatten().map(String::as_str));
    arguments.extend(["--", "--exact", "--test-threads=1"]);
    arguments.extend(failures.names.iter().map(String::as_str));
    let mut repeated = Failures::default();
    tests(rows, &mut repeated, "tests that failed, once more", &arguments, None)?;
    let mut unsteady = 0;
    for name in failures.names.iter().filter(|name| !repeated.names.contains(*name)) {
        // A program that was killed names neither those that passed nor those that failed.
        if repeated.passed.contains(name) {
            println!("== UNSTEADY: {name} failed at first and passed when run again, alone");
            rows.forgive(name);
            unsteady += 1;
        }
    }
    Ok(unsteady)
}

/// The tests that start an engine, on each of the newer ones.
fn on_newer_engines(rows: &mut Rows) -> Result<Total> {
    let mut total = Total::default();
    for suite in NEWER_ENGINES {
        let directory = testkit::workspace_root().join("target/engines").join(suite);
        testkit::engine::fetch(suite, &directory)?;
        let mut selection = vec!["test", "--workspace", "--no-fail-fast"];
        selection.extend(WITH_ENGINES.iter().flat_map(|name| ["--test", name]));
        let mut failures = Failures::default();
        let name = format!("tests on the engine of {suite}");
        total.add(tests(rows, &mut failures, &name, &selection, Some(&directory))?);
    }
    Ok(total)
}

fn finish(total: Total) -> Result<()> {
    let skipped = if total.skipped > 0 { format!(", {} skipped", total.skipped) } else { String::new() };
    println!("{} passed, {} failed{skipped}", total.passed, total.failed);
    if total.failed > 0 {
        // The total stays the last line.
        std::process::exit(1);
    }
    Ok(())
}

fn available(subcommand: &str) -> bool {
    let mut version = cargo(&[subcommand, "--version"]);
    version.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

/// A step that counts as one test.
fn check(total: &mut Total, name: &str, arguments: &[&str]) -> Result<bool> {
    let started = Instant::now();
    println!("== {name}: cargo {}", arguments.join(" "));
    let status = merged(cargo(arguments)).status().context("cannot run cargo")?;
    let outcome = if status.success() { "ok" } else { "FAILED" };
    println!("== {name}: {outcome} ({:.1} s)", started.elapsed().as_secs_f64());
    match status.success() {
        true => total.passed += 1,
        false => total.failed += 1,
    }
    Ok(status.success())
}

/// Runs `cargo test …`, shows its output as it comes, and adds up the counts of all test programs.
fn tests(
    rows: &mut Rows,
    failures: &mut Failures,
    name: &str,
    arguments: &[&str],
    engine: Option<&Path>,
) -> Result<Total> {
    let started = Instant::now();
    println!("== {name}: cargo {}", arguments.join(" "));
    // One pipe for both: what cargo says stands where it belongs.
    let (output, writer) = std::io::pipe().context("cannot make a pipe")?;
    let mut command = merged(cargo(arguments));
    if let Some(engine) = engine {
        command.env(testkit::engine::VARIABLE, engine);
    }
    command.env(THREADS.0, THREADS.1).stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn().context("cannot run cargo")?;
    // It holds the writing end.
    drop(command);
    let mut total = Total::default();
    for line in BufReader::new(output).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        println!("{line}");
        rows.note(&line);
        failures.note(&line);
        if let Some(counts) = parse_result(&line) {
            total.add(counts);
        }
    }
    let status = child.wait()?;
    if !status.success() && total.failed == 0 {
        // It did not compile, or a test program was killed: no line says so.
        total.failed += 1;
    }
    println!(
        "== {name}: {} passed, {} failed ({:.1} s)",
        total.passed,
        total.failed,
        started.elapsed().as_secs_f64()
    );
    if status.success() && total.passed == 0 {
        bail!("{name}: not a single test ran");
    }
    Ok(total)
}

/// Without input: a test that asks a question must fail, not wait.
fn merged(mut command: Command) -> Command {
    command.stdin(Stdio::null());
    command
}

/// `test result: ok. 17 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 3.92s`
pub fn parse_result(line: &str) -> Option<Total> {
    let counts = line.strip_prefix("test result: ")?.split_once(". ")?.1;
    let count =
        |what: &str| counts.split("; ").find_map(|part| part.strip_suffix(what)?.trim().parse::<u64>().ok());
    Some(Total { passed: count("passed")?, failed: count("failed")?, skipped: count("ignored")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counts_of_a_test_program_are_read() {
        let line = "test result: FAILED. 17 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out; finished in 3.92s";
        let total = parse_result(line).unwrap();
        assert_eq!((total.passed, total.failed, total.skipped), (17, 2, 1));
        assert!(parse_result("test tests::the_counts_are_read ... ok").is_none());
    }

    #[test]
    fn failures_and_how_to_run_them_again_are_read() {
        let mut failures = Failures::default();
        for line in [
            "test one_that_holds ... ok",
            "test tests::one_that_does_not ... FAILED",
            "error: test failed, to rerun pass `-p cvmfs-client --test network_setup`",
            "error: test failed, to rerun pass `-p xtask --bin xtask`",
            "error: test failed, to rerun pass `--lib`",
        ] {
            failures.note(line);
        }
        assert_eq!(failures.passed.iter().collect::<Vec<_>>(), ["one_that_holds"]);
        assert_eq!(failures.names.iter().collect::<Vec<_>>(), ["tests::one_that_does_not"]);
        assert!(!failures.is_incomplete);
        let killed = "  process didn't exit successfully: `target/debug/deps/x-1` (signal: 9, SIGKILL: kill)";
        failures.note(killed);
        assert!(failures.is_incomplete);
        let targets: Vec<String> = failures.targets.iter().map(|target| target.join(" ")).collect();
        assert_eq!(targets, ["--bin xtask", "--lib", "--test network_setup"]);
    }
}
