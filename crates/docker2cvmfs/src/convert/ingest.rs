//! Spooled layers into one revision of the repository.

use std::io::{self, Read};

use cvmfs_publish::{IngestOptions, PublishError, Publisher};

use crate::failure::ConvertError;
use crate::progress::{LayerMeter, Progress};
use crate::spool::SpooledLayer;

/// What was published.
pub(super) struct Stored {
    pub(super) revision: u64,
    pub(super) bytes_stored: u64,
}

/// Ingests layers that are not there yet in one transaction.
pub(super) fn layers(
    publisher: &mut Publisher,
    spooled: Vec<SpooledLayer>,
    progress: &Progress,
) -> Result<Stored, ConvertError> {
    // Another conversion may have published some of them since we looked.
    let mut missing = Vec::with_capacity(spooled.len());
    for layer in spooled {
        if !publisher.exists(layer.wanted.path.as_bytes())? {
            missing.push(layer);
        }
    }
    if missing.is_empty() {
        return Ok(Stored { revision: publisher.head().manifest.revision, bytes_stored: 0 });
    }
    let options = IngestOptions::of_layer();
    let mut transaction = publisher.begin()?;
    for mut layer in missing {
        let digest = layer.wanted.blob.digest.to_string();
        let failed = |cause| match cause {
            PublishError::Interrupted => ConvertError::Interrupted,
            cause => ConvertError::Ingest { digest: digest.clone(), cause },
        };
        let path = layer.wanted.path.clone();
        let meter = progress.ingest(&layer.wanted.blob);
        let stream = layer.open().map_err(|cause| failed(PublishError::Input(cause)))?;
        let mut stream = Metered { stream, meter: &meter };
        let report = transaction.ingest_tar(path.as_bytes(), &mut stream, &options).map_err(failed)?;
        // What the archive's reader left, so that the diff id is checked in any case.
        io::copy(&mut stream, &mut io::sink()).map_err(|cause| failed(PublishError::Input(cause)))?;
        for warning in &report.warnings {
            tracing::warn!(layer = digest, "{warning}");
        }
        meter.finish();
    }
    let report = transaction.commit(None)?;
    progress.step(&format!("revision {} published", report.revision));
    Ok(Stored { revision: report.revision, bytes_stored: report.bytes_stored })
}

struct Metered<'a, R> {
    stream: R,
    meter: &'a LayerMeter,
}

impl<R: Read> Read for Metered<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.stream.read(buffer)?;
        self.meter.add(length as u64);
        Ok(length)
    }
}
