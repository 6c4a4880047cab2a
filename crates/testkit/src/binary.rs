//! Where the workspace and its binaries are.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Overrides the directory in which [`binary`] looks.
pub const BINARY_DIRECTORY_VARIABLE: &str = "CVMFS_BIN_DIR";

static CHOSEN: OnceLock<PathBuf> = OnceLock::new();

/// From now on [`binary`] looks in this directory. The first call counts.
pub fn use_binaries_of(directory: &Path) {
    let _ = CHOSEN.set(directory.to_owned());
}

/// The root of the workspace, that is the directory of the workspace's `Cargo.toml`.
pub fn workspace_root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .expect("testkit lies two levels below the workspace root")
}

/// The directory that was chosen, or in which cargo puts binaries of the profile that this process was built with.
pub fn binary_directory() -> PathBuf {
    if let Some(directory) = CHOSEN.get() {
        return directory.clone();
    }
    if let Some(directory) = std::env::var_os(BINARY_DIRECTORY_VARIABLE) {
        return PathBuf::from(directory);
    }
    let executable = std::env::current_exe().expect("the running executable has a path");
    let directory = executable.parent().expect("an executable lies in a directory");
    // Test executables lie in `deps`, one level below the binaries.
    match directory.file_name() {
        Some(name) if name == "deps" => directory.parent().unwrap_or(directory).to_owned(),
        _ => directory.to_owned(),
    }
}

/// The path of a binary of this workspace, such as `cvmfs-client`.
///
/// # Panics
/// If it has not been built; the message says how to.
pub fn binary(name: &str) -> PathBuf {
    let path = binary_directory().join(name);
    assert!(
        path.is_file(),
        "{} does not exist: build it with `cargo build --workspace --bins`, or run `cargo xtask test`",
        path.display()
    );
    path
}
