//! The publisher's lock in a store: an object that exactly one publisher can create.
//!
//! Its holder writes it anew every [`RENEWAL`]. A publisher that sees it unchanged for [`LEASE`], by its own clock,
//! takes it over; one whose process is known to be gone is taken over at once. So a lock never outlives its
//! holder for long, and clocks of different machines are never compared.
//!
//! All of this rests on conditional writes: `If-None-Match: *` to create, `If-Match` to renew and to take over. A
//! store that ignores or refuses them is found out before anything is done, and refused.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bucket::connection::Connection;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions, UpdateVersion};

use super::super::{StorageError, StorageLock};
use super::{MUTABLE, at, attributes};
use crate::error::chain;

/// How often the holder shows that it is alive.
const RENEWAL: Duration = Duration::from_secs(8);
/// A lock that was not renewed for so long is nobody's: several renewals may fail, but no publisher
/// has to wait long for one that died on another machine.
const LEASE: Duration = Duration::from_secs(40);
/// The holder itself gives up earlier, so that there are never two who think they hold it.
const SURE: Duration = Duration::from_secs(30);
/// How often a busy lock is looked at.
const POLL: Duration = Duration::from_millis(500);
/// Longest lock object; anything longer is not ours.
const MAX_LOCK: u64 = 1024;

/// Whether a lock is still held; shared with whoever changes the store under its protection.
#[derive(Debug)]
pub(super) struct Held {
    lost: AtomicBool,
    renewed: Mutex<Instant>,
}

impl Held {
    /// An error if the lock may meanwhile belong to somebody else.
    pub(super) fn check(&self, path: &Path) -> Result<(), StorageError> {
        let renewed = *self.renewed.lock().unwrap_or_else(PoisonError::into_inner);
        if self.lost.load(Ordering::SeqCst) || renewed.elapsed() > SURE {
            return Err(StorageError::LockLost { path: path.to_string() });
        }
        Ok(())
    }
}

/// The lock while it is held; renewed by a thread, removed when dropped.
#[derive(Debug)]
pub(super) struct Lease {
    connection: Connection,
    path: Path,
    held: Arc<Held>,
    stop: Option<Sender<()>>,
    renewer: Option<JoinHandle<()>>,
}

impl StorageLock for Lease {}

impl Lease {
    /// Takes the lock at `path`, waiting at most `wait`.
    pub(super) fn take(
        connection: &Connection,
        path: &Path,
        wait: Duration,
    ) -> Result<(Lease, Arc<Held>), StorageError> {
        let me = Identity::current();
        let started = Instant::now();
        let mut watched: Option<(Option<String>, Instant)> = None;
        let mut version = loop {
            let before = Instant::now();
            match create(connection, path, &me) {
                Ok(version) => break (version, before),
                Err(object_store::Error::AlreadyExists { .. }) => {}
                Err(error) if is_not_implemented(&error) => return Err(refused(connection, &error)),
                Err(error) => return Err(at("lock", path)(error)),
            }
            let Some((text, there)) = read(connection, path)? else { continue };
            if text == me.text(0) {
                // made by an attempt whose answer was lost
                break (there, before);
            }
            let unchanged = match &watched {
                Some((tag, since)) if *tag == there.e_tag => since.elapsed(),
                _ => {
                    watched = Some((there.e_tag.clone(), before));
                    Duration::ZERO
                }
            };
            if unchanged >= LEASE || me.knows_to_be_gone(&text) {
                tracing::warn!(holder = holder(&text), "taking over the lock of a publisher that is gone");
                let before = Instant::now();
                match write(connection, path, me.text(0), PutMode::Update(there)) {
                    Ok(version) => break (version, before),
                    Err(
                        object_store::Error::Precondition { .. } | object_store::Error::AlreadyExists { .. },
                    ) => continue,
                    Err(error) => return Err(at("lock", path)(error)),
                }
            }
            if started.elapsed() >= wait {
                return Err(StorageError::Locked {
                    path: path.to_string(),
                    holder: holder(&text),
                    seconds: wait.as_secs(),
                });
            }
            std::thread::sleep(POLL.min(wait));
        };
        if let Err(error) = require_conditional_writes(connection, path, &me) {
            remove(connection, path);
            return Err(error);
        }
        let held = Arc::new(Held { lost: AtomicBool::new(false), renewed: Mutex::new(version.1) });
        let (stop, stopped) = channel::<()>();
        let renewer = {
            let (connection, path, held) = (connection.clone(), path.clone(), held.clone());
            std::thread::spawn(move || {
                let mut number = 0_u64;
                while stopped.recv_timeout(RENEWAL) == Err(RecvTimeoutError::Timeout) {
                    number += 1;
                    let before = Instant::now();
                    match write(&connection, &path, me.text(number), PutMode::Update(version.0.clone())) {
                        Ok(renewed) => {
                            version.0 = renewed;
                            *held.renewed.lock().unwrap_or_else(PoisonError::into_inner) = before;
                        }
                        Err(object_store::Error::Precondition { .. }) => {
                            // ours after all, if only the answer to an earlier attempt was lost
                            match read(&connection, &path) {
                                Ok(Some((text, there))) if me.wrote(&text) => version.0 = there,
                                _ => {
                                    held.lost.store(true, Ordering::SeqCst);
                                    return;
                                }
                            }
                        }
                        // the next renewal may succeed; if none does, `Held::check` notices
                        Err(error) => tracing::warn!(%error, "cannot renew the publisher's lock"),
                    }
                }
            })
        };
        let lease = Lease {
            connection: connection.clone(),
            path: path.clone(),
            held: held.clone(),
            stop: Some(stop),
            renewer: Some(renewer),
        };
        Ok((lease, held))
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(renewer) = self.renewer.take() {
            let _ = renewer.join();
        }
        // somebody else's is left alone
        if self.held.check(&self.path).is_ok() {
            remove(&self.connection, &self.path);
        }
        self.held.lost.store(true, Ordering::SeqCst);
    }
}

/// Who holds a lock: for people, and to tell on this machine whether the holder still lives.
#[derive(Debug, Clone)]
struct Identity {
    process: u32,
    host: String,
    /// Changes with each boot of the machine, and differs between containers.
    place: String,
    /// Tells two locks of one process apart.
    nonce: u64,
}

impl Identity {
    fn current() -> Identity {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let namespace = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
        let place =
            if boot.is_empty() { String::new() } else { format!("{}/{}", boot.trim(), namespace.display()) };
        let nonce = {
            use std::hash::{BuildHasher, Hasher};
            // seeded anew for each of these states
            std::collections::hash_map::RandomState::new().build_hasher().finish()
        };
        Identity { process: std::process::id(), host, place, nonce }
    }

    fn text(&self, number: u64) -> String {
        let Identity { process, host, place, nonce } = self;
        format!("process {process} on {host}\nplace {place}\nnonce {nonce:016x}\nrenewal {number}\n")
    }

    fn wrote(&self, text: &str) -> bool {
        text.starts_with(self.text(0).trim_end_matches("0\n"))
    }

    /// True if the holder ran in this very place and its process is gone.
    fn knows_to_be_gone(&self, text: &str) -> bool {
        let line = |key: &str| text.lines().find_map(|line| line.strip_prefix(key));
        if self.place.is_empty() || line("place ") != Some(&self.place) {
            return false;
        }
        let process =
            line("process ").and_then(|rest| rest.split(' ').next()).and_then(|id| id.parse::<u32>().ok());
        process.is_some_and(|id| id != self.process && !std::path::Path::new(&format!("/proc/{id}")).exists())
    }
}

fn holder(text: &str) -> String {
    text.lines().next().filter(|line| line.starts_with("process ")).unwrap_or("unknown process").to_owned()
}

fn create(connection: &Connection, path: &Path, me: &Identity) -> object_store::Result<UpdateVersion> {
    write(connection, path, me.text(0), PutMode::Create)
}

fn write(
    connection: &Connection,
    path: &Path,
    text: String,
    mode: PutMode,
) -> object_store::Result<UpdateVersion> {
    let path = path.clone();
    connection.wait(|store| async move {
        let options = PutOptions { mode, attributes: attributes(&MUTABLE), ..PutOptions::default() };
        store.put_opts(&path, text.into(), options).await.map(UpdateVersion::from)
    })
}

fn read(connection: &Connection, path: &Path) -> Result<Option<(String, UpdateVersion)>, StorageError> {
    let asked = path.clone();
    let answer = connection.wait(|store| async move {
        let found = store.get(&asked).await?;
        let version = UpdateVersion { e_tag: found.meta.e_tag.clone(), version: found.meta.version.clone() };
        if found.meta.size > MAX_LOCK {
            return Ok((String::new(), version));
        }
        let text = String::from_utf8_lossy(&found.bytes().await?).into_owned();
        Ok((text, version))
    });
    match answer {
        Ok(found) => Ok(Some(found)),
        Err(object_store::Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(at("lock", path)(error)),
    }
}

fn remove(connection: &Connection, path: &Path) {
    let path = path.clone();
    // best effort: it expires by itself
    let _ = connection.wait(|store| async move { store.delete(&path).await });
}

/// With the lock in hand: neither may it be created a second time, nor changed with a version that it does not have.
fn require_conditional_writes(
    connection: &Connection,
    path: &Path,
    me: &Identity,
) -> Result<(), StorageError> {
    let lacking = || StorageError::NoConditionalWrites {
        location: connection.store.to_string(),
        reason: "it writes although the condition does not hold".to_owned(),
    };
    match create(connection, path, me) {
        Err(object_store::Error::AlreadyExists { .. }) => {}
        Ok(_) => return Err(lacking()),
        Err(error) if is_not_implemented(&error) => return Err(refused(connection, &error)),
        Err(error) => return Err(at("lock", path)(error)),
    }
    let foreign =
        UpdateVersion { e_tag: Some("\"00000000000000000000000000000000\"".to_owned()), version: None };
    match write(connection, path, me.text(0), PutMode::Update(foreign)) {
        Err(object_store::Error::Precondition { .. }) => Ok(()),
        Ok(_) => Err(lacking()),
        Err(error) if is_not_implemented(&error) => Err(refused(connection, &error)),
        Err(error) => Err(at("lock", path)(error)),
    }
}

fn refused(connection: &Connection, error: &object_store::Error) -> StorageError {
    StorageError::NoConditionalWrites { location: connection.store.to_string(), reason: chain(error) }
}

/// Stores without conditional writes either ignore the headers or say 501 `NotImplemented`.
fn is_not_implemented(error: &object_store::Error) -> bool {
    matches!(error, object_store::Error::NotImplemented { .. }) || chain(error).contains("NotImplemented")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_process_of_this_place_is_known_to_be_gone() {
        let me = Identity { process: 1, host: "h".into(), place: "boot/pid:[1]".into(), nonce: 7 };
        // no process has this number: it is beyond the kernel's limit
        let gone = Identity { process: 4_194_305, nonce: 8, ..me.clone() };
        assert!(me.knows_to_be_gone(&gone.text(3)));
        assert!(!me.knows_to_be_gone(&Identity { place: "boot/pid:[2]".into(), ..gone.clone() }.text(3)));
        assert!(!me.knows_to_be_gone(&Identity { process: std::process::id(), ..gone.clone() }.text(3)));
        assert!(!Identity { place: String::new(), ..me.clone() }.knows_to_be_gone(&gone.text(3)));
        assert!(me.wrote(&me.text(12)) && !me.wrote(&gone.text(12)));
        assert_eq!(holder(&gone.text(0)), "process 4194305 on h");
        assert_eq!(holder("<html>"), "unknown process");
    }
}
