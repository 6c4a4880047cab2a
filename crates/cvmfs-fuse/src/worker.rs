//! The worker: opens the repository, takes the connection over from its predecessor (or
//! completes the kernel's handshake as the first one) and serves until the mount is gone.

use std::collections::HashMap;
use std::io::{self, BufRead};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use cvmfs_client::clock::SystemClock;
use cvmfs_client::config::{ClientSettings, Config};
use cvmfs_client::deadline::Deadline;
use cvmfs_client::error::ClientError;
use cvmfs_client::repository::{Refreshed, Repository};
use cvmfs_format::ContentHash;
use fuser::{Session, SessionACL};

use crate::content::Content;
use crate::control::{self, ControlSettings};
use crate::filesystem::{Adapter, Mount, Options, chain};
use crate::handles::Handles;
use crate::launch::{MountRequest, Report};
use crate::logging;
use crate::magic::Visibility;
use crate::metrics::{MetricsListener, Telemetry};
use crate::shared_state::SharedState;
use crate::syscall;
use crate::view::View;

/// Threads that read `/dev/fuse`. They never wait for the network, so few are enough; one
/// more lets a look-up go on beside a large listing.
const READERS: usize = 3;

/// Time for one look at the server for a newer revision.
const REFRESH_DEADLINE: Duration = Duration::from_secs(30);
/// A repository whose manifest asks for more frequent looks is looked at this often.
const SHORTEST_TTL: Duration = Duration::from_secs(10);
/// Time for the name of who receives telemetry; the end of a mount waits for it.
const RESOLVE_PATIENCE: Duration = Duration::from_secs(2);
/// How soon a changed time between looks counts.
const TTL_CHECK: Duration = Duration::from_secs(5);

/// `FUSE_NOTIFY_INC_EPOCH`: all entries the kernel remembers are looked up again before
/// their next use. Linux 6.16; older kernels answer EINVAL.
const NEXT_EPOCH: [u32; 4] = [16, 8, 0, 0];

/// Entry point of the role.
pub(crate) fn run() -> ExitCode {
    syscall::unblock_signals();
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

fn serve() -> Result<(), Failure> {
    let (device, memory) = inherited_descriptors()?;
    let mut input = io::stdin().lock();
    let mut line = String::new();
    input.read_line(&mut line)?;
    let request: MountRequest = serde_json::from_str(&line).map_err(io::Error::from)?;
    let config = Config::load(&request.fqrn, &request.sources);
    logging::start(&request, config.as_ref().ok())?;
    let config = config.map_err(ClientError::from)?;
    let state = Arc::new(SharedState::map(memory.as_fd())?);
    let (settings, options, parameters) = load_settings(&request, &config)?;
    let observed = ControlSettings::from(&config).map_err(ClientError::from)?;
    logging::check_settings(&config).map_err(ClientError::from)?;
    let repository = match state.pin() {
        Some(pin) if state.is_answered() => {
            tracing::warn!(
                decision = "worker-restart",
                workers = state.workers(),
                "taking over from a worker that died"
            );
            Repository::resume(settings, Arc::new(SystemClock), pin)?
        }
        _ => {
            let repository = Repository::open(settings, Arc::new(SystemClock))?;
            state.record_pin(&repository.snapshot().pinned());
            Report::Ready.send(io::stdout())?;
            repository
        }
    };
    line.clear();
    if input.read_line(&mut line)? == 0 {
        return Err(Failure { message: "the supervisor ended before the mount".into(), exit_code: 1 });
    }
    drop(input);
    state.count_worker();
    let handles = Handles::restore(state.clone(), device.try_clone()?);
    let content = Content::new(repository.store().clone(), handles);
    let view = View::new(repository, request.layer_view, parameters, state.clone());
    view.attach_again();
    let mount = Arc::new(Mount::new(view, content, options, state));
    let session = connect(&mount, &device)?;
    if mount.passthrough_offered.load(std::sync::atomic::Ordering::SeqCst) {
        mount.content.probe_passthrough();
    }
    let (stop, stopped) = mpsc::channel();
    let observers = Observers::start(&request, &mount, device.try_clone()?, config, observed)?;
    let following = follow(mount.clone(), device, stopped);
    tracing::info!(
        fqrn = request.fqrn,
        mountpoint = %request.mountpoint.display(),
        revision = mount.view.repository().snapshot().pinned().revision,
        "serving"
    );
    let mode = if mount.content.is_passthrough() { "passthrough" } else { "plain" };
    tracing::info!(decision = "mode", mode, reason = "", "how reads are answered");
    let result = session.run();
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

/// Names and values of the whole configuration.
type Parameters = HashMap<Vec<u8>, Vec<u8>>;

fn load_settings(
    request: &MountRequest,
    config: &Config,
) -> Result<(ClientSettings, Options, Parameters), Failure> {
    let settings = ClientSettings::from(config).map_err(ClientError::from)?;
    let visibility = config.get("CVMFS_MAGIC_XATTRS_VISIBILITY").map(|setting| setting.value.as_str());
    let magic = match visibility {
        _ if request.layer_view => Visibility::Off,
        Some("never") => Visibility::Never,
        Some("always") => Visibility::Always,
        _ => Visibility::RootOnly,
    };
    let kernel_cache = settings.kcache_timeout;
    let parameters = config
        .iter()
        .map(|(key, setting)| (key.as_bytes().to_vec(), setting.value.clone().into_bytes()))
        .collect();
    Ok((settings, Options { kernel_cache, magic }, parameters))
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

/// Shakes hands with the kernel, or with the record of the first handshake.
///
/// fuser always begins with INIT, which a connection carries once. So it gets a socket
/// that holds the recorded INIT; the reply is sent to the kernel by the first worker and
/// compared by later ones; then the device takes the socket's place.
fn connect(mount: &Arc<Mount>, device: &OwnedFd) -> Result<Session<Adapter>, Failure> {
    let state = &mount.state;
    let (ours, theirs) = UnixDatagram::pair()?;
    ours.send(&state.init())?;
    let mut config = fuser::Config::default();
    config.acl = SessionACL::All;
    config.n_threads = Some(READERS);
    let session = Session::from_fd(Adapter(mount.clone()), OwnedFd::from(theirs), SessionACL::All, config)?;
    let mut reply = [0; 4096];
    let length = ours.recv(&mut reply)?;
    let reply = reply.get(..length).unwrap_or_default();
    if state.is_answered() {
        if reply != state.reply() {
            let message =
                "this version wants other connection settings than the mount has; mount again".into();
            return Err(Failure { message, exit_code: 1 });
        }
    } else {
        state.record_reply(reply)?;
        rustix::io::write(device, reply).map_err(io::Error::from)?;
        state.set_answered();
    }
    syscall::replace_descriptor(device.as_fd(), session.as_fd())?;
    Ok(session)
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

/// Looks for a newer revision now; on a change the kernel's entries are looked up again.
pub(crate) fn refresh(mount: &Mount, device: &OwnedFd) -> Result<Refreshed, ClientError> {
    let outcome = mount.view.repository().refresh(Deadline::after(REFRESH_DEADLINE))?;
    if outcome == Refreshed::Updated {
        revision_changed(mount, device);
    }
    Ok(outcome)
}

/// Moves to the revision with this root catalog and stays there.
pub(crate) fn switch_root(
    mount: &Mount,
    device: &OwnedFd,
    root: ContentHash,
) -> Result<Refreshed, ClientError> {
    let outcome = mount.view.repository().switch_root(root, Deadline::after(REFRESH_DEADLINE))?;
    if outcome == Refreshed::Updated {
        revision_changed(mount, device);
    }
    Ok(outcome)
}

fn revision_changed(mount: &Mount, device: &OwnedFd) {
    mount.view.revision_changed();
    let message: Vec<u8> = NEXT_EPOCH.iter().flat_map(|word| word.to_ne_bytes()).collect();
    if let Err(error) = rustix::io::write(device, &message) {
        tracing::debug!(%error, "the kernel keeps entries until their time is over");
    }
    let pin = mount.view.repository().snapshot().pinned();
    tracing::info!(decision = "revision", revision = pin.revision, root = %pin.root_hash, "new revision in use");
}
