//! The same session of an engine's verbs on overlay2 and on the plugin, on every kind of image: whatever the engine
//! shows must be the same.

#![allow(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use testkit::image::busybox_layer;
use testkit::process::run;
use testkit::tar::TarBuilder;
use testkit::{Dockerd, Image, Published, Registry, ScratchDir, ThinEngine};

const PATIENCE: Duration = Duration::from_secs(120);

/// Everything below directories that the engine does not make, without times of what the session writes.
const LIST: &str = "cd /; for p in $(find bin/sh etc/app srv opt 2>/dev/null | sort); do stat -c '%n %F %a %u %g %h %t,%T' $p; done \
                    | sed 's/directory \\([0-7]*\\) \\([0-9]*\\) \\([0-9]*\\) [0-9]*/directory \\1 \\2 \\3/'; \
                    find bin/sh etc/app srv opt -type f 2>/dev/null | sort | xargs sha256sum; \
                    for l in $(find srv -type l | sort); do readlink $l; done";

/// What a container does to its image.
const CHANGE: &str = "cd /srv; echo changed > plain; rm gone; rm -r full; mkdir full; echo fresh > full/new; \
                      ln plain twice; ln -s plain soft; chmod 4711 program; chown 12:34 owned; mkdir -p deep/er/est; \
                      echo x > deep/er/est/file; mv moved elsewhere; : > emptied; mkfifo pipe; rm -r /etc/app; \
                      touch -d '2001-02-03 04:05:06' dated; rm link1; dd if=/dev/zero of=holes bs=1 count=1 seek=1000000 2>/dev/null";

fn layers() -> Vec<Vec<u8>> {
    let noise: Vec<u8> = (0..400_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 20) as u8).collect();
    let long = format!("srv/{}/{}", "d".repeat(120), "f".repeat(150));
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let data = TarBuilder::new()
        .directory("etc/app", 0o750)
        .file("etc/app/config", 0o600, b"config")
        .directory("srv", 0o755)
        .file("srv/plain", 0o644, b"plain")
        .file("srv/gone", 0o644, b"gone")
        .directory("srv/full", 0o1777)
        .file("srv/full/stale", 0o644, b"stale")
        .file("srv/program", 0o755, &noise)
        .file("srv/owned", 0o640, b"owned")
        .file("srv/moved", 0o644, b"moved")
        .file("srv/emptied", 0o644, &noise[..10_000])
        .file("srv/dated", 0o644, b"dated")
        .file("srv/link1", 0o644, b"linked")
        .hard_link("srv/link2", "srv/link1")
        .char_device("srv/null", 0o666, (1, 3))
        .xattr("security.capability", &capability)
        .file("srv/capable", 0o755, b"capable")
        .file(&long, 0o644, b"long")
        .directory("srv/opaque", 0o755)
        .file("srv/opaque/below", 0o644, b"below");
    let top = TarBuilder::new()
        .directory("srv/opaque", 0o755)
        .file("srv/opaque/.wh..wh..opq", 0o644, b"")
        .file("srv/opaque/above", 0o644, b"above")
        .directory("etc/app", 0o755)
        .file("etc/app/.wh.config", 0o644, b"")
        .file("etc/app/other", 0o644, b"other")
        .file("srv/plain", 0o664, b"plain of the top layer");
    vec![busybox_layer().unwrap().finish(), data.finish(), top.finish()]
}

fn image(layers: Vec<Vec<u8>>) -> Image {
    Image::new(layers)
        .config(serde_json::json!({"Cmd": ["/bin/cat", "/srv/plain"], "Env": ["PATH=/bin", "A=b c"]}))
}

/// What was asked of an engine, and what it answered.
#[derive(Default)]
struct Transcript(Vec<(String, String)>);

impl Transcript {
    fn note(&mut self, what: &str, answer: impl Into<String>) {
        self.0.push((what.to_owned(), answer.into()));
    }

    /// Panics at the first difference.
    fn compare(&self, other: &Transcript, whose: &str) {
        assert_eq!(self.0.len(), other.0.len());
        for ((what, expected), (_, found)) in self.0.iter().zip(&other.0) {
            let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
            let (expected, found) = (lines(expected), lines(found));
            let missing: Vec<_> = expected.iter().filter(|line| !found.contains(line)).collect();
            let extra: Vec<_> = found.iter().filter(|line| !expected.contains(line)).collect();
            assert!(expected == found, "{whose}: {what}: missing {missing:#?}, not on overlay2 {extra:#?}");
        }
    }
}

/// A session on one engine with one image.
struct Session<'a> {
    docker: &'a Dockerd,
    image: &'a str,
    registry: &'a Registry,
    scratch: PathBuf,
    transcript: Transcript,
}

impl Session<'_> {
    fn docker(&self, arguments: &[&str]) -> String {
        self.docker.docker(arguments).unwrap()
    }

    fn list(&mut self, what: &str, image: &str) {
        let shown = self.docker.run(&[image, "/bin/sh", "-c", LIST]).unwrap();
        assert!(shown.lines().count() > 20, "{what}: {shown}");
        self.transcript.note(what, shown);
    }

    /// The content of an archive: names, modes, owners, sizes, link targets, and the hashes of its files.
    fn note_archive(&mut self, what: &str, file: &Path) {
        let script = "tar --list --verbose --numeric-owner --quoting-style=escape --utc --full-time -f $0 | \
                      sed 's/ 20[2-9][0-9]-[0-9-]* [0-9:]* / /' | sort; mkdir $0.d; tar -C $0.d -xf $0 --exclude=dev --exclude=proc; cd $0.d; \
                      find . -type f | sort | xargs -d '\\n' sha256sum; rm -rf $0.d";
        let mut command = Command::new("sh");
        command.args(["-c", script]).arg(file);
        let text = run(command, PATIENCE).unwrap().success().unwrap();
        self.transcript.note(what, text);
    }

    /// The entries of the top layers of saved images, in their order.
    fn note_top_layers(&mut self, file: &Path) {
        let unpacked = file.with_extension("d");
        std::fs::create_dir(&unpacked).unwrap();
        let mut command = Command::new("tar");
        command.arg("-xf").arg(file).arg("-C").arg(&unpacked);
        run(command, PATIENCE).unwrap().success().unwrap();
        let manifest = std::fs::read(unpacked.join("manifest.json")).unwrap();
        let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
        let mut images = manifest.as_array().unwrap().clone();
        images.sort_by_key(|image| image["RepoTags"][0].to_string());
        for image in images {
            let layer = unpacked.join(image["Layers"].as_array().unwrap().last().unwrap().as_str().unwrap());
            let script = "tar --list --verbose --numeric-owner --quoting-style=escape --utc --full-time --xattrs -vv -f $0 | \
                          sed 's/ 20[2-9][0-9]-[0-9-]* [0-9:]* / /; s/^.* \\(.*\\.wh\\.\\)/\\1/'";
            // Of a whiteout only the name counts.
            let mut command = Command::new("sh");
            command.args(["-c", script]).arg(&layer);
            let text = run(command, PATIENCE).unwrap().success().unwrap();
            self.transcript.note(&format!("top layer of {}", image["RepoTags"][0]), text);
        }
    }

    fn build(&mut self, buildkit: &str) {
        let context = self.scratch.join(format!("context-{buildkit}"));
        std::fs::create_dir(&context).unwrap();
        let dockerfile = format!(
            "FROM {0} AS first\nRUN echo first > /srv/first && rm /srv/gone\nFROM {0}\nCOPY copied /srv/copied\n\
             ADD added.tar /opt/\nRUN rm -r /srv/opaque && mkdir /srv/opaque && echo run > /srv/opaque/run\n\
             COPY --from=first /srv/first /srv/program /opt/\nENV E=f\n",
            self.image
        );
        std::fs::write(context.join("Dockerfile"), dockerfile).unwrap();
        std::fs::write(context.join("copied"), "copied").unwrap();
        let added =
            TarBuilder::new().directory("a", 0o700).file("a/b", 0o4755, b"added").hard_link("a/c", "a/b");
        std::fs::write(context.join("added.tar"), added.finish()).unwrap();
        let tag = format!("built-{buildkit}:1");
        for round in ["build", "build from the cache"] {
            let mut build = self.docker.docker_command(&["build", "--network=host", "-t", &tag]);
            build.arg(&context).env("DOCKER_BUILDKIT", buildkit);
            run(build, PATIENCE).unwrap().success().unwrap();
            self.list(&format!("{round}, DOCKER_BUILDKIT={buildkit}"), &tag);
        }
        let env = self.docker(&["run", "--rm", "--network=host", &tag, "/bin/sh", "-c", "echo $A $E"]);
        self.transcript.note("environment of the built image", env);
    }

    fn run(mut self) -> Transcript {
        let file = |name: &str| self.scratch.join(name).to_str().unwrap().to_owned();
        let (exported, saved, copied) = (file("exported.tar"), file("saved.tar"), file("copied"));
        self.docker(&["pull", "-q", self.image]);
        self.list("run", self.image);
        let shown = self.docker.run(&[self.image]).unwrap();
        self.transcript.note("run without a command", shown);

        // A container that stays.
        self.docker(&["run", "--network=host", "--name", "changed", self.image, "/bin/sh", "-c", CHANGE]);
        let sorted = |text: String| {
            let mut lines: Vec<&str> = text.lines().collect();
            lines.sort_unstable();
            lines.join("\n")
        };
        let changes = sorted(self.docker(&["diff", "changed"]));
        assert!(changes.contains("D /srv/gone"), "{changes}");
        self.transcript.note("diff", changes);
        let size = self.docker(&["ps", "-as", "--filter", "name=changed", "--format", "{{.Size}}"]);
        self.transcript.note("ps -s", size.split(" (").next().unwrap_or_default());
        self.docker(&["cp", "changed:/srv", &copied]);
        let mut command = Command::new("sh");
        command.args(["-c", "cd $0; find . | sort | xargs -d '\\n' stat -c '%n %F %a' | grep -v pipe; find . -type f | sort | xargs -d '\\n' sha256sum", &copied]);
        let text = run(command, PATIENCE).unwrap().success().unwrap();
        self.transcript.note("cp out", text);
        std::fs::write(copied.replace("copied", "one"), "copied in").unwrap();
        self.docker(&["cp", &copied.replace("copied", "one"), "changed:/srv/full/in"]);
        let changes = sorted(self.docker(&["diff", "changed"]));
        self.transcript.note("diff after cp in", changes);
        self.docker(&["export", "-o", &exported, "changed"]);
        self.note_archive("export", Path::new(&exported));
        let root =
            self.docker(&["inspect", "--format", "{{json .Config.Env}} {{.State.ExitCode}}", "changed"]);
        // A thin image says in its environment what it is.
        self.transcript.note("inspect", root.replace(",\"CVMFS_IMAGE=true\"", ""));

        // A container that runs.
        self.docker(&["run", "-d", "--network=host", "--name", "running", self.image, "/bin/sleep", "1000"]);
        let inside = self.docker(&[
            "exec",
            "running",
            "/bin/sh",
            "-c",
            "cat /srv/plain; echo y > /srv/exec; rm -r /srv/opaque; ls /srv",
        ]);
        self.transcript.note("exec", inside);
        let changes = sorted(self.docker(&["diff", "running"]));
        self.transcript.note("diff of a running container", changes);
        self.docker(&["restart", "-t", "0", "running"]);
        let inside = self.docker(&["exec", "running", "/bin/sh", "-c", "cat /srv/exec; ls /srv"]);
        self.transcript.note("exec after a restart", inside);

        self.docker(&["commit", "changed", "committed:1"]);
        self.list("commit", "committed:1");
        self.docker(&["commit", "--change", "ENV C=d", "running", "running:1"]);
        self.list("commit of a running container", "running:1");
        self.docker(&["save", "-o", &saved, "committed:1", "running:1"]);
        self.note_top_layers(Path::new(&saved));
        self.docker(&["rmi", "committed:1", "running:1"]);
        self.docker(&["load", "-i", &saved]);
        self.list("save, rmi, load", "committed:1");
        let env = self.docker(&["run", "--rm", "--network=host", "running:1", "/bin/sh", "-c", "echo $A $C"]);
        self.transcript.note("environment", env);
        let pushed = self.registry.reference("session", "1");
        self.docker(&["tag", "committed:1", &pushed]);
        self.docker(&["push", "-q", &pushed]);
        self.docker(&["rmi", "committed:1", &pushed]);
        self.docker(&["pull", "-q", &pushed]);
        self.list("tag, push, rmi, pull", &pushed);
        self.docker(&["import", &exported, "imported:1"]);
        self.list("import", "imported:1");

        self.build("0");
        self.build("1");
        let left = self.docker(&["ps", "-a", "--format", "{{.Names}}"]);
        self.transcript.note("ps -a", sorted(left));
        self.docker(&["rm", "-f", "changed", "running"]);
        self.docker(&["builder", "prune", "-af"]);
        self.docker(&["system", "prune", "-af"]);
        let left = self.docker(&["images", "-aq"]) + &self.docker(&["ps", "-aq"]);
        self.transcript.note("system prune", left);
        self.transcript
    }
}

#[test]
fn every_verb_shows_on_the_plugin_what_it_shows_on_overlay2() {
    let registry = Registry::start().unwrap();
    let repository = Published::create("verbs.example.org").unwrap();
    registry.push("app", "1", &image(layers())).unwrap();
    let normal = registry.reference("app", "1");
    let thin = registry.reference("thin/app", "1");
    repository.convert(&normal, &["--output", &thin]).unwrap();
    // The lowest layer as it is, the others from the repository.
    let descriptor = testkit::process::run(
        {
            let mut command = Command::new(testkit::binary("docker2cvmfs"));
            command.args(["thin", &normal, &format!("{}/layers/", repository.fqrn)]);
            command
        },
        PATIENCE,
    );
    let descriptor_text = descriptor.unwrap().success().unwrap();
    let mut descriptor: serde_json::Value = serde_json::from_str(&descriptor_text).unwrap();
    descriptor["layers"].as_array_mut().unwrap().remove(0);
    let upper = TarBuilder::new().file("thin.json", 0o644, descriptor.to_string().as_bytes()).finish();
    registry.push("mixed", "1", &image(vec![layers().swap_remove(0), upper])).unwrap();
    let thin_on_normal = registry.reference("mixed", "1");

    // The lower layers from the repository, the uppermost as it is.
    let mut lower: serde_json::Value = serde_json::from_str(&descriptor_text).unwrap();
    lower["layers"].as_array_mut().unwrap().pop();
    let lower = TarBuilder::new().file("thin.json", 0o644, lower.to_string().as_bytes()).finish();
    registry.push("mixed", "2", &image(vec![lower, layers().swap_remove(2)])).unwrap();
    let normal_on_thin = registry.reference("mixed", "2");

    let scratch = ScratchDir::new("verbs").unwrap();
    let session = |docker: &Dockerd, image: &str, name: &str| {
        let scratch = scratch.path().join(name);
        std::fs::create_dir(&scratch).unwrap();
        Session { docker, image, registry: &registry, scratch, transcript: Transcript::default() }.run()
    };
    let overlay2 = Dockerd::builder().start().unwrap();
    let expected = session(&overlay2, &normal, "overlay2");
    drop(overlay2);
    let engine = ThinEngine::start().unwrap();
    engine.etc.add_published(&repository).unwrap();
    let home = engine.propagated_mount().unwrap();
    let kinds = [
        ("normal", &normal),
        ("thin", &thin),
        ("thin-on-normal", &thin_on_normal),
        ("normal-on-thin", &normal_on_thin),
    ];
    for (name, image) in kinds {
        let found = session(&engine.dockerd, image, name);
        expected.compare(&found, name);
        let layers = std::fs::read_dir(&home).unwrap().flatten().map(|entry| entry.path());
        let left: Vec<_> =
            layers.flat_map(|driver| std::fs::read_dir(driver.join("l"))).flatten().flatten().collect();
        assert!(left.is_empty(), "{name}: layers are left after everything was pruned: {left:?}");
    }
}
