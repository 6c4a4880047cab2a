//! A log file that never grows beyond two times its bound.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

/// The file; several processes may write one, as supervisor and worker do.
#[derive(Debug)]
pub(super) struct LogFile {
    path: PathBuf,
    bound: u64,
    open: Mutex<File>,
}

impl LogFile {
    /// Opens or creates the file. At `bound` bytes it becomes `NAME.1` and a new one begins.
    pub(super) fn open(path: PathBuf, bound: u64) -> io::Result<LogFile> {
        let file = append(&path)?;
        Ok(LogFile { path, bound, open: Mutex::new(file) })
    }
}

fn append(path: &std::path::Path) -> io::Result<File> {
    File::options().create(true).append(true).mode(0o600).open(path)
}

impl Write for &LogFile {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let own = open.metadata()?;
        let named = fs::metadata(&self.path).ok();
        let is_own = named.is_some_and(|named| (named.dev(), named.ino()) == (own.dev(), own.ino()));
        if !is_own {
            // Somebody else has begun a new one, or removed it.
            *open = append(&self.path)?;
        } else if own.len() + line.len() as u64 > self.bound && own.len() > 0 {
            let mut older = self.path.clone().into_os_string();
            older.push(".1");
            fs::rename(&self.path, older)?;
            *open = append(&self.path)?;
        }
        open.write(line)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_never_grows_beyond_twice_its_bound() {
        const BOUND: u64 = 4 << 20;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        // Two processes write the same one.
        let logs = [LogFile::open(path.clone(), BOUND).unwrap(), LogFile::open(path.clone(), BOUND).unwrap()];
        let line = vec![b'x'; 1 << 20];
        for number in 0..40 {
            (&logs[number % 2]).write_all(&line).unwrap();
        }
        let total: u64 = fs::read_dir(directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .sum();
        assert!(total <= 2 * BOUND, "{total}");
        assert!(path.exists() && directory.path().join("log.1").exists());
    }
}
