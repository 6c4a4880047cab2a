//! Whatever ends, in whatever order: containers that the engine keeps go on reading, everything starts again, and
//! nothing is left behind. `CVMFS_TEST_SEED` chooses the order, `CVMFS_TEST_EVENTS` how much happens: a number, or events
//! by name with commas between them.

#![allow(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

mod common;

use std::collections::HashSet;
use std::time::Duration;

use rustix::process::Signal;
use testkit::process::{kill, wait_until};
use testkit::tar::TarBuilder;
use testkit::{Dockerd, Image, Published, Registry, ThinEngine, binary, managed_plugin};

/// Files in the image that a container reads one after the other, so that none is known already.
const FILES: usize = 400;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    /// dockerd ends as it should, and starts.
    EngineRestarted,
    /// dockerd and containerd are killed, and start.
    EngineKilled,
    /// The process that answers the engine is killed.
    ServerKilled,
    /// The workers of all repositories are killed.
    WorkersKilled,
    /// All processes of the plugin are killed.
    PluginKilled,
    /// `docker plugin disable -f` and `enable`.
    PluginDisabled,
    /// All processes and mounts are gone, then everything starts.
    HostSwitchedOff,
}

use Event::*;

impl Event {
    const ALL: [Event; 7] = [
        EngineRestarted,
        EngineKilled,
        ServerKilled,
        WorkersKilled,
        PluginKilled,
        PluginDisabled,
        HostSwitchedOff,
    ];

    /// Whether running containers go on as if nothing had happened.
    fn keeps_containers(self, live_restore: bool) -> bool {
        match self {
            ServerKilled | WorkersKilled => true,
            EngineRestarted | EngineKilled => live_restore,
            PluginKilled | PluginDisabled | HostSwitchedOff => false,
        }
    }
}

struct World {
    engine: ThinEngine,
    images: [String; 2],
    next_file: usize,
    _repository: Published,
    _registry: Registry,
}

impl World {
    fn new(fqrn: &str, options: &[&str]) -> World {
        let registry = Registry::start().unwrap();
        let mut files = TarBuilder::new().directory("srv", 0o755);
        for number in 0..FILES {
            files = files.file(&format!("srv/{number}"), 0o644, format!("content of {number}").as_bytes());
        }
        registry.push("app", "1", &Image::busybox().unwrap().layer(files.finish())).unwrap();
        let repository = Published::create(fqrn).unwrap();
        let (normal, thin) = (registry.reference("app", "1"), registry.reference("thin/app", "1"));
        repository.convert(&normal, &["--output", &thin]).unwrap();
        let builder = options.iter().fold(Dockerd::builder(), |builder, option| builder.argument(option));
        let engine = ThinEngine::start_on(builder, &binary("cvmfs-graphdriver")).unwrap();
        engine.etc.add_published(&repository).unwrap();
        World { engine, images: [normal, thin], next_file: 0, _repository: repository, _registry: registry }
    }

    fn docker(&self, arguments: &[&str]) -> Result<String, String> {
        let finished = self.engine.dockerd.docker_output(arguments).map_err(|error| format!("{error:#}"))?;
        if finished.status.success() { Ok(finished.stdout.trim().to_owned()) } else { Err(finished.output()) }
    }

    fn start_containers(&self) {
        for (name, image) in ["normal", "thin"].iter().zip(&self.images) {
            let arguments = ["run", "-d", "--network=host", "--name", name, image, "/bin/sleep", "100000"];
            self.docker(&arguments).unwrap();
        }
    }

    /// Makes something happen; afterwards the engine answers.
    fn happen(&mut self, event: Event) -> Result<(), String> {
        match event {
            EngineRestarted => {
                self.engine.dockerd.stop_only();
                self.engine.dockerd.start().map_err(|error| format!("{error:#}"))?;
                self.mend_the_engine()?;
            }
            EngineKilled => {
                self.engine.dockerd.kill();
                self.engine.dockerd.start().map_err(|error| format!("{error:#}"))?;
                self.mend_the_engine()?;
            }
            HostSwitchedOff => {
                self.engine.dockerd.switch_off();
                self.engine.dockerd.start().map_err(|error| format!("{error:#}"))?;
            }
            ServerKilled | WorkersKilled | PluginKilled => {
                let before = managed_plugin::processes(&self.engine.dockerd);
                let chosen: Vec<u32> = before.iter().copied().filter(|pid| role(*pid).is(event)).collect();
                if chosen.is_empty() && event == WorkersKilled {
                    return Ok(()); // No repository is mounted.
                }
                assert!(!chosen.is_empty(), "{event:?}: {before:?}");
                chosen.iter().for_each(|pid| kill(*pid, Signal::KILL));
                wait_until("the processes are replaced", Duration::from_secs(30), || {
                    let now = managed_plugin::processes(&self.engine.dockerd);
                    chosen.iter().all(|pid| !now.contains(pid))
                        && now.iter().any(|pid| role(*pid) == Role::Server)
                })
                .map_err(|error| format!("{error:#}"))?;
            }
            PluginDisabled => {
                self.docker(&["plugin", "disable", "-f", managed_plugin::NAME])?;
                self.docker(&["plugin", "enable", managed_plugin::NAME])?;
            }
        }
        Ok(())
    }

    /// An engine that was killed unmounts what the former plugin process had while it starts the new one. When it
    /// loses that race against itself, no mount of the plugin reaches the host until the next restart.
    fn mend_the_engine(&mut self) -> Result<(), String> {
        let shared = self.engine.propagated_mount().map_err(|error| format!("{error:#}"))?;
        if testkit::mounts::all().iter().any(|mount| mount.point == shared) {
            return Ok(());
        }
        println!("the engine lost the plugin's propagated mount; restarting it");
        self.engine.dockerd.restart().map_err(|error| format!("{error:#}"))
    }

    /// Running containers read what they never read before.
    fn read_on(&mut self) -> Result<(), String> {
        for name in ["normal", "thin"] {
            let number = self.next_file;
            self.next_file += 1;
            let text = self.docker(&["exec", name, "/bin/cat", &format!("/srv/{number}")])?;
            if text != format!("content of {number}") {
                return Err(format!("{name} reads {text:?}"));
            }
        }
        Ok(())
    }

    /// The processes of a container are not the plugin's: without it they go on.
    fn still_runs(&self, event: Event) -> Result<(), String> {
        if !matches!(event, PluginKilled | PluginDisabled) {
            return Ok(());
        }
        match self.docker(&["inspect", "--format", "{{.State.Running}}", "normal"])?.as_str() {
            "true" => Ok(()),
            running => Err(format!("the container of the normal image runs: {running}")),
        }
    }

    /// Containers that ended start again, and new ones start.
    fn start_again(&mut self, are_kept: bool) -> Result<(), String> {
        if !are_kept {
            for name in ["normal", "thin"] {
                self.docker(&["restart", "-t", "0", name])?;
            }
        }
        self.read_on()?;
        for image in &self.images {
            let text = self.docker(&["run", "--rm", "--network=host", image, "/bin/cat", "/srv/7"])?;
            if text != "content of 7" {
                return Err(format!("{image} shows {text:?}"));
            }
        }
        Ok(())
    }

    /// Two containers run, one of them on a repository; no layer else is mounted.
    fn count_mounts(&self) -> Result<(), String> {
        // Below the data root they are seen a second time: the plugin's own root file system lies there.
        let shared = self.engine.propagated_mount().unwrap();
        let count = |kind: &str| {
            let of_kind = |mount: &testkit::mounts::Mount| mount.kind.starts_with(kind);
            let points = testkit::mounts::below(&shared).into_iter().filter(of_kind).map(|mount| mount.point);
            points.collect::<HashSet<_>>().len()
        };
        match (count("overlay"), count("fuse")) {
            (2, 1) => Ok(()),
            (overlays, fuses) => {
                Err(format!("{overlays} overlays and {fuses} repositories are mounted, not 2 and 1"))
            }
        }
    }

    fn end(mut self, live_restore: bool) {
        self.docker(&["rm", "-f", "normal", "thin"]).unwrap();
        let root = self.engine.dockerd.data_root();
        let left = |kind: &str| -> Vec<_> {
            testkit::mounts::below(&root).into_iter().filter(|mount| mount.kind.starts_with(kind)).collect()
        };
        assert!(left("overlay").is_empty(), "{:?}", left("overlay"));
        self.engine.dockerd.stop_only();
        if live_restore {
            return; // The plugin lives on, too.
        }
        assert!(left("fuse").is_empty(), "{:?}", left("fuse"));
        wait_until("the plugin's processes end", Duration::from_secs(10), || {
            managed_plugin::processes(&self.engine.dockerd).is_empty()
        })
        .unwrap();
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// Process 1 of the plugin.
    First,
    Server,
    Worker,
    Other,
}

impl Role {
    fn is(self, event: Event) -> bool {
        matches!(
            (event, self),
            (ServerKilled, Role::Server) | (WorkersKilled, Role::Worker) | (PluginKilled, Role::First)
        )
    }
}

fn role(pid: u32) -> Role {
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let is_first =
        status.lines().any(|line| line.starts_with("NSpid:") && line.split_whitespace().last() == Some("1"));
    match command.split(|byte| *byte == 0).nth(1) {
        Some(b"serve") if is_first => Role::First,
        Some(b"serve") => Role::Server,
        _ if name.trim() == "cvmfs-worker" => Role::Worker,
        _ => Role::Other,
    }
}

/// Makes `events` happen and prints a line for each; panics at the end if one was not survived.
fn play(mut world: World, events: &[Event], live_restore: bool) {
    world.start_containers();
    world.read_on().unwrap();
    let (mut passed, mut failed) = (0, 0);
    for event in events {
        let are_kept = event.keeps_containers(live_restore);
        let begun = std::time::Instant::now();
        let outcome = world
            .happen(*event)
            .and_then(|()| if are_kept { world.read_on() } else { Ok(()) })
            .and_then(|()| world.still_runs(*event))
            .and_then(|()| world.start_again(are_kept))
            .and_then(|()| world.count_mounts());
        let seconds = begun.elapsed().as_secs_f64();
        match outcome {
            Ok(()) => {
                passed += 1;
                println!("crash matrix: {event:?}: survived, {seconds:.1} s");
            }
            Err(reason) => {
                failed += 1;
                println!("crash matrix: {event:?}: FAILED after {seconds:.1} s: {reason}");
                for name in ["normal", "thin"] {
                    let state = world.docker(&["inspect", "--format", "{{.Id}} {{json .State}}", name]);
                    println!("  {name}: {}", state.unwrap_or_else(|error| error));
                }
                for name in ["normal", "thin"] {
                    let _ = world.docker(&["restart", "-t", "0", name]);
                }
            }
        }
    }
    println!("crash matrix, live-restore {live_restore}: {passed} passed, {failed} failed");
    assert_eq!(failed, 0);
    world.end(live_restore);
}

/// Each event once in each position would take an hour: an order by chance, in which each happens at least once.
fn order(of: &[Event], at_least: usize) -> Vec<Event> {
    let named = std::env::var("CVMFS_TEST_EVENTS").unwrap_or_default();
    let named: Vec<Event> = named
        .split(',')
        .filter_map(|name| of.iter().copied().find(|event| format!("{event:?}") == name))
        .collect();
    if !named.is_empty() {
        return named;
    }
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let mut seed = number("CVMFS_TEST_SEED").unwrap_or_else(|| u64::from(std::process::id()));
    println!("crash matrix: CVMFS_TEST_SEED={seed}");
    let mut random = move |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(seed >> 33).unwrap() % below
    };
    let mut events = of.to_vec();
    let count = number("CVMFS_TEST_EVENTS").map_or(at_least, |count| usize::try_from(count).unwrap());
    while events.len() < count {
        events.push(of[random(of.len())]);
    }
    for index in (1..events.len()).rev() {
        events.swap(index, random(index + 1));
    }
    events
}

#[test]
fn containers_of_both_kinds_survive_what_they_can_and_start_again_after_the_rest() {
    let world = World::new("matrix.example.org", &[]);
    play(world, &order(&Event::ALL, 7), false);
}

#[test]
fn with_live_restore_containers_read_on_while_the_engine_is_away() {
    let world = World::new("live.example.org", &["--live-restore"]);
    let events = order(&[EngineRestarted, EngineKilled, ServerKilled, WorkersKilled], 4);
    play(world, &events, true);
}
