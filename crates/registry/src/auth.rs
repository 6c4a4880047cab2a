//! Authentication: from the challenge of a registry to an `Authorization` header.
//!
//! Tokens are kept per repository and access, used until the registry refuses them, and
//! then asked for anew.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use base64::Engine as _;
use reqwest::header::{HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{StatusCode, Url};
use serde::Deserialize;

use crate::challenge::{self, Challenge};
use crate::credentials::{Credential, Credentials};
use crate::error::RegistryError;
use crate::http::{HttpClients, authority, causes};
use crate::reference::{Reference, is_loopback_host};
use crate::secret::Secret;
use crate::transport::retry_after;

/// Token answers are a few kilobytes.
const MAX_TOKEN_BYTES: usize = 1 << 20;
/// Token services that are tried for one answer; a server that names more wants to keep us busy.
const MAX_TOKEN_SERVICES: usize = 3;
/// How we name ourselves to token services.
const CLIENT_ID: &str = "docker2cvmfs";

/// What is to be done in a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Access {
    Pull,
    PullPush,
}

impl Access {
    fn actions(self) -> &'static str {
        match self {
            Self::Pull => "pull",
            Self::PullPush => "pull,push",
        }
    }
}

/// The credentials of the user and the headers that registries accepted.
#[derive(Debug)]
pub(crate) struct Authenticator {
    credentials: Credentials,
    accepted: Mutex<HashMap<(String, String, Access), HeaderValue>>,
}

impl Authenticator {
    pub(crate) fn new(credentials: Credentials) -> Self {
        Self { credentials, accepted: Mutex::default() }
    }

    /// The header for a request, if one is known.
    pub(crate) fn header(&self, reference: &Reference, access: Access) -> Option<HeaderValue> {
        let accepted = self.accepted.lock().unwrap_or_else(PoisonError::into_inner);
        accepted.get(&key(reference, access)).cloned()
    }

    /// Answers a 401: afterwards [`header`](Self::header) gives a fresh value.
    pub(crate) async fn answer(
        &self,
        http: &HttpClients,
        url: &Url,
        reference: &Reference,
        access: Access,
        headers: &HeaderMap,
        object: &str,
    ) -> Result<(), RegistryError> {
        let session = Session { http, url, reference, access, object };
        let credential = self.credentials.find(reference).await?;
        let challenges: Vec<Challenge> = headers
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(challenge::parse)
            .collect();
        let header = session.respond(&challenges, credential.as_ref()).await?;
        let mut accepted = self.accepted.lock().unwrap_or_else(PoisonError::into_inner);
        accepted.insert(key(reference, access), header);
        Ok(())
    }
}

fn key(reference: &Reference, access: Access) -> (String, String, Access) {
    (reference.registry.clone(), reference.repository.clone(), access)
}

/// One challenge being answered.
struct Session<'a> {
    http: &'a HttpClients,
    url: &'a Url,
    reference: &'a Reference,
    access: Access,
    object: &'a str,
}

impl Session<'_> {
    async fn respond(
        &self,
        challenges: &[Challenge],
        credential: Option<&Credential>,
    ) -> Result<HeaderValue, RegistryError> {
        let mut refused = None;
        for bearer in challenges.iter().filter(|c| c.scheme == "bearer").take(MAX_TOKEN_SERVICES) {
            match self.token(bearer, credential).await {
                Ok(token) => return self.sensitive(&format!("Bearer {}", token.expose())),
                // The server offers other ways for those who cannot use this one.
                Err(error @ (RegistryError::Denied { .. } | RegistryError::Misdirected { .. })) => {
                    refused.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
        let is_basic = challenges.iter().any(|c| c.scheme == "basic");
        match (credential, refused) {
            (Some(Credential::Password { user, password }), _) if is_basic => {
                self.refuse_plain_text(self.url)?;
                self.sensitive(&basic(user, password))
            }
            // What a token service said tells more than that there is no password for Basic.
            (_, Some(refused)) => Err(refused),
            (Some(Credential::IdentityToken(_)), None) if is_basic => {
                Err(self.denied("it asks for user and password, not a token"))
            }
            (None, None) if is_basic => {
                Err(self.denied("it asks for user and password; log in with docker login or podman login"))
            }
            _ => Err(self.denied("it asks for a kind of authentication that is not supported")),
        }
    }

    async fn token(
        &self,
        bearer: &Challenge,
        credential: Option<&Credential>,
    ) -> Result<Secret, RegistryError> {
        let realm = bearer.parameter("realm").and_then(|realm| Url::parse(realm).ok());
        let Some(realm) =
            realm.filter(|url| matches!(url.scheme(), "http" | "https") && url.host_str().is_some())
        else {
            return Err(self.misdirected("names no valid token service in its challenge"));
        };
        if credential.is_some() {
            self.refuse_plain_text(&realm)?;
        }
        let own = format!("repository:{}:{}", self.reference.repository, self.access.actions());
        let scope = match bearer.parameter("scope") {
            // The server names what this request needs; the next ones will want to push.
            Some(pull) if self.access == Access::PullPush && own.strip_prefix(pull) == Some(",push") => own,
            Some(scope) => scope.to_owned(),
            None => own,
        };
        let service = bearer.parameter("service").unwrap_or_default();
        let client = self.http.to(&realm)?;
        let request = match credential {
            Some(Credential::IdentityToken(token)) => client.post(realm.clone()).form(&[
                ("grant_type", "refresh_token"),
                ("refresh_token", token.expose()),
                ("service", service),
                ("scope", &scope),
                ("client_id", CLIENT_ID),
            ]),
            other => {
                let mut parameters = vec![("scope", scope.as_str())];
                if !service.is_empty() {
                    parameters.insert(0, ("service", service));
                }
                let request = client.get(realm.clone()).query(&parameters);
                match other {
                    Some(Credential::Password { user, password }) => request
                        .header(reqwest::header::AUTHORIZATION, self.sensitive(&basic(user, password))?),
                    _ => request,
                }
            }
        };
        self.fetch_token(&realm, request).await
    }

    async fn fetch_token(
        &self,
        realm: &Url,
        request: reqwest::RequestBuilder,
    ) -> Result<Secret, RegistryError> {
        let host = authority(realm);
        let object = || format!("token for {}", self.object);
        let network = |error: reqwest::Error| RegistryError::Network {
            object: object(),
            host: authority(realm),
            cause: causes(&error),
        };
        let mut response = request.send().await.map_err(network)?;
        let status = response.status();
        if matches!(status.as_u16(), 400 | 401 | 403) {
            return Err(
                self.denied(&format!("its token service {host} answers {status}; check user and password"))
            );
        }
        if status == StatusCode::TOO_MANY_REQUESTS {
            let pause = retry_after(response.headers());
            return Err(RegistryError::RateLimited { object: object(), host, pause });
        }
        if !status.is_success() {
            let status = status.as_u16();
            return Err(RegistryError::Status { object: object(), host, status, detail: String::new() });
        }
        let mut text = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(network)? {
            text.extend_from_slice(&chunk);
            if text.len() > MAX_TOKEN_BYTES {
                return Err(RegistryError::TooLarge {
                    object: object(),
                    host,
                    limit: MAX_TOKEN_BYTES as u64,
                });
            }
        }
        token_of(&text).ok_or_else(|| {
            self.misdirected(&format!("uses token service {host}, which answers without a token"))
        })
    }

    fn sensitive(&self, text: &str) -> Result<HeaderValue, RegistryError> {
        let mut value = HeaderValue::from_str(text)
            .map_err(|_| self.denied("the credential has characters that HTTP cannot carry"))?;
        value.set_sensitive(true);
        Ok(value)
    }

    /// A password crosses the network in clear only if the user asked for plain HTTP to
    /// that very host, or stays on this machine.
    fn refuse_plain_text(&self, target: &Url) -> Result<(), RegistryError> {
        let loopback = target.host_str().is_some_and(is_loopback_host);
        let asked_for = self.url.scheme() == "http" && self.url.host_str() == target.host_str();
        if target.scheme() == "https" || loopback || asked_for {
            return Ok(());
        }
        Err(self.misdirected(&format!("wants credentials to be sent in clear to {}", authority(target))))
    }

    fn denied(&self, reason: &str) -> RegistryError {
        RegistryError::Denied {
            object: self.object.to_owned(),
            host: authority(self.url),
            reason: reason.to_owned(),
        }
    }

    fn misdirected(&self, reason: &str) -> RegistryError {
        RegistryError::Misdirected {
            object: self.object.to_owned(),
            host: authority(self.url),
            reason: reason.to_owned(),
        }
    }
}

fn basic(user: &str, password: &Secret) -> String {
    let pair = format!("{user}:{}", password.expose());
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair))
}

/// The token in a token service's answer.
pub fn token_of(answer: &[u8]) -> Option<Secret> {
    #[derive(Deserialize)]
    struct Answer {
        token: Option<String>,
        access_token: Option<String>,
    }
    let answer = serde_json::from_slice::<Answer>(answer).ok()?;
    answer.token.or(answer.access_token).filter(|token| !token.is_empty()).map(Secret::new)
}
