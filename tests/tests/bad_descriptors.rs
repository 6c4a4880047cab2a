//! A thin image with a descriptor that is not acceptable, or a repository that cannot be used, gives a clear
//! message to the user of `docker run`, in time; everything else keeps working.

#![allow(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

mod common;

use std::time::{Duration, Instant};

use common::assert_says;
use serde_json::json;
use testkit::tar::TarBuilder;
use testkit::{Fixture, Image, Origin, Published, Registry, ThinEngine};

/// `docker run` answers within this time.
const PATIENCE: Duration = Duration::from_secs(30);

struct World {
    registry: Registry,
    engine: ThinEngine,
    count: std::cell::Cell<u32>,
}

impl World {
    fn new() -> Self {
        let world = Self {
            registry: Registry::start().unwrap(),
            engine: ThinEngine::start().unwrap(),
            count: 0.into(),
        };
        world.registry.push("normal", "1", &Image::busybox().unwrap()).unwrap();
        world
    }

    /// Runs an image with this descriptor; it must fail with one of the words, and normal images must still
    /// run.
    #[track_caller]
    fn fails(&self, descriptor: &[u8], words: &[&str]) {
        let tag = self.count.get().to_string();
        self.count.set(self.count.get() + 1);
        let image = Image::new([TarBuilder::new().file("thin.json", 0o644, descriptor).finish()]);
        self.registry.push("bad", &tag, &image).unwrap();
        let mounts = self.mounted();

        let started = Instant::now();
        let finished =
            self.engine.dockerd.run_output(&[&self.registry.reference("bad", &tag), "/bin/true"]).unwrap();
        assert!(started.elapsed() < PATIENCE, "it took {:?}", started.elapsed());
        assert!(!finished.status.success(), "it ran: {}", finished.output());
        assert_says(&finished.output(), words);
        assert_eq!(self.mounted(), mounts, "something stayed mounted");

        let normal = self.registry.reference("normal", "1");
        assert_eq!(self.engine.dockerd.run(&[&normal, "/bin/echo", "still here"]).unwrap(), "still here");
    }

    fn mounted(&self) -> usize {
        let below = self.engine.propagated_mount().unwrap();
        testkit::mounts::below(&below).iter().filter(|mount| mount.kind != "ext4").count()
    }
}

fn descriptor(urls: &[String]) -> Vec<u8> {
    let layers: Vec<_> = urls.iter().map(|url| json!({"digest": "ab".repeat(32), "url": url})).collect();
    serde_json::to_vec(&json!({"version": "1.0", "origin": "test", "layers": layers})).unwrap()
}

#[test]
fn descriptors_that_are_not_acceptable_are_refused_with_the_reason() {
    let world = World::new();
    let one = |url: &str| descriptor(&[url.to_owned()]);
    world.fails(&one("cvmfs://repo.example.org/layers/../../etc"), &["'..'"]);
    world.fails(&one("https://repo.example.org/layers/x"), &["cvmfs://"]);
    world.fails(&one("cvmfs://repo'; reboot;'/layers/x"), &["repository name"]);
    let newer = json!({"version": "7.0", "layers": []});
    world.fails(&serde_json::to_vec(&newer).unwrap(), &["newer"]);
    let many: Vec<_> = (0..600).map(|n| format!("cvmfs://repo.example.org/layers/{n}")).collect();
    world.fails(&descriptor(&many), &["600"]);
    let mut large = descriptor(&[]);
    large.extend(std::iter::repeat_n(b' ', 2 << 20));
    world.fails(&large, &["larger than"]);
    world.fails(b"{ not json", &["not valid json"]);
}

#[test]
fn a_repository_that_cannot_be_used_is_named_with_the_reason() {
    let world = World::new();
    let etc = &world.engine.etc;
    let one = |fqrn: &str, path: &str| descriptor(&[format!("cvmfs://{fqrn}/{path}")]);

    world.fails(&one("unknown.example.org", "layers/x"), &["unknown.example.org"]);

    let wrong = Fixture::unpack("bad-wrong-key").unwrap();
    let origin = Origin::serve(&wrong.storage).unwrap();
    etc.add(&wrong.fqrn, &origin.url(), &wrong.master_pub).unwrap();
    world.fails(&one(&wrong.fqrn, "software"), &["whitelist", "key"]);

    let away = Published::create("away.example.org").unwrap();
    etc.add("away.example.org", "http://127.0.0.1:1", &away.public_key()).unwrap();
    world.fails(&one("away.example.org", "layers/x"), &["away.example.org"]);

    let present = Published::create("present.example.org").unwrap();
    etc.add_published(&present).unwrap();
    world.fails(&one("present.example.org", "layers/not-there"), &["layers/not-there"]);
}

#[test]
fn a_file_that_only_has_the_name_leaves_the_layer_ordinary() {
    let world = World::new();
    let image = Image::busybox()
        .unwrap()
        .layer(TarBuilder::new().file("thin.json", 0o644, b"{ not json").file("x", 0o644, b"x").finish());
    world.registry.push("ordinary", "1", &image).unwrap();
    let reference = world.registry.reference("ordinary", "1");
    assert_eq!(
        world.engine.dockerd.run(&[&reference, "/bin/cat", "/thin.json", "/x"]).unwrap(),
        "{ not jsonx"
    );
}
