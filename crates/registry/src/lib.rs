//! Container registries: references, authentication, manifests, blobs, layer streams.
//!
//! [`Client`] speaks to any registry with the OCI distribution API (Docker registry HTTP
//! API, version 2), reading and pushing. [`Source`] reads an image wherever it is kept: in
//! a registry, a docker-archive or a directory in OCI layout. [`LayerStream`] turns a
//! layer's blob into the tar archive that it holds.
//!
//! Invariants:
//!
//! * Bytes are right or an error: manifests asked for by digest, configurations, blobs
//!   and uncompressed layers are verified before their end is reported.
//! * Every wait has a deadline, every document a size limit, every retry an end.
//! * Credentials go to the registry that they are for and to the token service it names,
//!   over TLS unless the user asked for plain HTTP or the host is this machine; never to
//!   the target of a redirect, a log, or an error message.
//! * Calls block; the one asynchronous runtime is inside.

mod auth;
mod blob;
mod challenge;
mod client;
mod config;
mod credentials;
mod digest;
mod endpoint;
mod error;
mod http;
mod layer;
mod manifest;
mod platform;
mod reference;
mod secret;
mod signature;
mod source;
mod transport;

/// Parsers of what registries answer, for tests that feed them anything.
pub mod answers {
    pub use crate::auth::token_of;
    pub use crate::challenge::{Challenge, parse as challenges};
    pub use crate::signature::listed as listed_signatures;
}

pub use blob::BlobReader;
pub use client::{Canceller, Client, ClientSettings, FetchedManifest, Image, Mirror};
pub use config::{ImageConfig, MAX_CONFIG_BYTES};
pub use credentials::{Credential, Credentials, CredentialsError};
pub use digest::{Digest, Digester, InvalidDigest};
pub use endpoint::Endpoint;
pub use error::{ErrorKind, RegistryError};
pub use http::{Deadlines, SLOWEST_BYTES_PER_SECOND};
pub use layer::{LayerError, LayerStream, MAX_LAYER_BYTES};
pub use manifest::{
    Descriptor, ImageManifest, IndexEntry, MAX_MANIFEST_BYTES, Manifest, ManifestError, docker_list,
    media_type,
};
pub use platform::{InvalidPlatform, Platform, choose};
pub use reference::{ImageSource, Reference, ReferenceError, Transport as ReferenceTransport};
pub use secret::Secret;
pub use signature::{InvalidPublicKey, PublicKey, SignedStatement, Statement};
pub use source::{ImageSet, Source};
pub use transport::Body;
