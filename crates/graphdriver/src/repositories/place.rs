//! Finding layers in mounted repositories.

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2, readlinkat};
use rustix::io::Errno;
use thin_image::Location;

use super::{Fqrn, RepositoryError, RepositoryMounts, remaining};

/// Longest look for a newer revision, so that time is left to find the layers in it.
const REFRESH_TIME: Duration = Duration::from_secs(4);
/// The kernel answers EAGAIN when a directory moved while it followed a path.
const RETRIES: usize = 16;

/// The directories of `locations`, in order. A layer that is not there may be newer
/// than the mounted revision: each repository is asked once to look for a newer one.
pub(super) fn find_all(
    mounts: &dyn RepositoryMounts,
    mountpoints: &HashMap<Fqrn, PathBuf>,
    locations: &[&Location],
    until: Instant,
) -> Result<Vec<PathBuf>, RepositoryError> {
    let places: Vec<Place> = locations
        .iter()
        .map(|&location| {
            let mountpoint =
                mountpoints.get(&Fqrn::from(location)).expect("every repository was mounted before");
            Place { mountpoint: mountpoint.clone(), path: location.path.clone() }
        })
        .collect();
    let mut refreshed = Vec::new();
    loop {
        let (index, errno) = match within_deadline(places.clone(), until) {
            Ok(found) => return Ok(found),
            Err(failure) => failure,
        };
        let location = locations.get(index).expect("the failure is about one of the places");
        let fqrn = Fqrn::from(*location);
        let missing = matches!(errno, Errno::NOENT | Errno::NOTDIR);
        if missing && !refreshed.contains(&fqrn) {
            mounts.refresh(&fqrn, remaining(until).min(REFRESH_TIME));
            refreshed.push(fqrn);
            continue;
        }
        let path = location.path.clone();
        return Err(match errno {
            _ if missing => RepositoryError::LayerMissing { revision: mounts.revision(&fqrn), fqrn, path },
            Errno::XDEV | Errno::LOOP => RepositoryError::LeadsOut { fqrn, path },
            errno => RepositoryError::Unreadable { fqrn, path, cause: errno.into() },
        });
    }
}

#[derive(Debug, Clone)]
struct Place {
    mountpoint: PathBuf,
    path: String,
}

/// Finds all places, or the index of the first one that cannot be found.
///
/// A file system that hangs must not hang the caller: the kernel has no time limit of
/// its own for a lookup. The thread of such a call stays behind until it is answered.
fn within_deadline(places: Vec<Place>, until: Instant) -> Result<Vec<PathBuf>, (usize, Errno)> {
    let (answer, answered) = mpsc::sync_channel(1);
    let work = move || {
        let open = |(index, place): (usize, &Place)| {
            open_beneath(&place.mountpoint, &place.path).map_err(|errno| (index, errno))
        };
        // Nobody listens any more once the time is over.
        let _ = answer.send(places.iter().enumerate().map(open).collect());
    };
    if thread::Builder::new().name("find-layers".into()).spawn(work).is_err() {
        return Err((0, Errno::AGAIN));
    }
    answered.recv_timeout(remaining(until)).unwrap_or(Err((0, Errno::TIMEDOUT)))
}

/// The real directory: symbolic links inside the repository are followed, those that
/// lead out are not.
fn open_beneath(mountpoint: &Path, path: &str) -> Result<PathBuf, Errno> {
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(mountpoint, directory, Mode::empty())?;
    let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let mut opened = Err(Errno::AGAIN);
    for _ in 0..RETRIES {
        opened = openat2(&root, path, directory, Mode::empty(), beneath);
        if !matches!(opened, Err(Errno::AGAIN)) {
            break;
        }
    }
    let opened = opened?;
    let link = format!("/proc/self/fd/{}", opened.as_raw_fd());
    let real = readlinkat(CWD, link, Vec::new())?;
    Ok(PathBuf::from(OsString::from_vec(real.into_bytes())))
}
