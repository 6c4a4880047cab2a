//! Who may read a protected repository (client behaviour §13).
//!
//! The root catalog of a protected repository names a requirement, `<helper>%<membership>`. Whether a process meets
//! it is decided by an external program, the authorisation helper, which is started at the first question
//! ([`helper`]) and whose answers are kept for each login session ([`session`]).
//!
//! Invariants:
//! * whatever goes wrong — no helper, a helper that hangs, dies or talks nonsense — access is denied, never granted;
//! * no question waits longer than its caller's deadline or [`helper::ANSWER_PATIENCE`];
//! * credentials of users are in no message and in no debug output.

mod frame;
mod helper;
mod session;

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::deadline::Deadline;
use helper::{Helper, Question};
use session::{Session, Sessions};

/// How long an answer is kept if the helper does not say.
const DEFAULT_TTL: Duration = Duration::from_secs(120);
/// Longest time for which an answer is kept: a membership that was withdrawn must count some time.
const LONGEST_TTL: Duration = Duration::from_secs(24 * 3600);

/// How helpers are found and started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuthorizationSettings {
    /// This helper, whatever the repository names (`CVMFS_AUTHZ_HELPER`).
    pub helper: Option<PathBuf>,
    /// The directory with programs named `cvmfs_<helper>_helper` (`CVMFS_AUTHZ_SEARCH_PATH`).
    pub search_path: PathBuf,
    /// The helper's environment: the parameters `CVMFS_AUTHZ_<NAME>` as `<NAME>`.
    pub environment: Vec<(String, String)>,
    /// `CVMFS_SYSLOG_FACILITY`, for the helper's own messages.
    pub syslog_facility: i64,
    /// `CVMFS_SYSLOG_LEVEL`, likewise.
    pub syslog_level: i64,
    /// `CVMFS_DEBUGLOG`, likewise.
    pub debug_log: Option<PathBuf>,
}

/// The process on whose behalf the kernel asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Process, in this process' PID namespace; 0 if it has no number here.
    pub pid: u32,
}

impl Caller {
    /// Calls of the superuser are always allowed.
    pub fn is_superuser(self) -> bool {
        self.uid == 0
    }
}

/// What a permitted user presents to servers of external data.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// An X.509 proxy certificate with its key, PEM.
    X509Proxy(Vec<u8>),
    /// A bearer token.
    Bearer(String),
}

impl fmt::Debug for Credentials {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::X509Proxy(_) => "X509Proxy(…)",
            Self::Bearer(_) => "Bearer(…)",
        })
    }
}

/// Why access is denied. Only the helper's own verdicts are kept for a session.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    /// The user has no credentials.
    #[error("no credentials were found")]
    NotFound,
    /// The user's credentials are expired or otherwise not valid.
    #[error("the credentials are not valid")]
    Invalid,
    /// The user is not a member.
    #[error("not a member")]
    NotMember,
    /// No helper, or one that does not answer.
    #[error("the authorisation helper cannot be asked: {0}")]
    NoHelper(String),
    /// The helper does not say why, or the process has no number in this PID namespace.
    #[error("{0}")]
    Unknown(String),
}

/// The verdict on one session.
pub(crate) type Verdict = Result<Option<Arc<Credentials>>, Denial>;

/// A verdict and how long it holds.
#[derive(Debug, Clone)]
struct Answer {
    verdict: Verdict,
    ttl: Duration,
}

/// The checks of one repository.
#[derive(Debug)]
pub struct Authorization {
    fqrn: String,
    settings: AuthorizationSettings,
    sessions: Mutex<Sessions>,
    helper: Mutex<Option<(PathBuf, Arc<Helper>)>>,
}

impl Authorization {
    /// Checks for the repository `fqrn`. Nothing is started yet.
    pub fn new(fqrn: &str, settings: AuthorizationSettings) -> Self {
        Self { fqrn: fqrn.to_owned(), settings, sessions: Mutex::default(), helper: Mutex::default() }
    }

    /// The verdict on `caller` if it is known without asking the helper.
    pub fn known(&self, requirement: &[u8], caller: Caller) -> Option<Verdict> {
        if caller.is_superuser() {
            return Some(Ok(None));
        }
        if caller.uid == u32::MAX || caller.gid == u32::MAX {
            // Nor may a helper be asked about such a caller: it would take that for leave to act as its own user.
            let reason = "the kernel does not say who asks: the repository was mounted before it was protected, and \
                          must be mounted anew (CVMFS_FUSE_IDMAP)";
            return Some(Err(Denial::Unknown(reason.to_owned())));
        }
        let session = Session::of(caller)?;
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner).get(requirement, session, Instant::now())
    }

    /// Whether `caller` meets the requirement, with the credentials that it has.
    ///
    /// # Errors
    /// [`Denial`], also if the helper cannot be asked before the deadline.
    pub fn check(&self, requirement: &[u8], caller: Caller, deadline: Deadline) -> Verdict {
        if let Some(verdict) = self.known(requirement, caller) {
            return verdict;
        }
        let Some(session) = Session::of(caller) else {
            let reason = "the process cannot be identified (it is gone, or in another PID namespace)";
            return Err(Denial::Unknown(reason.to_owned()));
        };
        let answer = self.ask(requirement, caller, deadline)?;
        if let Err(denial) = &answer.verdict {
            tracing::info!(fqrn = self.fqrn, uid = caller.uid, pid = caller.pid, %denial, "access denied");
        }
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.keep(requirement, session, answer.clone(), Instant::now());
        answer.verdict
    }

    fn ask(&self, requirement: &[u8], caller: Caller, deadline: Deadline) -> Result<Answer, Denial> {
        let (program, membership) = self.split(requirement)?;
        let helper = self.helper(program)?;
        helper.ask(Question { caller, membership: membership.to_vec() }, deadline)
    }

    /// The helper's program and what it is asked, from `<helper>%<membership>`.
    fn split<'a>(&self, requirement: &'a [u8]) -> Result<(PathBuf, &'a [u8]), Denial> {
        let none = |reason: String| Err(Denial::NoHelper(reason));
        let cut = requirement.iter().position(|byte| *byte == b'%');
        let (name, membership) = match cut {
            Some(at) => (&requirement[..at], &requirement[at + 1..]),
            None => (&b""[..], requirement),
        };
        if let Some(program) = &self.settings.helper {
            return Ok((program.clone(), membership));
        }
        let name = match std::str::from_utf8(name) {
            Ok(name) if is_helper_name(name) => name,
            _ => return none("the repository names none that could be a program".to_owned()),
        };
        Ok((self.settings.search_path.join(format!("cvmfs_{name}_helper")), membership))
    }

    fn helper(&self, program: PathBuf) -> Result<Arc<Helper>, Denial> {
        let mut slot = self.helper.lock().unwrap_or_else(PoisonError::into_inner);
        match slot.as_ref() {
            Some((known, helper)) if *known == program => Ok(helper.clone()),
            _ => {
                let helper = Helper::new(&self.fqrn, &program, &self.settings)
                    .map_err(|error| Denial::NoHelper(error.to_string()))?;
                let helper = Arc::new(helper);
                *slot = Some((program, helper.clone()));
                Ok(helper)
            }
        }
    }
}

/// The name comes from a catalog and becomes part of a path.
fn is_helper_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
}

#[cfg(test)]
mod tests;
