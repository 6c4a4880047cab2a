//! The locks and counters of code whose schedules are explored.
//!
//! Modules that take them from here are compiled a second time by `tests/schedules.rs`, where this module is
//! replaced by one that runs every test under many schedules.

pub(crate) use std::sync::atomic;
pub(crate) use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
