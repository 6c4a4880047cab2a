//! Errors of registry access.

use std::time::Duration;

use crate::credentials::CredentialsError;
use crate::digest::Digest;
use crate::manifest::ManifestError;
use crate::reference::ReferenceError;

/// What went wrong between us and a registry. Each message names the object and the
/// host; none contains a secret or the query of an URL, which may hold a signature.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// Not an image reference.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// A registry URL that is none.
    #[error("registry URL {url:?}: {rule}")]
    Url {
        /// The text.
        url: String,
        /// The rule that it breaks.
        rule: &'static str,
    },
    /// The local part of HTTP or TLS cannot be set up.
    #[error("cannot set up the HTTP client: {0}")]
    Setup(String),
    /// Credentials of the user cannot be read.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// The registry does not have it.
    #[error(
        "{object} not found in registry {host}{detail}; check the image's name and tag, or push it again"
    )]
    NotFound {
        /// Manifest, configuration or layer.
        object: String,
        /// Host and port.
        host: String,
        /// The registry's own words, with a separator.
        detail: String,
    },
    /// A local source lacks it.
    #[error("{object} not found in {place}")]
    NotInSource {
        /// Manifest, configuration or layer.
        object: String,
        /// The archive or directory.
        place: String,
    },
    /// No or insufficient rights.
    #[error("registry {host} denies access to {object}: {reason}")]
    Denied {
        /// Manifest, configuration or layer.
        object: String,
        /// Host and port.
        host: String,
        /// Why, and what to do.
        reason: String,
    },
    /// Too many requests, and the registry asks for a longer pause than we grant.
    #[error("registry {host} limits requests; {object} can be asked for again {}", when(*pause))]
    RateLimited {
        /// Manifest, configuration or layer.
        object: String,
        /// Host and port.
        host: String,
        /// The pause that it asks for, if stated.
        pause: Option<Duration>,
    },
    /// Any other unexpected answer.
    #[error(
        "registry {host} answers {status} to the request for {object}{detail}; try again later, or look at the \
         registry's log"
    )]
    Status {
        /// Manifest, configuration or layer.
        object: String,
        /// Host and port.
        host: String,
        /// The HTTP status.
        status: u16,
        /// The registry's own words, with a separator.
        detail: String,
    },
    /// Connection refused, name unknown, TLS failure, connection lost.
    #[error("{object}: cannot reach {host}: {cause}")]
    Network {
        /// Manifest, configuration or layer.
        object: String,
        /// Host and port.
        host: String,
        /// The chain of causes in one line.
        cause: String,
    },
    /// No byte within the deadline.
    #[error("{object}: {host} did not answer within {} s", waited.as_secs())]
    Timeout {
        /// Manifest, configuration or layer.
        object: String,
        /// Host and port.
        host: String,
        /// How long we waited.
        waited: Duration,
    },
    /// The bytes are not those that the digest promises.
    #[error(
        "{object} from {host} has digest {found}, not {expected}: the content was damaged or exchanged there, or on its way"
    )]
    WrongDigest {
        /// Manifest, configuration or layer.
        object: String,
        /// Host and port.
        host: String,
        /// As the manifest or reference says.
        expected: Digest,
        /// Of the bytes that came.
        found: Digest,
    },
    /// More or fewer bytes than promised.
    #[error("{object} from {host} has {found} bytes, not {expected}")]
    WrongSize {
        /// Manifest, configuration or layer.
        object: String,
        /// Host and port.
        host: String,
        /// As the manifest says.
        expected: u64,
        /// As the answer says, or how many came before the end.
        found: u64,
    },
    /// A document beyond the bound for its kind.
    #[error("{object} from {host} is larger than {limit} bytes")]
    TooLarge {
        /// Manifest or configuration.
        object: String,
        /// Host and port.
        host: String,
        /// The bound in bytes.
        limit: u64,
    },
    /// The document breaks the format.
    #[error("{object}: {cause}")]
    Manifest {
        /// The image.
        object: String,
        /// The rule.
        #[source]
        cause: ManifestError,
    },
    /// The image configuration breaks the format.
    #[error("{object}: {reason}")]
    Configuration {
        /// The image.
        object: String,
        /// The rule.
        reason: String,
    },
    /// The index has no image for the platform.
    #[error("{object} has no image for {wanted}; it has: {offered}")]
    NoPlatform {
        /// The image.
        object: String,
        /// The platform asked for.
        wanted: String,
        /// Those there are.
        offered: String,
    },
    /// A redirect or token service that would expose credentials or lead nowhere.
    #[error("{object}: registry {host} {reason}")]
    Misdirected {
        /// Manifest, configuration or layer.
        object: String,
        /// Host and port.
        host: String,
        /// What it did.
        reason: String,
    },
    /// Local input of a push or a spool cannot be read.
    #[error("{object}: {cause}")]
    Local {
        /// What was to be read.
        object: String,
        /// Why it failed.
        #[source]
        cause: std::io::Error,
    },
    /// The caller cancelled the work.
    #[error("interrupted")]
    Cancelled,
}

fn when(pause: Option<Duration>) -> String {
    pause.map_or_else(|| "later".to_owned(), |pause| format!("in {} s", pause.as_secs()))
}

/// Classes of errors that callers treat alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The registry cannot be reached or does not work at the moment.
    Network,
    /// The object does not exist.
    NotFound,
    /// Everything else.
    Other,
}

impl RegistryError {
    /// The class, for exit codes.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Network { .. } | Self::Timeout { .. } | Self::Status { .. } | Self::RateLimited { .. } => {
                ErrorKind::Network
            }
            Self::NotFound { .. } | Self::NotInSource { .. } | Self::NoPlatform { .. } => ErrorKind::NotFound,
            _ => ErrorKind::Other,
        }
    }
}
