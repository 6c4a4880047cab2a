//! The last requests that failed, for `status` and `check`: an administrator finds there what users complain about,
//! without looking for the log.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Different failures that are kept; the log has all of them.
const MOST: usize = 8;
/// Longest text of one, in bytes: paths and causes come from the network.
const LONGEST: usize = 1000;
/// Seconds after which a failure is no news any more.
const OLD: i64 = 3600;

/// See the module documentation.
#[derive(Debug, Default)]
pub(crate) struct Failures(Mutex<VecDeque<Failure>>);

#[derive(Debug)]
struct Failure {
    text: String,
    times: u64,
    /// Unix time of the last.
    last: i64,
}

impl Failures {
    /// Takes notice of a failure at a Unix time. The same one again is counted.
    pub(crate) fn note(&self, mut text: String, unix: i64) {
        if text.len() > LONGEST {
            text.truncate(text.floor_char_boundary(LONGEST));
            text.push('…');
        }
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = kept.iter().position(|failure| failure.text == text).and_then(|at| kept.remove(at));
        let times = known.map_or(0, |failure| failure.times) + 1;
        kept.push_front(Failure { text, times, last: unix });
        kept.truncate(MOST);
    }

    /// Those of the last hour, the newest first.
    pub(crate) fn recent(&self, unix: i64) -> Vec<String> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.iter().filter(|failure| unix - failure.last < OLD).map(Failure::to_string).collect()
    }

    /// Forgets them all.
    pub(crate) fn clear(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} (", self.text)?;
        if self.times > 1 {
            write!(formatter, "{} times, ", self.times)?;
        }
        let last = OffsetDateTime::from_unix_timestamp(self.last).ok();
        match last.and_then(|last| last.format(&Rfc3339).ok()) {
            Some(last) => write!(formatter, "last at {last})"),
            None => write!(formatter, "last at {})", self.last),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_comes_first_and_repeated_ones_are_counted() {
        let failures = Failures::default();
        failures.note("content of /a: lost".into(), 1_000);
        failures.note("content of /b: lost".into(), 2_000);
        failures.note("content of /a: lost".into(), 3_000);
        assert_eq!(
            failures.recent(3_001),
            [
                "content of /a: lost (2 times, last at 1970-01-01T00:50:00Z)",
                "content of /b: lost (last at 1970-01-01T00:33:20Z)"
            ]
        );
        assert_eq!(failures.recent(2_000 + OLD).len(), 1, "after an hour a failure is forgotten");
        failures.clear();
        assert!(failures.recent(3_001).is_empty());
    }

    #[test]
    fn number_and_length_are_bounded() {
        let failures = Failures::default();
        for number in 0..100 {
            failures.note(format!("{number}{}", "ä".repeat(LONGEST)), 10);
        }
        let recent = failures.recent(10);
        assert_eq!(recent.len(), MOST);
        assert!(recent.iter().all(|text| text.len() < LONGEST + 100));
    }
}
