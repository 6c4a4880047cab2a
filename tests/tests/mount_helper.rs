//! `mount -t cvmfs`, fstab and autofs mount repositories through the helper, as with the C++ client.
//!
//! Each story runs as a script in a mount namespace of its own, in which `/sbin` has the helper, `/etc` a
//! configuration and `/run` nothing: the machine and other tests see none of it.

#![allow(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use testkit::process::{Finished, run};
use testkit::published::EtcCvmfs;
use testkit::tar::TarBuilder;
use testkit::{Fixture, Origin, Published, ScratchDir, binary, install};

const FQRN: &str = "basic-sha1.peer.example.org";

/// A node with one configured repository.
struct Node {
    directory: ScratchDir,
    etc: EtcCvmfs,
    _fixture: Fixture,
    origin: Option<Origin>,
}

impl Node {
    fn new() -> Self {
        let directory = ScratchDir::new("node").unwrap();
        for name in ["sbin", "mnt", "mnt2"] {
            std::fs::create_dir(directory.path().join(name)).unwrap();
        }
        symlink(binary("cvmfs-client"), directory.path().join("sbin/mount.cvmfs")).unwrap();
        symlink(binary("cvmfs-client"), directory.path().join("sbin/auto.cvmfs")).unwrap();
        let etc = EtcCvmfs::create(&directory.path().join("etc/cvmfs")).unwrap();
        let fixture = Fixture::unpack("basic-sha1").unwrap();
        let origin = Origin::serve(&fixture.storage).unwrap();
        etc.add(FQRN, &origin.url(), &fixture.master_pub).unwrap();
        let node = Self { directory, etc, _fixture: fixture, origin: Some(origin) };
        node.set(&format!("CVMFS_CACHE_BASE={}", node.path("cache").display()));
        node.set("CVMFS_DEFAULT_DOMAIN=peer.example.org");
        node
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Adds a line to `default.local`.
    fn set(&self, line: &str) {
        append(&self.etc.path().join("default.local"), line);
    }

    /// Runs a script; whatever it mounted at `$M` is unmounted at its end.
    fn run(&self, script: &str) -> Finished {
        let text = format!(
            "M={mnt} N={mnt2} D={directory}\n\
             end() {{ set +e; umount -l $M $N 2>/dev/null; test -z \"$A\" || kill $A; }}\n\
             trap end EXIT\n\
             mount -t overlay overlay -o lowerdir=$D/sbin:/usr/sbin /usr/sbin || exit 99\n\
             mount -t overlay overlay -o lowerdir=$D/etc:/etc /etc || exit 99\n\
             mount -t tmpfs tmpfs /run || exit 99\n\
             {script}\n",
            mnt = self.path("mnt").display(),
            mnt2 = self.path("mnt2").display(),
            directory = self.directory.path().display(),
        );
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "bash", "-c", &text]);
        run(command, Duration::from_secs(120)).unwrap()
    }

    #[track_caller]
    fn succeeds(&self, script: &str) -> String {
        let finished = self.run(&format!("set -e\n{script}"));
        finished.success().unwrap()
    }

    #[track_caller]
    fn is_refused(&self, script: &str, code: i32, words: &[&str]) {
        let finished = self.run(script);
        assert_eq!(finished.code(), Some(code), "{script}: {}", finished.output());
        assert_says(&finished.stderr, words);
    }
}

#[track_caller]
fn assert_says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "no {word:?} in:\n{text}");
    }
}

fn append(file: &Path, line: &str) {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    std::fs::write(file, format!("{text}{line}\n")).unwrap();
}

#[test]
fn mount_and_umount_take_a_full_name_a_short_name_and_a_path() {
    let node = Node::new();
    for device in [FQRN, "basic-sha1", "/dev/basic-sha1"] {
        let listed = node.succeeds(&format!("mount -t cvmfs {device} $M\nls $M\numount $M\nls $M"));
        assert_says(&listed, &["README.md"]);
        assert_eq!(listed.matches("README.md").count(), 1, "{listed}");
    }
}

#[test]
fn a_line_of_fstab_is_mounted_with_its_usual_options() {
    let node = Node::new();
    let line = format!(
        "{FQRN} {} cvmfs defaults,_netdev,nodev,nofail,x-systemd.automount 0 0",
        node.path("mnt").display()
    );
    append(&node.path("etc/fstab"), &line);
    assert_says(
        &node.succeeds("mount $M\ngrep $M /proc/self/mountinfo\nls $M"),
        &["fuse.cvmfs", "nosuid", "README.md"],
    );
}

#[test]
fn a_remount_of_what_is_mounted_succeeds_and_of_anything_else_fails() {
    let node = Node::new();
    node.succeeds(&format!("mount -t cvmfs {FQRN} $M\nmount.cvmfs {FQRN} $M -o remount"));
    node.is_refused(&format!("mount.cvmfs {FQRN} $M -o remount"), 1, &["is not mounted on"]);
    node.is_refused(
        &format!("mount -t cvmfs {FQRN} $M && mount -t cvmfs {FQRN} $N"),
        1,
        &["is already mounted on", "mnt"],
    );
}

#[test]
fn a_dry_run_checks_and_shows_the_command_and_mounts_nothing() {
    let node = Node::new();
    let shown = node.succeeds("mount.cvmfs -f basic-sha1 $M -o ro\n! grep -q \" $M \" /proc/self/mountinfo");
    assert_says(&shown, &[&format!("cvmfs-client mount {FQRN}"), "-o ro"]);
}

#[test]
fn what_is_wrong_with_the_configuration_is_said_with_code_1_before_anything_is_mounted() {
    let node = Node::new();
    node.is_refused("mount.cvmfs 'a b' $M", 1, &["is not a repository name"]);
    node.is_refused(&format!("mount.cvmfs {FQRN} $M -o nosuchoption"), 1, &["nosuchoption"]);
    node.is_refused(&format!("mount.cvmfs {FQRN}"), 1, &["Usage: mount.cvmfs"]);
    node.is_refused("mount.cvmfs unknown.example.org $M", 1, &["CVMFS_SERVER_URL is not set"]);
    node.is_refused(
        &format!("mount --bind /etc/passwd /dev/fuse; mount.cvmfs {FQRN} $M"),
        1,
        &["FUSE is not available", "modprobe fuse"],
    );
    node.set("CVMFS_STRICT_MOUNT=yes");
    node.is_refused(
        &format!("mount.cvmfs {FQRN} $M"),
        1,
        &["not allowed to mount", "default.local:", "CVMFS_REPOSITORIES"],
    );
    node.set("CVMFS_REPOSITORIES=other,basic-sha1");
    node.succeeds(&format!("mount.cvmfs {FQRN} $M"));
    node.set("CVMFS_HTTP_PROXY=");
    node.is_refused(&format!("mount.cvmfs {FQRN} $M"), 1, &["CVMFS_HTTP_PROXY is not set"]);
}

#[test]
fn a_mount_that_fails_has_code_32_and_the_reason() {
    let mut node = Node::new();
    node.origin = None;
    node.is_refused(&format!("mount -t cvmfs {FQRN} $M"), 32, &[FQRN, "manifest"]);
}

#[test]
fn a_mount_that_another_namespace_keeps_alive_is_attached_to() {
    let node = Node::new();
    let script = format!(
        "mount -t cvmfs {FQRN} $M\n\
         unshare --mount --propagation private bash -ec '\
           umount '$M'; test ! -e '$M'/README.md; mount -t cvmfs {FQRN} '$M'; cat '$M'/README.md; umount '$M\n\
         cat $M/README.md >/dev/null"
    );
    assert!(!node.succeeds(&script).is_empty());
}

#[test]
fn the_processes_get_the_limits_that_the_configuration_asks_for() {
    let node = Node::new();
    for line in
        ["CVMFS_NFILES=3000", "CVMFS_OOM_SCORE_ADJ=123", "CVMFS_CPU_AFFINITY=0", "CVMFS_SYSTEMD_NOKILL=yes"]
    {
        node.set(line);
    }
    let script = format!(
        "ulimit -Sn 1024\nmount -t cvmfs {FQRN} $M\n\
         for p in /proc/[0-9]*; do\n\
           test \"$(readlink $p/ns/mnt)\" = \"$(readlink /proc/$$/ns/mnt)\" || continue\n\
           tr '\\0' ' ' < $p/cmdline | grep '^@cvmfs-' || continue\n\
           cat $p/oom_score_adj; grep -e 'open files' $p/limits; grep Cpus_allowed_list $p/status\n\
         done"
    );
    let text = node.succeeds(&script);
    assert_says(&text, &["@cvmfs-supervisor", "@cvmfs-worker"]);
    assert_eq!(text.matches("\n123\n").count(), 2, "{text}");
    assert_eq!(
        text.matches("Cpus_allowed_list:\t0\n").count() + usize::from(text.ends_with("list:\t0")),
        2,
        "{text}"
    );
    assert_eq!(text.matches("open files            3512 ").count(), 2, "{text}");
}

/// Starts the automounter with the helper's program map, as `/etc/auto.master` would.
const AUTOMOUNTER: &str = "
mkdir /run/at
echo '/run/at program:/usr/sbin/auto.cvmfs' > /run/auto.master
# Its own process group: the automounter never mounts for processes of its group.
setsid automount -f -v -p /run/automount.pid /run/auto.master > /run/automount.log 2>&1 &
until grep -q ' /run/at ' /proc/self/mountinfo && test -s /run/automount.pid; do sleep 0.05; done
A=$(cat /run/automount.pid)
end() {
  set +e
  grep -o ' /run/at/[^ ]*' /proc/self/mountinfo | xargs -r umount -l
  kill $A; cat /run/automount.log >&2
}
";

#[test]
fn autofs_mounts_a_repository_when_somebody_looks_there() {
    install(&["autofs"]).unwrap();
    let node = Node::new();
    let script = format!(
        "{AUTOMOUNTER}
         ls /run/at/{FQRN}
         ! ls /run/at/.Trash 2>/dev/null
         ! ls /run/at/nodot 2>/dev/null
         grep '/run/at/{FQRN}' /proc/self/mountinfo"
    );
    assert_says(&node.succeeds(&script), &["README.md", "fuse.cvmfs"]);
}

#[test]
fn autofs_mounts_the_configuration_repository_first() {
    install(&["autofs"]).unwrap();
    let node = Node::new();
    let shared = Published::create("config.example.org").unwrap();
    let url = node.origin.as_ref().unwrap().url();
    let text = format!("CVMFS_SERVER_URL={url}\n");
    let archive = TarBuilder::new().directory("cvmfs", 0o755).directory("cvmfs/domain.d", 0o755).file(
        "cvmfs/domain.d/peer.example.org.conf",
        0o644,
        text.as_bytes(),
    );
    shared.ingest("/etc", &archive.finish(), &[]).unwrap();
    node.etc.add_published(&shared).unwrap();
    node.set("CVMFS_MOUNT_DIR=/run/at");
    std::fs::create_dir(node.path("etc/cvmfs/default.d")).unwrap();
    append(
        &node.path("etc/cvmfs/default.d/50.conf"),
        "CVMFS_CONFIG_REPOSITORY=config.example.org\nCVMFS_MOUNT_DIR=/run/at",
    );
    // Nothing but the configuration repository knows the servers.
    let local = format!("CVMFS_PUBLIC_KEY=/etc/cvmfs/keys/{FQRN}.pub\n");
    std::fs::write(node.etc.path().join(format!("config.d/{FQRN}.conf")), local).unwrap();
    let listed =
        node.succeeds(&format!("{AUTOMOUNTER}\nls /run/at/{FQRN}\ngrep -c ' /run/at/' /proc/self/mountinfo"));
    assert_says(&listed, &["README.md", "2"]);
}
