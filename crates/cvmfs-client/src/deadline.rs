//! The end of a caller's patience.
//!
//! Every function of this crate that may wait takes a [`Deadline`] and returns before or at it. Deadlines are
//! monotonic and cheap to copy; they travel down unchanged instead of being split into time-outs.

use std::time::{Duration, Instant};

use tokio::sync::watch;

/// Patience beyond this is treated as this: it keeps the arithmetic on instants from overflowing.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// A point in monotonic time after which the caller no longer waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(Instant);

impl Deadline {
    /// The deadline `patience` from now.
    pub fn after(patience: Duration) -> Self {
        Self(Instant::now() + patience.min(LONGEST))
    }

    /// The deadline at this instant.
    pub fn at(instant: Instant) -> Self {
        Self(instant)
    }

    /// The time left; zero once it is over.
    pub fn remaining(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// Whether the deadline has passed.
    pub fn is_over(self) -> bool {
        self.remaining().is_zero()
    }

    /// The deadline as an instant.
    pub fn instant(self) -> Instant {
        self.0
    }

    /// The earlier of this deadline and the one `patience` from now.
    #[must_use]
    pub fn at_most(self, patience: Duration) -> Self {
        self.min(Self::after(patience))
    }
}

/// A switch that ends the waiting of one caller at once, for requests whose process was signalled.
///
/// It ends the wait, not the work: a download that others wait for goes on.
#[derive(Debug, Clone)]
pub struct Interrupt(watch::Sender<bool>);

impl Interrupt {
    /// A switch that is off.
    pub fn new() -> Self {
        Self(watch::Sender::new(false))
    }

    /// Ends every wait that was given this switch, now and in future.
    pub fn raise(&self) {
        self.0.send_replace(true);
    }

    /// Whether the switch is on.
    pub fn is_raised(&self) -> bool {
        *self.0.borrow()
    }

    /// Resolves when the switch is on.
    pub(crate) async fn raised(&self) {
        // The sender lives as long as `self`, so waiting cannot fail.
        let _ = self.0.subscribe().wait_for(|on| *on).await;
    }
}

impl Default for Interrupt {
    fn default() -> Self {
        Self::new()
    }
}

/// How long a caller waits: until its deadline, or until it is interrupted.
#[derive(Debug, Clone, Copy)]
pub struct Patience<'a> {
    /// The latest end of the wait.
    pub deadline: Deadline,
    /// Ends the wait earlier when raised.
    pub interrupt: Option<&'a Interrupt>,
}

impl Patience<'_> {
    /// Resolves when the caller leaves; tells why.
    pub(crate) async fn exhausted(self) -> Leave {
        let over = tokio::time::sleep_until(self.deadline.instant().into());
        match self.interrupt {
            None => {
                over.await;
                Leave::Deadline
            }
            Some(interrupt) => tokio::select! {
                () = over => Leave::Deadline,
                () = interrupt.raised() => Leave::Interrupted,
            },
        }
    }
}

impl From<Deadline> for Patience<'_> {
    fn from(deadline: Deadline) -> Self {
        Self { deadline, interrupt: None }
    }
}

/// Why a caller stopped waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leave {
    Deadline,
    Interrupted,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_ends_after_its_patience() {
        assert!(Deadline::after(Duration::ZERO).is_over());
        let later = Deadline::after(Duration::from_secs(60));
        assert!(!later.is_over());
        assert!(later.remaining() > Duration::from_secs(59));
        assert!(later.at_most(Duration::from_secs(1)) < later);
    }

    #[test]
    fn endless_patience_does_not_overflow() {
        assert!(!Deadline::after(Duration::MAX).is_over());
    }
}
