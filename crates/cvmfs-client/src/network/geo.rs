//! Hosts and fallback proxies in the order of their distance, as the Geo API of a server tells (repository format
//! §17).

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::request::Request;
use super::routes::{Route, random_below};
use super::transfer::Attempt;
use super::way::{Host, Way};
use super::{Memory, Shared};

/// Servers that are asked; the first valid answer counts.
const MAX_ASKED: usize = 3;
/// Longest time for all of it at mount: an order is no reason to wait.
const PATIENCE: Duration = Duration::from_secs(5);
/// Separates hosts from proxies.
const SEPARATOR: &str = "+PXYSEP+";
/// Largest reply: 64 hosts and 256 proxies with their commas.
const MAX_REPLY: u64 = 4096;

/// Sorts at mount; the configured order stays when no server answers.
pub(super) async fn sort_once(shared: &Arc<Shared>) {
    let sorted = tokio::time::timeout(PATIENCE, sort(shared)).await.unwrap_or(false);
    if !sorted {
        tracing::warn!("no server gave a geographic order (CVMFS_USE_GEOAPI); the configured order stays");
        if let Some(most) = shared.settings.max_servers {
            let (mut hosts, _) = shared.routes.hosts();
            if hosts.len() > most {
                hosts.truncate(most);
                shared.routes.set_hosts(hosts);
            }
        }
    }
}

/// Sorts the hosts, and the groups of fallback proxies if there are several. Returns whether a server told an order.
pub(super) async fn sort(shared: &Arc<Shared>) -> bool {
    let (hosts, _) = shared.routes.hosts();
    let (states, current_group, first_fallback) = shared.routes.groups();
    let groups: Vec<Vec<Arc<Way>>> =
        states.into_iter().map(|group| group.into_iter().map(|state| state.way).collect()).collect();
    let fallbacks: Vec<&str> = match groups.get(first_fallback..) {
        // The members of a group are taken to be at one place.
        Some(fallback) if fallback.len() > 1 => {
            fallback.iter().filter_map(|group| name(group.first()?)).collect()
        }
        _ => Vec::new(),
    };
    let sorts_proxies = fallbacks.len() > 1 && fallbacks.len() == groups.len() - first_fallback;
    if hosts.len() < 2 && !sorts_proxies {
        return true;
    }
    let Some(route) = shared.routes.current(0, Instant::now()) else { return false };
    // The same question from everybody is answered by caches.
    let mut sorted: Vec<Arc<Host>> = hosts.clone();
    sorted.sort_by(|left, right| left.name.cmp(&right.name));
    let mut names: Vec<&str> = sorted.iter().map(|host| &*host.name).collect();
    if sorts_proxies {
        names.push(SEPARATOR);
        names.extend(&fallbacks);
    }
    let place = match &shared.settings.proxy_template {
        Some(template) => template.clone(),
        None if current_group < first_fallback => {
            name(&route.way).map_or_else(|| identity(shared), str::to_owned)
        }
        None => identity(shared),
    };
    let path = format!("api/v1.0/geo/{place}/{}", names.join(","));
    let mut candidates = hosts.clone();
    for _ in 0..MAX_ASKED.min(hosts.len()) {
        let chosen = usize::try_from(random_below(candidates.len() as u64)).unwrap_or(0);
        let host = candidates.swap_remove(chosen);
        let asked = host.base.clone();
        let reply = ask(shared, Route { host, way: Arc::clone(&route.way) }, &path).await;
        let Some(order) = reply.as_deref().and_then(|reply| parse_reply(reply, names.len())) else {
            tracing::debug!(host = asked, "no valid geographic order");
            continue;
        };
        let mut nearest: Vec<Arc<Host>> =
            order.iter().filter_map(|index| sorted.get(*index)).cloned().collect();
        nearest.truncate(shared.settings.max_servers.unwrap_or(usize::MAX));
        let order_shown: Vec<&str> = nearest.iter().map(|host| host.base.as_str()).collect();
        tracing::info!(order = ?order_shown, asked, "hosts are in geographic order");
        shared.routes.set_hosts(nearest);
        if sorts_proxies {
            let own = groups.iter().take(first_fallback).cloned();
            let far = order.iter().filter_map(|index| {
                groups.get(first_fallback + index.checked_sub(sorted.len() + 1)?).cloned()
            });
            shared.routes.set_groups(own.chain(far).collect(), first_fallback);
        }
        return true;
    }
    false
}

async fn ask(shared: &Arc<Shared>, route: Route, path: &str) -> Option<Vec<u8>> {
    let policy = shared.policy();
    let timeout = if route.way.is_direct() { policy.timeout_direct } else { policy.timeout };
    let request = Request::new(path, "geographic order", MAX_REPLY);
    let attempt = Attempt {
        transport: &shared.transport,
        route: &route,
        request: &request,
        no_cache: false,
        fresh: false,
        timeout,
        patience: timeout,
        low_speed_limit: 0,
    };
    let mut reply = Memory::default();
    attempt.run(&mut reply, &mut 0).await.ok().map(|()| reply.0)
}

/// The name of a proxy as configured.
fn name(way: &Arc<Way>) -> Option<&str> {
    way.as_proxy().map(|proxy| proxy.url.host.as_str())
}

/// Stands for this machine where no proxy does.
fn identity(shared: &Shared) -> String {
    match &shared.settings.uuid {
        Some(uuid) => uuid.clone(),
        None => {
            let part = || random_below(u64::MAX);
            format!("{:016x}{:016x}", part(), part())
        }
    }
}

/// The positions of a reply, counted from 0; `None` unless it is a permutation of all `count` of them.
pub(super) fn parse_reply(reply: &[u8], count: usize) -> Option<Vec<usize>> {
    let text = std::str::from_utf8(reply).ok()?.strip_suffix('\n')?;
    let mut order = Vec::with_capacity(count);
    for number in text.split(',') {
        let index = number.parse::<usize>().ok()?.checked_sub(1)?;
        if index >= count || order.contains(&index) {
            return None;
        }
        order.push(index);
    }
    (order.len() == count).then_some(order)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_permutation_is_an_answer() {
        assert_eq!(parse_reply(b"3,1,2\n", 3), Some(vec![2, 0, 1]));
        for wrong in
            ["3,1,2", "1,2\n", "1,2,2\n", "1,2,4\n", "0,1,2\n", "1,2,3,4\n", "", "\n", "a,b,c\n", "1,2,-3\n"]
        {
            assert_eq!(parse_reply(wrong.as_bytes(), 3), None, "{wrong:?}");
        }
        assert_eq!(parse_reply(b"\xff\n", 1), None);
    }
}
