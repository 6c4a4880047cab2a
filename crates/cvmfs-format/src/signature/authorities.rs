//! The certificate authorities that a site trusts (repository format §6.1, §6.3).
//!
//! A whitelist with the line `Wcachain` demands that the signing certificate is not only listed but also issued by
//! such an authority: a chain of certificates, each within its time, signed by the next one, which is a certificate
//! authority, up to a self-signed one of the site's; and none of them in its issuer's revocation list, which must be
//! there and current. Signatures are RSA, as everything in this format.

use std::fmt;

use der::asn1::{AnyRef, ObjectIdentifier};
use der::{Decode, Encode};
use rsa::pkcs8::DecodePublicKey;
use x509_cert::certificate::{CertificateInner, Raw};
use x509_cert::crl::CertificateList;
use x509_cert::ext::Extensions;
use x509_cert::ext::pkix::{BasicConstraints, KeyUsage};
use x509_cert::spki::AlgorithmIdentifierOwned;

use super::Certificate;
use crate::pem::blocks;

/// Longest chain from the signing certificate to a self-signed one; real ones have two or three links.
const MAX_CHAIN: usize = 8;

/// Extensions that may be critical: constraints, key usage, extended key usage, policies. The last two do not matter
/// for this purpose; any other critical one must be understood and is not.
const UNDERSTOOD: [ObjectIdentifier; 4] = [
    ObjectIdentifier::new_unwrap("2.5.29.19"),
    ObjectIdentifier::new_unwrap("2.5.29.15"),
    ObjectIdentifier::new_unwrap("2.5.29.37"),
    ObjectIdentifier::new_unwrap("2.5.29.32"),
];

/// Why a certificate is not accepted as issued by one of the authorities.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// There are no authorities.
    #[error("no certificate authorities are configured")]
    NoAuthorities,
    /// A certificate of the chain is outside of its time.
    #[error("certificate {0} is not valid at this time")]
    Time(String),
    /// The issuer is not among the authorities, or did not sign.
    #[error("no trusted certificate authority has issued {0}")]
    NoIssuer(String),
    /// The issuer has published no list, or none that is current.
    #[error("there is no current revocation list of the issuer of {0}")]
    NoRevocationList(String),
    /// A certificate was withdrawn.
    #[error("certificate {0} is revoked")]
    Revoked(String),
    /// A certificate has properties that cannot be judged here.
    #[error("certificate {subject}: {reason}")]
    Unsupported {
        /// Its subject.
        subject: String,
        /// What is not supported.
        reason: String,
    },
    /// The chain does not end.
    #[error("the chain of certificates is longer than {MAX_CHAIN}")]
    TooLong,
}

/// Certificates of authorities and their revocation lists.
#[derive(Default)]
pub struct Authorities {
    certificates: Vec<Link>,
    lists: Vec<RevocationList>,
}

impl Authorities {
    /// None; nothing verifies.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds all certificates and revocation lists of a PEM text. What cannot be read is left out: directories of
    /// authorities hold files of many kinds, and a missing link is noticed when it is needed.
    pub fn add_pem(&mut self, text: &[u8]) {
        for block in blocks(text).unwrap_or_default() {
            if block.label.ends_with("CERTIFICATE") {
                self.certificates.extend(Link::parse(&block.der));
            } else if block.label == "X509 CRL" {
                self.lists.extend(RevocationList::parse(&block.der));
            }
        }
    }

    /// Verifies the chain of `certificate` at a Unix time.
    ///
    /// # Errors
    /// [`ChainError`] of the first link that is broken.
    pub fn verify(&self, certificate: &Certificate, unix_now: i64) -> Result<(), ChainError> {
        if self.certificates.is_empty() {
            return Err(ChainError::NoAuthorities);
        }
        let unreadable = || ChainError::Unsupported {
            subject: certificate.subject().to_owned(),
            reason: "it cannot be read".to_owned(),
        };
        let leaf = Link::parse(certificate.der()).ok_or_else(unreadable)?;
        let mut link = &leaf;
        for depth in 0..MAX_CHAIN {
            link.check(unix_now)?;
            let issuer = self.issuer_of(link, depth, unix_now)?;
            self.check_revocation(link, issuer, unix_now)?;
            if issuer.is_self_issued() {
                issuer.check(unix_now)?;
                return self.check_revocation(issuer, issuer, unix_now);
            }
            link = issuer;
        }
        Err(ChainError::TooLong)
    }

    /// The authority that signed `link`. A renewed authority has several certificates: one that is valid now counts.
    fn issuer_of(&self, link: &Link, depth: usize, now: i64) -> Result<&Link, ChainError> {
        let signed = |candidate: &&Link| {
            candidate.subject == link.issuer
                && candidate.may_issue(depth)
                && candidate.verifies(&link.signed, &link.algorithm, &link.signature)
        };
        let mut candidates = self.certificates.iter().filter(signed).peekable();
        let first = candidates.peek().copied();
        let valid = candidates.find(|candidate| candidate.check(now).is_ok());
        valid.or(first).ok_or_else(|| ChainError::NoIssuer(link.name.clone()))
    }

    fn check_revocation(&self, link: &Link, issuer: &Link, now: i64) -> Result<(), ChainError> {
        let mut lists = self.lists.iter().filter(|list| {
            list.issuer == issuer.subject
                && list.is_current(now)
                && issuer.verifies(&list.signed, &list.algorithm, &list.signature)
        });
        let list = lists.next().ok_or_else(|| ChainError::NoRevocationList(link.name.clone()))?;
        // Several current lists of one issuer: each may revoke.
        let is_revoked = |list: &RevocationList| list.serials.contains(&link.serial);
        if is_revoked(list) || lists.any(is_revoked) {
            return Err(ChainError::Revoked(link.name.clone()));
        }
        Ok(())
    }
}

impl fmt::Debug for Authorities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authorities")
            .field("certificates", &self.certificates.len())
            .field("revocation_lists", &self.lists.len())
            .finish()
    }
}

/// A certificate as a link of a chain.
struct Link {
    name: String,
    /// DER, for comparison.
    subject: Vec<u8>,
    issuer: Vec<u8>,
    serial: Vec<u8>,
    not_before: i64,
    not_after: i64,
    key: Option<rsa::PublicKey>,
    constraints: Option<BasicConstraints>,
    usage: Option<KeyUsage>,
    not_understood: Option<ObjectIdentifier>,
    signed: Vec<u8>,
    algorithm: AlgorithmIdentifierOwned,
    signature: Vec<u8>,
}

impl Link {
    fn parse(der: &[u8]) -> Option<Self> {
        // Trust settings may follow the certificate.
        let (_, rest) = AnyRef::from_der_partial(der).ok()?;
        let der = der.get(..der.len() - rest.len())?;
        let certificate: CertificateInner<Raw> = Decode::from_der(der).ok()?;
        let parsed = certificate.tbs_certificate();
        let key = parsed.subject_public_key_info().to_der().ok()?;
        Some(Self {
            name: format!("'{}'", parsed.subject()),
            subject: parsed.subject().to_der().ok()?,
            issuer: parsed.issuer().to_der().ok()?,
            serial: parsed.serial_number().as_bytes().to_vec(),
            not_before: unix(parsed.validity().not_before)?,
            not_after: unix(parsed.validity().not_after)?,
            key: rsa::PublicKey::from_public_key_der(&key).ok(),
            constraints: extension(parsed.extensions())?,
            usage: extension(parsed.extensions())?,
            not_understood: critical(parsed.extensions()),
            signed: signed_part(der)?,
            algorithm: certificate.signature_algorithm().clone(),
            signature: certificate.signature().as_bytes()?.to_vec(),
        })
    }

    fn is_self_issued(&self) -> bool {
        self.subject == self.issuer
    }

    /// Whether it may take part in a chain now.
    fn check(&self, now: i64) -> Result<(), ChainError> {
        if now < self.not_before || now > self.not_after {
            return Err(ChainError::Time(self.name.clone()));
        }
        match self.not_understood {
            Some(extension) => Err(ChainError::Unsupported {
                subject: self.name.clone(),
                reason: format!("its critical extension {extension} is not supported"),
            }),
            None => Ok(()),
        }
    }

    /// Whether it is an authority that may have `depth` others below it.
    fn may_issue(&self, depth: usize) -> bool {
        let has_room = |constraints: &BasicConstraints| {
            constraints.path_len_constraint.is_none_or(|most| depth <= usize::from(most))
        };
        self.constraints.as_ref().is_some_and(|constraints| constraints.ca && has_room(constraints))
            && self.usage.as_ref().is_none_or(KeyUsage::key_cert_sign)
    }

    fn verifies(&self, message: &[u8], algorithm: &AlgorithmIdentifierOwned, signature: &[u8]) -> bool {
        let Some(key) = &self.key else { return false };
        match algorithm.oid.to_string().as_str() {
            "1.2.840.113549.1.1.5" => key.pkcs1v15_verify::<sha1::Sha1>(message, signature),
            "1.2.840.113549.1.1.11" => key.pkcs1v15_verify::<sha2::Sha256>(message, signature),
            "1.2.840.113549.1.1.12" => key.pkcs1v15_verify::<sha2::Sha384>(message, signature),
            "1.2.840.113549.1.1.13" => key.pkcs1v15_verify::<sha2::Sha512>(message, signature),
            _ => return false,
        }
        .is_ok()
    }
}

/// A list of withdrawn certificates.
struct RevocationList {
    issuer: Vec<u8>,
    this_update: i64,
    next_update: Option<i64>,
    serials: Vec<Vec<u8>>,
    signed: Vec<u8>,
    algorithm: AlgorithmIdentifierOwned,
    signature: Vec<u8>,
}

impl RevocationList {
    /// `None` also for a list with a critical extension: it may cover a part of the certificates only.
    fn parse(der: &[u8]) -> Option<Self> {
        let list: CertificateList<Raw> = Decode::from_der(der).ok()?;
        let parsed = &list.tbs_cert_list;
        if critical(parsed.crl_extensions.as_ref()).is_some() {
            return None;
        }
        let revoked = parsed.revoked_certificates.iter().flatten();
        Some(Self {
            issuer: parsed.issuer.to_der().ok()?,
            this_update: unix(parsed.this_update)?,
            next_update: match parsed.next_update {
                Some(time) => Some(unix(time)?),
                None => None,
            },
            serials: revoked.map(|entry| entry.serial_number.as_bytes().to_vec()).collect(),
            signed: signed_part(der)?,
            algorithm: list.signature_algorithm.clone(),
            signature: list.signature.as_bytes()?.to_vec(),
        })
    }

    fn is_current(&self, now: i64) -> bool {
        self.this_update <= now && self.next_update.is_none_or(|next| now <= next)
    }
}

fn unix(time: x509_cert::time::Time) -> Option<i64> {
    i64::try_from(time.to_unix_duration().as_secs()).ok()
}

/// The bytes that a signature covers: the first element of the outer sequence, as they are.
fn signed_part(der: &[u8]) -> Option<Vec<u8>> {
    let outer = AnyRef::from_der(der).ok()?.value();
    let (_, rest) = AnyRef::from_der_partial(outer).ok()?;
    Some(outer.get(..outer.len() - rest.len())?.to_vec())
}

/// The value of an extension: `Some(None)` if there is none, `None` if it cannot be read.
fn extension<T: for<'a> Decode<'a> + der::oid::AssociatedOid>(
    extensions: Option<&Extensions>,
) -> Option<Option<T>> {
    match extensions.into_iter().flatten().find(|extension| extension.extn_id == T::OID) {
        Some(extension) => T::from_der(extension.extn_value.as_bytes()).ok().map(Some),
        None => Some(None),
    }
}

/// A critical extension that is not understood.
fn critical(extensions: Option<&Extensions>) -> Option<ObjectIdentifier> {
    let mut critical = extensions.into_iter().flatten().filter(|extension| extension.critical);
    critical.find(|extension| !UNDERSTOOD.contains(&extension.extn_id)).map(|extension| extension.extn_id)
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use super::*;

    /// An authority of its own, an intermediate one, and a signing certificate, made by OpenSSL.
    const SCRIPT: &str = r#"
set -e
authority() { # name
  mkdir -p $1; : > $1/index; echo 1000 > $1/serial; echo 1000 > $1/crlnumber
  cat > $1.cnf <<END
[ca]
default_ca=d
[d]
dir=$1
database=$1/index
serial=$1/serial
crlnumber=$1/crlnumber
new_certs_dir=$1
certificate=$1.pem
private_key=$1.key
default_md=sha256
default_days=30
default_crl_days=30
policy=p
[p]
commonName=supplied
[authority]
basicConstraints=critical,CA:TRUE
keyUsage=critical,keyCertSign,cRLSign
[plain]
basicConstraints=CA:FALSE
END
}
request() { openssl req -new -newkey rsa:2048 -nodes -keyout $1.key -subj "/CN=$1" -out $1.req -batch; }
issue() { openssl ca -batch -notext -config $1.cnf -extensions $3 -in $2.req -out $2.pem; }
lists() { openssl ca -config $1.cnf -gencrl -out $1.crl; }
authority root; authority middle; authority other
for name in root other; do
  request $name
  openssl ca -batch -notext -selfsign -config $name.cnf -keyfile $name.key -extensions authority -in $name.req -out $name.pem
done
request middle; issue root middle authority
request signer; issue middle signer plain
request forger; issue other forger plain
for name in root middle other; do lists $name; done
cp middle.crl middle_before.crl
openssl ca -config middle.cnf -revoke signer.pem
lists middle
"#;

    struct Made(tempfile::TempDir);

    impl Made {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let made =
                Command::new("sh").args(["-c", SCRIPT]).current_dir(directory.path()).output().unwrap();
            assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
            Self(directory)
        }

        fn read(&self, name: &str) -> Vec<u8> {
            std::fs::read(Path::new(self.0.path()).join(name)).unwrap()
        }

        fn verify(&self, certificate: &str, trusted: &[&str], days: i64) -> Result<(), ChainError> {
            let mut authorities = Authorities::new();
            for name in trusted {
                authorities.add_pem(&self.read(name));
            }
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
            let certificate = Certificate::from_pem(&self.read(certificate)).unwrap();
            authorities.verify(&certificate, i64::try_from(now).unwrap() + days * 86_400)
        }
    }

    #[test]
    fn a_certificate_is_accepted_through_its_chain_and_refused_without_any_of_its_parts() {
        let made = Made::new();
        let whole = ["root.pem", "root.crl", "middle.pem", "middle_before.crl", "other.pem", "other.crl"];
        made.verify("signer.pem", &whole, 0).unwrap();
        made.verify("forger.pem", &whole, 0).unwrap();
        let without =
            |missing: &str| -> Vec<&str> { whole.into_iter().filter(|name| *name != missing).collect() };
        for (missing, words) in [
            ("root.pem", "no trusted certificate authority has issued 'CN=middle'"),
            ("middle.pem", "no trusted certificate authority has issued 'CN=signer'"),
            ("root.crl", "no current revocation list of the issuer of 'CN=middle'"),
            ("middle_before.crl", "no current revocation list of the issuer of 'CN=signer'"),
        ] {
            let error = made.verify("signer.pem", &without(missing), 0).unwrap_err().to_string();
            assert!(error.contains(words), "without {missing}: {error}");
        }
        let error = made.verify("forger.pem", &["root.pem", "root.crl"], 0).unwrap_err();
        assert!(matches!(error, ChainError::NoIssuer(_)), "{error}");
        assert_eq!(made.verify("signer.pem", &[], 0), Err(ChainError::NoAuthorities));
        for days in [-2, 40] {
            let error = made.verify("signer.pem", &whole, days).unwrap_err();
            assert!(matches!(error, ChainError::Time(_)), "{days}: {error}");
        }
    }

    #[test]
    fn a_revoked_certificate_is_refused_also_if_an_older_list_does_not_know() {
        let made = Made::new();
        for lists in [&["middle.crl"][..], &["middle_before.crl", "middle.crl"]] {
            let trusted = [&["root.pem", "root.crl", "middle.pem"][..], lists].concat();
            let error = made.verify("signer.pem", &trusted, 0).unwrap_err();
            assert_eq!(error, ChainError::Revoked("'CN=signer'".to_owned()));
        }
    }

    #[test]
    fn rubbish_among_the_authorities_is_left_out() {
        let mut authorities = Authorities::new();
        authorities.add_pem(b"rubbish");
        authorities.add_pem(b"-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n");
        authorities.add_pem(b"-----BEGIN X509 CRL-----\nMAA=\n-----END X509 CRL-----\n");
        assert_eq!(format!("{authorities:?}"), "Authorities { certificates: 0, revocation_lists: 0 }");
    }
}
