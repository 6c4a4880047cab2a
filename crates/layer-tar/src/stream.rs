//! The bytes of an archive: a window for headers, and the content of the current entry.

use crate::error::TarError;
use std::io::{self, Read};
use tar_core::HEADER_SIZE;

/// Bytes read ahead when headers are wanted; small files mostly lie inside.
const READ_AHEAD: usize = 64 * 1024;

/// The stream below a reader. Between entries the window holds header bytes; inside an entry `left` bytes
/// of content and `padding` bytes up to the next block are still to come.
pub(crate) struct Stream<R> {
    inner: R,
    window: Vec<u8>,
    start: usize,
    end: usize,
    offset: u64,
    left: u64,
    padding: u64,
    /// The current entry for messages.
    pub(crate) entry: String,
}

impl<R: Read> Stream<R> {
    pub(crate) fn new(inner: R) -> Self {
        let window = vec![0; READ_AHEAD];
        Stream { inner, window, start: 0, end: 0, offset: 0, left: 0, padding: 0, entry: String::new() }
    }

    /// Bytes of the archive consumed so far.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// What is buffered and not yet consumed.
    pub(crate) fn window(&self) -> &[u8] {
        &self.window[self.start..self.end]
    }

    /// Takes `count` bytes of the window.
    pub(crate) fn consume(&mut self, count: usize) {
        let count = count.min(self.end - self.start);
        self.start += count;
        self.offset += count as u64;
    }

    /// Reads until the window has at least `wanted` bytes; false if the stream ends before.
    pub(crate) fn fill(&mut self, wanted: usize) -> Result<bool, TarError> {
        if self.window.len() - self.start < wanted {
            self.window.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
            if self.window.len() < wanted {
                self.window.resize(wanted.next_multiple_of(READ_AHEAD), 0);
            }
        }
        while self.end - self.start < wanted {
            match self.inner.read(&mut self.window[self.end..]) {
                Ok(0) => return Ok(false),
                Ok(count) => self.end += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(TarError::Io { offset: self.offset, source }),
            }
        }
        Ok(true)
    }

    /// Begins an entry whose content takes `stored` bytes of the archive.
    pub(crate) fn begin_content(&mut self, entry: String, stored: u64) {
        self.entry = entry;
        self.left = stored;
        let block = HEADER_SIZE as u64;
        self.padding = (block - stored % block) % block;
    }

    /// Reads stored bytes of the current entry; 0 only at their end or for an empty buffer.
    pub(crate) fn read_content(&mut self, buffer: &mut [u8]) -> Result<usize, TarError> {
        let wanted = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        if wanted == 0 {
            return Ok(0);
        }
        let count = self.read_some(&mut buffer[..wanted])?;
        if count == 0 {
            return Err(self.cut());
        }
        self.left -= count as u64;
        Ok(count)
    }

    /// Passes over what is left of the current entry.
    pub(crate) fn skip_content(&mut self) -> Result<(), TarError> {
        let mut scratch = [0u8; 16 * 1024];
        while self.left + self.padding > 0 {
            let wanted = usize::try_from(self.left + self.padding).unwrap_or(usize::MAX).min(scratch.len());
            let count = self.read_some(&mut scratch[..wanted])? as u64;
            if count == 0 {
                return Err(self.cut());
            }
            let content = count.min(self.left);
            self.left -= content;
            self.padding -= count - content;
        }
        self.entry.clear();
        Ok(())
    }

    /// Reads and forgets everything up to the end of the stream.
    pub(crate) fn drain(&mut self) -> Result<(), TarError> {
        let mut scratch = [0u8; 16 * 1024];
        while self.read_some(&mut scratch)? > 0 {}
        Ok(())
    }

    pub(crate) fn into_inner(self) -> R {
        self.inner
    }

    fn read_some(&mut self, buffer: &mut [u8]) -> Result<usize, TarError> {
        let buffered = (self.end - self.start).min(buffer.len());
        if buffered > 0 {
            buffer[..buffered].copy_from_slice(&self.window[self.start..self.start + buffered]);
            self.consume(buffered);
            return Ok(buffered);
        }
        loop {
            match self.inner.read(buffer) {
                Ok(count) => {
                    self.offset += count as u64;
                    return Ok(count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(TarError::Io { offset: self.offset, source }),
            }
        }
    }

    fn cut(&self) -> TarError {
        TarError::CutEntry {
            offset: self.offset,
            entry: self.entry.clone(),
            missing: self.left.saturating_add(self.padding),
        }
    }
}
