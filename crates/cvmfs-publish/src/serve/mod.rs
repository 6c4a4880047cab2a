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

use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use tokio::net::TcpListener;

use crate::error::PublishError;
use crate::http_server;
use files::Files;
use log::AccessLog;

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
        let files = self.files;
        let answer = move |request, peer| {
            let (files, log) = (files.clone(), log.clone());
            async move {
                let started = std::time::Instant::now();
                let (response, sent) = files.answer(&request).await;
                log.record(&request, &response, sent, peer, started.elapsed());
                response
            }
        };
        http_server::serve(self.listener, answer).await;
    }
}

#[cfg(test)]
mod tests;
