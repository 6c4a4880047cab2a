//! The one place that calls the C zlib library, for streams equal to those of the C++ tools.
//!
//! Pure Rust and vectorised libraries produce other, equally valid bytes. Since objects are named by the hash of
//! their stored bytes, only the reference library gives the reference tools' names.
#![allow(unsafe_code)]

use libz_sys::{Z_OK, compress2, compressBound};

/// The library's default level, which the C++ tools use.
const LEVEL: i32 = 6;

/// Deflates `plain` to one zlib stream with the reference library.
pub(crate) fn compress(plain: &[u8]) -> Vec<u8> {
    // SAFETY: a pure function of its argument.
    let bound = unsafe { compressBound(plain.len() as _) };
    let mut stream: Vec<u8> = Vec::with_capacity(bound as usize);
    let mut size = bound;
    // SAFETY: the destination has `bound` writable bytes and the source `plain.len()` readable ones; both live
    // through the call and do not overlap. `size` is in/out: room before, bytes written after.
    let code = unsafe { compress2(stream.as_mut_ptr(), &mut size, plain.as_ptr(), plain.len() as _, LEVEL) };
    // With a valid level and `compressBound` bytes of room only a failed allocation is left.
    assert_eq!(code, Z_OK, "zlib cannot allocate its state of 256 KiB");
    // SAFETY: zlib has initialised the first `size` bytes and `size` is at most the capacity.
    unsafe { stream.set_len(size as usize) };
    stream.shrink_to_fit();
    stream
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_equal_the_format_descriptions_examples() {
        assert_eq!(compress(b""), [0x78, 0x9c, 3, 0, 0, 0, 0, 1]);
        assert_eq!(
            compress(b"hello\n"),
            [0x78, 0x9c, 0xcb, 0x48, 0xcd, 0xc9, 0xc9, 0xe7, 0x02, 0x00, 0x08, 0x4b, 0x02, 0x1f]
        );
    }
}
