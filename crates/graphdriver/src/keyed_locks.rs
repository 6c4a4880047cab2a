//! One lock per key, for as long as somebody holds or wants it.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// Serialises work on equal keys; different keys never wait for each other.
///
/// Order: a thread that holds the lock of a layer may take that of a repository, never
/// the other way round, and nobody holds the locks of two layers.
#[derive(Debug)]
pub struct KeyedLocks<K> {
    shared: Arc<Shared<K>>,
}

#[derive(Debug)]
struct Shared<K> {
    held: Mutex<HashSet<K>>,
    released: Condvar,
}

/// Holds the lock of one key until dropped.
#[derive(Debug)]
pub struct KeyGuard<K: Eq + Hash> {
    shared: Arc<Shared<K>>,
    key: K,
}

impl<K: Eq + Hash + Clone> KeyedLocks<K> {
    /// No key is locked.
    pub fn new() -> Self {
        Self { shared: Arc::new(Shared { held: Mutex::new(HashSet::new()), released: Condvar::new() }) }
    }

    /// Waits until nobody else holds `key`.
    pub fn lock(&self, key: &K) -> KeyGuard<K> {
        let mut held = self.shared.held.lock().unwrap_or_else(PoisonError::into_inner);
        while held.contains(key) {
            held = self.shared.released.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
        held.insert(key.clone());
        KeyGuard { shared: Arc::clone(&self.shared), key: key.clone() }
    }
}

impl<K: Eq + Hash + Clone> Default for KeyedLocks<K> {
    fn default() -> Self {
        Self::new()
    }
}

impl<K: Eq + Hash> Drop for KeyGuard<K> {
    fn drop(&mut self) {
        self.shared.held.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
        self.shared.released.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;
    use std::time::Duration;

    #[test]
    fn equal_keys_exclude_each_other_and_others_do_not() {
        let locks = Arc::new(KeyedLocks::new());
        let inside = Arc::new(AtomicUsize::new(0));
        let other = locks.lock(&"other");
        let threads: Vec<_> = (0..8)
            .map(|_| {
                let (locks, inside) = (Arc::clone(&locks), Arc::clone(&inside));
                thread::spawn(move || {
                    let _guard = locks.lock(&"same");
                    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                    thread::sleep(Duration::from_millis(1));
                    inside.fetch_sub(1, Ordering::SeqCst);
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        drop(other);
    }
}
