//! The HTTP address of a registry.

use reqwest::Url;

use crate::error::RegistryError;
use crate::http::authority;
use crate::reference::{Reference, Transport};

/// A registry's API, version 2: a URL that ends in `/v2/`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    base: Url,
}

impl Endpoint {
    /// Where the registry of a reference is. Docker Hub's host has another name than the
    /// registry in references. Without a stated transport loopback is plain HTTP.
    ///
    /// # Errors
    /// If the registry's name gives no URL.
    pub fn of(reference: &Reference) -> Result<Self, RegistryError> {
        let host =
            if reference.registry == "docker.io" { "registry-1.docker.io" } else { &reference.registry };
        let scheme = match reference.transport {
            Transport::Http => "http",
            Transport::Auto if reference.is_loopback() => "http",
            Transport::Auto | Transport::Https => "https",
        };
        Self::parse(&format!("{scheme}://{host}/v2"))
    }

    /// A registry given by its URL; `/v2` belongs to it, as in `https://host/v2`.
    ///
    /// # Errors
    /// If it is not an HTTP URL.
    pub fn parse(text: &str) -> Result<Self, RegistryError> {
        let error = |rule| RegistryError::Url { url: text.chars().take(300).collect(), rule };
        // An URL with a password is not repeated in a message.
        if text.contains('@') {
            return Err(RegistryError::Url {
                url: "…".to_owned(),
                rule: "credentials do not belong here; use docker login",
            });
        }
        let mut base =
            Url::parse(text).map_err(|_| error("not a URL such as https://registry.example.org/v2"))?;
        if !matches!(base.scheme(), "http" | "https") || base.host_str().is_none() {
            return Err(error("only http and https are spoken"));
        }
        if base.query().is_some() || base.fragment().is_some() {
            return Err(error("must not have a query or fragment"));
        }
        let path = format!("{}/", base.path().trim_end_matches('/'));
        base.set_path(&path);
        Ok(Self { base })
    }

    /// The transport and the `host[:port]` for references to this registry.
    pub fn registry(&self) -> (Transport, String) {
        let transport = if self.base.scheme() == "http" { Transport::Http } else { Transport::Https };
        (transport, authority(&self.base))
    }

    /// The URL as users write it, without a slash at the end.
    pub fn as_str(&self) -> &str {
        self.base.as_str().trim_end_matches('/')
    }

    /// The URL of something below a repository; `rest` consists of characters that need
    /// no escaping (digests, tags, fixed words).
    pub(crate) fn url(&self, reference: &Reference, rest: &str) -> Url {
        let mut url = self.base.clone();
        url.set_path(&format!("{}{}/{rest}", self.base.path(), reference.repository));
        url
    }

    /// `host[:port]`, for messages.
    pub(crate) fn host(&self) -> String {
        authority(&self.base)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest_url(reference: &str) -> String {
        let reference: Reference = reference.parse().unwrap();
        Endpoint::of(&reference).unwrap().url(&reference, "manifests/1").to_string()
    }

    #[test]
    fn registries_are_found_where_docker_finds_them() {
        assert_eq!(manifest_url("redis"), "https://registry-1.docker.io/v2/library/redis/manifests/1");
        assert_eq!(manifest_url("localhost:5000/a/b"), "http://localhost:5000/v2/a/b/manifests/1");
        assert_eq!(manifest_url("[::1]:5000/a"), "http://[::1]:5000/v2/a/manifests/1");
        assert_eq!(manifest_url("https://localhost/a"), "https://localhost/v2/a/manifests/1");
        assert_eq!(manifest_url("http://r.example.org:81/a"), "http://r.example.org:81/v2/a/manifests/1");
        assert_eq!(manifest_url("r.example.org/a"), "https://r.example.org/v2/a/manifests/1");
    }

    #[test]
    fn a_registry_url_ends_in_v2() {
        for text in ["https://registry-1.docker.io/v2", "https://registry-1.docker.io/v2/"] {
            let endpoint = Endpoint::parse(text).unwrap();
            assert_eq!(endpoint.base.as_str(), "https://registry-1.docker.io/v2/");
            assert_eq!(endpoint.registry(), (Transport::Https, "registry-1.docker.io".into()));
        }
        for wrong in ["registry-1.docker.io/v2", "ftp://a.b/v2", "https://", "https://a.b/v2?x"] {
            assert!(Endpoint::parse(wrong).is_err(), "{wrong}");
        }
        assert!(!Endpoint::parse("https://user:hunter2@a.b/v2").unwrap_err().to_string().contains("hunter2"));
    }
}
