//! What a request shows to prove that its caller may read (client behaviour §13).
//!
//! Credentials are shown to https servers only, and not to those that a redirect leads to.

use cvmfs_format::hash::{ContentHash, HashAlgorithm};
use hyper::header::HeaderValue;

use crate::authz::Credentials;

/// The `Authorization` header of a bearer token. One that does not fit into a header is no token.
pub(super) fn authorization(credentials: &Credentials) -> Option<HeaderValue> {
    let Credentials::Bearer(token) = credentials else { return None };
    let mut value = HeaderValue::try_from(format!("Bearer {}", token.trim())).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// Text and identity of a client certificate: connections of different users are not shared.
pub(super) fn certificate(credentials: &Credentials) -> Option<(u64, &[u8])> {
    let Credentials::X509Proxy(pem) = credentials else { return None };
    let [a, b, c, d, e, f, g, h, ..] = ContentHash::of(HashAlgorithm::Sha1, pem).digest;
    Some((u64::from_be_bytes([a, b, c, d, e, f, g, h]), pem))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_becomes_a_header_that_is_not_shown() {
        let header = authorization(&Credentials::Bearer("sesame\n".to_owned())).unwrap();
        assert_eq!(header.to_str().unwrap(), "Bearer sesame");
        assert!(!format!("{header:?}").contains("sesame"));
        assert!(authorization(&Credentials::Bearer("a\r\nb".to_owned())).is_none());
    }

    #[test]
    fn users_with_different_certificates_have_different_identities() {
        let identity = |pem: &[u8]| certificate(&Credentials::X509Proxy(pem.to_vec())).map(|(id, _)| id);
        assert_eq!(identity(b"a"), identity(b"a"));
        assert_ne!(identity(b"a"), identity(b"b"));
    }
}
