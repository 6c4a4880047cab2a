//! Whether servers and proxies can be reached, and whose fault it is if not.
//!
//! Each server is asked for the manifest through each proxy: a server that no proxy reaches while they reach others
//! is to blame itself, and so is a proxy that reaches none.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use cvmfs_client::config::{ClientSettings, NetworkSettings, Proxy, ProxyGroup, ProxyList};
use cvmfs_client::deadline::Deadline;
use cvmfs_client::network::{Cause, FetchError, Fetcher, Request};
use cvmfs_format::letter::MAX_LETTER;
use cvmfs_format::manifest::Manifest;

use super::Findings;
use crate::logging::redaction::redacted;

/// Time for all questions together.
const PATIENCE: Duration = Duration::from_secs(8);
/// Questions at a time.
const AT_ONCE: usize = 8;
/// Questions at most; with more servers and proxies each is asked through a few of the others.
const MAX_PAIRS: usize = 48;
/// A server whose revision is so many seconds older than that of another one does not follow.
const LAG: u64 = 24 * 3600;

/// What a server answered.
struct Answer {
    revision: u64,
    timestamp: u64,
    fqrn: String,
    time: Duration,
}

/// Why there is no answer.
struct Failure {
    text: String,
    advice: &'static str,
}

type Answers = HashMap<(usize, usize), Result<Answer, Failure>>;

/// Asks all; true if a server was reached at all.
pub(super) fn check(findings: &mut Findings, settings: &ClientSettings) -> bool {
    let servers = servers(settings);
    let proxies = proxies(settings);
    if proxies.is_empty() {
        findings.warn(
            "proxy",
            "no proxy is listed by name: those that are found out are not tried here",
            "mount, then see `cvmfs-client status`",
        );
    }
    let answers = ask(settings, &servers, &proxies);
    let reached = answers.values().any(Result::is_ok);
    for (number, proxy) in proxies.iter().enumerate() {
        let own: Vec<_> =
            answers.iter().filter(|((_, proxy), _)| *proxy == number).map(|(_, answer)| answer).collect();
        judge(findings, "proxy", &proxy.display(), &own, reached, |answer| {
            format!("reaches servers, {} ms", answer.time.as_millis())
        });
    }
    let newest = answers.values().flatten().map(|answer| (answer.revision, answer.timestamp)).max();
    for (number, server) in servers.iter().enumerate() {
        let own: Vec<_> =
            answers.iter().filter(|((server, _), _)| *server == number).map(|(_, answer)| answer).collect();
        let shown = redacted(server);
        judge(findings, "server", &shown, &own, reached, |answer| {
            format!("serves revision {}, {} ms", answer.revision, answer.time.as_millis())
        });
        let Some(answer) = own.iter().filter_map(|answer| answer.as_ref().ok()).next() else { continue };
        if answer.fqrn != settings.fqrn {
            findings.warn(
                "server",
                format!("{shown} serves another repository, {}", answer.fqrn),
                "correct the path in CVMFS_SERVER_URL",
            );
        } else if let Some((revision, timestamp)) = newest
            && answer.timestamp + LAG < timestamp
        {
            findings.warn(
                "server",
                format!("{shown} is behind: revision {} where another one has {revision}", answer.revision),
                "tell its operators; the client uses it all the same, and refuses to go back",
            );
        }
    }
    if !reached {
        findings.fail(
            "network",
            "no server can be reached",
            Some(
                "see the causes above; a repository that was mounted before is mounted from its cache".into(),
            ),
            4,
        );
    }
    reached
}

/// One line about a server or a proxy.
fn judge(
    findings: &mut Findings,
    subject: &'static str,
    name: &str,
    answers: &[&Result<Answer, Failure>],
    others_work: bool,
    describe: impl Fn(&Answer) -> String,
) {
    let best = answers.iter().filter_map(|answer| answer.as_ref().ok()).min_by_key(|answer| answer.time);
    match (best, answers.iter().find_map(|answer| answer.as_ref().err())) {
        (Some(answer), _) => findings.ok(subject, format!("{name} {}", describe(answer))),
        (None, Some(failure)) if others_work => {
            findings.warn(subject, format!("{name}: {}", failure.text), failure.advice);
        }
        (None, Some(failure)) => {
            findings.fail(subject, format!("{name}: {}", failure.text), Some(failure.advice.into()), 4);
        }
        (None, None) => findings.warn(
            subject,
            format!("{name} was not tried"),
            "the time was over, or there are too many",
        ),
    }
}

fn servers(settings: &ClientSettings) -> Vec<String> {
    settings.network.servers.clone()
}

fn proxies(settings: &ClientSettings) -> Vec<Proxy> {
    let mut found: Vec<Proxy> = Vec::new();
    // Groups written `auto` are not asked one by one: who they are is known once they are discovered.
    for group in settings.network.proxies.regular.iter().chain(&settings.network.proxies.fallback) {
        let ProxyGroup::Listed(proxies) = group else { continue };
        for proxy in proxies {
            if !found.contains(proxy) {
                found.push(proxy.clone());
            }
        }
    }
    found
}

/// Settings with this server and this proxy only, and one attempt.
fn only(settings: &ClientSettings, server: &str, proxy: &Proxy) -> ClientSettings {
    let network = NetworkSettings {
        servers: vec![server.to_owned()],
        proxies: ProxyList::new(vec![ProxyGroup::Listed(vec![proxy.clone()])], Vec::new()),
        use_geo_api: false,
        fail_over_indefinitely: false,
        max_retries: 0,
        ..settings.network.clone()
    };
    ClientSettings { network, ..settings.clone() }
}

/// Which server is asked through which proxy.
fn pairs(servers: usize, proxies: usize) -> Vec<(usize, usize)> {
    let all = (0..servers).flat_map(|server| (0..proxies).map(move |proxy| (server, proxy)));
    if servers * proxies <= MAX_PAIRS {
        return all.collect();
    }
    // Two of the other kind for each: one that is down does not make all look bad.
    let mut chosen: Vec<_> = all.filter(|(server, proxy)| *server < 2 || *proxy < 2).collect();
    chosen.truncate(MAX_PAIRS);
    chosen
}

fn ask(settings: &ClientSettings, servers: &[String], proxies: &[Proxy]) -> Answers {
    let end = Deadline::after(PATIENCE);
    let waiting = Mutex::new(VecDeque::from(pairs(servers.len(), proxies.len())));
    let answers = Mutex::new(Answers::new());
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let next = waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                    let Some(pair @ (server, proxy)) = next.filter(|_| !end.is_over()) else { return };
                    let (Some(server), Some(proxy)) = (servers.get(server), proxies.get(proxy)) else {
                        continue;
                    };
                    let answer = ask_one(&only(settings, server, proxy), proxy, end);
                    answers.lock().unwrap_or_else(PoisonError::into_inner).insert(pair, answer);
                }
            });
        }
    });
    answers.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn ask_one(settings: &ClientSettings, proxy: &Proxy, deadline: Deadline) -> Result<Answer, Failure> {
    let failure = |text: String, advice| Failure { text, advice };
    let fetcher = Fetcher::new(settings)
        .map_err(|error| failure(crate::filesystem::chain(&error), "correct CVMFS_HTTP_PROXY"))?;
    let started = Instant::now();
    let request = Request::new(".cvmfspublished", "manifest", MAX_LETTER as u64);
    let text = fetcher.bytes(&request, deadline).map_err(|error| explain(&error, *proxy != Proxy::Direct))?;
    let time = started.elapsed();
    let manifest = Manifest::parse(&text).map_err(|error| {
        failure(
            format!("the manifest is damaged: {error}"),
            "something on the way answers in the server's place: a login page?",
        )
    })?;
    Ok(Answer { revision: manifest.revision, timestamp: manifest.timestamp, fqrn: manifest.fqrn, time })
}

/// What a failure means and what to do about it.
fn explain(error: &FetchError, proxied: bool) -> Failure {
    let advice = match error {
        FetchError::NotFound { .. } => "there is no such repository on this server: correct CVMFS_SERVER_URL",
        FetchError::Network { cause, .. } => match cause {
            Cause::Resolve(_) | Cause::ResolveProxy(_) => {
                "correct the name, or mend the name service of this machine"
            }
            Cause::Connect(_) if proxied => "see whether the proxy runs and lets this machine connect",
            Cause::Connect(_) => {
                "see whether the server runs; a site that needs a proxy lists it in CVMFS_HTTP_PROXY"
            }
            Cause::Certificate(_) => {
                "the certificate has expired, has another name, or its authority is not known here"
            }
            Cause::ProxyStatus(407) | Cause::Status(407) => "put user name and password into the proxy's URL",
            Cause::ProxyStatus(_) | Cause::Status(403) if proxied => {
                "let the proxy's access rules allow this machine and this server"
            }
            Cause::Redirect(_) => "name the final URL, or set CVMFS_FOLLOW_REDIRECTS=yes",
            Cause::Silent(_) | Cause::TooSlow { .. } => "overloaded, or packets are lost on the way",
            _ => "see the log of the server or proxy",
        },
        FetchError::Deadline { .. } => "no answer in the time that this check has; a mount is more patient",
        _ => "see the log of the server or proxy",
    };
    let text = match error {
        FetchError::Network { cause, .. } => cause.to_string(),
        other => other.to_string(),
    };
    Failure { text, advice }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_servers_and_proxies_are_each_asked_at_least_once_as_far_as_the_bound_goes() {
        assert_eq!(pairs(2, 3).len(), 6);
        let chosen = pairs(10, 12);
        assert!(chosen.len() <= MAX_PAIRS);
        assert!((0..10).all(|server| chosen.iter().any(|pair| pair.0 == server)));
        assert!((0..12).all(|proxy| chosen.iter().any(|pair| pair.1 == proxy)));
    }
}
