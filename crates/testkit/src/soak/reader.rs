//! One reader: opens, reads, lists, and checks what it gets.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;

use super::content::{World, header};
use super::{Random, sleep};

/// Most errors kept; more say no more.
const MAX_ERRORS: usize = 100_000;

/// What readers saw.
#[derive(Debug, Default)]
pub(super) struct Observed {
    /// Of each operation that succeeded.
    pub(super) latencies: Vec<Duration>,
    pub(super) bytes: u64,
    pub(super) errors: Vec<Failed>,
    /// The first thing that was not as published.
    pub(super) wrong: Option<String>,
}

/// An operation that failed.
#[derive(Debug)]
pub(super) struct Failed {
    pub(super) begun: Instant,
    pub(super) ended: Instant,
    what: String,
}

impl std::fmt::Display for Failed {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} after {:?}, begun {:?}", self.what, self.ended - self.begun, self.begun)
    }
}

impl Observed {
    pub(super) fn add(&mut self, other: Observed) {
        self.latencies.extend(other.latencies);
        self.bytes += other.bytes;
        self.errors.extend(other.errors);
        self.wrong = self.wrong.take().or(other.wrong);
    }
}

/// Why an operation did not succeed.
enum Trouble {
    Error(String),
    Wrong(String),
}

/// A large file that is kept open, over updates of the repository.
struct Held {
    file: File,
    number: usize,
    version: u64,
}

/// Reads until it is told to stop, or something is wrong.
pub(super) fn read_on(world: &World, mountpoint: &Path, seed: u64, stop: &AtomicBool) -> Observed {
    let mut random = Random(seed);
    let mut observed = Observed::default();
    let mut held = None;
    while !stop.load(Ordering::SeqCst) && observed.wrong.is_none() {
        let begun = Instant::now();
        let outcome = match random.below(20) {
            0 => list(world, mountpoint, &mut random),
            1 => absent(mountpoint, &mut random),
            2..=5 => part(world, mountpoint, &mut random, &mut held),
            _ => whole(world, mountpoint, &mut random),
        };
        match outcome {
            Ok(bytes) => {
                observed.latencies.push(begun.elapsed());
                observed.bytes += bytes;
            }
            Err(Trouble::Error(what)) if observed.errors.len() < MAX_ERRORS => {
                observed.errors.push(Failed { begun, ended: Instant::now(), what });
            }
            Err(Trouble::Error(_)) => {}
            Err(Trouble::Wrong(what)) => {
                observed.wrong = Some(format!("{what} (begun {begun:?})"));
                stop.store(true, Ordering::SeqCst);
            }
        }
        if sleep(random.milliseconds(0..60)).is_err() {
            break;
        }
    }
    observed
}

fn whole(world: &World, mountpoint: &Path, random: &mut Random) -> Result<u64, Trouble> {
    let number = random.below(world.len() as u64) as usize;
    let oldest = world.oldest(number);
    let path = world.path(number);
    let bytes = std::fs::read(mountpoint.join(path)).map_err(|error| failed("reading", path, &error))?;
    let checked = || {
        let version = world.version(number, &bytes, oldest)?;
        world.compare(number, version, 0, &bytes, usize::MAX)
    };
    checked().map_err(wrong)?;
    Ok(bytes.len() as u64)
}

/// A part of a large file that is open for long.
fn part(
    world: &World,
    mountpoint: &Path,
    random: &mut Random,
    held: &mut Option<Held>,
) -> Result<u64, Trouble> {
    if held.is_none() || random.below(30) == 0 {
        *held = None;
        let large: Vec<usize> = (0..world.len()).filter(|number| world.is_large(*number)).collect();
        let number = large[random.below(large.len() as u64) as usize];
        let (oldest, path) = (world.oldest(number), world.path(number));
        let file = File::open(mountpoint.join(path)).map_err(|error| failed("opening", path, &error))?;
        let mut start = vec![0; header()];
        file.read_exact_at(&mut start, 0).map_err(|error| failed("reading the start of", path, &error))?;
        let version = world.version(number, &start, oldest).map_err(wrong)?;
        *held = Some(Held { file, number, version });
    }
    let Some(Held { file, number, version }) = held else { return Ok(0) };
    let offset = random.below(world.length(*number, *version) + 1000);
    let mut buffer = vec![0; random.below(200_000) as usize];
    let length = read_at(file, &mut buffer, offset)
        .map_err(|error| failed("reading a part of", world.path(*number), &error))?;
    world.compare(*number, *version, offset, &buffer[..length], buffer.len()).map_err(wrong)?;
    Ok(length as u64)
}

fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64)? {
            0 => break,
            length => filled += length,
        }
    }
    Ok(filled)
}

fn list(world: &World, mountpoint: &Path, random: &mut Random) -> Result<u64, Trouble> {
    let (name, expected) = world.names(random.below(100) as usize);
    let entries =
        std::fs::read_dir(mountpoint.join(&name)).map_err(|error| failed("listing", &name, &error))?;
    let mut count = 0;
    for entry in entries {
        let entry = entry.map_err(|error| failed("listing", &name, &error))?;
        let kind = entry.metadata().map_err(|error| failed("examining what is in", &name, &error))?;
        count += usize::from(kind.is_file() && entry.file_name() != ".cvmfscatalog");
    }
    if count == expected {
        Ok(0)
    } else {
        Err(Trouble::Wrong(format!("{name} has {count} files, not {expected}")))
    }
}

fn absent(mountpoint: &Path, random: &mut Random) -> Result<u64, Trouble> {
    let name = format!("set{}/no-such-file-{}", random.below(4), random.below(1000));
    match mountpoint.join(&name).symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(failed("looking for", &name, &error)),
        Ok(_) => Err(Trouble::Wrong(format!("{name} exists"))),
    }
}

fn failed(doing: &str, path: &str, error: &io::Error) -> Trouble {
    // Whatever the reason, these two are what a client may say.
    match error.raw_os_error() {
        Some(libc::EIO | libc::ETIMEDOUT) => Trouble::Error(format!("{doing} {path}: {error}")),
        _ => Trouble::Wrong(format!("{doing} {path}: {error}")),
    }
}

fn wrong(error: anyhow::Error) -> Trouble {
    Trouble::Wrong(format!("{error:#}"))
}
