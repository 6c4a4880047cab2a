//! All tests, with one total at the end: formatting, lints, units, the stories on real engines.

use std::io::{BufRead as _, BufReader};
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

/// Tests that mount need root, and the stories start engines: so many at a time, on any machine.
const THREADS: (&str, &str) = ("RUST_TEST_THREADS", "2");

/// Packages whose very unit tests mount or start engines, and thus need root.
const NEED_ROOT: [&str; 2] = ["testkit", "overlay"];

#[derive(Debug, Default, Clone, Copy)]
struct Total {
    passed: u64,
    failed: u64,
    skipped: u64,
}

/// Runs everything and prints the total as the last line; an error if anything failed.
pub fn run(quick: bool) -> Result<()> {
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
    tests(&mut total, &mut rows, "tests", &selection)?;
    rows.print()?;
    finish(total)
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
fn tests(total: &mut Total, rows: &mut Rows, name: &str, arguments: &[&str]) -> Result<()> {
    let started = Instant::now();
    println!("== {name}: cargo {}", arguments.join(" "));
    let mut child = merged(cargo(arguments))
        .env(THREADS.0, THREADS.1)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run cargo")?;
    let output = child.stdout.take().context("the output is piped")?;
    let mut here = Total::default();
    for line in BufReader::new(output).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        println!("{line}");
        rows.note(&line);
        if let Some(counts) = parse_result(&line) {
            here.passed += counts.passed;
            here.failed += counts.failed;
            here.skipped += counts.skipped;
        }
    }
    let status = child.wait()?;
    if !status.success() && here.failed == 0 {
        // It did not compile, or a test program was killed: no line says so.
        here.failed += 1;
    }
    println!(
        "== {name}: {} passed, {} failed ({:.1} s)",
        here.passed,
        here.failed,
        started.elapsed().as_secs_f64()
    );
    if status.success() && here.passed == 0 {
        bail!("{name}: not a single test ran");
    }
    total.passed += here.passed;
    total.failed += here.failed;
    total.skipped += here.skipped;
    Ok(())
}

/// Without input: a test that asks a question must fail, not wait.
fn merged(mut command: Command) -> Command {
    command.stdin(Stdio::null());
    command
}

/// `test result: ok. 17 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 3.92s`
fn parse_result(line: &str) -> Option<Total> {
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
}
