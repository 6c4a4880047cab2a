//! Many readers on one mount while everything goes wrong that can: what they may and may not see.
//!
//! The repository has two servers. Every few seconds something happens: one server misbehaves, or both, the worker is
//! killed, a revision is published and taken into use, the cache loses files. Readers check every byte; the cache is a
//! fraction of the content, so that it is evicted all the time.
//!
//! What must hold:
//! * never a wrong byte, never a mix of revisions in one open file, and no revision older than one that was in use;
//! * no error unless *both* servers were disturbed at that time: neither one bad server nor a dead worker, an update
//!   or an eviction is a reason for one;
//! * no operation outlives its deadline;
//! * afterwards everything is readable, and memory, descriptors and cache are within their bounds.

mod content;
mod reader;
mod trouble;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use self::content::World;
use self::reader::Observed;
use self::trouble::{Counts, Weather};
use crate::process::wait_until;
use crate::{Mount, MountBuilder, Origin, Published, interrupt};

/// The configured size of the cache: a third of the content.
const CACHE_MEGABYTES: u64 = 10;
/// Beyond the cache's limit, for files that are being written.
const CACHE_SLACK: u64 = 16 << 20;
/// No operation of a reader may take longer. A look-up may wait 10 s, an open and a read 30 s each; a machine under
/// load needs a little more.
const LONGEST_OPERATION: Duration = Duration::from_secs(100);
/// Descriptors that older revisions may hold: eight of them with five catalogs each, and some.
const DESCRIPTOR_SLACK: usize = 64;
/// Each of the 64 threads that wait for the network keeps three for its runtime, once it had to wait; others are few.
const MOST_ANONYMOUS: usize = 64 * 3 + 32;
/// Memory that stays with an allocator after 64 readers at once.
const MEMORY_SLACK: u64 = 48 << 20;

/// How long, how many, and which faults.
#[derive(Debug, Clone)]
pub struct Options {
    /// Time under faults.
    pub duration: Duration,
    /// Readers at once.
    pub readers: usize,
    /// Chooses faults and what is read.
    pub seed: u64,
}

/// What happened, as one line.
#[derive(Debug)]
pub struct Summary {
    options: Options,
    reads: usize,
    bytes: u64,
    errors: usize,
    counts: Counts,
    revision: u64,
    latencies: [Duration; 3],
    before: Resources,
    after: Resources,
}

impl fmt::Display for Summary {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [median, late, latest] = self.latencies.map(|latency| latency.as_secs_f64() * 1000.0);
        write!(
            formatter,
            "soak: {} s with {} readers (seed {}): {} reads of {} MB, no wrong byte; {} faults ({}); {} errors, all while \
             both servers were disturbed; revision {}; latency p50 {median:.1} ms, p99 {late:.1} ms, max {latest:.0} ms; \
             worker {} -> {}",
            self.options.duration.as_secs(),
            self.options.readers,
            self.options.seed,
            self.reads,
            self.bytes >> 20,
            self.counts.total(),
            self.counts,
            self.errors,
            self.revision,
            self.before,
            self.after,
        )
    }
}

/// What a worker uses.
#[derive(Debug, Clone)]
struct Resources {
    descriptors: usize,
    memory: u64,
    /// The descriptors by what they are open on.
    kinds: BTreeMap<String, usize>,
}

impl fmt::Display for Resources {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} MB {} descriptors", self.memory >> 20, self.descriptors)
    }
}

/// Runs a soak; an error tells what should not have happened.
///
/// # Errors
/// Whatever the module's documentation says must not be.
pub fn run(options: &Options) -> Result<Summary> {
    let repository = Published::create("soak.example.org")?;
    let world = World::publish(&repository)?;
    let second = Origin::serve(&repository.storage)?;
    let (config, cache) = configure(&repository, &second)?;
    let mount = MountBuilder::new(&repository.fqrn, &config).option("cvmfs_suid").mount()?;
    println!("soak: {} with {} readers, seed {}", mount.path().display(), options.readers, options.seed);

    // Calm weather first: what it takes when nothing is wrong.
    let calm = Duration::from_secs(3).min(options.duration / 4);
    let observed = read_during(&world, &mount, options, |_| sleep(calm))?;
    ensure!(observed.errors.is_empty(), "errors before any fault: {:?}", observed.errors);
    let before = resources(&mount)?;

    let weather = Weather::new(&repository, &second, &mount, &cache, &world, options.seed);
    let observed = read_during(&world, &mount, options, |stop| weather.rage(options.duration, stop))?;
    let latencies = judge(&observed, &weather)?;
    let revision = aftermath(&world, &mount, options)?;
    let after = resources(&mount)?;
    check_bounds(&before, &after, &cache, &mount)?;
    Ok(Summary {
        options: options.clone(),
        reads: observed.latencies.len(),
        bytes: observed.bytes,
        errors: observed.errors.len(),
        counts: weather.counts(),
        revision,
        latencies,
        before,
        after,
    })
}

fn configure(repository: &Published, second: &Origin) -> Result<(PathBuf, PathBuf)> {
    let (file, cache) = (repository.client_config()?, repository.scratch().join("cache"));
    let text = std::fs::read_to_string(&file)?;
    let more = format!(
        "CVMFS_SERVER_URL='{};{}'\nCVMFS_TIMEOUT=3\nCVMFS_TIMEOUT_DIRECT=3\nCVMFS_BACKOFF_INIT=1\nCVMFS_BACKOFF_MAX=2\n\
         CVMFS_QUOTA_LIMIT={CACHE_MEGABYTES}\n",
        repository.origin.url(),
        second.url()
    );
    std::fs::write(&file, text + &more)?;
    Ok((file, cache))
}

/// Runs the readers while `meanwhile` runs, which learns when one has seen something wrong.
fn read_during(
    world: &World,
    mount: &Mount,
    options: &Options,
    meanwhile: impl FnOnce(&AtomicBool) -> Result<()>,
) -> Result<Observed> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..options.readers)
            .map(|number| {
                let (stop, seed) = (&stop, options.seed.wrapping_add(number as u64));
                scope.spawn(move || reader::read_on(world, mount.path(), seed, stop))
            })
            .collect();
        let outcome = meanwhile(&stop);
        stop.store(true, Ordering::SeqCst);
        let mut all = Observed::default();
        for reader in readers {
            all.add(reader.join().expect("a reader does not panic"));
        }
        outcome.map(|()| all)
    })
}

/// Decides whether what the readers saw is all right; returns median, 99th percentile and maximum.
fn judge(observed: &Observed, weather: &Weather<'_>) -> Result<[Duration; 3]> {
    if let Some(wrong) = &observed.wrong {
        bail!("wrong content: {wrong}; faults:\n{}", weather.history());
    }
    let unexplained: Vec<_> = observed.errors.iter().filter(|error| !weather.explains(error)).collect();
    if let Some(first) = unexplained.first() {
        bail!(
            "{} of {} errors without a fault that explains them; the first: {first}; faults:\n{}",
            unexplained.len(),
            observed.errors.len(),
            weather.history()
        );
    }
    let mut latencies = observed.latencies.clone();
    latencies.sort_unstable();
    let at = |part: f64| {
        let index = (latencies.len().saturating_sub(1)) as f64 * part;
        latencies.get(index as usize).copied().context("nothing was read")
    };
    let latencies = [at(0.5)?, at(0.99)?, at(1.0)?];
    ensure!(latencies[2] < LONGEST_OPERATION, "an operation took {:?}", latencies[2]);
    let slow = observed.errors.iter().map(|error| error.ended - error.begun).max().unwrap_or_default();
    ensure!(slow < LONGEST_OPERATION, "an error took {slow:?}");
    Ok(latencies)
}

/// After the last fault everything must be as before; returns the revision in use.
fn aftermath(world: &World, mount: &Mount, options: &Options) -> Result<u64> {
    // Clients may remember failures for a moment.
    sleep(trouble::GRACE)?;
    let observed = read_during(world, mount, options, |_| sleep(Duration::from_secs(2)))?;
    ensure!(observed.wrong.is_none() && observed.errors.is_empty(), "after the last fault: {observed:?}");
    world.read_everything(mount.path()).context("after the last fault")?;
    let revision: u64 =
        ask(mount, "refresh")?.parse().context("the mount is updated after the last fault")?;
    ensure!(revision == world.revision(), "revision {revision}, but {} was published", world.revision());
    wait_until("all files are closed", Duration::from_secs(20), || {
        mount.status().is_ok_and(|status| status["open_files"] == 0)
    })?;
    Ok(revision)
}

fn check_bounds(before: &Resources, after: &Resources, cache: &Path, mount: &Mount) -> Result<()> {
    let lasting = |of: &Resources| of.descriptors - of.kinds.get("anon_inode").copied().unwrap_or_default();
    ensure!(
        lasting(after) <= lasting(before) + DESCRIPTOR_SLACK
            && after.descriptors - lasting(after) <= MOST_ANONYMOUS,
        "descriptors: {} at the start, {} at the end; {:?} and {:?}",
        before.descriptors,
        after.descriptors,
        before.kinds,
        after.kinds
    );
    ensure!(
        after.memory <= before.memory * 3 / 2 + MEMORY_SLACK,
        "memory: {} bytes at the start, {} at the end",
        before.memory,
        after.memory
    );
    let limit = (CACHE_MEGABYTES << 20) + CACHE_SLACK;
    let mut size = 0;
    // Eviction works in the background.
    wait_until("the cache is within its limit", Duration::from_secs(20), || {
        size = size_below(cache);
        size <= limit
    })
    .with_context(|| format!("the cache has {size} bytes, its limit is {CACHE_MEGABYTES} MB"))?;
    ensure!(mount.is_mounted(), "the mount is gone");
    Ok(())
}

/// Bytes on disk of all files below a directory.
fn size_below(directory: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => size_below(&entry.path()),
            Ok(meta) => meta.blocks() * 512,
            Err(_) => 0,
        })
        .sum()
}

/// What the present worker uses. Pages of the cache's files that it maps do not count.
fn resources(mount: &Mount) -> Result<Resources> {
    let pid: u32 = ask(mount, "pid")?.trim().parse().context("`pid` is answered with a number")?;
    let mut kinds = BTreeMap::<String, usize>::new();
    for descriptor in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let target = std::fs::read_link(descriptor?.path()).unwrap_or_default();
        let target = target.to_string_lossy();
        // `socket:[123]`, `anon_inode:[eventpoll]`, or a path.
        let kind = match target.starts_with('/') {
            true if target.ends_with(" (deleted)") => "deleted files",
            true => "files",
            false => target.split(':').next().unwrap_or_default(),
        };
        *kinds.entry(kind.to_owned()).or_default() += 1;
    }
    let descriptors = kinds.values().sum();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kilobytes: u64 = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:")?.trim().strip_suffix(" kB")?.trim().parse().ok())
        .context("the kernel tells the memory of a process")?;
    Ok(Resources { descriptors, memory: kilobytes << 10, kinds })
}

/// Asks until a worker answers: one may just have been killed.
fn ask(mount: &Mount, command: &str) -> Result<String> {
    let mut answer = String::new();
    wait_until(&format!("`{command}` is answered"), Duration::from_secs(60), || {
        answer = mount.ask(command, Duration::from_secs(60)).unwrap_or_default();
        !answer.is_empty()
    })?;
    Ok(answer)
}

fn sleep(time: Duration) -> Result<()> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        interrupt::check()?;
        std::thread::sleep(Duration::from_millis(20).min(end.saturating_duration_since(Instant::now())));
    }
    Ok(())
}

/// SplitMix64: good enough to choose, and the same everywhere.
#[derive(Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        content::mix(self.0)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    pub(crate) fn milliseconds(&mut self, range: std::ops::Range<u64>) -> Duration {
        Duration::from_millis(range.start + self.below(range.end - range.start))
    }
}
