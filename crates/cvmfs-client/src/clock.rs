//! Wall-clock time as a parameter.
//!
//! Whitelist expiry and pinning by date compare against the time of day, and a test must be able to choose it.
//! Waiting never uses this clock: a deadline is monotonic ([`crate::deadline`]), so a clock that jumps by a year
//! neither ends nor prolongs a wait.

use std::fmt::Debug;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// Tells the time of day.
pub trait Clock: Send + Sync + Debug {
    /// Seconds since 1970-01-01T00:00:00Z; negative before.
    fn unix(&self) -> i64;
}

/// The clock of the machine.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn unix(&self) -> i64 {
        match SystemTime::now().duration_since(UNIX_EPOCH) {
            Ok(since) => i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
            Err(before) => i64::try_from(before.duration().as_secs()).map_or(i64::MIN, |seconds| -seconds),
        }
    }
}

/// A clock that stands still until it is moved.
#[derive(Debug, Default)]
pub struct ManualClock(AtomicI64);

impl ManualClock {
    /// A clock that shows `unix` seconds since the epoch.
    pub fn at(unix: i64) -> Self {
        Self(AtomicI64::new(unix))
    }

    /// Moves the clock to `unix` seconds since the epoch.
    pub fn set(&self, unix: i64) {
        self.0.store(unix, Ordering::SeqCst);
    }

    /// Moves the clock by `seconds`, backwards if negative.
    pub fn advance(&self, seconds: i64) {
        self.0.fetch_add(seconds, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn unix(&self) -> i64 {
        self.0.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manual_clock_shows_what_it_was_set_to() {
        let clock = ManualClock::at(1_700_000_000);
        clock.advance(-1);
        assert_eq!(clock.unix(), 1_699_999_999);
        clock.set(5);
        assert_eq!(clock.unix(), 5);
    }

    #[test]
    fn the_system_clock_is_past_the_year_2020() {
        assert!(SystemClock.unix() > 1_577_836_800);
    }
}
