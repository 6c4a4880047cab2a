//! Text files of a bounded size.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

/// The text of a file of at most `limit` bytes; an error says what is wrong, without the file's name.
pub(crate) fn read_text(file: &Path, limit: u64) -> Result<String, String> {
    let opened = File::open(file).map_err(|error| format!("cannot be read: {error}"))?;
    let mut text = String::new();
    opened.take(limit + 1).read_to_string(&mut text).map_err(|error| format!("cannot be read: {error}"))?;
    if text.len() as u64 > limit { Err(format!("is larger than {limit} bytes")) } else { Ok(text) }
}
