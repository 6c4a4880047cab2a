//! Thin layers: what a container on them sees, and what becomes of bad ones.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod common;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use common::Host;
use rustix::mount::mount_bind;
use serde_json::json;
use testkit::tar::TarBuilder;

const FQRN: &str = "layers.example.org";

/// A descriptor of layers of one repository, base first.
fn descriptor(paths: &[&str]) -> String {
    let layer = |path: &&str| json!({"digest": "ab".repeat(32), "url": format!("cvmfs://{FQRN}/{path}")});
    json!({"version": "1.0", "layers": paths.iter().map(layer).collect::<Vec<_>>()}).to_string()
}

fn thin(paths: &[&str]) -> Vec<u8> {
    archive(&descriptor(paths))
}

fn archive(thin_json: &str) -> Vec<u8> {
    TarBuilder::new().file("thin.json", 0o600, thin_json.as_bytes()).finish()
}

/// A layer in the repository with one file that names it, and one that every layer has.
fn publish(host: &Host, path: &str) {
    let layer = host.repository_directory(FQRN, path);
    let name = path.rsplit('/').next().unwrap();
    fs::write(layer.join(name), name).unwrap();
    fs::write(layer.join("top"), name).unwrap();
}

fn listed(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn text(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap()
}

#[test]
fn a_container_on_a_thin_image_sees_the_repository_s_layers_and_not_the_descriptor() {
    let host = Host::initialised();
    publish(&host, "layers/base");
    publish(&host, "layers/upper");
    let tar = thin(&["layers/base", "layers/upper"]);
    let size = host.add_layer("thin", "", &tar);
    assert_eq!(size, u64::try_from(descriptor(&["layers/base", "layers/upper"]).len()).unwrap());
    host.create_container("c", "thin");
    let tree = host.get("c");
    assert_eq!(listed(&tree), ["base", "top", "upper"]);
    assert_eq!(text(tree.join("top")), "upper");
    fs::write(tree.join("written"), "x").unwrap();
    fs::remove_file(tree.join("base")).unwrap();
    assert_eq!(listed(&tree), ["top", "upper", "written"]);

    let of = json!({"ID": "c", "Parent": "c-init"});
    let changes = json!({"Changes": [{"Path": "/base", "Kind": 2}, {"Path": "/written", "Kind": 1}]});
    assert_eq!(host.call("Changes", of.clone()), changes);
    assert_eq!(host.call("DiffSize", of), json!({"Size": 1}));
    host.put("c");
    assert!(host.mounted().is_empty());
}

#[test]
fn the_thin_layer_itself_shows_its_descriptor_even_when_the_repository_is_gone() {
    let host = Host::initialised();
    publish(&host, "layers/base");
    host.add_layer("thin", "", &thin(&["layers/base"]));
    fs::remove_dir_all(&host.repositories.directory).unwrap();
    let tree = host.get("thin");
    assert_eq!(text(tree.join("thin.json")), descriptor(&["layers/base"]));
    host.put("thin");
}

#[test]
fn a_second_start_after_a_restart_mounts_what_the_grandchild_needs() {
    let mut host = Host::initialised();
    publish(&host, "layers/base");
    host.add_layer("thin", "", &thin(&["layers/base"]));
    host.add_layer("normal", "thin", &TarBuilder::new().file("normal", 0o644, b"n").finish());
    for (container, image, expected) in
        [("c", "thin", vec!["base", "top"]), ("d", "normal", vec!["base", "normal", "top"])]
    {
        host.create_container(container, image);
        assert_eq!(listed(&host.get(container)), expected);
        host.put(container);
        host.restart();
        assert_eq!(listed(&host.get(container)), expected, "{container} after a restart");
        host.put(container);
    }
}

#[test]
fn a_running_container_on_a_repository_of_the_host_stays_mounted_when_the_plugin_starts_anew() {
    let mut host = Host::start();
    let options = json!({"Home": host.home(), "Opts": ["cvmfsMountMethod=external"]});
    host.call("Init", options.clone());
    publish(&host, "layers/base");
    let (repository, mountpoint) =
        (host.repository_directory(FQRN, ""), host.home().join("cvmfs").join(FQRN));
    fs::create_dir_all(&mountpoint).unwrap();
    host.add_layer("thin", "", &thin(&["layers/base"]));
    let refused = host.failing_call("CreateReadWrite", json!({"ID": "c-init", "Parent": "thin"}));
    assert!(refused.contains("the host must mount it there"), "{refused}");
    mount_bind(&repository, &mountpoint).unwrap();
    host.create_container("c", "thin");
    let merged = host.get("c");
    for _ in ["with an engine that goes on", "with one that begins anew"] {
        host.restart();
        assert!(host.mounted().contains(&merged));
        host.call("Init", options.clone());
        assert!(host.mounted().contains(&merged));
        assert_eq!(listed(&merged), ["base", "top"]);
    }
    host.put("c");
    assert_eq!(host.mounted(), [mountpoint.as_path()], "the host's mount stays");
    testkit::mounts::unmount_below(&mountpoint);
}

#[test]
fn a_thin_layer_on_a_normal_one_keeps_what_lies_below() {
    let host = Host::initialised();
    publish(&host, "layers/base");
    let normal = TarBuilder::new().file("normal", 0o644, b"n").file("top", 0o644, b"normal").finish();
    host.add_layer("normal", "", &normal);
    host.add_layer("thin", "normal", &thin(&["layers/base"]));
    host.create_container("c", "thin");
    let tree = host.get("c");
    assert_eq!(listed(&tree), ["base", "normal", "top"]);
    assert_eq!(text(tree.join("top")), "base");
    host.put("c");
}

#[test]
fn a_thin_commit_repeats_its_base_and_a_layer_may_occur_twice() {
    let host = Host::initialised();
    ["layers/a", "layers/b", "layers/c"].iter().for_each(|path| publish(&host, path));
    host.add_layer("thin", "", &thin(&["layers/a", "layers/b"]));
    host.add_layer("committed", "thin", &thin(&["layers/a", "layers/b", "layers/c"]));
    host.create_container("c", "committed");
    let lowers = host.call("GetMetadata", json!({"ID": "c-init"}))["Metadata"]["LowerDir"].clone();
    assert_eq!(lowers.as_str().unwrap().split(':').count(), 3, "{lowers}");
    let tree = host.get("c");
    assert_eq!(
        (listed(&tree), text(tree.join("top"))),
        (["a", "b", "c", "top"].map(String::from).to_vec(), "c".into())
    );
    host.put("c");

    host.add_layer("twice", "", &thin(&["layers/a", "layers/b", "layers/a"]));
    host.create_container("d", "twice");
    assert_eq!(text(host.get("d").join("top")), "a");
    host.put("d");
}

#[test]
fn a_thin_image_without_layers_is_an_empty_tree() {
    let host = Host::initialised();
    host.add_layer("thin", "", &archive(r#"{"version": "0.1", "layers": []}"#));
    host.create_container("c", "thin");
    assert!(listed(&host.get("c")).is_empty());
    host.put("c");
}

#[test]
fn a_file_of_that_name_in_an_ordinary_layer_is_an_ordinary_file() {
    let host = Host::initialised();
    let bad = r#"{"version": "9.0", "layers": [{"url": "cvmfs://x.y/../.."}]}"#;
    let tar = TarBuilder::new().file("thin.json", 0o644, bad.as_bytes()).file("other", 0o644, b"x").finish();
    host.add_layer("a", "", &tar);
    let link = TarBuilder::new().symlink("thin.json", "/etc/passwd").finish();
    host.add_layer("b", "a", &link);
    host.create_container("c", "a");
    assert_eq!(listed(&host.get("c")), ["other", "thin.json"]);
    host.put("c");
}

#[test]
fn bad_descriptors_are_refused_with_their_reason_and_leave_nothing() {
    let host = Host::initialised();
    publish(&host, "layers/base");
    host.add_layer("good", "", &thin(&["layers/base"]));
    host.create_container("running", "good");
    let tree = host.get("running");
    let url = |url: &str| {
        json!({"version": "1.0", "layers": [{"digest": "ab".repeat(32), "url": url}]}).to_string()
    };
    let many: Vec<_> = (0..600).map(|n| format!("layers/{n}")).collect();
    let many: Vec<_> = many.iter().map(String::as_str).collect();
    for (name, text, named) in [
        ("dots", url("cvmfs://layers.example.org/layers/../../etc"), "'..'"),
        ("absolute", url("cvmfs://layers.example.org//etc"), "empty component"),
        ("scheme", url("https://layers.example.org/x"), "cvmfs://"),
        ("quote", url("cvmfs://x';touch /tmp/x;'.cern.ch/y"), "repository name"),
        ("newline", url("cvmfs://layers.example.org/a\nb"), "control character"),
        ("version", json!({"version": "2.0", "layers": []}).to_string(), "newer"),
        ("many", descriptor(&many), "600"),
        ("large", format!("{}{}", descriptor(&["layers/base"]), " ".repeat(2 << 20)), "larger"),
        ("malformed", "{\"version\": \"1.0\", \"layers\": [".to_owned(), "not valid JSON"),
    ] {
        host.create(name, "");
        let (status, answer) = host.connect().apply(name, "", &archive(&text));
        assert_eq!(status, 500, "{name}: {answer}");
        assert!(answer["Err"].as_str().unwrap().contains(named), "{name}: {answer}");
        host.remove(name);
        assert!(!host.home().join(name).exists());
    }
    let links = listed(&host.home().join("l"));
    assert_eq!(links.len(), 4, "good, its one layer, running-init, running: {links:?}");
    assert_eq!(text(tree.join("top")), "base", "the running container is unaffected");
    host.put("running");
}

#[test]
fn as_many_layers_as_the_kernel_stacks_run_and_one_more_is_refused() {
    let host = Host::initialised();
    let paths: Vec<_> = (0..499).map(|n| format!("layers/layer-with-a-long-name-{n:0200}")).collect();
    let mut paths: Vec<_> = paths.iter().map(String::as_str).collect();
    paths.iter().for_each(|path| publish(&host, path));
    host.add_layer("thin", "", &thin(&paths));
    host.create_container("c", "thin");
    assert_eq!(listed(&host.get("c")).len(), 500);
    host.put("c");

    paths.push("layers/one-more");
    host.create("too-many", "");
    let (status, answer) = host.connect().apply("too-many", "", &thin(&paths));
    assert_eq!(status, 500);
    assert!(answer["Err"].as_str().unwrap().contains("501 lower directories"), "{answer}");

    host.add_layer("on-top", "thin", &[0; 1024]);
    let message = host.failing_call("CreateReadWrite", json!({"ID": "d-init", "Parent": "on-top"}));
    assert!(message.contains("501 lower directories"), "{message}");
    assert!(!host.home().join("d-init").exists());
}

#[test]
fn a_start_that_cannot_have_its_files_fails_with_the_reason_and_leaves_nothing() {
    let host = Host::initialised();
    publish(&host, "layers/base");
    host.add_layer("missing", "", &thin(&["layers/base", "layers/gone"]));
    host.add_layer("unknown", "", &archive(&descriptor(&["x"]).replace(FQRN, "unknown.example.org")));
    symlink("/etc", host.repositories.directory.join(FQRN).join("layers/out")).unwrap();
    host.add_layer("outside", "", &thin(&["layers/out"]));
    for (image, reason) in [
        ("missing", "layer layers/gone not in repository layers.example.org at revision 3"),
        ("unknown", "cannot mount repository unknown.example.org: no configuration for unknown.example.org"),
        ("outside", "layer layers/out in repository layers.example.org leads out of the repository"),
    ] {
        let create = json!({"ID": "c-init", "Parent": image});
        let message = host.failing_call("CreateReadWrite", create);
        let rest = message.strip_prefix(reason);
        // The reason ends there; what may be done about it follows.
        assert!(rest.is_some_and(|rest| rest.is_empty() || rest.starts_with([':', ';'])), "{message}");
        assert!(!host.home().join("c-init").exists());
    }
    assert!(host.mounted().is_empty());
    // The layer appears: the same start works now.
    publish(&host, "layers/gone");
    host.create_container("c", "missing");
}

#[test]
fn a_stopped_container_whose_layer_disappeared_fails_at_its_start_and_not_with_an_empty_tree() {
    let host = Host::initialised();
    publish(&host, "layers/base");
    host.add_layer("thin", "", &thin(&["layers/base"]));
    host.create_container("c", "thin");
    fs::remove_dir_all(host.repositories.directory.join(FQRN).join("layers/base")).unwrap();
    assert!(host.failing_call("Get", json!({"ID": "c"})).contains("layers/base"));
    assert!(host.mounted().is_empty() && !host.home().join("c/merged").exists());
    publish(&host, "layers/base");
    assert_eq!(listed(&host.get("c")), ["base", "top"]);
    host.put("c");
}

#[test]
fn a_commit_of_a_thin_container_is_an_ordinary_layer_on_the_thin_one() {
    let host = Host::initialised();
    publish(&host, "layers/base");
    host.add_layer("thin", "", &thin(&["layers/base"]));
    host.create_container("c", "thin");
    let tree = host.get("c");
    fs::write(tree.join("new"), "n").unwrap();
    let (status, archive) = host.connect().diff("c", "c-init");
    assert_eq!(status, 200);
    host.add_layer("committed", "thin", &archive.unwrap());
    host.put("c");
    host.create_container("d", "committed");
    assert_eq!(listed(&host.get("d")), ["base", "new", "top"]);
    host.put("d");
}

#[test]
fn a_squash_compares_with_a_layer_that_is_not_the_parent() {
    let host = Host::initialised();
    publish(&host, "layers/base");
    host.add_layer("thin", "", &thin(&["layers/base"]));
    host.add_layer("one", "thin", &TarBuilder::new().file("one", 0o644, b"1").finish());
    let two = TarBuilder::new().file("two", 0o644, b"22").file(".wh.base", 0o600, b"").finish();
    host.add_layer("two", "one", &two);
    let of = json!({"ID": "two", "Parent": "thin"});
    let changes = host.call("Changes", of.clone());
    let expected = [("/base", 2), ("/one", 1), ("/two", 1)];
    assert_eq!(changes, json!({"Changes": expected.map(|(path, kind)| json!({"Path": path, "Kind": kind}))}));
    assert_eq!(host.call("DiffSize", of), json!({"Size": 3}));
    let (status, archive) = host.connect().diff("two", "thin");
    assert_eq!(status, 200);
    host.add_layer("squashed", "thin", &archive.unwrap());
    host.create_container("c", "squashed");
    assert_eq!(listed(&host.get("c")), ["one", "top", "two"]);
    host.put("c");
    assert!(host.mounted().is_empty());
}

#[test]
fn layers_of_the_go_plugin_run_as_they_are() {
    let host = Host::start();
    publish(&host, "layers/a");
    publish(&host, "layers/b");
    let home = host.home();
    let link = |name: &str, target: &str| {
        fs::create_dir_all(home.join("l")).unwrap();
        symlink(target, home.join("l").join(name)).unwrap();
    };
    let layer = |id: &str, link_name: &str, lower: &str| {
        let directory = home.join(id);
        for part in ["diff", "work"] {
            fs::create_dir_all(directory.join(part)).unwrap();
        }
        fs::write(directory.join("link"), link_name).unwrap();
        fs::write(directory.join("lower"), lower).unwrap();
        link(link_name, &format!("../{id}/diff"));
    };
    let name = |letter: &str| letter.repeat(26);
    link(&name("A"), &format!("../cvmfs/{FQRN}/layers/a"));
    link(&name("B"), &format!("../cvmfs/{FQRN}/layers/b"));
    let thin_lower = format!("l/{}:l/{}", name("B"), name("A"));
    layer("thin", &name("T"), &thin_lower);
    fs::write(home.join("thin/diff/thin.json"), descriptor(&["layers/a", "layers/b"])).unwrap();
    layer("c-init", &name("I"), &thin_lower);
    fs::write(home.join("c-init/thin_parent"), "thin").unwrap();
    layer("c", &name("C"), &format!("l/{}:{thin_lower}", name("I")));
    fs::write(home.join("c/diff/written"), "w").unwrap();

    host.init();
    assert_eq!(listed(&host.get("thin")), ["thin.json"], "the thin layer is its own tree");
    let tree = host.get("c");
    assert_eq!(listed(&tree), ["a", "b", "top", "written"]);
    assert_eq!(text(tree.join("top")), "b");
    let changes = json!({"Changes": [{"Path": "/written", "Kind": 1}]});
    assert_eq!(host.call("Changes", json!({"ID": "c", "Parent": "c-init"})), changes);
    host.put("c");
    host.create_container("d", "thin");
    assert_eq!(listed(&host.get("d")), ["a", "b", "top"]);
    host.put("d");
    ["d", "d-init", "c", "c-init", "thin"].iter().for_each(|id| host.remove(id));
}
