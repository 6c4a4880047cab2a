//! Requests that the kernel has handed out and waits for, on kernels that do not hand them out again.
//!
//! From Linux 6.9 on the kernel repeats the requests in flight when it is asked to. An older one waits for their
//! answers until the mount ends, so a worker's death must not take them along: there each request is read straight
//! into the memory that workers share, and one that waits for the network is copied to a place of its own there before
//! the next one is read. A successor answers what it finds. One that was answered just before the death is answered
//! twice: the kernel does not take the second answer, and what was opened for the first stays open.

use std::collections::HashSet;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::{Arc, Mutex, PoisonError};

use super::{JOURNAL_USED, KEPT, KEPT_AREA, KEPT_WORDS, READER_AREA, READER_WORDS, SharedState};
use crate::dispatch::READERS;
use crate::protocol::request::{self, opcode};
use crate::protocol::{REPEAT_BIT, REQUEST_HEADER};

/// The number of a request within its message.
const UNIQUE: std::ops::Range<usize> = 8..16;
/// Words of a page: each is touched once, because the kernel brings none in for a dying thread.
const PAGE_WORDS: usize = 512;

/// The record of requests of a connection, for the worker that serves it.
#[derive(Debug)]
pub(crate) struct Journal {
    state: Arc<SharedState>,
    free: Mutex<Vec<usize>>,
}

/// A request that is not answered yet. Dropped when it is.
#[derive(Debug)]
pub(crate) struct Kept {
    journal: Arc<Journal>,
    place: usize,
}

/// A request that predecessors left. Dropped before it is answered it is left to a successor.
#[derive(Debug)]
pub(crate) struct Left {
    /// Marked as one that comes again.
    message: Vec<u8>,
    kept: Option<ManuallyDrop<Kept>>,
}

impl Journal {
    /// The record, and what predecessors left unanswered, in the kernel's order. To be called before a thread reads.
    pub(crate) fn open(state: &Arc<SharedState>) -> (Arc<Journal>, Vec<Left>) {
        let used = state.kept_used();
        let (taken, free): (Vec<usize>, Vec<usize>) =
            (0..used).partition(|place| state.message_at(at(*place), KEPT_WORDS).is_some());
        let journal = Arc::new(Journal { state: state.clone(), free: Mutex::new(free) });
        let of_journal = |place| Kept { journal: journal.clone(), place };
        let mut found: Vec<(Vec<u8>, Option<Kept>)> =
            taken.into_iter().map(of_journal).map(|kept| (kept.message(), Some(kept))).collect();
        for reader in 0..READERS {
            if let Some(message) = state.message_at(of_reader(reader), READER_WORDS) {
                // Kept before its buffer is used again, so that it outlives this worker, too.
                let kept = journal.keep(&message);
                found.push((message, kept));
            }
            for page in (0..READER_WORDS).step_by(PAGE_WORDS) {
                state.word(of_reader(reader) + page).store(0, SeqCst);
            }
        }
        let mut seen = HashSet::new();
        found.sort_by_key(|(message, _)| unique_of(message));
        found.retain(|(message, _)| seen.insert(unique_of(message)));
        let left = found.into_iter().map(|(message, kept)| Left::new(message, kept)).collect();
        (journal, left)
    }

    /// Reads a request for a thread; its length in `buffer`. It counts as unanswered until [`Self::done`].
    ///
    /// # Errors
    /// The device's.
    pub(crate) fn read(&self, reader: usize, device: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
        self.done(reader);
        let area = of_reader(reader);
        let length = self.state.words.read_from(device, area, READER_WORDS)?.min(buffer.len());
        let message = self.state.load_bytes(area, length);
        buffer[..length].copy_from_slice(&message);
        Ok(length)
    }

    /// What the thread read last is answered, or kept.
    pub(crate) fn done(&self, reader: usize) {
        self.state.word(of_reader(reader)).store(0, Release);
    }

    /// Keeps a request until it is answered. `None`, if it is larger than any that waits: then it does not outlive
    /// this worker.
    pub(crate) fn keep(self: &Arc<Journal>, message: &[u8]) -> Option<Kept> {
        let (first, rest) = message.split_first_chunk::<8>()?;
        if message.len() > KEPT_WORDS * 8 {
            return None;
        }
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let place = match free.pop() {
            Some(place) => place,
            None => self.state.use_another_place()?,
        };
        drop(free);
        self.state.store_bytes(at(place) + 1, rest);
        // The mark of one that came again is put on anew when it is read.
        self.state.word(at(place) + 1).fetch_and(!REPEAT_BIT, Relaxed);
        // Length and operation make it valid.
        self.state.word(at(place)).store(u64::from_le_bytes(*first), Release);
        Some(Kept { journal: self.clone(), place })
    }
}

impl Kept {
    fn message(&self) -> Vec<u8> {
        self.journal.state.message_at(at(self.place), KEPT_WORDS).unwrap_or_default()
    }
}

impl Left {
    fn new(mut message: Vec<u8>, kept: Option<Kept>) -> Left {
        let unique = unique_of(&message) | REPEAT_BIT;
        if let Some(bytes) = message.get_mut(UNIQUE) {
            bytes.copy_from_slice(&unique.to_ne_bytes());
        }
        Left { message, kept: kept.map(ManuallyDrop::new) }
    }

    /// The request, marked as one that comes again.
    pub(crate) fn message(&self) -> &[u8] {
        &self.message
    }

    /// It is answered now, or kept anew.
    pub(crate) fn done(self) {
        drop(self.kept.map(ManuallyDrop::into_inner));
    }
}

fn unique_of(message: &[u8]) -> u64 {
    let bytes = message.get(UNIQUE).and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, u64::from_ne_bytes) & !REPEAT_BIT
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.journal.state.word(at(self.place)).store(0, Release);
        self.journal.free.lock().unwrap_or_else(PoisonError::into_inner).push(self.place);
    }
}

impl SharedState {
    /// Requests that a dead worker left unanswered, which are forgotten.
    pub(crate) fn take_unanswered(&self) -> Vec<Vec<u8>> {
        let readers = (0..READERS).map(|reader| (of_reader(reader), READER_WORDS));
        let kept = (0..self.kept_used()).map(|place| (at(place), KEPT_WORDS));
        let take = |(area, words)| {
            let message = self.message_at(area, words)?;
            self.word(area).store(0, SeqCst);
            Some(message)
        };
        readers.chain(kept).filter_map(take).collect()
    }

    /// The unanswered request in an area.
    fn message_at(&self, area: usize, words: usize) -> Option<Vec<u8>> {
        let length = self.word(area).load(Acquire) as u32 as usize;
        let message =
            (REQUEST_HEADER..=words * 8).contains(&length).then(|| self.load_bytes(area, length))?;
        // Nobody waits for an answer to these.
        let is_news = matches!(request::opcode_of(&message), opcode::FORGET | opcode::BATCH_FORGET);
        (!is_news).then_some(message)
    }

    /// Places from this one on were never used.
    fn kept_used(&self) -> usize {
        (self.word(JOURNAL_USED).load(SeqCst) as usize).min(KEPT)
    }

    fn use_another_place(&self) -> Option<usize> {
        let more = |used: u64| (used < KEPT as u64).then_some(used + 1);
        self.word(JOURNAL_USED).fetch_update(SeqCst, SeqCst, more).ok().map(|place| place as usize)
    }
}

fn of_reader(reader: usize) -> usize {
    READER_AREA + reader * READER_WORDS
}

fn at(place: usize) -> usize {
    KEPT_AREA + place * KEPT_WORDS
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::protocol::request::tests::message;

    fn state() -> Arc<SharedState> {
        let memory = SharedState::create_memory().unwrap();
        Arc::new(SharedState::map(memory.as_fd()).unwrap())
    }

    fn numbers(left: &[Left]) -> Vec<u64> {
        left.iter().map(|left| unique_of(left.message())).collect()
    }

    #[test]
    fn what_is_not_answered_outlives_its_worker_and_the_next_one() {
        let state = state();
        let (first, left) = Journal::open(&state);
        assert!(left.is_empty());
        let (device, kernel) = std::os::unix::net::UnixDatagram::pair().unwrap();
        let mut buffer = vec![0; 64 << 10];
        let mut read = |journal: &Journal, reader, unique: u64, number| {
            let request = message(number, unique, 5, b"name\0");
            kernel.send(&request).unwrap();
            let length = journal.read(reader, device.as_fd(), &mut buffer).unwrap();
            assert_eq!(buffer[..length], request);
            request
        };
        let kept: Vec<_> = [7, 8, 9]
            .map(|unique| first.keep(&read(&first, 0, unique, opcode::LOOKUP)).unwrap())
            .into_iter()
            .collect();
        read(&first, 1, 6, opcode::LOOKUP);
        read(&first, 2, 10, opcode::BATCH_FORGET);
        drop(kept.into_iter().nth(1));
        // The others were answered when they were dropped; what was being read and handled is left.
        let (second, left) = Journal::open(&state);
        assert_eq!(numbers(&left), [6, 9], "the last message of reader 0 is in its buffer still");
        // This worker does not come to answer them.
        drop(left);
        read(&second, 0, 11, opcode::GETATTR);
        std::mem::forget(second.keep(&read(&second, 1, 12, opcode::GETXATTR)));
        let (third, left) = Journal::open(&state);
        assert_eq!(numbers(&left), [6, 9, 11, 12], "each once");
        let again = left[0].message().to_vec();
        assert_eq!(again[8..16], (6 | REPEAT_BIT).to_ne_bytes());
        assert_eq!(again[40..], *b"name\0");
        let places = state.kept_used();
        left.into_iter().for_each(Left::done);
        for unique in 0..1000 {
            drop(third.keep(&message(opcode::LOOKUP, unique, 5, b"name\0")));
        }
        assert_eq!(state.kept_used(), places, "places are used again");
        assert!(Journal::open(&state).1.is_empty());
    }

    #[test]
    fn without_a_successor_the_supervisor_takes_what_is_left() {
        let state = state();
        let (journal, _) = Journal::open(&state);
        std::mem::forget(journal.keep(&message(opcode::OPEN, 3, 5, &[0; 8])));
        assert!(journal.keep(&message(opcode::LOOKUP, 4, 5, &[1; 1100])).is_none(), "no name is so long");
        let taken = state.take_unanswered();
        assert_eq!((taken.len(), request::opcode_of(&taken[0])), (1, opcode::OPEN));
        assert!(state.take_unanswered().is_empty());
    }
}
