//! What an administrator asks and changes while the repository is mounted (client behaviour §12).

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::request::Request;
use super::routes::{Route, Verdict};
use super::transfer::Attempt;
use super::way::Host;
use super::{Fetcher, Memory, geo, preparation};
use crate::config::{ProxyGroup, ProxyList, at_least_a_second, parse_servers, without_credentials};
use crate::deadline::Deadline;

/// Longest list that is taken.
const MAX_LIST: usize = 64 * 1024;
/// Largest manifest that is fetched to measure a host.
const MAX_PROBE: u64 = 64 * 1024;

/// One server of the repository.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HostInfo {
    /// Its base URL.
    pub url: String,
    /// Whether requests go there.
    pub is_current: bool,
    /// How long it took to answer, if it was probed and answered.
    pub round_trip: Option<Duration>,
}

/// The proxies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ProxyInfo {
    /// Groups in order of preference.
    pub groups: Vec<Vec<ProxyEntry>>,
    /// Index of the group in use.
    pub current_group: usize,
    /// Index of the first group of fallback proxies; the number of groups if there is none.
    pub first_fallback_group: usize,
}

/// One address of a proxy, or `DIRECT`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ProxyEntry {
    /// The URL with the address and without credentials, or `DIRECT`.
    pub url: String,
    /// The name that it was resolved from.
    pub name: Option<String>,
    /// What is known about it.
    pub state: ProxyState,
    /// Whether requests go through it.
    pub is_current: bool,
}

/// What is known about a proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ProxyState {
    /// Nothing bad.
    Alive,
    /// It answers too slowly, and is used when there is none better.
    Slow,
    /// It failed, and is not used until the reset time.
    Burned,
    /// Its name does not resolve at present.
    Unresolved,
}

impl ProxyState {
    /// `alive`, `slow`, `burned` or `unresolved`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Alive => "alive",
            Self::Slow => "slow",
            Self::Burned => "burned",
            Self::Unresolved => "unresolved",
        }
    }
}

/// A list of servers or proxies that cannot be taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{list}' is not usable: {reason}")]
pub struct InvalidList {
    /// The list without credentials.
    list: String,
    /// What is wrong with it.
    reason: String,
}

impl Fetcher {
    /// The hosts in order, with what is known of them.
    pub fn host_info(&self) -> Vec<HostInfo> {
        let (hosts, current) = self.0.routes.hosts();
        let describe = |(index, host): (usize, &Arc<Host>)| HostInfo {
            url: host.base.clone(),
            is_current: index == current,
            round_trip: host.round_trip(),
        };
        hosts.iter().enumerate().map(describe).collect()
    }

    /// Goes on to the next host.
    pub fn switch_host(&self) {
        self.reject_host("asked to switch");
    }

    /// Replaces the hosts by a list separated by `;`, with the first one current.
    ///
    /// # Errors
    /// The list is empty or has something in it that is no URL.
    pub fn set_hosts(&self, list: &str) -> Result<(), InvalidList> {
        let invalid = |reason: &str| InvalidList { list: shown(list), reason: reason.to_owned() };
        let servers = parse_servers(bounded(list)?).map_err(invalid)?;
        let hosts: Result<Vec<_>, _> = servers.iter().map(|base| Host::new(base).map(Arc::new)).collect();
        let hosts = hosts.map_err(invalid)?;
        if hosts.is_empty() {
            return Err(invalid("no server is left"));
        }
        tracing::info!(hosts = shown(list), "hosts are replaced");
        self.0.routes.set_hosts(hosts);
        Ok(())
    }

    /// Orders the hosts by how fast they answer; those that do not answer come last.
    pub fn probe_hosts(&self, deadline: Deadline) {
        let (mut hosts, _) = self.0.routes.hosts();
        let measuring = futures_util::future::join_all(hosts.iter().map(|host| async {
            let time = self.measure(Arc::clone(host)).await;
            host.set_round_trip(time);
        }));
        // Those that were measured until the deadline are.
        let _ = self.wait(measuring, deadline.into());
        hosts.sort_by_key(|host| host.round_trip().unwrap_or(Duration::MAX));
        if hosts.iter().any(|host| host.round_trip().is_some()) {
            let order: Vec<&str> = hosts.iter().map(|host| host.base.as_str()).collect();
            tracing::info!(?order, "hosts are ordered by their round-trip time");
            self.0.routes.set_hosts(hosts);
        }
    }

    /// Orders the hosts and fallback proxies by the Geo API. Returns whether a server gave a valid answer.
    pub fn probe_geo(&self, deadline: Deadline) -> bool {
        let shared = &self.0;
        let sorting = async {
            match preparation::ready(shared).await {
                Ok(()) => geo::sort(shared).await,
                Err(_) => false,
            }
        };
        self.wait(sorting, deadline.into()).unwrap_or(false)
    }

    /// The proxies by group, with what is known of them.
    pub fn proxy_info(&self) -> ProxyInfo {
        let (groups, current_group, first_fallback_group) = self.0.routes.groups();
        let describe = |state: &super::routes::WayState| ProxyEntry {
            url: state.way.shown.clone(),
            name: state
                .way
                .as_proxy()
                .filter(|proxy| proxy.url.address().is_none())
                .map(|proxy| proxy.url.host.clone()),
            state: match state.verdict {
                _ if state.way.is_unresolved() => ProxyState::Unresolved,
                Some(Verdict::Burned) => ProxyState::Burned,
                Some(Verdict::Slow) => ProxyState::Slow,
                None => ProxyState::Alive,
            },
            is_current: state.is_current,
        };
        let groups = groups.iter().map(|group| group.iter().map(describe).collect()).collect();
        ProxyInfo { groups, current_group, first_fallback_group }
    }

    /// Replaces the groups of proxies by a list as `CVMFS_HTTP_PROXY` has it.
    ///
    /// # Errors
    /// The list is not usable, or nothing would be left.
    pub fn set_proxies(&self, list: &str) -> Result<(), InvalidList> {
        let old = self.0.preparation.list();
        self.replace_proxies(list, |regular| ProxyList::new(regular, old.fallback))
    }

    /// Replaces the fallback proxies.
    ///
    /// # Errors
    /// As [`Fetcher::set_proxies`].
    pub fn set_fallback_proxies(&self, list: &str) -> Result<(), InvalidList> {
        // The configuration's own list, since a fallback list took `DIRECT` out of it.
        let old = self.0.preparation.list();
        self.replace_proxies(list, |fallback| ProxyList::new(old.regular, fallback))
    }

    fn replace_proxies(
        &self,
        list: &str,
        join: impl FnOnce(Vec<ProxyGroup>) -> ProxyList,
    ) -> Result<(), InvalidList> {
        let invalid = |reason: String| InvalidList { list: shown(list), reason };
        let groups = ProxyGroup::parse_list(bounded(list)?).map_err(invalid)?;
        let joined = join(groups);
        if joined.is_empty() {
            return Err(invalid("no proxy is left; write DIRECT to go without".to_owned()));
        }
        tracing::info!(proxies = shown(list), "proxies are replaced");
        self.0.preparation.set_list(joined);
        let renewed = self.wait(preparation::renew(&self.0), Deadline::after(super::PREPARATION).into());
        match renewed {
            Ok(Err(reason)) => Err(invalid(reason)),
            Ok(Ok(())) => {
                self.0.preparation.found();
                Ok(())
            }
            Err(_) => Err(invalid("the names were not resolved in time".to_owned())),
        }
    }

    /// Forgets what is known against proxies and picks one of the current group anew.
    pub fn rebalance_proxies(&self) {
        self.0.routes.rebalance();
    }

    /// Goes on to the next group of proxies.
    pub fn switch_proxy_group(&self) {
        self.0.routes.switch_group(Instant::now());
    }

    /// The time-outs through a proxy and without.
    pub fn timeouts(&self) -> (Duration, Duration) {
        let policy = self.0.policy();
        (policy.timeout, policy.timeout_direct)
    }

    /// Changes the time-outs through a proxy and without; at least a second each.
    pub fn set_timeouts(&self, proxied: Duration, direct: Duration) {
        let mut policy = self.0.policy.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        policy.timeout = at_least_a_second(proxied);
        policy.timeout_direct = at_least_a_second(direct);
    }

    /// The name server that is asked; `None` if the system has none.
    pub fn nameserver(&self) -> Option<IpAddr> {
        self.0.names.name_server()
    }

    /// Asks another name server from now on.
    pub fn set_nameserver(&self, server: IpAddr) {
        tracing::info!(%server, "name server is replaced");
        self.0.names.set_name_server(server);
    }

    /// An address of `name`, from the name servers of the configuration.
    ///
    /// # Errors
    /// Why there is none, in words.
    pub fn address_of(&self, name: &str, deadline: Deadline) -> Result<IpAddr, String> {
        match self.wait(self.0.names.addresses(name), deadline.into()) {
            Ok(Ok(addresses)) => addresses.first().copied().ok_or_else(|| format!("{name} has no address")),
            Ok(Err(reason)) => Err(reason),
            Err(_) => Err(format!("{name} was not resolved in time")),
        }
    }

    /// The time that the second of two requests for the manifest takes: the first one opens the connection.
    async fn measure(&self, host: Arc<Host>) -> Option<Duration> {
        preparation::ready(&self.0).await.ok()?;
        let way = self.0.routes.current(0, Instant::now())?.way;
        let request = Request::new(".cvmfspublished", "probe", MAX_PROBE);
        let policy = self.0.policy();
        let timeout = if way.is_direct() { policy.timeout_direct } else { policy.timeout };
        let route = Route { host, way };
        let mut took = None;
        for _ in 0..2 {
            let attempt = Attempt {
                transport: &self.0.transport,
                route: &route,
                request: &request,
                no_cache: false,
                fresh: false,
                timeout,
                patience: timeout,
                low_speed_limit: policy.low_speed_limit,
            };
            let begun = Instant::now();
            attempt.run(&mut Memory::default(), &mut 0).await.ok()?;
            took = Some(begun.elapsed());
        }
        took
    }
}

fn bounded(list: &str) -> Result<&str, InvalidList> {
    if list.len() > MAX_LIST {
        return Err(InvalidList {
            list: "(list)".to_owned(),
            reason: "it is longer than any sensible list".to_owned(),
        });
    }
    Ok(list)
}

/// For messages: without credentials and not too long.
fn shown(list: &str) -> String {
    without_credentials(list).chars().take(500).collect()
}
