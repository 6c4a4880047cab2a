//! A TCP connection with time-outs that the kernel keeps, driven by whatever thread uses it.
//!
//! A stream of tokio's is watched by the runtime that made it. This one moves to the runtime in which it is polled
//! (see [`super::local`]): a kept connection follows the thread that takes it out of the pool.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::local;

/// A connection that is idle for so long is probed by the kernel.
const KEEPALIVE: Duration = Duration::from_secs(15);

#[derive(Debug)]
pub(super) struct Wire {
    /// The runtime that watches the socket.
    place: local::Place,
    /// Only absent after a move to another runtime failed.
    stream: Option<TcpStream>,
}

impl Wire {
    /// Connects to `address` within `timeout`; bytes that nobody acknowledges for that long end the connection.
    pub(super) async fn connect(address: SocketAddr, timeout: Duration) -> io::Result<Self> {
        let stream = match tokio::time::timeout(timeout, TcpStream::connect(address)).await {
            Ok(connected) => connected?,
            Err(_) => {
                let reason = format!("not connected within {} s", timeout.as_secs());
                return Err(io::Error::new(io::ErrorKind::TimedOut, reason));
            }
        };
        stream.set_nodelay(true)?;
        let socket = stream.as_fd();
        sockopt::set_socket_keepalive(socket, true)?;
        sockopt::set_tcp_keepidle(socket, KEEPALIVE)?;
        sockopt::set_tcp_keepintvl(socket, KEEPALIVE)?;
        let patience = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
        sockopt::set_tcp_user_timeout(socket, patience)?;
        Ok(Self { place: local::here(), stream: Some(stream) })
    }

    /// The stream, watched by the runtime in which this is polled.
    fn stream(&mut self) -> io::Result<Pin<&mut TcpStream>> {
        let here = local::here();
        if self.place != here
            && let Some(stream) = self.stream.take()
        {
            self.stream = Some(TcpStream::from_std(stream.into_std()?)?);
            self.place = here;
        }
        self.stream.as_mut().map(Pin::new).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.stream()?.poll_read(context, buffer)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.stream()?.poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_shutdown(context)
    }
}
