//! The protocol server: HTTP/1.1 on a unix socket (graph driver plugin §4).
//!
//! Each connection is served on its own and never closed for being idle: the engine
//! would send a call that it repeats with an empty body. A call's body is read to its
//! end before it is answered. The driver's work blocks, so it runs on threads; the
//! streams of `Diff` and `ApplyDiff` reach them through bounded channels, and any
//! number of calls may run at once, which a commit needs: it feeds one `Diff` into one
//! `ApplyDiff`.

mod calls;
mod operator;
mod stream;

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::plugin::Plugin;

pub use operator::CallCounters;

/// After SIGTERM the engine waits 10 s before it kills; calls get this long to end.
const DRAIN_TIME: Duration = Duration::from_secs(8);
/// Pause after a failed accept, which means that file descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves `plugin` on `listener` until `stop` becomes true; then no new call is taken
/// and those that run get [`DRAIN_TIME`].
pub async fn serve(listener: UnixListener, plugin: Arc<Plugin>, mut stop: watch::Receiver<bool>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(connection(stream, Arc::clone(&plugin), stop.clone()));
                }
                Err(error) => {
                    tracing::error!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
            () = stopped(&mut stop) => break,
        }
    }
    drop(listener);
    let drained = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(DRAIN_TIME, drained).await.is_err() {
        tracing::warn!("stopping although calls are still running");
    }
}

async fn connection(stream: UnixStream, plugin: Arc<Plugin>, mut stop: watch::Receiver<bool>) {
    let service = service_fn(move |request| {
        let plugin = Arc::clone(&plugin);
        async move { Ok::<_, Infallible>(calls::answer(plugin, request).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .header_read_timeout(None)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let mut stopping = false;
    loop {
        tokio::select! {
            ended = &mut connection => {
                if let Err(error) = ended {
                    // The engine hung up, or a stream was cut because the driver failed.
                    tracing::debug!(%error, "connection ended");
                }
                return;
            }
            () = stopped(&mut stop), if !stopping => {
                stopping = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    // An error means that the sender is gone: then nobody can stop the server any more.
    if stop.wait_for(|&stop| stop).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Binds the socket, replacing one that a killed process left behind.
///
/// # Errors
/// The system's.
pub fn bind(path: &std::path::Path) -> io::Result<std::os::unix::net::UnixListener> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if std::os::unix::fs::FileTypeExt::is_socket(&metadata.file_type()) => {
            if std::os::unix::net::UnixStream::connect(path).is_ok() {
                return Err(io::Error::new(
                    io::ErrorKind::AddrInUse,
                    "another process listens on this socket",
                ));
            }
            std::fs::remove_file(path)?;
        }
        Ok(_) => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is not a socket"));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let listener = std::os::unix::net::UnixListener::bind(path)?;
    // Whoever may connect can mount and delete: root only.
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}
