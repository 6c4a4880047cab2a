//! Stored form of objects: zlib streams or plain bytes (repository format §3).
//!
//! Readers verify the hash over the stored bytes; inflating is lenient where the C++ client is (a stream without end
//! marker or checksum is accepted, bytes after its end are ignored), because the hash and the expected size decide.
//! The output is always bounded by the caller.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::io;
use std::str::FromStr;

use flate2::{Decompress, FlushDecompress, Status};

use crate::hash::shown;
use crate::stock_zlib;

/// How an object's bytes are stored (§3).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Compression {
    /// An RFC 1950 zlib stream.
    #[default]
    Zlib,
    /// The bytes themselves.
    None,
}

impl Compression {
    /// Number in catalog flags.
    pub fn id(self) -> u8 {
        match self {
            Self::Zlib => 0,
            Self::None => 1,
        }
    }

    /// The compression with this number.
    pub fn from_id(id: u8) -> Option<Self> {
        match id {
            0 => Some(Self::Zlib),
            1 => Some(Self::None),
            _ => None,
        }
    }

    /// Name in configuration and in the attribute `user.compression`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Zlib => "zlib",
            Self::None => "none",
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The name of a compression or of a deflate implementation is not known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown {what} {found:?} (known: {known})")]
pub struct UnknownName {
    what: &'static str,
    found: String,
    known: &'static str,
}

impl FromStr for Compression {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        match name {
            "zlib" | "default" => Ok(Self::Zlib),
            "none" => Ok(Self::None),
            _ => Err(UnknownName {
                what: "compression",
                found: shown(name.as_bytes()),
                known: "zlib, default, none",
            }),
        }
    }
}

/// Why a stored object could not be turned into plain bytes.
#[derive(Debug, thiserror::Error)]
pub enum InflateError {
    /// The bytes are no zlib stream.
    #[error("not a valid zlib stream ({0})")]
    Corrupt(String),
    /// The plain bytes exceed the caller's limit.
    #[error("more than the expected {limit} bytes after decompression")]
    TooLarge {
        /// The limit in bytes.
        limit: u64,
    },
    /// The plain bytes could not be written.
    #[error("cannot write decompressed data")]
    Write(#[source] io::Error),
}

/// Plain bytes produced by one call of the inflate engine.
const BUFFER: usize = 64 * 1024;

/// Turns stored bytes into plain bytes, piece by piece, with bounded output and constant memory.
///
/// After an error the inflater is of no further use.
pub struct Inflater {
    stream: Option<Zlib>,
    limit: u64,
    produced: u64,
}

struct Zlib {
    engine: Decompress,
    buffer: Box<[u8]>,
    ended: bool,
}

impl Inflater {
    /// Starts an object that may have at most `limit` plain bytes.
    pub fn new(compression: Compression, limit: u64) -> Self {
        let stream = match compression {
            Compression::Zlib => Some(Zlib {
                engine: Decompress::new(true),
                buffer: vec![0; BUFFER].into_boxed_slice(),
                ended: false,
            }),
            Compression::None => None,
        };
        Self { stream, limit, produced: 0 }
    }

    /// Takes stored bytes and writes the plain bytes they give. Nothing beyond the limit is ever written.
    pub fn write(&mut self, input: &[u8], out: &mut dyn io::Write) -> Result<(), InflateError> {
        let Some(zlib) = &mut self.stream else {
            return emit(input, &mut self.produced, self.limit, out);
        };
        let mut rest = input;
        // Bytes after the end of the stream are covered by the hash and ignored.
        while !zlib.ended {
            let (read, written) = (zlib.engine.total_in(), zlib.engine.total_out());
            let status = zlib
                .engine
                .decompress(rest, &mut zlib.buffer, FlushDecompress::None)
                .map_err(|error| InflateError::Corrupt(error.to_string()))?;
            let read = (zlib.engine.total_in() - read) as usize;
            let written = (zlib.engine.total_out() - written) as usize;
            rest = rest.get(read..).unwrap_or_default();
            emit(&zlib.buffer[..written], &mut self.produced, self.limit, out)?;
            match status {
                Status::StreamEnd => zlib.ended = true,
                _ if read == 0 && written == 0 && !rest.is_empty() => {
                    return Err(InflateError::Corrupt("no progress".to_owned()));
                }
                // A full buffer may leave plain bytes inside the engine; anything less means it wants input.
                _ if rest.is_empty() && written < zlib.buffer.len() => break,
                _ => {}
            }
        }
        Ok(())
    }

    /// Ends the object and returns the number of plain bytes. A stream that did not reach its end marker is
    /// accepted: compare the number with the size the catalog states.
    pub fn finish(self) -> Result<u64, InflateError> {
        Ok(self.produced)
    }

    /// Plain bytes so far.
    pub fn produced(&self) -> u64 {
        self.produced
    }
}

impl fmt::Debug for Inflater {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inflater")
            .field("zlib", &self.stream.is_some())
            .field("limit", &self.limit)
            .field("produced", &self.produced)
            .finish()
    }
}

fn emit(plain: &[u8], produced: &mut u64, limit: u64, out: &mut dyn io::Write) -> Result<(), InflateError> {
    if plain.len() as u64 > limit - *produced {
        return Err(InflateError::TooLarge { limit });
    }
    out.write_all(plain).map_err(InflateError::Write)?;
    *produced += plain.len() as u64;
    Ok(())
}

/// Inflates an object held in memory to at most `limit` plain bytes.
pub fn inflate(compression: Compression, stored: &[u8], limit: u64) -> Result<Vec<u8>, InflateError> {
    let mut plain = Vec::new();
    let mut inflater = Inflater::new(compression, limit);
    inflater.write(stored, &mut plain)?;
    inflater.finish()?;
    Ok(plain)
}

/// Inflates an object held in memory whose plain size is `size`, at once and so a third faster than piece by piece.
/// The result may have another size nevertheless if the object is not what it should be; it is never longer.
///
/// # Errors
/// As [`inflate`] with `size` as the limit.
pub fn inflate_known(compression: Compression, stored: &[u8], size: u64) -> Result<Vec<u8>, InflateError> {
    thread_local! {
        static ENGINE: std::cell::RefCell<libdeflater::Decompressor> =
            std::cell::RefCell::new(libdeflater::Decompressor::new());
    }
    let length = usize::try_from(size).map_err(|_| InflateError::TooLarge { limit: size })?;
    if compression == Compression::Zlib {
        let mut plain = vec![0; length];
        let outcome = ENGINE.with_borrow_mut(|engine| engine.zlib_decompress(stored, &mut plain));
        if outcome.is_ok_and(|produced| produced == length) {
            return Ok(plain);
        }
        // Streams that this library refuses and the C++ client accepts (without end marker or checksum) come here,
        // and damaged ones for the reason.
    }
    inflate(compression, stored, size)
}

/// Which library deflates when publishing. Readers do not care; object names differ.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Deflate {
    /// The reference zlib at level 6: streams, and hence object names, equal those of the C++ tools.
    #[default]
    Stock,
    /// libdeflate: several times as fast, other names for the same content. What does not shrink is stored as it is,
    /// inside the stream.
    Fast,
}

/// libdeflate's level. Of the files of a Debian system it makes 1.06 to 1.08 times what zlib's default makes of them, in
/// less than a sixth of its time; level 3 would save 5 % of that and take half as long again.
const FAST_LEVEL: i32 = 1;
/// Media and archives within images do not shrink, and to find that out takes longer than to compress others. So
/// contents of this many bytes and more are first looked at in samples.
const SAMPLED_FROM: usize = 256 << 10;
const SAMPLE: usize = 2048;
/// One sample for this many bytes …
const SAMPLE_EVERY: usize = 32 << 10;
/// … but not more than this.
const MAX_SAMPLES: usize = 64;
/// A sample that shrinks by less than one part of this many is said not to shrink.
const WORTHWHILE: usize = 20;
/// A thread does not hold on to more memory than for a large chunk.
const MAX_ROOM: usize = 20 << 20;

impl Deflate {
    /// Deflates to one zlib stream.
    pub fn compress(&self, plain: &[u8]) -> Vec<u8> {
        self.with_compressed(plain, <[u8]>::to_vec)
    }

    /// Deflates to one zlib stream for `consumer`, in memory that the thread uses again: fresh memory for each
    /// stream would take a tenth of the time of compressing.
    pub fn with_compressed<R>(&self, plain: &[u8], consumer: impl FnOnce(&[u8]) -> R) -> R {
        match self {
            Self::Stock => consumer(&stock_zlib::compress(plain)),
            Self::Fast => {
                let mut room = ROOM.take();
                let size = fast(plain, &mut room);
                let outcome = consumer(room.get(..size).unwrap_or_default());
                if room.len() <= MAX_ROOM {
                    ROOM.set(room);
                }
                outcome
            }
        }
    }

    /// Name in configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stock => "stock",
            Self::Fast => "fast",
        }
    }
}

/// libdeflate's compressors, some hundred kilobytes: made once for each thread, for making them costs more than
/// compressing a small file.
struct Compressors {
    quick: libdeflater::Compressor,
    usual: libdeflater::Compressor,
    storing: libdeflater::Compressor,
}

thread_local! {
    static FAST: RefCell<Compressors> = RefCell::new(Compressors {
        quick: compressor(1),
        usual: compressor(FAST_LEVEL),
        storing: compressor(0),
    });
    /// Room for a stream at its longest; what is in it has no meaning.
    static ROOM: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

fn compressor(level: i32) -> libdeflater::Compressor {
    libdeflater::Compressor::new(libdeflater::CompressionLvl::new(level).expect("levels 0 to 12 exist"))
}

/// Deflates into `room`, which grows as needed, and returns the stream's length.
fn fast(plain: &[u8], room: &mut Vec<u8>) -> usize {
    FAST.with_borrow_mut(|compressors| {
        let shrinks = plain.len() < SAMPLED_FROM || any_sample_shrinks(&mut compressors.quick, plain);
        let compressor = if shrinks { &mut compressors.usual } else { &mut compressors.storing };
        let longest = compressor.zlib_compress_bound(plain.len());
        if room.len() < longest {
            room.resize(longest, 0);
        }
        compressor.zlib_compress(plain, room).expect("the bound suffices for any input")
    })
}

/// Whether compressing is worth while anywhere in `plain`, as far as samples tell.
fn any_sample_shrinks(quick: &mut libdeflater::Compressor, plain: &[u8]) -> bool {
    let samples = (plain.len() / SAMPLE_EVERY).min(MAX_SAMPLES);
    let mut room = [0; SAMPLE - SAMPLE / WORTHWHILE];
    // Compressing into less room than the sample fails unless it shrinks.
    plain
        .chunks(plain.len() / samples.max(1))
        .filter_map(|part| part.get(..SAMPLE))
        .any(|sample| quick.deflate_compress(sample, &mut room).is_ok())
}

impl FromStr for Deflate {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        match name {
            "stock" => Ok(Self::Stock),
            "fast" => Ok(Self::Fast),
            _ => Err(UnknownName { what: "deflate", found: shown(name.as_bytes()), known: "stock, fast" }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(bytes: usize) -> Vec<u8> {
        let mut state = 1u32;
        (0..bytes)
            .map(|index| {
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
                if index % 5 == 0 { state as u8 } else { b'a' }
            })
            .collect()
    }

    fn in_pieces(stored: &[u8], piece: usize, limit: u64) -> Result<Vec<u8>, InflateError> {
        let mut plain = Vec::new();
        let mut inflater = Inflater::new(Compression::Zlib, limit);
        for part in stored.chunks(piece) {
            inflater.write(part, &mut plain)?;
        }
        assert_eq!(inflater.finish()?, plain.len() as u64);
        Ok(plain)
    }

    #[test]
    fn both_libraries_write_streams_that_come_back_in_any_pieces() {
        let plain = noise(300_000);
        for deflate in [Deflate::Stock, Deflate::Fast] {
            let stored = deflate.compress(&plain);
            let header = u16::from_be_bytes([stored[0], stored[1]]);
            assert!(stored[0] == 0x78 && header % 31 == 0, "{header:#x} does not begin a zlib stream");
            for piece in [1, 7, 4096, stored.len()] {
                assert_eq!(in_pieces(&stored, piece, plain.len() as u64).unwrap(), plain);
            }
            assert_eq!(deflate.name().parse(), Ok(deflate));
        }
    }

    #[test]
    fn what_does_not_shrink_is_kept_as_it_is_and_what_does_in_one_place_is_compressed() {
        let mut state = 1_u64;
        let mut random = |bytes: usize| -> Vec<u8> {
            let word = |_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()
            };
            (0..bytes / 8).flat_map(word).collect()
        };
        let archive = random(4 << 20);
        let stored = Deflate::Fast.compress(&archive);
        assert!(stored.len() < archive.len() + archive.len() / 1000);
        assert_eq!(in_pieces(&stored, 8191, archive.len() as u64).unwrap(), archive);
        assert_eq!(inflate_known(Compression::Zlib, &stored, archive.len() as u64).unwrap(), archive);
        // Text in a sixteenth of it, wherever it is.
        for place in 0..15 {
            let mut mixed = archive.clone();
            let start = (place << 18) + 12_345;
            mixed[start..start + (1 << 18)].fill(b'x');
            let shrunk = Deflate::Fast.compress(&mixed);
            assert!(shrunk.len() < mixed.len() - (1 << 18) + 10_000, "text at {start} was not found");
            assert_eq!(in_pieces(&shrunk, 8191, mixed.len() as u64).unwrap(), mixed);
        }
    }

    #[test]
    fn a_stream_without_end_marker_or_checksum_is_read_up_to_where_it_goes() {
        let plain = noise(50_000);
        let stored = Deflate::Stock.compress(&plain);
        assert_eq!(in_pieces(&stored[..stored.len() - 4], 999, 1 << 20).unwrap(), plain);
        assert_eq!(in_pieces(&stored[..stored.len() - 1], 999, 1 << 20).unwrap(), plain);
        let half = in_pieces(&stored[..stored.len() / 2], 999, 1 << 20).unwrap();
        assert!(!half.is_empty() && plain.starts_with(&half));
        assert_eq!(in_pieces(&[], 1, 1).unwrap(), b"");
    }

    #[test]
    fn at_once_and_piece_by_piece_give_the_same() {
        let plain = noise(50_000);
        let size = plain.len() as u64;
        let stored = Deflate::Stock.compress(&plain);
        let mut tailed = stored.clone();
        tailed.extend_from_slice(b"tail");
        for variant in [&stored[..], &stored[..stored.len() - 4], &tailed] {
            assert_eq!(inflate_known(Compression::Zlib, variant, size).unwrap(), plain);
        }
        assert_eq!(
            inflate_known(Compression::Zlib, &stored, size + 1).unwrap(),
            plain,
            "shorter than stated"
        );
        assert!(matches!(
            inflate_known(Compression::Zlib, &stored, size - 1),
            Err(InflateError::TooLarge { .. })
        ));
        assert!(inflate_known(Compression::Zlib, b"not zlib", 100).is_err());
        assert_eq!(inflate_known(Compression::None, &plain, size).unwrap(), plain);
        assert_eq!(inflate_known(Compression::Zlib, &Deflate::Fast.compress(b""), 0).unwrap(), b"");
    }

    #[test]
    fn bytes_after_the_end_of_the_stream_are_ignored() {
        let mut stored = Deflate::Stock.compress(b"hello\n");
        stored.extend_from_slice(b"tail");
        for piece in [1, 100] {
            assert_eq!(in_pieces(&stored, piece, 6).unwrap(), b"hello\n");
        }
    }

    #[test]
    fn a_damaged_stream_is_an_error() {
        let mut stored = Deflate::Stock.compress(&noise(1000));
        let last = stored.len() - 1;
        stored[last] ^= 1;
        assert!(matches!(in_pieces(&stored, 4096, 1 << 20), Err(InflateError::Corrupt(_))));
        assert!(matches!(inflate(Compression::Zlib, b"not zlib", 100), Err(InflateError::Corrupt(_))));
        // a preset dictionary is asked for (FDICT)
        assert!(matches!(
            inflate(Compression::Zlib, &[0x78, 0xbb, 0, 0, 0, 1, 0, 0], 100),
            Err(InflateError::Corrupt(_))
        ));
    }

    #[test]
    fn a_bomb_stops_at_the_limit() {
        let stored = Deflate::Fast.compress(&vec![0; 10_000_000]);
        let mut out = Vec::new();
        let mut inflater = Inflater::new(Compression::Zlib, 100_000);
        let error = inflater.write(&stored, &mut out).unwrap_err();
        assert!(matches!(error, InflateError::TooLarge { limit: 100_000 }));
        assert!(out.len() <= 100_000);
        assert!(inflate(Compression::None, b"12345", 4).is_err());
        assert_eq!(inflate(Compression::None, b"1234", 4).unwrap(), b"1234");
    }

    #[test]
    fn names_are_those_of_the_configuration() {
        assert_eq!("default".parse(), Ok(Compression::Zlib));
        assert_eq!("none".parse(), Ok(Compression::None));
        assert_eq!(
            "lz4".parse::<Compression>().unwrap_err().to_string(),
            "unknown compression \"lz4\" (known: zlib, default, none)"
        );
        assert_eq!(Compression::from_id(Compression::None.id()), Some(Compression::None));
        assert_eq!(Compression::from_id(2), None);
    }
}
