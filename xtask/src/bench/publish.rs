//! The publisher: archives of small files, of large ones and of a whole root file system; nothing new; check; a small
//! change of a large repository; peak memory.
//!
//! The native column is `tar --extract` of the same archive onto the same disk, or repeats the goal where nothing native
//! does the work.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use testkit::tar::TarBuilder;
use testkit::{Published, ScratchDir, binary, interrupt, process};

use super::{Goal, Line};

const ROUNDS: usize = 3;
const COMMAND_TIMEOUT: Duration = Duration::from_secs(600);
/// How often the peak memory of a publisher is looked at.
const MEMORY_POLL: Duration = Duration::from_millis(10);
/// Files and bytes of each.
const SMALL: (usize, usize) = (20_000, 4096);
const LARGE: (usize, usize) = (8, 64 << 20);
/// A root file system with a scientific Python: entries, and bytes in all.
const ROOT: (usize, u64) = (45_000, 1_240_000_000);
/// The large repository: directories, and files in each.
const MILLION: (usize, usize) = (10_000, 100);
const CHANGED: usize = 10;

/// Measures.
pub fn measure() -> Result<Vec<Line>> {
    let directory = ScratchDir::new("publish")?;
    let work = Work { directory: directory.path().to_owned() };
    let mut lines = Vec::new();
    eprintln!("preparing {} small and {} large files", SMALL.0, LARGE.0);
    let small = work.archive("small", &mut (0..SMALL.0).map(|_| SMALL.1))?;
    let (rounds, _) = work.rounds(&small, ROUNDS)?;
    lines.push(Line::new("publish 20,000 x 4 KiB", "s", Goal::Within(0.8), &rounds));
    std::fs::remove_file(&small)?;
    let large = work.archive("large", &mut (0..LARGE.0).map(|_| LARGE.1))?;
    let (rounds, megabytes) = work.rounds(&large, ROUNDS)?;
    lines.push(Line::new("publish 8 x 64 MiB", "s", Goal::Within(2.5), &rounds));
    lines.push(alone("the same, peak memory", "MB", 120.0, megabytes));
    std::fs::remove_file(&large)?;
    lines.extend(work.root()?);
    lines.push(work.million()?);
    Ok(lines)
}

struct Work {
    directory: PathBuf,
}

impl Work {
    /// Pairs of seconds to unpack an archive and to publish it, and the highest peak memory of the publisher in MB.
    fn rounds(&self, archive: &Path, count: usize) -> Result<(Vec<(f64, f64)>, f64)> {
        let mut rounds = Vec::new();
        let mut megabytes = 0.0_f64;
        for _ in 0..count {
            interrupt::check()?;
            let repository = Published::create("bench.example.org")?;
            let native = self.unpack(archive)?;
            rustix::fs::sync();
            let (ours, memory) = publish(&repository, "base", archive)?;
            rounds.push((native, ours));
            megabytes = megabytes.max(memory);
        }
        Ok((rounds, megabytes))
    }

    fn unpack(&self, archive: &Path) -> Result<f64> {
        let to = self.directory.join("unpacked");
        std::fs::create_dir(&to)?;
        rustix::fs::sync();
        let started = Instant::now();
        let mut command = Command::new("tar");
        command.arg("-xf").arg(archive).arg("-C").arg(&to);
        process::run(command, COMMAND_TIMEOUT)?.success()?;
        let seconds = started.elapsed().as_secs_f64();
        std::fs::remove_dir_all(&to)?;
        Ok(seconds)
    }

    /// The root file system: new, once more with nothing new, and checked.
    fn root(&self) -> Result<Vec<Line>> {
        eprintln!("preparing a root file system of {} entries", ROOT.0);
        let mean = ROOT.1 / ROOT.0 as u64;
        // most files are small, a few make up most of the bytes
        let mut sizes = (0..ROOT.0).map(|number| match number % 100 {
            0 => mean as usize * 60,
            1..10 => mean as usize * 3,
            _ => mean as usize * 13 / 90,
        });
        let archive = self.archive("root", &mut sizes)?;
        let repository = Published::create("bench.example.org")?;
        let native = self.unpack(&archive)?;
        rustix::fs::sync();
        let (first, _) = publish(&repository, "base", &archive)?;
        let (again, _) = publish(&repository, "base", &archive)?;
        let started = Instant::now();
        let mut command = Command::new(binary("cvmfs-publish"));
        command.arg("check").arg(&repository.fqrn).arg("--storage").arg(&repository.storage);
        command.arg("--public-key").arg(repository.public_key());
        process::run(command, COMMAND_TIMEOUT)?.success()?;
        let check = started.elapsed().as_secs_f64();
        std::fs::remove_file(&archive)?;
        Ok(vec![
            Line::new("publish a root of 45,000 entries", "s", Goal::Within(10.0), &[(native, first)]),
            alone("the same again, nothing new", "s", 2.0, again),
            alone("check of it", "s", 5.0, check),
        ])
    }

    /// A change of ten files in a repository of a million.
    fn million(&self) -> Result<Line> {
        let (directories, files) = MILLION;
        eprintln!("preparing a repository of {} entries", directories * files);
        let repository = Published::create("wide.example.org")?;
        let names = |directory: usize, file: usize| {
            format!("d{:03}/e{:03}/f{file:03}", directory / 100, directory % 100)
        };
        for hundred in 0..directories / 1000 {
            interrupt::check()?;
            let mut tar = TarBuilder::new();
            for directory in hundred * 1000..(hundred + 1) * 1000 {
                for file in 0..files {
                    tar = tar.file(&names(directory, file), 0o644, b"");
                }
            }
            repository.ingest("base", &tar.finish(), &[])?;
        }
        let mut seconds = Vec::new();
        for round in 0..ROUNDS {
            let mut tar = TarBuilder::new();
            for file in 0..CHANGED {
                tar = tar.file(&names(4321, file), 0o644, format!("{round} {file}").as_bytes());
            }
            let archive = self.directory.join("change.tar");
            std::fs::write(&archive, tar.finish())?;
            seconds.push(publish(&repository, "base", &archive)?.0);
        }
        Ok(alone("10 of 1,000,000 files changed", "s", 1.0, super::median(seconds)))
    }

    /// An archive of files of these sizes, a hundred in a directory, each half random and half text.
    fn archive(&self, name: &str, sizes: &mut dyn Iterator<Item = usize>) -> Result<PathBuf> {
        let path = self.directory.join(format!("{name}.tar"));
        let mut out = BufWriter::new(File::create(&path)?);
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut word = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state ^ (state >> 29)
        };
        for (number, size) in sizes.enumerate() {
            interrupt::check()?;
            let mut content: Vec<u8> = (0..size / 16).flat_map(|_| word().to_le_bytes()).collect();
            while content.len() < size {
                writeln!(content, "line {number} of some text that compresses")?;
            }
            content.truncate(size);
            let one = TarBuilder::new().file(&format!("d{:04}/f{number:06}", number / 100), 0o644, &content);
            // an archive ends with two empty blocks
            let bytes = one.finish();
            out.write_all(&bytes[..512 + size.next_multiple_of(512)])?;
        }
        out.write_all(&[0; 1024])?;
        out.flush()?;
        Ok(path)
    }
}

/// Publishes an archive; seconds, and peak resident memory in MB.
fn publish(repository: &Published, base: &str, archive: &Path) -> Result<(f64, f64)> {
    let mut command = Command::new(binary("cvmfs-publish"));
    command.args(["ingest", &repository.fqrn, "--base", base, "--tar"]).arg(archive);
    command.arg("--storage").arg(&repository.storage).arg("--keys").arg(&repository.keys);
    let started = Instant::now();
    let mut child = command.stdout(Stdio::null()).spawn()?;
    let mut megabytes = 0.0_f64;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        // the process may end in between
        megabytes = megabytes.max(peak(child.id()).unwrap_or(0.0));
        std::thread::sleep(MEMORY_POLL);
    };
    ensure!(status.success(), "publishing {} failed", archive.display());
    Ok((started.elapsed().as_secs_f64(), megabytes))
}

fn peak(pid: u32) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no such field")?;
    let kilobytes: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kilobytes / 1024.0)
}

/// A value that nothing native compares to.
fn alone(name: &str, unit: &'static str, goal: f64, value: f64) -> Line {
    Line::new(name, unit, Goal::Within(goal), &[(goal, value)])
}
