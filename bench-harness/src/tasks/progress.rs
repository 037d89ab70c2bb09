//! How far a training run is: a bar on a terminal, plain lines elsewhere.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use kavanam_model::train::StepReport;

/// Plain lines come at most this often.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// The progress of one run.
pub(crate) struct Progress {
    label: String,
    bar: ProgressBar,
    started: Instant,
    from: u64,
    last_line: Instant,
    tokens: u64,
    smoothed_loss: Option<f64>,
}

impl Progress {
    /// A run that goes on from step `from`.
    pub(crate) fn start(label: &str, from: u64) -> Progress {
        let style =
            ProgressStyle::with_template("{prefix:<14} {bar:30} {pos}/{len} steps  {msg}  {eta} left");
        let bar = ProgressBar::new(from + 1).with_prefix(label.to_owned());
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_position(from);
        bar.reset_eta();
        let now = Instant::now();
        let label = label.to_owned();
        Progress { label, bar, started: now, from, last_line: now, tokens: 0, smoothed_loss: None }
    }

    /// After each step of a run of `total` steps, as far as one knows.
    pub(crate) fn step(&mut self, report: &StepReport, total: u64) {
        let StepReport { step, loss, tokens, .. } = *report;
        self.tokens += tokens as u64;
        let smoothed = self.smoothed_loss.map_or(loss, |mean| mean + 0.02 * (loss - mean));
        self.smoothed_loss = Some(smoothed);
        let seconds = self.started.elapsed().as_secs_f64();
        let rate = self.tokens as f64 / seconds.max(1e-9);
        if !self.bar.is_hidden() {
            self.bar.set_message(format!("loss {smoothed:.3}  {rate:.0} tokens/s"));
            self.bar.set_length(total);
            self.bar.set_position(step);
        } else if self.last_line.elapsed() >= LINE_EVERY {
            self.last_line = Instant::now();
            let done = (step - self.from).max(1) as f64;
            let left = seconds / done * total.saturating_sub(step) as f64;
            eprintln!(
                "{}: step {step}/{total}, loss {smoothed:.3}, {rate:.0} tokens/s, {left:.0} s left",
                self.label
            );
        }
    }

    /// A line that stays.
    pub(crate) fn note(&self, text: &str) {
        if self.bar.is_hidden() {
            eprintln!("{}: {text}", self.label);
        } else {
            self.bar.println(format!("{:<14} {text}", self.label));
        }
    }

    /// At the end: the bar goes.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
