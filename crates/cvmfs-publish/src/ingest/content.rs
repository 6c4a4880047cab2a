//! File contents: whole into one object, or cut into chunks (repository format §18).

use std::io::{self, Read};
use std::sync::atomic::Ordering;

use cvmfs_format::ObjectKind;
use cvmfs_format::chunking::ChunkDetector;
use layer_tar::{LayerPath, TarError};

use super::Sink;
use crate::error::PublishError;
use crate::piece::Piece;
use crate::tree::{FileContent, Pieces};

/// Read in steps of this size, so that an interrupt is noticed and the detector runs over data still in the
/// processor's cache.
const STEP: usize = 256 << 10;

impl Sink<'_> {
    /// Stores `size` bytes of `reader`, the content of the file at `path`.
    pub(super) fn store(
        &mut self,
        path: &LayerPath,
        reader: &mut impl Read,
        size: u64,
    ) -> Result<FileContent, PublishError> {
        let mut detector =
            ChunkDetector::new(self.chunk_sizes).map_err(|error| PublishError::Usage(error.to_string()))?;
        let cutting = detector.applies_to(size);
        let mut piece = self.piece(size);
        // bytes of `piece` that the detector has seen
        let mut examined = 0;
        let mut offset = 0;
        let mut remaining = size;
        let mut chunks = Vec::new();
        while remaining > 0 {
            self.interrupt.check()?;
            let step = usize::try_from(remaining).unwrap_or(STEP).min(STEP);
            let read = piece.read_from(reader, step).map_err(read_failure)?;
            if read < step {
                return Err(PublishError::entry(path.as_bytes(), "became shorter while it was read"));
            }
            let read = read as u64;
            remaining -= read;
            self.report.bytes_in += read;
            self.counters.bytes_in.fetch_add(read, Ordering::Relaxed);
            while let Some(cut) = cutting.then(|| detector.next_cut(&piece.bytes()[examined..])).flatten() {
                let mut next = self.piece(remaining);
                piece.cut(examined + cut, &mut next);
                let chunk = std::mem::replace(&mut piece, next);
                examined = 0;
                let length = chunk.len() as u64;
                let ticket = self.pipeline.submit(ObjectKind::Chunk, chunk, self.encoding)?;
                chunks.push((offset, length, ticket));
                offset += length;
            }
            examined = piece.len();
        }
        let compression = self.encoding.compression;
        let pieces = if chunks.is_empty() {
            Pieces::Whole(self.pipeline.submit(ObjectKind::File, piece, self.encoding)?)
        } else {
            let length = piece.len() as u64;
            let ticket = self.pipeline.submit(ObjectKind::Chunk, piece, self.encoding)?;
            chunks.push((offset, length, ticket));
            Pieces::Chunks(chunks.into())
        };
        Ok(FileContent { size, compression, pieces })
    }

    /// Stores the content of an empty file.
    pub(crate) fn store_empty(&mut self) -> Result<FileContent, PublishError> {
        self.store(&LayerPath::root(), &mut io::empty(), 0)
    }

    /// Room for what is left of a file, at most a chunk of mean size: larger ones are rare enough to grow.
    fn piece(&self, left: u64) -> Piece {
        self.pipeline.piece(usize::try_from(left.min(self.chunk_sizes.avg)).unwrap_or(STEP))
    }
}

/// Archive errors travel through `Read` as I/O errors; here they become themselves again.
fn read_failure(error: io::Error) -> PublishError {
    match error.downcast::<TarError>() {
        Ok(error) => PublishError::Tar(error),
        Err(error) => PublishError::Input(error),
    }
}
