//! The device while there is no worker.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::child::{Signals, Wish, poll_for};
use crate::protocol::request::{self, opcode};
use crate::protocol::{Fields, REPLY_HEADER};
use crate::shared_state::SharedState;

/// As the workers': the kernel refuses to read less than 8 KiB.
const BUFFER: usize = 64 << 10;

/// Answers all requests with EIO for some time, so that their callers do not wait for ever.
pub(super) fn answer_with_error(device: &OwnedFd, time: Duration, signals: &Signals) -> Wish {
    let end = Instant::now() + time;
    let mut buffer = vec![1; BUFFER];
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let mut polled = [PollFd::new(device, PollFlags::IN), signals.as_poll()];
        poll_for(&mut polled, left);
        let events = polled[0].revents();
        let wish = signals.take();
        if wish != Wish::None || left.is_zero() || events.contains(PollFlags::ERR) {
            return wish;
        }
        if events.contains(PollFlags::IN)
            && let Ok(length) = rustix::io::read(device.as_fd(), &mut buffer)
            && let Some(answer) = error_for(buffer.get(..length).unwrap_or_default())
        {
            let _ = rustix::io::write(device.as_fd(), &answer);
        }
    }
}

/// Answers what a dead worker left with EIO, on a kernel that does not send it again.
pub(super) fn answer_left_with_error(device: &OwnedFd, state: &SharedState) {
    for answer in state.take_unanswered().iter().filter_map(|message| error_for(message)) {
        let _ = rustix::io::write(device.as_fd(), &answer);
    }
}

/// The answer EIO to a request; none if it expects no answer.
fn error_for(message: &[u8]) -> Option<[u8; REPLY_HEADER]> {
    let number = request::opcode_of(message);
    if matches!(number, opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT) {
        return None;
    }
    let unique = Fields(message.get(8..)?).u64()?;
    let mut answer = [0; REPLY_HEADER];
    answer[..4].copy_from_slice(&(REPLY_HEADER as u32).to_ne_bytes());
    // Releases succeed: there is nothing that could fail.
    let errno = if matches!(number, opcode::RELEASE | opcode::RELEASEDIR) { 0 } else { libc::EIO };
    answer[4..8].copy_from_slice(&(-errno).to_ne_bytes());
    answer[8..].copy_from_slice(&unique.to_ne_bytes());
    Some(answer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::request::tests::message;

    #[test]
    fn without_a_worker_callers_get_an_error_and_nothing_else_is_answered() {
        let answer = error_for(&message(opcode::LOOKUP, 77, 1, b"x\0")).unwrap();
        assert_eq!(answer[4..8], (-libc::EIO).to_ne_bytes());
        assert_eq!(answer[8..], 77_u64.to_ne_bytes());
        assert_eq!(error_for(&message(opcode::RELEASE, 77, 1, &[0; 24])).unwrap()[4..8], [0; 4]);
        assert_eq!(error_for(&message(opcode::FORGET, 77, 1, &[0; 8])), None);
        assert_eq!(error_for(&[1; 12]), None);
    }
}
