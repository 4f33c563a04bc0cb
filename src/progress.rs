//! Progress on stderr, and signals that end the program.

use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::failure::Failure;

/// Number of SIGINT on every system that has it.
#[cfg(not(unix))]
const SIGINT: i32 = 2;

/// The signal that asked the program to end; 0 for none.
static SIGNAL: AtomicI32 = AtomicI32::new(0);
static QUIET: AtomicBool = AtomicBool::new(false);
static VERBOSE: AtomicBool = AtomicBool::new(false);

/// Makes the signals that ask a program to end set a flag that [`check`] reads: SIGINT (Ctrl-C), SIGTERM (`kill`,
/// Slurm, systemd, docker) and SIGHUP (a closed terminal, unless `nohup` ignores it). A second one ends the process at
/// once. The exit code is 128 plus the signal's number.
pub fn catch_interrupts() -> anyhow::Result<()> {
    #[cfg(unix)]
    {
        extern "C" fn on_signal(signal: libc::c_int) {
            if SIGNAL.swap(signal, Ordering::SeqCst) != 0 {
                // SAFETY: `_exit` may be called in a signal handler.
                unsafe { libc::_exit(128 + signal) };
            }
        }
        let handler: extern "C" fn(libc::c_int) = on_signal;
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            // SAFETY: both structures are plain data for which zeros are valid; the handler calls only an atomic and
            // `_exit`, which are safe in a signal handler.
            let installed = unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                libc::sigaction(signal, std::ptr::null(), &mut action);
                if signal == libc::SIGHUP && action.sa_sigaction == libc::SIG_IGN {
                    continue;
                }
                action = std::mem::zeroed();
                action.sa_sigaction = handler as usize;
                action.sa_flags = libc::SA_RESTART;
                libc::sigaction(signal, &action, std::ptr::null_mut())
            };
            anyhow::ensure!(installed == 0, "cannot catch signals: {}", std::io::Error::last_os_error());
        }
    }
    #[cfg(not(unix))]
    ctrlc::set_handler(|| {
        if SIGNAL.swap(SIGINT, Ordering::SeqCst) != 0 {
            std::process::exit(128 + SIGINT);
        }
    })?;
    Ok(())
}

/// Whether a signal has asked the program to end.
pub fn interrupted() -> bool {
    SIGNAL.load(Ordering::SeqCst) != 0
}

/// Returns [`Failure::Interrupted`] when a signal has asked the program to end. Every long loop calls it once a step.
pub fn check() -> anyhow::Result<()> {
    match SIGNAL.load(Ordering::SeqCst) {
        0 => Ok(()),
        signal => Err(Failure::Interrupted { signal: signal as u8, hint: None }.into()),
    }
}

/// `--quiet`: no progress bars and no notes.
pub fn set_quiet(quiet: bool) {
    QUIET.store(quiet, Ordering::SeqCst);
}

/// Whether `--quiet` was given.
pub fn is_quiet() -> bool {
    QUIET.load(Ordering::SeqCst)
}

/// `--verbose`: prints the time of each [`Stage`] and all names in warnings.
pub fn set_verbose(verbose: bool) {
    VERBOSE.store(verbose, Ordering::SeqCst);
}

/// Whether `--verbose` was given.
pub fn is_verbose() -> bool {
    VERBOSE.load(Ordering::SeqCst)
}

/// A part of the work whose duration is printed on stderr with `--verbose`.
pub struct Stage(&'static str, Instant);

impl Stage {
    /// Begins now.
    pub fn begin(what: &'static str) -> Self {
        Self(what, Instant::now())
    }

    /// Ends now: `time: 1.23 s loading the UNet`.
    pub fn end(self) {
        if is_verbose() {
            line(format_args!("time: {:6.2} s {}", self.1.elapsed().as_secs_f64(), self.0));
        }
    }
}

/// A bar over `length` steps on stderr, with rate and time left; hidden with `--quiet` and where
/// stderr is not a terminal.
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

/// Prints `note: …` on stderr, unless `--quiet` was given.
pub fn note(text: impl std::fmt::Display) {
    if !QUIET.load(Ordering::SeqCst) {
        line(format_args!("note: {text}"));
    }
}

/// Prints `warning: …` on stderr.
pub fn warn(text: impl std::fmt::Display) {
    line(format_args!("warning: {text}"));
}

/// Prints `error: …` on stderr.
pub fn error(error: &anyhow::Error) {
    line(format_args!("error: {error:#}"));
}

/// Prints a line on stderr. A closed stderr is not an error; the command continues.
fn line(text: std::fmt::Arguments) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}
