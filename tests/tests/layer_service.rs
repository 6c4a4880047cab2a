//! The layer service publishes what engines leave in a bucket, whatever happens to it, to the store and to layers.

#![allow(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

mod common;

use std::time::Duration;

use s3_testkit::layer_service::leave_layer;
use s3_testkit::s3_server::{Faults, LAYERS};
use s3_testkit::{LayerService, S3Server};
use testkit::tar::TarBuilder;
use testkit::{MountBuilder, Published, http};

fn layer(name: &str) -> Vec<u8> {
    TarBuilder::new()
        .directory("etc", 0o755)
        .file("etc/name", 0o644, name.as_bytes())
        .file("etc/.wh.gone", 0o644, b"")
        .finish()
}

fn world(name: &str) -> (Published, S3Server) {
    (Published::create(&format!("{name}.example.org")).unwrap(), S3Server::start(true).unwrap())
}

#[test]
fn a_layer_in_the_bucket_becomes_a_directory_in_the_repository() {
    let (repository, bucket) = world("layers");
    // Without looking again: notifications and questions are enough.
    let service = LayerService::start(&repository, &bucket, &["--watch", "0"]).unwrap();
    let nobodys = "0".repeat(64);
    assert_eq!(service.state(&nobodys).unwrap().text(), "unknown");

    let notified = leave_layer(&bucket, &layer("one")).unwrap();
    assert_eq!(service.notify(&notified, &[]).unwrap().status, 200);
    let done = service.wait_for(&notified, "done").unwrap();
    assert_eq!((done.status, done.header("x-cvmfs-revision")), (200, Some("2")));
    assert_eq!(done.header("x-cvmfs-root-hash").unwrap().len(), 40);

    // An engine that asks makes a layer known whose notification was lost.
    let asked = leave_layer(&bucket, &layer("two")).unwrap();
    assert_eq!(service.state(&asked).unwrap().text(), "publishing");
    service.wait_for(&asked, "done").unwrap();

    let config = repository.client_config().unwrap();
    let mount = MountBuilder::new(&repository.fqrn, &config).option("layer_view").mount().unwrap();
    for (key, name) in [(&notified, "one"), (&asked, "two")] {
        let directory = mount.path().join("layers").join(key);
        assert_eq!(std::fs::read_to_string(directory.join("etc/name")).unwrap(), name);
        use std::os::unix::fs::FileTypeExt;
        let whiteout = std::fs::symlink_metadata(directory.join("etc/gone")).unwrap();
        assert!(whiteout.file_type().is_char_device(), "a whiteout as overlayfs reads it");
    }
    repository.publish("check", &[]).unwrap().success().unwrap();
    let metrics = http::get(service.address(), "/metrics").unwrap().text();
    assert!(metrics.contains("cvmfs_layer_service_published_total 2\n"), "{metrics}");
    let health = http::get(service.address(), "/healthz").unwrap();
    assert_eq!(health.status, 200, "{}", health.text());
}

#[test]
fn what_the_name_does_not_say_is_refused_with_the_reason_and_the_others_are_published() {
    let (repository, bucket) = world("refused");
    let good = leave_layer(&bucket, &layer("good")).unwrap();
    let no_archive = leave_layer(&bucket, b"this is no archive, however long one reads it").unwrap();
    let renamed = "ab".repeat(32);
    std::fs::copy(bucket.root().join(LAYERS).join(&good), bucket.root().join(LAYERS).join(&renamed)).unwrap();
    let escape = TarBuilder::new().file("../../etc/passwd", 0o644, b"root").finish();
    let escape = leave_layer(&bucket, &escape).unwrap();
    let service = LayerService::start(&repository, &bucket, &[]).unwrap();
    service.wait_for(&good, "done").unwrap();
    for (key, reason) in [(&renamed, "SHA-256"), (&no_archive, "archive"), (&escape, "..")] {
        let answer = service.wait_for(key, "unknown").unwrap();
        let told = answer.header("x-cvmfs-reason").unwrap_or_default();
        assert!(told.contains(reason), "{key}: {told}");
    }
    // Stored properly, it counts.
    std::fs::remove_file(bucket.root().join(LAYERS).join(&renamed)).unwrap();
    assert_eq!(service.state("../../etc/passwd").unwrap().text(), "unknown");
    assert_eq!(service.state("%2e%2e").unwrap().text(), "unknown");
    repository.publish("check", &[]).unwrap().success().unwrap();
}

#[test]
fn notifications_need_the_token_if_there_is_one_and_questions_do_not() {
    let (repository, bucket) = world("token");
    let token = repository.scratch().join("token");
    std::fs::write(&token, "open-sesame\n").unwrap();
    let options = ["--watch", "0", "--token-file", token.to_str().unwrap()];
    let service = LayerService::start(&repository, &bucket, &options).unwrap();
    let key = leave_layer(&bucket, &layer("one")).unwrap();
    for wrong in [&[][..], &[("Authorization", "Bearer open-sesamf")], &[("Authorization", "Bearer ")]] {
        assert_eq!(service.notify(&key, wrong).unwrap().status, 401);
    }
    assert_eq!(service.notify(&key, &[("Authorization", "Bearer open-sesame")]).unwrap().status, 200);
    service.wait_for(&key, "done").unwrap();
    assert!(!service.log_text().contains("sesame"), "no secret in a log");
    let post = |body: &[u8]| {
        let headers = [("Authorization", "open-sesame")];
        http::request(service.address(), "POST", "/", &headers, body).unwrap().status
    };
    assert_eq!((post(b""), post(b"{}"), post(b"nonsense")), (200, 200, 400));
    assert_eq!(post(&vec![b' '; 2 << 20]), 400, "a notification is small");
}

#[test]
fn a_store_that_is_down_delays_layers_and_loses_none() {
    let (repository, bucket) = world("down");
    let service = LayerService::start(&repository, &bucket, &["--watch", "1s"]).unwrap();
    let key = leave_layer(&bucket, &layer("one")).unwrap();
    bucket.break_with(Faults { cut_layers: 10, ..Faults::default() });
    service.notify(&key, &[]).unwrap();
    // A cut download is not the layer's fault as long as the store may be at fault; the content tells.
    let answer = service.wait_for(&key, "unknown").unwrap();
    assert!(answer.header("x-cvmfs-reason").unwrap().contains("SHA-256"), "{:?}", answer.headers);
    bucket.break_with(Faults::default());
    service.notify(&key, &[]).unwrap();
    service.wait_for(&key, "done").unwrap();
}

#[test]
fn a_service_that_is_killed_at_any_moment_goes_on_after_the_next_start() {
    let (repository, bucket) = world("killed");
    let mut service = LayerService::prepare(&repository, &bucket, &["--watch", "1s"]).unwrap();
    let mut keys = Vec::new();
    for round in 0..6_u64 {
        for number in 0..5 {
            keys.push(leave_layer(&bucket, &layer(&format!("{round}-{number}"))).unwrap());
        }
        service.run().unwrap();
        std::thread::sleep(Duration::from_millis(50 + 150 * round));
        service.end(round % 3 != 2);
    }
    service.run().unwrap();
    for key in &keys {
        service.wait_for(key, "done").unwrap();
    }
    repository.publish("check", &[]).unwrap().success().unwrap();
    let config = repository.client_config().unwrap();
    let mount = MountBuilder::new(&repository.fqrn, &config).mount().unwrap();
    for key in &keys {
        assert!(mount.path().join("layers").join(key).join("etc/name").is_file());
    }
}

#[test]
fn a_service_that_cannot_work_says_why_at_once() {
    let (repository, bucket) = world("cannot");
    let start = |options: &[&str]| {
        let mut service = LayerService::prepare(&repository, &bucket, options).unwrap();
        service.run().unwrap_err().to_string()
    };
    let text = start(&["--base", "../up"]);
    assert!(text.contains("../up"), "{text}");
    let key = repository.keys.join(format!("{}.key", repository.fqrn));
    std::fs::rename(&key, key.with_extension("away")).unwrap();
    let text = start(&[]);
    assert!(text.contains(&format!("{}.key", repository.fqrn)), "{text}");
}
