//! The main story: an engine with the managed plugin starts normal and thin images; files of thin images are
//! fetched when they are opened.

#![allow(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

mod common;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use testkit::image::busybox_layer;
use testkit::managed_plugin::NAME;
use testkit::tar::TarBuilder;
use testkit::{Dockerd, Image, Published, Registry, ThinEngine};

/// Lists everything in a container that its image brought, with hashes of the files.
const LIST: &str = "cd /; for d in bin etc srv; do find $d | sort | xargs stat -c '%n %F %a %u %g %s %T'; done | \
                    sed 's/directory [0-9]* /directory /' 2>/dev/null; \
                    find bin etc/app srv -type f | sort | xargs sha256sum";

/// A busybox with two more layers, the upper of which deletes and replaces.
fn application(name: &str) -> Image {
    let content: Vec<u8> = (0..3_000_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 20) as u8).collect();
    let base = busybox_layer().unwrap();
    let data = TarBuilder::new()
        .directory("srv", 0o755)
        .file("srv/data", 0o644, &content)
        .file("srv/name", 0o644, name.as_bytes())
        .file("srv/never-read", 0o644, &content[1000..])
        .directory("etc/app", 0o755)
        .file("etc/app/old", 0o644, b"old")
        .directory("srv/cache", 0o755)
        .file("srv/cache/stale", 0o644, b"stale");
    let top = TarBuilder::new()
        .directory("etc/app", 0o755)
        .file("etc/app/.wh.old", 0o644, b"")
        .file("etc/app/new", 0o640, b"new")
        .directory("srv/cache", 0o755)
        .file("srv/cache/.wh..wh..opq", 0o644, b"")
        .file("srv/cache/fresh", 0o644, b"fresh");
    Image::new([base.finish(), data.finish(), top.finish()])
        .config(serde_json::json!({"Cmd": ["/bin/cat", "/srv/name"], "Env": ["PATH=/bin"]}))
}

struct World {
    registry: Registry,
    repository: Published,
}

impl World {
    /// Pushes the application under this name and converts it; returns both references.
    fn publish(&self, name: &str) -> (String, String) {
        self.registry.push(name, "1", &application(name)).unwrap();
        let normal = self.registry.reference(name, "1");
        let thin = self.registry.reference(&format!("thin/{name}"), "1");
        self.repository.convert(&normal, &["--output", &thin]).unwrap();
        (normal, thin)
    }

    fn new(fqrn: &str) -> Self {
        Self { registry: Registry::start().unwrap(), repository: Published::create(fqrn).unwrap() }
    }
}

#[test]
fn normal_and_thin_images_run_side_by_side_and_show_the_same_files() {
    let world = World::new("stories.example.org");
    let (normal, thin) = world.publish("app");
    let engine = ThinEngine::start().unwrap();
    engine.etc.add_published(&world.repository).unwrap();
    let docker = &engine.dockerd;
    assert_eq!(docker.docker(&["info", "--format", "{{.Driver}}"]).unwrap(), NAME);

    let expected = docker.run(&[&normal, "/bin/sh", "-c", LIST]).unwrap();
    assert!(expected.lines().count() > 40 && expected.contains("fresh"), "{expected}");
    assert!(!expected.contains("stale") && !expected.contains("etc/app/old"), "{expected}");
    assert_eq!(docker.run(&[&thin, "/bin/sh", "-c", LIST]).unwrap(), expected);
    // Neither the descriptor nor the repository's bookkeeping is seen.
    let root = |image: &str| docker.run(&[image, "/bin/ls", "-A", "/"]).unwrap();
    assert_eq!(root(&thin), root(&normal));
    // The configuration of the image came along.
    assert_eq!(docker.run(&[&thin]).unwrap(), "app");
    let finished = docker.run_output(&[&thin, "/bin/cat", "/thin.json"]).unwrap();
    assert!(!finished.status.success(), "{}", finished.output());
}

#[test]
fn a_thin_image_fetches_only_what_it_opens() {
    let world = World::new("lazy.example.org");
    let (_, thin) = world.publish("app");
    let engine = ThinEngine::start().unwrap();
    engine.etc.add_published(&world.repository).unwrap();
    assert_eq!(engine.dockerd.run(&[&thin]).unwrap(), "app");
    let fetched = world.repository.origin.bytes_sent();
    assert!(fetched < 3_000_000, "{fetched} bytes for busybox and one small file");
    let before = world.repository.origin.requests().len();
    assert_eq!(engine.dockerd.run(&[&thin]).unwrap(), "app");
    let more = world.repository.origin.requests().len() - before;
    assert!(more <= 2, "{more} requests for a second start");
}

#[test]
fn a_container_writes_to_its_own_layer_only() {
    let world = World::new("writes.example.org");
    let (_, thin) = world.publish("app");
    let engine = ThinEngine::start().unwrap();
    engine.etc.add_published(&world.repository).unwrap();
    let docker = &engine.dockerd;
    let script = "echo changed > /srv/name; rm /etc/app/new; mkdir /srv/cache/d; cat /srv/name; ls /etc/app";
    assert_eq!(docker.run(&[&thin, "/bin/sh", "-c", script]).unwrap(), "changed");
    assert_eq!(docker.run(&[&thin]).unwrap(), "app");
}

#[test]
fn two_containers_of_two_thin_images_run_at_once_and_both_go_away() {
    let world = World::new("two.example.org");
    let (_, first) = world.publish("first");
    let (_, second) = world.publish("second");
    let engine = ThinEngine::start().unwrap();
    engine.etc.add_published(&world.repository).unwrap();
    let docker = &engine.dockerd;
    let run = |name: &str, image: &str| {
        docker.docker(&["run", "-d", "--network=host", "--name", name, image, "/bin/sleep", "1000"]).unwrap();
    };
    run("one", &first);
    run("two", &second);
    assert_eq!(docker.docker(&["exec", "one", "/bin/cat", "/srv/name"]).unwrap(), "first");
    assert_eq!(docker.docker(&["exec", "two", "/bin/cat", "/srv/name"]).unwrap(), "second");

    docker.docker(&["rm", "-f", "one"]).unwrap();
    assert_eq!(docker.docker(&["exec", "two", "/bin/cat", "/srv/cache/fresh"]).unwrap(), "fresh");
    docker.docker(&["rm", "-f", "two"]).unwrap();
    docker.docker(&["rmi", &first, &second]).unwrap();
    assert_eq!(docker.docker(&["images", "-q"]).unwrap(), "");
    assert_eq!(docker.docker(&["ps", "-aq"]).unwrap(), "");
}

#[test]
fn layers_built_on_a_thin_image_work() {
    let world = World::new("build.example.org");
    let (_, thin) = world.publish("app");
    let engine = ThinEngine::start().unwrap();
    engine.etc.add_published(&world.repository).unwrap();
    let docker = &engine.dockerd;
    docker
        .docker(&[
            "run",
            "--network=host",
            "--name",
            "story",
            &thin,
            "/bin/sh",
            "-c",
            "echo more > /srv/more; rm /srv/name",
        ])
        .unwrap();
    docker.docker(&["commit", "story", "derived:1"]).unwrap();
    let shown =
        docker.run(&["derived:1", "/bin/sh", "-c", "cat /srv/more /srv/cache/fresh; ls /srv"]).unwrap();
    assert!(shown.starts_with("more\nfresh") && !shown.contains("name"), "{shown}");
}

#[test]
fn a_thin_image_can_be_saved_and_loaded_and_pushed() {
    let world = World::new("save.example.org");
    let (_, thin) = world.publish("app");
    let engine = ThinEngine::start().unwrap();
    engine.etc.add_published(&world.repository).unwrap();
    let docker = &engine.dockerd;
    docker.docker(&["pull", &thin]).unwrap();
    let archive = world.repository.scratch().join("saved.tar");
    docker.docker(&["save", "-o", archive.to_str().unwrap(), &thin]).unwrap();
    let digest = docker.docker(&["inspect", "--format", "{{.Id}}", &thin]).unwrap();
    let pushed = world.registry.reference("thin/copy", "2");
    docker.docker(&["tag", &thin, &pushed]).unwrap();
    docker.docker(&["push", &pushed]).unwrap();
    let original = world.registry.manifest("thin/app", "1").unwrap();
    let copy = world.registry.manifest("thin/copy", "2").unwrap();
    assert_eq!(copy["config"]["digest"], original["config"]["digest"], "{copy}");
    docker.docker(&["rmi", "-f", &digest]).unwrap();
    docker.docker(&["load", "-i", archive.to_str().unwrap()]).unwrap();
    assert_eq!(docker.docker(&["inspect", "--format", "{{.Id}}", &thin]).unwrap(), digest);
    assert_eq!(docker.run(&[&thin]).unwrap(), "app");
}

#[test]
fn the_engine_reports_the_state_of_the_driver() {
    let world = World::new("status.example.org");
    let (_, thin) = world.publish("app");
    let engine = ThinEngine::start().unwrap();
    engine.etc.add_published(&world.repository).unwrap();
    engine.dockerd.run(&[&thin]).unwrap();
    let text = engine.dockerd.docker(&["info", "--format", "{{json .DriverStatus}}"]).unwrap();
    let rows: Vec<(String, String)> = serde_json::from_str(&text).unwrap();
    let names: Vec<_> = rows.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(&names[..3], ["Backing Filesystem", "Supports d_type", "Native Overlay Diff"]);
    assert!(text.contains("status.example.org"), "{text}");
}

#[test]
fn a_normal_image_is_the_same_as_on_overlay2() {
    let registry = Registry::start().unwrap();
    registry.push("app", "1", &application("app")).unwrap();
    let image = registry.reference("app", "1");
    let overlay2 = Dockerd::builder().start().unwrap();
    let expected = overlay2.run(&[&image, "/bin/sh", "-c", LIST]).unwrap();
    drop(overlay2);
    let engine = ThinEngine::start().unwrap();
    assert_eq!(engine.dockerd.run(&[&image, "/bin/sh", "-c", LIST]).unwrap(), expected);
    let inspect: Value = serde_json::from_str(&engine.dockerd.docker(&["inspect", &image]).unwrap()).unwrap();
    assert_eq!(inspect[0]["GraphDriver"]["Name"], NAME);
}

/// Files of several owners that a namespace has.
fn layer_with_owners() -> TarBuilder {
    TarBuilder::new()
        .directory("srv", 0o755)
        .owner(1000, 2000)
        .file("srv/of-a-user", 0o600, b"private")
        .owner(0, 0)
        .file("srv/of-root", 0o600, b"secret")
        .file("srv/set-user-id", 0o4755, b"#!/bin/sh\n")
}

/// What a container sees of them.
const LIST_OWNERS: &str = "cd /srv; stat -c '%n %u %g %a' . *; cat of-root of-a-user; \
                           cd /; find bin etc | sort | xargs stat -c '%n %u %g %a'";

/// An engine whose containers live in a user namespace, and the directory that its plugin mounts into.
fn engine_with_user_namespace() -> (ThinEngine, PathBuf) {
    let dockerd = Dockerd::builder().argument("--userns-remap=default");
    let engine = ThinEngine::start_on(dockerd, &testkit::binary("cvmfs-graphdriver")).unwrap();
    // The engine keeps the directories of plugins to itself; root of the namespace must come through them.
    let id = engine.dockerd.docker(&["plugin", "inspect", "--format", "{{.ID}}", NAME]).unwrap();
    let root = engine.dockerd.docker(&["info", "--format", "{{.DockerRootDir}}"]).unwrap();
    let plugins = Path::new(&root).join("plugins");
    let propagated = plugins.join(&id).join("propagated-mount");
    for closed in [plugins.clone(), plugins.join(&id), propagated.clone()] {
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::metadata(&closed).unwrap().permissions().mode();
        std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(mode | 0o011)).unwrap();
    }
    (engine, propagated)
}

/// `Dockerd::run` uses the host's network, which belongs to another namespace.
fn run_in_namespace(docker: &Dockerd, image: &str, script: &str) -> String {
    docker.docker(&["run", "--rm", "--network=none", image, "/bin/sh", "-c", script]).unwrap()
}

#[test]
fn with_a_user_namespace_normal_and_thin_images_show_the_same_owners_and_work_alike() {
    let world = World::new("userns.example.org");
    // An owner outside of the namespace is refused by the engine for normal images.
    let content = layer_with_owners().owner(70_000, 70_001).file("srv/outside", 0o644, b"x");
    let busybox = busybox_layer().unwrap().finish();
    world.registry.push("inside", "1", &Image::new([busybox.clone(), layer_with_owners().finish()])).unwrap();
    world.registry.push("outside", "1", &Image::new([busybox, content.finish()])).unwrap();
    let thin = |name: &str| {
        let thin = world.registry.reference(&format!("thin/{name}"), "1");
        world.repository.convert(&world.registry.reference(name, "1"), &["--output", &thin]).unwrap();
        thin
    };
    let (thin_inside, thin_outside) = (thin("inside"), thin("outside"));
    let (engine, _) = engine_with_user_namespace();
    engine.etc.add_published(&world.repository).unwrap();
    let docker = &engine.dockerd;
    let run = |image: &str, script: &str| run_in_namespace(docker, image, script);
    let expected = run(&world.registry.reference("inside", "1"), LIST_OWNERS);
    assert!(
        expected.contains("of-a-user 1000 2000 600") && expected.contains("set-user-id 0 0 4755"),
        "{expected}"
    );
    assert_eq!(run(&thin_inside, LIST_OWNERS), expected);
    let change = "chown 5:6 /srv/of-a-user && echo more >> /srv/of-root && stat -c '%u %g' /srv/of-a-user /srv/of-root; \
                  cat /srv/of-root";
    assert_eq!(run(&thin_inside, change), "5 6\n0 0\nsecretmore");
    let outside = run(&thin_outside, "stat -c '%u %g' /srv/outside; cat /srv/outside");
    assert_eq!(outside, "65534 65534\nx");
    let info = docker.docker(&["info"]).unwrap();
    assert!(info.contains("mapped by the client"), "{info}");

    // A commit has the container's owners again.
    docker
        .docker(&["run", "--network=none", "--name", "changed", &thin_inside, "/bin/sh", "-c", change])
        .unwrap();
    docker.docker(&["commit", "changed", "committed"]).unwrap();
    assert_eq!(run("committed", "stat -c '%u %g' /srv/of-a-user; cat /srv/of-root"), "5 6\nsecretmore");
    docker.docker(&["rm", "changed"]).unwrap();
}

#[test]
fn a_repository_that_the_host_mounts_shows_the_owners_of_the_user_namespace_by_an_id_mapped_mount() {
    let world = World::new("mapped.example.org");
    let busybox = busybox_layer().unwrap().finish();
    world.registry.push("app", "1", &Image::new([busybox, layer_with_owners().finish()])).unwrap();
    let (normal, thin) = (world.registry.reference("app", "1"), world.registry.reference("thin/app", "1"));
    world.repository.convert(&normal, &["--output", &thin]).unwrap();
    let (mut engine, propagated) = engine_with_user_namespace();
    engine.dockerd.add_argument("--storage-opt=cvmfsMountMethod=external");
    engine.dockerd.restart().unwrap();
    let docker = &engine.dockerd;
    let expected = run_in_namespace(docker, &normal, LIST_OWNERS);

    // The host's client, which knows of no namespace.
    let mountpoint = propagated.join("cvmfs/graphdriver/cvmfs").join(&world.repository.fqrn);
    std::fs::create_dir_all(&mountpoint).unwrap();
    let config =
        format!("config={},layer_view,allow_other,suid", world.repository.client_config().unwrap().display());
    let place = mountpoint.to_str().unwrap();
    let mount = ["mount", world.repository.fqrn.as_str(), place, "-o", config.as_str()];
    testkit::published::run_binary("cvmfs-client", &mount).unwrap().success().unwrap();
    assert_eq!(std::fs::metadata(&mountpoint).unwrap().uid(), 0);
    assert_eq!(run_in_namespace(docker, &thin, LIST_OWNERS), expected);
    let change = "chown 5:6 /srv/of-a-user && echo more >> /srv/of-root && cat /srv/of-root";
    assert_eq!(run_in_namespace(docker, &thin, change), "secretmore");
    let info = docker.docker(&["info"]).unwrap();
    assert!(info.contains("mapped.example.org: mounted by the host, id-mapped"), "{info}");

    // The mapped mount goes with the engine, and the engine takes the host's one, too.
    engine.dockerd.stop_only();
    let left = testkit::mounts::below(&propagated);
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn an_operator_sees_what_is_lazy_and_how_much_was_fetched() {
    let world = World::new("operator.example.org");
    let (normal, thin) = world.publish("app");
    let engine = ThinEngine::start().unwrap();
    engine.etc.add_published(&world.repository).unwrap();
    let docker = &engine.dockerd;
    for (name, image) in [("lazy", &thin), ("whole", &normal)] {
        let arguments = ["run", "-d", "--network=host", "--name", name, image, "/bin/sleep", "1000"];
        docker.docker(&arguments).unwrap();
    }
    docker.docker(&["exec", "lazy", "/bin/cat", "/srv/name", "/etc/app/new"]).unwrap();
    let id = docker.docker(&["plugin", "inspect", "--format", "{{.ID}}", NAME]).unwrap();
    let socket = format!("/run/docker/plugins/{id}/plugin.sock");
    let status = |options: &[&str]| {
        testkit::published::run_binary(
            "cvmfs-graphdriver",
            &[&["status", "--socket", &socket], options].concat(),
        )
    };
    let report: Value = serde_json::from_str(&status(&["--json"]).unwrap().success().unwrap()).unwrap();
    let layer_of = |container: &str| {
        let format = "{{.GraphDriver.Data.MergedDir}}";
        let merged = docker.docker(&["inspect", "--format", format, container]).unwrap();
        let id = merged.split('/').rev().nth(1).unwrap().to_owned();
        let layers = report["layers"].as_array().unwrap();
        layers.iter().find(|layer| layer["id"] == id.as_str()).unwrap_or_else(|| panic!("no {id}: {report}"))
    };
    let lazy = layer_of("lazy");
    assert_eq!(
        (&lazy["kind"], &lazy["lazy"], &lazy["mounted"]),
        (&"container".into(), &"all".into(), &true.into())
    );
    let (fetched, bytes) = (lazy["bytes_fetched"].as_u64().unwrap(), lazy["bytes"].as_u64().unwrap());
    // Busybox and two small files of busybox and two files of 3 MB.
    assert!(fetched > 500_000 && fetched < bytes - 5_000_000, "{report}");
    let whole = layer_of("whole");
    assert_eq!((&whole["lazy"], &whole["bytes_fetched"]), (&"no".into(), &0.into()));
    assert!(report["layers"].as_array().unwrap().iter().any(|layer| layer["kind"] == "image"), "{report}");
    assert_eq!(report["ordinary_layers"], 3, "{report}");
    let repository = &report["repositories"][0];
    assert_eq!((&repository["fqrn"], &repository["answers"]), (&"operator.example.org".into(), &true.into()));
    assert_eq!(repository["users"], 1, "{report}");
    let text = status(&[]).unwrap().success().unwrap();
    assert!(
        text.contains("lazy, all 3 layers") && text.contains("not lazy, its image has no thin layer"),
        "{text}"
    );

    // None of the plugin's processes can do what it does not need.
    let pids = testkit::managed_plugin::processes(docker);
    assert!(pids.len() >= 4, "keeper, server, supervisor and worker: {pids:?}");
    let mut workers = 0;
    for pid in pids {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let field =
            |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
        let capabilities = u64::from_str_radix(&field("CapBnd:"), 16).unwrap();
        // chown, dac_override, fowner, fsetid, kill, setgid, setuid, sys_admin, sys_resource, mknod, setfcap
        let needed = [0, 1, 3, 4, 5, 6, 7, 21, 24, 27, 31].iter().fold(0_u64, |sum, bit| sum | 1 << bit);
        let identities = 1 << 6 | 1 << 7;
        assert_eq!(capabilities & !needed, 0, "{pid}: {capabilities:x}");
        assert_eq!(u64::from_str_radix(&field("CapEff:"), 16).unwrap() & !needed, 0, "{pid}");
        let command = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
        if command.contains("worker") {
            workers += 1;
            assert_eq!(
                u64::from_str_radix(&field("CapPrm:"), 16).unwrap() & identities,
                0,
                "{pid}: {command}"
            );
        }
        assert_eq!(field("NoNewPrivs:"), "1", "{pid}");
        assert_eq!(field("Seccomp:"), "2", "{pid}: system calls are filtered");
    }
    assert_eq!(workers, 1, "the worker cannot act as another user either");
    // The worker, who reads what the network says, finds no other files than its own.
    let modules = std::fs::read_to_string("/sys/kernel/security/lsm").unwrap_or_default();
    if modules.contains("landlock") {
        let said = docker.log_text();
        assert!(said.contains("access to files is confined"), "{said}");
    }

    let metrics = {
        use std::io::{Read as _, Write as _};
        let mut stream = std::os::unix::net::UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: plugin\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    for line in [
        "cvmfs_graphdriver_mounted_layers{kind=\"container\",lazy=\"all\"} 1",
        "cvmfs_graphdriver_repository_up{fqrn=\"operator.example.org\"} 1",
        "cvmfs_graphdriver_calls_total{call=\"Init\"} 1",
    ] {
        assert!(metrics.lines().any(|found| found == line), "no {line} in:\n{metrics}");
    }
    docker.docker(&["rm", "-f", "lazy", "whole"]).unwrap();
    let refused =
        testkit::published::run_binary("cvmfs-graphdriver", &["status", "--socket", "/no/such"]).unwrap();
    assert!(
        refused.code() == Some(1) && refused.stderr.contains("docker plugin inspect"),
        "{}",
        refused.output()
    );
}
