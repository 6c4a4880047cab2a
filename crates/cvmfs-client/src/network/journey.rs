//! The attempts of one request: where the next one goes (client behaviour §6.3).
//!
//! Each pair of host and way is tried once, apart from repetitions that the table asks for, so a journey ends.
//!
//! # Silence
//! A proxy that accepts a connection and does not answer in time may be dead, overloaded, or wait for a host that is.
//! So another proxy is tried first, then another host, then the same way once more with more patience. Only when
//! nobody has got an answer from it for [`SILENCE_LIMIT`] time-outs it is dead, and `DIRECT`, if listed, has its turn.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::failure::{Blame, Cause, FetchError, Place};
use super::routes::{Route, Routes, Verdict, random_below};
use super::way::{Host, Way};

/// Attempts for one request whatever hosts, proxies and retries would allow.
const MAX_ATTEMPTS: u32 = 64;
/// A proxy that has not answered for so many time-outs is dead.
const SILENCE_LIMIT: u32 = 3;
/// How much longer the last resort may take to answer.
const MORE_PATIENCE: u32 = 2;

/// The time-outs and repetitions of the configuration.
#[derive(Debug, Clone)]
pub(super) struct Policy {
    pub(super) timeout: Duration,
    pub(super) timeout_direct: Duration,
    pub(super) low_speed_limit: u64,
    pub(super) max_retries: u32,
    pub(super) backoff_init: Duration,
    pub(super) backoff_max: Duration,
    pub(super) indefinitely: bool,
}

/// A failed attempt.
pub(super) struct Failure<'a> {
    pub(super) cause: &'a Cause,
    /// What the server asks to wait before the next attempt.
    pub(super) retry_after: Option<Duration>,
    /// The attempt used a connection that had served before.
    pub(super) reused: bool,
    /// When the attempt began.
    pub(super) began: Instant,
}

/// The attempts of one request.
pub(super) struct Journey {
    pub(super) route: Route,
    /// Ask caches on the way for a fresh copy.
    pub(super) no_cache: bool,
    /// Do not use a connection that has served before.
    pub(super) fresh: bool,
    /// How many times the time-out may pass before the answer begins.
    pub(super) patience: u32,
    key: u32,
    attempts: u32,
    /// Pairs of host and way that were tried.
    tried: Vec<(u64, u64)>,
    first_host: u64,
    retries: u32,
    /// A connection that was closed before an answer is nobody's fault once.
    closed_forgiven: bool,
    /// Whether every answer so far was "not found".
    only_absent: bool,
    /// The last failure.
    pub(super) last: Option<Cause>,
}

/// What to do after a failed attempt.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Take the route of the journey, which may have changed, after this pause.
    Again(Duration),
    GiveUp,
}

impl Journey {
    pub(super) fn start(route: Route, key: u32) -> Self {
        let pair = (route.host.id, route.way.id);
        Self {
            first_host: route.host.id,
            route,
            no_cache: false,
            fresh: false,
            patience: 1,
            key,
            attempts: 0,
            tried: vec![pair],
            retries: 0,
            closed_forgiven: false,
            only_absent: true,
            last: None,
        }
    }

    pub(super) fn succeeded(&self, routes: &Routes, now: Instant) {
        if self.route.host.id != self.first_host {
            routes.host_proved_better(&self.route.host, self.first_host, now);
        }
    }

    /// Decides after a failed attempt (client behaviour §6.3). Deviations from the C++ client, where its users
    /// complain: an unreachable way is not repeated while there is another one; a missing or damaged object changes
    /// the host for this request only, until the other one has proved better; a slow proxy is not burned.
    pub(super) fn next_step(
        &mut self,
        routes: &Routes,
        policy: &Policy,
        failure: &Failure<'_>,
        now: Instant,
    ) -> Step {
        let cause = failure.cause;
        self.attempts += 1;
        if self.attempts >= MAX_ATTEMPTS {
            return Step::GiveUp;
        }
        if failure.reused && cause.may_be_stale() {
            // Not even counted: the connection was kept too long, which is nobody's fault.
            self.fresh = true;
            return Step::Again(Duration::ZERO);
        }
        self.only_absent &= matches!(cause, Cause::Status(404 | 410));
        if matches!(cause, Cause::Corrupt(_)) && !self.no_cache {
            self.no_cache = true;
            return Step::Again(Duration::ZERO);
        }
        if matches!(cause, Cause::Closed(_)) && !self.closed_forgiven {
            self.closed_forgiven = true;
            return Step::Again(Duration::ZERO);
        }
        let may_repeat = cause.is_transfer() && !self.no_cache && self.retries < policy.max_retries;
        // A cut transfer is likely to succeed on the way it came; a way that cannot be reached is not.
        if may_repeat && matches!(cause, Cause::Cut(_)) {
            self.retries += 1;
            return Step::Again(Duration::ZERO);
        }
        let dead_by_silence = match cause {
            Cause::Silent(_) if !self.route.way.is_direct() => {
                let silent = self.route.way.stayed_silent(failure.began, now);
                Some(silent >= SILENCE_LIMIT * policy.timeout)
            }
            _ => None,
        };
        if self.move_on(routes, cause, dead_by_silence == Some(true), now) {
            self.no_cache = false;
            self.fresh = false;
            self.patience = 1;
            return Step::Again(Duration::ZERO);
        }
        if dead_by_silence == Some(false) && self.retries < policy.max_retries.max(1) {
            self.retries += 1;
            self.patience = MORE_PATIENCE;
            return Step::Again(Duration::ZERO);
        }
        if may_repeat {
            self.retries += 1;
            let pause = pause(policy, self.retries);
            return Step::Again(failure.retry_after.map_or(pause, |asked| asked.min(policy.backoff_max)));
        }
        if !self.route.way.is_direct() {
            routes.unburn_all(now);
        }
        Step::GiveUp
    }

    /// Begins anew after everything has failed, for those who never give up. Returns the pause before that.
    pub(super) fn start_again(&mut self, routes: &Routes, policy: &Policy, now: Instant) -> Duration {
        routes.rebalance();
        if let Some(route) = routes.current(self.key, now) {
            let last = self.last.take();
            *self = Self { last, ..Self::start(route, self.key) };
        }
        pause(policy, 16).max(Duration::from_secs(1))
    }

    /// Changes the route if there is one that was not tried.
    fn move_on(&mut self, routes: &Routes, cause: &Cause, silent_is_dead: bool, now: Instant) -> bool {
        let way = Arc::clone(&self.route.way);
        let blame = match cause.blame(!way.is_direct()) {
            Blame::SlowProxy if silent_is_dead => Blame::DeadProxy,
            blame => blame,
        };
        match blame {
            Blame::Host => self.next_host(routes, cause, now),
            Blame::HostThenProxy => {
                self.next_host(routes, cause, now) || self.next_way(routes, Verdict::Slow, now)
            }
            Blame::SlowProxy => {
                self.next_way(routes, Verdict::Slow, now) || self.next_host(routes, cause, now)
            }
            Blame::DeadProxy => {
                self.next_way(routes, Verdict::Burned, now) || self.next_round(routes, cause, now)
            }
        }
    }

    /// Another host by the same way.
    fn next_host(&mut self, routes: &Routes, cause: &Cause, now: Instant) -> bool {
        let way = self.route.way.id;
        let Some(host) = routes.next_host(&self.route.host, |host| !self.tried.contains(&(host.id, way)))
        else {
            return false;
        };
        // A host that lacks one object, or has a damaged one, may serve all others; and one that a proxy cannot
        // reach may be reached by others: this request goes elsewhere, the verdict waits until that proves better.
        let proved = !matches!(cause, Cause::Status(404 | 410 | 416) | Cause::Corrupt(_));
        let blamed = matches!(cause.blame(!self.route.way.is_direct()), Blame::Host);
        if proved && blamed {
            routes.host_failed(&self.route.host, now);
        }
        let way = Arc::clone(&self.route.way);
        self.take(host, way);
        true
    }

    /// Another way to the same host. The failed one is marked for everybody.
    fn next_way(&mut self, routes: &Routes, verdict: Verdict, now: Instant) -> bool {
        let tried = self.ways_tried_with(&self.route.host);
        match routes.way_failed(&self.route.way, verdict, &tried, self.key, now) {
            Some(way) => {
                let host = Arc::clone(&self.route.host);
                self.take(host, way);
                true
            }
            None => false,
        }
    }

    /// All ways failed with this host: another host, and all ways once more.
    fn next_round(&mut self, routes: &Routes, cause: &Cause, now: Instant) -> bool {
        routes.unburn_all(now);
        let fits = |host: &Host| {
            let tried = self.ways_tried_with(host);
            routes.another_way(&tried, true).is_some()
        };
        // Asked before the routes are locked: `fits` looks at them itself.
        let (chain, _) = routes.hosts();
        let start = chain.iter().position(|host| host.id == self.route.host.id).map_or(0, |at| at + 1);
        let next = (0..chain.len())
            .filter_map(|offset| chain.get((start + offset) % chain.len()))
            .find(|host| host.id != self.route.host.id && fits(host));
        let Some(host) = next.cloned() else { return false };
        let Some(way) = routes.another_way(&self.ways_tried_with(&host), true) else { return false };
        tracing::debug!(host = host.base, %cause, "all proxies failed with a host, the next one has its turn");
        self.take(host, way);
        true
    }

    fn ways_tried_with(&self, host: &Host) -> Vec<u64> {
        self.tried.iter().filter(|(known, _)| *known == host.id).map(|(_, way)| *way).collect()
    }

    fn take(&mut self, host: Arc<Host>, way: Arc<Way>) {
        self.tried.push((host.id, way.id));
        self.route = Route { host, way };
    }

    pub(super) fn failure(&self, object: &str, place: Box<Place>, cause: Cause) -> FetchError {
        let object = object.to_owned();
        match cause {
            Cause::Corrupt(reason) => FetchError::Corrupt { object, place, reason },
            _ if self.only_absent => FetchError::NotFound { object, place },
            cause => FetchError::Network { object, place, cause, attempts: self.attempts },
        }
    }
}

/// The pause before the repetition number `retry`: random, and doubled each time up to a limit.
fn pause(policy: &Policy, retry: u32) -> Duration {
    let doubled = policy.backoff_init.saturating_mul(1 << retry.saturating_sub(1).min(16));
    let limit = u64::try_from(doubled.min(policy.backoff_max).as_millis()).unwrap_or(u64::MAX);
    Duration::from_millis(random_below(limit.max(1)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::url::Url;

    const POLICY: Policy = Policy {
        timeout: Duration::from_secs(5),
        timeout_direct: Duration::from_secs(10),
        low_speed_limit: 1024,
        max_retries: 1,
        backoff_init: Duration::from_secs(2),
        backoff_max: Duration::from_secs(10),
        indefinitely: false,
    };

    /// A network of `hosts` hosts and of groups of ways by name.
    struct World {
        routes: Routes,
        hosts: Vec<u64>,
        ways: Vec<u64>,
    }

    impl World {
        fn new(hosts: usize, groups: &[&[&str]]) -> Self {
            let hosts: Vec<Arc<Host>> =
                (0..hosts).map(|number| Arc::new(Host::new(&format!("http://h{number}")).unwrap())).collect();
            let make = |name: &&str| {
                Arc::new(match *name {
                    "DIRECT" => Way::direct(),
                    name => {
                        let url = Url::parse(&format!("http://{name}:3128")).unwrap();
                        Way::proxy(&url, Some("127.0.0.1:3128".parse().unwrap()))
                    }
                })
            };
            let groups: Vec<Vec<Arc<Way>>> =
                groups.iter().map(|group| group.iter().map(make).collect()).collect();
            let ways = groups.iter().flatten().map(|way| way.id).collect();
            let ids = hosts.iter().map(|host| host.id).collect();
            let reset = Duration::from_secs(300);
            let count = groups.len();
            Self { routes: Routes::new(hosts, groups, count, false, reset, reset), hosts: ids, ways }
        }

        fn journey(&self) -> Journey {
            Journey::start(self.routes.current(0, Instant::now()).unwrap(), 0)
        }

        /// Host and way of the route as numbers.
        fn place(&self, journey: &Journey) -> (usize, usize) {
            let host = self.hosts.iter().position(|id| *id == journey.route.host.id).unwrap();
            (host, self.ways.iter().position(|id| *id == journey.route.way.id).unwrap())
        }

        /// The places of the attempts after these failures, and whether the last failure ended the journey.
        fn travel(&self, causes: &[Cause]) -> (Vec<(usize, usize)>, bool) {
            let mut journey = self.journey();
            let mut taken = vec![self.place(&journey)];
            for cause in causes {
                match step(&mut journey, &self.routes, cause) {
                    Step::Again(_) => taken.push(self.place(&journey)),
                    Step::GiveUp => return (taken, true),
                }
            }
            (taken, false)
        }

        fn current(&self) -> (usize, usize) {
            self.place(&self.journey())
        }
    }

    fn step(journey: &mut Journey, routes: &Routes, cause: &Cause) -> Step {
        let now = Instant::now();
        journey.next_step(
            routes,
            &POLICY,
            &Failure { cause, retry_after: None, reused: false, began: now },
            now,
        )
    }

    fn repeat(cause: &Cause, times: usize) -> Vec<Cause> {
        vec![cause.clone(); times]
    }

    fn refused() -> Cause {
        Cause::Connect("refused".to_owned())
    }

    fn slow() -> Cause {
        Cause::TooSlow { limit: 1024, window: Duration::from_secs(5) }
    }

    #[test]
    fn all_proxies_are_tried_with_a_host_before_the_next_host_is_tried_with_all_proxies() {
        let world = World::new(2, &[&["a"], &["b"]]);
        let (taken, given_up) = world.travel(&repeat(&refused(), 5));
        assert_eq!(
            taken,
            [(0, 0), (0, 1), (1, 0), (1, 1), (1, 1)],
            "and the last one once more after a pause"
        );
        assert!(given_up);
    }

    #[test]
    fn row_22_a_damaged_body_is_asked_for_past_caches_then_of_the_next_host_then_given_up() {
        let world = World::new(2, &[&["a"], &["b"]]);
        let (taken, given_up) = world.travel(&repeat(&Cause::Corrupt("hash".to_owned()), 4));
        assert_eq!(taken, [(0, 0), (0, 0), (1, 0), (1, 0)]);
        assert!(given_up);
        assert_eq!(world.current(), (0, 0), "one damaged object is no verdict on a host");
    }

    #[test]
    fn row_11_an_object_that_every_host_lacks_is_not_found() {
        let world = World::new(2, &[&["a"], &["DIRECT"]]);
        let mut journey = world.journey();
        assert_ne!(step(&mut journey, &world.routes, &Cause::Status(404)), Step::GiveUp);
        assert_eq!(step(&mut journey, &world.routes, &Cause::Status(404)), Step::GiveUp);
        let place = Box::new(Place { host: String::new(), proxy: String::new() });
        assert!(matches!(journey.failure("x", place, Cause::Status(404)), FetchError::NotFound { .. }));
        assert_eq!(world.current(), (0, 0));
    }

    #[test]
    fn row_13_the_only_way_is_tried_again_after_the_pause_that_the_server_asks_for_within_reason() {
        let world = World::new(1, &[&["DIRECT"]]);
        let now = Instant::now();
        for (status, asked, expected) in
            [(429, 3, Duration::from_secs(3)), (503, 100_000, POLICY.backoff_max)]
        {
            let cause = Cause::Status(status);
            let failure = Failure {
                cause: &cause,
                retry_after: Some(Duration::from_secs(asked)),
                reused: false,
                began: now,
            };
            let mut journey = world.journey();
            assert_eq!(journey.next_step(&world.routes, &POLICY, &failure, now), Step::Again(expected));
            assert_eq!(journey.next_step(&world.routes, &POLICY, &failure, now), Step::GiveUp);
        }
    }

    #[test]
    fn row_07_a_slow_way_without_alternative_is_repeated_and_not_burned() {
        let world = World::new(1, &[&["a"], &["DIRECT"]]);
        let (taken, given_up) = world.travel(&repeat(&slow(), 2));
        assert_eq!((taken, given_up), (vec![(0, 0), (0, 0)], true));
        assert_eq!(world.current(), (0, 0));
    }

    #[test]
    fn row_06_a_silent_proxy_makes_room_for_others_at_once_and_for_direct_only_when_it_stays_silent() {
        let world = World::new(1, &[&["a"], &["b"], &["DIRECT"]]);
        let mut journey = world.journey();
        let silent = Cause::Silent(Duration::from_secs(5));
        let began = Instant::now();
        let fail = |journey: &mut Journey, at: u64| {
            let (began, now) = (began, began + Duration::from_secs(at));
            let failure = Failure { cause: &silent, retry_after: None, reused: false, began };
            assert_ne!(journey.next_step(&world.routes, &POLICY, &failure, now), Step::GiveUp);
            world.place(journey)
        };
        assert_eq!(fail(&mut journey, 5), (0, 1), "the next proxy");
        assert_eq!(fail(&mut journey, 10), (0, 1), "no DIRECT yet, but more patience");
        assert_eq!(journey.patience, MORE_PATIENCE);
        assert_eq!(fail(&mut journey, 20), (0, 2), "nobody has answered for too long");
    }

    #[test]
    fn a_silent_proxy_that_answers_others_is_never_dead() {
        let world = World::new(1, &[&["a"], &["DIRECT"]]);
        let began = Instant::now();
        let silent = Cause::Silent(Duration::from_secs(5));
        let mut journey = world.journey();
        for at in [5, 10] {
            journey.route.way.answered();
            let began = began + Duration::from_secs(at - 5);
            let failure = Failure { cause: &silent, retry_after: None, reused: false, began };
            journey.next_step(&world.routes, &POLICY, &failure, began + Duration::from_secs(5));
            assert_eq!(world.place(&journey), (0, 0));
        }
        assert_eq!(world.current(), (0, 0));
    }

    #[test]
    fn row_09_a_connection_that_was_kept_too_long_is_nobodys_fault() {
        let world = World::new(2, &[&["a", "b"]]);
        let now = Instant::now();
        for cause in [Cause::Closed("eof".to_owned()), Cause::Silent(Duration::from_secs(5))] {
            let mut journey = world.journey();
            let before = world.place(&journey);
            let failure = Failure { cause: &cause, retry_after: None, reused: true, began: now };
            assert_eq!(journey.next_step(&world.routes, &POLICY, &failure, now), Step::Again(Duration::ZERO));
            assert!(journey.fresh);
            assert_eq!((world.place(&journey), journey.retries), (before, 0));
            assert!(world.routes.groups().0.iter().flatten().all(|state| state.verdict.is_none()));
        }
    }

    #[test]
    fn a_host_that_the_proxy_cannot_reach_is_left_before_the_proxy_is() {
        let world = World::new(2, &[&["a"], &["b"], &["DIRECT"]]);
        let gateway = Cause::Gateway { status: 503, reason: "ERR_CONNECT_FAIL".to_owned() };
        let (taken, _) = world.travel(&repeat(&gateway, 3));
        assert_eq!(taken, [(0, 0), (1, 0), (1, 1), (0, 1)], "all proxies and hosts, but never DIRECT");
        assert!(world.routes.groups().0.iter().flatten().all(|state| state.verdict != Some(Verdict::Burned)));
    }

    #[test]
    fn row_08_a_cut_body_is_fetched_by_the_same_way_once_and_then_by_the_next() {
        let world = World::new(1, &[&["a"], &["b"]]);
        let (taken, _) = world.travel(&repeat(&Cause::Cut("reset".to_owned()), 2));
        assert_eq!(taken, [(0, 0), (0, 0), (0, 1)]);
    }

    #[test]
    fn no_list_of_failures_leads_to_more_than_a_bounded_number_of_attempts() {
        let world = World::new(8, &[&["a", "b", "c"], &["d", "e", "f", "g"], &["DIRECT"]]);
        let causes = [
            refused(),
            slow(),
            Cause::Status(500),
            Cause::Gateway { status: 502, reason: String::new() },
            Cause::Closed(String::new()),
            Cause::ProxyStatus(403),
            Cause::Silent(Duration::from_secs(5)),
        ];
        for seed in 0..200_usize {
            let mut journey = world.journey();
            let mut attempts = 0;
            while step(
                &mut journey,
                &world.routes,
                &causes[(seed * 31 + attempts * 7 + attempts * attempts) % 7],
            ) != Step::GiveUp
            {
                attempts += 1;
                assert!(attempts <= MAX_ATTEMPTS as usize);
            }
        }
    }
}
