//! What happens before the first request, and again when names change: proxies are discovered, their names resolved,
//! hosts sorted (client behaviour §5.2, §5.3).
//!
//! Where nothing is to be found out nobody waits. Later renewals happen beside the requests, which go on with what was
//! known before.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::roster::Roster;
use super::way::Moment;
use super::{PREPARATION, Shared, discovery, geo};
use crate::config::{NetworkSettings, Proxy, ProxyGroup, ProxyList};

/// How long a discovery that found nothing is not repeated.
const DISCOVERY_RETRY: Duration = Duration::from_secs(15);

#[derive(Debug)]
pub(super) struct Preparation {
    phase: AtomicU8,
    /// When names are to be resolved again.
    due: Moment,
    running: AtomicBool,
    outcome: watch::Sender<Option<Result<(), String>>>,
    lists: Mutex<Lists>,
    has_proxies: AtomicBool,
    sorted: AtomicBool,
}

#[derive(Debug)]
struct Lists {
    configured: ProxyList,
    /// What `auto` stands for, once it was found out.
    discovered: Option<Vec<ProxyGroup>>,
}

const PENDING: u8 = 0;
const READY: u8 = 1;

impl Preparation {
    pub(super) fn new(settings: &NetworkSettings, roster: &Roster) -> Self {
        let plain = !settings.use_geo_api
            && !has_auto(&settings.proxies)
            && !roster.groups.iter().flatten().any(|way| way.is_unresolved());
        let preparation = Self {
            phase: AtomicU8::new(if plain { READY } else { PENDING }),
            due: Moment::default(),
            running: AtomicBool::new(false),
            outcome: watch::Sender::new(None),
            lists: Mutex::new(Lists { configured: settings.proxies.clone(), discovered: None }),
            has_proxies: AtomicBool::new(false),
            sorted: AtomicBool::new(!settings.use_geo_api),
        };
        preparation.note_proxies(&settings.proxies);
        preparation
    }

    /// Whether any proxy is configured, so that going without one is worth counting.
    pub(super) fn has_proxies(&self) -> bool {
        self.has_proxies.load(Ordering::Relaxed)
    }

    /// The lists as configured, with later changes by an administrator.
    pub(super) fn list(&self) -> ProxyList {
        self.lock().configured.clone()
    }

    /// Replaces the configured lists; [`renew`] makes them count.
    pub(super) fn set_list(&self, list: ProxyList) {
        let mut lists = self.lock();
        lists.configured = list;
        lists.discovered = None;
    }

    /// Requests can be sent: an administrator named proxies where discovery had found none.
    pub(super) fn found(&self) {
        self.phase.store(READY, Ordering::Release);
    }

    fn note_proxies(&self, list: &ProxyList) {
        let any = list.regular.iter().chain(&list.fallback).any(|group| match group {
            ProxyGroup::Auto => false,
            ProxyGroup::Listed(proxies) => proxies.iter().any(|proxy| *proxy != Proxy::Direct),
        });
        self.has_proxies.store(any, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Lists> {
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits until requests can be sent, and begins what is due.
pub(super) async fn ready(shared: &Arc<Shared>) -> Result<(), String> {
    let preparation = &shared.preparation;
    let is_due = || preparation.due.get().is_some_and(|due| Instant::now() >= due);
    if preparation.phase.load(Ordering::Acquire) == READY {
        if is_due() {
            begin(shared);
        }
        return Ok(());
    }
    let mut outcome = preparation.outcome.subscribe();
    // A failure is told to everybody until it is time for the next try.
    if let Some(Err(reason)) = &*outcome.borrow_and_update()
        && !is_due()
    {
        return Err(reason.clone());
    }
    begin(shared);
    match outcome.changed().await {
        Ok(()) => outcome.borrow().clone().unwrap_or(Ok(())),
        Err(_) => Ok(()),
    }
}

/// Begins the preparations unless they are under way.
fn begin(shared: &Arc<Shared>) {
    if shared.preparation.running.swap(true, Ordering::AcqRel) {
        return;
    }
    let own = Arc::clone(shared);
    shared.handle().spawn(async move {
        let outcome = match tokio::time::timeout(PREPARATION, renew(&own)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(format!("proxies were not found out within {} s", PREPARATION.as_secs())),
        };
        let preparation = &own.preparation;
        match &outcome {
            Ok(()) => preparation.phase.store(READY, Ordering::Release),
            Err(reason) => {
                tracing::warn!(reason, "network is not prepared");
                preparation.due.set(Instant::now() + DISCOVERY_RETRY);
            }
        }
        preparation.running.store(false, Ordering::Release);
        preparation.outcome.send_replace(Some(outcome));
    });
}

/// Finds out what is to be found out about the present lists, and makes it count.
pub(super) async fn renew(shared: &Arc<Shared>) -> Result<(), String> {
    let preparation = &shared.preparation;
    let (configured, discovered) = {
        let lists = preparation.lock();
        (lists.configured.clone(), lists.discovered.clone())
    };
    let list = if has_auto(&configured) {
        let found = match discovered {
            Some(found) => found,
            None => {
                let found = discovery::find(shared).await?;
                preparation.lock().discovered = Some(found.clone());
                found
            }
        };
        replace_auto(&configured, &found)
    } else {
        configured
    };
    let known: Vec<_> = shared
        .routes
        .groups()
        .0
        .into_iter()
        .map(|group| group.into_iter().map(|state| state.way).collect())
        .collect();
    let roster = Roster::resolved(&list, &known, &shared.names)
        .await
        .map_err(|(proxy, reason)| format!("proxy {proxy} is not usable: {reason}"))?;
    if roster.groups.is_empty() {
        return Err("no proxy is left, and DIRECT is not listed".to_owned());
    }
    match roster.due {
        Some(due) => preparation.due.set(due),
        None => preparation.due.clear(),
    }
    preparation.note_proxies(&list);
    shared.routes.set_groups(roster.groups, roster.first_fallback);
    if !preparation.sorted.swap(true, Ordering::AcqRel) {
        geo::sort_once(shared).await;
    }
    Ok(())
}

fn has_auto(list: &ProxyList) -> bool {
    list.regular.iter().chain(&list.fallback).any(|group| *group == ProxyGroup::Auto)
}

/// The list with what `auto` stands for.
fn replace_auto(list: &ProxyList, found: &[ProxyGroup]) -> ProxyList {
    let replace = |groups: &[ProxyGroup]| -> Vec<ProxyGroup> {
        groups
            .iter()
            .flat_map(|group| match group {
                ProxyGroup::Auto => found.to_vec(),
                listed => vec![listed.clone()],
            })
            .collect()
    };
    ProxyList::new(replace(&list.regular), replace(&list.fallback))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_stands_for_what_was_found_and_direct_still_counts_only_without_a_fallback() {
        let parse = |text: &str| ProxyGroup::parse_list(text).unwrap();
        let found = parse("http://a;http://b;DIRECT");
        let list = ProxyList::new(parse("auto;http://c"), Vec::new());
        assert_eq!(replace_auto(&list, &found).regular, parse("http://a;http://b;DIRECT;http://c"));
        let list = ProxyList::new(parse("auto"), parse("http://f"));
        assert_eq!(replace_auto(&list, &found).regular, parse("http://a;http://b"));
    }
}
