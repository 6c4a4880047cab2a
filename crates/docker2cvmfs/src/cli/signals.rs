//! Ctrl-C and SIGTERM: stop in good order, leave nothing half-done.

use cvmfs_publish::Interrupt;
use registry::Canceller;
use tokio::signal::unix::{SignalKind, signal};

/// Exit code of a program that was interrupted.
const INTERRUPTED: i32 = 130;

/// From now on the first SIGINT, SIGTERM or SIGHUP ends all waits for registries and
/// asks the publisher to stop; the second one ends the process. Either is safe: what
/// was not committed is not published.
pub(super) fn cancel_on_signal(cancellers: &[Canceller], interrupt: Option<&Interrupt>) {
    let cancellers = cancellers.to_vec();
    let interrupt = interrupt.cloned();
    let watch = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            next_signal().await?;
            let too_late = interrupt.is_some_and(|interrupt| !interrupt.request());
            if too_late {
                eprintln!("docker2cvmfs: the revision is being published, finishing that");
            } else {
                eprintln!("docker2cvmfs: stopping");
            }
            cancellers.iter().for_each(Canceller::cancel);
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
