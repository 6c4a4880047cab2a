//! The attempts of one request: where the next one goes (client behaviour §6.3).

use std::time::{Duration, Instant};

use super::failure::{Blame, Cause, FetchError, Place};
use super::routes::{Route, Routes, random_below};

/// Attempts for one request whatever hosts, proxies and retries would allow.
const MAX_ATTEMPTS: u32 = 64;

/// The time-outs and repetitions of the configuration.
#[derive(Debug)]
pub(super) struct Policy {
    pub(super) timeout: Duration,
    pub(super) timeout_direct: Duration,
    pub(super) low_speed_limit: u64,
    pub(super) max_retries: u32,
    pub(super) backoff_init: Duration,
    pub(super) backoff_max: Duration,
}

/// The attempts of one request.
pub(super) struct Journey {
    pub(super) route: Route,
    /// Ask caches on the way for a fresh copy.
    pub(super) no_cache: bool,
    attempts: u32,
    /// Hosts tried with the present round of proxies.
    hosts: usize,
    first_host: usize,
    proxies: Vec<usize>,
    retries: u32,
    /// A connection that was closed before an answer is nobody's fault once: it was kept alive too long.
    closed_forgiven: bool,
    /// Whether every answer so far was "not found".
    only_absent: bool,
    /// The last failure.
    pub(super) last: Option<Cause>,
}

/// What to do after a failed attempt.
pub(super) enum Step {
    /// Take the route of the journey, which may have changed, after this pause.
    Again(Duration),
    GiveUp,
}

impl Journey {
    pub(super) fn start(routes: &Routes, now: Instant) -> Self {
        let route = routes.current(now);
        Self {
            route,
            no_cache: false,
            attempts: 0,
            hosts: 1,
            first_host: route.host,
            proxies: vec![route.client],
            retries: 0,
            closed_forgiven: false,
            only_absent: true,
            last: None,
        }
    }

    pub(super) fn succeeded(&self, routes: &Routes, now: Instant) {
        if self.route.host != self.first_host {
            routes.host_proved_better(self.route.host, self.first_host, now);
        }
    }

    /// Decides after a failed attempt (client behaviour §6.3). Deviations from the C++ client, where its users
    /// complain: an unreachable way is not repeated while there is another one; a missing or damaged object changes
    /// the host for this request only, until the other one has proved better; a slow proxy is not burned.
    pub(super) fn next_step(
        &mut self,
        routes: &Routes,
        policy: &Policy,
        cause: &Cause,
        retry_after: Option<Duration>,
        now: Instant,
    ) -> Step {
        self.attempts += 1;
        self.only_absent &= matches!(cause, Cause::Status(404 | 410));
        if self.attempts >= MAX_ATTEMPTS {
            return Step::GiveUp;
        }
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
        if self.move_on(routes, cause, now) {
            self.no_cache = false;
            return Step::Again(Duration::ZERO);
        }
        if may_repeat {
            self.retries += 1;
            let doubled = policy.backoff_init.saturating_mul(1 << (self.retries - 1).min(16));
            let limit = u64::try_from(doubled.min(policy.backoff_max).as_millis()).unwrap_or(u64::MAX);
            let pause = Duration::from_millis(random_below(limit.max(1)));
            return Step::Again(retry_after.map_or(pause, |asked| asked.min(policy.backoff_max)));
        }
        Step::GiveUp
    }

    /// Changes the route if there is one that was not tried.
    fn move_on(&mut self, routes: &Routes, cause: &Cause, now: Instant) -> bool {
        let proxied = !routes.is_direct(self.route.client);
        match cause.blame(proxied) {
            Blame::Host => self.next_host(routes, cause, now),
            Blame::Proxy => {
                let slow = matches!(cause, Cause::TooSlow { .. });
                if slow {
                    if let Some(other) = routes.proxy_slow(self.route.client, &self.proxies, now) {
                        self.take_proxy(other);
                        return true;
                    }
                } else if self.proxies.len() < routes.proxies() {
                    let other = routes.proxy_failed(self.route.client, now);
                    self.take_proxy(other);
                    return true;
                }
                if self.hosts < routes.hosts() {
                    if !slow {
                        self.proxies.clear();
                        let first = routes.reset_proxies(now);
                        self.take_proxy(first);
                    }
                    return self.next_host(routes, cause, now);
                }
                false
            }
        }
    }

    fn next_host(&mut self, routes: &Routes, cause: &Cause, now: Instant) -> bool {
        if self.hosts >= routes.hosts() {
            return false;
        }
        // A host that lacks one object, or has a damaged one, may serve all others.
        if !matches!(cause, Cause::Status(404 | 410) | Cause::Corrupt(_)) {
            routes.host_failed(self.route.host, now);
        }
        self.hosts += 1;
        self.route.host = (self.route.host + 1) % routes.hosts();
        true
    }

    fn take_proxy(&mut self, client: usize) {
        self.proxies.push(client);
        self.route.client = client;
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

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: Policy = Policy {
        timeout: Duration::from_secs(5),
        timeout_direct: Duration::from_secs(10),
        low_speed_limit: 1024,
        max_retries: 1,
        backoff_init: Duration::from_secs(2),
        backoff_max: Duration::from_secs(10),
    };

    /// The routes of the attempts after these failures; the last failure ends the journey if that is expected.
    fn travel(routes: &Routes, causes: &[Cause]) -> (Vec<Route>, bool) {
        let now = Instant::now();
        let mut journey = Journey::start(routes, now);
        let mut taken = vec![journey.route];
        for cause in causes {
            match journey.next_step(routes, &POLICY, cause, None, now) {
                Step::Again(_) => taken.push(journey.route),
                Step::GiveUp => return (taken, true),
            }
        }
        (taken, false)
    }

    fn route(host: usize, client: usize) -> Route {
        Route { host, client }
    }

    /// Two hosts; the first proxy group is client 0, the second client 1.
    fn two_by_two() -> Routes {
        let reset = Duration::from_secs(300);
        Routes::new(2, vec![vec![0], vec![1]], None, reset, reset)
    }

    #[test]
    fn all_proxies_are_tried_with_a_host_before_the_next_host_is_tried_with_all_proxies() {
        let dead = || Cause::Connect("refused".to_owned());
        let (taken, _) = travel(&two_by_two(), &[dead(), dead(), dead()]);
        assert_eq!(taken, [route(0, 0), route(0, 1), route(1, 0), route(1, 1)]);
    }

    #[test]
    fn a_damaged_body_is_asked_for_past_caches_then_of_the_next_host_then_given_up() {
        let damaged = || Cause::Corrupt("hash".to_owned());
        let routes = two_by_two();
        let (taken, given_up) = travel(&routes, &[damaged(), damaged(), damaged(), damaged()]);
        assert_eq!(taken, [route(0, 0), route(0, 0), route(1, 0), route(1, 0)]);
        assert!(given_up);
        assert_eq!(routes.current(Instant::now()).host, 0, "one damaged object is no verdict on a host");
    }

    #[test]
    fn an_object_that_every_host_lacks_is_not_found() {
        let routes = two_by_two();
        let now = Instant::now();
        let mut journey = Journey::start(&routes, now);
        assert!(matches!(
            journey.next_step(&routes, &POLICY, &Cause::Status(404), None, now),
            Step::Again(_)
        ));
        assert!(matches!(journey.next_step(&routes, &POLICY, &Cause::Status(404), None, now), Step::GiveUp));
        let place = Box::new(Place { host: String::new(), proxy: String::new() });
        assert!(matches!(journey.failure("x", place, Cause::Status(404)), FetchError::NotFound { .. }));
    }

    #[test]
    fn the_only_way_there_is_is_tried_again_after_a_pause_that_the_server_may_ask_for() {
        let routes = Routes::new(1, vec![vec![0]], Some(0), Duration::ZERO, Duration::ZERO);
        let now = Instant::now();
        let mut journey = Journey::start(&routes, now);
        let asked = Some(Duration::from_secs(3));
        match journey.next_step(&routes, &POLICY, &Cause::Status(429), asked, now) {
            Step::Again(pause) => assert_eq!(pause, Duration::from_secs(3)),
            Step::GiveUp => panic!("given up"),
        }
        assert!(matches!(journey.next_step(&routes, &POLICY, &Cause::Status(429), asked, now), Step::GiveUp));
        let mut journey = Journey::start(&routes, now);
        let endless = Some(Duration::from_secs(100_000));
        match journey.next_step(&routes, &POLICY, &Cause::Status(503), endless, now) {
            Step::Again(pause) => assert_eq!(pause, POLICY.backoff_max, "within reason"),
            Step::GiveUp => panic!("given up"),
        }
    }

    #[test]
    fn a_slow_way_without_alternative_is_repeated_and_not_burned() {
        let routes = Routes::new(1, vec![vec![0], vec![1]], Some(1), Duration::ZERO, Duration::ZERO);
        let slow = || Cause::TooSlow { limit: 1024, window: Duration::from_secs(5) };
        let (taken, given_up) = travel(&routes, &[slow(), slow()]);
        assert_eq!((taken, given_up), (vec![route(0, 0), route(0, 0)], true));
        assert_eq!(routes.current(Instant::now()).client, 0);
    }
}
