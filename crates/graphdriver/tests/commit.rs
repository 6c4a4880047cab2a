//! Commits of containers of thin images against a layer service that says what the original one may say.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::Host;
use s3_testkit::S3Server;
use s3_testkit::s3_server::{ACCESS_KEY, Faults, LAYERS, SECRET_KEY};
use serde_json::{Value, json};
use testkit::tar::TarBuilder;

const FQRN: &str = "layers.example.org";
/// A container's id.
const CONTAINER: &str = "be08917b20fdc9735bc12399d2a1052568223cf17a3862bf23fb2e28691c91d2";

/// What the service answers, one after the other; the last one for ever.
type Script = Arc<Mutex<Vec<(u16, &'static str)>>>;

struct World {
    host: Host,
    bucket: S3Server,
    script: Script,
}

impl World {
    /// A host with a container on a thin image of one layer, in which one file was written and one deleted.
    fn new(options: &[&str], script: &[(u16, &'static str)]) -> World {
        let host = Host::start();
        host.call("Init", json!({"Home": host.home(), "Opts": options}));
        let bucket = S3Server::start(true).unwrap();
        let script: Script = Arc::new(Mutex::new(script.to_vec()));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (answers, repository) = (script.clone(), host.repositories.directory.join(FQRN));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut lines = BufReader::new(stream.unwrap());
                let mut request = String::new();
                if lines.read_line(&mut request).unwrap_or(0) == 0 {
                    continue;
                }
                let key = request.split(' ').nth(1).unwrap().rsplit('/').next().unwrap().to_owned();
                let mut script = answers.lock().unwrap();
                let (status, body) = if script.len() > 1 { script.remove(0) } else { script[0] };
                if body == "done" {
                    fs::create_dir_all(repository.join("layers").join(key)).unwrap();
                }
                let body = if body == "DONE" { "done" } else { body };
                let answer = format!(
                    "HTTP/1.1 {status} X\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                    body.len()
                );
                let _ = lines.get_mut().write_all(answer.as_bytes());
            }
        });
        let directory = host.directory.path().join("layer-service");
        fs::create_dir(&directory).unwrap();
        let config = json!({
            "accesskey": ACCESS_KEY, "AccessSecret": SECRET_KEY, "CvmfsRepo": FQRN, "SSL": false,
            "Host": bucket.address.trim_start_matches("http://"),
            "PublishStatusURL": format!("http://{address}/status/"),
        });
        fs::write(directory.join("config.json"), config.to_string()).unwrap();

        let base = host.repository_directory(FQRN, "layers/base");
        fs::write(base.join("old"), "old").unwrap();
        let thin = json!({"version": "1.0", "origin": "app:1", "layers":
            [{"digest": "ab".repeat(32), "url": format!("cvmfs://{FQRN}/layers/base")}]});
        let thin = TarBuilder::new().file("thin.json", 0o600, thin.to_string().as_bytes()).finish();
        host.add_layer("thin", "", &thin);
        host.create_container(CONTAINER, "thin");
        let tree = host.get(CONTAINER);
        fs::write(tree.join("new"), "new").unwrap();
        fs::remove_file(tree.join("old")).unwrap();
        host.put(CONTAINER);
        World { host, bucket, script }
    }

    /// The archive of the container's commit, or the message.
    fn commit(&self) -> Result<Vec<u8>, String> {
        let (status, body) = self.host.connect().diff(CONTAINER, &format!("{CONTAINER}-init"));
        let body = body.unwrap();
        if status == 200 {
            return Ok(body);
        }
        let answer: Value = serde_json::from_slice(&body).unwrap();
        Err(answer["Err"].as_str().unwrap().to_owned())
    }

    fn stored(&self) -> Vec<PathBuf> {
        fs::read_dir(self.bucket.root().join(LAYERS)).unwrap().map(|entry| entry.unwrap().path()).collect()
    }
}

/// The names in an archive.
fn names(tar: &[u8]) -> Vec<String> {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a.tar");
    fs::write(&file, tar).unwrap();
    let output = std::process::Command::new("tar").arg("-tf").arg(file).output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn a_commit_waits_for_the_original_service_and_answers_with_the_descriptor_alone() {
    let world = World::new(&[], &[(200, "unknown"), (200, "publishing"), (200, "publishing"), (200, "done")]);
    let archive = world.commit().unwrap();
    assert_eq!(names(&archive), ["thin.json"]);
    let stored = world.stored();
    assert_eq!(stored.len(), 1);
    let key = stored[0].file_name().unwrap().to_str().unwrap();
    let mut plain = Vec::new();
    flate2::read::GzDecoder::new(fs::File::open(&stored[0]).unwrap()).read_to_end(&mut plain).unwrap();
    assert_eq!(names(&plain), ["new", ".wh.old"], "whiteouts are those of layers");

    // What the engine makes of it is a thin layer on top of the image.
    world.host.add_layer("committed", "thin", &archive);
    let top = world.host.repository_directory(FQRN, &format!("layers/{key}"));
    fs::write(top.join("new"), "published").unwrap();
    world.host.create_container("c", "committed");
    let tree = world.host.get("c");
    assert_eq!(fs::read_to_string(tree.join("new")).unwrap(), "published");
    world.host.put("c");
    let text = fs::read_to_string(world.host.get("committed").join("thin.json")).unwrap();
    let descriptor: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(descriptor["origin"], "app:1", "the image's own words stay");
    assert_eq!(descriptor["layers"][1]["digest"], key);
    assert_eq!(descriptor["layers"].as_array().unwrap().len(), 2);
    // The same changes are the same layer, and it is not sent again.
    world.bucket.arrived();
    assert_eq!(world.commit().unwrap(), archive);
    assert!(world.bucket.arrived().iter().all(|request| request.method != "PUT"));
}

#[test]
fn row_80_a_service_that_publishes_for_ever_or_does_not_know_the_layer_ends_in_an_error_in_time() {
    let cases = [
        ((200, "publishing"), "cvmfsCommitTimeout=3", 20, "was not published within 3 seconds"),
        ((200, "unknown"), "cvmfsCommitTimeout=3", 20, "does not know it"),
        ((200, "unknown"), "cvmfsCommitTimeout=600", 55, "does not know it"),
        ((200, "perhaps"), "cvmfsCommitTimeout=3", 20, "something else than the state"),
        ((500, "done"), "cvmfsCommitTimeout=3", 20, "500"),
        // Published, but not seen here.
        ((200, "DONE"), "cvmfsCommitTimeout=3", 20, "cannot be read here"),
    ];
    std::thread::scope(|scope| {
        for (script, option, most, reason) in cases {
            scope.spawn(move || {
                let world = World::new(&[option], &[script]);
                let begun = Instant::now();
                let message = world.commit().unwrap_err();
                assert!(message.contains(reason) && message.contains("can be repeated"), "{message}");
                assert!(begun.elapsed() < Duration::from_secs(most), "{:?}", begun.elapsed());
                // Nothing is lost: it works once the service does.
                *world.script.lock().unwrap() = vec![(200, "done")];
                assert_eq!(names(&world.commit().unwrap()), ["thin.json"]);
            });
        }
    });
}

#[test]
fn row_81_an_upload_that_is_refused_or_lost_is_an_error_and_nothing_is_asked_of_the_service() {
    let world = World::new(&[], &[(200, "done")]);
    world.bucket.break_with(Faults { refuse_layers: Some(403), ..Faults::default() });
    let message = world.commit().unwrap_err();
    assert!(message.contains("cannot store layer") && message.contains("403"), "{message}");
    world.bucket.break_with(Faults { lost_uploads: 1, ..Faults::default() });
    let message = world.commit().unwrap_err();
    assert!(message.contains("is not there as a whole"), "{message}");
    // A store that is busy for a moment is tried again.
    world.bucket.break_with(Faults { busy: 3, ..Faults::default() });
    assert_eq!(names(&world.commit().unwrap()), ["thin.json"]);
    assert_eq!(world.stored().len(), 1);
}

#[test]
fn a_site_may_prefer_ordinary_layers_to_errors() {
    let world = World::new(&["cvmfsCommitFallback=diff"], &[(200, "done")]);
    world.bucket.break_with(Faults { refuse_layers: Some(403), ..Faults::default() });
    assert_eq!(names(&world.commit().unwrap()), ["new", ".wh.old"]);
    world.bucket.break_with(Faults::default());
    assert_eq!(names(&world.commit().unwrap()), ["thin.json"]);
    fs::write(world.host.directory.path().join("layer-service/config.json"), "{}").unwrap();
    assert_eq!(names(&world.commit().unwrap()), ["new", ".wh.old"]);
}
