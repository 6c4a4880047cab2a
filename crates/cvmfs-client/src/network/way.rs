//! What requests go to and through: hosts and ways. A *way* is one address of a proxy, or `DIRECT`.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::prelude::{BASE64_STANDARD, Engine as _};
use hyper::header::HeaderValue;

use crate::config::Proxy;
use crate::url::{Scheme, Url, bracketed};

/// A server of the repository.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) id: u64,
    /// As configured, without a slash at the end.
    pub(super) base: String,
    pub(super) url: Url,
    /// The name or address in it.
    pub(super) name: Arc<str>,
    /// The `Host` header.
    pub(super) header: HeaderValue,
    /// The server asked to be left alone until then.
    rests: Moment,
    pub(super) round_trip: Mutex<Option<Duration>>,
}

/// One address of a proxy, or `DIRECT`.
#[derive(Debug)]
pub(super) struct Way {
    pub(super) id: u64,
    pub(super) kind: WayKind,
    /// The URL with the address, without credentials, or `DIRECT`.
    pub(super) shown: String,
    /// Since when no request has been answered; absent while answers come.
    silent: Moment,
}

#[derive(Debug)]
pub(super) enum WayKind {
    Direct,
    Proxy(Box<ProxyWay>),
}

pub(super) struct ProxyWay {
    /// The proxy's URL as configured.
    pub(super) url: Url,
    /// `Proxy-Authorization`.
    pub(super) authorization: Option<HeaderValue>,
    /// `None` while the name does not resolve; requests by this way fail at once.
    pub(super) address: Option<SocketAddr>,
}

impl std::fmt::Debug for ProxyWay {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} at {:?}", self.url, self.address)
    }
}

/// Identities of hosts and ways are never used twice in a process.
fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Host {
    /// # Errors
    /// What is wrong with the URL.
    pub(super) fn new(base: &str) -> Result<Self, &'static str> {
        let base = base.trim_end_matches('/');
        let url = Url::parse(base)?;
        let header =
            HeaderValue::from_str(&url.authority()).map_err(|_| "host name does not fit into a header")?;
        Ok(Self {
            id: next_id(),
            base: base.to_owned(),
            name: Arc::from(url.host.as_str()),
            url,
            header,
            rests: Moment::default(),
            round_trip: Mutex::new(None),
        })
    }

    /// The server asked for a pause.
    pub(super) fn rest(&self, pause: Duration, now: Instant) {
        self.rests.set(now + pause);
    }

    /// How long the server is to be left alone.
    pub(super) fn rest_left(&self, now: Instant) -> Option<Duration> {
        let left = self.rests.get()?.saturating_duration_since(now);
        (!left.is_zero()).then_some(left)
    }

    pub(super) fn round_trip(&self) -> Option<Duration> {
        *self.round_trip.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_round_trip(&self, time: Option<Duration>) {
        *self.round_trip.lock().unwrap_or_else(PoisonError::into_inner) = time;
    }
}

impl Way {
    pub(super) fn direct() -> Self {
        Self { id: next_id(), kind: WayKind::Direct, shown: "DIRECT".to_owned(), silent: Moment::default() }
    }

    /// Where there is no way at all: requests fail at once.
    pub(super) fn nowhere() -> Self {
        let url = Url {
            scheme: Scheme::Http,
            host: "0.0.0.0".to_owned(),
            port: 80,
            credentials: None,
            path: String::new(),
        };
        Self { shown: "(no proxy)".to_owned(), ..Self::proxy(&url, None) }
    }

    /// The way through `url` at `address`.
    pub(super) fn proxy(url: &Url, address: Option<SocketAddr>) -> Self {
        let shown = match address {
            Some(address) => {
                format!("{}://{}:{}", url.scheme_name(), bracketed(&address.ip().to_string()), url.port)
            }
            None => format!("{}://{}", url.scheme_name(), url.authority()),
        };
        let proxy = ProxyWay { url: url.clone(), authorization: authorization(url), address };
        Self { id: next_id(), kind: WayKind::Proxy(Box::new(proxy)), shown, silent: Moment::default() }
    }

    pub(super) fn is_direct(&self) -> bool {
        matches!(self.kind, WayKind::Direct)
    }

    pub(super) fn as_proxy(&self) -> Option<&ProxyWay> {
        match &self.kind {
            WayKind::Direct => None,
            WayKind::Proxy(proxy) => Some(proxy),
        }
    }

    pub(super) fn is_unresolved(&self) -> bool {
        self.as_proxy().is_some_and(|proxy| proxy.address.is_none())
    }

    /// Whether this is `address` of the proxy configured as `url`.
    pub(super) fn is_at(&self, url: &Url, address: Option<SocketAddr>) -> bool {
        self.as_proxy().is_some_and(|proxy| proxy.url == *url && proxy.address == address)
    }

    /// For messages: the address, and the name if it is known by one.
    pub(super) fn describe(&self) -> String {
        match self.as_proxy() {
            Some(proxy) if proxy.address.is_none() => format!("{} (does not resolve)", self.shown),
            Some(proxy) if proxy.url.address().is_none() => format!("{} ({})", self.shown, proxy.url.host),
            _ => self.shown.clone(),
        }
    }

    /// An answer began to arrive.
    pub(super) fn answered(&self) {
        self.silent.clear();
    }

    /// A request that was sent at `began` got no answer. Returns for how long no request at all got one.
    pub(super) fn stayed_silent(&self, began: Instant, now: Instant) -> Duration {
        now.saturating_duration_since(self.silent.get_or_set(began))
    }
}

/// User name and password of a proxy URL as a header.
fn authorization(url: &Url) -> Option<HeaderValue> {
    let mut value = basic(&percent_decode(url.credentials.as_ref()?));
    value.set_sensitive(true);
    Some(value)
}

fn basic(credentials: &[u8]) -> HeaderValue {
    let text = format!("Basic {}", BASE64_STANDARD.encode(credentials));
    HeaderValue::from_str(&text).expect("base64 fits into a header")
}

fn percent_decode(text: &str) -> Vec<u8> {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut index = 0;
    while let Some(&byte) = bytes.get(index) {
        let code = text.get(index + 1..index + 3).and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match code.filter(|_| byte == b'%') {
            Some(code) => {
                plain.push(code);
                index += 3;
            }
            None => {
                plain.push(byte);
                index += 1;
            }
        }
    }
    plain
}

/// The proxy of the configuration as a URL.
///
/// # Errors
/// What is wrong with it.
pub(super) fn proxy_url(proxy: &Proxy) -> Result<Option<Url>, &'static str> {
    match proxy {
        Proxy::Direct => Ok(None),
        Proxy::Url(url) => {
            let url = Url::parse(url)?;
            if url.scheme == Scheme::File {
                Err("a proxy is reached by http or https")
            } else {
                Ok(Some(url))
            }
        }
    }
}

/// A point in time that is read on every request, hence without a lock.
#[derive(Debug, Default)]
pub(super) struct Moment(AtomicU64);

/// What moments count from; one less, so that zero means "not set".
static ORIGIN: LazyLock<Instant> = LazyLock::new(Instant::now);

impl Moment {
    fn encode(instant: Instant) -> u64 {
        let since = instant.saturating_duration_since(*ORIGIN).as_micros();
        u64::try_from(since).unwrap_or(u64::MAX - 1).saturating_add(1)
    }

    fn decode(value: u64) -> Option<Instant> {
        (value > 0).then(|| *ORIGIN + Duration::from_micros(value - 1))
    }

    pub(super) fn get(&self) -> Option<Instant> {
        Self::decode(self.0.load(Ordering::Relaxed))
    }

    pub(super) fn set(&self, instant: Instant) {
        self.0.store(Self::encode(instant), Ordering::Relaxed);
    }

    pub(super) fn clear(&self) {
        // Almost always clear already: a read leaves the cache line shared.
        if self.0.load(Ordering::Relaxed) != 0 {
            self.0.store(0, Ordering::Relaxed);
        }
    }

    fn get_or_set(&self, instant: Instant) -> Instant {
        let new = Self::encode(instant);
        match self.0.compare_exchange(0, new, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => instant,
            Err(old) => Self::decode(old).unwrap_or(instant),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_of_a_proxy_become_a_header_and_are_never_shown() {
        let url = Url::parse("http://al%20addin:opensesame@proxy:3128").unwrap();
        let way = Way::proxy(&url, Some("10.0.0.1:3128".parse().unwrap()));
        let header = way.as_proxy().unwrap().authorization.clone().unwrap();
        assert_eq!(header.to_str().unwrap(), "Basic YWwgYWRkaW46b3BlbnNlc2FtZQ==");
        assert_eq!(way.describe(), "http://10.0.0.1:3128 (proxy)");
        assert!(!format!("{way:?}{header:?}").contains("opensesame"));
    }

    #[test]
    fn silence_lasts_from_the_first_unanswered_request_to_the_next_answer() {
        let way = Way::direct();
        let begun = Instant::now();
        let second = Duration::from_secs(1);
        assert_eq!(way.stayed_silent(begun + second, begun + 6 * second).as_secs(), 5);
        assert_eq!(way.stayed_silent(begun + 6 * second, begun + 11 * second).as_secs(), 10);
        way.answered();
        assert_eq!(way.stayed_silent(begun + 11 * second, begun + 16 * second).as_secs(), 5);
    }

    #[test]
    fn a_host_rests_until_the_time_it_asked_for() {
        let host = Host::new("http://h/x/").unwrap();
        let now = Instant::now();
        assert_eq!(host.rest_left(now), None);
        host.rest(Duration::from_secs(3), now);
        assert!(host.rest_left(now).is_some_and(|left| left > Duration::from_secs(2)));
        assert_eq!(host.rest_left(now + Duration::from_secs(4)), None);
        assert_eq!(host.base, "http://h/x");
    }
}
