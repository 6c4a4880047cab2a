//! Small files and links, as an archive to be ingested.

use std::collections::BTreeMap;

use layer_tar::{AbsoluteNames, LayerEntryMeta, LayerPath, LayerWriter};

use crate::failure::ConvertError;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Member {
    /// A regular file with this content.
    File(Vec<u8>),
    /// The same, executable.
    Program(Vec<u8>),
    /// A symbolic link.
    Link(String),
}

/// Entries by their paths, without a slash in front.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Members(BTreeMap<String, Member>);

impl Members {
    pub(super) fn add(&mut self, path: &str, member: Member) {
        self.0.insert(path.to_owned(), member);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The archive. All times are 0, all owners root: it depends on its members alone.
    pub(super) fn to_tar(&self) -> Result<Vec<u8>, ConvertError> {
        let mut archive = LayerWriter::new(Vec::new());
        for (path, member) in &self.0 {
            let refused = |reason: String| {
                ConvertError::Usage(format!("{path:?} cannot be a path in a repository: {reason}"))
            };
            let place = LayerPath::parse(path.as_bytes(), AbsoluteNames::default());
            let meta = LayerEntryMeta {
                path: place.map_err(|error| refused(error.to_string()))?,
                mode: match member {
                    Member::File(_) => 0o644,
                    Member::Program(_) => 0o755,
                    Member::Link(_) => 0o777,
                },
                uid: 0,
                gid: 0,
                mtime: (0, 0),
                xattrs: Vec::new(),
            };
            match member {
                Member::File(bytes) | Member::Program(bytes) => {
                    archive.append_file(&meta, bytes.len() as u64, bytes.as_slice())
                }
                Member::Link(target) => archive.append_symlink(&meta, target.as_bytes()),
            }
            .map_err(|error| refused(error.to_string()))?;
        }
        archive.finish().map_err(|error| ConvertError::Usage(error.to_string()))
    }
}
