//! Standard output of the commands.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write};

use anyhow::{Context, Result};

/// Options that every command takes.
#[derive(Clone, Debug, clap::Args)]
pub struct Output {
    /// Print results as JSON on stdout.
    #[arg(help_heading = "Global options", long, global = true, env = "DIFFLORA_JSON")]
    pub json: bool,
    /// Suppress progress bars and notes on stderr.
    #[arg(help_heading = "Global options", long, short, global = true, env = "DIFFLORA_QUIET")]
    pub quiet: bool,
    /// Replace existing images and LoRAs that difflora did not write. Its own are always replaced.
    #[arg(help_heading = "Global options", long, global = true, env = "DIFFLORA_OVERWRITE")]
    pub overwrite: bool,
    /// Largest image that is read, in megapixels.
    #[arg(help_heading = "Global options", long, global = true, value_name = "N", default_value_t = crate::image::MAX_MEGAPIXELS, value_parser = clap::value_parser!(u32).range(1..=4000), env = "DIFFLORA_MAX_MEGAPIXELS")]
    pub max_megapixels: u32,
    /// Print the time of each stage, and all names in warnings instead of the first ten.
    #[arg(help_heading = "Global options", long, short, global = true, env = "DIFFLORA_VERBOSE")]
    pub verbose: bool,
}

/// Prints a line on standard output, as `println!` does, but never panics.
///
/// A closed pipe (`difflora lora inspect FILE | head`) is not an error; the command continues.
///
/// # Errors
/// Standard output cannot be written for another reason, for example a full disk behind `> FILE`.
macro_rules! print_line {
    ($($part:tt)*) => { $crate::commands::output::print(format_args!("{}\n", format_args!($($part)*))) };
}
pub(crate) use print_line;

/// Prints text without a line end; see [`print_line`].
///
/// # Errors
/// As there.
pub fn print(text: Arguments) -> Result<()> {
    // The test harness captures what the macros of the standard library print, and nothing else.
    if cfg!(test) {
        std::print!("{text}");
        return Ok(());
    }
    let mut stdout = std::io::stdout().lock();
    match stdout.write_fmt(text).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written.context("cannot write to the standard output"),
    }
}
