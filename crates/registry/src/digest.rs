//! Content digests of registries: `sha256:<hex>`.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest as _, Sha256, Sha512};

/// The digest of a blob or manifest. Only algorithms that we can verify are accepted.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest {
    algorithm: Algorithm,
    hex: String,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Algorithm {
    Sha256,
    Sha512,
}

/// Not a digest, or one of an algorithm that cannot be verified.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0:?} is not a digest of the form sha256:<64 lower case hexadecimal digits>")]
pub struct InvalidDigest(String);

impl Digest {
    /// The SHA-256 of `bytes`.
    pub fn sha256_of(bytes: &[u8]) -> Self {
        let mut digester = Digester::sha256();
        digester.update(bytes);
        digester.finish()
    }

    /// The name of the algorithm, `sha256` or `sha512`.
    pub fn algorithm(&self) -> &'static str {
        match self.algorithm {
            Algorithm::Sha256 => "sha256",
            Algorithm::Sha512 => "sha512",
        }
    }

    /// The hexadecimal part, lower case.
    pub fn hex(&self) -> &str {
        &self.hex
    }
}

impl FromStr for Digest {
    type Err = InvalidDigest;

    fn from_str(text: &str) -> Result<Self, InvalidDigest> {
        let invalid = || InvalidDigest(text.chars().take(200).collect());
        let (algorithm, hex) = text.split_once(':').ok_or_else(invalid)?;
        let (algorithm, length) = match algorithm {
            "sha256" => (Algorithm::Sha256, 64),
            "sha512" => (Algorithm::Sha512, 128),
            _ => return Err(invalid()),
        };
        let lower_case = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if hex.len() != length || !hex.bytes().all(lower_case) {
            return Err(invalid());
        }
        Ok(Self { algorithm, hex: hex.to_owned() })
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm(), self.hex)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Computes a digest incrementally.
pub struct Digester(State);

enum State {
    Sha256(Sha256),
    Sha512(Sha512),
}

impl Digester {
    /// A digester for SHA-256.
    pub fn sha256() -> Self {
        Self(State::Sha256(Sha256::new()))
    }

    /// A digester for the algorithm of `expected`.
    pub fn like(expected: &Digest) -> Self {
        match expected.algorithm {
            Algorithm::Sha256 => Self::sha256(),
            Algorithm::Sha512 => Self(State::Sha512(Sha512::new())),
        }
    }

    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            State::Sha256(state) => state.update(bytes),
            State::Sha512(state) => state.update(bytes),
        }
    }

    /// The digest of all bytes so far.
    pub fn finish(self) -> Digest {
        match self.0 {
            State::Sha256(state) => {
                Digest { algorithm: Algorithm::Sha256, hex: hex::encode(state.finalize()) }
            }
            State::Sha512(state) => {
                Digest { algorithm: Algorithm::Sha512, hex: hex::encode(state.finalize()) }
            }
        }
    }
}

impl fmt::Debug for Digester {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Digester")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_sha256sum_and_sha512sum() {
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::sha256_of(b"").to_string(), empty);
        let abc512 = "sha512:ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f";
        let mut digester = Digester::like(&abc512.parse().unwrap());
        digester.update(b"abc");
        assert_eq!(digester.finish().to_string(), abc512);
    }

    #[test]
    fn what_cannot_be_verified_is_no_digest() {
        let upper = format!("sha256:{}", "A".repeat(64));
        let long = format!("sha256:{}", "a".repeat(65));
        let path = format!("sha256:../{}", "a".repeat(61));
        for text in ["", "sha256", "sha256:", "md5:d41d8cd98f00b204e9800998ecf8427e", &upper, &long, &path] {
            assert!(text.parse::<Digest>().is_err(), "{text:?}");
        }
    }
}
