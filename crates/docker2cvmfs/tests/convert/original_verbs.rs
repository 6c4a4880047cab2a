//! The verbs of docker2cvmfs 0.3.

use std::process::Command;

use serde_json::{Value, json};

use crate::workplace::{FQRN, Workplace, image};

fn registry_url(place: &Workplace) -> String {
    format!("http://{}/v2", place.registry.address())
}

#[test]
fn manifest_prints_the_names_of_the_originals_fields_with_one_blank_of_indentation() {
    let place = Workplace::new();
    let image = image();
    place.registry.push("team/app", "1", &image).unwrap();
    let ran = place.run(&["--registry", &registry_url(&place), "manifest", "team/app:1"]);
    let config = image.config_blob();
    let layer = |n: usize| {
        format!(
            "  {{\n   \"MediaType\": \"application/vnd.docker.image.rootfs.diff.tar.gzip\",\n   \"Size\": {},\n   \"Digest\": \"{}\"\n  }}",
            image.layers[n].blob.len(),
            image.layers[n].digest()
        )
    };
    let expected = format!(
        "{{\n \"SchemaVersion\": 2,\n \"MediaType\": \"application/vnd.docker.distribution.manifest.v2+json\",\n \"Config\": {{\n  \"MediaType\": \"application/vnd.docker.container.image.v1+json\",\n  \"Size\": {},\n  \"Digest\": \"{}\"\n }},\n \"Layers\": [\n{},\n{},\n{}\n ]\n}}\n",
        config.len(),
        testkit::image::digest(&config),
        layer(0),
        layer(1),
        layer(2)
    );
    assert_eq!((ran.code, ran.stdout.as_str()), (0, expected.as_str()), "{}", ran.stderr);
    // The registry may also stand in the reference, or behind the verb.
    let full = place.run(&["manifest", &place.registry.reference("team/app", "1")]);
    assert_eq!(full.stdout, expected);
    let behind = place.run(&["manifest", "team/app:1", "--registry", &registry_url(&place)]);
    assert_eq!(behind.stdout, expected);
}

#[test]
fn config_prints_the_blob_as_it_is() {
    let place = Workplace::new();
    let image = image();
    place.registry.push("team/app", "1", &image).unwrap();
    let ran = place.run(&["--registry", &registry_url(&place), "config", "team/app:1"]);
    assert_eq!(ran.stdout.as_bytes(), [image.config_blob().as_slice(), b"\n"].concat());
}

#[test]
fn thin_prints_the_originals_descriptor() {
    let place = Workplace::new();
    let image = image();
    place.registry.push("team/app", "1", &image).unwrap();
    let url = registry_url(&place);
    let ran = place.run(&["--registry", &url, "thin", "team/app:1", "images.cern.ch/layers"]);
    let layers: Vec<String> = image
        .layers
        .iter()
        .map(|layer| {
            let hex = layer.digest().replace("sha256:", "");
            format!(
                "    {{\n      \"digest\": \"{hex}\",\n      \"url\": \"cvmfs://images.cern.ch/layers/{hex}\"\n    }}"
            )
        })
        .collect();
    let expected = format!(
        "{{\n  \"version\": \"1.0\",\n  \"origin\": \"team/app:1@{url}\",\n  \"layers\": [\n{}\n  ]\n}}\n",
        layers.join(",\n")
    );
    assert_eq!(ran.stdout, expected, "{}", ran.stderr);
    assert_eq!(place.run(&["thin", "team/app:1"]).code, 2);
    assert_eq!(place.run(&["--registry", &url, "thin", "team/app:1", "nodot/layers"]).code, 2);
}

#[test]
fn pull_fills_a_directory_as_the_manual_describes() {
    let place = Workplace::new();
    let image = image();
    place.registry.push("cloud/image-name", "latest", &image).unwrap();
    let directory = place.path("layers");
    let url = registry_url(&place);
    let pull =
        || place.run(&["--registry", &url, "pull", "cloud/image-name:latest", directory.to_str().unwrap()]);
    assert_eq!(pull().code, 0);
    for layer in &image.layers {
        let name = format!("{}.tar.gz", layer.digest().replace("sha256:", ""));
        assert_eq!(std::fs::read(directory.join(name)).unwrap(), layer.blob);
    }
    assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 3);
    let blobs = |log: String| log.matches("/v2/cloud/image-name/blobs/").count();
    let before = blobs(place.registry.log_text());
    assert_eq!(pull().code, 0);
    assert_eq!(blobs(place.registry.log_text()), before, "what is there is not fetched again");
}

#[test]
fn pull_publishes_into_a_repository() {
    let place = Workplace::new();
    let image = image();
    place.registry.push("app", "1", &image).unwrap();
    let (storage, keys) = (place.path("storage"), place.path("keys"));
    let ran = place.run(&[
        "pull",
        &place.registry.reference("app", "1"),
        "--repository",
        FQRN,
        "--storage",
        storage.to_str().unwrap(),
        "--keys",
        keys.to_str().unwrap(),
        "--json",
    ]);
    assert_eq!(ran.json()["revision"], 2);
    assert_eq!(place.run(&["pull", "app:1"]).code, 2);
}

#[test]
fn make_thin_loads_the_image_into_the_local_engine() {
    use std::os::unix::fs::PermissionsExt as _;
    let place = Workplace::new();
    place.registry.push("app", "1", &image()).unwrap();
    // A stand-in for the docker program that keeps what it is asked to load.
    let bin = place.path("bin");
    std::fs::create_dir(&bin).unwrap();
    let loaded = place.path("loaded.tar");
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = load ] || exit 0\nwhile [ $# -gt 1 ]; do shift; done\ncp \"$1\" {}\n",
        loaded.display()
    );
    std::fs::write(bin.join("docker"), script).unwrap();
    std::fs::set_permissions(bin.join("docker"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let url = registry_url(&place);
    let mut command = place.command();
    command.env("PATH", path).args([
        "--registry",
        &url,
        "make-thin",
        "-i",
        "app:1",
        "-o",
        "mine/thin_app:7",
        "-r",
        FQRN,
    ]);
    let output = command
        .arg("--storage")
        .arg(place.path("storage"))
        .arg("--keys")
        .arg(place.path("keys"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let file = |name: &str| Command::new("tar").arg("-xOf").arg(&loaded).arg(name).output().unwrap().stdout;
    let manifest: Value = serde_json::from_slice(&file("manifest.json")).unwrap();
    assert_eq!(manifest[0]["RepoTags"], json!(["docker.io/mine/thin_app:7"]));
    let config: Value = serde_json::from_slice(&file(manifest[0]["Config"].as_str().unwrap())).unwrap();
    assert_eq!(config["config"]["Cmd"], json!(["a b", "c"]));
    std::fs::write(place.path("layer.tar"), file(manifest[0]["Layers"][0].as_str().unwrap())).unwrap();
    let thin =
        Command::new("tar").arg("-xOf").arg(place.path("layer.tar")).arg("thin.json").output().unwrap();
    let thin: Value = serde_json::from_slice(&thin.stdout).unwrap();
    assert_eq!(thin["origin"], format!("app:1@{url}"));
}

#[test]
fn version_and_hint_are_printed_like_the_originals() {
    let place = Workplace::new();
    let version = place.run(&["-v"]);
    assert!(
        version.stdout.starts_with(&format!("Version:  {}\nCommit:   ", env!("CARGO_PKG_VERSION"))),
        "{version:?}"
    );
    let hint = place.run(&[]);
    assert_eq!(hint.code, 0);
    assert_eq!(
        hint.stdout,
        "Use `docker2cvmfs help` for a list of supported commands.\nRegistry: \n    https://registry-1.docker.io/v2\n"
    );
    let help = place.run(&["help"]);
    for verb in ["manifest", "config", "thin", "pull", "make-thin", "convert", "loop"] {
        assert!(help.stdout.contains(verb), "{}", help.stdout);
    }
}
