//! Layers that several images need are fetched once.
//!
//! An image claims the layers it misses. What another image has claimed already it waits
//! for, after it has fetched its own: whoever waits holds nothing that anybody waits for.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};

use crate::spool::{SpooledLayer, Wanted};

/// A fetched layer that several images may hold.
pub(super) type SharedLayer = Arc<Mutex<SpooledLayer>>;

/// A layer's place, and the diff id that an image says it has: one that lies must not spoil it for others.
type Key = (String, String);

fn key(layer: &Wanted) -> Key {
    (layer.path.clone(), layer.diff_id.to_string())
}

#[derive(Debug)]
enum Claim {
    /// Somebody fetches it.
    Fetching,
    /// It is here as long as an image that waits to be published holds it.
    Fetched(Weak<Mutex<SpooledLayer>>),
}

/// The layers under way.
#[derive(Debug, Default)]
pub(super) struct Claims {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    claims: HashMap<Key, Claim>,
    published: HashSet<String>,
    /// Bytes of layers that are being fetched or wait to be published.
    spooled: u64,
}

/// What is to be done about a layer.
pub(super) enum Turn {
    /// Fetch it, and say so with [`Claims::fetched`] or [`Claims::failed`].
    Yours,
    /// Another image has fetched it.
    Here(SharedLayer),
    /// Another image has published it.
    Published,
}

impl Claims {
    /// Takes the layers that nobody has claimed; the rest is to be waited for.
    pub(super) fn claim(&self, wanted: Vec<Wanted>) -> (Vec<Wanted>, Vec<Wanted>) {
        let mut state = self.lock();
        wanted.into_iter().partition(|layer| {
            let is_free = state.is_free(layer);
            if is_free {
                state.claims.insert(key(layer), Claim::Fetching);
            }
            is_free
        })
    }

    /// Waits until a layer's fate is known; it may become the caller's own.
    pub(super) fn wait_for(&self, layer: &Wanted) -> Turn {
        let mut state = self.lock();
        loop {
            if state.published.contains(&layer.path) {
                return Turn::Published;
            }
            match state.claims.get(&key(layer)) {
                Some(Claim::Fetching) => {
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                Some(Claim::Fetched(held)) => match held.upgrade() {
                    Some(layer) => return Turn::Here(layer),
                    None => {
                        state.claims.insert(key(layer), Claim::Fetching);
                        return Turn::Yours;
                    }
                },
                None => {
                    state.claims.insert(key(layer), Claim::Fetching);
                    return Turn::Yours;
                }
            }
        }
    }

    /// A claimed layer is here.
    pub(super) fn fetched(&self, layer: SpooledLayer) -> SharedLayer {
        let key = key(&layer.wanted);
        let shared = Arc::new(Mutex::new(layer));
        self.lock().claims.insert(key, Claim::Fetched(Arc::downgrade(&shared)));
        self.changed.notify_all();
        shared
    }

    /// Claimed layers could not be fetched.
    pub(super) fn failed<'a>(&self, layers: impl IntoIterator<Item = &'a Wanted>) {
        let mut state = self.lock();
        for layer in layers {
            if matches!(state.claims.get(&key(layer)), Some(Claim::Fetching)) {
                state.claims.remove(&key(layer));
            }
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Layers are in the repository.
    pub(super) fn published<'a>(&self, paths: impl IntoIterator<Item = &'a str>) {
        let mut state = self.lock();
        for path in paths {
            state.claims.retain(|(claimed, _), _| claimed != path);
            state.published.insert(path.to_owned());
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Waits until `bytes` more fit into the spool. An image that is larger than the limit
    /// gets the spool for itself.
    pub(super) fn reserve(&self, bytes: u64, limit: u64) -> Reservation<'_> {
        let mut state = self.lock();
        while state.spooled > 0 && state.spooled.saturating_add(bytes) > limit {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.spooled = state.spooled.saturating_add(bytes);
        Reservation { claims: self, bytes }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn is_free(&self, layer: &Wanted) -> bool {
        !self.published.contains(&layer.path)
            && match self.claims.get(&key(layer)) {
                None => true,
                Some(Claim::Fetching) => false,
                Some(Claim::Fetched(held)) => held.strong_count() == 0,
            }
    }
}

/// Room in the spool, given back when dropped.
#[derive(Debug)]
pub(super) struct Reservation<'a> {
    claims: &'a Claims,
    bytes: u64,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let mut state = self.claims.lock();
        state.spooled = state.spooled.saturating_sub(self.bytes);
        drop(state);
        self.claims.changed.notify_all();
    }
}
