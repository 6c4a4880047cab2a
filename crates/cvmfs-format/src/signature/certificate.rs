//! The release certificate (repository format §5): names the key that signs manifests.

use std::fmt;

use der::asn1::AnyRef;
use der::{Decode, Encode};
use rsa::pkcs8::DecodePublicKey;
use sha1::Sha1;
use x509_cert::certificate::{CertificateInner, Raw};

use super::SignatureError;
use crate::hash::{ContentHash, HashAlgorithm};
use crate::letter::Letter;
use crate::pem::{PemError, blocks};

const WHAT: &str = "certificate";

/// An X.509 certificate with an RSA key.
#[derive(Clone)]
pub struct Certificate {
    pem: Vec<u8>,
    der: Vec<u8>,
    subject: String,
    key: rsa::PublicKey,
}

impl Certificate {
    /// Reads the first certificate of a PEM text: `CERTIFICATE`, `X509 CERTIFICATE` or, as OpenSSL writes for
    /// certificates with attached trust settings, `TRUSTED CERTIFICATE`.
    pub fn from_pem(pem: &[u8]) -> Result<Self, SignatureError> {
        let unusable = |reason: String| SignatureError::Unusable { what: WHAT, reason };
        let block = blocks(pem)
            .and_then(|blocks| {
                blocks
                    .into_iter()
                    .find(|block| block.label.ends_with("CERTIFICATE"))
                    .ok_or(PemError::NoBlock { wanted: "CERTIFICATE" })
            })
            .map_err(|source| SignatureError::Pem { what: WHAT, source })?;
        // Trust settings follow the certificate as a second DER value; they are no part of the fingerprint.
        let (_, rest) = AnyRef::from_der_partial(&block.der).map_err(|error| unusable(error.to_string()))?;
        if !rest.is_empty() && !block.label.starts_with("TRUSTED") {
            return Err(unusable(format!("{} bytes follow the certificate", rest.len())));
        }
        let der = block.der[..block.der.len() - rest.len()].to_vec();
        let parsed: CertificateInner<Raw> =
            Decode::from_der(&der).map_err(|error: der::Error| unusable(error.to_string()))?;
        let parsed = parsed.tbs_certificate();
        let key = parsed.subject_public_key_info().to_der().map_err(|error| unusable(error.to_string()))?;
        let key = rsa::PublicKey::from_public_key_der(&key).map_err(|error| unusable(error.to_string()))?;
        Ok(Self { pem: pem.to_vec(), subject: parsed.subject().to_string(), der, key })
    }

    /// Hash of the certificate's DER form, as whitelists list it.
    pub fn fingerprint(&self, algorithm: HashAlgorithm) -> ContentHash {
        ContentHash::of(algorithm, &self.der)
    }

    /// Verifies the signature of a manifest.
    pub fn verify_manifest(&self, letter: &Letter<'_>) -> Result<(), SignatureError> {
        self.key
            .pkcs1v15_verify::<Sha1>(letter.hash_text, letter.signature)
            .map_err(|_| SignatureError::Manifest)
    }

    /// The PEM text as it was read: the plain bytes of the certificate object.
    pub fn pem(&self) -> &[u8] {
        &self.pem
    }

    /// The subject, such as `CN=example.cern.ch CernVM-FS Release Managers`.
    pub fn subject(&self) -> &str {
        &self.subject
    }

    pub(super) fn der(&self) -> &[u8] {
        &self.der
    }

    pub(super) fn key(&self) -> &rsa::PublicKey {
        &self.key
    }
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificate")
            .field("subject", &self.subject)
            .field("fingerprint", &self.fingerprint(HashAlgorithm::Sha1).to_fingerprint())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pem::encode;
    use crate::signature::generate_keys;

    #[test]
    fn a_trusted_certificate_has_the_fingerprint_of_the_plain_one() {
        let pem = generate_keys("example.cern.ch", 1_700_000_000).unwrap().certificate_pem;
        let plain = Certificate::from_pem(pem.as_bytes()).unwrap();
        assert_eq!(plain.pem(), pem.as_bytes());
        assert_eq!(plain.subject(), "CN=example.cern.ch CernVM-FS Release Managers");
        let with_settings = [plain.der.as_slice(), &[0x30, 2, 5, 0]].concat();
        let trusted = encode("TRUSTED CERTIFICATE", &with_settings).unwrap();
        let trusted = Certificate::from_pem(trusted.as_bytes()).unwrap();
        for algorithm in HashAlgorithm::ALL {
            assert_eq!(trusted.fingerprint(algorithm), plain.fingerprint(algorithm));
        }
        let odd = encode("CERTIFICATE", &with_settings).unwrap();
        assert!(Certificate::from_pem(odd.as_bytes()).is_err());
    }

    #[test]
    fn what_is_no_certificate_is_refused_with_the_reason() {
        let error = Certificate::from_pem(b"hello").unwrap_err();
        assert!(matches!(error, SignatureError::Pem { source: PemError::NoBlock { .. }, .. }), "{error:?}");
        let error = Certificate::from_pem(b"-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n")
            .unwrap_err();
        assert!(matches!(error, SignatureError::Unusable { .. }), "{error:?}");
    }
}
