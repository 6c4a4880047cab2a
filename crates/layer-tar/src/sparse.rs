//! The content of a regular file: data ranges in a sea of zeros.

use crate::error::TarError;
use crate::stream::Stream;
use std::fmt;
use std::io::{self, Read};

/// A range of a file that the archive has bytes for; everything between ranges reads as zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataRange {
    /// Where it begins in the file.
    pub offset: u64,
    /// Its length in bytes, never 0.
    pub length: u64,
}

/// Where a file's data lie: ranges in ascending order, apart from each other, within the file's size, and
/// together exactly as long as the stored bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DataMap {
    size: u64,
    ranges: Vec<DataRange>,
}

impl DataMap {
    /// A file without holes.
    pub(crate) fn dense(size: u64) -> Self {
        let ranges = if size == 0 { Vec::new() } else { vec![DataRange { offset: 0, length: size }] };
        DataMap { size, ranges }
    }

    /// A sparse file; the error says which rule the map breaks.
    pub(crate) fn sparse(
        size: u64,
        stored: u64,
        map: impl IntoIterator<Item = (u64, u64)>,
    ) -> Result<Self, &'static str> {
        let mut ranges = Vec::new();
        let (mut end, mut total) = (0u64, 0u64);
        for (offset, length) in map {
            if offset < end {
                return Err("has overlapping or unordered ranges");
            }
            end = offset
                .checked_add(length)
                .filter(|&end| end <= size)
                .ok_or("has a range beyond the file's end")?;
            // Ranges do not overlap and lie within the size, so their sum cannot overflow.
            total += length;
            if length > 0 {
                ranges.push(DataRange { offset, length });
            }
        }
        if total != stored {
            return Err("does not account for the stored bytes");
        }
        Ok(DataMap { size, ranges })
    }
}

/// The content of the current entry. Reading it yields the whole file with its holes as zeros; an entry that
/// is not a regular file has none. What is not read is skipped.
pub struct Content<'a, R> {
    stream: &'a mut Stream<R>,
    map: DataMap,
    position: u64,
    range: usize,
}

const BUFFER: u64 = 64 * 1024;

impl<'a, R: Read> Content<'a, R> {
    pub(crate) fn new(stream: &'a mut Stream<R>, map: DataMap) -> Self {
        Content { stream, map, position: 0, range: 0 }
    }

    /// Bytes that reading to the end yields.
    pub fn size(&self) -> u64 {
        self.map.size
    }

    /// The ranges with data, ascending; a file without holes has one, or none if it is empty.
    pub fn ranges(&self) -> &[DataRange] {
        &self.map.ranges
    }

    /// Hands every stored byte with its place in the file to `take`, ascending and without the holes, for
    /// whoever can leave holes in a file. Must be called before anything was read.
    pub fn visit_data(mut self, mut take: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
        // Most files are small, and clearing a buffer costs.
        let largest = self.map.ranges.iter().map(|range| range.length).max().unwrap_or(0);
        let mut buffer = vec![0; largest.min(BUFFER) as usize];
        for index in 0..self.map.ranges.len() {
            let DataRange { offset, length } = self.map.ranges[index];
            self.position = offset;
            self.range = index;
            while self.position < offset + length {
                let count = self.read(&mut buffer)?;
                take(self.position - count as u64, &buffer[..count])?;
            }
        }
        Ok(())
    }
}

impl<R: Read> Read for Content<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        while let Some(range) = self.map.ranges.get(self.range) {
            if self.position < range.offset {
                break;
            }
            let left = range.offset + range.length - self.position;
            if left > 0 {
                let count = at_most(buffer, left);
                let count = self.stream.read_content(count).map_err(TarError::into_io)?;
                self.position += count as u64;
                return Ok(count);
            }
            self.range += 1;
        }
        let next = self.map.ranges.get(self.range).map_or(self.map.size, |range| range.offset);
        let hole = at_most(buffer, next - self.position);
        hole.fill(0);
        self.position += hole.len() as u64;
        Ok(hole.len())
    }
}

fn at_most(buffer: &mut [u8], limit: u64) -> &mut [u8] {
    let length = usize::try_from(limit).unwrap_or(usize::MAX).min(buffer.len());
    &mut buffer[..length]
}

impl TarError {
    fn into_io(self) -> io::Error {
        self.into()
    }
}

impl<R> fmt::Debug for Content<'_, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Content")
            .field("map", &self.map)
            .field("position", &self.position)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_that_contradict_the_data_are_refused() {
        assert!(DataMap::sparse(100, 20, [(0, 10), (50, 10), (100, 0)]).is_ok());
        assert!(DataMap::sparse(100, 0, []).is_ok());
        assert!(DataMap::sparse(100, 20, [(50, 10), (0, 10)]).is_err());
        assert!(DataMap::sparse(100, 20, [(0, 10), (5, 10)]).is_err());
        assert!(DataMap::sparse(100, 20, [(90, 20)]).is_err());
        assert!(DataMap::sparse(100, 10, [(u64::MAX, 10)]).is_err());
        assert!(DataMap::sparse(100, 11, [(0, 10)]).is_err());
    }

    #[test]
    fn holes_read_as_zeros_and_data_keep_their_place() {
        let mut stream = Stream::new(&b"abcdef"[..]);
        stream.begin_content("f".into(), 6);
        let map = DataMap::sparse(12, 6, [(2, 3), (7, 3)]).unwrap();
        let mut expanded = Vec::new();
        Content::new(&mut stream, map.clone()).read_to_end(&mut expanded).unwrap();
        assert_eq!(expanded, b"\0\0abc\0\0def\0\0");

        let mut stream = Stream::new(&b"abcdef"[..]);
        stream.begin_content("f".into(), 6);
        let mut seen = Vec::new();
        Content::new(&mut stream, map)
            .visit_data(|offset, data| {
                seen.push((offset, data.to_vec()));
                Ok(())
            })
            .unwrap();
        assert_eq!(seen, [(2, b"abc".to_vec()), (7, b"def".to_vec())]);
    }
}
