//! How reads reach the content: the choice is made once per connection and shown in `status`.
//!
//! | profile | open | read | needs |
//! |---|---|---|---|
//! | `passthrough` | one request | the kernel reads the cache file itself | Linux 6.9, root of the initial user namespace, a cache on a real file system |
//! | `no_open` | no request at all | a request for each page that is not in the page cache | Linux 3.16 |
//! | `plain` | one request | as above | nothing |
//!
//! With `no_open` the kernel opens files by itself, so what cannot be had is an error of
//! `read` and not of `open`, and open files are not counted. It takes small files at nearly
//! the speed of a local file system. Under all profiles the pages of a node stay good for
//! ever: another content is another node.

use cvmfs_client::config::ProfileChoice;
use serde::{Deserialize, Serialize};

use crate::protocol::handshake::{Agreement, capability};
use crate::shared_state::SharedState;

/// How reads reach the content; see the module documentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Profile {
    /// The kernel reads cache files itself.
    Passthrough,
    /// The kernel opens files without asking; reads come to the client.
    NoOpen,
    /// Opens and reads come to the client.
    Plain,
}

impl Profile {
    /// The name in `status` and configuration.
    pub fn name(self) -> &'static str {
        match self {
            Profile::Passthrough => "passthrough",
            Profile::NoOpen => "no_open",
            Profile::Plain => "plain",
        }
    }

    fn number(self) -> u64 {
        match self {
            Profile::Passthrough => 1,
            Profile::NoOpen => 2,
            Profile::Plain => 3,
        }
    }

    fn of_number(number: u64) -> Option<Profile> {
        [Profile::Passthrough, Profile::NoOpen, Profile::Plain].into_iter().find(|one| one.number() == number)
    }
}

/// A profile and why it is not a better one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chosen {
    pub(crate) profile: Profile,
    /// In words, for an administrator.
    pub(crate) reason: String,
}

/// Chooses the profile. `probe` tries passthrough with a file of the cache. A successor
/// keeps what its predecessor chose as far as the kernel cannot be told otherwise.
/// `must_see_opens`: somebody has to be asked about each open.
pub(crate) fn choose(
    wanted: ProfileChoice,
    must_see_opens: bool,
    agreement: &Agreement,
    state: &SharedState,
    probe: impl FnOnce() -> std::io::Result<()>,
) -> Chosen {
    let chosen = match Profile::of_number(state.profile()) {
        // The kernel has been told, and does not ask again.
        Some(Profile::NoOpen) => {
            Chosen { profile: Profile::NoOpen, reason: "chosen when the repository was mounted".into() }
        }
        _ => choose_anew(wanted, must_see_opens, agreement, probe),
    };
    state.record_profile(chosen.profile.number());
    chosen
}

fn choose_anew(
    wanted: ProfileChoice,
    must_see_opens: bool,
    agreement: &Agreement,
    probe: impl FnOnce() -> std::io::Result<()>,
) -> Chosen {
    let chosen = |profile, reason: String| Chosen { profile, reason };
    let reason = match wanted {
        ProfileChoice::NoOpen | ProfileChoice::Plain => "asked for by CVMFS_FUSE_PROFILE".to_owned(),
        _ if !agreement.has(capability::PASSTHROUGH) => {
            "the kernel does not offer passthrough (Linux 6.9 or newer does)".to_owned()
        }
        _ => match probe() {
            Ok(()) => return chosen(Profile::Passthrough, "cache files can be passed through".to_owned()),
            Err(error) => refusal(&error),
        },
    };
    match wanted {
        ProfileChoice::Plain => chosen(Profile::Plain, reason),
        _ if must_see_opens => {
            chosen(Profile::Plain, format!("{reason}; opens must be seen, so no_open is no choice"))
        }
        _ if !agreement.has(capability::NO_OPEN_SUPPORT) => {
            chosen(Profile::Plain, format!("{reason}; nor no_open (Linux 3.16)"))
        }
        _ => chosen(Profile::NoOpen, reason),
    }
}

/// What the kernel's refusal of a backing file means.
fn refusal(error: &std::io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EPERM) => "passthrough needs root (CAP_SYS_ADMIN) in the initial user namespace".to_owned(),
        Some(libc::ELOOP) => {
            "the cache lies on a stacked file system (such as overlayfs); put it on a real one for passthrough".to_owned()
        }
        Some(libc::EOPNOTSUPP | libc::EINVAL) => "the cache's file system cannot be passed through".to_owned(),
        _ => format!("passthrough was tried and failed: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::os::fd::AsFd;

    use super::*;

    fn state() -> SharedState {
        SharedState::map(SharedState::create_memory().unwrap().as_fd()).unwrap()
    }

    fn agreement(capabilities: u64) -> Agreement {
        Agreement { kernel_minor: 40, capabilities }
    }

    #[test]
    fn the_best_profile_that_works_is_taken_and_the_reason_names_the_obstacle() {
        let all = agreement(capability::PASSTHROUGH | capability::NO_OPEN_SUPPORT);
        let refuse = |code: i32| move || Err(io::Error::from_raw_os_error(code));
        let auto = ProfileChoice::Auto;
        assert_eq!(choose(auto, false, &all, &state(), || Ok(())).profile, Profile::Passthrough);
        let stacked = choose(auto, false, &all, &state(), refuse(libc::ELOOP));
        assert_eq!(stacked.profile, Profile::NoOpen);
        assert!(stacked.reason.contains("stacked"), "{}", stacked.reason);
        let unprivileged = choose(auto, true, &all, &state(), refuse(libc::EPERM));
        assert_eq!(unprivileged.profile, Profile::Plain);
        assert!(unprivileged.reason.contains("root"), "{}", unprivileged.reason);
        let old = choose(auto, false, &agreement(0), &state(), || panic!("not probed"));
        assert_eq!(old.profile, Profile::Plain);
        assert!(old.reason.contains("Linux 6.9"), "{}", old.reason);
        assert_eq!(choose(ProfileChoice::Plain, false, &all, &state(), || Ok(())).profile, Profile::Plain);
    }

    #[test]
    fn a_successor_keeps_what_the_kernel_was_told() {
        let all = agreement(capability::PASSTHROUGH | capability::NO_OPEN_SUPPORT);
        let state = state();
        let first = choose(ProfileChoice::NoOpen, false, &all, &state, || Ok(()));
        let second = choose(ProfileChoice::Auto, true, &all, &state, || Ok(()));
        assert_eq!((first.profile, second.profile), (Profile::NoOpen, Profile::NoOpen));
    }
}
