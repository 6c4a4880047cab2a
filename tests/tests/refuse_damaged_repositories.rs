//! A repository that cannot be trusted is refused; one that is damaged in a place fails in that place only.
//! The message says why.

#![allow(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

mod common;

use std::time::{Duration, Instant};

use common::{assert_same, assert_says};
use testkit::{Fixture, Mount, MountBuilder, Origin, compare, walk_tree};

/// A refused mount answers within this time, also when servers are asked again.
const PATIENCE: Duration = Duration::from_secs(30);

/// Exit code of the command line for everything about trust.
const TRUST: i32 = 3;

#[track_caller]
fn is_refused(name: &str, code: Option<i32>, words: &[&str]) {
    let fixture = Fixture::unpack(name).unwrap();
    let origin = Origin::serve(&fixture.storage).unwrap();
    let config = fixture.client_config(&origin.url()).unwrap();
    let started = Instant::now();
    let (mount, finished) = MountBuilder::new(&fixture.fqrn, &config).attempt().unwrap();
    assert!(started.elapsed() < PATIENCE, "it took {:?}", started.elapsed());
    assert!(!finished.status.success(), "mounted: {}", finished.output());
    if let Some(code) = code {
        assert_eq!(finished.code(), Some(code), "{}", finished.output());
    }
    assert_says(&finished.stderr, &[&fixture.fqrn]);
    for word in words {
        assert_says(&finished.stderr, &[word]);
    }
    assert!(!mount.is_mounted(), "something stayed mounted");
}

#[test]
fn an_expired_whitelist_is_refused() {
    is_refused("bad-expired-whitelist", Some(TRUST), &["whitelist", "expired"]);
}

#[test]
fn a_repository_of_another_name_is_refused() {
    is_refused("bad-fqrn", Some(TRUST), &["basic-sha1.peer.example.org"]);
}

#[test]
fn a_manifest_that_was_changed_after_signing_is_refused() {
    is_refused("bad-manifest-sig", Some(TRUST), &["manifest"]);
}

#[test]
fn a_certificate_that_is_not_whitelisted_is_refused() {
    is_refused("bad-whitelist-fingerprint", Some(TRUST), &["whitelist", "certificate"]);
}

#[test]
fn a_whitelist_that_was_changed_after_signing_is_refused() {
    is_refused("bad-whitelist-sig", Some(TRUST), &["whitelist"]);
}

#[test]
fn a_repository_signed_by_another_master_key_is_refused() {
    is_refused("bad-wrong-key", Some(TRUST), &["whitelist", "key"]);
}

#[test]
fn a_truncated_root_catalog_is_refused() {
    is_refused("bad-root-truncated", None, &["2233871e28825674bf24c917048879250a52eb92"]);
}

/// Mounts a damaged copy of basic-sha1 and returns how it differs from the undamaged ground truth.
fn differences(name: &str) -> (Vec<String>, Mount, Fixture, Origin) {
    let truth = Fixture::unpack("basic-sha1").unwrap().manifest;
    let fixture = Fixture::unpack(name).unwrap();
    let origin = Origin::serve(&fixture.storage).unwrap();
    let config = fixture.client_config(&origin.url()).unwrap();
    let mount = MountBuilder::new(&fixture.fqrn, &config)
        .option("cvmfs_suid")
        .environment("PEER_ARCH", "x86_64-el9")
        .environment("PEER_VER", "v1.0")
        .mount()
        .unwrap();
    let differences = compare(&truth, &walk_tree(mount.path()));
    (differences, mount, fixture, origin)
}

#[track_caller]
fn only_one_file_fails(name: &str) {
    let (mut differences, mount, _fixture, _origin) = differences(name);
    assert!(
        differences
            .iter()
            .any(|line| line.starts_with("/sizes/rnd100001: error:") && line.contains("Input/output")),
        "{differences:?}"
    );
    differences.retain(|line| !line.starts_with("/sizes/rnd100001: "));
    assert_same(&differences);
    let status = mount.status().unwrap();
    assert!(status["io_errors"].as_u64().unwrap() > 0);
    // Whoever is called for it finds file, object and error in one place.
    let told = status["errors"][0].as_str().unwrap();
    for word in ["/sizes/rnd100001", "3d72c5e9f9eada6d4a607a4b304a1e7f4b1d0f6e", "EIO"] {
        assert!(told.contains(word), "no {word} in {told}");
    }
    assert_says(&mount.log_text(), &["3d72c5e9f9eada6d4a607a4b304a1e7f4b1d0f6e"]);
}

#[test]
fn a_flipped_byte_makes_one_file_unreadable_and_no_other() {
    only_one_file_fails("bad-object-flip");
}

#[test]
fn a_missing_object_makes_one_file_unreadable_and_no_other() {
    only_one_file_fails("bad-object-missing");
}

#[test]
fn a_truncated_object_makes_one_file_unreadable_and_no_other() {
    only_one_file_fails("bad-object-truncated");
}

#[test]
fn a_missing_nested_catalog_closes_its_directory_and_no_other() {
    let (mut differences, mount, _fixture, _origin) = differences("bad-nested-missing");
    assert!(differences.iter().any(|line| line.starts_with("/software")), "{differences:?}");
    assert!(mount.path().join("software").symlink_metadata().is_ok(), "its stat still works");
    let listed = std::fs::read_dir(mount.path().join("software"));
    let error = listed.and_then(|entries| entries.collect::<Result<Vec<_>, _>>()).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    differences.retain(|line| !line.starts_with("/software"));
    assert_same(&differences);
    assert_says(&mount.log_text(), &["5759f795e69aa181b9491ca2a12f6b47d6b3e9ea"]);
}

#[test]
fn a_server_that_is_not_there_is_named_and_the_mount_fails_in_time() {
    let fixture = Fixture::unpack("basic-sha1").unwrap();
    let origin = Origin::serve(&fixture.storage).unwrap();
    let url = origin.url();
    drop(origin);
    let config = fixture.client_config(&url).unwrap();
    let started = Instant::now();
    let (mount, finished) = MountBuilder::new(&fixture.fqrn, &config).attempt().unwrap();
    assert!(started.elapsed() < PATIENCE);
    assert_eq!(finished.code(), Some(4), "{}", finished.output());
    assert_says(&finished.stderr, &[url.trim_start_matches("http://")]);
    assert!(!mount.is_mounted());
}
