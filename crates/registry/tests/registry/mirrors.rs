//! Mirrors, and registries with certificates of their own.

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use registry::{Client, ClientSettings, Credentials, Mirror, Platform, Reference, RegistryError};
use serde_json::{Value, json};
use testkit::process::Service;
use testkit::tar::TarBuilder;
use testkit::{Image, Registry, ScratchDir};

use crate::docker_registry::push;

fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

fn start(directory: &ScratchDir, mut configuration: Value) -> Service {
    configuration["version"] = "0.1".into();
    configuration["storage"] = json!({"filesystem": {"rootdirectory": directory.path().join("data")}});
    let file = directory.path().join("registry.yml");
    std::fs::write(&file, configuration.to_string()).unwrap();
    let mut command = Command::new("docker-registry");
    command.arg("serve").arg(&file).env("OTEL_TRACES_EXPORTER", "none");
    let mut service = Service::start("docker-registry", command, &directory.path().join("log")).unwrap();
    let address = configuration["http"]["addr"].as_str().unwrap().to_owned();
    service.wait_ready(Duration::from_secs(20), || TcpStream::connect(&address).is_ok()).unwrap();
    service
}

fn client(mirrors: Vec<Mirror>) -> Client {
    let settings = ClientSettings { credentials: Credentials::none(), mirrors, ..ClientSettings::default() };
    Client::new(settings).unwrap()
}

#[test]
fn a_cache_in_front_of_a_registry_is_asked_first_and_the_registry_where_it_cannot_serve() {
    let registry = Registry::start().unwrap();
    let image = Image::new([TarBuilder::new().file("x", 0o644, b"x").finish()]);
    registry.push("team/app", "1", &image).unwrap();
    let reference: Reference = registry.reference("team/app", "1").parse().unwrap();
    let cache = free_address();
    let directory = ScratchDir::new("cache").unwrap();
    let upstream = format!("http://{}", registry.address());
    let mut service = start(&directory, json!({"http": {"addr": cache}, "proxy": {"remoteurl": upstream}}));

    let mirror: Mirror = format!("{}=http://{cache}", registry.address()).parse().unwrap();
    let read = |client: &Client| {
        let found = client.source(&reference).image(&Platform::host())?;
        client.stated_digest(&reference)?;
        let mut blob = client.blob(&reference, &found.manifest.layers[0])?;
        std::io::copy(&mut blob, &mut std::io::sink()).unwrap();
        Ok::<_, RegistryError>(found.digest)
    };
    let ours = client(vec![mirror]);
    let digest = read(&ours).unwrap();
    // The registry saw the cache, and never us.
    let agents = registry.log_text();
    assert!(!agents.contains("docker2cvmfs"), "{agents}");
    assert!(service.log_text().contains("docker2cvmfs"));
    // The cache ends: the registry serves.
    service.kill();
    assert_eq!(read(&ours).unwrap(), digest);
    assert!(registry.log_text().contains("docker2cvmfs"));
    // Other registries are not asked for at this mirror, and what nobody has is not found.
    let missing: Reference = registry.reference("team/none", "1").parse().unwrap();
    let error = ours.source(&missing).image(&Platform::host()).unwrap_err();
    assert!(matches!(error, RegistryError::NotFound { .. }), "{error}");
}

#[test]
fn mirrors_are_written_as_urls_with_or_without_their_registry() {
    let parse = |text: &str| text.parse::<Mirror>();
    let hub = parse("https://mirror.example.org").unwrap();
    assert_eq!(
        (hub.registry.as_str(), hub.endpoint.as_str()),
        ("docker.io", "https://mirror.example.org/v2")
    );
    let quay = parse("quay.io=https://mirror.example.org/quay/v2/").unwrap();
    assert_eq!(
        (quay.registry.as_str(), quay.endpoint.as_str()),
        ("quay.io", "https://mirror.example.org/quay/v2")
    );
    for wrong in ["mirror.example.org", "quay.io=", "a b=https://x", "https://user:hunter2@x"] {
        let error = parse(wrong).unwrap_err().to_string();
        assert!(!error.contains("hunter2"), "{error}");
    }
}

fn openssl(directory: &Path, arguments: &str) {
    let mut command = Command::new("openssl");
    let output = command.current_dir(directory).args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn certificates_of_a_registry_are_taken_from_the_directories_of_engines() {
    testkit::install(&["docker-registry", "openssl"]).unwrap();
    let directory = ScratchDir::new("certificates").unwrap();
    let path = |name: &str| directory.path().join(name);
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    openssl(directory.path(), &format!("req -x509 {key} -keyout ca.key -out ca.crt -days 2 -subj /CN=site"));
    std::fs::write(path("server.ext"), "subjectAltName=IP:127.0.0.1\n").unwrap();
    std::fs::write(path("client.ext"), "extendedKeyUsage=clientAuth\n").unwrap();
    for name in ["server", "client"] {
        openssl(directory.path(), &format!("req {key} -keyout {name}.key -out {name}.csr -subj /CN={name}"));
        let sign = "x509 -req -CA ca.crt -CAkey ca.key -CAcreateserial -days 2";
        openssl(directory.path(), &format!("{sign} -in {name}.csr -extfile {name}.ext -out {name}.crt"));
    }
    let address = free_address();
    let tls =
        json!({"certificate": path("server.crt"), "key": path("server.key"), "clientcas": [path("ca.crt")]});
    let _service = start(&directory, json!({"http": {"addr": address, "tls": tls}}));

    let certificates = path("certs.d");
    let own = certificates.join(&address);
    std::fs::create_dir_all(&own).unwrap();
    let connect = || {
        let (credentials, certificates) = (Credentials::none(), vec![certificates.clone()]);
        Client::new(ClientSettings { credentials, certificates, ..ClientSettings::default() }).unwrap()
    };
    let reference: Reference = format!("https://{address}/team/app:1").parse().unwrap();
    let tar = TarBuilder::new().file("x", 0o644, b"x").finish();
    let blob = Image::new([tar.clone()]).layers.remove(0).blob;
    // Neither its authority nor our certificate is known; then the authority; then both.
    let error = push(&connect(), &reference, &blob, &tar).unwrap_err();
    assert!(error.to_string().contains("certs.d"), "{error}");
    std::fs::copy(path("ca.crt"), own.join("ca.crt")).unwrap();
    assert!(push(&connect(), &reference, &blob, &tar).is_err());
    std::fs::copy(path("client.crt"), own.join("client.cert")).unwrap();
    let error = push(&connect(), &reference, &blob, &tar).unwrap_err();
    assert!(error.to_string().contains("client.key"), "{error}");
    std::fs::copy(path("client.key"), own.join("client.key")).unwrap();
    push(&connect(), &reference, &blob, &tar).unwrap();
    connect().source(&reference).image(&Platform::host()).unwrap();
}
