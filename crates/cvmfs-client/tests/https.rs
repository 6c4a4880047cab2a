//! What users see of https: which servers are believed, and what they are shown.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use cvmfs_client::authz::Credentials;
use cvmfs_client::network::{Cause, FetchError, Fetcher, Request};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection, StreamOwned};
use support::{Bench, seconds};
use testkit::Origin;

/// The certificate `name` of the directory `tls` with its key.
fn pem(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/tls").join(format!("{name}.pem"))
}

/// Speaks TLS and passes the requests on to an origin.
struct Front {
    address: SocketAddr,
    /// Connections whose client showed a certificate.
    known_clients: Arc<AtomicUsize>,
}

impl Front {
    fn serve(certificate: &str, origin: &Origin) -> Self {
        let chain: Vec<CertificateDer<'static>> =
            CertificateDer::pem_file_iter(pem(certificate)).unwrap().collect::<Result<_, _>>().unwrap();
        let key = PrivateKeyDer::from_pem_file(pem(certificate)).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(pem("authority")).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .allow_unauthenticated()
            .build()
            .unwrap();
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(clients)
            .with_single_cert(chain, key)
            .unwrap();
        let config = Arc::new(config);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let known_clients = Arc::new(AtomicUsize::new(0));
        let (known, target) = (Arc::clone(&known_clients), origin.address());
        std::thread::spawn(move || {
            while let Ok((socket, _)) = listener.accept() {
                let (config, known) = (Arc::clone(&config), Arc::clone(&known));
                std::thread::spawn(move || {
                    // An error is a client that went away.
                    let _ = converse(socket, config, target, &known);
                });
            }
        });
        Self { address, known_clients }
    }

    fn url(&self) -> String {
        format!("https://{}", self.address)
    }
}

fn converse(
    socket: TcpStream,
    config: Arc<ServerConfig>,
    target: SocketAddr,
    known: &AtomicUsize,
) -> std::io::Result<()> {
    let connection = ServerConnection::new(config).map_err(std::io::Error::other)?;
    let mut client = StreamOwned::new(connection, socket);
    let mut origin = TcpStream::connect(target)?;
    let mut first = true;
    loop {
        let head = read_head(&mut client)?;
        if std::mem::take(&mut first) && client.conn.peer_certificates().is_some() {
            known.fetch_add(1, Ordering::SeqCst);
        }
        origin.write_all(head.as_bytes())?;
        let head = read_head(&mut origin)?;
        let length = head.to_ascii_lowercase();
        let length = length.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap_or("0");
        let mut body = vec![0; length.parse().unwrap_or(0)];
        origin.read_exact(&mut body)?;
        client.write_all(head.as_bytes())?;
        client.write_all(&body)?;
        client.flush()?;
    }
}

fn read_head(stream: &mut impl Read) -> std::io::Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

/// A storage with one file, the origin that serves it, and TLS in front of that.
struct Site {
    bench: Bench,
    origin: Origin,
    front: Front,
}

impl Site {
    fn new(certificate: &str) -> Self {
        let bench = Bench::new();
        std::fs::write(bench.storage().join("file"), b"content").unwrap();
        let origin = Origin::serve(bench.storage()).unwrap();
        let front = Front::serve(certificate, &origin);
        Self { bench, origin, front }
    }

    fn fetcher(&self, options: &[(&str, &str)]) -> Fetcher {
        Fetcher::new(&self.bench.settings(&self.front.url(), options)).unwrap()
    }

    fn fetch(&self, options: &[(&str, &str)]) -> Result<Vec<u8>, FetchError> {
        self.fetcher(options).bytes(&request(), seconds(20))
    }
}

fn request() -> Request {
    Request::new("file", "file", 1000)
}

#[test]
fn row_23_a_wrong_certificate_is_refused_and_the_message_says_what_is_wrong_with_it() {
    let authority = pem("authority");
    let options = [("X509_CERT_BUNDLE", authority.to_str().unwrap())];
    for (certificate, words) in [
        ("expired", "certificate of 127.0.0.1 has expired"),
        ("wrong-name", "certificate is for another name than 127.0.0.1"),
        ("unknown", "unknown authority"),
    ] {
        let site = Site::new(certificate);
        let error = site.fetch(&options).unwrap_err();
        assert!(
            matches!(error, FetchError::Network { cause: Cause::Certificate(_), .. }),
            "{certificate}: {error}"
        );
        assert!(error.to_string().contains(words), "{certificate}: {error}");
        assert_eq!(site.origin.connections(), 1, "{certificate}: nothing was asked");
        assert_eq!(site.origin.requests().len(), 0);
    }
    let site = Site::new("good");
    assert_eq!(site.fetch(&options).unwrap(), b"content");
}

#[test]
fn row_23_certificates_count_as_the_configuration_says() {
    let site = Site::new("good");
    let directory = tempfile::tempdir().unwrap();
    // A name as grid sites have it.
    std::fs::copy(pem("authority"), directory.path().join("0a1b2c3d.0")).unwrap();
    let directory = directory.path().to_str().unwrap();
    assert_eq!(site.fetch(&[("X509_CERT_DIR", directory)]).unwrap(), b"content");
    let only_grid = [("X509_CERT_DIR", directory), ("CVMFS_USE_SSL_SYSTEM_CA", "no")];
    assert_eq!(site.fetch(&only_grid).unwrap(), b"content");
    let only_system = [("X509_CERT_DIR", directory), ("CVMFS_USE_SSL_SYSTEM_CA", "yes")];
    assert!(site.fetch(&only_system).unwrap_err().to_string().contains("unknown authority"));
    let nothing = [("X509_CERT_DIR", "/nowhere"), ("CVMFS_USE_SSL_SYSTEM_CA", "no")];
    assert!(site.fetch(&nothing).is_err());
}

#[test]
fn https_goes_through_a_tunnel_of_the_proxy() {
    let site = Site::new("good");
    let authority = pem("authority");
    let seen: Arc<Mutex<Vec<String>>> = Arc::default();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let proxy = format!("http://user:sesame@{}", listener.local_addr().unwrap());
    let log = Arc::clone(&seen);
    std::thread::spawn(move || {
        while let Ok((mut near, _)) = listener.accept() {
            let head = read_head(&mut near).unwrap();
            let target = head.split(' ').nth(1).unwrap().to_owned();
            log.lock().unwrap().push(head);
            let mut far = TcpStream::connect(target).unwrap();
            near.write_all(b"HTTP/1.1 200 tunnel\r\nX-Header: y\r\n\r\n").unwrap();
            let (mut near_copy, mut far_copy) = (near.try_clone().unwrap(), far.try_clone().unwrap());
            std::thread::spawn(move || std::io::copy(&mut near_copy, &mut far_copy));
            std::thread::spawn(move || std::io::copy(&mut far, &mut near));
        }
    });
    let options = [("X509_CERT_BUNDLE", authority.to_str().unwrap()), ("CVMFS_HTTP_PROXY", proxy.as_str())];
    let fetcher = site.fetcher(&options);
    for _ in 0..3 {
        assert_eq!(fetcher.bytes(&request(), seconds(20)).unwrap(), b"content");
    }
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), 1, "one tunnel serves all");
    assert!(seen[0].starts_with(&format!("CONNECT {} HTTP/1.1\r\n", site.front.address)), "{seen:?}");
    assert!(seen[0].contains("Proxy-Authorization: Basic dXNlcjpzZXNhbWU="), "{seen:?}");
    assert!(!format!("{fetcher:?} {:?}", fetcher.proxy_info()).contains("sesame"));
}

#[test]
fn credentials_are_shown_to_https_servers_and_to_no_others() {
    let site = Site::new("good");
    let authority = pem("authority");
    let options = [("X509_CERT_BUNDLE", authority.to_str().unwrap())];
    let fetcher = site.fetcher(&options);
    let with = |credentials: Credentials| Request { credentials: Some(Arc::new(credentials)), ..request() };
    let token = with(Credentials::Bearer("sesame".to_owned()));
    let certificate = with(Credentials::X509Proxy(std::fs::read(pem("user")).unwrap()));
    fetcher.bytes(&token, seconds(20)).unwrap();
    support::requests(&site.origin, 1);
    assert_eq!(site.origin.requests()[0].headers["authorization"], "Bearer sesame");
    assert_eq!(site.front.known_clients.load(Ordering::SeqCst), 0);
    fetcher.bytes(&certificate, seconds(20)).unwrap();
    assert_eq!(site.front.known_clients.load(Ordering::SeqCst), 1);
    // The next one has neither, and does not come over the connection of the one who had.
    fetcher.bytes(&request(), seconds(20)).unwrap();
    support::requests(&site.origin, 3);
    assert!(!site.origin.requests()[2].headers.contains_key("authorization"));
    assert_eq!(site.front.known_clients.load(Ordering::SeqCst), 1);

    let plain = Fetcher::new(&site.bench.settings(&site.origin.url(), &[])).unwrap();
    site.origin.clear_requests();
    plain.bytes(&token, seconds(20)).unwrap();
    support::requests(&site.origin, 1);
    assert!(!site.origin.requests()[0].headers.contains_key("authorization"), "not without TLS");
}
