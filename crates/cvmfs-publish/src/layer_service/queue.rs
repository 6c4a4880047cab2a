//! What is known of layers: which wait, which are being published, what became of the others.

use std::collections::HashMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bucket::{LayerKey, LayerState};

/// Layers that may wait; a bucket with more is emptied in rounds.
const MOST_WAITING: usize = 10_000;
/// Layers remembered after they were published or given up (about 200 bytes each).
const MOST_REMEMBERED: usize = 50_000;
/// Layers that are published together.
const BATCH: usize = 64;
/// Pauses after failures that may pass, each twice the one before.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
const LONGEST_PAUSE: Duration = Duration::from_secs(120);
/// Failures after which a layer is given up: about 20 minutes.
const MOST_FAILURES: u32 = 14;

/// How long the reason is told why a layer was given up. Whoever asks later may have stored it anew.
const GIVEN_UP_TIME: Duration = Duration::from_secs(60);

/// See the module documentation.
#[derive(Debug, Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct State {
    layers: HashMap<LayerKey, Layer>,
    counts: Counts,
    /// Why the last attempt failed, if it did.
    trouble: Option<String>,
    stopped: bool,
}

#[derive(Debug, Clone)]
enum Layer {
    Waiting { since: Instant, from: Instant, failures: u32 },
    Working { since: Instant, failures: u32 },
    Done(Published),
    GivenUp { reason: String, at: Instant },
}

/// Where a layer was published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Published {
    pub(super) revision: u64,
    pub(super) root_hash: String,
}

/// For metrics and health.
#[derive(Debug, Clone, Default)]
pub(super) struct Counts {
    pub(super) published: u64,
    pub(super) given_up: u64,
    pub(super) retries: u64,
    pub(super) notifications: u64,
    pub(super) questions: u64,
    pub(super) bytes: u64,
    pub(super) revision: u64,
}

/// A layer's state with what the service adds to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Told {
    pub(super) state: LayerState,
    pub(super) root_hash: Option<String>,
}

/// How the service is.
#[derive(Debug)]
pub(super) struct Health {
    pub(super) counts: Counts,
    pub(super) waiting: usize,
    pub(super) oldest: Duration,
    pub(super) trouble: Option<String>,
}

/// What became of an attempt to publish a layer.
#[derive(Debug)]
pub(super) enum Outcome {
    Published(Published),
    /// Trying again may help.
    Failed(String),
    /// Only another layer would help.
    Refused(String),
}

impl Queue {
    /// Has a layer published, unless that is so already. False if too many wait.
    pub(super) fn add(&self, key: LayerKey) -> bool {
        let mut state = self.lock();
        let now = Instant::now();
        match state.layers.get(&key) {
            None | Some(Layer::GivenUp { .. }) => {}
            Some(_) => return true,
        }
        if state.waiting() >= MOST_WAITING {
            return false;
        }
        state.make_room();
        state.layers.insert(key, Layer::Waiting { since: now, from: now, failures: 0 });
        drop(state);
        self.wake.notify_all();
        true
    }

    /// Notes that a layer is in the repository.
    pub(super) fn found(&self, key: LayerKey, published: Published) {
        let mut state = self.lock();
        state.make_room();
        state.layers.entry(key).or_insert(Layer::Done(published));
    }

    /// Whether anything is known of a layer, also that it cannot be published.
    pub(super) fn knows(&self, key: &LayerKey) -> bool {
        self.lock().layers.contains_key(key)
    }

    /// What is known of a layer; none also if it was given up long ago.
    pub(super) fn state(&self, key: &LayerKey) -> Option<Told> {
        let told = |state| Told { state, root_hash: None };
        Some(match self.lock().layers.get(key)? {
            Layer::Waiting { .. } | Layer::Working { .. } => told(LayerState::Publishing),
            Layer::Done(Published { revision, root_hash }) => Told {
                state: LayerState::Done { revision: Some(*revision) },
                root_hash: Some(root_hash.clone()),
            },
            Layer::GivenUp { at, .. } if at.elapsed() >= GIVEN_UP_TIME => return None,
            Layer::GivenUp { reason, .. } => told(LayerState::Unknown { reason: Some(reason.clone()) }),
        })
    }

    /// The layers to publish next, the longest waiting first; waits for them at most until `until`. `None` at the end.
    pub(super) fn take(&self, until: Instant) -> Option<Vec<LayerKey>> {
        let mut state = self.lock();
        loop {
            if state.stopped {
                return None;
            }
            let now = Instant::now();
            let mut ready: Vec<(Instant, LayerKey)> = Vec::new();
            let mut next = until;
            for (key, layer) in &state.layers {
                if let Layer::Waiting { since, from, .. } = layer {
                    if *from <= now {
                        ready.push((*since, key.clone()));
                    } else {
                        next = next.min(*from);
                    }
                }
            }
            if !ready.is_empty() || now >= until {
                ready.sort_unstable();
                ready.truncate(BATCH);
                let keys: Vec<LayerKey> = ready.into_iter().map(|(_, key)| key).collect();
                for key in &keys {
                    if let Some(layer) = state.layers.get_mut(key)
                        && let Layer::Waiting { since, failures, .. } = *layer
                    {
                        *layer = Layer::Working { since, failures };
                    }
                }
                return Some(keys);
            }
            let pause = next.saturating_duration_since(now);
            state = self.wake.wait_timeout(state, pause).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Notes what became of a layer that was taken.
    pub(super) fn ended(&self, key: &LayerKey, outcome: Outcome) {
        let mut state = self.lock();
        let Some(&Layer::Working { since, failures }) = state.layers.get(key) else { return };
        let layer = match outcome {
            Outcome::Published(published) => {
                tracing::info!(layer = %key, revision = published.revision, "layer published");
                state.counts.published += 1;
                state.counts.revision = state.counts.revision.max(published.revision);
                state.trouble = None;
                Layer::Done(published)
            }
            Outcome::Failed(reason) if failures + 1 < MOST_FAILURES => {
                let pause = FIRST_PAUSE.saturating_mul(1 << failures.min(16)).min(LONGEST_PAUSE);
                tracing::warn!(layer = %key, reason, pause_s = pause.as_secs(), "layer not published, trying again");
                state.counts.retries += 1;
                state.trouble = Some(reason);
                Layer::Waiting { since, from: Instant::now() + pause, failures: failures + 1 }
            }
            Outcome::Failed(reason) | Outcome::Refused(reason) => {
                tracing::error!(layer = %key, reason, "layer given up; it is tried again when it is stored or asked for");
                state.counts.given_up += 1;
                Layer::GivenUp { reason, at: Instant::now() }
            }
        };
        state.layers.insert(key.clone(), layer);
    }

    /// Changes the numbers.
    pub(super) fn count(&self, change: impl FnOnce(&mut Counts)) {
        change(&mut self.lock().counts);
    }

    /// Notes that nothing can be done at all, or that it can again.
    pub(super) fn trouble(&self, trouble: Option<String>) {
        self.lock().trouble = trouble;
    }

    /// How the service is.
    pub(super) fn health(&self) -> Health {
        let state = self.lock();
        let since = state.layers.values().filter_map(|layer| match layer {
            Layer::Waiting { since, .. } | Layer::Working { since, .. } => Some(*since),
            _ => None,
        });
        Health {
            counts: state.counts.clone(),
            waiting: state.waiting(),
            oldest: since.min().map(|since| since.elapsed()).unwrap_or_default(),
            trouble: state.trouble.clone(),
        }
    }

    /// Whoever waits gets nothing any more.
    pub(super) fn stop(&self) {
        self.lock().stopped = true;
        self.wake.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn waiting(&self) -> usize {
        let waits = |layer: &&Layer| matches!(layer, Layer::Waiting { .. } | Layer::Working { .. });
        self.layers.values().filter(waits).count()
    }

    /// Forgets what is over, when there is too much: it is found again in the repository.
    fn make_room(&mut self) {
        if self.layers.len() >= MOST_REMEMBERED {
            self.layers.retain(|_, layer| matches!(layer, Layer::Waiting { .. } | Layer::Working { .. }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u8) -> LayerKey {
        format!("{number:02x}").repeat(32).parse().unwrap()
    }

    fn published(revision: u64) -> Outcome {
        Outcome::Published(Published { revision, root_hash: "ab".to_owned() })
    }

    fn now(queue: &Queue) -> Vec<LayerKey> {
        queue.take(Instant::now()).unwrap()
    }

    #[test]
    fn a_layer_waits_is_published_and_is_done() {
        let queue = Queue::default();
        assert_eq!(queue.state(&key(1)), None);
        assert!(queue.add(key(1)));
        assert_eq!(queue.state(&key(1)).unwrap().state, LayerState::Publishing);
        assert_eq!(now(&queue), [key(1)]);
        assert!(queue.add(key(1)), "once more while it is being published");
        assert!(now(&queue).is_empty());
        queue.ended(&key(1), published(7));
        assert_eq!(queue.state(&key(1)).unwrap().state, LayerState::Done { revision: Some(7) });
        assert!(queue.add(key(1)) && now(&queue).is_empty(), "what is there is not published again");
    }

    #[test]
    fn what_may_pass_is_tried_again_and_what_cannot_is_given_up() {
        let queue = Queue::default();
        queue.add(key(1));
        queue.add(key(2));
        assert_eq!(now(&queue).len(), 2);
        queue.ended(&key(1), Outcome::Failed("store is down".to_owned()));
        queue.ended(&key(2), Outcome::Refused("damaged".to_owned()));
        assert_eq!(queue.state(&key(1)).unwrap().state, LayerState::Publishing);
        let reason = LayerState::Unknown { reason: Some("damaged".to_owned()) };
        assert_eq!(queue.state(&key(2)).unwrap().state, reason);
        assert!(now(&queue).is_empty(), "not at once");
        assert_eq!(queue.health().trouble.as_deref(), Some("store is down"));
        // Stored once more.
        queue.add(key(2));
        assert_eq!(now(&queue), [key(2)]);
        queue.ended(&key(2), published(3));
        assert_eq!((queue.health().trouble, queue.health().waiting), (None, 1));
    }

    #[test]
    fn a_queue_is_bounded_and_ends() {
        let queue = Queue::default();
        let mut number = 0_u64;
        while queue.add(format!("{number:064x}").parse().unwrap()) {
            number += 1;
            assert!(number < 20_000);
        }
        assert_eq!(now(&queue).len(), BATCH);
        queue.stop();
        assert!(queue.take(Instant::now() + Duration::from_secs(60)).is_none());
    }
}
