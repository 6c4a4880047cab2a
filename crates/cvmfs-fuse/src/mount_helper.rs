//! `mount.cvmfs`, as mount(8), fstab and autofs call it, and `auto.cvmfs`, the program map of autofs (client
//! behaviour §3).
//!
//! All checks of the configuration come before anything is started, each with exit code 1 and a message that says
//! what to change; a mount that fails afterwards gives exit code 32, which mount(8) knows.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use cvmfs_client::config::{Config, ConfigSources, ProcessSettings, expand_fqrn};
use cvmfs_client::error::ClientError;
use rustix::fs::{FlockOperation, flock};

use crate::control;
use crate::launch::{self, MountError, MountRequest, Mounted};
use crate::logging::redaction::redacted;
use crate::mount_options::MountOptions;
use crate::mount_point;

/// Exit code for what is wrong before the client is started.
const REFUSED: u8 = 1;
/// Exit code for a mount that failed.
const FAILED: u8 = 32;
/// Another mount of the same repository gets this time to finish; it has less itself.
const TURN_PATIENCE: Duration = Duration::from_secs(90);
/// Pause before the lock is tried again.
const TURN_PAUSE: Duration = Duration::from_millis(100);

/// Time for the automounter to mount the configuration repository.
const VISIT_PATIENCE: Duration = Duration::from_secs(40);
/// Pause between looks whether it has.
const VISIT_PAUSE: Duration = Duration::from_millis(5);

const USAGE: &str = "\
Mount helper of CernVM-FS, called by mount(8).
Usage: mount.cvmfs REPOSITORY MOUNTPOINT [-fnv] [-o OPTION[,OPTION…]]
  -f    only check, and show the command that would mount
  -o    mount options; config=FILE[:FILE…] reads these files instead of /etc/cvmfs
  -h    this help";

/// Why nothing is mounted.
#[derive(Debug, thiserror::Error)]
enum HelperError {
    #[error("{0}\n{USAGE}")]
    Usage(String),
    #[error(transparent)]
    Options(#[from] crate::cli::Usage),
    #[error(transparent)]
    Config(#[from] ClientError),
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    Mount(#[from] MountError),
}

impl HelperError {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Mount(_) => FAILED,
            _ => REFUSED,
        }
    }
}

/// Runs this process as `mount.cvmfs`.
pub(crate) fn main(configuration: &Path, timeout: Duration) -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    match run(&arguments, configuration, timeout) {
        Ok(said) => {
            if !said.is_empty() {
                println!("{said}");
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("mount.cvmfs: {}", redacted(&crate::filesystem::chain(&error)));
            ExitCode::from(error.exit_code())
        }
    }
}

/// Runs this process as `auto.cvmfs KEY`: the map entry for a key that can be a repository, else no entry.
pub(crate) fn autofs_map() -> ExitCode {
    let mut keys = std::env::args().skip(1);
    match (keys.next(), keys.next()) {
        (Some(key), None) if is_key(&key) => {
            println!("-fstype=cvmfs :{key}");
            ExitCode::SUCCESS
        }
        _ => ExitCode::from(REFUSED),
    }
}

/// Programs that look for `.Trash` or `cvs` in every directory must not cause mounts.
fn is_key(key: &str) -> bool {
    key.starts_with(|first: char| first.is_ascii_alphanumeric())
        && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        && key.contains('.')
        && !key.ends_with('.')
}

/// What the command line asks for.
#[derive(Debug, Default, PartialEq, Eq)]
struct Arguments {
    device: String,
    mountpoint: PathBuf,
    options: Vec<String>,
    dry_run: bool,
    help: bool,
}

impl Arguments {
    fn parse(given: &[OsString]) -> Result<Self, HelperError> {
        let usage = |what: String| HelperError::Usage(what);
        let mut parsed = Self::default();
        let mut positional = Vec::new();
        let mut rest = given.iter();
        while let Some(argument) = rest.next() {
            let flags = match argument.to_str().and_then(|text| text.strip_prefix('-')) {
                Some(flags) if !flags.is_empty() => flags,
                _ => {
                    positional.push(argument.clone());
                    continue;
                }
            };
            for (index, flag) in flags.char_indices() {
                match flag {
                    // Verbose, no mtab, sloppy, read-only, read-write: nothing to do.
                    'v' | 'n' | 's' | 'r' | 'w' => {}
                    'f' => parsed.dry_run = true,
                    'h' => parsed.help = true,
                    'o' | 't' | 'N' => {
                        let glued = flags.get(index + 1..).unwrap_or_default();
                        let value = match glued {
                            "" => rest.next().and_then(|value| value.to_str()).map(str::to_owned),
                            glued => Some(glued.to_owned()),
                        };
                        let value = value.ok_or_else(|| usage(format!("option -{flag} needs a value")))?;
                        if flag == 'o' {
                            parsed.options.push(value);
                        }
                        break;
                    }
                    _ => return Err(usage(format!("unknown option -{flag}"))),
                }
            }
        }
        if parsed.help {
            return Ok(parsed);
        }
        let [device, mountpoint] = positional.as_slice() else {
            return Err(usage("expected a repository and a mount point".to_owned()));
        };
        let not_a_name =
            || HelperError::Refused("the repository's name has bytes that no name has".to_owned());
        device.to_str().ok_or_else(not_a_name)?.clone_into(&mut parsed.device);
        parsed.mountpoint = PathBuf::from(mountpoint);
        Ok(parsed)
    }

    /// The repository's name as given: some versions of mount(8) make a path of it.
    fn name(&self) -> &str {
        match self.device.strip_prefix('/') {
            Some(path) => path.rsplit('/').next().unwrap_or(path),
            None => &self.device,
        }
    }
}

/// Returns what is to be said on success.
fn run(arguments: &[OsString], configuration: &Path, timeout: Duration) -> Result<String, HelperError> {
    let arguments = Arguments::parse(arguments)?;
    if arguments.help {
        return Ok(USAGE.to_owned());
    }
    let options = MountOptions::parse(&arguments.options)?;
    let sources = options.sources(configuration);
    let domain = Config::default_domain(&sources).map_err(ClientError::from)?;
    let fqrn = expand_fqrn(arguments.name(), domain.as_deref()).map_err(ClientError::from)?;
    visit_configuration_repository(&fqrn, &sources);
    let config = Config::load(&fqrn, &sources).map_err(ClientError::from)?;
    check_fuse()?;
    check_strict_mount(&config, domain.as_deref())?;
    check_settings(&config)?;
    let request = request(&arguments, &options, sources, &config)?;
    if arguments.dry_run {
        let given = arguments.options.join(",");
        let given = if given.is_empty() { given } else { format!(" -o {given}") };
        return Ok(format!("cvmfs-client mount {fqrn} {}{given}", request.mountpoint.display()));
    }
    let _turn = take_turn(&fqrn)?;
    let others = control::records().into_iter().filter(|record| record.fqrn == fqrn);
    let running: Vec<Mounted> =
        others.filter(|record| control::ping(&record.control, Duration::from_secs(2))).collect();
    match running.iter().find(|record| record.mountpoint == request.mountpoint) {
        Some(_) if options.remount => return Ok(String::new()),
        // Alive, and not mounted here: another mount namespace has it.
        Some(record) if !mount_point::is_mountpoint(&request.mountpoint) => {
            launch::attach(record, &request)?;
            return Ok(String::new());
        }
        _ => {}
    }
    if let Some(record) = running.first() {
        return Err(HelperError::Refused(format!(
            "repository {fqrn} is already mounted on {}; `cvmfs-client mount` makes a second mount",
            record.mountpoint.display()
        )));
    }
    if options.remount {
        let place = request.mountpoint.display();
        return Err(HelperError::Refused(format!("repository {fqrn} is not mounted on {place}")));
    }
    for notice in config.notices() {
        eprintln!("mount.cvmfs: {}", redacted(&notice.to_string()));
    }
    launch::mount(&request, timeout)?;
    Ok(String::new())
}

fn request(
    arguments: &Arguments,
    options: &MountOptions,
    sources: ConfigSources,
    config: &Config,
) -> Result<MountRequest, HelperError> {
    let fqrn = config.fqrn().to_owned();
    let mountpoint = mount_point::absolute(&arguments.mountpoint)?;
    Ok(MountRequest {
        log_file: Some(control::log_path(&fqrn, &mountpoint)),
        fqrn,
        mountpoint,
        sources,
        layer_view: options.layer_view,
        allow_other: true,
        suid_and_devices: options.layer_view || options.suid,
        log_level: "info".to_owned(),
        log_json: false,
        confined: false,
        process: ProcessSettings::from(config).map_err(ClientError::from)?,
    })
}

/// Has the automounter mount the configuration repository. It ignores this process, as all of its own process group,
/// so another one looks there; how that ends is seen when the configuration is read.
fn visit_configuration_repository(fqrn: &str, sources: &ConfigSources) {
    let Ok(Some(directory)) = Config::configuration_repository(fqrn, sources) else { return };
    let child = Command::new("/proc/self/exe")
        .arg(crate::VISITOR_ROLE)
        .arg(directory)
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = child else { return };
    let end = Instant::now() + VISIT_PATIENCE;
    while Instant::now() < end && matches!(child.try_wait(), Ok(None)) {
        std::thread::sleep(VISIT_PAUSE);
    }
    // One that waits for a dead mount does not end; it is of no harm.
    let _ = child.kill();
}

/// The role of the process that looks at a directory.
pub(crate) fn visitor(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    match arguments.next().map(std::fs::read_dir) {
        Some(Ok(_)) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn check_fuse() -> Result<(), HelperError> {
    let is_device = std::fs::metadata("/dev/fuse").is_ok_and(|found| found.file_type().is_char_device());
    if is_device {
        return Ok(());
    }
    let advice =
        "FUSE is not available: there is no device /dev/fuse (load the kernel module with `modprobe fuse`)";
    Err(HelperError::Refused(advice.to_owned()))
}

/// With strict mounts, only the listed repositories and the configuration repository may be mounted.
fn check_strict_mount(config: &Config, domain: Option<&str>) -> Result<(), HelperError> {
    if !config.switch("CVMFS_STRICT_MOUNT", false).map_err(ClientError::from)? {
        return Ok(());
    }
    let value = |name| config.get(name).map_or("", |setting| setting.value.as_str());
    let listed = value("CVMFS_REPOSITORIES").split(',').map(str::trim);
    let mut allowed = listed.filter_map(|name| expand_fqrn(name, domain).ok());
    if allowed.any(|name| name == config.fqrn()) || value("CVMFS_CONFIG_REPOSITORY") == config.fqrn() {
        return Ok(());
    }
    let origin =
        config.get("CVMFS_STRICT_MOUNT").map(|setting| setting.origin.to_string()).unwrap_or_default();
    Err(HelperError::Refused(format!(
        "not allowed to mount {}: CVMFS_STRICT_MOUNT is set ({origin}), add it to CVMFS_REPOSITORIES",
        config.fqrn()
    )))
}

/// Whatever the client would refuse is refused here, before anything is started: the proxies and servers above all.
fn check_settings(config: &Config) -> Result<(), HelperError> {
    cvmfs_client::config::ClientSettings::from(config)
        .map(drop)
        .map_err(|error| ClientError::from(error).into())
}

/// One helper after the other for one repository: two that start at the same time must not both mount it. Given back
/// when dropped, also by the kernel if this process dies.
fn take_turn(fqrn: &str) -> Result<File, HelperError> {
    launch::create_run_directory()?;
    let path = launch::run_directory().join(format!("{fqrn}.mountcheck.lock"));
    let refused =
        |error: std::io::Error| HelperError::Refused(format!("cannot lock {}: {error}", path.display()));
    let file = File::options().create(true).append(true).mode(0o600).open(&path).map_err(refused)?;
    let end = Instant::now() + TURN_PATIENCE;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < end => std::thread::sleep(TURN_PAUSE),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(HelperError::Refused(format!("another mount of {fqrn} does not finish")));
            }
            Err(error) => return Err(refused(error.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &str) -> Result<Arguments, HelperError> {
        Arguments::parse(&words.split(' ').map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn the_command_lines_of_mount_fstab_and_autofs_are_understood() {
        let plain = parse("a.example.org /mnt/a").unwrap();
        assert_eq!((plain.name(), plain.mountpoint.as_path()), ("a.example.org", Path::new("/mnt/a")));
        let mount = parse("a.example.org /mnt/a -v -n -o rw,_netdev -oconfig=/x -sf").unwrap();
        assert_eq!((mount.options.join(";"), mount.dry_run), ("rw,_netdev;config=/x".to_owned(), true));
        assert_eq!(parse("/root/a.example.org /mnt/a").unwrap().name(), "a.example.org");
        assert!(parse("-h").unwrap().help);
        for bad in ["a.example.org", "a b c", "a /mnt -x", "a /mnt -o", ""] {
            let error = parse(bad).unwrap_err();
            assert_eq!(error.exit_code(), REFUSED, "{bad}");
            assert!(error.to_string().contains("Usage: mount.cvmfs"), "{error}");
        }
    }

    #[test]
    fn only_full_names_are_keys_of_the_map() {
        for key in ["atlas.cern.ch", "a.b", "my-repo_1.x.org", "9.z"] {
            assert!(is_key(key), "{key}");
        }
        for key in ["", "atlas", ".Trash", "a.", "a b.c", "../x.y", "-a.b", "a;b.c", "ä.b"] {
            assert!(!is_key(key), "{key}");
        }
    }

    #[test]
    fn strict_mounts_allow_the_listed_repositories_only() {
        let check = |fqrn: &str, options: &[(&str, &str)]| {
            let overrides = options.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
            let sources = ConfigSources { files: Some(Vec::new()), overrides, ..ConfigSources::default() };
            check_strict_mount(&Config::load(fqrn, &sources).unwrap(), Some("cern.ch"))
        };
        let strict = [
            ("CVMFS_STRICT_MOUNT", "yes"),
            ("CVMFS_REPOSITORIES", "atlas, b.example.org"),
            ("CVMFS_CONFIG_REPOSITORY", "config.example.org"),
        ];
        for fqrn in ["atlas.cern.ch", "b.example.org", "config.example.org"] {
            check(fqrn, &strict).unwrap();
        }
        let error = check("c.example.org", &strict).unwrap_err();
        assert!(error.to_string().contains("add it to CVMFS_REPOSITORIES"), "{error}");
        check("c.example.org", &[("CVMFS_STRICT_MOUNT", "no")]).unwrap();
        check("c.example.org", &[("CVMFS_STRICT_MOUNT", "yes")]).unwrap_err();
    }
}
