//! `cvmfs-client check`: will a mount work, and if not, what is to be done? Without mounting, and in bounded time.

mod cache;
mod kernel;
mod network;

use std::process::ExitCode;
use std::time::Duration;

use cvmfs_client::clock::{Clock, SystemClock};
use cvmfs_client::config::{
    CacheInstance, ClientSettings, Config, ConfigError, DirectoryInstance, NoticeKind,
};
use cvmfs_client::deadline::Deadline;
use cvmfs_client::error::ClientError;
use cvmfs_client::store::ObjectStore;
use cvmfs_client::trust::{self, Trusted};
use serde::Serialize;

use super::config::{errors_of, sources_of};
use crate::control::{self, ControlSettings, Inspected};
use crate::filesystem::chain;
use crate::logging::redaction::redacted;

/// Time for the chain of trust: three small files and the root catalog.
const TRUST_PATIENCE: Duration = Duration::from_secs(10);
/// A manifest signed so long after now tells that this machine's clock is behind.
const CLOCK_SLACK: i64 = 24 * 3600;

/// How something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Ok,
    Warning,
    Failed,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    subject: &'static str,
    state: State,
    text: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
    /// The exit code that belongs to a failure.
    #[serde(skip)]
    code: u8,
}

/// Everything that was looked at.
#[derive(Debug, Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn ok(&mut self, subject: &'static str, text: impl Into<String>) {
        self.add(subject, State::Ok, text.into(), None, 0);
    }

    fn warn(&mut self, subject: &'static str, text: impl Into<String>, advice: impl Into<String>) {
        self.add(subject, State::Warning, text.into(), Some(advice.into()), 0);
    }

    fn fail(&mut self, subject: &'static str, text: impl Into<String>, advice: Option<String>, code: u8) {
        self.add(subject, State::Failed, text.into(), advice, code);
    }

    fn add(&mut self, subject: &'static str, state: State, text: String, advice: Option<String>, code: u8) {
        let (text, advice) = (redacted(&text), advice.as_deref().map(redacted));
        self.0.push(Finding { subject, state, text, advice, code });
    }

    /// The code of the first failure: what is looked at first is what the rest depends on.
    fn exit_code(&self) -> u8 {
        self.0.iter().find(|finding| finding.state == State::Failed).map_or(0, |finding| finding.code)
    }

    fn count(&self, state: State) -> usize {
        self.0.iter().filter(|finding| finding.state == state).count()
    }
}

/// Checks everything that a mount of `fqrn` needs.
pub(super) fn check(json: bool, fqrn: &str, options: &[String]) -> anyhow::Result<ExitCode> {
    let sources = sources_of(options)?;
    let mut findings = Findings::default();
    let settings = match Config::load(fqrn, &sources) {
        Ok(config) => configuration(&mut findings, &config),
        Err(error @ ConfigError::InvalidName { .. }) => return Err(ClientError::from(error).into()),
        Err(error) => {
            findings.fail("configuration", error.to_string(), None, 1);
            None
        }
    };
    kernel::check(&mut findings);
    let mut trusted = None;
    if let Some(settings) = &settings {
        let cache = cache::check(&mut findings, settings);
        let reached = network::check(&mut findings, settings);
        if reached {
            trusted = check_trust(&mut findings, settings, cache);
        }
        mounted(&mut findings, fqrn);
    }
    if json {
        println!("{}", document(fqrn, &findings, trusted.as_ref()));
    } else {
        print(fqrn, &findings);
    }
    Ok(ExitCode::from(findings.exit_code()))
}

fn configuration(findings: &mut Findings, config: &Config) -> Option<ClientSettings> {
    for notice in config.notices() {
        let advice = match notice.kind {
            NoticeKind::UnknownParameter => "correct or remove the line",
            NoticeKind::NotSupported => "the mount works without it; remove the line if that is right",
            NoticeKind::NotExecuted => "write the value as a plain assignment",
            NoticeKind::Duplicate => "remove one of the lines",
            NoticeKind::ConfigRepository => "mount the configuration repository first",
        };
        findings.warn("configuration", notice.to_string(), advice);
    }
    let complaint = ControlSettings::from(config).ok().and_then(|settings| settings.complaint);
    if let Some(complaint) = complaint {
        findings.warn("telemetry", complaint, "counters are not sent until then");
    }
    let errors = errors_of(config);
    for error in &errors {
        findings.fail("configuration", error.to_string(), None, 1);
    }
    let settings = ClientSettings::from(config).ok()?;
    if errors.is_empty() {
        let count = config.iter().count();
        findings.ok("configuration", format!("{count} parameters, below {}", config.directory().display()));
    }
    Some(settings)
}

/// Verifies what the servers offer now. What was verified earlier does not count here: a mount would work with it,
/// but not follow.
fn check_trust(findings: &mut Findings, settings: &ClientSettings, cache: cache::Place) -> Option<Trusted> {
    let mut within = settings.clone();
    if let cache::Place::Elsewhere(directory) = &cache {
        let instance = DirectoryInstance::private(directory.clone(), settings.cache.primary.limit());
        within.cache.primary = CacheInstance::Directory(instance);
        within.cache_directory = directory.clone();
    }
    let store = match ObjectStore::open(&within) {
        Ok(store) => store,
        Err(error) => {
            findings.fail("trust", chain(&error), None, error.exit_code());
            return None;
        }
    };
    match trust::verify(&store, settings, &SystemClock, Deadline::after(TRUST_PATIENCE)) {
        Ok(trusted) => {
            let manifest = &trusted.manifest;
            findings.ok(
                "trust",
                format!(
                    "revision {}, root catalog {}: every signature is good",
                    manifest.revision, manifest.root_catalog
                ),
            );
            whitelist(findings, trusted.whitelist_expires);
            if i64::try_from(manifest.timestamp).is_ok_and(|signed| signed > SystemClock.unix() + CLOCK_SLACK)
            {
                findings.warn(
                    "clock",
                    "the newest revision was signed in the future, as this machine's clock has it",
                    "set the clock: expiry of whitelists is judged by it",
                );
            }
            Some(trusted)
        }
        Err(error) => {
            let error = ClientError::from(error);
            let advice = match error.exit_code() {
                3 => Some(
                    "compare the public key with the publisher's, and the clock of this machine with the time; if \
                     both are right, ask the publisher"
                        .to_owned(),
                ),
                _ => None,
            };
            findings.fail("trust", chain(&error), advice, error.exit_code());
            None
        }
    }
}

fn whitelist(findings: &mut Findings, expires: i64) {
    let days = (expires - SystemClock.unix()).div_euclid(24 * 3600);
    let until = time::OffsetDateTime::from_unix_timestamp(expires)
        .map_or_else(|_| expires.to_string(), |time| time.date().to_string());
    if days > 7 {
        findings.ok("whitelist", format!("valid until {until}, {days} days"));
    } else {
        findings.warn(
            "whitelist",
            format!("expires at {until}, in {days} days"),
            "ask the publisher to sign a new one: without it new mounts fail and no new revision is accepted",
        );
    }
}

fn mounted(findings: &mut Findings, fqrn: &str) {
    for mount in control::inspect_all(Some(fqrn)) {
        match mount {
            Inspected::Answered(status) if status.errors.is_empty() => findings.ok(
                "mount",
                format!("mounted at {}, revision {}", status.mountpoint.display(), status.revision),
            ),
            Inspected::Answered(status) => findings.warn(
                "mount",
                format!("mounted at {}: {}", status.mountpoint.display(), status.errors.join("; ")),
                format!("cvmfs-client status {fqrn}"),
            ),
            Inspected::Silent { record, reason, .. } => {
                let place = record.mounted.mountpoint.display();
                findings.fail("mount", format!("mounted at {place} and does not answer"), Some(reason), 1);
            }
        }
    }
}

fn print(fqrn: &str, findings: &Findings) {
    for finding in &findings.0 {
        let state = match finding.state {
            State::Ok => "ok",
            State::Warning => "WARNING",
            State::Failed => "FAILED",
        };
        println!("{state:<8} {:<14} {}", finding.subject, finding.text);
        if let Some(advice) = &finding.advice {
            println!("{:<23} -> {advice}", "");
        }
    }
    let (failed, warnings) = (findings.count(State::Failed), findings.count(State::Warning));
    if failed > 0 {
        println!("{fqrn} cannot be mounted as it should: {failed} failed, {warnings} warnings");
    } else {
        println!("{fqrn} can be mounted, {warnings} warnings");
    }
}

fn document(fqrn: &str, findings: &Findings, trusted: Option<&Trusted>) -> serde_json::Value {
    let mut document = serde_json::json!({
        "fqrn": fqrn,
        "ok": findings.exit_code() == 0,
        "findings": findings.0,
    });
    if let Some(trusted) = trusted {
        document["revision"] = trusted.manifest.revision.into();
        document["root_hash"] = trusted.manifest.root_catalog.to_string().into();
        document["whitelist_expires"] = trusted.whitelist_expires.into();
    }
    document
}
