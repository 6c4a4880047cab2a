//! Converted images beside their originals: the manual's recipe word for word, and images as they come, entry by entry
//! the same on the plugin as on overlay2.

#![allow(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

mod common;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::assert_same;
use testkit::image::busybox_layer;
use testkit::process::run;
use testkit::tar::TarBuilder;
use testkit::tree::compare_without;
use testkit::{Dockerd, Image, Published, Registry, ScratchDir, ThinEngine, TreeEntry, binary, walk_tree};

const PATIENCE: Duration = Duration::from_secs(300);

/// Packages of two layers of a Debian image, taken from this machine, which is one. They have set-id programs, hard
/// links and links of every kind.
const BASE: &str = "base-files base-passwd bash coreutils dash debianutils libc6 libc-bin libtinfo6 libselinux1 libpcre2-8-0 \
                    libacl1 libattr1 libgmp10 libcrypt1 hostname";
const MORE: &str = "util-linux mount passwd login perl-base findutils grep sed tar gzip tzdata";

/// What an engine puts into every container, or creates it anew.
const OF_THE_ENGINE: [&str; 8] =
    ["/.dockerenv", "/dev", "/proc", "/sys", "/etc/hostname", "/etc/hosts", "/etc/resolv.conf", "/etc/mtab"];

#[test]
fn the_recipe_of_the_manual_works_word_for_word() {
    let registry = Registry::start().unwrap();
    let top = TarBuilder::new().directory("etc", 0o755).file("etc/.wh.passwd", 0o644, b"").file(
        "etc/greeting",
        0o644,
        b"hello from the manual\n",
    );
    let image = Image::new([busybox_layer().unwrap().finish(), top.finish()]);
    registry.push("cloud/image-name", "latest", &image).unwrap();
    let repository = Published::create("images.example.org").unwrap();
    let engine = ThinEngine::start().unwrap();
    engine.etc.add_published(&repository).unwrap();

    // As in the manual, but for the names of registry, repository and directories.
    let home = repository.scratch().join("user");
    std::fs::create_dir(&home).unwrap();
    std::os::unix::fs::symlink(binary("docker2cvmfs"), home.join("docker2cvmfs")).unwrap();
    let name = format!("{}/cvmfs/thin_image-name", registry.address());
    let url = format!("http://{}/v2", registry.address());
    let recipe = format!(
        r#"set -e
./docker2cvmfs --registry {url} pull cloud/image-name:latest $HOME/layers/

for l in $HOME/layers/*; do
  hash=$(basename $l .tar.gz)
  dst_layer=$HOME/images/layers/$hash
  mkdir -p $dst_layer
  touch $dst_layer/.cvmfscatalog
  tar xf $l -C $dst_layer --owner=$(id -u) --group=$(id -u) --no-xattrs --exclude="*dev/*";
done

$PUBLISH ingest $FQRN --storage $STORAGE --keys $KEYS --base / --tree $HOME/images

./docker2cvmfs --registry {url} thin cloud/image-name:latest $FQRN/layers > thin.json
tar cf - thin.json | docker import - {name}
docker push {name}
"#
    );
    let mut shell = Command::new("sh");
    shell.args(["-c", &recipe]).current_dir(&home).env("HOME", &home).env("FQRN", &repository.fqrn);
    shell
        .env("PUBLISH", binary("cvmfs-publish"))
        .env("STORAGE", &repository.storage)
        .env("KEYS", &repository.keys);
    shell.env("DOCKER_HOST", format!("unix://{}", engine.dockerd.socket().display()));
    run(shell, PATIENCE).unwrap().success().unwrap();

    engine.dockerd.docker(&["rmi", "-f", &name]).unwrap();
    // docker import keeps no configuration: the command has to be named.
    let shown = engine.dockerd.run(&[&name, "/bin/cat", "/etc/greeting"]).unwrap();
    assert_eq!(shown, "hello from the manual");
    let gone = engine.dockerd.run(&[&name, "/bin/sh", "-c", "test -e /etc/passwd || echo gone"]).unwrap();
    assert_eq!(gone, "gone", "the whiteout of the archive counts");
}

/// The files of these packages on this machine as an archive.
fn debian_layer(scratch: &Path, packages: &str, links: bool) -> Vec<u8> {
    let file = scratch.join("debian.tar");
    let script = r#"set -e
dpkg -L $PACKAGES | sed -E 's#^/(bin|sbin|lib|lib64)/#/usr/\1/#' | sort -u | while IFS= read -r path; do
    case "$path" in /.|/bin|/sbin|/lib|/lib64|/dev*|/proc*|/sys*|/run*|/tmp) continue ;; esac
    if [ -e "$path" ] || [ -L "$path" ]; then printf '%s\n' "${path#/}"; fi
done > "$OUT.list"
tar -C / --no-recursion --xattrs --numeric-owner -cf "$OUT" -T "$OUT.list"
if [ -n "$LINKS" ]; then
    mkdir "$OUT.d"; cd "$OUT.d"
    for name in bin sbin lib lib64; do ln -s "usr/$name" "$name"; done
    mkdir proc sys dev run; mkdir -m 1777 tmp
    tar --numeric-owner -rf "$OUT" bin sbin lib lib64 proc sys dev run tmp
fi
"#;
    let mut shell = Command::new("sh");
    shell.args(["-c", script]).env("PACKAGES", packages).env("OUT", &file).env("LC_ALL", "C.UTF-8");
    shell.env("LINKS", if links { "yes" } else { "" });
    run(shell, PATIENCE).unwrap().success().unwrap();
    std::fs::read(&file).unwrap()
}

fn debian(scratch: &Path) -> Image {
    let packages: Vec<&str> = BASE.split_whitespace().chain(MORE.split_whitespace()).collect();
    testkit::install(&packages).unwrap();
    let change = TarBuilder::new()
        .file("etc/debian_version", 0o644, b"changed\n")
        .file("usr/share/.wh.zoneinfo", 0o644, b"")
        .directory("usr/share/doc", 0o755)
        .file("usr/share/doc/.wh..wh..opq", 0o644, b"")
        .file("usr/share/doc/only", 0o600, b"this")
        // cap_net_raw+ep
        .xattr("security.capability", &[1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
        .file("usr/bin/capable", 0o755, b"#!/bin/sh\n");
    let config =
        serde_json::json!({"Cmd": ["/bin/bash", "-c", "perl -e 'print 6*7'"], "Env": ["PATH=/usr/bin:/bin"]});
    Image::new([debian_layer(scratch, BASE, true), debian_layer(scratch, MORE, false), change.finish()])
        .config(config)
}

/// Forty layers that add, replace, delete and hide what others brought.
fn many_layers() -> Image {
    let mut layers = vec![busybox_layer().unwrap().finish()];
    for n in 0..40_usize {
        let text = format!("layer {n}");
        let mut tar = TarBuilder::new()
            .directory("srv", 0o755)
            .file(&format!("srv/f{}", n % 9), 0o644, text.as_bytes())
            .owner(n as u32, 7)
            .file(&format!("srv/own{n}"), 0o600, text.as_bytes())
            .hard_link(&format!("srv/link{n}"), &format!("srv/own{n}"))
            .owner(0, 0)
            .directory(&format!("srv/d{}", n % 5), 0o700 | (n as u32 % 8))
            .file(&format!("srv/d{}/in{n}", n % 5), 0o640, text.as_bytes())
            .symlink(&format!("srv/s{}", n % 4), &format!("own{n}"));
        if n >= 3 && n % 3 == 0 {
            tar = tar.file(&format!("srv/.wh.own{}", n - 3), 0o644, b"");
        }
        if n % 7 == 6 {
            tar = tar.file(&format!("srv/d{}/.wh..wh..opq", n % 5), 0o644, b"");
        }
        if n % 11 == 10 {
            // A directory becomes a file, and the file a directory.
            tar = tar.file("srv/turns", 0o644, b"file");
        } else if n % 11 == 5 {
            tar = tar.directory("srv/turns", 0o755).file("srv/turns/inside", 0o644, text.as_bytes());
        }
        layers.push(tar.finish());
    }
    Image::new(layers).config(serde_json::json!({"Cmd": ["/bin/cat", "/srv/f3"]}))
}

/// The tree of a container that was made and not started, unpacked from `docker export`.
fn tree(docker: &Dockerd, image: &str) -> Vec<TreeEntry> {
    let scratch = ScratchDir::new("exported").unwrap();
    let (file, root) = (scratch.path().join("exported.tar"), scratch.path().join("root"));
    std::fs::create_dir(&root).unwrap();
    let container = docker.docker(&["create", "--network=host", image, "nothing"]).unwrap();
    docker.docker(&["export", "-o", file.to_str().unwrap(), container.trim()]).unwrap();
    docker.docker(&["rm", container.trim()]).unwrap();
    let mut tar = Command::new("tar");
    tar.args(["--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf"]).arg(&file).arg("-C").arg(&root);
    run(tar, PATIENCE).unwrap().success().unwrap();
    let mut entries = walk_tree(&root);
    entries.retain(|entry| {
        let path = Path::new(&entry.path);
        !OF_THE_ENGINE.iter().any(|own| path.starts_with(own))
    });
    for entry in &mut entries {
        // Engines put files into some directories.
        if entry.kind.as_deref() == Some("dir") {
            entry.mtime_ns = None;
        }
    }
    entries
}

#[test]
fn images_as_they_come_are_entry_by_entry_what_they_are_on_overlay2() {
    let scratch = ScratchDir::new("images").unwrap();
    let registry = Registry::start().unwrap();
    let repository = Published::create("compared.example.org").unwrap();
    let thin_engine = ThinEngine::start().unwrap();
    thin_engine.etc.add_published(&repository).unwrap();
    let overlay2 = Dockerd::builder().start().unwrap();
    for (name, image, least, says) in [
        ("busybox", Image::busybox().unwrap(), 30, ""),
        ("debian", debian(scratch.path()), 1500, "42"),
        ("many", many_layers(), 100, "layer 39"),
    ] {
        registry.push(name, "1", &image).unwrap();
        let normal = registry.reference(name, "1");
        let thin = registry.reference(&format!("thin/{name}"), "1");
        let report = repository.convert(&normal, &["--output", &thin]).unwrap();
        assert_eq!(report["layers"].as_array().unwrap().len(), image.layers.len());
        for (docker, image) in [(&overlay2, &normal), (&thin_engine.dockerd, &thin)] {
            docker.docker(&["pull", "-q", image]).unwrap();
            if !says.is_empty() {
                assert_eq!(docker.run(&[image]).unwrap(), says, "{image}");
            }
        }
        let (expected, found) = (tree(&overlay2, &normal), tree(&thin_engine.dockerd, &thin));
        assert!(expected.len() >= least, "{name} has only {} entries", expected.len());
        assert_same(&compare_without(&expected, &found, &["blocks"]));
        println!("{name}: {} entries in {} layers are the same", expected.len(), image.layers.len());
    }
    repository.publish("check", &[]).unwrap().success().unwrap();
}
