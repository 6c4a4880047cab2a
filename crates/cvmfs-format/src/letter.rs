//! Signed text: the common form of manifest and whitelist (repository format §4.2, §6.1).
//!
//! ```text
//! <text, every line ended by a newline>
//! --
//! <hash of the text including its last newline>
//! <raw signature up to the end of the file>
//! ```
//!
//! The signed message is the *text form* of the hash. Which signature scheme applies depends on the document, see
//! [`crate::signature`].

use crate::hash::{ContentHash, HashAlgorithm, MAX_HASH_TEXT};

/// Largest manifest or whitelist accepted: real ones have a few hundred bytes, a whitelist line about 70.
pub const MAX_LETTER: usize = 64 * 1024;

/// Largest signature: an RSA key of 8192 bits, the largest the verification accepts.
const MAX_SIGNATURE: usize = 1024;

const SEPARATOR: &[u8] = b"\n--\n";

/// A signed text cut into its parts, with the hash of the text verified; the signature is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Letter<'a> {
    /// The text up to and including the newline before `--`.
    pub text: &'a [u8],
    /// The hash of the text.
    pub hash: ContentHash,
    /// The hash as written: the message that is signed.
    pub hash_text: &'a [u8],
    /// The signature, raw.
    pub signature: &'a [u8],
}

/// Why a file is not a signed text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LetterError {
    /// More than [`MAX_LETTER`] bytes.
    #[error("signed text has {0} bytes, more than the {MAX_LETTER} allowed")]
    TooLarge(usize),
    /// There is no line `--`.
    #[error("no signature found (line `--` missing, file incomplete?)")]
    NoSeparator,
    /// The line after `--` is no hash.
    #[error("malformed hash line after `--` (file incomplete?)")]
    BadHashLine,
    /// The signature is empty or longer than any key allows.
    #[error("signature of {0} bytes, expected the length of an RSA key")]
    BadSignatureLength(usize),
    /// The text does not have the hash that the hash line states.
    #[error("text was changed: its hash is {found}, the signed hash is {expected}")]
    HashMismatch {
        /// Hash of the text.
        found: ContentHash,
        /// Hash line.
        expected: ContentHash,
    },
}

impl<'a> Letter<'a> {
    /// Cuts a signed text and verifies the hash over the text.
    pub fn parse(file: &'a [u8]) -> Result<Self, LetterError> {
        if file.len() > MAX_LETTER {
            return Err(LetterError::TooLarge(file.len()));
        }
        let end = file
            .windows(SEPARATOR.len())
            .position(|window| window == SEPARATOR)
            .ok_or(LetterError::NoSeparator)?;
        let (text, rest) = (&file[..end + 1], &file[end + SEPARATOR.len()..]);
        let newline = rest
            .iter()
            .take(MAX_HASH_TEXT + 1)
            .position(|byte| *byte == b'\n')
            .ok_or(LetterError::BadHashLine)?;
        let (hash_text, signature) = (&rest[..newline], &rest[newline + 1..]);
        let expected = ContentHash::parse(hash_text).map_err(|_| LetterError::BadHashLine)?;
        if signature.is_empty() || signature.len() > MAX_SIGNATURE {
            return Err(LetterError::BadSignatureLength(signature.len()));
        }
        let found = ContentHash::of(expected.algorithm, text);
        if found != expected {
            return Err(LetterError::HashMismatch { found, expected });
        }
        Ok(Self { text, hash: expected, hash_text, signature })
    }
}

/// Signs a text: appends `--`, the hash in the given algorithm and what `sign` makes of the hash's text form.
///
/// `sign` is [`PrivateKey::sign_manifest`](crate::signature::PrivateKey::sign_manifest) or
/// [`PrivateKey::sign_whitelist`](crate::signature::PrivateKey::sign_whitelist). A last newline is added to the text
/// if it lacks one.
pub fn seal<E>(
    mut text: Vec<u8>,
    algorithm: HashAlgorithm,
    sign: impl FnOnce(&[u8]) -> Result<Vec<u8>, E>,
) -> Result<Vec<u8>, E> {
    if text.last() != Some(&b'\n') {
        text.push(b'\n');
    }
    let hash = ContentHash::of(algorithm, &text).to_string();
    let signature = sign(hash.as_bytes())?;
    text.extend_from_slice(b"--\n");
    text.extend_from_slice(hash.as_bytes());
    text.push(b'\n');
    text.extend_from_slice(&signature);
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    fn sealed(text: &[u8], algorithm: HashAlgorithm) -> Vec<u8> {
        seal(text.to_vec(), algorithm, |message| Ok::<_, Infallible>(message.to_vec())).unwrap()
    }

    #[test]
    fn a_sealed_text_comes_back_in_every_algorithm() {
        for algorithm in HashAlgorithm::ALL {
            let file = sealed(b"Cabc\nS1\n", algorithm);
            let letter = Letter::parse(&file).unwrap();
            assert_eq!(letter.text, b"Cabc\nS1\n");
            assert_eq!(letter.hash, ContentHash::of(algorithm, b"Cabc\nS1\n"));
            assert_eq!(letter.signature, letter.hash_text);
        }
        assert_eq!(sealed(b"a", HashAlgorithm::Sha1), sealed(b"a\n", HashAlgorithm::Sha1));
    }

    #[test]
    fn a_signature_may_contain_the_separator() {
        let file = seal(b"a\n".to_vec(), HashAlgorithm::Sha1, |_| Ok::<_, Infallible>(b"x\n--\ny".to_vec()))
            .unwrap();
        assert_eq!(Letter::parse(&file).unwrap().signature, b"x\n--\ny");
    }

    #[test]
    fn a_changed_cut_or_oversized_file_is_refused_with_the_reason() {
        let file = sealed(b"Cabc\nS1\n", HashAlgorithm::Sha1);
        let mut changed = file.clone();
        changed[1] = b'x';
        assert!(matches!(Letter::parse(&changed), Err(LetterError::HashMismatch { .. })));
        for end in 0..=file.len() - 40 {
            assert!(Letter::parse(&file[..end]).is_err(), "{end}");
        }
        assert_eq!(Letter::parse(b"abc"), Err(LetterError::NoSeparator));
        assert_eq!(Letter::parse(b"abc\n--\nabc\n"), Err(LetterError::BadHashLine));
        assert_eq!(Letter::parse(&vec![0; MAX_LETTER + 1]), Err(LetterError::TooLarge(MAX_LETTER + 1)));
        let long = [&file[..file.len() - 40], &[0; 1025]].concat();
        assert_eq!(Letter::parse(&long), Err(LetterError::BadSignatureLength(1025)));
    }
}
