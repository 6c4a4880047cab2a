//! The program `docker2cvmfs`; everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    cvmfs_publish::allocator::return_large_buffers();
    docker2cvmfs::cli::run()
}
