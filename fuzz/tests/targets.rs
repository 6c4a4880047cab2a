//! Seconds of random bytes for every parser of foreign bytes.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuzz::driver::{drive, write_seeds};
use fuzz::{TARGETS, target};

/// Seconds per target with the fixed seed; with CVMFS_FUZZ_SECONDS so many, and again with a new one.
const SECONDS: u64 = 1;
/// So that a change of the code is seen with the bytes of the run before.
const FIXED_SEED: u64 = 0x6376_6d66_7331;
/// Address space of this process: a document that needs more is a bomb.
const MEMORY: u64 = 4 << 30;

fn run(name: &str) {
    let limit = rustix::process::Rlimit { current: Some(MEMORY), maximum: Some(MEMORY) };
    rustix::process::setrlimit(rustix::process::Resource::As, limit)
        .expect("a lower limit is always allowed");
    let target = target(name).unwrap_or_else(|| panic!("there is no target {name}"));
    let number = |variable: &str| std::env::var(variable).ok().and_then(|text| text.parse().ok());
    let time = Duration::from_secs(number("CVMFS_FUZZ_SECONDS").unwrap_or(SECONDS));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos() as u64);
    // New bytes only on request: a gate must not fail by chance for something that was there before.
    let seeds = match (number("CVMFS_FUZZ_SEED"), number("CVMFS_FUZZ_SECONDS")) {
        (Some(seed), _) => vec![seed],
        (None, Some(_)) => vec![FIXED_SEED, now],
        (None, None) => vec![FIXED_SEED],
    };
    for seed in seeds {
        let report = drive(target, seed, time);
        println!(
            "{name}: {} inputs with CVMFS_FUZZ_SEED={seed}, slowest {:?}",
            report.inputs, report.slowest
        );
    }
}

macro_rules! targets {
    ($($name:ident)*) => {
        mod no_bytes_break {
            $(#[test] fn $name() { super::run(stringify!($name)); })*
        }
        const TESTED: &[&str] = &[$(stringify!($name)),*];
    };
}

targets! {
    manifest whitelist keys blacklist catalog catalog_rows history reflog snapshot chunk_list xattrs compressed names
    configuration variant_link control proxy_script geo_reply descriptor layer plugin_request
    layer_service registry wish_list policy
}

#[test]
fn every_target_is_tested() {
    for target in TARGETS {
        assert!(TESTED.contains(&target.name), "{} is not tested", target.name);
    }
}

#[test]
#[ignore = "for other drivers: writes the seeds to target/fuzz/seeds"]
fn seeds() {
    for target in &TARGETS {
        println!("{}", write_seeds(target).unwrap().display());
    }
}
