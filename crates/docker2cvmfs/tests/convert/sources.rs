//! Images that are not in a registry, and images for several platforms.

use std::process::Command;

use serde_json::{Value, json};
use testkit::Image;
use testkit::image::{MANIFEST_TYPE, digest};
use testkit::tar::TarBuilder;

use crate::workplace::{Workplace, image};

fn copy(from: &str, to: &str) {
    let flags = ["copy", "-q", "--src-tls-verify=false", "--dest-tls-verify=false"];
    let output = Command::new("skopeo").args(flags).args([from, to]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn states(report: &Value) -> Vec<&str> {
    let layers = report["layers"].as_array().unwrap();
    layers.iter().map(|layer| layer["state"].as_str().unwrap()).collect()
}

/// The repository's tree below a layer, by the independent reader, without what differs between publications.
fn tree(place: &Workplace, layer: &Value) -> Vec<Value> {
    let prefix = layer["path"].as_str().unwrap();
    let below = |entry: &Value| {
        let mut entry = entry.clone();
        let path = entry["path"].as_str().unwrap().strip_prefix(prefix)?.to_owned();
        if ["", "/.cvmfscatalog"].contains(&path.as_str()) {
            // Made by the conversion.
            entry["mtime_ns"] = Value::Null;
        }
        entry["path"] = path.into();
        Some(entry)
    };
    place.published().iter().filter_map(below).collect()
}

#[test]
fn a_directory_in_oci_layout_gives_what_the_registry_gives() {
    let place = Workplace::new();
    place.registry.push("team/app", "1", &image()).unwrap();
    let from_registry = place.registry.reference("team/app", "1");
    let directory = place.path("layout");
    let oci = format!("oci:{}:team/app:1", directory.display());
    copy(&format!("docker://{from_registry}"), &oci);
    let report = place.convert(&oci, &[]).json();
    assert_eq!(states(&report), ["new", "new", "new"]);
    assert_eq!(report["image"], oci);
    // The blobs are the same, so nothing is left for the registry's image.
    let again = place.convert(&from_registry, &[]).json();
    assert_eq!(states(&again), ["present", "present", "present"]);
    place.assert_consistent();
    place.assert_spool_is_empty();
    // One image alone needs no name, and the other verbs read it as well.
    let unnamed = format!("oci:{}", directory.display());
    let config = |image: &str| place.run(&["config", image]).json()["config"].clone();
    assert_eq!(config(&unnamed), config(&from_registry));
    let pulled = place.path("pulled");
    let ran = place.run(&["pull", &unnamed, pulled.to_str().unwrap()]);
    assert_eq!(ran.stdout.lines().count(), 3, "{}", ran.stderr);
}

#[test]
fn an_archive_of_docker_save_gives_the_same_trees_compressed_or_not() {
    let place = Workplace::new();
    let image = image();
    place.registry.push("team/app", "1", &image).unwrap();
    let engine = testkit::Dockerd::builder().start().unwrap();
    let name = place.registry.reference("team/app", "1");
    engine.docker(&["pull", &name]).unwrap();
    let file = place.path("saved.tar");
    engine.docker(&["save", "--output", file.to_str().unwrap(), &name]).unwrap();
    let id = engine.docker(&["inspect", "--format", "{{.Id}}", &name]).unwrap();

    let archive = format!("docker-archive:{}", file.display());
    let target = place.registry.reference("thin", "1");
    let report = place.convert(&archive, &["--output", &target]).json();
    assert_eq!(report["digest"], id.trim(), "the image is known by its id");
    assert_eq!(states(&report), ["new", "new", "new"]);
    let diff_ids: Vec<String> = image.layers.iter().map(|layer| digest(&layer.tar)).collect();
    let reported: Vec<&Value> = report["layers"].as_array().unwrap().iter().map(|l| &l["digest"]).collect();
    assert_eq!(reported, diff_ids.iter().collect::<Vec<_>>());
    let from_registry = place.convert(&name, &[]).json();
    for index in 0..3 {
        assert_eq!(tree(&place, &report["layers"][index]), tree(&place, &from_registry["layers"][index]));
    }

    let gzip = Command::new("gzip").arg("--keep").arg(&file).status().unwrap();
    assert!(gzip.success());
    let compressed = format!("docker-archive:{}.gz", file.display());
    let again = place.convert(&compressed, &[]).json();
    assert_eq!((states(&again), &again["digest"]), (vec!["present"; 3], &report["digest"]));
    // The archive's own name makes the thin image's.
    let thin = place.path("thin.tar");
    let named = format!("{archive}:{name}");
    place.convert(&named, &["--output-archive", thin.to_str().unwrap()]).json();
    assert_eq!(place.convert(&archive, &["--output-archive", thin.to_str().unwrap()]).code, 2);
    place.assert_spool_is_empty();
}

#[test]
fn of_several_images_in_one_archive_one_has_to_be_named() {
    let place = Workplace::new();
    place.registry.push("a", "1", &image()).unwrap();
    let other = Image::new([TarBuilder::new().file("other", 0o644, b"o").finish()]);
    place.registry.push("b", "1", &other).unwrap();
    let engine = testkit::Dockerd::builder().start().unwrap();
    let names = [place.registry.reference("a", "1"), place.registry.reference("b", "1")];
    for name in &names {
        engine.docker(&["pull", name]).unwrap();
    }
    let file = place.path("both.tar");
    engine.docker(&["save", "--output", file.to_str().unwrap(), &names[0], &names[1]]).unwrap();
    let archive = format!("docker-archive:{}", file.display());
    let refused = place.convert(&archive, &[]);
    assert_eq!(refused.code, 1);
    assert!(names.iter().all(|name| refused.stderr.contains(name)), "{}", refused.stderr);
    let report = place.convert(&format!("{archive}:{}", names[1]), &[]).json();
    assert_eq!(report["layers"].as_array().unwrap().len(), 1);
    // So has one of several in a layout.
    let directory = place.path("layout");
    for (number, name) in names.iter().enumerate() {
        copy(&format!("docker://{name}"), &format!("oci:{}:image{number}", directory.display()));
    }
    let oci = format!("oci:{}", directory.display());
    let refused = place.convert(&oci, &[]);
    assert!(refused.stderr.contains("image0, image1"), "{}", refused.stderr);
    place.convert(&format!("{oci}:image1"), &[]).json();
}

#[test]
fn damaged_and_missing_local_sources_are_refused_by_name() {
    let place = Workplace::new();
    place.registry.push("app", "1", &image()).unwrap();
    let directory = place.path("layout");
    copy(
        &format!("docker://{}", place.registry.reference("app", "1")),
        &format!("oci:{}", directory.display()),
    );
    let oci = format!("oci:{}", directory.display());
    let blob = |digest: &str| directory.join("blobs/sha256").join(digest.trim_start_matches("sha256:"));
    let layer = image().layers[0].digest();
    let before = place.published_paths();
    let whole = std::fs::read(blob(&layer)).unwrap();
    let refused = |place: &Workplace, code: i32, words: &[&str]| {
        let ran = place.convert(&oci, &[]);
        assert_eq!(ran.code, code, "{}", ran.stderr);
        assert!(words.iter().all(|word| ran.stderr.contains(word)), "{}", ran.stderr);
        assert_eq!(place.published_paths(), before);
    };
    let mut damaged = whole.clone();
    let last = damaged.len() - 5;
    damaged[last] ^= 1;
    std::fs::write(blob(&layer), &damaged).unwrap();
    refused(&place, 1, &[&layer, "layout"]);
    std::fs::write(blob(&layer), &whole[..whole.len() / 2]).unwrap();
    refused(&place, 1, &[&layer, "layout"]);
    std::fs::remove_file(blob(&layer)).unwrap();
    refused(&place, 5, &[&layer, "layout"]);
    // A link that leads out of the archive is no member.
    let evil = place.path("evil.tar");
    let manifest = json!([{"Config": "c.json", "RepoTags": null, "Layers": ["l.tar"]}]).to_string();
    let tar = TarBuilder::new().file("manifest.json", 0o644, manifest.as_bytes());
    std::fs::write(&evil, tar.symlink("c.json", "../../../etc/passwd").finish()).unwrap();
    let ran = place.convert(&format!("docker-archive:{}", evil.display()), &[]);
    assert_eq!(ran.code, 5, "{}", ran.stderr);
    assert!(ran.stderr.contains("c.json"), "{}", ran.stderr);
    for missing in ["docker-archive:/no/such.tar", "oci:/no/such"] {
        let ran = place.convert(missing, &[]);
        assert_eq!(ran.code, 5, "{}", ran.stderr);
        assert!(ran.stderr.contains("/no/such"), "{}", ran.stderr);
    }
    std::fs::write(&evil, b"no archive at all").unwrap();
    assert_eq!(place.convert(&format!("docker-archive:{}", evil.display()), &[]).code, 1);
    place.assert_spool_is_empty();
}

/// An index of two platforms that share a layer, with an attestation.
fn push_index(place: &Workplace, name: &str) -> (String, [Image; 2]) {
    let shared = TarBuilder::new().file("shared", 0o644, b"for all").finish();
    let own = |text: &str| TarBuilder::new().file("arch", 0o644, text.as_bytes()).finish();
    let images = [Image::new([shared.clone(), own("amd64")]), Image::new([shared, own("arm")])];
    let platforms = [
        json!({"os": "linux", "architecture": "amd64"}),
        json!({"os": "linux", "architecture": "arm", "variant": "v7"}),
    ];
    let mut entries = Vec::new();
    for (image, platform) in images.iter().zip(platforms) {
        // The configuration says what the testkit runs on; only the index knows of the other platform.
        let digest = place.registry.push(name, "part", image).unwrap();
        entries.push(json!({
            "mediaType": MANIFEST_TYPE, "size": image.manifest().len(), "digest": digest, "platform": platform,
        }));
    }
    let mut attestation = entries[0].clone();
    attestation["platform"] = json!({"os": "unknown", "architecture": "unknown"});
    attestation["annotations"] = json!({"vnd.docker.reference.type": "attestation-manifest"});
    entries.push(attestation);
    let kind = "application/vnd.oci.image.index.v1+json";
    let index = json!({"schemaVersion": 2, "mediaType": kind, "manifests": entries}).to_string();
    (place.registry.push_manifest(name, "1", kind, index.as_bytes()).unwrap(), images)
}

#[test]
fn all_platforms_go_into_one_revision_and_one_thin_index() {
    let place = Workplace::new();
    let (index, images) = push_index(&place, "multi");
    let (source, target) = (place.registry.reference("multi", "1"), place.registry.reference("thin", "1"));
    let before = place.revision();
    let report = place.convert(&source, &["--platform", "all", "--output", &target]).json();
    assert_eq!(report["digest"], index);
    assert_eq!(report["revision"], before + 1);
    assert_eq!(states(&report), ["new"; 3], "the shared layer is listed once: {report}");
    let platforms: Vec<&Value> =
        report["images"].as_array().unwrap().iter().map(|image| &image["platform"]).collect();
    assert_eq!(platforms, ["linux/amd64", "linux/arm/v7"]);

    let raw = |reference: &str| {
        let arguments = ["inspect", "--raw", "--tls-verify=false"];
        let output =
            Command::new("skopeo").args(arguments).arg(format!("docker://{reference}")).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    let thin: Value = serde_json::from_slice(&raw(&target)).unwrap();
    let entries = thin["manifests"].as_array().unwrap();
    assert_eq!(entries.len(), 2);
    for ((entry, image), source_entry) in
        entries.iter().zip(&images).zip(report["images"].as_array().unwrap())
    {
        let by_digest =
            format!("docker://{}@{}", target.trim_end_matches(":1"), entry["digest"].as_str().unwrap());
        let arguments = ["inspect", "--config", "--tls-verify=false"];
        let output = Command::new("skopeo").args(arguments).arg(&by_digest).output().unwrap();
        let config: Value = serde_json::from_slice(&output.stdout).unwrap();
        let bound = &config["config"]["Labels"]["ch.cern.cvmfs.thin.source-digest"];
        assert_eq!(bound, &source_entry["digest"]);
        let own = image.layers[1].digest().replace("sha256:", "");
        assert!(place.published_paths().contains(&format!("/layers/{own}/arch")));
    }
    assert_eq!(entries[1]["platform"], json!({"architecture": "arm", "os": "linux", "variant": "v7"}));
    // An engine takes the one for its machine.
    let inspected = Command::new("skopeo")
        .args(["inspect", "--override-arch", "arm", "--override-variant", "v7", "--tls-verify=false"])
        .arg(format!("docker://{target}"))
        .output()
        .unwrap();
    assert!(inspected.status.success(), "{}", String::from_utf8_lossy(&inspected.stderr));

    // Again: nothing new, and the same bytes.
    let first = raw(&target);
    let again = place.convert(&source, &["--platform", "all", "--output", &target]).json();
    assert_eq!((states(&again), &again["revision"]), (vec!["present"; 3], &report["revision"]));
    assert_eq!(raw(&target), first);
    // One file holds one image.
    let file = place.path("thin.tar");
    let refused = place.convert(&source, &["--platform", "all", "--output-archive", file.to_str().unwrap()]);
    assert_eq!(refused.code, 2, "{}", refused.stderr);
    assert!(refused.stderr.contains("2 platforms"), "{}", refused.stderr);
}

#[test]
fn all_platforms_of_an_image_that_stands_alone_is_that_image() {
    let place = Workplace::new();
    let digest = place.registry.push("app", "1", &image()).unwrap();
    let target = place.registry.reference("thin", "1");
    let source = place.registry.reference("app", "1");
    let report = place.convert(&source, &["--platform", "all", "--output", &target]).json();
    assert_eq!(report["digest"], digest);
    assert!(report.get("images").is_none(), "{report}");
    assert!(place.registry.manifest("thin", "1").unwrap()["layers"].is_array());
}

#[test]
fn a_mirror_that_serves_something_else_costs_a_second_download_and_nothing_more() {
    let place = Workplace::new();
    let image = image();
    place.registry.push("app", "1", &image).unwrap();
    let mirror = testkit::Registry::start().unwrap();
    mirror.push("app", "1", &image).unwrap();
    let file = mirror.blob_file(&image.layers[0].digest());
    let mut damaged = std::fs::read(&file).unwrap();
    *damaged.last_mut().unwrap() ^= 1;
    std::fs::write(&file, damaged).unwrap();
    let source = place.registry.reference("app", "1");
    let option = format!("{}=http://{}", place.registry.address(), mirror.address());
    let report = place.convert(&source, &["--mirror", &option]).json();
    assert_eq!(states(&report), ["new"; 3]);
    place.assert_consistent();
    let layers = |log: &str, index: usize| {
        let blob = format!("GET /v2/app/blobs/{}", image.layers[index].digest());
        log.matches(&blob).count()
    };
    let (asked, of_mirror) = (place.registry.log_text(), mirror.log_text());
    assert_eq!([layers(&asked, 0), layers(&asked, 1)], [1, 0], "only what the mirror has wrong");
    assert!(layers(&of_mirror, 1) >= 1);
    place.assert_spool_is_empty();
}
