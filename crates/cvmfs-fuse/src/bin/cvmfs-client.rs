//! The CernVM-FS client for the command line.

use std::process::ExitCode;

fn main() -> ExitCode {
    match cvmfs_fuse::internal_main() {
        Some(code) => code,
        None => cvmfs_fuse::cli::main(),
    }
}
