//! Images that a policy accepts or refuses.

use std::process::Command;

use base64::Engine as _;
use serde_json::{Value, json};
use testkit::Image;
use testkit::image::{MANIFEST_TYPE, digest};
use testkit::tar::TarBuilder;

use crate::workplace::{Workplace, image};

fn openssl(place: &Workplace, arguments: &[&str]) -> Vec<u8> {
    let output =
        Command::new("openssl").current_dir(place.directory.path()).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// A pair of keys `NAME.key` and `NAME.pub`.
fn make_keys(place: &Workplace, name: &str, algorithm: &[&str]) {
    let (key, public) = (format!("{name}.key"), format!("{name}.pub"));
    let mut arguments = vec!["genpkey", "-out", &key];
    arguments.extend(algorithm);
    openssl(place, &arguments);
    openssl(place, &["pkey", "-in", &key, "-pubout", "-out", &public]);
}

const P256: [&str; 4] = ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"];

/// Signs a digest as cosign does, with openssl, and pushes the signature beside the image.
fn sign(place: &Workplace, key: &str, name: &str, signed: &str, stored_for: &str, identity: &str) {
    let statement = json!({
        "critical": {"identity": {"docker-reference": identity}, "image": {"docker-manifest-digest": signed},
                     "type": "cosign container image signature"},
        "optional": null,
    })
    .to_string();
    std::fs::write(place.path("statement"), &statement).unwrap();
    let key = format!("{key}.key");
    let is_edwards = String::from_utf8_lossy(&openssl(place, &["pkey", "-in", &key, "-noout", "-text"]))
        .contains("ED25519");
    let signature = if is_edwards {
        openssl(place, &["pkeyutl", "-sign", "-inkey", &key, "-rawin", "-in", "statement"])
    } else {
        openssl(place, &["dgst", "-sha256", "-sign", &key, "statement"])
    };
    let signature = base64::engine::general_purpose::STANDARD.encode(signature);
    let blob = place.registry.push_blob(name, statement.as_bytes()).unwrap();
    let config =
        b"{\"architecture\":\"\",\"os\":\"\",\"config\":{},\"rootfs\":{\"type\":\"layers\",\"diff_ids\":[]}}";
    let config_digest = place.registry.push_blob(name, config).unwrap();
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let artifact = json!({
        "schemaVersion": 2, "mediaType": kind,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "size": config.len(), "digest": config_digest},
        "layers": [{
            "mediaType": "application/vnd.dev.cosign.simplesigning.v1+json", "size": statement.len(), "digest": blob,
            "annotations": {"dev.cosignproject.cosign/signature": signature},
        }],
    })
    .to_string();
    let tag = format!("{}.sig", stored_for.replace(':', "-"));
    place.registry.push_manifest(name, &tag, kind, artifact.as_bytes()).unwrap();
}

fn policy(place: &Workplace, requirement: &Value) -> String {
    let scope = format!("{}/team", place.registry.address());
    let policy = json!({"default": [{"type": "reject"}], "transports": {"docker": {scope: [requirement]}}});
    let file = place.path("policy.json");
    std::fs::write(&file, policy.to_string()).unwrap();
    file.to_str().unwrap().to_owned()
}

fn signed_by(place: &Workplace, key: &str) -> Value {
    json!({"type": "sigstoreSigned", "keyPath": place.path(&format!("{key}.pub")),
           "signedIdentity": {"type": "matchRepository"}})
}

#[test]
fn only_what_the_key_signed_is_published() {
    let place = Workplace::new();
    make_keys(&place, "ours", &P256);
    make_keys(&place, "theirs", &P256);
    let push = |tag: &str| {
        let layer = TarBuilder::new().file("tag", 0o644, tag.as_bytes()).finish();
        place.registry.push("team/app", tag, &image().layer(layer)).unwrap()
    };
    let name = format!("{}/team/app", place.registry.address());
    let signed = push("signed");
    sign(&place, "ours", "team/app", &signed, &signed, &name);
    let foreign = push("foreign");
    sign(&place, "theirs", "team/app", &foreign, &foreign, &name);
    // A true signature of another image, put beside this one.
    let moved = push("moved");
    sign(&place, "ours", "team/app", &signed, &moved, &name);
    let renamed = push("renamed");
    sign(&place, "ours", "team/app", &renamed, &renamed, "elsewhere.example.org/team/app");
    push("bare");

    let policy = policy(&place, &signed_by(&place, "ours"));
    let before = place.published_paths();
    let convert = |tag: &str| {
        place.convert(
            &place.registry.reference("team/app", tag),
            &["--policy", &policy, "--log-level", "info"],
        )
    };
    for (tag, reason) in [
        ("foreign", "none of the 1 signatures"),
        ("moved", "is one of sha256:"),
        ("renamed", "elsewhere.example.org"),
        ("bare", "no signature"),
    ] {
        let ran = convert(tag);
        assert_eq!(ran.code, 3, "{tag}: {}", ran.stderr);
        assert!(ran.stderr.contains(reason) && ran.stderr.contains(tag), "{tag}: {}", ran.stderr);
    }
    let other = place.convert(&place.registry.reference("other", "1"), &["--policy", &policy]);
    assert_ne!(other.code, 0);
    assert_eq!(place.published_paths(), before, "nothing was published");
    let directory = place.path("pulled");
    let bare = place.registry.reference("team/app", "bare");
    let pulled = place.run(&["pull", &bare, directory.to_str().unwrap(), "--policy", &policy]);
    assert_eq!(pulled.code, 3, "{}", pulled.stderr);
    assert!(!directory.exists(), "nothing was fetched");
    let report = convert("signed").json();
    assert_eq!(report["digest"], signed);
    place.assert_consistent();
}

#[test]
fn keys_of_all_kinds_verify() {
    let place = Workplace::new();
    let digest = place.registry.push("team/app", "1", &image()).unwrap();
    let name = format!("{}/team/app", place.registry.address());
    let reference = place.registry.reference("team/app", "1");
    for (kind, algorithm) in [
        ("rsa", vec!["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"]),
        ("ed25519", vec!["-algorithm", "ED25519"]),
        ("p256", P256.to_vec()),
    ] {
        make_keys(&place, kind, &algorithm);
        let policy = policy(&place, &signed_by(&place, kind));
        let refused = place.convert(&reference, &["--policy", &policy, "--dry-run"]);
        assert_eq!(refused.code, 3, "{kind}: {}", refused.stderr);
        sign(&place, kind, "team/app", &digest, &digest, &name);
        place.convert(&reference, &["--policy", &policy, "--dry-run"]).json();
    }
}

#[test]
fn a_digest_can_be_required() {
    let place = Workplace::new();
    let known = place.registry.push("team/app", "1", &image()).unwrap();
    let allowed = policy(&place, &json!({"type": "digest", "digests": [known]}));
    let reference = place.registry.reference("team/app", "1");
    place.convert(&reference, &["--policy", &allowed]).json();
    place.registry.push("team/app", "1", &Image::new([TarBuilder::new().finish()])).unwrap();
    let ran = place.convert(&reference, &["--policy", &allowed]);
    assert_eq!(ran.code, 3, "{}", ran.stderr);
    assert!(ran.stderr.contains("not among those that are allowed"), "{}", ran.stderr);
}

#[test]
fn the_signature_of_an_index_counts_for_its_images() {
    let place = Workplace::new();
    make_keys(&place, "ours", &P256);
    let part = place.registry.push("team/app", "part", &image()).unwrap();
    let kind = "application/vnd.oci.image.index.v1+json";
    let index = json!({"schemaVersion": 2, "mediaType": kind, "manifests": [{
        "mediaType": MANIFEST_TYPE, "size": image().manifest().len(), "digest": part,
        "platform": {"os": "linux", "architecture": "amd64"},
    }]})
    .to_string();
    let signed = place.registry.push_manifest("team/app", "1", kind, index.as_bytes()).unwrap();
    assert_eq!(signed, digest(index.as_bytes()));
    let reference = place.registry.reference("team/app", "1");
    let policy = policy(&place, &signed_by(&place, "ours"));
    for platform in ["linux/amd64", "all"] {
        let ran = place.convert(&reference, &["--policy", &policy, "--platform", platform, "--dry-run"]);
        assert_eq!(ran.code, 3, "{}", ran.stderr);
    }
    let name = format!("{}/team/app", place.registry.address());
    sign(&place, "ours", "team/app", &signed, &signed, &name);
    for platform in ["linux/amd64", "all"] {
        place.convert(&reference, &["--policy", &policy, "--platform", platform]).json();
    }
}

#[test]
fn a_policy_that_cannot_be_used_is_wrong_usage() {
    let place = Workplace::new();
    let reference = place.registry.reference("team/app", "1");
    let file = place.path("policy.json");
    let with = |text: &str| {
        std::fs::write(&file, text).unwrap();
        place.convert(&reference, &["--policy", file.to_str().unwrap()])
    };
    for (text, reason) in [
        ("{", "policy.json"),
        (r#"{"default":[{"type":"signedBy","keyType":"GPGKeys"}]}"#, "signedBy"),
        (r#"{"default":[{"type":"sigstoreSigned","keyPath":"/no/such.pub"}]}"#, "/no/such.pub"),
    ] {
        let ran = with(text);
        assert_eq!(ran.code, 2, "{}", ran.stderr);
        assert!(ran.stderr.contains(reason), "{}", ran.stderr);
    }
    assert_eq!(place.convert(&reference, &["--policy", "/no/policy.json"]).code, 2);
}
