//! Ctrl-C and SIGTERM: stop in good order, leave nothing half-done.

use cvmfs_publish::Interrupt;
use registry::Canceller;
use tokio::signal::unix::{SignalKind, signal};

use crate::wishes::Bell;

/// Exit code of a program that was interrupted.
const INTERRUPTED: i32 = 130;

/// From now on the first SIGINT, SIGTERM or SIGHUP ends all waits for registries and
/// asks the publisher to stop; the second one ends the process. Either is safe: what
/// was not committed is not published.
pub(super) fn cancel_on_signal(cancellers: &[Canceller], interrupt: Option<&Interrupt>) {
    let cancellers = cancellers.to_vec();
    let interrupt = interrupt.cloned();
    on_signal(move || {
        let is_in_time = interrupt.is_none_or(|interrupt| interrupt.request());
        cancellers.iter().for_each(Canceller::cancel);
        is_in_time
    });
}

/// The same for a loop.
pub(super) fn stop_on_signal(bell: &Bell) {
    let bell = bell.clone();
    on_signal(move || bell.stop());
}

/// `stop` says whether it came in time.
fn on_signal(stop: impl FnOnce() -> bool + Send + 'static) {
    let watch = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            next_signal().await?;
            eprintln!("docker2cvmfs: stopping");
            if !stop() {
                eprintln!("docker2cvmfs: the revision is being published, finishing that");
            }
            next_signal().await?;
            std::process::exit(INTERRUPTED)
        })
    };
    let started = std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        let ended: std::io::Result<()> = watch();
        if let Err(error) = ended {
            tracing::warn!(%error, "signals cannot be watched; Ctrl-C ends the program at once");
        }
    });
    if let Err(error) = started {
        tracing::warn!(%error, "signals cannot be watched; Ctrl-C ends the program at once");
    }
}

async fn next_signal() -> std::io::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        _ = hang_up.recv() => {}
    }
    Ok(())
}
