//! One piece of work, however many ask for it.
//!
//! Who asks first leads: its own thread does the work, which costs no hand-over. The others wait. A leader who
//! leaves, because its deadline passed or it was interrupted, hands the work over to the runtime, where it goes on
//! for the others; when nobody waits any more it goes on for [`LINGER`], since an impatient reader tends to come
//! back, and is dropped then.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::watch;

use crate::deadline::{Leave, Patience};
use crate::network::Fetcher;

/// How long work goes on that nobody waits for.
const LINGER: Duration = Duration::from_secs(20);

/// The work under way, by key.
#[derive(Debug)]
pub(super) struct Flights<K: Eq + Hash, V>(Mutex<HashMap<K, Arc<watch::Sender<Option<V>>>>>);

/// The exclusive right to do the work of one key. Dropping it without a result makes the waiting start anew.
struct Flight<K: Eq + Hash + Clone, V> {
    flights: Arc<Flights<K, V>>,
    key: K,
    result: Arc<watch::Sender<Option<V>>>,
}

impl<K, V> Flights<K, V>
where
    K: Eq + Hash + Clone + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(HashMap::new())))
    }

    /// The result of the work for `key`, which `start` begins unless it is under way.
    pub(super) fn join(
        self: &Arc<Self>,
        key: &K,
        fetcher: &Fetcher,
        patience: Patience<'_>,
        start: impl Fn() -> BoxFuture<'static, V>,
    ) -> Result<V, Leave> {
        loop {
            let flight = match self.board(key) {
                Ok(flight) => flight,
                Err(mut result) => {
                    let landed = fetcher.wait(
                        async { result.wait_for(Option::is_some).await.ok().and_then(|value| value.clone()) },
                        patience,
                    )?;
                    match landed {
                        Some(value) => return Ok(value),
                        // Given up just before we came: begin anew.
                        None => continue,
                    }
                }
            };
            let mut work = start();
            return match fetcher.wait(work.as_mut(), patience) {
                Ok(value) => {
                    flight.land(&value);
                    Ok(value)
                }
                Err(leave) => {
                    fetcher.go_on(flight.go_on(work));
                    Err(leave)
                }
            };
        }
    }

    /// Begins the work for `key` in the background unless it is under way.
    pub(super) fn launch(
        self: &Arc<Self>,
        key: &K,
        fetcher: &Fetcher,
        work: impl FnOnce() -> BoxFuture<'static, V>,
    ) {
        if let Ok(flight) = self.board(key) {
            fetcher.runtime().spawn(flight.go_on(work()));
        }
    }

    /// The right to do the work, or the promise of its result if somebody else has it.
    fn board(self: &Arc<Self>, key: &K) -> Result<Flight<K, V>, watch::Receiver<Option<V>>> {
        let mut running = self.lock();
        if let Some(result) = running.get(key) {
            return Err(result.subscribe());
        }
        let result = Arc::new(watch::Sender::new(None));
        running.insert(key.clone(), Arc::clone(&result));
        Ok(Flight { flights: Arc::clone(self), key: key.clone(), result })
    }
}

impl<K: Eq + Hash, V> Flights<K, V> {
    fn lock(&self) -> MutexGuard<'_, HashMap<K, Arc<watch::Sender<Option<V>>>>> {
        // The map is consistent after every statement.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash + Clone, V: Clone> Flight<K, V> {
    fn land(self, value: &V) {
        // Removed first: who comes later finds the result in the cache.
        self.flights.lock().remove(&self.key);
        if self.result.receiver_count() > 0 {
            self.result.send_replace(Some(value.clone()));
        }
    }

    async fn go_on(self, work: BoxFuture<'static, V>) {
        let abandoned = async {
            loop {
                self.result.closed().await;
                tokio::time::sleep(LINGER).await;
                if self.result.receiver_count() == 0 {
                    break;
                }
            }
        };
        let value = tokio::select! {
            value = work => Some(value),
            () = abandoned => None,
        };
        if let Some(value) = value {
            self.land(&value);
        }
    }
}

impl<K: Eq + Hash + Clone, V> Drop for Flight<K, V> {
    fn drop(&mut self) {
        let mut running = self.flights.lock();
        if running.get(&self.key).is_some_and(|result| Arc::ptr_eq(result, &self.result)) {
            running.remove(&self.key);
        }
    }
}
