//! HTTP clients: one per proxy, since reqwest ties the proxy to the client.

use std::sync::Arc;
use std::time::Duration;

use rustls::{ClientConfig, RootCertStore};

use super::FetcherError;
use crate::config::{ClientSettings, Proxy};

/// Most redirects that are followed (client behaviour §2.3).
const MAX_REDIRECTS: usize = 4;
/// Idle connections are closed before typical middle boxes forget them silently.
const POOL_IDLE: Duration = Duration::from_secs(20);

/// The client that sends its requests through `proxy`. It obeys no environment variable.
pub(super) fn build(
    settings: &ClientSettings,
    proxy: &Proxy,
    tls: ClientConfig,
    connections: usize,
) -> Result<reqwest::Client, FetcherError> {
    let timeout = match proxy {
        Proxy::Direct => settings.timeout_direct,
        Proxy::Url(_) => settings.timeout,
    };
    let mut builder = reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .user_agent(user_agent())
        .connect_timeout(timeout)
        .tcp_nodelay(true)
        .tcp_keepalive(Duration::from_secs(15))
        .tcp_user_timeout(timeout)
        .pool_idle_timeout(POOL_IDLE)
        .pool_max_idle_per_host(connections)
        .hickory_dns(true)
        .referer(false)
        .redirect(redirects(settings.follow_redirects))
        .no_proxy();
    if let Proxy::Url(url) = proxy {
        let invalid = |source| FetcherError::Proxy { proxy: proxy.display(), source };
        builder = builder.proxy(reqwest::Proxy::all(url).map_err(invalid)?);
    }
    builder.build().map_err(FetcherError::Client)
}

/// What the client trusts for https: the public roots that are compiled in and those of the machine.
pub(super) fn tls() -> Result<ClientConfig, FetcherError> {
    let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    // A minimal root file system has none, which is no error.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(FetcherError::Tls)?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

/// The C++ client's form, by which servers and proxies recognise CernVM-FS (client behaviour §5.1).
fn user_agent() -> String {
    format!("cvmfs Fuse {}", env!("CARGO_PKG_VERSION"))
}

fn redirects(follow: bool) -> reqwest::redirect::Policy {
    if !follow {
        return reqwest::redirect::Policy::none();
    }
    reqwest::redirect::Policy::custom(|attempt| {
        if attempt.previous().len() > MAX_REDIRECTS {
            attempt.error("more than 4 redirects")
        } else if matches!(attempt.url().scheme(), "http" | "https") {
            attempt.follow()
        } else {
            attempt.error("redirect to something that is not http")
        }
    })
}
