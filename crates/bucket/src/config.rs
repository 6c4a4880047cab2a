//! `config.json` in `minio_ext_config`: where an engine leaves layers, and who publishes them (thin images §7.1).

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use object_store::aws::AmazonS3Builder;
use reqwest::Url;
use serde_json::{Map, Value};
use thin_image::Location;

use crate::connection::{Connection, InvalidLocation, is_name};

/// Name of the file.
pub const FILE_NAME: &str = "config.json";
/// The bucket that the original has; another one can be named with `Bucket`.
pub const DEFAULT_BUCKET: &str = "layers";
/// Stores of one's own have no regions, but a signature names one.
const DEFAULT_REGION: &str = "us-east-1";
/// Largest accepted file in bytes; real ones have 300.
const MAX_BYTES: u64 = 64 << 10;
/// Characters of a value that a message repeats.
const MAX_QUOTED: usize = 200;

/// A validated `config.json`. Of its keys `Bucket` and `Region` are ours, the others the original's.
#[derive(Clone)]
pub struct LayerServiceConfig {
    access_key: String,
    access_secret: String,
    endpoint: String,
    bucket: String,
    region: String,
    /// Name of the repository that the service publishes into.
    pub repository: String,
    /// What to ask for the state of a layer, without its key.
    pub status_url: Url,
    /// Keys of the file that nobody reads.
    pub unknown_keys: Vec<String>,
}

/// Why a `config.json` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("cannot read {}: {cause}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        cause: io::Error,
    },
    /// It is not what it should be.
    #[error("{}: {reason}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

impl LayerServiceConfig {
    /// Reads `config.json` in `directory`; `None` if there is no such file.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn in_directory(directory: &Path) -> Result<Option<LayerServiceConfig>, ConfigError> {
        let path = directory.join(FILE_NAME);
        match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(cause) => Err(ConfigError::Unreadable { path, cause }),
            Ok(file) => LayerServiceConfig::from_reader(file, path).map(Some),
        }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn read(path: &Path) -> Result<LayerServiceConfig, ConfigError> {
        let file =
            File::open(path).map_err(|cause| ConfigError::Unreadable { path: path.to_owned(), cause })?;
        LayerServiceConfig::from_reader(file, path.to_owned())
    }

    fn from_reader(file: File, path: PathBuf) -> Result<LayerServiceConfig, ConfigError> {
        let mut text = Vec::new();
        if let Err(cause) = file.take(MAX_BYTES + 1).read_to_end(&mut text) {
            return Err(ConfigError::Unreadable { path, cause });
        }
        LayerServiceConfig::parse(&text).map_err(|reason| ConfigError::Invalid { path, reason })
    }

    /// Reads the text of a file. Keys are compared without regard to case, as the original does.
    ///
    /// # Errors
    /// What is wrong with it, for people. Never repeats a secret.
    pub fn parse(text: &[u8]) -> Result<LayerServiceConfig, String> {
        if text.len() as u64 > MAX_BYTES {
            return Err(format!("is larger than {MAX_BYTES} bytes"));
        }
        // The parser's message would quote what it read.
        let document: Map<String, Value> = serde_json::from_slice(text).map_err(|error| {
            format!("is no JSON object (line {}, column {})", error.line(), error.column())
        })?;
        let mut fields = Fields(document);
        let access_key = fields.text("AccessKey")?;
        let access_secret = fields.text("AccessSecret")?;
        let host = fields.text("Host")?;
        let is_host = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '[' | ']');
        if !host.chars().all(is_host) {
            let host = quoted(&host);
            return Err(format!("Host {host} is not of the form HOST or HOST:PORT (without a scheme)"));
        }
        let scheme = if fields.flag("SSL")? { "https" } else { "http" };
        let endpoint = format!("{scheme}://{host}");
        if Url::parse(&endpoint).is_err() {
            return Err(format!("Host {} is not of the form HOST or HOST:PORT", quoted(&host)));
        }
        let repository = fields.text("CvmfsRepo")?;
        if let Err(error) = Location::new(&repository, DEFAULT_BUCKET) {
            return Err(format!("CvmfsRepo {}: {error}", quoted(&repository)));
        }
        let status = fields.text("PublishStatusURL")?;
        if status.contains('@') {
            // It would stand in messages.
            return Err("PublishStatusURL must not have a user name or password".to_owned());
        }
        let status_url = match Url::parse(status.trim_end_matches('/')) {
            Ok(url) if matches!(url.scheme(), "http" | "https") && url.has_host() => url,
            _ => return Err(format!("PublishStatusURL {} is no http or https URL", quoted(&status))),
        };
        if status_url.query().is_some() || status_url.fragment().is_some() {
            return Err(
                "PublishStatusURL has a query or a fragment; layers are named after its path".to_owned()
            );
        }
        let bucket = fields.optional_text("Bucket")?.unwrap_or_else(|| DEFAULT_BUCKET.to_owned());
        if !is_name(&bucket) {
            return Err(format!(
                "Bucket {} has other characters than letters, digits, '.', '-' and '_'",
                quoted(&bucket)
            ));
        }
        let region = fields.optional_text("Region")?.unwrap_or_else(|| DEFAULT_REGION.to_owned());
        let unknown_keys = fields.0.into_iter().map(|(key, _)| key).collect();
        Ok(LayerServiceConfig {
            access_key,
            access_secret,
            endpoint,
            bucket,
            region,
            repository,
            status_url,
            unknown_keys,
        })
    }

    /// Connects to the bucket; nothing is sent yet.
    pub(crate) fn connect(&self) -> Result<Connection, InvalidLocation> {
        let builder = AmazonS3Builder::new()
            .with_endpoint(&self.endpoint)
            .with_region(&self.region)
            .with_access_key_id(&self.access_key)
            .with_secret_access_key(&self.access_secret);
        Connection::build(&self.bucket, builder)
    }

    /// The bucket, for people.
    pub fn place(&self) -> String {
        format!("{}/{}", self.endpoint, self.bucket)
    }
}

impl fmt::Debug for LayerServiceConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // the rest are secrets
        f.debug_struct("LayerServiceConfig")
            .field("endpoint", &self.endpoint)
            .field("bucket", &self.bucket)
            .field("repository", &self.repository)
            .field("status_url", &self.status_url.as_str())
            .finish_non_exhaustive()
    }
}

/// A value for a message, shortened.
fn quoted(text: &str) -> String {
    format!("{:?}", text.chars().take(MAX_QUOTED).collect::<String>())
}

/// Fields of the document that nobody has taken yet.
struct Fields(Map<String, Value>);

impl Fields {
    fn take(&mut self, name: &'static str) -> Option<Value> {
        let key = self.0.keys().find(|key| key.eq_ignore_ascii_case(name)).cloned()?;
        self.0.remove(&key)
    }

    fn text(&mut self, name: &'static str) -> Result<String, String> {
        self.optional_text(name)?.ok_or_else(|| format!("{name} is missing or empty"))
    }

    fn optional_text(&mut self, name: &'static str) -> Result<Option<String>, String> {
        match self.take(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => {
                let text = text.trim();
                if text.chars().any(char::is_control) {
                    return Err(format!("{name} has control characters"));
                }
                Ok((!text.is_empty()).then(|| text.to_owned()))
            }
            Some(_) => Err(format!("{name} is not a text")),
        }
    }

    fn flag(&mut self, name: &'static str) -> Result<bool, String> {
        match self.take(name) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(flag)) => Ok(flag),
            Some(_) => Err(format!("{name} is neither true nor false")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANUAL: &str = r#"{"AccessKey": "KEY", "AccessSecret": "SECRET", "Host": "minio.example.com:9000", "SSL": false,
        "CvmfsRepo": "repo.example.com", "PublishStatusURL": "http://server.example.com:3000/status"}"#;

    fn with(key: &str, value: &str) -> Result<LayerServiceConfig, String> {
        let mut document: Map<String, Value> = serde_json::from_str(MANUAL).unwrap();
        document.insert(key.to_owned(), serde_json::from_str(value).unwrap());
        LayerServiceConfig::parse(serde_json::to_string(&document).unwrap().as_bytes())
    }

    #[test]
    fn the_file_of_the_manual_is_read() {
        let config = LayerServiceConfig::parse(MANUAL.as_bytes()).unwrap();
        assert_eq!(config.place(), "http://minio.example.com:9000/layers");
        assert_eq!(config.repository, "repo.example.com");
        assert_eq!(config.status_url.as_str(), "http://server.example.com:3000/status");
        assert!(config.unknown_keys.is_empty());
        let other_case = MANUAL.replace("CvmfsRepo", "cvmfsrepo").replace("SSL\": false", "ssl\": true");
        assert!(LayerServiceConfig::parse(other_case.as_bytes()).unwrap().place().starts_with("https://"));
        assert_eq!(with("Bucket", "\"mine\"").unwrap().bucket, "mine");
        assert_eq!(with("Colour", "1").unwrap().unknown_keys, ["Colour"]);
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        for (key, value) in [
            ("AccessKey", "\"\""),
            ("AccessSecret", "7"),
            ("Host", "\"http://minio:9000\""),
            ("Host", "\"a b\""),
            ("SSL", "\"yes\""),
            ("CvmfsRepo", "\"../etc\""),
            ("PublishStatusURL", "\"file:///etc\""),
            ("PublishStatusURL", "\"http://server/?a\""),
            ("PublishStatusURL", "\"http://user:SECRET@server/\""),
            ("Bucket", "\"a/b\""),
            ("Region", "\"a\\nb\""),
        ] {
            let message = with(key, value).unwrap_err();
            assert!(message.contains(key) && !message.contains("SECRET"), "{key} = {value}: {message}");
        }
        assert!(LayerServiceConfig::parse(b"[]").is_err());
        assert!(LayerServiceConfig::parse(&vec![b' '; 70_000]).unwrap_err().contains("larger"));
    }

    #[test]
    fn no_secret_is_shown() {
        let config = LayerServiceConfig::parse(MANUAL.as_bytes()).unwrap();
        assert!(!format!("{config:?}").contains("SECRET"));
        let cut = MANUAL.replace("\"Host\"", "Host");
        assert!(!LayerServiceConfig::parse(cut.as_bytes()).unwrap_err().contains("SECRET"));
    }

    #[test]
    fn a_missing_file_is_no_error_and_a_bad_one_is_named() {
        let directory = tempfile::tempdir().unwrap();
        assert!(LayerServiceConfig::in_directory(directory.path()).unwrap().is_none());
        std::fs::write(directory.path().join(FILE_NAME), "{").unwrap();
        let message = LayerServiceConfig::in_directory(directory.path()).unwrap_err().to_string();
        assert!(message.contains(FILE_NAME), "{message}");
    }
}
