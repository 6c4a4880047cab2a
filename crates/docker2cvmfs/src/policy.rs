//! Which images may be published: a policy file in the form of containers-policy.json(5).
//!
//! ```json
//! {
//!   "default": [{"type": "reject"}],
//!   "transports": {"docker": {
//!     "registry.example.org/team": [{"type": "sigstoreSigned", "keyPath": "/etc/cvmfs/team.pub",
//!                                    "signedIdentity": {"type": "matchRepository"}}],
//!     "registry.example.org/base:1": [{"type": "digest", "digests": ["sha256:…"]}],
//!     "docker.io/library": [{"type": "insecureAcceptAnything"}]
//!   }}
//! }
//! ```
//!
//! The most specific scope counts: the whole reference, its repository, the directories
//! above it, the registry, `*.domain`, the transport's `""`, and at last `default`. All
//! requirements of a scope must be met. `digest` is ours; kinds that cannot be verified
//! here are an error when the file is read, never a requirement that is passed over.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use registry::{Digest, ImageSource, PublicKey, Reference, Statement};
use serde::Deserialize;

use crate::bounded::read_text;
use crate::convert::Resolved;
use crate::failure::ConvertError;

/// Largest accepted policy file in bytes.
const MAX_POLICY_BYTES: u64 = 4 << 20;
/// Largest accepted key file in bytes.
const MAX_KEY_BYTES: u64 = 64 << 10;

/// What has to be true of an image before it is published.
#[derive(Debug, Clone)]
pub struct Policy {
    default: Vec<Requirement>,
    /// By transport, then by scope.
    transports: BTreeMap<String, BTreeMap<String, Vec<Requirement>>>,
}

/// A policy file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("policy {}: {reason}", file.display())]
pub struct PolicyError {
    /// The file.
    pub file: PathBuf,
    /// What is wrong, and where.
    pub reason: String,
}

#[derive(Debug, Clone)]
enum Requirement {
    Accept,
    Reject,
    Signed { keys: Vec<PublicKey>, identity: SignedIdentity },
    Digest(Vec<Digest>),
}

/// What the statement has to be about, beside the digest.
#[derive(Debug, Clone)]
enum SignedIdentity {
    /// The very reference; for an image by digest its repository.
    RepositoryDigestOrExact,
    /// The very reference, tag included.
    Exact,
    /// The repository, with any tag or none.
    Repository,
    /// This reference, whatever the image is called.
    ExactReference(Reference),
    /// This repository.
    ExactRepository(Reference),
}

impl Policy {
    /// Reads a policy and the keys that it names.
    ///
    /// # Errors
    /// A file that cannot be read or used, or a requirement that is not known.
    pub fn read(file: &Path) -> Result<Self, PolicyError> {
        let failed = |reason: String| PolicyError { file: file.to_owned(), reason };
        let text = read_text(file, MAX_POLICY_BYTES).map_err(failed)?;
        Self::parse(&text).map_err(failed)
    }

    /// Parses a policy; keys are read from the files that it names.
    ///
    /// # Errors
    /// What is wrong, and where.
    pub fn parse(text: &str) -> Result<Self, String> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Document {
            default: Vec<RawRequirement>,
            #[serde(default)]
            transports: BTreeMap<String, BTreeMap<String, Vec<RawRequirement>>>,
        }
        let document: Document = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let mut transports = BTreeMap::new();
        for (transport, scopes) in document.transports {
            let mut read = BTreeMap::new();
            for (scope, requirements) in scopes {
                let place = format!("transports, {transport}, {scope:?}");
                read.insert(scope, requirements_of(requirements, &place)?);
            }
            transports.insert(transport, read);
        }
        Ok(Self { default: requirements_of(document.default, "default")?, transports })
    }

    /// Refuses an image that does not meet its requirements.
    ///
    /// # Errors
    /// [`ConvertError::Refused`] with the reason, or a registry that does not tell.
    pub(crate) fn check(&self, resolved: &Resolved) -> Result<(), ConvertError> {
        let name = resolved.source.name();
        let (scope, requirements) = self.requirements(name);
        for requirement in requirements {
            let met = match requirement {
                Requirement::Accept => Ok(()),
                Requirement::Reject => Err("images of this scope are rejected".to_owned()),
                Requirement::Digest(digests) => has_digest(resolved, digests),
                Requirement::Signed { keys, identity } => is_signed(resolved, keys, identity)?,
            };
            if let Err(reason) = met {
                let (image, scope) = (name.to_string(), scope.to_owned());
                return Err(ConvertError::Refused { image, scope, reason });
            }
        }
        Ok(())
    }

    /// The requirements for an image, and the scope that they come from.
    fn requirements(&self, name: &ImageSource) -> (&str, &[Requirement]) {
        let (transport, scopes) = match name {
            ImageSource::Registry(reference) => ("docker", registry_scopes(reference)),
            ImageSource::DockerArchive { file, .. } => ("docker-archive", path_scopes(file)),
            ImageSource::OciDirectory { directory, .. } => ("oci", path_scopes(directory)),
        };
        let by_scope = self.transports.get(transport);
        let found = scopes.iter().find_map(|scope| by_scope?.get_key_value(scope.as_str()));
        match found.or_else(|| by_scope?.get_key_value("")) {
            Some((scope, requirements)) if scope.is_empty() => (transport, requirements),
            Some((scope, requirements)) => (scope, requirements),
            None => ("default", &self.default),
        }
    }
}

/// Scopes from the most to the least specific.
fn registry_scopes(reference: &Reference) -> Vec<String> {
    let repository = format!("{}/{}", host(reference), reference.repository);
    let mut scopes = Vec::new();
    scopes.extend(reference.digest.as_ref().map(|digest| format!("{repository}@{digest}")));
    // With a digest the tag says nothing, but a scope that names it was written for this image.
    if reference.tag.is_some() || reference.digest.is_none() {
        scopes.push(format!("{repository}:{}", reference.tag.as_deref().unwrap_or("latest")));
    }
    let mut rest = repository.as_str();
    scopes.push(rest.to_owned());
    while let Some((above, _)) = rest.rsplit_once('/') {
        scopes.push(above.to_owned());
        rest = above;
    }
    let host = rest.split(':').next().unwrap_or(rest);
    let mut domain = host;
    while let Some((_, above)) = domain.split_once('.') {
        scopes.push(format!("*.{above}"));
        domain = above;
    }
    scopes
}

/// A registry's name as policies write it: host names know no case, and 443 is where it is.
fn host(reference: &Reference) -> String {
    let host = reference.registry.to_ascii_lowercase();
    host.strip_suffix(":443").map_or_else(|| host.clone(), str::to_owned)
}

fn path_scopes(path: &Path) -> Vec<String> {
    // Where it really is: a link, or `..`, must not carry it into another scope. What is not there fails later.
    let path = std::fs::canonicalize(path).unwrap_or_else(|_| PathBuf::from("/"));
    path.ancestors().map(|path| path.display().to_string()).collect()
}

fn has_digest(resolved: &Resolved, digests: &[Digest]) -> Result<(), String> {
    if digests.contains(&resolved.top_digest) || digests.contains(&resolved.digest) {
        return Ok(());
    }
    Err(format!("its digest {} is not among those that are allowed", resolved.top_digest))
}

/// Whether what the name leads to is signed, or else each of the images taken from it.
fn is_signed(
    resolved: &Resolved,
    keys: &[PublicKey],
    identity: &SignedIdentity,
) -> Result<Result<(), String>, ConvertError> {
    let ImageSource::Registry(reference) = resolved.source.name() else {
        return Ok(Err("signatures are kept in registries, and this is a local file".to_owned()));
    };
    let of_whole = signature_of(resolved, &resolved.top_digest, keys, identity, reference)?;
    if of_whole.is_ok() || resolved.images.iter().any(|image| image.image.digest == resolved.top_digest) {
        return Ok(of_whole);
    }
    for image in &resolved.images {
        let of_image = signature_of(resolved, &image.image.digest, keys, identity, reference)?;
        if of_image.is_err() {
            return Ok(of_image);
        }
    }
    Ok(Ok(()))
}

fn signature_of(
    resolved: &Resolved,
    digest: &Digest,
    keys: &[PublicKey],
    identity: &SignedIdentity,
    image: &Reference,
) -> Result<Result<(), String>, ConvertError> {
    let signed = resolved.source.signatures(digest)?;
    let mut reason = match signed.len() {
        0 => format!(
            "{digest} has no signature (looked for the tag {}-{}.sig)",
            digest.algorithm(),
            digest.hex()
        ),
        count => format!("none of the {count} signatures of {digest} is by a key that is required"),
    };
    for statement in signed.iter().flat_map(|signed| keys.iter().filter_map(|key| key.verify(signed))) {
        if statement.digest != *digest {
            reason = format!("the signature kept for {digest} is one of {}", statement.digest);
        } else {
            match identity.accepts(&statement, image) {
                Ok(()) => return Ok(Ok(())),
                Err(other) => reason = other,
            }
        }
    }
    Ok(Err(reason))
}

impl SignedIdentity {
    fn accepts(&self, statement: &Statement, image: &Reference) -> Result<(), String> {
        let signed = statement
            .identity
            .parse::<Reference>()
            .map_err(|_| format!("the signature is for {:?}, which is no name", statement.identity))?;
        let same_repository =
            |other: &Reference| host(&signed) == host(other) && signed.repository == other.repository;
        // A signature for a name without a tag is one for the repository, and not for `latest`.
        let exact = |other: &Reference| {
            same_repository(other) && signed.tag.as_deref() == Some(other.tag.as_deref().unwrap_or("latest"))
        };
        let is_accepted = match self {
            Self::RepositoryDigestOrExact if image.digest.is_some() => same_repository(image),
            Self::RepositoryDigestOrExact | Self::Exact => exact(image),
            Self::Repository => same_repository(image),
            Self::ExactReference(wanted) => exact(wanted),
            Self::ExactRepository(wanted) => same_repository(wanted),
        };
        if is_accepted {
            return Ok(());
        }
        let hint = match self {
            Self::RepositoryDigestOrExact | Self::Exact if same_repository(image) => {
                "; cosign signs names without tags: \"signedIdentity\": {\"type\": \"matchRepository\"} accepts that"
            }
            _ => "",
        };
        Err(format!("the signature is for {}, not for what signedIdentity wants{hint}", statement.identity))
    }
}

#[derive(Deserialize)]
struct RawRequirement {
    #[serde(rename = "type")]
    kind: String,
    #[serde(flatten)]
    rest: BTreeMap<String, serde_json::Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawSigned {
    key_path: Option<PathBuf>,
    key_paths: Option<Vec<PathBuf>>,
    key_data: Option<String>,
    key_datas: Option<Vec<String>>,
    signed_identity: Option<RawIdentity>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawIdentity {
    #[serde(rename = "type")]
    kind: String,
    docker_reference: Option<String>,
    docker_repository: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDigests {
    digests: Vec<String>,
}

fn requirements_of(raw: Vec<RawRequirement>, place: &str) -> Result<Vec<Requirement>, String> {
    if raw.is_empty() {
        return Err(format!("{place}: an empty list accepts nothing and rejects nothing"));
    }
    raw.into_iter().map(|raw| requirement(raw).map_err(|reason| format!("{place}: {reason}"))).collect()
}

fn requirement(raw: RawRequirement) -> Result<Requirement, String> {
    let rest = serde_json::Value::Object(raw.rest.into_iter().collect());
    let nothing_more = |kind: &str, requirement: Requirement| match rest.as_object() {
        Some(rest) if !rest.is_empty() => Err(format!("{kind} has no keys but \"type\"")),
        _ => Ok(requirement),
    };
    let told = |error: serde_json::Error| format!("{}: {error}", raw.kind);
    match raw.kind.as_str() {
        "insecureAcceptAnything" => nothing_more(&raw.kind, Requirement::Accept),
        "reject" => nothing_more(&raw.kind, Requirement::Reject),
        "digest" => {
            let raw: RawDigests = serde_json::from_value(rest).map_err(told)?;
            let digests = raw.digests.iter().map(|text| text.parse::<Digest>().map_err(|error| error.to_string()));
            Ok(Requirement::Digest(digests.collect::<Result<_, _>>()?))
        }
        "sigstoreSigned" => signed(serde_json::from_value(rest).map_err(|error| {
            format!("{}; keys in files (keyPath, keyPaths, keyData, keyDatas) are supported, keyless signatures are not", told(error))
        })?),
        other => Err(format!(
            "requirement {other:?} is not supported; there are insecureAcceptAnything, reject, sigstoreSigned and digest"
        )),
    }
}

fn signed(raw: RawSigned) -> Result<Requirement, String> {
    let mut texts = Vec::new();
    for path in raw.key_path.iter().chain(raw.key_paths.iter().flatten()) {
        let text =
            read_text(path, MAX_KEY_BYTES).map_err(|reason| format!("key {}: {reason}", path.display()))?;
        texts.push((format!("key {}", path.display()), text));
    }
    for data in raw.key_data.iter().chain(raw.key_datas.iter().flatten()) {
        let text = base64::engine::general_purpose::STANDARD.decode(data.trim());
        let text = text.ok().and_then(|bytes| String::from_utf8(bytes).ok());
        texts.push(("keyData".to_owned(), text.ok_or("keyData is not base64 of a key in PEM form")?));
    }
    let key = |(name, text): &(String, String)| {
        PublicKey::from_pem(text).map_err(|error| format!("{name} {error}"))
    };
    let keys = texts.iter().map(key).collect::<Result<Vec<_>, _>>()?;
    if keys.is_empty() {
        return Err("sigstoreSigned names no key (keyPath, keyPaths, keyData, keyDatas)".to_owned());
    }
    let identity = raw.signed_identity.map_or(Ok(SignedIdentity::RepositoryDigestOrExact), identity)?;
    Ok(Requirement::Signed { keys, identity })
}

fn identity(raw: RawIdentity) -> Result<SignedIdentity, String> {
    let name = |name: Option<String>, key: &str| {
        let name = name.ok_or_else(|| format!("signedIdentity lacks {key}"))?;
        name.parse::<Reference>().map_err(|error| format!("signedIdentity: {error}"))
    };
    match raw.kind.as_str() {
        "matchRepoDigestOrExact" => Ok(SignedIdentity::RepositoryDigestOrExact),
        "matchExact" => Ok(SignedIdentity::Exact),
        "matchRepository" => Ok(SignedIdentity::Repository),
        "exactReference" => {
            let wanted = name(raw.docker_reference, "dockerReference")?;
            if wanted.tag.is_none() {
                return Err("signedIdentity: dockerReference lacks a tag; see exactRepository".to_owned());
            }
            Ok(SignedIdentity::ExactReference(wanted))
        }
        "exactRepository" => {
            Ok(SignedIdentity::ExactRepository(name(raw.docker_repository, "dockerRepository")?))
        }
        other => Err(format!("signedIdentity {other:?} is not supported")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope_of<'a>(policy: &'a Policy, image: &str) -> &'a str {
        policy.requirements(&image.parse().unwrap()).0
    }

    #[test]
    fn the_most_specific_scope_counts() {
        let accept = r#"[{"type":"insecureAcceptAnything"}]"#;
        let scopes =
            ["r.org/a/b:1", "r.org/a/b", "r.org/a", "r.org", "*.org", "localhost:5000", "*.example.org"];
        let scopes: Vec<String> = scopes.iter().map(|scope| format!(r#""{scope}":{accept}"#)).collect();
        let text = format!(
            r#"{{"default":[{{"type":"reject"}}],"transports":{{"docker":{{{}}}}}}}"#,
            scopes.join(",")
        );
        let policy = Policy::parse(&text).unwrap();
        let by_digest = format!("r.org/a/b:1@{}", Digest::sha256_of(b"x"));
        for (image, scope) in [
            ("r.org/a/b:1", "r.org/a/b:1"),
            ("http://r.org/a/b:1", "r.org/a/b:1"),
            ("r.org/a/b:2", "r.org/a/b"),
            ("r.org/a/c:1", "r.org/a"),
            ("r.org/c:1", "r.org"),
            ("x.r.org/c:1", "*.org"),
            ("x.example.org/c:1", "*.example.org"),
            ("localhost:5000/c:1", "localhost:5000"),
            ("localhost:5001/c:1", "default"),
            ("redis", "default"),
            ("R.org:443/a/b:1", "r.org/a/b:1"),
            (&by_digest, "r.org/a/b:1"),
            ("oci:/srv/x", "default"),
        ] {
            assert_eq!(scope_of(&policy, image), scope, "{image}");
        }
    }

    #[test]
    fn what_cannot_be_verified_is_no_policy() {
        let message =
            |requirement: &str| Policy::parse(&format!(r#"{{"default":[{requirement}]}}"#)).unwrap_err();
        assert!(message(r#"{"type":"signedBy","keyType":"GPGKeys"}"#).contains("not supported"));
        assert!(message(r#"{"type":"sigstoreSigned"}"#).contains("no key"));
        assert!(message(r#"{"type":"sigstoreSigned","fulcio":{}}"#).contains("keyless"));
        assert!(message(r#"{"type":"sigstoreSigned","keyPath":"/no/such.pub"}"#).contains("/no/such.pub"));
        assert!(message(r#"{"type":"sigstoreSigned","keyData":"AAAA"}"#).contains("keyData"));
        assert!(message(r#"{"type":"reject","because":"x"}"#).contains("no keys"));
        assert!(message(r#"{"type":"digest","digests":["sha256:1"]}"#).contains("not a digest"));
        assert!(Policy::parse(r#"{"default":[]}"#).unwrap_err().contains("empty list"));
        assert!(Policy::parse(r#"{"transports":{}}"#).unwrap_err().contains("default"));
        assert!(Policy::parse(r#"{"default":[{"type":"reject"}],"transport":{}}"#).is_err());
    }

    #[test]
    fn a_signature_is_for_a_name() {
        let digest = Digest::sha256_of(b"x");
        let statement = |identity: &str| Statement { digest: digest.clone(), identity: identity.to_owned() };
        let image = |text: &str| text.parse::<Reference>().unwrap();
        let by_digest = image(&format!("r.org/a@{digest}"));
        let accepts = |identity: &SignedIdentity, signed: &str, image: &Reference| {
            identity.accepts(&statement(signed), image).is_ok()
        };
        let default = SignedIdentity::RepositoryDigestOrExact;
        assert!(accepts(&default, "r.org/a:1", &image("r.org/a:1")));
        assert!(!accepts(&default, "r.org/a", &image("r.org/a:1")));
        assert!(!accepts(&default, "r.org/a", &image("r.org/a")), "no tag is not any tag");
        assert!(accepts(&default, "r.org/a:latest", &image("r.org/a")));
        assert!(!accepts(&default, "r.org/a:2", &image("r.org/a:1")));
        assert!(accepts(&default, "r.org/a", &by_digest));
        assert!(!accepts(&default, "r.org/b", &by_digest));
        assert!(accepts(&SignedIdentity::Repository, "r.org/a", &image("r.org/a:1")));
        assert!(!accepts(&SignedIdentity::Repository, "r.org/b", &image("r.org/a:1")));
        let renamed = SignedIdentity::ExactRepository(image("origin.org/a"));
        assert!(accepts(&renamed, "origin.org/a:7", &image("mirror.org/a:7")));
        assert!(!accepts(&renamed, "mirror.org/a:7", &image("mirror.org/a:7")));
        assert!(!accepts(&SignedIdentity::Repository, "NOT A NAME", &image("r.org/a:1")));
    }
}
