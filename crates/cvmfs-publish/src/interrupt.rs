//! Stopping a publish on the user's request, and the moment from which that is no longer possible.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::error::PublishError;

/// A wish to stop, shared between a publish and whoever may wish it (a signal, a caller's deadline).
///
/// Either the wish comes first and nothing is published, or the commit comes first and the
/// wish is too late: there is no state in between.
#[derive(Debug, Clone, Default)]
pub struct Interrupt(Arc<AtomicU8>);

const RUNNING: u8 = 0;
const REQUESTED: u8 = 1;
const COMMITTING: u8 = 2;
/// A wish that came too late for the revision that is committed, and counts for the next one.
const COMMITTING_LAST: u8 = 3;

impl Interrupt {
    /// Asks the publish to stop. False if it is committing already.
    pub fn request(&self) -> bool {
        match self.0.compare_exchange(RUNNING, REQUESTED, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) | Err(REQUESTED) => true,
            Err(_) => {
                let late =
                    self.0.compare_exchange(COMMITTING, COMMITTING_LAST, Ordering::SeqCst, Ordering::SeqCst);
                // The commit may have ended in between.
                late == Err(RUNNING) && self.request()
            }
        }
    }

    /// An error if a stop was asked for. Called between pieces of work.
    pub fn check(&self) -> Result<(), PublishError> {
        if self.0.load(Ordering::SeqCst) == REQUESTED { Err(PublishError::Interrupted) } else { Ok(()) }
    }

    /// Ends the time in which a stop is possible; called right before a revision becomes visible.
    pub(crate) fn begin_commit(&self) -> Result<(), PublishError> {
        match self.0.compare_exchange(RUNNING, COMMITTING, Ordering::SeqCst, Ordering::SeqCst) {
            Err(REQUESTED | COMMITTING_LAST) => Err(PublishError::Interrupted),
            _ => Ok(()),
        }
    }

    /// Begins it again, for the next revision of the same publisher.
    pub(crate) fn end_commit(&self) {
        if self.0.compare_exchange(COMMITTING, RUNNING, Ordering::SeqCst, Ordering::SeqCst).is_err() {
            let _ = self.0.compare_exchange(COMMITTING_LAST, REQUESTED, Ordering::SeqCst, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wish_before_the_commit_prevents_it_and_one_after_is_refused() {
        let early = Interrupt::default();
        assert!(early.request());
        assert!(early.check().is_err() && early.begin_commit().is_err());

        let late = Interrupt::default();
        late.begin_commit().unwrap();
        assert!(!late.request());
        late.check().unwrap();
        late.end_commit();
        assert!(late.check().is_err(), "it counts for what would come next");
        assert!(late.request());
    }
}
