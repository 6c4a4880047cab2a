//! The command line of `cvmfs-graphdriver`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing_subscriber::EnvFilter;

use crate::options::MountMethod;
use crate::plugin::{MountsFactory, Plugin};
use crate::publishing::Publishing;
use crate::repositories::{ClientMounts, ClientOptions, ExternalMounts, owners};
use crate::{keeper, privileges, server, status_command, system_calls};

/// Where dockerd expects the socket of a managed plugin.
const PLUGIN_SOCKET: &str = "/run/docker/plugins/plugin.sock";
/// The plugin's propagated mount.
const PLUGIN_MOUNT: &str = "/mnt";
/// Where the plugin sees the host's CernVM-FS configuration.
const PLUGIN_CONFIG: &str = "/cvmfs_ext_config";
/// Where the plugin sees the configuration of the layer service.
const PLUGIN_LAYER_SERVICE: &str = "/minio_ext_config";
/// The configuration of CernVM-FS on a host.
const HOST_CONFIG: &str = "/etc/cvmfs";
/// State of the plugin below the propagated mount.
const STATE_DIRECTORY: &str = ".cvmfs-graphdriver";

/// Docker graph driver plugin that runs images from CernVM-FS.
///
/// Normal images behave as with overlay2. A thin image lists directories in CernVM-FS
/// repositories instead of holding files: they are mounted when a container starts, and
/// a file is fetched when the container opens it.
#[derive(Debug, Parser)]
#[command(name = "cvmfs-graphdriver", version, max_term_width = 100)]
#[command(after_help = "\
As a managed plugin (Docker 17.06 to 27) dockerd starts it:
  docker plugin create cvmfs/graphdriver DIR && docker plugin enable cvmfs/graphdriver
  dockerd --experimental -s cvmfs/graphdriver
As a legacy plugin, on a host, for trials:
  cvmfs-graphdriver serve --socket /run/docker/plugins/cvmfs.sock &
  dockerd --experimental -s cvmfs")]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    log: LogOptions,
}

#[derive(Debug, Args)]
struct LogOptions {
    /// Lowest level that is logged: error, warn, info, debug or trace [default: the
    /// plugin setting CVMFS_GRAPHDRIVER_LOG, else info]
    #[arg(long, global = true, value_name = "LEVEL")]
    log_level: Option<tracing::Level>,
    /// Form of the log on stderr [default: the plugin setting
    /// CVMFS_GRAPHDRIVER_LOG_FORMAT, else text]
    #[arg(long, global = true, value_name = "FORMAT")]
    log_format: Option<LogFormat>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Answer the engine's calls until SIGTERM; mounts of containers stay.
    Serve(ServeOptions),
    /// Show what a running plugin does: repositories, containers and thin images, and how much of them was fetched.
    ///
    /// A container is lazy if all layers of its image lie in repositories: then a file is fetched when it is opened.
    /// Exit code 1 if the plugin does not answer or no engine uses it.
    Status(StatusOptions),
}

#[derive(Debug, Clone, Args)]
struct StatusOptions {
    /// Socket of the plugin.
    #[arg(long, value_name = "PATH", default_value = PLUGIN_SOCKET)]
    socket: PathBuf,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Args)]
struct ServeOptions {
    /// Socket to listen on.
    #[arg(long, value_name = "PATH", default_value = PLUGIN_SOCKET)]
    socket: PathBuf,
    /// Directory whose mounts the host sees; also keeps the plugin's state and cache
    /// [default: /mnt in the plugin; none with another socket: then the state is in /run
    /// and the cache in the driver's directory]
    #[arg(long, value_name = "DIR")]
    propagated_mount: Option<PathBuf>,
    /// CernVM-FS configuration, read in place: default.local, config.d, domain.d, keys
    /// [default: /cvmfs_ext_config if it exists, else /etc/cvmfs]
    #[arg(long, value_name = "DIR")]
    config: Option<PathBuf>,
    /// Directory with the config.json that says where the changes of committed containers of thin images are published
    /// [default: /minio_ext_config if it exists, else the CernVM-FS configuration]
    #[arg(long, value_name = "DIR")]
    layer_service: Option<PathBuf>,
    /// The socket is standard input, bound by the process that started this one.
    #[arg(long, hide = true)]
    inherited_socket: bool,
}

/// Runs the program.
pub fn run() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version go to stdout and are no error; the rest is wrong usage, 2.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let log_json = start_log(&cli.log);
    let options = match cli.command {
        Command::Serve(options) => options,
        Command::Status(options) => {
            return match status_command::run(&options.socket, options.json) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("error: {error:#}");
                    ExitCode::FAILURE
                }
            };
        }
    };
    if let Err(error) = privileges::drop_unneeded() {
        tracing::warn!(%error, "the plugin keeps privileges that it does not need");
    }
    if let Err(error) = system_calls::refuse_unneeded() {
        tracing::warn!(error, "system calls are not filtered");
    }
    let result = if keeper::is_needed() && !options.inherited_socket {
        keeper::run(&options.socket)
    } else {
        serve(&options, log_json)
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether the log is JSON.
fn start_log(options: &LogOptions) -> bool {
    let setting = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let level = options.log_level.map(|level| level.to_string()).or_else(|| setting("CVMFS_GRAPHDRIVER_LOG"));
    let level = level.unwrap_or_else(|| "info".to_owned());
    let known = level.parse::<tracing::Level>().is_ok();
    let filter = EnvFilter::new(if known { level.to_ascii_lowercase() } else { "info".to_owned() });
    let json = matches!(options.log_format, Some(LogFormat::Json))
        || (options.log_format.is_none()
            && setting("CVMFS_GRAPHDRIVER_LOG_FORMAT")
                .is_some_and(|format| format.eq_ignore_ascii_case("json")));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false);
    if json {
        log.json().init();
    } else {
        log.init();
    }
    if !known {
        tracing::warn!(level, "unknown log level, using info");
    }
    json
}

fn serve(options: &ServeOptions, log_json: bool) -> Result<()> {
    let listener = if options.inherited_socket {
        keeper::inherited_socket().context("cannot use the inherited socket")?
    } else {
        server::bind(&options.socket)
            .with_context(|| format!("cannot listen on {}", options.socket.display()))?
    };
    let plugin = Arc::new(Plugin::start(
        &state_directory(options),
        mounts(options, log_json),
        Publishing::new(&layer_service_directory(options)),
    ));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start")?;
    runtime.block_on(async {
        let listener = tokio::net::UnixListener::from_std(listener)?;
        tracing::info!(version = env!("CARGO_PKG_VERSION"), socket = %options.socket.display(), "serving");
        let (stop, stopped) = watch::channel(false);
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let idle = tokio::spawn(unmount_idle(Arc::clone(&plugin)));
        let unused = tokio::spawn(tell_if_unused(Arc::clone(&plugin)));
        let served = tokio::spawn(server::serve(listener, plugin, stopped));
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping; mounts of containers stay");
        if !options.inherited_socket {
            // Failing that, the next start replaces it.
            let _ = std::fs::remove_file(&options.socket);
        }
        idle.abort();
        unused.abort();
        stop.send_replace(true);
        served.await.context("the server failed")
    })?;
    // A call that hangs in the kernel must not keep the process alive.
    runtime.shutdown_background();
    Ok(())
}

/// How often idle repositories are looked for.
const IDLE_CHECK: std::time::Duration = std::time::Duration::from_secs(60);

/// An engine that wants the driver has asked for it by then.
const ENGINE_PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);

/// An engine that cannot use the plugin does not say so to it, and hardly to anybody else.
async fn tell_if_unused(plugin: Arc<Plugin>) {
    tokio::time::sleep(ENGINE_PATIENCE).await;
    if let Err(error) = plugin.driver() {
        tracing::warn!("{error}");
    }
}

async fn unmount_idle(plugin: Arc<Plugin>) {
    loop {
        tokio::time::sleep(IDLE_CHECK).await;
        if let Ok(driver) = plugin.driver() {
            // Ends with an error only when the runtime is shut down.
            let _ = tokio::task::spawn_blocking(move || driver.unmount_idle_repositories()).await;
        }
    }
}

fn is_managed(options: &ServeOptions) -> bool {
    options.socket == Path::new(PLUGIN_SOCKET)
}

/// Where the Init request is kept.
fn state_directory(options: &ServeOptions) -> PathBuf {
    match (&options.propagated_mount, is_managed(options)) {
        (Some(directory), _) => directory.join(STATE_DIRECTORY),
        (None, true) => Path::new(PLUGIN_MOUNT).join(STATE_DIRECTORY),
        // Needed only as long as the engine runs: /run is lost when the engine is.
        (None, false) => {
            Path::new("/run/cvmfs-graphdriver").join(options.socket.file_stem().unwrap_or_default())
        }
    }
}

fn config_directory(options: &ServeOptions) -> PathBuf {
    options.config.clone().unwrap_or_else(|| {
        let of_plugin = Path::new(PLUGIN_CONFIG);
        if of_plugin.is_dir() { of_plugin.to_owned() } else { PathBuf::from(HOST_CONFIG) }
    })
}

fn layer_service_directory(options: &ServeOptions) -> PathBuf {
    options.layer_service.clone().unwrap_or_else(|| {
        let of_plugin = Path::new(PLUGIN_LAYER_SERVICE);
        if of_plugin.is_dir() { of_plugin.to_owned() } else { config_directory(options) }
    })
}

fn mounts(options: &ServeOptions, log_json: bool) -> MountsFactory {
    let config = config_directory(options);
    // Not in the plugin's root file system, which an upgrade replaces.
    let cache = (options.propagated_mount.is_some() || is_managed(options))
        .then(|| state_directory(options).join("cache"));
    Box::new(move |home, options, id_maps| {
        let directory = home.join("cvmfs");
        Ok(match options.mount_method {
            MountMethod::External => {
                let mapped = home.join(STATE_DIRECTORY).join("mapped");
                Arc::new(ExternalMounts::new(&directory, id_maps, &mapped))
            }
            MountMethod::Internal => {
                let cache = cache.clone().unwrap_or_else(|| home.join(STATE_DIRECTORY).join("cache"));
                let mut parameters = options.client.overrides();
                parameters.extend(owners::parameters(id_maps, &home.join(STATE_DIRECTORY))?);
                Arc::new(ClientMounts::new(
                    &directory,
                    ClientOptions { config: config.clone(), cache, parameters, log_json },
                ))
            }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn two_legacy_plugins_on_one_host_keep_their_state_apart() {
        let options = |arguments: &[&str]| {
            let cli = Cli::try_parse_from([&["cvmfs-graphdriver", "serve"], arguments].concat()).unwrap();
            match cli.command {
                Command::Serve(options) => options,
                Command::Status(_) => panic!("not what was asked for"),
            }
        };
        let legacy = |name| state_directory(&options(&["--socket", name]));
        assert_ne!(legacy("/run/docker/plugins/a.sock"), legacy("/run/docker/plugins/b.sock"));
        assert_eq!(state_directory(&options(&[])), Path::new("/mnt/.cvmfs-graphdriver"));
        let given = options(&["--socket", "/s", "--propagated-mount", "/p"]);
        assert_eq!(state_directory(&given), Path::new("/p/.cvmfs-graphdriver"));
    }
}
