//! Restarts, crashes and calls in any order: what is mounted, counted and left on disk.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::{Connection, Host};
use serde_json::json;
use testkit::ScratchDir;
use testkit::tar::TarBuilder;

fn host_with_container() -> Host {
    let host = Host::initialised();
    host.add_layer("image", "", &TarBuilder::new().file("f", 0o644, b"x").finish());
    host.create_container("c", "image");
    host
}

#[test]
fn each_put_gives_back_one_reference_and_one_too_many_is_fine() {
    let host = host_with_container();
    let merged = host.home().join("c/merged");
    for _ in 0..3 {
        assert_eq!(host.get("c"), merged);
    }
    host.put("c");
    host.put("c");
    assert_eq!(host.mounted(), std::slice::from_ref(&merged));
    host.put("c");
    assert!(host.mounted().is_empty() && !merged.exists());
    host.put("c");
    host.put("never-heard-of");
    host.get("c");
    host.put("c");
    assert!(host.mounted().is_empty());
}

#[test]
fn the_pair_that_an_engine_sends_after_live_restore_does_not_unmount_the_running_container() {
    let mut host = host_with_container();
    host.get("c");
    host.restart();
    host.init();
    host.get("c");
    host.put("c");
    assert_eq!(host.mounted().len(), 1);
    host.put("c");
    assert!(host.mounted().is_empty());
}

#[test]
fn a_second_init_in_the_same_process_counts_what_is_mounted_anew() {
    let host = host_with_container();
    host.get("c");
    // The engine is killed in the middle of a copy, its successor knows of the container only.
    host.get("c");
    host.init();
    host.put("c");
    assert!(host.mounted().is_empty());
}

#[test]
fn a_put_after_a_crash_of_engine_and_plugin_unmounts() {
    let mut host = host_with_container();
    host.get("c");
    host.restart();
    host.put("c");
    assert!(host.mounted().is_empty());
}

#[test]
fn a_lost_mount_is_made_again() {
    let host = host_with_container();
    let tree = host.get("c");
    testkit::mounts::unmount_below(&host.home());
    assert!(host.mounted().is_empty());
    assert_eq!(fs::read(host.get("c").join("f")).unwrap(), b"x");
    host.put("c");
    assert_eq!(host.mounted(), [tree], "one reference is left");
    host.put("c");
    assert!(host.mounted().is_empty());
}

#[test]
fn clean_up_unmounts_everything() {
    let host = host_with_container();
    host.create_container("d", "image");
    host.get("c");
    host.get("d");
    host.call("Cleanup", json!({}));
    assert!(host.mounted().is_empty());
    host.get("c");
    host.put("c");
    assert!(host.mounted().is_empty());
}

#[test]
fn removing_a_mounted_layer_unmounts_it_and_removing_a_missing_one_succeeds() {
    let host = host_with_container();
    host.get("c");
    host.remove("c");
    host.remove("c");
    host.remove("c-init");
    assert!(host.mounted().is_empty());
    assert_eq!(fs::read_dir(host.home().join("l")).unwrap().count(), 1, "the image's link");
    host.create_container("c", "image");
}

#[test]
fn an_image_layer_is_writable_until_another_layer_is_created_on_it() {
    let host = Host::initialised();
    host.create("base", "");
    fs::write(host.get("base").join("written-by-a-build-step"), "1").unwrap();
    host.create("step", "base");
    let tree = host.get("step");
    fs::write(tree.join("step"), "2").unwrap();
    host.put("step");
    host.create("next", "step");
    let tree = host.get("step");
    assert_eq!(fs::read(tree.join("written-by-a-build-step")).unwrap(), b"1");
    assert_eq!(fs::write(tree.join("x"), "3").unwrap_err().raw_os_error(), Some(READ_ONLY));
    assert_eq!(fs::read(host.get("next").join("step")).unwrap(), b"2");
    host.put("next");
    host.put("step");
}

#[test]
fn a_home_behind_a_link_and_on_a_mount_of_its_own_works_like_any_other() {
    let host = Host::start();
    let real = host.directory.path().join("disk");
    fs::create_dir(&real).unwrap();
    rustix::mount::mount_bind(&real, &real).unwrap();
    symlink(&real, host.directory.path().join("link")).unwrap();
    let home = host.directory.path().join("link/home");
    host.call("Init", json!({"Home": home}));
    host.add_layer("image", "", &TarBuilder::new().file("d/f", 0o644, b"x").finish());
    host.create_container("c", "image");
    let tree = host.get("c");
    assert!(tree.starts_with(&home), "as the engine named it: {}", tree.display());
    assert_eq!(fs::read(tree.join("d/f")).unwrap(), b"x");
    assert_eq!(host.get("c"), tree);
    host.put("c");
    assert_eq!(testkit::mounts::below(&real).len(), 2, "one reference is left");
    for id in ["c", "c-init", "image"] {
        host.remove(id);
    }
    assert_eq!(fs::read_dir(home.join("l")).unwrap().count(), 0);
    assert_eq!(testkit::mounts::below(&real).len(), 1, "the disk itself");
    rustix::mount::unmount(&real, rustix::mount::UnmountFlags::DETACH).unwrap();
}

#[test]
fn a_file_system_that_somebody_mounted_in_a_layer_is_not_emptied_by_removing_the_layer() {
    let host = host_with_container();
    let precious = host.directory.path().join("precious");
    fs::create_dir(&precious).unwrap();
    fs::write(precious.join("file"), "kept").unwrap();
    let place = host.home().join("c/diff/place");
    fs::create_dir(&place).unwrap();
    rustix::mount::mount_bind(&precious, &place).unwrap();
    assert!(host.failing_call("Remove", json!({"ID": "c"})).contains("place"));
    assert_eq!(fs::read(precious.join("file")).unwrap(), b"kept");
    let moved = host.home().join(".removing-c/diff/place");
    rustix::mount::unmount(&moved, rustix::mount::UnmountFlags::DETACH).unwrap();
    host.remove("c");
    assert!(!host.home().join(".removing-c").exists());
    assert_eq!(fs::read(precious.join("file")).unwrap(), b"kept");
}

/// EROFS.
const READ_ONLY: i32 = 30;

#[test]
fn what_a_killed_process_left_half_done_is_gone_after_the_start() {
    let mut host = host_with_container();
    host.stop();
    let home = host.home();
    let name = "A".repeat(26);
    for (left, file) in [(".creating-x", "link"), (".removing-y", "thin")] {
        fs::create_dir_all(home.join(left).join("diff/some")).unwrap();
        fs::write(home.join(left).join(file), &name).unwrap();
        symlink("../x/diff", home.join("l").join(&name)).unwrap();
        host.restart();
        host.init();
        assert!(!home.join(left).exists());
        assert!(fs::symlink_metadata(home.join("l").join(&name)).is_err());
    }
    host.get("c");
    host.put("c");
}

#[test]
fn names_with_a_tag_and_other_characters_of_mount_options_work() {
    for name in ["cvmfs/graphdriver:latest", "a,b", "back\\slash", "with blank"] {
        let host = Host::start();
        let home = host.directory.path().join("mnt").join(name);
        host.call("Init", json!({"Home": home}));
        host.add_layer("image", "", &TarBuilder::new().file("f", 0o644, b"x").finish());
        host.create_container("c", "image");
        let tree = host.get("c");
        assert_eq!(tree, home.join("c/merged"));
        assert_eq!(fs::read(tree.join("f")).unwrap(), b"x");
        host.put("c");
        assert!(testkit::mounts::below(&home).is_empty(), "{name}");
    }
}

#[test]
fn many_containers_at_once_neither_wait_for_nor_disturb_each_other() {
    let host = Arc::new(host_with_container());
    let threads: Vec<_> = (0..12)
        .map(|thread| {
            let host = Arc::clone(&host);
            std::thread::spawn(move || {
                for round in 0..8 {
                    let id = format!("t{thread}r{round}");
                    host.create_container(&id, "image");
                    // A copy and a start of the same container interleave.
                    host.get(&id);
                    let tree = host.get("c");
                    assert_eq!(fs::read(tree.join("f")).unwrap(), b"x");
                    host.put("c");
                    host.put(&id);
                    host.remove(&id);
                    host.remove(&format!("{id}-init"));
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert!(host.mounted().is_empty());
    assert_eq!(fs::read_dir(host.home().join("l")).unwrap().count(), 3);
}

/// As in a managed plugin, where the program is process 1 of its namespace.
#[test]
fn process_1_starts_the_server_again_and_calls_wait_meanwhile() {
    let directory = ScratchDir::new("keeper").unwrap();
    let runtime = ScratchDir::runtime("keeper").unwrap();
    let socket = runtime.path().join("s.sock");
    let mut command = Command::new("unshare");
    command
        .args(["--pid", "--fork", "--kill-child", "--mount-proc"])
        .arg(env!("CARGO_BIN_EXE_cvmfs-graphdriver"));
    command.args(["serve", "--socket"]).arg(&socket).arg("--propagated-mount").arg(directory.path());
    let mut unshare =
        testkit::process::Service::start("plugin", command, &directory.path().join("log")).unwrap();
    unshare.wait_ready(Duration::from_secs(20), || socket.exists()).unwrap();
    let home = directory.path().join("home");
    assert_eq!(Connection::open(&socket).call("Init", &json!({"Home": home})).0, 200);

    let mut servers = Vec::new();
    for round in 0..3 {
        let id = format!("layer{round}");
        assert_eq!(Connection::open(&socket).call("Create", &json!({"ID": id})).0, 200);
        let server = server_of(&socket);
        assert!(!servers.contains(&server), "the server was started again");
        testkit::process::kill(server, rustix::process::Signal::KILL);
        servers.push(server);
        // At once: the call waits in the socket's queue until there is a server.
        let (status, answer) = Connection::open(&socket).call("Exists", &json!({"ID": id}));
        assert_eq!((status, answer), (200, json!({"Exists": true})), "initialised without Init");
    }
    let keeper = parent_of(server_of(&socket));
    testkit::process::kill(keeper, rustix::process::Signal::TERM);
    testkit::process::wait_until("the keeper to end", Duration::from_secs(15), || {
        !testkit::process::is_alive(keeper) && !socket.exists()
    })
    .unwrap();
    assert!(servers.iter().all(|server| !testkit::process::is_alive(*server)), "no zombies stay");
}

/// The server process that answers on `socket`.
fn server_of(socket: &Path) -> u32 {
    let mut found = Vec::new();
    testkit::process::wait_until("a server", Duration::from_secs(10), || {
        found = testkit::process::find(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            line.contains("--inherited-socket") && line.contains(socket.to_str().unwrap())
        });
        found.len() == 1
    })
    .unwrap();
    found[0]
}

fn parent_of(pid: u32) -> u32 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap();
    line.trim().parse().unwrap()
}

#[test]
fn with_a_user_namespace_layers_belong_to_its_root_and_archives_have_the_container_s_owners() {
    use std::os::unix::fs::MetadataExt;
    let host = Host::start();
    let map = json!([{"container_id": 0, "host_id": 100_000, "size": 65536}]);
    host.call("Init", json!({"Home": host.home(), "Opts": null, "UIDMaps": map, "GIDMaps": map}));
    let tar =
        TarBuilder::new().owner(0, 0).file("root", 0o4755, b"r").owner(1000, 1001).file("user", 0o644, b"u");
    let tar = tar.owner(0, 0).char_device("null", 0o666, (1, 3)).finish();
    host.add_layer("image", "", &tar);
    let owner = |path: &str| {
        let metadata = fs::symlink_metadata(host.home().join(path)).unwrap();
        (metadata.uid(), metadata.gid())
    };
    assert_eq!(owner("image/diff"), (100_000, 100_000));
    assert_eq!(owner("image/diff/user"), (101_000, 101_001));
    assert!(!host.home().join("image/diff/null").exists(), "no devices in a user namespace");
    host.create_container("c", "image");
    host.get("c");
    for path in ["c/diff", "c/work", "c/work/work", "c/merged"] {
        assert_eq!(owner(path), (100_000, 100_000), "{path}");
    }
    fs::write(host.home().join("c/merged/new"), "n").unwrap();
    std::os::unix::fs::chown(host.home().join("c/merged/new"), Some(100_007), Some(100_008)).unwrap();
    let (status, archive) = host.connect().diff("c", "c-init");
    assert_eq!(status, 200);
    host.add_layer("committed", "image", &archive.unwrap());
    assert_eq!(owner("committed/diff/new"), (100_007, 100_008));
    host.put("c");
}

/// The real program, killed at random moments while it creates and removes layers.
#[test]
fn kill_9_at_any_moment_leaves_whole_layers_or_none() {
    let directory = ScratchDir::new("kill").unwrap();
    let runtime = ScratchDir::runtime("kill").unwrap();
    let socket = runtime.path().join("s.sock");
    let home = directory.path().join("home");
    let next = Arc::new(AtomicUsize::new(0));
    for round in 0..25_u64 {
        let mut server = start_program(&socket, directory.path());
        if round == 0 {
            Connection::open(&socket).call("Init", &json!({"Home": home}));
        }
        let workers: Vec<_> = (0..3)
            .map(|_| {
                let (socket, next) = (socket.clone(), Arc::clone(&next));
                std::thread::spawn(move || create_and_remove(&socket, &next))
            })
            .collect();
        std::thread::sleep(Duration::from_millis(20 + round * 7 % 60));
        server.kill().unwrap();
        server.wait().unwrap();
        workers.into_iter().for_each(|worker| worker.join().unwrap());

        let mut server = start_program(&socket, directory.path());
        assert_eq!(Connection::open(&socket).call("Exists", &json!({"ID": "x"})).0, 200, "without Init");
        assert_consistent(&home);
        server.kill().unwrap();
        server.wait().unwrap();
    }
    let created = next.load(Ordering::SeqCst);
    assert!(created > 75, "only {created} layers were created between 25 kills");
}

fn start_program(socket: &Path, directory: &Path) -> Child {
    let child = Command::new(env!("CARGO_BIN_EXE_cvmfs-graphdriver"))
        .args(["--log-level", "error", "serve", "--socket"])
        .arg(socket)
        .arg("--propagated-mount")
        .arg(directory)
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let connects = || std::os::unix::net::UnixStream::connect(socket).is_ok();
    testkit::process::wait_until("the plugin to listen", Duration::from_secs(20), connects).unwrap();
    child
}

/// Calls until the server is gone.
fn create_and_remove(socket: &Path, next: &AtomicUsize) {
    let mut connection = Connection::open(socket);
    loop {
        let id = format!("n{}", next.fetch_add(1, Ordering::SeqCst));
        let child = format!("{id}-child");
        for (call, request) in [
            ("Create", json!({"ID": id})),
            ("Create", json!({"ID": child, "Parent": id})),
            ("Get", json!({"ID": child})),
            ("Put", json!({"ID": child})),
            ("Remove", json!({"ID": child})),
            ("Remove", json!({"ID": id})),
        ] {
            let Ok((status, answer)) = connection.try_call(call, &request) else { return };
            assert_eq!(status, 200, "{call} {request}: {answer}");
        }
    }
}

/// Every layer has all its files, every link belongs to exactly one layer.
fn assert_consistent(home: &Path) {
    let mut links = BTreeSet::new();
    for entry in fs::read_dir(home).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if matches!(name.as_str(), "l" | "cvmfs") {
            continue;
        }
        assert!(!name.starts_with('.'), "left over: {name}");
        let link = fs::read_to_string(entry.path().join("link")).unwrap();
        assert_eq!(fs::read_link(home.join("l").join(&link)).unwrap(), Path::new(&format!("../{name}/diff")));
        assert!(entry.path().join("diff").is_dir() && entry.path().join("parent").is_file());
        links.insert(link);
    }
    let found: BTreeSet<_> = fs::read_dir(home.join("l"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(found, links);
}
