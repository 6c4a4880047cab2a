//! Open regular files: one mode per node, one backing id per node, shared with a successor.
//!
//! The kernel refuses (EIO) a node that is open with two backing ids at once, and one
//! that is open by passthrough and by READ at once. So the mode is decided by the first
//! open and kept until the last release.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use crate::protocol::REPEAT_BIT;
use crate::shared_state::{MAX_OPEN_FILES, SharedState};
use crate::syscall;

/// How reads of an open file are answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// The kernel reads the backing file itself.
    Passthrough(u32),
    /// READ requests come to the worker.
    Plain,
}

/// What an opener can offer.
#[derive(Debug)]
pub(crate) enum Offer<'a> {
    /// The complete, verified cache file.
    File(&'a File),
    /// Only plain reads.
    PlainOnly,
    /// Nothing: the node must be open already.
    Nothing,
}

/// Table of open files.
#[derive(Debug)]
pub(crate) struct Handles {
    state: Arc<SharedState>,
    device: OwnedFd,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    nodes: HashMap<u64, (Mode, u32)>,
    by_unique: HashMap<u64, u32>,
    free: Vec<u32>,
    never_used: u32,
}

impl Handles {
    /// Rebuilds the table from what predecessors left.
    pub(crate) fn restore(state: Arc<SharedState>, device: OwnedFd) -> Handles {
        let mut table = Table::default();
        for slot in 0..state.slots_used() {
            let Some(open) = state.slot(slot) else {
                continue;
            };
            // Slots below the highest used one that are free now can be used again.
            table.free.extend(table.never_used..slot);
            table.never_used = slot + 1;
            let mode = if open.backing == 0 { Mode::Plain } else { Mode::Passthrough(open.backing) };
            table.nodes.entry(open.node).or_insert((mode, 0)).1 += 1;
            table.by_unique.insert(open.unique, slot);
        }
        Handles { state, device, table: Mutex::new(table) }
    }

    /// Probes passthrough with `file` and closes backing ids that a predecessor created
    /// but did not record. Returns whether passthrough works on this connection.
    ///
    /// The kernel hands ids out in rising order: whatever lies between the last sweep and
    /// a fresh id is either recorded or an orphan.
    pub(crate) fn sweep(&self, file: &File) -> io::Result<()> {
        let table = self.lock();
        let probe = syscall::open_backing(self.device.as_fd(), file.as_fd())?;
        let recorded: std::collections::HashSet<u32> = table
            .nodes
            .values()
            .filter_map(|(mode, _)| match mode {
                Mode::Passthrough(id) => Some(*id),
                Mode::Plain => None,
            })
            .collect();
        for id in self.state.swept_backing().max(1)..=probe {
            if !recorded.contains(&id) {
                // An id that does not exist any more answers ENOENT, which is as good.
                let _ = syscall::close_backing(self.device.as_fd(), id);
            }
        }
        self.state.set_swept_backing(probe);
        Ok(())
    }

    /// Opens `node` for the request `unique` and returns handle number and mode.
    ///
    /// A repeated request gets the handle that was recorded for it.
    ///
    /// # Errors
    /// ENFILE if the table is full, ENOENT if nothing is offered and the node is not open, or what the kernel says of a backing file.
    pub(crate) fn open(&self, node: u64, unique: u64, offer: &Offer<'_>) -> io::Result<(u64, Mode)> {
        let plain_unique = unique & !REPEAT_BIT;
        let mut table = self.lock();
        // Numbers are never used again: one that is known comes a second time, whether the kernel says so or not.
        if let Some(slot) = table.by_unique.get(&plain_unique).copied()
            && let Some(open) = self.state.slot(slot)
            && open.node == node
        {
            let mode = if open.backing == 0 { Mode::Plain } else { Mode::Passthrough(open.backing) };
            return Ok((handle(slot, open.generation), mode));
        }
        let slot = match table.free.pop() {
            Some(slot) => slot,
            None if (table.never_used as usize) < MAX_OPEN_FILES => {
                table.never_used += 1;
                table.never_used - 1
            }
            None => return Err(io::Error::from_raw_os_error(libc::ENFILE)),
        };
        let mode = match (table.nodes.get(&node), offer) {
            (Some((mode, _)), _) => *mode,
            (None, Offer::PlainOnly) => Mode::Plain,
            (None, Offer::Nothing) => {
                table.free.push(slot);
                return Err(io::Error::from_raw_os_error(libc::ENOENT));
            }
            (None, Offer::File(file)) => match syscall::open_backing(self.device.as_fd(), file.as_fd()) {
                Ok(id) => Mode::Passthrough(id),
                Err(error) => {
                    table.free.push(slot);
                    return Err(error);
                }
            },
        };
        table.nodes.entry(node).or_insert((mode, 0)).1 += 1;
        table.by_unique.insert(plain_unique, slot);
        let backing = if let Mode::Passthrough(id) = mode { id } else { 0 };
        let generation = self.state.fill_slot(slot, node, plain_unique, backing);
        Ok((handle(slot, generation), mode))
    }

    /// Whether the request `unique` was given a handle before.
    pub(crate) fn knows(&self, unique: u64) -> bool {
        self.lock().by_unique.contains_key(&(unique & !REPEAT_BIT))
    }

    /// The mode in which `node` is open now.
    pub(crate) fn mode(&self, node: u64) -> Option<Mode> {
        self.lock().nodes.get(&node).map(|(mode, _)| *mode)
    }

    /// Gives the handle back; returns true if it was the node's last. A repeated release
    /// finds the generation gone and does nothing.
    pub(crate) fn release(&self, handle: u64) -> bool {
        let slot = handle as u32;
        let generation = ((handle >> 32) as u32).wrapping_sub(1);
        let mut table = self.lock();
        let Some(open) = self.state.slot(slot).filter(|open| open.generation == generation) else {
            return false;
        };
        self.state.free_slot(slot, generation);
        table.by_unique.remove(&open.unique);
        table.free.push(slot);
        let Some((mode, count)) = table.nodes.get_mut(&open.node) else {
            return false;
        };
        *count -= 1;
        if *count > 0 {
            return false;
        }
        if let Mode::Passthrough(id) = *mode {
            let _ = syscall::close_backing(self.device.as_fd(), id);
        }
        table.nodes.remove(&open.node);
        true
    }

    /// Nodes that are open now.
    pub(crate) fn open_nodes(&self) -> usize {
        self.lock().nodes.len()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Handle numbers are never 0: directories and stateless opens use that.
fn handle(slot: u32, generation: u32) -> u64 {
    (u64::from(generation) + 1) << 32 | u64::from(slot)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plain opens need no FUSE device; any descriptor stands for it.
    fn handles(state: &Arc<SharedState>) -> Handles {
        let device = File::open("/dev/null").unwrap();
        Handles::restore(state.clone(), device.into())
    }

    fn state() -> Arc<SharedState> {
        let memory = SharedState::create_memory().unwrap();
        Arc::new(SharedState::map(memory.as_fd()).unwrap())
    }

    #[test]
    fn a_repeated_open_gets_the_handle_of_the_first_try() {
        let state = state();
        let first = handles(&state);
        let (fh, _) = first.open(77, 1000, &Offer::PlainOnly).unwrap();
        drop(first);
        let second = handles(&state);
        assert_eq!(second.open(77, 1000 | REPEAT_BIT, &Offer::PlainOnly).unwrap(), (fh, Mode::Plain));
        assert!(second.release(fh), "one open, one release");
        assert!(!second.release(fh), "a repeated release does nothing");
        assert_eq!(second.open_nodes(), 0);
    }

    #[test]
    fn slots_are_used_again_after_a_takeover_and_their_old_handles_are_dead() {
        let state = state();
        let first = handles(&state);
        let (a, _) = first.open(1, 10, &Offer::PlainOnly).unwrap();
        let (b, _) = first.open(2, 11, &Offer::PlainOnly).unwrap();
        first.release(a);
        drop(first);
        let second = handles(&state);
        let (c, _) = second.open(3, 12, &Offer::PlainOnly).unwrap();
        assert_eq!(c as u32, a as u32, "the free slot is found");
        assert_ne!(c, a);
        assert!(!second.release(a));
        assert_eq!(second.mode(2), Some(Mode::Plain));
        assert!(second.release(b));
    }
}
