//! A new repository's keys: master key pair, release key and its certificate (repository format §5, §6.4).

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use der::asn1::GeneralizedTime;
use rand::TryRng;
use rand::rngs::SysRng;
use rsa::pkcs1v15::SigningKey;
use rsa::pkcs8::EncodePublicKey;
use sha2::Sha256;
use x509_cert::TbsCertificate;
use x509_cert::builder::profile::BuilderProfile;
use x509_cert::builder::{Builder, CertificateBuilder};
use x509_cert::ext::Extension;
use x509_cert::name::Name;
use x509_cert::serial_number::SerialNumber;
use x509_cert::spki::{SubjectPublicKeyInfoOwned, SubjectPublicKeyInfoRef};
use x509_cert::time::{Time, Validity};

use super::SignatureError;
use super::private_key::{PrivateKey, failed};
use crate::manifest::is_valid_fqrn;
use crate::pem::encode;

/// Modulus of new keys in bits.
const KEY_BITS: usize = 2048;

/// Validity of a new certificate; clients do not check it, the whitelist's expiry counts.
const VALIDITY: i64 = 365 * 24 * 3600;

/// Bytes of the repository name that fit into the certificate's common name, which X.509 limits to 64 characters.
const MAX_NAME_IN_SUBJECT: usize = 30;

/// The files of a new repository's key directory, as PEM text.
#[derive(Clone)]
pub struct KeyChain {
    /// `<fqrn>.masterkey`, secret: signs whitelists.
    pub masterkey_pem: String,
    /// `<fqrn>.pub`: what clients trust.
    pub master_public_pem: String,
    /// `<fqrn>.key`, secret: signs manifests.
    pub key_pem: String,
    /// `<fqrn>.crt`: certificate of the release key.
    pub certificate_pem: String,
}

impl fmt::Debug for KeyChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyChain").field("master_public_pem", &self.master_public_pem).finish_non_exhaustive()
    }
}

/// Makes two RSA keys of 2048 bits and a self-signed certificate that is valid for 365 days from `now` (Unix time).
pub fn generate_keys(fqrn: &str, now: i64) -> Result<KeyChain, SignatureError> {
    if !is_valid_fqrn(fqrn) {
        return Err(failed("generate keys", format_args!("{fqrn:?} is not a valid repository name")));
    }
    let master = new_key()?;
    let key = new_key()?;
    Ok(KeyChain {
        masterkey_pem: master.to_pem()?,
        master_public_pem: master.public_pem()?,
        key_pem: key.to_pem()?,
        certificate_pem: self_signed(fqrn, now, key)?,
    })
}

fn new_key() -> Result<PrivateKey, SignatureError> {
    rsa::PrivateKey::new(&mut SysRng, KEY_BITS).map(PrivateKey).map_err(|error| failed("generate key", error))
}

/// `CN=<fqrn> CernVM-FS Release Managers`, the name cut to 30 bytes and marked if it is longer.
fn subject(fqrn: &str) -> String {
    match fqrn.get(..MAX_NAME_IN_SUBJECT) {
        Some(cut) if fqrn.len() > MAX_NAME_IN_SUBJECT => format!("CN={cut}[...] CernVM-FS Release Managers"),
        _ => format!("CN={fqrn} CernVM-FS Release Managers"),
    }
}

fn self_signed(fqrn: &str, now: i64, key: PrivateKey) -> Result<String, SignatureError> {
    build(fqrn, now, key).map_err(|error| failed("make certificate", error))
}

fn build(fqrn: &str, now: i64, key: PrivateKey) -> Result<String, x509_cert::builder::Error> {
    use der::Encode;

    let profile = SelfSigned(Name::from_str(&subject(fqrn))?);
    let validity = Validity::new(time(now)?, time(now.saturating_add(VALIDITY))?);
    let public = key.0.as_public_key().to_public_key_der()?;
    let public = SubjectPublicKeyInfoOwned::try_from(public.as_bytes())?;
    // The leading byte keeps the number positive and free of leading zeros.
    let mut serial = [0x40; 17];
    SysRng
        .try_fill_bytes(&mut serial[1..])
        .map_err(|_| x509_cert::builder::Error::Signature(Default::default()))?;
    let serial = SerialNumber::new(&serial)?;
    let signer = SigningKey::<Sha256>::new(key.0);
    let certificate = CertificateBuilder::new(profile, serial, validity, public)?
        .build::<_, rsa::pkcs1v15::Signature>(&signer)?;
    encode("CERTIFICATE", &certificate.to_der()?).ok_or(x509_cert::builder::Error::MissingAttributes)
}

fn time(unix: i64) -> Result<Time, der::Error> {
    let duration = Duration::from_secs(u64::try_from(unix).map_err(|_| der::ErrorKind::DateTime)?);
    GeneralizedTime::from_unix_duration(duration).map(Time::GeneralTime)
}

/// Issuer is subject and there are no extensions, as in the certificates that the C++ tools make.
struct SelfSigned(Name);

impl BuilderProfile for SelfSigned {
    fn get_issuer(&self, subject: &Name) -> Name {
        subject.clone()
    }

    fn get_subject(&self) -> Name {
        self.0.clone()
    }

    fn build_extensions(
        &self,
        _: SubjectPublicKeyInfoRef<'_>,
        _: SubjectPublicKeyInfoRef<'_>,
        _: &TbsCertificate,
    ) -> x509_cert::builder::Result<Vec<Extension>> {
        Ok(Vec::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_are_cut_in_the_certificates_subject() {
        assert_eq!(subject("a.example.org"), "CN=a.example.org CernVM-FS Release Managers");
        let (thirty, more) = ("a".repeat(30), "a".repeat(31));
        assert_eq!(subject(&thirty), format!("CN={thirty} CernVM-FS Release Managers"));
        assert_eq!(subject(&more), format!("CN={thirty}[...] CernVM-FS Release Managers"));
    }

    #[test]
    fn an_unusable_name_or_time_is_refused() {
        assert!(generate_keys("../x", 0).is_err());
        assert!(generate_keys("", 0).is_err());
        assert!(time(-1).is_err());
    }
}
