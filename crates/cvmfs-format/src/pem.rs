//! PEM blocks, read as leniently as OpenSSL does: any line width, text around the blocks, several blocks per file.

use der::pem::LineEnding;

use crate::hash::shown;

/// Largest PEM text accepted; an RSA key of 8192 bits takes 7 KiB.
const MAX_PEM: usize = 256 * 1024;

/// Why a text holds no usable PEM block.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PemError {
    /// More bytes than any key or certificate file has.
    #[error("{0} bytes of PEM, more than the {MAX_PEM} allowed")]
    TooLarge(usize),
    /// No block with one of the wanted labels.
    #[error("no PEM block {wanted} found")]
    NoBlock {
        /// What was looked for.
        wanted: &'static str,
    },
    /// A block is cut or not base64.
    #[error("malformed PEM block {0}")]
    Malformed(String),
    /// The key is protected by a pass phrase.
    #[error("key is encrypted with a pass phrase; store it unencrypted")]
    Encrypted,
}

/// One block: its label and the decoded bytes.
pub(crate) struct Block {
    pub(crate) label: String,
    pub(crate) der: Vec<u8>,
}

/// All blocks of a text, in order.
pub(crate) fn blocks(text: &[u8]) -> Result<Vec<Block>, PemError> {
    if text.len() > MAX_PEM {
        return Err(PemError::TooLarge(text.len()));
    }
    let text = String::from_utf8_lossy(text);
    let mut blocks = Vec::new();
    let mut lines = text.lines().map(str::trim);
    while let Some(line) = lines.next() {
        let Some(label) = line.strip_prefix("-----BEGIN ").and_then(|rest| rest.strip_suffix("-----")) else {
            continue;
        };
        let malformed = || PemError::Malformed(shown(label.as_bytes()));
        let end = format!("-----END {label}-----");
        let mut body = String::new();
        loop {
            match lines.next() {
                None => return Err(malformed()),
                Some(line) if line == end => break,
                Some(line) if line.contains("ENCRYPTED") => return Err(PemError::Encrypted),
                Some(line) => body.extend(line.chars().filter(|letter| !letter.is_whitespace())),
            }
        }
        if label.starts_with("ENCRYPTED") {
            return Err(PemError::Encrypted);
        }
        blocks.push(Block { label: label.to_owned(), der: decode(label, &body).ok_or_else(malformed)? });
    }
    Ok(blocks)
}

/// Decodes base64 by the crate's strict reader, for which the text is wrapped anew.
fn decode(label: &str, base64: &str) -> Option<Vec<u8>> {
    const WIDTH: usize = 64;
    if !base64.is_ascii() {
        return None;
    }
    let mut text = format!("-----BEGIN {label}-----\n");
    for line in base64.as_bytes().chunks(WIDTH) {
        text.push_str(std::str::from_utf8(line).ok()?);
        text.push('\n');
    }
    text.push_str(&format!("-----END {label}-----\n"));
    Some(der::pem::decode_vec(text.as_bytes()).ok()?.1)
}

/// Encodes one block.
pub(crate) fn encode(label: &str, der: &[u8]) -> Option<String> {
    der::pem::encode_string(label, LineEnding::LF, der).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_found_between_text_at_any_line_width() {
        let text = "comment\n-----BEGIN A B-----\r\nAQIDBAUG\r\nBwg=\r\n-----END A B-----\n\
            Bag Attributes\n-----BEGIN C-----\nAQ==\n-----END C-----\ntail";
        let found = blocks(text.as_bytes()).unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!(
            (found[0].label.as_str(), found[0].der.as_slice()),
            ("A B", &[1, 2, 3, 4, 5, 6, 7, 8][..])
        );
        assert_eq!((found[1].label.as_str(), found[1].der.as_slice()), ("C", &[1][..]));
        let again = encode("C", &[1]).unwrap();
        assert_eq!(blocks(again.as_bytes()).unwrap()[0].der, [1]);
    }

    #[test]
    fn cut_encrypted_and_oversized_texts_are_refused() {
        assert!(blocks(b"nothing here").unwrap().is_empty());
        assert!(matches!(blocks(b"-----BEGIN A-----\nAQ==\n"), Err(PemError::Malformed(_))));
        assert!(matches!(blocks(b"-----BEGIN A-----\n$$\n-----END A-----"), Err(PemError::Malformed(_))));
        let traditional =
            b"-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nAQ==\n-----END RSA PRIVATE KEY-----";
        assert!(matches!(blocks(traditional), Err(PemError::Encrypted)));
        let pkcs8 = b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nAQ==\n-----END ENCRYPTED PRIVATE KEY-----";
        assert!(matches!(blocks(pkcs8), Err(PemError::Encrypted)));
        assert!(matches!(blocks(&vec![b'x'; MAX_PEM + 1]), Err(PemError::TooLarge(_))));
    }
}
