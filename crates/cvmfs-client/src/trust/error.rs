//! Why a revision is not believed.

use std::io;
use std::path::{Path, PathBuf};

use cvmfs_format::catalog::CatalogError;
use cvmfs_format::hash::ContentHash;
use cvmfs_format::history::HistoryError;
use cvmfs_format::manifest::ManifestError;
use cvmfs_format::signature::SignatureError;
use cvmfs_format::whitelist::WhitelistError;

use super::chain::WHITELIST;
use crate::config::Selection;
use crate::network::FetchError;

/// Why a revision is not believed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrustError {
    /// A public key file cannot be used.
    #[error("cannot use public key {}: {reason}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A blacklist exists and cannot be read.
    #[error("cannot read blacklist {}: {source}", path.display())]
    Blacklist {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something of the chain cannot be fetched.
    #[error("cannot load the {what} of {fqrn}: {source}")]
    Unavailable {
        /// The repository.
        fqrn: String,
        /// Which part of the chain.
        what: &'static str,
        /// Why.
        source: FetchError,
    },
    /// The manifest is malformed or another repository's.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The manifest names no certificate.
    #[error("manifest of {fqrn} names no certificate")]
    NoCertificate {
        /// The repository.
        fqrn: String,
    },
    /// The certificate is none.
    #[error("cannot read the certificate of {fqrn}: {source}")]
    Certificate {
        /// The repository.
        fqrn: String,
        /// Why.
        source: SignatureError,
    },
    /// The manifest was changed or signed by somebody else.
    #[error("failed to verify repository manifest of {fqrn}: {reason}")]
    ManifestSignature {
        /// The repository.
        fqrn: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The whitelist was changed or signed by somebody else.
    #[error("invalid whitelist signature of {fqrn}: {reason}")]
    WhitelistSignature {
        /// The repository.
        fqrn: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The whitelist is malformed, expired, another repository's, or does not list the certificate.
    #[error("{source} (repository {fqrn})")]
    Whitelist {
        /// The repository.
        fqrn: String,
        /// Which of these.
        source: WhitelistError,
    },
    /// The certificate is on the site's blacklist.
    #[error("certificate of {fqrn} is blacklisted")]
    CertificateBlacklisted {
        /// The repository.
        fqrn: String,
    },
    /// The revision is on the site's blacklist.
    #[error("revision {revision} of {fqrn} is blacklisted: at least {lowest} is required")]
    RevisionBlacklisted {
        /// The repository.
        fqrn: String,
        /// The revision offered.
        revision: u64,
        /// The lowest one that is allowed.
        lowest: u64,
    },
    /// The server offers an older revision than was accepted before.
    #[error(
        "revision {offered} of {fqrn} is older than the known {known}: refused{}",
        replay_advice(breadcrumb.as_deref())
    )]
    Replayed {
        /// The repository.
        fqrn: String,
        /// The revision offered.
        offered: u64,
        /// The revision accepted before.
        known: u64,
        /// The file that remembers it.
        breadcrumb: Option<PathBuf>,
    },
    /// The root catalog has the right hash and is not readable.
    #[error("root catalog {hash} of {fqrn} is not readable: {source}")]
    RootCatalog {
        /// The repository.
        fqrn: String,
        /// The catalog.
        hash: ContentHash,
        /// Why.
        source: Box<CatalogError>,
    },
    /// A tag or date was asked for and the repository has no history.
    #[error("{fqrn} has no history, so {selection} cannot be found")]
    NoHistory {
        /// The repository.
        fqrn: String,
        /// What was asked for.
        selection: Selection,
    },
    /// The history has no such revision.
    #[error("{selection} is not in the history of {fqrn}{}", tags_advice(tags))]
    NotTagged {
        /// The repository.
        fqrn: String,
        /// What was asked for.
        selection: Selection,
        /// Some tags that exist, the newest first.
        tags: Vec<String>,
    },
    /// The history has the right hash and is not readable.
    #[error("history {hash} of {fqrn} is not readable: {source}")]
    History {
        /// The repository.
        fqrn: String,
        /// The database.
        hash: ContentHash,
        /// Why.
        source: Box<HistoryError>,
    },
}

fn tags_advice(tags: &[String]) -> String {
    let shown: Vec<String> = tags.iter().map(|tag| format!("'{}'", tag.escape_debug())).collect();
    if shown.is_empty() { "; it has no tags".to_owned() } else { format!("; it has {}", shown.join(", ")) }
}

fn replay_advice(breadcrumb: Option<&Path>) -> String {
    breadcrumb.map_or(String::new(), |path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let manifest = name.replace("cvmfschecksum", "cvmfsmanifest");
        format!("; if the repository was made anew, remove {} and {manifest} to accept it", path.display())
    })
}

impl TrustError {
    /// The fetch that failed, if that is the reason.
    pub(crate) fn fetch_error(&self) -> Option<&FetchError> {
        match self {
            Self::Unavailable { source, .. } => Some(source),
            _ => None,
        }
    }

    /// Whether another host may serve something better (repository format §4.3): not if nothing could be loaded,
    /// which the fetcher has tried on all hosts, and not if the certificate is refused.
    pub(super) fn is_worth_another_host(&self) -> bool {
        match self {
            Self::Unavailable { what, .. } => *what == WHITELIST,
            Self::Key { .. } | Self::Blacklist { .. } => false,
            Self::Whitelist { source: WhitelistError::NotListed(_) | WhitelistError::Chain(_), .. } => false,
            Self::CertificateBlacklisted { .. } | Self::RevisionBlacklisted { .. } => false,
            Self::NoHistory { .. } | Self::NotTagged { .. } => false,
            _ => true,
        }
    }

    /// Whether the last good revision may be used instead.
    pub(super) fn leaves_last_good(&self) -> bool {
        !matches!(
            self,
            Self::Key { .. }
                | Self::Blacklist { .. }
                | Self::CertificateBlacklisted { .. }
                | Self::RevisionBlacklisted { .. }
        )
    }
}
