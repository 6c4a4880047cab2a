//! What is compared with the model.

use std::fmt;

use crate::site::Site;
use crate::tree::Attributes;

/// Why an operation failed.
#[derive(Debug, Clone)]
pub struct Errno {
    pub number: i32,
    pub text: String,
}

impl fmt::Display for Errno {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "errno {}: {}", self.number, self.text)
    }
}

/// A client of a [`Site`]. Stopped when dropped.
pub trait Client: Sized + Sync {
    type File: Sync;

    fn start(site: &Site) -> Result<Self, String>;

    /// Kills what can be killed without an effect that anybody may see.
    fn crash(&self);

    fn revision(&self) -> u64;

    /// Looks for a newer revision now.
    fn refresh(&self) -> Result<(), String>;

    /// The attributes of the entry; nothing if there is none.
    fn look_up(&self, path: &str) -> Result<Option<Attributes>, Errno>;

    /// The names in a directory, in any order; nothing if there is no directory.
    fn list(&self, path: &str) -> Result<Option<Vec<String>>, Errno>;

    /// Opens a regular file; nothing if there is no entry.
    fn open(&self, path: &str) -> Result<Option<Self::File>, Errno>;

    /// Reads at most `length` bytes; fewer only at the end.
    fn read(&self, file: &Self::File, offset: u64, length: usize) -> Result<Vec<u8>, Errno>;
}
