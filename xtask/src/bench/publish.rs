//! The publisher: archives of small files, of large ones and of a whole root file system; nothing new; check; a small
//! change of a large repository; peak memory.
//!
//! The native column is `tar --extract` of the same archive onto the same disk, or repeats the goal where nothing native
//! does the work.

use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;
use testkit::tar::TarBuilder;
use testkit::{Published, ScratchDir, binary, interrupt, process};

use super::archive::{self, Archive, ROOT};
use super::{Goal, Line};

const ROUNDS: usize = 3;
const COMMAND_TIMEOUT: Duration = Duration::from_secs(600);
/// Files and bytes of each.
const SMALL: (usize, usize) = (20_000, 4096);
const LARGE: (usize, usize) = (8, 64 << 20);
/// The large repository: directories, and files in each.
const MILLION: (usize, usize) = (10_000, 100);
const CHANGED: usize = 10;

/// Measures.
pub fn measure() -> Result<Vec<Line>> {
    let directory = ScratchDir::new("publish")?;
    let work =
        Work { directory: directory.path().to_owned(), unpacked: Cell::default(), kept: RefCell::default() };
    let mut lines = Vec::new();
    eprintln!("preparing {} small and {} large files", SMALL.0, LARGE.0);
    let small = work.archive("small", &mut (0..SMALL.0).map(|_| SMALL.1))?;
    let (rounds, _) = work.rounds(&small, ROUNDS)?;
    lines.push(Line::new("publish 20,000 x 4 KiB", "s", Goal::Within(0.8), &rounds));
    let large = work.archive("large", &mut (0..LARGE.0).map(|_| LARGE.1))?;
    let (rounds, megabytes) = work.rounds(&large, ROUNDS)?;
    lines.push(Line::new("publish 8 x 64 MiB", "s", Goal::Within(2.5), &rounds));
    lines.push(Line::alone("the same, peak memory", "MB", 120.0, megabytes));
    lines.extend(work.root()?);
    lines.push(work.million()?);
    Ok(lines)
}

struct Work {
    directory: PathBuf,
    unpacked: Cell<u32>,
    kept: RefCell<Vec<Published>>,
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
            self.keep(repository);
            rounds.push((native, ours));
            megabytes = megabytes.max(memory);
        }
        Ok((rounds, megabytes))
    }

    /// Nothing is deleted before all is measured: where many files were just deleted, ext4 without a journal looks
    /// long for an inode, which would be measured as ours.
    fn keep(&self, repository: Published) {
        self.kept.borrow_mut().push(repository);
    }

    fn unpack(&self, archive: &Path) -> Result<f64> {
        let number = self.unpacked.get();
        self.unpacked.set(number + 1);
        let to = self.directory.join(format!("unpacked{number}"));
        std::fs::create_dir(&to)?;
        rustix::fs::sync();
        let started = Instant::now();
        let mut command = Command::new("tar");
        command.arg("-xf").arg(archive).arg("-C").arg(&to);
        process::run(command, COMMAND_TIMEOUT)?.success()?;
        let seconds = started.elapsed().as_secs_f64();
        Ok(seconds)
    }

    /// The root file system: new, once more with nothing new, and checked.
    fn root(&self) -> Result<Vec<Line>> {
        eprintln!("preparing a root file system of {} entries", ROOT.0);
        let archive = self.directory.join("root.tar");
        archive::root(std::slice::from_ref(&archive))?;
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
        self.keep(repository);
        Ok(vec![
            Line::new("publish a root of 45,000 entries", "s", Goal::Within(10.0), &[(native, first)]),
            Line::alone("the same again, nothing new", "s", 2.0, again),
            Line::alone("check of it", "s", 5.0, check),
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
        Ok(Line::alone("10 of 1,000,000 files changed", "s", 1.0, super::median(seconds)))
    }

    /// An archive of files of these sizes, a hundred in a directory, each half random and half text.
    fn archive(&self, name: &str, sizes: &mut dyn Iterator<Item = usize>) -> Result<PathBuf> {
        let path = self.directory.join(format!("{name}.tar"));
        let mut archive = Archive::create(&path)?;
        for size in sizes {
            archive.made(size)?;
        }
        archive.finish()?;
        Ok(path)
    }
}

/// Publishes an archive; seconds, and peak resident memory in MB.
fn publish(repository: &Published, base: &str, archive: &Path) -> Result<(f64, f64)> {
    let mut command = Command::new(binary("cvmfs-publish"));
    command.args(["ingest", &repository.fqrn, "--base", base, "--tar"]).arg(archive);
    command.arg("--storage").arg(&repository.storage).arg("--keys").arg(&repository.keys);
    super::time_and_memory(command)
}
