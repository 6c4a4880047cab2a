//! The connection to an S3 store: from a `s3://` location and the `AWS_*` variables to requests that a thread waits for.

use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey};
use object_store::client::{HttpClient, HttpConnector};
use object_store::{BackoffConfig, ClientOptions, RetryConfig};

use crate::storage::{StorageError, remote};

/// Server errors, 429 and broken connections are tried again so often, with growing pauses.
const MAX_RETRIES: usize = 8;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// All attempts of one request together; signatures are valid for five minutes.
const RETRY_TIMEOUT: Duration = Duration::from_secs(120);
/// Bucket and prefix of a `s3://BUCKET/PREFIX` location.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Location {
    pub(super) bucket: String,
    /// Empty, or without slashes at its ends.
    pub(super) prefix: String,
}

impl Location {
    pub(super) fn parse(url: &str) -> Result<Location, StorageError> {
        let invalid = |reason: &str| StorageError::InvalidLocation {
            location: url.to_owned(),
            reason: reason.to_owned(),
        };
        let rest = url.strip_prefix("s3://").ok_or_else(|| invalid("does not begin with s3://"))?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if bucket.is_empty() || !bucket.chars().all(allowed) {
            return Err(invalid("is not of the form s3://BUCKET/PREFIX"));
        }
        let prefix = prefix.trim_matches('/');
        let is_plain = |part: &str| !matches!(part, "" | "." | "..") && part.chars().all(allowed);
        if !prefix.is_empty() && !prefix.split('/').all(is_plain) {
            return Err(invalid(
                "has a prefix with other characters than letters, digits, `.`, `-`, `_` and `/`",
            ));
        }
        Ok(Location { bucket: bucket.to_owned(), prefix: prefix.to_owned() })
    }
}

/// A store, and whether its user says that it has conditional writes.
#[derive(Debug, Clone)]
pub(super) struct Connection {
    pub(super) store: Arc<AmazonS3>,
    pub(super) conditional: bool,
}

impl Connection {
    /// Connects to `bucket` as the `AWS_*` variables of the environment say. Nothing is sent yet.
    pub(super) fn open(bucket: &str) -> Result<Connection, StorageError> {
        let invalid =
            |reason: String| StorageError::InvalidLocation { location: format!("s3://{bucket}"), reason };
        let builder = AmazonS3Builder::from_env()
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
        let store = builder.build().map_err(|error| invalid(error.to_string()))?;
        Ok(Connection { store: Arc::new(store), conditional })
    }

    /// Makes a request and waits for its end. Works on every thread, also on those of another runtime.
    pub(super) fn wait<T, F>(&self, request: impl FnOnce(Arc<AmazonS3>) -> F) -> object_store::Result<T>
    where
        F: Future<Output = object_store::Result<T>> + Send + 'static,
        T: Send + 'static,
    {
        remote::wait(request(self.store.clone())).unwrap_or_else(|error| Err(failure(error)))
    }
}

pub(super) fn failure(reason: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> object_store::Error {
    object_store::Error::Generic { store: "S3", source: reason.into() }
}

#[derive(Debug)]
struct Connector;

impl HttpConnector for Connector {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        remote::http_client().map(HttpClient::new).map_err(failure)
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
            assert!(matches!(parsed(bad), Err(StorageError::InvalidLocation { .. })), "{bad}");
        }
    }
}
