//! The state of a mount from outside, also of one that does not answer.

use std::fs;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::json;

use super::Status;
use super::client::status_within;
use super::records::{Record, all_records, log_path};

/// Time for all mounts together to answer; the rest of the 2 seconds is for saying why one does not.
const PATIENCE: Duration = Duration::from_millis(1700);

/// What was found out about a mount.
#[derive(Debug)]
pub enum Inspected {
    /// It answers.
    Answered(Box<Status>),
    /// It does not.
    Silent {
        /// Which mount.
        record: Record,
        /// Its worker, if it has one.
        worker: Option<u32>,
        /// Why it does not answer, and what to do.
        reason: String,
    },
}

impl Inspected {
    /// The document of `status --json`: that of a mount that does not answer has the same keys, those that nobody
    /// knows being null, and the reason among its errors.
    pub fn document(&self) -> serde_json::Value {
        match self {
            Inspected::Answered(status) => serde_json::to_value(status).unwrap_or_default(),
            Inspected::Silent { record, worker, reason } => {
                let mut document = serde_json::to_value(Status::default()).unwrap_or_default();
                for value in document.as_object_mut().into_iter().flat_map(|keys| keys.values_mut()) {
                    *value = serde_json::Value::Null;
                }
                document["fqrn"] = json!(record.mounted.fqrn);
                document["mountpoint"] = json!(record.mounted.mountpoint);
                document["pid"] = json!(worker);
                document["online"] = json!(false);
                document["errors"] = json!([reason]);
                document["warnings"] = json!([]);
                document
            }
        }
    }
}

/// The state of all mounts of this user within 2 seconds, whatever they do.
pub fn inspect_all(fqrn: Option<&str>) -> Vec<Inspected> {
    inspect(
        all_records()
            .into_iter()
            .filter(|record| fqrn.is_none_or(|name| record.mounted.fqrn == name))
            .collect(),
    )
}

/// The state of these mounts within 2 seconds, in their order.
pub fn inspect(records: Vec<Record>) -> Vec<Inspected> {
    let end = Instant::now() + PATIENCE;
    let waiting: Vec<_> = records
        .into_iter()
        .map(|record| {
            let (sender, receiver) = mpsc::channel();
            if record.alive {
                let control = record.mounted.control.clone();
                // Without a thread the channel closes, which counts as no answer.
                let _ = std::thread::Builder::new().name("cvmfs-ask".into()).spawn(move || {
                    let _ = sender.send(status_within(&control, PATIENCE));
                });
            }
            (record, receiver)
        })
        .collect();
    let answered: Vec<_> = waiting
        .into_iter()
        .map(|(record, receiver)| {
            let answer = receiver.recv_timeout(end.saturating_duration_since(Instant::now()));
            (record, answer)
        })
        .collect();
    answered
        .into_iter()
        .map(|(record, answer)| match answer {
            Ok(Ok(status)) => Inspected::Answered(Box::new(status)),
            Ok(Err(error)) => silent(record, &error.to_string()),
            Err(_) => silent(record, "no answer in time"),
        })
        .collect()
}

/// What the process table says of a mount that does not answer.
fn silent(record: Record, error: &str) -> Inspected {
    let (place, supervisor) = (record.mounted.mountpoint.display(), record.mounted.supervisor_pid);
    let log = log_path(&record.mounted.fqrn, &record.mounted.mountpoint);
    if !record.alive {
        let reason = format!(
            "the processes of this mount are gone and users of it get errors: run `cvmfs-client umount {place}` and \
             mount again; the log is {}",
            log.display()
        );
        return Inspected::Silent { record, worker: None, reason };
    }
    let worker = only_child(supervisor);
    let state = |pid: u32| process_state(pid).unwrap_or('?');
    let reason = match worker.map(|pid| (pid, state(pid))) {
        _ if matches!(state(supervisor), 'T' | 't') => format!(
            "the supervisor (process {supervisor}) is stopped by a signal: continue it with `kill -CONT {supervisor}`"
        ),
        Some((pid, 'T' | 't')) => format!(
            "the worker (process {pid}) is stopped by a signal or a debugger: continue it with `kill -CONT {pid}`, or \
             kill it; the supervisor starts another"
        ),
        Some((pid, 'D')) => format!(
            "the worker (process {pid}) waits for the disk of its cache: see whether that disk or file server answers"
        ),
        Some((pid, 'Z')) => {
            format!("the worker (process {pid}) has just ended; the supervisor starts another")
        }
        Some((pid, _)) => format!(
            "the worker (process {pid}) does not answer ({error}): kill it if that lasts, the supervisor starts \
             another; the log is {}",
            log.display()
        ),
        None => format!(
            "there is no worker at present ({error}): the supervisor (process {supervisor}) starts one; if that lasts, \
             see {}",
            log.display()
        ),
    };
    Inspected::Silent { record, worker, reason }
}

/// A supervisor has one child, its worker.
fn only_child(pid: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    if let Ok(children) = children {
        return children.split_whitespace().next()?.parse().ok();
    }
    // Kernels without that file: look at everybody's parent.
    fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let candidate: u32 = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(format!("/proc/{candidate}/stat")).ok()?;
        let parent: u32 = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
        (parent == pid).then_some(candidate)
    })
}

/// The letter that `ps` shows: R, S, D, T, Z, …
fn process_state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before may hold anything, parentheses too.
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_of_a_process_is_read_past_its_name() {
        assert!(matches!(process_state(std::process::id()), Some('R' | 'S')));
        assert_eq!(process_state(u32::MAX), None);
    }

    #[test]
    fn a_mount_that_does_not_answer_has_the_keys_of_one_that_does() {
        let directory = tempfile::tempdir().unwrap();
        let record = Record {
            mounted: crate::Mounted {
                fqrn: "a.b".into(),
                mountpoint: "/mnt/x".into(),
                supervisor_pid: u32::MAX,
                flags: crate::MountFlags::default(),
                control: directory.path().join("sock"),
            },
            alive: false,
        };
        let [found] = <[Inspected; 1]>::try_from(inspect(vec![record])).unwrap();
        let document = found.document();
        let keys = |value: &serde_json::Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&document), keys(&serde_json::to_value(Status::default()).unwrap()));
        assert_eq!(document["online"], false);
        assert!(document["errors"][0].as_str().unwrap().contains("umount /mnt/x"), "{document}");
    }
}
