//! A container of a thin image is committed: its changes become a layer in the repository, the image is thin again,
//! and runs elsewhere. Whatever fails on the way, nothing is lost.

#![allow(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

mod common;

use std::time::Duration;

use s3_testkit::s3_server::{Faults, LAYERS};
use s3_testkit::{LayerService, S3Server};
use testkit::image::busybox_layer;
use testkit::tar::TarBuilder;
use testkit::{Dockerd, Image, Published, Registry, ThinEngine};

struct World {
    registry: Registry,
    repository: Published,
    bucket: S3Server,
    service: LayerService,
    engine: ThinEngine,
    thin: String,
}

impl World {
    fn new(name: &str) -> World {
        let (registry, bucket) = (Registry::start().unwrap(), S3Server::start(true).unwrap());
        let repository = Published::create(&format!("{name}.example.org")).unwrap();
        let data = TarBuilder::new()
            .directory("srv", 0o755)
            .file("srv/name", 0o644, b"base")
            .file("srv/old", 0o644, b"old")
            .directory("srv/full", 0o755)
            .file("srv/full/stale", 0o644, b"stale");
        let image = Image::new([busybox_layer().unwrap().finish(), data.finish()])
            .config(serde_json::json!({"Cmd": ["/bin/cat", "/srv/name"], "Env": ["PATH=/bin", "A=b c $d"]}));
        registry.push("app", "1", &image).unwrap();
        let thin = registry.reference("thin/app", "1");
        repository.convert(&registry.reference("app", "1"), &["--output", &thin]).unwrap();
        let service = LayerService::start(&repository, &bucket, &[]).unwrap();
        let engine = ThinEngine::start().unwrap();
        engine.etc.add_published(&repository).unwrap();
        service.write_plugin_config(&repository.fqrn, &bucket, engine.layer_service_config()).unwrap();
        World { registry, repository, bucket, service, engine, thin }
    }

    fn docker(&self) -> &Dockerd {
        &self.engine.dockerd
    }

    /// Runs `script` in a container of `image`, and leaves the container.
    fn change(&self, container: &str, image: &str, script: &str) {
        let arguments = ["run", "--network=host", "--name", container, image, "/bin/sh", "-c", script];
        self.docker().docker(&arguments).unwrap();
    }

    /// What an image shows.
    fn shown(docker: &Dockerd, image: &str) -> String {
        docker.run(&[image, "/bin/sh", "-c", SHOW]).unwrap()
    }

    fn layers_in_bucket(&self) -> usize {
        std::fs::read_dir(self.bucket.root().join(LAYERS)).unwrap().count()
    }

    /// How often the image's top layer is thin: what `docker save` finds in it.
    fn descriptor(&self, image: &str) -> serde_json::Value {
        let file = self.repository.scratch().join("saved.tar");
        self.docker().docker(&["save", "-o", file.to_str().unwrap(), image]).unwrap();
        let unpacked = self.repository.scratch().join("saved");
        let _ = std::fs::remove_dir_all(&unpacked);
        std::fs::create_dir(&unpacked).unwrap();
        let tar = |file: &std::path::Path, into: &std::path::Path| {
            let mut command = std::process::Command::new("tar");
            command.arg("-xf").arg(file).arg("-C").arg(into);
            testkit::process::run(command, Duration::from_secs(60)).unwrap().success().unwrap();
        };
        tar(&file, &unpacked);
        let manifest = std::fs::read(unpacked.join("manifest.json")).unwrap();
        let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
        let top = manifest[0]["Layers"].as_array().unwrap().last().unwrap().as_str().unwrap();
        tar(&unpacked.join(top), &unpacked);
        serde_json::from_slice(&std::fs::read(unpacked.join("thin.json")).unwrap()).unwrap()
    }
}

const SHOW: &str = "cd /srv; for f in $(find . | sort); do stat -c '%n %F %a %u' $f; \
                    [ -f $f ] && cat $f; done; echo; ls /; echo $A";
const CHANGE: &str = "cd /srv; echo new > name; rm old; rm -r full; mkdir full; echo fresh > full/fresh; \
                      ln name link; ln -s name soft; chmod 640 name; dd if=/dev/urandom of=noise bs=1k count=300 2>/dev/null";

#[test]
fn a_committed_container_is_a_thin_image_that_runs_here_and_elsewhere() {
    let world = World::new("commit");
    let docker = world.docker();
    world.change("one", &world.thin, CHANGE);
    let expected =
        docker.docker(&["commit", "one", "committed:1"]).map(|_| World::shown(docker, "committed:1"));
    let expected = expected.unwrap();
    assert!(expected.contains("fresh") && expected.contains("b c $d"), "{expected}");
    assert!(!expected.contains("stale") && !expected.contains("./old"), "{expected}");
    // The container itself sees the same.
    docker.docker(&["start", "one"]).unwrap();
    docker.docker(&["wait", "one"]).unwrap();
    let descriptor = world.descriptor("committed:1");
    let layers = descriptor["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 3, "{descriptor}");
    let digest = layers[2]["digest"].as_str().unwrap();
    assert_eq!(layers[2]["url"], format!("cvmfs://{}/layers/{digest}", world.repository.fqrn));
    assert!(world.bucket.root().join(LAYERS).join(digest).is_file());

    // On top of it once more, with a layer that hides some of the committed one.
    world.change("two", "committed:1", "cd /srv; rm full/fresh; echo newer > name");
    docker.docker(&["commit", "-c", "CMD [\"/bin/cat\", \"/srv/name\"]", "two", "committed:2"]).unwrap();
    assert_eq!(world.descriptor("committed:2")["layers"].as_array().unwrap().len(), 4);
    assert_eq!(docker.run(&["committed:2"]).unwrap(), "newer");
    assert!(!World::shown(docker, "committed:2").contains("fresh"));

    // Pushed, pulled by another engine, run.
    let pushed = world.registry.reference("thin/app", "2");
    docker.docker(&["tag", "committed:2", &pushed]).unwrap();
    docker.docker(&["push", &pushed]).unwrap();
    let other = ThinEngine::start().unwrap();
    other.etc.add_published(&world.repository).unwrap();
    other.dockerd.docker(&["pull", &pushed]).unwrap();
    assert_eq!(other.dockerd.run(&[&pushed]).unwrap(), "newer");
    assert_eq!(World::shown(&other.dockerd, &pushed), World::shown(docker, "committed:2"));
    // A classic builder commits a container for each RUN, and writes other layers by itself.
    let context = world.repository.scratch().join("context");
    std::fs::create_dir(&context).unwrap();
    let dockerfile =
        format!("FROM {}\nRUN echo built > /srv/name; rm /srv/old\nCOPY Dockerfile /srv/\n", world.thin);
    std::fs::write(context.join("Dockerfile"), dockerfile).unwrap();
    let mut build = docker.docker_command(&["build", "--network=host", "-t", "built:1"]);
    build.arg(&context).env("DOCKER_BUILDKIT", "0");
    testkit::process::run(build, Duration::from_secs(120)).unwrap().success().unwrap();
    let shown = docker.run(&["built:1", "/bin/sh", "-c", "cat /srv/name; ls /srv"]).unwrap();
    assert_eq!(shown, "built\nDockerfile\nfull\nname");
    assert_eq!(world.layers_in_bucket(), 3);
    world.repository.publish("check", &[]).unwrap().success().unwrap();
    let info = docker.docker(&["info", "--format", "{{json .DriverStatus}}"]).unwrap();
    assert!(info.contains(&world.repository.fqrn) && !info.contains("not-a-secret"), "{info}");
}

#[test]
fn what_changes_nothing_or_is_not_thin_only_is_committed_as_ever() {
    let world = World::new("asever");
    let docker = world.docker();
    let name = |image: &str| docker.run(&[image, "/bin/cat", "/srv/name"]).unwrap();
    world.change("nothing", &world.thin, "true");
    docker.docker(&["commit", "nothing", "same:1"]).unwrap();
    assert_eq!(name("same:1"), "base");
    // A normal image, and a container on a mixed one.
    let normal = world.registry.reference("app", "1");
    world.change("normal", &normal, "echo n > /srv/name");
    docker.docker(&["commit", "normal", "normal:2"]).unwrap();
    assert_eq!(name("normal:2"), "n");
    // BuildKit writes its layers by itself.
    let context = world.repository.scratch().join("context");
    std::fs::create_dir(&context).unwrap();
    std::fs::write(context.join("Dockerfile"), format!("FROM {}\nRUN echo built > /srv/name\n", world.thin))
        .unwrap();
    let build =
        docker.docker_command(&["build", "--network=host", "-t", "mixed:1", context.to_str().unwrap()]);
    let mut build = build;
    build.env("DOCKER_BUILDKIT", "1");
    testkit::process::run(build, Duration::from_secs(120)).unwrap().success().unwrap();
    assert_eq!(name("mixed:1"), "built");
    world.change("mixed", "mixed:1", "echo mixed > /srv/name");
    docker.docker(&["commit", "mixed", "mixed:2"]).unwrap();
    assert_eq!(name("mixed:2"), "mixed");
    assert_eq!(world.layers_in_bucket(), 0, "nothing of this is the layer service's business");
}

#[test]
fn a_commit_that_cannot_be_published_fails_with_the_reason_and_can_be_repeated() {
    let mut world = World::new("fails");
    world.change("one", &world.thin, CHANGE);
    let commit = |world: &World| world.docker().docker_output(&["commit", "one", "committed:1"]).unwrap();
    let refused = |world: &World, reasons: &[&str]| {
        let finished = commit(world);
        assert!(!finished.status.success(), "{}", finished.output());
        for reason in reasons {
            assert!(finished.output().contains(reason), "{reason}: {}", finished.output());
        }
        assert!(!finished.output().contains("not-a-secret"));
        assert!(!world.docker().docker(&["images"]).unwrap().contains("committed"));
    };
    world.bucket.break_with(Faults { refuse_layers: Some(403), ..Faults::default() });
    refused(&world, &["cannot store layer", "403"]);
    world.bucket.break_with(Faults::default());
    // The service is gone: an error within a minute, and the layer stays in the bucket.
    world.service.end(true);
    refused(&world, &["layer service", "does not answer"]);
    assert_eq!(world.layers_in_bucket(), 1);
    // config.json is damaged: no silent change of what a commit means.
    let config = world.engine.layer_service_config().join("config.json");
    let good = std::fs::read(&config).unwrap();
    std::fs::write(&config, "{").unwrap();
    refused(&world, &["config.json"]);
    std::fs::write(&config, good).unwrap();
    world.service.run().unwrap();
    let finished = commit(&world);
    assert!(finished.status.success(), "{}", finished.output());
    assert!(World::shown(world.docker(), "committed:1").contains("fresh"));
    assert_eq!(world.layers_in_bucket(), 1, "the same changes are the same layer");
    // Without the configuration a commit makes an ordinary layer.
    std::fs::remove_file(&config).unwrap();
    world.docker().docker(&["commit", "one", "ordinary:1"]).unwrap();
    assert_eq!(World::shown(world.docker(), "ordinary:1"), World::shown(world.docker(), "committed:1"));
}
