//! Images in registries: reading and pushing.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use reqwest::Method;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderValue};
use serde::Deserialize;
use tokio::runtime::Runtime;

use crate::auth::Access;
use crate::blob::{self, BlobReader};
use crate::credentials::Credentials;
use crate::digest::Digest;
use crate::endpoint::Endpoint;
use crate::error::RegistryError;
use crate::http::{Deadlines, HttpClients, authority};
use crate::manifest::{Descriptor, ImageManifest, MAX_MANIFEST_BYTES, Manifest};
use crate::platform::Platform;
use crate::reference::Reference;
use crate::source::Source;
use crate::transport::{Body, Call, Transport, network, refusal};

/// Pages of a list of tags. Registries send a hundred to a thousand in each.
const MAX_TAG_PAGES: usize = 1000;
/// How long a mirror is not asked after nobody answered there.
const MIRROR_REST: Duration = Duration::from_secs(300);
/// Most tags of a repository.
const MAX_TAGS: usize = 1_000_000;
/// Threads that move bytes and hash them; the readers' own threads come on top.
const WORKER_THREADS: usize = 2;

/// How a [`Client`] behaves.
#[derive(Debug, Clone)]
pub struct ClientSettings {
    /// Where credentials are looked up.
    pub credentials: Credentials,
    /// How long it waits.
    pub deadlines: Deadlines,
    /// How it names itself.
    pub user_agent: String,
    /// Another place for all references than the one in their name: a mirror, or
    /// `--registry URL`.
    pub endpoint: Option<Endpoint>,
    /// Mirrors that are asked first, for reading.
    pub mirrors: Vec<Mirror>,
    /// Directories with certificates for single registries, as engines have them:
    /// `DIRECTORY/HOST[:PORT]/` with authorities (`*.crt`) and the client's own (`*.cert`
    /// and `*.key`).
    pub certificates: Vec<PathBuf>,
}

/// A copy of a registry, or a cache in front of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    /// The registry, as references name it.
    pub registry: String,
    /// Where the mirror is.
    pub endpoint: Endpoint,
}

impl std::str::FromStr for Mirror {
    type Err = RegistryError;

    /// `[REGISTRY=]URL`; without a registry that of Docker Hub. The URL may leave `/v2` away.
    fn from_str(text: &str) -> Result<Self, RegistryError> {
        let (registry, url) = match text.split_once('=') {
            Some((registry, url)) if !registry.contains("://") => (registry, url),
            _ => ("docker.io", text),
        };
        let url = url.trim_end_matches('/');
        let url = if url.ends_with("/v2") { url.to_owned() } else { format!("{url}/v2") };
        // A registry's name has the form that it has in references.
        let name = format!("{registry}/name").parse::<Reference>()?;
        Ok(Self { registry: name.registry, endpoint: Endpoint::parse(&url)? })
    }
}

impl Default for ClientSettings {
    /// The user's credentials, the default deadlines.
    fn default() -> Self {
        Self {
            credentials: Credentials::from_environment(),
            deadlines: Deadlines::default(),
            user_agent: format!("docker2cvmfs/{}", env!("CARGO_PKG_VERSION")),
            endpoint: None,
            mirrors: Vec::new(),
            certificates: ["/etc/docker/certs.d", "/etc/containers/certs.d"].map(PathBuf::from).into(),
        }
    }
}

/// A client for any number of registries. Clones share connections and tokens.
///
/// All calls block; they must not be made on a thread of an asynchronous runtime.
#[derive(Debug, Clone)]
pub struct Client {
    runtime: Arc<Runtime>,
    transport: Arc<Transport>,
    endpoint: Option<Endpoint>,
    mirrors: Arc<[Mirror]>,
    /// Since when a mirror is not asked.
    resting: Arc<Mutex<HashMap<String, Instant>>>,
}

/// A manifest as it was served.
#[derive(Debug, Clone)]
pub struct FetchedManifest {
    /// Digest of the document.
    pub digest: Digest,
    /// Content type of the answer.
    pub content_type: Option<String>,
    /// The document, byte for byte.
    pub bytes: Vec<u8>,
    /// The document, parsed.
    pub manifest: Manifest,
}

/// One image for one platform.
#[derive(Debug, Clone)]
pub struct Image {
    /// Digest of the image's manifest (not of an index that led to it).
    pub digest: Digest,
    /// Digest of the document that the name led to: the manifest, or an index.
    pub top_digest: Digest,
    /// The manifest, byte for byte.
    pub manifest_bytes: Vec<u8>,
    /// The manifest.
    pub manifest: ImageManifest,
    /// What the image runs on, as far as an index that led to it states.
    pub platform: Option<Platform>,
}

/// A way to make a [`Client`]'s waits end early.
#[derive(Debug, Clone)]
pub struct Canceller(Arc<Transport>);

impl Canceller {
    /// Ends all waits of the client with [`RegistryError::Cancelled`], now and later.
    pub fn cancel(&self) {
        self.0.cancel();
    }
}

impl Client {
    /// A client.
    ///
    /// # Errors
    /// [`RegistryError::Setup`].
    pub fn new(settings: ClientSettings) -> Result<Self, RegistryError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(WORKER_THREADS)
            .thread_name("registry")
            .enable_all()
            .build()
            .map_err(|error| RegistryError::Setup(error.to_string()))?;
        let http = HttpClients::new(&settings.deadlines, &settings.user_agent, settings.certificates)?;
        let transport = Transport::new(http, settings.deadlines, settings.credentials);
        Ok(Self {
            runtime: Arc::new(runtime),
            transport: Arc::new(transport),
            endpoint: settings.endpoint,
            mirrors: settings.mirrors.into(),
            resting: Arc::default(),
        })
    }

    /// A client that shares connections and tokens with this one, but can be cancelled
    /// alone. Cancelling this one cancels its branches too.
    #[must_use]
    pub fn branch(&self) -> Self {
        Self { transport: Arc::new(self.transport.branch()), ..self.clone() }
    }

    /// Whether this client, or the one that it was branched off, was cancelled.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.transport.is_cancelled()
    }

    /// A handle to cancel the work of this client from another thread.
    pub fn canceller(&self) -> Canceller {
        Canceller(self.transport.clone())
    }

    /// The manifest or index behind a reference. With a digest in the reference the
    /// bytes are verified.
    ///
    /// # Errors
    /// Network, not found, denied, or a document that is no manifest.
    pub fn manifest(&self, reference: &Reference) -> Result<FetchedManifest, RegistryError> {
        let (content_type, bytes) = self.verified_document(reference)?;
        let manifest = Manifest::parse(content_type.as_deref(), &bytes)
            .map_err(|cause| RegistryError::Manifest { object: reference.to_string(), cause })?;
        let digest = reference.digest.clone().unwrap_or_else(|| Digest::sha256_of(&bytes));
        Ok(FetchedManifest { digest, content_type, bytes, manifest })
    }

    /// What a registry keeps as manifest, whether it is of an image or not.
    pub(crate) fn document_at(&self, reference: &Reference) -> Result<Vec<u8>, RegistryError> {
        self.verified_document(reference).map(|(_, bytes)| bytes)
    }

    /// A manifest's content type and bytes, held against the digests that are known of it.
    fn verified_document(&self, reference: &Reference) -> Result<(Option<String>, Vec<u8>), RegistryError> {
        self.mirrored(reference, |reference, endpoint| self.verified_document_at(reference, endpoint))
    }

    fn verified_document_at(
        &self,
        reference: &Reference,
        endpoint: &Endpoint,
    ) -> Result<(Option<String>, Vec<u8>), RegistryError> {
        let object = format!("manifest of {reference}");
        let url = endpoint.url(reference, &format!("manifests/{}", reference.selector()));
        let host = authority(&url);
        let mut call = self.call(Method::GET, url, reference, Access::Pull, &object);
        call.headers.insert(ACCEPT, accept());
        let (headers, bytes) = self.runtime.block_on(self.document(&call, MAX_MANIFEST_BYTES))?;
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let served = text("docker-content-digest").and_then(|digest| digest.parse().ok());
        // The registry's own word is checked too: a proxy may have mixed up documents.
        for expected in [reference.digest.clone(), served].into_iter().flatten() {
            let found = digest_like(&expected, &bytes);
            if found != expected {
                return Err(RegistryError::WrongDigest { object, host, expected, found });
            }
        }
        Ok((text("content-type"), bytes))
    }

    /// The digest of the manifest or index behind a reference, as the registry states it:
    /// good for seeing whether something changed, and no more. `None` if it states none.
    ///
    /// Registries that limit downloads do not count this question.
    ///
    /// # Errors
    /// Network, not found, denied.
    pub fn stated_digest(&self, reference: &Reference) -> Result<Option<Digest>, RegistryError> {
        match self.mirrored(reference, |reference, endpoint| self.stated_digest_at(reference, endpoint))? {
            // A mirror that does not say is no word of the registry.
            None if self.mirrors.iter().any(|mirror| mirror.registry == reference.registry) => {
                self.stated_digest_at(reference, &self.endpoint(reference)?)
            }
            stated => Ok(stated),
        }
    }

    fn stated_digest_at(
        &self,
        reference: &Reference,
        endpoint: &Endpoint,
    ) -> Result<Option<Digest>, RegistryError> {
        let object = format!("manifest of {reference}");
        let url = endpoint.url(reference, &format!("manifests/{}", reference.selector()));
        let mut call = self.call(Method::HEAD, url, reference, Access::Pull, &object);
        call.headers.insert(ACCEPT, accept());
        let response = self.runtime.block_on(self.transport.send(&call))?;
        if !response.status().is_success() {
            return Err(self.runtime.block_on(refusal(&object, response)));
        }
        let stated = response.headers().get("docker-content-digest").and_then(|value| value.to_str().ok());
        Ok(stated.and_then(|text| text.parse().ok()))
    }

    /// All tags of a repository, in the registry's order.
    ///
    /// # Errors
    /// Network, not found, denied, or more than anybody can use.
    pub fn tags(&self, reference: &Reference) -> Result<Vec<String>, RegistryError> {
        #[derive(Deserialize)]
        struct Page {
            tags: Option<Vec<String>>,
        }
        let object = format!("tags of {}/{}", reference.registry, reference.repository);
        let first = self.url(reference, "tags/list")?;
        let mut next = Some(first.clone());
        let mut tags = Vec::new();
        for _ in 0..MAX_TAG_PAGES {
            let Some(url) = next else { return Ok(tags) };
            let host = authority(&url);
            let call = self.call(Method::GET, url.clone(), reference, Access::Pull, &object);
            let (headers, bytes) = self.runtime.block_on(self.document(&call, MAX_MANIFEST_BYTES))?;
            let page: Page = serde_json::from_slice(&bytes).map_err(|error| {
                RegistryError::Configuration { object: object.clone(), reason: error.to_string() }
            })?;
            tags.extend(page.tags.unwrap_or_default());
            if tags.len() > MAX_TAGS {
                let reason = format!("are more than {MAX_TAGS}");
                return Err(RegistryError::Configuration { object, reason });
            }
            next = following_page(&headers, &url).filter(|next| *next != url);
            if next.as_ref().is_some_and(|next| !crate::http::same_origin(next, &first)) {
                let reason = "leads to another server for the rest of the tags".to_owned();
                return Err(RegistryError::Misdirected { object, host, reason });
            }
        }
        let reason = format!("come in more than {MAX_TAG_PAGES} pages");
        Err(RegistryError::Configuration { object, reason })
    }

    /// An image of a registry as a source.
    pub fn source(&self, reference: &Reference) -> Source {
        Source::registry(self, reference)
    }

    /// Starts the download of a blob. Foreign layers come from the first of their URLs
    /// that answers, if the registry itself does not have them.
    ///
    /// # Errors
    /// Those of the first request; later ones come out of the reader.
    pub fn blob(&self, reference: &Reference, blob: &Descriptor) -> Result<BlobReader, RegistryError> {
        let object = format!("layer {} of {reference}", blob.digest);
        match self.start(reference, blob, object.clone()) {
            Err(RegistryError::NotFound { .. }) if blob.is_foreign() => self.foreign(reference, blob, object),
            result => result,
        }
    }

    /// Whether a repository has a blob.
    ///
    /// # Errors
    /// Network, denied.
    pub fn has_blob(&self, reference: &Reference, digest: &Digest) -> Result<bool, RegistryError> {
        self.ask_for_blob(reference, digest, &format!("blob {digest} of {reference}"))
    }

    /// Finds out whether `reference` can be pushed to: an upload is opened and given up.
    /// Nothing less tells: who may read gets an answer to every other question.
    ///
    /// # Errors
    /// Network, denied, or a registry that does not work.
    pub fn check_push(&self, reference: &Reference) -> Result<(), RegistryError> {
        let object = format!("destination {reference}");
        self.runtime.block_on(async {
            let session = self.open_upload(reference, &object).await?;
            let cancel = Call { method: Method::DELETE, ..session };
            // A registry that cannot do that forgets the upload after a while.
            if let Err(error) = self.transport.send(&cancel).await {
                tracing::debug!(%error, "an upload could not be given up");
            }
            Ok(())
        })
    }

    fn ask_for_blob(
        &self,
        reference: &Reference,
        digest: &Digest,
        object: &str,
    ) -> Result<bool, RegistryError> {
        let url = self.url(reference, &format!("blobs/{digest}"))?;
        let call = self.call(Method::HEAD, url, reference, Access::PullPush, object);
        let response = self.runtime.block_on(self.transport.send(&call))?;
        match response.status().as_u16() {
            200 => Ok(true),
            404 => Ok(false),
            _ => Err(self.runtime.block_on(refusal(object, response))),
        }
    }

    /// Pushes a blob unless it is there already. Returns whether it was sent.
    ///
    /// # Errors
    /// Network, denied, or a registry that found other content than the digest says.
    pub fn push_blob(
        &self,
        reference: &Reference,
        digest: &Digest,
        body: Body,
    ) -> Result<bool, RegistryError> {
        if self.has_blob(reference, digest)? {
            return Ok(false);
        }
        let object = format!("upload of {digest} to {reference}");
        self.runtime.block_on(self.upload(reference, digest, body, &object))?;
        Ok(true)
    }

    /// Pushes a manifest under the reference's tag (or digest). Returns its digest.
    ///
    /// # Errors
    /// Network, denied, or a registry that lacks a blob of it.
    pub fn push_manifest(
        &self,
        reference: &Reference,
        media_type: &str,
        bytes: Vec<u8>,
    ) -> Result<Digest, RegistryError> {
        let object = format!("upload of the manifest of {reference}");
        let digest = Digest::sha256_of(&bytes);
        let url = self.url(reference, &format!("manifests/{}", reference.selector()))?;
        let mut call = self.call(Method::PUT, url, reference, Access::PullPush, &object);
        let content_type = HeaderValue::from_str(media_type);
        call.headers.insert(CONTENT_TYPE, content_type.expect("media types are valid in a header"));
        call.body = Body::Bytes(bytes.into());
        self.runtime.block_on(async {
            let response = self.transport.send(&call).await?;
            if response.status().is_success() { Ok(digest) } else { Err(refusal(&object, response).await) }
        })
    }

    fn foreign(
        &self,
        reference: &Reference,
        blob: &Descriptor,
        object: String,
    ) -> Result<BlobReader, RegistryError> {
        let mut last = RegistryError::NotFound {
            object: object.clone(),
            host: self.endpoint(reference)?.host(),
            detail: " (a foreign layer without a working URL)".to_owned(),
        };
        for text in &blob.urls {
            let url = reqwest::Url::parse(text).ok().filter(|u| matches!(u.scheme(), "http" | "https"));
            let Some(url) = url.filter(|url| url.host_str().is_some()) else { continue };
            // The image's author wrote the URL: nothing of the user goes there.
            let part = blob::Blob {
                reference: reference.clone(),
                url,
                descriptor: blob.clone(),
                object: object.clone(),
                is_anonymous: true,
            };
            match blob::start(&self.runtime, &self.transport, part) {
                Ok(reader) => return Ok(reader),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Starts the download of a blob from where the reference says.
    pub(crate) fn start(
        &self,
        reference: &Reference,
        blob: &Descriptor,
        object: String,
    ) -> Result<BlobReader, RegistryError> {
        self.mirrored(reference, |reference, endpoint| {
            let url = endpoint.url(reference, &format!("blobs/{}", blob.digest));
            let (descriptor, object) = (blob.clone(), object.clone());
            let part =
                blob::Blob { reference: reference.clone(), url, descriptor, object, is_anonymous: false };
            blob::start(&self.runtime, &self.transport, part)
        })
    }

    /// This client without mirrors; `None` if it has none for the registry.
    pub(crate) fn without_mirrors(&self, registry: &str) -> Option<Self> {
        let has = self.mirrors.iter().any(|mirror| mirror.registry == registry);
        has.then(|| Self { mirrors: Arc::from([]), ..self.clone() })
    }

    fn is_resting(&self, mirror: &Mirror) -> bool {
        let resting = self.resting.lock().unwrap_or_else(PoisonError::into_inner);
        resting.get(mirror.endpoint.as_str()).is_some_and(|since| since.elapsed() < MIRROR_REST)
    }

    /// A mirror that nobody answers at would cost each request its deadline.
    fn let_rest(&self, mirror: &Mirror) {
        let mut resting = self.resting.lock().unwrap_or_else(PoisonError::into_inner);
        resting.insert(mirror.endpoint.as_str().to_owned(), Instant::now());
    }

    /// Reads from the first mirror that answers, else from the registry itself. A mirror
    /// is a registry of its own: it does not get the registry's credentials.
    fn mirrored<T>(
        &self,
        reference: &Reference,
        read: impl Fn(&Reference, &Endpoint) -> Result<T, RegistryError>,
    ) -> Result<T, RegistryError> {
        for mirror in self.mirrors.iter().filter(|mirror| mirror.registry == reference.registry) {
            if self.is_resting(mirror) {
                continue;
            }
            let (transport, registry) = mirror.endpoint.registry();
            let there = Reference { transport, registry, ..reference.clone() };
            match read(&there, &mirror.endpoint) {
                Err(error) if !matches!(error, RegistryError::Cancelled) => {
                    if matches!(error, RegistryError::Network { .. } | RegistryError::Timeout { .. }) {
                        self.let_rest(mirror);
                    }
                    tracing::info!(mirror = mirror.endpoint.as_str(), %error, "a mirror does not serve, asking the registry");
                }
                result => return result,
            }
        }
        read(reference, &self.endpoint(reference)?)
    }

    /// A small document in whole.
    async fn document(&self, call: &Call<'_>, limit: u64) -> Result<(HeaderMap, Vec<u8>), RegistryError> {
        let started = Instant::now();
        let mut response = self.transport.send(call).await?;
        if !response.status().is_success() {
            return Err(refusal(call.object, response).await);
        }
        let host = authority(response.url());
        let mut bytes = Vec::new();
        loop {
            // The deadline is for the whole document, also if it comes byte by byte.
            let rest = call.deadline.saturating_sub(started.elapsed());
            let idle = self.transport.deadlines().idle.min(rest);
            let chunk = tokio::select! {
                biased;
                () = self.transport.cancellation() => return Err(RegistryError::Cancelled),
                chunk = tokio::time::timeout(idle, response.chunk()) => chunk,
            };
            match chunk {
                Ok(Ok(Some(chunk))) => bytes.extend_from_slice(&chunk),
                Ok(Ok(None)) => return Ok((response.headers().clone(), bytes)),
                Ok(Err(error)) => return Err(network(call.object, response.url(), &error)),
                Err(_) => {
                    return Err(RegistryError::Timeout {
                        object: call.object.to_owned(),
                        host,
                        waited: started.elapsed(),
                    });
                }
            }
            if bytes.len() as u64 > limit {
                return Err(RegistryError::TooLarge { object: call.object.to_owned(), host, limit });
            }
        }
    }

    /// Opens an upload session and sends all bytes in one request.
    async fn upload(
        &self,
        reference: &Reference,
        digest: &Digest,
        body: Body,
        object: &str,
    ) -> Result<(), RegistryError> {
        let mut call = self.open_upload(reference, object).await?;
        call.url.query_pairs_mut().append_pair("digest", &digest.to_string());
        call.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        call.deadline += Deadlines::sending(body.length());
        call.body = body;
        let response = self.transport.send(&call).await?;
        if response.status().is_success() { Ok(()) } else { Err(refusal(object, response).await) }
    }

    /// Opens an upload; returns the call for its bytes. Credentials do not follow to
    /// another server, and nothing leaves TLS.
    async fn open_upload<'a>(
        &self,
        reference: &'a Reference,
        object: &'a str,
    ) -> Result<Call<'a>, RegistryError> {
        let url = self.url(reference, "blobs/uploads/")?;
        let open = self.call(Method::POST, url.clone(), reference, Access::PullPush, object);
        let response = self.transport.send(&open).await?;
        if response.status().as_u16() != 202 {
            return Err(refusal(object, response).await);
        }
        let location =
            response.headers().get(reqwest::header::LOCATION).and_then(|value| value.to_str().ok());
        let misdirected = |reason: &str| RegistryError::Misdirected {
            object: object.to_owned(),
            host: authority(&url),
            reason: reason.to_owned(),
        };
        let target = location.and_then(|text| url.join(text).ok());
        let mut target = target.ok_or_else(|| misdirected("opens an upload without saying where"))?;
        if url.scheme() == "https" && target.scheme() == "http" {
            // A registry behind a proxy that ends TLS often does not know that it does.
            let is_here = target.host_str() == url.host_str() && target.port().is_none();
            if !is_here || target.set_scheme("https").is_err() || target.set_port(url.port()).is_err() {
                return Err(misdirected("leads an upload from https to plain http"));
            }
        }
        let mut call = self.call(Method::PUT, target, reference, Access::PullPush, object);
        call.is_anonymous = !crate::http::same_origin(&call.url, &url);
        Ok(call)
    }

    fn call<'a>(
        &self,
        method: Method,
        url: reqwest::Url,
        reference: &'a Reference,
        access: Access,
        object: &'a str,
    ) -> Call<'a> {
        let deadline = self.transport.deadlines().document;
        Call {
            method,
            url,
            reference,
            access,
            is_anonymous: false,
            headers: HeaderMap::new(),
            body: Body::Empty,
            object,
            deadline,
        }
    }

    fn url(&self, reference: &Reference, rest: &str) -> Result<reqwest::Url, RegistryError> {
        Ok(self.endpoint(reference)?.url(reference, rest))
    }

    fn endpoint(&self, reference: &Reference) -> Result<Endpoint, RegistryError> {
        self.endpoint.clone().map_or_else(|| Endpoint::of(reference), Ok)
    }
}

/// The digest of bytes by the algorithm of another one.
pub(crate) fn digest_like(expected: &Digest, bytes: &[u8]) -> Digest {
    let mut digester = crate::digest::Digester::like(expected);
    digester.update(bytes);
    digester.finish()
}

fn accept() -> HeaderValue {
    HeaderValue::from_str(&Manifest::accept()).expect("media types are valid in a header")
}

/// The target of `Link: <URL>; rel="next"`.
fn following_page(headers: &HeaderMap, page: &reqwest::Url) -> Option<reqwest::Url> {
    let link = headers.get(reqwest::header::LINK)?.to_str().ok()?;
    let (target, relation) = link.strip_prefix('<')?.split_once('>')?;
    if relation.contains("next") { page.join(target).ok() } else { None }
}
