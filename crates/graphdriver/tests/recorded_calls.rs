//! What real engines call, call by call: every answer is the recorded one.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod common;

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use common::Host;
use serde_json::Value;
use testkit::tar::TarBuilder;

/// `Home` in the recordings.
const RECORDED_HOME: &str = "/var/lib/docker/protolog";
/// Size of busybox in the recordings' base layer.
const BUSYBOX_BYTES: usize = 1_982_263;

/// Plays recordings one after the other against one plugin.
struct Player {
    host: Host,
    /// The last archive that Diff gave: the next ApplyDiff on another layer gets it.
    archive: Option<Vec<u8>>,
    worked: HashSet<String>,
}

impl Player {
    fn new() -> Self {
        Self { host: Host::start(), archive: None, worked: HashSet::new() }
    }

    fn play(&mut self, name: &str) {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/recorded").join(format!("{name}.jsonl"));
        for line in fs::read_to_string(&file).unwrap().lines() {
            let recorded: Value = serde_json::from_str(line).unwrap();
            self.play_call(name, &recorded);
        }
    }

    fn play_call(&mut self, name: &str, recorded: &Value) {
        let path = recorded["call"].as_str().unwrap();
        let call = path.rsplit('.').next().unwrap();
        let context = format!("{name}, call {}: {call}", recorded["seq"]);
        let expected = self.here(&recorded["response"]);
        match call {
            "ApplyDiff" => {
                let archive = self.archive_for(&recorded["first_entries"]);
                let query = |key: &str| recorded["query"][key].as_str().unwrap();
                let (status, answer) = self.host.connect().apply(query("id"), query("parent"), &archive);
                assert_eq!((status, answer), (200, expected), "{context}");
            }
            "Diff" => {
                let request = &recorded["request"];
                let text = |key: &str| request[key].as_str().unwrap_or_default();
                let (status, archive) = self.host.connect().diff(text("ID"), text("Parent"));
                assert_eq!(status, 200, "{context}");
                let archive = archive.expect("a whole archive");
                let was_empty = expected == "<tar stream, 1024 bytes>";
                assert_eq!(archive == [0; 1024], was_empty, "{context}: {} bytes", archive.len());
                self.archive = Some(archive);
            }
            _ => {
                let body = match call {
                    "Activate" => String::new(),
                    _ => format!("{}\n", self.here(&recorded["request"])),
                };
                let (status, answer) = self.host.connect().post(path, &body);
                assert_eq!(status, 200, "{context}: {answer}");
                match call {
                    "Status" => assert_eq!(answer["Status"][0][0], "Backing Filesystem", "{context}"),
                    "GetMetadata" => {
                        assert_eq!(
                            answer["Metadata"]["UpperDir"], expected["Metadata"]["UpperDir"],
                            "{context}"
                        );
                    }
                    _ => assert_eq!(answer, expected, "{context}"),
                }
                if call == "Get" {
                    self.work_in(Path::new(answer["Dir"].as_str().unwrap()));
                }
            }
        }
    }

    /// The recording with this plugin's paths.
    fn here(&self, recorded: &Value) -> Value {
        let home = self.host.home();
        serde_json::from_str(&recorded.to_string().replace(RECORDED_HOME, home.to_str().unwrap())).unwrap()
    }

    /// An archive with the recorded entries: the one that Diff gave, or the images'.
    fn archive_for(&mut self, entries: &Value) -> Vec<u8> {
        let names: Vec<_> = entries.as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
        if names.first() == Some(&".") {
            let busybox = vec![7; BUSYBOX_BYTES];
            let tar = TarBuilder::new().directory("./", 0o755).directory("./bin/", 0o755);
            return tar.symlink("./bin/sh", "busybox").file("./bin/busybox", 0o755, &busybox).finish();
        }
        if let Some(archive) = self.archive.take() {
            assert_eq!(
                names_in(&archive),
                names.iter().map(|name| (*name).to_owned()).collect::<HashSet<_>>()
            );
            return archive;
        }
        assert_eq!(names, ["bin", "d", "new", "bin/.wh.sh", "d/f"], "an archive that the images do not have");
        let tar =
            TarBuilder::new().directory("bin/", 0o755).directory("d/", 0o755).file("new", 0o644, b"new\n");
        tar.file("bin/.wh.sh", 0o600, b"").file("d/f", 0o644, b"f\n").finish()
    }

    /// What the recorded containers and build steps did, once each.
    fn work_in(&mut self, tree: &Path) {
        let id = tree.parent().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
        if !self.worked.insert(id.clone()) || id.ends_with("-init") {
            return;
        }
        let write = |name: &str, bytes: usize| fs::write(tree.join(name), vec![b'x'; bytes]).unwrap();
        let make = |name: &str| fs::create_dir(tree.join(name)).unwrap();
        match id.get(..6).unwrap() {
            "5d4d60" => {
                fs::remove_file(tree.join("bin/sh")).unwrap();
                make("d");
                write("d/f", 2);
                write("new", 4);
            }
            "82480d" | "xcfv6f" => write("copied", 144),
            "0uw8x1" | "bc7qwj" => write("context", 144),
            "1782e2" | "sa49w3" => {
                fs::remove_file(tree.join("copied")).unwrap();
                make("x");
                write("x/y", 3);
            }
            "1c073b" | "i0djmw" => make("work"),
            _ => {}
        }
    }
}

/// Names of an archive's entries, without slashes at the end.
fn names_in(archive: &[u8]) -> HashSet<String> {
    let mut names = HashSet::new();
    let mut at = 0;
    while archive.get(at).is_some_and(|&first| first != 0) {
        let header = &archive[at..at + 512];
        let text = |range: std::ops::Range<usize>| {
            let field = &header[range];
            let end = field.iter().position(|&b| b == 0).unwrap_or(field.len());
            String::from_utf8(field[..end].to_vec()).unwrap()
        };
        names.insert(text(0..100).trim_end_matches('/').to_owned());
        let size = usize::from_str_radix(text(124..136).trim(), 8).unwrap();
        at += 512 + size.next_multiple_of(512);
    }
    names
}

#[test]
fn every_docker_verb_gets_the_recorded_answers_and_nothing_is_left_behind() {
    let mut player = Player::new();
    for name in [
        "01-daemon-start",
        "03-docker-import",
        "04-docker-run-rm",
        "05-docker-create",
        "06-docker-start",
        "07-docker-cp-from",
        "08-docker-diff",
        "09-docker-ps-size",
        "10-docker-inspect-container",
        "11-docker-commit",
        "12-docker-export",
        "13-docker-rm",
        "14-docker-save",
        "15-docker-push",
        "16-docker-rmi",
        "17-docker-pull-top-layer",
        "18-docker-rmi-all",
        "19-docker-pull-all",
    ] {
        player.play(name);
    }
    let host = player.host;
    assert!(host.mounted().is_empty());
    for id in ["2de67d", "9cb637"] {
        let entries =
            fs::read_dir(host.home()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let id = entries.into_iter().find(|name| name.starts_with(id)).expect("the pulled layer");
        host.remove(&id);
    }
    let mut left: Vec<_> = fs::read_dir(host.home()).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["l"]);
    assert_eq!(fs::read_dir(host.home().join("l")).unwrap().count(), 0);
}

#[test]
fn both_builders_and_all_restarts_get_the_recorded_answers() {
    let mut player = Player::new();
    player.play("01-daemon-start");
    for name in
        ["20-docker-load", "21-docker-build-legacy", "22-docker-build-buildkit", "23-docker-rmi-legacy-build"]
    {
        player.play(name);
    }
    player.play("25-builder-prune");
    player.play("26-docker-run-detached");
    player.play("27-docker-exec");
    assert_eq!(player.host.mounted().len(), 1, "one container runs");
    player.play("28-daemon-stop-running-container");
    assert!(player.host.mounted().is_empty());
    player.host.restart();
    player.play("29-daemon-start-stopped-containers");
    player.play("30-start");
    assert_eq!(player.host.mounted().len(), 1);
    player.play("32-daemon-start-after-sigkill");
    player.play("34-live-restore-daemon-start");
    assert_eq!(player.host.mounted().len(), 1, "the running container keeps its mount");
    player.play("35-live-restore-container-stop");
    assert!(player.host.mounted().is_empty());
}
