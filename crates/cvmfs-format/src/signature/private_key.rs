//! Private keys (repository format §6.4): the release key signs manifests, the master key signs whitelists.

use std::fmt;

use rsa::Pkcs1v15Sign;
use rsa::pkcs1::DecodeRsaPrivateKey;
use rsa::pkcs8::{DecodePrivateKey, EncodePrivateKey, EncodePublicKey, LineEnding};
use sha1::Sha1;

use super::{Certificate, SignatureError};
use crate::pem::{PemError, blocks};

const WHAT: &str = "private key";

/// An RSA private key. Its `Debug` form shows no secret; the memory is wiped when it is dropped.
#[derive(Clone)]
pub struct PrivateKey(pub(super) rsa::PrivateKey);

impl PrivateKey {
    /// Reads the first private key of a PEM text, PKCS#1 (`RSA PRIVATE KEY`) or PKCS#8 (`PRIVATE KEY`), unencrypted.
    pub fn from_pem(pem: &[u8]) -> Result<Self, SignatureError> {
        let no_key = PemError::NoBlock { wanted: "PRIVATE KEY" };
        let pem_error = |source| SignatureError::Pem { what: WHAT, source };
        for block in blocks(pem).map_err(pem_error)? {
            let key = match block.label.as_str() {
                "PRIVATE KEY" => {
                    rsa::PrivateKey::from_pkcs8_der(&block.der).map_err(|error| error.to_string())
                }
                "RSA PRIVATE KEY" => {
                    rsa::PrivateKey::from_pkcs1_der(&block.der).map_err(|error| error.to_string())
                }
                _ => continue,
            };
            return key.map(Self).map_err(|reason| SignatureError::Unusable { what: WHAT, reason });
        }
        Err(pem_error(no_key))
    }

    /// Signature of a manifest whose hash has this text form (§4.2).
    pub fn sign_manifest(&self, hash_text: &[u8]) -> Result<Vec<u8>, SignatureError> {
        self.0.pkcs1v15_sign::<Sha1>(hash_text).map_err(|error| failed("sign manifest", error))
    }

    /// Signature of a whitelist whose hash has this text form (§6.1).
    pub fn sign_whitelist(&self, hash_text: &[u8]) -> Result<Vec<u8>, SignatureError> {
        self.0
            .sign_with_rng(&mut rand::rngs::SysRng, Pkcs1v15Sign::new_unprefixed(), hash_text)
            .map_err(|error| failed("sign whitelist", error))
    }

    /// Whether the certificate was made for this key.
    pub fn matches(&self, certificate: &Certificate) -> bool {
        self.0.as_public_key() == certificate.key()
    }

    /// The public half as PEM `PUBLIC KEY`.
    pub fn public_pem(&self) -> Result<String, SignatureError> {
        self.0
            .as_public_key()
            .to_public_key_pem(LineEnding::LF)
            .map_err(|error| failed("encode public key", error))
    }

    /// The key as unencrypted PEM `PRIVATE KEY` (PKCS#8). Secret: for the key file only.
    pub fn to_pem(&self) -> Result<String, SignatureError> {
        let pem = self.0.to_pkcs8_pem(LineEnding::LF).map_err(|error| failed("encode private key", error))?;
        Ok(pem.to_string())
    }
}

pub(super) fn failed(doing: &'static str, error: impl fmt::Display) -> SignatureError {
    SignatureError::Failed { doing, reason: error.to_string() }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(secret)")
    }
}
