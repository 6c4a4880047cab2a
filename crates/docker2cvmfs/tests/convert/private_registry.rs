//! A registry of a site: a certificate of the site's own authority, and a password.

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use testkit::ScratchDir;
use testkit::process::Service;

use crate::workplace::{Ran, Workplace, image};

/// Debian's docker-registry with TLS and a password file; user `me`, password `hunter2`.
struct PrivateRegistry {
    address: String,
    authority: PathBuf,
    _service: Service,
    _directory: ScratchDir,
}

fn openssl(directory: &Path, arguments: &str) {
    let mut command = Command::new("openssl");
    let output = command.current_dir(directory).args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

impl PrivateRegistry {
    fn start() -> Self {
        testkit::install(&["docker-registry", "openssl"]).unwrap();
        let directory = ScratchDir::new("tls-registry").unwrap();
        let path = |name: &str| directory.path().join(name);
        let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
        openssl(
            directory.path(),
            &format!("req -x509 {key} -keyout ca.key -out ca.crt -days 2 -subj /CN=site-authority"),
        );
        openssl(
            directory.path(),
            &format!("req {key} -keyout server.key -out server.csr -subj /CN=registry"),
        );
        std::fs::write(path("names"), "subjectAltName=IP:127.0.0.1\n").unwrap();
        openssl(
            directory.path(),
            "x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile names -out server.crt",
        );
        // bcrypt of the password; the registry takes nothing else.
        std::fs::write(path("htpasswd"), "me:$2b$04$PVQg7t8htyMNbaB38hzMGeVMLs7xa1/OnDqsch/DLu9QXO/2P6QbG\n")
            .unwrap();
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let configuration = serde_json::json!({
            "version": "0.1",
            "storage": {"filesystem": {"rootdirectory": path("data")}},
            "http": {"addr": address, "tls": {"certificate": path("server.crt"), "key": path("server.key")}},
            "auth": {"htpasswd": {"realm": "site", "path": path("htpasswd")}},
        });
        std::fs::write(path("registry.yml"), configuration.to_string()).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(path("registry.yml")).env("OTEL_TRACES_EXPORTER", "none");
        let mut service = Service::start("docker-registry", command, &path("log")).unwrap();
        service.wait_ready(Duration::from_secs(20), || TcpStream::connect(&address).is_ok()).unwrap();
        let authority = path("ca.crt");
        Self { address, authority, _service: service, _directory: directory }
    }
}

#[test]
fn a_registry_with_the_sites_certificate_authority_and_a_password_is_pushed_to_and_read() {
    let place = Workplace::new();
    place.registry.push("app", "1", &image()).unwrap();
    let source = place.registry.reference("app", "1");
    let private = PrivateRegistry::start();
    let target = format!("https://{}/thin/app:1", private.address);

    // An unknown authority is refused before anything is published, with the way out.
    let before = place.revision();
    let refused: Ran = place
        .convert_command(&source, &["--output", &target])
        .env_remove("SSL_CERT_FILE")
        .output()
        .unwrap()
        .into();
    assert_eq!(refused.code, 4, "{}", refused.stderr);
    assert!(refused.stderr.contains("SSL_CERT_FILE"), "{}", refused.stderr);
    assert_eq!(place.revision(), before);

    // Known, but without a login.
    let certified = |arguments: &[&str]| -> Ran {
        let mut command = place.convert_command(&source, arguments);
        command.env("SSL_CERT_FILE", &private.authority).output().unwrap().into()
    };
    let denied = certified(&["--output", &target]);
    assert_eq!(denied.code, 1, "{}", denied.stderr);
    assert!(denied.stderr.contains("docker login"), "{}", denied.stderr);
    assert_eq!(place.revision(), before);

    // base64 of me:hunter2
    std::fs::create_dir(place.path(".docker")).unwrap();
    std::fs::write(
        place.path(".docker/config.json"),
        format!(r#"{{"auths":{{"{}":{{"auth":"bWU6aHVudGVyMg=="}}}}}}"#, private.address),
    )
    .unwrap();
    certified(&["--output", &target]).json();
    let read = place
        .command()
        .env("SSL_CERT_FILE", &private.authority)
        .args(["manifest", &target])
        .output()
        .unwrap();
    assert!(read.status.success(), "{}", String::from_utf8_lossy(&read.stderr));
    let manifest: serde_json::Value = serde_json::from_slice(&read.stdout).unwrap();
    assert_eq!(manifest["Layers"].as_array().unwrap().len(), 1, "a thin image has one layer");
}
