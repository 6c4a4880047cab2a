//! The demo: a real image is published into a CernVM-FS repository and started as a thin image through the
//! plugin on a real engine, next to the normal image on overlay2.
//!
//! Everything lies in `target/demo` (and sockets in `/run`) and is removed at the end, on errors and on
//! Ctrl-C; only the Debian root file system is kept, in `target/debootstrap`.

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use testkit::tree::{TreeEntry, portable, walk_one_file_system};
use testkit::{Dockerd, ThinEngine, compare, interrupt, scratch, workspace_root};

use crate::build;
use crate::scene::{PACKAGES, Repository, Source, Steps, Subject, Traffic, debian_image, thin_engine, timed};

/// Files that an engine writes into every container.
const ENGINE_FILES: [&str; 4] = ["/etc/hostname", "/etc/hosts", "/etc/resolv.conf", "/.dockerenv"];

/// Directories into which an engine mounts, or whose content it makes.
const ENGINE_DIRECTORIES: [&str; 3] = ["/dev", "/proc", "/sys"];

#[derive(Debug, clap::Args)]
pub struct Options {
    /// Any image with a shell that this machine can reach, instead of Debian with Python
    #[arg(long, value_name = "IMAGE")]
    image: Option<String>,
    /// Print one JSON document at the end instead of the table
    #[arg(long)]
    json: bool,
}

/// What was measured.
#[derive(Debug, Default)]
struct Measured {
    engine: String,
    image_bytes: u64,
    pull_seconds: f64,
    normal_start: f64,
    normal_again: f64,
    thin_start: f64,
    thin_again: f64,
    traffic: Traffic,
    again: Traffic,
    files: usize,
}

/// Plays the demo.
pub fn run(options: &Options) -> Result<()> {
    let home = workspace_root().join("target/demo");
    scratch::use_base(&home);
    let mut steps = Steps::default();
    let subject = match &options.image {
        None => Subject::debian_python(),
        Some(image) => Subject::other(image),
    };
    let result = prepare(&mut steps).and_then(|()| {
        interrupt::catch();
        play(options, &subject, &mut steps)
    });
    scratch::remove(&home);
    if options.json {
        println!("{}", document(&subject, &steps, result.as_ref().ok()));
    } else if let Ok(result) = &result {
        print_table(&subject, result);
    }
    result.map(drop)
}

fn prepare(steps: &mut Steps) -> Result<()> {
    let binaries = steps.step("build the binaries", || build::binaries(build::Profile::Release))?;
    testkit::binary::use_binaries_of(&binaries);
    Ok(())
}

fn play(options: &Options, subject: &Subject, steps: &mut Steps) -> Result<Measured> {
    let mut result = Measured::default();
    steps.step("install what is missing", || testkit::install(&PACKAGES))?;

    let source = steps.step("start a registry", Source::start)?;
    let plain = steps.step("start an engine on overlay2", || Dockerd::builder().start())?;
    result.engine = format!("docker {}", plain.version()?);
    match &options.image {
        None => {
            let image = steps.step("make a Debian root file system with Python", debian_image)?;
            steps.step("push it to the registry", || source.registry.push("demo/image", "1", &image))?;
        }
        Some(image) => {
            steps.step("copy the image into the registry", || source.copy(&plain, image))?;
        }
    }
    result.image_bytes = source.image_bytes()?;

    let repository = steps.step("make and serve a repository", Repository::create)?;
    steps.step("publish the layers, push the thin image", || {
        repository.convert(&source.normal, &source.thin)
    })?;
    let engine = steps.step("start an engine on the plugin", thin_engine)?;
    repository.configure(&engine)?;

    let pull = steps.step("pull the normal image", || timed(&plain, &["pull", &source.normal]))?;
    result.pull_seconds = pull.1;
    let normal =
        steps.step("start the normal image", || timed(&plain, &subject.start_arguments(&source.normal)))?;
    result.normal_start = normal.1;

    let before = repository.traffic()?;
    let thin = steps
        .step("start the thin image", || timed(&engine.dockerd, &subject.start_arguments(&source.thin)))?;
    result.thin_start = thin.1;
    result.traffic = repository.traffic()?.since(before);
    ensure!(
        normal.0 == thin.0,
        "the thin container printed something else:\n{}\ninstead of\n{}",
        thin.0,
        normal.0
    );
    ensure!(result.traffic.requests > 0, "nothing was fetched from the repository");

    let warm = repository.traffic()?;
    result.thin_again = steps
        .step("start the thin image again", || {
            timed(&engine.dockerd, &subject.start_arguments(&source.thin))
        })?
        .1;
    result.again = repository.traffic()?.since(warm);
    result.normal_again = steps
        .step("start the normal image again", || timed(&plain, &subject.start_arguments(&source.normal)))?
        .1;

    result.files = steps
        .step("compare every file of both containers", || compare_files(subject, &source, &plain, &engine))?;
    steps.step("stop everything", || {
        drop(engine);
        drop(plain);
        drop(repository);
        drop(source);
        Ok(())
    })?;
    Ok(result)
}

/// Walks both running containers; the number of entries that are equal.
fn compare_files(subject: &Subject, source: &Source, plain: &Dockerd, engine: &ThinEngine) -> Result<usize> {
    let expected = files_of(subject, plain, &source.normal)?;
    let found = files_of(subject, &engine.dockerd, &source.thin)?;
    ensure!(expected.len() > 10, "the normal container shows {} files only", expected.len());
    let differences = compare(&expected, &found);
    ensure!(
        differences.is_empty(),
        "{} differences between the containers, among them:\n{}",
        differences.len(),
        differences.iter().take(20).cloned().collect::<Vec<_>>().join("\n")
    );
    Ok(found.len())
}

fn files_of(subject: &Subject, engine: &Dockerd, image: &str) -> Result<Vec<TreeEntry>> {
    const NAME: &str = "compare";
    engine.docker(&subject.hold_arguments(image, NAME))?;
    let pid = engine.docker(&["inspect", "--format", "{{.State.Pid}}", NAME])?;
    let pid: u32 = pid.parse().context("docker inspect printed no process id")?;
    ensure!(pid > 0, "the container ended: {}", engine.docker_output(&["logs", NAME])?.output());
    let mut entries = portable(&walk_one_file_system(format!("/proc/{pid}/root")));
    engine.docker(&["rm", "-f", NAME])?;
    entries.retain(|entry| {
        let path = std::path::Path::new(&entry.path);
        !ENGINE_FILES.iter().any(|file| path == std::path::Path::new(file))
            && !ENGINE_DIRECTORIES.iter().any(|directory| path.starts_with(directory))
    });
    Ok(entries)
}

fn document(subject: &Subject, steps: &Steps, result: Option<&Measured>) -> serde_json::Value {
    let steps = &steps.0;
    let Some(result) = result else {
        return json!({"ok": false, "image": subject.name, "steps": steps});
    };
    json!({
        "ok": true, "engine": result.engine, "image": subject.name, "image_bytes": result.image_bytes,
        "thin": {
            "start_seconds": result.thin_start, "bytes_fetched": result.traffic.bytes,
            "requests": result.traffic.requests, "start_again_seconds": result.thin_again,
            "requests_again": result.again.requests,
        },
        "normal": {
            "pull_seconds": result.pull_seconds, "start_seconds": result.normal_start,
            "bytes": result.image_bytes, "start_again_seconds": result.normal_again,
        },
        "files_compared": result.files,
        "steps": steps,
    })
}

fn print_table(subject: &Subject, result: &Measured) {
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    println!();
    println!("{} on {}", subject.name, result.engine);
    println!("{:32}{:>14}{:>14}", "", "normal", "thin");
    println!(
        "{:32}{:>12.2} s{:>12.2} s",
        "pull and first start",
        result.pull_seconds + result.normal_start,
        result.thin_start
    );
    println!("{:32}{:>12.2} s{:>14}", "  of which the pull", result.pull_seconds, "");
    println!(
        "{:32}{:>11.1} MB{:>11.1} MB",
        "transferred until then",
        megabytes(result.image_bytes),
        megabytes(result.traffic.bytes)
    );
    println!("{:32}{:>14}{:>14}", "requests to the repository", "", result.traffic.requests);
    println!("{:32}{:>12.2} s{:>12.2} s", "start again", result.normal_again, result.thin_again);
    println!("{:32}{:>14}{:>14}", "requests then", "", result.again.requests);
    println!();
    println!("both printed the same; {} files, directories and links compared: all equal", result.files);
    println!("(registry and repository are on this machine: a network would make the difference larger)");
}
