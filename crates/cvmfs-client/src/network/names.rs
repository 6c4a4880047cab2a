//! Names of proxies and hosts become addresses (client behaviour §2.3, §5.2).
//!
//! An answer is relied on for its lifetime, clamped to the configured bounds; a name that does not resolve is not
//! asked for again at once, and an old answer is better than none. However many requests need a name, one query is
//! under way.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{
    ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolverConfig, ResolverOpts,
};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::system_conf::parse_resolv_conf;
use tokio::runtime::Handle;

use crate::config::DnsSettings;

/// Most addresses of one name that are used, so that a name server cannot cause a storm of connections.
pub(super) const MAX_ADDRESSES: usize = 16;
/// Most names that are remembered; a site has some dozens.
const MAX_NAMES: usize = 512;
/// How long a name that did not resolve is not asked for again.
const FAILURE_TTL: Duration = Duration::from_secs(5);
/// Largest `resolv.conf` that is read.
const MAX_RESOLV_CONF: u64 = 64 * 1024;

/// What is known about a name.
#[derive(Debug, Clone)]
pub(super) struct Answer {
    /// At least one and at most [`MAX_ADDRESSES`], the preferred family first.
    pub(super) addresses: Arc<[IpAddr]>,
    /// How long this holds.
    pub(super) until: Instant,
}

/// Resolves names, and remembers.
#[derive(Debug)]
pub(super) struct Names {
    settings: DnsSettings,
    handle: Handle,
    resolv_conf: PathBuf,
    resolver: Mutex<Option<Arc<Setup>>>,
    server: Mutex<Option<SocketAddr>>,
    known: Mutex<HashMap<String, Arc<tokio::sync::Mutex<Option<Remembered>>>>>,
    turn: AtomicUsize,
}

struct Setup {
    resolver: TokioResolver,
    first_server: Option<IpAddr>,
    /// The `resolv.conf` that it was made from.
    stamp: Option<SystemTime>,
}

impl std::fmt::Debug for Setup {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "resolver with first server {:?}", self.first_server)
    }
}

#[derive(Debug)]
struct Remembered {
    answer: Option<Answer>,
    failure: Option<(String, Instant)>,
}

impl Names {
    pub(super) fn new(settings: DnsSettings, handle: Handle) -> Self {
        Self::with_resolv_conf(settings, handle, Path::new("/etc/resolv.conf"))
    }

    fn with_resolv_conf(settings: DnsSettings, handle: Handle, resolv_conf: &Path) -> Self {
        Self {
            server: Mutex::new(settings.server),
            settings,
            handle,
            resolv_conf: resolv_conf.to_owned(),
            resolver: Mutex::new(None),
            known: Mutex::default(),
            turn: AtomicUsize::new(0),
        }
    }

    /// How long a proxy name that does not resolve is left alone.
    pub(super) fn retry_after(&self) -> Duration {
        self.settings.min_ttl
    }

    /// The addresses of `name`.
    ///
    /// # Errors
    /// Why there are none, in words.
    pub(super) async fn lookup(&self, name: &str) -> Result<Answer, String> {
        if let Ok(address) = name.parse::<IpAddr>() {
            return Ok(Answer {
                addresses: Arc::from([address]),
                until: Instant::now() + self.settings.max_ttl,
            });
        }
        let cell = {
            let mut known = lock(&self.known);
            if known.len() >= MAX_NAMES && !known.contains_key(name) {
                known.clear();
            }
            Arc::clone(known.entry(name.to_owned()).or_default())
        };
        let mut remembered = cell.lock().await;
        let now = Instant::now();
        if let Some(memory) = &*remembered {
            match (&memory.answer, &memory.failure) {
                (Some(answer), _) if answer.until > now => return Ok(answer.clone()),
                (Some(answer), Some((_, until))) if *until > now => return Ok(answer.clone()),
                (None, Some((reason, until))) if *until > now => return Err(reason.clone()),
                _ => {}
            }
        }
        let old = remembered.take().and_then(|memory| memory.answer);
        match self.query(name).await {
            Ok(answer) => {
                *remembered = Some(Remembered { answer: Some(answer.clone()), failure: None });
                Ok(answer)
            }
            Err(reason) => {
                let failure = Some((reason.clone(), Instant::now() + FAILURE_TTL));
                *remembered = Some(Remembered { answer: old.clone(), failure });
                match old {
                    Some(answer) => {
                        tracing::warn!(
                            name,
                            reason,
                            "name does not resolve any more; its last addresses are used"
                        );
                        Ok(answer)
                    }
                    None => Err(reason),
                }
            }
        }
    }

    /// The addresses for one new connection, each time beginning with another one of the preferred family.
    pub(super) async fn addresses(&self, name: &str) -> Result<Vec<IpAddr>, String> {
        let answer = self.lookup(name).await?;
        let preferred = answer.addresses.first().is_some_and(IpAddr::is_ipv6);
        let (mut first, second): (Vec<IpAddr>, Vec<IpAddr>) =
            answer.addresses.iter().partition(|address| address.is_ipv6() == preferred);
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % first.len().max(1);
        first.rotate_left(turn);
        first.extend(second);
        Ok(first)
    }

    /// The addresses of a proxy that become its entries: of one family, at most as many as configured, in a stable
    /// order so that two answers can be compared.
    pub(super) fn entries(&self, answer: &Answer) -> Vec<IpAddr> {
        let family = answer.addresses.first().is_some_and(IpAddr::is_ipv6);
        let mut addresses: Vec<IpAddr> =
            answer.addresses.iter().copied().filter(|address| address.is_ipv6() == family).collect();
        if let Some(most) = self.settings.max_addresses {
            while addresses.len() > most {
                let index = super::routes::random_below(addresses.len() as u64);
                addresses.swap_remove(usize::try_from(index).unwrap_or(0));
            }
        }
        addresses.sort();
        addresses
    }

    /// The name server that is asked.
    pub(super) fn name_server(&self) -> Option<IpAddr> {
        if let Some(server) = *lock(&self.server) {
            return Some(server.ip());
        }
        self.setup().ok().and_then(|setup| setup.first_server)
    }

    /// Asks another name server from now on.
    pub(super) fn set_name_server(&self, server: IpAddr) {
        *lock(&self.server) = Some(SocketAddr::new(server, 53));
        *lock(&self.resolver) = None;
        lock(&self.known).clear();
    }

    async fn query(&self, name: &str) -> Result<Answer, String> {
        let setup = self.setup()?;
        let bound = self.settings.timeout * (self.settings.retries + 1) + Duration::from_secs(1);
        let (owned, settings) = (name.to_owned(), self.settings.clone());
        // The name may not be completed with search domains if it is complete already.
        let lookup = async move {
            let outcome = tokio::time::timeout(bound, setup.resolver.lookup_ip(owned.as_str())).await;
            let found = match outcome {
                Ok(Ok(found)) => found,
                Ok(Err(error)) => return Err(format!("{owned}: {error}")),
                Err(_) => {
                    return Err(format!(
                        "{owned}: no answer from the name server within {} s",
                        bound.as_secs()
                    ));
                }
            };
            let ttl = found.valid_until().saturating_duration_since(Instant::now());
            answer(found.iter(), ttl, &settings)
                .ok_or_else(|| format!("{owned}: the name has no usable address"))
        };
        // Sockets of the resolver belong to the runtime, whoever polls this.
        match self.handle.spawn(lookup).await {
            Ok(outcome) => outcome,
            Err(_) => Err(format!("{name}: the look-up was given up")),
        }
    }

    fn setup(&self) -> Result<Arc<Setup>, String> {
        let stamp = match self.settings.roaming {
            true => std::fs::metadata(&self.resolv_conf).and_then(|meta| meta.modified()).ok(),
            false => None,
        };
        let server = *lock(&self.server);
        let mut resolver = lock(&self.resolver);
        match &*resolver {
            Some(setup) if setup.stamp == stamp => Ok(Arc::clone(setup)),
            old => {
                if old.is_some() {
                    tracing::info!(file = %self.resolv_conf.display(), "name servers have changed");
                }
                let setup = Arc::new(self.build(server, stamp)?);
                *resolver = Some(Arc::clone(&setup));
                Ok(setup)
            }
        }
    }

    fn build(&self, server: Option<SocketAddr>, stamp: Option<SystemTime>) -> Result<Setup, String> {
        let system = read_limited(&self.resolv_conf).and_then(|text| parse_resolv_conf(text).ok());
        let (mut config, system_options) = system.unwrap_or_default();
        if let Some(server) = server {
            let mut connections = vec![ConnectionConfig::udp(), ConnectionConfig::tcp()];
            for connection in &mut connections {
                connection.port = server.port();
            }
            let name_server = NameServerConfig::new(server.ip(), true, connections);
            config = ResolverConfig::from_parts(None, config.search().to_vec(), vec![name_server]);
        }
        let first_server = config.name_servers().first().map(|server| server.ip);
        let mut options = ResolverOpts::default();
        options.ndots = system_options.ndots;
        options.timeout = self.settings.timeout;
        options.attempts = usize::try_from(self.settings.retries).unwrap_or(1);
        options.cache_size = 0;
        options.ip_strategy = match self.settings.ipv4_only {
            true => LookupIpStrategy::Ipv4Only,
            false => LookupIpStrategy::Ipv4AndIpv6,
        };
        let mut builder =
            TokioResolver::builder_with_config(config, TokioRuntimeProvider::default()).with_options(options);
        builder.options_mut().cache_size = 0;
        let resolver = builder.build().map_err(|error| format!("cannot set up the resolver: {error}"))?;
        Ok(Setup { resolver, first_server, stamp })
    }
}

/// What an answer of the name server is worth here; `None` if it has no usable address.
fn answer(found: impl Iterator<Item = IpAddr>, ttl: Duration, settings: &DnsSettings) -> Option<Answer> {
    let mut addresses: Vec<IpAddr> = Vec::new();
    for address in found.filter(|address| !(settings.ipv4_only && address.is_ipv6())) {
        if !addresses.contains(&address) && !address.is_unspecified() && !address.is_multicast() {
            addresses.push(address);
        }
        if addresses.len() >= 4 * MAX_ADDRESSES {
            break;
        }
    }
    addresses.sort_by_key(|address| address.is_ipv6() != settings.prefer_ipv6);
    addresses.truncate(MAX_ADDRESSES);
    let until = Instant::now() + ttl.clamp(settings.min_ttl, settings.max_ttl);
    (!addresses.is_empty()).then(|| Answer { addresses: addresses.into(), until })
}

fn read_limited(path: &Path) -> Option<Vec<u8>> {
    use std::io::Read;
    let mut text = Vec::new();
    std::fs::File::open(path).ok()?.take(MAX_RESOLV_CONF).read_to_end(&mut text).ok()?;
    Some(text)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> DnsSettings {
        DnsSettings {
            server: None,
            retries: 0,
            timeout: Duration::from_secs(1),
            min_ttl: Duration::from_secs(60),
            max_ttl: Duration::from_secs(86_400),
            roaming: false,
            prefer_ipv6: false,
            ipv4_only: false,
            max_addresses: None,
        }
    }

    fn addresses(list: &[&str]) -> Vec<IpAddr> {
        list.iter().map(|address| address.parse().unwrap()).collect()
    }

    #[test]
    fn row_03_lifetimes_are_clamped_and_addresses_are_capped() {
        let many = (0..1000_u32).map(|number| IpAddr::from((0x0A00_0001 + number).to_be_bytes()));
        let begun = Instant::now();
        let found = answer(many, Duration::ZERO, &settings()).unwrap();
        assert_eq!(found.addresses.len(), MAX_ADDRESSES);
        assert!(found.until >= begun + Duration::from_secs(60));
        let one = addresses(&["10.0.0.1"]);
        let found = answer(one.into_iter(), Duration::from_secs(1 << 40), &settings()).unwrap();
        assert!(found.until <= Instant::now() + Duration::from_secs(86_400));
        assert!(
            answer(addresses(&["0.0.0.0", "224.0.0.1"]).into_iter(), Duration::ZERO, &settings()).is_none()
        );
    }

    #[test]
    fn the_preferred_family_comes_first_and_ipv6_can_be_forbidden() {
        let both = addresses(&["2001:db8::1", "10.0.0.2", "2001:db8::2", "10.0.0.1"]);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let entries = |settings: DnsSettings| {
            let found = answer(both.clone().into_iter(), Duration::ZERO, &settings).unwrap();
            Names::new(settings, runtime.handle().clone()).entries(&found)
        };
        assert_eq!(entries(settings()), addresses(&["10.0.0.1", "10.0.0.2"]));
        let v6 = entries(DnsSettings { prefer_ipv6: true, ..settings() });
        assert_eq!(v6, addresses(&["2001:db8::1", "2001:db8::2"]));
        assert_eq!(entries(DnsSettings { max_addresses: Some(1), ..settings() }).len(), 1);
        let forbidden = DnsSettings { ipv4_only: true, prefer_ipv6: true, ..settings() };
        assert_eq!(entries(forbidden), addresses(&["10.0.0.1", "10.0.0.2"]));
    }

    #[test]
    fn name_servers_that_change_are_followed_when_roaming() {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("resolv.conf");
        let mut shown = Vec::new();
        for roaming in [false, true] {
            std::fs::write(&file, "nameserver 192.0.2.1\n").unwrap();
            let settings = DnsSettings { roaming, ..settings() };
            let names = Names::with_resolv_conf(settings, runtime.handle().clone(), &file);
            shown.push(names.name_server().unwrap().to_string());
            std::fs::write(&file, "nameserver 192.0.2.2\n").unwrap();
            let later = SystemTime::now() + Duration::from_secs(10);
            std::fs::File::options().write(true).open(&file).unwrap().set_modified(later).unwrap();
            shown.push(names.name_server().unwrap().to_string());
        }
        assert_eq!(shown, ["192.0.2.1", "192.0.2.1", "192.0.2.1", "192.0.2.2"]);
    }
}
