//! Answers about the cache.

use std::time::Duration;

use cvmfs_client::cache::{CacheEntry, Listing};
use cvmfs_client::deadline::Deadline;
use cvmfs_client::snapshot::Located;
use cvmfs_client::store::{Asked, ChunkedFile, Context as Reading};
use cvmfs_format::{ObjectKind, ObjectName};

use super::answers::{Context, printable};
use super::command::{Command, Listed};
use crate::filesystem::chain;

const MEGABYTE: u64 = 1024 * 1024;
/// Smallest limit in megabytes that can be set: with less a cache holds too little of anything.
const LOWEST_LIMIT: u64 = 1000;
/// Time to fetch what is pinned.
const PIN_PATIENCE: Duration = Duration::from_secs(55);

pub(super) fn answer(context: &Context, command: &Command) -> String {
    let cache = context.mount.view.repository().store().cache();
    match command {
        Command::CacheSize => {
            let status = context.status();
            cache_size(status.cache_used, status.cache_pinned)
        }
        Command::CacheInstance => cache.describe(),
        Command::CacheList(listed) => {
            let listing = match listed {
                Listed::All => Listing::All,
                Listed::Pinned => Listing::Pinned,
                Listed::Catalogs => Listing::Catalogs,
            };
            cache.list(listing).iter().map(line).collect()
        }
        Command::CacheLimitGet => match context.status().cache_limit {
            u64::MAX => "-1".into(),
            limit => (limit / MEGABYTE).to_string(),
        },
        Command::CacheLimitSet(megabytes) if *megabytes < LOWEST_LIMIT => {
            format!("New limit too low (minimum {LOWEST_LIMIT})")
        }
        Command::CacheLimitSet(megabytes) => {
            cache.set_limit(megabytes.saturating_mul(MEGABYTE));
            "OK".into()
        }
        Command::Cleanup(megabytes) if cache.shrink_to(megabytes.saturating_mul(MEGABYTE)) => "OK".into(),
        Command::Cleanup(_) => "Not fully cleaned (there might be pinned chunks)".into(),
        Command::CleanupRate(minutes) => {
            cache.cleanups_within(Duration::from_secs(minutes.saturating_mul(60))).to_string()
        }
        Command::Evict(path) => match context.regular_file(path) {
            Some(file) => {
                evict(context, &file);
                "OK".into()
            }
            None => "No such regular file".into(),
        },
        Command::Pin(path) => match context.regular_file(path).map(|file| pin(context, &file)) {
            Some(Ok(())) => "OK".into(),
            Some(Err(reason)) => {
                tracing::warn!(path = printable(path), reason, "a file cannot be pinned");
                "No such regular file or pinning failed".into()
            }
            None => "No such regular file or pinning failed".into(),
        },
        Command::TearDownToReadOnly => {
            cache.tear_down_to_read_only();
            "In read-only mode".into()
        }
        _ => "not supported".into(),
    }
}

/// Where an entry belongs, or its name where nobody noted that.
fn line(entry: &CacheEntry) -> String {
    let shown = entry.hint.as_deref().unwrap_or(&entry.name);
    format!("{}\n", printable(shown.as_bytes()))
}

/// A file as the store asks for it.
enum Content {
    Whole(ObjectName),
    Chunked(ChunkedFile),
}

fn content(context: &Context, file: &Located) -> Result<Content, String> {
    let entry = &file.entry;
    if entry.is_chunked() {
        let snapshot = context.mount.view.repository().snapshot();
        let chunks = snapshot.chunks(file, Deadline::after(super::answers::PATH_PATIENCE));
        let chunks = chunks.map_err(|error| chain(&error))?;
        return Ok(Content::Chunked(ChunkedFile {
            chunks,
            compression: entry.compression(),
            size: entry.size,
        }));
    }
    let hash = entry.hash.ok_or("the catalog names no content")?;
    Ok(Content::Whole(ObjectName::new(hash, ObjectKind::File)))
}

fn evict(context: &Context, file: &Located) {
    let store = context.mount.view.repository().store();
    match content(context, file) {
        Ok(Content::Whole(name)) => {
            store.unpin(&name, file.entry.compression());
            store.forget(&name, file.entry.compression());
        }
        Ok(Content::Chunked(file)) => {
            store.forget_chunked(&file);
        }
        Err(_) => {}
    }
}

fn pin(context: &Context, file: &Located) -> Result<(), String> {
    let store = context.mount.view.repository().store();
    let entry = &file.entry;
    let reading = Reading { path: Some(&file.path), is_external: entry.is_external(), ..Reading::default() };
    let deadline = Deadline::after(PIN_PATIENCE);
    let pinned = match content(context, file)? {
        Content::Whole(name) => {
            store.pin(&Asked::new(name, entry.compression(), Some(entry.size)).within(reading), deadline)
        }
        Content::Chunked(file) => store.pin_chunked(&file, reading, deadline),
    };
    pinned.map_err(|error| error.to_string())
}

fn cache_size(used: u64, pinned: u64) -> String {
    format!(
        "Current cache size is {}MB ({used} Bytes), pinned: {}MB ({pinned} Bytes)",
        used / MEGABYTE,
        pinned / MEGABYTE
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_is_told_as_tools_expect_it() {
        assert_eq!(
            cache_size(3 * MEGABYTE + 1, MEGABYTE),
            "Current cache size is 3MB (3145729 Bytes), pinned: 1MB (1048576 Bytes)"
        );
    }
}
