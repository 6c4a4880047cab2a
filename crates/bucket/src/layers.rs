//! Layers in a bucket: one object for each, named after the SHA-256 of its bytes (thin images §7.1).

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::str::FromStr;

use object_store::path::Path;
use object_store::{Attribute, Attributes};

use crate::config::LayerServiceConfig;
use crate::connection::{Connection, InvalidLocation, Location};

/// What the original calls a gzip archive.
const CONTENT_TYPE: &str = "application/x-gzip";
/// Hexadecimal digits of a key.
const KEY_DIGITS: usize = 64;

/// Name of a layer: 64 lower-case hexadecimal digits, the SHA-256 of the archive as it lies in the bucket.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerKey(String);

/// What is no [`LayerKey`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the name of a layer has 64 lower-case hexadecimal digits")]
pub struct InvalidKey;

impl FromStr for LayerKey {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<LayerKey, InvalidKey> {
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if text.len() == KEY_DIGITS && text.bytes().all(is_digit) {
            Ok(LayerKey(text.to_owned()))
        } else {
            Err(InvalidKey)
        }
    }
}

impl LayerKey {
    /// The name of a layer whose bytes have this SHA-256.
    pub fn of_sha256(digest: &[u8; 32]) -> LayerKey {
        LayerKey(hex::encode(digest))
    }

    /// The digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for LayerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where engines leave layers.
#[derive(Debug, Clone)]
pub struct LayerBucket {
    place: Place,
    name: String,
}

#[derive(Clone)]
enum Place {
    Store {
        connection: Connection,
        prefix: String,
    },
    /// As the file system of older minio servers keeps a bucket.
    Directory(PathBuf),
}

/// A bucket that does not do as asked.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} layer {key} in {bucket}")]
pub struct BucketError {
    action: &'static str,
    /// The layer; `*` for all.
    key: String,
    bucket: String,
    #[source]
    cause: Box<dyn std::error::Error + Send + Sync>,
    /// Whether the layer is not there.
    pub is_missing: bool,
}

impl LayerBucket {
    /// The bucket of a `config.json`.
    ///
    /// # Errors
    /// Settings that make no sense.
    pub fn of_config(config: &LayerServiceConfig) -> Result<LayerBucket, InvalidLocation> {
        let place = Place::Store { connection: config.connect()?, prefix: String::new() };
        Ok(LayerBucket { place, name: config.place() })
    }

    /// A bucket as `s3://BUCKET[/PREFIX]`, with endpoint and keys from the `AWS_*` variables; or a directory.
    ///
    /// # Errors
    /// A location that makes no sense.
    pub fn open(location: &str) -> Result<LayerBucket, InvalidLocation> {
        let place = if location.contains("://") {
            let Location { bucket, prefix } = Location::parse(location)?;
            Place::Store { connection: Connection::open(&bucket)?, prefix }
        } else {
            Place::Directory(PathBuf::from(location))
        };
        Ok(LayerBucket { place, name: location.to_owned() })
    }

    /// For people.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Stored bytes of a layer, if it is there.
    ///
    /// # Errors
    /// [`BucketError`].
    pub fn size(&self, key: &LayerKey) -> Result<Option<u64>, BucketError> {
        match &self.place {
            Place::Store { connection, prefix } => {
                let found = connection.head(&path(prefix, key));
                Ok(found.map_err(|error| self.refused("look for", key, error))?.map(|found| found.size))
            }
            Place::Directory(directory) => match std::fs::symlink_metadata(directory.join(key.as_str())) {
                Ok(metadata) if metadata.is_file() => Ok(Some(metadata.len())),
                Ok(_) => Ok(None),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(self.failed("look for", key, error)),
            },
        }
    }

    /// Leaves the next `size` bytes of `file` as the layer `key`.
    ///
    /// # Errors
    /// [`BucketError`].
    pub fn put(&self, key: &LayerKey, mut file: File, size: u64) -> Result<(), BucketError> {
        match &self.place {
            Place::Store { connection, prefix } => {
                let mut attributes = Attributes::new();
                attributes.insert(Attribute::ContentType, CONTENT_TYPE.into());
                let sent = connection.put_file(&path(prefix, key), &mut file, size, attributes);
                sent.map_err(|error| self.refused("store", key, error))
            }
            Place::Directory(directory) => {
                let copied = File::create(directory.join(key.as_str()))
                    .and_then(|mut copy| io::copy(&mut file.take(size), &mut copy));
                copied.map(|_| ()).map_err(|error| self.failed("store", key, error))
            }
        }
    }

    /// Reads a layer. What arrives is not verified.
    ///
    /// # Errors
    /// [`BucketError`].
    pub fn read(&self, key: &LayerKey) -> Result<Box<dyn Read + Send>, BucketError> {
        match &self.place {
            Place::Store { connection, prefix } => {
                let body = connection.read(&path(prefix, key));
                Ok(Box::new(body.map_err(|error| self.refused("read", key, error))?))
            }
            Place::Directory(directory) => {
                let file = File::open(directory.join(key.as_str()));
                Ok(Box::new(file.map_err(|error| self.failed("read", key, error))?))
            }
        }
    }

    /// Calls `visit` for each layer in the bucket. Other things are left alone.
    ///
    /// # Errors
    /// [`BucketError`].
    pub fn list(&self, visit: &mut dyn FnMut(LayerKey)) -> Result<(), BucketError> {
        let mut visit = |name: Option<&str>| {
            if let Some(Ok(key)) = name.map(str::parse) {
                visit(key);
            }
        };
        match &self.place {
            Place::Store { connection, prefix } => {
                let below = (!prefix.is_empty()).then(|| Path::from(prefix.as_str()));
                let refused = |error| self.refused("list", "*", error);
                for item in connection.list(below.as_ref()).map_err(refused)? {
                    visit(item.map_err(refused)?.location.filename());
                }
            }
            Place::Directory(directory) => {
                let failed = |error| self.failed("list", "*", error);
                for entry in std::fs::read_dir(directory).map_err(failed)? {
                    visit(entry.map_err(failed)?.file_name().to_str());
                }
            }
        }
        Ok(())
    }

    fn refused(
        &self,
        action: &'static str,
        key: impl fmt::Display,
        error: object_store::Error,
    ) -> BucketError {
        let is_missing = matches!(error, object_store::Error::NotFound { .. });
        BucketError { is_missing, ..self.error(action, key, Box::new(error)) }
    }

    fn failed(&self, action: &'static str, key: impl fmt::Display, error: io::Error) -> BucketError {
        let is_missing = error.kind() == io::ErrorKind::NotFound;
        BucketError { is_missing, ..self.error(action, key, Box::new(error)) }
    }

    fn error(
        &self,
        action: &'static str,
        key: impl fmt::Display,
        cause: Box<dyn std::error::Error + Send + Sync>,
    ) -> BucketError {
        BucketError { action, key: key.to_string(), bucket: self.name.clone(), cause, is_missing: false }
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // a connection knows secrets
        match self {
            Place::Store { prefix, .. } => {
                f.debug_struct("Store").field("prefix", prefix).finish_non_exhaustive()
            }
            Place::Directory(directory) => f.debug_tuple("Directory").field(directory).finish(),
        }
    }
}

fn path(prefix: &str, key: &LayerKey) -> Path {
    if prefix.is_empty() { Path::from(key.as_str()) } else { Path::from(format!("{prefix}/{key}")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_a_digest_and_nothing_else() {
        assert_eq!("ab".repeat(32).parse(), Ok(LayerKey::of_sha256(&[0xab; 32])));
        for bad in ["", "ab", "../etc/passwd", &"AB".repeat(32), &"ab".repeat(33), &"é".repeat(32)] {
            assert_eq!(bad.parse::<LayerKey>(), Err(InvalidKey), "{bad}");
        }
    }

    #[test]
    fn a_directory_is_a_bucket() {
        let directory = tempfile::tempdir().unwrap();
        let bucket = LayerBucket::open(directory.path().to_str().unwrap()).unwrap();
        let key: LayerKey = "12".repeat(32).parse().unwrap();
        assert_eq!(bucket.size(&key).unwrap(), None);
        assert!(bucket.read(&key).err().unwrap().is_missing);
        std::fs::write(directory.path().join("other"), b"x").unwrap();
        let source = directory.path().join("source");
        std::fs::write(&source, b"layer and more").unwrap();
        bucket.put(&key, File::open(source).unwrap(), 5).unwrap();
        assert_eq!(bucket.size(&key).unwrap(), Some(5));
        let mut text = String::new();
        bucket.read(&key).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "layer");
        let mut found = Vec::new();
        bucket.list(&mut |key| found.push(key)).unwrap();
        assert_eq!(found, [key]);
    }
}
