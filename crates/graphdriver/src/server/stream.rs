//! Archives in and out, in bounded memory: blocking readers and writers on one side,
//! HTTP bodies on the other.

use std::io::{self, Read, Write};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::TryStreamExt;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, BodyStream, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::{Response, StatusCode, header};
use tokio::sync::mpsc;
use tokio_util::io::{StreamReader, SyncIoBridge};

use super::calls::{Answer, CallError};
use crate::driver::DriverError;

/// Body of every response.
pub(super) type ResponseBody = UnsyncBoxBody<Bytes, io::Error>;

/// An outgoing archive travels in pieces of this size: a failure before the first full
/// piece still becomes a proper error message.
const PIECE_BYTES: usize = 256 * 1024;
/// Pieces on their way per stream.
const PIECES_IN_FLIGHT: usize = 4;
/// After a failure the rest of an incoming archive is read for this long. An engine
/// that cannot finish writing reports the broken connection instead of our message.
const DISCARD_TIME: Duration = Duration::from_secs(20);

/// Answers with what `write` writes. If `write` fails before the first piece is full,
/// that is an error; later, the connection is cut, so that the engine never takes a part
/// for the whole.
pub(super) async fn writing<F>(write: F) -> Result<Answer, CallError>
where
    F: FnOnce(&mut dyn Write) -> Result<(), DriverError> + Send + 'static,
{
    let (sender, mut pieces) = mpsc::channel(PIECES_IN_FLIGHT);
    tokio::task::spawn_blocking(move || {
        let mut out = PieceWriter { piece: BytesMut::with_capacity(PIECE_BYTES), sender };
        let written = write(&mut out).and_then(|()| out.flush().map_err(DriverError::Stream));
        // Fails if the engine hung up; then nobody needs to know.
        let _ = out.sender.blocking_send(written.map(|()| Piece::End));
    });
    // A failure until here becomes an error message.
    let first = received(pieces.recv().await)?;
    let frames = futures_util::stream::unfold(Some((Some(first), pieces)), |state| async move {
        let (first, mut pieces) = state?;
        let piece = match first {
            Some(piece) => Ok(piece),
            None => received(pieces.recv().await),
        };
        match piece {
            Ok(Piece::Data(data)) => Some((Ok(Frame::data(data)), Some((None, pieces)))),
            Ok(Piece::End) => None,
            Err(error) => {
                tracing::error!(%error, "a diff failed half-way, cutting the connection");
                Some((Err(io::Error::other(error)), None))
            }
        }
    });
    let mut answer = Response::new(StreamBody::new(frames).boxed_unsync());
    *answer.status_mut() = StatusCode::OK;
    answer.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/x-tar"));
    Ok(answer)
}

/// Lets `read` read the request's body and reads what it leaves, to the end: padding
/// after an archive belongs to the request, and a body that is cut is an error even if
/// the archive looked complete.
pub(super) async fn reading<T, F>(body: Incoming, read: F) -> Result<T, CallError>
where
    T: Send + 'static,
    F: FnOnce(&mut dyn Read) -> Result<T, DriverError> + Send + 'static,
{
    let frames = TryStreamExt::map_err(BodyStream::new(body), io::Error::other);
    let data = frames.try_filter_map(|frame| std::future::ready(Ok(frame.into_data().ok())));
    let reader = StreamReader::new(Box::pin(data));
    let mut reader = SyncIoBridge::new(reader);
    super::calls::blocking(move || {
        let result = read(&mut reader);
        let deadline = std::time::Instant::now() + DISCARD_TIME;
        let mut scrap = vec![0; PIECE_BYTES];
        loop {
            match reader.read(&mut scrap) {
                Ok(0) => break,
                Ok(_) if result.is_err() && std::time::Instant::now() > deadline => break,
                Ok(_) => {}
                Err(error) if result.is_ok() => return Err(DriverError::Stream(error).into()),
                Err(_) => break,
            }
        }
        Ok(result?)
    })
    .await
}

enum Piece {
    Data(Bytes),
    /// Nothing failed and nothing follows. Without it the archive is not whole, also if
    /// the thread that wrote it panicked.
    End,
}

fn received(piece: Option<Result<Piece, DriverError>>) -> Result<Piece, DriverError> {
    let ended = || io::Error::other("the thread that writes the archive ended half-way");
    piece.unwrap_or_else(|| Err(DriverError::Stream(ended())))
}

/// Collects what is written into pieces and sends them; waits while enough are on
/// their way.
struct PieceWriter {
    piece: BytesMut,
    sender: mpsc::Sender<Result<Piece, DriverError>>,
}

impl Write for PieceWriter {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let taken = data.len().min(PIECE_BYTES - self.piece.len());
        let (now, _) = data.split_at(taken);
        self.piece.extend_from_slice(now);
        if self.piece.len() == PIECE_BYTES {
            self.send()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.piece.is_empty() { Ok(()) } else { self.send() }
    }
}

impl PieceWriter {
    fn send(&mut self) -> io::Result<()> {
        let piece = std::mem::replace(&mut self.piece, BytesMut::with_capacity(PIECE_BYTES));
        self.sender
            .blocking_send(Ok(Piece::Data(piece.freeze())))
            .map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, "the engine hung up"))
    }
}
