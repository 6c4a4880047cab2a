//! A mount that moves from revision to revision: what the kernel remembered is right again at
//! once, and open files stay what they were.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use common::{Mounted, Prepared, kill_worker};
use testkit::{TreeEntry, compare, walk_tree};

/// The tags of the fixture with a ground truth of their own, in the order of a walk that
/// also goes back.
const WALK: [&str; 5] = ["v1", "v2", "v3", "v5", "v1"];

struct History {
    mounted: Mounted,
    environment: Vec<(&'static str, String)>,
}

impl History {
    /// Mounts the first revision for a kernel that remembers names for an hour.
    fn mount(kernel: Option<&str>, options: &str) -> History {
        let prepared = Prepared::new("history");
        let environment: Vec<_> =
            kernel.map(|minor| ("CVMFS_FUSE_TEST_KERNEL", minor.to_owned())).into_iter().collect();
        let history = History { mounted: prepared.0, environment };
        let root = history.root_of("v1");
        let options = format!("CVMFS_KCACHE_TIMEOUT=3600,CVMFS_ROOT_HASH={root}{options}");
        let output = common::mount_with(&history.mounted, &options, &history.environment);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        history
    }

    fn root_of(&self, tag: &str) -> String {
        let tags = fs::read_to_string(self.mounted.fixture.root().join("tags.txt")).unwrap();
        let line = tags.lines().find(|line| line.split(' ').next() == Some(tag)).unwrap();
        line.split(' ').nth(1).unwrap().to_owned()
    }

    fn truth(&self, tag: &str) -> Vec<TreeEntry> {
        let name = if tag == "v5" { "manifest.jsonl".into() } else { format!("manifest-{tag}.jsonl") };
        let file = fs::File::open(self.mounted.fixture.root().join(name)).unwrap();
        testkit::tree::read_manifest(file).unwrap()
    }

    fn move_to(&self, tag: &str) {
        assert_eq!(self.mounted.talk(&format!("chroot {}", self.root_of(tag))), "OK");
    }

    /// The kernel learns every name of every revision: what it is, or that it is not there.
    fn ask_for_all_names(&self) {
        for tag in WALK {
            for entry in self.truth(tag) {
                let path = Path::new(&entry.path);
                let _ = fs::symlink_metadata(self.path(path));
            }
        }
    }

    fn path(&self, inside: impl AsRef<Path>) -> std::path::PathBuf {
        self.mounted.mountpoint.join(inside.as_ref().strip_prefix("/").unwrap_or(inside.as_ref()))
    }

    fn shows(&self, tag: &str) {
        let differences = compare(&self.truth(tag), &walk_tree(&self.mounted.mountpoint));
        assert!(differences.is_empty(), "{tag}: {differences:#?}");
    }

    /// A regular file that has other content in another revision: path, and both sizes.
    fn changing_file(&self, from: &str, to: &str) -> String {
        let (before, after) = (self.truth(from), self.truth(to));
        let changed = before.iter().find(|one| {
            one.sha256.is_some()
                && one.size > Some(0)
                && after.iter().any(|other| other.path == one.path && other.sha256 != one.sha256)
        });
        changed.expect("a file changes").path.to_str().unwrap().to_owned()
    }
}

fn moves_without_a_trace(kernel: Option<&str>, options: &str) {
    let history = History::mount(kernel, options);
    for tag in WALK {
        history.move_to(tag);
        history.shows(tag);
        history.ask_for_all_names();
    }
}

#[test]
fn this_kernel_shows_each_revision_at_once() {
    moves_without_a_trace(None, "");
}

#[test]
fn a_kernel_that_can_expire_entries_shows_each_revision_at_once() {
    moves_without_a_trace(Some("38"), "");
}

#[test]
fn an_old_kernel_shows_each_revision_at_once() {
    moves_without_a_trace(Some("31"), "");
}

#[test]
fn reads_through_the_client_show_each_revision_at_once() {
    moves_without_a_trace(Some("36"), ",CVMFS_FUSE_PROFILE=plain");
}

#[test]
fn a_file_that_is_open_keeps_its_revision_also_with_another_worker() {
    for profile in ["passthrough", "plain"] {
        let history = History::mount(None, &format!(",CVMFS_FUSE_PROFILE={profile}"));
        let path = history.path(history.changing_file("v1", "v2"));
        let held = fs::File::open(&path).unwrap();
        let size = held.metadata().unwrap().size();
        let content = fs::read(&path).unwrap();
        for tag in ["v2", "v3"] {
            history.move_to(tag);
            let mut again = vec![0; content.len()];
            held.read_exact_at(&mut again, 0).unwrap();
            assert!(again == content, "{profile} {tag}: the open file changed");
            assert!(
                fs::read(&path).ok().as_ref() != Some(&content),
                "{profile} {tag}: a new open sees the old file"
            );
        }
        kill_worker(&history.mounted);
        let mut again = vec![0; content.len()];
        held.read_exact_at(&mut again, 0).unwrap();
        assert!(again == content, "{profile}: the open file changed with the worker");
        assert_eq!(held.metadata().unwrap().size(), size);
        history.shows("v3");
    }
}
