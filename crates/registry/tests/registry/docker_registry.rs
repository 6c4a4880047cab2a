//! Against Debian's docker-registry, cross-checked with skopeo.

use std::io::Read as _;
use std::process::Command;
use std::time::Duration;

use crate::script::client;
use registry::{
    Body, Client, Credential, Credentials, Descriptor, Digest, ImageManifest, LayerStream, MAX_LAYER_BYTES,
    Platform, Reference, RegistryError, Secret, media_type,
};
use testkit::process::Service;
use testkit::tar::{TarBuilder, gzip};
use testkit::{Image, Registry, ScratchDir};

fn anonymous() -> Client {
    client(Credentials::none())
}

fn layer_tar() -> Vec<u8> {
    TarBuilder::new().directory("etc", 0o755).file("etc/motd", 0o644, b"hello\n").finish()
}

fn blob(media_type: &str, bytes: &[u8]) -> Descriptor {
    let digest = Digest::sha256_of(bytes);
    Descriptor { media_type: media_type.into(), size: bytes.len() as u64, digest, urls: vec![] }
}

/// Pushes an image of one layer with our own code; returns the layer's descriptor.
pub fn push(
    client: &Client,
    reference: &Reference,
    layer: &[u8],
    tar: &[u8],
) -> Result<Descriptor, RegistryError> {
    let platform = Platform::host();
    let config = format!(
        r#"{{"os":"linux","architecture":"{}","rootfs":{{"type":"layers","diff_ids":["{}"]}}}}"#,
        platform.architecture,
        Digest::sha256_of(tar)
    );
    let manifest = ImageManifest {
        media_type: media_type::DOCKER_MANIFEST.into(),
        config: blob(media_type::DOCKER_CONFIG, config.as_bytes()),
        layers: vec![blob(media_type::DOCKER_LAYER_GZIP, layer)],
    };
    client.push_blob(reference, &manifest.config.digest, Body::Bytes(config.into()))?;
    client.push_blob(reference, &manifest.layers[0].digest, Body::Bytes(layer.to_vec().into()))?;
    client.push_manifest(reference, media_type::DOCKER_MANIFEST, manifest.to_docker_json())?;
    Ok(manifest.layers[0].clone())
}

fn skopeo(arguments: &[&str]) -> serde_json::Value {
    let output = Command::new("skopeo").args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

#[test]
fn what_we_push_other_tools_and_we_can_pull() {
    let registry = Registry::start().unwrap();
    let reference: Reference = registry.reference("team/image", "1").parse().unwrap();
    let client = anonymous();
    let tar = layer_tar();
    let layer = push(&client, &reference, &gzip(&tar), &tar).unwrap();

    let seen = skopeo(&["inspect", "--tls-verify=false", &format!("docker://{reference}")]);
    assert_eq!(seen["Layers"][0], layer.digest.to_string());
    assert_eq!(seen["Os"], "linux");

    let image = client.source(&reference).image(&Platform::host()).unwrap();
    assert_eq!(seen["Digest"], image.digest.to_string());
    assert_eq!(image.manifest.layers, std::slice::from_ref(&layer));
    let (_, config) = client.source(&reference).config(&image.manifest).unwrap();
    let reader = client.blob(&reference, &layer).unwrap();
    let mut unpacked = Vec::new();
    let mut stream = LayerStream::new(reader, &config.diff_ids[0], MAX_LAYER_BYTES).unwrap();
    stream.read_to_end(&mut unpacked).unwrap();
    assert_eq!(unpacked, tar);

    assert!(!client.push_blob(&reference, &layer.digest, Body::Empty).unwrap(), "it is there already");
    let by_digest = reference.at(&image.digest);
    assert_eq!(client.source(&by_digest).image(&Platform::host()).unwrap().manifest, image.manifest);
}

#[test]
fn a_file_is_pushed_as_stream() {
    let registry = Registry::start().unwrap();
    let reference: Reference = registry.reference("x", "1").parse().unwrap();
    let bytes = vec![7u8; 3 << 20];
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("blob");
    std::fs::write(&file, &bytes).unwrap();
    let digest = Digest::sha256_of(&bytes);
    let client = anonymous();
    assert!(client.push_blob(&reference, &digest, Body::File(file.clone(), bytes.len() as u64)).unwrap());
    assert_eq!(registry.blob("x", &digest.to_string()).unwrap(), bytes);
    let wrong = Digest::sha256_of(b"something else");
    let error = client.push_blob(&reference, &wrong, Body::File(file, bytes.len() as u64)).unwrap_err();
    assert!(error.to_string().contains("provided digest did not match"), "{error}");
}

#[test]
fn row_90_indexes_and_attestations_lead_to_the_image_of_the_platform() {
    let registry = Registry::start().unwrap();
    let image = Image::new([layer_tar()]);
    let digest = registry.push("multi", "amd64", &image).unwrap();
    let size = image.manifest().len();
    let entry = |architecture: &str, extra: &str| {
        format!(
            r#"{{"mediaType":"{}","size":{size},"digest":"{digest}","platform":{{"os":"linux","architecture":"{architecture}"}}{extra}}}"#,
            media_type::DOCKER_MANIFEST
        )
    };
    let attestation = r#","annotations":{"vnd.docker.reference.type":"attestation-manifest"}"#;
    let host = Platform::host();
    for kind in [media_type::OCI_INDEX, media_type::DOCKER_LIST] {
        let index = format!(
            r#"{{"schemaVersion":2,"mediaType":"{kind}","manifests":[{},{}]}}"#,
            entry("unknown", attestation),
            entry(&host.architecture, "")
        );
        registry.push_manifest("multi", "all", kind, index.as_bytes()).unwrap();
        let reference: Reference = registry.reference("multi", "all").parse().unwrap();
        let found = anonymous().source(&reference).image(&host).unwrap();
        assert_eq!(found.digest.to_string(), digest);
        assert!(anonymous().source(&reference).image(&"linux/s390x".parse().unwrap()).is_err());
    }
}

#[test]
fn an_oci_image_copied_by_skopeo_is_read() {
    let registry = Registry::start().unwrap();
    registry.push("docker", "1", &Image::new([layer_tar()])).unwrap();
    let (from, to) = (registry.reference("docker", "1"), registry.reference("oci", "1"));
    skopeo(&[
        "copy",
        "-q",
        "-f",
        "oci",
        "--dest-compress-format",
        "zstd",
        "--src-tls-verify=false",
        "--dest-tls-verify=false",
        &format!("docker://{from}"),
        &format!("docker://{to}"),
    ]);
    let reference: Reference = to.parse().unwrap();
    let image = anonymous().source(&reference).image(&Platform::host()).unwrap();
    assert_eq!(image.manifest.media_type, media_type::OCI_MANIFEST);
    let (_, config) = anonymous().source(&reference).config(&image.manifest).unwrap();
    let client = anonymous();
    let reader = client.blob(&reference, &image.manifest.layers[0]).unwrap();
    let stream = LayerStream::new(reader, &config.diff_ids[0], MAX_LAYER_BYTES).unwrap();
    assert_eq!(stream.finish().unwrap(), layer_tar().len() as u64);
}

#[test]
fn a_blob_damaged_in_the_registrys_storage_is_noticed() {
    let registry = Registry::start().unwrap();
    let image = Image::new([layer_tar()]);
    registry.push("x", "1", &image).unwrap();
    let digest = image.layers[0].digest();
    let file = registry.blob_file(&digest);
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    let reference: Reference = registry.reference("x", "1").parse().unwrap();
    let client = anonymous();
    let found = client.source(&reference).image(&Platform::host()).unwrap();
    let mut reader = client.blob(&reference, &found.manifest.layers[0]).unwrap();
    let error = reader.read_to_end(&mut Vec::new()).unwrap_err();
    assert!(error.to_string().contains(&digest), "{error}");
}

/// `docker-registry` with a password file.
struct PrivateRegistry {
    address: String,
    _service: Service,
    _directory: ScratchDir,
}

impl PrivateRegistry {
    fn start() -> Self {
        let directory = ScratchDir::new("private-registry").unwrap();
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let passwords = directory.path().join("htpasswd");
        // User "me", password "hunter2"; the registry takes bcrypt only.
        std::fs::write(&passwords, "me:$2b$04$PVQg7t8htyMNbaB38hzMGeVMLs7xa1/OnDqsch/DLu9QXO/2P6QbG\n")
            .unwrap();
        let configuration = serde_json::json!({
            "version": "0.1",
            "storage": {"filesystem": {"rootdirectory": directory.path().join("data")}},
            "http": {"addr": address},
            "auth": {"htpasswd": {"realm": "private", "path": passwords}},
        });
        let file = directory.path().join("registry.yml");
        std::fs::write(&file, configuration.to_string()).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&file).env("OTEL_TRACES_EXPORTER", "none");
        let mut service = Service::start("docker-registry", command, &directory.path().join("log")).unwrap();
        let answers = || testkit::http::get(&address, "/v2/").is_ok_and(|answer| answer.status == 401);
        service.wait_ready(Duration::from_secs(20), answers).unwrap();
        Self { address, _service: service, _directory: directory }
    }
}

#[test]
fn a_registry_with_passwords_takes_ours_and_no_other() {
    let registry = PrivateRegistry::start();
    let reference: Reference = format!("{}/team/image:1", registry.address).parse().unwrap();
    let tar = layer_tar();
    let with = |password: &str| {
        let credential = Credential::Password { user: "me".into(), password: Secret::new(password) };
        client(Credentials::none().with(registry.address.clone(), credential))
    };
    push(&with("hunter2"), &reference, &gzip(&tar), &tar).unwrap();
    with("hunter2").source(&reference).image(&Platform::host()).unwrap();
    for refused in [with("hunter3"), anonymous()] {
        let error = refused.source(&reference).image(&Platform::host()).unwrap_err();
        assert!(matches!(error, RegistryError::Denied { .. }), "{error}");
        assert!(!error.to_string().contains("hunter"), "{error}");
    }
}

#[test]
fn a_login_file_is_used() {
    let registry = PrivateRegistry::start();
    let reference: Reference = format!("{}/team/image:1", registry.address).parse().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("config.json");
    // base64 of me:hunter2
    std::fs::write(&file, format!(r#"{{"auths":{{"{}":{{"auth":"bWU6aHVudGVyMg=="}}}}}}"#, registry.address))
        .unwrap();
    let tar = layer_tar();
    push(&client(Credentials::from_files(vec![file])), &reference, &gzip(&tar), &tar).unwrap();
}
