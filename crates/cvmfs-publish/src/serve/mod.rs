//! A static HTTP/1.1 server for trials and tests.
//!
//! It serves one directory tree, for example `/srv/cvmfs` with a storage in each
//! sub-directory, the way a web server in front of a repository should: keep-alive, `HEAD`,
//! ranges, entity tags, and the cache lifetimes of the C++ server tools (publisher behaviour
//! §14.1). It is no replacement for a production server: no TLS, no rate limits.
//!
//! Nothing outside the directory is ever opened: paths are resolved by the kernel with
//! `RESOLVE_BENEATH`, so `..` and symbolic links cannot lead out. The scratch area of a
//! storage (`data/txn`) and directories answer 404.
//!
//! Each request leaves one JSON line in the access log:
//! `{"time","peer","method","path","status","bytes","range","seconds","agent"}`. Lines that the
//! log's reader does not take fast enough are dropped, never waited for.

mod files;
mod log;

use std::convert::Infallible;
use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::error::PublishError;
use files::Files;
use log::AccessLog;

/// Connections served at the same time; further ones wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 1024;
/// A client must send its request headers within this time, also on an idle keep-alive connection.
const HEADER_TIMEOUT: Duration = Duration::from_secs(60);

/// A server bound to its address, not yet answering.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    files: Arc<Files>,
}

impl Server {
    /// Binds to `address` (`host:port`, port 0 for a free one) to serve `directory`.
    pub async fn bind(address: &str, directory: &Path) -> Result<Server, PublishError> {
        let files = Arc::new(Files::open(directory)?);
        let listener = TcpListener::bind(address).await.map_err(PublishError::local("listen on", address))?;
        Ok(Server { listener, files })
    }

    /// The address with its real port.
    pub fn local_addr(&self) -> Result<SocketAddr, PublishError> {
        self.listener.local_addr().map_err(PublishError::local("listen on", "the socket"))
    }

    /// Answers requests until the returned future is dropped.
    pub async fn run(self, access_log: impl Write + Send + 'static) {
        let log = Arc::new(AccessLog::start(access_log));
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let Ok(slot) = slots.clone().acquire_owned().await else { return };
            match self.listener.accept().await {
                Ok((stream, peer)) => {
                    let (files, log) = (self.files.clone(), log.clone());
                    tokio::spawn(async move {
                        converse(stream, peer, files, log).await;
                        drop(slot);
                    });
                }
                Err(error) => {
                    // out of descriptors, or a connection that was reset while queued: pause and go on
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

async fn converse(stream: TcpStream, peer: SocketAddr, files: Arc<Files>, log: Arc<AccessLog>) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "cannot set TCP_NODELAY");
    }
    let answer = service_fn(|request| {
        let (files, log) = (files.clone(), log.clone());
        async move {
            let started = std::time::Instant::now();
            let (response, sent) = files.answer(&request).await;
            log.record(&request, &response, sent, peer, started.elapsed());
            Ok::<_, Infallible>(response)
        }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), answer)
        .await;
    if let Err(error) = served {
        tracing::debug!(%peer, %error, "connection ended");
    }
}

#[cfg(test)]
mod tests;
