//! A driver without coverage: good inputs, changed at random.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::Target;

/// Longest input. The largest foreign documents that are parsed in memory are a few hundred kilobytes.
const MAX_INPUT: usize = 1 << 20;
/// An input that takes longer than this is a hang. Generous: the machine may be busy.
const HANG: Duration = Duration::from_secs(60);

/// What a run did.
#[derive(Debug)]
pub struct Report {
    /// Inputs tried.
    pub inputs: u64,
    /// The longest time that one of them took.
    pub slowest: Duration,
}

/// Runs `target` on its regressions, its seeds and changed seeds until `time` is over.
///
/// # Panics
/// If the target panics. The message says where the input was left.
pub fn drive(target: &Target, seed: u64, time: Duration) -> Report {
    let watch = Watch::over(target);
    let mut report = Report { inputs: 0, slowest: Duration::ZERO };
    for (_, input) in regressions(target) {
        attempt(target, &input, &watch, &mut report, seed);
    }
    let seeds = (target.seeds)();
    assert!(!seeds.is_empty(), "{} has no seeds", target.name);
    for input in &seeds {
        attempt(target, input, &watch, &mut report, seed);
    }
    let mut random = Random(seed);
    let begun = Instant::now();
    while begun.elapsed() < time {
        let input = changed(&seeds, target.words, &mut random);
        attempt(target, &input, &watch, &mut report, seed);
    }
    report
}

/// The inputs that once broke `target`, with their names.
pub fn regressions(target: &Target) -> Vec<(String, Vec<u8>)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("regressions").join(target.name);
    let mut found: Vec<_> = std::fs::read_dir(directory)
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            Some((path.display().to_string(), std::fs::read(path).ok()?))
        })
        .collect();
    found.sort();
    found
}

/// Writes the seeds of `target` to files, for drivers that want them so; returns their directory.
///
/// # Errors
/// The files cannot be written.
pub fn write_seeds(target: &Target) -> std::io::Result<PathBuf> {
    let directory = output().join("seeds").join(target.name);
    std::fs::create_dir_all(&directory)?;
    for (number, seed) in (target.seeds)().iter().enumerate() {
        std::fs::write(directory.join(format!("seed-{number}")), seed)?;
    }
    Ok(directory)
}

fn attempt(target: &Target, input: &[u8], watch: &Watch, report: &mut Report, seed: u64) {
    let begun = Instant::now();
    watch.begin(input);
    let outcome = catch_unwind(AssertUnwindSafe(|| (target.run)(input)));
    watch.end();
    report.inputs += 1;
    report.slowest = report.slowest.max(begun.elapsed());
    if outcome.is_err() {
        let place = keep(target, input);
        panic!(
            "an input of {} bytes breaks the target {}: {}\n\
             (input {} of seed {seed}; once it is understood, it belongs into fuzz/regressions/{})",
            input.len(),
            target.name,
            place.display(),
            report.inputs,
            target.name
        );
    }
}

fn output() -> PathBuf {
    testkit::workspace_root().join("target/fuzz")
}

/// Leaves an input for looking into it.
fn keep(target: &Target, input: &[u8]) -> PathBuf {
    let mut hasher = DefaultHasher::new();
    input.hash(&mut hasher);
    let path = output().join(format!("{}-{:016x}", target.name, hasher.finish()));
    let _ = std::fs::create_dir_all(output());
    if let Err(error) = std::fs::write(&path, input) {
        eprintln!("cannot keep the input: {error}\n{input:?}");
    }
    path
}

/// Ends the process when an input hangs: a thread cannot be stopped otherwise.
struct Watch(Arc<Mutex<Option<Running>>>);

/// When an input began to run, and the input.
type Running = (Instant, Vec<u8>);

impl Watch {
    fn over(target: &Target) -> Self {
        let current = Arc::new(Mutex::new(None::<(Instant, Vec<u8>)>));
        let (watched, target) = (Arc::downgrade(&current), *target);
        std::thread::spawn(move || {
            while let Some(current) = watched.upgrade() {
                let now = current.lock().unwrap_or_else(PoisonError::into_inner).clone();
                if let Some((begun, input)) = now
                    && begun.elapsed() > HANG
                {
                    let place = keep(&target, &input);
                    eprintln!("an input hangs the target {}: {}", target.name, place.display());
                    std::process::abort();
                }
                drop(current);
                std::thread::sleep(Duration::from_millis(500));
            }
        });
        Self(current)
    }

    fn begin(&self, input: &[u8]) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), input.to_vec()));
    }

    fn end(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// A good input, made bad by a few changes.
fn changed(seeds: &[Vec<u8>], words: &[&str], random: &mut Random) -> Vec<u8> {
    let mut input = seeds[random.below(seeds.len())].clone();
    if !words.is_empty() && random.below(8) == 0 {
        // Nothing but words: sentences that no seed has.
        input = (0..random.below(40)).flat_map(|_| words[random.below(words.len())].bytes()).collect();
    }
    for _ in 0..1 + random.below(6) {
        change(&mut input, seeds, words, random);
    }
    input.truncate(MAX_INPUT);
    input
}

fn change(input: &mut Vec<u8>, seeds: &[Vec<u8>], words: &[&str], random: &mut Random) {
    /// Numbers at which things break.
    const EDGES: [u64; 12] = [
        0,
        1,
        0x7f,
        0x80,
        0xff,
        0x7fff,
        0xffff,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        0x7fff_ffff_ffff_ffff,
        u64::MAX,
    ];
    let at = random.below(input.len() + 1);
    let span = at..(at + 1 + random.short()).min(input.len()).max(at);
    match random.below(11) {
        0 => {
            if let Some(byte) = input.get_mut(at) {
                *byte ^= 1 << random.below(8);
            }
        }
        1 => input[span].iter_mut().for_each(|byte| *byte = random.next() as u8),
        2 => drop(input.drain(span)),
        3 => {
            let copy = input[span].to_vec();
            let to = random.below(input.len() + 1);
            input.splice(to..to, copy);
        }
        4 => {
            let copy = input[span].to_vec();
            let to = random.below(input.len() + 1);
            let end = (to + copy.len()).min(input.len());
            input[to..end].copy_from_slice(&copy[..end - to]);
        }
        5 => input.truncate(at),
        6 => {
            let other = &seeds[random.below(seeds.len())];
            let from = random.below(other.len() + 1);
            input.truncate(at);
            input.extend_from_slice(&other[from..]);
        }
        7 => {
            let number = EDGES[random.below(EDGES.len())];
            let width = 1 << random.below(4);
            let mut bytes = number.to_le_bytes();
            if random.below(2) == 0 {
                bytes[..width].reverse();
            }
            let end = (at + width).min(input.len());
            input[at..end].copy_from_slice(&bytes[..end - at]);
        }
        8 => {
            // A decimal number becomes another one.
            let digits = |input: &[u8], from: usize| {
                input[from..].iter().take_while(|byte| byte.is_ascii_digit()).count()
            };
            let Some(start) = (at..input.len()).find(|start| digits(input, *start) > 0) else { return };
            let number = EDGES[random.below(EDGES.len())].wrapping_add(random.below(3) as u64).to_string();
            let end = start + digits(input, start);
            input.splice(start..end, number.into_bytes());
        }
        9 if !words.is_empty() => {
            let word = words[random.below(words.len())].bytes();
            input.splice(at..at, word);
        }
        _ => {
            let byte = random.next() as u8;
            let length = random.short();
            input.splice(at..at, std::iter::repeat_n(byte, length));
        }
    }
}

/// SplitMix64: good enough to choose, and the same everywhere.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    /// Mostly a few, sometimes some hundred.
    fn short(&mut self) -> usize {
        let bits = self.below(10);
        self.below(1 << bits)
    }
}
