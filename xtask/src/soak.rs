//! Many readers under random faults, for as long as one likes; the stories have a short one.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use testkit::{interrupt, scratch, soak, workspace_root};

use crate::build::cargo;

#[derive(Debug, clap::Args)]
pub struct Options {
    /// How long
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// How many readers
    #[arg(long, default_value_t = 64)]
    readers: usize,
    /// Repeats the faults and choices of an earlier run
    #[arg(long)]
    seed: Option<u64>,
}

/// Runs a soak on the binaries that the tests use: they check arithmetic and assertions.
pub fn run(options: &Options) -> Result<()> {
    let status = cargo(&["build", "--workspace", "--bins"]).status().context("cannot run cargo")?;
    ensure!(status.success(), "the build failed");
    let home = workspace_root().join("target/soak");
    scratch::use_base(&home);
    interrupt::catch();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let summary = soak::run(&soak::Options {
        duration: Duration::from_secs(options.minutes * 60),
        readers: options.readers,
        seed: options.seed.unwrap_or(now),
    });
    scratch::remove(&home);
    println!("{}", summary?);
    Ok(())
}
