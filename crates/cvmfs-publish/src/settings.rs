//! What a repository remembers about how it wants to be published.
//!
//! The repository format has no place for the compression, the deflate implementation
//! or the chunk sizes of future publishes; the C++ tools keep them in `server.conf`
//! beside the storage. We keep them in the repository itself, in the metainfo object
//! (format §16) under `custom.publisher`: it is signed, travels with the storage, needs no
//! local state, and the C++ tools carry it along unread.
//!
//! A repository without that key was made by the C++ tools. It is continued in their
//! manner: stock deflate (so that equal files get equal object names), zlib, no nanoseconds.

use cvmfs_format::chunking::{ChunkDetector, ChunkSizes};
use cvmfs_format::{Compression, Deflate};
use serde::{Deserialize, Serialize};

use crate::error::PublishError;

/// Chunks are compressed in memory, several at a time.
const MAX_CHUNK: u64 = 64 << 20;

/// Parses `MIN:AVG:MAX` in bytes, each with an optional suffix K or M (format §18.1).
pub fn parse_chunk_sizes(text: &str) -> Result<ChunkSizes, PublishError> {
    let sizes: Option<Vec<u64>> = text.split(':').map(parse_size).collect();
    match sizes.as_deref() {
        Some(&[min, avg, max]) => validated(ChunkSizes { min, avg, max }),
        _ => Err(PublishError::Usage(format!("{text:?} is not of the form MIN:AVG:MAX, such as 4M:8M:16M"))),
    }
}

pub(crate) fn validated(sizes: ChunkSizes) -> Result<ChunkSizes, PublishError> {
    ChunkDetector::new(sizes).map_err(|error| PublishError::Usage(error.to_string()))?;
    if sizes.max > MAX_CHUNK {
        return Err(PublishError::Usage(format!(
            "chunks of {} bytes exceed the limit of {MAX_CHUNK}",
            sizes.max
        )));
    }
    Ok(sizes)
}

fn parse_size(text: &str) -> Option<u64> {
    let (digits, unit) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 1 << 10),
        b'M' | b'm' => (&text[..text.len() - 1], 1 << 20),
        _ => (text, 1),
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

/// How new content is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Which deflate produces the zlib streams, and so the object names.
    pub deflate: Deflate,
    /// Compression of file contents (catalogs and the like are always zlib).
    pub compression: Compression,
    /// When and how large files are cut.
    pub chunks: ChunkSizes,
    /// Whether the nanoseconds of modification times are recorded.
    pub nanoseconds: bool,
    /// Whether the repository itself says so; otherwise a `server.conf` may.
    pub is_recorded: bool,
}

impl Settings {
    /// Settings of repositories that the C++ tools made.
    pub fn foreign() -> Settings {
        Settings {
            deflate: Deflate::Stock,
            compression: Compression::Zlib,
            chunks: ChunkSizes::default(),
            nanoseconds: false,
            is_recorded: false,
        }
    }

    /// Settings of new repositories.
    pub fn new_repository(compression: Compression) -> Settings {
        Settings {
            deflate: Deflate::Fast,
            compression,
            chunks: ChunkSizes::default(),
            nanoseconds: true,
            is_recorded: true,
        }
    }

    /// The metainfo object of a new repository: the usual keys, empty, and these settings.
    pub fn to_metainfo(self) -> Vec<u8> {
        let record = Record {
            deflate: self.deflate.name().to_owned(),
            compression: self.compression.name().to_owned(),
            chunks: [self.chunks.min, self.chunks.avg, self.chunks.max],
            nanoseconds: self.nanoseconds,
        };
        let metainfo = serde_json::json!({
            "administrator": "", "email": "", "organisation": "", "description": "", "url": "",
            "recommended-stratum0": "", "recommended-stratum1s": [],
            "custom": { "publisher": record },
        });
        let mut text = serde_json::to_vec_pretty(&metainfo).expect("a JSON value always has a text");
        text.push(b'\n');
        text
    }

    /// Reads the settings from a metainfo object; what is absent or unreadable is as the C++ tools have it.
    pub fn from_metainfo(metainfo: &[u8]) -> Settings {
        let foreign = Settings::foreign();
        let Ok(mut document) = serde_json::from_slice::<serde_json::Value>(metainfo) else { return foreign };
        let record = document.pointer_mut("/custom/publisher").map(serde_json::Value::take);
        let Some(Ok(record)) = record.map(serde_json::from_value::<Record>) else { return foreign };
        let [min, avg, max] = record.chunks;
        Settings {
            deflate: record.deflate.parse().unwrap_or(foreign.deflate),
            compression: record.compression.parse().unwrap_or(foreign.compression),
            chunks: validated(ChunkSizes { min, avg, max }).unwrap_or_default(),
            nanoseconds: record.nanoseconds,
            is_recorded: true,
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    deflate: String,
    compression: String,
    /// Smallest, mean, largest.
    chunks: [u64; 3],
    nanoseconds: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_survive_their_metainfo() {
        let mut settings = Settings::new_repository(Compression::None);
        settings.chunks = ChunkSizes { min: 32, avg: 64, max: 128 };
        assert_eq!(Settings::from_metainfo(&settings.to_metainfo()), settings);
    }

    #[test]
    fn a_repository_of_the_cpp_tools_keeps_their_ways() {
        let text = br#"{"administrator": "x", "custom": {"_comment": "Put arbitrary structured data here"}}"#;
        assert_eq!(Settings::from_metainfo(text), Settings::foreign());
        assert_eq!(Settings::from_metainfo(b"not json"), Settings::foreign());
    }

    #[test]
    fn chunk_sizes_are_parsed_and_bounded() {
        let sizes = parse_chunk_sizes("4M:8M:16M").unwrap();
        assert_eq!(sizes, ChunkSizes::default());
        for bad in
            ["", "1:2", "4M:8M:16M:32M", "8M:4M:16M", "1:2:3", "4M:8M:1000M", "4M:8M:99999999999999999999M"]
        {
            assert!(parse_chunk_sizes(bad).is_err(), "{bad} was accepted");
        }
    }
}
