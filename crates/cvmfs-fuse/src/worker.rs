//! The worker: opens the repository, takes the connection over from its predecessor (or
//! completes the kernel's handshake as the first one) and serves until the mount is gone.

use std::collections::HashMap;
use std::io::{self, BufRead};
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::{Arc, PoisonError, mpsc};
use std::time::{Duration, Instant};

use cvmfs_client::clock::SystemClock;
use cvmfs_client::config::{ClientSettings, Config, ConfigSources, KernelSettings, Origin, Ownership};
use cvmfs_client::deadline::Deadline;
use cvmfs_client::error::ClientError;
use cvmfs_client::repository::{Refreshed, Repository};
use cvmfs_client::snapshot::{Pin, Snapshot};
use cvmfs_format::ContentHash;

use crate::attributes::Presentation;
use crate::confinement::Files;
use crate::content::{Content, nameless_file};
use crate::control::{self, ControlSettings};
use crate::filesystem::{Mount, chain};
use crate::handles::Handles;
use crate::launch::{Assignment, MountFlags, MountRequest, Prepared, Report};
use crate::logging;
use crate::metrics::{MetricsListener, Telemetry};
use crate::profile;
use crate::protocol::handshake::capability;
use crate::protocol::reply::Channel;
use crate::session::{self, SessionError};
use crate::shared_state::SharedState;
use crate::shared_state::journal::Journal;
use crate::syscall;
use crate::view::View;

/// Time for one look at the server for a newer revision.
const REFRESH_DEADLINE: Duration = Duration::from_secs(30);
/// A repository whose manifest asks for more frequent looks is looked at this often.
const SHORTEST_TTL: Duration = Duration::from_secs(10);
/// Time for the name of who receives telemetry; the end of a mount waits for it.
const RESOLVE_PATIENCE: Duration = Duration::from_secs(2);
/// How soon a changed time between looks counts.
const TTL_CHECK: Duration = Duration::from_secs(5);

/// Entry point of the role.
pub(crate) fn run() -> ExitCode {
    syscall::unblock_signals();
    // Without it the process list shows the descriptor by which the program was started.
    let _ = rustix::thread::set_name(c"cvmfs-worker");
    // The supervisor stays in the caller's session until the repository is mounted; a worker never touches the mount
    // point, and may have to trigger the automounter for the configuration repository.
    syscall::new_session();
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let report = Report::Failed { message: failure.message.clone(), exit_code: failure.exit_code };
            let _ = report.send(io::stdout());
            tracing::error!(error = failure.message, "the worker cannot serve");
            ExitCode::from(failure.exit_code.max(1))
        }
    }
}

#[derive(Debug)]
struct Failure {
    message: String,
    exit_code: u8,
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        Failure { message: error.to_string(), exit_code: 1 }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Failure {
        Failure { message: chain(&error), exit_code: error.exit_code() }
    }
}

impl From<SessionError> for Failure {
    fn from(error: SessionError) -> Failure {
        Failure { message: chain(&error), exit_code: 1 }
    }
}

fn serve() -> Result<(), Failure> {
    let (device, memory) = inherited_descriptors()?;
    let mut input = io::stdin().lock();
    let mut line = String::new();
    input.read_line(&mut line)?;
    let Assignment { request, last_settings } = serde_json::from_str(&line).map_err(io::Error::from)?;
    let state = Arc::new(SharedState::map(memory.as_fd())?);
    let settings = load_settings(&request, last_settings)?;
    if request.confined {
        confine(&request, &settings);
    }
    let repository = match state.pin() {
        Some(pin) if state.is_answered() => {
            tracing::warn!(
                decision = "worker-restart",
                workers = state.workers(),
                "taking over from another worker"
            );
            Repository::resume(settings.client, Arc::new(SystemClock), pin)?
        }
        _ => {
            let repository = Repository::open(settings.client, Arc::new(SystemClock))?;
            state.record_pin(&repository.snapshot().pinned());
            state.record_told();
            repository
        }
    };
    Report::Ready(settings.prepared).send(io::stdout())?;
    line.clear();
    if input.read_line(&mut line)? == 0 {
        return Err(Failure { message: "the supervisor ended before the mount".into(), exit_code: 1 });
    }
    drop(input);
    state.count_worker();
    let is_protected = repository.snapshot().requirement().is_some();
    let agreement = session::connect(&state, &device, &settings.kernel, is_protected)?;
    let handles = Handles::restore(state.clone(), device.try_clone()?);
    let must_see_opens = is_protected || settings.kernel.writable;
    let chosen = profile::choose(settings.kernel.profile, must_see_opens, &agreement, &state, || {
        nameless_file(repository.store().cache().directory()).and_then(|file| handles.sweep(&file))
    });
    tracing::info!(
        decision = "mode",
        mode = chosen.profile.name(),
        reason = chosen.reason,
        "how files are read"
    );
    let has_open_files = handles.open_nodes() > 0;
    let content = Content::new(repository.store().clone(), handles, chosen);
    let presentation = Presentation::new(settings.kernel.ownership.clone());
    let view = View::new(repository, request.layer_view, settings.parameters, presentation, state.clone());
    view.attach_again(has_open_files);
    let channel = Arc::new(Channel(device.try_clone()?));
    let (journal, left) = match agreement.has(capability::HAS_RESEND) {
        true => (None, Vec::new()),
        false => {
            let (journal, left) = Journal::open(&state);
            (Some(journal), left)
        }
    };
    let mount = Mount::new(view, content, settings.kernel, agreement, (state, journal), channel);
    let mount = Arc::new(mount);
    if let Some(pin) = mount.state.told_before() {
        tell_for_predecessor(&mount, device.try_clone()?, pin);
    }
    let (stop, stopped) = mpsc::channel();
    let observers =
        Observers::start(&request, &mount, device.try_clone()?, settings.config, settings.observed)?;
    let following = follow(mount.clone(), device, stopped);
    tracing::info!(
        fqrn = request.fqrn,
        mountpoint = %request.mountpoint.display(),
        revision = mount.view.repository().snapshot().pinned().revision,
        "serving"
    );
    let result = session::run(&mount, left);
    drop(stop);
    let _ = following.join();
    drop(observers);
    result.map_err(Failure::from)
}

fn inherited_descriptors() -> Result<(OwnedFd, OwnedFd), Failure> {
    let usage = || Failure { message: "started by hand; use `cvmfs-client mount`".into(), exit_code: 2 };
    let mut numbers = std::env::args().skip(3).map(|argument| argument.parse());
    match (numbers.next(), numbers.next()) {
        (Some(Ok(device)), Some(Ok(memory))) => Ok((
            syscall::inherited(device).map_err(|_| usage())?,
            syscall::inherited(memory).map_err(|_| usage())?,
        )),
        _ => Err(usage()),
    }
}

/// The configuration, with types.
struct Settings {
    config: Config,
    client: ClientSettings,
    kernel: KernelSettings,
    observed: ControlSettings,
    /// Names and values of the whole configuration, which symbolic links may name.
    parameters: HashMap<Vec<u8>, Vec<u8>>,
    prepared: Prepared,
}

/// Reads the configuration and starts logging as it says. If it cannot be used any more, a
/// successor goes on with what its predecessor had.
fn load_settings(
    request: &MountRequest,
    last_settings: Option<Vec<(String, String)>>,
) -> Result<Settings, Failure> {
    let config = Config::load(&request.fqrn, &request.sources).map_err(ClientError::from);
    let outcome = config.map_err(Failure::from).and_then(|config| {
        logging::start(request, Some(&config))?;
        settings_from(request, config)
    });
    let (Err(failure), Some(overrides)) = (&outcome, last_settings) else {
        if outcome.is_err() {
            logging::start(request, None)?;
        }
        return outcome;
    };
    let sources = ConfigSources { files: Some(Vec::new()), overrides, ..request.sources.clone() };
    let config = Config::load(&request.fqrn, &sources).map_err(ClientError::from)?;
    logging::start(request, Some(&config))?;
    tracing::error!(
        error = failure.message,
        "the configuration cannot be used any more; going on with the settings of the mount"
    );
    settings_from(request, config)
}

/// What parses the world's data gets no more files than it needs. A kernel that cannot do this is no reason not to mount.
fn confine(request: &MountRequest, settings: &Settings) {
    if let Err(error) = crate::confinement::drop_identities() {
        tracing::warn!(decision = "confinement", %error, "the right to act as other users stays");
    }
    let files = Files::of(request, &settings.config, &settings.client, &settings.observed);
    match files.confine() {
        Ok(()) => tracing::info!(
            decision = "confinement",
            "access to files is confined to the configuration, caches and sockets"
        ),
        Err(error) => tracing::warn!(
            decision = "confinement", error = %chain(&error),
            "access to files is not confined: that takes Linux 5.19 with Landlock"
        ),
    }
}

fn settings_from(request: &MountRequest, config: Config) -> Result<Settings, Failure> {
    let client = ClientSettings::from(&config).map_err(ClientError::from)?;
    let observed = ControlSettings::from(&config).map_err(ClientError::from)?;
    logging::check_settings(&config).map_err(ClientError::from)?;
    let mut kernel = KernelSettings::from(&config).map_err(ClientError::from)?;
    if request.layer_view {
        // Owners and modes of a layer are part of the image, whatever a site does with its software. Only who mounts for
        // containers of a user namespace may say how its owners are shown.
        let by_mounter = |name| config.get(name).is_some_and(|setting| setting.origin == Origin::Override);
        let mut ownership = Ownership::default();
        if by_mounter("CVMFS_UID_MAP") {
            ownership.uids = kernel.ownership.uids;
        }
        if by_mounter("CVMFS_GID_MAP") {
            ownership.gids = kernel.ownership.gids;
        }
        kernel.ownership = ownership;
    }
    let flags = MountFlags {
        check_permissions: kernel.check_permissions,
        suid: kernel.suid,
        writable: kernel.writable,
    };
    let settings = config.iter().map(|(key, setting)| (key.to_owned(), setting.value.clone())).collect();
    // Whoever publishes may name them in a link, and whoever reads the link sees them.
    let parameters = config
        .iter()
        .map(|(key, setting)| {
            (key.as_bytes().to_vec(), logging::redaction::redacted(&setting.value).into_bytes())
        })
        .collect();
    let prepared = Prepared { flags, settings };
    Ok(Settings { config, client, kernel, observed, parameters, prepared })
}

/// Those who tell others about the mount; they end with it.
struct Observers {
    _control: control::Control,
    _metrics: Option<MetricsListener>,
    _telemetry: Option<Telemetry>,
}

impl Observers {
    fn start(
        request: &MountRequest,
        mount: &Arc<Mount>,
        device: OwnedFd,
        config: Config,
        settings: ControlSettings,
    ) -> io::Result<Observers> {
        let mountpoint = request.mountpoint.clone();
        let context = Arc::new(control::Context::new(mount.clone(), device, mountpoint, config, &settings));
        let answering = context.clone();
        let own = control::socket_path(&request.fqrn, &request.mountpoint);
        let control =
            control::serve(&own, &settings.talk, Arc::new(move |command| answering.answer(command)))?;
        if let Some(complaint) = &settings.complaint {
            tracing::warn!(complaint, "telemetry is not sent");
        }
        let resolving = mount.clone();
        let resolve = move |name: &str| {
            let fetcher = resolving.view.repository().store().fetcher();
            fetcher.address_of(name, Deadline::after(RESOLVE_PATIENCE)).map_err(io::Error::other)
        };
        let telemetry =
            settings.telemetry.map(|influx| Telemetry::start(influx, move || context.status(), resolve));
        Ok(Observers {
            _control: control,
            _metrics: settings.metrics.map(MetricsListener::start).transpose()?,
            _telemetry: telemetry.transpose()?,
        })
    }
}

/// Looks for newer revisions as often as the revision's publisher says, until `stopped` hangs up. Also a mount that
/// shall not be updated looks at the blacklists.
fn follow(mount: Arc<Mount>, device: OwnedFd, stopped: mpsc::Receiver<()>) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let mut looked = Instant::now();
        loop {
            // The time may change while we wait: an administrator sets it, or a look on request fails.
            let due = mount.view.repository().ttl().max(SHORTEST_TTL);
            let wait = due.saturating_sub(looked.elapsed()).min(TTL_CHECK);
            match stopped.recv_timeout(wait) {
                Err(mpsc::RecvTimeoutError::Timeout) if looked.elapsed() < due => continue,
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                _ => return,
            }
            if !mount.view.repository().settings().auto_update {
                mount.view.repository().check_blacklists();
            } else if let Err(error) = refresh(&mount, &device) {
                let fqrn = &mount.view.repository().settings().fqrn;
                tracing::warn!(
                    decision = "refusal", fqrn, error = %chain(&error),
                    "no newer revision could be had; staying"
                );
            }
            looked = Instant::now();
        }
    })
}

/// The predecessor died between a new revision and its news.
fn tell_for_predecessor(mount: &Arc<Mount>, device: OwnedFd, before: Pin) {
    let (mount, (taken, turn)) = (mount.clone(), mpsc::channel());
    // The kernel may wait for this worker before it takes the news, so this one must serve meanwhile; but nobody else
    // changes or tells the revision first.
    std::thread::spawn(move || {
        let _turn = mount.updating.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = taken.send(());
        let repository = mount.view.repository();
        let recalled = repository.recall(before, &mount.state.catalogs(), Deadline::after(REFRESH_DEADLINE));
        let older = repository.older_snapshots();
        match older.iter().find(|snapshot| snapshot.pinned().root_hash == before.root_hash) {
            Some(old) => tell(&mount, &device, old, &repository.snapshot()),
            None => tracing::warn!(
                error = %recalled.err().map(|error| chain(&error)).unwrap_or_default(),
                "names of the revision before stay until their time is over"
            ),
        }
    });
    let _ = turn.recv_timeout(RESOLVE_PATIENCE);
}

/// Looks for a newer revision now; on a change the kernel is told what differs.
pub(crate) fn refresh(mount: &Mount, device: &OwnedFd) -> Result<Refreshed, ClientError> {
    // One after the other: what the second finds in use must be in use for everybody.
    let _turn = mount.updating.lock().unwrap_or_else(PoisonError::into_inner);
    let old = mount.view.repository().snapshot();
    let outcome = mount.view.repository().refresh(Deadline::after(REFRESH_DEADLINE))?;
    revision_changed(mount, device, &old);
    Ok(outcome)
}

/// Moves to the revision with this root catalog and stays there.
pub(crate) fn switch_root(
    mount: &Mount,
    device: &OwnedFd,
    root: ContentHash,
) -> Result<Refreshed, ClientError> {
    let _turn = mount.updating.lock().unwrap_or_else(PoisonError::into_inner);
    let old = mount.view.repository().snapshot();
    let outcome = mount.view.repository().switch_root(root, Deadline::after(REFRESH_DEADLINE))?;
    revision_changed(mount, device, &old);
    Ok(outcome)
}

/// Has nodes, listings and the kernel follow the repository if it left the revision `old`.
fn revision_changed(mount: &Mount, device: &OwnedFd, old: &Snapshot) {
    let new = mount.view.repository().snapshot();
    let pin = new.pinned();
    if pin.root_hash == old.pinned().root_hash {
        return;
    }
    mount.view.revision_changed();
    tracing::info!(decision = "revision", revision = pin.revision, root = %pin.root_hash, "new revision in use");
    tell(mount, device, old, &new);
}

/// Tells the kernel what differs, and a successor that this was done.
fn tell(mount: &Mount, device: &OwnedFd, old: &Snapshot, new: &Snapshot) {
    mount.invalidation.revision_changed(device, old, new, &|node| mount.is_busy(node));
    mount.state.record_told();
}
