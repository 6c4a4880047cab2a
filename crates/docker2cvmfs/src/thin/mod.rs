//! The thin image: a configuration, one layer with the descriptor, a manifest.
//!
//! Thin images §5. The configuration is the source's, with everything that engines and
//! people put there; added are `CVMFS_IMAGE=true` in the environment, by which the
//! original's users recognise thin images, and two labels. The image is written
//! directly: going through `docker import` would lose most of the configuration.
//!
//! All bytes follow from the source image and the place of its layers: times are those
//! of the source, the archive's header fields are fixed, and the gzip container stores
//! instead of compressing, so that no other version of a compressor gives other digests.

mod archive;
mod gzip;

pub use archive::write_docker_archive;

use std::collections::BTreeMap;

use layer_tar::{AbsoluteNames, LayerEntryMeta, LayerPath, LayerWriter};
use registry::{Descriptor, Digest, ImageConfig, ImageManifest, Platform, media_type};
use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};
use thin_image::{DESCRIPTOR_NAME, ThinImage, Version};

/// The label that says that an image is thin; its value is the descriptor's version.
pub const THIN_LABEL: &str = "ch.cern.cvmfs.thin";
/// The label with the digest of the manifest that the thin image was made from.
pub const SOURCE_LABEL: &str = "ch.cern.cvmfs.thin.source-digest";
/// The variable by which docker2cvmfs 0.3 marks thin images.
const MARK_VARIABLE: &str = "CVMFS_IMAGE";
/// Build caches name layers of the source; they mean nothing for the thin image.
const BUILD_CACHE_PREFIX: &str = "moby.buildkit.";

/// A complete thin image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThinImageBlobs {
    /// The image configuration.
    pub config: Vec<u8>,
    /// The layer as archive.
    pub layer_tar: Vec<u8>,
    /// The layer as registries keep it.
    pub layer_gzip: Vec<u8>,
    /// The image manifest, Docker schema 2.
    pub manifest: Vec<u8>,
}

impl ThinImageBlobs {
    /// The thin image for a descriptor, with the configuration of the image that it was
    /// made from, whose manifest has the digest `source`.
    pub fn build(descriptor: &ThinImage, config: &ImageConfig, source: &Digest) -> Self {
        let layer_tar = layer(descriptor.to_json().as_bytes());
        let layer_gzip = gzip::stored(&layer_tar);
        let config = configuration(config, source, &Digest::sha256_of(&layer_tar));
        let config = serde_json::to_vec(&Sorted(&config)).expect("a JSON value always has a text");
        let blob = |media_type: &str, bytes: &[u8]| Descriptor {
            media_type: media_type.to_owned(),
            size: bytes.len() as u64,
            digest: Digest::sha256_of(bytes),
            urls: Vec::new(),
        };
        let manifest = ImageManifest {
            media_type: media_type::DOCKER_MANIFEST.to_owned(),
            config: blob(media_type::DOCKER_CONFIG, &config),
            layers: vec![blob(media_type::DOCKER_LAYER_GZIP, &layer_gzip)],
        };
        Self { manifest: manifest.to_docker_json(), config, layer_tar, layer_gzip }
    }
}

impl ThinImageBlobs {
    /// Digest of the manifest.
    pub fn manifest_digest(&self) -> Digest {
        Digest::sha256_of(&self.manifest)
    }
}

/// The thin images of everything that was asked for under one name.
#[derive(Debug, Clone)]
pub struct ThinSet {
    /// The images, at least one, in the order of the source.
    pub images: Vec<(Platform, ThinImageBlobs)>,
    /// Whether they are a choice, even if of one.
    pub is_index: bool,
}

impl ThinSet {
    /// The one image of a set that is no choice, the first otherwise.
    pub(crate) fn only_image(&self) -> &ThinImageBlobs {
        let (_, image) = self.images.first().expect("a set has at least one image");
        image
    }

    /// The index of a choice, a Docker manifest list, which every engine reads.
    pub fn index(&self) -> Option<Vec<u8>> {
        let entry = |(platform, image): &(Platform, ThinImageBlobs)| {
            let descriptor = Descriptor {
                media_type: media_type::DOCKER_MANIFEST.to_owned(),
                size: image.manifest.len() as u64,
                digest: image.manifest_digest(),
                urls: Vec::new(),
            };
            (descriptor, platform.clone())
        };
        let entries: Vec<_> = self.images.iter().map(entry).collect();
        self.is_index.then(|| registry::docker_list(&entries))
    }
}

/// A JSON value that is written with its keys in order, whatever order the map of this
/// build keeps.
struct Sorted<'a>(&'a Value);

impl Serialize for Sorted<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Value::Object(object) => {
                let sorted: BTreeMap<&String, Sorted<'_>> =
                    object.iter().map(|(k, v)| (k, Sorted(v))).collect();
                serializer.collect_map(sorted)
            }
            Value::Array(list) => serializer.collect_seq(list.iter().map(Sorted)),
            other => other.serialize(serializer),
        }
    }
}

/// Whether an image says of itself that it is thin, or stands on a thin one.
pub fn is_marked_thin(config: &ImageConfig) -> bool {
    let config = config.document.get("config");
    let label = config.and_then(|config| config.get("Labels")).and_then(|labels| labels.get(THIN_LABEL));
    let variables = config.and_then(|config| config.get("Env")).and_then(Value::as_array);
    let marked = |variable: &Value| variable.as_str() == Some("CVMFS_IMAGE=true");
    label.is_some() || variables.is_some_and(|variables| variables.iter().any(marked))
}

/// The archive of the thin layer.
fn layer(descriptor: &[u8]) -> Vec<u8> {
    const VALID: &str = "a regular file of some kilobytes in memory can always be archived";
    let path = LayerPath::parse(DESCRIPTOR_NAME.as_bytes(), AbsoluteNames::default());
    let meta = LayerEntryMeta {
        path: path.expect("the descriptor's name is a valid path"),
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: (0, 0),
        xattrs: Vec::new(),
    };
    let mut archive = LayerWriter::new(Vec::new());
    archive.append_file(&meta, descriptor.len() as u64, descriptor).expect(VALID);
    archive.finish().expect(VALID)
}

/// The source's configuration with the parts exchanged that differ.
fn configuration(source: &ImageConfig, source_digest: &Digest, diff_id: &Digest) -> Value {
    let mut document = source.document.as_object().cloned().unwrap_or_default();
    document.retain(|key, _| !key.starts_with(BUILD_CACHE_PREFIX));
    let config = object_at(&mut document, "config");
    mark_environment(config);
    let labels = object_at(config, "Labels");
    labels.insert(THIN_LABEL.to_owned(), Version::SUPPORTED.to_string().into());
    labels.insert(SOURCE_LABEL.to_owned(), source_digest.to_string().into());

    let mut history = Map::new();
    if let Some(created) = document.get("created") {
        history.insert("created".to_owned(), created.clone());
    }
    history.insert("created_by".to_owned(), format!("docker2cvmfs: thin image of {source_digest}").into());
    document.insert("history".to_owned(), json!([history]));
    document.insert("rootfs".to_owned(), json!({"type": "layers", "diff_ids": [diff_id.to_string()]}));
    Value::Object(document)
}

/// The object under a key; absent or `null` becomes an empty one.
fn object_at<'a>(parent: &'a mut Map<String, Value>, key: &str) -> &'a mut Map<String, Value> {
    let value = parent.entry(key).or_insert_with(|| json!({}));
    if !value.is_object() {
        *value = json!({});
    }
    value.as_object_mut().expect("it was just made an object")
}

fn mark_environment(config: &mut Map<String, Value>) {
    let value = config.entry("Env").or_insert_with(|| json!([]));
    let mut variables = value.as_array().cloned().unwrap_or_default();
    let prefix = format!("{MARK_VARIABLE}=");
    variables.retain(|variable| !variable.as_str().is_some_and(|text| text.starts_with(&prefix)));
    variables.push(format!("{prefix}true").into());
    *value = Value::Array(variables);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;

    fn source() -> ImageConfig {
        let diff_ids = [b"1", b"2"].map(|text| Digest::sha256_of(text).to_string());
        let document = json!({
            "architecture": "arm64", "os": "linux", "variant": "v8", "created": "2020-09-13T12:26:40Z",
            "author": "somebody", "moby.buildkit.cache.v0": "AAAA",
            "config": {
                "Env": ["PATH=/bin", "A=with blank and $DOLLAR \"quotes\""], "Entrypoint": ["/bin/sh", "-c"],
                "Cmd": ["echo", "a b"], "User": "1000:7", "WorkingDir": "/w", "Labels": {"x": "y"},
                "ExposedPorts": {"80/tcp": {}}, "Volumes": {"/v": {}}, "StopSignal": "SIGINT",
                "Healthcheck": {"Test": ["CMD", "true"]}, "OnBuild": ["RUN x"], "Shell": ["/bin/bash"],
            },
            "history": [{"created_by": "a"}, {"created_by": "b"}],
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        ImageConfig::parse(document.to_string().as_bytes()).unwrap()
    }

    fn build() -> ThinImageBlobs {
        let descriptor = ThinImage::new(Some("here".into()), vec![]).unwrap();
        ThinImageBlobs::build(&descriptor, &source(), &Digest::sha256_of(b"source"))
    }

    #[test]
    fn the_whole_configuration_is_carried_over() {
        let source = source().document;
        let thin: Value = serde_json::from_slice(&build().config).unwrap();
        for key in ["architecture", "os", "variant", "created", "author"] {
            assert_eq!(thin[key], source[key], "{key}");
        }
        for (key, value) in source["config"].as_object().unwrap() {
            match key.as_str() {
                "Env" => {
                    let variables = thin["config"]["Env"].as_array().unwrap();
                    assert_eq!(variables[..2], value.as_array().unwrap()[..]);
                    assert_eq!(variables[2..], ["CVMFS_IMAGE=true"]);
                }
                "Labels" => assert_eq!(thin["config"]["Labels"]["x"], "y"),
                _ => assert_eq!(&thin["config"][key], value, "{key}"),
            }
        }
        assert!(thin.get("moby.buildkit.cache.v0").is_none());
    }

    #[test]
    fn the_image_says_that_it_is_thin_and_of_what() {
        let blobs = build();
        let thin = ImageConfig::parse(&blobs.config).unwrap();
        let labels = &thin.document["config"]["Labels"];
        assert_eq!(labels[THIN_LABEL], "1.0");
        assert_eq!(labels[SOURCE_LABEL], Digest::sha256_of(b"source").to_string());
        assert!(is_marked_thin(&thin) && !is_marked_thin(&source()));
        assert_eq!(thin.document["history"].as_array().unwrap().len(), 1);
        assert_eq!(thin.diff_ids, [Digest::sha256_of(&blobs.layer_tar)]);
    }

    #[test]
    fn the_layer_holds_the_descriptor_and_nothing_else() {
        let blobs = build();
        let mut unpacked = Vec::new();
        flate2::read::GzDecoder::new(&blobs.layer_gzip[..]).read_to_end(&mut unpacked).unwrap();
        assert_eq!(unpacked, blobs.layer_tar);
        let mut archive = layer_tar::LayerReader::new(&unpacked[..], layer_tar::Limits::default());
        let mut entry = archive.next_entry().unwrap().unwrap();
        let mut text = Vec::new();
        entry.content.read_to_end(&mut text).unwrap();
        assert_eq!(entry.path.as_bytes(), b"thin.json");
        assert_eq!((entry.mode, entry.uid, entry.gid, entry.mtime), (0o644, 0, 0, (0, 0)));
        assert_eq!(ThinImage::parse(&text).unwrap().origin.as_deref(), Some("here"));
        assert!(archive.next_entry().unwrap().is_none());
    }

    #[test]
    fn the_same_source_gives_the_same_bytes_in_every_version() {
        // These digests may change only with a reason that is worth a new digest of
        // every thin image that anybody ever converts again.
        let blobs = build();
        assert_eq!(blobs, build());
        let layer = Digest::sha256_of(&blobs.layer_gzip).to_string();
        assert_eq!(layer, "sha256:8d24f153acc8cb4e7ec7f64c329877fd2d0517c720ae244b471bec91c4d1de32");
        let manifest = Digest::sha256_of(&blobs.manifest).to_string();
        assert_eq!(manifest, "sha256:238ad75d020abe1be2b9c74f08f0cfd396a77460d81d5dd0716fbcb5c7b65371");
    }

    #[test]
    fn a_configuration_without_config_object_gets_one() {
        let bare = ImageConfig::parse(br#"{"os":"linux","config":null,"rootfs":{"diff_ids":[]}}"#).unwrap();
        let descriptor = ThinImage::new(None, vec![]).unwrap();
        let blobs = ThinImageBlobs::build(&descriptor, &bare, &Digest::sha256_of(b""));
        assert!(is_marked_thin(&ImageConfig::parse(&blobs.config).unwrap()));
    }
}
