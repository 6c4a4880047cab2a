//! The client against a reference model: random sequences of publishing, updating, looking up, reading, eviction,
//! network loss and restarts, run side by side on the real thing and on a map in memory.
//!
//! `CVMFS_MODEL_SECONDS` sets how long each of the two goes on; `CVMFS_MODEL_SEED` repeats one sequence. A sequence
//! that failed because of the client becomes a test with a name.

#![allow(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

mod client;
mod core;
mod mounted;
mod site;
mod steps;
mod tree;

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};

use crate::client::Client;
use crate::core::Core;
use crate::mounted::Mounted;

/// So that a change of the code is seen with the sequences of the run before.
const FIXED_SEED: u64 = 0x6376_6d66_7331;
/// Time for making a failing sequence shorter.
const SHRINK_MILLISECONDS: u32 = 120_000;

#[test]
fn the_client_core_does_what_the_model_does() {
    explore::<Core>(25);
}

#[test]
fn a_mount_does_what_the_model_does() {
    explore::<Mounted>(25);
}

/// With sequences that are the same in every run; where a time is asked for, half of it with new ones.
fn explore<C: Client>(seconds: u64) {
    let number = |variable: &str| std::env::var(variable).ok().and_then(|text| text.parse().ok());
    if let Some(seed) = number("CVMFS_MODEL_SEED") {
        return one::<C>(seed);
    }
    let half = Duration::from_secs(number("CVMFS_MODEL_SECONDS").unwrap_or(seconds)) / 2;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos() as u64);
    let mut sequences = 0;
    // New sequences only on request: a gate must not fail by chance for something that was there before.
    let is_asked_for = number("CVMFS_MODEL_SECONDS").is_some();
    for first in [FIXED_SEED, if is_asked_for { now } else { FIXED_SEED }] {
        let begun = Instant::now();
        let mut seed = first;
        while begun.elapsed() < half {
            one::<C>(seed);
            sequences += 1;
            seed = seed.wrapping_add(1);
        }
    }
    println!("{sequences} sequences");
}

/// One sequence.
fn one<C: Client>(seed: u64) {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config {
        cases: 1,
        max_shrink_iters: 5000,
        failure_persistence: None,
        max_shrink_time: SHRINK_MILLISECONDS,
        ..Config::default()
    };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let outcome = runner.run(&steps::steps(), |steps| steps::run::<C>(&steps).map_err(TestCaseError::fail));
    match outcome {
        Ok(()) => {}
        Err(TestError::Fail(reason, steps)) => {
            panic!("CVMFS_MODEL_SEED={seed}: {reason}\nshortest sequence found:\n{}", lines(&steps))
        }
        Err(error) => panic!("CVMFS_MODEL_SEED={seed}: {error}"),
    }
}

/// One step per line.
fn lines(steps: &[steps::Step]) -> String {
    steps.iter().map(|step| format!("    {step:?},\n")).collect()
}
