//! The one error type of conversions, and how errors become exit codes.

use std::error::Error;
use std::io;
use std::path::PathBuf;

use cvmfs_publish::PublishError;
use registry::{ErrorKind, RegistryError};
use thin_image::ThinImageError;

use crate::policy::PolicyError;
use crate::wishes::RecipeError;

/// Why a conversion failed. The message names the object; causes are chained.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The registry, or what it served.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The repository.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// A layer that is not what the image says, or cannot be published.
    #[error("layer {digest}")]
    Ingest {
        /// Digest of the layer's blob.
        digest: String,
        /// The stream, or the entry and the rule that it breaks.
        #[source]
        cause: PublishError,
    },
    /// The directory for downloaded layers.
    #[error("cannot keep downloaded layers in {} (--spool names another directory)", directory.display())]
    Spool {
        /// The directory.
        directory: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The thin image cannot be written.
    #[error("cannot write {}", file.display())]
    Output {
        /// The docker-archive or tarball.
        file: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The local Docker engine does not take the image.
    #[error("{command}: {reason}")]
    Engine {
        /// The program and its verb.
        command: String,
        /// What it says.
        reason: String,
    },
    /// The layers are published, but the thin image is not where it should be.
    #[error(
        "the layers are published in revision {revision}, but the thin image is not; run the same command again"
    )]
    ThinImageMissing {
        /// The repository's revision.
        revision: u64,
        /// Why.
        #[source]
        cause: Box<ConvertError>,
    },
    /// A thin image cannot hold this.
    #[error(transparent)]
    ThinImage(#[from] ThinImageError),
    /// The request makes no sense as it stands.
    #[error("{0}")]
    Usage(String),
    /// The source image cannot be converted.
    #[error("{image}: {reason}")]
    Unsuitable {
        /// The image.
        image: String,
        /// Why, and what to do.
        reason: String,
    },
    /// The image was fetched before, and has not changed since.
    #[error(
        "{error}; it has not changed, and is fetched again not before {until} (to have it fetched now, remove {})",
        record.display()
    )]
    KnownUnfit {
        /// What is wrong with it.
        error: String,
        /// When it is tried again.
        until: String,
        /// The record of the failure.
        record: PathBuf,
    },
    /// The policy does not let the image pass.
    #[error("{image} is refused by the policy (scope {scope}): {reason}")]
    Refused {
        /// The image.
        image: String,
        /// The scope of the policy that counts for it.
        scope: String,
        /// The requirement that is not met.
        reason: String,
    },
    /// A policy that cannot be used.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// A wish list that cannot be used.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// Another process works on the same wish list.
    #[error(
        "another process works with {}; wait for its end. A list of its own needs --state and --subdirectory of its own",
        directory.display()
    )]
    Busy {
        /// The directory of records.
        directory: PathBuf,
    },
    /// A record that cannot be read.
    #[error(
        "the record {} cannot be read, so nothing is removed; remove it by hand, and its image is looked at again",
        file.display()
    )]
    Record {
        /// The file.
        file: PathBuf,
    },
    /// Records of another repository.
    #[error(
        "the records are of repository {before}, and the list is for {now}; give it a directory of its own (--state)"
    )]
    OtherRepository {
        /// The list's.
        now: String,
        /// The records'.
        before: String,
    },
    /// The records of earlier rounds.
    #[error("cannot keep records in {} (--state names another directory)", path.display())]
    State {
        /// File or directory.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The status page cannot be offered.
    #[error("cannot listen on {address}")]
    Listen {
        /// Address and port.
        address: String,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The user asked to stop.
    #[error("interrupted: nothing was published")]
    Interrupted,
}

/// Exit codes, as the command-line contract has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitStatus(pub u8);

impl ExitStatus {
    /// Wrong usage.
    pub const USAGE: Self = Self(2);
    const FAILED: Self = Self(1);
    const TRUST: Self = Self(3);
    const NETWORK: Self = Self(4);
    const NOT_FOUND: Self = Self(5);
    const OUT_OF_SPACE: Self = Self(6);
    const INTERRUPTED: Self = Self(130);
}

impl ConvertError {
    /// 1 failed, 2 usage, 3 trust, 4 network, 5 not found, 6 out of space, 130
    /// interrupted.
    pub fn exit_status(&self) -> ExitStatus {
        match self {
            _ if self.is_interruption() => ExitStatus::INTERRUPTED,
            Self::Registry(RegistryError::Reference(_) | RegistryError::Url { .. })
            | Self::Usage(_)
            | Self::Recipe(_)
            | Self::Policy(_) => ExitStatus::USAGE,
            Self::Refused { .. } => ExitStatus::TRUST,
            Self::Registry(error) => match error.kind() {
                ErrorKind::Network => ExitStatus::NETWORK,
                ErrorKind::NotFound => ExitStatus::NOT_FOUND,
                ErrorKind::Other => ExitStatus::FAILED,
            },
            Self::Publish(error) | Self::Ingest { cause: error, .. } => ExitStatus(error.exit_code()),
            Self::Spool { cause, .. } | Self::Output { cause, .. } | Self::State { cause, .. }
                if is_out_of_space(cause) =>
            {
                ExitStatus::OUT_OF_SPACE
            }
            Self::ThinImageMissing { cause, .. } => cause.exit_status(),
            _ => ExitStatus::FAILED,
        }
    }

    /// Whether the user asked for it.
    pub fn is_interruption(&self) -> bool {
        matches!(
            self,
            Self::Registry(RegistryError::Cancelled)
                | Self::Publish(PublishError::Interrupted)
                | Self::Interrupted
        )
    }

    /// Whether the image itself is at fault: fetching it again is of no use as long as it does not change.
    pub(crate) fn is_of_the_image(&self) -> bool {
        let is_at_fault = match self {
            Self::Ingest { cause, .. } => {
                matches!(cause, PublishError::Input(_) | PublishError::Tar(_) | PublishError::Entry { .. })
            }
            Self::Registry(error) => matches!(error, RegistryError::WrongDigest { .. }),
            _ => false,
        };
        let is_of_the_system = |cause: &(dyn std::error::Error + 'static)| {
            cause.downcast_ref::<io::Error>().is_some_and(|error| error.raw_os_error().is_some())
        };
        is_at_fault && !self.causes().any(is_of_the_system)
    }

    /// The message with all its causes in one line.
    pub fn full_message(&self) -> String {
        let mut text = self.to_string();
        for cause in self.causes() {
            let part = cause.to_string();
            // Some messages quote their cause already.
            if !text.ends_with(&part) {
                text.push_str(": ");
                text.push_str(&part);
            }
        }
        text
    }

    /// What caused it, nearest first.
    fn causes(&self) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
        std::iter::successors(self.source(), |&cause| cause.source())
    }
}

fn is_out_of_space(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_class_of_error_has_its_exit_code() {
        let full = || io::Error::from(io::ErrorKind::StorageFull);
        let host = || "h".to_owned();
        let object = || "o".to_owned();
        let cases = [
            (ConvertError::Usage(String::new()), 2),
            (RegistryError::Network { object: object(), host: host(), cause: String::new() }.into(), 4),
            (RegistryError::NotFound { object: object(), host: host(), detail: String::new() }.into(), 5),
            (RegistryError::Denied { object: object(), host: host(), reason: String::new() }.into(), 1),
            (PublishError::Trust(String::new()).into(), 3),
            (ConvertError::Refused { image: object(), scope: object(), reason: object() }, 3),
            (ConvertError::Spool { directory: "d".into(), cause: full() }, 6),
            (ConvertError::Output { file: "f".into(), cause: full() }, 6),
            (ConvertError::Interrupted, 130),
        ];
        for (error, code) in cases {
            assert_eq!(error.exit_status(), ExitStatus(code), "{error:?}");
        }
    }

    #[test]
    fn the_full_message_names_all_causes_once() {
        let cause = io::Error::other("disk on fire");
        let inner = ConvertError::Output { file: "x.tar".into(), cause };
        let error = ConvertError::ThinImageMissing { revision: 3, cause: Box::new(inner) };
        assert!(
            error.full_message().ends_with("run the same command again: cannot write x.tar: disk on fire")
        );
    }
}
