//! The plugin as a storage driver, against overlay2 on an engine of the same version in the same run.
//!
//! An image of 40,000 small files is pulled, started, started twenty times at once and committed; normal on both
//! engines, and thin on the plugin.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use testkit::image::busybox_layer;
use testkit::managed_plugin::NAME;
use testkit::tar::TarBuilder;
use testkit::{Dockerd, Image, interrupt};

use super::{Goal, Line};
use crate::scene::{Engines, Steps, timed};

const STARTS: usize = 11;
const PULLS: usize = 3;
const COMMITS: usize = 3;
const BURSTS: usize = 3;
const FILES: usize = 40_000;
const AT_ONCE: usize = 20;
const GETS: usize = 50;
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// Measures; needs root.
pub fn measure() -> Result<Vec<Line>> {
    let mut steps = Steps::default();
    let world = World(Engines::start(&mut steps, "make an image of 40,000 files", image)?);
    let mut lines = vec![world.pull()?];
    // The thin image is pulled, and its repository mounted.
    world.0.engine.dockerd.run(&[&world.0.source.thin, "/bin/true"])?;
    lines.extend(world.start()?);
    lines.push(world.start_many()?);
    // Before the commits, whose blocks the disk discards for minutes.
    lines.push(world.get()?);
    lines.push(world.commit()?);
    Ok(lines)
}

struct World(Engines);

impl World {
    /// `docker pull` of the normal image, which is removed again on both engines.
    fn pull(&self) -> Result<Line> {
        let mut rounds = Vec::new();
        for round in 0..PULLS {
            interrupt::check()?;
            let native = timed(&self.0.plain, &["pull", "-q", &self.0.source.normal])?.1;
            let ours = timed(&self.0.engine.dockerd, &["pull", "-q", &self.0.source.normal])?.1;
            rounds.push((native, ours));
            if round + 1 < PULLS {
                self.0.plain.docker(&["rmi", &self.0.source.normal])?;
                self.0.engine.dockerd.docker(&["rmi", &self.0.source.normal])?;
            }
        }
        Ok(Line::new("docker pull, 40,000 files", "s", Goal::AtMost(1.1), &rounds))
    }

    /// `docker run --rm` of a small program, all warm.
    fn start(&self) -> Result<[Line; 2]> {
        let run = |engine: &Dockerd, image: &str| -> Result<f64> {
            let arguments = ["run", "--rm", "--network=host", image, "/bin/cat", "/data/d000/f000000"];
            Ok(timed(engine, &arguments)?.1)
        };
        run(&self.0.plain, &self.0.source.normal)?;
        let (mut normal, mut thin) = (Vec::new(), Vec::new());
        for _ in 0..STARTS {
            interrupt::check()?;
            let native = run(&self.0.plain, &self.0.source.normal)?;
            normal.push((native, run(&self.0.engine.dockerd, &self.0.source.normal)?));
            thin.push((native, run(&self.0.engine.dockerd, &self.0.source.thin)?));
        }
        Ok([
            Line::new("docker run, normal image, warm", "s", Goal::AtMost(1.1), &normal),
            Line::new("docker run, thin image, warm", "s", Goal::AtMost(1.2), &thin),
        ])
    }

    /// Twenty containers at once.
    fn start_many(&self) -> Result<Line> {
        let burst = |engine: &Dockerd, image: &str| -> Result<f64> {
            let started = Instant::now();
            std::thread::scope(|scope| {
                let run = || engine.run(&[image, "/bin/cat", "/data/d001/f000100"]);
                let runs: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(run)).collect();
                runs.into_iter().try_for_each(|run| match run.join() {
                    Ok(outcome) => outcome.map(drop),
                    Err(_) => anyhow::bail!("a thread of the benchmark ended"),
                })
            })?;
            Ok(started.elapsed().as_secs_f64())
        };
        let mut rounds = Vec::new();
        for _ in 0..BURSTS {
            interrupt::check()?;
            rounds.push((
                burst(&self.0.plain, &self.0.source.normal)?,
                burst(&self.0.engine.dockerd, &self.0.source.thin)?,
            ));
        }
        Ok(Line::new("20 containers at once, thin, warm", "s", Goal::AtMost(1.2), &rounds))
    }

    /// `docker commit` of 64 MiB.
    fn commit(&self) -> Result<Line> {
        let commit = |engine: &Dockerd| -> Result<f64> {
            let write = "dd if=/dev/urandom of=/new bs=1048576 count=64";
            engine.docker(&[
                "run",
                "--network=host",
                "--name",
                "change",
                &self.0.source.normal,
                "/bin/sh",
                "-c",
                write,
            ])?;
            let seconds = timed(engine, &["commit", "change", "changed"])?.1;
            engine.docker(&["rm", "change"])?;
            engine.docker(&["rmi", "changed"])?;
            Ok(seconds)
        };
        let mut rounds = Vec::new();
        for _ in 0..COMMITS {
            interrupt::check()?;
            rounds.push((commit(&self.0.plain)?, commit(&self.0.engine.dockerd)?));
        }
        Ok(Line::new("docker commit of 64 MiB", "s", Goal::AtMost(1.1), &rounds))
    }

    /// The call that mounts a container's tree, its repository being mounted.
    fn get(&self) -> Result<Line> {
        let docker = &self.0.engine.dockerd;
        docker.docker(&["create", "--name", "idle", &self.0.source.thin, "/bin/true"])?;
        let merged = docker.docker(&["inspect", "--format", "{{.GraphDriver.Data.MergedDir}}", "idle"])?;
        let id = Path::new(&merged).parent().and_then(Path::file_name).context("no id in MergedDir")?;
        let id = id.to_str().context("an id is no text")?.to_owned();
        let plugin = docker.docker(&["plugin", "inspect", "--format", "{{.ID}}", NAME])?;
        let socket = PathBuf::from("/run/docker/plugins").join(plugin).join("plugin.sock");
        let mut milliseconds = Vec::new();
        for _ in 0..GETS {
            let started = Instant::now();
            call(&socket, "GraphDriver.Get", &format!("{{\"ID\":\"{id}\",\"MountLabel\":\"\"}}"))?;
            milliseconds.push(started.elapsed().as_secs_f64() * 1000.0);
            call(&socket, "GraphDriver.Put", &format!("{{\"ID\":\"{id}\"}}"))?;
        }
        docker.docker(&["rm", "idle"])?;
        let median = super::median(milliseconds);
        // Nothing native does this work: the column repeats the goal.
        Ok(Line::new("GraphDriver.Get, repository mounted", "ms", Goal::Within(3.0), &[(3.0, median)]))
    }
}

/// A busybox and 40,000 small files in 400 directories.
fn image() -> Result<Image> {
    let mut tar = TarBuilder::new();
    for number in 0..FILES {
        let content = format!("file {number} of an image with many small files\n").repeat(8);
        tar = tar.file(&format!("data/d{:03}/f{number:06}", number / 100), 0o644, content.as_bytes());
    }
    Ok(Image::new([busybox_layer()?.finish(), tar.finish()]))
}

/// A call of the plugin protocol; an error unless it succeeds.
fn call(socket: &Path, name: &str, body: &str) -> Result<()> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(CALL_TIMEOUT))?;
    let length = body.len();
    write!(
        stream,
        "POST /{name} HTTP/1.1\r\nHost: plugin\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 200"), "{name}: {answer}");
    Ok(())
}
