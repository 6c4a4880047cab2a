//! `docker2cvmfs convert`: an image from a registry becomes layers in a repository and a thin image.

#![allow(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

mod common;

use std::process::Command;
use std::time::{Duration, Instant};

use common::assert_says;
use serde_json::{Value, json};
use testkit::image::Layer;
use testkit::process::{Finished, run};
use testkit::published::run_binary;
use testkit::tar::TarBuilder;
use testkit::{Fault, Image, MountBuilder, Origin, Published, Registry};

/// A failing conversion says so within this time.
const PATIENCE: Duration = Duration::from_secs(30);

fn two_layers() -> Image {
    let base =
        TarBuilder::new().directory("etc", 0o755).file("etc/a", 0o644, b"a").file("etc/b", 0o644, b"b");
    let top =
        TarBuilder::new().directory("etc", 0o755).file("etc/.wh.b", 0o644, b"").file("etc/c", 0o644, b"c");
    Image::new([base.finish(), top.finish()]).config(json!({
        "Env": ["PATH=/bin", "GREETING=hello world $HOME \"quoted\""],
        "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["echo hi"], "WorkingDir": "/etc", "User": "1000:1000",
        "Labels": {"org.example.label": "kept"}, "ExposedPorts": {"80/tcp": {}}, "Volumes": {"/data": {}},
        "StopSignal": "SIGINT",
    }))
}

/// The descriptor and the configuration of a docker-archive.
fn unpack_thin(archive: &std::path::Path) -> (Value, Value) {
    let member = |archive: &std::path::Path, name: &str| {
        let mut tar = Command::new("tar");
        tar.arg("-xOf").arg(archive).arg(name);
        run(tar, Duration::from_secs(10)).unwrap().success().unwrap()
    };
    let manifest: Value = serde_json::from_str(&member(archive, "manifest.json")).unwrap();
    let config = serde_json::from_str(&member(archive, manifest[0]["Config"].as_str().unwrap())).unwrap();
    let layer = manifest[0]["Layers"][0].as_str().unwrap();
    assert_eq!(manifest[0]["Layers"].as_array().unwrap().len(), 1, "{manifest}");
    let directory = testkit::ScratchDir::new("thin").unwrap();
    let mut tar = Command::new("tar");
    tar.arg("-xf").arg(archive).arg("-C").arg(directory.path()).arg(layer);
    run(tar, Duration::from_secs(10)).unwrap().success().unwrap();
    let descriptor = member(&directory.path().join(layer), "thin.json");
    (serde_json::from_str(&descriptor).unwrap(), config)
}

#[test]
fn the_thin_image_lists_the_layers_and_keeps_the_whole_configuration() {
    let registry = Registry::start().unwrap();
    let image = two_layers();
    registry.push("test/app", "1", &image).unwrap();
    let repository = Published::create("images.example.org").unwrap();
    let archive = repository.scratch().join("thin.tar");
    let reference = registry.reference("test/app", "1");
    let options = ["--output-archive", archive.to_str().unwrap()];
    let report = repository.convert(&reference, &options).unwrap();

    let layers = report["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 2);
    assert!(layers.iter().all(|layer| layer["state"] == "new"), "{report}");
    assert!(report["bytes_downloaded"].as_u64().unwrap() > 0, "{report}");

    let (descriptor, config) = unpack_thin(&archive);
    let urls: Vec<_> = descriptor["layers"].as_array().unwrap().iter().map(|layer| &layer["url"]).collect();
    let mount = MountBuilder::new(&repository.fqrn, &repository.client_config().unwrap()).mount().unwrap();
    let layer = |index: usize| {
        let url: &str = urls[index].as_str().unwrap();
        mount.path().join(url.strip_prefix("cvmfs://images.example.org/").unwrap())
    };
    assert_eq!(std::fs::read(layer(0).join("etc/b")).unwrap(), b"b", "the base comes first");
    assert_eq!(std::fs::read(layer(1).join("etc/c")).unwrap(), b"c");
    let digest = descriptor["layers"][0]["digest"].as_str().unwrap();
    assert_eq!(format!("sha256:{digest}"), image.layers[0].digest());

    let mut kept = config["config"].clone();
    let env = kept["Env"].as_array_mut().unwrap();
    env.retain(|variable| variable != "CVMFS_IMAGE=true");
    let labels = kept["Labels"].as_object_mut().unwrap();
    labels.retain(|name, _| name == "org.example.label");
    for (name, value) in image.config.as_object().unwrap() {
        assert_eq!(&kept[name], value, "{name}");
    }
}

#[test]
fn layers_that_are_there_already_are_not_fetched_again() {
    let registry = Registry::start().unwrap();
    let image = two_layers();
    registry.push("test/app", "1", &image).unwrap();
    let more = TarBuilder::new().file("more", 0o644, b"more").finish();
    registry.push("test/app", "2", &image.layer(more)).unwrap();
    let repository = Published::create("again.example.org").unwrap();
    repository
        .convert(&registry.reference("test/app", "1"), &["--output", &registry.reference("thin/app", "1")])
        .unwrap();
    let report = repository
        .convert(&registry.reference("test/app", "2"), &["--output", &registry.reference("thin/app", "2")])
        .unwrap();
    let states: Vec<_> = report["layers"].as_array().unwrap().iter().map(|layer| &layer["state"]).collect();
    assert_eq!(states, ["present", "present", "new"], "{report}");
    assert_eq!(registry.manifest("thin/app", "2").unwrap()["layers"].as_array().unwrap().len(), 1);
}

/// Converts an image that is broken on purpose; the repository must stay as it was.
#[track_caller]
fn fails(registry: &Registry, reference: &str, code: Option<i32>, words: &[&str]) -> Finished {
    let repository = Published::create("faults.example.org").unwrap();
    let before = std::fs::read(repository.storage.join(".cvmfspublished")).unwrap();
    let output = registry.reference("thin/broken", "1");
    let started = Instant::now();
    let finished = repository.convert_output(reference, &["--output", &output]).unwrap();
    assert!(started.elapsed() < PATIENCE, "it took {:?}", started.elapsed());
    assert!(!finished.status.success(), "converted: {}", finished.output());
    if let Some(code) = code {
        assert_eq!(finished.code(), Some(code), "{}", finished.output());
    }
    for word in words {
        assert_says(&finished.stderr, &[word]);
    }
    assert_eq!(std::fs::read(repository.storage.join(".cvmfspublished")).unwrap(), before);
    assert!(registry.manifest("thin/broken", "1").is_err(), "a thin image was pushed");
    repository.publish("check", &[]).unwrap().success().unwrap();
    finished
}

#[test]
fn a_layer_with_a_wrong_digest_is_refused() {
    let registry = Registry::start().unwrap();
    let image = two_layers();
    registry.push("test/app", "1", &image).unwrap();
    let digest = image.layers[1].digest();
    let mut other = Layer::new(TarBuilder::new().file("evil", 0o644, b"evil").finish()).blob;
    other.resize(image.layers[1].blob.len(), 0);
    std::fs::write(registry.blob_file(&digest), other).unwrap();
    fails(&registry, &registry.reference("test/app", "1"), None, &[&digest]);
}

#[test]
fn a_layer_whose_gzip_stream_is_cut_is_refused() {
    let registry = Registry::start().unwrap();
    let mut image = two_layers();
    let cut = image.layers[1].blob.len() / 2;
    image.layers[1].blob.truncate(cut);
    registry.push("test/app", "1", &image).unwrap();
    fails(&registry, &registry.reference("test/app", "1"), None, &[&image.layers[1].digest()]);
}

#[test]
fn a_layer_that_leaves_its_directory_is_refused() {
    let registry = Registry::start().unwrap();
    let image = Image::new([TarBuilder::new().file("../../escape", 0o644, b"x").finish()]);
    registry.push("test/app", "1", &image).unwrap();
    fails(&registry, &registry.reference("test/app", "1"), None, &["../../escape"]);
}

#[test]
fn an_image_that_the_registry_does_not_have_is_not_found() {
    let registry = Registry::start().unwrap();
    fails(&registry, &registry.reference("test/nothing", "1"), Some(5), &["test/nothing"]);
}

#[test]
fn a_registry_that_answers_500_is_named() {
    let registry = Registry::start().unwrap();
    let empty = testkit::ScratchDir::new("broken-registry").unwrap();
    let broken = Origin::serve(empty.path()).unwrap();
    broken.set_fault("*", Fault::Status(500));
    let address = broken.url().trim_start_matches("http://").to_owned();
    fails(&registry, &format!("{address}/test/app:1"), Some(4), &[&address, "500"]);
}

#[test]
fn the_verbs_of_the_original_tool_print_what_it_printed() {
    let registry = Registry::start().unwrap();
    let image = two_layers();
    registry.push("test/app", "1", &image).unwrap();
    let url = format!("http://{}/v2", registry.address());
    let verb = |arguments: &[&str]| {
        let mut all = vec!["--registry", &url];
        all.extend(arguments);
        run_binary("docker2cvmfs", &all).unwrap().success().unwrap()
    };
    // With the names of the original's structures, indented by one blank.
    let text = verb(&["manifest", "test/app:1"]);
    assert!(text.starts_with("{\n \"SchemaVersion\": 2"), "{text}");
    let manifest: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(manifest["Layers"][1]["Digest"], image.layers[1].digest().as_str(), "{manifest}");
    let config: Value = serde_json::from_str(&verb(&["config", "test/app:1"])).unwrap();
    assert_eq!(config["config"], image.config);
    let thin: Value =
        serde_json::from_str(&verb(&["thin", "test/app:1", "images.example.org/layers"])).unwrap();
    let digest = image.layers[0].digest().trim_start_matches("sha256:").to_owned();
    assert_eq!(thin["layers"][0]["url"], format!("cvmfs://images.example.org/layers/{digest}").as_str());
    assert_eq!(thin["version"], "1.0");
}
