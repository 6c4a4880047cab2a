//! Conversions that succeed.

use std::process::Command;

use serde_json::{Value, json};
use testkit::Image;
use testkit::tar::TarBuilder;

use crate::workplace::{FQRN, Workplace, image};

fn skopeo(arguments: &[&str]) -> Value {
    let output = Command::new("skopeo").args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

#[test]
fn an_image_becomes_layers_in_one_revision_and_a_thin_image() {
    let place = Workplace::new();
    let image = image();
    let digest = place.registry.push("team/app", "1", &image).unwrap();
    let (source, target) =
        (place.registry.reference("team/app", "1"), place.registry.reference("thin/app", "1"));
    let before = place.revision();
    let report = place.convert(&source, &["--output", &target]).json();

    let keys: Vec<&String> = report.as_object().unwrap().keys().collect();
    let expected =
        ["bytes_downloaded", "bytes_stored", "digest", "image", "layers", "output", "revision", "seconds"];
    assert_eq!(keys.len(), expected.len());
    assert!(expected.iter().all(|key| report.get(key).is_some()), "{report}");
    assert_eq!(report["digest"], digest);
    assert_eq!(report["image"], source);
    assert_eq!(report["output"], target);
    assert_eq!(report["revision"], before + 1);
    assert_eq!(place.revision(), before + 1, "all layers are in one revision");
    let hexes: Vec<String> = image.layers.iter().map(|l| l.digest().replace("sha256:", "")).collect();
    for (layer, hex) in report["layers"].as_array().unwrap().iter().zip(&hexes) {
        let expected =
            json!({"digest": format!("sha256:{hex}"), "path": format!("/layers/{hex}"), "state": "new"});
        assert_eq!(layer, &expected);
    }
    let bytes: usize = image.layers.iter().map(|layer| layer.blob.len()).sum();
    assert_eq!(report["bytes_downloaded"], bytes);
    assert!(report["bytes_stored"].as_u64().unwrap() > 0);

    place.assert_consistent();
    // The repository, by a reader that shares no code with us.
    let published = place.published();
    let entry = |layer: usize, path: &str| {
        let path = format!("/layers/{}{path}", hexes[layer]);
        published
            .iter()
            .find(|entry| entry["path"] == path.as_str())
            .unwrap_or_else(|| panic!("{path} is missing"))
    };
    let tool = entry(0, "/opt/tool");
    assert_eq!((&tool["mode"], &tool["uid"], &tool["gid"]), (&json!("4755"), &json!(1000), &json!(7)));
    assert_eq!(tool["xattrs"]["user.colour"], "Ymx1ZQ==");
    assert_eq!(entry(0, "/etc/link")["target"], "../opt/old");
    let whiteout = entry(1, "/etc/motd");
    assert_eq!((&whiteout["type"], &whiteout["rdev"]), (&json!("char"), &json!("0:0")));
    assert_eq!(entry(1, "/opt")["xattrs"]["trusted.overlay.opaque"], "eQ==");
    assert_eq!(entry(2, "")["type"], "dir", "an empty layer has its directory");
    assert!(published.iter().all(|entry| !entry["path"].as_str().unwrap().contains(".wh.")));

    // The thin image, by skopeo.
    let thin = skopeo(&["inspect", "--config", "--tls-verify=false", &format!("docker://{target}")]);
    let config = &thin["config"];
    assert_eq!(config["Env"], json!(["PATH=/bin", "GREETING=hello $USER, \"dear\"", "CVMFS_IMAGE=true"]));
    assert_eq!(config["Entrypoint"], json!(["/bin/sh", "-c"]));
    assert_eq!(config["Cmd"], json!(["a b", "c"]));
    assert_eq!((&config["User"], &config["WorkingDir"]), (&json!("1000:7"), &json!("/opt")));
    assert_eq!(config["Labels"]["vendor"], "x");
    assert_eq!(config["Labels"]["ch.cern.cvmfs.thin"], "1.0");
    assert_eq!(config["Labels"]["ch.cern.cvmfs.thin.source-digest"], digest);
    assert_eq!(config["ExposedPorts"], json!({"80/tcp": {}}));
    assert_eq!(thin["created"], "2020-09-13T12:26:40Z");

    // Its layer, by tar.
    let manifest = place.registry.manifest("thin/app", "1").unwrap();
    let layers = manifest["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 1);
    let blob = place.registry.blob("thin/app", layers[0]["digest"].as_str().unwrap()).unwrap();
    std::fs::write(place.path("layer.tar.gz"), blob).unwrap();
    let tar = |arguments: &[&str]| {
        let output =
            Command::new("tar").current_dir(place.directory.path()).args(arguments).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let listing = tar(&["--utc", "--full-time", "--numeric-owner", "-tvzf", "layer.tar.gz"]);
    assert!(listing.starts_with("-rw-r--r-- 0/0"), "{listing}");
    assert!(listing.ends_with("1970-01-01 00:00:00 thin.json\n"), "{listing}");
    let descriptor: Value = serde_json::from_str(&tar(&["-xOzf", "layer.tar.gz", "thin.json"])).unwrap();
    assert_eq!(descriptor["version"], "1.0");
    assert_eq!(descriptor["origin"], format!("{}@{digest}", source.trim_end_matches(":1")));
    let urls: Vec<String> = hexes.iter().map(|hex| format!("cvmfs://{FQRN}/layers/{hex}")).collect();
    for ((layer, hex), url) in descriptor["layers"].as_array().unwrap().iter().zip(&hexes).zip(urls) {
        assert_eq!(layer, &json!({"digest": hex, "url": url}));
    }
    place.assert_spool_is_empty();
}

#[test]
fn a_second_conversion_fetches_no_layer_and_publishes_nothing() {
    let place = Workplace::new();
    place.registry.push("app", "1", &image()).unwrap();
    let (source, target) = (place.registry.reference("app", "1"), place.registry.reference("thin", "1"));
    place.convert(&source, &["--output", &target]).json();
    let (revision, first) = (place.revision(), place.registry.manifest("thin", "1").unwrap());
    let requests = |log: &str| log.matches("/v2/app/blobs/").count();
    let before = requests(&place.registry.log_text());

    let report = place.convert(&source, &["--output", &target]).json();
    let states: Vec<&Value> =
        report["layers"].as_array().unwrap().iter().map(|layer| &layer["state"]).collect();
    assert_eq!(states, ["present", "present", "present"]);
    assert_eq!((&report["bytes_downloaded"], &report["bytes_stored"]), (&json!(0), &json!(0)));
    assert_eq!(report["revision"], revision);
    assert_eq!(place.revision(), revision);
    assert_eq!(
        place.registry.manifest("thin", "1").unwrap(),
        first,
        "the thin image is the same bit for bit"
    );
    let config_requests = 2;
    let after = requests(&place.registry.log_text());
    assert!(after - before <= config_requests, "only the configuration was fetched: {}", after - before);
}

#[test]
fn only_the_layers_that_changed_are_fetched() {
    let place = Workplace::new();
    place.registry.push("app", "1", &image()).unwrap();
    place.convert(&place.registry.reference("app", "1"), &[]).json();
    let layer = TarBuilder::new().file("added", 0o644, b"x").finish();
    let next = image().layer(layer);
    place.registry.push("app", "2", &next).unwrap();
    let report = place.convert(&place.registry.reference("app", "2"), &[]).json();
    let states: Vec<&Value> =
        report["layers"].as_array().unwrap().iter().map(|layer| &layer["state"]).collect();
    assert_eq!(states, ["present", "present", "present", "new"]);
    assert_eq!(report["bytes_downloaded"], next.layers[3].blob.len());
    assert_eq!(report["output"], Value::Null);
}

#[test]
fn a_layer_that_occurs_twice_is_published_once() {
    let place = Workplace::new();
    let tar = TarBuilder::new().file("x", 0o644, b"x").finish();
    let image = Image::new([tar.clone(), tar]);
    place.registry.push("twice", "1", &image).unwrap();
    let report = place.convert(&place.registry.reference("twice", "1"), &[]).json();
    assert_eq!(report["layers"].as_array().unwrap().len(), 2);
    assert_eq!(report["bytes_downloaded"], image.layers[0].blob.len());
}

#[test]
fn a_dry_run_says_what_would_be_done_and_does_nothing() {
    let place = Workplace::new();
    place.registry.push("app", "1", &image()).unwrap();
    let before = (place.revision(), place.published_paths());
    let target = place.registry.reference("thin", "1");
    let report =
        place.convert(&place.registry.reference("app", "1"), &["--dry-run", "--output", &target]).json();
    assert_eq!(report["layers"][0]["state"], "new");
    assert_eq!((&report["bytes_downloaded"], &report["output"]), (&json!(0), &Value::Null));
    assert_eq!((place.revision(), place.published_paths()), before);
    assert!(place.registry.manifest("thin", "1").is_err());
}

#[test]
fn a_dry_run_needs_neither_the_lock_nor_the_private_key() {
    let place = Workplace::new();
    place.registry.push("app", "1", &image()).unwrap();
    let publisher =
        cvmfs_publish::Publisher::open(FQRN, place.path("storage").to_str().unwrap(), &place.path("keys"));
    let _lock = publisher.unwrap();
    std::fs::remove_file(place.path(&format!("keys/{FQRN}.key"))).unwrap();
    place.convert(&place.registry.reference("app", "1"), &["--dry-run"]).json();
}

#[test]
fn the_archive_is_one_that_docker_and_skopeo_read() {
    let place = Workplace::new();
    place.registry.push("team/app", "1", &image()).unwrap();
    let file = place.path("thin.tar");
    let source = place.registry.reference("team/app", "1");
    let report = place.convert(&source, &["--output-archive", file.to_str().unwrap()]).json();
    assert_eq!(report["output"], file.to_str().unwrap());
    let first = std::fs::read(&file).unwrap();

    let archive = format!("docker-archive:{}", file.display());
    let config = skopeo(&["inspect", "--config", &archive]);
    assert_eq!(config["config"]["Labels"]["ch.cern.cvmfs.thin"], "1.0");
    let copy = place.registry.reference("copied", "1");
    skopeo(&["copy", "-q", "--dest-tls-verify=false", &archive, &format!("docker://{copy}")]);
    let manifest: Value = {
        let output = Command::new("tar").arg("-xOf").arg(&file).arg("manifest.json").output().unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    };
    assert_eq!(manifest[0]["RepoTags"], json!([place.registry.reference("team/app_thin", "1")]));

    place.convert(&source, &["--output-archive", file.to_str().unwrap()]).json();
    assert_eq!(std::fs::read(&file).unwrap(), first, "reproducible bit for bit");
}

#[test]
fn zstd_and_plain_layers_are_published_like_gzip_ones() {
    let place = Workplace::new();
    let mut image = image();
    let zstd =
        Command::new("zstd").args(["-q", "-c"]).arg(write(&place, &image.layers[0].tar)).output().unwrap();
    image.layers[0].blob = zstd.stdout;
    image.layers[1].blob = image.layers[1].tar.clone();
    place.registry.push("mixed", "1", &image).unwrap();
    place.convert(&place.registry.reference("mixed", "1"), &[]).json();
    let path = format!("/layers/{}/etc/passwd", image.layers[0].digest().replace("sha256:", ""));
    assert!(place.published_paths().contains(&path));
}

fn write(place: &Workplace, bytes: &[u8]) -> std::path::PathBuf {
    let file = place.path("layer.tar");
    std::fs::write(&file, bytes).unwrap();
    file
}

#[test]
fn the_layers_go_to_the_subdirectory_asked_for() {
    let place = Workplace::new();
    let image = image();
    place.registry.push("app", "1", &image).unwrap();
    place.convert(&place.registry.reference("app", "1"), &["--subdirectory", "a/b/"]).json();
    let path = format!("/a/b/{}/etc/link", image.layers[0].digest().replace("sha256:", ""));
    assert!(place.published_paths().contains(&path));
}

#[test]
fn people_get_a_summary_and_progress_in_lines() {
    let place = Workplace::new();
    place.registry.push("app", "1", &image()).unwrap();
    let mut command = place.convert_command(&place.registry.reference("app", "1"), &[]);
    let arguments: Vec<_> = command.get_args().filter(|a| *a != "--json").map(ToOwned::to_owned).collect();
    command = place.command();
    let output = command.args(arguments).output().unwrap();
    let (stdout, stderr) =
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(stdout.contains("revision  2\n"), "{stdout}");
    assert!(
        stderr.contains("3 layers, 3 of them new") && stderr.contains("revision 2 published"),
        "{stderr}"
    );
}

#[test]
fn a_credential_helper_is_asked_for_the_login() {
    use std::os::unix::fs::PermissionsExt as _;
    let place = Workplace::new();
    place.registry.push("app", "1", &image()).unwrap();
    let bin = place.path("bin");
    std::fs::create_dir(&bin).unwrap();
    let asked = place.path("asked");
    let helper = bin.join("docker-credential-trial");
    std::fs::write(
        &helper,
        format!(
            "#!/bin/sh\ncat > {}\necho '{{\"Username\":\"u\",\"Secret\":\"s3cret\"}}'\n",
            asked.display()
        ),
    )
    .unwrap();
    std::fs::set_permissions(&helper, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::create_dir(place.path(".docker")).unwrap();
    std::fs::write(place.path(".docker/config.json"), r#"{"credsStore": "trial"}"#).unwrap();
    // A registry that wants a login: the real one does not, so a small server stands in.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        use std::io::{Read as _, Write as _};
        for mut stream in listener.incoming().map_while(Result::ok) {
            let mut head = vec![0; 4096];
            let length = stream.read(&mut head).unwrap_or(0);
            let authorised = String::from_utf8_lossy(&head[..length]).contains("Basic dTpzM2NyZXQ=");
            let status = if authorised {
                "404 Not Found"
            } else {
                "401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"r\""
            };
            let _ = write!(stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        }
    });
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let output = place
        .command()
        .env("PATH", path)
        .args(["manifest", &format!("{address}/x:1"), "--log-level", "trace"])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(5), "the login was accepted: {stderr}");
    assert_eq!(std::fs::read_to_string(asked).unwrap(), address.to_string());
    assert!(!stderr.contains("s3cret") && !stderr.contains("dTpzM2NyZXQ"), "no secret in the log: {stderr}");
}

#[test]
fn a_docker_engine_loads_the_archive_and_pulls_the_pushed_image() {
    let place = Workplace::new();
    place.registry.push("team/app", "1", &image()).unwrap();
    let (source, target) = (place.registry.reference("team/app", "1"), place.registry.reference("thin", "1"));
    let file = place.path("thin.tar");
    place.convert(&source, &["--output", &target]).json();
    place.convert(&source, &["--output-archive", file.to_str().unwrap(), "--name", "mine/thin:2"]).json();
    let engine = testkit::Dockerd::builder().start().unwrap();
    engine.docker(&["load", "--input", file.to_str().unwrap()]).unwrap();
    engine.docker(&["pull", &target]).unwrap();
    let id = |name: &str| engine.docker(&["inspect", "--format", "{{.Id}}", name]).unwrap();
    assert_eq!(id("mine/thin:2"), id(&target), "both ways give the same image");
    let entrypoint =
        engine.docker(&["inspect", "--format", "{{json .Config.Entrypoint}} {{json .Config.Env}}", &target]);
    assert_eq!(
        entrypoint.unwrap().trim(),
        r#"["/bin/sh","-c"] ["PATH=/bin","GREETING=hello $USER, \"dear\"","CVMFS_IMAGE=true"]"#
    );
}
