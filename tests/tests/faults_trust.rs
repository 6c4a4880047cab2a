//! Faults around trust and revisions, seen through a real mount: what readers notice when a repository changes, is
//! blacklisted, vanishes or is protected.

#![allow(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use common::assert_says;
use testkit::process::{Finished, run};
use testkit::tar::TarBuilder;
use testkit::{Mount, MountBuilder, Published};

/// A repository of the publisher's with one file `/data/file`, and its mount.
struct Site {
    repository: Published,
    mount: Mount,
}

impl Site {
    fn new(fqrn: &str) -> Self {
        let repository = Published::create(fqrn).unwrap();
        publish(&repository, 1);
        let mount = mount(&repository, &[]);
        Self { repository, mount }
    }

    fn file(&self) -> std::path::PathBuf {
        self.mount.path().join("data/file")
    }

    /// What `cvmfs-client talk` answers.
    fn talk(&self, command: &str) -> Finished {
        let mut talk = Command::new(testkit::binary("cvmfs-client"));
        talk.args(["talk", &self.repository.fqrn]).args(command.split(' '));
        run(talk, Duration::from_secs(60)).unwrap()
    }

    fn update(&self, version: usize) {
        publish(&self.repository, version);
        assert_eq!(self.talk("remount sync").stdout.trim(), "New revision applied");
    }
}

fn mount(repository: &Published, options: &[&str]) -> Mount {
    let builder = MountBuilder::new(&repository.fqrn, &repository.client_config().unwrap());
    options.iter().fold(builder, |builder, option| builder.option(option)).mount().unwrap()
}

/// All versions have the same length and the same time, so that nothing but the content tells them apart.
fn content(version: usize) -> Vec<u8> {
    format!("{version:08}").repeat(50_000).into_bytes()
}

fn publish(repository: &Published, version: usize) {
    let archive =
        TarBuilder::new().directory("data", 0o755).file("data/file", 0o644, &content(version)).finish();
    repository.ingest("/", &archive, &[]).unwrap();
}

#[test]
fn row_43_an_open_file_keeps_its_revision_and_a_new_open_sees_the_new_one() {
    let site = Site::new("row43.example.org");
    let mut opened = std::fs::File::open(site.file()).unwrap();
    // Half of it is in the page cache of the old revision, half is not.
    let mut half = vec![0; 200_000];
    std::io::Read::read_exact(&mut opened, &mut half).unwrap();
    site.update(2);
    assert_eq!(std::fs::read(site.file()).unwrap(), content(2), "a new open");
    std::io::Read::read_to_end(&mut opened, &mut half).unwrap();
    assert_eq!(half, content(1), "an open file");
    site.update(3);
    assert_eq!(std::fs::read(site.file()).unwrap(), content(3));
    drop(opened);
    assert_eq!(site.mount.status().unwrap()["io_errors"], 0);
}

#[test]
fn row_43_readers_of_quick_updates_see_one_revision_each() {
    const UPDATES: usize = 20;
    let site = Site::new("row43b.example.org");
    let versions: Vec<Vec<u8>> = (1..=UPDATES + 1).map(content).collect();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut last = 0;
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    let read = std::fs::read(site.file()).unwrap();
                    let version = versions.iter().position(|version| *version == read);
                    let version = version.expect("exactly one of the published versions");
                    assert!(version >= last, "revision {version} after {last}");
                    last = version;
                }
            });
        }
        for version in 2..=UPDATES + 1 {
            site.update(version);
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert_eq!(std::fs::read(site.file()).unwrap(), *versions.last().unwrap());
    assert_eq!(site.mount.status().unwrap()["io_errors"], 0);
}

/// A process that maps a file and tells the checksum of the mapping whenever it is asked.
struct Mapper {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

const MAPPER: &str = "
import hashlib, mmap, os, sys
file = os.open(sys.argv[1], os.O_RDONLY)
mapping = mmap.mmap(file, 0, prot=mmap.PROT_READ)
for line in sys.stdin:
    mapping.madvise(mmap.MADV_DONTNEED)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    print(hashlib.sha256(mapping).hexdigest(), flush=True)
";

impl Mapper {
    fn start(file: &Path) -> Self {
        let mut child = Command::new("/usr/bin/python3")
            .args(["-c", MAPPER])
            .arg(file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, input, output }
    }

    fn checksum(&mut self) -> String {
        writeln!(self.input).unwrap();
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }
}

impl Drop for Mapper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn row_44_mappings_of_a_library_that_is_replaced_never_mix_its_versions() {
    use sha2::Digest;
    let checksum = |version| hex::encode(sha2::Sha256::digest(content(version)));
    let site = Site::new("row44.example.org");
    // Processes that started before, between and after the updates, all of them asked after each update.
    let mut mappers: Vec<(usize, Mapper)> = Vec::new();
    for version in 1..=4 {
        if version > 1 {
            site.update(version);
        }
        mappers.extend((0..6).map(|_| (version, Mapper::start(&site.file()))));
        for _ in 0..2 {
            for (mapped, mapper) in &mut mappers {
                assert_eq!(mapper.checksum(), checksum(*mapped), "mapped as version {mapped}, now {version}");
            }
        }
    }
}

#[test]
fn row_40_a_link_to_itself_and_one_with_an_unset_variable_end() {
    let repository = Published::create("row40.example.org").unwrap();
    let archive = TarBuilder::new()
        .symlink("loop", "loop")
        .symlink("unset", "a$(CVMFS_NO_SUCH_VARIABLE)b")
        .symlink("default", "$(CVMFS_NO_SUCH_VARIABLE:-here)")
        .finish();
    repository.ingest("/", &archive, &[]).unwrap();
    let mount = mount(&repository, &[]);
    let error = std::fs::metadata(mount.path().join("loop")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
    let target = |name: &str| std::fs::read_link(mount.path().join(name)).unwrap();
    assert_eq!((target("unset"), target("default")), ("ab".into(), "here".into()));
}

#[test]
fn row_30_a_revision_that_is_blacklisted_while_mounted_is_closed_until_a_newer_one_is_published() {
    let repository = Published::create("row30.example.org").unwrap();
    publish(&repository, 1);
    let blacklist = repository.scratch().join("blacklist");
    let site = Site {
        mount: mount(&repository, &[&format!("CVMFS_BLACKLIST={}", blacklist.display())]),
        repository,
    };
    std::fs::metadata(site.file()).unwrap();
    let revision = site.mount.status().unwrap()["revision"].as_u64().unwrap();
    std::fs::write(&blacklist, format!("<{} {}\n", site.repository.fqrn, revision + 1)).unwrap();
    assert_says(&site.talk("remount sync").stdout, &["Failed"]);
    let error = std::fs::read(site.file()).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert_says(&site.mount.log_text(), &["is blacklisted"]);
    site.update(2);
    assert_eq!(std::fs::read(site.file()).unwrap(), content(2));
}

#[test]
fn row_45_a_repository_that_vanishes_is_served_from_the_cache_with_a_warning() {
    let site = Site::new("row45.example.org");
    assert_eq!(std::fs::read(site.file()).unwrap(), content(1));
    std::fs::remove_dir_all(&site.repository.storage).unwrap();
    std::fs::create_dir(&site.repository.storage).unwrap();
    assert_says(&site.talk("remount sync").stdout, &["Failed"]);
    assert_eq!(std::fs::read(site.file()).unwrap(), content(1));
    let status = site.mount.status().unwrap();
    assert_eq!(status["online"], false, "{status}");
    site.mount.unmount().unwrap();
    let again = mount(&site.repository, &[]);
    assert_eq!(std::fs::read(again.path().join("data/file")).unwrap(), content(1), "also after a new mount");
}

/// Puts a membership requirement into the root catalog of a repository and signs it again.
const PROTECT: &str = "
import hashlib, os, sqlite3, sys, tempfile, zlib
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding
storage, key, requirement = sys.argv[1:]
def path(text): return os.path.join(storage, 'data', text[:2], text[2:] + 'C')
manifest = open(os.path.join(storage, '.cvmfspublished'), 'rb').read()
lines = manifest.split(b'\\n--\\n')[0].decode().split('\\n')
old = next(line[1:] for line in lines if line[0] == 'C')
with tempfile.NamedTemporaryFile() as file:
    file.write(zlib.decompress(open(path(old), 'rb').read())); file.flush()
    with sqlite3.connect(file.name) as database:
        database.execute(\"INSERT OR REPLACE INTO properties VALUES ('voms_authz', ?)\", [requirement])
    stored = zlib.compress(open(file.name, 'rb').read())
new = hashlib.sha1(stored).hexdigest()
os.makedirs(os.path.dirname(path(new)), exist_ok=True)
open(path(new), 'wb').write(stored)
lines = ['C' + new if line[0] == 'C' else 'S' + str(int(line[1:]) + 1) if line[0] == 'S' else line for line in lines]
text = ('\\n'.join(lines) + '\\n').encode()
digest = hashlib.sha1(text).hexdigest().encode()
private = serialization.load_pem_private_key(open(key, 'rb').read(), None)
signature = private.sign(digest, padding.PKCS1v15(), hashes.SHA1())
open(os.path.join(storage, '.cvmfspublished'), 'wb').write(text + b'--\\n' + digest + b'\\n' + signature)
";

/// A helper that knows user 1000 as a member, and says so for every session.
const HELPER: &str = "#!/usr/bin/python3
import json, struct, sys
def receive():
    version, length = struct.unpack('=II', sys.stdin.buffer.read(8))
    return json.loads(sys.stdin.buffer.read(length))['cvmfs_authz_v1']
def send(**fields):
    text = json.dumps({'cvmfs_authz_v1': fields}).encode()
    sys.stdout.buffer.write(struct.pack('=II', 1, len(text)) + text)
    sys.stdout.buffer.flush()
receive()
send(msgid=1, revision=0)
while True:
    question = receive()
    if question['msgid'] == 4: break
    send(msgid=3, revision=0, status=0 if question['uid'] == 1000 else 3, ttl=60)
";

#[test]
fn a_protected_repository_is_open_to_whom_the_helper_admits_and_to_root() {
    let repository = Published::create("protected.example.org").unwrap();
    publish(&repository, 1);
    let mut protect = Command::new("/usr/bin/python3");
    let key = repository.keys.join(format!("{}.key", repository.fqrn));
    protect.args(["-c", PROTECT]).arg(&repository.storage).arg(key).arg("story%/members");
    run(protect, Duration::from_secs(30)).unwrap().success().unwrap();
    let helper = repository.scratch().join("cvmfs_story_helper");
    std::fs::write(&helper, HELPER).unwrap();
    std::fs::set_permissions(&helper, std::fs::Permissions::from_mode(0o755)).unwrap();
    let search = format!("CVMFS_AUTHZ_SEARCH_PATH={}", repository.scratch().display());
    // The kernel asks for attributes anew each time, as it would after the usual minute.
    let mount = mount(&repository, &[&search, "CVMFS_KCACHE_TIMEOUT=0"]);
    let file = mount.path().join("data/file");
    let as_user = |uid: u32, program: &str| {
        let mut command = Command::new("setpriv");
        command.args([
            &format!("--reuid={uid}"),
            "--regid=1000",
            "--clear-groups",
            "setsid",
            "--wait",
            program,
        ]);
        command.arg(&file);
        run(command, Duration::from_secs(30)).unwrap()
    };
    assert_eq!(std::fs::read(&file).unwrap(), content(1), "root");
    assert_eq!(as_user(1000, "cat").success().unwrap().into_bytes(), content(1), "a member");
    for program in ["cat", "stat"] {
        let refused = as_user(1001, program);
        assert!(!refused.status.success(), "{program}");
        assert_says(&refused.stderr, &["Permission denied"]);
    }
    assert_says(&mount.log_text(), &["not a member"]);
}
