//! mount(2): all options in one string that must fit a page.
//!
//! The string is kept short by names relative to a directory that contains all layers. If that is not enough,
//! the layers are opened and named by their descriptors' numbers, relative to `/proc/self/fd`: 500 of them
//! take 2000 bytes, but what is mounted can then no longer be read from mountinfo.

use super::{Marks, MountError, OverlayMount, Support, open_directory};
use crate::sys;
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// A page without its final NUL; the kernel silently cuts the rest off.
const MAX_OPTIONS: usize = 4095;

pub(super) fn mount(overlay: &OverlayMount, target: &Path, support: &Support) -> Result<(), MountError> {
    let attach = |source| MountError::Attach { target: target.to_owned(), source };
    let absolute_target = std::path::absolute(target).map_err(attach)?;
    let directories = Directories::open(overlay)?;
    let call = directories
        .by_relative_names(overlay, support)
        .or_else(|| directories.by_descriptors(overlay, support));
    let call = match call {
        Some(call) if call.options.len() <= MAX_OPTIONS => call,
        other => {
            let length = other.map_or(0, |call| call.options.len());
            return Err(MountError::OptionsTooLong {
                lowers: overlay.lowers.len(),
                length,
                limit: MAX_OPTIONS,
            });
        }
    };
    let options = CString::new(call.options)
        .map_err(|_| overlay.refused(target, "lowerdir", Vec::new(), Errno::INVAL))?;

    // The working directory is a property of the process; a thread of its own can have its own.
    let run = || -> Result<(), Errno> {
        sys::unshare_working_directory()?;
        rustix::process::chdir(&call.working_directory)?;
        rustix::mount::mount(
            "overlay",
            &absolute_target,
            "overlay",
            MountFlags::empty(),
            Some(options.as_c_str()),
        )
    };
    let done = std::thread::scope(|scope| match std::thread::Builder::new().spawn_scoped(scope, run) {
        Ok(thread) => Ok(thread.join().unwrap_or(Err(Errno::CANCELED))),
        Err(error) => Err(error),
    });
    match done.map_err(attach)? {
        Ok(()) => Ok(()),
        Err(Errno::NODEV) => Err(MountError::NoOverlay(Errno::NODEV.into())),
        Err(error) => Err(overlay.refused(target, "create", Vec::new(), error)),
    }
}

/// One call of mount(2).
struct Call {
    working_directory: PathBuf,
    options: Vec<u8>,
}

/// The open directories: they name what is missing, and can be named by number.
struct Directories {
    lowers: Vec<OwnedFd>,
    upper: Option<OwnedFd>,
    work: Option<OwnedFd>,
}

impl Directories {
    fn open(overlay: &OverlayMount) -> Result<Self, MountError> {
        let optional =
            |role, path: &Option<PathBuf>| path.as_deref().map(|path| open_directory(role, path)).transpose();
        Ok(Directories {
            lowers: overlay
                .lowers
                .iter()
                .map(|lower| open_directory("lower", lower))
                .collect::<Result<_, _>>()?,
            upper: optional("upper", &overlay.upper)?,
            work: optional("work", &overlay.work)?,
        })
    }

    /// None if the names do not fit or have no common directory.
    fn by_relative_names(&self, overlay: &OverlayMount, support: &Support) -> Option<Call> {
        let absolute = |path: &PathBuf| std::path::absolute(path).ok();
        let lowers: Vec<PathBuf> = overlay.lowers.iter().map(absolute).collect::<Option<_>>()?;
        let upper = overlay.upper.iter().map(absolute).collect::<Option<Vec<_>>>()?;
        let work = overlay.work.iter().map(absolute).collect::<Option<Vec<_>>>()?;
        let mut common = lowers.first()?.clone();
        for path in lowers.iter().chain(&upper).chain(&work) {
            while !path.starts_with(&common) {
                common.pop();
            }
        }
        let relative = |path: &PathBuf| match path.strip_prefix(&common) {
            Ok(rest) if rest.as_os_str().is_empty() => Some(b".".to_vec()),
            Ok(rest) => Some(rest.as_os_str().as_bytes().to_vec()),
            Err(_) => None,
        };
        let lowers = lowers.iter().map(relative).collect::<Option<Vec<_>>>()?;
        let upper = upper.first().map(relative);
        let work = work.first().map(relative);
        let options = options(overlay, support, &lowers, upper.flatten(), work.flatten());
        (options.len() <= MAX_OPTIONS).then_some(Call { working_directory: common, options })
    }

    fn by_descriptors(&self, overlay: &OverlayMount, support: &Support) -> Option<Call> {
        let number = |directory: &OwnedFd| directory.as_raw_fd().to_string().into_bytes();
        let lowers: Vec<Vec<u8>> = self.lowers.iter().map(number).collect();
        let (upper, work) = (self.upper.as_ref().map(number), self.work.as_ref().map(number));
        let options = options(overlay, support, &lowers, upper, work);
        Some(Call { working_directory: PathBuf::from("/proc/self/fd"), options })
    }
}

fn options(
    overlay: &OverlayMount,
    support: &Support,
    lowers: &[Vec<u8>],
    upper: Option<Vec<u8>>,
    work: Option<Vec<u8>>,
) -> Vec<u8> {
    let mut options = b"lowerdir=".to_vec();
    for (index, lower) in lowers.iter().enumerate() {
        if index > 0 {
            options.push(b':');
        }
        escape(&mut options, lower, b"\\:,");
    }
    if let (Some(upper), Some(work)) = (upper, work) {
        options.extend_from_slice(b",upperdir=");
        escape(&mut options, &upper, b"\\,");
        options.extend_from_slice(b",workdir=");
        escape(&mut options, &work, b"\\,");
    }
    for option in overlay.switched_off(support) {
        options.extend_from_slice(format!(",{option}=off").as_bytes());
    }
    if overlay.marks == Marks::User {
        options.extend_from_slice(b",userxattr");
    }
    if let Some(label) = &overlay.label {
        // Labels contain commas; the quotes protect them.
        options.extend_from_slice(format!(",context=\"{label}\"").as_bytes());
    }
    options
}

fn escape(options: &mut Vec<u8>, name: &[u8], special: &[u8]) {
    for &byte in name {
        if special.contains(&byte) {
            options.push(b'\\');
        }
        options.push(byte);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mount::Way;

    #[test]
    fn options_are_escaped_as_the_kernel_undoes_it() {
        let overlay = OverlayMount { label: Some("u:r:t:s0:c1,c2".to_owned()), ..OverlayMount::default() };
        let support = Support { way: Way::Classic, index: true, redirect_dir: false, metacopy: true };
        let lowers = [b"a:b".to_vec(), b"c,d\\e".to_vec()];
        let text = options(&overlay, &support, &lowers, Some(b"u:p,\\".to_vec()), Some(b"w".to_vec()));
        let expected = r#"lowerdir=a\:b:c\,d\\e,upperdir=u:p\,\\,workdir=w,index=off,metacopy=off,context="u:r:t:s0:c1,c2""#;
        assert_eq!(String::from_utf8(text).unwrap(), expected);
    }
}
