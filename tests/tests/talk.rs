//! What an administrator asks a mount: with the stock tool `cvmfs_talk`, whose side of the conversation is played
//! here byte by byte, and with `cvmfs-client`.

#![allow(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use testkit::process::{Finished, run};
use testkit::tar::TarBuilder;
use testkit::{Fixture, Mount, MountBuilder, Origin, Published, ScratchDir, binary};

/// Longer than any command may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A fixture behind an origin, and a directory of its own as workspace.
struct Stage {
    fixture: Fixture,
    origin: Origin,
    workspace: ScratchDir,
}

impl Stage {
    fn new(name: &str) -> Stage {
        let fixture = Fixture::unpack(name).unwrap();
        let origin = Origin::serve(&fixture.storage).unwrap();
        Stage { fixture, origin, workspace: ScratchDir::new("workspace").unwrap() }
    }

    fn builder(&self) -> MountBuilder {
        let config = self.fixture.client_config(&self.origin.url()).unwrap();
        MountBuilder::new(&self.fixture.fqrn, &config)
            .option(&format!("CVMFS_WORKSPACE={}", self.workspace.path().display()))
    }

    /// Where `cvmfs_talk` looks.
    fn socket(&self) -> PathBuf {
        self.workspace.path().join(format!("cvmfs_io.{}", self.fixture.fqrn))
    }

    fn talk(&self, command: &str) -> String {
        cvmfs_talk(&self.socket(), command)
    }
}

/// As the stock tool does: the command without any end in one write, then everything up to the end.
fn cvmfs_talk(socket: &Path, command: &str) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(stream.write(command.as_bytes()).unwrap(), command.len());
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn client(arguments: &[&str]) -> Finished {
    let mut command = Command::new(binary("cvmfs-client"));
    command.args(arguments);
    run(command, PATIENCE).unwrap()
}

#[test]
fn the_stock_tool_finds_the_socket_and_gets_the_answers_it_expects() {
    let stage = Stage::new("basic-sha1");
    let mount = stage.builder().mount().unwrap();
    let status = mount.status().unwrap();
    let (pid, revision) = (status["pid"].to_string(), status["revision"].to_string());
    let metadata = fs::metadata(mount.path()).unwrap();
    let device = format!("{}:{}", rustix::fs::major(metadata.dev()), rustix::fs::minor(metadata.dev()));
    let host = stage.origin.url();
    let exact = [
        ("pid", pid.clone()),
        ("pid cachemgr", pid),
        ("mountpoint", mount.path().display().to_string()),
        ("device id", device),
        ("revision", revision),
        ("remount", "Catalog up to date".into()),
        ("remount sync", "Catalog up to date".into()),
        ("max ttl info", "unset".into()),
        ("max ttl set 5", "OK".into()),
        ("max ttl info", "5 minutes".into()),
        ("max ttl set 0", "OK".into()),
        ("max ttl info", "unset".into()),
        ("timeout info", "Timeout with proxy: 5s\nTimeout without proxy: 5s".into()),
        ("tracebuffer flush", "OK".into()),
        ("reset error counters", "OK".into()),
        ("version patchlevel", "0".into()),
        ("evict /sizes/rnd100001", "OK".into()),
        ("evict /sizes", "No such regular file".into()),
        ("evict /no/such", "No such regular file".into()),
        ("cleanup", "Usage: cleanup <MB>".into()),
        ("no such command", "unknown command".into()),
        ("external host info", "No hosts defined".into()),
        ("host info", format!("  [0] {host} (unprobed)\nActive host 0: {host}")),
        ("proxy info", "Load-balance groups:\n[0] DIRECT\nActive proxy: [0] DIRECT".into()),
    ];
    for (command, answer) in exact {
        assert_eq!(stage.talk(command), format!("{answer}\n"), "{command}");
    }
    // Tools of other versions end a command with a zero byte or a line end.
    assert_eq!(stage.talk("revision\0"), stage.talk("revision\n"));

    let version = stage.talk("version");
    assert!(version.contains(" (CernVM-FS Fuse Module)\n") && version.ends_with(" (Loader)\n"), "{version}");
    let size = stage.talk("cache size");
    assert!(size.starts_with("Current cache size is ") && size.contains(" Bytes), pinned: "), "{size}");
    let parameters = stage.talk("parameters");
    assert!(parameters.contains(&format!("CVMFS_SERVER_URL={host}    # from ")), "{parameters}");
    let affairs = stage.talk("internal affairs");
    assert!(
        affairs.contains("Name|Value|Description\n") && affairs.contains("\ndownload.n_requests|"),
        "{affairs}"
    );
    let history = stage.talk("hotpatch history");
    assert_eq!(history.lines().count(), 2, "{history}");

    assert_eq!(stage.talk("open catalogs"), "-> \n");
    fs::read_dir(mount.path().join("software")).unwrap().count();
    assert_eq!(stage.talk("open catalogs"), "-> \n    -> /software\n");
    assert_eq!(stage.talk("detach nested catalogs"), "OK\n");
    assert_eq!(stage.talk("open catalogs"), "-> \n");
    assert!(fs::read_dir(mount.path().join("software")).unwrap().count() > 0, "attached again when needed");

    // The process that replaces the worker when it dies.
    let supervisor: u32 = stage.talk("pid watchdog").trim().parse().unwrap();
    let line = fs::read(format!("/proc/{supervisor}/cmdline")).unwrap();
    assert!(String::from_utf8_lossy(&line).contains("supervisor"), "{line:?}");

    mount.unmount().unwrap();
    testkit::process::wait_until("the socket to go", PATIENCE, || !stage.socket().exists()).unwrap();
}

#[test]
fn servers_proxies_and_timeouts_can_be_changed_while_mounted() {
    let stage = Stage::new("basic-sha1");
    let mount = stage.builder().mount().unwrap();
    let (host, other) = (stage.origin.url(), Origin::serve(&stage.fixture.storage).unwrap());
    let proxy = Origin::serve(&stage.fixture.storage).unwrap();
    let (second, through) = (other.url(), proxy.url());
    let steps = [
        ("timeout set 7 8", "OK".to_owned()),
        ("timeout info", "Timeout with proxy: 7s\nTimeout without proxy: 8s".into()),
        (&format!("host set {host};{second}"), "OK".into()),
        ("host switch", "OK".into()),
        ("host info", format!("  [0] {host} (unprobed)\n  [1] {second} (unprobed)\nActive host 1: {second}")),
        ("nameserver set 192.0.2.53", "OK".into()),
        ("nameserver get", "DNS server address: 192.0.2.53".into()),
        (&format!("proxy set {through};DIRECT"), "OK".into()),
        (
            "proxy info",
            format!("Load-balance groups:\n[0] {through}\n[1] DIRECT\nActive proxy: [0] {through}"),
        ),
        ("proxy rebalance", "OK".into()),
        ("proxy group switch", "OK".into()),
        (
            "external host switch",
            "Failed, no servers of external files are configured (CVMFS_EXTERNAL_URL)".into(),
        ),
        ("host set nonsense", "Failed".into()),
        ("proxy set ftp://x", "Failed".into()),
    ];
    for (command, answer) in steps {
        let given = stage.talk(command);
        let exact = given == format!("{answer}\n");
        assert!(exact || answer == "Failed" && given.starts_with("Failed, "), "{command}: {given}");
    }
    assert!(stage.talk("proxy info").contains("Active proxy: [1] DIRECT\n"));
    assert_eq!(stage.talk("host probe"), "OK\n");
    assert!(stage.talk("host info").contains(" ms)"), "{}", stage.talk("host info"));
    // Requests take the new ways.
    other.clear_requests();
    proxy.clear_requests();
    assert_eq!(stage.talk(&format!("host set {second}")), "OK\n");
    fs::read(mount.path().join("sizes/rnd100001")).unwrap();
    assert_eq!(other.requests().len(), 1);
    let status = mount.status().unwrap();
    assert_eq!((&status["host"], &status["hosts"][0]["current"]), (&second.as_str().into(), &true.into()));
}

#[test]
fn an_evicted_file_is_fetched_again() {
    let stage = Stage::new("basic-sha1");
    let mount = stage.builder().mount().unwrap();
    let path = mount.path().join("sizes/rnd100001");
    let content = fs::read(&path).unwrap();
    let requests = || mount.status().unwrap()["requests"].as_u64().unwrap();
    let before = requests();
    assert!(fs::read(&path).unwrap() == content);
    assert_eq!(requests(), before);
    assert_eq!(stage.talk("evict /sizes/rnd100001"), "OK\n");
    assert!(fs::read(&path).unwrap() == content);
    assert_eq!(requests(), before + 1);
}

#[test]
fn the_cache_is_listed_bounded_emptied_and_pinned_on_request() {
    let stage = Stage::new("chunked");
    let mount = stage.builder().mount().unwrap();
    let largest =
        stage.fixture.manifest.iter().filter(|line| line.size.is_some()).max_by_key(|line| line.size);
    let path = largest.unwrap().path.to_str().unwrap().to_owned();
    let file = mount.path().join(path.trim_start_matches('/'));
    let status = |key: &str| mount.status().unwrap()[key].as_u64().unwrap();
    assert!(stage.talk("cache instance").contains("cache"), "{}", stage.talk("cache instance"));
    assert_eq!(stage.talk("cache limit get"), format!("{}\n", status("cache_limit") >> 20));
    assert_eq!(stage.talk("cache limit set 999"), "New limit too low (minimum 1000)\n");
    assert_eq!(stage.talk("cache limit set 1000"), "OK\n");
    assert_eq!(stage.talk("cache limit get"), "1000\n");

    let pinned = status("cache_pinned");
    assert_eq!(stage.talk("pin /no/such"), "No such regular file or pinning failed\n");
    assert_eq!(stage.talk(&format!("pin {path}")), "OK\n");
    assert!(status("cache_pinned") > pinned, "more is pinned");
    assert!(
        stage.talk("cache list pinned").lines().any(|line| line == path),
        "{}",
        stage.talk("cache list pinned")
    );
    assert!(stage.talk("cache list catalogs").lines().count() >= 1);
    assert!(stage.talk("cache list").lines().count() >= 2);
    // What is pinned stays, and needs no request any more.
    assert_eq!(stage.talk("cleanup 0"), "Not fully cleaned (there might be pinned chunks)\n");
    let requests = status("requests");
    let content = fs::read(&file).unwrap();
    assert_eq!(status("requests"), requests);
    assert!(stage.talk("cleanup rate 60").trim().parse::<u64>().unwrap() >= 1);
    assert_eq!(stage.talk(&format!("evict {path}")), "OK\n");
    assert!(!stage.talk("cache list").lines().any(|line| line == path));
    assert!(fs::read(&file).unwrap() == content, "fetched again");
    assert!(status("requests") > requests);

    assert_eq!(stage.talk("tear down to read-only"), "In read-only mode\n");
    assert!(fs::read(&file).unwrap() == content);
    let warnings = mount.status().unwrap()["warnings"].to_string();
    assert!(warnings.contains("cannot be written"), "{warnings}");
}

#[test]
fn fsck_finds_a_damaged_file_in_a_cache_in_use_and_repairs_it() {
    let stage = Stage::new("basic-sha1");
    let mount = stage.builder().mount().unwrap();
    let file = mount.path().join("sizes/rnd100001");
    let content = fs::read(&file).unwrap();
    let directory = mount.status().unwrap()["cache_directory"].as_str().unwrap().to_owned();
    let clean = client(&["fsck", &directory]);
    assert_eq!(clean.code(), Some(0), "{}", clean.output());
    let hit = stored(Path::new(&directory), &content).expect("the content is in the cache");
    let mut damaged = content.clone();
    damaged[50_000] ^= 1;
    // As a disk does it: the bytes change and nothing else.
    let writable = fs::OpenOptions::new().write(true).open(&hit).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&writable, &damaged, 0).unwrap();
    let found = client(&["fsck", &directory]);
    assert_eq!(found.code(), Some(1), "{}", found.output());
    assert!(found.stdout.contains("damaged") && found.stdout.contains("--repair"), "{}", found.output());
    let repaired = client(&["--json", "fsck", "--repair", &directory]);
    assert_eq!(repaired.code(), Some(0), "{}", repaired.output());
    let report: serde_json::Value = serde_json::from_str(&repaired.stdout).unwrap();
    assert_eq!((&report["problems"], &report["removed"]), (&1.into(), &1.into()), "{report}");
    assert!(!hit.exists());
    drop(mount);
    let again = stage.builder().mount().unwrap();
    assert!(fs::read(again.path().join("sizes/rnd100001")).unwrap() == content);
    let absent = client(&["fsck", "/no/such/cache"]);
    assert_eq!(absent.code(), Some(1), "{}", absent.output());
}

/// The file of a cache with this content.
fn stored(directory: &Path, content: &[u8]) -> Option<PathBuf> {
    let directories = fs::read_dir(directory).unwrap().flatten().filter(|entry| entry.path().is_dir());
    let files = directories.flat_map(|entry| fs::read_dir(entry.path()).into_iter().flatten().flatten());
    files.map(|entry| entry.path()).find(|path| fs::read(path).is_ok_and(|found| found == content))
}

#[test]
fn the_workspace_is_found_as_the_stock_tool_finds_it() {
    let fixture = Fixture::unpack("basic-sha1").unwrap();
    let origin = Origin::serve(&fixture.storage).unwrap();
    let config = fixture.client_config(&origin.url()).unwrap();
    // Paths of sockets are short.
    let base = tempfile::tempdir_in("/tmp").unwrap();
    let builder = || {
        let base = format!("CVMFS_CACHE_BASE={}", base.path().display());
        MountBuilder::new(&fixture.fqrn, &config).option(&base)
    };
    let name = format!("cvmfs_io.{}", fixture.fqrn);
    // Not written in the configuration: the stock tool then takes the cache for one of this repository alone.
    let mount = builder().mount().unwrap();
    assert!(!cvmfs_talk(&base.path().join(&fixture.fqrn).join(&name), "pid").is_empty());
    drop(mount);
    let mount = builder().option("CVMFS_SHARED_CACHE=yes").mount().unwrap();
    assert!(!cvmfs_talk(&base.path().join("shared").join(&name), "pid").is_empty());
    drop(mount);
}

#[test]
fn the_socket_can_be_given_to_a_user_and_be_elsewhere() {
    let stage = Stage::new("basic-sha1");
    let socket = stage.workspace.path().join("deep/below/talk.sock");
    let mount = stage
        .builder()
        .option(&format!("CVMFS_TALK_SOCKET={}", socket.display()))
        .option("CVMFS_TALK_OWNER=nobody")
        .mount()
        .unwrap();
    let metadata = fs::symlink_metadata(&socket).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!((metadata.mode() & 0o777, metadata.uid()), (0o660, 65534));
    assert!(!stage.socket().exists());
    assert_eq!(cvmfs_talk(&socket, "pid"), format!("{}\n", mount.status().unwrap()["pid"]));
}

#[test]
fn a_second_mount_and_a_foreign_file_leave_the_mount_working_and_the_socket_with_its_owner() {
    let stage = Stage::new("basic-sha1");
    let first = stage.builder().mount().unwrap();
    let second = stage.builder().mount().unwrap();
    assert_eq!(stage.talk("mountpoint"), format!("{}\n", first.path().display()));
    assert!(second.log_text().contains("cvmfs_talk cannot reach this mount"), "{}", second.log_text());
    drop(second);
    assert_eq!(stage.talk("mountpoint"), format!("{}\n", first.path().display()));
    drop(first);
    fs::write(stage.socket(), b"precious").unwrap();
    let third = stage.builder().mount().unwrap();
    assert_eq!(fs::read(stage.socket()).unwrap(), b"precious");
    assert_eq!(third.status().unwrap()["fqrn"], stage.fixture.fqrn.as_str());
}

#[test]
fn a_published_revision_is_applied_on_request_and_another_root_can_be_chosen() {
    let repository = Published::create("talk.example.org").unwrap();
    let workspace = ScratchDir::new("workspace").unwrap();
    let mount = MountBuilder::new(&repository.fqrn, &repository.client_config().unwrap())
        .option(&format!("CVMFS_WORKSPACE={}", workspace.path().display()))
        .mount()
        .unwrap();
    let socket = workspace.path().join("cvmfs_io.talk.example.org");
    let first = mount.status().unwrap();
    let layer = TarBuilder::new().file("news", 0o644, b"fresh").finish();
    repository.ingest("layer", &layer, &[]).unwrap();
    assert_eq!(cvmfs_talk(&socket, "remount sync"), "New revision applied\n");
    let shown = || fs::read(mount.path().join("layer/news"));
    let patient = testkit::process::wait_until("the new file", PATIENCE, || shown().is_ok());
    patient.unwrap();
    assert_eq!(shown().unwrap(), b"fresh");
    let second = mount.status().unwrap();
    assert!(second["revision"].as_u64() > first["revision"].as_u64());
    let decision = format!("decision=\"revision\" revision={}", second["revision"]);
    assert!(mount.log_text().contains(&decision), "{}", mount.log_text());

    assert_eq!(cvmfs_talk(&socket, &format!("chroot {}", first["root_hash"].as_str().unwrap())), "OK\n");
    let third = mount.status().unwrap();
    assert_eq!((&third["root_hash"], &third["fixed"]), (&first["root_hash"], &true.into()));
    assert_eq!(cvmfs_talk(&socket, "remount"), "Catalog up to date\n", "a chosen root stays");
    let absent = "chroot 0123456789012345678901234567890123456789";
    assert_eq!(cvmfs_talk(&socket, absent), "Failed\n");
    assert!(mount.log_text().contains("command=\"chroot\" caller_uid=0 caller_pid="), "{}", mount.log_text());
}

#[test]
fn the_verb_talk_answers_with_exit_codes() {
    let stage = Stage::new("basic-sha1");
    let fqrn = stage.fixture.fqrn.as_str();
    // Other tests mount the same repository: this one's own name tells it apart.
    let mount = stage.builder().mount().unwrap();
    let pid = client(&["talk", fqrn, "pid"]);
    assert_eq!(pid.code(), Some(0), "{}", pid.output());
    for (words, code) in [
        (&["no", "such", "command"][..], 2),
        (&["cleanup"], 2),
        (&["chroot", "0123456789012345678901234567890123456789"], 1),
        (&["cache", "size"], 0),
    ] {
        let mut arguments = vec!["talk", fqrn];
        arguments.extend(words);
        let finished = client(&arguments);
        assert_eq!(finished.code(), Some(code), "{words:?}: {}", finished.output());
    }
    let by_place = client(&["talk", mount.path().to_str().unwrap(), "mountpoint"]);
    assert_eq!(by_place.stdout.trim(), mount.path().to_str().unwrap());
    let absent = client(&["talk", "absent.example.org", "pid"]);
    assert_eq!(absent.code(), Some(5), "{}", absent.output());
    drop(mount);
}

#[test]
fn a_mount_tells_its_decisions_in_json_and_in_the_files_that_the_configuration_names() {
    let stage = Stage::new("basic-sha1");
    let (usyslog, debug) = (stage.workspace.path().join("usyslog"), stage.workspace.path().join("debug.log"));
    let config = stage.fixture.client_config(&stage.origin.url()).unwrap();
    let mountpoint = stage.workspace.path().join("mnt");
    fs::create_dir(&mountpoint).unwrap();
    let options = format!(
        "config={},CVMFS_USYSLOG={},CVMFS_DEBUGLOG={},CVMFS_WORKSPACE={},CVMFS_MAX_RETRIES=0,\
         CVMFS_HTTP_PROXY=http://127.0.0.1:9;DIRECT",
        config.display(),
        usyslog.display(),
        debug.display(),
        stage.workspace.path().display()
    );
    let place = mountpoint.to_str().unwrap();
    let finished =
        client(&["--log-format", "json", "--json", "mount", &stage.fixture.fqrn, place, "-o", &options]);
    assert_eq!(finished.code(), Some(0), "{}", finished.output());
    let report: serde_json::Value = serde_json::from_str(&finished.stdout).unwrap();
    let log = Path::new(report["control"].as_str().unwrap()).with_extension("log");
    let text = fs::read_to_string(&log).unwrap();
    let unmounted = client(&["umount", place]);
    assert_eq!(unmounted.code(), Some(0), "{}", unmounted.output());
    let _ = fs::remove_file(log);

    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let failover = lines.iter().find(|line| line["decision"] == "fail-over").expect("the dead proxy is left");
    for field in ["object", "host", "proxy", "cause", "next_host", "next_proxy", "timestamp", "level"] {
        assert!(failover[field].is_string(), "{field} in {failover}");
    }
    assert_eq!(
        (&failover["proxy"], &failover["next_proxy"]),
        (&"http://127.0.0.1:9".into(), &"DIRECT".into())
    );
    let mode = lines.iter().find(|line| line["decision"] == "mode").expect("the mode is told");
    assert!(mode["mode"].is_string(), "{mode}");
    assert!(fs::read_to_string(&usyslog).unwrap().contains("decision=\"fail-over\""));
    assert!(fs::read_to_string(&debug).unwrap().contains("DEBUG"));
}

#[test]
fn no_password_of_a_proxy_is_in_a_log_an_answer_or_a_message() {
    const SECRET: &str = "s3cr3tpassw0rd";
    let stage = Stage::new("basic-sha1");
    let (usyslog, debug) = (stage.workspace.path().join("usyslog"), stage.workspace.path().join("debug.log"));
    let config = stage.fixture.client_config(&stage.origin.url()).unwrap();
    // A dead proxy with a password, then the way that works.
    let parameters = [
        "CVMFS_MAX_RETRIES=0".to_owned(),
        format!("CVMFS_HTTP_PROXY=\"http://user:{SECRET}@127.0.0.1:9;DIRECT\""),
        format!("CVMFS_WORKSPACE={}", stage.workspace.path().display()),
        format!("CVMFS_USYSLOG={}", usyslog.display()),
        format!("CVMFS_DEBUGLOG={}", debug.display()),
    ];
    let mut text = fs::read_to_string(&config).unwrap();
    text.push_str(&parameters.join("\n"));
    fs::write(&config, text).unwrap();
    let mount = MountBuilder::new(&stage.fixture.fqrn, &config).mount().unwrap();
    fs::read(mount.path().join("sizes/rnd100001")).unwrap();
    let fqrn = stage.fixture.fqrn.as_str();
    let option = format!("config={}", config.display());
    let mut said = vec![
        ("log", mount.log_text()),
        ("usyslog", fs::read_to_string(&usyslog).unwrap()),
        ("debug log", fs::read_to_string(&debug).unwrap()),
        ("status", client(&["status", fqrn]).output()),
        ("status --json", client(&["status", "--json", fqrn]).output()),
        ("config", client(&["config", fqrn, "-o", &option]).output()),
        ("config --json", client(&["config", "--json", fqrn, "-o", &option]).output()),
        ("check", client(&["check", fqrn, "-o", &option]).output()),
        ("check --json", client(&["check", "--json", fqrn, "-o", &option]).output()),
        ("metrics", client(&["metrics"]).output()),
    ];
    for command in ["parameters", "proxy info", "host info", "internal affairs", "status json", "refresh"] {
        said.push((command, stage.talk(command)));
    }
    for (what, text) in &said {
        assert!(!text.is_empty(), "{what} says nothing");
        assert!(!text.contains(SECRET), "the password is in {what}: {text}");
    }
    assert!(
        said.iter().any(|(_, text)| text.contains("***@127.0.0.1:9") || text.contains("http://127.0.0.1:9"))
    );
    drop(mount);

    // A wrong value is quoted in the message, without its password.
    for parameter in ["CVMFS_HTTP_PROXY=ftp", "CVMFS_SERVER_URL=http"] {
        let wrong = format!("{option},{parameter}://user:{SECRET}@127.0.0.1:9");
        for verb in ["check", "config"] {
            let refused = client(&[verb, fqrn, "-o", &wrong]);
            assert_eq!(refused.code(), Some(1), "{}", refused.output());
            assert!(!refused.output().contains(SECRET), "{}", refused.output());
        }
    }
}

/// A request as a monitoring system sends it.
fn scrape(mut stream: impl Read + Write) -> String {
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn mounts_that_share_an_address_are_all_in_the_metrics_and_survive_each_other() {
    let (one, other) = (Stage::new("basic-sha1"), Stage::new("hardlinks"));
    let port = free_port();
    let listen = format!("CVMFS_METRICS_LISTEN=127.0.0.1:{port}");
    let first = one.builder().option(&listen).mount().unwrap();
    let second = other.builder().option(&listen).mount().unwrap();
    let get = || {
        let stream = std::net::TcpStream::connect(("127.0.0.1", port)).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Some(scrape(stream))
    };
    let series = |mount: &Mount| format!("mountpoint=\"{}\"}} ", mount.path().display());
    let has = |text: &Option<String>, mount: &Mount| {
        text.as_ref().is_some_and(|text| {
            text.lines().any(|line| line.starts_with("cvmfs_revision{") && line.contains(&series(mount)))
        })
    };
    let both = || {
        let text = get();
        has(&text, &first) && has(&text, &second)
    };
    testkit::process::wait_until("both mounts in the metrics", PATIENCE, both).unwrap();
    let text = get().unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    assert!(
        head.starts_with("HTTP/1.1 200") && head.to_lowercase().contains("text/plain; version=0.0.4"),
        "{head}"
    );
    for name in [
        "cvmfs_up",
        "cvmfs_cache_used_bytes",
        "cvmfs_http_requests_total",
        "cvmfs_whitelist_expiry_timestamp_seconds",
    ] {
        assert!(body.contains(&format!("# TYPE {name} ")), "{name} is not in {body}");
    }
    // Who serves the address goes; the other takes its place.
    let place = first.path().display().to_string();
    first.unmount().unwrap();
    testkit::process::wait_until("the other mount to take over", PATIENCE, || has(&get(), &second)).unwrap();
    testkit::process::wait_until("the first to be gone", PATIENCE, || {
        get().is_some_and(|text| !text.contains(&place))
    })
    .unwrap();
}

#[test]
fn metrics_are_offered_on_a_unix_socket_and_only_what_was_asked_for_is_answered() {
    let stage = Stage::new("basic-sha1");
    let socket = stage.workspace.path().join("metrics.sock");
    let mount =
        stage.builder().option(&format!("CVMFS_METRICS_LISTEN=unix:{}", socket.display())).mount().unwrap();
    testkit::process::wait_until("the socket", PATIENCE, || UnixStream::connect(&socket).is_ok()).unwrap();
    let connect = || {
        let stream = UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    };
    assert!(scrape(connect()).contains("cvmfs_revision{"));
    for (request, status) in [
        ("GET /etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", "404"),
        ("POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", "405"),
        ("garbage\r\n\r\n", "400"),
    ] {
        let mut stream = connect();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{request}: {answer}");
    }
    // Callers that say nothing neither stay nor keep others out.
    let silent: Vec<_> = (0..50).map(|_| connect()).collect();
    assert!(scrape(connect()).contains("cvmfs_revision{"));
    drop(silent);
    drop(mount);
    testkit::process::wait_until("the socket to go", PATIENCE, || !socket.exists()).unwrap();
    let refused = stage.builder().option("CVMFS_METRICS_LISTEN=0.0.0.0:9100").attempt().unwrap().1;
    assert!(!refused.status.success());
    assert!(
        refused.stderr.contains("CVMFS_METRICS_LISTEN") && refused.stderr.contains("127.0.0.1:PORT"),
        "{}",
        refused.stderr
    );
}

#[test]
fn telemetry_arrives_in_the_line_protocol() {
    let receiver = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    receiver.set_read_timeout(Some(PATIENCE)).unwrap();
    let stage = Stage::new("basic-sha1");
    let mount = stage
        .builder()
        .option("CVMFS_TELEMETRY_SEND=yes")
        .option("CVMFS_TELEMETRY_RATE=5")
        .option("CVMFS_INFLUX_HOST=127.0.0.1")
        .option(&format!("CVMFS_INFLUX_PORT={}", receiver.local_addr().unwrap().port()))
        .option("CVMFS_INFLUX_METRIC_NAME=site")
        .mount()
        .unwrap();
    let mut buffer = [0; 65536];
    let length = receiver.recv(&mut buffer).unwrap();
    let text = String::from_utf8_lossy(&buffer[..length]);
    assert!(text.starts_with(&format!("site_absolute,repo={} ", stage.fixture.fqrn)), "{text}");
    assert!(text.contains("download.n_requests="), "{text}");
    drop(mount);
}
