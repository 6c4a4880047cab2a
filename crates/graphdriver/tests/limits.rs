//! Limits on the size of containers, by project quotas.
//!
//! Those marked as ignored need a file system that has them; `cargo xtask kernel` runs them on Debian's kernel.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod common;

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::Path;

use common::Host;
use overlay::quota::ProjectQuotas;
use serde_json::json;
use testkit::tar::TarBuilder;

const MIB: usize = 1 << 20;

fn host(options: &[&str]) -> Host {
    let host = Host::start();
    host.call("Init", json!({"Home": host.home(), "Opts": options}));
    host.add_layer("image", "", &TarBuilder::new().file("f", 0o644, &vec![7; 3 * MIB]).finish());
    host
}

fn create(host: &Host, container: &str, size: Option<&str>) {
    let options = size.map_or(json!(null), |size| json!({"size": size}));
    let init = format!("{container}-init");
    host.call("CreateReadWrite", json!({"ID": init, "Parent": "image", "StorageOpt": options}));
    host.call("CreateReadWrite", json!({"ID": container, "Parent": init, "StorageOpt": options}));
}

/// How many MiB can be written into a new file, at most `most`.
fn room(tree: &Path, most: usize) -> usize {
    let mut file = fs::File::create(tree.join("new")).unwrap();
    for written in 0..most {
        match file.write_all(&vec![1; MIB]).and_then(|()| file.sync_data()) {
            Ok(()) => {}
            Err(error) if matches!(error.kind(), ErrorKind::QuotaExceeded | ErrorKind::StorageFull) => {
                return written;
            }
            Err(error) => panic!("{error}"),
        }
    }
    most
}

#[test]
fn without_project_quotas_a_limit_is_refused_with_the_reason_and_leaves_nothing() {
    // A tmpfs has none.
    let host = Host::start();
    let home = host.directory.path().join("tmpfs");
    fs::create_dir(&home).unwrap();
    rustix::mount::mount("none", &home, "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
    let refused = host.failing_call("Init", json!({"Home": home, "Opts": ["overlay2.size=10M"]}));
    assert!(refused.contains("has no project quotas; mount it with prjquota"), "{refused}");
    host.call("Init", json!({"Home": home, "Opts": null}));
    host.add_layer("image", "", &TarBuilder::new().file("f", 0o644, b"x").finish());
    let limited = json!({"ID": "c", "Parent": "image", "StorageOpt": {"size": "10M"}});
    let refused = host.failing_call("CreateReadWrite", limited);
    assert!(refused.contains("the size of a container cannot be limited"), "{refused}");
    let refused =
        host.failing_call("Create", json!({"ID": "i", "Parent": "", "StorageOpt": {"size": "10M"}}));
    assert!(refused.contains("for containers only"), "{refused}");
    let left: Vec<_> = fs::read_dir(&home).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| name == "l" || name == "image" || name == "cvmfs"), "{left:?}");
    host.call("CreateReadWrite", json!({"ID": "c", "Parent": "image", "StorageOpt": {}}));
    testkit::mounts::unmount_below(&home);
}

#[test]
#[ignore = "needs a file system with project quotas: cargo xtask kernel"]
fn a_container_writes_as_much_as_its_limit_allows_and_others_are_not_concerned() {
    let host = host(&[]);
    create(&host, "limited", Some("10M"));
    create(&host, "larger", Some("20m"));
    create(&host, "free", None);
    let (limited, larger, free) = (host.get("limited"), host.get("larger"), host.get("free"));
    assert!((8..=10).contains(&room(&limited, 64)), "a limit of 10 MiB");
    assert!((18..=20).contains(&room(&larger, 64)), "a limit of 20 MiB");
    assert_eq!(room(&free, 64), 64);
    let shown = rustix::fs::statvfs(&limited).unwrap();
    assert_eq!(shown.f_blocks * shown.f_frsize, 10 * MIB as u64, "df shows the limit");
    // What is deleted makes room; what lies below costs nothing until it is changed.
    fs::remove_file(limited.join("new")).unwrap();
    fs::OpenOptions::new().append(true).open(limited.join("f")).unwrap().write_all(b"changed").unwrap();
    assert!((5..=7).contains(&room(&limited, 64)), "the copy of 3 MiB counts");
    fs::remove_file(limited.join("new")).unwrap();
    fs::rename(limited.join("f"), limited.join("g")).unwrap();
    ["limited", "larger", "free"].iter().for_each(|id| host.put(id));
}

#[test]
#[ignore = "needs a file system with project quotas: cargo xtask kernel"]
fn a_default_limit_holds_for_containers_that_ask_for_no_other_and_never_for_images() {
    let mut host = host(&["overlay2.size=10M"]);
    create(&host, "default", None);
    create(&host, "own", Some("20M"));
    let tree = host.get("default");
    let filled = room(&tree, 64);
    assert!((8..=10).contains(&filled), "{filled}");
    assert!((18..=20).contains(&room(&host.get("own"), 64)));
    host.add_layer("large", "image", &TarBuilder::new().file("l", 0o644, &vec![1; 30 * MIB]).finish());
    let rows = host.call("Status", json!({}));
    assert!(rows.to_string().contains("10 MiB (overlay2.size)"), "{rows}");

    // Limits outlive the plugin, and numbers of projects are used again.
    host.restart();
    assert_eq!(room(&tree, 64), filled);
    let quotas = ProjectQuotas::of(&host.home()).unwrap();
    let project = |id: &str| quotas.project_of(&host.home().join(id).join("diff")).unwrap();
    let (first, second) = (project("default-init"), project("default"));
    assert_eq!(quotas.limit_of(second), Some(10 * MIB as u64));
    ["default", "own"].iter().for_each(|id| host.put(id));
    for id in ["default", "default-init"] {
        host.remove(id);
    }
    assert_eq!([first, second].map(|project| quotas.limit_of(project)), [None, None]);
    host.restart();
    create(&host, "next", None);
    let project = |id: &str| quotas.project_of(&host.home().join(id).join("diff")).unwrap();
    assert_eq!((project("next-init"), project("next")), (first, second));
    assert!((8..=10).contains(&room(&host.get("next"), 64)));
    host.put("next");
}

#[test]
#[ignore = "needs a file system that counts projects and enforces nothing: cargo xtask kernel"]
fn quotas_that_only_count_are_no_limits() {
    let host = Host::start();
    let refused = host.failing_call("Init", json!({"Home": host.home(), "Opts": ["overlay2.size=10M"]}));
    assert!(refused.contains("has no project quotas") && refused.contains("not enforced"), "{refused}");
}
