//! To be written.
use anyhow::Result;
#[derive(Debug, clap::Args)]
pub struct Options {}
pub fn run(_options: &Options) -> Result<()> {
    anyhow::bail!("not yet")
}
