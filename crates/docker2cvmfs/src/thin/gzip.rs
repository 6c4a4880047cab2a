//! A gzip container that stores (RFC 1952, RFC 1951 §3.2.4).
//!
//! The thin layer is a few kilobytes and its digest should depend on its content alone.
//! A compressor's output changes with its version; stored blocks have only one form.

use flate2::Crc;

/// Identification, deflate, no flags, no time, no extra flags, unknown system.
const HEADER: [u8; 10] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff];
/// A stored block has a length of two bytes.
const MAX_BLOCK: usize = u16::MAX as usize;

/// `content` as gzip, without compression.
pub(super) fn stored(content: &[u8]) -> Vec<u8> {
    let mut output = HEADER.to_vec();
    let blocks = content.chunks(MAX_BLOCK);
    let last = blocks.len().saturating_sub(1);
    for (index, block) in blocks.enumerate() {
        let length = u16::try_from(block.len()).expect("a chunk is not longer than asked for");
        output.push(u8::from(index == last));
        output.extend_from_slice(&length.to_le_bytes());
        output.extend_from_slice(&(!length).to_le_bytes());
        output.extend_from_slice(block);
    }
    if content.is_empty() {
        output.extend_from_slice(&[1, 0, 0, 0xff, 0xff]);
    }
    let mut checksum = Crc::new();
    checksum.update(content);
    output.extend_from_slice(&checksum.sum().to_le_bytes());
    output.extend_from_slice(&checksum.amount().to_le_bytes());
    output
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;

    #[test]
    fn any_length_is_unpacked_to_the_same_bytes() {
        for length in [0, 1, 65_534, 65_535, 65_536, 131_070, 200_000] {
            let content: Vec<u8> = (0..length).map(|n| u8::try_from(n % 251).unwrap()).collect();
            let mut unpacked = Vec::new();
            flate2::read::GzDecoder::new(&stored(&content)[..]).read_to_end(&mut unpacked).unwrap();
            assert_eq!(unpacked, content, "{length}");
        }
    }
}
