//! A real Docker engine on thin images, with repositories that the C++ tools wrote, mounted by our client.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod engine;

use std::path::Path;

use engine::Engine;
use serde_json::json;
use testkit::tar::TarBuilder;
use testkit::{Fixture, Origin};

/// A layer with busybox, and a repository whose layers were ingested from images.
struct World {
    engine: Engine,
    fixture: Fixture,
    origin: Origin,
}

impl World {
    fn new() -> Self {
        let fixture = Fixture::unpack("ingested-layers").unwrap();
        let origin = Origin::serve(&fixture.storage).unwrap();
        let world = Self { engine: Engine::start(), fixture, origin };
        world.configure(&world.fixture.master_pub);
        world.engine.import_busybox("base:1");
        world
    }

    /// Configures the repository in what the plugin takes for `/etc/cvmfs`.
    fn configure(&self, key: &Path) {
        let (config, fqrn) = (&self.engine.config, &self.fixture.fqrn);
        for directory in ["config.d", "keys"] {
            std::fs::create_dir_all(config.join(directory)).unwrap();
        }
        std::fs::copy(key, config.join(format!("keys/{fqrn}.pub"))).unwrap();
        let text = format!(
            "CVMFS_SERVER_URL={}\nCVMFS_PUBLIC_KEY=/etc/cvmfs/keys/{fqrn}.pub\nCVMFS_HTTP_PROXY=DIRECT\n\
             CVMFS_TIMEOUT=5\nCVMFS_TIMEOUT_DIRECT=5\n",
            self.origin.url()
        );
        std::fs::write(config.join(format!("config.d/{fqrn}.conf")), text).unwrap();
    }

    /// The directories of the two ingested layers, base first: the upper one deletes.
    fn layers(&self) -> Vec<String> {
        let paths = self.fixture.manifest.iter().filter_map(|entry| entry.path.to_str()?.strip_prefix('/'));
        let mut layers: Vec<_> = paths.filter(|path| path.ends_with("/layerfs")).map(str::to_owned).collect();
        layers.sort_by_key(|path| path.starts_with(".layers/2d"));
        assert_eq!(layers.len(), 2, "{layers:?}");
        layers
    }

    fn descriptor(&self, paths: &[String]) -> Vec<u8> {
        let layer = |path: &String| json!({"digest": "ab".repeat(32), "url": format!("cvmfs://{}/{path}", self.fixture.fqrn)});
        let layers: Vec<_> = paths.iter().map(layer).collect();
        let text = json!({"version": "1.0", "layers": layers}).to_string();
        TarBuilder::new().file("thin.json", 0o600, text.as_bytes()).finish()
    }

    /// An image of busybox, then the thin layer: it has a shell, and the repository's files.
    fn load(&self, reference: &str, thin: &[u8]) {
        let busybox = testkit::image::busybox_layer().unwrap().finish();
        let image = testkit::Image::new([busybox, thin.to_vec()]);
        let archive = self.engine.directory.path().join("load.tar");
        image.write_docker_archive(&archive, reference).unwrap();
        self.engine.docker(&["load", "-i", archive.to_str().unwrap()]);
    }
}

#[test]
fn a_container_on_a_thin_image_reads_the_repository_and_survives_restarts() {
    let mut world = World::new();
    let layers = world.layers();
    world.load("thin:1", &world.descriptor(&layers));
    let before = world.origin.bytes_sent();
    assert_eq!(before, 0, "nothing is fetched before a container starts");
    let look = "ls -a / | grep -c wh; ls /thin.json; cat /etc/hostname 2>&1 | head -1; md5sum /bin/tool /bin/busybox";
    let first = world.engine.docker.run_output(&["thin:1", "/bin/busybox", "sh", "-c", look]).unwrap();
    assert!(first.stdout.starts_with("0\n"), "no whiteout is visible: {}", first.output());
    assert!(!first.stdout.contains("thin.json"));
    world.engine.assert_nothing_mounted();

    let engine = &mut world.engine;
    let create = [
        "create",
        "--network=host",
        "--name",
        "old",
        "thin:1",
        "/bin/busybox",
        "sh",
        "-c",
        "find / -xdev | wc -l",
    ];
    engine.docker(&create);
    let count = engine.docker(&["start", "-a", "old"]);
    assert!(count.parse::<u32>().unwrap() > 40, "{count}");
    engine.docker.restart().unwrap();
    assert_eq!(engine.docker(&["start", "-a", "old"]), count, "after a restart of the engine");
    engine.kill_plugin();
    assert_eq!(engine.docker(&["start", "-a", "old"]), count, "after kill -9 of the plugin");
    engine.docker.stop();
    engine.kill_plugin();
    engine.docker.start().unwrap();
    assert_eq!(engine.docker(&["start", "-a", "old"]), count, "after restarts of both");

    // Commit, build upon, save, load.
    engine.docker(&["commit", "old", "thin:2"]);
    engine.docker(&["rm", "old"]);
    assert_eq!(
        engine.docker.run(&["thin:2", "/bin/busybox", "sh", "-c", "find / -xdev | wc -l"]).unwrap(),
        count
    );
    let saved = engine.directory.path().join("saved.tar");
    engine.docker(&["save", "-o", saved.to_str().unwrap(), "thin:1"]);
    engine.docker(&["rmi", "thin:2", "thin:1"]);
    engine.docker(&["load", "-i", saved.to_str().unwrap()]);
    assert_eq!(
        engine.docker.run(&["thin:1", "/bin/busybox", "sh", "-c", "find / -xdev | wc -l"]).unwrap(),
        count
    );
    let info = engine.docker(&["info"]);
    assert!(info.contains("revision"), "{info}");
    engine.assert_nothing_mounted();
}

#[test]
fn a_running_container_on_a_thin_image_does_not_notice_that_the_plugin_is_killed() {
    let mut world = World::new();
    world.load("thin:1", &world.descriptor(&world.layers()));
    let engine = &mut world.engine;
    engine.docker(&["run", "-d", "--network=host", "--name", "running", "thin:1", "/bin/sleep", "1000"]);
    engine.kill_plugin();
    let read = ["exec", "running", "/bin/busybox", "sh", "-c", "find / -xdev -type f | xargs md5sum | wc -l"];
    assert!(engine.docker(&read).parse::<u32>().unwrap() > 10);
    engine.docker(&["cp", "running:/usr", engine.directory.path().to_str().unwrap()]);
    engine.docker(&["rm", "-f", "running"]);
    engine.assert_nothing_mounted();
}

#[test]
fn a_repository_that_cannot_be_used_fails_the_start_within_half_a_minute_and_leaves_nothing() {
    let world = World::new();
    let layers = world.layers();
    world.load("good:1", &world.descriptor(&layers));
    world.load("gone:1", &world.descriptor(&[layers[0].clone(), "layers/gone".to_owned()]));
    let other = String::from_utf8(world.descriptor(&layers))
        .unwrap()
        .replace(".peer.example.org", ".lost.example.org");
    world.load("unknown:1", other.as_bytes());
    let before = world.engine.layers().len();
    let fails = |image: &str, reasons: &[&str]| {
        let started = std::time::Instant::now();
        let said =
            world.engine.failing_docker(&["run", "--rm", "--network=host", image, "/bin/busybox", "true"]);
        assert!(started.elapsed().as_secs() < 30, "{image}: {:?}", started.elapsed());
        assert!(reasons.iter().all(|reason| said.contains(reason)), "{image}: {said}");
        assert_eq!(world.engine.layers().len(), before, "{image} left a layer");
        let mountpoints = std::fs::read_dir(world.engine.home().join("cvmfs")).unwrap();
        let left: Vec<_> = mountpoints.map(|entry| entry.unwrap().file_name()).collect();
        assert!(left.is_empty(), "{image} left {left:?}");
        world.engine.assert_nothing_mounted();
    };
    // Once the client has seen the repository, its cache would do.
    world.origin.set_fault("*.cvmfspublished", testkit::Fault::Hang);
    fails("good:1", &["run `cvmfs-client check ingested-layers.peer.example.org`"]);
    world.origin.clear_faults();
    let wrong = Fixture::unpack("basic-sha1").unwrap();
    world.configure(&wrong.master_pub);
    fails("good:1", &["ingested-layers.peer.example.org", "key"]);
    world.configure(&world.fixture.master_pub);
    fails("gone:1", &["layer layers/gone not in repository ingested-layers.peer.example.org at revision"]);
    fails("unknown:1", &["repository ingested-layers.lost.example.org: ", "run `cvmfs-client check "]);
    world.engine.docker.run(&["good:1", "/bin/busybox", "true"]).unwrap();
    world.engine.docker.run(&["base:1", "/bin/busybox", "true"]).unwrap();
}
