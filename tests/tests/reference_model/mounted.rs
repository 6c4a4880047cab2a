//! A mount by the real binary: the kernel asks.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::PathBuf;
use std::time::Duration;

use rustix::fs::{lgetxattr, llistxattr, major, minor};
use rustix::process::Signal;
use testkit::{Mount, MountBuilder, process};

use crate::client::{Client, Errno};
use crate::site::{FQRN, Site};
use crate::tree::Attributes;

/// A successor of a killed worker answers within this time.
const PATIENCE: Duration = Duration::from_secs(40);

/// See the module documentation.
#[derive(Debug)]
pub struct Mounted(Mount);

impl Mounted {
    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    /// Asks until a worker answers: one may just have died.
    fn ask(&self, command: &str) -> String {
        let mut answer = None;
        process::wait_until("a worker answers", PATIENCE, || {
            answer = self.0.ask(command, PATIENCE).ok().filter(|answer| !answer.is_empty());
            answer.is_some()
        })
        .unwrap();
        answer.unwrap_or_default()
    }
}

impl Client for Mounted {
    type File = File;

    fn start(site: &Site) -> Result<Mounted, String> {
        let mount = MountBuilder::new(FQRN, &site.client_config()).option("cvmfs_suid").mount();
        mount.map(Mounted).map_err(|error| error.to_string())
    }

    fn crash(&self) {
        let pid: u32 = self.ask("pid").trim().parse().unwrap();
        process::kill(pid, Signal::KILL);
        process::wait_until("the worker is dead", PATIENCE, || !process::is_alive(pid)).unwrap();
    }

    fn revision(&self) -> u64 {
        let answer = self.ask("revision");
        answer.trim().parse().unwrap_or_else(|_| panic!("`revision` is answered with {answer}"))
    }

    fn refresh(&self) -> Result<(), String> {
        let answer = self.ask("refresh");
        answer.trim().parse::<u64>().map(drop).map_err(|_| answer)
    }

    fn look_up(&self, path: &str) -> Result<Option<Attributes>, Errno> {
        let path = self.path(path);
        let Some(meta) = found(path.symlink_metadata())? else { return Ok(None) };
        let kind = meta.file_type();
        let target = if kind.is_symlink() {
            let target = std::fs::read_link(&path).map_err(errno)?;
            Some(target.into_os_string().into_string().unwrap())
        } else {
            None
        };
        let mut xattrs = std::collections::BTreeMap::new();
        if kind.is_dir() || kind.is_file() {
            let mut names = vec![0_u8; 4096];
            let length = llistxattr(&path, &mut names[..]).map_err(|error| errno(error.into()))?;
            for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
                let mut value = vec![0_u8; 4096];
                let length = lgetxattr(&path, name, &mut value[..]).map_err(|error| errno(error.into()))?;
                value.truncate(length);
                xattrs.insert(String::from_utf8(name.to_vec()).unwrap(), value);
            }
        }
        Ok(Some(Attributes {
            kind: match kind {
                _ if kind.is_dir() => "directory",
                _ if kind.is_file() => "file",
                _ if kind.is_symlink() => "symlink",
                _ if kind.is_fifo() => "fifo",
                _ if kind.is_char_device() => "char",
                _ => "something else",
            },
            mode: meta.mode() & 0o7777,
            owner: (meta.uid(), meta.gid()),
            mtime: meta.mtime(),
            size: meta.size(),
            nlink: meta.nlink() as u32,
            target,
            device: kind.is_char_device().then(|| (major(meta.rdev()), minor(meta.rdev()))),
            xattrs,
        }))
    }

    fn list(&self, path: &str) -> Result<Option<Vec<String>>, Errno> {
        // A link to a directory is none.
        let path = self.path(path);
        let is_directory = found(path.symlink_metadata())?.is_some_and(|meta| meta.is_dir());
        if !is_directory {
            return Ok(None);
        }
        let Some(entries) = found(std::fs::read_dir(path))? else { return Ok(None) };
        let names = entries.map(|entry| Ok(entry.map_err(errno)?.file_name().into_string().unwrap()));
        names.collect::<Result<_, _>>().map(Some)
    }

    fn open(&self, path: &str) -> Result<Option<File>, Errno> {
        found(File::open(self.path(path)))
    }

    fn read(&self, file: &File, offset: u64, length: usize) -> Result<Vec<u8>, Errno> {
        let mut buffer = vec![0; length];
        let mut filled = 0;
        while filled < length {
            match file.read_at(&mut buffer[filled..], offset + filled as u64).map_err(errno)? {
                0 => break,
                read => filled += read,
            }
        }
        buffer.truncate(filled);
        Ok(buffer)
    }
}

fn found<T>(result: io::Result<T>) -> Result<Option<T>, Errno> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(error) if [libc::ENOENT, libc::ENOTDIR].contains(&error.raw_os_error().unwrap_or(0)) => Ok(None),
        Err(error) => Err(errno(error)),
    }
}

fn errno(error: io::Error) -> Errno {
    Errno { number: error.raw_os_error().unwrap_or(0), text: error.to_string() }
}
