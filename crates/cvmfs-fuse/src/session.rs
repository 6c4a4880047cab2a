//! The connection to the kernel: agreed upon once, served by one worker after the other.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cvmfs_client::config::{KernelSettings, ProfileChoice};

use crate::dispatch::READERS;
use crate::filesystem::Mount;
use crate::protocol::handshake::{Agreement, HandshakeError, Offer, agreed_in, capability};
use crate::shared_state::SharedState;
use crate::shared_state::journal::Left;
use crate::test_fault;

/// Why a worker cannot take the connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error("cannot answer the kernel's INIT")]
    Answer(#[source] std::io::Error),
}

/// Answers the kernel's INIT, or learns from its record what a predecessor agreed upon: a
/// connection keeps its settings for life, whatever configuration and program say now. `asks_who_calls`: the
/// repository is protected.
pub(crate) fn connect(
    state: &SharedState,
    device: &OwnedFd,
    settings: &KernelSettings,
    asks_who_calls: bool,
) -> Result<Agreement, SessionError> {
    let offer = Offer::parse(&state.init(), test_fault::kernel_minor())?;
    if state.is_answered() {
        return Ok(agreed_in(&offer, &state.reply()));
    }
    let recorded = state.reply();
    let (reply, agreement) = if recorded.is_empty() {
        let (reply, agreement) = offer.answer(wanted(settings, asks_who_calls));
        state.record_reply(&reply).map_err(SessionError::Answer)?;
        (reply, agreement)
    } else {
        // A worker before recorded it and may have sent it: no other one will do.
        let agreement = agreed_in(&offer, &recorded);
        (recorded, agreement)
    };
    match rustix::io::write(device, &reply) {
        // It had sent it.
        Ok(_) | Err(rustix::io::Errno::NOENT) => {}
        Err(error) => return Err(SessionError::Answer(error.into())),
    }
    state.set_answered();
    Ok(agreement)
}

/// The capabilities that a mount with these settings asks for.
fn wanted(settings: &KernelSettings, asks_who_calls: bool) -> u64 {
    let mut wanted = capability::ASYNC_READ
        | capability::DO_READDIRPLUS
        | capability::PARALLEL_DIROPS
        | capability::NO_OPEN_SUPPORT
        // Content never changes under a node id; the kernel need not compare times.
        | capability::EXPLICIT_INVAL_DATA
        | capability::HAS_EXPIRE_ONLY
        // A new worker asks for the requests in flight again.
        | capability::HAS_RESEND;
    if matches!(settings.profile, ProfileChoice::Auto | ProfileChoice::Passthrough) {
        wanted |= capability::PASSTHROUGH;
    }
    if settings.id_mapped && !asks_who_calls {
        wanted |= capability::ALLOW_IDMAP;
    }
    if settings.cache_symlinks {
        wanted |= capability::CACHE_SYMLINKS;
    }
    if settings.enforce_acls {
        wanted |= capability::POSIX_ACL;
    }
    wanted
}

/// Whether the kernel sends requests in flight again when it is asked to (Linux 6.9). Before INIT is answered there are
/// none.
pub(crate) fn repeats_requests(state: &SharedState) -> bool {
    let offer = Offer::parse(&state.init(), test_fault::kernel_minor());
    state.is_answered()
        && offer.is_ok_and(|offer| agreed_in(&offer, &state.reply()).has(capability::HAS_RESEND))
}

/// Serves requests until the mount is gone, first those that predecessors `left`.
///
/// # Errors
/// If the device cannot be read any more, or threads cannot be started.
pub(crate) fn run(mount: &Arc<Mount>, left: Vec<Left>) -> std::io::Result<()> {
    let named = |name: &str| std::thread::Builder::new().name(name.to_owned());
    mount.state.beat();
    let watched = mount.clone();
    let pulse = named("cvmfs-pulse").spawn(move || watched.keep_watch())?;
    let mut readers = Vec::new();
    let mut left = Some(left);
    for reader in 0..READERS {
        let (mount, left) = (mount.clone(), left.take().unwrap_or_default());
        readers.push(named("cvmfs-reader").spawn(move || {
            mount.serve_left(reader, left);
            mount.read_requests(reader)
        })?);
    }
    let mut outcome = Ok(());
    for reader in readers {
        // A reader that fails leaves the others waiting: the process ends, and its successor goes on.
        outcome = match reader.join() {
            Ok(ended) => outcome.and(ended),
            Err(_) => Err(std::io::Error::other("a thread that reads the device panicked")),
        };
    }
    mount.is_ending.store(true, Ordering::Relaxed);
    drop(pulse);
    outcome
}

/// Lets the kernel read further ahead, which pays where reads come to the client. Without
/// effect if the kernel does not let us.
pub(crate) fn widen_readahead(mountpoint: &std::path::Path) {
    const READAHEAD_KIB: &str = "1024";
    let Ok(Some(device)) = crate::mount_table::device_of(mountpoint) else { return };
    let path = format!("/sys/class/bdi/{device}/read_ahead_kb");
    if let Err(error) = std::fs::write(&path, READAHEAD_KIB) {
        tracing::debug!(path, %error, "read-ahead stays as it is");
    }
}

/// The device by which the connection is named in `/sys/fs/fuse/connections`, for messages.
pub(crate) fn is_open(device: impl AsFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut polled = [PollFd::new(&device, PollFlags::IN)];
    let _ = poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    !polled[0].revents().contains(PollFlags::ERR)
}
