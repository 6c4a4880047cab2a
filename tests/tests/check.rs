//! `cvmfs-client check` names what prevents a mount and what to do about it, in bounded time.

#![allow(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

mod common;

use std::process::Command;
use std::time::{Duration, Instant};

use testkit::process::{Finished, run};
use testkit::{Fault, Fixture, Origin, ScratchDir, binary};

/// The check's own bounds are shorter; the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(60);

struct Stage {
    fixture: Fixture,
    origin: Origin,
}

impl Stage {
    fn new(name: &str) -> Stage {
        let fixture = Fixture::unpack(name).unwrap();
        let origin = Origin::serve(&fixture.storage).unwrap();
        Stage { fixture, origin }
    }

    fn check(&self, options: &[&str]) -> Finished {
        let config = self.fixture.client_config(&self.origin.url()).unwrap();
        let mut all = vec![format!("config={}", config.display())];
        all.extend(options.iter().map(|option| (*option).to_owned()));
        let mut command = Command::new(binary("cvmfs-client"));
        command.args(["check", &self.fixture.fqrn, "-o", &all.join(",")]);
        let started = Instant::now();
        let finished = run(command, PATIENCE).unwrap();
        assert!(started.elapsed() < Duration::from_secs(40), "it took {:?}", started.elapsed());
        finished
    }
}

#[track_caller]
fn assert_line(finished: &Finished, state: &str, words: &[&str]) {
    let found = finished
        .stdout
        .lines()
        .any(|line| line.starts_with(state) && words.iter().all(|word| line.contains(word)));
    assert!(found, "no line '{state} … {words:?}' in\n{}", finished.output());
}

#[test]
fn a_repository_that_can_be_mounted_is_fine_in_every_part() {
    let stage = Stage::new("basic-sha1");
    let finished = stage.check(&[]);
    assert_eq!(finished.code(), Some(0), "{}", finished.output());
    for subject in ["configuration", "fuse", "kernel", "cache", "proxy", "server", "trust", "whitelist"] {
        assert_line(&finished, "ok", &[subject]);
    }
    assert!(finished.stdout.trim_end().ends_with("can be mounted, 0 warnings"), "{}", finished.output());
}

#[test]
fn the_proxy_and_the_server_that_are_down_are_blamed_and_no_other() {
    let stage = Stage::new("basic-sha1");
    let proxy = Origin::serve(&stage.fixture.storage).unwrap();
    let finished = stage.check(&[
        &format!("CVMFS_HTTP_PROXY={}|http://127.0.0.1:9", proxy.url()),
        &format!("CVMFS_SERVER_URL={};http://127.0.0.1:10/away", stage.origin.url()),
    ]);
    assert_eq!(finished.code(), Some(0), "one way works: {}", finished.output());
    assert_line(&finished, "ok", &["proxy", &proxy.url()]);
    assert_line(&finished, "WARNING", &["proxy", "http://127.0.0.1:9", "cannot connect"]);
    assert_line(&finished, "ok", &["server", &stage.origin.url()]);
    assert!(finished.stdout.contains("lets this machine connect"), "what to do: {}", finished.output());
}

#[test]
fn a_proxy_that_refuses_is_told_from_a_server_that_lacks_the_repository() {
    let stage = Stage::new("basic-sha1");
    let refusing = Origin::serve(&stage.fixture.storage).unwrap();
    refusing.set_fault("*", Fault::Status(403));
    let finished = stage.check(&[&format!("CVMFS_HTTP_PROXY={};DIRECT", refusing.url())]);
    assert_eq!(finished.code(), Some(0), "{}", finished.output());
    assert_line(&finished, "WARNING", &["proxy", &refusing.url(), "403"]);
    assert!(finished.stdout.contains("access rules"), "{}", finished.output());

    stage.origin.set_fault("*", Fault::Status(404));
    let finished = stage.check(&[]);
    assert_eq!(finished.code(), Some(4), "{}", finished.output());
    assert!(finished.stdout.contains("correct CVMFS_SERVER_URL"), "{}", finished.output());
}

#[test]
fn servers_that_are_all_down_or_silent_are_exit_code_4() {
    let stage = Stage::new("basic-sha1");
    let finished = stage.check(&["CVMFS_SERVER_URL=http://127.0.0.1:9/away;http://127.0.0.1:10/away"]);
    assert_eq!(finished.code(), Some(4), "{}", finished.output());
    assert_line(&finished, "FAILED", &["server", "127.0.0.1:9", "cannot connect"]);
    stage.origin.set_fault("*", Fault::Hang);
    let finished = stage.check(&[]);
    assert_eq!(finished.code(), Some(4), "{}", finished.output());
    assert_line(&finished, "FAILED", &["server", &stage.origin.url()]);
}

#[test]
fn a_broken_chain_of_trust_is_exit_code_3() {
    for (name, word) in
        [("bad-wrong-key", "key"), ("bad-expired-whitelist", "expired"), ("bad-manifest-sig", "manifest")]
    {
        let finished = Stage::new(name).check(&[]);
        assert_eq!(finished.code(), Some(3), "{name}: {}", finished.output());
        assert_line(&finished, "FAILED", &["trust", word]);
        assert_line(&finished, "ok", &["server"]);
    }
}

#[test]
fn an_unknown_parameter_is_shown_with_its_line_and_a_wrong_value_fails() {
    let stage = Stage::new("basic-sha1");
    let config = stage.fixture.client_config(&stage.origin.url()).unwrap();
    let mut text = std::fs::read_to_string(&config).unwrap();
    let line = text.lines().count() + 1;
    text.push_str("CVMFS_HTTP_PROXXY=DIRECT\n");
    std::fs::write(&config, text).unwrap();
    let check = |options: &str| {
        let mut command = Command::new(binary("cvmfs-client"));
        command.args(["check", &stage.fixture.fqrn, "-o"]);
        command.arg(format!("config={}{options}", config.display()));
        run(command, PATIENCE).unwrap()
    };
    let finished = check("");
    assert_eq!(finished.code(), Some(0), "{}", finished.output());
    let place = format!("{}:{line}", config.display());
    assert_line(&finished, "WARNING", &["configuration", &place, "CVMFS_HTTP_PROXY?"]);
    for wrong in [
        "CVMFS_TIMEOUT=5s",
        "CVMFS_SYSLOG_FACILITY=local3",
        "CVMFS_METRICS_LISTEN=9100",
        "CVMFS_TELEMETRY_SEND=often",
    ] {
        let finished = check(&format!(",{wrong}"));
        assert_eq!(finished.code(), Some(1), "{wrong}: {}", finished.output());
        assert!(
            finished.stdout.lines().any(|line| line.starts_with("FAILED") && line.contains("CVMFS_")),
            "{}",
            finished.output()
        );
    }
}

#[test]
fn telemetry_without_receiver_is_a_warning_and_no_obstacle() {
    let finished = Stage::new("basic-sha1").check(&["CVMFS_TELEMETRY_SEND=yes"]);
    assert_eq!(finished.code(), Some(0), "{}", finished.output());
    assert_line(&finished, "WARNING", &["telemetry", "CVMFS_INFLUX_HOST"]);
}

#[test]
fn a_cache_that_cannot_be_written_fails_and_the_rest_is_still_checked() {
    let stage = Stage::new("basic-sha1");
    let finished = stage.check(&["CVMFS_CACHE_BASE=/proc/no/such"]);
    assert_eq!(finished.code(), Some(1), "{}", finished.output());
    assert_line(&finished, "FAILED", &["cache", "/proc/no/such"]);
    assert_line(&finished, "ok", &["trust"]);
}

#[test]
fn the_findings_are_one_json_document() {
    let stage = Stage::new("basic-sha1");
    let config = stage.fixture.client_config(&stage.origin.url()).unwrap();
    let mut command = Command::new(binary("cvmfs-client"));
    command.args(["--json", "check", &stage.fixture.fqrn, "-o", &format!("config={}", config.display())]);
    let finished = run(command, PATIENCE).unwrap();
    let document: serde_json::Value = serde_json::from_str(&finished.stdout).unwrap();
    assert_eq!((&document["ok"], &document["fqrn"]), (&true.into(), &stage.fixture.fqrn.as_str().into()));
    assert!(
        document["revision"].as_u64().unwrap() > 0 && document["whitelist_expires"].is_i64(),
        "{document}"
    );
    let findings = document["findings"].as_array().unwrap();
    assert!(findings.iter().all(|one| one["state"] == "ok" && one["subject"].is_string()), "{document}");
}

#[test]
fn a_configuration_file_may_be_named_from_the_current_directory() {
    let stage = Stage::new("basic-sha1");
    let config = stage.fixture.client_config(&stage.origin.url()).unwrap();
    let mountpoint = ScratchDir::new("relative").unwrap();
    let client = |arguments: &[&str]| {
        let mut command = Command::new(binary("cvmfs-client"));
        command.args(arguments).current_dir(config.parent().unwrap());
        run(command, PATIENCE).unwrap()
    };
    let option = format!("config={}", config.file_name().unwrap().to_str().unwrap());
    let place = mountpoint.path().to_str().unwrap();
    client(&["mount", &stage.fixture.fqrn, place, "-o", &option]).success().unwrap();
    client(&["umount", place]).success().unwrap();
}

#[test]
fn a_mount_that_fails_at_the_servers_names_the_check_that_tells_more() {
    let fixture = Fixture::unpack("bad-whitelist-sig").unwrap();
    let origin = Origin::serve(&fixture.storage).unwrap();
    let config = fixture.client_config(&origin.url()).unwrap();
    let mountpoint = ScratchDir::new("untrusted").unwrap();
    let mut command = Command::new(binary("cvmfs-client"));
    command.args(["mount", &fixture.fqrn]).arg(mountpoint.path());
    command.arg("-o").arg(format!("config={}", config.display()));
    let finished = run(command, PATIENCE).unwrap();
    assert_eq!(finished.code(), Some(3), "{}", finished.output());
    let check = format!("`cvmfs-client check {} -o config={}`", fixture.fqrn, config.display());
    assert!(finished.stderr.contains(&check), "{}", finished.output());
    let reason = "invalid whitelist signature";
    assert_eq!(finished.stderr.matches(reason).count(), 1, "told once: {}", finished.output());
}

#[test]
fn a_reader_that_goes_away_ends_the_command_without_a_word() {
    let mut command = Command::new("sh");
    let script =
        "for verb in status metrics; do \"$0\" $verb | true; \"$0\" config x.example.org | true; done";
    command.args(["-c", script]).arg(binary("cvmfs-client"));
    let finished = run(command, PATIENCE).unwrap();
    assert!(!finished.stderr.contains("panicked"), "{}", finished.output());
}

#[test]
fn a_misspelt_log_level_is_wrong_usage() {
    let mut command = Command::new(binary("cvmfs-client"));
    command.args(["--log-level", "bogus", "status"]);
    let finished = run(command, PATIENCE).unwrap();
    assert_eq!(finished.code(), Some(2), "{}", finished.output());
    assert!(finished.stderr.contains("debug"), "it names the levels: {}", finished.output());
}
