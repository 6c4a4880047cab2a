//! Downloads of blobs: streamed, verified, resumed.
//!
//! A task of the runtime fetches, hashes and counts; the caller reads blocking from a
//! short queue. The end of the stream is reported only after size and digest were found
//! right, so whoever reads to the end without an error has the right bytes.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Buf as _, Bytes};
use reqwest::header::{CONTENT_RANGE, HeaderValue, RANGE};
use reqwest::{Response, StatusCode};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

use crate::auth::Access;
use crate::digest::Digester;
use crate::error::RegistryError;
use crate::http::{Deadlines, SLOWEST_BYTES_PER_SECOND, authority};
use crate::manifest::Descriptor;
use crate::reference::Reference;
use crate::transport::{Body, Call, Transport, network, refusal};

/// Pieces waiting for the reader. A piece is what the connection had ready, at most a
/// few hundred kilobytes; usually 16 to 64.
const QUEUE_LENGTH: usize = 32;
/// Continuations of one download that bring nothing. Each one has retries of its own.
const MAX_FRUITLESS_RESUMES: u32 = 3;
/// Pause before a continuation.
const RESUME_PAUSE: Duration = Duration::from_millis(200);

/// A blob being downloaded. Reads end without error only if size and digest are right;
/// errors carry a [`RegistryError`], see [`BlobReader::failure_of`].
#[derive(Debug)]
pub struct BlobReader {
    pieces: mpsc::Receiver<Message>,
    current: VecDeque<Bytes>,
    finished: bool,
    /// Keeps the download's task running.
    _runtime: Arc<Runtime>,
}

#[derive(Debug)]
enum Message {
    Piece(Bytes),
    Verified,
    Failed(RegistryError),
}

impl BlobReader {
    /// The registry's error inside an error of [`Read`], for callers that get it back
    /// from elsewhere.
    pub fn failure_of(error: &io::Error) -> Option<&RegistryError> {
        error.get_ref()?.downcast_ref()
    }
}

impl Read for BlobReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if let Some(piece) = self.current.front_mut() {
                let length = piece.len().min(buffer.len());
                piece.copy_to_slice(buffer.get_mut(..length).unwrap_or_default());
                if piece.is_empty() {
                    self.current.pop_front();
                }
                return Ok(length);
            }
            if self.finished {
                return Ok(0);
            }
            match self.pieces.blocking_recv() {
                Some(Message::Piece(piece)) if piece.is_empty() => {}
                Some(Message::Piece(piece)) => self.current.push_back(piece),
                Some(Message::Verified) => self.finished = true,
                Some(Message::Failed(error)) => return Err(io::Error::other(error)),
                None => return Err(io::Error::other(RegistryError::Cancelled)),
            }
        }
    }
}

/// What is downloaded, and from where.
#[derive(Debug, Clone)]
pub(crate) struct Blob {
    pub(crate) reference: Reference,
    pub(crate) url: reqwest::Url,
    pub(crate) descriptor: Descriptor,
    pub(crate) object: String,
    /// See [`Call::is_anonymous`].
    pub(crate) is_anonymous: bool,
}

/// Starts a download. Errors of the first request are returned at once.
pub(crate) fn start(
    runtime: &Arc<Runtime>,
    transport: &Arc<Transport>,
    blob: Blob,
) -> Result<BlobReader, RegistryError> {
    let mut download = Download {
        patience: Patience::new(transport.deadlines()),
        transport: transport.clone(),
        digester: Digester::like(&blob.descriptor.digest),
        blob,
        received: 0,
    };
    let first = runtime.block_on(download.request())?;
    let (sender, pieces) = mpsc::channel(QUEUE_LENGTH);
    runtime.spawn(async move {
        let last = match download.run(first, &sender).await {
            Ok(()) => Message::Verified,
            Err(error) => Message::Failed(error),
        };
        // A reader that went away needs no last word.
        let _ = sender.send(last).await;
    });
    Ok(BlobReader { pieces, current: VecDeque::new(), finished: false, _runtime: runtime.clone() })
}

struct Download {
    transport: Arc<Transport>,
    blob: Blob,
    digester: Digester,
    received: u64,
    patience: Patience,
}

/// How much longer a download may wait, see [`Deadlines::stall`]. The reader's own pace does not count.
#[derive(Debug)]
struct Patience {
    limit: Duration,
    /// Never above `limit`: a fast start does not pay for a stall later.
    left: Duration,
}

impl Patience {
    fn new(deadlines: &Deadlines) -> Self {
        Self { limit: deadlines.stall, left: deadlines.stall }
    }

    fn waited(&mut self, time: Duration) {
        self.left = self.left.saturating_sub(time);
    }

    fn received(&mut self, bytes: u64) {
        let worth = Duration::from_micros(bytes.saturating_mul(1_000_000) / SLOWEST_BYTES_PER_SECOND);
        self.left = (self.left + worth).min(self.limit);
    }

    /// The time that was waited when it is over.
    fn spent(&self) -> Duration {
        self.limit.saturating_sub(self.left)
    }
}

/// Why one answer brought no more pieces.
enum Interruption {
    /// The reader is gone.
    Abandoned,
    /// Worth another request for the rest.
    Resumable(RegistryError),
    /// Not worth one.
    Final(RegistryError),
}

impl Download {
    async fn run(&mut self, first: Response, sender: &mpsc::Sender<Message>) -> Result<(), RegistryError> {
        let mut response = first;
        let mut fruitless = 0;
        loop {
            let before = self.received;
            match self.transfer(response, sender).await {
                Ok(()) => return self.verify(),
                Err(Interruption::Abandoned) => return Err(RegistryError::Cancelled),
                Err(Interruption::Final(error)) => return Err(error),
                Err(Interruption::Resumable(error)) => {
                    fruitless = if self.received > before { 0 } else { fruitless + 1 };
                    if fruitless > MAX_FRUITLESS_RESUMES {
                        return Err(error);
                    }
                    tracing::warn!(
                        received = self.received,
                        size = self.blob.descriptor.size,
                        "{error}; asking for the rest, for at most {} s without progress",
                        self.patience.left.as_secs()
                    );
                    tokio::time::sleep(RESUME_PAUSE).await;
                    self.patience.waited(RESUME_PAUSE);
                }
            }
            response = self.request().await?;
        }
    }

    /// Asks for the blob, or for what is missing of it.
    async fn request(&mut self) -> Result<Response, RegistryError> {
        let mut headers = reqwest::header::HeaderMap::new();
        if self.received > 0 {
            let range = HeaderValue::from_str(&format!("bytes={}-", self.received));
            headers.insert(RANGE, range.expect("digits are valid in a header"));
        }
        let call = Call {
            method: reqwest::Method::GET,
            url: self.blob.url.clone(),
            reference: &self.blob.reference,
            access: Access::Pull,
            is_anonymous: self.blob.is_anonymous,
            headers,
            body: Body::Empty,
            object: &self.blob.object,
            deadline: self.transport.deadlines().document.min(self.patience.left),
        };
        let started = Instant::now();
        let response = self.transport.send(&call).await;
        self.patience.waited(started.elapsed());
        let response = response?;
        match response.status() {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => Ok(response),
            _ => Err(refusal(&self.blob.object, response).await),
        }
    }

    /// Passes on the body of one answer; `Ok` once all bytes of the blob were passed on.
    async fn transfer(
        &mut self,
        mut response: Response,
        sender: &mpsc::Sender<Message>,
    ) -> Result<(), Interruption> {
        let mut skip = self.overlap(&response)?;
        let host = authority(response.url());
        loop {
            if self.received == self.blob.descriptor.size {
                return self.expect_end(response, host).await;
            }
            let started = Instant::now();
            let wait = self.patience.left.min(self.transport.deadlines().silence());
            let chunk = tokio::select! {
                biased;
                () = self.transport.cancellation() => return Err(Interruption::Final(RegistryError::Cancelled)),
                () = sender.closed() => return Err(Interruption::Abandoned),
                chunk = tokio::time::timeout(wait, response.chunk()) => chunk,
            };
            self.patience.waited(started.elapsed());
            let mut piece = match chunk {
                Ok(Ok(Some(piece))) => piece,
                Ok(Ok(None)) => return Err(Interruption::Resumable(self.wrong_size(host, self.received))),
                Ok(Err(error)) => {
                    let error = network(&self.blob.object, response.url(), &error);
                    return Err(Interruption::Resumable(error));
                }
                Err(_) => {
                    let timeout = |waited| {
                        let object = self.blob.object.clone();
                        RegistryError::Timeout { object, host, waited }
                    };
                    return Err(if self.patience.left.is_zero() {
                        Interruption::Final(timeout(self.patience.spent()))
                    } else {
                        Interruption::Resumable(timeout(wait))
                    });
                }
            };
            let known = skip.min(piece.len() as u64);
            skip -= known;
            piece.advance(usize::try_from(known).expect("not more than the piece's length"));
            let total = self.received + piece.len() as u64;
            if total > self.blob.descriptor.size {
                return Err(Interruption::Final(self.wrong_size(host, total)));
            }
            self.received = total;
            self.patience.received(piece.len() as u64);
            self.digester.update(&piece);
            if sender.send(Message::Piece(piece)).await.is_err() {
                return Err(Interruption::Abandoned);
            }
        }
    }

    /// How many bytes at the answer's start are here already: a server may ignore the
    /// range and send everything again.
    fn overlap(&self, response: &Response) -> Result<u64, Interruption> {
        let host = || authority(response.url());
        if response.status() != StatusCode::PARTIAL_CONTENT {
            let length = response.content_length();
            return match length {
                Some(length) if length != self.blob.descriptor.size => {
                    Err(Interruption::Final(self.wrong_size(host(), length)))
                }
                _ => Ok(self.received),
            };
        }
        let range = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
        let start =
            range.and_then(|text| text.strip_prefix("bytes ")?.split('-').next()?.parse::<u64>().ok());
        if start == Some(self.received) {
            return Ok(0);
        }
        Err(Interruption::Final(RegistryError::Misdirected {
            object: self.blob.object.clone(),
            host: host(),
            reason: format!("answers another range than asked for ({})", range.unwrap_or("none")),
        }))
    }

    /// After the last byte nothing may follow.
    async fn expect_end(&self, mut response: Response, host: String) -> Result<(), Interruption> {
        match tokio::time::timeout(self.transport.deadlines().idle, response.chunk()).await {
            Ok(Ok(Some(piece))) if !piece.is_empty() => {
                Err(Interruption::Final(self.wrong_size(host, self.received + piece.len() as u64)))
            }
            // All bytes are here: how the connection ends does not matter.
            _ => Ok(()),
        }
    }

    fn verify(&mut self) -> Result<(), RegistryError> {
        let expected = self.blob.descriptor.digest.clone();
        let digester = std::mem::replace(&mut self.digester, Digester::sha256());
        let found = digester.finish();
        if found == expected {
            return Ok(());
        }
        let host = authority(&self.blob.url);
        Err(RegistryError::WrongDigest { object: self.blob.object.clone(), host, expected, found })
    }

    fn wrong_size(&self, host: String, found: u64) -> RegistryError {
        let object = self.blob.object.clone();
        RegistryError::WrongSize { object, host, expected: self.blob.descriptor.size, found }
    }
}
