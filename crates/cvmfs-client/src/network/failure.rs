//! What can go wrong with a request, and whom it blames (client behaviour §6).

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// Why an object could not be fetched. Cheap to clone: everybody who waited for one download gets the same answer.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// Every server says that the object does not exist.
    #[error("{object} does not exist on any server (last asked: {place})")]
    NotFound {
        /// What was asked for.
        object: String,
        /// The last server asked.
        place: Box<Place>,
    },
    /// No server could be reached, or none answered as it should.
    #[error("cannot fetch {object}: {cause} ({place}, {attempts} attempts)")]
    Network {
        /// What was asked for.
        object: String,
        /// Where the last attempt went.
        place: Box<Place>,
        /// What went wrong with the last attempt.
        cause: Cause,
        /// How many attempts were made.
        attempts: u32,
    },
    /// The bytes are not those that the object's name promises, past caches and from every server.
    #[error("{object} is corrupt: {reason} ({place})")]
    Corrupt {
        /// What was asked for.
        object: String,
        /// Where the last copy came from.
        place: Box<Place>,
        /// How it differs.
        reason: String,
    },
    /// The caller's deadline passed first.
    #[error("deadline passed while fetching {object} ({place}{})", last_problem(last))]
    Deadline {
        /// What was asked for.
        object: String,
        /// Where requests go at present.
        place: Box<Place>,
        /// The last failed attempt.
        last: Option<Cause>,
    },
    /// The caller was interrupted.
    #[error("interrupted while fetching {object}")]
    Interrupted {
        /// What was asked for.
        object: String,
    },
    /// There is no room for the object, neither in the cache nor beside it.
    #[error("no space for {object}: {reason}")]
    NoSpace {
        /// What was asked for.
        object: String,
        /// What is full.
        reason: String,
    },
    /// A local file could not be written or read.
    #[error("cannot store {object}: {source}")]
    Local {
        /// What was asked for.
        object: String,
        /// Why.
        source: Arc<io::Error>,
    },
    /// The catalog promises something that this client refuses.
    #[error("{object} is refused: {reason}")]
    Refused {
        /// What was asked for.
        object: String,
        /// The rule that is broken.
        reason: String,
    },
}

fn last_problem(last: &Option<Cause>) -> String {
    last.as_ref().map_or(String::new(), |cause| format!("; last problem: {cause}"))
}

/// The host and the proxy of an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Base URL of the host.
    pub host: String,
    /// The proxy's address, or `DIRECT`.
    pub proxy: String,
}

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "host {}, proxy {}", self.host, self.proxy)
    }
}

/// What went wrong with one attempt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Cause {
    /// The name of the host does not resolve.
    #[error("host name does not resolve: {0}")]
    Resolve(String),
    /// The name of the proxy does not resolve.
    #[error("proxy name does not resolve: {0}")]
    ResolveProxy(String),
    /// The connection was refused or not established in time.
    #[error("cannot connect: {0}")]
    Connect(String),
    /// No certificate that this client trusts.
    #[error("TLS certificate problem: {0}")]
    Certificate(String),
    /// Connected, but not a byte came within the time-out.
    #[error("no answer within {} s", .0.as_secs())]
    Silent(Duration),
    /// Bytes came, but fewer than the low-speed limit.
    #[error("slower than {limit} bytes/s for {} s", window.as_secs())]
    TooSlow {
        /// Bytes per second that were expected.
        limit: u64,
        /// Time over which they were counted.
        window: Duration,
    },
    /// The connection was closed before the answer began.
    #[error("connection closed before an answer: {0}")]
    Closed(String),
    /// The connection broke while the body was transferred.
    #[error("body was cut: {0}")]
    Cut(String),
    /// The server answered with this status.
    #[error("HTTP status {0}")]
    Status(u16),
    /// The proxy itself answered with this status.
    #[error("HTTP status {0} from the proxy")]
    ProxyStatus(u16),
    /// The proxy answered with this status because it cannot get through to the host.
    #[error("HTTP status {status} from the proxy, which cannot get through: {reason}")]
    Gateway {
        /// The status.
        status: u16,
        /// What the proxy says of it.
        reason: String,
    },
    /// There is no way out: proxies are to be discovered, and none was found.
    #[error("no proxy: {0}")]
    NoProxy(String),
    /// A redirect that is not followed.
    #[error("redirect is not followed: {0}")]
    Redirect(String),
    /// The server did not send the part of a file that was asked for.
    #[error("byte range is not served: {0}")]
    Range(String),
    /// A file below a `file://` server cannot be read.
    #[error("local file cannot be read: {0}")]
    LocalFile(String),
    /// The body is not what was expected.
    #[error("{0}")]
    Corrupt(String),
}

/// Whom a failure blames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Blame {
    Host,
    /// The host, and the proxy when the other hosts fare no better through it.
    HostThenProxy,
    /// The proxy lives, but something is wrong with it or behind it.
    SlowProxy,
    /// Nobody answers at the proxy, or it refuses to serve.
    DeadProxy,
}

impl Cause {
    /// Whom this failure blames when it came through a proxy (`proxied`) or directly (client behaviour §6.1, §6.2).
    ///
    /// The C++ client burns a proxy for everything that is not the host's fault. Here only those are burned at which
    /// nobody answers or which refuse; a proxy that answers something, however slowly, lives. Silence is neither: how
    /// long it lasts decides ([`super::journey`]).
    pub(super) fn blame(&self, proxied: bool) -> Blame {
        if !proxied {
            return Blame::Host;
        }
        match self {
            Self::Status(status) if is_host_status(*status) => Blame::Host,
            Self::Redirect(_)
            | Self::Certificate(_)
            | Self::Corrupt(_)
            | Self::Range(_)
            | Self::LocalFile(_) => Blame::Host,
            Self::Gateway { .. } => Blame::HostThenProxy,
            Self::Silent(_) | Self::TooSlow { .. } | Self::Cut(_) => Blame::SlowProxy,
            Self::Resolve(_)
            | Self::ResolveProxy(_)
            | Self::NoProxy(_)
            | Self::Connect(_)
            | Self::Closed(_)
            | Self::Status(_)
            | Self::ProxyStatus(_) => Blame::DeadProxy,
        }
    }

    /// Whether the same URL is worth another attempt after a pause.
    pub(super) fn is_transfer(&self) -> bool {
        matches!(
            self,
            Self::Connect(_)
                | Self::Silent(_)
                | Self::TooSlow { .. }
                | Self::Closed(_)
                | Self::Cut(_)
                | Self::Status(429 | 503)
                | Self::ProxyStatus(429 | 503)
                | Self::Gateway { .. }
        )
    }

    /// Whether a connection that was kept too long explains this failure: a middle box forgot it, or the server
    /// closed it in the same moment.
    pub(super) fn may_be_stale(&self) -> bool {
        matches!(self, Self::Closed(_) | Self::Silent(_) | Self::Connect(_))
    }
}

/// Statuses that come from the host whichever way they came.
fn is_host_status(status: u16) -> bool {
    matches!(status, 400 | 404 | 410 | 416 | 429 | 500..=599)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn row_13_the_table_decides_whom_a_failure_blames() {
        let through_proxy = [
            (Cause::Status(404), Blame::Host),
            (Cause::Status(400), Blame::Host),
            (Cause::Status(500), Blame::Host),
            (Cause::Status(502), Blame::Host),
            (Cause::Status(503), Blame::Host),
            (Cause::Status(504), Blame::Host),
            (Cause::Status(429), Blame::Host),
            (Cause::Status(403), Blame::DeadProxy),
            (Cause::Status(407), Blame::DeadProxy),
            (Cause::ProxyStatus(503), Blame::DeadProxy),
            (Cause::Gateway { status: 503, reason: String::new() }, Blame::HostThenProxy),
            (Cause::ResolveProxy(String::new()), Blame::DeadProxy),
            (Cause::Connect(String::new()), Blame::DeadProxy),
            (Cause::Closed(String::new()), Blame::DeadProxy),
            (Cause::Silent(Duration::ZERO), Blame::SlowProxy),
            (Cause::Cut(String::new()), Blame::SlowProxy),
            (Cause::TooSlow { limit: 1, window: Duration::ZERO }, Blame::SlowProxy),
            (Cause::Corrupt(String::new()), Blame::Host),
            (Cause::Certificate(String::new()), Blame::Host),
            (Cause::Redirect(String::new()), Blame::Host),
        ];
        for (cause, blame) in through_proxy {
            assert_eq!(cause.blame(true), blame, "{cause}");
            assert_eq!(cause.blame(false), Blame::Host, "{cause}");
        }
    }
}
