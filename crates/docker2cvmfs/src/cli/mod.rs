//! The command line: the original's verbs with their arguments and outputs, `convert`
//! and `loop`.

mod arguments;
mod inspect;
mod publish;
mod pull;
mod signals;
mod wishes;

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser as _;
use tracing_subscriber::EnvFilter;

use crate::failure::{ConvertError, ExitStatus};
use arguments::{Arguments, Command, LogFormat};

/// Runs the program.
pub fn run() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version go to stdout and are no error; the rest is wrong usage.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(ExitStatus::USAGE.0));
        }
    };
    start_log(&arguments);
    match perform(&arguments) {
        Ok((text, true)) => print(&text),
        Ok((text, false)) => {
            print(&text);
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("docker2cvmfs: {}", error.full_message());
            ExitCode::from(error.exit_status().0)
        }
    }
}

/// Does what was asked; returns what goes to stdout, and whether all of it went well.
fn perform(arguments: &Arguments) -> Result<(String, bool), ConvertError> {
    if arguments.original_version {
        return Ok((format!("Version:  {}\nCommit:   {}\n", env!("CARGO_PKG_VERSION"), commit()), true));
    }
    let Some(command) = &arguments.command else {
        let registry = arguments.registry_url();
        let hint = format!(
            "Use `docker2cvmfs help` for a list of supported commands.\nRegistry: \n    {registry}\n"
        );
        return Ok((hint, true));
    };
    let text = match command {
        Command::Loop(wishes) => return wishes::run(arguments, wishes),
        Command::Manifest(image) => inspect::manifest(arguments, image),
        Command::Config(image) => inspect::config(arguments, image),
        Command::Thin(thin) => inspect::thin(arguments, thin),
        Command::Pull(pull) => pull::pull(arguments, pull),
        Command::MakeThin(make_thin) => publish::make_thin(arguments, make_thin),
        Command::Convert(convert) => publish::convert(arguments, convert),
    };
    Ok((text?, true))
}

fn commit() -> &'static str {
    option_env!("GIT_COMMIT").unwrap_or("<unofficial build>")
}

/// A reader that closes the pipe early has seen enough: no error.
fn print(text: &str) -> ExitCode {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("docker2cvmfs: cannot write the result: {error}");
            ExitCode::FAILURE
        }
    }
}

fn start_log(arguments: &Arguments) {
    let filter = EnvFilter::new(format!("{},hyper=warn,reqwest=warn", arguments.log_level()));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false);
    match arguments.log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
}
