//! The client alone: many small files, some large ones, and the memory of a walk over a million entries.
//!
//! The origin is `cvmfs-publish serve` on loopback. "Cold" is a fresh cache, "warm" a fresh mount on a filled
//! cache, "hot" the same mount once more. The native column is the same work in a directory on ext4.

use std::cell::Cell;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use testkit::process::Service;
use testkit::tar::TarBuilder;
use testkit::{Mount, MountBuilder, Published, ScratchDir, binary, interrupt, process};

use super::{Goal, Line};

const SMALL_FILES: usize = 20_000;
const SMALL_BYTES: usize = 4096;
const PER_DIRECTORY: usize = 100;
const LARGE_FILES: usize = 8;
const LARGE_BYTES: usize = 64 << 20;
const ROUNDS: usize = 3;
/// The walk: catalogs, directories in each, files in each directory.
const WIDE: (usize, usize, usize) = (20, 500, 100);
const COMMAND_TIMEOUT: Duration = Duration::from_secs(300);

/// Measures; needs root.
pub fn measure() -> Result<Vec<Line>> {
    eprintln!("preparing {SMALL_FILES} small and {LARGE_FILES} large files");
    let world = World::new()?;
    let (native, lists) = (world.tree.join("small"), &world.lists);
    let native_find = || seconds(&mut shell("find . -ls | wc -l", &native));
    let native_cat = |readers| cat(&native, lists, readers);
    let native_large = || seconds(&mut shell("cat * | wc -c", &world.tree.join("large")));

    let mut rounds: [Vec<(f64, f64)>; 6] = Default::default();
    for _ in 0..ROUNDS {
        interrupt::check()?;
        let mount = world.mount_cold()?;
        let small = mount.path().join("small");
        rounds[0].push((native_cat(1)?, cat(&small, lists, 1)?));
        drop(mount);
        let mount = world.mount()?;
        let small = mount.path().join("small");
        rounds[1].push((native_cat(1)?, cat(&small, lists, 1)?));
        rounds[2].push((native_cat(1)?, cat(&small, lists, 1)?));
        drop(mount);
        let mount = world.mount_cold()?;
        rounds[3].push((native_cat(4)?, cat(&mount.path().join("small"), lists, 4)?));
        drop(mount);
        let mount = world.mount_cold()?;
        rounds[4]
            .push((native_find()?, seconds(&mut shell("find . -ls | wc -l", &mount.path().join("small")))?));
        drop(mount);
        let mount = world.mount_cold()?;
        rounds[5].push((native_large()?, seconds(&mut shell("cat * | wc -c", &mount.path().join("large")))?));
        eprintln!("measured one round");
    }
    let names = [
        ("cat 20,000 x 4 KiB, cold", 3.0),
        ("the same, warm cache, fresh mount", 1.5),
        ("the same, hot", 1.0),
        ("the same, cold, 4 readers", 2.0),
        ("find -ls of them, cold", 0.3),
        ("cat 8 x 64 MiB, cold", 1.0),
    ];
    let mut lines: Vec<Line> = names
        .iter()
        .zip(&rounds)
        .map(|((name, goal), rounds)| Line::new(name, "s", Goal::Within(*goal), rounds))
        .collect();
    drop(world);
    lines.push(walk()?);
    Ok(lines)
}

/// Peak memory of both processes of a mount after a walk over a million entries in 20 catalogs.
fn walk() -> Result<Line> {
    let (catalogs, directories, files) = WIDE;
    eprintln!("preparing {} entries in {catalogs} catalogs", catalogs * directories * files);
    let repository = Published::create("wide.example.org")?;
    for catalog in 0..catalogs {
        interrupt::check()?;
        let mut tar = TarBuilder::new();
        for directory in 0..directories {
            tar = tar.directory(&format!("d{directory:04}"), 0o755);
            for file in 0..files {
                tar = tar.file(&format!("d{directory:04}/f{file:06}"), 0o644, b"");
            }
        }
        repository.ingest(&format!("base{catalog:02}"), &tar.finish(), &["--catalog"])?;
    }
    let origin = Serving::start(&repository)?;
    let config = origin.config(&repository, 0)?;
    let mount = MountBuilder::new(&repository.fqrn, &config).mount()?;
    let started = Instant::now();
    let finished = process::run(shell("find . -ls | wc -l", mount.path()), COMMAND_TIMEOUT)?;
    let entries: usize = finished.success()?.trim().parse().context("wc prints a number")?;
    ensure!(entries > catalogs * directories * files, "only {entries} entries were found");
    eprintln!("walked in {:.1} s", started.elapsed().as_secs_f64());
    let worker = mount.status()?["pid"].as_u64().context("status names the worker")?;
    let supervisor = parent(worker)?;
    let megabytes = peak(worker)? + peak(supervisor)?;
    // Nothing native does this work: the column repeats the goal.
    Ok(Line::new("peak memory, find over 1,000,000", "MB", Goal::Within(60.0), &[(60.0, megabytes)]))
}

/// A server process, so that its work is not ours.
struct Serving {
    _service: Service,
    url: String,
}

impl Serving {
    fn start(repository: &Published) -> Result<Self> {
        let port = testkit::registry::free_port()?;
        let address = format!("127.0.0.1:{port}");
        let mut command = Command::new(binary("cvmfs-publish"));
        command.args(["serve", "--log-level", "error", "--listen", &address]).arg(&repository.storage);
        let log = repository.scratch().join("serve.log");
        let mut service = Service::start("origin", command, &log)?;
        service.wait_ready(Duration::from_secs(10), || std::net::TcpStream::connect(&address).is_ok())?;
        Ok(Self { _service: service, url: format!("http://{address}") })
    }

    /// A client configuration with cache number `cache`.
    fn config(&self, repository: &Published, cache: u32) -> Result<PathBuf> {
        let file = repository.scratch().join("bench.conf");
        let cache = repository.scratch().join(format!("cache{cache}"));
        testkit::fixture::write_client_config(&file, &cache, &self.url, &repository.public_key())?;
        Ok(file)
    }
}

struct World {
    tree: PathBuf,
    lists: Vec<PathBuf>,
    cold: Cell<u32>,
    origin: Serving,
    repository: Published,
    _directory: ScratchDir,
}

impl World {
    fn new() -> Result<Self> {
        let directory = ScratchDir::new("client")?;
        let tree = directory.path().join("tree");
        make_tree(&tree)?;
        let repository = Published::create("bench.example.org")?;
        let tar = directory.path().join("tree.tar");
        let file = tar.to_str().context("a path is not UTF-8")?.to_owned();
        for base in ["small", "large"] {
            let mut command = Command::new("tar");
            command.arg("-cf").arg(&tar).arg("-C").arg(tree.join(base)).arg(".");
            process::run(command, COMMAND_TIMEOUT)?.success()?;
            repository.publish("ingest", &["--base", base, "--tar", &file])?.success()?;
        }
        std::fs::remove_file(&tar)?;
        let lists = write_lists(directory.path())?;
        let origin = Serving::start(&repository)?;
        Ok(Self { tree, lists, cold: Cell::new(0), origin, repository, _directory: directory })
    }

    /// On the cache of the mount before.
    fn mount(&self) -> Result<Mount> {
        let config = self.origin.config(&self.repository, self.cold.get())?;
        MountBuilder::new(&self.repository.fqrn, &config).mount()
    }

    /// On a cache of its own. The one before stays: where many files were just deleted, ext4 looks long for
    /// an inode, which would be measured as ours.
    fn mount_cold(&self) -> Result<Mount> {
        self.cold.set(self.cold.get() + 1);
        rustix::fs::sync();
        self.mount()
    }
}

fn make_tree(tree: &Path) -> Result<()> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut word = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state ^ (state >> 29)
    };
    for number in 0..SMALL_FILES {
        let path = tree.join("small").join(small(number));
        if number % PER_DIRECTORY == 0 {
            std::fs::create_dir_all(path.parent().context("it has a directory")?)?;
        }
        // Half random, half text.
        let mut content: Vec<u8> = (0..SMALL_BYTES / 16).flat_map(|_| word().to_le_bytes()).collect();
        while content.len() < SMALL_BYTES {
            writeln!(content, "line {number} of some text that compresses")?;
        }
        content.truncate(SMALL_BYTES);
        std::fs::write(path, content)?;
    }
    std::fs::create_dir_all(tree.join("large"))?;
    for number in 0..LARGE_FILES {
        let mut file = std::fs::File::create(tree.join("large").join(number.to_string()))?;
        for _ in 0..LARGE_BYTES >> 20 {
            let mut block = vec![0; 1 << 20];
            for bytes in block.chunks_exact_mut(16) {
                bytes[..8].copy_from_slice(&word().to_le_bytes());
            }
            file.write_all(&block)?;
        }
    }
    rustix::fs::sync();
    Ok(())
}

fn small(number: usize) -> PathBuf {
    PathBuf::from(format!("d{:04}/f{number:06}", number / PER_DIRECTORY))
}

/// Four lists, each a quarter of the names.
fn write_lists(directory: &Path) -> Result<Vec<PathBuf>> {
    (0..4)
        .map(|part| {
            let names: String = (0..SMALL_FILES / 4)
                .map(|index| format!("{}\n", small(part * SMALL_FILES / 4 + index).display()))
                .collect();
            let list = directory.join(format!("list{part}"));
            std::fs::write(&list, names)?;
            Ok(list)
        })
        .collect()
}

/// Seconds to `cat` all small files below `directory` with one reader or four.
fn cat(directory: &Path, lists: &[PathBuf], readers: usize) -> Result<f64> {
    let started = Instant::now();
    let mut children = Vec::new();
    for group in lists.chunks(lists.len() / readers) {
        let names: Vec<_> = group.iter().map(|list| list.display().to_string()).collect();
        let mut command = shell(&format!("cat {} | xargs cat | wc -c", names.join(" ")), directory);
        children.push(command.stdout(Stdio::piped()).spawn()?);
    }
    let mut bytes = 0;
    for mut child in children {
        let output = child.stdout.take().context("the output is piped")?;
        let line = BufReader::new(output).lines().next().context("wc prints a line")??;
        bytes += line.trim().parse::<usize>()?;
        ensure!(child.wait()?.success(), "cat failed");
    }
    ensure!(bytes == SMALL_FILES * SMALL_BYTES, "cat read {bytes} bytes");
    Ok(started.elapsed().as_secs_f64())
}

fn seconds(command: &mut Command) -> Result<f64> {
    let started = Instant::now();
    ensure!(command.stdout(Stdio::null()).status()?.success(), "{} failed", process::describe(command));
    Ok(started.elapsed().as_secs_f64())
}

fn shell(script: &str, directory: &Path) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script]).current_dir(directory);
    command
}

fn parent(pid: u64) -> Result<u64> {
    status_field(pid, "PPid:")
}

/// Peak resident memory in MB.
fn peak(pid: u64) -> Result<f64> {
    Ok(status_field(pid, "VmHWM:")? as f64 / 1024.0)
}

fn status_field(pid: u64, name: &str) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)).context("no such field")?;
    line.split_whitespace().next().and_then(|value| value.parse().ok()).context("not a number")
}
