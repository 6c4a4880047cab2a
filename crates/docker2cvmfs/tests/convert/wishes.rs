//! The loop over a wish list.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use testkit::process::{Service, wait, wait_until};
use testkit::registry::free_port;
use testkit::tar::TarBuilder;
use testkit::{Image, Registry, http};

use crate::workplace::{FQRN, Ran, Workplace};

const PATIENCE: Duration = Duration::from_secs(60);

fn file(name: &str, text: &str) -> Vec<u8> {
    TarBuilder::new().file(name, 0o644, text.as_bytes()).finish()
}

/// An image with the base of all others and a layer of its own.
fn app(text: &str) -> Image {
    Image::new([file("base", "for all"), file("own", text)])
}

impl Workplace {
    /// Writes the list: images of this workplace's registry.
    fn wish(&self, images: &[&str]) {
        let address = self.registry.address();
        let input: Vec<String> =
            images.iter().map(|image| format!("  - 'http://{address}/{image}'\n")).collect();
        let text = format!(
            "version: 1\nuser: robot\ncvmfs_repo: {FQRN}\noutput_format: '$(scheme)://{address}/thin/$(image)'\ninput:\n{}",
            input.concat()
        );
        std::fs::write(self.path("wishes.yaml"), text).unwrap();
    }

    fn loop_command(&self, more: &[&str]) -> Command {
        let mut command = self.command();
        command.arg("loop").arg(self.path("wishes.yaml")).arg("--state").arg(self.path("state"));
        command.arg("--storage").arg(self.path("storage")).arg("--keys").arg(self.path("keys")).args(more);
        command
    }

    fn round(&self, more: &[&str]) -> Ran {
        self.loop_command(&["--once", "--json"]).args(more).output().unwrap().into()
    }

    /// The report of a round in which some images may have failed.
    fn report(&self, more: &[&str]) -> Value {
        let ran = self.round(more);
        serde_json::from_str(&ran.stdout).unwrap_or_else(|_| panic!("{}", ran.stderr))
    }

    fn has_layer(&self, image: &Image, index: usize) -> bool {
        let path = format!("/layers/{}", image.layers[index].digest().replace("sha256:", ""));
        self.published_paths().contains(&path)
    }
}

fn counts(report: &Value) -> [u64; 4] {
    ["wished", "unchanged", "converted", "failed"].map(|key| report[key].as_u64().unwrap())
}

#[test]
fn a_list_is_converted_once_and_then_left_alone() {
    let place = Workplace::new();
    for tag in ["1.1", "1.2", "2.0"] {
        place.registry.push("team/app", tag, &app(tag)).unwrap();
    }
    place.registry.push("other", "latest", &app("other")).unwrap();
    place.wish(&["team/app:1.*", "other", "other:latest"]);
    let before = place.revision();

    let planned = place.report(&["--dry-run"]);
    assert_eq!(counts(&planned), [3, 0, 3, 0], "{planned}");
    assert!(planned["images"].as_array().unwrap().iter().all(|image| image["state"] == "planned"));
    assert_eq!(planned["images"][0]["bytes_new"], planned["images"][0]["bytes"]);
    assert_eq!(place.revision(), before);
    assert!(place.registry.manifest("thin/team/app", "1.1").is_err());

    let report = place.round(&[]).json();
    assert_eq!(counts(&report), [3, 0, 3, 0], "{report}");
    place.assert_consistent();
    for (tag, is_there) in [("1.1", true), ("1.2", true), ("2.0", false)] {
        assert_eq!(place.has_layer(&app(tag), 1), is_there, "{tag}");
        assert_eq!(place.registry.manifest("thin/team/app", tag).is_ok(), is_there, "{tag}");
    }
    assert!(place.registry.manifest("thin/other", "latest").is_ok());
    let log = place.registry.log_text();
    let gets = |log: &str, object: &str| {
        log.lines().filter(|line| line.contains("\"GET ") && line.contains(object)).count()
    };
    // The base is in all three images, under two names.
    assert_eq!(gets(&log, &app("x").layers[0].digest()), 1, "a shared layer is fetched once");

    let again = place.round(&[]).json();
    assert_eq!(counts(&again), [3, 3, 0, 0], "{again}");
    assert_eq!(again["revision"], report["revision"]);
    let later = place.registry.log_text();
    let new = &later[log.len()..];
    assert_eq!(
        gets(new, "/blobs/") + gets(new, "/manifests/"),
        0,
        "digests are asked for, nothing is fetched"
    );
    place.assert_spool_is_empty();
}

#[test]
fn row_105_an_image_that_cannot_be_converted_leaves_the_others_alone() {
    let place = Workplace::new();
    for name in ["a", "c"] {
        place.registry.push(name, "1", &app(name)).unwrap();
    }
    let mut damaged = app("b");
    damaged.layers[1].blob.truncate(30);
    place.registry.push("b", "1", &damaged).unwrap();
    place.wish(&["a:1", "b:1", "c:1", "missing:1", "nothing:*"]);
    let ran = place.round(&[]);
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    let report: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(counts(&report), [4, 0, 2, 3], "{report}");
    let error = |image: &str| {
        let images = report["images"].as_array().unwrap();
        let found = images.iter().find(|found| found["image"].as_str().unwrap().contains(image));
        found.unwrap_or_else(|| panic!("{image} in {report}"))["error"].as_str().unwrap().to_owned()
    };
    assert!(error("/b:1").contains(&damaged.layers[1].digest()), "{}", error("/b:1"));
    assert!(error("/missing:1").contains("not found"));
    assert!(error("/nothing:*").contains("not found"));
    // Nothing of the damaged image was published, not even the layer that is right.
    assert!(place.has_layer(&app("a"), 1) && place.has_layer(&app("c"), 1) && !place.has_layer(&damaged, 1));
    assert!(place.registry.manifest("thin/b", "1").is_err());
    place.assert_consistent();
    // As long as it does not change, it is not fetched again, unless somebody wants it.
    let fetched = |place: &Workplace| {
        let blob = format!("GET /v2/b/blobs/{}", damaged.layers[1].digest());
        place.registry.log_text().lines().filter(|line| line.contains(&blob)).count()
    };
    let (before, report) = (fetched(&place), place.report(&[]));
    assert_eq!(counts(&report), [4, 2, 0, 3], "{report}");
    assert!(report.to_string().contains("is fetched again not before"), "{report}");
    assert_eq!(fetched(&place), before);
    std::fs::remove_dir_all(place.path("state/unfit")).unwrap();
    assert_eq!(counts(&place.report(&[])), [4, 2, 0, 3]);
    assert!(fetched(&place) > before);
    // It is mended, and the next round finishes what the first one could not.
    place.registry.push("b", "1", &app("b")).unwrap();
    let report = place.report(&[]);
    assert_eq!(counts(&report), [4, 2, 1, 2], "{report}");
    assert!(place.has_layer(&app("b"), 1));
    place.assert_spool_is_empty();
}

#[test]
fn what_left_the_list_goes_after_its_grace_with_its_objects() {
    let place = Workplace::new();
    for name in ["a", "b"] {
        place.registry.push(name, "1", &app(name)).unwrap();
    }
    place.wish(&["a:1", "b:1"]);
    place.round(&[]).json();
    // A tag moves on, and an image leaves.
    place.registry.push("a", "1", &app("a, second")).unwrap();
    place.wish(&["a:1"]);
    let report = place.round(&[]).json();
    assert_eq!((&report["retired"], &report["layers_removed"]), (&json!(1), &json!(0)), "{report}");
    assert!(place.has_layer(&app("b"), 1) && place.has_layer(&app("a"), 1), "within the grace");

    let planned = place.report(&["--dry-run", "--grace", "0s"]);
    assert_eq!(planned["layers_removed"], 2, "{planned}");
    assert!(place.has_layer(&app("b"), 1));
    let report = place.round(&["--grace", "0s"]).json();
    assert_eq!(report["layers_removed"], 2, "{report}");
    assert!(!place.has_layer(&app("b"), 1) && !place.has_layer(&app("a"), 1));
    assert!(place.has_layer(&app("a, second"), 0), "the base is still needed");
    assert!(place.has_layer(&app("a, second"), 1));
    place.assert_consistent();
    let report = place.round(&["--grace", "0s"]).json();
    assert_eq!((&report["layers_removed"], &report["unchanged"]), (&json!(0), &json!(1)), "{report}");
    // It is wished for again.
    place.wish(&["a:1", "b:1"]);
    let report = place.round(&["--grace", "0s"]).json();
    assert_eq!(counts(&report), [2, 1, 1, 0], "{report}");
    assert!(place.has_layer(&app("b"), 1));
}

#[test]
fn a_registry_that_does_not_answer_and_a_broken_list_remove_nothing() {
    let mut place = Workplace::new();
    place.registry.push("a", "1", &app("a")).unwrap();
    place.wish(&["a:*"]);
    place.round(&[]).json();
    std::fs::write(place.path("wishes.yaml"), "version: 1\ncvmfs_repo: [").unwrap();
    let ran = place.round(&["--grace", "0s"]);
    assert_eq!(ran.code, 2, "{}", ran.stderr);
    assert!(ran.stderr.contains("wishes.yaml"), "{}", ran.stderr);
    place.wish(&["a:*"]);
    // The old one ends with its replacement.
    place.registry = Registry::start().unwrap();
    let report = place.report(&["--grace", "0s"]);
    assert_eq!(counts(&report)[3], 1, "{report}");
    assert_eq!((&report["retired"], &report["layers_removed"]), (&json!(0), &json!(0)));
    assert!(place.has_layer(&app("a"), 1));
}

#[test]
fn a_thin_image_that_was_deleted_is_made_again() {
    let place = Workplace::new();
    place.registry.push("a", "1", &app("a")).unwrap();
    place.wish(&["a:1"]);
    let report = place.round(&[]).json();
    let thin = place.registry.manifest("thin/a", "1").unwrap();
    let digest = {
        let address = place.registry.address();
        let accept = [("Accept", "application/vnd.docker.distribution.manifest.v2+json")];
        let answer = http::request(address, "GET", "/v2/thin/a/manifests/1", &accept, &[]).unwrap();
        answer.header("docker-content-digest").unwrap().to_owned()
    };
    place.registry.delete_manifest("thin/a", &digest).unwrap();
    assert!(place.registry.manifest("thin/a", "1").is_err());
    let again = place.round(&[]).json();
    assert_eq!(counts(&again), [1, 0, 1, 0], "{again}");
    assert_eq!((&again["revision"], &again["bytes_downloaded"]), (&report["revision"], &json!(0)));
    assert_eq!(place.registry.manifest("thin/a", "1").unwrap(), thin);
}

#[test]
fn two_images_cannot_have_one_thin_image() {
    let place = Workplace::new();
    for name in ["a", "b"] {
        place.registry.push(name, "1", &app(name)).unwrap();
    }
    place.wish(&["a:1", "b:1"]);
    let list = std::fs::read_to_string(place.path("wishes.yaml")).unwrap();
    std::fs::write(place.path("wishes.yaml"), list.replace("$(image)", "same:$(tag)")).unwrap();
    let report = place.report(&[]);
    assert_eq!(counts(&report), [1, 0, 1, 1], "{report}");
    let error = report["images"][0]["error"].as_str().unwrap();
    assert!(error.contains("/a:1") && error.contains("/b:1"), "{error}");
}

#[test]
fn another_layout_converts_anew_and_another_repository_is_refused() {
    let place = Workplace::new();
    place.registry.push("a", "1", &app("a")).unwrap();
    place.wish(&["a:1"]);
    place.round(&[]).json();
    let moved = place.round(&["--subdirectory", "elsewhere"]).json();
    assert_eq!(counts(&moved), [1, 0, 1, 0], "{moved}");
    let elsewhere = format!("/elsewhere/{}", app("a").layers[1].digest().replace("sha256:", ""));
    assert!(place.published_paths().contains(&elsewhere));
    // What the old layout had goes like everything that is replaced.
    let removed = place.round(&["--subdirectory", "elsewhere", "--grace", "0s"]).json();
    assert_eq!(removed["layers_removed"], 2, "{removed}");
    assert!(!place.has_layer(&app("a"), 1) && place.published_paths().contains(&elsewhere));
    let list = std::fs::read_to_string(place.path("wishes.yaml")).unwrap();
    std::fs::write(place.path("wishes.yaml"), list.replace(FQRN, "other.example.org")).unwrap();
    let ran = place.round(&[]);
    assert!(ran.code != 0 && ran.stderr.contains("--state"), "{}", ran.stderr);
}

#[test]
fn an_image_that_lies_about_a_shared_layer_spoils_only_itself() {
    let place = Workplace::new();
    let mut liar = app("liar");
    liar.layers[0].tar = file("base", "something else");
    liar.layers[1].tar = file("own", "something else");
    place.registry.push("a-liar", "1", &liar).unwrap();
    for name in ["b", "c"] {
        place.registry.push(name, "1", &app(name)).unwrap();
    }
    place.wish(&["a-liar:1", "b:1", "c:1"]);
    let before = place.revision();
    let report = place.report(&[]);
    assert_eq!(counts(&report), [3, 0, 2, 1], "{report}");
    assert!(place.has_layer(&app("b"), 0) && place.has_layer(&app("c"), 1) && !place.has_layer(&liar, 1));
    let after = place.revision();
    assert!(after > before);
    // Another round tries it again, and publishes nothing.
    std::fs::remove_dir_all(place.path("state/unfit")).unwrap();
    let report = place.report(&[]);
    assert_eq!(counts(&report)[1], 2, "{report}");
    assert_eq!(place.revision(), after);
    place.assert_consistent();
}

#[test]
fn two_loops_do_not_share_their_records() {
    let place = Workplace::new();
    place.registry.push("a", "1", &app("a")).unwrap();
    place.wish(&["a:1"]);
    std::fs::create_dir_all(place.path("state")).unwrap();
    let lock = std::fs::File::create(place.path("state/lock")).unwrap();
    lock.lock().unwrap();
    let ran = place.round(&[]);
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("--state"), "{}", ran.stderr);
}

/// A loop that runs, with its status page.
struct Running {
    service: Service,
    address: String,
}

impl Running {
    fn start(place: &Workplace, port: u16, more: &[&str]) -> Self {
        let address = format!("127.0.0.1:{port}");
        let mut command = place.loop_command(&["--listen", &address]);
        command.args(more);
        let mut service = Service::start("docker2cvmfs", command, &place.path("loop.log")).unwrap();
        service.wait_ready(PATIENCE, || http::get(&address, "/healthz").is_ok()).unwrap();
        Self { service, address }
    }

    fn status(&self) -> Value {
        serde_json::from_slice(&http::get(&self.address, "/status").unwrap().body).unwrap()
    }

    fn rounds(&self) -> u64 {
        self.status()["totals"]["rounds"].as_u64().unwrap()
    }

    fn wait_for_rounds(&self, rounds: u64) {
        let waited = wait_until("a round", PATIENCE, || {
            self.rounds() >= rounds && self.status()["state"] == "waiting"
        });
        waited.unwrap_or_else(|error| panic!("{error}: {}", self.service.log_text()));
    }
}

#[test]
fn a_push_is_looked_at_when_the_registry_tells() {
    let port = free_port().unwrap();
    let url = format!("http://127.0.0.1:{port}/webhook");
    let place = Workplace::with(Registry::start_notifying(&url, "Bearer s3cret-token").unwrap());
    place.registry.push("team/app", "1", &app("first")).unwrap();
    place.wish(&["team/app:*"]);
    std::fs::write(place.path("token"), "s3cret-token\n").unwrap();
    let token = place.path("token");
    let mut running =
        Running::start(&place, port, &["--interval", "1d", "--token-file", token.to_str().unwrap()]);
    running.wait_for_rounds(1);
    assert!(place.has_layer(&app("first"), 1));

    let rounds = running.rounds();
    place.registry.push("team/app", "1", &app("second")).unwrap();
    place.registry.push("team/app", "new", &app("third")).unwrap();
    wait_until("the second image", PATIENCE, || place.has_layer(&app("third"), 1)).unwrap();
    running.wait_for_rounds(rounds + 1);
    assert!(place.has_layer(&app("second"), 1));
    assert_eq!(running.status()["rounds"][0]["cause"], "notification");
    // Harbor's form, and what is refused.
    place.registry.push("team/app", "harbor", &app("fourth")).unwrap();
    let harbor = json!({"type": "PUSH_ARTIFACT", "event_data": {
        "resources": [{"tag": "harbor"}], "repository": {"repo_full_name": "team/app"}}})
    .to_string();
    let post = |authorization: &str, body: &[u8]| {
        http::request(&running.address, "POST", "/webhook", &[("Authorization", authorization)], body)
            .unwrap()
            .status
    };
    assert_eq!(post("s3cret-token", harbor.as_bytes()), 202);
    assert_eq!(post("Bearer other", harbor.as_bytes()), 401);
    assert_eq!(post("s3cret-token", b"no JSON"), 400);
    assert_eq!(post("s3cret-token", &vec![b' '; 2 << 20]), 400);
    wait_until("the fourth image", PATIENCE, || place.has_layer(&app("fourth"), 1)).unwrap();

    running.service.stop(Duration::from_secs(5));
    let log = running.service.log_text();
    assert!(!log.contains("s3cret"), "no secret in the log: {log}");
    place.assert_consistent();
}

#[test]
fn the_status_page_tells_what_was_converted_and_what_failed() {
    let place = Workplace::new();
    place.registry.push("good", "1", &app("good")).unwrap();
    place.wish(&["good:1", "missing:1"]);
    let running = Running::start(&place, free_port().unwrap(), &["--interval", "1d"]);
    running.wait_for_rounds(1);
    let status = running.status();
    assert_eq!(status["fqrn"], FQRN);
    let image = &status["images"][0];
    assert_eq!(image["image"], format!("http://{}/good:1", place.registry.address()));
    assert_eq!(image["layers"], 2);
    assert_eq!((&image["bytes"], &image["bytes_shared"]), (&image["bytes_downloaded"], &json!(0)));
    assert_eq!(status["rounds"][0]["failed"], 1);
    let page = http::get(&running.address, "/").unwrap();
    assert!(page.header("content-type").unwrap().starts_with("text/html"));
    let page = page.text();
    for words in [FQRN, "/good:1", "/missing:1", "not found"] {
        assert!(page.contains(words), "{words} in {page}");
    }
    let metrics = http::get(&running.address, "/metrics").unwrap().text();
    for line in ["docker2cvmfs_images 1", "docker2cvmfs_images_failed 1", "docker2cvmfs_up 1"] {
        assert!(metrics.lines().any(|found| found == line), "{line} in {metrics}");
    }
    assert_eq!(http::get(&running.address, "/healthz").unwrap().status, 200);
    assert_eq!(http::get(&running.address, "/nothing").unwrap().status, 404);
    // A list that breaks while the loop runs is said, and is no end.
    drop(running);
    let log = std::fs::read_to_string(place.path("loop.log")).unwrap();
    assert!(log.contains("2 images wished for"), "{log}");
}

#[test]
fn a_loop_ends_in_good_order_and_goes_on_after_a_broken_list() {
    let place = Workplace::new();
    place.registry.push("a", "1", &app("a")).unwrap();
    place.wish(&["a:1"]);
    let mut command = place.loop_command(&["--interval", "1s", "--listen", "127.0.0.1:0"]);
    let log = std::fs::File::create(place.path("loop.log")).unwrap();
    let mut child = command.stderr(Stdio::from(log)).stdout(Stdio::null()).spawn().unwrap();
    let log = || std::fs::read_to_string(place.path("loop.log")).unwrap();
    wait_until("a conversion", PATIENCE, || place.has_layer(&app("a"), 1)).unwrap();
    std::fs::write(place.path("wishes.yaml"), "version: 7\n").unwrap();
    wait_until("the complaint", PATIENCE, || log().contains("version 7")).unwrap();
    place.registry.push("b", "1", &app("b")).unwrap();
    place.wish(&["a:1", "b:1"]);
    wait_until("the next image", PATIENCE, || place.has_layer(&app("b"), 1)).unwrap();
    testkit::process::kill(child.id(), rustix::process::Signal::TERM);
    let status = wait(&mut child, Duration::from_secs(5)).unwrap().expect("it ends within 5 s");
    assert!(status.success(), "{status:?}: {}", log());
}

#[test]
fn row_91_a_kill_at_any_point_costs_nothing_but_time() {
    let place = Workplace::new();
    let images: Vec<Image> = (0..6).map(|n| app(&format!("image {n} {}", "x".repeat(20_000 * n)))).collect();
    for (number, image) in images.iter().enumerate() {
        place.registry.push("app", &number.to_string(), image).unwrap();
    }
    place.wish(&["app:*"]);
    // A round takes some hundred milliseconds: kills spread over all of it.
    let started = Instant::now();
    let mut kills = 0;
    for step in 0..40u64 {
        let mut child =
            place.loop_command(&["--once"]).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(4 + step * 7 % 260));
        if child.try_wait().unwrap().is_none() {
            kills += 1;
        }
        let _ = child.kill();
        child.wait().unwrap();
    }
    assert!(kills >= 10, "{kills} kills in {:?}", started.elapsed());
    let report = place.round(&[]).json();
    assert_eq!((counts(&report)[0], counts(&report)[3]), (6, 0), "{report}");
    let settled = place.round(&[]).json();
    assert_eq!(counts(&settled), [6, 6, 0, 0], "{settled}");
    for (number, image) in images.iter().enumerate() {
        assert!(place.has_layer(image, 0) && place.has_layer(image, 1));
        place.registry.manifest("thin/app", &number.to_string()).unwrap();
    }
    place.assert_consistent();
    // What the killed ones left is removed by the next one when it is a minute old.
    for left in std::fs::read_dir(place.path("spool")).unwrap() {
        let directory = std::fs::File::open(left.unwrap().path()).unwrap();
        directory.set_modified(std::time::SystemTime::now() - Duration::from_secs(61)).unwrap();
    }
    place.round(&[]).json();
    place.assert_spool_is_empty();
}
