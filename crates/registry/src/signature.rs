//! Signatures of images as cosign keeps them beside the image.
//!
//! The signatures of an image with digest `sha256:HEX` are an artifact under the tag
//! `sha256-HEX.sig` of the same repository. Each of its layers is a signed statement, a
//! small JSON document that names the digest; the signature stands in an annotation.
//! Nothing that is read here is trusted before [`PublicKey::verify`] accepted it.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read as _;

use base64::Engine as _;
use der::{Decode as _, Encode as _};
use ring::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P384_SHA384_ASN1, ED25519, RSA_PKCS1_2048_8192_SHA256, UnparsedPublicKey,
    VerificationAlgorithm,
};
use serde::Deserialize;
use x509_cert::spki::{AlgorithmIdentifierOwned, ObjectIdentifier, SubjectPublicKeyInfoOwned};

use crate::client::Client;
use crate::digest::Digest;
use crate::error::RegistryError;
use crate::manifest::Descriptor;
use crate::reference::Reference;

/// Largest signed statement in bytes; real ones have a few hundred.
const MAX_STATEMENT_BYTES: u64 = 1 << 20;
/// Most signatures that are looked at.
const MAX_SIGNATURES: usize = 64;
/// Layers that hold a signed statement.
const STATEMENT_TYPE: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
/// The annotation with the signature in base64.
const SIGNATURE: &str = "dev.cosignproject.cosign/signature";
/// What a statement says that it is.
const STATEMENT_KINDS: [&str; 2] = ["cosign container image signature", "atomic container signature"];

const ID_EC: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const ID_P256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
const ID_P384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");
const ID_RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const ID_ED25519: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.101.112");

/// A key that verifies signatures.
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey {
    kind: Kind,
    bytes: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    P256,
    P384,
    Rsa,
    Ed25519,
}

/// A text that is no public key that we can use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidPublicKey(String);

/// A statement with a signature, not verified yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedStatement {
    bytes: Vec<u8>,
    signature: Vec<u8>,
}

/// What a verified statement says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statement {
    /// The digest of the manifest or index that was signed.
    pub digest: Digest,
    /// The name that it was signed for, as the signer wrote it.
    pub identity: String,
}

impl PublicKey {
    /// Reads a key in PEM form (`BEGIN PUBLIC KEY`): ECDSA with P-256 or P-384, RSA from
    /// 2048 bits, Ed25519.
    ///
    /// # Errors
    /// What the text is instead.
    pub fn from_pem(text: &str) -> Result<Self, InvalidPublicKey> {
        let invalid = |reason: &str| InvalidPublicKey(reason.to_owned());
        let (label, document) = der::pem::decode_vec(text.trim().as_bytes())
            .map_err(|_| invalid("is not a public key in PEM form (-----BEGIN PUBLIC KEY-----)"))?;
        if label != "PUBLIC KEY" {
            return Err(InvalidPublicKey(format!("is a {label}, not a PUBLIC KEY")));
        }
        let info = SubjectPublicKeyInfoOwned::from_der(&document)
            .map_err(|_| invalid("is damaged: not a SubjectPublicKeyInfo"))?;
        let kind = kind_of(&info.algorithm).ok_or_else(|| {
            invalid("is of a kind that is not supported: ECDSA P-256, P-384, RSA and Ed25519 are")
        })?;
        let bytes =
            info.subject_public_key.as_bytes().ok_or_else(|| invalid("is damaged: no whole bytes"))?;
        Ok(Self { kind, bytes: bytes.to_vec() })
    }

    /// The statement, if this key signed it.
    pub fn verify(&self, signed: &SignedStatement) -> Option<Statement> {
        let algorithm: &'static dyn VerificationAlgorithm = match self.kind {
            Kind::P256 => &ECDSA_P256_SHA256_ASN1,
            Kind::P384 => &ECDSA_P384_SHA384_ASN1,
            Kind::Rsa => &RSA_PKCS1_2048_8192_SHA256,
            Kind::Ed25519 => &ED25519,
        };
        let key = UnparsedPublicKey::new(algorithm, &self.bytes);
        key.verify(&signed.bytes, &signed.signature).ok()?;
        Statement::parse(&signed.bytes)
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({:?})", self.kind)
    }
}

fn kind_of(algorithm: &AlgorithmIdentifierOwned) -> Option<Kind> {
    match algorithm.oid {
        ID_EC => {
            let curve = algorithm.parameters.as_ref()?.to_der().ok()?;
            match ObjectIdentifier::from_der(&curve).ok()? {
                ID_P256 => Some(Kind::P256),
                ID_P384 => Some(Kind::P384),
                _ => None,
            }
        }
        ID_RSA => Some(Kind::Rsa),
        ID_ED25519 => Some(Kind::Ed25519),
        _ => None,
    }
}

impl SignedStatement {
    /// A statement and its signature, for callers that have them from elsewhere.
    pub fn new(bytes: Vec<u8>, signature: Vec<u8>) -> Self {
        Self { bytes, signature }
    }
}

impl Statement {
    /// What is not a statement about an image says nothing, whoever signed it.
    fn parse(bytes: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct Document {
            critical: Critical,
        }
        #[derive(Deserialize)]
        struct Critical {
            identity: Identity,
            image: Subject,
            #[serde(rename = "type")]
            kind: String,
        }
        #[derive(Deserialize)]
        struct Identity {
            #[serde(rename = "docker-reference")]
            reference: String,
        }
        #[derive(Deserialize)]
        struct Subject {
            #[serde(rename = "docker-manifest-digest")]
            digest: String,
        }
        let critical = serde_json::from_slice::<Document>(bytes).ok()?.critical;
        let is_known = STATEMENT_KINDS.contains(&critical.kind.as_str());
        let digest = critical.image.digest.parse().ok()?;
        is_known.then_some(Self { digest, identity: critical.identity.reference })
    }
}

/// The signatures that an artifact lists: its layers, and what is written at them.
///
/// # Errors
/// What keeps the document from being read.
pub fn listed(artifact: &[u8]) -> Result<Vec<(Descriptor, Vec<u8>)>, String> {
    #[derive(Deserialize)]
    struct Artifact {
        #[serde(default)]
        layers: Vec<Layer>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Layer {
        #[serde(default)]
        media_type: String,
        digest: String,
        size: u64,
        #[serde(default)]
        annotations: BTreeMap<String, String>,
    }
    let artifact: Artifact = serde_json::from_slice(artifact).map_err(|error| error.to_string())?;
    let mut listed = Vec::new();
    for layer in artifact.layers.into_iter().filter(|layer| layer.media_type == STATEMENT_TYPE) {
        let signature = layer.annotations.get(SIGNATURE);
        let signature = signature.and_then(|s| base64::engine::general_purpose::STANDARD.decode(s).ok());
        let (Some(signature), Ok(digest)) = (signature, layer.digest.parse()) else { continue };
        if layer.size <= MAX_STATEMENT_BYTES && listed.len() < MAX_SIGNATURES {
            let (media_type, size) = (layer.media_type, layer.size);
            listed.push((Descriptor { media_type, size, digest, urls: Vec::new() }, signature));
        }
    }
    Ok(listed)
}

impl Client {
    /// The signatures that a repository keeps of a manifest or index; none if it keeps none.
    ///
    /// # Errors
    /// Network, denied, or an artifact that cannot be read.
    pub fn signatures(
        &self,
        reference: &Reference,
        digest: &Digest,
    ) -> Result<Vec<SignedStatement>, RegistryError> {
        let tag = format!("{}-{}.sig", digest.algorithm(), digest.hex());
        let place = Reference { tag: Some(tag), digest: None, ..reference.clone() };
        let artifact = match self.document_at(&place) {
            Ok(artifact) => artifact,
            Err(RegistryError::NotFound { .. }) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let object = format!("signatures {place}");
        let listed = listed(&artifact)
            .map_err(|reason| RegistryError::Configuration { object: object.clone(), reason })?;
        let mut signed = Vec::with_capacity(listed.len());
        for (blob, signature) in listed {
            let mut bytes = Vec::new();
            self.start(&place, &blob, object.clone())?
                .read_to_end(&mut bytes)
                .map_err(|error| crate::source::failure(&object, error))?;
            signed.push(SignedStatement { bytes, signature });
        }
        Ok(signed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_usable_key_is_said() {
        let message = |text: &str| PublicKey::from_pem(text).unwrap_err().to_string();
        assert!(message("").contains("PEM"));
        assert!(
            message("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n").contains("PRIVATE KEY")
        );
        assert!(message("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n").contains("damaged"));
    }

    #[test]
    fn only_statements_about_images_say_something() {
        let digest = format!("sha256:{}", "a".repeat(64));
        let statement = |kind: &str, digest: &str| {
            let text = format!(
                r#"{{"critical":{{"identity":{{"docker-reference":"r.org/a"}},"image":{{"docker-manifest-digest":"{digest}"}},"type":"{kind}"}},"optional":null}}"#
            );
            Statement::parse(text.as_bytes())
        };
        let good = statement("cosign container image signature", &digest).unwrap();
        assert_eq!((good.digest.to_string(), good.identity.as_str()), (digest.clone(), "r.org/a"));
        assert!(statement("something else", &digest).is_none());
        assert!(statement("cosign container image signature", "sha256:1").is_none());
        assert!(Statement::parse(b"{}").is_none());
    }

    #[test]
    fn artifacts_list_statements_and_other_layers_are_passed_over() {
        let digest = format!("sha256:{}", "a".repeat(64));
        let layer = |media_type: &str, size: u64, signature: &str| {
            format!(
                r#"{{"mediaType":"{media_type}","size":{size},"digest":"{digest}","annotations":{{"{SIGNATURE}":"{signature}"}}}}"#
            )
        };
        let layers = [
            layer(STATEMENT_TYPE, 7, "AAEC"),
            layer("application/octet-stream", 7, "AAEC"),
            layer(STATEMENT_TYPE, 7, "not base64!"),
            layer(STATEMENT_TYPE, 1 << 40, "AAEC"),
        ];
        let artifact = format!(r#"{{"layers":[{}]}}"#, layers.join(","));
        let listed = listed(artifact.as_bytes()).unwrap();
        assert_eq!(listed.len(), 1);
        assert_eq!(listed[0].1, [0, 1, 2]);
        assert!(super::listed(b"[").is_err());
    }
}
