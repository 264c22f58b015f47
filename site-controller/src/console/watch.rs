//! Progress of long work, on a terminal as steps and bars, elsewhere as plain lines. The one home of indicatif.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{self, IsTerminal};

/// Shows work as it goes on; everything goes to stderr, so that stdout holds the result alone.
pub struct Display {
    bar: Option<ProgressBar>,
    /// The step whose bytes the bar shows.
    current: String,
    quiet: bool,
}

impl Display {
    /// `quiet`: nothing but errors (for `--json`).
    pub fn new(quiet: bool) -> Self {
        let bar = (!quiet && io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            bar.set_style(style("{spinner} {msg}"));
            bar.enable_steady_tick(std::time::Duration::from_millis(120));
            bar
        });
        Self { bar, current: String::new(), quiet }
    }

    pub fn step(&mut self, step: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("  {step}")),
            None if !self.quiet => eprintln!("{step}"),
            None => {}
        }
        if let Some(bar) = &self.bar {
            bar.set_style(style("{spinner} {msg}"));
            bar.set_message(step.to_owned());
        }
        self.current.clear();
    }

    pub fn bytes(&mut self, step: &str, done: u64, total: u64) {
        let Some(bar) = &self.bar else { return };
        if self.current != step {
            step.clone_into(&mut self.current);
            bar.set_style(style("{spinner} {msg:16} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}"));
            bar.set_message(step.to_owned());
        }
        bar.set_length(total);
        bar.set_position(done);
    }

    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    // The templates stand above; a wrong one is shown as the default style.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
