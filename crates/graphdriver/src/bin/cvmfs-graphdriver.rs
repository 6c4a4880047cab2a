//! `cvmfs-graphdriver`: the Docker graph driver plugin.

use std::process::ExitCode;

fn main() -> ExitCode {
    // The FUSE processes are this program under another role.
    if let Some(code) = cvmfs_fuse::internal_main() {
        return code;
    }
    graphdriver::cli::run()
}
