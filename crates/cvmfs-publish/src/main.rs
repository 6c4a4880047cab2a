//! The command `cvmfs-publish`, see `cvmfs-publish --help`.

mod cli;
mod progress;
mod run;
mod signals;

use std::io::IsTerminal as _;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use cli::{Cli, Common, LogFormat};

fn main() -> ExitCode {
    cvmfs_publish::allocator::return_large_buffers();
    let cli = Cli::parse();
    if let Err(reason) = start_log(&cli.common) {
        eprintln!("error: --log-level: {reason}");
        return ExitCode::from(2);
    }
    match run::run(cli) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let code = error.exit_code();
            eprintln!("error: {}", error.full_message());
            ExitCode::from(code)
        }
    }
}

fn start_log(common: &Common) -> Result<(), String> {
    let filter = EnvFilter::try_new(&common.log_level).map_err(|error| error.to_string())?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match common.log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}
