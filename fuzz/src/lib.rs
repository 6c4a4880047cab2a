//! Everything in this workspace that parses foreign bytes, as functions that take any bytes at all.
//!
//! A target returns if the code under test gave an answer or an error. It panics if that code panicked, or if the
//! answer breaks a promise: what is parsed is written back as the same thing, no listed name leaves its directory,
//! no output is larger than its limit.
//!
//! Two drivers run the same targets:
//!
//! * `cargo test -p fuzz`: changes the [seeds](Target::seeds) at random for a few seconds per target, on any tool
//!   chain and without a network. `CVMFS_FUZZ_SECONDS` sets the time, `CVMFS_FUZZ_SEED` repeats a run. An input that
//!   breaks a target is left in `target/fuzz`.
//! * libFuzzer, guided by coverage, works on stable without a sanitizer:
//!   `FUZZ_TARGET=catalog cargo fuzz run any --features libfuzzer --sanitizer none`.
//!   `cargo test -p fuzz seeds -- --ignored` writes the seeds to `target/fuzz/seeds/TARGET` for it.
//!
//! An input that once broke a target stays in `regressions/TARGET` and is run first.

mod chunk_lists;
mod configuration;
mod control;
mod conversions;
mod databases;
mod documents;
pub mod driver;
mod fixtures;
mod images;
mod layer_service;
mod network;
mod plugin;
mod signed;
mod snapshots;

/// Something that parses bytes.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name.
    pub name: &'static str,
    /// Feeds it.
    pub run: fn(&[u8]),
    /// Inputs that are good, to be made bad.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Words of the language of its inputs.
    pub words: &'static [&'static str],
}

/// All targets.
pub const TARGETS: [Target; 25] = [
    signed::MANIFEST,
    signed::WHITELIST,
    signed::KEYS,
    signed::BLACKLIST,
    databases::CATALOG,
    databases::CATALOG_ROWS,
    databases::HISTORY,
    databases::REFLOG,
    snapshots::SNAPSHOT,
    chunk_lists::CHUNK_LIST,
    documents::XATTRS,
    documents::COMPRESSED,
    documents::NAMES,
    configuration::CONFIGURATION,
    configuration::VARIANT_LINK,
    control::CONTROL,
    network::PROXY_SCRIPT,
    network::GEO_REPLY,
    images::DESCRIPTOR,
    images::LAYER,
    images::REGISTRY,
    conversions::WISH_LIST,
    conversions::POLICY,
    plugin::REQUEST,
    layer_service::DOCUMENTS,
];

/// The target with this name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

/// Takes bytes apart, as the structured targets do: whatever is missing is zero.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bytes<'a>(pub(crate) &'a [u8]);

impl<'a> Bytes<'a> {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    pub(crate) fn number(&mut self) -> u64 {
        // Short numbers are as likely as long ones, and those around powers of two likelier than others.
        match self.byte() % 8 {
            0 => 0,
            1 => 1,
            2 => u64::from(self.byte()),
            3 => u64::from(self.byte()) << 12,
            4 => 1_u64.wrapping_shl(self.byte().into()).wrapping_sub(1),
            5 => 1_u64.wrapping_shl(self.byte().into()),
            6 => u64::from(self.byte()).wrapping_neg(),
            _ => {
                let mut bytes = [0; 8];
                let taken = self.take(8);
                bytes[..taken.len()].copy_from_slice(taken);
                u64::from_le_bytes(bytes)
            }
        }
    }

    pub(crate) fn take(&mut self, length: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        taken
    }
}
