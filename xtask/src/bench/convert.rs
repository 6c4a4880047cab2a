//! The converter: an image of a root file system from a registry on this machine, once more with nothing new, with one
//! changed layer; a wish list of a thousand images with nothing new behind a line of 20 ms.
//!
//! The native column is `skopeo copy` of the image to a directory and `tar --extract` of its layers, or repeats the
//! goal where nothing native does the work.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use testkit::image::Layer;
use testkit::process::{Finished, run};
use testkit::relay::Relay;
use testkit::tar::TarBuilder;
use testkit::{Image, Published, Registry, ScratchDir, binary, interrupt};

use super::{Goal, Line, archive};

const LAYERS: usize = 10;
const COMMAND_TIMEOUT: Duration = Duration::from_secs(600);
/// The wish list: repositories, and images in each.
const WISHES: (usize, usize) = (50, 20);
const ROUND_TRIP: Duration = Duration::from_millis(20);

/// Measures.
pub fn measure() -> Result<Vec<Line>> {
    testkit::install(&["skopeo"])?;
    let directory = ScratchDir::new("convert")?;
    let mut lines = image(directory.path())?;
    interrupt::check()?;
    lines.push(wishes(directory.path())?);
    Ok(lines)
}

fn image(directory: &Path) -> Result<Vec<Line>> {
    eprintln!("preparing an image of {} files in {LAYERS} layers", archive::ROOT.0);
    let registry = Registry::start()?;
    let parts: Vec<PathBuf> = (0..LAYERS).map(|part| directory.join(format!("layer{part}.tar"))).collect();
    archive::root(&parts)?;
    let mut image = Image::new([]);
    for part in &parts {
        let tar = std::fs::read(part)?;
        let mut gzip = Command::new("gzip");
        gzip.arg("-c").arg(part);
        let output = gzip.output().context("gzip")?;
        ensure!(output.status.success(), "gzip failed");
        image.layers.push(Layer { tar, blob: output.stdout });
    }
    registry.push("big", "1", &image)?;
    let changed = TarBuilder::new().file("changed", 0o644, b"changed").finish();
    *image.layers.last_mut().context("there are layers")? = Layer::new(changed);
    registry.push("big", "2", &image)?;
    drop(image);
    let repository = Published::create("bench.example.org")?;
    rustix::fs::sync();
    let native = native(directory, &registry.reference("big", "1"))?;
    rustix::fs::sync();
    let convert = |tag: &str| {
        let mut command = Command::new(binary("docker2cvmfs"));
        command.args([
            "convert",
            &registry.reference("big", tag),
            "--repository",
            &repository.fqrn,
            "--json",
        ]);
        command.arg("--storage").arg(&repository.storage).arg("--keys").arg(&repository.keys);
        command.arg("--output").arg(registry.reference("thin/big", tag)).env("TMPDIR", directory);
        super::time_and_memory(command)
    };
    let (seconds, megabytes) = convert("1")?;
    let requests = |log: &str| log.lines().filter(|line| line.contains("GET /v2/big/blobs/")).count();
    let before = requests(&registry.log_text());
    let (again, _) = convert("1")?;
    let configuration = requests(&registry.log_text()) - before;
    let (one_layer, _) = convert("2")?;
    let one_more = requests(&registry.log_text()) - before - configuration;
    ensure!(configuration <= 2, "{configuration} blobs were asked for with nothing new");
    ensure!(one_more <= 4, "{one_more} blobs were asked for with one layer changed");
    Ok(vec![
        Line::new("convert 1.24 GB in 10 layers", "s", Goal::Within(12.0), &[(native, seconds)]),
        Line::alone("the same, peak memory", "MB", 300.0, megabytes),
        Line::alone("the same again, nothing new", "s", 1.0, again),
        Line::alone("with one changed layer", "s", 1.0, one_layer),
    ])
}

/// Seconds to download the image and to unpack its layers.
fn native(directory: &Path, reference: &str) -> Result<f64> {
    let (downloaded, unpacked) = (directory.join("downloaded"), directory.join("unpacked"));
    std::fs::create_dir(&unpacked)?;
    let started = Instant::now();
    let mut command = Command::new("skopeo");
    command.args(["copy", "-q", "--src-tls-verify=false", &format!("docker://{reference}")]);
    command.arg(format!("dir:{}", downloaded.display()));
    run(command, COMMAND_TIMEOUT)?.success()?;
    for item in std::fs::read_dir(&downloaded)? {
        let item = item?.path();
        if std::fs::read(&item)?.starts_with(&[0x1f, 0x8b]) {
            let mut tar = Command::new("tar");
            tar.arg("-xzf").arg(&item).arg("-C").arg(&unpacked);
            run(tar, COMMAND_TIMEOUT)?.success()?;
        }
    }
    Ok(started.elapsed().as_secs_f64())
}

fn wishes(directory: &Path) -> Result<Line> {
    let (repositories, tags) = WISHES;
    eprintln!("preparing {} images", repositories * tags);
    let registry = Registry::start()?;
    let relay = Relay::distant(registry.address().parse()?, ROUND_TRIP)?;
    let repository = Published::create("wishes.example.org")?;
    let mut list = format!(
        "version: 1\ncvmfs_repo: {}\noutput_format: '{}/thin/$(image)'\ninput:\n",
        repository.fqrn,
        relay.url()
    );
    for name in 0..repositories {
        for tag in 0..tags {
            interrupt::check()?;
            let content = format!("{name} {tag}");
            let layer = TarBuilder::new().file("content", 0o644, content.as_bytes()).finish();
            registry.push(&format!("app{name}"), &tag.to_string(), &Image::new([layer]))?;
            list.push_str(&format!("  - '{}/app{name}:{tag}'\n", relay.url()));
        }
    }
    let recipe = directory.join("wishes.yaml");
    std::fs::write(&recipe, list)?;
    let round = || -> Result<(Finished, f64)> {
        let mut command = Command::new(binary("docker2cvmfs"));
        command.arg("loop").arg(&recipe).args(["--once", "--json", "--parallel", "32"]);
        command.arg("--storage").arg(&repository.storage).arg("--keys").arg(&repository.keys);
        command.arg("--state").arg(directory.join("state")).env("TMPDIR", directory);
        let started = Instant::now();
        Ok((run(command, COMMAND_TIMEOUT)?, started.elapsed().as_secs_f64()))
    };
    let (first, seconds) = round()?;
    let count = |finished: Finished, key: &str| -> Result<u64> {
        let report: serde_json::Value = serde_json::from_str(&finished.success()?)?;
        report[key].as_u64().context("the report lacks a number")
    };
    let all = (repositories * tags) as u64;
    ensure!(count(first, "converted")? == all, "not all images were converted");
    eprintln!("they were converted within {seconds:.0} s");
    let (second, seconds) = round()?;
    ensure!(count(second, "unchanged")? == all, "something was new");
    Ok(Line::alone("1,000 images, nothing new, 20 ms", "s", 60.0, seconds))
}
