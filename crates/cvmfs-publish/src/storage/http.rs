//! A repository behind a web server, to be read: the source of a replica, or something to check from afar.
//!
//! Requests are tried again after server errors and broken connections; what arrives is as untrusted as everything
//! else, and verified by whoever asked.

use std::io::{self, Read};
use std::time::Duration;

use bucket::network::{self, Pieces};
use cvmfs_format::ObjectName;
use futures_util::StreamExt;
use reqwest::{Client, Method, Response, StatusCode};

use super::{Put, Scratch, Storage, StorageError, StorageLock, StoredObject, read_bounded};

/// Attempts of one request, with pauses that double.
const ATTEMPTS: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Requests at the same time that a web server does not mind.
const PARALLEL: usize = 16;

/// A repository at a URL such as `http://stratum0.example.org/cvmfs/test.example.org`.
#[derive(Debug)]
pub struct Http {
    client: Client,
    url: String,
}

impl Http {
    /// Prepares for reading below `url`; nothing is sent yet.
    pub fn open(url: &str) -> Result<Http, StorageError> {
        let invalid = |reason: String| StorageError::InvalidLocation { location: url.to_owned(), reason };
        let parsed = reqwest::Url::parse(url).map_err(|error| invalid(error.to_string()))?;
        if parsed.query().is_some() || parsed.fragment().is_some() {
            return Err(invalid("has a query or a fragment, which no storage has".to_owned()));
        }
        let client = network::http_client().map_err(|error| invalid(error.to_string()))?;
        Ok(Http { client, url: url.trim_end_matches('/').to_owned() })
    }

    fn url_of(&self, name: &str) -> String {
        format!("{}/{name}", self.url)
    }

    /// The answer to a request, or `None` if there is no such thing.
    fn ask(&self, method: Method, name: &str) -> Result<Option<Response>, StorageError> {
        let url = self.url_of(name);
        let failed = |reason: String| StorageError::Unreachable { url: url.clone(), reason };
        let mut pause = FIRST_PAUSE;
        for attempt in 1.. {
            let request = self.client.request(method.clone(), &url);
            let answer = network::wait(async move { request.send().await })
                .map_err(|error| failed(error.to_string()))?;
            let reason = match answer {
                Ok(answer) if answer.status() == StatusCode::OK => return Ok(Some(answer)),
                Ok(answer) if matches!(answer.status(), StatusCode::NOT_FOUND | StatusCode::GONE) => {
                    return Ok(None);
                }
                Ok(answer) => {
                    let status = answer.status();
                    if !status.is_server_error() && status != StatusCode::TOO_MANY_REQUESTS {
                        return Err(failed(status.to_string()));
                    }
                    status.to_string()
                }
                Err(error) => crate::workspace::chain(&error.without_url()),
            };
            if attempt == ATTEMPTS {
                return Err(failed(reason));
            }
            tracing::debug!(url, reason, "asking again");
            std::thread::sleep(pause);
            pause *= 2;
        }
        Err(failed("was not asked".to_owned()))
    }

    fn read_only(&self) -> StorageError {
        StorageError::ReadOnly { location: self.location() }
    }

    fn body(&self, name: &str, answer: Response) -> Result<Pieces, StorageError> {
        let body = answer.bytes_stream().map(|piece| piece.map_err(reqwest::Error::without_url));
        Pieces::of(body).map_err(|source| StorageError::Io {
            action: "open",
            path: self.url_of(name),
            source,
        })
    }
}

impl Storage for Http {
    fn location(&self) -> String {
        self.url.clone()
    }

    fn lock(&self, _: Duration) -> Result<Box<dyn StorageLock>, StorageError> {
        Err(self.read_only())
    }

    fn writers(&self) -> usize {
        PARALLEL
    }

    fn put_object(&self, _: &ObjectName, _: &[u8]) -> Result<Put, StorageError> {
        Err(self.read_only())
    }

    fn put_object_file(&self, _: &ObjectName, _: &std::path::Path) -> Result<Put, StorageError> {
        Err(self.read_only())
    }

    fn object_size(&self, name: &ObjectName) -> Result<Option<u64>, StorageError> {
        let name = name.path();
        let Some(answer) = self.ask(Method::HEAD, &name)? else { return Ok(None) };
        // the body of the answer to HEAD is empty: the header counts
        let length =
            answer.headers().get(reqwest::header::CONTENT_LENGTH).and_then(|value| value.to_str().ok());
        let size = length.and_then(|text| text.parse().ok());
        size.map(Some).ok_or_else(|| StorageError::Unreachable {
            url: self.url_of(&name),
            reason: "the server does not tell the size".to_owned(),
        })
    }

    fn open_object(&self, name: &ObjectName) -> Result<Box<dyn Read + Send>, StorageError> {
        let name = name.path();
        match self.ask(Method::GET, &name)? {
            Some(answer) => Ok(Box::new(self.body(&name, answer)?)),
            None => Err(StorageError::Io {
                action: "read",
                path: self.url_of(&name),
                source: io::ErrorKind::NotFound.into(),
            }),
        }
    }

    fn delete_object(&self, _: &ObjectName) -> Result<(), StorageError> {
        Err(self.read_only())
    }

    fn get_file(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>, StorageError> {
        match self.ask(Method::GET, name)? {
            Some(answer) => read_bounded(self.body(name, answer)?, &self.url_of(name), limit).map(Some),
            None => Ok(None),
        }
    }

    fn put_file(&self, _: &str, _: &[u8]) -> Result<(), StorageError> {
        Err(self.read_only())
    }

    fn delete_file(&self, _: &str) -> Result<(), StorageError> {
        Err(self.read_only())
    }

    fn settle(&self) -> Result<(), StorageError> {
        Err(self.read_only())
    }

    fn list_objects(&self, _: &mut dyn FnMut(StoredObject)) -> Result<(), StorageError> {
        Err(StorageError::NoListing { location: self.location() })
    }

    fn scratch(&self) -> Result<Scratch, StorageError> {
        Scratch::in_temporary_directory()
    }
}
