//! Progress on stderr and interruption by Ctrl-C.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::failure::Failure;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
static QUIET: AtomicBool = AtomicBool::new(false);
static VERBOSE: AtomicBool = AtomicBool::new(false);

/// Makes Ctrl-C set a flag that [`check`] looks at; a second Ctrl-C ends the process at once with 130.
pub fn catch_interrupts() -> anyhow::Result<()> {
    ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
    })?;
    Ok(())
}

/// Whether the user has asked to stop.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// An error when the user has asked to stop: call it once a step in every long loop.
pub fn check() -> anyhow::Result<()> {
    if interrupted() { Err(Failure::Interrupted.into()) } else { Ok(()) }
}

/// `--quiet`: no progress bars and no notes.
pub fn set_quiet(quiet: bool) {
    QUIET.store(quiet, Ordering::SeqCst);
}

/// Whether the user asked for no progress and no notes.
pub fn is_quiet() -> bool {
    QUIET.load(Ordering::SeqCst)
}

/// `--verbose`: each [`Stage`] is told, and lists in warnings are whole.
pub fn set_verbose(verbose: bool) {
    VERBOSE.store(verbose, Ordering::SeqCst);
}

/// Whether the user asked to be told everything.
pub fn is_verbose() -> bool {
    VERBOSE.load(Ordering::SeqCst)
}

/// A part of the work whose duration is told on stderr with `--verbose`.
pub struct Stage(&'static str, Instant);

impl Stage {
    /// Begins now.
    pub fn begin(what: &'static str) -> Self {
        Self(what, Instant::now())
    }

    /// Ends now: `time: 1.23 s loading the UNet`.
    pub fn end(self) {
        if is_verbose() {
            tell(format_args!("time: {:6.2} s {}", self.1.elapsed().as_secs_f64(), self.0));
        }
    }
}

/// A bar over `length` steps on stderr, with rate and time left; nothing is drawn when stderr is
/// not a terminal or the program was told to be quiet.
pub fn bar(length: u64, what: &'static str) -> ProgressBar {
    let target = if QUIET.load(Ordering::SeqCst) {
        ProgressDrawTarget::hidden()
    } else {
        ProgressDrawTarget::stderr()
    };
    let style = ProgressStyle::with_template("{prefix:>12} {bar:28} {pos}/{len} {per_sec} {eta} left {msg}")
        .expect("the template is constant and valid");
    ProgressBar::with_draw_target(Some(length), target).with_style(style).with_prefix(what)
}

/// A remark for the user on stderr: `note: …`, left out with `--quiet`.
pub fn note(text: impl std::fmt::Display) {
    if !QUIET.load(Ordering::SeqCst) {
        tell(format_args!("note: {text}"));
    }
}

/// A warning on stderr: `warning: …`.
pub fn warn(text: impl std::fmt::Display) {
    tell(format_args!("warning: {text}"));
}

/// An error on stderr: `error: …`.
pub fn error(error: &anyhow::Error) {
    tell(format_args!("error: {error:#}"));
}

/// A line on stderr. When stderr is closed, nobody is left who could be told of that: the work goes on.
fn tell(line: std::fmt::Arguments) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}
