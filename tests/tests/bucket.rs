//! An image is converted into a bucket, and the bucket itself serves the repository to the clients.

#![allow(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

mod common;

use std::process::Command;
use std::time::Duration;

use common::{Overlay, assert_same, layer_content, unpack_layers};
use s3_testkit::S3Server;
use s3_testkit::s3_server::BUCKET;
use testkit::process::{Finished, run};
use testkit::tar::TarBuilder;
use testkit::{Image, MountBuilder, Registry, ScratchDir, binary, compare, walk_tree};

const FQRN: &str = "bucket.example.org";

struct World {
    server: S3Server,
    directory: ScratchDir,
}

impl World {
    fn run(&self, program: &str, arguments: &[&str]) -> Finished {
        let mut command = Command::new(binary(program));
        command.args(arguments).args(["--storage", &format!("s3://{BUCKET}/{FQRN}"), "--keys"]);
        command.arg(self.directory.path()).envs(self.server.environment());
        run(command, Duration::from_secs(60)).unwrap()
    }
}

#[test]
fn an_image_is_converted_into_a_bucket_and_mounted_from_it() {
    // Anybody may read, as the clients do.
    let world =
        World { server: S3Server::start(false).unwrap(), directory: ScratchDir::new("bucket").unwrap() };
    world.run("cvmfs-publish", &["mkfs", FQRN]).success().unwrap();
    let registry = Registry::start().unwrap();
    let layers = [
        TarBuilder::new()
            .directory("etc", 0o755)
            .file("etc/a", 0o644, b"a")
            .file("etc/b", 0o4755, b"b")
            .finish(),
        TarBuilder::new()
            .directory("etc", 0o750)
            .file("etc/.wh.b", 0o644, b"")
            .file("etc/c", 0o644, b"c")
            .finish(),
    ];
    registry.push("test/app", "1", &Image::new(layers.clone())).unwrap();
    let convert = |output: &str| {
        let (from, to) = (registry.reference("test/app", "1"), registry.reference("thin/app", output));
        let done =
            world.run("docker2cvmfs", &["convert", &from, "--repository", FQRN, "--output", &to, "--json"]);
        let report: serde_json::Value = serde_json::from_str(&done.success().unwrap()).unwrap();
        let layers = report["layers"].as_array().unwrap();
        layers.iter().map(|layer| layer["state"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(convert("1"), ["new", "new"]);
    assert_eq!(convert("2"), ["present", "present"]);

    let config = world.directory.path().join("client.conf");
    let url = format!("{}/{BUCKET}/{FQRN}", world.server.address);
    let key = world.directory.path().join(format!("{FQRN}.pub"));
    let cache = world.directory.path().join("cache");
    testkit::fixture::write_client_config(&config, &cache, &url, &key).unwrap();
    let mount = MountBuilder::new(FQRN, &config).option("layer_view").option("cvmfs_suid").mount().unwrap();
    let manifest = registry.manifest("test/app", "1").unwrap();
    let mounted: Vec<_> = manifest["layers"]
        .as_array()
        .unwrap()
        .iter()
        .rev()
        .map(|layer| {
            let digest = layer["digest"].as_str().unwrap().trim_start_matches("sha256:").to_owned();
            mount.path().join("layers").join(digest)
        })
        .collect();
    let overlay = Overlay::of(&mounted.iter().map(std::path::PathBuf::as_path).collect::<Vec<_>>());
    let reference = unpack_layers(&[&layers[0], &layers[1]]);
    let expected = layer_content(&walk_tree(reference.path().join("root")));
    assert_same(&compare(&expected, &layer_content(&walk_tree(overlay.path()))));
    world.run("cvmfs-publish", &["check", FQRN]).success().unwrap();
}
