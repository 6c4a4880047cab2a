//! Where a layer's content lies: `cvmfs://FQRN/PATH`.

use std::fmt;
use std::str::FromStr;

/// Longest repository name, in bytes: it becomes the name of a mount point.
const MAX_FQRN_BYTES: usize = 255;
/// Longest path component, in bytes: the limit of every file system involved.
const MAX_COMPONENT_BYTES: usize = 255;
/// Longest path, in bytes: it must stay below the kernel's 4096 with a mount point before it.
const MAX_PATH_BYTES: usize = 3072;

/// A directory in a repository. Made by [`Location::new`] or by parsing an URL; both
/// make sure that joining it to a mount point stays below the mount point.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub struct Location {
    /// Fully qualified repository name.
    pub fqrn: String,
    /// Path in the repository, without a slash at either end.
    pub path: String,
}

/// The rule that an URL breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LocationError {
    /// Another scheme, or none.
    #[error("does not begin with cvmfs://")]
    Scheme,
    /// No repository name that could be one.
    #[error(
        "the repository name must consist of letters, digits, '-' and '_', in parts with dots between them, and not \
         begin with '-'"
    )]
    RepositoryName,
    /// Nothing after the repository name.
    #[error("names no directory in the repository")]
    NoPath,
    /// `//`, or a slash at the end.
    #[error("the path has an empty component")]
    EmptyComponent,
    /// `.` or `..`.
    #[error("the path has a '.' or '..' component")]
    DotComponent,
    /// Characters that no layer path has and that confuse logs and mount tables.
    #[error("the path has a NUL, newline or other control character")]
    ControlCharacter,
    /// Longer than the kernel takes.
    #[error("the path or one of its components is too long")]
    TooLong,
}

impl Location {
    /// Checks both parts.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn new(fqrn: &str, path: &str) -> Result<Self, LocationError> {
        check_fqrn(fqrn)?;
        check_path(path)?;
        Ok(Self { fqrn: fqrn.to_owned(), path: path.to_owned() })
    }
}

impl FromStr for Location {
    type Err = LocationError;

    fn from_str(url: &str) -> Result<Self, LocationError> {
        let rest = url.strip_prefix("cvmfs://").ok_or(LocationError::Scheme)?;
        match rest.split_once('/') {
            Some((fqrn, path)) => Self::new(fqrn, path),
            None => Err(check_fqrn(rest).err().unwrap_or(LocationError::NoPath)),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cvmfs://{}/{}", self.fqrn, self.path)
    }
}

/// The rule by which clients mount, so that no image names a repository that none of them would take.
fn check_fqrn(fqrn: &str) -> Result<(), LocationError> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    let valid = fqrn.bytes().all(allowed)
        && fqrn.contains('.')
        && fqrn.split('.').all(|part| !part.is_empty())
        && !fqrn.starts_with('-')
        && fqrn.len() <= MAX_FQRN_BYTES;
    if valid { Ok(()) } else { Err(LocationError::RepositoryName) }
}

fn check_path(path: &str) -> Result<(), LocationError> {
    if path.is_empty() {
        return Err(LocationError::NoPath);
    }
    if path.len() > MAX_PATH_BYTES {
        return Err(LocationError::TooLong);
    }
    if path.chars().any(char::is_control) {
        return Err(LocationError::ControlCharacter);
    }
    path.split('/').try_for_each(|component| match component {
        "" => Err(LocationError::EmptyComponent),
        "." | ".." => Err(LocationError::DotComponent),
        long if long.len() > MAX_COMPONENT_BYTES => Err(LocationError::TooLong),
        _ => Ok(()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_of_all_known_writers_are_read() {
        for url in [
            "cvmfs://docker2cvmfs-ci.cern.ch/layers/d8e2b9f3",
            "cvmfs://unpacked.cern.ch/.layers/4f/4fb6/layerfs",
            "cvmfs://a.b/x",
            "cvmfs://A_b-1.example.org/with blank/ü",
        ] {
            assert_eq!(url.parse::<Location>().unwrap().to_string(), url);
        }
    }

    #[test]
    fn each_broken_rule_has_its_name() {
        use LocationError::*;
        let long = format!("cvmfs://a.b/{}", "x".repeat(256));
        let deep = format!("cvmfs://a.b/{}", "x/".repeat(2000) + "x");
        let named = format!("cvmfs://{}.org/x", "a".repeat(255));
        for (url, rule) in [
            ("http://a.b/x", Scheme),
            ("CVMFS://a.b/x", Scheme),
            ("/cvmfs/a.b/x", Scheme),
            ("", Scheme),
            ("cvmfs:///x", RepositoryName),
            ("cvmfs://nodot/x", RepositoryName),
            ("cvmfs://.a.b/x", RepositoryName),
            ("cvmfs://../x", RepositoryName),
            ("cvmfs://-a.b/x", RepositoryName),
            ("cvmfs://a..b/x", RepositoryName),
            ("cvmfs://a.b./x", RepositoryName),
            ("cvmfs://a.b:80/x", RepositoryName),
            ("cvmfs://a.b@c/x", RepositoryName),
            (&named, RepositoryName),
            ("cvmfs://a.b", NoPath),
            ("cvmfs://a.b/", NoPath),
            ("cvmfs://a.b//x", EmptyComponent),
            ("cvmfs://a.b/x/", EmptyComponent),
            ("cvmfs://a.b/../x", DotComponent),
            ("cvmfs://a.b/x/..", DotComponent),
            ("cvmfs://a.b/./x", DotComponent),
            ("cvmfs://a.b/x\0y", ControlCharacter),
            ("cvmfs://a.b/x\ny", ControlCharacter),
            (&long, TooLong),
            (&deep, TooLong),
        ] {
            assert_eq!(url.parse::<Location>(), Err(rule), "{url:?}");
        }
    }
}
