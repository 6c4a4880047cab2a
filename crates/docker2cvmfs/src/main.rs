//! The program `docker2cvmfs`; everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    docker2cvmfs::cli::run()
}
