//! Images, registries and repositories that must not get through: a clear message, the
//! right exit code, and a repository that is as it was.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use testkit::tar::TarBuilder;
use testkit::{Fault, Image, Origin};

use crate::workplace::{FQRN, Ran, Workplace, image};

fn all_files(directory: &Path) -> Vec<String> {
    let output = Command::new("find").arg(directory).args(["-type", "f"]).output().unwrap();
    let mut files: Vec<String> =
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect();
    // What the publisher remembers for itself, beside its lock.
    files.retain(|file| !file.ends_with("/data/txn/publish.known"));
    files.sort();
    files
}

/// The conversion fails with this code, the repository keeps every file it had and gets
/// none, and nothing else is left.
fn fails(place: &Workplace, image: &str, code: i32) -> Ran {
    let before = all_files(&place.path("storage"));
    let started = Instant::now();
    let ran = place.convert(image, &["--output", &place.registry.reference("thin", "1")]);
    assert!(started.elapsed() < Duration::from_secs(30), "an answer within 30 seconds");
    assert_eq!(ran.code, code, "{}", ran.stderr);
    assert_eq!(ran.stdout, "");
    assert_eq!(all_files(&place.path("storage")), before);
    assert!(place.registry.manifest("thin", "1").is_err());
    place.assert_spool_is_empty();
    ran
}

fn push(place: &Workplace, image: &Image) -> String {
    place.registry.push("bad", "1", image).unwrap();
    place.registry.reference("bad", "1")
}

/// An image whose middle layer has this archive; all layers around it are good.
fn with_layer(tar: Vec<u8>) -> Image {
    let mut image = image();
    image.layers.insert(1, testkit::image::Layer::new(tar));
    image
}

#[test]
fn row_89_a_blob_that_was_damaged_in_the_registry() {
    let place = Workplace::new();
    let image = image();
    let reference = push(&place, &image);
    let digest = image.layers[1].digest();
    let file = place.registry.blob_file(&digest);
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let ran = fails(&place, &reference, 1);
    assert!(
        ran.stderr.contains(&digest) && ran.stderr.contains("was damaged or exchanged"),
        "{}",
        ran.stderr
    );
}

#[test]
fn row_89_a_layer_that_unpacks_to_something_else() {
    let place = Workplace::new();
    let mut image = image();
    image.layers[2].tar = TarBuilder::new().file("promised", 0o644, b"").finish();
    let ran = fails(&place, &push(&place, &image), 1);
    assert!(ran.stderr.contains("but the image configuration says"), "{}", ran.stderr);
}

#[test]
fn row_89_a_truncated_gzip_and_one_with_garbage_behind_it() {
    let place = Workplace::new();
    let mut cut = image();
    let length = cut.layers[0].blob.len();
    cut.layers[0].blob.truncate(length - 20);
    let ran = fails(&place, &push(&place, &cut), 1);
    assert!(ran.stderr.contains("the gzip stream is damaged or cut"), "{}", ran.stderr);

    let mut longer = image();
    longer.layers[0].blob.extend_from_slice(b"garbage");
    let ran = fails(&place, &push(&place, &longer), 1);
    assert!(ran.stderr.contains("the gzip stream is damaged or cut"), "{}", ran.stderr);
}

#[test]
fn archives_that_lead_out_of_the_layer() {
    let place = Workplace::new();
    for (name, word) in [("../escape", ".."), ("/absolute", "/absolute"), ("a/../../b", "..")] {
        let layer = TarBuilder::new().file("good", 0o644, b"").file(name, 0o644, b"x").finish();
        let ran = fails(&place, &push(&place, &with_layer(layer)), 1);
        assert!(ran.stderr.contains("layer sha256:") && ran.stderr.contains(word), "{}", ran.stderr);
    }
}

#[test]
fn something_that_is_no_archive() {
    let place = Workplace::new();
    for layer in [b"not a tar archive at all".to_vec(), vec![b'x'; 5000]] {
        let ran = fails(&place, &push(&place, &with_layer(layer)), 1);
        assert!(ran.stderr.contains("layer sha256:"), "{}", ran.stderr);
    }
}

#[test]
fn a_symbolic_link_that_leads_out_is_stored_as_it_is() {
    let place = Workplace::new();
    let layer = TarBuilder::new().symlink("out", "../../../etc/passwd").finish();
    let reference = push(&place, &with_layer(layer));
    place.convert(&reference, &[]).json();
    let published = place.published();
    let link = published.iter().find(|entry| entry["path"].as_str().unwrap().ends_with("/out")).unwrap();
    assert_eq!(link["target"], "../../../etc/passwd");
}

#[test]
fn an_image_that_is_not_there() {
    let place = Workplace::new();
    let reference = place.registry.reference("nothing", "1");
    let ran = fails(&place, &reference, 5);
    assert!(ran.stderr.contains(&format!("manifest of {reference} not found")), "{}", ran.stderr);
}

#[test]
fn a_layer_that_is_not_there() {
    let place = Workplace::new();
    let image = image();
    let reference = push(&place, &image);
    let file = place.registry.blob_file(&image.layers[1].digest());
    std::fs::remove_file(file).unwrap();
    let ran = fails(&place, &reference, 5);
    assert!(ran.stderr.contains(&image.layers[1].digest()), "{}", ran.stderr);
}

#[test]
fn a_registry_that_answers_500_or_is_not_there() {
    let place = Workplace::new();
    let origin = Origin::serve(place.directory.path()).unwrap();
    origin.set_fault("*", Fault::Status(500));
    let address = origin.address();
    let ran = fails(&place, &format!("{address}/x:1"), 4);
    assert!(ran.stderr.contains("answers 500"), "{}", ran.stderr);
    drop(origin);
    let ran = fails(&place, &format!("{address}/x:1"), 4);
    assert!(ran.stderr.contains(&format!("cannot reach {address}")), "{}", ran.stderr);
}

#[test]
fn a_target_that_cannot_be_written_is_noticed_before_anything_is_published() {
    let place = Workplace::new();
    let reference = push(&place, &image());
    let before = place.revision();
    let ran = place.convert(&reference, &["--output-archive", "/nonexistent/thin.tar"]);
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("cannot write /nonexistent/thin.tar"), "{}", ran.stderr);
    let ran = place.convert(&reference, &["--output", "127.0.0.1:1/thin:1"]);
    assert_eq!(ran.code, 4, "{}", ran.stderr);
    assert_eq!(place.revision(), before);
}

#[test]
fn a_thin_image_is_not_converted_again() {
    let place = Workplace::new();
    let target = place.registry.reference("already", "thin");
    let reference = push(&place, &image());
    place.convert(&reference, &["--output", &target]).json();
    let ran = fails(&place, &target, 1);
    assert!(ran.stderr.contains("is a thin image"), "{}", ran.stderr);
}

#[test]
fn a_platform_that_the_image_was_not_built_for() {
    let place = Workplace::new();
    let reference = push(&place, &image());
    let ran = place.convert(&reference, &["--platform", "linux/s390x"]);
    assert_eq!(ran.code, 5);
    assert!(ran.stderr.contains("no image for linux/s390x; it has: linux/"), "{}", ran.stderr);
}

#[test]
fn wrong_keys_and_a_wrong_name() {
    let place = Workplace::new();
    let reference = push(&place, &image());
    let keys = place.path("other-keys");
    cvmfs_publish::keys::KeyFiles::new(&keys, FQRN).create_missing(1_700_000_000).unwrap();
    let mut command = place.command();
    command.args(["convert", &reference, "--repository", FQRN, "--storage"]).arg(place.path("storage"));
    let ran: Ran = command.arg("--keys").arg(keys).output().unwrap().into();
    assert_eq!(ran.code, 3, "{}", ran.stderr);
    let nothing = place.path("spool");
    let mut command = place.command();
    command.args(["convert", &reference, "--repository", FQRN, "--storage"]).arg(nothing);
    let ran: Ran = command.arg("--keys").arg(place.path("keys")).output().unwrap().into();
    assert_eq!(ran.code, 5, "{}", ran.stderr);
}

#[test]
fn wrong_usage() {
    let place = Workplace::new();
    for image in ["UPPER:1", "a//b", "docker-archive:", "oci::x"] {
        let ran = place.convert(image, &[]);
        assert_eq!(ran.code, 2, "{image}: {}", ran.stderr);
    }
    assert_eq!(place.convert("a:1", &["--platform", "any"]).code, 2);
    assert_eq!(place.run(&["manifest", "a:1", "--platform", "all"]).code, 2);
    let reference = push(&place, &image());
    assert_eq!(place.convert(&reference, &["--subdirectory", "a/../b"]).code, 2);
    assert_eq!(place.run(&["--registry", "ftp://x", "manifest", "a:1"]).code, 2);
}

#[test]
fn a_full_spool_is_out_of_space() {
    let place = Workplace::new();
    let mut state = 1u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0]
    })
    .take(4_000_000)
    .collect();
    let reference = push(&place, &Image::new([TarBuilder::new().file("noise", 0o644, &noise).finish()]));
    let spool = place.path("spool");
    let mount =
        |arguments: &[&str]| assert!(Command::new("mount").args(arguments).status().unwrap().success());
    mount(&["-t", "tmpfs", "-o", "size=1m", "tmpfs", spool.to_str().unwrap()]);
    let ran = fails(&place, &reference, 6);
    assert!(Command::new("umount").arg(&spool).status().unwrap().success());
    assert!(ran.stderr.contains("--spool names another directory"), "{}", ran.stderr);
}

#[test]
fn an_interrupt_during_the_download_leaves_nothing() {
    let place = Workplace::new();
    let image = image();
    push(&place, &image);
    // The registry's content through a server that goes slow on the first layer.
    let root = place.path("mirror");
    let blobs = root.join("v2/bad/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::create_dir_all(root.join("v2/bad/manifests")).unwrap();
    std::fs::write(root.join("v2/bad/manifests/1"), image.manifest()).unwrap();
    for blob in image.layers.iter().map(|layer| layer.blob.clone()).chain([image.config_blob()]) {
        std::fs::write(blobs.join(testkit::image::digest(&blob)), &blob).unwrap();
    }
    let origin = Origin::serve(&root).unwrap();
    origin.set_fault(&format!("*{}", image.layers[0].digest()), Fault::Slow(100));
    let before = all_files(&place.path("storage"));
    let mut command = place.convert_command(&format!("{}/bad:1", origin.address()), &[]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while !origin.requests().iter().any(|request| request.path.contains(&image.layers[1].digest())) {
        assert!(Instant::now() < deadline, "{:?}", origin.requests());
        std::thread::sleep(Duration::from_millis(20));
    }
    let asked = Instant::now();
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    let ran: Ran = child.wait_with_output().unwrap().into();
    assert!(asked.elapsed() < Duration::from_secs(5));
    assert_eq!(ran.code, 130, "{}", ran.stderr);
    assert!(ran.stderr.contains("interrupted"), "{}", ran.stderr);
    assert_eq!(all_files(&place.path("storage")), before);
    place.assert_spool_is_empty();
    // The same again, undisturbed.
    origin.clear_faults();
    place.convert(&format!("{}/bad:1", origin.address()), &[]).json();
}

#[test]
fn a_kill_during_the_download_leaves_nothing_and_the_next_run_succeeds() {
    let place = Workplace::new();
    let reference = push(&place, &image());
    for wait in [0, 5, 10, 20, 40, 60] {
        let mut child = place
            .convert_command(&reference, &[])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(wait));
        let _ = child.kill();
        child.wait().unwrap();
        if place.revision() == 1 {
            continue;
        }
        assert_eq!(place.revision(), 2, "all layers or none");
        break;
    }
    let report = place.convert(&reference, &[]).json();
    assert_eq!(report["revision"], 2);
    place.assert_consistent();
}

#[test]
fn a_destination_that_cannot_be_reached_is_called_by_its_name() {
    let place = Workplace::new();
    let reference = push(&place, &image());
    let ran = place.convert(&reference, &["--output", "127.0.0.1:1/thin:1"]);
    assert_eq!(ran.code, 4, "{}", ran.stderr);
    assert!(
        ran.stderr.contains("destination 127.0.0.1:1/thin:1: cannot reach 127.0.0.1:1"),
        "{}",
        ran.stderr
    );
    assert!(!ran.stderr.contains("sha256:"), "{}", ran.stderr);
    assert_eq!(place.revision(), 1);
}

#[test]
fn a_pull_without_a_target_names_both() {
    let ran = Workplace::new().run(&["pull", "image:1"]);
    assert_eq!(ran.code, 2);
    assert!(ran.stderr.contains("DIRECTORY") && ran.stderr.contains("--repository"), "{}", ran.stderr);
}
