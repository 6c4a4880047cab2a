//! What a user sees of a mount: the tree, its attributes, its processes, its end.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{Mounted, Prepared, client, is_gone, kernel_passes_through, mount_with, signal, wait_until};
use rustix::process::Signal;
use testkit::{Fault, compare, walk_tree};

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
    wait_until("the end of the worker", || is_gone(worker.cast_signed()));
    wait_until("the end of the record", || mounted.find_record().is_none());
    assert!(mounted.status().is_null(), "nothing is listed");
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

#[test]
fn every_profile_shows_the_same_and_tells_its_name_and_reason() {
    for (options, kernel, profile, reason) in [
        ("", None, "passthrough", "passed through"),
        ("CVMFS_FUSE_PROFILE=no_open", None, "no_open", "CVMFS_FUSE_PROFILE"),
        ("CVMFS_FUSE_PROFILE=plain", None, "plain", "CVMFS_FUSE_PROFILE"),
        ("", Some("31"), "no_open", "Linux 6.9"),
        ("CVMFS_MOUNT_RW=yes", Some("31"), "plain", "opens must be seen"),
        ("", Some("22"), "plain", "Linux 3.16"),
    ] {
        if profile == "passthrough" && !kernel_passes_through() {
            continue;
        }
        let mounted = Prepared::new("chunked").0;
        let environment: Vec<_> =
            kernel.map(|minor| ("CVMFS_FUSE_TEST_KERNEL", minor.to_owned())).into_iter().collect();
        let output = mount_with(&mounted, options, &environment);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let state = mounted.status();
        assert_eq!(state["mode"], profile, "{options} {kernel:?}");
        assert!(state["mode_reason"].as_str().unwrap().contains(reason), "{}", state["mode_reason"]);
        for pass in ["cold", "warm"] {
            let found = walk_tree(&mounted.mountpoint);
            let differences = compare(&mounted.fixture.manifest, &found);
            assert!(differences.is_empty(), "{profile} {pass}: {differences:#?}");
        }
        assert_eq!(mounted.status()["io_errors"], 0);
    }
}

#[test]
fn row_64_a_file_a_missing_name_and_another_file_system_are_refused_in_words() {
    let prepared = Prepared::new("basic-sha1");
    let scratch = prepared.0.scratch.path();
    let config = prepared.0.fixture.client_config(&prepared.0.origin.url()).unwrap();
    let refused = |place: &Path| {
        let option = format!("config={}", config.display());
        let output = client(&["mount", &prepared.0.fixture.fqrn, place.to_str().unwrap(), "-o", &option]);
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let file = scratch.join("file");
    fs::write(&file, "").unwrap();
    assert!(refused(&file).contains("not a directory"));
    assert!(refused(&scratch.join("missing")).contains("create the mount point first"));
    assert!(refused(Path::new("/proc")).contains("a proc file system"));
    let dangling = scratch.join("dangling");
    std::os::unix::fs::symlink("nowhere", &dangling).unwrap();
    assert!(refused(&dangling).contains("leads nowhere"));
}

#[test]
fn row_64_a_link_leads_to_its_mount_point_and_away_again() {
    let prepared = Prepared::new("basic-sha1");
    let link = prepared.0.scratch.path().join("link");
    std::os::unix::fs::symlink(&prepared.0.mountpoint, &link).unwrap();
    let config = prepared.0.fixture.client_config(&prepared.0.origin.url()).unwrap();
    let option = format!("config={}", config.display());
    let arguments = ["mount", &prepared.0.fixture.fqrn, link.to_str().unwrap(), "-o", &option];
    assert!(client(&arguments).status.success());
    assert!(prepared.0.mountpoint.join("software").is_dir());
    assert!(client(&["umount", link.to_str().unwrap()]).status.success());
    assert!(!prepared.0.mountpoint.join("software").exists());
}

#[test]
fn row_64_what_is_left_of_a_dead_mount_of_ours_is_replaced() {
    let prepared = Prepared::new("basic-sha1");
    assert!(prepared.mount("").status.success());
    let supervisor = prepared.0.record()["supervisor_pid"].as_i64().unwrap();
    let worker = prepared.0.status()["pid"].as_i64().unwrap();
    signal(supervisor, Signal::KILL);
    signal(worker, Signal::KILL);
    wait_until("the end", || is_gone(supervisor) && is_gone(worker));
    let error = fs::read_dir(&prepared.0.mountpoint).unwrap_err();
    // The second one while the kernel takes the connection down.
    assert!(matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED)), "{error}");
    let output = prepared.mount("");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(prepared.0.mountpoint.join("software").is_dir());
}

#[test]
fn row_65_a_mount_in_use_names_its_users_and_goes_lazily() {
    let mounted = Mounted::new("basic-sha1", "");
    let place = mounted.mountpoint.to_str().unwrap();
    let mut held = fs::File::open(mounted.mountpoint.join("sizes/rnd100001")).unwrap();
    let output = client(&["umount", place]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains(&std::process::id().to_string()) && text.contains("--lazy"), "{text}");
    assert!(mounted.mountpoint.join("software").is_dir(), "it is still mounted");
    let supervisor = mounted.record()["supervisor_pid"].as_i64().unwrap();
    assert!(client(&["umount", "--lazy", place]).status.success());
    assert!(!mounted.mountpoint.join("software").exists());
    let mut content = Vec::new();
    std::io::Read::read_to_end(&mut held, &mut content).unwrap();
    assert_eq!(content.len(), 100_001, "the open file can still be read");
    drop(held);
    wait_until("the end of the processes", || is_gone(supervisor));
}

/// A `cat` of a file whose object never arrives.
fn stuck_reader(mounted: &Mounted) -> std::process::Child {
    mounted.origin.set_fault("*/data/*", Fault::Hang);
    let reader = std::process::Command::new("cat")
        .arg(mounted.mountpoint.join("sizes/rnd100001"))
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    wait_until("a request that waits", || mounted.status()["waiting"] == 1);
    reader
}

#[test]
fn row_66_a_reader_that_is_killed_or_interrupted_during_a_download_is_gone_at_once() {
    for (profile, how) in [
        ("passthrough", Signal::KILL),
        // Not INT, which a test started in the background of a shell ignores with all its children.
        ("passthrough", Signal::TERM),
        ("no_open", Signal::KILL),
        ("plain", Signal::TERM),
    ] {
        let mounted =
            Mounted::new("basic-sha1", &format!("CVMFS_FUSE_PROFILE={profile},CVMFS_TIMEOUT_DIRECT=60"));
        fs::metadata(mounted.mountpoint.join("sizes/rnd100001")).unwrap();
        let mut reader = stuck_reader(&mounted);
        signal(i64::from(reader.id()), how);
        let began = Instant::now();
        reader.wait().unwrap();
        // Its deadline is half a minute away, so this tells "at once" from "when it was over".
        assert!(began.elapsed() < Duration::from_secs(15), "{profile} {how:?}: {:?}", began.elapsed());
        let state = mounted.status();
        assert_eq!(state["io_errors"], 0, "{profile} {how:?}");
        if profile == "passthrough" {
            // The others wait for a page that the kernel reads for all of them.
            assert_eq!(state["interrupted"], 1, "{how:?}");
            wait_until("nobody waits", || mounted.status()["waiting"] == 0);
            assert_eq!(mounted.status()["open_files"], 0);
        }
        mounted.origin.clear_faults();
    }
}

#[test]
fn row_66_a_signal_that_ends_nothing_leaves_the_reader_alone() {
    let mounted = Mounted::new("basic-sha1", "CVMFS_TIMEOUT_DIRECT=60");
    fs::metadata(mounted.mountpoint.join("sizes/rnd100001")).unwrap();
    let mut reader = stuck_reader(&mounted);
    for harmless in [Signal::CHILD, Signal::URG, Signal::WINCH] {
        signal(i64::from(reader.id()), harmless);
    }
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(mounted.status()["waiting"], 1, "it waits on");
    // The first signal used the kernel's only message up; this one is seen nevertheless.
    signal(i64::from(reader.id()), Signal::KILL);
    reader.wait().unwrap();
    assert_eq!(mounted.status()["interrupted"], 1);
}

#[test]
fn row_67_nodes_are_not_counted_so_forgetting_them_leaves_nothing_behind() {
    let mounted = Mounted::new("basic-sha1", "CVMFS_KCACHE_TIMEOUT=0");
    let walk = || {
        for _ in 0..4 {
            let found = walk_tree(&mounted.mountpoint);
            assert_eq!(found.len(), mounted.fixture.manifest.len());
        }
        // The kernel forgets what nobody uses: a flood of FORGET.
        fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
    };
    walk();
    let before = mounted.status();
    walk();
    walk();
    wait_until("a flood of forgets", || {
        mounted.status()["calls"]["forget"]["count"].as_u64().unwrap_or(0) > 0
    });
    let after = mounted.status();
    let grown = after["memory"].as_u64().unwrap().saturating_sub(before["memory"].as_u64().unwrap());
    assert!(grown < 16 << 20, "{grown} bytes more");
    assert_eq!(after["open_files"], 0);
    assert_eq!(after["io_errors"], 0);
}

#[test]
fn statfs_tells_of_cache_and_repository_and_of_names() {
    let mounted = Mounted::new("basic-sha1", "CVMFS_QUOTA_LIMIT=1000");
    let numbers = rustix::fs::statvfs(&mounted.mountpoint).unwrap();
    assert_eq!((numbers.f_bsize, numbers.f_namemax), (512, 255));
    assert!(numbers.f_blocks * 512 <= 1000 << 20 && numbers.f_blocks > 0);
    assert!(numbers.f_bfree <= numbers.f_blocks);
    assert!(numbers.f_files > 400 && numbers.f_ffree < numbers.f_files);
}

#[test]
fn owners_are_mapped_and_an_unreadable_map_fails_the_mount() {
    let prepared = Prepared::new("basic-sha1");
    let map = prepared.0.scratch.path().join("uids");
    fs::write(&map, "# everybody\n* 4711\n").unwrap();
    let options = format!("CVMFS_UID_MAP={},CVMFS_WORLD_READABLE=yes", map.display());
    assert!(prepared.mount(&options).status.success());
    let metadata = fs::metadata(prepared.0.mountpoint.join("software")).unwrap();
    assert_eq!((metadata.uid(), metadata.mode() & 0o555), (4711, 0o555));
    assert!(client(&["umount", prepared.0.mountpoint.to_str().unwrap()]).status.success());
    fs::write(&map, "what?\n").unwrap();
    let output = prepared.mount(&options);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("line 1"), "{output:?}");
}

fn xattr(path: &Path, name: &str) -> Result<String, i32> {
    let mut value = vec![0; 1 << 16];
    let length =
        rustix::fs::lgetxattr(path, name, &mut value[..]).map_err(rustix::io::Errno::raw_os_error)?;
    value.truncate(length);
    Ok(String::from_utf8(value).unwrap())
}

#[test]
fn every_magic_attribute_has_a_value_and_the_root_lists_them() {
    let mounted = Mounted::new("basic-sha1", "CVMFS_MAGIC_XATTRS_VISIBILITY=rootonly");
    let mut names = vec![0; 1 << 16];
    let length = rustix::fs::llistxattr(&mounted.mountpoint, &mut names[..]).unwrap();
    let names: Vec<_> = names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()).collect();
    assert!(names.len() > 30, "{}", names.len());
    for name in names {
        let name = std::str::from_utf8(name).unwrap();
        xattr(&mounted.mountpoint, name).unwrap_or_else(|errno| panic!("{name}: {errno}"));
    }
    let file = mounted.mountpoint.join("sizes/rnd100001");
    let mut none = vec![0; 1 << 16];
    assert_eq!(rustix::fs::llistxattr(&file, &mut none[..]).unwrap(), 0, "only the root lists them");
    assert_eq!(xattr(&file, "user.lhash").unwrap(), "Not in cache");
    let content = fs::read(&file).unwrap();
    let local = xattr(&file, "user.lhash").unwrap();
    assert_eq!(local.len(), 40);
    assert_ne!(local, xattr(&file, "user.hash").unwrap(), "that is of the compressed bytes");
    assert_eq!(content.len(), 100_001);
    assert_eq!(xattr(&file, "user.chunks").unwrap(), "1");
    assert_eq!(xattr(&file, "user.chunk_list~?").unwrap(), "num_pages, 1");
    assert_eq!(xattr(&file, "user.rawlink"), Err(libc::ENODATA), "not a link");
    assert_eq!(xattr(&mounted.mountpoint, "user.fqrn").unwrap(), mounted.fixture.fqrn);
    assert_eq!(xattr(&mounted.mountpoint, "user.proxy").unwrap(), "DIRECT");
    assert_eq!(xattr(&mounted.mountpoint, "user.host_list").unwrap(), mounted.origin.url());
    assert!(xattr(&mounted.mountpoint, "user.pubkeys").unwrap().contains("PUBLIC KEY"));
}

#[test]
fn a_protected_attribute_is_for_privileged_groups() {
    let mounted = Mounted::new("basic-sha1", "CVMFS_XATTR_PROTECTED_XATTRS=user.host");
    assert!(xattr(&mounted.mountpoint, "user.host").is_ok(), "group 0 is privileged");
    let as_group = |name: &str| {
        let script = "import os,sys; os.setgroups([0]); os.setgid(12345); print(os.getxattr(sys.argv[1], sys.argv[2]).decode())";
        std::process::Command::new("python3")
            .args(["-c", script, mounted.mountpoint.to_str().unwrap(), name])
            .output()
            .unwrap()
    };
    assert!(as_group("user.fqrn").status.success());
    let denied = as_group("user.host");
    assert!(String::from_utf8_lossy(&denied.stderr).contains("No data"), "{denied:?}");
}
