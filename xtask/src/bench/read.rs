//! Warm reads: the same tree in a directory on ext4 and in a mounted repository, both seen through overlayfs
//! as a container sees them.
//!
//! Measurements of both alternate within each round, on one processor, so that what else happens on the
//! machine meets both; the result is the median over the rounds.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::thread::{CpuSet, sched_setaffinity};
use testkit::{Mount, MountBuilder, Published, ScratchDir, interrupt, process};

use super::syscall::sum_mapped;
use super::{Goal, Line};

/// Large enough that one pass takes tens of milliseconds from the page cache.
const FILE_BYTES: usize = 256 << 20;
/// One file below the publisher's smallest chunk, many times.
const SMALL_FILES: usize = 2000;
const SMALL_BYTES: usize = 4096;
const ROUNDS: usize = 9;
const RANDOM_READS: u64 = 100_000;

/// Measures; needs root.
pub fn measure() -> Result<Vec<Line>> {
    eprintln!("preparing a tree of {} MB", FILE_BYTES >> 20);
    let world = World::new()?;
    pin_to_one_processor()?;
    let native = world.native.path.join("large");
    let ours = world.ours.path.join("large");
    // Once through, so that both are in the page cache and the object is in the client's cache.
    ensure!(sequential(&native)?.1 == sequential(&ours)?.1, "the mounted file has other bytes");

    let compare = |name: &str, unit, goal, measure: &dyn Fn(&Path) -> Result<f64>| -> Result<Line> {
        let mut rounds = Vec::new();
        for round in 0..ROUNDS {
            interrupt::check()?;
            // Who comes first changes from round to round.
            rounds.push(if round % 2 == 0 {
                let first = measure(&native)?;
                (first, measure(&ours)?)
            } else {
                let second = measure(&ours)?;
                (measure(&native)?, second)
            });
        }
        eprintln!("measured {name}");
        Ok(Line::new(name, unit, goal, &rounds))
    };
    let mut lines = vec![
        compare("sequential read, warm", "GB/s", Goal::AtLeast(0.95), &|path| Ok(sequential(path)?.0))?,
        compare("mmap, warm", "GB/s", Goal::AtLeast(0.9), &mapped)?,
        compare("random 4 KiB read, warm", "k/s", Goal::AtLeast(0.8), &random)?,
    ];
    let (native, ours) = (world.native.path.join("small"), world.ours.path.join("small"));
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        rounds.push((open_small(&native)?, open_small(&ours)?));
    }
    // No goal was set for it: the round trip of an open is what passthrough leaves.
    lines.push(Line::new("open, read 4 KiB, close, warm", "k/s", Goal::AtLeast(0.0), &rounds));
    Ok(lines)
}

struct World {
    native: Overlay,
    ours: Overlay,
    _mount: Mount,
    _repository: Published,
    _directory: ScratchDir,
}

impl World {
    fn new() -> Result<Self> {
        let directory = ScratchDir::new("read")?;
        let tree = directory.path().join("tree");
        make_tree(&tree)?;
        let tar = directory.path().join("tree.tar");
        let mut command = Command::new("tar");
        command.arg("-cf").arg(&tar).arg("-C").arg(&tree).arg(".");
        process::run(command, Duration::from_secs(120))?.success()?;
        let repository = Published::create("bench.example.org")?;
        let file = tar.to_str().context("a path is not UTF-8")?;
        repository.publish("ingest", &["--base", "tree", "--tar", file])?.success()?;
        std::fs::remove_file(&tar)?;
        let mount = MountBuilder::new(&repository.fqrn, &repository.client_config()?).mount()?;
        let native = Overlay::on(&tree, &directory.path().join("native"))?;
        let ours = Overlay::on(&mount.path().join("tree"), &directory.path().join("ours"))?;
        Ok(Self { native, ours, _mount: mount, _repository: repository, _directory: directory })
    }
}

/// An overlay with an upper directory, as a container has it.
struct Overlay {
    path: PathBuf,
}

impl Overlay {
    fn on(lower: &Path, directory: &Path) -> Result<Self> {
        let part = |name: &str| directory.join(name);
        for name in ["upper", "work", "merged"] {
            std::fs::create_dir_all(part(name))?;
        }
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.display(),
            part("upper").display(),
            part("work").display()
        );
        let options = std::ffi::CString::new(options)?;
        let path = part("merged");
        mount("overlay", &path, "overlay", MountFlags::empty(), Some(options.as_c_str()))
            .with_context(|| format!("cannot mount an overlay on {}", lower.display()))?;
        Ok(Self { path })
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let _ = unmount(&self.path, UnmountFlags::DETACH);
    }
}

fn make_tree(tree: &Path) -> Result<()> {
    std::fs::create_dir_all(tree.join("small"))?;
    // Half random, half zeros: compresses, but not to nothing.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut block = vec![0_u8; 1 << 20];
    let mut large = File::create(tree.join("large"))?;
    for _ in 0..FILE_BYTES >> 20 {
        for word in block.chunks_exact_mut(16) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            word[..8].copy_from_slice(&state.to_le_bytes());
        }
        large.write_all(&block)?;
    }
    for number in 0..SMALL_FILES {
        let mut content = vec![0_u8; SMALL_BYTES];
        content[..8].copy_from_slice(&(number as u64).to_le_bytes());
        std::fs::write(tree.join("small").join(number.to_string()), content)?;
    }
    Ok(())
}

fn pin_to_one_processor() -> Result<()> {
    let mut processors = CpuSet::new();
    processors.set(0);
    sched_setaffinity(None, &processors).context("cannot stay on one processor")
}

/// Gigabytes per second, and a sum over the bytes.
fn sequential(path: &Path) -> Result<(f64, u64)> {
    let mut file = File::open(path)?;
    let mut block = vec![0_u8; 1 << 17];
    let mut sum = 0_u64;
    let mut total = 0_usize;
    let started = Instant::now();
    loop {
        let count = file.read(&mut block)?;
        if count == 0 {
            break;
        }
        total += count;
        sum = sum.wrapping_mul(31).wrapping_add(u64::from(block[count / 2]));
    }
    let seconds = started.elapsed().as_secs_f64();
    ensure!(total == FILE_BYTES, "{} has {total} bytes", path.display());
    Ok((total as f64 / seconds / 1e9, sum))
}

fn mapped(path: &Path) -> Result<f64> {
    let file = File::open(path)?;
    let started = Instant::now();
    std::hint::black_box(sum_mapped(&file)?);
    Ok(FILE_BYTES as f64 / started.elapsed().as_secs_f64() / 1e9)
}

/// Thousand reads per second.
fn random(path: &Path) -> Result<f64> {
    let file = File::open(path)?;
    let mut block = vec![0_u8; SMALL_BYTES];
    let mut state = 42_u64;
    let started = Instant::now();
    for _ in 0..RANDOM_READS {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let page = (state >> 33) % (FILE_BYTES / SMALL_BYTES) as u64;
        file.read_exact_at(&mut block, page * SMALL_BYTES as u64)?;
    }
    Ok(RANDOM_READS as f64 / started.elapsed().as_secs_f64() / 1e3)
}

/// Thousand files per second.
fn open_small(directory: &Path) -> Result<f64> {
    let mut block = vec![0_u8; SMALL_BYTES];
    let started = Instant::now();
    for number in 0..SMALL_FILES {
        File::open(directory.join(number.to_string()))?.read_exact(&mut block)?;
    }
    Ok(SMALL_FILES as f64 / started.elapsed().as_secs_f64() / 1e3)
}
