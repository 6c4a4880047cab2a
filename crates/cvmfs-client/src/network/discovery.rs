//! Proxies that nobody has listed: `http_proxy`, proxy configuration files, and what was found the last time (client
//! behaviour §5.2).

use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::runtime::Handle;

use super::names::Names;
use super::pac::{self, Surroundings};
use super::request::Request;
use super::routes::Route;
use super::transfer::Attempt;
use super::way::{Host, Way};
use super::{Memory, Shared};
use crate::config::{ProxyGroup, without_credentials};

/// What `auto` in `CVMFS_PAC_URLS` stands for.
const WPAD: &str = "http://wpad/wpad.dat";
/// Most files that are asked for.
const MAX_FILES: usize = 8;
/// Longest time for one file, its name look-ups included.
const PATIENCE: Duration = Duration::from_secs(8);
/// Longest wait for one name that a file asks for.
const LOOKUP: Duration = Duration::from_secs(2);
/// Largest saved list.
const MAX_SAVED: u64 = 64 * 1024;

/// The groups that `auto` stands for.
pub(super) async fn find(shared: &Arc<Shared>) -> Result<Vec<ProxyGroup>, String> {
    let settings = &shared.settings.discovery;
    if let Some(list) = &settings.http_proxy {
        let groups = ProxyGroup::parse_list(list)
            .map_err(|reason| format!("http_proxy of the environment: {reason}"))?;
        if !groups.is_empty() && !groups.contains(&ProxyGroup::Auto) {
            tracing::info!(proxies = without_credentials(list), "proxies are those of http_proxy");
            return Ok(groups);
        }
    }
    let mut problems = Vec::new();
    for url in settings.pac_urls.iter().take(MAX_FILES) {
        let url = if url == "auto" { WPAD } else { url };
        let asked = tokio::time::timeout(PATIENCE, ask(shared, url)).await;
        match asked.unwrap_or_else(|_| Err(format!("no answer within {} s", PATIENCE.as_secs()))) {
            Ok((list, groups)) => {
                tracing::info!(url, proxies = list, "proxies were found by proxy configuration");
                save(&settings.saved, &list);
                return Ok(groups);
            }
            Err(reason) => {
                tracing::warn!(url, reason, "proxy configuration gives no answer");
                problems.push(format!("{url}: {reason}"));
            }
        }
    }
    if let Some((list, groups)) = saved(&settings.saved) {
        tracing::warn!(proxies = list, "proxies are those that were found the last time");
        return Ok(groups);
    }
    if settings.pac_urls.is_empty() {
        return Err("'auto' needs CVMFS_PAC_URLS or http_proxy, and neither is set".to_owned());
    }
    Err(format!("no proxy was found: {}", problems.join("; ")))
}

/// The answer of the file at `url` for the first host; what it answers for the others is compared.
async fn ask(shared: &Arc<Shared>, url: &str) -> Result<(String, Vec<ProxyGroup>), String> {
    let script = fetch(shared, url).await?;
    let names = Arc::clone(&shared.names);
    let handle = shared.handle().clone();
    let (hosts, _) = shared.routes.hosts();
    let running = handle.clone().spawn_blocking(move || {
        let surroundings = Network { names, handle };
        let mut first: Option<String> = None;
        for host in hosts {
            let url = format!("{}/.cvmfspublished", host.base);
            let found = pac::find_proxy(&script, &url, &host.url.host, &surroundings);
            match (&first, found) {
                (None, found) => first = Some(found.map_err(|error| error.to_string())?),
                (Some(first), Ok(found)) if *first != found => {
                    tracing::warn!(host = host.base, found, used = first, "proxies differ between hosts");
                }
                _ => {}
            }
        }
        first.ok_or_else(|| "there is no host to ask for".to_owned())
    });
    let answer = running.await.map_err(|_| "the file could not be evaluated".to_owned())??;
    let groups = pac::groups(&answer);
    if groups.is_empty() {
        let shown: String = answer.chars().filter(|letter| !letter.is_control()).take(100).collect();
        return Err(format!("it names no proxy: '{shown}'"));
    }
    Ok((write_list(&groups), groups))
}

/// The text of a proxy configuration file. It is fetched without a proxy, since there is none yet.
async fn fetch(shared: &Arc<Shared>, url: &str) -> Result<String, String> {
    // The file is the "host" as a whole; nothing is appended to its URL.
    let host = Arc::new(Host::new(url).map_err(str::to_owned)?);
    let route = Route { host, way: Arc::new(Way::direct()) };
    let request = Request::new("", "proxy configuration", pac::MAX_SCRIPT as u64);
    let policy = shared.policy();
    let attempt = Attempt {
        transport: &shared.transport,
        route: &route,
        request: &request,
        no_cache: false,
        fresh: false,
        timeout: policy.timeout_direct,
        patience: policy.timeout_direct,
        low_speed_limit: policy.low_speed_limit,
    };
    let mut script = Memory::default();
    match attempt.run(&mut script, &mut 0).await {
        Ok(()) => String::from_utf8(script.0).map_err(|_| "the file is no text".to_owned()),
        Err(super::AttemptError::Failed { cause, .. }) => Err(cause.to_string()),
        Err(_) => Err("the file could not be kept".to_owned()),
    }
}

/// The network as a proxy configuration file sees it.
struct Network {
    names: Arc<Names>,
    handle: Handle,
}

impl Surroundings for Network {
    fn resolve(&self, name: &str) -> Vec<IpAddr> {
        let lookup = async { tokio::time::timeout(LOOKUP, self.names.lookup(name)).await };
        match self.handle.block_on(lookup) {
            Ok(Ok(answer)) => answer.addresses.to_vec(),
            _ => Vec::new(),
        }
    }

    fn own_address(&self) -> IpAddr {
        // No packet is sent: the kernel chooses the address that a packet to the outside would have.
        let chosen = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).and_then(|socket| {
            socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9))?;
            socket.local_addr()
        });
        chosen.map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |address| address.ip())
    }

    fn unix_time(&self) -> i64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
    }
}

fn write_list(groups: &[ProxyGroup]) -> String {
    let group = |group: &ProxyGroup| match group {
        ProxyGroup::Auto => "auto".to_owned(),
        ProxyGroup::Listed(proxies) => {
            proxies.iter().map(crate::config::Proxy::display).collect::<Vec<_>>().join("|")
        }
    };
    groups.iter().map(group).collect::<Vec<_>>().join(";")
}

/// Keeps what was found; a failure costs no more than that it cannot be used the next time.
fn save(path: &Path, list: &str) {
    let Some(directory) = path.parent() else { return };
    let written = tempfile::NamedTempFile::new_in(directory).and_then(|mut file| {
        use std::io::Write;
        file.write_all(list.as_bytes())?;
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    });
    if let Err(error) = written {
        tracing::debug!(path = %path.display(), %error, "found proxies are not saved");
    }
}

fn saved(path: &Path) -> Option<(String, Vec<ProxyGroup>)> {
    let mut list = String::new();
    std::fs::File::open(path).ok()?.take(MAX_SAVED).read_to_string(&mut list).ok()?;
    let groups = ProxyGroup::parse_list(list.trim()).ok()?;
    (!groups.is_empty() && !groups.contains(&ProxyGroup::Auto)).then(|| (list.trim().to_owned(), groups))
}
