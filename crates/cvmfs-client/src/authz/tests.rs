use std::os::unix::fs::PermissionsExt;

use super::*;

/// A helper that writes what it is asked and with which environment to `log`, and answers as `answer` says, a
/// Python expression of `fields`, the question.
fn script(directory: &std::path::Path, answer: &str) -> PathBuf {
    let program = directory.join("cvmfs_test_helper");
    let text = format!(
        r#"#!/usr/bin/env -S PATH=/usr/local/bin:/usr/bin:/bin python3
import json, os, struct, sys, time
log = open({log:?}, "a")
def receive():
    header = sys.stdin.buffer.read(8)
    if len(header) < 8: sys.exit(0)
    version, length = struct.unpack("=II", header)
    return json.loads(sys.stdin.buffer.read(length))["cvmfs_authz_v1"]
def send(fields):
    fields["revision"] = 0
    text = json.dumps({{"cvmfs_authz_v1": fields}}).encode()
    sys.stdout.buffer.write(struct.pack("=II", 1, len(text)) + text)
    sys.stdout.buffer.flush()
hello = receive()
print("handshake", hello["fqrn"], dict(os.environ).get("TOKEN"), os.environ.get("HOME"), file=log, flush=True)
send({{"msgid": 1}})
while True:
    fields = receive()
    print(json.dumps(fields, sort_keys=True), file=log, flush=True)
    if fields["msgid"] == 4: sys.exit(0)
    send({{"msgid": 3, **({answer})}})
"#,
        log = directory.join("log"),
    );
    std::fs::write(&program, text).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    program
}

fn settings(directory: &std::path::Path) -> AuthorizationSettings {
    AuthorizationSettings {
        helper: None,
        search_path: directory.to_owned(),
        environment: vec![("TOKEN".into(), "/tokens".into())],
        syslog_facility: -1,
        syslog_level: 0,
        debug_log: None,
    }
}

fn caller(uid: u32) -> Caller {
    Caller { uid, gid: 100, pid: std::process::id() }
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

fn log(directory: &std::path::Path) -> Vec<String> {
    let text = std::fs::read_to_string(directory.join("log")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

#[test]
fn the_helper_decides_and_its_answer_holds_for_the_session() {
    let directory = tempfile::tempdir().unwrap();
    script(directory.path(), r#"{"status": 0 if fields["uid"] == 1000 else 3, "bearer_token": "t"}"#);
    let authorization = Authorization::new("a.example.org", settings(directory.path()));
    let granted = authorization.check(b"test%/cms", caller(1000), soon()).unwrap();
    assert_eq!(granted.as_deref(), Some(&Credentials::Bearer("t".into())));
    assert_eq!(authorization.check(b"test%/cms", caller(1001), soon()), Err(Denial::NotMember));
    for _ in 0..3 {
        authorization.check(b"test%/cms", caller(1000), soon()).unwrap();
    }
    assert!(authorization.known(b"test%/cms", caller(1000)).unwrap().is_ok());
    assert_eq!(authorization.known(b"test%/atlas", caller(1000)), None, "another requirement");
    let log = log(directory.path());
    assert_eq!(log[0], "handshake a.example.org /tokens None", "nothing else of the environment");
    assert_eq!(log.len(), 3, "one question for each session: {log:?}");
    assert!(log[1].contains("\"membership\": \"L2Ntcw==\""), "{log:?}");
}

#[test]
fn the_superuser_is_always_allowed_and_no_helper_is_started() {
    let authorization = Authorization::new("a.example.org", settings(std::path::Path::new("/absent")));
    assert_eq!(authorization.check(b"test%/cms", caller(0), soon()), Ok(None));
}

#[test]
fn without_a_usable_helper_everything_is_denied_with_the_reason() {
    let directory = tempfile::tempdir().unwrap();
    let check = |requirement: &[u8]| {
        let authorization = Authorization::new("a.example.org", settings(directory.path()));
        authorization.check(requirement, caller(1000), soon()).unwrap_err().to_string()
    };
    let missing = check(b"voms%/cms");
    assert!(missing.contains("cvmfs_voms_helper") && missing.contains("cannot be started"), "{missing}");
    for bad in [&b"../../bin/sh%x"[..], b"%x", b"no percent sign", b"\xff%x"] {
        assert!(check(bad).contains("none that could be a program"), "{bad:?}");
    }
    for (answer, reason) in [
        ("sys.exit(1)", "has ended"),
        (r#"{"msgid": 9}"#, "breaks the protocol"),
        (r#"{"status": 1}"#, "no credentials were found"),
    ] {
        script(directory.path(), answer);
        assert!(check(b"test%x").contains(reason), "{}", check(b"test%x"));
    }
}

#[test]
fn a_helper_that_is_silent_costs_its_caller_no_more_than_the_deadline() {
    let directory = tempfile::tempdir().unwrap();
    script(directory.path(), r#"time.sleep(30)"#);
    let authorization = Authorization::new("a.example.org", settings(directory.path()));
    let started = Instant::now();
    let denial = authorization.check(b"test%x", caller(1000), Deadline::after(Duration::from_millis(200)));
    assert!(denial.unwrap_err().to_string().contains("in time"));
    assert!(started.elapsed() < ANSWER_PATIENCE_IN_TESTS, "{:?}", started.elapsed());
}

const ANSWER_PATIENCE_IN_TESTS: Duration = Duration::from_secs(8);

#[test]
fn the_configured_helper_replaces_the_one_that_the_repository_names() {
    let directory = tempfile::tempdir().unwrap();
    let helper = script(directory.path(), r#"{"status": 0}"#);
    let settings = AuthorizationSettings {
        helper: Some(helper),
        search_path: "/absent".into(),
        ..settings(directory.path())
    };
    let authorization = Authorization::new("a.example.org", settings);
    authorization.check(b"voms%/cms", caller(1000), soon()).unwrap();
    authorization.check(b"no percent sign", caller(1000), soon()).unwrap();
}

#[test]
fn the_helper_ends_with_the_repository() {
    let directory = tempfile::tempdir().unwrap();
    script(directory.path(), r#"{"status": 0}"#);
    let authorization = Authorization::new("a.example.org", settings(directory.path()));
    authorization.check(b"test%x", caller(1000), soon()).unwrap();
    drop(authorization);
    let end = Instant::now() + Duration::from_secs(20);
    while !log(directory.path()).last().is_some_and(|line| line.contains("\"msgid\": 4")) {
        assert!(Instant::now() < end, "not asked to quit: {:?}", log(directory.path()));
        std::thread::yield_now();
    }
}

#[test]
fn a_process_that_cannot_be_identified_is_denied() {
    let directory = tempfile::tempdir().unwrap();
    script(directory.path(), r#"{"status": 0}"#);
    let authorization = Authorization::new("a.example.org", settings(directory.path()));
    let nobody = Caller { pid: 0, ..caller(1000) };
    assert!(
        authorization.check(b"test%x", nobody, soon()).unwrap_err().to_string().contains("PID namespace")
    );
    // An id-mapped mount: the helper, which would allow it, is not asked.
    for unknown in [caller(u32::MAX), Caller { gid: u32::MAX, ..caller(1000) }] {
        let denial = authorization.check(b"test%x", unknown, soon()).unwrap_err().to_string();
        assert!(denial.contains("must be mounted anew (CVMFS_FUSE_IDMAP)"), "{denial}");
    }
}
