//! Answers about the cache.

use super::answers::Context;
use super::command::Command;

const MEGABYTE: u64 = 1024 * 1024;

pub(super) fn answer(context: &Context, command: &Command) -> String {
    let store = context.mount.view.repository().store();
    match command {
        Command::CacheSize => {
            let status = context.status();
            cache_size(status.cache_used, status.cache_pinned)
        }
        Command::CacheInstance => {
            format!("Posix cache manager (cache directory: {})", store.cache().directory().display())
        }
        Command::CacheLimitGet => (context.status().cache_limit / MEGABYTE).to_string(),
        Command::Evict(path) => match context.regular_file(path) {
            Some(file) => {
                if let Some(hash) = file.entry.hash {
                    let name = cvmfs_format::ObjectName::new(hash, cvmfs_format::ObjectKind::File);
                    store.forget(&name, file.entry.compression());
                }
                "OK".into()
            }
            None => "No such regular file".into(),
        },
        _ => "not supported".into(),
    }
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
