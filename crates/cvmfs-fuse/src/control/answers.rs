//! The answers to commands, word for word those of the C++ client where tools read them (client behaviour §12).
//!
//! Where this client has no such thing the answer begins with `not supported`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cvmfs_client::config::Config;
use cvmfs_client::deadline::Deadline;
use cvmfs_client::network::{Fetcher, HostInfo};
use cvmfs_client::repository::Refreshed;
use cvmfs_client::store::CacheUsage;
use cvmfs_format::catalog::EntryKind;

use super::command::{Command, Side};
use super::settings::ControlSettings;
use super::sockets::send_descriptor;
use super::status::{CallStatus, HostStatus, LayerStatus, ProxyStatus, Status};
use super::{cache_answers, internal_affairs, network_answers};
use crate::filesystem::{Mount, chain};
use crate::logging::redaction::redacted;
use crate::profile::Profile;
use crate::statistics::CallStatistics;

/// Longest wait for the disk of the cache when the state is asked for: `status` has 2 seconds.
const CACHE_PATIENCE: Duration = Duration::from_secs(1);
/// Longest wait for catalogs that a path leads through.
pub(super) const PATH_PATIENCE: Duration = Duration::from_secs(30);
/// Layers that `status` tells of.
const MAX_LAYERS: usize = 4096;
/// What `version` and `hotpatch history` show. There is no separate loader: it has the same version.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What answers are made from.
#[derive(Debug)]
pub(crate) struct Context {
    pub(super) mount: Arc<Mount>,
    /// The FUSE connection.
    pub(super) device: OwnedFd,
    pub(super) mountpoint: PathBuf,
    pub(super) config: Config,
    started: SystemTime,
    supervisor: u32,
    cache: CacheProbe,
    /// Where metrics are offered.
    metrics: String,
}

impl Context {
    pub(crate) fn new(
        mount: Arc<Mount>,
        device: OwnedFd,
        mountpoint: PathBuf,
        config: Config,
        settings: &ControlSettings,
    ) -> Context {
        let supervisor =
            rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get().unsigned_abs());
        Context {
            mount,
            device,
            mountpoint,
            config,
            started: SystemTime::now(),
            supervisor,
            cache: CacheProbe::default(),
            metrics: settings.metrics.as_ref().map(ToString::to_string).unwrap_or_default(),
        }
    }

    /// Answers a command.
    pub(crate) fn answer(&self, command: &Command) -> String {
        let repository = self.mount.view.repository();
        match command {
            Command::Ping => "pong".into(),
            Command::StatusJson => serde_json::to_string(&self.status()).unwrap_or_default(),
            Command::Refresh => match crate::worker::refresh(&self.mount, &self.device) {
                Ok(_) => repository.snapshot().pinned().revision.to_string(),
                Err(error) => redacted(&chain(&error)),
            },
            Command::Remount => match crate::worker::refresh(&self.mount, &self.device) {
                Ok(Refreshed::UpToDate) => "Catalog up to date".into(),
                Ok(Refreshed::Updated) => "New revision applied".into(),
                Err(error) if error.exit_code() == 6 => "Failed (no space)".into(),
                Err(_) => "Failed".into(),
            },
            Command::Revision => repository.snapshot().pinned().revision.to_string(),
            Command::Chroot(root) => match crate::worker::switch_root(&self.mount, &self.device, *root) {
                Ok(_) => "OK".into(),
                Err(error) => {
                    tracing::warn!(decision = "refusal", %root, error = %chain(&error), "another root on request");
                    "Failed".into()
                }
            },
            Command::DetachNestedCatalogs => {
                repository.detach_nested_catalogs();
                "OK".into()
            }
            Command::MaxTtlInfo => match repository.max_ttl() {
                Some(limit) => format!("{} minutes", limit.as_secs() / 60),
                None => "unset".into(),
            },
            Command::MaxTtlSet(minutes) => {
                let limit = Duration::from_secs(minutes.saturating_mul(60));
                repository.set_max_ttl((*minutes > 0).then_some(limit));
                "OK".into()
            }
            Command::OpenCatalogs => self.open_catalogs(),
            Command::CacheSize
            | Command::CacheInstance
            | Command::CacheList(_)
            | Command::CacheLimitGet
            | Command::CacheLimitSet(_)
            | Command::Cleanup(_)
            | Command::CleanupRate(_)
            | Command::Evict(_)
            | Command::Pin(_)
            | Command::TearDownToReadOnly => cache_answers::answer(self, command),
            Command::NameserverGet
            | Command::NameserverSet(_)
            | Command::HostInfo(_)
            | Command::HostSwitch(_)
            | Command::HostSet(..)
            | Command::HostProbe
            | Command::HostProbeGeo
            | Command::ProxyInfo(_)
            | Command::ProxySet(..)
            | Command::ProxyRebalance
            | Command::ProxyGroupSwitch
            | Command::ProxyFallback(_)
            | Command::TimeoutInfo
            | Command::TimeoutSet(..) => network_answers::answer(self, command),
            Command::InternalAffairs => internal_affairs::internal_affairs(&self.status()),
            Command::Latency => internal_affairs::latency(&self.status()),
            Command::ResetErrorCounters => {
                self.mount.statistics.reset_errors();
                "OK".into()
            }
            // There is no trace, so nothing is left in a buffer.
            Command::TracebufferFlush => "OK".into(),
            Command::Mountpoint => self.mountpoint.display().to_string(),
            Command::DeviceId => device_id(&self.mountpoint).unwrap_or_else(|| "0:0".into()),
            // The cache has no process of its own: this one keeps it.
            Command::Pid | Command::PidCacheManager => std::process::id().to_string(),
            // The process that replaces this one when it dies.
            Command::PidWatchdog => self.supervisor.to_string(),
            Command::Parameters => self.parameters(),
            Command::HotpatchHistory => {
                let time = |time: SystemTime| {
                    let format = time::macros::format_description!(
                        "[day] [month repr:short] [year] [hour]:[minute]:[second]"
                    );
                    time::OffsetDateTime::from(time).format(format).unwrap_or_default()
                };
                format!(
                    "{}    (start of CernVM-FS loader {VERSION})\n{}    (loaded CernVM-FS Fuse Module {VERSION})",
                    time(process_start(self.supervisor).unwrap_or(self.started)),
                    time(self.started)
                )
            }
            Command::VfsInodes | Command::VfsEntries => {
                "not supported: node numbers follow from the catalogs and are not kept in a table".into()
            }
            Command::Version => format!("{VERSION} (CernVM-FS Fuse Module)\n{VERSION} (Loader)"),
            Command::VersionPatchlevel => "0".into(),
            Command::SendMountFd(socket) => match send_descriptor(socket, self.device.as_fd()) {
                Ok(()) => "OK".into(),
                Err(error) => {
                    tracing::warn!(socket = %socket.display(), %error, "the connection cannot be handed on");
                    "Failed".into()
                }
            },
        }
    }

    /// The state as a document.
    pub(crate) fn status(&self) -> Status {
        let mount = &self.mount;
        let repository = mount.view.repository();
        let known = repository.status();
        let network = repository.store().status();
        let traffic = repository.store().counters();
        let (cache, cache_error) = self.cache.state(mount);
        let chosen = mount.content.chosen();
        let counted = mount.call_statistics();
        let failures = mount.statistics.recent_failures(unix(SystemTime::now()));
        let wrong = known.refused.into_iter().chain(known.last_error).chain(cache_error).chain(failures);
        let errors = wrong.map(|error| redacted(&error)).collect();
        let status = Status {
            fqrn: known.fqrn,
            mountpoint: self.mountpoint.clone(),
            pid: std::process::id(),
            revision: known.revision,
            root_hash: known.root_hash,
            online: known.online,
            host: redacted(&network.host),
            proxy: redacted(&network.proxy),
            cache_used: cache.usage.used,
            cache_limit: cache.usage.limit,
            requests: traffic.requests,
            bytes_fetched: traffic.bytes_fetched,
            cache_hits: traffic.cache_hits,
            cache_misses: traffic.cache_misses,
            fetched_ahead: traffic.fetched_ahead,
            passthrough: chosen.profile == Profile::Passthrough,
            errors,
            mode: chosen.profile.name().into(),
            mode_reason: chosen.reason.clone(),
            layer_view: mount.view.is_layer_view(),
            layers: layers(mount),
            open_files: counted.open_files,
            catalogs: repository.snapshot().attached().len(),
            io_errors: counted.io_errors,
            calls: call_status(&counted),
            errors_by_cause: counted.errors,
            waiting: counted.waiting,
            interrupted: counted.interrupted,
            overdue: counted.overdue,
            refused: counted.refused,
            workers: mount.state.workers(),
            repeated_requests: mount.state.repeated(),
            started: unix(self.started),
            version: VERSION.into(),
            ttl: repository.ttl().as_secs(),
            fixed: known.fixed,
            whitelist_expires: known.whitelist_expires,
            whitelist_days: known.whitelist_days,
            warnings: known.warnings.into_iter().chain(cache.warning()).collect(),
            memory: resident_memory(),
            descriptors: std::fs::read_dir("/proc/self/fd").ok().map(|found| found.count() as u64),
            metrics: self.metrics.clone(),
            hosts: self.hosts(Side::Regular),
            proxies: self.proxies(Side::Regular),
            network_errors: traffic.network_errors,
            fail_overs: traffic.fail_overs,
            cache_directory: repository.store().cache().directory().to_owned(),
            cache_pinned: cache.usage.pinned,
            cleanups: cache.cleanups,
            evictions: cache.usage.evictions,
            ..Status::default()
        };
        status.conclude()
    }

    /// Who fetches from the servers of this side; nobody if external files have none of their own.
    pub(super) fn fetcher(&self, side: Side) -> Option<&Fetcher> {
        let store = self.mount.view.repository().store();
        match side {
            Side::Regular => Some(store.fetcher()),
            Side::External => store.external_fetcher(),
        }
    }

    /// The servers in their present order.
    pub(super) fn hosts(&self, side: Side) -> Vec<HostStatus> {
        let hosts = self.fetcher(side).map(Fetcher::host_info).unwrap_or_default();
        let shown = |host: HostInfo| HostStatus {
            url: redacted(&host.url),
            current: host.is_current,
            round_trip_ms: host.round_trip.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
        };
        hosts.into_iter().map(shown).collect()
    }

    /// The proxies, group by group.
    pub(super) fn proxies(&self, side: Side) -> Vec<ProxyStatus> {
        let Some(info) = self.fetcher(side).map(Fetcher::proxy_info) else { return Vec::new() };
        let first_fallback = info.first_fallback_group;
        let groups = info.groups.into_iter().enumerate();
        groups
            .flat_map(|(group, members)| members.into_iter().map(move |proxy| (group, proxy)))
            .map(|(group, proxy)| ProxyStatus {
                group,
                fallback: group >= first_fallback,
                state: proxy.state.name().into(),
                current: proxy.is_current,
                url: redacted(&proxy.url),
                name: proxy.name,
            })
            .collect()
    }

    /// The attached catalogs as a tree, each under the deepest one above it.
    fn open_catalogs(&self) -> String {
        let attached = self.mount.view.repository().snapshot().attached();
        let mut above: Vec<Vec<u8>> = Vec::new();
        let mut text = String::new();
        // Sorted by path, so that a catalog comes after all those above it.
        let mut places: Vec<Vec<u8>> = attached.iter().map(|catalog| catalog.mountpoint().to_vec()).collect();
        places.sort_by(|one, other| one.split(|byte| *byte == b'/').cmp(other.split(|byte| *byte == b'/')));
        for place in places {
            while above.last().is_some_and(|last| !is_below(&place, last)) {
                above.pop();
            }
            let _ = writeln!(text, "{}-> {}", "    ".repeat(above.len()), printable(&place));
            above.push(place);
        }
        text
    }

    fn parameters(&self) -> String {
        let mut text = String::new();
        for (name, setting) in self.config.iter() {
            let _ = writeln!(text, "{name}={}    # from {}", redacted(&setting.value), setting.origin);
        }
        text
    }

    /// The regular file at a path of the repository.
    pub(super) fn regular_file(&self, path: &[u8]) -> Option<cvmfs_client::snapshot::Located> {
        let snapshot = self.mount.view.repository().snapshot();
        let located = snapshot.resolve(path, Deadline::after(PATH_PATIENCE)).ok()??;
        (located.entry.kind() == EntryKind::File).then_some(located)
    }
}

fn is_below(path: &[u8], top: &[u8]) -> bool {
    path.strip_prefix(top).is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
}

/// A path for a line of text: bytes that are no text are replaced, control characters escaped.
pub(super) fn printable(path: &[u8]) -> String {
    String::from_utf8_lossy(path).chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

fn unix(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs().cast_signed())
}

/// Calls by name, with their durations if they are timed.
fn call_status(counted: &CallStatistics) -> BTreeMap<String, CallStatus> {
    let status = |(name, count): (&&'static str, &u64)| {
        let durations = counted.latencies.get(name).cloned().unwrap_or_default();
        ((*name).to_owned(), CallStatus { count: *count, durations })
    };
    counted.calls.iter().map(status).collect()
}

/// `major:minor` of the mount, from the mount table: the mount itself is not touched.
fn device_id(mountpoint: &std::path::Path) -> Option<String> {
    crate::mount_table::device_of(mountpoint).ok()?
}

/// Bytes of memory that this process has.
fn resident_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kilobytes * 1024)
}

/// When a process started.
fn process_start(pid: u32) -> Option<SystemTime> {
    std::fs::metadata(format!("/proc/{pid}")).ok()?.modified().ok()
}

/// What is known of the cache.
#[derive(Debug, Clone, Copy, Default)]
struct CacheState {
    usage: CacheUsage,
    /// Times that room was made within the last day.
    cleanups: u64,
    is_read_only: bool,
}

impl CacheState {
    fn of(mount: &Mount) -> CacheState {
        let cache = mount.view.repository().store().cache();
        CacheState {
            usage: cache.usage(),
            cleanups: cache.cleanups_within(Duration::from_secs(24 * 3600)),
            is_read_only: cache.is_read_only(),
        }
    }

    fn warning(&self) -> Option<String> {
        self.is_read_only
            .then(|| "the cache cannot be written: what is not in it is fetched each time".into())
    }
}

/// Asks for the state of the cache without waiting longer than [`CACHE_PATIENCE`]: its disk may hang.
#[derive(Debug, Default)]
struct CacheProbe {
    state: Mutex<ProbeState>,
}

#[derive(Debug, Default)]
struct ProbeState {
    last: CacheState,
    /// A thread that asks already; no second one joins it.
    asking: Option<mpsc::Receiver<CacheState>>,
}

impl CacheProbe {
    /// The state, and what is wrong if it is an old one.
    fn state(&self, mount: &Arc<Mount>) -> (CacheState, Option<String>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let receiver = state.asking.take().unwrap_or_else(|| {
            let (sender, receiver) = mpsc::channel();
            let mount = mount.clone();
            let _ = std::thread::Builder::new().name("cvmfs-usage".into()).spawn(move || {
                let _ = sender.send(CacheState::of(&mount));
            });
            receiver
        });
        match receiver.recv_timeout(CACHE_PATIENCE) {
            Ok(known) => {
                state.last = known;
                (known, None)
            }
            Err(error) => {
                if error == mpsc::RecvTimeoutError::Timeout {
                    state.asking = Some(receiver);
                }
                (state.last, Some("the disk of the cache does not answer; its usage is from earlier".into()))
            }
        }
    }
}

/// What each layer's catalog says, and how much below it was fetched.
fn layers(mount: &Mount) -> BTreeMap<String, LayerStatus> {
    if !mount.view.is_layer_view() {
        return BTreeMap::new();
    }
    let attached = mount.view.repository().snapshot().attached();
    let nested = attached.iter().filter(|catalog| !catalog.mountpoint().is_empty()).take(MAX_LAYERS);
    let status = nested.map(|catalog| {
        let tally = mount.content.traffic.of(catalog.mountpoint());
        let path = String::from_utf8_lossy(catalog.mountpoint()).into_owned();
        let status =
            LayerStatus { bytes: catalog.content(), files_fetched: tally.files, bytes_fetched: tally.bytes };
        (path, status)
    });
    status.collect()
}
