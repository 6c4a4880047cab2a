//! Bytes on their way into the storage.
//!
//! Large buffers are used again: the system clears the memory of new ones, and a read into them would clear it once
//! more, which together takes a tenth of the time of compressing.

use std::io::{self, Read};
use std::sync::{Mutex, PoisonError};

/// Smaller ones come from the heap, and cost next to nothing.
const LARGE: usize = 1 << 20;
/// Buffers that wait to be used again: the reader takes one as soon as there is room for it.
const MAX_WAITING: usize = 1;

/// A whole small file, or a part of a large one.
#[derive(Debug)]
pub(crate) struct Piece {
    /// What is behind the length has no meaning.
    buffer: Vec<u8>,
    length: usize,
}

impl Piece {
    pub(crate) fn bytes(&self) -> &[u8] {
        self.buffer.get(..self.length).unwrap_or_default()
    }

    pub(crate) fn len(&self) -> usize {
        self.length
    }

    /// Appends up to `count` bytes of `reader`; fewer only at its end. Returns how many.
    pub(crate) fn read_from(&mut self, reader: &mut impl Read, count: usize) -> io::Result<usize> {
        let (begin, end) = (self.length, self.length.saturating_add(count));
        if self.buffer.len() < end {
            self.buffer.resize(end, 0);
        }
        while self.length < end {
            match reader.read(self.buffer.get_mut(self.length..end).unwrap_or_default()) {
                Ok(0) => break,
                Ok(read) => self.length = (self.length + read).min(end),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(self.length - begin)
    }

    /// Keeps the first `length` bytes and moves the others to `next`, which is empty.
    pub(crate) fn cut(&mut self, length: usize, next: &mut Piece) {
        let moved = self.bytes().get(length..).unwrap_or_default();
        if next.buffer.len() < moved.len() {
            next.buffer.resize(moved.len(), 0);
        }
        next.buffer.get_mut(..moved.len()).unwrap_or_default().copy_from_slice(moved);
        next.length = moved.len();
        self.length = self.length.min(length);
    }
}

#[cfg(test)]
impl From<Vec<u8>> for Piece {
    fn from(buffer: Vec<u8>) -> Piece {
        Piece { length: buffer.len(), buffer }
    }
}

/// Large buffers that wait to be used again.
#[derive(Debug, Default)]
pub(crate) struct Buffers(Mutex<Vec<Vec<u8>>>);

impl Buffers {
    /// An empty piece with room for `capacity` bytes; it grows if there are more.
    pub(crate) fn piece(&self, capacity: usize) -> Piece {
        // A much larger one would make queued pieces take more memory than is counted for them.
        let suits = |buffer: &mut Vec<u8>| capacity >= LARGE && buffer.len() / 2 <= capacity;
        let waiting = self.lock().pop_if(suits);
        // The system gives large ones cleared.
        Piece { buffer: waiting.unwrap_or_else(|| vec![0; capacity]), length: 0 }
    }

    /// Takes back what is stored.
    pub(crate) fn give_back(&self, piece: Piece) {
        if piece.buffer.len() >= LARGE {
            let mut waiting = self.lock();
            if waiting.len() < MAX_WAITING {
                waiting.push(piece.buffer);
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_that_is_used_again_shows_nothing_of_what_was_in_it() {
        let buffers = Buffers::default();
        let mut first = buffers.piece(LARGE);
        assert_eq!(first.read_from(&mut &vec![7; LARGE + 3][..], LARGE + 3).unwrap(), LARGE + 3);
        buffers.give_back(first);
        let mut second = buffers.piece(LARGE);
        assert_eq!((second.len(), second.bytes()), (0, &b""[..]));
        assert_eq!(second.read_from(&mut &b"short"[..], 100).unwrap(), 5);
        assert_eq!(second.bytes(), b"short");
    }

    #[test]
    fn a_cut_moves_what_follows_it() {
        let buffers = Buffers::default();
        let mut piece = Piece::from(b"first and second".to_vec());
        let mut next = buffers.piece(2);
        piece.cut(6, &mut next);
        assert_eq!((piece.bytes(), next.bytes()), (&b"first "[..], &b"and second"[..]));
        next.read_from(&mut &b" and third"[..], 4).unwrap();
        assert_eq!(next.bytes(), b"and second and");
    }
}
