//! Image references, read the way Docker reads them.
//!
//! `[http://|https://|docker://]registry[:port]/name[:tag][@digest]`, short names
//! (`redis` is `docker.io/library/redis:latest`), and the two local forms
//! `docker-archive:FILE[:NAME]` and `oci:DIRECTORY[:NAME]`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::digest::Digest;

/// Longest repository name with its registry, in bytes; the limit of the distribution
/// specification.
const MAX_NAME_BYTES: usize = 255;
/// Longest tag, in bytes; same source.
const MAX_TAG_BYTES: usize = 128;
/// What Docker calls its own registry in references.
const DOCKER_HUB: &str = "docker.io";

/// Where an image comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageSource {
    /// An image in a registry.
    Registry(Reference),
    /// A file written by `docker save`.
    DockerArchive {
        /// The archive.
        file: PathBuf,
        /// Which of several images in it.
        name: Option<String>,
    },
    /// A directory in OCI image layout.
    OciDirectory {
        /// The directory with `index.json`.
        directory: PathBuf,
        /// Which of several images in it (`org.opencontainers.image.ref.name`).
        name: Option<String>,
    },
}

/// An image, or a place for one, in a registry.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    /// What the reference says about the transport.
    pub transport: Transport,
    /// Host name and optional port; `docker.io` for Docker Hub.
    pub registry: String,
    /// Name below the registry, for example `library/redis`.
    pub repository: String,
    /// The tag, if one was given.
    pub tag: Option<String>,
    /// The digest, if one was given; it wins over the tag.
    pub digest: Option<Digest>,
}

/// How to speak to a registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Transport {
    /// Not stated: TLS, but plain HTTP for loopback addresses.
    Auto,
    /// Stated by `http://`.
    Http,
    /// Stated by `https://`.
    Https,
}

/// Why a text is not an image reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("image reference {text:?}: {rule}")]
pub struct ReferenceError {
    /// The text, shortened.
    pub text: String,
    /// The rule that it breaks.
    pub rule: &'static str,
}

impl FromStr for ImageSource {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        if let Some(rest) = text.strip_prefix("docker-archive:") {
            let (path, name) = local(text, rest)?;
            return Ok(Self::DockerArchive { file: path, name });
        }
        if let Some(rest) = text.strip_prefix("oci:") {
            let (path, name) = local(text, rest)?;
            return Ok(Self::OciDirectory { directory: path, name });
        }
        text.parse().map(Self::Registry)
    }
}

impl fmt::Display for ImageSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, path, name) = match self {
            Self::Registry(reference) => return fmt::Display::fmt(reference, f),
            Self::DockerArchive { file, name } => ("docker-archive", file, name),
            Self::OciDirectory { directory, name } => ("oci", directory, name),
        };
        write!(f, "{kind}:{}", path.display())?;
        name.as_ref().map_or(Ok(()), |name| write!(f, ":{name}"))
    }
}

impl Reference {
    /// A repository path with tag or digest on a registry that is named elsewhere, as
    /// `--registry URL` does: `REPOSITORY[:TAG][@DIGEST]`.
    ///
    /// # Errors
    /// The rule that the text breaks.
    pub fn on_registry(text: &str, registry: &str, transport: Transport) -> Result<Self, ReferenceError> {
        let mut reference = Self { transport, registry: registry.to_owned(), ..below_registry(text, text)? };
        reference.complete_hub_name();
        Ok(reference)
    }

    /// What selects the manifest: the digest, else the tag, else `latest`.
    pub fn selector(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => "latest".to_owned(),
        }
    }

    /// The same repository with another selector.
    pub fn at(&self, digest: &Digest) -> Self {
        Self { tag: None, digest: Some(digest.clone()), ..self.clone() }
    }

    /// Whether the registry is on this machine.
    pub fn is_loopback(&self) -> bool {
        is_loopback_host(host_of(&self.registry))
    }

    /// Docker Hub keeps official images below `library/`.
    fn complete_hub_name(&mut self) {
        let hub = matches!(self.registry.as_str(), DOCKER_HUB | "index.docker.io" | "registry-1.docker.io");
        if !hub {
            return;
        }
        DOCKER_HUB.clone_into(&mut self.registry);
        if !self.repository.contains('/') {
            self.repository.insert_str(0, "library/");
        }
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let (transport, rest) = if let Some(rest) = text.strip_prefix("http://") {
            (Transport::Http, rest)
        } else if let Some(rest) = text.strip_prefix("https://") {
            (Transport::Https, rest)
        } else {
            (Transport::Auto, text.strip_prefix("docker://").unwrap_or(text))
        };
        let (registry, rest) = split_registry(rest);
        let stated = transport != Transport::Auto;
        let registry = match registry {
            Some(registry) => registry,
            None if stated => {
                return Err(error(text, "names no registry with a repository behind the scheme"));
            }
            None => DOCKER_HUB,
        };
        check_registry(text, registry)?;
        let mut reference = Self { transport, registry: registry.to_owned(), ..below_registry(text, rest)? };
        reference.complete_hub_name();
        if registry.len() + reference.repository.len() >= MAX_NAME_BYTES {
            return Err(error(text, "the name is longer than 255 bytes"));
        }
        Ok(reference)
    }
}

impl fmt::Display for Reference {
    /// The canonical long form; parsing it gives the same reference.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = match self.transport {
            Transport::Auto => "",
            Transport::Http => "http://",
            Transport::Https => "https://",
        };
        write!(f, "{scheme}{}/{}", self.registry, self.repository)?;
        match (&self.tag, &self.digest) {
            (None, None) => write!(f, ":latest"),
            (Some(tag), None) => write!(f, ":{tag}"),
            (None, Some(digest)) => write!(f, "@{digest}"),
            (Some(tag), Some(digest)) => write!(f, ":{tag}@{digest}"),
        }
    }
}

/// The host of `host[:port]`, IPv6 without its brackets.
pub(crate) fn host_of(registry: &str) -> &str {
    if let Some(rest) = registry.strip_prefix('[') {
        return rest.split(']').next().unwrap_or(rest);
    }
    registry.split(':').next().unwrap_or(registry)
}

/// Whether a host name or address means this machine.
pub(crate) fn is_loopback_host(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>();
    host.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

fn error(text: &str, rule: &'static str) -> ReferenceError {
    ReferenceError { text: text.chars().take(300).collect(), rule }
}

/// `PATH[:NAME]`. A colon inside the path cannot be told from the separator: the first
/// one counts, as for skopeo, because names have colons too.
fn local(text: &str, rest: &str) -> Result<(PathBuf, Option<String>), ReferenceError> {
    let (path, name) = match rest.split_once(':') {
        Some((path, name)) => (path, Some(name)),
        None => (rest, None),
    };
    match path {
        "" => Err(error(text, "names no file")),
        path => Ok((PathBuf::from(path), name.filter(|n| !n.is_empty()).map(str::to_owned))),
    }
}

/// Docker's rule: the part before the first slash is a registry if it has a dot, a
/// colon or an upper case letter in it, or is `localhost`.
fn split_registry(text: &str) -> (Option<&str>, &str) {
    match text.split_once('/') {
        Some((first, rest))
            if first.contains(['.', ':'])
                || first == "localhost"
                || first.chars().any(char::is_uppercase) =>
        {
            (Some(first), rest)
        }
        _ => (None, text),
    }
}

fn check_registry(text: &str, registry: &str) -> Result<(), ReferenceError> {
    let wrong = |rule| Err(error(text, rule));
    let (host, port) = if registry.starts_with('[') {
        match registry.split_once(']') {
            Some((host, port)) => (host.trim_start_matches('['), port),
            None => return wrong("the registry's address lacks its closing bracket"),
        }
    } else {
        registry.find(':').map_or((registry, ""), |colon| registry.split_at(colon))
    };
    let host_is_valid = if registry.starts_with('[') {
        host.parse::<std::net::Ipv6Addr>().is_ok()
    } else {
        host.split('.').all(|label| {
            !label.is_empty()
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        })
    };
    if !host_is_valid {
        return wrong("the registry is not a host name or address");
    }
    let port_is_valid = match port.strip_prefix(':') {
        None => port.is_empty(),
        Some(digits) => {
            digits.bytes().all(|b| b.is_ascii_digit()) && digits.parse::<u16>().is_ok_and(|p| p > 0)
        }
    };
    if port_is_valid { Ok(()) } else { wrong("the registry's port is not a number from 1 to 65535") }
}

/// `REPOSITORY[:TAG][@DIGEST]`; transport and registry are filled in by the caller.
fn below_registry(text: &str, rest: &str) -> Result<Reference, ReferenceError> {
    let (name, digest) = match rest.split_once('@') {
        Some((name, digest)) => {
            let digest =
                digest.parse().map_err(|_| error(text, "what follows '@' is not a sha256 digest"))?;
            (name, Some(digest))
        }
        None => (rest, None),
    };
    let (repository, tag) = match name.split_once(':') {
        Some((repository, tag)) => (repository, Some(tag)),
        None => (name, None),
    };
    if tag.is_some_and(|tag| !is_tag(tag)) {
        return Err(error(text, "the tag must consist of letters, digits, '_', '.' and '-', at most 128"));
    }
    if repository.is_empty() {
        return Err(error(text, "names no repository"));
    }
    if repository.len() > MAX_NAME_BYTES {
        return Err(error(text, "the name is longer than 255 bytes"));
    }
    if !repository.split('/').all(is_path_component) {
        return Err(error(
            text,
            "the repository must consist of lower case letters and digits, separated by '.', '_', '__', '-' or '/'",
        ));
    }
    if repository.len() == 64 && repository.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(error(text, "this is an image id, not a name"));
    }
    Ok(Reference {
        transport: Transport::Auto,
        registry: String::new(),
        repository: repository.to_owned(),
        tag: tag.map(str::to_owned),
        digest,
    })
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    (1..=MAX_TAG_BYTES).contains(&tag.len())
        && tag.bytes().all(|b| word(b) || matches!(b, b'.' | b'-'))
        && !tag.starts_with(['.', '-'])
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_path_component(component: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    let ends_are_words =
        bytes.first().is_some_and(|b| alphanumeric(*b)) && bytes.last().is_some_and(|b| alphanumeric(*b));
    ends_are_words
        && bytes.split(|b| alphanumeric(*b)).all(|separator| {
            matches!(separator, b"" | b"." | b"_" | b"__") || separator.iter().all(|b| *b == b'-')
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn names_mean_what_they_mean_to_docker() {
        for (typed, canonical) in [
            ("redis", "docker.io/library/redis:latest"),
            ("redis:4", "docker.io/library/redis:4"),
            ("docker.io/redis", "docker.io/library/redis:latest"),
            ("index.docker.io/redis", "docker.io/library/redis:latest"),
            ("atlas/analysisbase:21.2.1", "docker.io/atlas/analysisbase:21.2.1"),
            ("localhost/x", "localhost/x:latest"),
            ("localhost:5000/x:1", "localhost:5000/x:1"),
            ("127.0.0.1:5000/a/b/c:V_1.0-x", "127.0.0.1:5000/a/b/c:V_1.0-x"),
            ("[::1]:5000/x", "[::1]:5000/x:latest"),
            ("http://registry.example.org/x", "http://registry.example.org/x:latest"),
            (
                "https://registry.hub.docker.com/library/centos:7",
                "https://registry.hub.docker.com/library/centos:7",
            ),
            ("docker://quay.io/x/y", "quay.io/x/y:latest"),
            ("UPPER/x", "UPPER/x:latest"),
            ("a__b/c-d/e---f.g", "docker.io/a__b/c-d/e---f.g:latest"),
        ] {
            assert_eq!(typed.parse::<Reference>().unwrap().to_string(), canonical, "{typed}");
        }
        let both = format!("redis:4@sha256:{HEX}").parse::<Reference>().unwrap();
        assert_eq!((both.tag.as_deref(), both.selector()), (Some("4"), format!("sha256:{HEX}")));
    }

    #[test]
    fn what_docker_refuses_is_refused_with_the_rule() {
        for (typed, rule) in [
            ("", "names no repository"),
            ("Redis", "lower case"),
            ("a//b", "lower case"),
            ("../b", "host name"),
            ("a..b/c", "host name"),
            ("x/..", "lower case"),
            ("a___b", "lower case"),
            ("-a", "lower case"),
            ("redis:", "the tag"),
            ("redis:-x", "the tag"),
            ("redis@sha256:12", "not a sha256 digest"),
            ("redis@md5:d41d8cd98f00b204e9800998ecf8427e", "not a sha256 digest"),
            ("host:port/x", "port"),
            ("host:0/x", "port"),
            ("host:65536/x", "port"),
            ("[::1/x", "bracket"),
            ("[::zz]/x", "host name"),
            ("http://redis", "names no registry"),
            ("us er.org/x", "host name"),
            ("user:pw@host/x", "port"),
            (HEX, "image id"),
        ] {
            let error = typed.parse::<Reference>().expect_err(typed);
            assert!(error.rule.contains(rule), "{typed}: {error}");
        }
        assert!("a".repeat(300).parse::<Reference>().is_err());
    }

    #[test]
    fn local_images_are_told_from_registries() {
        let parsed = |text: &str| text.parse::<ImageSource>().unwrap();
        assert_eq!(
            parsed("docker-archive:/a/x.tar:localhost:5000/x:1"),
            ImageSource::DockerArchive { file: "/a/x.tar".into(), name: Some("localhost:5000/x:1".into()) }
        );
        assert_eq!(
            parsed("docker-archive:x.tar:redis:4"),
            ImageSource::DockerArchive { file: "x.tar".into(), name: Some("redis:4".into()) }
        );
        assert_eq!(
            parsed("oci:dir:v1"),
            ImageSource::OciDirectory { directory: "dir".into(), name: Some("v1".into()) }
        );
        assert!(matches!(parsed("oci/x"), ImageSource::Registry(_)));
        assert!("oci:".parse::<ImageSource>().is_err());
    }

    #[test]
    fn a_registry_named_elsewhere_completes_the_name() {
        let at =
            |text, registry| Reference::on_registry(text, registry, Transport::Auto).map(|r| r.to_string());
        assert_eq!(at("redis:4", "registry-1.docker.io").unwrap(), "docker.io/library/redis:4");
        assert_eq!(at("redis:4", "localhost:5000").unwrap(), "localhost:5000/redis:4");
        assert_eq!(at("a.b/c:4", "localhost:5000").unwrap(), "localhost:5000/a.b/c:4");
    }

    #[test]
    fn loopback_registries_are_recognised() {
        for (typed, expected) in [
            ("localhost:5000/x", true),
            ("127.3.2.1/x", true),
            ("[::1]:5000/x", true),
            ("localhost.example.org/x", false),
            ("128.0.0.1/x", false),
            ("redis", false),
        ] {
            assert_eq!(typed.parse::<Reference>().unwrap().is_loopback(), expected, "{typed}");
        }
    }

    proptest! {
        #[test]
        fn any_text_gives_a_reference_or_an_error(text in "\\PC{0,80}") {
            let _ = text.parse::<ImageSource>();
        }

        #[test]
        fn the_long_form_is_read_back_as_the_same(
            text in "(https?://)?([a-z]{1,5}(\\.[a-z]{1,4}){0,2}(:[1-9][0-9]{0,3})?/)?[a-z0-9]{1,5}([._/-][a-z0-9]{1,4}){0,3}(:[\\w.-]{1,9})?(@sha256:[0-9a-f]{64})?",
        ) {
            if let Ok(reference) = text.parse::<Reference>() {
                prop_assert_eq!(reference.to_string().parse::<Reference>().unwrap().to_string(), reference.to_string());
            }
        }
    }
}
