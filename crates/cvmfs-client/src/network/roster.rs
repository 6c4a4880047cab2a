//! The proxies of the configuration as ways: each address of a name is one entry of its group (client behaviour
//! §5.2).

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use futures_util::future::join_all;

use super::names::Names;
use super::way::{Way, proxy_url};
use crate::config::{Proxy, ProxyGroup, ProxyList};
use crate::url::Url;

/// Proxies with their groups resolved into ways.
#[derive(Debug)]
pub(super) struct Roster {
    pub(super) groups: Vec<Vec<Arc<Way>>>,
    pub(super) first_fallback: usize,
    /// When a name is to be resolved again; `None` if there are no names.
    pub(super) due: Option<Instant>,
}

impl Roster {
    /// Without asking anybody: names have one entry that does not resolve yet. Groups that have to be found out are
    /// left out.
    pub(super) fn unresolved(list: &ProxyList) -> Result<Self, (String, &'static str)> {
        let parsed = parse(list)?;
        Ok(Self::assemble(&parsed, &[], |url| match url.address() {
            Some(address) => vec![Some(SocketAddr::new(address, url.port))],
            None => vec![None],
        }))
    }

    /// With all names resolved, or as far as they can be. Ways that are in `known` are used again.
    pub(super) async fn resolved(
        list: &ProxyList,
        known: &[Vec<Arc<Way>>],
        names: &Names,
    ) -> Result<Self, (String, &'static str)> {
        let parsed = parse(list)?;
        let mut wanted: Vec<&str> = parsed.urls().map(|url| url.host.as_str()).collect();
        wanted.sort_unstable();
        wanted.dedup();
        let answers = join_all(wanted.iter().map(|name| names.lookup(name))).await;
        let mut due: Option<Instant> = None;
        let mut found: HashMap<&str, Vec<std::net::IpAddr>> = HashMap::new();
        for (name, answer) in wanted.into_iter().zip(answers) {
            let until = match answer {
                Ok(answer) => {
                    found.insert(name, names.entries(&answer));
                    answer.until.max(Instant::now() + std::time::Duration::from_secs(1))
                }
                Err(reason) => {
                    tracing::warn!(proxy = name, reason, "proxy name does not resolve");
                    Instant::now() + names.retry_after()
                }
            };
            if name.parse::<std::net::IpAddr>().is_err() {
                due = Some(due.map_or(until, |due| due.min(until)));
            }
        }
        let mut roster = Self::assemble(&parsed, known, |url| match found.get(url.host.as_str()) {
            Some(addresses) => {
                addresses.iter().map(|address| Some(SocketAddr::new(*address, url.port))).collect()
            }
            None => vec![None],
        });
        roster.due = due;
        Ok(roster)
    }

    fn assemble(
        parsed: &Parsed,
        known: &[Vec<Arc<Way>>],
        addresses: impl Fn(&Url) -> Vec<Option<SocketAddr>>,
    ) -> Self {
        // One way for one proxy, in however many groups it is listed: what is known of it counts everywhere.
        let mut ways: Vec<Arc<Way>> = known.iter().flatten().cloned().collect();
        let mut make =
            |fits: &dyn Fn(&Way) -> bool, new: &dyn Fn() -> Way| match ways.iter().find(|way| fits(way)) {
                Some(way) => Arc::clone(way),
                None => {
                    let way = Arc::new(new());
                    ways.push(Arc::clone(&way));
                    way
                }
            };
        let mut build = |groups: &[Vec<Option<Url>>]| -> Vec<Vec<Arc<Way>>> {
            groups
                .iter()
                .map(|group| {
                    let mut members: Vec<Arc<Way>> = Vec::new();
                    for member in group {
                        match member {
                            None => members.push(make(&Way::is_direct, &Way::direct)),
                            Some(url) => members.extend(addresses(url).into_iter().map(|address| {
                                make(&|way| way.is_at(url, address), &|| Way::proxy(url, address))
                            })),
                        }
                    }
                    members
                })
                .filter(|members| !members.is_empty())
                .collect()
        };
        let mut groups = build(&parsed.regular);
        let first_fallback = groups.len();
        groups.extend(build(&parsed.fallback));
        Self { groups, first_fallback, due: None }
    }
}

/// Groups of proxy URLs; `None` is `DIRECT`.
struct Parsed {
    regular: Vec<Vec<Option<Url>>>,
    fallback: Vec<Vec<Option<Url>>>,
}

impl Parsed {
    fn urls(&self) -> impl Iterator<Item = &Url> {
        self.regular.iter().chain(&self.fallback).flatten().flatten()
    }
}

fn parse(list: &ProxyList) -> Result<Parsed, (String, &'static str)> {
    let groups = |groups: &[ProxyGroup]| -> Result<Vec<Vec<Option<Url>>>, (String, &'static str)> {
        groups
            .iter()
            .map(|group| match group {
                ProxyGroup::Auto => Ok(Vec::new()),
                ProxyGroup::Listed(proxies) => proxies
                    .iter()
                    .map(|proxy: &Proxy| proxy_url(proxy).map_err(|reason| (proxy.display(), reason)))
                    .collect(),
            })
            .collect()
    };
    Ok(Parsed { regular: groups(&list.regular)?, fallback: groups(&list.fallback)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(regular: &str, fallback: &str) -> ProxyList {
        let parse = |text: &str| ProxyGroup::parse_list(text).unwrap();
        ProxyList::new(parse(regular), parse(fallback))
    }

    #[test]
    fn addresses_become_ways_at_once_and_a_proxy_in_two_groups_is_one_way() {
        let roster =
            Roster::unresolved(&list("http://10.0.0.1:3128|http://10.0.0.2;http://10.0.0.1:3128;squid", ""))
                .unwrap();
        let shown: Vec<Vec<String>> =
            roster.groups.iter().map(|group| group.iter().map(|way| way.describe()).collect()).collect();
        assert_eq!(shown[0], ["http://10.0.0.1:3128", "http://10.0.0.2:80"]);
        assert_eq!(roster.groups[0][0].id, roster.groups[1][0].id);
        assert_eq!(shown[2], ["http://squid (does not resolve)"]);
        assert_eq!(roster.first_fallback, 3);
    }

    #[test]
    fn ways_that_are_known_are_used_again() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let settings = crate::config::DnsSettings {
            server: None,
            retries: 0,
            timeout: std::time::Duration::from_secs(1),
            min_ttl: std::time::Duration::from_secs(60),
            max_ttl: std::time::Duration::from_secs(60),
            roaming: false,
            prefer_ipv6: false,
            ipv4_only: true,
            max_addresses: None,
        };
        let names = Names::new(settings, runtime.handle().clone());
        let first = Roster::unresolved(&list("http://10.0.0.1", "http://10.0.0.2")).unwrap();
        let second = runtime
            .block_on(Roster::resolved(&list("http://10.0.0.3|http://10.0.0.1", ""), &first.groups, &names))
            .unwrap();
        assert_eq!(second.groups[0][1].id, first.groups[0][0].id);
        assert_eq!(second.due, None, "addresses need no second look-up");
    }
}
