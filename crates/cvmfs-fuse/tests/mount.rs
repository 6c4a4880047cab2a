//! What a user sees of a mount: the tree, its attributes, its processes, its end.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{Mounted, Prepared, client};

#[test]
fn reads_go_by_passthrough_and_the_second_reader_needs_no_request() {
    let mounted = Mounted::new("basic-sha1", "");
    let path = mounted.mountpoint.join("sizes/rnd100001");
    assert_eq!(fs::read(&path).unwrap().len(), 100_001);
    let state = mounted.status();
    assert_eq!(state["passthrough"], true, "{state}");
    let before = state["requests"].as_u64().unwrap();
    assert_eq!(fs::read(&path).unwrap().len(), 100_001);
    assert_eq!(mounted.status()["requests"].as_u64().unwrap(), before);
}

#[test]
fn nested_catalogs_are_loaded_when_somebody_walks_into_them() {
    let mounted = Mounted::new("basic-sha1", "");
    fs::metadata(mounted.mountpoint.join("software")).unwrap();
    assert_eq!(mounted.status()["catalogs"], 1, "looking at a mount point loads nothing");
    fs::read_dir(mounted.mountpoint.join("software")).unwrap().count();
    assert_eq!(mounted.status()["catalogs"], 2);
}

#[test]
fn writing_is_refused_and_a_missing_name_is_missing() {
    let mounted = Mounted::new("basic-sha1", "");
    let error = fs::write(mounted.mountpoint.join("new"), b"x").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    for _ in 0..2 {
        let error = fs::metadata(mounted.mountpoint.join("no/such")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
    }
}

#[test]
fn hard_links_are_one_inode_with_the_count_of_its_names() {
    let mounted = Mounted::new("hardlinks", "");
    let groups: Vec<_> = mounted.fixture.manifest.iter().filter(|line| line.ino_group.is_some()).collect();
    assert!(!groups.is_empty());
    for line in groups {
        let below =
            |path: &std::ffi::OsStr| mounted.mountpoint.join(Path::new(path).strip_prefix("/").unwrap());
        let (leader, member) = (below(line.ino_group.as_ref().unwrap()), below(&line.path));
        let (leader, member) = (fs::symlink_metadata(leader).unwrap(), fs::symlink_metadata(member).unwrap());
        assert_eq!(leader.ino(), member.ino(), "{:?}", line.path);
    }
}

#[test]
fn the_processes_end_with_the_mount() {
    let mounted = Mounted::new("basic-sha1", "");
    let worker = mounted.status()["pid"].as_u64().unwrap();
    assert!(client(&["umount", mounted.mountpoint.to_str().unwrap()]).status.success());
    let end = Instant::now() + Duration::from_secs(5);
    while fs::exists(format!("/proc/{worker}")).unwrap() {
        assert!(Instant::now() < end, "the worker lives on");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(client(&["status", &mounted.fixture.fqrn]).status.code(), Some(5));
}

#[test]
fn a_second_mount_at_the_same_place_is_refused() {
    let prepared = Prepared::new("basic-sha1");
    assert!(prepared.mount("").status.success());
    let output = prepared.mount("");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("mounted here already"));
}

#[test]
fn a_server_that_is_away_is_named_and_the_exit_code_is_4() {
    let prepared = Prepared::new("basic-sha1");
    let output = prepared.mount("CVMFS_SERVER_URL=http://127.0.0.1:9/nothing,CVMFS_MAX_RETRIES=0");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(4), "{text}");
    assert!(text.contains("127.0.0.1:9"), "{text}");
    assert!(fs::read_dir(&prepared.0.mountpoint).unwrap().next().is_none(), "nothing is mounted");
}

#[test]
fn a_repository_that_was_mounted_before_mounts_again_without_a_server() {
    let prepared = Prepared::new("basic-sha1");
    assert!(prepared.mount("").status.success());
    let content = fs::read(prepared.0.mountpoint.join("sizes/rnd100001")).unwrap();
    assert!(client(&["umount", prepared.0.mountpoint.to_str().unwrap()]).status.success());
    let output = prepared.mount("CVMFS_SERVER_URL=http://127.0.0.1:9/away,CVMFS_MAX_RETRIES=0");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(prepared.0.status()["online"], false);
    assert!(fs::read(prepared.0.mountpoint.join("sizes/rnd100001")).unwrap() == content);
}
