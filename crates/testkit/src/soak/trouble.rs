//! What goes wrong, when, and which errors it explains.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use rustix::process::Signal;

use super::content::World;
use super::reader::Failed;
use super::{Random, ask, sleep};
use crate::origin::Fault;
use crate::process::{is_alive, kill, wait_until};
use crate::{Mount, Origin, Published};

/// How long after both servers recovered an error may still come from before: failures are remembered for two
/// seconds, and a download that began then may be given up a little later.
pub(super) const GRACE: Duration = Duration::from_secs(5);

/// What a server does to every request.
const FAULTS: [(&str, Fault); 9] = [
    ("status 500", Fault::Status(500)),
    ("status 503", Fault::Status(503)),
    ("status 404", Fault::Status(404)),
    ("reset", Fault::Reset),
    ("silence", Fault::Hang),
    ("drip", Fault::Slow(200)),
    ("cut body", Fault::Truncate(300)),
    ("flipped bit", Fault::Flip(200)),
    ("delay", Fault::Delay(Duration::from_millis(800))),
];

/// How often each thing happened.
#[derive(Debug, Clone, Default)]
pub(super) struct Counts(BTreeMap<String, u32>);

impl Counts {
    pub(super) fn total(&self) -> u32 {
        self.0.values().sum()
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<_> = self.0.iter().map(|(what, count)| format!("{what} {count}")).collect();
        formatter.write_str(&parts.join(", "))
    }
}

/// Brings the faults.
pub(super) struct Weather<'w> {
    repository: &'w Published,
    second: &'w Origin,
    mount: &'w Mount,
    cache: &'w Path,
    world: &'w World,
    seed: u64,
    past: Mutex<Past>,
}

#[derive(Debug, Default)]
struct Past {
    counts: Counts,
    /// Everything, with its beginning and end.
    events: Vec<(Instant, Instant, String)>,
    /// When both servers were disturbed.
    outages: Vec<(Instant, Instant)>,
}

impl<'w> Weather<'w> {
    pub(super) fn new(
        repository: &'w Published,
        second: &'w Origin,
        mount: &'w Mount,
        cache: &'w Path,
        world: &'w World,
        seed: u64,
    ) -> Self {
        Self { repository, second, mount, cache, world, seed, past: Mutex::default() }
    }

    /// One thing after the other until the time is over. In the second half no worker is killed, so that one lives long
    /// enough for a leak to be seen.
    pub(super) fn rage(&self, duration: Duration, stop: &AtomicBool) -> Result<()> {
        let begun = Instant::now();
        let mut random = Random(self.seed ^ 0xfa17);
        while begun.elapsed() < duration && !stop.load(Ordering::SeqCst) {
            sleep(random.milliseconds(300..4000))?;
            let may_kill = begun.elapsed() < duration / 2;
            let since = Instant::now();
            let (what, is_outage) = self.happen(&mut random, may_kill)?;
            let mut past = self.past();
            *past.counts.0.entry(what.clone()).or_default() += 1;
            past.events.push((since, Instant::now(), what));
            if is_outage {
                past.outages.push((since, Instant::now()));
            }
        }
        Ok(())
    }

    /// Makes one thing happen and ends it; tells what it was and whether it disturbed both servers.
    fn happen(&self, random: &mut Random, may_kill: bool) -> Result<(String, bool)> {
        Ok(match random.below(10) {
            0 | 1 => {
                self.update(random)?;
                ("update".to_owned(), false)
            }
            2 => {
                self.evict(random);
                ("eviction".to_owned(), false)
            }
            3 | 4 if may_kill => {
                self.kill_worker()?;
                ("worker killed".to_owned(), false)
            }
            5 | 6 => {
                let what = self.disturb(&[&self.repository.origin, self.second], random, may_kill)?;
                (format!("both servers: {what}"), true)
            }
            _ => {
                let one = if random.below(2) == 0 { &self.repository.origin } else { self.second };
                (format!("one server: {}", self.disturb(&[one], random, may_kill)?), false)
            }
        })
    }

    fn disturb(&self, servers: &[&Origin], random: &mut Random, may_kill: bool) -> Result<String> {
        let (name, fault) = &FAULTS[random.below(FAULTS.len() as u64) as usize];
        for server in servers {
            server.set_fault("*", fault.clone());
        }
        let time = random.milliseconds(500..5000);
        let mut name = (*name).to_owned();
        if may_kill && random.below(6) == 0 {
            sleep(time / 2)?;
            self.kill_worker()?;
            name.push_str(" and a killed worker");
        }
        sleep(time)?;
        for server in servers {
            server.clear_faults();
            // Nobody looks at them here, and there are many.
            server.clear_requests();
        }
        Ok(name)
    }

    fn update(&self, random: &mut Random) -> Result<()> {
        let numbers: std::collections::BTreeSet<usize> =
            (0..1 + random.below(12)).map(|_| random.below(self.world.len() as u64) as usize).collect();
        self.world.write(self.repository, &Vec::from_iter(numbers))?;
        let answer = ask(self.mount, "refresh")?;
        let revision: u64 =
            answer.trim().parse().map_err(|_| anyhow::anyhow!("`refresh` is answered with {answer}"))?;
        anyhow::ensure!(revision == self.world.revision(), "revision {revision} after an update");
        self.world.in_use();
        Ok(())
    }

    /// Files of the cache disappear: asked for, or just so.
    fn evict(&self, random: &mut Random) {
        if random.below(2) == 0 && self.mount.ask("cleanup 3", Duration::from_secs(30)).is_ok() {
            return;
        }
        for directory in std::fs::read_dir(self.cache.join("shared")).into_iter().flatten().flatten() {
            let is_content = directory.file_name().len() == 2;
            for file in std::fs::read_dir(directory.path()).into_iter().flatten().flatten() {
                if is_content && random.below(3) == 0 {
                    let _ = std::fs::remove_file(file.path());
                }
            }
        }
    }

    fn kill_worker(&self) -> Result<()> {
        let pid: u32 = ask(self.mount, "pid")?.trim().parse()?;
        kill(pid, Signal::KILL);
        wait_until("the worker is dead", Duration::from_secs(20), || !is_alive(pid))
    }

    /// Whether both servers were disturbed at some time of this operation, or shortly before.
    pub(super) fn explains(&self, error: &Failed) -> bool {
        self.past()
            .outages
            .iter()
            .any(|(begun, ended)| error.begun <= *ended + GRACE && error.ended >= *begun)
    }

    pub(super) fn counts(&self) -> Counts {
        self.past().counts.clone()
    }

    /// Everything that happened, for a message.
    pub(super) fn history(&self) -> String {
        let past = self.past();
        past.events.iter().map(|(begun, ended, what)| format!("  {begun:?} to {ended:?}: {what}\n")).collect()
    }

    fn past(&self) -> MutexGuard<'_, Past> {
        self.past.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
