//! Faults on request, for the tests that show that a mount survives them.
//!
//! `CVMFS_FUSE_TEST_FAULT=FAULT:NAME` in the environment of the mount makes the look-up of
//! NAME (or of what begins with it) slow (five seconds on the slow lane), or hang, or kill the worker. `CVMFS_FUSE_TEST_KERNEL=MINOR` pretends an older kernel and
//! `CVMFS_FUSE_TEST_PATIENCE=SECONDS` shortens the watchdog's patience. Nobody else sets them.

use std::sync::OnceLock;
use std::time::Duration;

use crate::shared_state::SharedState;

/// How long a slow look-up takes.
const SLOW: Duration = Duration::from_secs(5);

/// Commits the fault if one was asked for this name.
pub(crate) fn at_lookup(name: &[u8], state: &SharedState) {
    match fault_of(name) {
        Some("slow") => std::thread::sleep(SLOW),
        Some("hang") => std::thread::sleep(Duration::from_secs(3600)),
        Some("hang-once") if state.workers() == 1 => std::thread::sleep(Duration::from_secs(3600)),
        Some("abort") => std::process::abort(),
        Some("panic") => panic!("asked for by the test"),
        _ => {}
    }
}

/// Whether the look-up of the name belongs on the slow lane.
pub(crate) fn is_slow(name: &[u8]) -> bool {
    fault_of(name) == Some("slow")
}

/// A fault that several requests have at once goes by the beginning of the name.
fn concerns(fault: &str, wanted: &[u8], name: &[u8]) -> bool {
    if fault == "slow" { name.starts_with(wanted) } else { name == wanted }
}

fn fault_of(name: &[u8]) -> Option<&'static str> {
    static FAULT: OnceLock<Option<(String, Vec<u8>)>> = OnceLock::new();
    let fault = FAULT.get_or_init(|| {
        let text = std::env::var("CVMFS_FUSE_TEST_FAULT").ok()?;
        let (fault, name) = text.split_once(':')?;
        Some((fault.to_owned(), name.as_bytes().to_vec()))
    });
    fault.as_ref().filter(|(fault, wanted)| concerns(fault, wanted, name)).map(|(fault, _)| fault.as_str())
}

/// The minor protocol version that the kernel is taken for.
pub(crate) fn kernel_minor() -> Option<u32> {
    std::env::var("CVMFS_FUSE_TEST_KERNEL").ok()?.parse().ok()
}

/// The watchdog's patience.
pub(crate) fn patience() -> Option<Duration> {
    std::env::var("CVMFS_FUSE_TEST_PATIENCE").ok()?.parse().ok().map(Duration::from_secs)
}
