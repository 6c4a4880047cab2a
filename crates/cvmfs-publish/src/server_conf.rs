//! `server.conf`: the settings of the C++ server tools for one repository (publisher behaviour §2 and §7).
//!
//! Who moves to this publisher keeps the file; what it says about new content holds here too, unless the command line
//! says otherwise. The file is a shell script by its form; only plain assignments are understood, nothing is run.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use cvmfs_format::Compression;
use cvmfs_format::chunking::ChunkSizes;

use crate::balance::CatalogLimits;
use crate::error::PublishError;
use crate::settings::validated;

/// A real one has 2 KiB.
const MAX_FILE: u64 = 1 << 20;

/// What a `server.conf` says; `None` where it says nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServerConf {
    /// `CVMFS_IGNORE_SPECIAL_FILES`: leave out devices, fifos and sockets.
    pub ignore_special_files: Option<bool>,
    /// `CVMFS_INCLUDE_XATTRS`: publish extended attributes.
    pub include_xattrs: Option<bool>,
    /// `CVMFS_IGNORE_XDIR_HARDLINKS`: hard links across directories become independent entries; otherwise they are
    /// refused.
    pub ignore_xdir_hard_links: Option<bool>,
    /// `CVMFS_ENABLE_MTIME_NS`: record the nanoseconds of modification times.
    pub nanoseconds: Option<bool>,
    /// `CVMFS_REPOSITORY_TTL`: seconds that clients keep the manifest, from the next revision on.
    pub ttl: Option<u32>,
    /// `CVMFS_COMPRESSION_ALGORITHM`.
    pub compression: Option<Compression>,
    /// `CVMFS_MIN_CHUNK_SIZE`, `CVMFS_AVG_CHUNK_SIZE`, `CVMFS_MAX_CHUNK_SIZE`.
    pub chunk_sizes: Option<ChunkSizes>,
    /// `CVMFS_AUTOCATALOGS_MAX_WEIGHT` and `_MIN_WEIGHT`, if `CVMFS_AUTOCATALOGS` is on.
    pub catalog_limits: Option<CatalogLimits>,
}

impl ServerConf {
    /// Where the C++ tools keep the file of a repository.
    pub fn usual_place(fqrn: &str) -> PathBuf {
        Path::new("/etc/cvmfs/repositories.d").join(fqrn).join("server.conf")
    }

    /// Reads a file.
    ///
    /// # Errors
    /// It cannot be read, or a setting has a value that makes no sense.
    pub fn read(path: &Path) -> Result<ServerConf, PublishError> {
        let mut text = Vec::new();
        let file = File::open(path).map_err(PublishError::local("read", path))?;
        file.take(MAX_FILE + 1).read_to_end(&mut text).map_err(PublishError::local("read", path))?;
        if text.len() as u64 > MAX_FILE {
            let large = io::Error::new(io::ErrorKind::FileTooLarge, "is too large for a server.conf");
            return Err(PublishError::local("read", path)(large));
        }
        ServerConf::parse(&String::from_utf8_lossy(&text))
            .map_err(|reason| PublishError::Usage(format!("{}: {reason}", path.display())))
    }

    fn parse(text: &str) -> Result<ServerConf, String> {
        let values: HashMap<&str, &str> = text.lines().filter_map(assignment).collect();
        let size = |key: &str| match values.get(key).filter(|value| !value.is_empty()) {
            Some(value) => value.parse::<u64>().map(Some).map_err(|_| format!("{key}={value} is no number")),
            None => Ok(None),
        };
        let switch = |key: &str| match values.get(key).filter(|value| !value.is_empty()) {
            Some(value) => {
                on_or_off(value).map(Some).ok_or_else(|| format!("{key}={value} is neither true nor false"))
            }
            None => Ok(None),
        };
        let compression = match values.get("CVMFS_COMPRESSION_ALGORITHM").copied() {
            None | Some("") => None,
            Some("default") => Some(Compression::Zlib),
            Some(name) => {
                Some(name.parse().map_err(|_| format!("CVMFS_COMPRESSION_ALGORITHM={name} is not known"))?)
            }
        };
        let sizes =
            (size("CVMFS_MIN_CHUNK_SIZE")?, size("CVMFS_AVG_CHUNK_SIZE")?, size("CVMFS_MAX_CHUNK_SIZE")?);
        let chunk_sizes = match (switch("CVMFS_USE_FILE_CHUNKING")?, sizes) {
            (Some(false), _) => {
                // Pieces of bounded size are what keeps the memory bounded.
                tracing::warn!(
                    "CVMFS_USE_FILE_CHUNKING=false is not followed: large files are cut into chunks"
                );
                None
            }
            (_, (Some(min), Some(avg), Some(max))) => {
                Some(validated(ChunkSizes { min, avg, max }).map_err(|error| error.to_string())?)
            }
            _ => None,
        };
        let usual = CatalogLimits::default();
        let catalog_limits = match switch("CVMFS_AUTOCATALOGS")? {
            Some(true) => Some(CatalogLimits {
                max: size("CVMFS_AUTOCATALOGS_MAX_WEIGHT")?.unwrap_or(usual.max),
                min: size("CVMFS_AUTOCATALOGS_MIN_WEIGHT")?.unwrap_or(usual.min),
            }),
            _ => None,
        };
        let ttl = match size("CVMFS_REPOSITORY_TTL")? {
            Some(seconds) => Some(
                u32::try_from(seconds)
                    .map_err(|_| format!("CVMFS_REPOSITORY_TTL={seconds} is more than 136 years"))?,
            ),
            None => None,
        };
        Ok(ServerConf {
            ttl,
            ignore_special_files: switch("CVMFS_IGNORE_SPECIAL_FILES")?,
            include_xattrs: switch("CVMFS_INCLUDE_XATTRS")?,
            ignore_xdir_hard_links: switch("CVMFS_IGNORE_XDIR_HARDLINKS")?,
            nanoseconds: switch("CVMFS_ENABLE_MTIME_NS")?,
            compression,
            chunk_sizes,
            catalog_limits,
        })
    }
}

/// `KEY=VALUE`, with or without quotes and `export`. Values that a shell would have to work out are left out.
fn assignment(line: &str) -> Option<(&str, &str)> {
    let line = line.trim();
    let (key, value) = line.strip_prefix("export ").unwrap_or(line).split_once('=')?;
    let is_name = key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    let value = value.trim();
    let value = match value.as_bytes().first() {
        Some(&quote @ (b'"' | b'\'')) => value[1..].split(char::from(quote)).next()?,
        // a comment may follow
        _ => value.split([' ', '\t']).next()?,
    };
    (is_name && !value.contains(['$', '`', '\\'])).then_some((key, value))
}

/// As the C++ tools read switches.
fn on_or_off(value: &str) -> Option<bool> {
    match value.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Some(true),
        "false" | "no" | "off" | "0" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_assignments_count_and_the_last_one_wins() {
        let text = "# made by hand\nexport CVMFS_INCLUDE_XATTRS=\"true\"  # yes\nCVMFS_IGNORE_SPECIAL_FILES=no\n\
                    CVMFS_IGNORE_SPECIAL_FILES='YES'\nCVMFS_AUTO_TAG_TIMESPAN=\"\"\nCVMFS_IGNORE_XDIR_HARDLINKS=$X\n\
                    CVMFS_USE_FILE_CHUNKING=true\nCVMFS_MIN_CHUNK_SIZE=32768\nCVMFS_AVG_CHUNK_SIZE=65536\n\
                    CVMFS_MAX_CHUNK_SIZE=131072\nCVMFS_COMPRESSION_ALGORITHM=none\nif true; then rm -rf /; fi\n";
        let conf = ServerConf::parse(text).unwrap();
        assert_eq!(conf.include_xattrs, Some(true));
        assert_eq!(conf.ignore_special_files, Some(true));
        assert_eq!(conf.ignore_xdir_hard_links, None);
        assert_eq!(conf.compression, Some(Compression::None));
        assert_eq!(conf.chunk_sizes, Some(ChunkSizes { min: 32_768, avg: 65_536, max: 131_072 }));
        assert_eq!(conf.catalog_limits, None);
        assert_eq!(ServerConf::parse("").unwrap(), ServerConf::default());
    }

    #[test]
    fn a_value_without_sense_is_named() {
        for (text, named) in [
            ("CVMFS_INCLUDE_XATTRS=maybe", "CVMFS_INCLUDE_XATTRS=maybe"),
            ("CVMFS_MIN_CHUNK_SIZE=4M", "CVMFS_MIN_CHUNK_SIZE=4M"),
            ("CVMFS_REPOSITORY_TTL=5000000000", "CVMFS_REPOSITORY_TTL=5000000000"),
            ("CVMFS_COMPRESSION_ALGORITHM=lzma", "lzma"),
        ] {
            let error = ServerConf::parse(text).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
    }
}
