//! Which host and which proxy the next request takes.
//!
//! All requests share one current host and one current proxy, so a failure found by one is known to all (client
//! behaviour §5.2–§5.4). The state machine does no I/O and is given the time, so that tests need neither.

use std::collections::HashSet;
use std::hash::{BuildHasher, Hasher};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The way of one attempt: indexes into the hosts and the clients (one client per proxy).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) host: usize,
    pub(super) client: usize,
}

#[derive(Debug)]
pub(super) struct Routes {
    hosts: usize,
    /// Groups of clients, none empty.
    groups: Vec<Vec<usize>>,
    /// The client that goes without a proxy.
    direct: Option<usize>,
    proxy_reset_after: Duration,
    host_reset_after: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    host: usize,
    /// Since when another than the first host is used.
    host_left: Option<Instant>,
    group: usize,
    client: usize,
    /// Since when another than the first group is used.
    group_left: Option<Instant>,
    burned: HashSet<usize>,
    /// When the first proxy of the current group was burned.
    burned_since: Option<Instant>,
}

impl Routes {
    /// `groups` must not be empty and neither must any of them; `hosts` is at least one.
    pub(super) fn new(
        hosts: usize,
        groups: Vec<Vec<usize>>,
        direct: Option<usize>,
        proxy_reset_after: Duration,
        host_reset_after: Duration,
    ) -> Self {
        let client = groups.first().map_or(0, |group| pick(group, &HashSet::new()).unwrap_or(0));
        let state = State {
            host: 0,
            host_left: None,
            group: 0,
            client,
            group_left: None,
            burned: HashSet::new(),
            burned_since: None,
        };
        Self { hosts, groups, direct, proxy_reset_after, host_reset_after, state: Mutex::new(state) }
    }

    pub(super) fn hosts(&self) -> usize {
        self.hosts
    }

    /// Number of proxies in all groups, `DIRECT` included.
    pub(super) fn proxies(&self) -> usize {
        self.groups.iter().map(Vec::len).sum()
    }

    pub(super) fn is_direct(&self, client: usize) -> bool {
        self.direct == Some(client)
    }

    /// The way for a new request, after the reset timers had their effect.
    pub(super) fn current(&self, now: Instant) -> Route {
        let mut state = self.lock();
        let is_due = |since: Option<Instant>, after: Duration| {
            !after.is_zero() && since.is_some_and(|since| now.saturating_duration_since(since) >= after)
        };
        if is_due(state.group_left, self.proxy_reset_after) {
            self.enter_group(&mut state, 0, now);
        } else if is_due(state.burned_since, self.proxy_reset_after) {
            let group = state.group;
            self.enter_group(&mut state, group, now);
        }
        if is_due(state.host_left, self.host_reset_after) {
            state.host = 0;
            state.host_left = None;
        }
        Route { host: state.host, client: state.client }
    }

    /// The host failed: others use the next one, unless somebody else has moved on already.
    pub(super) fn host_failed(&self, host: usize, now: Instant) {
        let mut state = self.lock();
        if state.host == host {
            let next = (host + 1) % self.hosts;
            move_host(&mut state, next, now);
        }
    }

    /// A request succeeded on `host` after `failed` could not serve it: `host` is current from now on.
    pub(super) fn host_proved_better(&self, host: usize, failed: usize, now: Instant) {
        let mut state = self.lock();
        if state.host == failed {
            move_host(&mut state, host, now);
        }
    }

    /// The proxy failed: it is not used again until the reset timer. Returns the proxy to use instead.
    pub(super) fn proxy_failed(&self, client: usize, now: Instant) -> usize {
        let mut state = self.lock();
        if state.client == client {
            state.burned.insert(client);
            state.burned_since.get_or_insert(now);
            let group = self.groups.get(state.group).map(Vec::as_slice).unwrap_or_default();
            match pick(group, &state.burned) {
                Some(other) => state.client = other,
                None => {
                    let next = (state.group + 1) % self.groups.len().max(1);
                    self.enter_group(&mut state, next, now);
                }
            }
        }
        state.client
    }

    /// The proxy is alive but slow: it is not burned, and `DIRECT` is no way around it. Returns another proxy that
    /// is not in `tried`, if there is one, and makes it current.
    pub(super) fn proxy_slow(&self, client: usize, tried: &[usize], now: Instant) -> Option<usize> {
        let mut state = self.lock();
        let fits = |other: usize| {
            other != client
                && !self.is_direct(other)
                && !tried.contains(&other)
                && !state.burned.contains(&other)
        };
        let group = (0..self.groups.len()).map(|offset| (state.group + offset) % self.groups.len()).find_map(
            |group| Some((group, self.groups.get(group)?.iter().copied().find(|other| fits(*other))?)),
        );
        let (group, other) = group?;
        if state.client == client {
            if group != state.group {
                self.enter_group(&mut state, group, now);
            }
            state.client = other;
        }
        Some(other)
    }

    /// All proxies were tried with one host: start again with the first group for the next host.
    pub(super) fn reset_proxies(&self, now: Instant) -> usize {
        let mut state = self.lock();
        self.enter_group(&mut state, 0, now);
        state.client
    }

    fn enter_group(&self, state: &mut State, group: usize, now: Instant) {
        state.burned.clear();
        state.burned_since = None;
        state.group = group;
        state.group_left = if group == 0 { None } else { state.group_left.or(Some(now)) };
        if let Some(client) = self.groups.get(group).and_then(|group| pick(group, &state.burned)) {
            state.client = client;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is consistent after every statement, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn move_host(state: &mut State, host: usize, now: Instant) {
    state.host = host;
    state.host_left = if host == 0 { None } else { state.host_left.or(Some(now)) };
}

/// A random member of `group` that is not burned: the load of many clients spreads over the proxies of a group.
fn pick(group: &[usize], burned: &HashSet<usize>) -> Option<usize> {
    let alive: Vec<usize> = group.iter().copied().filter(|client| !burned.contains(client)).collect();
    let index = random_below(alive.len().max(1) as u64);
    alive.get(usize::try_from(index).unwrap_or(0)).copied()
}

/// A number below `bound` that differs from process to process; not fit for secrets.
pub(super) fn random_below(bound: u64) -> u64 {
    std::hash::RandomState::new().build_hasher().finish() % bound.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROXY_RESET: Duration = Duration::from_secs(300);
    const HOST_RESET: Duration = Duration::from_secs(1800);

    /// Clients 0 and 1 form the first group, 2 the second, 3 is DIRECT in the third.
    fn routes() -> Routes {
        Routes::new(2, vec![vec![0, 1], vec![2], vec![3]], Some(3), PROXY_RESET, HOST_RESET)
    }

    #[test]
    fn a_failed_proxy_is_replaced_in_its_group_then_by_the_next_group() {
        let (routes, now) = (routes(), Instant::now());
        let first = routes.current(now).client;
        assert!(first < 2);
        assert_eq!(routes.proxy_failed(first, now), 1 - first);
        assert_eq!(routes.proxy_failed(1 - first, now), 2);
        assert_eq!(routes.proxy_failed(2, now), 3);
        assert!(routes.proxy_failed(3, now) < 2, "groups are cyclic");
    }

    #[test]
    fn a_verdict_on_a_proxy_that_is_no_longer_current_changes_nothing() {
        let (routes, now) = (routes(), Instant::now());
        let first = routes.current(now).client;
        let second = routes.proxy_failed(first, now);
        assert_eq!(routes.proxy_failed(first, now), second);
        assert_eq!(routes.current(now).client, second);
    }

    #[test]
    fn the_first_group_and_the_first_host_come_back_after_their_reset_time() {
        let (routes, now) = (routes(), Instant::now());
        routes.proxy_failed(routes.current(now).client, now);
        routes.proxy_failed(routes.current(now).client, now);
        routes.host_failed(0, now);
        assert_eq!(routes.current(now), Route { host: 1, client: 2 });
        let later = now + PROXY_RESET;
        assert!(routes.current(later).client < 2);
        assert_eq!(routes.current(later).host, 1);
        assert_eq!(routes.current(now + HOST_RESET).host, 0);
    }

    #[test]
    fn a_slow_proxy_is_never_replaced_by_direct() {
        let now = Instant::now();
        let routes = Routes::new(1, vec![vec![0], vec![1]], Some(1), PROXY_RESET, HOST_RESET);
        assert_eq!(routes.proxy_slow(0, &[0], now), None);
        assert_eq!(routes.current(now).client, 0);
        let routes = self::routes();
        let first = routes.current(now).client;
        assert_eq!(routes.proxy_slow(first, &[first], now), Some(1 - first));
        assert_eq!(routes.proxy_slow(1 - first, &[0, 1], now), Some(2));
        assert_eq!(routes.proxy_slow(2, &[0, 1, 2], now), None);
    }

    #[test]
    fn the_start_within_a_group_is_random() {
        let starts: HashSet<usize> = (0..64).map(|_| routes().current(Instant::now()).client).collect();
        assert_eq!(starts, HashSet::from([0, 1]));
    }

    #[test]
    fn a_host_that_served_what_another_lacked_becomes_current() {
        let (routes, now) = (routes(), Instant::now());
        routes.host_proved_better(1, 0, now);
        assert_eq!(routes.current(now).host, 1);
        routes.host_proved_better(0, 0, now);
        assert_eq!(routes.current(now).host, 1, "somebody else has moved on already");
    }
}
