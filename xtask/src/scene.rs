//! What the demo and the start benchmark are played on: a registry with an image, a repository with its
//! layers, an engine on overlay2 and an engine on the plugin.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;
use testkit::image::Layer;
use testkit::process::{Finished, Service, run};
use testkit::published::run_binary;
use testkit::{Dockerd, Image, Registry, ScratchDir, ThinEngine, workspace_root};

/// Packages that the scene needs.
pub const PACKAGES: [&str; 3] = ["docker.io", "docker-registry", "debootstrap"];

/// Debootstrap downloads some 50 MB and configures 100 packages.
const DEBOOTSTRAP_TIMEOUT: Duration = Duration::from_secs(1200);

/// Pulling and pushing an image of the user's choice.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(1200);

/// The repository of the scene.
pub const FQRN: &str = "demo.example.org";

const SUITE: &str = "bookworm";

/// What the default image does: imports a part of the standard library, then prints one checksum over the
/// sources of all of it that were loaded.
const PROGRAM: &str = "\
import hashlib, sys, json, email.message, urllib.request, sqlite3, asyncio, decimal
total = hashlib.sha256()
for name in sorted(m.__file__ for m in list(sys.modules.values()) if getattr(m, '__file__', None)):
    total.update(name.encode() + hashlib.sha256(open(name, 'rb').read()).digest())
print(len(sys.modules), 'modules', total.hexdigest())";

/// One timed step.
#[derive(Debug, Clone, Serialize)]
pub struct Step {
    pub name: String,
    pub seconds: f64,
}

/// The steps so far; each is announced on standard error.
#[derive(Debug, Default)]
pub struct Steps(pub Vec<Step>);

impl Steps {
    /// Does one step and notes how long it took.
    pub fn step<T>(&mut self, name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        testkit::interrupt::check()?;
        let started = Instant::now();
        let result = work().with_context(|| name.to_owned())?;
        let seconds = started.elapsed().as_secs_f64();
        eprintln!("{seconds:8.1} s  {name}");
        self.0.push(Step { name: name.to_owned(), seconds });
        Ok(result)
    }
}

/// The image that is shown, and how it is started.
#[derive(Debug, Clone)]
pub struct Subject {
    /// What the user calls it.
    pub name: String,
    /// Options of `docker run` before the image.
    entrypoint: Vec<String>,
    start: Vec<String>,
    hold: Vec<String>,
}

impl Subject {
    /// The Debian root file system with Python.
    pub fn debian_python() -> Self {
        let python = |program: &str| vec!["python3".to_owned(), "-c".to_owned(), program.to_owned()];
        Self {
            name: format!("debian-{SUITE}-python3 (made by debootstrap)"),
            entrypoint: Vec::new(),
            start: python(PROGRAM),
            hold: python("import time; time.sleep(3600)"),
        }
    }

    /// Any image with a shell.
    pub fn other(image: &str) -> Self {
        let shell = |script: &str| vec!["-c".to_owned(), script.to_owned()];
        Self {
            name: image.to_owned(),
            entrypoint: vec!["--entrypoint".to_owned(), "/bin/sh".to_owned()],
            start: shell("ls -l / >/dev/null && echo started"),
            hold: shell("sleep 3600"),
        }
    }

    /// `docker run --rm …` of the start command.
    pub fn start_arguments<'a>(&'a self, image: &'a str) -> Vec<&'a str> {
        let mut arguments = vec!["run", "--rm", "--network=host"];
        arguments.extend(self.entrypoint.iter().map(String::as_str));
        arguments.push(image);
        arguments.extend(self.start.iter().map(String::as_str));
        arguments
    }

    /// `docker run -d --name NAME …` of a command that only waits.
    pub fn hold_arguments<'a>(&'a self, image: &'a str, name: &'a str) -> Vec<&'a str> {
        let mut arguments = vec!["run", "-d", "--network=host", "--name", name];
        arguments.extend(self.entrypoint.iter().map(String::as_str));
        arguments.push(image);
        arguments.extend(self.hold.iter().map(String::as_str));
        arguments
    }
}

/// Builds the Debian root file system, or takes the one of an earlier run; an image of one layer.
pub fn debian_image() -> Result<Image> {
    let directory = workspace_root().join("target/debootstrap");
    let tarball = directory.join(format!("{SUITE}-python3.tar"));
    if !tarball.is_file() {
        std::fs::create_dir_all(&directory)?;
        let root = directory.join(format!("{SUITE}-python3"));
        testkit::scratch::remove_any(&root)?;
        let made = debootstrap(&root, &tarball);
        testkit::scratch::remove(&root);
        made?;
    }
    let tar = std::fs::read(&tarball).with_context(|| format!("cannot read {}", tarball.display()))?;
    let image = Image { layers: vec![Layer::new(tar)], config: serde_json::json!({}) };
    Ok(image.config(serde_json::json!({
        "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        "Cmd": ["python3"],
    })))
}

fn debootstrap(root: &Path, tarball: &Path) -> Result<()> {
    let mut command = Command::new("debootstrap");
    command.args(["--variant=minbase", "--include=python3", SUITE]).arg(root);
    command.env("DEBIAN_FRONTEND", "noninteractive");
    run(command, DEBOOTSTRAP_TIMEOUT)?.success()?;
    for rubbish in ["var/cache/apt/archives", "var/lib/apt/lists"] {
        testkit::scratch::remove_any(&root.join(rubbish))?;
    }
    let partial = tarball.with_extension("partial");
    let mut tar = Command::new("tar");
    tar.arg("--create").arg("--file").arg(&partial).arg("--directory").arg(root);
    tar.args(["--sort=name", "--numeric-owner", "--one-file-system", "."]);
    run(tar, DEBOOTSTRAP_TIMEOUT)?.success()?;
    std::fs::rename(&partial, tarball)?;
    Ok(())
}

/// The source of the images: a registry that holds the normal image and, later, the thin one.
#[derive(Debug)]
pub struct Source {
    pub registry: Registry,
    /// Reference of the normal image.
    pub normal: String,
    /// Reference of the thin image.
    pub thin: String,
}

impl Source {
    /// Starts the registry.
    pub fn start() -> Result<Self> {
        let registry = Registry::start()?;
        let (normal, thin) = (registry.reference("demo/image", "1"), registry.reference("demo/thin", "1"));
        Ok(Self { registry, normal, thin })
    }

    /// Copies an image that the machine can reach into the registry, by way of an engine.
    pub fn copy(&self, engine: &Dockerd, image: &str) -> Result<()> {
        let docker = |arguments: &[&str]| run(engine.docker_command(arguments), TRANSFER_TIMEOUT)?.success();
        docker(&["pull", image])?;
        docker(&["tag", image, &self.normal])?;
        docker(&["push", &self.normal])?;
        docker(&["rmi", "-f", image, &self.normal])?;
        docker(&["image", "prune", "-af"])?;
        Ok(())
    }

    /// What a pull of the normal image transfers: configuration and layers.
    pub fn image_bytes(&self) -> Result<u64> {
        let manifest = self.registry.manifest("demo/image", "1")?;
        let sizes = manifest["layers"].as_array().into_iter().flatten().chain([&manifest["config"]]);
        Ok(sizes.filter_map(|part| part["size"].as_u64()).sum())
    }
}

/// The repository, its keys, and the product's own server.
#[derive(Debug)]
pub struct Repository {
    storage: PathBuf,
    keys: PathBuf,
    address: String,
    log: PathBuf,
    _server: Service,
    _directory: ScratchDir,
}

/// What a server sent.
#[derive(Debug, Clone, Copy, Default)]
pub struct Traffic {
    pub requests: u64,
    pub bytes: u64,
}

impl Traffic {
    /// What came after an earlier look.
    pub fn since(self, earlier: Self) -> Self {
        Self { requests: self.requests - earlier.requests, bytes: self.bytes - earlier.bytes }
    }
}

impl Repository {
    /// `cvmfs-publish mkfs` and `serve`.
    pub fn create() -> Result<Self> {
        let directory = ScratchDir::new("repository")?;
        let (storage, keys) = (directory.path().join("storage"), directory.path().join("keys"));
        std::fs::create_dir(&storage)?;
        std::fs::create_dir(&keys)?;
        let text = |path: &Path| path.display().to_string();
        let arguments = ["mkfs", FQRN, "--storage", &text(&storage), "--keys", &text(&keys)];
        run_binary("cvmfs-publish", &arguments)?.success()?;

        let address = format!("127.0.0.1:{}", testkit::registry::free_port()?);
        let log = directory.path().join("access.log");
        let mut command = Command::new(testkit::binary("cvmfs-publish"));
        command.args(["serve", "--listen", &address]).arg(&storage);
        let mut server = Service::start("cvmfs-publish serve", command, &log)?;
        server.wait_ready(Duration::from_secs(10), || {
            testkit::http::get(&address, "/.cvmfspublished").is_ok_and(|answer| answer.status == 200)
        })?;
        Ok(Self { storage, keys, address, log, _server: server, _directory: directory })
    }

    /// `docker2cvmfs convert`; what it printed.
    pub fn convert(&self, normal: &str, thin: &str) -> Result<String> {
        let (storage, keys) = (self.storage.display().to_string(), self.keys.display().to_string());
        let arguments = [
            "convert",
            normal,
            "--storage",
            &storage,
            "--keys",
            &keys,
            "--repository",
            FQRN,
            "--output",
            thin,
            "--json",
        ];
        run_binary("docker2cvmfs", &arguments)?.success()
    }

    /// Tells the plugin where the repository is.
    pub fn configure(&self, engine: &ThinEngine) -> Result<()> {
        let key = self.keys.join(format!("{FQRN}.pub"));
        engine.etc.add(FQRN, &format!("http://{}", self.address), &key)
    }

    /// What was served so far, by the access log.
    pub fn traffic(&self) -> Result<Traffic> {
        // The log is written by a thread of its own, a moment after the answer.
        std::thread::sleep(Duration::from_millis(200));
        let text = std::fs::read_to_string(&self.log)?;
        let lines = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let mut traffic = Traffic::default();
        for bytes in lines.filter_map(|line| line["bytes"].as_u64()) {
            traffic.requests += 1;
            traffic.bytes += bytes;
        }
        Ok(traffic)
    }
}

/// Runs `docker …`, which must succeed; what it printed, and the seconds.
pub fn timed(engine: &Dockerd, arguments: &[&str]) -> Result<(String, f64)> {
    let finished: Finished = run(engine.docker_command(arguments), TRANSFER_TIMEOUT)?;
    let seconds = finished.elapsed.as_secs_f64();
    Ok((finished.success()?, seconds))
}

/// Starts the engine on the plugin; needs the packages of [`PACKAGES`].
pub fn thin_engine() -> Result<ThinEngine> {
    let binary = testkit::binary("cvmfs-graphdriver");
    ensure!(binary.is_file(), "{} has not been built", binary.display());
    ThinEngine::start_with(&binary)
}

/// An image in a registry, as it is and thin, with an engine for each way to run it.
#[derive(Debug)]
pub struct Engines {
    // The order of the fields is the order of their end.
    /// On the plugin, which knows the repository.
    pub engine: ThinEngine,
    /// On overlay2.
    pub plain: Dockerd,
    _repository: Repository,
    pub source: Source,
}

impl Engines {
    /// Makes the image, pushes and publishes it, and starts both engines. Installs what is missing.
    pub fn start(steps: &mut Steps, what: &str, image: impl FnOnce() -> Result<Image>) -> Result<Self> {
        steps.step("install what is missing", || testkit::install(&PACKAGES))?;
        let source = Source::start()?;
        let image = steps.step(what, image)?;
        steps.step("push it to a registry", || source.registry.push("demo/image", "1", &image))?;
        let repository = Repository::create()?;
        steps.step("publish the layers", || repository.convert(&source.normal, &source.thin))?;
        let plain = Dockerd::builder().start()?;
        let engine = steps.step("start an engine on the plugin", thin_engine)?;
        repository.configure(&engine)?;
        Ok(Self { engine, plain, _repository: repository, source })
    }
}
