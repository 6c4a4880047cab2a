//! Progress of a conversion: bars on a terminal, plain lines otherwise, on stderr.

use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use registry::Descriptor;

/// Digits of a digest that people compare.
const SHORT_DIGEST: usize = 12;
/// Bars are redrawn this often.
const REFRESH: Duration = Duration::from_millis(200);

/// Where progress is shown.
#[derive(Debug, Clone)]
pub struct Progress(Kind);

#[derive(Debug, Clone)]
enum Kind {
    Silent,
    Lines,
    Bars(MultiProgress),
}

impl Progress {
    /// Nothing is shown.
    pub fn silent() -> Self {
        Self(Kind::Silent)
    }

    /// Bars if stderr is a terminal, otherwise lines.
    pub fn on_stderr() -> Self {
        if std::io::stderr().is_terminal() {
            Self(Kind::Bars(MultiProgress::with_draw_target(ProgressDrawTarget::stderr())))
        } else {
            Self(Kind::Lines)
        }
    }

    /// Shows that a piece of work begins or has ended.
    pub(crate) fn step(&self, text: &str) {
        match &self.0 {
            Kind::Silent => {}
            Kind::Lines => eprintln!("{text}"),
            Kind::Bars(bars) => drop(bars.println(text)),
        }
    }

    /// A meter for the download of a layer.
    pub(crate) fn layer(&self, blob: &Descriptor) -> LayerMeter {
        let name = short(blob);
        self.meter(format!("{name}: downloading"), format!("{name}: downloaded and verified"), blob.size)
    }

    /// A meter for an ingest, which has no known length.
    pub(crate) fn ingest(&self, blob: &Descriptor) -> LayerMeter {
        let name = short(blob);
        self.meter(format!("{name}: publishing"), format!("{name}: ready to be published"), blob.size)
    }

    fn meter(&self, begin: String, end: String, bytes: u64) -> LayerMeter {
        if let Kind::Lines = self.0 {
            self.step(&format!("{begin} ({})", HumanBytes(bytes)));
        }
        let bar = match &self.0 {
            Kind::Bars(bars) => {
                let style =
                    ProgressStyle::with_template("{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}");
                let bar = bars.add(ProgressBar::new(bytes)).with_message(begin);
                bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
                bar.enable_steady_tick(REFRESH);
                bar
            }
            _ => ProgressBar::hidden(),
        };
        LayerMeter { progress: self.clone(), bar, end }
    }
}

/// Progress of one layer.
#[derive(Debug)]
pub(crate) struct LayerMeter {
    progress: Progress,
    bar: ProgressBar,
    end: String,
}

impl LayerMeter {
    pub(crate) fn add(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
        self.progress.step(&self.end);
    }
}

impl Drop for LayerMeter {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

fn short(blob: &Descriptor) -> &str {
    blob.digest.hex().get(..SHORT_DIGEST).unwrap_or_default()
}
