//! The connection to an S3 store: from a `s3://` location and the `AWS_*` variables to requests that a thread waits for.

use std::fs::File;
use std::io::Read;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey};
use object_store::client::{HttpClient, HttpConnector};
use object_store::path::Path;
use object_store::{
    Attributes, BackoffConfig, ClientOptions, ObjectMeta, ObjectStore, ObjectStoreExt, PutMultipartOptions,
    PutOptions, PutPayload, RetryConfig,
};

use crate::network::{self, Pieces};

/// Server errors, 429 and broken connections are tried again so often, with growing pauses.
const MAX_RETRIES: usize = 8;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// All attempts of one request together; signatures are valid for five minutes.
const RETRY_TIMEOUT: Duration = Duration::from_secs(120);
/// Larger files are sent in parts of this size.
pub const PART: u64 = 64 << 20;
/// Entries of a listing that are read ahead of its reader.
const LISTED_AHEAD: usize = 1024;

/// A location or an endpoint that cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{location}: {reason}")]
pub struct InvalidLocation {
    /// As it was given.
    pub location: String,
    /// What is wrong with it.
    pub reason: String,
}

/// Bucket and prefix of a `s3://BUCKET/PREFIX` location.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// Name of the bucket.
    pub bucket: String,
    /// Empty, or without slashes at its ends.
    pub prefix: String,
}

impl Location {
    /// Reads a URL.
    ///
    /// # Errors
    /// What is not of that form, or has characters that no key of ours has.
    pub fn parse(url: &str) -> Result<Location, InvalidLocation> {
        let invalid = |reason: &str| InvalidLocation { location: url.to_owned(), reason: reason.to_owned() };
        let rest = url.strip_prefix("s3://").ok_or_else(|| invalid("does not begin with s3://"))?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if !is_name(bucket) {
            return Err(invalid("is not of the form s3://BUCKET/PREFIX"));
        }
        let prefix = prefix.trim_matches('/');
        let is_plain = |part: &str| !matches!(part, "." | "..") && is_name(part);
        if !prefix.is_empty() && !prefix.split('/').all(is_plain) {
            return Err(invalid(
                "has a prefix with other characters than letters, digits, `.`, `-`, `_` and `/`",
            ));
        }
        Ok(Location { bucket: bucket.to_owned(), prefix: prefix.to_owned() })
    }
}

/// Whether a bucket, or a part of a prefix, may be called so.
pub(crate) fn is_name(text: &str) -> bool {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    !text.is_empty() && text.chars().all(is_allowed)
}

/// A bucket in a store, and whether its user says that the store has conditional writes.
#[derive(Debug, Clone)]
pub struct Connection {
    /// For requests; see [`Connection::wait`].
    pub store: Arc<AmazonS3>,
    /// False if `AWS_CONDITIONAL_PUT=disabled`.
    pub conditional: bool,
}

impl Connection {
    /// Connects to `bucket` as the `AWS_*` variables of the environment say. Nothing is sent yet.
    ///
    /// # Errors
    /// Variables that make no sense.
    pub fn open(bucket: &str) -> Result<Connection, InvalidLocation> {
        Connection::build(bucket, AmazonS3Builder::from_env())
    }

    /// Connects to `bucket` as `builder` says.
    ///
    /// # Errors
    /// Settings that make no sense.
    pub(crate) fn build(bucket: &str, builder: AmazonS3Builder) -> Result<Connection, InvalidLocation> {
        let builder = builder
            .with_bucket_name(bucket)
            .with_http_connector(Connector)
            // whoever names an http:// endpoint means it
            .with_allow_http(true)
            .with_retry(RetryConfig {
                backoff: BackoffConfig { init_backoff: FIRST_PAUSE, max_backoff: LONGEST_PAUSE, base: 2.0 },
                max_retries: MAX_RETRIES,
                retry_timeout: RETRY_TIMEOUT,
            });
        let conditional =
            builder.get_config_value(&AmazonS3ConfigKey::ConditionalPut).as_deref() != Some("disabled");
        let store = builder.build().map_err(|error| InvalidLocation {
            location: format!("s3://{bucket}"),
            reason: error.to_string(),
        })?;
        Ok(Connection { store: Arc::new(store), conditional })
    }

    /// Makes a request and waits for its end. Works on every thread, also on those of another runtime.
    ///
    /// # Errors
    /// What the store says.
    pub fn wait<T, F>(&self, request: impl FnOnce(Arc<AmazonS3>) -> F) -> object_store::Result<T>
    where
        F: Future<Output = object_store::Result<T>> + Send + 'static,
        T: Send + 'static,
    {
        network::wait(request(self.store.clone())).unwrap_or_else(|error| Err(failure(error)))
    }

    /// What the store knows of a key, if it is there.
    ///
    /// # Errors
    /// What the store says.
    pub fn head(&self, path: &Path) -> object_store::Result<Option<ObjectMeta>> {
        let asked = path.clone();
        match self.wait(|store| async move { store.head(&asked).await }) {
            Ok(found) => Ok(Some(found)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sends the next `size` bytes of `file`; in parts if they are many, so that they are never in memory as a whole.
    ///
    /// # Errors
    /// What the store says; a file that ends early.
    pub fn put_file(
        &self,
        path: &Path,
        file: &mut File,
        size: u64,
        attributes: Attributes,
    ) -> object_store::Result<()> {
        let asked = path.clone();
        let mut read = |size: u64| {
            let mut part = vec![0; usize::try_from(size).unwrap_or(usize::MAX)];
            file.read_exact(&mut part).map(|()| PutPayload::from(part)).map_err(failure)
        };
        if size <= PART {
            let payload = read(size)?;
            let options = PutOptions { attributes, ..PutOptions::default() };
            return self
                .wait(|store| async move { store.put_opts(&asked, payload, options).await.map(|_| ()) });
        }
        let options = PutMultipartOptions { attributes, ..PutMultipartOptions::default() };
        let mut upload = self.wait(|store| async move { store.put_multipart_opts(&asked, options).await })?;
        let mut sent = Ok(());
        let mut left = size;
        while left > 0 && sent.is_ok() {
            let length = left.min(PART);
            left -= length;
            sent = read(length).and_then(|part| self.wait(|_| upload.put_part(part)));
        }
        self.wait(|_| async move {
            match sent {
                Ok(()) => upload.complete().await.map(|_| ()),
                Err(error) => {
                    // parts of an upload that nobody completes would cost money for ever
                    let _ = upload.abort().await;
                    Err(error)
                }
            }
        })
    }

    /// Reads an object while it is downloaded.
    ///
    /// # Errors
    /// What the store says, also that there is none.
    pub fn read(&self, path: &Path) -> object_store::Result<Pieces> {
        let asked = path.clone();
        let found = self.wait(|store| async move { store.get(&asked).await })?;
        Pieces::of(found.into_stream()).map_err(failure)
    }

    /// What lies below `prefix`, while the listing arrives.
    ///
    /// # Errors
    /// If there is no runtime; the items tell what the store says.
    pub fn list(
        &self,
        prefix: Option<&Path>,
    ) -> object_store::Result<Receiver<object_store::Result<ObjectMeta>>> {
        network::forward(self.store.list(prefix), LISTED_AHEAD).map_err(failure)
    }
}

/// A failure that is not the store's.
pub fn failure(reason: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> object_store::Error {
    object_store::Error::Generic { store: "S3", source: reason.into() }
}

#[derive(Debug)]
struct Connector;

impl HttpConnector for Connector {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        network::http_client().map(HttpClient::new).map_err(failure)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_is_a_bucket_and_a_prefix() {
        let parsed = |url: &str| Location::parse(url).map(|l| (l.bucket, l.prefix));
        let expected = |bucket: &str, prefix: &str| (bucket.to_owned(), prefix.to_owned());
        assert_eq!(parsed("s3://b/example.org/").unwrap(), expected("b", "example.org"));
        assert_eq!(parsed("s3://b.c-d/x/y").unwrap(), expected("b.c-d", "x/y"));
        assert_eq!(parsed("s3://b").unwrap(), expected("b", ""));
        for bad in ["s3://", "s3:///x", "s3://b/../x", "s3://b/a//b", "s3://b/a b", "http://b/x"] {
            assert_eq!(parsed(bad).unwrap_err().location, bad);
        }
    }
}
