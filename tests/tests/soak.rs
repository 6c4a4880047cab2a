//! A short soak; `cargo xtask soak` runs a long one.

#![allow(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

use std::time::Duration;

use testkit::soak::{Options, run};

#[test]
fn readers_under_random_faults_see_no_wrong_byte_and_no_error_without_a_reason() {
    let number = |variable: &str| std::env::var(variable).ok().and_then(|text| text.parse::<u64>().ok());
    let options = Options {
        duration: Duration::from_secs(number("CVMFS_SOAK_SECONDS").unwrap_or(25)),
        readers: number("CVMFS_SOAK_READERS").unwrap_or(32) as usize,
        seed: number("CVMFS_SOAK_SEED").unwrap_or(1),
    };
    println!("{}", run(&options).unwrap());
}
