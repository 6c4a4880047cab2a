//! Small files that are fetched before a program opens them.

#![allow(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

use testkit::tar::TarBuilder;
use testkit::{Mount, MountBuilder, Published};

/// Directories, and files in each. No two files are equal.
const DIRECTORIES: usize = 3;
const FILES: usize = 100;

fn path(directory: usize, file: usize) -> String {
    format!("d{directory}/f{file:03}")
}

fn content(directory: usize, file: usize) -> String {
    format!("file {file} of directory {directory}\n").repeat(40)
}

fn publish() -> Published {
    let repository = Published::create("ahead.example.org").unwrap();
    let mut tar = TarBuilder::new();
    for directory in 0..DIRECTORIES {
        tar = tar.directory(&format!("d{directory}"), 0o755);
        for file in 0..FILES {
            tar = tar.file(&path(directory, file), 0o644, content(directory, file).as_bytes());
        }
    }
    repository.ingest("tree", &tar.finish(), &[]).unwrap();
    repository
}

/// A mount on an empty cache.
fn mount(repository: &Published, option: &str) -> Mount {
    let config = repository.client_config().unwrap();
    let cache = format!("CVMFS_CACHE_BASE={}", repository.scratch().join(option).display());
    MountBuilder::new(&repository.fqrn, &config).option(&cache).option(option).mount().unwrap()
}

/// Reads a file and compares it with what was published.
fn read(mount: &Mount, directory: usize, file: usize) {
    let found = std::fs::read(mount.path().join("tree").join(path(directory, file))).unwrap();
    assert!(found == content(directory, file).as_bytes(), "{}", path(directory, file));
}

fn count(mount: &Mount, name: &str) -> u64 {
    mount.status().unwrap()[name].as_u64().unwrap()
}

#[test]
fn a_program_that_reads_files_in_their_order_gets_the_next_ones_before_it_asks() {
    let repository = publish();
    for profile in ["passthrough", "no_open"] {
        let mount = mount(&repository, &format!("CVMFS_FUSE_PROFILE={profile}"));
        for directory in 0..DIRECTORIES {
            (0..FILES).for_each(|file| read(&mount, directory, file));
        }
        let ahead = count(&mount, "fetched_ahead");
        assert!(ahead > (DIRECTORIES * FILES) as u64 / 2, "{profile}: {ahead} files ahead");
        let requests = count(&mount, "requests");
        // Once more: everything is in the cache, so nothing is fetched, ahead or not.
        for directory in 0..DIRECTORIES {
            (0..FILES).for_each(|file| read(&mount, directory, file));
        }
        assert_eq!(count(&mount, "requests"), requests);
        assert!(
            requests <= (DIRECTORIES * FILES) as u64 + 20,
            "each file is fetched once: {requests} requests"
        );
    }
}

#[test]
fn nothing_is_fetched_ahead_of_a_reader_without_order_nor_where_it_is_switched_off() {
    let repository = publish();
    for (setting, step) in [("32", 37), ("0", 1)] {
        let mount = mount(&repository, &format!("CVMFS_FILES_AHEAD={setting}"));
        (0..FILES).for_each(|number| read(&mount, 0, number * step % FILES));
        assert_eq!(count(&mount, "fetched_ahead"), 0);
    }
}
