//! The worker's log: standard error, or a file that never grows beyond two times its bound.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::launch::MountRequest;

/// At this size the file becomes `NAME.1` and a new one begins.
const MAX_LOG_BYTES: u64 = 4 << 20;

/// Starts logging as the request asks. Only the first call of a process has an effect.
pub(crate) fn start(request: &MountRequest) -> io::Result<()> {
    // fuser warns about every request that is meant to be answered with ENOSYS.
    let level = format!("fuser=error,{}", request.log_level);
    let filter = EnvFilter::try_new(level).unwrap_or_else(|_| EnvFilter::new("fuser=error,info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_target(false);
    let started = match &request.log_file {
        None if request.log_json => builder.json().with_writer(io::stderr).try_init(),
        None => builder.with_writer(io::stderr).try_init(),
        Some(path) => {
            let log = LogFile::open(path.clone())?;
            if request.log_json {
                builder.json().with_writer(log).try_init()
            } else {
                builder.with_writer(log).try_init()
            }
        }
    };
    // A second subscriber in one process is a programming error without consequences.
    let _ = started;
    Ok(())
}

#[derive(Debug)]
struct LogFile {
    path: PathBuf,
    open: Mutex<(File, u64)>,
}

impl LogFile {
    fn open(path: PathBuf) -> io::Result<LogFile> {
        let file = File::options().create(true).append(true).mode(0o600).open(&path)?;
        let size = file.metadata()?.len();
        Ok(LogFile { path, open: Mutex::new((file, size)) })
    }
}

impl Write for &LogFile {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.1 + line.len() as u64 > MAX_LOG_BYTES {
            let mut older = self.path.clone().into_os_string();
            older.push(".1");
            fs::rename(&self.path, older)?;
            let file = File::options().create(true).append(true).mode(0o600).open(&self.path)?;
            *open = (file, 0);
        }
        let written = open.0.write(line)?;
        open.1 += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogFile {
    type Writer = &'a LogFile;

    fn make_writer(&'a self) -> &'a LogFile {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_never_grows_beyond_twice_its_bound() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let log = LogFile::open(path.clone()).unwrap();
        let line = vec![b'x'; 1 << 20];
        for _ in 0..20 {
            (&log).write_all(&line).unwrap();
        }
        let total: u64 = fs::read_dir(directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .sum();
        assert!(total <= 2 * MAX_LOG_BYTES, "{total}");
        assert!(path.exists() && directory.path().join("log.1").exists());
    }
}
