//! Files that must stay: catalogs while they are attached, and what an administrator has pinned.
//!
//! Pins are a promise of this process to its users and a request to all processes on the cache not to evict. They end
//! with the process. Each process keeps its pins in a file of fixed slots in its own directory ([`super::presence`]),
//! where whoever evicts reads them.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::sync::{Mutex, PoisonError};

use super::{Cache, CacheName};

/// Bytes of a slot: the longest name and the size.
const SLOT: usize = 128;
/// Most pins of one process: it bounds what others read. Open catalogs are bounded by half of it.
const MAX_PINS: usize = 2048;

/// Why a file cannot be pinned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PinError {
    /// Pinned files may take half of the cache, and this one would not fit.
    #[error("pinned files already take half of the cache")]
    NoRoom,
    /// The file is not in the cache.
    #[error("the file is not in the cache")]
    NotCached,
}

/// Keeps a file in the cache until it is dropped.
#[derive(Debug)]
pub struct Pinned {
    cache: Cache,
    name: CacheName,
}

impl Pinned {
    pub(super) fn new(cache: &Cache, name: &CacheName) -> Self {
        Self { cache: cache.clone(), name: name.clone() }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.cache.release(&self.name);
    }
}

/// The names in slots, with the bytes that the files count.
#[derive(Debug, Default)]
pub(super) struct PinSlots {
    names: HashSet<Box<str>>,
    pub(super) bytes: u64,
}

impl PinSlots {
    pub(super) fn contains(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    fn add(&mut self, name: &str, bytes: u64) {
        if self.names.insert(name.into()) {
            self.bytes = self.bytes.saturating_add(bytes);
        }
    }
}

/// Reads a process's pins.
pub(super) fn read(file: &File, into: &mut PinSlots) {
    let mut bytes = vec![0; SLOT * MAX_PINS];
    let length = file.read_at(&mut bytes, 0).unwrap_or(0);
    for slot in bytes.get(..length).unwrap_or_default().chunks_exact(SLOT) {
        let Some((size, name)) = slot.split_first_chunk::<8>() else { continue };
        let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
        if let Some(name) = name.get(..end).and_then(|name| std::str::from_utf8(name).ok())
            && !name.is_empty()
        {
            into.add(name, u64::from_le_bytes(*size));
        }
    }
}

/// The pins of this process.
#[derive(Debug, Default)]
pub(super) struct Pins(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    pins: HashMap<CacheName, Pin>,
    free: Vec<usize>,
    used: usize,
}

#[derive(Debug)]
struct Pin {
    holders: usize,
    slot: usize,
    bytes: u64,
    hint: Option<Arc<str>>,
}

/// What became of a pin.
pub(super) enum Taken {
    /// It is the first one of this file in this process.
    First,
    /// The file was pinned already.
    Again,
    /// There is no slot left.
    Full,
}

impl Pins {
    /// Takes a pin; `file` is where this process's pins are told to others.
    pub(super) fn take(
        &self,
        file: Option<&File>,
        name: &CacheName,
        bytes: u64,
        hint: Option<&str>,
    ) -> Taken {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pin) = table.pins.get_mut(name) {
            pin.holders += 1;
            return Taken::Again;
        }
        let slot = match table.free.pop() {
            Some(slot) => slot,
            None if table.used < MAX_PINS => {
                table.used += 1;
                table.used - 1
            }
            None => return Taken::Full,
        };
        write_slot(file, slot, Some((name, bytes)));
        table.pins.insert(name.clone(), Pin { holders: 1, slot, bytes, hint: hint.map(Arc::from) });
        Taken::First
    }

    /// Gives a pin back. The bytes of the file if it was the last one.
    pub(super) fn release(&self, file: Option<&File>, name: &CacheName) -> Option<u64> {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let pin = table.pins.get_mut(name)?;
        pin.holders -= 1;
        if pin.holders > 0 {
            return None;
        }
        let pin = table.pins.remove(name)?;
        table.free.push(pin.slot);
        write_slot(file, pin.slot, None);
        Some(pin.bytes)
    }

    /// Tells all pins anew in another file.
    pub(super) fn tell(&self, file: &File) {
        let table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, pin) in &table.pins {
            write_slot(Some(file), pin.slot, Some((name, pin.bytes)));
        }
    }

    pub(super) fn hint(&self, name: &CacheName) -> Option<Arc<str>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pins.get(name)?.hint.clone()
    }
}

fn write_slot(file: Option<&File>, slot: usize, pin: Option<(&CacheName, u64)>) {
    let mut bytes = [0_u8; SLOT];
    if let Some((name, size)) = pin {
        let name = name.as_str().as_bytes();
        let (number, text) = bytes.split_at_mut(8);
        number.copy_from_slice(&size.to_le_bytes());
        if let Some(text) = text.get_mut(..name.len()) {
            text.copy_from_slice(name);
        }
    }
    if let Some(file) = file {
        // A pin that is not told may be evicted by others; who holds the file open keeps it.
        let _ = file.write_all_at(&bytes, (slot * SLOT) as u64);
    }
}
