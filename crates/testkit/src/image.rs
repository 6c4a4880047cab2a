//! Container images made by hand: layers from tar archives, a configuration, and the two ways in which they
//! leave, a registry ([`crate::Registry::push`]) or a docker-archive.

use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::tar::{TarBuilder, gzip};

/// Media type of an image manifest, schema 2.
pub const MANIFEST_TYPE: &str = "application/vnd.docker.distribution.manifest.v2+json";
const CONFIG_TYPE: &str = "application/vnd.docker.container.image.v1+json";
const LAYER_TYPE: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";

/// The applets that the busybox image offers.
const APPLETS: &[&str] = &[
    "sh",
    "cat",
    "ls",
    "echo",
    "sleep",
    "sha256sum",
    "md5sum",
    "find",
    "stat",
    "mkdir",
    "rm",
    "touch",
    "cp",
    "mv",
    "ln",
    "test",
    "dd",
    "sort",
    "true",
    "false",
    "mount",
    "id",
    "xargs",
    "wc",
    "readlink",
];

/// One layer.
#[derive(Debug, Clone)]
pub struct Layer {
    /// The uncompressed archive.
    pub tar: Vec<u8>,
    /// What a registry stores: gzip, or whatever bytes a test wants to offer as such.
    pub blob: Vec<u8>,
}

impl Layer {
    /// A layer stored as gzip.
    pub fn new(tar: Vec<u8>) -> Self {
        let blob = gzip(&tar);
        Self { tar, blob }
    }

    /// The name under which a registry knows the stored bytes.
    pub fn digest(&self) -> String {
        digest(&self.blob)
    }
}

/// An image for linux on this machine's architecture.
#[derive(Debug, Clone)]
pub struct Image {
    /// From the base upwards.
    pub layers: Vec<Layer>,
    /// The `config` object of the image configuration: `Cmd`, `Env`, …
    pub config: Value,
}

impl Image {
    /// An image with these layers (tar archives, from the base upwards) and nothing configured.
    pub fn new(layers: impl IntoIterator<Item = Vec<u8>>) -> Self {
        Self { layers: layers.into_iter().map(Layer::new).collect(), config: json!({}) }
    }

    /// The smallest image that runs: a static busybox and its applets. Installs `busybox-static`.
    pub fn busybox() -> Result<Self> {
        Ok(Self::new([busybox_layer()?.finish()]))
    }

    /// Adds a layer on top.
    #[must_use]
    pub fn layer(mut self, tar: Vec<u8>) -> Self {
        self.layers.push(Layer::new(tar));
        self
    }

    /// Replaces the `config` object.
    #[must_use]
    pub fn config(mut self, config: Value) -> Self {
        self.config = config;
        self
    }

    /// The image configuration blob.
    pub fn config_blob(&self) -> Vec<u8> {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let diff_ids: Vec<_> = self.layers.iter().map(|layer| digest(&layer.tar)).collect();
        let history: Vec<_> = self.layers.iter().map(|_| json!({"created_by": "testkit"})).collect();
        to_bytes(&json!({
            "architecture": architecture, "os": "linux", "created": "2020-09-13T12:26:40Z",
            "config": self.config, "history": history,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }))
    }

    /// The manifest of the image as a registry holds it.
    pub fn manifest(&self) -> Vec<u8> {
        let config = self.config_blob();
        let layers: Vec<_> = self
            .layers
            .iter()
            .map(|layer| json!({"mediaType": LAYER_TYPE, "size": layer.blob.len(), "digest": layer.digest()}))
            .collect();
        to_bytes(&json!({
            "schemaVersion": 2, "mediaType": MANIFEST_TYPE,
            "config": {"mediaType": CONFIG_TYPE, "size": config.len(), "digest": digest(&config)},
            "layers": layers,
        }))
    }

    /// Writes a file for `docker load`.
    pub fn write_docker_archive(&self, file: &Path, reference: &str) -> Result<()> {
        let config = self.config_blob();
        let config_name = format!("{}.json", hex::encode(Sha256::digest(&config)));
        let mut tar = TarBuilder::new().file(&config_name, 0o644, &config);
        let mut names = Vec::new();
        for (number, layer) in self.layers.iter().enumerate() {
            let name = format!("layer{number}.tar");
            tar = tar.file(&name, 0o644, &layer.tar);
            names.push(name);
        }
        let manifest = json!([{"Config": config_name, "RepoTags": [reference], "Layers": names}]);
        let tar = tar.file("manifest.json", 0o644, &to_bytes(&manifest));
        std::fs::write(file, tar.finish()).with_context(|| format!("cannot write {}", file.display()))
    }
}

/// The archive of a root file system with a static busybox, to be continued.
pub fn busybox_layer() -> Result<TarBuilder> {
    crate::install(&["busybox-static"])?;
    let busybox = std::fs::read("/bin/busybox").context("busybox-static has no /bin/busybox")?;
    let mut tar = TarBuilder::new();
    for directory in ["bin", "etc", "proc", "sys", "dev", "root", "tmp", "usr", "var"] {
        tar = tar.directory(directory, if directory == "tmp" { 0o1777 } else { 0o755 });
    }
    tar = tar.file("bin/busybox", 0o755, &busybox).file(
        "etc/passwd",
        0o644,
        b"root:x:0:0:root:/root:/bin/sh\n",
    );
    for applet in APPLETS {
        tar = tar.symlink(&format!("bin/{applet}"), "busybox");
    }
    Ok(tar)
}

/// `sha256:` and the hash of the bytes in hexadecimal digits.
pub fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

fn to_bytes(value: &Value) -> Vec<u8> {
    serde_json::to_vec(value).expect("a JSON value can be written")
}
