//! Repositories written by the C++ tools, mounted with `cvmfs-client mount`, show what the C++ client shows:
//! every line of the ground truth is met.

#![allow(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

mod common;

use common::assert_same;
use testkit::{Fixture, Mount, MountBuilder, Origin, compare, walk_tree};

/// The option and the variables with which the ground truth was recorded; variant symbolic links show them.
fn mount(fixture: &Fixture, origin: &Origin) -> Mount {
    MountBuilder::new(&fixture.fqrn, &fixture.client_config(&origin.url()).unwrap())
        .option("cvmfs_suid")
        .environment("PEER_ARCH", "x86_64-el9")
        .environment("PEER_VER", "v1.0")
        .mount()
        .unwrap()
}

#[track_caller]
fn meets_its_ground_truth(name: &str) {
    let fixture = Fixture::unpack(name).unwrap();
    assert!(!fixture.manifest.is_empty(), "{name} has no ground truth");
    let origin = Origin::serve(&fixture.storage).unwrap();
    let mount = mount(&fixture, &origin);
    assert_same(&compare(&fixture.manifest, &walk_tree(mount.path())));
    mount.unmount().unwrap();
    assert!(!mount.is_mounted());
}

#[test]
fn basic_sha1_meets_its_ground_truth() {
    meets_its_ground_truth("basic-sha1");
}

#[test]
fn shake128_meets_its_ground_truth() {
    meets_its_ground_truth("shake128");
}

#[test]
fn nocompress_meets_its_ground_truth() {
    meets_its_ground_truth("nocompress");
}

#[test]
fn chunked_meets_its_ground_truth() {
    meets_its_ground_truth("chunked");
}

#[test]
fn chunked_shake128_none_meets_its_ground_truth() {
    meets_its_ground_truth("chunked-shake128-none");
}

#[test]
fn hardlinks_meets_its_ground_truth() {
    meets_its_ground_truth("hardlinks");
}

#[test]
fn special_meets_its_ground_truth() {
    meets_its_ground_truth("special");
}

#[test]
fn xattrs_meets_its_ground_truth() {
    meets_its_ground_truth("xattrs");
}

#[test]
fn ingested_layers_meets_its_ground_truth() {
    meets_its_ground_truth("ingested-layers");
}

#[test]
fn volatile_meets_its_ground_truth() {
    meets_its_ground_truth("volatile");
}

#[test]
fn history_gc_meets_its_ground_truth() {
    meets_its_ground_truth("history-gc");
}

/// The C++ publisher has stored an entry without a name there, at which the C++ client fails; we show the rest.
#[test]
fn ingest_corner_meets_its_ground_truth_but_for_a_directory_with_a_nameless_entry() {
    let fixture = Fixture::unpack("ingest-corner").unwrap();
    let origin = Origin::serve(&fixture.storage).unwrap();
    let mount = mount(&fixture, &origin);
    let differences = compare(&fixture.manifest, &walk_tree(mount.path()));
    assert_eq!(differences, ["/doubleslash/d: error: expected \"Input/output error\", found nothing"]);
}

#[test]
fn history_meets_its_ground_truth_at_each_tag() {
    let fixture = Fixture::unpack("history").unwrap();
    let origin = Origin::serve(&fixture.storage).unwrap();
    let config = fixture.client_config(&origin.url()).unwrap();
    for (tag, truth) in [
        ("v1", "manifest-v1.jsonl"),
        ("v2", "manifest-v2.jsonl"),
        ("v3", "manifest-v3.jsonl"),
        ("trunk", "manifest.jsonl"),
    ] {
        let file = std::fs::File::open(fixture.root().join(truth)).unwrap();
        let mount = MountBuilder::new(&fixture.fqrn, &config)
            .option("cvmfs_suid")
            .option(&format!("CVMFS_REPOSITORY_TAG={tag}"))
            .environment("PEER_ARCH", "x86_64-el9")
            .environment("PEER_VER", "v1.0")
            .mount()
            .unwrap();
        assert_same(&compare(&testkit::tree::read_manifest(file).unwrap(), &walk_tree(mount.path())));
    }
}

#[test]
fn external_meets_its_ground_truth() {
    let fixture = Fixture::unpack("external").unwrap();
    let origin = Origin::serve(&fixture.storage).unwrap();
    let external = Origin::serve(fixture.storage.join("ext")).unwrap();
    let config = fixture.client_config(&origin.url()).unwrap();
    let mut text = std::fs::read_to_string(&config).unwrap();
    text.push_str(&format!("CVMFS_EXTERNAL_URL={}\nCVMFS_EXTERNAL_HTTP_PROXY=DIRECT\n", external.url()));
    std::fs::write(&config, text).unwrap();
    let mount = MountBuilder::new(&fixture.fqrn, &config)
        .option("cvmfs_suid")
        .environment("PEER_ARCH", "x86_64-el9")
        .environment("PEER_VER", "v1.0")
        .mount()
        .unwrap();
    assert_same(&compare(&fixture.manifest, &walk_tree(mount.path())));
    assert!(!external.requests().is_empty(), "the second server was asked");
    // Catalogs and documents end with the letter of their kind. The file of the first revision is not external.
    let requests = origin.requests();
    let is_file =
        |path: &str| path.contains("/data/") && !path.ends_with(|last: char| last.is_ascii_uppercase());
    let files = requests.iter().filter(|request| is_file(&request.path)).count();
    assert!(files <= 1, "{files} files came from the first server");
}

#[test]
fn what_was_read_once_is_read_again_from_the_cache_when_the_server_is_away() {
    let fixture = Fixture::unpack("basic-sha1").unwrap();
    let origin = Origin::serve(&fixture.storage).unwrap();
    let mount = mount(&fixture, &origin);
    assert_same(&compare(&fixture.manifest, &walk_tree(mount.path())));
    let requests = origin.requests().len();
    drop(origin);
    assert_same(&compare(&fixture.manifest, &walk_tree(mount.path())));
    let status = mount.status().unwrap();
    assert_eq!(status["fqrn"], fixture.fqrn.as_str());
    assert!(status["requests"].as_u64().unwrap() <= requests as u64 + 8, "{status}");
    assert!(status["bytes_fetched"].as_u64().unwrap() > 0, "{status}");
}

#[test]
fn many_objects_come_over_few_connections_and_none_comes_twice() {
    let fixture = Fixture::unpack("basic-sha1").unwrap();
    let origin = Origin::serve(&fixture.storage).unwrap();
    let mount = mount(&fixture, &origin);
    walk_tree(mount.path());
    let requests = origin.requests();
    let mut objects: Vec<_> = requests
        .iter()
        .filter(|request| request.path.contains("/data/"))
        .map(|request| &request.path)
        .collect();
    let all = objects.len();
    objects.sort();
    objects.dedup();
    assert!(all > 50, "{all} objects only");
    assert_eq!(objects.len(), all, "an object was fetched twice");
    assert!(origin.connections() <= 16, "{} connections for {all} objects", origin.connections());
}
