//! Progress of long work on standard error: a bar on a terminal, a line now and then otherwise.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cvmfs_publish::Counters;
use indicatif::{HumanBytes, HumanCount, ProgressBar, ProgressDrawTarget, ProgressStyle};

const REDRAW: Duration = Duration::from_millis(100);
/// Between two plain lines; short work prints none.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);

/// Shows the counters until it is dropped.
#[derive(Debug)]
pub(crate) struct Progress {
    stop: Option<Sender<()>>,
    shower: Option<JoinHandle<()>>,
}

impl Progress {
    pub(crate) fn start(counters: Arc<Counters>) -> Progress {
        let (stop, stopped) = channel::<()>();
        let show = move || {
            let terminal = std::io::stderr().is_terminal();
            let started = Instant::now();
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed} {msg}") {
                bar.set_style(style);
            }
            let interval = if terminal { REDRAW } else { PLAIN_INTERVAL };
            while stopped.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                if terminal {
                    bar.set_message(line(&counters));
                    bar.tick();
                } else {
                    eprintln!("{} s: {}", started.elapsed().as_secs(), line(&counters));
                }
            }
            bar.finish_and_clear();
        };
        Progress { stop: Some(stop), shower: Some(std::thread::spawn(show)) }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(shower) = self.shower.take() {
            let _ = shower.join();
        }
    }
}

/// What there is to tell so far: a check stores nothing, a collection only deletes.
fn line(counters: &Counters) -> String {
    let count = |value: &AtomicU64, what: &str| (value.load(Ordering::Relaxed), what.to_owned());
    let parts = [
        count(&counters.entries, "entries"),
        count(&counters.new_objects, "new objects"),
        count(&counters.removed_objects, "objects deleted"),
    ];
    let mut text: Vec<String> = parts
        .into_iter()
        .filter(|(value, what)| *value > 0 || what == "entries")
        .map(|(value, what)| format!("{} {what}", HumanCount(value)))
        .collect();
    for (value, what) in [count(&counters.bytes_in, "read"), count(&counters.bytes_stored, "stored")] {
        if value > 0 {
            text.push(format!("{} {what}", HumanBytes(value)));
        }
    }
    text.join(", ")
}
