//! What is asked for, by whom, and with what right.

use std::cell::RefCell;
use std::sync::Arc;

use crate::authz::{Caller, Credentials};

/// A file to be fetched from the hosts.
#[derive(Debug, Clone)]
pub struct Request {
    /// Path below the storage root, without a leading slash.
    pub path: String,
    /// The name used in messages.
    pub object: String,
    /// Most bytes of the body.
    pub max: u64,
    /// First and last byte, if only a part is wanted.
    pub range: Option<(u64, u64)>,
    /// Who reads, for sites that trace it (`CVMFS_HTTP_TRACING`).
    pub caller: Option<Caller>,
    /// The path inside the repository that is read, for sites that tell it (`CVMFS_SEND_INFO_HEADER`).
    pub file: Option<String>,
    /// The right to read; shown to https servers only.
    pub credentials: Option<Arc<Credentials>>,
}

thread_local! {
    /// For whom this thread fetches.
    static READER: RefCell<Option<(Caller, String)>> = const { RefCell::new(None) };
}

/// Says for whom the calling thread fetches until this is dropped: sites may want their servers to know
/// (`CVMFS_HTTP_TRACING`, `CVMFS_SEND_INFO_HEADER`). A thread that waits drives its own downloads, so this needs no
/// way through everything between a reader and a request. What is fetched ahead is fetched for nobody.
#[derive(Debug)]
pub struct OnBehalf(());

impl OnBehalf {
    /// Of a process that reads `file`, a path inside the repository.
    #[must_use]
    pub fn of(caller: Caller, file: String) -> Self {
        READER.set(Some((caller, file)));
        Self(())
    }
}

impl Drop for OnBehalf {
    fn drop(&mut self) {
        READER.take();
    }
}

impl Request {
    /// The request with what the calling thread says of its reader, where it does not say itself.
    pub(super) fn on_behalf(&self) -> Option<Self> {
        if self.caller.is_some() || self.file.is_some() {
            return None;
        }
        let (caller, file) = READER.with_borrow(Clone::clone)?;
        Some(Self { caller: Some(caller), file: Some(file), ..self.clone() })
    }

    /// A request for a whole file, on nobody's behalf.
    pub fn new(path: impl Into<String>, object: impl Into<String>, max: u64) -> Self {
        Self {
            path: path.into(),
            object: object.into(),
            max,
            range: None,
            caller: None,
            file: None,
            credentials: None,
        }
    }

    /// The path as it stands in a URL.
    pub(super) fn encoded_path(&self) -> String {
        encode(&self.path)
    }

    /// Where the object lies on the ring of proxies: the first 32 bits of its hash, zero for what has none (client
    /// behaviour §5.2).
    pub(super) fn shard_key(&self) -> u32 {
        let Some(name) = self.path.strip_prefix("data/") else { return 0 };
        let digits: String = name.chars().filter(|letter| *letter != '/').take(8).collect();
        u32::from_str_radix(&digits, 16).unwrap_or(0)
    }
}

/// Percent-encodes a path, leaving what the C++ client leaves (client behaviour §5.1).
pub(super) fn encode(path: &str) -> String {
    use std::fmt::Write;
    let mut encoded = String::with_capacity(path.len());
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || b"/:.@+-_~[],".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            // Writing to a string cannot fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_encoded_as_the_reference_does() {
        assert_eq!(encode("data/ab/cd~[x],:@+-_.C"), "data/ab/cd~[x],:@+-_.C");
        assert_eq!(encode("a b\r\n?#%ä"), "a%20b%0D%0A%3F%23%25%C3%A4");
    }

    #[test]
    fn the_key_of_an_object_is_the_beginning_of_its_hash() {
        assert_eq!(Request::new("data/ab/cdef0123456789C", "", 0).shard_key(), 0xABCD_EF01);
        assert_eq!(Request::new(".cvmfspublished", "", 0).shard_key(), 0);
    }
}
