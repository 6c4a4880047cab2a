//! Workspace tasks: everything that a developer or a CI job does with this repository, as one program that
//! needs no shell. `cargo xtask --help` lists them.

mod bench;
mod build;
mod demo;
mod dist;
mod faults;
mod kernel;
mod plugin;
mod scene;
mod soak;
mod test;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version, about = "Tasks of this workspace")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Publish an image, start it as a thin image on a real engine, compare with the normal image
    Demo(demo::Options),
    /// Run all tests, engines included
    Test {
        /// Leave out the tests that need root
        #[arg(long)]
        quick: bool,
        /// `all`: run those that start an engine on newer ones, too, which are fetched from Debian
        #[arg(long, value_enum, default_value_t, conflicts_with = "quick")]
        engines: test::Engines,
    },
    /// Run tests of mounts, layers and limits on Debian's kernel in a virtual machine
    Kernel {
        /// Use the processor's virtualisation instead of emulating it
        #[arg(long)]
        kvm: bool,
    },
    /// Build the managed plugin: config.json, rootfs and the tarball
    Plugin {
        /// Where to put them
        #[arg(long, default_value = "target/plugin")]
        output: PathBuf,
    },
    /// Measure, as ratios to the same work without CernVM-FS
    Bench(bench::Options),
    /// Many readers on a mount under random faults: no wrong byte, no error without a reason
    Soak(soak::Options),
    /// Build the static binaries, the plugin tarball and their checksums
    Dist {
        /// Where to put them
        #[arg(long, default_value = "target/dist")]
        output: PathBuf,
    },
}

fn main() -> ExitCode {
    let result = match Arguments::parse().task {
        Task::Demo(options) => demo::run(&options),
        Task::Test { quick, engines } => test::run(quick, engines),
        Task::Kernel { kvm } => kernel::run(kvm),
        Task::Plugin { output } => plugin::run(&output),
        Task::Bench(options) => bench::run(&options),
        Task::Soak(options) => soak::run(&options),
        Task::Dist { output } => dist::run(&output),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
