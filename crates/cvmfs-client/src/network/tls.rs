//! Which servers are believed for https, and who we say we are.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{CertificateError, ClientConfig, RootCertStore};

use super::credentials::certificate;
use crate::authz::Credentials;
use crate::config::TlsSettings;

/// Where grid sites keep the certificates of their authorities.
const GRID_CERTIFICATES: &str = "/etc/grid-security/certificates";
/// Most client certificates whose set-up is kept; users of one machine come and go.
const MAX_IDENTITIES: usize = 64;

/// TLS for one fetcher. Nothing is read before the first https request.
#[derive(Debug)]
pub(super) struct Tls {
    settings: TlsSettings,
    roots: OnceLock<Arc<RootCertStore>>,
    anonymous: OnceLock<Result<Arc<ClientConfig>, String>>,
    /// By identity of the credentials.
    identities: Mutex<HashMap<u64, Arc<ClientConfig>>>,
}

impl Tls {
    pub(super) fn new(settings: TlsSettings) -> Self {
        Self { settings, roots: OnceLock::new(), anonymous: OnceLock::new(), identities: Mutex::default() }
    }

    /// The set-up for a request with these credentials.
    ///
    /// # Errors
    /// Why there is none, in words.
    pub(super) fn config(&self, credentials: Option<&Credentials>) -> Result<Arc<ClientConfig>, String> {
        let Some((id, pem)) = credentials.and_then(certificate) else {
            return self.anonymous.get_or_init(|| self.build(None)).clone();
        };
        let mut identities = self.identities.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(config) = identities.get(&id) {
            return Ok(Arc::clone(config));
        }
        let config = self.build(Some(pem))?;
        if identities.len() >= MAX_IDENTITIES {
            identities.clear();
        }
        identities.insert(id, Arc::clone(&config));
        Ok(config)
    }

    fn build(&self, certificate: Option<&[u8]>) -> Result<Arc<ClientConfig>, String> {
        let roots = Arc::clone(self.roots.get_or_init(|| Arc::new(self.load_roots())));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots);
        let config = match certificate {
            None => builder.with_no_client_auth(),
            Some(pem) => {
                let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(pem)
                    .collect::<Result<_, _>>()
                    .map_err(|_| "the client certificate is no PEM".to_owned())?;
                let key = PrivateKeyDer::from_pem_slice(pem)
                    .map_err(|_| "the client certificate comes without its key".to_owned())?;
                builder
                    .with_client_auth_cert(chain, key)
                    .map_err(|error| format!("the client certificate is not usable: {error}"))?
            }
        };
        Ok(Arc::new(config))
    }

    /// The authorities that count (client behaviour §2.3). With `CVMFS_USE_SSL_SYSTEM_CA=yes` the system's, with `no`
    /// those of `X509_CERT_DIR` and `X509_CERT_BUNDLE`, and where the configuration says nothing all of them, so that
    /// https works without preparation. Where the system has none, the public roots that are compiled in stand in.
    fn load_roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        if self.settings.system != Some(false) {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                roots.roots = webpki_roots::TLS_SERVER_ROOTS.to_vec();
            }
        }
        if self.settings.system != Some(true) {
            let grid = std::path::Path::new(GRID_CERTIFICATES);
            let directory = self.settings.directory.as_deref().unwrap_or(grid);
            let bundle = self.settings.bundle.as_deref();
            let directory = directory.is_dir().then_some(directory);
            if directory.is_some() || bundle.is_some() {
                let found = rustls_native_certs::load_certs_from_paths(bundle, directory);
                for error in found.errors.iter().take(3) {
                    tracing::warn!(%error, "certificates of authorities are not readable");
                }
                roots.add_parsable_certificates(found.certs);
            }
        }
        if roots.is_empty() {
            tracing::warn!(
                "no certificates of authorities were found (CVMFS_USE_SSL_SYSTEM_CA, X509_CERT_DIR, X509_CERT_BUNDLE); \
                 https servers cannot be verified"
            );
        }
        roots
    }
}

/// What is wrong with the certificate of a server, in the words of an administrator; `None` if the connection failed
/// for another reason.
pub(super) fn certificate_problem(error: &io::Error, host: &str) -> Option<String> {
    let error = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    let rustls::Error::InvalidCertificate(problem) = error else {
        return Some(format!("{host}: {error}"));
    };
    let words = match problem {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            format!("the certificate of {host} has expired")
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            format!("the certificate of {host} is not valid yet; is this machine's clock right?")
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            format!("the certificate is for another name than {host}")
        }
        CertificateError::UnknownIssuer => format!(
            "the certificate of {host} is signed by an unknown authority; add it to the system's certificates or to \
             X509_CERT_DIR"
        ),
        CertificateError::Revoked => format!("the certificate of {host} is revoked"),
        other => format!("the certificate of {host} is not acceptable: {other:?}"),
    };
    Some(words)
}
