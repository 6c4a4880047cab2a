//! Keys, certificates and the format's two signature schemes (repository format §4.2, §5, §6).
//!
//! Both schemes sign the *text* of a hash:
//!
//! * manifest: RSA PKCS#1 v1.5 with a SHA-1 `DigestInfo` over the text, whatever algorithm the text itself is in;
//! * whitelist: the text itself as PKCS#1 type-1 payload, without digest.
//!
//! Trust flows from the master public keys (configuration) through the whitelist to the certificate and from there to
//! the manifest, which names all content by hash. Validity dates of certificates are not checked: the whitelist's
//! expiry takes their place.

mod authorities;
mod certificate;
mod generate;
mod private_key;

use rsa::Pkcs1v15Sign;
use rsa::pkcs1::DecodeRsaPublicKey;
use rsa::pkcs8::DecodePublicKey;

pub use self::authorities::{Authorities, ChainError};
pub use self::certificate::Certificate;
pub use self::generate::{KeyChain, generate_keys};
pub use self::private_key::PrivateKey;
use crate::letter::Letter;
pub use crate::letter::seal;
pub use crate::pem::PemError;
use crate::pem::blocks;

/// Why a key or certificate is unusable, or a signature does not hold.
#[derive(Debug, thiserror::Error)]
pub enum SignatureError {
    /// The file is not PEM or lacks the wanted block.
    #[error("cannot read {what}")]
    Pem {
        /// Which key or certificate.
        what: &'static str,
        /// The cause.
        #[source]
        source: PemError,
    },
    /// The PEM block is not a usable RSA key or X.509 certificate.
    #[error("unusable {what}: {reason}")]
    Unusable {
        /// Which key or certificate.
        what: &'static str,
        /// The cause, as the decoder states it.
        reason: String,
    },
    /// No public key verifies the whitelist.
    #[error("invalid whitelist signature (none of {keys} public keys matches)")]
    Whitelist {
        /// Number of keys tried.
        keys: usize,
    },
    /// The certificate's key does not verify the manifest.
    #[error("failed to verify repository manifest (signature was not made with the key of its certificate)")]
    Manifest,
    /// Signing or key generation failed.
    #[error("cannot {doing}: {reason}")]
    Failed {
        /// What was tried.
        doing: &'static str,
        /// The cause.
        reason: String,
    },
}

/// Public master keys: whoever holds one of the private counterparts may sign whitelists (§6.4).
#[derive(Debug, Clone, Default)]
pub struct MasterKeys(Vec<rsa::PublicKey>);

impl MasterKeys {
    /// No keys; nothing verifies.
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads all public keys of one PEM text.
    pub fn from_pem(text: &[u8]) -> Result<Self, SignatureError> {
        let mut keys = Self::new();
        keys.add_pem(text)?;
        Ok(keys)
    }

    /// Adds all public keys of one PEM text (`PUBLIC KEY` or `RSA PUBLIC KEY` blocks, at least one).
    pub fn add_pem(&mut self, text: &[u8]) -> Result<(), SignatureError> {
        const WHAT: &str = "public master key";
        let unusable = |reason: String| SignatureError::Unusable { what: WHAT, reason };
        let before = self.0.len();
        for block in blocks(text).map_err(|source| SignatureError::Pem { what: WHAT, source })? {
            match block.label.as_str() {
                "PUBLIC KEY" => {
                    self.0.push(
                        rsa::PublicKey::from_public_key_der(&block.der)
                            .map_err(|e| unusable(e.to_string()))?,
                    );
                }
                "RSA PUBLIC KEY" => {
                    self.0.push(
                        rsa::PublicKey::from_pkcs1_der(&block.der).map_err(|e| unusable(e.to_string()))?,
                    );
                }
                _ => {}
            }
        }
        if self.0.len() == before {
            let source = PemError::NoBlock { wanted: "PUBLIC KEY" };
            return Err(SignatureError::Pem { what: WHAT, source });
        }
        Ok(())
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Verifies the signature of a whitelist: any of the keys suffices.
    pub fn verify_whitelist(&self, letter: &Letter<'_>) -> Result<(), SignatureError> {
        let is_good = |key: &rsa::PublicKey| {
            key.verify(Pkcs1v15Sign::new_unprefixed(), letter.hash_text, letter.signature).is_ok()
        };
        if self.0.iter().any(is_good) {
            return Ok(());
        }
        Err(SignatureError::Whitelist { keys: self.0.len() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::HashAlgorithm;

    #[test]
    fn a_generated_key_chain_signs_and_verifies_both_documents_in_every_algorithm() {
        let chain = generate_keys("example.cern.ch", 1_700_000_000).unwrap();
        let master = PrivateKey::from_pem(chain.masterkey_pem.as_bytes()).unwrap();
        let key = PrivateKey::from_pem(chain.key_pem.as_bytes()).unwrap();
        let certificate = Certificate::from_pem(chain.certificate_pem.as_bytes()).unwrap();
        let master_keys = MasterKeys::from_pem(chain.master_public_pem.as_bytes()).unwrap();
        assert!(key.matches(&certificate) && !master.matches(&certificate));
        assert_eq!(master.public_pem().unwrap(), chain.master_public_pem);
        for algorithm in HashAlgorithm::ALL {
            let whitelist = seal(b"w\n".to_vec(), algorithm, |text| master.sign_whitelist(text)).unwrap();
            let manifest = seal(b"m\n".to_vec(), algorithm, |text| key.sign_manifest(text)).unwrap();
            let (whitelist, manifest) =
                (Letter::parse(&whitelist).unwrap(), Letter::parse(&manifest).unwrap());
            master_keys.verify_whitelist(&whitelist).unwrap();
            certificate.verify_manifest(&manifest).unwrap();
            // The schemes are not interchangeable.
            let error = master_keys.verify_whitelist(&manifest).unwrap_err();
            assert!(error.to_string().starts_with("invalid whitelist signature"), "{error}");
            let wrong_scheme = seal(b"m\n".to_vec(), algorithm, |text| key.sign_whitelist(text)).unwrap();
            let error = certificate.verify_manifest(&Letter::parse(&wrong_scheme).unwrap()).unwrap_err();
            assert!(error.to_string().starts_with("failed to verify repository manifest"), "{error}");
        }
    }

    #[test]
    fn no_key_verifies_nothing() {
        let file =
            seal(b"w\n".to_vec(), HashAlgorithm::Sha1, |_| Ok::<_, SignatureError>(vec![0; 256])).unwrap();
        let letter = Letter::parse(&file).unwrap();
        assert!(MasterKeys::new().verify_whitelist(&letter).is_err());
        assert!(MasterKeys::from_pem(b"").is_err());
        assert!(
            MasterKeys::from_pem(b"-----BEGIN PUBLIC KEY-----\nAQ==\n-----END PUBLIC KEY-----\n").is_err()
        );
    }
}
