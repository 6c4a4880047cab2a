//! The program against real registries and repositories on disk.
#![allow(clippy::unwrap_used, reason = "helpers of tests may end the test")]

mod bad_input;
mod conversion;
mod original_verbs;
mod private_registry;
mod signatures;
mod sources;
mod wishes;
mod workplace;
