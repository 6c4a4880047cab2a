//! Debian's docker-registry as a throw-away instance on loopback.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use crate::image::{self, Image, MANIFEST_TYPE};
use crate::process::{Service, print_log};
use crate::{ScratchDir, http};

const START_TIMEOUT: Duration = Duration::from_secs(20);

/// A running registry; it ends, and its storage is removed, when dropped.
#[derive(Debug)]
pub struct Registry {
    address: String,
    service: Service,
    directory: ScratchDir,
}

impl Registry {
    /// Starts an empty registry that allows deletes on a free port. Installs `docker-registry`.
    pub fn start() -> Result<Self> {
        Self::start_with(None)
    }

    /// As [`Registry::start`], and every push is told to `url`, with `authorization` as header.
    pub fn start_notifying(url: &str, authorization: &str) -> Result<Self> {
        Self::start_with(Some(json!({"endpoints": [{
            "name": "listener", "url": url, "headers": {"Authorization": [authorization]},
            "timeout": "2s", "threshold": 3, "backoff": "1s",
        }]})))
    }

    fn start_with(notifications: Option<serde_json::Value>) -> Result<Self> {
        crate::install(&["docker-registry"])?;
        let directory = ScratchDir::new("registry")?;
        // Another process may take the port between the look and the start.
        let mut last = None;
        for _ in 0..3 {
            match start_at(directory.path(), free_port()?, notifications.as_ref()) {
                Ok((address, service)) => return Ok(Self { address, service, directory }),
                Err(error) => last = Some(error),
            }
        }
        Err(last.expect("three attempts leave an error"))
    }

    /// `127.0.0.1:PORT`, the first part of an image reference.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The full reference of an image in this registry.
    pub fn reference(&self, name: &str, tag: &str) -> String {
        format!("{}/{name}:{tag}", self.address)
    }

    /// All that it has logged.
    pub fn log_text(&self) -> String {
        self.service.log_text()
    }

    /// The file that holds a blob, for tests that damage it.
    pub fn blob_file(&self, digest: &str) -> PathBuf {
        let hash = digest.trim_start_matches("sha256:");
        let shard = hash.get(..2).unwrap_or_default();
        self.directory.path().join(format!("data/docker/registry/v2/blobs/sha256/{shard}/{hash}/data"))
    }

    /// Stores an image; returns the digest of its manifest.
    pub fn push(&self, name: &str, tag: &str, image: &Image) -> Result<String> {
        for layer in &image.layers {
            self.push_blob(name, &layer.blob)?;
        }
        self.push_blob(name, &image.config_blob())?;
        self.push_manifest(name, tag, MANIFEST_TYPE, &image.manifest())
    }

    /// Stores a blob; returns its digest.
    pub fn push_blob(&self, name: &str, blob: &[u8]) -> Result<String> {
        let digest = image::digest(blob);
        let begin = http::request(&self.address, "POST", &format!("/v2/{name}/blobs/uploads/"), &[], &[])?;
        let location = begin.header("location").context("the registry named no upload location")?;
        let path = location.find("/v2/").map_or(location, |at| &location[at..]);
        let separator = if path.contains('?') { '&' } else { '?' };
        let headers = [("Content-Type", "application/octet-stream")];
        let target = format!("{path}{separator}digest={digest}");
        let done = http::request(&self.address, "PUT", &target, &headers, blob)?;
        ensure!(done.status == 201, "blob {digest} was answered {}: {}", done.status, done.text());
        Ok(digest)
    }

    /// Stores a manifest of any type under a tag or digest; returns its digest.
    pub fn push_manifest(&self, name: &str, tag: &str, media_type: &str, manifest: &[u8]) -> Result<String> {
        let target = format!("/v2/{name}/manifests/{tag}");
        let done = http::request(&self.address, "PUT", &target, &[("Content-Type", media_type)], manifest)?;
        ensure!(done.status == 201, "manifest {name}:{tag} was answered {}: {}", done.status, done.text());
        Ok(image::digest(manifest))
    }

    /// Takes a tag away.
    pub fn delete_manifest(&self, name: &str, digest: &str) -> Result<()> {
        let target = format!("/v2/{name}/manifests/{digest}");
        let done = http::request(&self.address, "DELETE", &target, &[], &[])?;
        ensure!(done.status == 202, "deleting {name}@{digest} was answered {}: {}", done.status, done.text());
        Ok(())
    }

    /// Fetches a manifest.
    pub fn manifest(&self, name: &str, tag: &str) -> Result<serde_json::Value> {
        let target = format!("/v2/{name}/manifests/{tag}");
        let answer = http::request(&self.address, "GET", &target, &[("Accept", MANIFEST_TYPE)], &[])?;
        ensure!(answer.status == 200, "manifest {name}:{tag} was answered {}", answer.status);
        serde_json::from_slice(&answer.body).context("manifest")
    }

    /// Fetches a blob.
    pub fn blob(&self, name: &str, digest: &str) -> Result<Vec<u8>> {
        let answer = http::get(&self.address, &format!("/v2/{name}/blobs/{digest}"))?;
        ensure!(answer.status == 200, "blob {digest} was answered {}", answer.status);
        Ok(answer.body)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        if std::thread::panicking() {
            print_log("log of the registry", &self.log_text());
        }
    }
}

fn start_at(
    directory: &Path,
    port: u16,
    notifications: Option<&serde_json::Value>,
) -> Result<(String, Service)> {
    let address = format!("127.0.0.1:{port}");
    // JSON is YAML.
    let mut config = json!({
        "version": "0.1",
        "log": {"level": "warn", "accesslog": {"disabled": false}},
        "storage": {"filesystem": {"rootdirectory": directory.join("data")}, "delete": {"enabled": true}},
        "http": {"addr": address},
    });
    if let Some(notifications) = notifications {
        config["notifications"] = notifications.clone();
    }
    let file = directory.join("registry.yml");
    std::fs::write(&file, config.to_string())?;
    let mut command = Command::new("docker-registry");
    // Otherwise it looks for a collector of traces.
    command.arg("serve").arg(&file).env("OTEL_TRACES_EXPORTER", "none");
    let mut service = Service::start("docker-registry", command, &directory.join("log"))?;
    service
        .wait_ready(START_TIMEOUT, || http::get(&address, "/v2/").is_ok_and(|answer| answer.status == 200))?;
    Ok((address, service))
}

/// A port of 127.0.0.1 that nobody listened on a moment ago.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tar::TarBuilder;

    #[test]
    fn an_image_that_was_pushed_comes_back() {
        let registry = Registry::start().unwrap();
        let image = Image::new([TarBuilder::new().file("hello", 0o644, b"hi").finish()]);
        registry.push("test/image", "1", &image).unwrap();
        let manifest = registry.manifest("test/image", "1").unwrap();
        let digest = manifest["layers"][0]["digest"].as_str().unwrap();
        assert_eq!(registry.blob("test/image", digest).unwrap(), image.layers[0].blob);
        assert!(registry.blob_file(digest).is_file());
    }
}
