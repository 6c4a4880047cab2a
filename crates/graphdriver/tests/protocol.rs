//! The protocol on a real socket: what engines send, what broken ones send, what breaks half-way.

mod common;

use std::fs;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::{Connection, Host};
use serde_json::json;
use testkit::tar::TarBuilder;

const EMPTY_ARCHIVE: [u8; 1024] = [0; 1024];

#[test]
fn a_managed_plugin_s_first_call_is_init_and_a_legacy_one_s_is_activate_without_a_body() {
    let host = Host::start();
    let mut connection = host.connect();
    assert_eq!(connection.post("/Plugin.Activate", ""), (200, json!({"Implements": ["GraphDriver"]})));
    let init = json!({"Home": host.home(), "Opts": null, "UIDMaps": null, "GIDMaps": null});
    assert_eq!(connection.call("Init", &init), (200, json!({})));
    let capabilities = json!({"Capabilities": {"ReproducesExactDiffs": false}});
    assert_eq!(connection.call("Capabilities", &json!({})), (200, capabilities));
}

#[test]
fn an_idle_connection_stays_open_and_serves_many_calls() {
    let host = Host::initialised();
    let mut connection = host.connect();
    for _ in 0..200 {
        assert_eq!(connection.call("Exists", &json!({"ID": "a"})), (200, json!({"Exists": false})));
    }
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(connection.call("Exists", &json!({"ID": "a"})).0, 200);
}

#[test]
fn a_call_repeated_with_an_empty_body_is_an_error_and_not_a_call_with_defaults() {
    let host = Host::initialised();
    for call in ["Init", "Create", "Get", "Put", "Remove", "Cleanup", "Status"] {
        let (status, answer) = host.connect().post(&format!("/GraphDriver.{call}"), "");
        assert_eq!(status, 500, "{call}");
        assert!(answer["Err"].as_str().unwrap().contains("empty"), "{call}: {answer}");
    }
}

#[test]
fn a_bad_request_gets_a_message_and_the_socket_stays_alive() {
    let host = Host::initialised();
    let mut connection = host.connect();
    for (body, named) in [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("{}", "ID"),
        (r#"{"ID": 5}"#, "cannot be read"),
        (r#"{"ID": "../../etc"}"#, "../../etc"),
        (r#"{"ID": "x", "Parent": "a/b"}"#, "a/b"),
        (r#"{"ID": ""}"#, "not a layer id"),
    ] {
        let (status, answer) = connection.post("/GraphDriver.Create", body);
        assert_eq!(status, 500, "{body}");
        assert!(answer["Err"].as_str().unwrap().contains(named), "{body}: {answer}");
    }
    assert_eq!(connection.post("/GraphDriver.Nonsense", "{}").0, 404);
    assert_eq!(connection.post("/", "{}").0, 404);
    assert_eq!(connection.call("Exists", &json!({"ID": "x"})), (200, json!({"Exists": false})));
}

#[test]
fn a_huge_body_is_refused_without_being_kept() {
    let host = Host::initialised();
    let mut connection = host.connect();
    let body = format!(r#"{{"ID": "{}"}}"#, "a".repeat(2 << 20));
    let (status, answer) = connection.post("/GraphDriver.Create", &body);
    assert_eq!(status, 413, "{answer}");
    assert!(!host.call("Exists", json!({"ID": "a"}))["Exists"].as_bool().unwrap());
}

#[test]
fn a_call_before_init_says_so_and_one_after_a_restart_works_without_init() {
    let mut host = Host::start();
    let told = host.failing_call("Create", json!({"ID": "a"}));
    assert!(told.contains("not initialised") && told.contains("Docker 28 and newer have no graph"), "{told}");
    host.init();
    host.create("a", "");
    host.restart();
    assert!(host.call("Exists", json!({"ID": "a"}))["Exists"].as_bool().unwrap());
    host.create("b", "a");
}

#[test]
fn an_init_with_an_unknown_option_is_refused_by_name_and_changes_nothing() {
    let host = Host::initialised();
    host.create("a", "");
    let bad = json!({"Home": host.home(), "Opts": ["cvmfsMountMethod=internal", "dm.basesize=10G"]});
    assert!(host.failing_call("Init", bad).contains("dm.basesize"));
    assert!(host.failing_call("Init", json!({"Home": "relative"})).contains("relative"));
    assert!(host.failing_call("Init", json!({"Home": "/a/../b"})).contains("/a/../b"));
    assert!(host.call("Exists", json!({"ID": "a"}))["Exists"].as_bool().unwrap());
}

#[test]
fn a_state_file_that_is_damaged_does_not_keep_the_plugin_from_starting() {
    let mut host = Host::initialised();
    fs::write(host.directory.path().join("state/init.json"), "{ damaged").unwrap();
    host.restart();
    assert!(host.failing_call("Create", json!({"ID": "a"})).contains("not initialised"));
    host.init();
    host.create("a", "");
}

#[test]
fn an_archive_that_is_cut_is_an_error_and_the_layer_can_be_removed() {
    let host = Host::initialised();
    host.create("a", "");
    let tar = TarBuilder::new().file("f", 0o644, &vec![1; 300_000]).finish();
    let mut connection = host.connect();
    connection.begin_apply("a", "");
    connection.send_chunk(&tar[..100_000]);
    drop(connection);
    host.remove("a");
    assert!(!host.home().join("a").exists());

    // A whole archive in a body without an end is cut as well.
    host.create("b", "");
    let mut connection = host.connect();
    connection.begin_apply("b", "");
    connection.send_chunk(&tar);
    drop(connection);
    host.remove("b");

    // An archive without its end, in a body with one.
    host.create("c", "");
    let (status, answer) = host.connect().apply("c", "", &tar[..100_000]);
    assert_eq!(status, 500, "{answer}");
}

#[test]
fn padding_after_the_archive_is_read_before_the_answer_comes() {
    let host = Host::initialised();
    host.create("a", "");
    let mut tar = TarBuilder::new().file("f", 0o644, b"12345").finish();
    tar.extend(vec![0; 3 << 20]);
    let mut connection = host.connect();
    assert_eq!(connection.apply("a", "", &tar), (200, json!({"Size": 5})));
    assert_eq!(connection.call("Exists", &json!({"ID": "a"})).0, 200, "the connection is still in step");
}

#[test]
fn a_bad_archive_is_named_to_the_engine_although_it_is_still_sending() {
    let host = Host::initialised();
    for (name, tar) in [
        ("outside", TarBuilder::new().file("../outside", 0o644, b"x")),
        ("absolute", TarBuilder::new().symlink("d", "/etc").file("d/../../x", 0o644, b"x")),
    ] {
        host.create(name, "");
        let tar = tar.file("big", 0o644, &vec![0; 5 << 20]).finish();
        let (status, answer) = host.connect().apply(name, "", &tar);
        assert_eq!(status, 500, "{answer}");
        assert!(answer["Err"].as_str().unwrap().contains(name), "{answer}");
        host.remove(name);
    }
    assert!(!host.home().join("outside").exists());
}

#[test]
fn an_archive_for_a_layer_on_another_parent_is_refused() {
    let host = Host::initialised();
    host.create("a", "");
    host.create("b", "a");
    let (status, answer) = host.connect().apply("b", "", &EMPTY_ARCHIVE);
    assert_eq!(status, 500);
    assert!(answer["Err"].as_str().unwrap().contains("created on another layer"), "{answer}");
}

#[test]
fn a_commit_of_an_unchanged_container_is_the_empty_archive() {
    let host = Host::initialised();
    host.add_layer("image", "", &TarBuilder::new().file("f", 0o644, b"x").finish());
    host.create_container("c", "image");
    host.get("c");
    assert_eq!(host.connect().diff("c", "c-init"), (200, Some(EMPTY_ARCHIVE.to_vec())));
    host.put("c");
}

#[test]
fn a_diff_that_cannot_begin_is_a_message_and_one_that_fails_later_cuts_the_connection() {
    let host = Host::initialised();
    assert!(host.failing_call("Diff", json!({"ID": "nothing"})).contains("nothing"));

    host.create("image", "");
    host.create_container("c", "image");
    let tree = host.get("c");
    fs::write(tree.join("file"), vec![7; 64 << 20]).unwrap();
    let mut connection = host.connect();
    let (status, mut body) = connection.begin_diff("c", "c-init");
    assert_eq!(status, 200);
    assert!(!body.next_piece().unwrap().is_empty());
    fs::File::options().write(true).open(tree.join("file")).unwrap().set_len(10).unwrap();
    while let Some(piece) = body.next_piece() {
        assert!(!piece.is_empty(), "the archive seemed to end properly");
    }
    host.put("c");
}

#[test]
fn a_commit_of_more_than_fits_any_buffer_feeds_its_diff_into_apply_diff_without_a_deadlock() {
    const BYTES: usize = 96 << 20;
    let host = Host::initialised();
    host.create("image", "");
    host.create_container("c", "image");
    let tree = host.get("c");
    let content: Vec<u8> = (0..BYTES).map(|i| u8::try_from(i / 4096 % 251).unwrap()).collect();
    fs::write(tree.join("big"), &content).unwrap();

    // As dockerd: Diff begins, then the new layer is created and gets the bytes as they come.
    let mut from = host.connect();
    let (status, mut archive) = from.begin_diff("c", "c-init");
    assert_eq!(status, 200);
    host.create("committed", "image");
    let mut to = host.connect();
    to.begin_apply("committed", "image");
    loop {
        let piece = archive.next_piece().expect("a whole archive");
        if piece.is_empty() {
            break;
        }
        to.send_chunk(&piece);
    }
    to.send("0\r\n\r\n");
    assert_eq!(to.json_answer(), (200, json!({"Size": BYTES})));
    host.put("c");
    assert_eq!(fs::read(host.get("committed").join("big")).unwrap(), content);
    host.put("committed");
}

#[test]
fn calls_on_other_layers_go_on_while_an_archive_is_stuck() {
    let host = Host::initialised();
    host.create("stuck", "");
    let mut connection = host.connect();
    connection.begin_apply("stuck", "");
    connection.send_chunk(&[0; 100]);
    host.create("a", "stuck");
    host.get("a");
    host.put("a");
    host.remove("a");
}

#[test]
fn half_a_request_does_no_harm() {
    let host = Host::initialised();
    for text in ["", "P", "POST /GraphDriver.Create HTTP/1.1\r\nContent-Le", "\0\u{1}garbage\r\n\r\n"] {
        let mut connection = Connection::open(&host.socket());
        connection.send(text);
        drop(connection);
    }
    drop(UnixStream::connect(host.socket()).unwrap());
    host.create("a", "");
}
