//! The HTTP clients: TLS roots, proxies, deadlines.
//!
//! Registries are reached through the proxies of the environment (`HTTPS_PROXY`,
//! `HTTP_PROXY`, `NO_PROXY`), loopback addresses never. A proxy belongs to a client, so
//! there are two; registries with certificates of their own (`certs.d`) have two more. Redirects are followed by hand (`transport`), because the choice of
//! client and the removal of credentials depend on the target.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reqwest::redirect::Policy;
use reqwest::{Client, ClientBuilder, Url};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::error::RegistryError;
use crate::reference::is_loopback_host;

/// How long each kind of wait may take.
#[derive(Debug, Clone, Copy)]
pub struct Deadlines {
    /// Until a connection stands, TLS included.
    pub connect: Duration,
    /// Between two pieces of an answer, and until its first.
    pub idle: Duration,
    /// For one small document with all its retries and token requests. An upload has one second more per
    /// [`SLOWEST_BYTES_PER_SECOND`].
    pub document: Duration,
    /// For a download that does not get on, over all its requests and retries: time spent waiting counts, and each
    /// [`SLOWEST_BYTES_PER_SECOND`] that came pay for a second of it.
    pub stall: Duration,
}

/// Hosts that are remembered to have certificates of their own, or none.
const MAX_KNOWN_HOSTS: usize = 1000;
/// A transfer slower than this on average is given up.
pub const SLOWEST_BYTES_PER_SECOND: u64 = 16 << 10;

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            idle: Duration::from_secs(20),
            // A user in front of a dead registry gets an answer within half a minute.
            document: Duration::from_secs(28),
            stall: Duration::from_secs(28),
        }
    }
}

impl Deadlines {
    /// What the bytes of an upload are given to leave, on top of the wait for the answer.
    pub(crate) fn sending(bytes: u64) -> Duration {
        Duration::from_secs(bytes / SLOWEST_BYTES_PER_SECOND)
    }

    /// The longest silence within a download, before the rest is asked for anew: a few tries fit into a stall.
    pub(crate) fn silence(&self) -> Duration {
        self.idle.min(self.stall / 3)
    }
}

/// The clients for both kinds of targets, and for registries with certificates of their own.
#[derive(Debug)]
pub(crate) struct HttpClients {
    general: Pair,
    deadlines: Deadlines,
    user_agent: String,
    certificates: Vec<PathBuf>,
    /// By `host[:port]`; `None` for those without.
    own: Mutex<HashMap<String, Option<Pair>>>,
}

#[derive(Debug, Clone)]
struct Pair {
    direct: Client,
    proxied: Client,
}

impl HttpClients {
    pub(crate) fn new(
        deadlines: &Deadlines,
        user_agent: &str,
        certificates: Vec<PathBuf>,
    ) -> Result<Self, RegistryError> {
        Ok(Self {
            general: Pair::new(deadlines, user_agent, tls_configuration(&Certificates::default())?)?,
            deadlines: *deadlines,
            user_agent: user_agent.to_owned(),
            certificates,
            own: Mutex::default(),
        })
    }

    /// The client for a target.
    pub(crate) fn to(&self, url: &Url) -> Result<Client, RegistryError> {
        if url.scheme() == "https"
            && let Some(own) = self.own(&authority(url))?
        {
            return Ok(own.to(url));
        }
        Ok(self.general.to(url))
    }

    fn own(&self, host: &str) -> Result<Option<Pair>, RegistryError> {
        if let Some(known) = self.own.lock().unwrap_or_else(PoisonError::into_inner).get(host) {
            return Ok(known.clone());
        }
        let own = match Certificates::of(host, &self.certificates)? {
            None => None,
            Some(certificates) => {
                Some(Pair::new(&self.deadlines, &self.user_agent, tls_configuration(&certificates)?)?)
            }
        };
        let mut known = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        // Redirects may lead to any number of hosts.
        if known.len() < MAX_KNOWN_HOSTS {
            known.insert(host.to_owned(), own.clone());
        }
        Ok(own)
    }
}

impl Pair {
    fn new(
        deadlines: &Deadlines,
        user_agent: &str,
        tls: rustls::ClientConfig,
    ) -> Result<Self, RegistryError> {
        let builder = || {
            Client::builder()
                .tls_backend_preconfigured(tls.clone())
                .redirect(Policy::none())
                .retry(reqwest::retry::never())
                .connect_timeout(deadlines.connect)
                .tcp_nodelay(true)
                .user_agent(user_agent)
        };
        let built = |builder: ClientBuilder| builder.build().map_err(|e| RegistryError::Setup(causes(&e)));
        // Minimal root file systems have no hosts file.
        let localhost = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        Ok(Self {
            direct: built(builder().no_proxy().resolve("localhost", localhost))?,
            proxied: built(builder())?,
        })
    }

    fn to(&self, url: &Url) -> Client {
        let is_here = url.host_str().is_some_and(is_loopback_host);
        if is_here { self.direct.clone() } else { self.proxied.clone() }
    }
}

/// What is trusted, and shown, beside what holds for all registries.
#[derive(Debug, Default)]
struct Certificates {
    authorities: Vec<CertificateDer<'static>>,
    /// The client's certificate with its chain, and its key.
    own: Option<(PathBuf, PathBuf)>,
}

impl Certificates {
    /// Those of the first directory that knows the host. `hosts` have no slashes: they
    /// come from URLs.
    fn of(host: &str, directories: &[PathBuf]) -> Result<Option<Self>, RegistryError> {
        let Some(directory) = directories.iter().map(|directory| directory.join(host)).find(|d| d.is_dir())
        else {
            return Ok(None);
        };
        let unreadable = |file: &Path, error: &dyn std::fmt::Display| {
            RegistryError::Setup(format!("{}: {error}", file.display()))
        };
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&directory).map_err(|error| unreadable(&directory, &error))? {
            files.push(entry.map_err(|error| unreadable(&directory, &error))?.path());
        }
        files.sort();
        let mut found = Self::default();
        for file in &files {
            match file.extension().and_then(|extension| extension.to_str()) {
                Some("crt") => {
                    let pem =
                        CertificateDer::pem_file_iter(file).map_err(|error| unreadable(file, &error))?;
                    for certificate in pem {
                        found.authorities.push(certificate.map_err(|error| unreadable(file, &error))?);
                    }
                }
                Some("cert") => {
                    let key = file.with_extension("key");
                    if !key.is_file() {
                        return Err(unreadable(file, &format!("lacks its key {}", key.display())));
                    }
                    found.own = Some((file.clone(), key));
                }
                _ => {}
            }
        }
        Ok(Some(found))
    }
}

/// TLS with the provider named explicitly: a default one may be missing, or another
/// crate of the program may have installed its own. Roots are those of the system
/// (`SSL_CERT_FILE` and `SSL_CERT_DIR` are honoured) and the public ones.
fn tls_configuration(own: &Certificates) -> Result<rustls::ClientConfig, RegistryError> {
    let mut roots = rustls::RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    let native = rustls_native_certs::load_native_certs();
    for error in &native.errors {
        tracing::debug!(%error, "a system certificate file cannot be used");
    }
    let (_, ignored) = roots.add_parsable_certificates(native.certs);
    if ignored > 0 {
        tracing::debug!(ignored, "system certificates that cannot be parsed");
    }
    for authority in &own.authorities {
        roots.add(authority.clone()).map_err(|error| RegistryError::Setup(error.to_string()))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| RegistryError::Setup(error.to_string()))?;
    let builder = builder.with_root_certificates(roots);
    let Some((file, key)) = &own.own else { return Ok(builder.with_no_client_auth()) };
    let failed = |file: &Path, error: &dyn std::fmt::Display| {
        RegistryError::Setup(format!("{}: {error}", file.display()))
    };
    let chain = CertificateDer::pem_file_iter(file)
        .and_then(|pem| pem.collect::<Result<Vec<_>, _>>())
        .map_err(|error| failed(file, &error))?;
    let secret = PrivateKeyDer::from_pem_file(key).map_err(|error| failed(key, &error))?;
    builder.with_client_auth_cert(chain, secret).map_err(|error| failed(file, &error))
}

/// `host[:port]` of an URL, for messages. Never the path or query of a redirect target:
/// they hold signatures.
pub(crate) fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// Whether credentials for one URL may be sent to the other.
pub(crate) fn same_origin(one: &Url, other: &Url) -> bool {
    one.scheme() == other.scheme()
        && one.host_str() == other.host_str()
        && one.port_or_known_default() == other.port_or_known_default()
}

/// All causes of an error in one line, without the URL.
pub(crate) fn causes(error: &reqwest::Error) -> String {
    use std::error::Error as _;
    let mut text = String::new();
    let mut cause = error.source();
    while let Some(current) = cause {
        let part = current.to_string();
        // Wrappers of hyper repeat the text of what they wrap.
        if !text.ends_with(&part) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&part);
        }
        cause = current.source();
    }
    if is_unknown_issuer(error) {
        text.push_str(
            "; if the registry has a certificate authority of its own, name the file with the authority's \
             certificate in SSL_CERT_FILE, or put it into /etc/docker/certs.d/HOST/ca.crt",
        );
    }
    if text.is_empty() { "connection failed".to_owned() } else { text }
}

/// Whether a certificate was refused because nobody known signed it.
fn is_unknown_issuer(error: &(dyn std::error::Error + 'static)) -> bool {
    use rustls::{CertificateError, Error};
    if let Some(tls) = error.downcast_ref::<Error>() {
        return matches!(tls, Error::InvalidCertificate(CertificateError::UnknownIssuer));
    }
    // Errors of I/O hide what they wrap from `source`.
    let wrapped = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
    wrapped.is_some_and(|inner| is_unknown_issuer(inner)) || error.source().is_some_and(is_unknown_issuer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_stay_with_scheme_host_and_port() {
        let url = |text: &str| Url::parse(text).unwrap();
        assert!(same_origin(&url("https://a.b/x"), &url("https://a.b:443/y")));
        for other in ["http://a.b/x", "https://a.b:444/x", "https://c.a.b/x"] {
            assert!(!same_origin(&url("https://a.b/x"), &url(other)), "{other}");
        }
    }

    #[test]
    fn messages_show_host_and_port_only() {
        let url = Url::parse("https://u:p@s3.example.org:9000/b?X-Amz-Signature=1").unwrap();
        assert_eq!(authority(&url), "s3.example.org:9000");
    }
}
