//! Archives as they come: plain, gzip or zstd, told apart by their first bytes.

use std::io::{self, BufReader, Cursor, Read};

use flate2::bufread::MultiGzDecoder;

const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// A multiple of the pipe size, large enough that system calls do not count.
const BUFFER: usize = 256 << 10;
/// zstd frames may demand a window of up to 2 GiB from the reader; the reference tool refuses above 128 MiB.
const MAX_ZSTD_WINDOW_LOG: u32 = 27;

/// The plain bytes of `input`. A cut or damaged stream gives an error when it is read so far.
pub fn decompressed<'r>(mut input: impl Read + Send + 'r) -> io::Result<Box<dyn Read + Send + 'r>> {
    let mut magic = Vec::with_capacity(ZSTD.len());
    input.by_ref().take(ZSTD.len() as u64).read_to_end(&mut magic)?;
    let compressed = (magic.starts_with(&GZIP), magic == ZSTD);
    let whole = BufReader::with_capacity(BUFFER, Cursor::new(magic).chain(input));
    Ok(match compressed {
        (true, _) => Box::new(BufReader::with_capacity(BUFFER, MultiGzDecoder::new(whole))),
        (_, true) => {
            let mut decoder = zstd::Decoder::with_buffer(whole)?;
            decoder.window_log_max(MAX_ZSTD_WINDOW_LOG)?;
            Box::new(decoder)
        }
        _ => Box::new(whole),
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn read(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut plain = Vec::new();
        decompressed(bytes)?.read_to_end(&mut plain)?;
        Ok(plain)
    }

    #[test]
    fn all_forms_give_the_same_bytes() {
        let plain: Vec<u8> = (0..100_000u32).flat_map(u32::to_le_bytes).collect();
        assert_eq!(read(&plain).unwrap(), plain);
        assert_eq!(read(&gzip(&plain)).unwrap(), plain);
        assert_eq!(read(&zstd::encode_all(&plain[..], 1).unwrap()).unwrap(), plain);
        assert_eq!(read(&[gzip(b"two "), gzip(b"members")].concat()).unwrap(), b"two members");
        assert_eq!(read(b"").unwrap(), b"");
        assert_eq!(read(b"x").unwrap(), b"x");
    }

    #[test]
    fn a_cut_stream_is_an_error() {
        let plain: Vec<u8> = (0..100_000u32).flat_map(u32::to_le_bytes).collect();
        for whole in [gzip(&plain), zstd::encode_all(&plain[..], 1).unwrap()] {
            for cut in [whole.len() / 2, whole.len() - 1] {
                assert!(read(&whole[..cut]).is_err(), "a stream cut at {cut} was accepted");
            }
        }
    }
}
