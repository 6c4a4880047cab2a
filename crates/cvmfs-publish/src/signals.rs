//! SIGINT and SIGTERM: a publish stops before its commit, or completes it.

use std::time::Duration;

use cvmfs_publish::{Interrupt, PublishError};
use tokio::signal::unix::{SignalKind, signal};

/// How long an interrupted publish may take to end by itself, which also removes its work files. A read from a
/// silent pipe would never end.
const GRACE: Duration = Duration::from_secs(2);
/// Exit code after SIGINT by the shell's convention.
const INTERRUPTED: i32 = 130;

/// From now on a signal requests `interrupt`; the process ends even if the publish does not notice.
pub(crate) fn interrupt_on_signal(interrupt: Interrupt) -> Result<(), PublishError> {
    let failed = |source| PublishError::Local { action: "watch", path: "signals".into(), source };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let guard = runtime.enter();
    let stopped = stopped().map_err(failed)?;
    drop(guard);
    std::thread::spawn(move || {
        runtime.block_on(async {
            stopped.await;
            if interrupt.request() {
                tokio::time::sleep(GRACE).await;
                eprintln!("error: interrupted: nothing was published");
                std::process::exit(INTERRUPTED);
            }
            tracing::warn!("too late to stop: the revision is being published");
        });
    });
    Ok(())
}

/// Completes at the first SIGINT or SIGTERM.
pub(crate) fn stopped() -> std::io::Result<impl Future<Output = ()> + Send> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}
