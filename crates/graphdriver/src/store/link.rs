//! Short names of lower directories: `l/<26 characters>`, symbolic links that keep the
//! list of lowers short (graph driver plugin §10).

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rand::RngExt;
use thin_image::Location;

use super::{Lower, StoreError};
use crate::layer_id::LayerId;

/// Directory of the links below the store.
pub(super) const LINK_DIRECTORY: &str = "l";
/// 26 characters of 5 bits, the length that Docker's overlay2 uses.
const NAME_LENGTH: usize = 26;
const BASE32: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";

/// The name of a link, without directory.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct LinkName(String);

impl LinkName {
    /// A name that is not in use: 130 random bits.
    pub(super) fn random() -> Self {
        let mut random = rand::rng();
        Self((0..NAME_LENGTH).map(|_| char::from(BASE32[random.random_range(0..BASE32.len())])).collect())
    }

    /// Reads a name; overlay2 writes 26 characters of base 32.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let valid = text.len() == NAME_LENGTH && text.bytes().all(|b| BASE32.contains(&b));
        valid.then(|| Self(text.to_owned()))
    }

    /// `l/NAME`, as it stands in `lower`.
    pub(super) fn entry(&self) -> String {
        format!("{LINK_DIRECTORY}/{}", self.0)
    }

    /// Reads `l/NAME`.
    pub(super) fn parse_entry(entry: &str) -> Option<Self> {
        Self::parse(entry.strip_prefix(LINK_DIRECTORY)?.strip_prefix('/')?)
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    fn path(&self, home: &Path) -> PathBuf {
        home.join(LINK_DIRECTORY).join(&self.0)
    }

    /// Makes the link point to `lower`.
    pub(super) fn create(&self, home: &Path, lower: &Lower) -> Result<(), StoreError> {
        let target = match lower {
            Lower::Layer(id) => format!("../{id}/diff"),
            Lower::Repository(location) => format!("../cvmfs/{}/{}", location.fqrn, location.path),
        };
        let path = self.path(home);
        std::os::unix::fs::symlink(target, &path).map_err(|cause| StoreError::io("create", path, cause))
    }

    /// Removes the link; one that is not there is fine.
    pub(super) fn remove(&self, home: &Path) -> Result<(), StoreError> {
        let path = self.path(home);
        match fs::remove_file(&path) {
            Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
                Err(StoreError::io("remove", path, cause))
            }
            _ => Ok(()),
        }
    }

    /// What the link stands for. The target is validated like a descriptor's URL: the
    /// Go plugin wrote links from unchecked ones.
    pub(super) fn resolve(&self, home: &Path) -> Result<Lower, StoreError> {
        let path = self.path(home);
        let target = fs::read_link(&path).map_err(|cause| StoreError::io("read", path.clone(), cause))?;
        parse_target(target.as_os_str().as_bytes()).ok_or(StoreError::BadLink { path, target })
    }
}

fn parse_target(target: &[u8]) -> Option<Lower> {
    let (first, rest) = std::str::from_utf8(target).ok()?.strip_prefix("../")?.split_once('/')?;
    if first == "cvmfs" {
        let (fqrn, path) = rest.split_once('/')?;
        return Some(Lower::Repository(Location::new(fqrn, path).ok()?));
    }
    (rest == "diff").then(|| first.parse::<LayerId>().ok().map(Lower::Layer))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_layers_or_places_in_a_repository_and_nothing_else() {
        assert_eq!(parse_target(b"../abc/diff"), Some(Lower::Layer("abc".parse().unwrap())));
        let place = Location::new("a.b", "layers/x").unwrap();
        assert_eq!(parse_target(b"../cvmfs/a.b/layers/x"), Some(Lower::Repository(place)));
        for target in [
            "/etc",
            "../abc",
            "../abc/work",
            "../abc/diff/x",
            "../../x/diff",
            "../cvmfs/a.b",
            "../cvmfs/a.b/../x",
            "../cvmfs/../x/y",
        ] {
            assert_eq!(parse_target(target.as_bytes()), None, "{target}");
        }
    }

    #[test]
    fn names_have_the_form_of_overlay2() {
        let name = LinkName::random();
        assert_eq!(LinkName::parse_entry(&name.entry()), Some(name));
        assert!(LinkName::parse_entry("l/../../etc/passwd-aaaaaaaaa").is_none());
        assert!(LinkName::parse_entry("l/SHORT").is_none());
    }
}
