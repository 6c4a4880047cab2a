//! Reading a whole archive into memory, and running the tools it is compared with.
#![allow(dead_code)]

use layer_tar::{DataRange, EntryKind, LayerReader, Limits, TarError, Timestamp, Xattr};
use std::io::Read;
use std::path::Path;
use std::process::Command;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub path: Vec<u8>,
    pub kind: EntryKind,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Timestamp,
    pub xattrs: Vec<Xattr>,
    pub content: Vec<u8>,
    pub ranges: Vec<DataRange>,
}

pub fn read_all(archive: &[u8]) -> Result<Vec<Found>, TarError> {
    drain(LayerReader::new(archive, Limits::default()))
}

pub fn drain<R: Read>(mut reader: LayerReader<R>) -> Result<Vec<Found>, TarError> {
    let mut entries = Vec::new();
    while let Some(mut entry) = reader.next_entry()? {
        let mut content = Vec::new();
        if let Err(error) = entry.read_to_end(&mut content) {
            return Err(error.downcast::<TarError>().expect("content errors are archive errors"));
        }
        entries.push(Found {
            path: entry.path.as_bytes().to_vec(),
            kind: entry.kind.clone(),
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            xattrs: entry.xattrs.clone(),
            ranges: entry.content.ranges().to_vec(),
            content,
        });
    }
    Ok(entries)
}

pub fn find<'a>(entries: &'a [Found], path: &[u8]) -> &'a Found {
    entries
        .iter()
        .find(|entry| entry.path == path)
        .unwrap_or_else(|| panic!("no entry '{}' in {:?}", path.escape_ascii(), names(entries)))
}

pub fn names(entries: &[Found]) -> Vec<String> {
    entries.iter().map(|entry| entry.path.escape_ascii().to_string()).collect()
}

/// Runs a shell script in `directory` and returns what it prints.
pub fn sh(directory: &Path, script: &str) -> Vec<u8> {
    let output = Command::new("bash").arg("-euc").arg(script).current_dir(directory).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}\n{errors}");
    output.stdout
}

pub fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").unwrap().uid() == 0
}
