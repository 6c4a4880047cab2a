//! Lists of chunks as the client opens them.

use std::time::Duration;

use cvmfs_client::deadline::Deadline;
use cvmfs_client::network::FetchError;
use cvmfs_client::store::ChunkedFile;
use cvmfs_format::catalog::Chunk;
use cvmfs_format::{Compression, ContentHash, HashAlgorithm};

use crate::snapshots::Bench;
use crate::{Bytes, Target};

/// Largest chunk that the client takes, see there.
const MAX_CHUNK: u64 = 64 << 20;

pub(crate) const CHUNK_LIST: Target = Target {
    name: "chunk_list",
    run: chunk_list,
    seeds: || {
        // A count, the offset of a read, then sizes, each in the form of `Bytes::number`.
        vec![
            vec![0, 0, 0],
            vec![2, 2, 5, 2, 100, 2, 200],
            vec![3, 3, 1, 3, 16, 3, 16, 2, 7],
            vec![1, 5, 63, 5, 26],
            vec![2, 1, 5, 26, 5, 26],
        ]
    },
    words: &[],
};

fn chunk_list(bytes: &[u8]) {
    thread_local! {
        static BENCH: Bench = Bench::new();
    }
    let mut bytes = Bytes(bytes);
    let count = bytes.byte() % 40;
    let offset = bytes.number();
    let mut chunks: Vec<Chunk> = Vec::new();
    let mut end = 0_u64;
    for number in 0..count {
        let size = bytes.number();
        // One in sixteen begins somewhere else.
        let begin = if bytes.0.first().is_some_and(|byte| byte % 16 == 15) { bytes.number() } else { end };
        let hash = ContentHash::of(HashAlgorithm::Sha1, &[number]);
        chunks.push(Chunk { offset: begin, size, hash });
        end = begin.wrapping_add(size);
    }
    let size = if bytes.byte() % 8 == 7 { bytes.number() } else { end };
    let is_sound = sound(&chunks, size);
    let file = ChunkedFile { chunks, compression: Compression::Zlib, size };
    BENCH.with(|bench| {
        match bench.store.chunked(&file) {
            Err(FetchError::Refused { reason, .. }) => assert!(!is_sound, "{file:?} is refused: {reason}"),
            // A sparse file of this size may be more than the file system can have.
            Err(_) => assert!(is_sound, "{file:?} is not refused"),
            Ok(handle) => {
                assert!(is_sound, "{file:?} is not refused");
                let mut buffer = [0; 5000];
                for offset in [offset, offset % size.max(1), size.saturating_sub(1), u64::MAX] {
                    let deadline = Deadline::after(Duration::from_secs(20));
                    match handle.read_at(&mut buffer, offset, deadline) {
                        Ok(length) => {
                            assert!(length == 0 && offset >= size, "bytes out of nowhere at {offset}");
                        }
                        Err(error) => assert!(offset < size, "at {offset} beyond the end: {error}"),
                    }
                }
            }
        }
        // What was begun is of no use to the next one.
        for entry in
            std::fs::read_dir(bench.store.cache().directory().join("chunked")).into_iter().flatten().flatten()
        {
            let _ = std::fs::remove_file(entry.path());
        }
    });
}

/// The rule, written down once more.
fn sound(chunks: &[Chunk], size: u64) -> bool {
    let mut end = Some(0_u64);
    for chunk in chunks {
        if Some(chunk.offset) != end || chunk.size == 0 || chunk.size > MAX_CHUNK {
            return false;
        }
        end = chunk.offset.checked_add(chunk.size);
    }
    end == Some(size)
}
