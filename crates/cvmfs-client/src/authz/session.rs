//! Login sessions and the verdicts that are kept for them.
//!
//! All processes of a session share their credentials by convention, so the helper is asked once for all of them.
//! A session is told from another with the same number by the time at which its leader started.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::time::Instant;

use super::{Answer, Caller, Verdict};

/// Most sessions remembered; a batch node has some hundred.
const MAX_SESSIONS: usize = 16 * 1024;
/// Longest `/proc/PID/stat` looked at.
const MAX_STAT: u64 = 4096;

/// One login session of one user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Session {
    leader: u32,
    leader_started: u64,
    uid: u32,
    gid: u32,
}

impl Session {
    /// The session of a process; `None` if there is no such process.
    pub(super) fn of(caller: Caller) -> Option<Self> {
        let Caller { uid, gid, pid } = caller;
        let own = ProcessStat::read(pid)?;
        // The leader may have ended before its session: then the processes stand for themselves.
        let leader = if own.session == pid { Some(own) } else { ProcessStat::read(own.session) };
        Some(match leader {
            Some(leader) => Self { leader: own.session, leader_started: leader.started, uid, gid },
            None => Self { leader: pid, leader_started: own.started, uid, gid },
        })
    }
}

/// What `/proc/PID/stat` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ProcessStat {
    session: u32,
    started: u64,
}

impl ProcessStat {
    fn read(pid: u32) -> Option<Self> {
        if pid == 0 {
            return None;
        }
        let mut text = Vec::new();
        File::open(format!("/proc/{pid}/stat")).ok()?.take(MAX_STAT).read_to_end(&mut text).ok()?;
        Self::parse(&text)
    }

    /// Fields 6 and 22. The name of the program in field 2 may contain anything, also parentheses and blanks.
    fn parse(text: &[u8]) -> Option<Self> {
        let end = text.iter().rposition(|byte| *byte == b')')?;
        let rest = std::str::from_utf8(text.get(end + 1..)?).ok()?;
        let mut fields = rest.split_ascii_whitespace();
        let session = fields.nth(3)?.parse().ok()?;
        let started = fields.nth(15)?.parse().ok()?;
        Some(Self { session, started })
    }
}

/// Verdicts by session, for one requirement: another revision may require something else.
#[derive(Debug, Default)]
pub(super) struct Sessions {
    requirement: Vec<u8>,
    verdicts: HashMap<Session, (Instant, Verdict)>,
}

impl Sessions {
    pub(super) fn get(&self, requirement: &[u8], session: Session, now: Instant) -> Option<Verdict> {
        if self.requirement != requirement {
            return None;
        }
        let (until, verdict) = self.verdicts.get(&session)?;
        (now < *until).then(|| verdict.clone())
    }

    pub(super) fn keep(&mut self, requirement: &[u8], session: Session, answer: Answer, now: Instant) {
        if self.requirement != requirement {
            self.verdicts.clear();
            self.requirement = requirement.to_vec();
        }
        if self.verdicts.len() >= MAX_SESSIONS {
            self.verdicts.retain(|_, (until, _)| now < *until);
        }
        if self.verdicts.len() >= MAX_SESSIONS {
            self.verdicts.clear();
        }
        if let Some(until) = now.checked_add(answer.ttl) {
            self.verdicts.insert(session, (until, answer.verdict));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::authz::Denial;

    #[test]
    fn a_program_with_a_strange_name_has_its_session() {
        let text = b"42 (a) b (c)) S 1 40 37 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 4711 1 1";
        assert_eq!(ProcessStat::parse(text), Some(ProcessStat { session: 37, started: 4711 }));
        for bad in [&b""[..], b"42 (x", b"42 (x) S 1 2", b"42 (x) S 1 2 y"] {
            assert_eq!(ProcessStat::parse(bad), None);
        }
    }

    #[test]
    fn this_process_has_a_session_and_a_process_that_is_not_there_has_none() {
        let caller = Caller { uid: 1, gid: 2, pid: std::process::id() };
        let session = Session::of(caller).unwrap();
        assert_eq!(Session::of(caller), Some(session));
        assert_ne!(
            Session::of(Caller { uid: 3, ..caller }),
            Some(session),
            "another user is another session"
        );
        for pid in [0, u32::MAX] {
            assert_eq!(Session::of(Caller { pid, ..caller }), None);
        }
    }

    #[test]
    fn a_verdict_is_kept_for_its_time_and_its_requirement() {
        let caller = Caller { uid: 1, gid: 2, pid: std::process::id() };
        let (session, now) = (Session::of(caller).unwrap(), Instant::now());
        let mut sessions = Sessions::default();
        let answer = Answer { verdict: Err(Denial::NotMember), ttl: Duration::from_secs(10) };
        sessions.keep(b"x%a", session, answer, now);
        let at = |seconds| now + Duration::from_secs(seconds);
        assert_eq!(sessions.get(b"x%a", session, at(9)), Some(Err(Denial::NotMember)));
        assert_eq!(sessions.get(b"x%a", session, at(10)), None);
        assert_eq!(sessions.get(b"x%b", session, at(1)), None);
        sessions.keep(b"x%b", session, Answer { verdict: Ok(None), ttl: Duration::ZERO }, now);
        assert_eq!(sessions.get(b"x%a", session, at(1)), None, "an answer to another question is forgotten");
    }
}
