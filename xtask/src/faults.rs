//! The fault matrix: which rows the tests that ran have shown.
//!
//! A test belongs to row 7 if its name begins with `row_07_`; the rows and what a user sees in each are listed
//! in `tests/fault-matrix.txt`.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use testkit::workspace_root;

/// Outcome of the tests of one row.
#[derive(Debug, Default, Clone, Copy)]
struct Outcome {
    passed: u32,
    failed: u32,
}

/// What was seen so far.
#[derive(Debug, Default)]
pub struct Rows(BTreeMap<u32, Outcome>);

impl Rows {
    /// Takes notice of one line that a test program printed.
    pub fn note(&mut self, line: &str) {
        let Some((row, passed)) = parse(line) else { return };
        let outcome = self.0.entry(row).or_default();
        if passed {
            outcome.passed += 1;
        } else {
            outcome.failed += 1;
        }
    }

    /// Takes back one failure of a test that passed later.
    pub fn forgive(&mut self, name: &str) {
        if let Some(number) = row(name)
            && let Some(outcome) = self.0.get_mut(&number)
        {
            outcome.failed = outcome.failed.saturating_sub(1);
        }
    }

    /// Prints the table, unless no test of it ran.
    pub fn print(&self) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        let file = workspace_root().join("tests/fault-matrix.txt");
        let text =
            std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        println!("== fault matrix");
        let (mut passed, mut failed, mut not_run) = (0, 0, 0);
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (number, what) = line.split_once(' ').context("a row has a number and a text")?;
            let outcome = self.0.get(&number.parse()?).copied().unwrap_or_default();
            let verdict = match outcome {
                Outcome { failed: 1.., .. } => {
                    failed += 1;
                    "FAILED"
                }
                Outcome { passed: 1.., .. } => {
                    passed += 1;
                    "passed"
                }
                _ => {
                    not_run += 1;
                    "not run"
                }
            };
            println!("{number:>3} {verdict:8} {what}");
        }
        println!("== fault matrix: {passed} passed, {failed} failed, {not_run} not run");
        Ok(())
    }
}

/// The row of a line such as `test network::row_07_a_slow_proxy_is_not_dead ... ok`, and whether it passed.
fn parse(line: &str) -> Option<(u32, bool)> {
    let (name, outcome) = line.strip_prefix("test ")?.split_once(" ... ")?;
    let number = row(name)?;
    match outcome {
        "ok" => Some((number, true)),
        "FAILED" => Some((number, false)),
        _ => None,
    }
}

fn row(name: &str) -> Option<u32> {
    name.rsplit("::").next()?.strip_prefix("row_")?.split('_').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_of_a_row_are_recognised_by_their_names() {
        assert_eq!(parse("test network::row_07_a_slow_proxy_is_not_dead ... ok"), Some((7, true)));
        assert_eq!(parse("test row_69_garbage ... FAILED"), Some((69, false)));
        assert_eq!(parse("test row_69_garbage ... ignored"), None);
        assert_eq!(parse("test rows_are_counted ... ok"), None);
        assert_eq!(parse("row_07_x ... ok"), None);
    }
}
