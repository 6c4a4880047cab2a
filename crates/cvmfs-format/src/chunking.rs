//! Content-defined chunk boundaries of large files (repository format §18).
//!
//! Boundaries are a publisher's choice; these are the C++ tools' (a 32-bit xor-shift checksum), so that equal content
//! gives equal chunks whoever published it.

/// Bytes over which the rolling checksum looks: it is shifted by one bit per byte and has 32 bits.
const WINDOW: u64 = 32;

/// The value near which the checksum cuts.
const MAGIC: i32 = 0x7fff_ffff;

/// Chunk size limits in bytes (§18.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkSizes {
    /// Smallest chunk but the last of a file; files up to this size are not chunked.
    pub min: u64,
    /// Size aimed at.
    pub avg: u64,
    /// Largest chunk.
    pub max: u64,
}

impl Default for ChunkSizes {
    fn default() -> Self {
        Self { min: 4 << 20, avg: 8 << 20, max: 16 << 20 }
    }
}

/// The limits are not usable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("chunk sizes {min} < {avg} < {max} do not hold, or the smallest is below {WINDOW} or the average above 4 GiB", min = .0.min, avg = .0.avg, max = .0.max)]
pub struct ChunkSizesError(pub ChunkSizes);

/// Finds the boundaries of one file, fed piece by piece.
#[derive(Debug, Clone)]
pub struct ChunkDetector {
    sizes: ChunkSizes,
    threshold: i32,
    /// Bytes of the current chunk so far.
    size: u64,
    checksum: u32,
}

impl ChunkDetector {
    /// Starts a file.
    pub fn new(sizes: ChunkSizes) -> Result<Self, ChunkSizesError> {
        let average = u32::try_from(sizes.avg).map_err(|_| ChunkSizesError(sizes))?;
        if sizes.min < WINDOW || sizes.min >= sizes.avg || sizes.avg >= sizes.max {
            return Err(ChunkSizesError(sizes));
        }
        // At most 2^32 / 33, hence it fits.
        let threshold = (u32::MAX / average) as i32;
        Ok(Self { sizes, threshold, size: 0, checksum: 0 })
    }

    /// Whether a file of this size is chunked at all.
    pub fn applies_to(&self, file_size: u64) -> bool {
        file_size > self.sizes.min
    }

    /// Takes the file's next bytes up to the next boundary.
    ///
    /// `Some(n)`: the current chunk ends after `data[..n]` (`n` may be 0); call again with `data[n..]`, which begins
    /// the next chunk. `None`: no boundary, all of `data` belongs to the current chunk. The end of the file ends the
    /// last chunk; no boundary is reported there, so no chunk is empty.
    pub fn next_cut(&mut self, data: &[u8]) -> Option<usize> {
        let quiet = self.sizes.min - WINDOW;
        let mut position =
            usize::try_from(quiet.saturating_sub(self.size)).unwrap_or(usize::MAX).min(data.len());
        self.size += position as u64;
        loop {
            if self.size >= self.sizes.min {
                position += self.skip_blocks(data.get(position..).unwrap_or_default());
            }
            let byte = *data.get(position)?;
            if self.size == self.sizes.max {
                return Some(self.cut(position));
            }
            self.checksum = (self.checksum << 1) ^ u32::from(byte);
            // The byte at the boundary has been fed to the old chunk's checksum and belongs to the new chunk.
            if self.size >= self.sizes.min && self.hits(self.checksum) {
                return Some(self.cut(position));
            }
            self.size += 1;
            position += 1;
        }
    }

    /// Takes whole blocks without a boundary, and returns their length. The checksum after each byte of a block is that
    /// before the block, shifted, and the block's own: so the bytes of a block need not wait for each other, and nor do
    /// the blocks' own checksums.
    fn skip_blocks(&mut self, data: &[u8]) -> usize {
        const BLOCK: usize = 8;
        let room = usize::try_from(self.sizes.max - self.size).unwrap_or(usize::MAX);
        let mut taken = 0;
        for block in data.get(..room).unwrap_or(data).chunks_exact(BLOCK) {
            let mut own = 0_u32;
            let mut any = false;
            for (index, byte) in block.iter().enumerate() {
                own = (own << 1) ^ u32::from(*byte);
                any |= self.hits((self.checksum << (index + 1)) ^ own);
            }
            if any {
                break;
            }
            self.checksum = (self.checksum << BLOCK) ^ own;
            taken += BLOCK;
        }
        self.size += taken as u64;
        taken
    }

    /// Bytes of the current chunk so far.
    pub fn current_size(&self) -> u64 {
        self.size
    }

    /// Wrapping arithmetic on 32 bits is part of the rule: it makes 0xffffffff a hit.
    fn hits(&self, checksum: u32) -> bool {
        (checksum as i32).wrapping_sub(MAGIC).wrapping_abs() < self.threshold
    }

    fn cut(&mut self, position: usize) -> usize {
        self.size = 0;
        self.checksum = 0;
        position
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: ChunkSizes = ChunkSizes { min: 4096, avg: 8192, max: 16384 };

    fn xorshift(bytes: usize) -> Vec<u8> {
        let mut state = 1u32;
        (0..bytes)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
                state as u8
            })
            .collect()
    }

    fn cuts(sizes: ChunkSizes, data: &[u8], piece: usize) -> Vec<usize> {
        let mut detector = ChunkDetector::new(sizes).unwrap();
        let mut cuts = Vec::new();
        for (index, mut rest) in data.chunks(piece).enumerate() {
            let end = index * piece + rest.len();
            while let Some(cut) = detector.next_cut(rest) {
                rest = &rest[cut..];
                cuts.push(end - rest.len());
            }
        }
        cuts
    }

    #[test]
    fn small_vectors_are_cut_as_published_in_any_pieces() {
        let data = xorshift(100_000);
        assert_eq!(data[..4], [0x21, 0x01, 0xc5, 0x4f]);
        let expected = [15776, 32035, 48419, 53074, 57880, 62100, 66896, 73354, 80125, 84610, 89081];
        for piece in [1, 31, 4096, 65536, 100_000] {
            assert_eq!(cuts(SMALL, &data, piece), expected, "{piece}");
        }
    }

    #[test]
    fn constant_bytes_cut_at_the_smallest_or_largest_size() {
        let every =
            |step: usize| (1..).map(|n| n * step).take_while(|cut| *cut < 100_000).collect::<Vec<_>>();
        assert_eq!(cuts(SMALL, &[1; 100_000], 777), every(4096));
        assert_eq!(cuts(SMALL, &[0; 100_000], 777), every(16384));
    }

    #[test]
    fn sixty_four_mebibytes_are_cut_as_published() {
        let expected = [12568436, 20725431, 24974299, 31661413, 36431706, 49005286, 64652823];
        assert_eq!(cuts(ChunkSizes::default(), &xorshift(64 << 20), 1 << 20), expected);
    }

    #[test]
    fn a_boundary_at_the_end_of_the_file_is_not_reported() {
        assert_eq!(cuts(SMALL, &[0; 16384], 1000), []);
        assert_eq!(cuts(SMALL, &[0; 16385], 1000), [16384]);
        let detector = ChunkDetector::new(SMALL).unwrap();
        assert!(!detector.applies_to(4096) && detector.applies_to(4097));
    }

    #[test]
    fn unusable_sizes_are_refused() {
        for (min, avg, max) in [(31, 64, 128), (64, 64, 128), (64, 128, 128), (64, 1 << 33, 1 << 34)] {
            assert!(ChunkDetector::new(ChunkSizes { min, avg, max }).is_err());
        }
    }
}
