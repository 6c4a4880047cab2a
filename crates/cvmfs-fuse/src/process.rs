//! What the configuration asks of the processes themselves: limits, CPUs, the out-of-memory score.
//!
//! The supervisor applies it to itself, and its workers inherit it.

use std::io;

use cvmfs_client::config::ProcessSettings;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CpuSet, sched_setaffinity};

/// Applies the settings to this process. What the system refuses is told and done without: a mount with fewer
/// descriptors is better than none.
pub(crate) fn apply(settings: &ProcessSettings, tell: &dyn Fn(&str)) {
    if let Err(error) = raise_open_files(settings.open_files) {
        tell(&format!("cannot have {} open files: {error}", settings.open_files));
    }
    if !settings.cpus.is_empty() {
        let mut cpus = CpuSet::new();
        settings.cpus.iter().for_each(|cpu| cpus.set(*cpu));
        if let Err(error) = sched_setaffinity(None, &cpus) {
            tell(&format!("cannot run on CPUs {:?} only: {error}", settings.cpus));
        }
    }
    if let Some(score) = settings.oom_score_adj
        && let Err(error) = std::fs::write("/proc/self/oom_score_adj", score.to_string())
    {
        tell(&format!("cannot set the out-of-memory score to {score}: {error}"));
    }
}

/// Never lowers a limit.
fn raise_open_files(wanted: u64) -> io::Result<()> {
    let now = getrlimit(Resource::Nofile);
    let enough = |limit: Option<u64>| limit.is_none_or(|limit| limit >= wanted);
    if enough(now.current) {
        return Ok(());
    }
    if enough(now.maximum) {
        return Ok(setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: now.maximum })?);
    }
    let raised = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: Some(wanted) });
    // Only the superuser raises the maximum; up to it anybody may go.
    raised.or_else(|_| setrlimit(Resource::Nofile, Rlimit { current: now.maximum, maximum: now.maximum }))?;
    Ok(())
}

/// The name of a process in the process list. An init system that shuts down spares one that begins with `@`: the
/// mount may hold the root file system, or those of containers that are still to be stopped.
pub(crate) fn shown_name(name: &str, settings: &ProcessSettings) -> String {
    if settings.spared_at_shutdown { format!("@{name}") } else { name.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_open_files_never_sinks() {
        let before = getrlimit(Resource::Nofile).current;
        raise_open_files(3).unwrap();
        assert_eq!(getrlimit(Resource::Nofile).current, before);
        apply(&ProcessSettings::default(), &|problem| panic!("{problem}"));
        let after = getrlimit(Resource::Nofile);
        assert!(after.current.is_none_or(|limit| limit >= 131_584 || after.maximum == Some(limit)));
    }
}
