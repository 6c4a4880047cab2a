//! What wakes the loop before its time, and what ends it.

use std::collections::HashSet;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cvmfs_publish::Interrupt;
use registry::Canceller;

use super::notice::Notice;

/// Notices that wait. More of them are one reason to look at everything.
const MAX_NOTICES: usize = 10_000;
/// A push of many tags comes as many notifications; those that follow shortly are looked
/// at in the same round.
const COLLECT: Duration = Duration::from_millis(500);

/// Wakes and ends a loop; clones ring the same bell.
#[derive(Debug, Clone, Default)]
pub struct Bell(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    is_stopped: bool,
    notices: HashSet<Notice>,
    /// How to end the round that runs.
    round: Option<(Interrupt, Vec<Canceller>)>,
}

/// Why the loop goes on.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ring {
    Stop,
    Time,
    Notices(Vec<Notice>),
}

impl Bell {
    /// Ends the loop: the round that runs stops, and no other one begins. False if a
    /// revision is being published at this moment, which is finished first.
    pub fn stop(&self) -> bool {
        let mut state = self.lock();
        state.is_stopped = true;
        let mut is_in_time = true;
        if let Some((interrupt, cancellers)) = &state.round {
            is_in_time = interrupt.request();
            cancellers.iter().for_each(Canceller::cancel);
        }
        drop(state);
        self.0.changed.notify_all();
        is_in_time
    }

    /// Makes the loop look at some images.
    pub fn notify(&self, notices: impl IntoIterator<Item = Notice>) {
        let mut state = self.lock();
        for notice in notices {
            if state.notices.len() < MAX_NOTICES {
                state.notices.insert(notice);
            }
        }
        drop(state);
        self.0.changed.notify_all();
    }

    /// What the next [`stop`](Self::stop) ends.
    pub(super) fn ends(&self, interrupt: &Interrupt, cancellers: &[Canceller]) {
        let mut state = self.lock();
        if state.is_stopped {
            interrupt.request();
            cancellers.iter().for_each(Canceller::cancel);
        }
        state.round = Some((interrupt.clone(), cancellers.to_vec()));
    }

    /// Waits for something to do; at `end` everything is to be looked at, whatever else was told.
    pub(super) fn wait(&self, end: Instant) -> Ring {
        let mut state = self.lock();
        loop {
            let rest = end.saturating_duration_since(Instant::now());
            if state.is_stopped {
                return Ring::Stop;
            }
            if rest.is_zero() {
                state.notices.clear();
                return Ring::Time;
            }
            if !state.notices.is_empty() {
                break;
            }
            (state, _) = self.0.changed.wait_timeout(state, rest).unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        std::thread::sleep(COLLECT);
        let mut state = self.lock();
        if state.is_stopped {
            return Ring::Stop;
        }
        let notices = std::mem::take(&mut state.notices);
        // Too many to know them all: everything is looked at.
        if notices.len() < MAX_NOTICES { Ring::Notices(notices.into_iter().collect()) } else { Ring::Time }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
