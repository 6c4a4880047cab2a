//! Documents and archives of container images.

use std::io::Read;

use layer_tar::{LayerReader, Limits};
use registry::{Manifest, Reference, answers};
use testkit::tar::TarBuilder;
use thin_image::ThinImage;

use crate::Target;

/// The documents of thin images and of registries.
pub(crate) const DESCRIPTOR: Target = Target {
    name: "descriptor",
    run: descriptor,
    seeds: || {
        let digest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let text = [
            format!(
                "{{\"version\":\"1.0\",\"min_version\":\"0.1\",\"origin\":\"https://r/i:t@{digest}\",\"layers\":[{{\"digest\":\"{digest}\",\"url\":\"cvmfs://a.example.org/layers/x\"}}],\"comment\":\"\"}}"
            ),
            format!(
                "{{\"schemaVersion\":2,\"mediaType\":\"application/vnd.docker.distribution.manifest.v2+json\",\"config\":{{\"mediaType\":\"x\",\"size\":1,\"digest\":\"{digest}\"}},\"layers\":[{{\"mediaType\":\"application/vnd.docker.image.rootfs.diff.tar.gzip\",\"size\":2,\"digest\":\"{digest}\"}}]}}"
            ),
            format!(
                "{{\"schemaVersion\":2,\"manifests\":[{{\"mediaType\":\"application/vnd.oci.image.manifest.v1+json\",\"size\":3,\"digest\":\"{digest}\",\"platform\":{{\"architecture\":\"amd64\",\"os\":\"linux\"}}}}]}}"
            ),
            format!("https://user@registry.example.org:5000/library/image:tag@{digest}"),
        ];
        text.map(String::into_bytes).into()
    },
    words: &[
        "{",
        "}",
        "[",
        "]",
        "\"",
        ":",
        ",",
        "null",
        "1e999",
        "-1",
        "\\u0000",
        "../",
        "cvmfs://",
        "sha256:",
        "\"url\"",
        "\"layers\"",
    ],
};

/// The archives of layers.
pub(crate) const LAYER: Target = Target {
    name: "layer",
    run: layer,
    seeds: || {
        let tar = TarBuilder::new()
            .directory("d", 0o755)
            .owner(7, 8)
            .xattr("user.colour", b"blue")
            .file("d/f", 0o640, b"hello")
            .hard_link("d/g", "d/f")
            .symlink("d/l", "f")
            .char_device("d/null", 0o666, (1, 3))
            .file(&"n".repeat(150), 0o644, &[7; 3000])
            .finish();
        vec![tar]
    },
    words: &[
        "ustar\x0000",
        "ustar  \0",
        "GNU.sparse.major=1",
        "30 path=x\n",
        "SCHILY.xattr.",
        "../",
        ".wh.",
        "7777777",
    ],
};

/// What registries and token services answer beside manifests: challenges, configurations, signatures, keys.
pub(crate) const REGISTRY: Target = Target {
    name: "registry",
    run: registry_answers,
    seeds: || {
        let digest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        [
            "Bearer realm=\"https://auth.example.org/token\",service=\"r\",scope=\"repository:a/b:pull,push\", Basic realm=\"x\""
                .to_owned(),
            format!(
                r#"{{"architecture":"arm","os":"linux","variant":"v7","config":{{"Env":["A=b"]}},"rootfs":{{"type":"layers","diff_ids":["{digest}"]}}}}"#
            ),
            format!(
                r#"{{"layers":[{{"mediaType":"application/vnd.dev.cosign.simplesigning.v1+json","size":7,"digest":"{digest}","annotations":{{"dev.cosignproject.cosign/signature":"AAEC"}}}}]}}"#
            ),
            "-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEAAAAAAAAAAAAAAAAAAAAAAAAAAAA\nAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\n-----END PUBLIC KEY-----\n".to_owned(),
            r#"{"token":"abc","access_token":"abc","expires_in":300,"issued_at":"2020-01-01T00:00:00Z"}"#.to_owned(),
        ]
        .map(String::into_bytes)
        .into()
    },
    words: &[
        "{",
        "}",
        "[",
        "]",
        "\"",
        ":",
        ",",
        "=",
        "\\",
        "Bearer ",
        "Basic ",
        "realm=",
        "scope=",
        "null",
        "-1",
        "sha256:",
        "-----BEGIN ",
        "-----END ",
        "PUBLIC KEY-----",
        "\n",
    ],
};

fn registry_answers(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        for challenge in answers::challenges(text) {
            assert!(!challenge.scheme.is_empty() && challenge.scheme.len() <= text.len());
            let _ = challenge.parameter("realm");
        }
        let _ = registry::PublicKey::from_pem(text).map_err(|error| error.to_string());
    }
    if let Ok(config) = registry::ImageConfig::parse(bytes) {
        assert!(config.diff_ids.iter().all(|id| id.hex().bytes().all(|b| b.is_ascii_hexdigit())));
    }
    let _ = answers::token_of(bytes);
    for (blob, signature) in answers::listed_signatures(bytes).unwrap_or_default() {
        assert!(blob.size <= 1 << 20 && signature.len() <= bytes.len());
    }
}

fn descriptor(bytes: &[u8]) {
    if let Ok(image) = ThinImage::parse(bytes) {
        let again = ThinImage::parse(image.to_json().as_bytes()).expect("what was written is readable");
        assert_eq!(again.layers, image.layers);
        for layer in &image.layers {
            let outside = layer.location.path.split('/').any(|part| matches!(part, "" | "." | ".."));
            assert!(!outside, "{:?} leaves the repository", layer.location);
        }
    }
    let _ = Manifest::parse(None, bytes).map_err(|error| error.to_string());
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = text.parse::<Reference>();
    }
}

fn layer(bytes: &[u8]) {
    let mut reader = LayerReader::new(bytes, Limits::default());
    let mut sum = 0_u64;
    while let Ok(Some(mut entry)) = reader.next_entry() {
        let path = entry.path.as_bytes();
        let outside = path.split(|byte| *byte == b'/').any(|part| part == b"..") || path.starts_with(b"/");
        assert!(!outside, "{path:?} leaves the layer");
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = entry.read(&mut buffer) {
            sum += length as u64;
            // Holes are bytes without bytes in the archive: there may be many.
            if sum > 8 << 20 {
                return;
            }
        }
    }
}
