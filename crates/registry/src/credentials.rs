//! Credentials of the user, from the files of Docker and podman and their helpers.
//!
//! Read in this order, the first file that knows the registry wins:
//! `$DOCKER_CONFIG/config.json` (else `~/.docker/config.json`), `$REGISTRY_AUTH_FILE`,
//! `$XDG_RUNTIME_DIR/containers/auth.json`, `~/.config/containers/auth.json`. Within a
//! file: `credHelpers`, then `auths` with content, then `credsStore`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::reference::Reference;
use crate::secret::Secret;

/// A configuration file has a few entries; a larger one is no configuration file.
const MAX_FILE_BYTES: u64 = 4 << 20;
/// A helper answers with one small JSON object.
const MAX_HELPER_BYTES: u64 = 64 << 10;
/// Helpers ask a local key ring; one that waits for a person is of no use here.
const HELPER_DEADLINE: Duration = Duration::from_secs(15);
/// Under this key Docker keeps the login of Docker Hub.
const HUB_KEY: &str = "https://index.docker.io/v1/";

/// What proves the user's identity to a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credential {
    /// A user name and a password.
    Password {
        /// The user.
        user: String,
        /// The password.
        password: Secret,
    },
    /// An identity token, exchanged for access tokens.
    IdentityToken(Secret),
}

/// A credential file or helper that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// The file exists but cannot be read.
    #[error("credentials in {}", file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// Why.
        #[source]
        cause: std::io::Error,
    },
    /// The file is not what Docker or podman write. The parser's message is left out:
    /// it may quote a password.
    #[error("credentials in {}: not a valid configuration file (line {line})", file.display())]
    Malformed {
        /// The file.
        file: PathBuf,
        /// The line at which the parser stopped.
        line: usize,
    },
    /// An `auth` value that is not base64 of `user:password`.
    #[error("credentials in {}: auth of {registry} is not base64 of user:password", file.display())]
    BadAuth {
        /// The file.
        file: PathBuf,
        /// The key below `auths`.
        registry: String,
    },
    /// A credential helper that failed.
    #[error("credential helper docker-credential-{name} for {registry}: {reason}")]
    Helper {
        /// The helper, without its prefix.
        name: String,
        /// The registry that it was asked about.
        registry: String,
        /// What went wrong.
        reason: String,
    },
}

/// Where credentials are looked up.
#[derive(Debug, Clone, Default)]
pub struct Credentials {
    files: Vec<PathBuf>,
    fixed: Vec<(Named, Credential)>,
}

/// The registries that a credential is for.
#[derive(Debug, Clone)]
enum Named {
    /// One, by `host[:port]`.
    Whole(String),
    /// All whose name has this part.
    Part(String),
}

impl Credentials {
    /// No credentials: every request is anonymous.
    pub fn none() -> Self {
        Self::default()
    }

    /// The files that Docker and podman use, by the environment.
    pub fn from_environment() -> Self {
        let directory = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let home = directory("HOME");
        let docker = directory("DOCKER_CONFIG").or_else(|| home.as_ref().map(|home| home.join(".docker")));
        let files = [
            docker.map(|directory| directory.join("config.json")),
            directory("REGISTRY_AUTH_FILE"),
            directory("XDG_RUNTIME_DIR").map(|directory| directory.join("containers/auth.json")),
            home.map(|home| home.join(".config/containers/auth.json")),
        ];
        Self { files: files.into_iter().flatten().collect(), fixed: Vec::new() }
    }

    /// These files only.
    pub fn from_files(files: Vec<PathBuf>) -> Self {
        Self { files, fixed: Vec::new() }
    }

    /// Adds a credential for a registry (`host[:port]`); it wins over the files.
    #[must_use]
    pub fn with(mut self, registry: impl Into<String>, credential: Credential) -> Self {
        self.fixed.push((Named::Whole(registry.into()), credential));
        self
    }

    /// Adds a credential for all registries whose `host[:port]` has a part; it wins over
    /// the files.
    #[must_use]
    pub fn with_part(mut self, part: impl Into<String>, credential: Credential) -> Self {
        self.fixed.push((Named::Part(part.into()), credential));
        self
    }

    /// The credential for the registry of `reference`, if the user has one.
    pub(crate) async fn find(&self, reference: &Reference) -> Result<Option<Credential>, CredentialsError> {
        let is_for = |(named, _): &&(Named, Credential)| match named {
            Named::Whole(registry) => *registry == reference.registry,
            Named::Part(part) => reference.registry.contains(part.as_str()),
        };
        if let Some((_, credential)) = self.fixed.iter().find(is_for) {
            return Ok(Some(credential.clone()));
        }
        for file in &self.files {
            let Some(configuration) = read(file)? else { continue };
            if let Some(credential) = configuration.find(file, reference).await? {
                return Ok(Some(credential));
            }
        }
        Ok(None)
    }
}

/// `config.json` of Docker and `auth.json` of podman; other keys are none of our business.
#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct Configuration {
    auths: BTreeMap<String, Option<Login>>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Login {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
}

fn read(file: &Path) -> Result<Option<Configuration>, CredentialsError> {
    use std::io::Read as _;
    let unreadable = |cause| CredentialsError::Unreadable { file: file.to_owned(), cause };
    let mut text = Vec::new();
    match std::fs::File::open(file) {
        Ok(open) => open.take(MAX_FILE_BYTES).read_to_end(&mut text).map_err(unreadable)?,
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(cause) => return Err(unreadable(cause)),
    };
    match serde_json::from_slice(&text) {
        Ok(configuration) => Ok(Some(configuration)),
        Err(error) => Err(CredentialsError::Malformed { file: file.to_owned(), line: error.line() }),
    }
}

impl Configuration {
    async fn find(&self, file: &Path, reference: &Reference) -> Result<Option<Credential>, CredentialsError> {
        let keys = keys(reference);
        for key in &keys {
            let named = self.cred_helpers.iter().find(|(found, _)| normalised(found) == normalised(key));
            if let Some((registry, helper)) = named {
                return ask_helper(helper, registry).await;
            }
        }
        for key in &keys {
            let matching = self.auths.iter().find(|(found, _)| normalised(found) == normalised(key));
            if let Some((registry, Some(login))) = matching
                && let Some(credential) = login.credential(file, registry)?
            {
                return Ok(Some(credential));
            }
        }
        match &self.creds_store {
            Some(store) if !store.is_empty() => ask_helper(store, &store_key(reference)).await,
            _ => Ok(None),
        }
    }
}

impl Login {
    fn credential(&self, file: &Path, registry: &str) -> Result<Option<Credential>, CredentialsError> {
        let filled = |value: &Option<String>| value.clone().filter(|text| !text.is_empty());
        if let Some(token) = filled(&self.identitytoken) {
            return Ok(Some(Credential::IdentityToken(Secret::new(token))));
        }
        if let Some(auth) = filled(&self.auth) {
            let bad = || CredentialsError::BadAuth { file: file.to_owned(), registry: registry.to_owned() };
            let decoded = base64::engine::general_purpose::STANDARD.decode(auth.trim()).map_err(|_| bad())?;
            let text = String::from_utf8(decoded).map_err(|_| bad())?;
            // Old Docker versions pad with NUL bytes.
            let (user, password) = text.trim_end_matches('\0').split_once(':').ok_or_else(bad)?;
            return Ok(Some(credential(user, password)));
        }
        Ok(filled(&self.username)
            .zip(self.password.as_deref())
            .map(|(user, password)| credential(&user, password)))
    }
}

/// The user name `<token>` marks an identity token in key rings.
fn credential(user: &str, password: &str) -> Credential {
    if user == "<token>" {
        Credential::IdentityToken(Secret::new(password))
    } else {
        Credential::Password { user: user.to_owned(), password: Secret::new(password) }
    }
}

/// The keys under which the login of a registry may stand, the most specific first:
/// podman allows one per name space.
fn keys(reference: &Reference) -> Vec<String> {
    let mut keys = Vec::new();
    let mut name = format!("{}/{}", reference.registry, reference.repository);
    while let Some(slash) = name.rfind('/') {
        keys.push(name.clone());
        name.truncate(slash);
    }
    keys.push(name);
    if is_hub(reference) {
        keys.extend(["index.docker.io", "registry-1.docker.io"].map(str::to_owned));
    }
    keys
}

fn is_hub(reference: &Reference) -> bool {
    reference.registry == "docker.io"
}

fn store_key(reference: &Reference) -> String {
    if is_hub(reference) { HUB_KEY.to_owned() } else { reference.registry.clone() }
}

/// Docker writes some keys as URLs of API version 1 and reads them by their host.
fn normalised(key: &str) -> &str {
    match key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")) {
        Some(url) => url.split('/').next().unwrap_or(url),
        None => key.trim_end_matches('/'),
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    username: String,
    secret: String,
}

async fn ask_helper(name: &str, registry: &str) -> Result<Option<Credential>, CredentialsError> {
    let failed = |reason: String| CredentialsError::Helper {
        name: name.chars().take(100).collect(),
        registry: registry.to_owned(),
        reason,
    };
    // The name becomes part of a program's name: no path may be smuggled in.
    if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) {
        return Err(failed("not a name of a helper".to_owned()));
    }
    let exchange = run_helper(name, registry);
    let (answered, output) = match tokio::time::timeout(HELPER_DEADLINE, exchange).await {
        Ok(Ok(result)) => result,
        Ok(Err(cause)) => return Err(failed(cause.to_string())),
        Err(_) => return Err(failed(format!("no answer within {} s", HELPER_DEADLINE.as_secs()))),
    };
    if !answered {
        let message = String::from_utf8_lossy(&output);
        // The protocol has no code for "not there", only this text.
        if message.contains("credentials not found") {
            return Ok(None);
        }
        return Err(failed(message.trim().chars().take(200).collect()));
    }
    let answer: HelperAnswer = serde_json::from_slice(&output)
        .map_err(|_| failed("answered something else than JSON".to_owned()))?;
    Ok(Some(credential(&answer.username, &answer.secret)))
}

async fn run_helper(name: &str, registry: &str) -> std::io::Result<(bool, Vec<u8>)> {
    let mut child = tokio::process::Command::new(format!("docker-credential-{name}"))
        .arg("get")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut input) = child.stdin.take() {
        // A helper that does not read its input has decided already.
        let _ = input.write_all(registry.as_bytes()).await;
    }
    let mut output = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(MAX_HELPER_BYTES).read_to_end(&mut output).await?;
    }
    Ok((child.wait().await?.success(), output))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(json: &str, reference: &str) -> Result<Option<Credential>, CredentialsError> {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("config.json");
        std::fs::write(&file, json).unwrap();
        let credentials = Credentials::from_files(vec![directory.path().join("absent"), file]);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(credentials.find(&reference.parse().unwrap()))
    }

    fn password(user: &str, password: &str) -> Option<Credential> {
        Some(Credential::Password { user: user.into(), password: Secret::new(password) })
    }

    #[test]
    fn logins_of_docker_are_found_by_host() {
        // base64 of "me:pass:word" and "hub:pw"
        let json = r#"{"auths": {"reg.example.org:5000": {"auth": "bWU6cGFzczp3b3Jk"},
                       "https://index.docker.io/v1/": {"auth": "aHViOnB3"}}, "other": 1}"#;
        assert_eq!(find(json, "reg.example.org:5000/a/b").unwrap(), password("me", "pass:word"));
        assert_eq!(find(json, "redis").unwrap(), password("hub", "pw"));
        assert_eq!(find(json, "reg.example.org/a/b").unwrap(), None);
    }

    #[test]
    fn podmans_most_specific_name_space_wins() {
        let json =
            r#"{"auths": {"quay.io": {"auth": "aHViOnB3"}, "quay.io/team": {"auth": "bWU6cGFzczp3b3Jk"}}}"#;
        assert_eq!(find(json, "quay.io/team/x").unwrap(), password("me", "pass:word"));
        assert_eq!(find(json, "quay.io/teams/x").unwrap(), password("hub", "pw"));
    }

    #[test]
    fn identity_tokens_are_told_from_passwords() {
        let json = r#"{"auths": {"a.b": {"auth": "aHViOnB3", "identitytoken": "T"}}}"#;
        assert_eq!(find(json, "a.b/x").unwrap(), Some(Credential::IdentityToken(Secret::new("T"))));
        assert_eq!(credential("<token>", "T"), Credential::IdentityToken(Secret::new("T")));
    }

    #[test]
    fn a_broken_file_is_named_without_quoting_it() {
        let message = find(r#"{"auths": {"a.b": {"auth": hunter2}}}"#, "a.b/x").unwrap_err().to_string();
        assert!(message.contains("config.json") && !message.contains("hunter2"), "{message}");
        let message = find(r#"{"auths": {"a.b": {"auth": "!!"}}}"#, "a.b/x").unwrap_err().to_string();
        assert!(message.contains("auth of a.b"), "{message}");
    }

    #[test]
    fn a_missing_or_smuggled_helper_is_an_error() {
        let message = find(r#"{"credsStore": "no-such-helper"}"#, "a.b/x").unwrap_err().to_string();
        assert!(
            message.starts_with("credential helper docker-credential-no-such-helper for a.b"),
            "{message}"
        );
        assert!(find(r#"{"credHelpers": {"a.b": "../../tmp/x"}}"#, "a.b/x").is_err());
        assert_eq!(find(r#"{"credHelpers": {"c.d": "../../tmp/x"}}"#, "a.b/x").unwrap(), None);
    }
}
