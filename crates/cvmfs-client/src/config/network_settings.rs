//! What the configuration says about servers, proxies and the network (client behaviour §2.3).

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::settings::{missing, set};
use super::{Config, ConfigError, Setting};
use crate::url::{Scheme, Url};

/// Most proxies in all groups: more than any site has, and a bound for what discovery may return.
pub(crate) const MAX_PROXIES: usize = 256;
/// Most hosts.
const MAX_HOSTS: usize = 64;
/// Most letters of all tracing headers together (client behaviour §2.3).
const MAX_TRACING: usize = 1000;

/// Servers, proxies and how to use them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkSettings {
    /// Base URLs of the hosts without a slash at the end, in order of preference; at least one.
    pub servers: Vec<String>,
    /// Hosts that are kept, after they were sorted.
    pub max_servers: Option<usize>,
    /// Whether the Geo API sorts hosts and fallback proxies at mount.
    pub use_geo_api: bool,
    /// What the Geo API is told instead of the proxy's name.
    pub proxy_template: Option<String>,
    /// The proxies.
    pub proxies: ProxyList,
    /// Whether the requests spread over the proxies of a group by the objects' names.
    pub shard_proxies: bool,
    /// Where groups written `auto` are found out.
    pub discovery: DiscoverySettings,
    /// Whether a request is repeated until its deadline when every way has failed.
    pub fail_over_indefinitely: bool,
    /// Time to connect through a proxy, and window of the low-speed limit.
    pub timeout: Duration,
    /// The same without a proxy.
    pub timeout_direct: Duration,
    /// A transfer below this many bytes per second during the time-out is given up.
    pub low_speed_limit: u64,
    /// Repetitions of a failed transfer from the same URL.
    pub max_retries: u32,
    /// Longest first pause before a repetition.
    pub backoff_init: Duration,
    /// Longest pause before a repetition.
    pub backoff_max: Duration,
    /// Time after which the first proxy group is tried again; zero: never.
    pub proxy_reset_after: Duration,
    /// Time after which the first host is tried again; zero: never.
    pub host_reset_after: Duration,
    /// How names become addresses.
    pub dns: DnsSettings,
    /// Whether redirects are followed.
    pub follow_redirects: bool,
    /// Which certificates are believed.
    pub tls: TlsSettings,
    /// Whether servers are told the path that is read.
    pub send_info_header: bool,
    /// Whether servers are told who reads.
    pub tracing: bool,
    /// Further headers for every request: name without the prefix `X-CVMFS-`, and value.
    pub tracing_headers: Vec<(String, String)>,
    /// Identifies this machine towards the Geo API and in the `User-Agent`.
    pub uuid: Option<String>,
}

/// The proxies of a site.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProxyList {
    /// Groups in order of preference.
    pub regular: Vec<ProxyGroup>,
    /// Groups that follow them, sorted by the Geo API if that is used.
    pub fallback: Vec<ProxyGroup>,
}

/// Proxies of equal preference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProxyGroup {
    /// These; not empty.
    Listed(Vec<Proxy>),
    /// Those that a proxy configuration file names (`auto`).
    Auto,
}

/// One way out to the servers. Its debug form shows no credentials.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum Proxy {
    /// Without a proxy.
    Direct,
    /// Through the proxy with this URL.
    Url(String),
}

impl fmt::Debug for Proxy {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.display())
    }
}

impl Proxy {
    /// The proxy's URL without user name and password, or `DIRECT`; fit for logs.
    pub fn display(&self) -> String {
        let Self::Url(url) = self else { return "DIRECT".to_owned() };
        match url.split_once("://") {
            Some((scheme, rest)) => {
                let address = rest.rsplit_once('@').map_or(rest, |(_, address)| address);
                format!("{scheme}://{address}")
            }
            None => url.clone(),
        }
    }
}

impl ProxyGroup {
    /// The groups of a list as `CVMFS_HTTP_PROXY` has it: groups separated by `;`, their members by `|`.
    ///
    /// # Errors
    /// What is wrong with it, in words that name no credentials.
    pub fn parse_list(text: &str) -> Result<Vec<Self>, String> {
        let mut groups = Vec::new();
        let mut count = 0;
        for group in text.split(';') {
            let mut proxies = Vec::new();
            let mut auto = false;
            for proxy in group.split('|').map(str::trim).filter(|proxy| !proxy.is_empty()) {
                count += 1;
                match proxy {
                    "DIRECT" => proxies.push(Proxy::Direct),
                    "auto" => auto = true,
                    _ => {
                        let url =
                            if proxy.contains("://") { proxy.to_owned() } else { format!("http://{proxy}") };
                        let parsed = Url::parse(&url).map_err(|reason| {
                            format!("expected DIRECT or proxies of the form http://host:port ({reason})")
                        })?;
                        if parsed.scheme == Scheme::File {
                            return Err("a proxy is reached by http or https".to_owned());
                        }
                        proxies.push(Proxy::Url(url));
                    }
                }
            }
            if auto && !proxies.is_empty() {
                return Err("auto is a group of its own: separate it by ';'".to_owned());
            }
            if auto {
                groups.push(Self::Auto);
            } else if !proxies.is_empty() {
                groups.push(Self::Listed(proxies));
            }
        }
        if count > MAX_PROXIES { Err(format!("more than {MAX_PROXIES} proxies")) } else { Ok(groups) }
    }
}

impl ProxyList {
    /// Joins both lists (client behaviour §2.3): with fallback proxies, `DIRECT` counts in neither list.
    pub fn new(mut regular: Vec<ProxyGroup>, mut fallback: Vec<ProxyGroup>) -> Self {
        if !fallback.is_empty() {
            for list in [&mut regular, &mut fallback] {
                for group in list.iter_mut() {
                    if let ProxyGroup::Listed(proxies) = group {
                        proxies.retain(|proxy| *proxy != Proxy::Direct);
                    }
                }
                list.retain(|group| *group != ProxyGroup::Listed(Vec::new()));
            }
        }
        Self { regular, fallback }
    }

    /// Whether there is no way out at all.
    pub fn is_empty(&self) -> bool {
        self.regular.is_empty() && self.fallback.is_empty()
    }
}

/// Where proxies are found out. Its debug form shows no credentials.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct DiscoverySettings {
    /// The environment's `http_proxy`, which comes before all files.
    pub http_proxy: Option<String>,
    /// URLs of proxy configuration files.
    pub pac_urls: Vec<String>,
    /// Keeps what was found for the next time.
    pub saved: PathBuf,
}

impl fmt::Debug for DiscoverySettings {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown: Vec<String> =
            self.http_proxy.iter().chain(&self.pac_urls).map(|list| without_credentials(list)).collect();
        write!(formatter, "{shown:?}, kept in {}", self.saved.display())
    }
}

/// How names become addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsSettings {
    /// Asked instead of the system's name servers.
    pub server: Option<SocketAddr>,
    /// Repetitions of a query.
    pub retries: u32,
    /// Longest wait for an answer.
    pub timeout: Duration,
    /// Shortest time for which an answer is relied on.
    pub min_ttl: Duration,
    /// Longest time for which an answer is relied on.
    pub max_ttl: Duration,
    /// Whether changes of `/etc/resolv.conf` are followed.
    pub roaming: bool,
    /// Whether IPv6 is preferred.
    pub prefer_ipv6: bool,
    /// Whether IPv6 is not used at all.
    pub ipv4_only: bool,
    /// Most addresses of one proxy name that are used.
    pub max_addresses: Option<usize>,
}

/// Which certificates are believed for https.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TlsSettings {
    /// Whether the system's certificates count: `None` if the configuration says nothing.
    pub system: Option<bool>,
    /// Directory with certificates of authorities (`X509_CERT_DIR`).
    pub directory: Option<PathBuf>,
    /// File with certificates of authorities (`X509_CERT_BUNDLE`).
    pub bundle: Option<PathBuf>,
}

/// Names that count in the environment of the process as well as in the configuration: the C++ client exports its
/// configuration and reads these from there.
fn environment(config: &Config, variables: &dyn Fn(&str) -> Option<String>, name: &str) -> Option<String> {
    let value = match config.get(name) {
        Some(setting) => Some(setting.value.clone()),
        None => variables(name),
    };
    value.filter(|value| !value.is_empty())
}

impl NetworkSettings {
    /// For the servers of the repository itself. `variables` is the environment of the process.
    pub(super) fn from(
        config: &Config,
        workspace: &std::path::Path,
        variables: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, ConfigError> {
        let use_geo_api = config.switch("CVMFS_USE_GEOAPI", false)?;
        let max_servers =
            usize::try_from(config.number("CVMFS_MAX_SERVERS", 0)?).ok().filter(|most| *most > 0);
        let mut servers =
            servers(config, "CVMFS_SERVER_URL")?.ok_or_else(|| missing(config, "CVMFS_SERVER_URL", false))?;
        if !use_geo_api {
            servers.truncate(max_servers.unwrap_or(usize::MAX));
        }
        Ok(Self {
            servers,
            max_servers,
            use_geo_api,
            proxy_template: text(config, "CVMFS_PROXY_TEMPLATE"),
            proxies: proxies(config)?,
            shard_proxies: config.switch("CVMFS_PROXY_SHARD", false)?,
            discovery: DiscoverySettings {
                http_proxy: environment(config, variables, "http_proxy"),
                pac_urls: environment(config, variables, "CVMFS_PAC_URLS")
                    .map(|urls| {
                        urls.split(';')
                            .map(str::trim)
                            .filter(|url| !url.is_empty())
                            .map(str::to_owned)
                            .collect()
                    })
                    .unwrap_or_default(),
                saved: workspace.join(format!("proxies.default-{}", config.fqrn())),
            },
            fail_over_indefinitely: config.switch("CVMFS_FAILOVER_INDEFINITELY", false)?,
            timeout: at_least_a_second(config.seconds("CVMFS_TIMEOUT", 5)?),
            timeout_direct: at_least_a_second(config.seconds("CVMFS_TIMEOUT_DIRECT", 10)?),
            low_speed_limit: config.number("CVMFS_LOW_SPEED_LIMIT", 1024)?.max(0).unsigned_abs(),
            max_retries: u32::try_from(config.number("CVMFS_MAX_RETRIES", 1)?.clamp(0, 100)).unwrap_or(1),
            backoff_init: config.seconds("CVMFS_BACKOFF_INIT", 2)?,
            backoff_max: config.seconds("CVMFS_BACKOFF_MAX", 10)?,
            proxy_reset_after: config.seconds("CVMFS_PROXY_RESET_AFTER", 300)?,
            host_reset_after: config.seconds("CVMFS_HOST_RESET_AFTER", 1800)?,
            dns: dns(config, variables)?,
            follow_redirects: config.switch("CVMFS_FOLLOW_REDIRECTS", false)?,
            tls: TlsSettings {
                system: match set(config, "CVMFS_USE_SSL_SYSTEM_CA") {
                    Some(_) => Some(config.switch("CVMFS_USE_SSL_SYSTEM_CA", false)?),
                    None => None,
                },
                directory: environment(config, variables, "X509_CERT_DIR").map(PathBuf::from),
                bundle: environment(config, variables, "X509_CERT_BUNDLE").map(PathBuf::from),
            },
            send_info_header: config.switch("CVMFS_SEND_INFO_HEADER", false)?,
            tracing: config.switch("CVMFS_HTTP_TRACING", false)?,
            tracing_headers: tracing_headers(config)?,
            uuid: environment(config, variables, "CERNVM_UUID").filter(|uuid| is_word(uuid)),
        })
    }

    /// For the servers of external files: what is not configured separately is as for the repository itself
    /// (client behaviour §2.3). `None` without `CVMFS_EXTERNAL_URL`.
    pub(super) fn external(&self, config: &Config) -> Result<Option<Self>, ConfigError> {
        let Some(mut servers) = servers(config, "CVMFS_EXTERNAL_URL")? else { return Ok(None) };
        let most =
            usize::try_from(config.number("CVMFS_EXTERNAL_MAX_SERVERS", 0)?).ok().filter(|most| *most > 0);
        if !self.use_geo_api {
            servers.truncate(most.unwrap_or(usize::MAX));
        }
        let regular = match set(config, "CVMFS_EXTERNAL_HTTP_PROXY") {
            Some(setting) => proxy_groups(config, "CVMFS_EXTERNAL_HTTP_PROXY", setting)?,
            None => vec![ProxyGroup::Listed(vec![Proxy::Direct])],
        };
        let fallback = match set(config, "CVMFS_EXTERNAL_FALLBACK_PROXY") {
            Some(setting) => proxy_groups(config, "CVMFS_EXTERNAL_FALLBACK_PROXY", setting)?,
            None => Vec::new(),
        };
        let seconds =
            |name: &str, default: Duration| config.seconds(name, default.as_secs()).map(at_least_a_second);
        Ok(Some(Self {
            servers,
            max_servers: most,
            proxies: ProxyList::new(regular, fallback),
            timeout: seconds("CVMFS_EXTERNAL_TIMEOUT", self.timeout)?,
            timeout_direct: seconds("CVMFS_EXTERNAL_TIMEOUT_DIRECT", self.timeout_direct)?,
            ..self.clone()
        }))
    }
}

/// A time-out of zero would fail every request.
pub(crate) fn at_least_a_second(timeout: Duration) -> Duration {
    timeout.max(Duration::from_secs(1))
}

/// The hosts of a list as `CVMFS_SERVER_URL` has it, separated by `;`.
///
/// # Errors
/// What is wrong with it, in words.
pub(crate) fn parse_servers(list: &str) -> Result<Vec<String>, &'static str> {
    let mut servers = Vec::new();
    for server in list.split(';').map(str::trim).filter(|server| !server.is_empty()) {
        let url = Url::parse(server)?;
        if url.credentials.is_some() {
            return Err("a server's URL has no user name and no password");
        }
        if url.path.contains('?') {
            return Err("a server's URL has no query");
        }
        servers.push(server.trim_end_matches('/').to_owned());
    }
    if servers.len() > MAX_HOSTS { Err("more than 64 servers") } else { Ok(servers) }
}

fn servers(config: &Config, name: &str) -> Result<Option<Vec<String>>, ConfigError> {
    let Some(setting) = set(config, name) else { return Ok(None) };
    let servers = parse_servers(&setting.value).map_err(|reason| {
        config.invalid(
            name,
            setting,
            &format!("expected URLs with http:// or https:// separated by ';' ({reason})"),
        )
    })?;
    Ok((!servers.is_empty()).then_some(servers))
}

fn proxies(config: &Config) -> Result<ProxyList, ConfigError> {
    const NAME: &str = "CVMFS_HTTP_PROXY";
    let setting = set(config, NAME).ok_or_else(|| missing(config, NAME, true))?;
    let regular = proxy_groups(config, NAME, setting)?;
    let fallback = match set(config, "CVMFS_FALLBACK_PROXY") {
        Some(fallback) => proxy_groups(config, "CVMFS_FALLBACK_PROXY", fallback)?,
        None => Vec::new(),
    };
    let list = ProxyList::new(regular, fallback);
    if list.is_empty() {
        return Err(config.invalid(NAME, setting, "no proxy is left; write DIRECT to go without"));
    }
    Ok(list)
}

fn proxy_groups(config: &Config, name: &str, setting: &Setting) -> Result<Vec<ProxyGroup>, ConfigError> {
    ProxyGroup::parse_list(&setting.value).map_err(|rule| {
        let shown = Setting { value: without_credentials(&setting.value), origin: setting.origin.clone() };
        config.invalid(name, &shown, &rule)
    })
}

/// The list with `***` in place of user names and passwords.
pub(crate) fn without_credentials(list: &str) -> String {
    let mut shown = String::with_capacity(list.len());
    for part in list.split_inclusive([';', '|']) {
        match part.rsplit_once('@') {
            Some((before, address)) => {
                let scheme = before.split_once("://").map_or("", |(scheme, _)| scheme);
                let separator = if scheme.is_empty() { "" } else { "://" };
                shown.push_str(&format!("{scheme}{separator}***@{address}"));
            }
            None => shown.push_str(part),
        }
    }
    shown
}

fn dns(config: &Config, variables: &dyn Fn(&str) -> Option<String>) -> Result<DnsSettings, ConfigError> {
    let min_ttl = config.seconds("CVMFS_DNS_MIN_TTL", 60)?;
    let max_ttl = config.seconds("CVMFS_DNS_MAX_TTL", 86_400)?;
    let server = match set(config, "CVMFS_DNS_SERVER") {
        Some(setting) => Some(parse_name_server(&setting.value).ok_or_else(|| {
            config.invalid("CVMFS_DNS_SERVER", setting, "expected the address of a name server")
        })?),
        None => None,
    };
    let prefer_ipv6 = match set(config, "CVMFS_IPFAMILY_PREFER") {
        Some(setting) => match setting.value.as_str() {
            "4" => false,
            "6" => true,
            _ => return Err(config.invalid("CVMFS_IPFAMILY_PREFER", setting, "expected 4 or 6")),
        },
        None => false,
    };
    Ok(DnsSettings {
        server,
        retries: u32::try_from(config.number("CVMFS_DNS_RETRIES", 1)?.clamp(0, 10)).unwrap_or(1),
        timeout: at_least_a_second(config.seconds("CVMFS_DNS_TIMEOUT", 3)?),
        min_ttl,
        max_ttl: max_ttl.max(min_ttl),
        roaming: config.switch("CVMFS_DNS_ROAMING", false)?,
        prefer_ipv6,
        ipv4_only: environment(config, variables, "CVMFS_IPV4_ONLY").is_some(),
        max_addresses: usize::try_from(config.number("CVMFS_MAX_IPADDR_PER_PROXY", 0)?)
            .ok()
            .filter(|most| *most > 0),
    })
}

/// `ADDRESS` or `ADDRESS:PORT`.
fn parse_name_server(text: &str) -> Option<SocketAddr> {
    match text.trim().parse::<IpAddr>() {
        Ok(address) => Some(SocketAddr::new(address, 53)),
        Err(_) => text.trim().parse().ok(),
    }
}

fn tracing_headers(config: &Config) -> Result<Vec<(String, String)>, ConfigError> {
    const NAME: &str = "CVMFS_HTTP_TRACING_HEADERS";
    let Some(setting) = set(config, NAME) else { return Ok(Vec::new()) };
    if setting.value.len() > MAX_TRACING {
        return Err(config.invalid(NAME, setting, "more than 1000 letters"));
    }
    let mut headers = Vec::new();
    for pair in setting.value.split('|').filter(|pair| !pair.trim().is_empty()) {
        let pair = pair.split_once(':').map(|(key, value)| (key.trim(), value.trim()));
        match pair {
            Some((key, value))
                if !key.is_empty()
                    && key.bytes().all(|byte| byte.is_ascii_alphanumeric())
                    && value.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic()) =>
            {
                headers.push((key.to_owned(), value.to_owned()));
            }
            _ => {
                return Err(config.invalid(
                    NAME,
                    setting,
                    "expected KEY:VALUE separated by '|', keys of letters and digits only",
                ));
            }
        }
    }
    Ok(headers)
}

fn text(config: &Config, name: &str) -> Option<String> {
    set(config, name).map(|setting| setting.value.clone())
}

/// Fit for a header and a path.
fn is_word(text: &str) -> bool {
    text.len() <= 64 && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}
