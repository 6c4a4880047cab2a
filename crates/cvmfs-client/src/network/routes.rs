//! Which host and which way the next request takes.
//!
//! All requests share one current host and one current way, so a failure found by one is known to all (client
//! behaviour §5.2–§5.4). The state machine does no I/O and is given the time, so that tests need neither.
//!
//! Deviations from the C++ client, where its users complain:
//! * a way that is *slow* (it answers, or its connection stands, but not fast enough) is told from one that is
//!   *burned*: slow ones are used when there is no better one, and none of them makes room for `DIRECT`;
//! * `DIRECT` is no peer of the proxies in its group: it is used when every listed proxy is burned, or where it is
//!   the first group by itself.

use std::collections::HashSet;
use std::hash::{BuildHasher, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::shard::Ring;
use super::way::{Host, Way};

/// The way of one attempt.
#[derive(Debug, Clone)]
pub(super) struct Route {
    pub(super) host: Arc<Host>,
    pub(super) way: Arc<Way>,
}

/// What is known against a way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nobody answers there, or it refuses to serve.
    Burned,
    /// It lives but is of little use at present.
    Slow,
}

/// The state of one way, for status.
#[derive(Debug, Clone)]
pub(super) struct WayState {
    pub(super) way: Arc<Way>,
    pub(super) verdict: Option<Verdict>,
    pub(super) is_current: bool,
}

#[derive(Debug)]
pub(super) struct Routes {
    proxy_reset_after: Duration,
    host_reset_after: Duration,
    shard: bool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Never empty.
    hosts: Vec<Arc<Host>>,
    host: usize,
    /// Since when another than the first host is used.
    host_left: Option<Instant>,
    /// Groups of ways; none is empty. Without any the way leads nowhere.
    groups: Vec<Vec<Arc<Way>>>,
    first_fallback: usize,
    group: usize,
    way: Arc<Way>,
    /// Since when another than the first group is used.
    group_left: Option<Instant>,
    burned: HashSet<u64>,
    slow: HashSet<u64>,
    /// When the first of these marks was set.
    marked_since: Option<Instant>,
    /// The ways of the current group that share the requests, if they do.
    ring: Option<Ring>,
}

impl Routes {
    /// `hosts` is not empty; `groups` are as in [`Routes::set_groups`].
    pub(super) fn new(
        hosts: Vec<Arc<Host>>,
        groups: Vec<Vec<Arc<Way>>>,
        first_fallback: usize,
        shard: bool,
        proxy_reset_after: Duration,
        host_reset_after: Duration,
    ) -> Self {
        let mut state = State {
            hosts,
            host: 0,
            host_left: None,
            groups: Vec::new(),
            first_fallback: 0,
            group: 0,
            way: Arc::new(Way::nowhere()),
            group_left: None,
            burned: HashSet::new(),
            slow: HashSet::new(),
            marked_since: None,
            ring: None,
        };
        state.replace_groups(groups, first_fallback, shard);
        Self { proxy_reset_after, host_reset_after, shard, state: Mutex::new(state) }
    }

    /// The way for a new request for something with this `key`, after the reset timers had their effect.
    pub(super) fn current(&self, key: u32, now: Instant) -> Option<Route> {
        let mut state = self.lock();
        let is_due = |since: Option<Instant>, after: Duration| {
            !after.is_zero() && since.is_some_and(|since| now.saturating_duration_since(since) >= after)
        };
        if is_due(state.group_left, self.proxy_reset_after) {
            state.clear_marks();
            state.group_left = None;
            state.settle(0, self.shard);
        } else if is_due(state.marked_since, self.proxy_reset_after) {
            state.clear_marks();
            if state.group == 0 {
                state.settle_if_needed(self.shard);
            }
        }
        if is_due(state.host_left, self.host_reset_after) {
            state.host = 0;
            state.host_left = None;
        }
        let host = Arc::clone(state.hosts.get(state.host)?);
        let way = match state.ring.as_ref().and_then(|ring| ring.find(key, &[])) {
            Some(way) => way,
            None => Arc::clone(&state.way),
        };
        Some(Route { host, way })
    }

    /// Number of hosts.
    pub(super) fn host_count(&self) -> usize {
        self.lock().hosts.len()
    }

    /// The host after `host` in the chain for which `fits` holds.
    pub(super) fn next_host(&self, host: &Host, fits: impl Fn(&Host) -> bool) -> Option<Arc<Host>> {
        let state = self.lock();
        let count = state.hosts.len();
        let start = state.hosts.iter().position(|known| known.id == host.id).map_or(0, |at| at + 1);
        (start..start + count)
            .filter_map(|index| state.hosts.get(index % count))
            .find(|candidate| candidate.id != host.id && fits(candidate))
            .cloned()
    }

    /// The host failed: others use the next one, unless somebody else has moved on already. Returns whether the
    /// current host changed.
    pub(super) fn host_failed(&self, host: &Host, now: Instant) -> bool {
        let mut state = self.lock();
        let is_current = state.hosts.get(state.host).is_some_and(|current| current.id == host.id);
        if is_current && state.hosts.len() > 1 {
            let next = (state.host + 1) % state.hosts.len();
            state.move_host(next, now);
            return true;
        }
        false
    }

    /// A request succeeded on `host` after `failed` could not serve it: `host` is current from now on.
    pub(super) fn host_proved_better(&self, host: &Host, failed: u64, now: Instant) {
        let mut state = self.lock();
        if state.hosts.get(state.host).is_some_and(|current| current.id == failed)
            && let Some(index) = state.hosts.iter().position(|known| known.id == host.id)
        {
            state.move_host(index, now);
        }
    }

    /// Records what is known against `way` now, and returns a way that is not in `tried`, the best there is. It
    /// becomes current if `way` was. With [`Verdict::Slow`], `DIRECT` is no answer.
    pub(super) fn way_failed(
        &self,
        way: &Way,
        verdict: Verdict,
        tried: &[u64],
        key: u32,
        now: Instant,
    ) -> Option<Arc<Way>> {
        let mut state = self.lock();
        let was_current = state.way.id == way.id || state.ring.as_ref().is_some_and(|ring| ring.has(way.id));
        let is_listed = state.groups.iter().flatten().any(|known| known.id == way.id);
        if is_listed && !way.is_direct() {
            match verdict {
                Verdict::Burned => {
                    state.slow.remove(&way.id);
                    state.burned.insert(way.id);
                }
                Verdict::Slow => {
                    state.slow.insert(way.id);
                }
            }
            state.marked_since.get_or_insert(now);
            if let Some(ring) = &mut state.ring {
                ring.remove(way.id);
            }
        }
        let (group, other) = match state.ring.as_ref().and_then(|ring| ring.find(key, tried)) {
            Some(other) => (state.group, other),
            None => state.best(tried, verdict == Verdict::Burned)?,
        };
        if was_current {
            state.take(group, &other, now, self.shard);
        }
        Some(other)
    }

    /// A way for one more round with another host: the best that is not in `tried`.
    pub(super) fn another_way(&self, tried: &[u64], allow_direct: bool) -> Option<Arc<Way>> {
        self.lock().best(tried, allow_direct).map(|(_, way)| way)
    }

    /// All ways were tried in vain: the next request starts with the first group and without marks.
    pub(super) fn unburn_all(&self, now: Instant) {
        let mut state = self.lock();
        let all_burned =
            state.groups.iter().flatten().all(|way| way.is_direct() || state.burned.contains(&way.id));
        if all_burned {
            state.clear_marks();
            state.leave_group(0, now);
            state.settle(0, self.shard);
        }
    }

    /// Whether any group lists `DIRECT`.
    #[cfg(test)]
    pub(super) fn lists_direct(&self) -> bool {
        self.lock().groups.iter().flatten().any(|way| way.is_direct())
    }

    /// Replaces the hosts; the first one is current. `hosts` is not empty.
    pub(super) fn set_hosts(&self, hosts: Vec<Arc<Host>>) {
        let mut state = self.lock();
        if !hosts.is_empty() {
            state.hosts = hosts;
            state.host = 0;
            state.host_left = None;
        }
    }

    /// The hosts and the index of the current one.
    pub(super) fn hosts(&self) -> (Vec<Arc<Host>>, usize) {
        let state = self.lock();
        (state.hosts.clone(), state.host)
    }

    /// Replaces the proxies; groups from `first_fallback` on are fallback groups. Ways that are in the old groups as
    /// well keep their marks, and stay current if they are.
    pub(super) fn set_groups(&self, groups: Vec<Vec<Arc<Way>>>, first_fallback: usize) {
        self.lock().replace_groups(groups, first_fallback, self.shard);
    }

    /// The ways by group, the current group, the first fallback group.
    pub(super) fn groups(&self) -> (Vec<Vec<WayState>>, usize, usize) {
        let state = self.lock();
        let describe = |way: &Arc<Way>| WayState {
            way: Arc::clone(way),
            verdict: if state.burned.contains(&way.id) {
                Some(Verdict::Burned)
            } else {
                state.slow.contains(&way.id).then_some(Verdict::Slow)
            },
            is_current: state.ring.as_ref().map_or(state.way.id == way.id, |ring| ring.has(way.id)),
        };
        let groups = state.groups.iter().map(|group| group.iter().map(describe).collect()).collect();
        (groups, state.group, state.first_fallback)
    }

    /// Forgets all marks and picks a way of the current group anew.
    pub(super) fn rebalance(&self) {
        let mut state = self.lock();
        state.clear_marks();
        let group = state.group;
        state.settle(group, self.shard);
    }

    /// Goes on to the next group.
    pub(super) fn switch_group(&self, now: Instant) {
        let mut state = self.lock();
        let next = (state.group + 1) % state.groups.len().max(1);
        state.clear_marks();
        state.leave_group(next, now);
        state.settle(next, self.shard);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is consistent after every statement, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn move_host(&mut self, host: usize, now: Instant) {
        self.host = host;
        self.host_left = if host == 0 { None } else { self.host_left.or(Some(now)) };
    }

    fn leave_group(&mut self, group: usize, now: Instant) {
        self.group = group;
        self.group_left = if group == 0 { None } else { self.group_left.or(Some(now)) };
    }

    fn clear_marks(&mut self) {
        self.burned.clear();
        self.slow.clear();
        self.marked_since = None;
    }

    /// How much a way is to be preferred; smaller is better, `None` is out of the question.
    fn rank(&self, way: &Way, allow_direct: bool) -> Option<u8> {
        if self.burned.contains(&way.id) {
            return None;
        }
        if way.is_direct() {
            return allow_direct.then_some(2);
        }
        Some(if way.is_unresolved() { 3 } else { u8::from(self.slow.contains(&way.id)) })
    }

    /// The best way that is not in `tried`, the current group's first: at random among equals, so that the load of
    /// many clients spreads over the proxies of a group.
    fn best(&self, tried: &[u64], allow_direct: bool) -> Option<(usize, Arc<Way>)> {
        let count = self.groups.len();
        let mut found: Option<(u8, usize, Vec<&Arc<Way>>)> = None;
        for offset in 0..count {
            let index = (self.group + offset) % count;
            for way in self.groups.get(index).into_iter().flatten().filter(|way| !tried.contains(&way.id)) {
                let Some(rank) = self.rank(way, allow_direct) else { continue };
                match &mut found {
                    Some((best, group, ways)) if *best == rank && *group == index => ways.push(way),
                    Some((best, ..)) if *best <= rank => {}
                    _ => found = Some((rank, index, vec![way])),
                }
            }
        }
        let (_, group, ways) = found?;
        Some((group, Arc::clone(pick(&ways)?)))
    }

    /// Makes a way of `group` current: the best one of that group, whatever other groups have.
    fn settle(&mut self, group: usize, shard: bool) {
        self.group = group;
        let ways = self.groups.get(group).cloned().unwrap_or_default();
        let rank = |way: &Arc<Way>| self.rank(way, true).unwrap_or(u8::MAX);
        let best = ways.iter().map(rank).min();
        let candidates: Vec<Arc<Way>> = ways.iter().filter(|way| Some(rank(way)) == best).cloned().collect();
        self.ring = (shard && candidates.iter().all(|way| !way.is_direct()) && candidates.len() > 1)
            .then(|| Ring::new(&candidates));
        if let Some(way) = pick(&candidates) {
            self.way = Arc::clone(way);
        }
    }

    /// As [`State::settle`] for the current group, but a way that is as good as any stays.
    fn settle_if_needed(&mut self, shard: bool) {
        let group = self.group;
        let is_member =
            self.groups.get(group).is_some_and(|ways| ways.iter().any(|way| way.id == self.way.id));
        let is_fine = self.rank(&self.way, false) == Some(0);
        if shard || !is_member || !is_fine {
            self.settle(group, shard);
        }
    }

    /// Makes `way` of `group` current.
    fn take(&mut self, group: usize, way: &Arc<Way>, now: Instant, shard: bool) {
        if group != self.group {
            self.leave_group(group, now);
            self.settle(group, shard);
        }
        self.way = Arc::clone(way);
    }

    fn replace_groups(&mut self, groups: Vec<Vec<Arc<Way>>>, first_fallback: usize, shard: bool) {
        if groups.is_empty() {
            return;
        }
        self.groups = groups;
        self.first_fallback = first_fallback;
        let known: HashSet<u64> = self.groups.iter().flatten().map(|way| way.id).collect();
        self.burned.retain(|id| known.contains(id));
        self.slow.retain(|id| known.contains(id));
        if self.burned.is_empty() && self.slow.is_empty() {
            self.marked_since = None;
        }
        match self.groups.iter().position(|ways| ways.iter().any(|way| way.id == self.way.id)) {
            Some(group) if group == self.group => self.settle_if_needed(shard),
            _ => {
                self.group_left = None;
                self.settle(0, shard);
            }
        }
    }
}

/// A random member.
fn pick<T>(members: &[T]) -> Option<&T> {
    let index = random_below(members.len().max(1) as u64);
    members.get(usize::try_from(index).unwrap_or(0))
}

/// A number below `bound` that differs from process to process; not fit for secrets.
pub(super) fn random_below(bound: u64) -> u64 {
    std::hash::RandomState::new().build_hasher().finish() % bound.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::url::Url;

    const PROXY_RESET: Duration = Duration::from_secs(300);
    const HOST_RESET: Duration = Duration::from_secs(1800);
    const DEAD: Verdict = Verdict::Burned;

    fn proxy(name: &str) -> Arc<Way> {
        let url = Url::parse(&format!("http://{name}:3128")).unwrap();
        Arc::new(Way::proxy(&url, Some(([127, 0, 0, name.as_bytes()[0]], 3128).into())))
    }

    fn hosts(count: usize) -> Vec<Arc<Host>> {
        (0..count).map(|number| Arc::new(Host::new(&format!("http://h{number}")).unwrap())).collect()
    }

    fn routes_with(groups: &[Vec<Arc<Way>>]) -> Routes {
        Routes::new(hosts(2), groups.to_vec(), groups.len(), false, PROXY_RESET, HOST_RESET)
    }

    /// Two proxies, one proxy, DIRECT.
    fn setting() -> (Vec<Vec<Arc<Way>>>, Routes) {
        let groups = vec![vec![proxy("a"), proxy("b")], vec![proxy("c")], vec![Arc::new(Way::direct())]];
        let routes = routes_with(&groups);
        (groups, routes)
    }

    fn current(routes: &Routes, now: Instant) -> String {
        routes.current(0, now).unwrap().way.describe()
    }

    /// All ways in the order in which failures lead to them, for a request that tries each once.
    fn tour(routes: &Routes, verdict: Verdict, now: Instant) -> Vec<String> {
        let mut way = routes.current(0, now).unwrap().way;
        let (mut tried, mut names) = (Vec::new(), Vec::new());
        loop {
            tried.push(way.id);
            names.push(way.as_proxy().map_or("DIRECT".to_owned(), |proxy| proxy.url.host.clone()));
            match routes.way_failed(&way, verdict, &tried, 0, now) {
                Some(next) => way = next,
                None => return names,
            }
        }
    }

    #[test]
    fn row_04_a_dead_proxy_is_replaced_in_its_group_then_by_the_next_group_and_last_by_direct() {
        let (_, routes) = setting();
        let mut names = tour(&routes, DEAD, Instant::now());
        names[..2].sort();
        assert_eq!(names, ["a", "b", "c", "DIRECT"]);
    }

    #[test]
    fn row_07_a_slow_proxy_is_never_replaced_by_direct() {
        let (_, routes) = setting();
        let now = Instant::now();
        let mut names = tour(&routes, Verdict::Slow, now);
        names[..2].sort();
        assert_eq!(names, ["a", "b", "c"]);
        assert_ne!(current(&routes, now), "DIRECT");
        let (groups, ..) = routes.groups();
        assert!(groups.iter().flatten().all(|state| state.verdict != Some(DEAD)), "slow is not dead");
    }

    #[test]
    fn a_slow_proxy_serves_when_the_others_are_dead_although_direct_is_listed() {
        let (groups, routes) = setting();
        let now = Instant::now();
        let slow = &groups[0][0];
        routes.way_failed(slow, Verdict::Slow, &[slow.id], 0, now);
        for dead in [&groups[0][1], &groups[1][0]] {
            routes.way_failed(dead, DEAD, &[dead.id], 0, now);
        }
        assert_eq!(current(&routes, now), slow.describe());
        routes.way_failed(slow, DEAD, &[slow.id], 0, now);
        assert_eq!(current(&routes, now), "DIRECT");
    }

    #[test]
    fn row_19_without_direct_in_the_list_there_is_no_direct() {
        let groups = vec![vec![proxy("a"), proxy("b")]];
        let routes = routes_with(&groups);
        let mut names = tour(&routes, DEAD, Instant::now());
        names.sort();
        assert_eq!(names, ["a", "b"]);
        assert!(!routes.lists_direct());
    }

    #[test]
    fn direct_is_no_peer_of_the_proxies_in_its_group_but_the_first_group_may_be_direct_alone() {
        let now = Instant::now();
        for _ in 0..32 {
            let routes = routes_with(&[vec![Arc::new(Way::direct()), proxy("a")]]);
            assert_ne!(current(&routes, now), "DIRECT");
            let routes = routes_with(&[vec![Arc::new(Way::direct())], vec![proxy("a")]]);
            assert_eq!(current(&routes, now), "DIRECT");
        }
    }

    #[test]
    fn row_05_a_verdict_is_shared_and_a_late_one_changes_nothing() {
        let (_, routes) = setting();
        let now = Instant::now();
        let first = routes.current(0, now).unwrap().way;
        let second = routes.way_failed(&first, DEAD, &[first.id], 0, now).unwrap();
        // Others that were under way with the first proxy come to the same verdict later.
        for _ in 0..10 {
            assert_eq!(routes.way_failed(&first, DEAD, &[first.id], 0, now).unwrap().id, second.id);
        }
        assert_eq!(routes.current(0, now).unwrap().way.id, second.id);
    }

    #[test]
    fn row_20_the_first_group_and_the_first_host_come_back_after_their_reset_time() {
        let (groups, routes) = setting();
        let now = Instant::now();
        let first_group: Vec<String> = groups[0].iter().map(|way| way.describe()).collect();
        for way in &groups[0] {
            routes.way_failed(way, DEAD, &[way.id], 0, now);
        }
        assert_eq!(current(&routes, now), groups[1][0].describe());
        let (chain, _) = routes.hosts();
        assert!(routes.host_failed(&chain[0], now));
        assert_eq!(routes.current(0, now).unwrap().host.id, chain[1].id);
        let later = now + PROXY_RESET;
        assert!(first_group.contains(&current(&routes, later)));
        assert_eq!(routes.current(0, later).unwrap().host.id, chain[1].id);
        assert_eq!(routes.current(0, now + HOST_RESET).unwrap().host.id, chain[0].id);
        let forever = Routes::new(hosts(1), groups.clone(), 3, false, Duration::ZERO, Duration::ZERO);
        for way in &groups[0] {
            forever.way_failed(way, DEAD, &[way.id], 0, now);
        }
        assert_eq!(current(&forever, now + 1000 * PROXY_RESET), groups[1][0].describe(), "zero is never");
    }

    #[test]
    fn a_burned_proxy_of_the_current_group_is_used_again_after_the_reset_time() {
        let groups = vec![vec![proxy("a"), proxy("b")]];
        let routes = routes_with(&groups);
        let now = Instant::now();
        let burned = routes.current(0, now).unwrap().way;
        let other = routes.way_failed(&burned, DEAD, &[burned.id], 0, now).unwrap();
        routes.current(0, now + PROXY_RESET);
        assert_eq!(routes.way_failed(&other, DEAD, &[other.id], 0, now).unwrap().id, burned.id);
    }

    #[test]
    fn when_all_are_dead_the_next_request_starts_afresh() {
        let groups = vec![vec![proxy("a")], vec![proxy("b")]];
        let routes = routes_with(&groups);
        let now = Instant::now();
        assert_eq!(tour(&routes, DEAD, now), ["a", "b"]);
        routes.unburn_all(now);
        assert_eq!(tour(&routes, DEAD, now), ["a", "b"]);
    }

    #[test]
    fn the_start_within_a_group_is_random() {
        let starts: HashSet<String> = (0..64)
            .map(|_| {
                let (_, routes) = setting();
                routes.current(0, Instant::now()).unwrap().way.describe()
            })
            .collect();
        assert_eq!(starts.len(), 2);
    }

    #[test]
    fn a_host_that_served_what_another_lacked_becomes_current() {
        let (_, routes) = setting();
        let now = Instant::now();
        let (chain, _) = routes.hosts();
        routes.host_proved_better(&chain[1], chain[0].id, now);
        assert_eq!(routes.current(0, now).unwrap().host.id, chain[1].id);
        routes.host_proved_better(&chain[0], chain[0].id, now);
        assert_eq!(
            routes.current(0, now).unwrap().host.id,
            chain[1].id,
            "somebody else has moved on already"
        );
    }

    #[test]
    fn proxies_that_stay_in_the_list_keep_their_marks_and_their_turn() {
        let groups = vec![vec![proxy("a"), proxy("b")]];
        let routes = routes_with(&groups);
        let now = Instant::now();
        let burned = routes.current(0, now).unwrap().way;
        let kept = routes.way_failed(&burned, DEAD, &[burned.id], 0, now).unwrap();
        let added = proxy("c");
        routes.set_groups(vec![vec![Arc::clone(&burned), Arc::clone(&kept), added]], 1);
        assert_eq!(routes.current(0, now).unwrap().way.id, kept.id);
        assert!(routes.groups().0[0].iter().any(|state| state.verdict == Some(DEAD)));
        routes.set_groups(vec![vec![burned]], 1);
        assert_eq!(routes.groups().0.len(), 1);
    }

    #[test]
    fn a_name_that_does_not_resolve_is_the_last_choice() {
        let url = Url::parse("http://nowhere.invalid:3128").unwrap();
        let unresolved = Arc::new(Way::proxy(&url, None));
        for _ in 0..16 {
            let routes = routes_with(&[vec![Arc::clone(&unresolved), proxy("a")]]);
            assert_ne!(current(&routes, Instant::now()), unresolved.describe());
        }
    }

    #[test]
    fn with_sharding_each_object_has_its_proxy_and_a_dead_one_moves_only_its_own() {
        let ways: Vec<Arc<Way>> = ["a", "b", "c"].iter().map(|name| proxy(name)).collect();
        let routes = Routes::new(hosts(1), vec![ways.clone()], 1, true, PROXY_RESET, HOST_RESET);
        let now = Instant::now();
        let keys: Vec<u32> = (0..300).map(|step: u32| step.wrapping_mul(0x9E37_79B9)).collect();
        let assignment = |routes: &Routes| {
            keys.iter().map(|key| routes.current(*key, now).unwrap().way.id).collect::<Vec<u64>>()
        };
        let before = assignment(&routes);
        assert_eq!(before, assignment(&routes));
        assert_eq!(before.iter().collect::<HashSet<_>>().len(), 3);
        routes.way_failed(&ways[0], DEAD, &[ways[0].id], keys[0], now);
        for (old, new) in before.iter().zip(assignment(&routes)) {
            if *old == ways[0].id {
                assert_ne!(new, ways[0].id);
            } else {
                assert_eq!(new, *old);
            }
        }
    }
}
