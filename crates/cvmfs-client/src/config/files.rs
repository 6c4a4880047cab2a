//! Reading configuration files, and the evaluation of one of them.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use super::syntax::{self, Assignment, FileTest, Flow};
use super::{Config, ConfigError, NoticeKind, Origin};

/// Largest configuration file in bytes. Distributed ones have a few KiB; a log put there by mistake is refused.
pub(super) const MAX_FILE: u64 = 1024 * 1024;
/// Longest wait for the configuration repository: it is another mount, which may be slow or dead.
const PATIENCE: Duration = Duration::from_secs(10);
/// Files that include each other, at most this deep.
const MAX_INCLUDE_DEPTH: usize = 8;
/// Files read by `.` in all, so that files that include each other twice end before the night does.
const MAX_INCLUDES: usize = 256;

/// Whether there is simply no such file.
pub(super) fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// The text of a file of bounded size. Bytes that are not UTF-8 occur in comments and are replaced.
pub(super) fn read_file(path: &Path) -> Result<String, ConfigError> {
    let failed = |source| ConfigError::Read { path: path.to_owned(), source };
    // A pipe without writer would block the open.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(ConfigError::TooLarge { path: path.to_owned() });
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Does something with files that may lie on a dead mount, on a thread of its own; `None` if it takes too long.
pub(super) fn patiently<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        // The receiver is gone if this took too long.
        let _ = sender.send(work());
    });
    receiver.recv_timeout(PATIENCE).ok()
}

/// Evaluates the text of a file.
pub(super) fn evaluate(config: &mut Config, path: &Path, text: &str) {
    let directory = path.parent().unwrap_or(Path::new("/")).to_owned();
    let mut scope = FileScope::new(config, path, &directory, &[]);
    syntax::evaluate(text, &mut scope);
}

/// The evaluation of one file.
struct FileScope<'a> {
    config: &'a mut Config,
    path: &'a Path,
    /// The directory of the outermost file, from which the paths of included ones count.
    directory: &'a Path,
    /// The files that include this one, the outermost first.
    including: &'a [&'a Path],
    /// Lines of this file in which names were set unconditionally.
    set_in: HashMap<String, (u32, String)>,
}

impl<'a> FileScope<'a> {
    fn new(config: &'a mut Config, path: &'a Path, directory: &'a Path, including: &'a [&'a Path]) -> Self {
        Self { config, path, directory, including, set_in: HashMap::new() }
    }

    fn origin(&self, line: u32) -> Origin {
        Origin::File { path: self.path.to_owned(), line }
    }

    /// A second line that sets the same name is usually a forgotten one.
    fn notice_duplicate(&mut self, name: &str, value: &str, line: u32) {
        if let Some((before, other)) = self.set_in.insert(name.to_owned(), (line, value.to_owned()))
            && other != value
        {
            let message = format!("{name} was already set in line {before} of this file; this line counts");
            self.config.notice(self.origin(line), NoticeKind::Duplicate, message);
        }
    }
}

impl syntax::Variables for FileScope<'_> {
    fn value(&self, name: &str) -> Option<&str> {
        self.config.get(name).map(|setting| setting.value.as_str())
    }

    fn assign(&mut self, name: &str, value: String, line: u32, how: Assignment) {
        let origin = self.origin(line);
        if name == "CVMFS_CONFIG_REPOSITORY" && self.config.config_repository_frozen {
            if self.value(name) == Some(&value) {
                return;
            }
            let message = "CVMFS_CONFIG_REPOSITORY cannot be changed after default.d: ignored".to_owned();
            return self.config.notice(origin, NoticeKind::ConfigRepository, message);
        }
        if name == "CVMFS_FQRN" {
            return;
        }
        if how == Assignment::Plain {
            self.notice_duplicate(name, &value, line);
        }
        self.config.insert(name, &value, origin);
    }

    fn include(&mut self, path: &str, _line: u32) -> Result<Flow, String> {
        let path = normal(&self.directory.join(path));
        let mut including = self.including.to_vec();
        including.push(self.path);
        if including.contains(&path.as_path()) {
            return Err(format!("{} includes itself", path.display()));
        }
        self.config.includes += 1;
        if including.len() > MAX_INCLUDE_DEPTH || self.config.includes > MAX_INCLUDES {
            return Err(format!("{} is included too deep, or too many files are", path.display()));
        }
        let inside = path.clone();
        let text = match patiently(move || read_file(&inside)) {
            Some(Ok(text)) => text,
            Some(Err(error)) => return Err(error.to_string()),
            None => return Err(format!("{} cannot be read in time", path.display())),
        };
        let mut scope = FileScope::new(self.config, &path, self.directory, &including);
        Ok(syntax::evaluate(&text, &mut scope))
    }

    fn test_file(&self, test: FileTest, path: &str) -> bool {
        let path = self.directory.join(path);
        let answer = move || {
            let found = std::fs::metadata(&path);
            match test {
                FileTest::Exists => found.is_ok(),
                FileTest::IsFile => found.is_ok_and(|found| found.is_file()),
                FileTest::IsDirectory => found.is_ok_and(|found| found.is_dir()),
                FileTest::IsReadable => File::open(&path).is_ok(),
                FileTest::HasContent => found.is_ok_and(|found| found.len() > 0),
            }
        };
        patiently(answer).unwrap_or(false)
    }

    fn read_file(&self, path: &str) -> Option<String> {
        let path = self.directory.join(path);
        patiently(move || read_file(&path)).and_then(Result::ok)
    }

    fn report(&mut self, line: u32, problem: String) {
        let origin = self.origin(line);
        self.config.notice(origin, NoticeKind::NotExecuted, problem);
    }
}

/// The path without `.` and `..`, so that one file has one name here.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            std::path::Component::CurDir => {}
            std::path::Component::ParentDir => {
                normal.pop();
            }
            other => normal.push(other),
        }
    }
    normal
}
