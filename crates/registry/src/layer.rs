//! Layer blobs as uncompressed tar streams.
//!
//! The compression is told by the first bytes, not by the media type, as engines do.
//! Gzip may have several members, zstd several frames, skippable ones included. The end
//! of the stream is reported only after the whole blob was consumed and the digest of
//! the uncompressed bytes, the layer's diff id, was found right.

use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::MultiGzDecoder;

use crate::blob::BlobReader;
use crate::digest::{Digest, Digester};

/// Bytes read ahead of the decompressor.
const BUFFER_BYTES: usize = 128 << 10;
/// The longest magic number that is looked for.
const MAGIC_BYTES: usize = 6;
/// Default bound for the uncompressed size of a layer: 256 GiB. Deflate expands at most
/// a thousandfold, so this is what keeps a small blob from filling a disk.
pub const MAX_LAYER_BYTES: u64 = 256 << 30;

/// Why a blob is not the layer that the image says.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// A compression that neither Docker nor OCI define for layers.
    #[error("is compressed with {0}, which is not defined for image layers")]
    UnsupportedCompression(&'static str),
    /// The compressed stream is damaged, cut, or followed by something else.
    #[error("the {compression} stream is damaged or cut: {cause}")]
    Damaged {
        /// `gzip` or `zstd`.
        compression: &'static str,
        /// What the decompressor says.
        #[source]
        cause: io::Error,
    },
    /// The uncompressed bytes are not those that the configuration promises.
    #[error("unpacks to content with digest {found}, but the image configuration says {expected}")]
    WrongDiffId {
        /// As the configuration says.
        expected: Digest,
        /// Of the bytes.
        found: Digest,
    },
    /// More uncompressed bytes than granted.
    #[error("unpacks to more than {0} bytes")]
    TooLarge(u64),
}

/// A layer as tar stream, verified at its end.
pub struct LayerStream<R: Read> {
    unpacked: Unpacked<R>,
    digester: Option<Digester>,
    is_verified: bool,
    expected: Digest,
}

/// Whatever a blob unpacks to, of at most a number of bytes.
pub(crate) struct Unpacked<R: Read> {
    decoder: Decoder<R>,
    plain_bytes: u64,
    limit: u64,
}

/// The blob with the bytes put back that were looked at.
type Blob<R> = BufReader<io::Chain<io::Cursor<Vec<u8>>, R>>;

enum Decoder<R: Read> {
    Plain(Blob<R>),
    // The gzip state is boxed: it is much larger than the others.
    Gzip(Box<MultiGzDecoder<Blob<R>>>),
    Zstd(zstd::stream::read::Decoder<'static, Blob<R>>),
}

impl<R: Read> LayerStream<R> {
    /// A stream over the blob's bytes that must unpack to `diff_id`, of at most `limit`
    /// bytes.
    ///
    /// # Errors
    /// The blob's own, or [`LayerError::UnsupportedCompression`] inside an [`io::Error`].
    pub fn new(blob: R, diff_id: &Digest, limit: u64) -> io::Result<Self> {
        let unpacked = Unpacked::new(blob, limit)?;
        Ok(Self {
            unpacked,
            digester: Some(Digester::like(diff_id)),
            is_verified: false,
            expected: diff_id.clone(),
        })
    }

    /// Uncompressed bytes so far.
    pub fn plain_bytes(&self) -> u64 {
        self.unpacked.plain_bytes
    }

    /// Reads to the end, so that everything is verified, whatever the consumer left.
    ///
    /// # Errors
    /// Those of reading.
    pub fn finish(mut self) -> io::Result<u64> {
        io::copy(&mut self, &mut io::sink())?;
        Ok(self.plain_bytes())
    }

    fn verify(&mut self) -> io::Result<()> {
        let digester = match self.digester.take() {
            Some(digester) => digester,
            None if self.is_verified => return Ok(()),
            // Whoever asks again after an error gets no clean end.
            None => return Err(io::Error::other("the layer was found to be wrong before")),
        };
        let found = digester.finish();
        if found == self.expected {
            self.is_verified = true;
            return Ok(());
        }
        let expected = self.expected.clone();
        Err(io::Error::other(LayerError::WrongDiffId { expected, found }))
    }
}

impl<R: Read> Unpacked<R> {
    /// Unpacks as the first bytes say.
    pub(crate) fn new(mut blob: R, limit: u64) -> io::Result<Self> {
        let start = first_bytes(&mut blob)?;
        let compression = compression(&start);
        let blob = BufReader::with_capacity(BUFFER_BYTES, io::Cursor::new(start).chain(blob));
        let decoder = match compression {
            Compression::None => Decoder::Plain(blob),
            Compression::Gzip => Decoder::Gzip(Box::new(MultiGzDecoder::new(blob))),
            Compression::Zstd => Decoder::Zstd(zstd::stream::read::Decoder::with_buffer(blob)?),
            Compression::Unsupported(name) => {
                return Err(io::Error::other(LayerError::UnsupportedCompression(name)));
            }
        };
        Ok(Self { decoder, plain_bytes: 0, limit })
    }
}

impl<R: Read> Read for Unpacked<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        let length = self.decoder.read(buffer)?;
        if length == 0 {
            self.decoder.drain()?;
            return Ok(0);
        }
        self.plain_bytes += length as u64;
        if self.plain_bytes > self.limit {
            return Err(io::Error::other(LayerError::TooLarge(self.limit)));
        }
        Ok(length)
    }
}

impl<R: Read> Read for LayerStream<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        let length = self.unpacked.read(buffer)?;
        if length == 0 {
            self.verify()?;
            return Ok(0);
        }
        if let (Some(digester), Some(bytes)) = (&mut self.digester, buffer.get(..length)) {
            digester.update(bytes);
        }
        Ok(length)
    }
}

impl<R: Read> std::fmt::Debug for LayerStream<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LayerStream").field("expected", &self.expected).finish_non_exhaustive()
    }
}

impl<R: Read> Decoder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let (result, compression) = match self {
            Self::Plain(blob) => return blob.read(buffer),
            Self::Gzip(decoder) => (decoder.read(buffer), "gzip"),
            Self::Zstd(decoder) => (decoder.read(buffer), "zstd"),
        };
        result.map_err(|cause| damaged(compression, cause))
    }

    /// Consumes what the decompressor left of the blob, so that the blob is verified too.
    fn drain(&mut self) -> io::Result<()> {
        let (blob, compression) = match self {
            Self::Plain(blob) => (blob, "tar"),
            Self::Gzip(decoder) => (decoder.get_mut(), "gzip"),
            Self::Zstd(decoder) => (decoder.get_mut(), "zstd"),
        };
        if blob.fill_buf()?.is_empty() {
            return Ok(());
        }
        Err(damaged(compression, io::Error::new(io::ErrorKind::InvalidData, "something follows its end")))
    }
}

/// Errors of the blob itself (network, digest, disk) pass through; those of the
/// decompressor get a name.
fn damaged(compression: &'static str, cause: io::Error) -> io::Error {
    if cause.raw_os_error().is_some() || BlobReader::failure_of(&cause).is_some() {
        return cause;
    }
    io::Error::new(io::ErrorKind::InvalidData, LayerError::Damaged { compression, cause })
}

enum Compression {
    None,
    Gzip,
    Zstd,
    Unsupported(&'static str),
}

/// The compression by its magic number; all of them are also compared by engines. A tar
/// archive begins with a name, which none of these byte sequences is likely to be.
fn compression(start: &[u8]) -> Compression {
    match start {
        [0x1f, 0x8b, ..] => Compression::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Compression::Zstd,
        [b'B', b'Z', b'h', b'1'..=b'9', b'1', b'A', ..] => Compression::Unsupported("bzip2"),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Compression::Unsupported("xz"),
        _ => Compression::None,
    }
}

/// Whether bytes begin like a compressed stream, also of a kind that is not unpacked.
pub(crate) fn is_compressed(mut bytes: impl Read) -> io::Result<bool> {
    Ok(!matches!(compression(&first_bytes(&mut bytes)?), Compression::None))
}

/// The first bytes of the blob, fewer if it is shorter.
fn first_bytes(blob: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut start = Vec::with_capacity(MAGIC_BYTES);
    blob.take(MAGIC_BYTES as u64).read_to_end(&mut start)?;
    Ok(start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    const PLAIN: &[u8] = b"a tar archive, for all that this module knows. ";

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        zstd::encode_all(bytes, 3).unwrap()
    }

    fn unpack(blob: &[u8], expected: &[u8], limit: u64) -> Result<Vec<u8>, String> {
        let mut plain = Vec::new();
        let mut stream =
            LayerStream::new(blob, &Digest::sha256_of(expected), limit).map_err(|e| e.to_string())?;
        stream.read_to_end(&mut plain).map_err(|error| error.to_string())?;
        assert_eq!(stream.finish().unwrap(), plain.len() as u64);
        Ok(plain)
    }

    #[test]
    fn each_compression_gives_the_same_bytes() {
        let twice = [PLAIN, PLAIN].concat();
        let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
        for blob in [
            twice.clone(),
            gzip(&twice),
            [gzip(PLAIN), gzip(PLAIN)].concat(),
            [gzip(PLAIN), gzip(b""), gzip(PLAIN)].concat(),
            zstd(&twice),
            [zstd(PLAIN), zstd(PLAIN)].concat(),
            [zstd(PLAIN), skippable.clone(), zstd(PLAIN), skippable.clone()].concat(),
            [skippable, zstd(&twice)].concat(),
        ] {
            assert_eq!(unpack(&blob, &twice, 1000).unwrap(), twice);
        }
        assert_eq!(unpack(b"", b"", 0).unwrap(), b"");
        assert_eq!(unpack(b"ab", b"ab", 2).unwrap(), b"ab");
    }

    #[test]
    fn cut_and_damaged_streams_are_errors() {
        for (name, blob) in [("gzip", gzip(PLAIN)), ("zstd", zstd(PLAIN))] {
            for cut in [7, blob.len() / 2, blob.len() - 1] {
                let message = unpack(&blob[..cut], PLAIN, 1000).unwrap_err();
                assert!(
                    message.contains(&format!("the {name} stream is damaged or cut")),
                    "{cut}: {message}"
                );
            }
            let garbage = [blob.as_slice(), b"garbage"].concat();
            assert!(unpack(&garbage, PLAIN, 1000).unwrap_err().contains("damaged"), "{name}");
            let mut flipped = blob.clone();
            *flipped.last_mut().unwrap() ^= 1;
            assert!(unpack(&flipped, PLAIN, 1000).is_err(), "{name}");
        }
    }

    #[test]
    fn content_with_another_diff_id_is_refused() {
        for blob in [PLAIN.to_vec(), gzip(PLAIN), zstd(PLAIN)] {
            assert!(
                unpack(&blob, b"something else", 1000).unwrap_err().contains("the image configuration says")
            );
        }
        let twice_compressed = gzip(&gzip(PLAIN));
        assert!(unpack(&twice_compressed, PLAIN, 1000).is_err());
    }

    #[test]
    fn the_end_is_verified_even_if_the_consumer_stops_early() {
        let blob = gzip(PLAIN);
        let mut stream = LayerStream::new(&blob[..], &Digest::sha256_of(b"other"), 1000).unwrap();
        let mut start = [0; 4];
        stream.read_exact(&mut start).unwrap();
        assert!(stream.finish().is_err());
    }

    #[test]
    fn a_bomb_stops_at_the_limit() {
        let bomb = vec![0u8; 1 << 20];
        for blob in [gzip(&bomb), zstd(&bomb), bomb.clone()] {
            assert!(unpack(&blob, &bomb, 1000).unwrap_err().contains("more than 1000 bytes"));
        }
    }

    #[test]
    fn other_compressions_are_refused_by_name() {
        assert!(unpack(b"BZh91AY&SY", b"", 1000).unwrap_err().contains("bzip2"));
        assert!(unpack(b"\xfd7zXZ\0\0", b"", 1000).unwrap_err().contains("xz"));
    }
}
