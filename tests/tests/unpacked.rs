//! `--layout unpacked`: what DUCC writes, with flat trees made from catalogs.

#![allow(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

mod common;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::{Overlay, assert_same, layer_content};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::{Config, RngSeed, TestRunner};
use serde_json::Value;
use testkit::process::run;
use testkit::published::run_binary;
use testkit::tar::TarBuilder;
use testkit::{Image, MountBuilder, Published, Registry, TreeEntry, compare, walk_tree};

/// Images that are compared, each of up to six layers; `CVMFS_TEST_TREES` asks for more.
const IMAGES: u32 = 40;
/// What Apptainer's files are called.
const ADDED: [&str; 7] =
    ["/.singularity.d", "/.exec", "/.run", "/.shell", "/.test", "/environment", "/singularity"];

/// One entry of a layer. Few names, so that layers meet.
#[derive(Debug, Clone)]
struct Item {
    path: Vec<&'static str>,
    kind: Kind,
}

#[derive(Debug, Clone)]
enum Kind {
    File(u8),
    Directory(u32),
    Symlink,
    Device,
    HardLink(&'static str),
    Whiteout,
    Opaque,
}

fn item() -> impl Strategy<Value = Item> {
    let name = || prop::sample::select(vec!["a", "b", "c", "d"]);
    let kind = prop_oneof![
        5 => any::<u8>().prop_map(Kind::File),
        6 => prop::sample::select(vec![0o755, 0o700, 0o1777]).prop_map(Kind::Directory),
        1 => Just(Kind::Symlink),
        1 => Just(Kind::Device),
        2 => name().prop_map(Kind::HardLink),
        3 => Just(Kind::Whiteout),
        2 => Just(Kind::Opaque),
    ];
    (vec(name(), 1..4), kind).prop_map(|(path, kind)| Item { path, kind })
}

/// A layer as an engine could have written it: no name is both there and whited out, parents are directories.
fn layer(mut tar: TarBuilder, items: &[Item]) -> Vec<u8> {
    use std::collections::BTreeMap;
    // Last one wins; what would lie below a file is left out.
    let mut entries: BTreeMap<String, &Item> = BTreeMap::new();
    for item in items {
        entries.insert(item.path.join("/"), item);
    }
    let is_directory = |item: &Item| matches!(item.kind, Kind::Directory(_) | Kind::Opaque);
    let mut made: std::collections::BTreeSet<String> = std::collections::BTreeSet::new();
    let mut files: Vec<String> = Vec::new();
    for (path, item) in &entries {
        let parents: Vec<String> = (1..item.path.len()).map(|length| item.path[..length].join("/")).collect();
        if parents.iter().any(|parent| entries.get(parent).is_some_and(|item| !is_directory(item))) {
            continue;
        }
        for parent in &parents {
            if made.insert(parent.clone()) {
                tar = tar.directory(parent, 0o755);
            }
        }
        let parent = parents.last().cloned().unwrap_or_default();
        let name = item.path.last().unwrap();
        let beside =
            |name: &str| if parent.is_empty() { name.to_owned() } else { format!("{parent}/{name}") };
        match &item.kind {
            Kind::File(byte) => {
                tar = tar.owner(1000, 7).file(path, 0o644, &[*byte; 10]).owner(0, 0);
                files.push(path.clone());
            }
            Kind::Directory(mode) => {
                made.insert(path.clone());
                tar = tar.xattr("user.colour", b"blue").directory(path, *mode);
            }
            Kind::Symlink => tar = tar.symlink(path, "somewhere/else"),
            Kind::Device => tar = tar.char_device(path, 0o600, (1, 3)),
            Kind::HardLink(target) => {
                let target = beside(target);
                if files.contains(&target) && target != *path {
                    tar = tar.hard_link(path, &target);
                }
            }
            Kind::Whiteout => tar = tar.file(&beside(&format!(".wh.{name}")), 0o644, b""),
            Kind::Opaque => {
                made.insert(path.clone());
                tar = tar.directory(path, 0o755).file(&format!("{path}/.wh..wh..opq"), 0o644, b"");
            }
        }
    }
    tar.finish()
}

fn without_additions(entries: &[TreeEntry]) -> Vec<TreeEntry> {
    let is_added = |entry: &TreeEntry| ADDED.iter().any(|added| Path::new(&entry.path).starts_with(added));
    // overlayfs lists a whiteout that hides nothing, though it cannot be looked up.
    let is_listed_only = |entry: &TreeEntry| entry.error.is_some() && entry.kind.is_none();
    let mut entries = layer_content(entries);
    entries.retain(|entry| !is_added(entry) && !is_listed_only(entry));
    entries
}

/// Paths of the layers of a report, below a mount.
fn layers_of(report: &Value, mount: &Path) -> Vec<std::path::PathBuf> {
    let layers = report["layers"].as_array().unwrap();
    layers.iter().map(|layer| mount.join(layer["path"].as_str().unwrap().trim_start_matches('/'))).collect()
}

#[test]
fn row_106_flat_trees_made_from_catalogs_are_what_overlayfs_shows() {
    let repository = Published::create("flat.example.org").unwrap();
    let strategy = vec(vec(item(), 0..14), 1..6);
    let mut images: Vec<Vec<Vec<Item>>> = Vec::new();
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    let count = number("CVMFS_TEST_TREES").unwrap_or(IMAGES);
    let seed = RngSeed::Fixed(u64::from(number("CVMFS_TEST_SEED").unwrap_or(7)));
    let config = Config { failure_persistence: None, rng_seed: seed, ..Config::default() };
    let mut runner = TestRunner::new(config);
    for _ in 0..count {
        images.push(strategy.new_tree(&mut runner).unwrap().current());
    }
    let mut reports = Vec::new();
    for (number, layers) in images.iter().enumerate() {
        // overlayfs takes no directory twice, and at least two.
        let own = |depth: usize| TarBuilder::new().file(&format!("layer{depth}"), 0o644, b"");
        let base = TarBuilder::new().file("base", 0o644, b"").finish();
        let above = layers.iter().enumerate().map(|(depth, items)| layer(own(depth), items));
        let image = Image::new(std::iter::once(base).chain(above))
            .config(serde_json::json!({"Labels": {"number": number.to_string()}}));
        let archive = repository.scratch().join("image.tar");
        image.write_docker_archive(&archive, &format!("r.example.org/image:{number}")).unwrap();
        let source = format!("docker-archive:{}", archive.display());
        reports.push(repository.convert(&source, &["--layout", "unpacked"]).unwrap());
    }
    repository.publish("check", &[]).unwrap().success().unwrap();
    let mount = MountBuilder::new(&repository.fqrn, &repository.client_config().unwrap()).mount().unwrap();
    let mut entries = 0;
    for (number, report) in reports.iter().enumerate() {
        let mut lowers = layers_of(report, mount.path());
        lowers.reverse();
        let overlay = Overlay::of(&lowers.iter().map(std::path::PathBuf::as_path).collect::<Vec<_>>());
        let expected = without_additions(&walk_tree(overlay.path()));
        let flat = mount.path().join(format!("r.example.org/image:{number}/"));
        let found = without_additions(&walk_tree(&flat));
        assert_same(
            &compare(&expected, &found)
                .into_iter()
                .map(|line| format!("image {number}: {line}\n{:?}", images[number]))
                .collect::<Vec<_>>(),
        );
        entries += found.len();
    }
    assert!(entries > 200, "the trees had {entries} entries in all");
}

#[test]
fn an_image_lies_where_snapshotter_and_apptainer_look() {
    let registry = Registry::start().unwrap();
    let image =
        Image::busybox().unwrap().layer(TarBuilder::new().file("etc/greeting", 0o644, b"hello\n").finish());
    let image = image.config(serde_json::json!({
        "Env": ["PATH=/bin", "GREETING=it's \"$HOME\" & more"], "Entrypoint": ["/bin/sh", "-c"],
        "Cmd": ["echo \"$GREETING\"; cat /etc/greeting"],
    }));
    let digest = registry.push("team/app", "1", &image).unwrap();
    let repository = Published::create("unpacked.example.org").unwrap();
    let reference = registry.reference("team/app", "1");
    let report = repository
        .convert(&reference, &["--layout", "unpacked", "--output", &registry.reference("thin", "1")])
        .unwrap();
    assert_eq!(report["revision"], 2, "all of it is one revision");
    repository.publish("check", &[]).unwrap().success().unwrap();
    let mount = MountBuilder::new(&repository.fqrn, &repository.client_config().unwrap()).mount().unwrap();
    let read = |path: &str| std::fs::read_to_string(mount.path().join(path)).unwrap();
    let json = |path: &str| serde_json::from_str::<Value>(&read(path)).unwrap();

    let id = testkit::image::digest(&image.config_blob());
    let hex = |digest: &str| digest.trim_start_matches("sha256:").to_owned();
    let place = |below: &str, digest: &str| format!("{below}/{}/{}", &hex(digest)[..2], hex(digest));
    for layer in &image.layers {
        let directory = place(".layers", &layer.digest());
        assert!(mount.path().join(&directory).join("layerfs").is_dir());
        let described = &json(&format!("{directory}/.metadata/layers.json"))[0];
        let diff_id = testkit::image::digest(&layer.tar);
        assert_eq!(described["id"], hex(&diff_id));
        assert_eq!(described["diff-digest"], diff_id);
        assert_eq!(described["compressed-diff-digest"], layer.digest());
        assert_eq!(described["diff-size"], layer.tar.len());
        assert_eq!(json(&format!("{directory}/.metadata/origin.json"))["origin"], serde_json::json!([id]));
    }
    let link = std::fs::read_link(mount.path().join(&reference)).unwrap();
    assert_eq!(link.to_str().unwrap(), format!("../../{}", place(".flat", &id)));
    let manifest = read(&format!(".metadata/{reference}/manifest.json"));
    assert_eq!(testkit::image::digest(manifest.as_bytes()), digest);
    let thin = registry.manifest("thin", "1").unwrap();
    assert_eq!(thin["layers"].as_array().unwrap().len(), 1);

    // Apptainer enters the directory and calls the actions; environment and arguments are the image's.
    let root = std::fs::canonicalize(mount.path().join(&reference)).unwrap();
    let action = |arguments: &[&str]| {
        let mut command = Command::new("chroot");
        command.arg(&root).args(arguments).env("HOME", "/root");
        run(command, Duration::from_secs(20)).unwrap().success().unwrap()
    };
    assert_eq!(action(&["/.run"]), "it's \"$HOME\" & more\nhello");
    assert_eq!(action(&["/.run", "echo other"]), "other");
    assert_eq!(action(&["/.exec", "cat", "/etc/greeting"]), "hello");

    // Again: nothing. Under another name: a link, and a second origin only for another configuration.
    let again = repository.convert(&reference, &["--layout", "unpacked"]).unwrap();
    assert_eq!((&again["revision"], &again["bytes_downloaded"]), (&report["revision"], &0.into()));
    registry.push("team/app", "2", &image).unwrap();
    registry.push("team/app", "3", &image.clone().config(serde_json::json!({"User": "7"}))).unwrap();
    for tag in ["2", "3"] {
        let report =
            repository.convert(&registry.reference("team/app", tag), &["--layout", "unpacked"]).unwrap();
        assert_eq!(report["bytes_downloaded"], 0, "{tag}");
    }
    mount.ask("remount sync", Duration::from_secs(20)).unwrap();
    assert!(std::fs::read_link(mount.path().join(registry.reference("team/app", "2"))).unwrap() == link);
    let origin = format!("{}/.metadata/origin.json", place(".layers", &image.layers[0].digest()));
    assert_eq!(json(&origin)["origin"].as_array().unwrap().len(), 2);
    // A layer that is there unpacks to what it unpacks to, whatever another image says.
    let mut lying = image;
    lying.layers[0].tar = TarBuilder::new().file("other", 0o644, b"").finish();
    registry.push("team/lying", "1", &lying).unwrap();
    let error =
        repository.convert(&registry.reference("team/lying", "1"), &["--layout", "unpacked"]).unwrap_err();
    assert!(format!("{error:#}").contains("but that unpacks to"), "{error:#}");
    let images = json("podmanStore/overlay-images/images.json");
    let named = images.as_array().unwrap().iter().find(|image| image["id"] == hex(&id)).unwrap();
    assert_eq!(named["names"], serde_json::json!([reference, registry.reference("team/app", "2")]));
    assert_eq!(images.as_array().unwrap().len(), 2, "{images}");
    assert_eq!(json("podmanStore/overlay-layers/layers.json").as_array().unwrap().len(), 2);
    repository.publish("check", &[]).unwrap().success().unwrap();
}

#[test]
fn the_loop_keeps_links_true_and_removes_flat_trees_after_the_grace() {
    let registry = Registry::start().unwrap();
    let app = |text: &str| {
        let base = TarBuilder::new().file("base", 0o644, b"base").finish();
        let own = TarBuilder::new().file("own", 0o644, text.as_bytes()).finish();
        Image::new([base, own]).config(serde_json::json!({"Labels": {"text": text}}))
    };
    registry.push("app", "1", &app("first")).unwrap();
    registry.push("gone", "1", &app("gone")).unwrap();
    // What app:1 becomes, under another name.
    registry.push("twin", "1", &app("second")).unwrap();
    let repository = Published::create("wishes.example.org").unwrap();
    let recipe = repository.scratch().join("wishes.yaml");
    let wish = |images: &[&str]| {
        let input: Vec<String> =
            images.iter().map(|image| format!("  - 'http://{}/{image}'\n", registry.address())).collect();
        let text = format!("version: 1\ncvmfs_repo: {}\ninput:\n{}", repository.fqrn, input.concat());
        std::fs::write(&recipe, text).unwrap();
    };
    let round = |more: &[&str]| -> Value {
        let path = |path: &Path| path.to_str().unwrap().to_owned();
        let state = repository.scratch().join("state");
        let mut arguments: Vec<String> =
            ["loop", "--once", "--json", "--skip-thin-image", "--layout", "unpacked"]
                .map(str::to_owned)
                .into();
        arguments.extend([path(&recipe), "--storage".to_owned(), path(&repository.storage)]);
        arguments.extend(["--keys".to_owned(), path(&repository.keys), "--state".to_owned(), path(&state)]);
        arguments.extend(more.iter().map(|more| (*more).to_owned()));
        let text = run_binary("docker2cvmfs", &arguments).unwrap().success().unwrap();
        serde_json::from_str(&text).unwrap()
    };
    wish(&["app:1", "gone:1", "twin:1"]);
    assert_eq!(round(&[])["converted"], 3);
    assert_eq!(round(&[])["unchanged"], 3);
    registry.push("app", "1", &app("second")).unwrap();
    wish(&["app:1"]);
    assert_eq!(round(&[])["converted"], 1);
    let mount = MountBuilder::new(&repository.fqrn, &repository.client_config().unwrap()).mount().unwrap();
    let at = |name: &str| mount.path().join(registry.address()).join(name);
    assert_eq!(std::fs::read(at("app:1/own")).unwrap(), b"second");
    assert_eq!(std::fs::read(at("gone:1/own")).unwrap(), b"gone", "within the grace");
    let flat = |text: &str| {
        let id = testkit::image::digest(&app(text).config_blob()).replace("sha256:", "");
        mount.path().join(format!(".flat/{}/{id}", &id[..2]))
    };
    assert!(flat("first").is_dir());
    let removed = round(&["--grace", "0s"]);
    assert_eq!(removed["layers_removed"], 2, "{removed}");
    mount.ask("remount sync", Duration::from_secs(20)).unwrap();
    assert!(!flat("first").exists() && !flat("gone").exists() && flat("second").is_dir());
    assert!(at("gone:1").symlink_metadata().is_err());
    let index = |name: &str| -> Value {
        let text = std::fs::read(mount.path().join("podmanStore").join(name)).unwrap();
        serde_json::from_slice(&text).unwrap()
    };
    let (images, layers) = (index("overlay-images/images.json"), index("overlay-layers/layers.json"));
    assert_eq!(images[0]["names"], serde_json::json!([registry.reference("app", "1")]));
    assert_eq!((images.as_array().unwrap().len(), layers.as_array().unwrap().len()), (1, 2));
    let kept = std::fs::read_dir(mount.path().join("podmanStore/overlay")).unwrap().count();
    assert_eq!(kept, 3, "two layers, and the directory of short names");
    assert_eq!(std::fs::read(at("app:1/base")).unwrap(), b"base", "what others need stays");
    repository.publish("check", &[]).unwrap().success().unwrap();
}

/// podman of this machine, with images of its own nowhere and those of a repository's store.
struct Podman {
    scratch: testkit::ScratchDir,
}

impl Podman {
    fn with_store(store: &Path) -> Podman {
        testkit::install(&["podman"]).unwrap();
        let scratch = testkit::ScratchDir::new("podman").unwrap();
        let directory = scratch.path().display();
        let text = format!(
            "[storage]\ndriver = \"overlay\"\ngraphroot = \"{directory}/root\"\nrunroot = \"{directory}/run\"\n\
             [storage.options]\nadditionalimagestores = [\"{}\"]\n",
            store.display()
        );
        std::fs::write(scratch.path().join("storage.conf"), text).unwrap();
        Podman { scratch }
    }

    fn run(&self, arguments: &[&str]) -> String {
        let mut command = Command::new("podman");
        command.arg("--cgroup-manager=cgroupfs").args(arguments);
        command.env("CONTAINERS_STORAGE_CONF", self.scratch.path().join("storage.conf"));
        run(command, Duration::from_secs(60)).unwrap().success().unwrap().trim().to_owned()
    }

    /// The tree that a container of an image has.
    fn container_of<R>(&self, image: &str, look: impl FnOnce(&Path) -> R) -> R {
        let container = self.run(&["create", "--network=host", image, "/none"]);
        let root = self.run(&["mount", &container]);
        let seen = look(Path::new(&root));
        self.run(&["umount", &container]);
        self.run(&["rm", &container]);
        seen
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        // podman leaves its directory mounted on itself.
        for below in ["root/overlay", "root"] {
            let _ =
                rustix::mount::unmount(self.scratch.path().join(below), rustix::mount::UnmountFlags::DETACH);
        }
    }
}

#[test]
fn podman_finds_the_images_and_stacks_their_layers() {
    let registry = Registry::start().unwrap();
    let layer = |name: &str, content: &[u8]| TarBuilder::new().file(name, 0o644, content).finish();
    let shared = TarBuilder::new()
        .file("dir/.wh.gone", 0o644, b"")
        .directory("replaced", 0o755)
        .file("replaced/.wh..wh..opq", 0o644, b"")
        .file("replaced/new", 0o644, b"new")
        .finish();
    let image = |base: &[u8]| {
        let below = TarBuilder::new()
            .file("base", 0o644, base)
            .file("dir/gone", 0o644, b"")
            .file("dir/stays", 0o644, b"")
            .file("replaced/old", 0o644, b"old")
            .finish();
        // A layer that is there twice is stacked once.
        Image::new([below, shared.clone(), shared.clone(), layer("top", base)])
    };
    // The same layer on two others.
    registry.push("team/one", "1", &image(b"one")).unwrap();
    registry.push("team/two", "1", &image(b"two")).unwrap();
    let repository = Published::create("podman.example.org").unwrap();
    let names = ["team/one", "team/two"].map(|name| registry.reference(name, "1"));
    for name in &names {
        repository.convert(name, &["--layout", "unpacked"]).unwrap();
    }
    repository.publish("check", &[]).unwrap().success().unwrap();
    let mount = MountBuilder::new(&repository.fqrn, &repository.client_config().unwrap()).mount().unwrap();
    let podman = Podman::with_store(&mount.path().join("podmanStore"));
    let listed: Value = serde_json::from_str(&podman.run(&["images", "--format", "json"])).unwrap();
    let mut found: Vec<&str> =
        listed.as_array().unwrap().iter().map(|image| image["Names"][0].as_str().unwrap()).collect();
    found.sort_unstable();
    assert_eq!(found, names.each_ref().map(String::as_str), "{listed}");
    assert!(listed.as_array().unwrap().iter().all(|image| image["ReadOnly"] == true), "{listed}");
    for (name, base) in names.iter().zip(["one", "two"]) {
        podman.container_of(name, |root| {
            let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap();
            assert_eq!((read("base").as_str(), read("top").as_str()), (base, base));
            assert!(root.join("dir/stays").exists() && !root.join("dir/gone").exists());
            assert!(root.join("replaced/new").exists() && !root.join("replaced/old").exists());
            // What it writes goes to podman's own store.
            std::fs::write(root.join("dir/stays"), b"changed").unwrap();
            assert_eq!(read("dir/stays"), "changed");
        });
    }
}
