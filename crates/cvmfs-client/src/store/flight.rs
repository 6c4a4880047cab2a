//! One piece of work, however many ask for it.
//!
//! Who asks first leads: its own thread does the work, which costs no hand-over. The others wait. A leader who
//! leaves, because its deadline passed or it was interrupted, hands the work over to the [`Driver`], where it goes on
//! for the others; when nobody waits any more it goes on for a while, since an impatient reader tends to come back, and
//! is dropped then.

use std::collections::HashMap;
use std::future::Future;
use std::hash::Hash;

use futures_util::future::BoxFuture;
use tokio::sync::watch;

use crate::deadline::{Leave, Patience};
use crate::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Where work is waited for, and where it goes on when its starter has left.
pub(super) trait Driver: Clone + Send + Sync + 'static {
    /// Drives `work` on the calling thread until it is done or the caller leaves.
    fn wait<T>(&self, work: impl Future<Output = T>, patience: Patience<'_>) -> Result<T, Leave>;
    /// Drives `work`, which the calling thread has begun in [`Driver::wait`] and leaves, in the background.
    fn go_on(&self, work: BoxFuture<'static, ()>);
    /// Drives work in the background that nobody has begun.
    fn begin(&self, work: BoxFuture<'static, ()>);
    /// Resolves when work that nobody waits for has gone on for long enough.
    fn linger(&self) -> BoxFuture<'static, ()>;
}

/// The work under way, by key.
#[derive(Debug)]
pub(super) struct Flights<K: Eq + Hash, V>(Mutex<Table<K, V>>);

#[derive(Debug)]
struct Table<K: Eq + Hash, V> {
    running: HashMap<K, Arc<watch::Sender<Option<V>>>>,
    /// How often work was done so far.
    landed: u64,
}

/// A moment, to tell whether work was done since.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Moment(u64);

/// The exclusive right to do the work of one key. Dropping it without a result makes the waiting start anew.
struct Flight<K: Eq + Hash + Clone, V> {
    flights: Arc<Flights<K, V>>,
    key: K,
    result: Arc<watch::Sender<Option<V>>>,
    /// Nothing has landed since the caller's look.
    is_first: bool,
}

impl<K, V> Flights<K, V>
where
    K: Eq + Hash + Clone + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(Table { running: HashMap::new(), landed: 0 })))
    }

    /// The present moment. Who takes it before looking whether the work is done already need not look again unless
    /// [`Flights::join`] says so.
    pub(super) fn moment(&self) -> Moment {
        Moment(self.lock().landed)
    }

    /// The result of the work for `key`, which `start` begins unless it is under way. `start` is told whether some work
    /// was done since `looked`: the caller's then perhaps, too.
    pub(super) fn join(
        self: &Arc<Self>,
        key: &K,
        looked: Moment,
        driver: &impl Driver,
        patience: Patience<'_>,
        start: impl Fn(bool) -> BoxFuture<'static, V>,
    ) -> Result<V, Leave> {
        loop {
            let flight = match self.board(key, looked) {
                Ok(flight) => flight,
                Err(mut result) => {
                    let landed = driver.wait(
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
            let mut work = start(!flight.is_first);
            return match driver.wait(work.as_mut(), patience) {
                Ok(value) => {
                    flight.land(&value);
                    Ok(value)
                }
                Err(leave) => {
                    driver.go_on(Box::pin(flight.go_on(work, driver.clone())));
                    Err(leave)
                }
            };
        }
    }

    /// Begins the work for `key` in the background unless it is under way. `start` is told as in [`Flights::join`].
    pub(super) fn launch(
        self: &Arc<Self>,
        key: &K,
        looked: Moment,
        driver: &impl Driver,
        start: impl FnOnce(bool) -> BoxFuture<'static, V>,
    ) {
        if let Ok(flight) = self.board(key, looked) {
            let work = start(!flight.is_first);
            driver.begin(Box::pin(flight.go_on(work, driver.clone())));
        }
    }

    /// The right to do the work, or the promise of its result if somebody else has it.
    fn board(self: &Arc<Self>, key: &K, looked: Moment) -> Result<Flight<K, V>, watch::Receiver<Option<V>>> {
        let mut table = self.lock();
        if let Some(result) = table.running.get(key) {
            return Err(result.subscribe());
        }
        let result = Arc::new(watch::Sender::new(None));
        table.running.insert(key.clone(), Arc::clone(&result));
        let is_first = Moment(table.landed) == looked;
        Ok(Flight { flights: Arc::clone(self), key: key.clone(), result, is_first })
    }
}

impl<K: Eq + Hash, V> Flights<K, V> {
    fn lock(&self) -> MutexGuard<'_, Table<K, V>> {
        // The table is consistent after every statement.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash + Clone, V: Clone> Flight<K, V> {
    fn land(self, value: &V) {
        let mut table = self.flights.lock();
        // Removed first: who comes later finds the result in the cache.
        table.running.remove(&self.key);
        table.landed += 1;
        drop(table);
        if self.result.receiver_count() > 0 {
            self.result.send_replace(Some(value.clone()));
        }
    }

    /// Goes on without a leader, until nobody has waited for as long as `driver` lingers.
    async fn go_on(self, work: BoxFuture<'static, V>, driver: impl Driver) {
        let abandoned = async {
            loop {
                self.result.closed().await;
                driver.linger().await;
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
        let mut table = self.flights.lock();
        if table.running.get(&self.key).is_some_and(|result| Arc::ptr_eq(result, &self.result)) {
            table.running.remove(&self.key);
        }
    }
}
