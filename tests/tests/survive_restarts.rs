//! What was running or stored before the engine or the plugin ended is there afterwards.

#![allow(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

mod common;

use std::time::{Duration, Instant};

use rustix::process::Signal;
use testkit::process::{kill, wait_until};
use testkit::{Image, Published, Registry, ThinEngine, managed_plugin};

struct World {
    engine: ThinEngine,
    repository: Published,
    thin: String,
    normal: String,
    registry: Registry,
}

fn world(fqrn: &str) -> World {
    let registry = Registry::start().unwrap();
    let image = Image::busybox().unwrap().layer(
        testkit::tar::TarBuilder::new()
            .directory("srv", 0o755)
            .file("srv/name", 0o644, b"thin")
            .file("srv/other", 0o644, b"read later")
            .finish(),
    );
    registry.push("app", "1", &image).unwrap();
    let repository = Published::create(fqrn).unwrap();
    let (normal, thin) = (registry.reference("app", "1"), registry.reference("thin/app", "1"));
    repository.convert(&normal, &["--output", &thin]).unwrap();
    let engine = ThinEngine::start().unwrap();
    engine.etc.add_published(&repository).unwrap();
    World { engine, repository, thin, normal, registry }
}

impl World {
    fn docker(&self, arguments: &[&str]) -> String {
        self.engine.dockerd.docker(arguments).unwrap()
    }

    /// The plugin's first process, and the one that answers the engine.
    fn plugin_processes(&self) -> (u32, u32) {
        let found = serve_processes(&self.engine);
        let (keepers, servers): (Vec<_>, Vec<_>) = found.into_iter().partition(|pid| is_first(*pid));
        assert_eq!((keepers.len(), servers.len()), (1, 1));
        (keepers[0], servers[0])
    }

    fn run(&self, image: &str) -> String {
        self.engine.dockerd.run(&[image, "/bin/cat", "/srv/name"]).unwrap()
    }
}

#[test]
fn images_and_containers_work_again_after_the_engine_was_restarted() {
    let mut world = world("restart.example.org");
    world.docker(&["create", "--network=host", "--name", "story", &world.thin, "/bin/cat", "/srv/name"]);
    assert_eq!(world.run(&world.thin), "thin");
    assert_eq!(world.docker(&["start", "-a", "story"]), "thin");

    world.engine.dockerd.restart().unwrap();
    assert_eq!(world.docker(&["start", "-a", "story"]), "thin");
    assert_eq!(world.run(&world.thin), "thin");
    assert_eq!(world.run(&world.normal), "thin");
    world.docker(&["rm", "story"]);
    world.docker(&["rmi", &world.thin, &world.normal]);
}

#[test]
fn images_and_containers_work_again_after_the_engine_was_killed() {
    let mut world = world("killed.example.org");
    world.docker(&["run", "-d", "--network=host", "--name", "story", &world.thin, "/bin/sleep", "1000"]);
    world.engine.dockerd.kill();
    world.engine.dockerd.start().unwrap();
    world.docker(&["rm", "-f", "story"]);
    // An engine that was killed unmounts what the former plugin process had while it starts the new one. When it
    // loses that race against itself, no mount of the plugin reaches the host until the next restart.
    let shared = world.engine.propagated_mount().unwrap();
    if !testkit::mounts::all().iter().any(|mount| mount.point == shared) {
        println!("the engine lost the plugin's propagated mount; restarting it");
        world.engine.dockerd.restart().unwrap();
    }
    assert_eq!(world.run(&world.thin), "thin");
    assert_eq!(world.run(&world.normal), "thin");
}

#[test]
fn a_killed_plugin_process_answers_again_without_init_and_containers_go_on() {
    let world = world("plugin.example.org");
    world.docker(&["run", "-d", "--network=host", "--name", "story", &world.thin, "/bin/sleep", "1000"]);
    let (keeper, server) = world.plugin_processes();
    kill(server, Signal::KILL);
    wait_until("the server is started again", Duration::from_secs(30), || {
        let found = serve_processes(&world.engine);
        found.len() == 2 && !found.contains(&server) && found.contains(&keeper)
    })
    .unwrap();

    let other = world.docker(&["exec", "story", "/bin/cat", "/srv/other"]);
    assert_eq!(other, "read later", "the container goes on, also with files that it had not read");
    assert_eq!(world.run(&world.thin), "thin");
    assert_eq!(world.run(&world.normal), "thin");
    world.docker(&["rm", "-f", "story"]);
}

#[test]
fn a_plugin_whose_processes_were_all_killed_answers_again_without_init() {
    let world = world("keeper.example.org");
    assert_eq!(world.run(&world.thin), "thin");
    let (keeper, _) = world.plugin_processes();
    // The first process of its name space takes all others with it, those of the mounts too.
    kill(keeper, Signal::KILL);
    wait_until("the engine starts the plugin again", Duration::from_secs(30), || {
        let found = serve_processes(&world.engine);
        found.len() == 2 && !found.contains(&keeper)
    })
    .unwrap();
    assert_eq!(world.run(&world.thin), "thin");
    assert_eq!(world.run(&world.normal), "thin");
}

#[test]
fn a_stopped_engine_leaves_neither_mounts_nor_processes() {
    let mut world = world("stop.example.org");
    world.docker(&["run", "-d", "--network=host", "--name", "story", &world.thin, "/bin/sleep", "1000"]);
    let mount = world.engine.propagated_mount().unwrap();
    assert!(!testkit::mounts::below(&mount).is_empty());
    let started = Instant::now();
    world.engine.dockerd.stop_only();
    assert!(started.elapsed() < Duration::from_secs(40), "stopping took {:?}", started.elapsed());
    let left: Vec<_> =
        testkit::mounts::below(&mount).into_iter().filter(|m| m.kind.starts_with("fuse")).collect();
    assert!(left.is_empty(), "{left:?}");
    wait_until("the plugin's processes end", Duration::from_secs(10), || {
        managed_plugin::processes(&world.engine.dockerd).is_empty()
    })
    .unwrap();
    assert!(world.repository.origin.requests().len() > 3);
}

/// The two processes that run `cvmfs-graphdriver serve`, without those that serve mounts.
fn serve_processes(engine: &ThinEngine) -> Vec<u32> {
    let serves = |pid: &u32| {
        std::fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| line.split(|byte| *byte == 0).nth(1) == Some(b"serve"))
    };
    managed_plugin::processes(&engine.dockerd).into_iter().filter(serves).collect()
}

/// Whether a process is the first of its process name space.
fn is_first(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| line.starts_with("NSpid:") && line.split_whitespace().last() == Some("1"))
}

#[test]
fn an_upgrade_of_the_plugin_keeps_images_containers_and_the_cache() {
    let mut world = world("upgrade.example.org");
    world.docker(&["create", "--network=host", "--name", "thin", &world.thin, "/bin/cat", "/srv/name"]);
    world.docker(&["create", "--network=host", "--name", "normal", &world.normal, "/bin/cat", "/srv/name"]);
    let written = "echo written > /srv/written; cat /srv/name";
    world.docker(&["run", "--network=host", "--name", "changed", &world.thin, "/bin/sh", "-c", written]);
    assert_eq!(world.docker(&["start", "-a", "thin"]), "thin");

    // The next version, as a site distributes it.
    let directory = testkit::ScratchDir::new("next").unwrap();
    let next = directory.path().join("plugin");
    managed_plugin::assemble(&next, &testkit::binary("cvmfs-graphdriver")).unwrap();
    std::fs::write(next.join("rootfs/etc/next-version"), b"").unwrap();
    let reference = world.registry.reference("graphdriver", "next");
    world.docker(&["plugin", "create", &reference, next.to_str().unwrap()]);
    world.docker(&["plugin", "push", &reference]);
    world.docker(&["plugin", "rm", &reference]);

    world.engine.dockerd.restart_with_driver("overlay2").unwrap();
    world.docker(&["plugin", "disable", managed_plugin::NAME]);
    let upgrade = ["plugin", "upgrade", "--grant-all-permissions", "--skip-remote-check"];
    world.docker(&[&upgrade[..], &[managed_plugin::NAME, &reference]].concat());
    // An upgrade forgets the settings.
    let etc = format!("cvmfs_ext_config={}", world.engine.etc.path().display());
    let minio = format!("minio_ext_config={}", world.engine.layer_service_config().display());
    world.docker(&["plugin", "set", managed_plugin::NAME, &etc, &minio]);
    world.docker(&["plugin", "enable", managed_plugin::NAME]);
    let requests = world.repository.origin.requests().len();
    world.engine.dockerd.restart_with_driver(managed_plugin::NAME).unwrap();

    let id = world.docker(&["plugin", "inspect", "--format", "{{.ID}}", managed_plugin::NAME]);
    let root = world.engine.dockerd.data_root().join("plugins").join(id).join("rootfs");
    assert!(root.join("etc/next-version").exists(), "it was not upgraded");
    for container in ["thin", "normal"] {
        assert_eq!(world.docker(&["start", "-a", container]), "thin");
    }
    assert_eq!(world.docker(&["diff", "changed"]), "C /srv\nA /srv/written");
    assert_eq!(world.run(&world.thin), "thin");
    let objects = world.repository.origin.requests().into_iter().skip(requests);
    let fetched: Vec<_> = objects.filter(|request| format!("{request:?}").contains("/data/")).collect();
    assert!(fetched.is_empty(), "fetched again: {fetched:?}");
    world.docker(&["rm", "thin", "normal", "changed"]);
}
