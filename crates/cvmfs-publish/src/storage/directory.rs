//! A repository in a directory of a local file system.
//!
//! Every write goes to a temporary file in `data/txn` and is renamed into place, so a
//! killed publisher leaves nothing but files named `publish.…` there, which the next
//! one removes once it holds the lock. Files of that directory with other names belong
//! to other tools and are left alone.
//!
//! The lock is `flock(2)` on `data/txn/publish.lock`: the kernel releases it however
//! the holder ends. `data/txn` must not be served (repository format §1).

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cvmfs_format::ObjectName;
use rustix::fs::FlockOperation;

use super::writeback::Writeback;
use super::{Known, Put, Scratch, Storage, StorageError, StorageLock, StoredObject, read_bounded};

/// Sub-directory for temporary files, on the file system of the objects so that a rename suffices.
const SCRATCH: &str = "data/txn";
/// Begins the name of everything that this publisher keeps in the scratch directory.
const OURS: &str = "publish.";
const LOCK: &str = "publish.lock";
/// What was stored lately ([`Known`]).
const KNOWN: &str = "publish.known";
/// How often a busy lock is tried again: short against any publish, cheap enough to repeat.
const LOCK_POLL: Duration = Duration::from_millis(50);
/// Objects are for everybody: web servers run under another user.
const FILE_MODE: u32 = 0o644;
const DIRECTORY_MODE: u32 = 0o755;
/// The lock file names its holder in a short line; anything longer is not ours.
const MAX_HOLDER: u64 = 256;

/// A repository's storage directory.
#[derive(Debug)]
pub struct Directory {
    root: PathBuf,
    scratch: PathBuf,
    next_temporary: AtomicU64,
    writeback: Writeback,
    known: OnceLock<Option<Known>>,
}

impl Directory {
    /// Opens an existing storage directory.
    pub fn open(root: impl AsRef<Path>) -> Result<Directory, StorageError> {
        let root = root.as_ref();
        if !root.join("data").is_dir() {
            return Err(StorageError::NoStorage { path: root.display().to_string() });
        }
        let storage = Directory {
            root: root.to_owned(),
            scratch: root.join(SCRATCH),
            next_temporary: AtomicU64::new(0),
            writeback: Writeback::of(root).map_err(at("open", root))?,
            known: OnceLock::new(),
        };
        Ok(storage)
    }

    /// Opens a storage directory, making it, `data/00` … `data/ff` and the scratch directory as needed.
    pub fn create(root: impl AsRef<Path>) -> Result<Directory, StorageError> {
        let root = root.as_ref();
        make_directory(root)?;
        make_directory(&root.join("data"))?;
        for byte in 0..=255u8 {
            make_directory(&root.join(format!("data/{byte:02x}")))?;
        }
        make_directory(&root.join(SCRATCH))?;
        Directory::open(root)
    }

    fn temporary(&self) -> PathBuf {
        let number = self.next_temporary.fetch_add(1, Ordering::Relaxed);
        self.scratch.join(format!("{OURS}{}.{number}", std::process::id()))
    }

    /// A temporary file in a directory of the calling thread: threads that make files in one directory wait for each
    /// other.
    fn temporary_of_thread(&self) -> PathBuf {
        static THREADS: AtomicU64 = AtomicU64::new(0);
        thread_local! {
            static THREAD: u64 = THREADS.fetch_add(1, Ordering::Relaxed);
        }
        let number = self.next_temporary.fetch_add(1, Ordering::Relaxed);
        let directory = format!("{OURS}{}.thread{}", std::process::id(), THREAD.with(|thread| *thread));
        self.scratch.join(directory).join(number.to_string())
    }

    /// Writes `content` to a new temporary file, renames it to `target`, and removes it on failure.
    fn place(&self, target: &Path, content: &[u8], durably: bool) -> Result<(), StorageError> {
        let temporary = self.temporary_of_thread();
        let placed = self.write_temporary(&temporary, content, durably).and_then(|()| {
            rename_making_parent(&temporary, target).map_err(at("write", target))?;
            if durably && let Some(parent) = target.parent() {
                File::open(parent).and_then(|d| d.sync_all()).map_err(at("write", parent))?;
            }
            Ok(())
        });
        if placed.is_err() {
            // best effort: the next publisher clears the scratch directory anyway
            let _ = fs::remove_file(&temporary);
        }
        placed
    }

    fn write_temporary(&self, path: &Path, content: &[u8], durably: bool) -> Result<(), StorageError> {
        let create = || OpenOptions::new().write(true).create_new(true).mode(FILE_MODE).open(path);
        let mut file = match create() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if let Some(parent) = path.parent() {
                    make_directory(parent)?;
                }
                create()
            }
            other => other,
        }
        .map_err(at("create", path))?;
        if umask_takes(FILE_MODE) {
            file.set_permissions(fs::Permissions::from_mode(FILE_MODE)).map_err(at("write", path))?;
        }
        file.write_all(content).map_err(at("write", path))?;
        if durably {
            file.sync_all().map_err(at("write", path))?;
        }
        Ok(())
    }

    fn remove_leftovers(&self) -> Result<(), StorageError> {
        for item in fs::read_dir(&self.scratch).map_err(at("list", &self.scratch))? {
            let item = item.map_err(at("list", &self.scratch))?;
            let name = item.file_name();
            if name.as_encoded_bytes().starts_with(OURS.as_bytes()) && name != LOCK && name != KNOWN {
                let path = item.path();
                let directory = item.file_type().map_err(at("remove", &path))?.is_dir();
                let removed = if directory { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
                removed.map_err(at("remove", &path))?;
            }
        }
        Ok(())
    }
}

impl Drop for Directory {
    /// Removes the directories of this process' threads. What is in use or cannot be removed is the next one's.
    fn drop(&mut self) {
        if *self.next_temporary.get_mut() == 0 {
            // Nothing was written.
            return;
        }
        let ours = format!("{OURS}{}.thread", std::process::id());
        for item in fs::read_dir(&self.scratch).into_iter().flatten().flatten() {
            if item.file_name().as_encoded_bytes().starts_with(ours.as_bytes()) {
                let _ = fs::remove_dir(item.path());
            }
        }
    }
}

impl Storage for Directory {
    fn location(&self) -> String {
        self.root.display().to_string()
    }

    fn lock(&self, wait: Duration) -> Result<Box<dyn StorageLock>, StorageError> {
        make_directory(&self.scratch)?;
        let path = self.scratch.join(LOCK);
        let started = Instant::now();
        loop {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(FILE_MODE)
                .open(&path)
                .map_err(at("lock", &path))?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                // a lock on a file that was meanwhile unlinked would exclude nobody
                Ok(()) if is_same_file(&file, &path) => {
                    let held = DirectoryLock { file };
                    held.sign().map_err(at("lock", &path))?;
                    self.remove_leftovers()?;
                    return Ok(Box::new(held));
                }
                Ok(()) | Err(rustix::io::Errno::WOULDBLOCK) => {}
                Err(error) => return Err(at("lock", &path)(error.into())),
            }
            if started.elapsed() >= wait {
                return Err(StorageError::Locked {
                    path: path.display().to_string(),
                    holder: holder(file),
                    seconds: wait.as_secs(),
                });
            }
            std::thread::sleep(LOCK_POLL.min(wait));
        }
    }

    fn put_object(&self, name: &ObjectName, stored: &[u8]) -> Result<Put, StorageError> {
        let target = self.root.join(name.path());
        let put = state_of(&target, stored.len() as u64)?;
        if put == Put::Present {
            return Ok(put);
        }
        self.place(&target, stored, false)?;
        self.writeback.stored(stored.len() as u64);
        Ok(put)
    }

    fn known(&self) -> Option<&Known> {
        let open = || {
            let path = self.scratch.join(KNOWN);
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            options.custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed());
            let known = options.open(&path).and_then(Known::new);
            known
                .inspect_err(|error| tracing::debug!(path = %path.display(), %error, "nothing is remembered"))
                .ok()
        };
        self.known.get_or_init(open).as_ref()
    }

    fn is_sure_of_new_objects(&self) -> bool {
        true
    }

    fn put_object_file(&self, name: &ObjectName, file: &Path) -> Result<Put, StorageError> {
        let target = self.root.join(name.path());
        let size = fs::metadata(file).map_err(at("read", file))?.len();
        let put = state_of(&target, size)?;
        if put == Put::Present {
            return Ok(put);
        }
        fs::set_permissions(file, fs::Permissions::from_mode(FILE_MODE)).map_err(at("write", file))?;
        rename_making_parent(file, &target).map_err(at("write", &target))?;
        Ok(put)
    }

    fn object_size(&self, name: &ObjectName) -> Result<Option<u64>, StorageError> {
        let path = self.root.join(name.path());
        match fs::metadata(&path) {
            Ok(found) => Ok(Some(found.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(at("look for", &path)(error)),
        }
    }

    fn open_object(&self, name: &ObjectName) -> Result<Box<dyn Read + Send>, StorageError> {
        let path = self.root.join(name.path());
        let file = File::open(&path).map_err(at("open", &path))?;
        Ok(Box::new(file))
    }

    fn delete_object(&self, name: &ObjectName) -> Result<(), StorageError> {
        for path in [self.root.join(name.path()), self.root.join(name.alternative_path())] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(at("remove", &path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn get_file(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>, StorageError> {
        let path = self.root.join(name);
        match File::open(&path) {
            Ok(file) => read_bounded(file, &path.display().to_string(), limit).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(at("open", &path)(error)),
        }
    }

    fn put_file(&self, name: &str, content: &[u8]) -> Result<(), StorageError> {
        self.place(&self.root.join(name), content, true)
    }

    fn delete_file(&self, name: &str) -> Result<(), StorageError> {
        let path = self.root.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at("remove", &path)(error)),
            _ => Ok(()),
        }
    }

    fn settle(&self) -> Result<(), StorageError> {
        // Once for the whole publish: syncing each object would cost more than compressing it.
        self.writeback.settle().map_err(at("flush", &self.root))
    }

    fn list_objects(&self, visit: &mut dyn FnMut(StoredObject)) -> Result<(), StorageError> {
        let data = self.root.join("data");
        for group in sorted_names(&data)? {
            let path = data.join(&group);
            if path == self.scratch {
                continue;
            }
            if !path.is_dir() {
                let found = fs::symlink_metadata(&path).map_err(at("look for", &path))?;
                visit(stored(format!("data/{group}"), &found));
                continue;
            }
            for name in sorted_names(&path)? {
                match fs::symlink_metadata(path.join(&name)) {
                    Ok(found) => visit(stored(format!("data/{group}/{name}"), &found)),
                    // collected since the directory was read
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(at("look for", &path.join(&name))(error)),
                }
            }
        }
        Ok(())
    }

    fn scratch(&self) -> Result<Scratch, StorageError> {
        let path = self.temporary();
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(at("create", &path))?;
        Ok(Scratch::of(path))
    }
}

/// What storing an object of this size will be, by what is there.
fn state_of(target: &Path, size: u64) -> Result<Put, StorageError> {
    match fs::symlink_metadata(target) {
        Ok(there) if there.len() == size => Ok(Put::Present),
        // The name fixes the content, so another length is damage (a power failure
        // before the data reached the disk). Replacing it atomically is safe.
        Ok(there) => {
            tracing::warn!(
                object = %target.display(), found = there.len(), expected = size,
                "replacing a damaged object"
            );
            Ok(Put::Replaced)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Put::New),
        Err(error) => Err(at("look for", target)(error)),
    }
}

fn stored(path: String, found: &fs::Metadata) -> StoredObject {
    StoredObject { path, size: found.len(), modified: found.mtime() }
}

#[derive(Debug)]
struct DirectoryLock {
    file: File,
}

impl StorageLock for DirectoryLock {}

impl DirectoryLock {
    /// Says in the lock file who holds it; only people read that.
    fn sign(&self) -> io::Result<()> {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        self.file.set_len(0)?;
        let line = format!("process {} on {host}\n", std::process::id());
        std::os::unix::fs::FileExt::write_all_at(&self.file, line.as_bytes(), 0)
    }
}

fn holder(file: File) -> String {
    let mut line = String::new();
    match file.take(MAX_HOLDER).read_to_string(&mut line) {
        Ok(1..) => line.trim().to_owned(),
        _ => "unknown process".to_owned(),
    }
}

fn is_same_file(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(held), Ok(named)) => held.dev() == named.dev() && held.ino() == named.ino(),
        _ => false,
    }
}

/// Whether something new with this mode must be given it once more, because of the umask of this process. Asking the
/// kernel for that any other way would change it for a moment.
fn umask_takes(mode: u32) -> bool {
    static UMASK: OnceLock<Option<u32>> = OnceLock::new();
    let read = || {
        let status = fs::read_to_string("/proc/self/status").ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("Umask:"))?;
        u32::from_str_radix(line.trim(), 8).ok()
    };
    UMASK.get_or_init(read).is_none_or(|umask| umask & mode != 0)
}

/// Makes a directory that everybody can enter, whatever the umask; one that exists stays as it is.
fn make_directory(path: &Path) -> Result<(), StorageError> {
    let make = || {
        if path.is_dir() {
            return Ok(());
        }
        fs::create_dir_all(path)?;
        open_to_everybody(path)
    };
    make().map_err(at("create", path))
}

/// Gives a new directory what the umask took. Some file systems know no modes, and refuse to change them.
fn open_to_everybody(directory: &Path) -> io::Result<()> {
    if umask_takes(DIRECTORY_MODE) {
        fs::set_permissions(directory, fs::Permissions::from_mode(DIRECTORY_MODE))?;
    }
    Ok(())
}

fn rename_making_parent(from: &Path, to: &Path) -> io::Result<()> {
    match fs::rename(from, to) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(parent) = to.parent() {
                fs::create_dir_all(parent)?;
                open_to_everybody(parent)?;
            }
            fs::rename(from, to)
        }
        other => other,
    }
}

fn sorted_names(directory: &Path) -> Result<Vec<String>, StorageError> {
    let mut names = Vec::new();
    for item in fs::read_dir(directory).map_err(at("list", directory))? {
        names.push(item.map_err(at("list", directory))?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StorageError {
    let path = path.display().to_string();
    move |source| StorageError::Io { action, path, source }
}

#[cfg(test)]
mod tests {
    use cvmfs_format::{ContentHash, HashAlgorithm, ObjectKind};

    use super::*;

    fn name(bytes: &[u8]) -> ObjectName {
        ObjectName::new(ContentHash::of(HashAlgorithm::Shake128, bytes), ObjectKind::Chunk)
    }

    #[test]
    fn an_object_is_stored_once_and_readable_by_everybody() {
        let dir = tempfile::tempdir().unwrap();
        let storage = Directory::create(dir.path()).unwrap();
        let object = name(b"content");
        assert_eq!(storage.put_object(&object, b"content").unwrap(), Put::New);
        let path = dir.path().join(object.path());
        let before = fs::metadata(&path).unwrap();
        assert_eq!(before.permissions().mode() & 0o7777, 0o644);
        assert_eq!(storage.put_object(&object, b"content").unwrap(), Put::Present);
        assert_eq!(fs::metadata(&path).unwrap().ino(), before.ino(), "an existing object was rewritten");
        assert_eq!(storage.get_object(&object, 100).unwrap(), b"content");
        drop(storage);
        assert!(
            fs::read_dir(dir.path().join("data/txn")).unwrap().next().is_none(),
            "temporary file left behind"
        );
    }

    #[test]
    fn an_object_cut_by_a_power_failure_is_replaced_on_the_next_publish() {
        let dir = tempfile::tempdir().unwrap();
        let storage = Directory::create(dir.path()).unwrap();
        let object = name(b"content");
        fs::write(dir.path().join(object.path()), b"").unwrap();
        assert_eq!(storage.put_object(&object, b"content").unwrap(), Put::Replaced);
        assert_eq!(storage.get_object(&object, 100).unwrap(), b"content");
    }

    #[test]
    fn missing_object_directories_are_made() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("data")).unwrap();
        let storage = Directory::open(dir.path()).unwrap();
        storage.put_object(&name(b"x"), b"x").unwrap();
        assert_eq!(storage.object_size(&name(b"x")).unwrap(), Some(1));
        assert_eq!(storage.object_size(&name(b"y")).unwrap(), None);
    }

    #[test]
    fn a_second_publisher_waits_and_then_learns_who_holds_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let storage = Directory::create(dir.path()).unwrap();
        let held = storage.lock(Duration::ZERO).unwrap();
        let started = Instant::now();
        let error = storage.lock(Duration::from_millis(200)).unwrap_err();
        assert!(started.elapsed() >= Duration::from_millis(200));
        assert!(error.to_string().contains(&format!("process {} on ", std::process::id())), "{error}");
        drop(held);
        storage.lock(Duration::ZERO).unwrap();
    }

    #[test]
    fn taking_the_lock_removes_our_leftovers_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let storage = Directory::create(dir.path()).unwrap();
        let scratch = dir.path().join("data/txn");
        fs::write(scratch.join("publish.1.1"), b"cut").unwrap();
        fs::create_dir(scratch.join("publish.1.2")).unwrap();
        fs::write(scratch.join("publish.1.2/catalog"), b"cut").unwrap();
        fs::write(scratch.join("txn.of.another.tool"), b"").unwrap();
        let _held = storage.lock(Duration::ZERO).unwrap();
        assert_eq!(sorted_names(&scratch).unwrap(), ["publish.lock", "txn.of.another.tool"]);
    }

    #[test]
    fn a_listing_shows_objects_but_not_the_scratch_area() {
        let dir = tempfile::tempdir().unwrap();
        let storage = Directory::create(dir.path()).unwrap();
        storage.put_object(&name(b"x"), b"x").unwrap();
        fs::write(dir.path().join("data/txn/publish.1.1"), b"cut").unwrap();
        let mut found = Vec::new();
        storage.list_objects(&mut |object| found.push(object)).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].path.as_str(), found[0].size), (name(b"x").path().as_str(), 1));
        assert!(found[0].modified > 1_600_000_000);
    }
}
