//! Tests on another kernel than the machine's: Debian's, in a virtual machine.
//!
//! Debian 12 has Linux 6.1: no FUSE passthrough, no id-mapped FUSE, layers of overlays as strings, and what the tests of
//! limits need, xfs and ext4 with project quotas. The machine starts from a disk image with the test programs of this
//! build at the very paths where they were built, runs them, and tells the outcome on its console. It is emulated, which
//! takes some minutes; KVM does not work in every machine that is virtual itself.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use testkit::process::Service;
use testkit::workspace_root;

use crate::build::cargo;
use crate::test::{Total, parse_result};

/// The kernel of Debian for virtual machines.
const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";
const PACKAGES: [&str; 7] =
    ["qemu-system-x86", "xfsprogs", "e2fsprogs", "kmod", "busybox-static", "binutils", "cpio"];

/// What the machine needs before it has its disks, and what the tests need.
const EARLY_MODULES: [&str; 2] = ["virtio_pci", "virtio_blk"];
const MODULES: [&str; 8] = ["ext4", "xfs", "quota_v2", "overlay", "fuse", "loop", "virtio_pci", "virtio_blk"];

/// Package, test program, and whether those tests run, too, that are ignored elsewhere.
const PROGRAMS: [(&str, &str, bool); 7] = [
    ("cvmfs-fuse", "mount", false),
    ("cvmfs-fuse", "takeover", false),
    ("cvmfs-fuse", "revisions", false),
    ("graphdriver", "limits", true),
    ("graphdriver", "protocol", false),
    ("graphdriver", "restarts", false),
    ("graphdriver", "thin_layers", false),
];
/// Tests that need a command that is not there, a machine as quick as a real one, or reads that pass through and can
/// be interrupted.
const SKIPPED: [&str; 7] = [
    WITHOUT_QUOTAS.1,
    "process_1_starts",
    "kill_9_at_any_moment",
    "a_protected_attribute",
    "reads_go_by_passthrough",
    "row_66_a_reader_that",
    "row_66_a_signal_that",
];
/// A test for a file system that was mounted without quotas, of the program before.
const WITHOUT_QUOTAS: (&str, &str) = ("limits", "quotas_that_only_count");
/// Those that run once more with their directories on ext4.
const ON_EXT4: [&str; 1] = ["limits"];

/// Commands that the tests start.
const COMMANDS: [&str; 16] = [
    "sh",
    "switch_root",
    "ifconfig",
    "tar",
    "gzip",
    "mount",
    "umount",
    "mkdir",
    "cat",
    "cp",
    "rm",
    "sleep",
    "true",
    "poweroff",
    "insmod",
    "timeout",
];
/// Emulated, all of it takes longer than anybody waits.
const MOST_TIME: Duration = Duration::from_secs(1800);
const DISK_BYTES: u64 = 4 << 30;
const MEMORY: &str = "3072";
/// Ends the output of a run that came to its end.
const FAILED: &str = "== FAILED:";
const DONE: &str = "== all programs have run";

/// Runs the tests and prints the total as the last line; an error if any failed.
pub fn run(kvm: bool) -> Result<()> {
    let total = tests(kvm)?;
    println!("{} passed, {} failed", total.passed, total.failed);
    ensure!(total.failed == 0, "tests failed on the other kernel");
    Ok(())
}

/// Runs the tests; their output goes through.
pub fn tests(kvm: bool) -> Result<Total> {
    testkit::install(&PACKAGES)?;
    let directory = workspace_root().join("target/kernel");
    fs::create_dir_all(&directory)?;
    let kernel = Kernel::fetch(&directory)?;
    println!("== kernel: {}", kernel.version);
    let programs = programs()?;
    let disks = Disks::make(&directory, &kernel, &programs)?;
    boot(&kernel, &disks, &directory, kvm)
}

struct Kernel {
    root: PathBuf,
    version: String,
}

impl Kernel {
    /// Fetches the newest kernel, unless it is there, and unpacks it.
    fn fetch(directory: &Path) -> Result<Kernel> {
        let depends = output(Command::new("apt-cache").args(["depends", KERNEL_PACKAGE]))?;
        let package =
            depends.lines().find_map(|line| line.trim().strip_prefix("Depends: ")).context("no kernel")?;
        let version =
            package.strip_prefix("linux-image-").context("no version in the kernel's name")?.to_owned();
        let root = directory.join(&version);
        if !root.join("boot").is_dir() {
            let unpacked = directory.join("unpacked");
            testkit::scratch::remove(&unpacked);
            succeed(Command::new("apt-get").args(["download", "-q", package]).current_dir(directory))?;
            let archive = fs::read_dir(directory)?
                .filter_map(|entry| Some(entry.ok()?.path()))
                .find(|path| {
                    let name = path.file_name().unwrap_or_default().to_string_lossy();
                    name.starts_with(package) && name.ends_with(".deb")
                })
                .context("apt-get has downloaded nothing")?;
            succeed(Command::new("dpkg").arg("-x").arg(&archive).arg(&unpacked))?;
            succeed(Command::new("depmod").arg("-b").arg(&unpacked).arg(&version))?;
            fs::remove_file(archive)?;
            fs::rename(unpacked, &root)?;
        }
        Ok(Kernel { root, version })
    }

    fn image(&self) -> PathBuf {
        self.root.join("boot").join(format!("vmlinuz-{}", self.version))
    }

    /// The files of modules with those that they need, in the order in which they are loaded. What is built into the
    /// kernel has none.
    fn files_of(&self, modules: &[&str]) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for module in modules {
            let mut show = Command::new("modprobe");
            show.arg("-d").arg(&self.root).args(["-S", &self.version, "--show-depends", module]);
            for line in output(&mut show)?.lines() {
                if let Some(file) = line.strip_prefix("insmod ") {
                    files.push(PathBuf::from(file.split_whitespace().next().unwrap_or_default()));
                }
            }
        }
        let mut seen = BTreeSet::new();
        files.retain(|file| seen.insert(file.clone()));
        Ok(files)
    }
}

/// Test programs of this build by name.
fn programs() -> Result<Vec<(&'static str, bool, PathBuf)>> {
    let status =
        cargo(&["build", "--quiet", "--workspace", "--all-targets"]).status().context("cannot run cargo")?;
    ensure!(status.success(), "the tests do not build");
    let mut list = cargo(&["test", "--quiet", "--workspace", "--no-run", "--message-format=json"]);
    let messages = output(&mut list)?;
    let find = |package: &str, name: &str| {
        messages.lines().find_map(|line| {
            let message: serde_json::Value = serde_json::from_str(line).ok()?;
            let is_it = message["target"]["name"] == name
                && message["target"]["kind"][0] == "test"
                && message["manifest_path"].as_str()?.ends_with(&format!("/{package}/Cargo.toml"));
            is_it.then(|| message["executable"].as_str().map(PathBuf::from)).flatten()
        })
    };
    let program = |&(package, name, ignored): &(&str, &'static str, bool)| {
        Ok((name, ignored, find(package, name).with_context(|| format!("no test program {name}"))?))
    };
    PROGRAMS.iter().map(program).collect()
}

struct Disks {
    initial: PathBuf,
    root: PathBuf,
    xfs: PathBuf,
    ext4: PathBuf,
}

impl Disks {
    fn make(directory: &Path, kernel: &Kernel, programs: &[(&str, bool, PathBuf)]) -> Result<Disks> {
        let disks = Disks {
            initial: directory.join("initial"),
            root: directory.join("root.disk"),
            xfs: directory.join("xfs.disk"),
            ext4: directory.join("ext4.disk"),
        };
        let staging = directory.join("staging");
        testkit::scratch::remove(&staging);
        disks.make_initial(&staging.join("initial"), kernel)?;
        disks.make_root(&staging.join("root"), kernel, programs)?;
        empty(&disks.xfs)?;
        succeed(Command::new("mkfs.xfs").args(["-q", "-f"]).arg(&disks.xfs))?;
        empty(&disks.ext4)?;
        succeed(
            Command::new("mkfs.ext4")
                .args(["-q", "-O", "quota,project", "-E", "quotatype=prjquota"])
                .arg(&disks.ext4),
        )?;
        testkit::scratch::remove(&staging);
        Ok(disks)
    }

    /// The first root: loads what the disk needs, and changes over to it.
    fn make_initial(&self, staging: &Path, kernel: &Kernel) -> Result<()> {
        base(staging)?;
        let mut script = "#!/bin/sh\nmount -t devtmpfs none /dev\n".to_owned();
        for file in kernel.files_of(&EARLY_MODULES)? {
            let name = file.file_name().context("a module has a name")?;
            fs::copy(&file, staging.join(name))?;
            script.push_str(&format!("insmod /{}\n", name.to_string_lossy()));
        }
        script.push_str("mount -t ext4 /dev/vda /mnt\nmount -t devtmpfs none /mnt/dev\nexec switch_root /mnt /run-tests\n");
        program(&staging.join("init"), &script)?;
        let pack = format!("find . | cpio --quiet -o -H newc >'{}'", self.initial.display());
        succeed(Command::new("sh").args(["-c", &pack]).current_dir(staging))
    }

    /// The root of the tests: the programs where they were built, and a few commands.
    fn make_root(&self, staging: &Path, kernel: &Kernel, programs: &[(&str, bool, PathBuf)]) -> Result<()> {
        base(staging)?;
        let workspace = workspace_root();
        let scratch = workspace.join("target/tmp");
        let inside = |path: &Path| staging.join(path.strip_prefix("/").unwrap_or(path));
        let binaries = testkit::binary::binary_directory();
        for directory in [scratch.clone(), binaries.join("../tmp")] {
            fs::create_dir_all(inside(&directory))?;
        }
        let copied = programs.iter().map(|(_, _, path)| path.clone());
        for path in copied
            .chain(["cvmfs-client", "cvmfs-graphdriver", "cvmfs-publish"].map(|name| binaries.join(name)))
        {
            let target = inside(&path);
            fs::create_dir_all(target.parent().context("a program lies in a directory")?)?;
            succeed(Command::new("strip").arg("-o").arg(&target).arg(&path))?;
        }
        for directory in
            [workspace.join("tests/fixtures"), workspace.join("crates/graphdriver/tests/recorded")]
        {
            fs::create_dir_all(inside(&directory))?;
            succeed(Command::new("cp").arg("-rL").arg(directory.join(".")).arg(inside(&directory)))?;
        }
        let mut script = format!(
            "#!/bin/sh\nmount -t proc none /proc\nmount -t sysfs none /sys\nmount -t tmpfs none /tmp\nmount -t tmpfs none /run\n\
             mkdir -p /dev/shm\nmount -t tmpfs none /dev/shm\nexport PATH=/bin RUST_TEST_THREADS=3\nifconfig lo 127.0.0.1 up\ncd {}\n",
            workspace.display()
        );
        for file in kernel.files_of(&MODULES)? {
            let name = file.file_name().context("a module has a name")?;
            fs::copy(&file, staging.join("lib").join(name))?;
            // What the first root needed is loaded already.
            script.push_str(&format!("insmod /lib/{} 2>/dev/null\n", name.to_string_lossy()));
        }
        let step = |name: &str, ignored: bool, path: &Path, place: &str| {
            let mut options: String = SKIPPED.iter().map(|name| format!(" --skip {name}")).collect();
            options.push_str(if ignored { " --include-ignored" } else { "" });
            format!(
                "echo '== {name} on {place}'\ntimeout 900 {}{options} </dev/null 2>&1 || echo '{FAILED} {name}'\n",
                path.display()
            )
        };
        let mounted = |kind: &str, disk: &str| {
            format!("mount -t {kind} -o prjquota {disk} {} || echo '{FAILED} {kind}'\n", scratch.display())
        };
        script.push_str(&mounted("xfs", "/dev/vdb"));
        script.extend(programs.iter().map(|(name, ignored, path)| step(name, *ignored, path, "xfs")));
        script.push_str(&format!("umount {} || echo '{FAILED} umount'\n", scratch.display()));
        script.push_str(&mounted("ext4", "/dev/vdc"));
        let again = programs.iter().filter(|(name, ..)| ON_EXT4.contains(name));
        script.extend(again.map(|(name, ignored, path)| step(name, *ignored, path, "ext4")));
        script.push_str(&format!(
            "umount {0} || echo '{FAILED} umount'\nmount -t ext4 /dev/vdc {0} || echo '{FAILED} ext4'\n",
            scratch.display()
        ));
        let (program_without, test) = WITHOUT_QUOTAS;
        let path = programs.iter().find(|(name, ..)| *name == program_without).map(|(.., path)| path);
        let path = path.context("the program is not among the others")?;
        script.push_str(&format!(
            "{} --ignored {test} </dev/null 2>&1 || echo '{FAILED} {test}'\n",
            path.display()
        ));
        script.push_str(&format!("echo '{DONE}'\npoweroff -f\n"));
        program(&staging.join("run-tests"), &script)?;
        empty(&self.root)?;
        succeed(Command::new("mkfs.ext4").arg("-q").arg("-d").arg(staging).arg(&self.root))
    }
}

/// Directories and commands of a root.
fn base(staging: &Path) -> Result<()> {
    for directory in
        ["bin", "dev", "proc", "sys", "tmp", "run", "mnt", "lib", "etc", "root", "var/lib", "usr"]
    {
        fs::create_dir_all(staging.join(directory))?;
    }
    fs::copy("/bin/busybox", staging.join("bin/busybox")).context("busybox is missing")?;
    for command in COMMANDS {
        symlink("busybox", staging.join("bin").join(command))?;
    }
    fs::write(staging.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")?;
    fs::write(staging.join("etc/group"), "root:x:0:\n")?;
    Ok(symlink("../bin", staging.join("usr/bin"))?)
}

fn program(path: &Path, script: &str) -> Result<()> {
    fs::write(path, script)?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

fn empty(disk: &Path) -> Result<()> {
    Ok(fs::File::create(disk)?.set_len(DISK_BYTES)?)
}

/// Starts the machine and counts what its tests say.
fn boot(kernel: &Kernel, disks: &Disks, directory: &Path, kvm: bool) -> Result<Total> {
    let started = Instant::now();
    let mut machine = Command::new("qemu-system-x86_64");
    let accelerator = if kvm { "kvm" } else { "tcg,thread=multi" };
    machine.args(["-accel", accelerator, "-cpu", "max", "-smp", "2", "-m", MEMORY]);
    machine.args(["-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"]);
    machine.arg("-kernel").arg(kernel.image()).arg("-initrd").arg(&disks.initial);
    machine.args(["-append", "console=ttyS0 panic=-1 quiet"]);
    for disk in [&disks.root, &disks.xfs, &disks.ext4] {
        machine.arg("-drive").arg(format!("file={},if=virtio,format=raw,cache=unsafe", disk.display()));
    }
    let log = directory.join("console.log");
    testkit::scratch::remove_any(&log)?;
    let service = Service::start("machine", machine, &log)?;
    let mut console = BufReader::new(fs::File::open(&log)?);
    let (mut total, mut is_done) = (Total::default(), false);
    let mut line = Vec::new();
    loop {
        let was_running = testkit::process::is_alive(service.pid());
        while console.read_until(b'\n', &mut line)? > 0 {
            if line.last() != Some(&b'\n') && was_running {
                // The rest of the line comes later.
                break;
            }
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            line.clear();
            println!("{text}");
            if let Some(counts) = parse_result(&text) {
                total.add(counts);
            }
            if text.starts_with(FAILED) && total.failed == 0 {
                total.failed += 1;
            }
            is_done |= text == DONE;
        }
        if !was_running {
            break;
        }
        testkit::interrupt::check()?;
        ensure!(started.elapsed() < MOST_TIME, "the machine is not done after {} s", MOST_TIME.as_secs());
        std::thread::sleep(Duration::from_millis(200));
    }
    if !is_done {
        bail!("the machine ended before its tests; see {}", log.display());
    }
    println!(
        "== kernel {}: {} passed, {} failed ({:.1} s)",
        kernel.version,
        total.passed,
        total.failed,
        started.elapsed().as_secs_f64()
    );
    Ok(total)
}

fn output(command: &mut Command) -> Result<String> {
    let described = testkit::process::describe(command);
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run {described}"))?;
    ensure!(output.status.success(), "{described} failed");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn succeed(command: &mut Command) -> Result<()> {
    output(command).map(drop)
}
